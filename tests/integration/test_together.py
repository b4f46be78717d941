"""An experiment whose trainings share passes through the model is the experiment of trainings one by one."""

import json
from pathlib import Path
from typing import Any

import pytest

from lingraft import execution, stepping
from lingraft.config import Experiment, load_experiment
from lingraft.errors import DataError, Interrupted, RunFailed
from lingraft.estimating import estimates
from lingraft.locating import locate
from lingraft.plan import Step, make_plan
from lingraft.report.results import results
from lingraft.runner import Events, pending, run
from lingraft.store import Store, read_json
from tests.integration.test_pipeline import make_experiment

LESS = ["methods=[vanilla,eng-ft,tgt-ft,adamergex,control-sequential]", "training.learning_rate=0.002", "targets=[sw]"]


def load(path: Path, *overrides: str) -> Experiment:
    return load_experiment(path, [*LESS, *overrides])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    return make_experiment(tmp_path_factory.mktemp("experiment"), tiny_folder)


@pytest.fixture(scope="module")
def alone(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(load(path), folder / "out")
    return folder


def keys(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder / "store")) for p in (folder / "store").glob("*/*/step.json"))


def predictions(folder: Path) -> dict[str, list[Any]]:
    return {
        str(p.relative_to(folder)): [json.loads(line) for line in p.read_text().splitlines()]
        for p in sorted((folder / "store").glob("predict/*/predictions.jsonl"))
    }


def assert_close(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_close(ours[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=0.01, abs=0.02)
    else:
        assert ours == theirs


def test_the_same_steps_and_the_same_answers(path: Path, alone: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    at: list[tuple[int, int, str]] = []
    events = Events(
        step=lambda step, number, total: told.append((step.label, number)),
        progress=lambda step, done, total, note, loss: at.append((done, total, note)),
    )
    run(load(path, "speed.together=3"), tmp_path / "out", events=events)
    assert keys(tmp_path) == keys(alone)
    assert [number for _, number in told] == list(range(1, len(told) + 1))
    assert_close(predictions(tmp_path), predictions(alone))
    together = [note for *_, note in at if "together" in note]
    assert any("3 together" in note for note in together)
    records = [read_json(p) for p in (tmp_path / "store").glob("train/*/step.json")]
    counts = {record["environment"].get("together", 1) for record in records}
    assert 3 in counts and max(counts) == 3
    for record in records:
        other = read_json(alone / "store/train" / _key(record, alone) / "step.json")
        assert {k: record[k] for k in ("config", "inputs", "label", "steps", "tokens")} == {
            k: other[k] for k in ("config", "inputs", "label", "steps", "tokens")
        }
        assert sorted(record["files"]) == sorted(other["files"])
    assert_close(results(tmp_path / "out")["methods"], results(alone / "out")["methods"])


def _key(record: dict[str, Any], folder: Path) -> str:
    found = [
        p.parent.name
        for p in (folder / "store").glob("train/*/step.json")
        if all(read_json(p)[k] == record[k] for k in ("config", "inputs", "reads"))
    ]
    assert len(found) == 1
    return found[0]


def test_a_killed_group_is_finished_by_either(path: Path, alone: Path, tmp_path: Path) -> None:
    count = 0

    def stop(step: Step, done: int, total: int, note: str, loss: float | None) -> None:
        nonlocal count
        count += "together" in note
        if count == 4:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"interrupted during '.*', '.*' \("):
        run(load(path, "speed.together=4"), tmp_path / "out", events=Events(progress=stop))
    assert list((tmp_path / "store/train").glob(".*.partial"))
    run(load(path), tmp_path / "out")
    assert keys(tmp_path) == keys(alone)
    assert_close(predictions(tmp_path), predictions(alone))


def test_one_of_a_group_that_fails_stops_what_depends_on_it_alone(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = execution._sequences, []

    def failing(step: Step, *args: Any) -> Any:
        if "reference" in step.config and step.config["language"] == "sw":
            raise DataError("the text is gone")
        return real(step, *args)

    monkeypatch.setattr(execution, "_sequences", failing)
    events = Events(failure=lambda step, error: failed.append((step, str(error))))
    with pytest.raises(RunFailed, match="that depend on them did not run"):
        run(load(path, "speed.together=5"), tmp_path / "out", events=events)
    assert {error for _, error in failed} == {"the text is gone"}
    config = load(path)
    plan = make_plan(config, locate(config.backbone))
    left = pending(plan, Store(tmp_path / "store"))
    lost = {step.key for step, _ in failed}
    for step in plan.steps:
        if any(needed.key in lost for needed in step.inputs.values()):
            lost.add(step.key)
    assert {step.key for step in left} == lost


def test_a_training_that_goes_on_from_another_waits_for_it(path: Path, tmp_path: Path) -> None:
    order: list[Step] = []
    run(load(path, "speed.together=99"), tmp_path / "out", events=Events(step=lambda step, *_: order.append(step)))
    there: set[str] = set()
    for step in order:
        assert {needed.key for needed in step.inputs.values()} <= there
        there.add(step.key)
    assert any("start_from" in step.inputs for step in order)


def test_a_model_that_mixes_rows_is_trained_on_one_by_one(
    path: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepping, "_rows_of", lambda drawn: 2)  # As if a layer read other rows than the batch has.
    run(load(path, "speed.together=3"), tmp_path / "out")
    records = [read_json(p) for p in (tmp_path / "store").glob("train/*/step.json")]
    assert records and all("together" not in record["environment"] for record in records)
    assert keys(tmp_path) == keys(alone)


def test_an_estimate_knows_that_time_was_shared(path: Path, tmp_path: Path) -> None:
    config = load(path, "speed.together=3")
    run(config, tmp_path / "out")
    located, store = locate(config.backbone), Store(tmp_path / "store")
    plan = make_plan(config, located)
    more = make_plan(load(path, "seeds=[0,1,2]"), located)
    before = estimates(more, store, located)["seconds"]
    for record in (tmp_path / "store").glob("train/*/step.json"):
        values = read_json(record)
        values["environment"].pop("together", None)
        del values["seal"]  # As records were before they had one.
        record.write_text(json.dumps(values))
    assert pending(plan, store) == []
    assert estimates(more, store, located)["seconds"] > before
