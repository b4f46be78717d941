"""An experiment as Slurm jobs on a cluster of one process: the same results as without, whatever is killed or fails."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lingraft.config import Experiment, load_experiment
from lingraft.locating import locate
from lingraft.plan import Plan, make_plan
from lingraft.report.results import results
from lingraft.runner import run
from lingraft.slurm import Options, export
from lingraft.store import Store
from tests.fake_slurm import Cluster, keys_of, waited_for
from tests.integration.test_pipeline import make_experiment

FEW = [
    "targets=[sw]",
    "seeds=[0]",
    "methods=[eng-ft, adamergex]",
    "selection.weights=[1.0]",
    "training.epochs=1",
    "evaluation.source=false",
    "resources.cpus=1",
]
BREAKING = """
import os, sys
if "--only" in sys.argv and os.environ.get("BROKEN") in sys.argv[sys.argv.index("--only") + 1].split(","):
    sys.exit("this node is broken")
from lingraft.cli import main
main()
"""


class Exported:
    def __init__(self, folder: Path, model: Path, **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.experiment: Experiment = load_experiment(make_experiment(folder, model), FEW)
        (folder / "breaking.py").write_text(BREAKING, encoding="utf-8")
        self.options = Options(command=(sys.executable, str(folder / "breaking.py")), **options)
        self.located = locate(self.experiment.backbone)
        self.store, self.out = Store(folder / "store"), folder / "out"
        self.cluster = Cluster(folder / "cluster")
        self.found = self.again()

    @property
    def plan(self) -> Plan:
        return make_plan(self.experiment, self.located)

    def again(self) -> dict[str, Any]:
        return export(self.plan, self.store, self.located, self.out, self.options)

    def submit(self) -> None:
        submitted = self.cluster.submit(self.found["submit"])
        assert submitted.returncode == 0, submitted.stderr


def scores(out: Path) -> dict[str, Any]:
    found = results(out)
    return {name: method["languages"] for name, method in found["methods"].items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The experiment carried out by one process."""
    folder = tmp_path_factory.mktemp("plain")
    run(load_experiment(make_experiment(folder, tiny_folder), FEW), folder / "out")
    return folder


@pytest.mark.full
def test_killed_tasks_go_on_and_the_results_are_those_of_a_plain_run(
    plain: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    exported = Exported(tmp_path / "with blanks", tiny_folder)
    train = next(step for step in exported.plan.steps if step.kind == "train")
    working = exported.store.path("train", train.key).parent

    def kill(task: Any) -> int | None:
        if task.restarts or task.number is None or train.key not in running(task):
            return None
        waited_for(working, f"*{train.key}*")
        return signal.SIGKILL

    exported.cluster.during = kill
    exported.submit()
    statuses = exported.cluster.run()
    assert set(statuses.values()) == {0}, {name: exported.cluster.log(name) for name in statuses if statuses[name]}
    assert sum(task.restarts for task in exported.cluster.tasks) == 1
    assert all(exported.store.has(step.kind, step.key) for step in exported.plan.steps)
    assert scores(exported.out) == scores(plain / "out")
    assert (exported.out / "report.md").is_file()
    # Nothing is pending: another export submits the report alone.
    assert exported.again()["arrays"] == []


@pytest.mark.full
def test_what_a_failed_task_does_not_touch_is_finished_and_the_rest_exported_again(
    plain: Path, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = Exported(tmp_path, tiny_folder)
    broken = next(step for step in exported.plan.steps if step.kind == "train" and step.config["language"] == "id")
    monkeypatch.setenv("BROKEN", broken.key)
    exported.submit()
    statuses = exported.cluster.run()
    assert statuses["tiny-finish"] == 1 and "did not end well" in exported.cluster.log("tiny-finish")
    lacking = {broken.key}
    for step in exported.plan.steps:
        if any(needed.key in lacking for needed in step.inputs.values()):
            lacking.add(step.key)
    unfinished = {s.key for s in exported.plan.steps if not exported.store.has(s.kind, s.key)}
    assert unfinished == lacking and len(lacking) < len(exported.plan.steps) - 4
    logs = [exported.cluster.log(name) for name in statuses if statuses[name]]
    assert any("needs" in log and "not finished" in log for log in logs)
    monkeypatch.delenv("BROKEN")
    exported.found = exported.again()
    assert exported.found["steps"] == len(lacking)
    exported.cluster = Cluster(tmp_path / "second")
    exported.submit()
    assert set(exported.cluster.run().values()) == {0}
    assert scores(exported.out) == scores(plain / "out")


def test_what_runs_is_what_was_exported_and_changed_data_are_said(tmp_path: Path, tiny_folder: Path) -> None:
    exported = Exported(tmp_path, tiny_folder)
    (tmp_path / "tiny.yaml").write_text("name: other\n", encoding="utf-8")
    path = exported.out / "slurm/experiment.yaml"
    again = load_experiment(path)
    assert {s.key for s in make_plan(again, locate(again.backbone)).steps} == {s.key for s in exported.plan.steps}
    (wave,) = (exported.out / "slurm").glob("steps-01-cpu-*.txt")
    key = keys_of(wave.read_text(encoding="utf-8"))[0]
    with (tmp_path / "data/en/train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "more", "text": "goal", "label": "sport"}) + "\n")
    with (tmp_path / "data/sw.txt").open("a", encoding="utf-8") as file:
        file.write("mto mlima\n")
    command = [sys.executable, "-m", "lingraft.cli", "run", str(path), "--store", str(tmp_path / "store")]
    ended = subprocess.run([*command, "--only", key], capture_output=True, text=True, env=os.environ, check=False)
    assert ended.returncode == 2 and "has no step" in ended.stderr and "have changed" in ended.stderr


def running(task: Any) -> list[str]:
    """The keys of a task's line."""
    name = task.job["text"].splitlines()[-1].split()[1]
    return keys_of((Path(task.job["cwd"]) / f"{name}.txt").read_text(encoding="utf-8").splitlines()[task.number - 1])
