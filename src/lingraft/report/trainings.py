"""How a run's trainings went: losses by step, and what each took."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lingraft.errors import LingraftError
from lingraft.report.readings import Made, Readings, opened
from lingraft.report.results import manifest_of, metric_of, store_of
from lingraft.report.spending import seconds_of

METRICS = "metrics.jsonl"
"""A training's log, as `checkpoints.METRICS`, which cannot be had without torch."""
POINTS = 200
"""Of a curve, at most."""
_DRAWN = ("loss", "held_out_loss", "learning_rate")


def trainings(run: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every training of a run, in the order in which they were planned.

    Args:
        run: The run's folder.
        found: Its figures, see `results.results`.

    Returns:
        For each: `key`, `label`, `kind` (see `kinds_of`), `task`, `language` (None where it has none), `seed`, the adapter's
        `family`, `steps`, `tokens`, `seconds`, `final_loss` (None where they were not noted), and `curve`, at most `POINTS`
        points of `step`, `loss`, `learning_rate` and, where it was looked at, `held_out_loss`.
    """
    manifest = manifest_of(run)
    readings = opened(run, store_of(run, manifest), metric_of(manifest))
    steps = readings.made([place for place in manifest["steps"] if place.startswith("train/")])
    kinds = kinds_of(steps, found["experiment"])
    return [_training(step, kinds[step.key], readings) for step in steps if step.record]


def kinds_of(steps: Sequence[Made], experiment: dict[str, Any]) -> dict[str, str]:
    """What trainings are, by their keys: on the `task`, on the `reference` task, a `language` adapter, or a `second` stage.

    Args:
        steps: Trainings.
        experiment: The experiment that they are of.
    """
    steps = [step for step in steps if step.kind == "train"]
    beneath = {(step.record.get("inputs") or {}).get("beneath") for step in steps} - {None}
    structures = [step.config.get("adapter") for step in steps if step.key in beneath]
    reference = (experiment.get("reference") or {}).get("task")

    def kind(step: Made) -> str:
        config = step.config
        if "second" in config:
            return "second"
        if "reference" in config:
            # What lies beneath a task's adapter is a language's; so are all that are built like it.
            return "language" if config.get("adapter") in structures else "reference"
        if config.get("initial"):
            return "reference"
        name = (config.get("task") or {}).get("task")
        return "reference" if name == reference != experiment["task"] else "task"

    return {step.key: kind(step) for step in steps}


def _training(step: Made, kind: str, readings: Readings) -> dict[str, Any]:
    config, record = step.config, step.record
    noted = _noted(step, readings)
    language = config.get("language")
    last = noted[-1] if noted else {}
    return {
        "key": step.key,
        "label": step.label,
        "kind": kind,
        "task": (config.get("reference") or config.get("task") or {}).get("task"),
        "language": None if language == "-" else language,
        "seed": config.get("seed"),
        "family": (config.get("adapter") or {}).get("family"),
        "curve": _binned(noted),
        "steps": record.get("steps", last.get("step")),
        "tokens": record.get("tokens", last.get("tokens")),
        "seconds": seconds_of(step),
        "final_loss": _finite(record.get("loss", last.get("loss"))),
    }


def _noted(step: Made, readings: Readings) -> list[dict[str, Any]]:
    """The lines of a training's log, by step; lines that are torn or no numbers are left out."""
    store = readings.store
    try:
        path = (readings.folder(step.place) if store.remote else store.path(step.kind, step.key)) / METRICS
        text = path.read_text(encoding="utf-8", errors="replace")
    except (OSError, LingraftError):
        return []
    found: dict[int, dict[str, Any]] = {}
    for line in text.split("\n"):
        try:
            values = json.loads(line)
            found[int(values["step"])] = {"tokens": values.get("tokens"), **_point(values)}
        except (ValueError, TypeError, KeyError, RecursionError, AttributeError, OverflowError):
            continue
    # A training that went on from a checkpoint may have noted a step twice: the last time counts.
    return [{"step": number, **found[number]} for number in sorted(found)]


def _point(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name in _DRAWN if (value := _finite(values.get(name))) is not None}


def _finite(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _binned(noted: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A curve of at most `POINTS` points: the means of neighbouring steps, and the last step as it is."""
    if len(noted) <= POINTS:
        return [_mean([point]) for point in noted]
    *before, last = noted
    bounds = [len(before) * n // (POINTS - 1) for n in range(POINTS)]
    return [*(_mean(before[a:b]) for a, b in pairwise(bounds)), _mean([last])]


def _mean(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The means of what was noted, at the last of the steps."""
    mean: dict[str, Any] = {"step": points[-1]["step"], "loss": None, "learning_rate": None}
    for name in _DRAWN:
        values = [point[name] for point in points if name in point]
        if values:
            mean[name] = sum(values) / len(values)
    return mean
