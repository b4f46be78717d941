"""What the steps behind a run's figures took when they were made: time, tokens, room on the disk, and on what machine."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lingraft.report.readings import Made, Readings, harmless, opened
from lingraft.report.results import manifest_of, metric_of, store_of

LONGEST = 10
"""Trainings that are named."""


def spending(run: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What a run's steps took, by their records; steps that other runs share are counted too.

    Args:
        run: The run's folder.
        found: Its figures, see `results.results`.

    Returns:
        `total_seconds`; `by_kind`, rows of `kind`, `steps`, `seconds`, `tokens` and `bytes` (None where no record says it);
        `trainings`, the longest, of `label`, `key`, `steps`, `tokens` and `seconds`; `machine`, the environment as it was
        recorded; and `unknown`, of how many steps the time is not known.
    """
    manifest = manifest_of(run)
    readings = opened(run, store_of(run, manifest), metric_of(manifest))
    steps = readings.made(manifest["steps"])
    sizes = _sizes(steps, readings)
    kinds = dict.fromkeys(step.kind for step in steps)
    trained = [step for step in steps if step.kind == "train" and seconds_of(step) is not None]
    trained.sort(key=lambda step: -(seconds_of(step) or 0.0))
    return {
        "total_seconds": _sum(map(seconds_of, steps)) or 0.0,
        "by_kind": [_row(kind, [step for step in steps if step.kind == kind], sizes) for kind in kinds],
        "trainings": [
            {
                "label": step.label,
                "key": step.key,
                "seconds": seconds_of(step),
                "steps": step.record.get("steps"),
                "tokens": step.record.get("tokens"),
            }
            for step in trained[:LONGEST]
        ],
        "machine": machine(steps),
        "unknown": sum(seconds_of(step) is None for step in steps),
    }


def seconds_of(step: Made) -> float | None:
    """What a step took; of trainings that shared passes through the model, its share."""
    for name in ("wall_seconds", "seconds"):
        value = step.record.get(name)
        if isinstance(value, int | float):
            together = (step.record.get("environment") or {}).get("together")
            return value / together if name == "wall_seconds" and isinstance(together, int) and together > 1 else value
    return None


def machine(steps: Iterable[Made]) -> dict[str, Any]:
    """What steps noted of where they were made; where that differs, every value."""
    values: dict[str, list[str]] = {}
    for step in steps:
        noted = step.record.get("environment")
        for name, value in (noted if isinstance(noted, dict) else {}).items():
            if name != "together" and harmless(value) not in values.setdefault(name, []):
                values[name].append(harmless(value))
    return {name: ", ".join(several) for name, several in sorted(values.items())}


def _row(kind: str, steps: Sequence[Made], sizes: dict[str, int]) -> dict[str, Any]:
    return {
        "kind": kind,
        "steps": len(steps),
        "seconds": _sum(map(seconds_of, steps)),
        "tokens": _sum(_number(step.record.get("tokens")) for step in steps),
        "bytes": _sum(sizes.get(step.place) for step in steps),
    }


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _sum(values: Iterable[Any]) -> Any:
    """The sum of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _sizes(steps: Sequence[Made], readings: Readings) -> dict[str, int]:
    """Bytes of steps that are there, by place."""
    store = readings.store
    if store.remote:
        return {f"{kind}/{key}": size for (kind, key), (size, _) in store.sizes().items()}
    return {step.place: _size(store.path(step.kind, step.key)) for step in steps if step.record}


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
