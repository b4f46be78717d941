"""What the benchmarks share: ways that run in turn, processes of their own, peak memory, peers' environments, tables.

Only the standard library is imported here: peers' environments, which run the same files, have no lingraft.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ENVIRONMENTS = HERE.parent / ".bench"
Times = dict[str, dict[str, Any]]


# Where and of what


def versions(*names: str) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float | None:
    """The machine's memory."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((round(int(line.split()[1]) / 2**20, 1) for line in lines if line.startswith("MemTotal:")), None)


def machine(*packages: str) -> dict[str, Any]:
    """The processor, its cores, Python and the packages asked for."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions(*packages),
    }


def commit() -> str:
    """The commit of the sources, and whether they were changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "../src")
    return git("rev-parse", "--short", "HEAD") + (" and changes not committed" if changed else "")


def heading(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What stands at the head of every result: machine, commit, date, threads, rounds."""
    return {
        "machine": machine("numpy", "torch", "transformers", "peft", "accelerate") | {"memory_gib": memory_gib()},
        "commit": commit(),
        "date": time.strftime("%B %Y"),
        "threads": options.threads,
        "rounds": options.rounds,
        **more,
    }


# Options and results


def arguments(description: str | None, out: str, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that all of them have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny random models: shows only that all of it runs")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    return parser


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Writes a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, least and most."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def in_turn(ways: Mapping[str, Callable[[], Any]], rounds: int, before: Callable[[], Any] | None = None) -> Times:
    """Seconds of the ways, each run once unmeasured and then once a round; `before` is called before every run, unmeasured."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            if before is not None:
                before()
            began = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: spread(found) for name, found in times.items()}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Memory


def memory(field: str) -> int | None:
    """A field of what Linux says of this process's memory, in bytes; None elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def mib(size: float | None) -> int | None:
    """Bytes as MiB."""
    return None if size is None else round(size / 2**20)


def peak_memory() -> int | None:
    """The most this process has held, in MiB; ru_maxrss would count what its parent held when it was started, too."""
    return mib(memory("VmHWM"))


def forget_peak() -> None:
    """Lets the peak begin at what is held now."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


# Processes of their own


def surroundings(threads: int) -> dict[str, str]:
    """The environment of a process: so many threads, and nothing is fetched."""
    count = str(threads)
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, **fixed}


def alone(python: Path | str, script: str, *given: str, threads: int) -> Any:
    """The last line that a script prints, run in a process of its own, as JSON."""
    command = [str(python), script, *given]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=surroundings(threads))
    return json.loads(done.stdout.splitlines()[-1])


class Worker:
    """A script in a process of its own that does one thing each time it is asked.

    Processes with models of their own take turns step by step: whoever is not asked sleeps.
    """

    def __init__(self, python: Path | str, script: str, *given: str, threads: int) -> None:
        self._process = subprocess.Popen(
            [str(python), script, *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=surroundings(threads),
        )
        self.ready: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended with {self._process.wait()}")
        return json.loads(line)

    def ask(self, what: str, **more: Any) -> dict[str, Any]:
        """Has it do something, and waits for what it says."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def workers(made: Mapping[str, Callable[[], Worker]]) -> Iterator[dict[str, Worker]]:
    """Starts workers one after the other, and ends all of them."""
    with ExitStack() as stack:
        found = {}
        for name, make in made.items():
            found[name] = worker = make()
            stack.callback(worker.close)
        yield found


class Asked:
    """A worker's own end. What libraries print goes to the standard error instead."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **values: Any) -> None:
        """Answers."""
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()

    def wait(self) -> dict[str, Any]:
        """What is asked next; ends the process when nobody will ask any more."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        return json.loads(line)


# Peers


def pins(name: str) -> dict[str, str]:
    """The versions that a peer's environment is to have."""
    lines = (HERE / "peers" / f"{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def peer(name: str) -> Path:
    """The interpreter of a peer's environment, which is made first where it is not there.

    torch is linked from this environment where it is of the pinned version: then the same torch runs on both sides, and a
    gigabyte is not fetched again. Everything else is installed.

    Raises:
        SystemExit: It has not the pinned versions.
    """
    folder = ENVIRONMENTS / name
    python, made = folder / "bin" / "python", folder / "pins.txt"
    wanted = (HERE / "peers" / f"{name}.txt").read_text()
    if not made.exists() or made.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"making {folder}", file=sys.stderr, flush=True)
        ENVIRONMENTS.mkdir(exist_ok=True)
        (ENVIRONMENTS / ".gitignore").write_text("*\n")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        _link_torch(python, pins(name)["torch"])
        requirements = str(HERE / "peers" / f"{name}.txt")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--requirement", requirements], check=True)
        made.write_text(wanted)
    ask = "import json, sys; from importlib.metadata import version; print(json.dumps([version(n) for n in sys.argv[1:]]))"
    expected = pins(name)
    said = subprocess.run([str(python), "-c", ask, *expected], capture_output=True, text=True, check=True).stdout
    for package, found in zip(expected, json.loads(said), strict=True):
        if found.partition("+")[0] != expected[package]:
            raise SystemExit(f"{folder}: {package} {found} instead of {expected[package]}; remove the folder")
    return python


def _link_torch(python: Path, wanted: str) -> None:
    """Links this environment's torch into another, if it is of the version that is wanted."""
    found = versions("torch").get("torch", "")
    if found.partition("+")[0] != wanted:
        return
    import sysconfig

    ours = Path(sysconfig.get_paths()["purelib"])
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    theirs = Path(subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    for part in ours.iterdir():
        if re.fullmatch(r"torch|torchgen|functorch|torch-.*\.dist-info|nvidia.*|triton.*", part.name):
            (theirs / part.name).symlink_to(part)


# Data


def rows_of(task: str, language: str, split: str, data: Path | None, limit: int) -> tuple[list[Any], str]:
    """Items of a task, and what they are: the user's data, or the bundled sentences."""
    from lingraft.tasks.items import subset
    from lingraft.tasks.sources import BUNDLED
    from lingraft.tasks.table import find_task

    found = find_task(task)
    items = found.examples(found.sources(language, split, data or BUNDLED), language=language)
    chosen = subset(items, limit)
    name = {"topics": "SIB-200", "xcopa": "XCOPA"}.get(task, task) if data else "lingraft's bundled topics"
    return chosen, f"{name} {language}, {split}, {len(chosen)} items"


def data_option(parser: argparse.ArgumentParser) -> None:
    """`--data-dir`."""
    parser.add_argument("--data-dir", type=Path, help="upstream files of the data sets; absent: the bundled sentences")


# Models


def tiny_model(folder: Path, words: int = 0, dtype: str = "float32", **sizes: int) -> Path:
    """Writes a random Llama with a tokenizer of bytes: two layers, 32 wide, unless told otherwise."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    usual = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    config = LlamaConfig(
        **{**usual, **sizes},
        vocab_size=words or len(vocabulary),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, 0.02 if sizes else 0.2, generator=generator)
    model.save_pretrained(folder)
    return folder
