"""Arithmetic, planning, reporting and help need neither torch nor transformers, and do not import them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.adapters import FEW, write_adapter

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets")
LIGHT = [
    "lingraft",
    "lingraft.adapter",
    "lingraft.cli",
    "lingraft.commands",
    "lingraft.families",
    "lingraft.merging",
    "lingraft.plan",
    "lingraft.report.results",
    "lingraft.report.tables",
    "lingraft.report.terminal",
    "lingraft.runner",
    "lingraft.store",
]


def heavy_after(code: str) -> list[str]:
    """The heavy packages that a fresh Python has imported after running the code."""
    report = f"import json, sys; print(); print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_check_sees_a_heavy_import() -> None:
    assert heavy_after("import sys; sys.modules['torch'] = sys") == ["torch"]


@pytest.mark.parametrize("module", LIGHT)
def test_importing_leaves_the_heavy_libraries_out(module: str) -> None:
    assert heavy_after(f"import {module}") == []


@pytest.mark.parametrize("names", ["Adapter, Divergence, transfer", "load_experiment, run"])
def test_light_public_names_stay_light(names: str) -> None:
    assert heavy_after(f"from lingraft import {names}") == []


def test_every_public_name_is_there() -> None:
    import lingraft

    assert sorted(lingraft.__all__) == dir(lingraft)
    assert all(getattr(lingraft, name) is not None for name in lingraft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'grft'"):
        _ = lingraft.grft


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["merge", "--help"], ["report", "--help"]], ids=str)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
from lingraft.cli import main
try:
    main({arguments!r}, standalone_mode=True)
except SystemExit as end:
    assert end.code == 0, end.code
else:
    raise AssertionError("the command line did not end")
"""
    assert heavy_after(code) == []


def test_merging_on_the_command_line_imports_nothing_heavy(tmp_path: Path) -> None:
    named = enumerate(("task", "target-ref", "source-ref"))
    options = [part for seed, n in named for part in (f"--{n}", str(write_adapter(tmp_path / n, seed, shapes=FEW)))]
    arguments = ["merge", *options, "--weight", "0.5", "--space", "product", "--verify", "--out", str(tmp_path / "out")]
    assert heavy_after(f"from lingraft.cli import main\nmain({arguments!r}, standalone_mode=False)") == []
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
