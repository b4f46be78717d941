"""Arithmetic, planning, reporting and help need neither torch nor transformers, and do not import them."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import save_tiny_model
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


def heavy_after(code: str, among: Sequence[str] = HEAVY) -> list[str]:
    """Which of some packages a fresh Python has imported after running the code."""
    report = f"import json, sys; print(); print(json.dumps([m for m in {tuple(among)} if m in sys.modules]))"
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


DRAWN = ("matplotlib", "altair", "vl_convert")
DRAWING = (*DRAWN, "jinja2", "PIL")
TABLES = ("datasets", "pandas", "pyarrow", "scipy", "sklearn", "torchvision")
BESIDE_MODELS = tuple(name for name in TABLES if name != "scipy")
"""Of these, what is not imported with a model either; transformers' losses import scipy wherever it is installed."""
TRAINING = ("lingraft.training", "lingraft.stepping", "lingraft.lottery")
EXPERIMENT = """
name: small
backbone: {model: model, dtype: float32}
task: topics
targets: [sw]
development: [tr]
reference: {text: "udhr/{language}.txt"}
data_dir: bundled
"""
SWAHILI = "--model model --language sw --data-dir bundled --dtype float32 --out out"
VERBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tasks": ("tasks", (*HEAVY, *TABLES, *DRAWING, "numpy", "safetensors", "lingraft.plan")),
    "methods": ("methods", (*HEAVY, *TABLES, *DRAWING, "numpy", "safetensors", "lingraft.plan")),
    "schema": ("schema", (*HEAVY, *TABLES, *DRAWING, "numpy", "rich", "lingraft.plan")),
    "merge": (
        "merge --task task --target-ref target --source-ref source --weight 1 --out out",
        (*HEAVY, *TABLES, *DRAWING, "rich", "lingraft.plan"),
    ),
    "divergence": (
        "divergence --target-ref target --source-ref source --out out",
        (*HEAVY, *TABLES, *DRAWING, "rich", "lingraft.plan"),
    ),
    "inspect": ("inspect task target", (*HEAVY, *TABLES, *DRAWING, "lingraft.plan")),
    "plan": ("run experiment.yaml --dry-run --out out", (*HEAVY, *TABLES, *DRAWING, "lingraft.backbones")),
    "evaluate": (
        f"evaluate --task topics --limit 2 {SWAHILI}",
        (*BESIDE_MODELS, *TRAINING, *DRAWN, "peft", "lingraft.plan"),
    ),
    "train": (
        f"train --task clm --text udhr/{{language}}.txt {SWAHILI} training.epochs=0.1 reference.max_segments=4 "
        "reference.segment_tokens=32",
        (*BESIDE_MODELS, *DRAWN, "lingraft.evaluation", "lingraft.plan"),
    ),
}
"""By the verb, what is asked, and what it has no use for."""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment, a model and three adapters."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "experiment.yaml").write_text(EXPERIMENT)
    save_tiny_model(folder / "model")
    for seed, name in enumerate(("task", "target", "source")):
        write_adapter(folder / name, seed, shapes=FEW)
    return folder


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_imports_what_it_needs(asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(asked)
    text, absent = VERBS[name]
    arguments = [str(tmp_path / "out") if word == "out" else word for word in text.split()]
    code = f"from lingraft.cli import main\nmain({arguments!r}, standalone_mode=False)"
    assert heavy_after(code, absent) == []


def test_the_package_is_run_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "lingraft", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: lingraft ")
