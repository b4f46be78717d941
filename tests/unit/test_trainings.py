"""Trainings: which there were, of what kind, and curves that survive torn logs and stay short."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lingraft.digests import digest_value
from lingraft.report.results import results
from lingraft.report.trainings import METRICS, POINTS, trainings
from lingraft.store import Store, write_json
from tests.unit.test_report import make_run

LORA = {"family": "lora", "rank": 8}
WIDE = {"family": "bottleneck", "positions": "madx"}


def with_steps(run: Path, steps: Sequence[tuple[str, Mapping[str, Any], str | None]]) -> Path:
    """Adds steps to a run made by hand: kind, record, and the log of a training."""
    store, manifest = Store(run / "store"), json.loads((run / "manifest.json").read_text())
    manifest["steps"] = []
    for number, (kind, record, log) in enumerate(steps):
        key = digest_value([kind, number], 24)
        with store.making(kind, key, {"kind": kind, **record}) as work:
            if log is not None:
                (work / "metrics.jsonl").write_text(log, encoding="utf-8")
        manifest["steps"].append(f"{kind}/{key}")
    write_json(run / "manifest.json", manifest)
    return run


def key(number: int) -> str:
    return digest_value(["train", number], 24)


def log(steps: int, **more: Any) -> str:
    lines = [
        {"step": n, "loss": 10.0 - n / 1000, "learning_rate": 1e-4, "tokens": 7 * n, **more}
        for n in range(1, steps + 1)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def trained(
    tmp_path: Path, *steps: tuple[str, Mapping[str, Any], str | None], **experiment: Any
) -> list[dict[str, Any]]:
    run = with_steps(make_run(tmp_path, **experiment), steps)
    found = trainings(run, results(run))
    json.dumps(found, allow_nan=False)
    return found


TASK = {
    "config": {"task": {"task": "topics"}, "language": "en", "seed": 3, "adapter": LORA},
    "label": "train topics en seed 3",
}


def test_the_log_is_the_one_that_trainings_write():
    from lingraft import checkpoints

    assert METRICS == checkpoints.METRICS


def test_evidence_is_read_without_torch():
    modules = "results, tables, headline, examples, trainings, spending, provenance, divergences"
    code = f"import sys; from lingraft.report import {modules}; import lingraft.commands.adapters; "
    code += "print([name for name in ('torch', 'transformers', 'scipy', 'altair') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_training_says_what_it_was(tmp_path: Path):
    record = {**TASK, "steps": 4, "tokens": 28, "seconds": 1.5, "loss": 2.25}
    (found,) = trained(tmp_path, ("train", record, log(4)), ("predict", {}, None))
    curve = found.pop("curve")
    assert found == {
        "key": key(0),
        "label": "train topics en seed 3",
        "kind": "task",
        "task": "topics",
        "language": "en",
        "seed": 3,
        "family": "lora",
        "steps": 4,
        "tokens": 28,
        "seconds": 1.5,
        "final_loss": 2.25,
    }
    assert [point["step"] for point in curve] == [1, 2, 3, 4]
    assert curve[0] == {"step": 1, "loss": 9.999, "learning_rate": 1e-4}


def test_the_kinds_of_trainings(tmp_path: Path):
    text = {"reference": {"task": "clm"}, "seed": 0}
    steps = [
        ("train", {"config": {**text, "language": "sw", "adapter": LORA}}, None),
        ("train", {"config": {**text, "language": "en", "adapter": WIDE}}, None),
        ("train", {"config": {**text, "language": "sw", "adapter": WIDE}}, None),
        ("train", {**TASK, "inputs": {"beneath": key(1)}}, None),
        ("train", {"config": {"task": {"task": "topics"}, "second": {"kind": "fused"}, "language": "sw"}}, None),
        ("train", {"config": {"task": {"task": "xnli"}, "language": "sw", "adapter": LORA}}, None),
        ("train", {"config": {"initial": True, "language": "-", "adapter": LORA}}, None),
    ]
    found = trained(tmp_path, *steps, reference={"task": "xnli"})
    assert [f["kind"] for f in found] == [
        "reference",
        "language",
        "language",
        "task",
        "second",
        "reference",
        "reference",
    ]
    assert found[0]["task"] == "clm"
    assert found[-1]["language"] is None
    assert all(f["curve"] == [] for f in found)


@pytest.mark.parametrize(
    "tail",
    [
        '{"step": 4, "lo',
        "\x00\x00",
        "[1]\n",
        '{"loss": 1}\n',
        "null\n",
        '{"step": 1e999, "loss": 1}\n',
        '{"step": "x"}\n',
        "\n\n",
    ],
)
def test_a_torn_line_is_left_out(tmp_path: Path, tail: str):
    (found,) = trained(tmp_path, ("train", TASK, log(3) + tail))
    assert [point["step"] for point in found["curve"]] == [1, 2, 3]
    assert found["steps"] == 3
    assert found["tokens"] == 21
    assert found["final_loss"] == pytest.approx(9.997)


def test_a_loss_that_is_no_number_is_none(tmp_path: Path):
    text = '{"step": 1, "loss": NaN, "learning_rate": 0.1}\n{"step": 2, "loss": 1.0}\n'
    (found,) = trained(tmp_path, ("train", {**TASK, "loss": None}, text))
    assert found["curve"][0] == {"step": 1, "loss": None, "learning_rate": 0.1}
    assert found["curve"][1]["loss"] == 1.0


def test_a_step_that_was_taken_again_counts_once(tmp_path: Path):
    again = log(5) + log(3, loss=1.0)
    (found,) = trained(tmp_path, ("train", TASK, again))
    assert [point["step"] for point in found["curve"]] == [1, 2, 3, 4, 5]
    assert [point["loss"] for point in found["curve"][:3]] == [1.0] * 3


@pytest.mark.parametrize("steps", [POINTS - 1, POINTS, POINTS + 1, 2 * POINTS, 5_003])
def test_curves_are_short_and_end_with_the_last_step(tmp_path: Path, steps: int):
    (found,) = trained(tmp_path, ("train", TASK, log(steps)))
    curve = found["curve"]
    assert len(curve) == min(steps, POINTS)
    assert curve[-1] == {"step": steps, "loss": 10.0 - steps / 1000, "learning_rate": 1e-4}
    assert [p["step"] for p in curve] == sorted({p["step"] for p in curve})
    # Means of neighbours keep a falling line falling, and its mean.
    assert [p["loss"] for p in curve] == sorted((p["loss"] for p in curve), reverse=True)
    widths = [b - a for a, b in zip([0, *(p["step"] for p in curve)], [p["step"] for p in curve], strict=False)]
    mean = sum(w * p["loss"] for w, p in zip(widths, curve, strict=True)) / steps
    assert mean == pytest.approx(10.0 - (steps + 1) / 2000)


def test_held_out_losses_stay_where_they_were_looked_at(tmp_path: Path):
    lines = [json.loads(line) for line in log(1000).splitlines()]
    lines[499]["held_out_loss"] = 4.0
    lines[999]["held_out_loss"] = 3.0
    (found,) = trained(tmp_path, ("train", TASK, "".join(json.dumps(line) + "\n" for line in lines)))
    held = [point["held_out_loss"] for point in found["curve"] if "held_out_loss" in point]
    assert held == [4.0, 3.0]
    assert found["curve"][-1]["held_out_loss"] == 3.0


def test_a_training_that_is_not_in_the_store_any_more_is_left_out(tmp_path: Path):
    run = with_steps(make_run(tmp_path), [("train", TASK, log(2)), ("train", TASK, log(2))])
    Store(run / "store").drop("train", key(0))
    assert [f["key"] for f in trainings(run, results(run))] == [key(1)]
