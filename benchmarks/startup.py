"""How long until a command says something, and in how much memory?

    .venv/bin/python benchmarks/startup.py [--quick] [--rounds 5] [--out benchmarks/results/startup.json]

Processes in turn: seconds until the first line and until the end, and the most memory held (of the process, as its parent is told
when it ends). `merge` is of three random adapters in the shape of the demo model's and runs to its end; `inspect` reads one;
"a loaded model" is all that `evaluate` imports, and the model in memory. Beside them Python alone, and what any tool on PEFT
imports.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

CLI = [sys.executable, "-c", "import sys; from lingraft.cli import main; sys.exit(main())"]
LOADED = """
import sys
from lingraft.commands import models
from lingraft.backbones import Backbone
from lingraft.config import BackboneConfig
from lingraft.locating import locate
from lingraft import evaluation, reading
Backbone(locate(BackboneConfig(model=sys.argv[1], device="cpu")))
print("loaded")
"""
PEER_LOADED = """
import sys, torch, peft, transformers
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print("loaded")
"""
ASIDE = """
import json, os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
process.stdout.read(1)
first = time.perf_counter() - began
process.stdout.read()
_, status, usage = os.wait4(process.pid, 0)
whole = time.perf_counter() - began
assert status == 0, sys.argv
print(json.dumps([first, whole, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)]))
"""
"""ru_maxrss of a process counts what its parent held when it was started: a small one stands between."""


def once(command: list[str], threads: int) -> tuple[float, float, float]:
    """Seconds to the first character, to the end, and bytes."""
    import json

    done = subprocess.run(
        [sys.executable, "-S", "-c", ASIDE, *command],
        capture_output=True,
        text=True,
        check=True,
        env=common.surroundings(threads),
    )
    first, whole, peak = json.loads(done.stdout.splitlines()[-1])
    return first, whole, peak


def commands(model: str, place: Path) -> dict[str, list[str]]:
    """What is started."""
    from grid import write_adapters
    from lingraft.backbones import Backbone
    from lingraft.config import BackboneConfig
    from lingraft.locating import locate

    backbone = Backbone(locate(BackboneConfig(model=model, device="cpu")))
    folders = write_adapters(backbone, place)
    task, target, source = (str(folders[name]) for name in ("task", "target", "source"))
    references = ["--task", task, "--target-ref", target, "--source-ref", source, "--weight", "0.6"]
    python = [sys.executable, "-c"]
    return {
        "Python alone": [*python, "print(0)"],
        "lingraft --help": [*CLI, "--help"],
        "lingraft inspect": [*CLI, "inspect", task],
        "lingraft merge": [*CLI, "merge", *references, "--out", str(place / "out")],
        "lingraft, a loaded model": [*python, LOADED, model],
        "import peft, transformers": [*python, "import peft, transformers; print(0)"],
        "transformers, a loaded model": [*python, PEER_LOADED, str(backbone.folder)],
    }


def measure(asked: dict[str, list[str]], options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """All of them in turn, the first time not counted."""
    import shutil

    said: dict[str, list[tuple[float, float, float]]] = {name: [] for name in asked}
    for turn in range(options.rounds + 1):
        for name, command in asked.items():
            shutil.rmtree(place / "out", ignore_errors=True)
            os.sync()
            found = once(command, options.threads)
            if turn:
                said[name].append(found)
    return {
        name: {
            "first_line": common.spread([first for first, _, _ in rows]),
            "whole": common.spread([whole for _, whole, _ in rows]),
            "peak_mib": common.mib(common.spread([peak for _, _, peak in rows])["median_s"]),
        }
        for name, rows in said.items()
    }


def main() -> None:
    parser = common.arguments(__doc__, "startup.json")
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if options.quick:
            options.model, options.rounds = str(common.tiny_model(place / "tiny")), 1
        asked = commands(options.model, place)
        if options.quick:
            asked = {name: asked[name] for name in ("lingraft --help", "lingraft merge")}
        found = common.heading(options, commands=measure(asked, options, place))
    common.write(options.out, found)
    for name, row in found["commands"].items():
        print(f"{name}: {row['first_line']['median_s']:.2f} s to the first line, {row['peak_mib']} MiB")
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
