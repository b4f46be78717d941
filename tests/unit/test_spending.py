"""What a run took, by its steps' records: sums, shares of trainings that ran together, and what older records do not say."""

import json
from pathlib import Path
from typing import Any

import pytest

from lingraft.report.results import results
from lingraft.report.spending import LONGEST, spending
from lingraft.store import Store
from tests.unit.test_report import make_run
from tests.unit.test_trainings import TASK, key, with_steps


def spent(tmp_path: Path, *steps: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    run = with_steps(make_run(tmp_path), [(kind, record, "{}" if kind == "train" else None) for kind, record in steps])
    found = spending(run, results(run))
    json.dumps(found, allow_nan=False)
    return found


def test_sums_by_kind(tmp_path: Path):
    found = spent(
        tmp_path,
        ("train", {**TASK, "wall_seconds": 3.0, "seconds": 2.5, "tokens": 10}),
        ("train", {**TASK, "wall_seconds": 1.0, "tokens": 5}),
        ("predict", {"seconds": 0.5}),
    )
    train, predict = found["by_kind"]
    assert {k: train[k] for k in ("kind", "steps", "seconds", "tokens")} == {
        "kind": "train",
        "steps": 2,
        "seconds": 4.0,
        "tokens": 15,
    }
    assert (predict["seconds"], predict["tokens"]) == (0.5, None)
    assert found["total_seconds"] == 4.5
    assert found["unknown"] == 0
    assert train["bytes"] > predict["bytes"] > 0


def test_bytes_are_those_of_the_files(tmp_path: Path):
    run = with_steps(make_run(tmp_path), [("train", {"wall_seconds": 1}, "x" * 1000)])
    folder = run / "store" / "train" / key(0)
    assert spending(run, results(run))["by_kind"][0]["bytes"] == sum(p.stat().st_size for p in folder.iterdir())


def test_trainings_that_ran_together_share_the_time(tmp_path: Path):
    together = {**TASK, "wall_seconds": 12.0, "environment": {"together": 3, "device": "cuda"}}
    found = spent(tmp_path, *[("train", together)] * 3)
    assert found["total_seconds"] == pytest.approx(12.0)
    assert found["machine"] == {"device": "cuda"}


def test_what_records_do_not_say_is_unknown(tmp_path: Path):
    found = spent(tmp_path, ("train", TASK), ("score", {}), ("predict", {"wall_seconds": 1.0}))
    assert found["unknown"] == 2
    assert found["total_seconds"] == 1.0
    assert [row["seconds"] for row in found["by_kind"]] == [None, None, 1.0]
    assert found["trainings"] == []


def test_a_step_that_is_gone_is_counted_as_unknown(tmp_path: Path):
    run = with_steps(make_run(tmp_path), [("train", {"wall_seconds": 5}, ""), ("train", {"wall_seconds": 2}, "")])
    Store(run / "store").drop("train", key(0))
    found = spending(run, results(run))
    assert (found["unknown"], found["total_seconds"], found["by_kind"][0]["steps"]) == (1, 2, 2)


def test_the_longest_trainings_come_first(tmp_path: Path):
    found = spent(tmp_path, *[("train", {**TASK, "wall_seconds": float(n)}) for n in range(LONGEST + 4)])
    assert [row["seconds"] for row in found["trainings"]] == [float(n) for n in range(LONGEST + 3, 3, -1)]


def test_machines_that_differ_are_all_named(tmp_path: Path):
    found = spent(
        tmp_path,
        ("train", {"environment": {"device": "cpu", "torch": "2"}}),
        ("train", {"environment": {"device": "cuda", "torch": "2"}}),
    )
    assert found["machine"] == {"device": "cpu, cuda", "torch": "2"}
