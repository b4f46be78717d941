"""How the trainings went: a drawing of each one's losses, those of one kind on one scale, and a table of all."""

import math
from typing import Any

from lingraft.languages import name_of
from lingraft.report.page.charts import training
from lingraft.report.page.files import Files
from lingraft.report.page.svg import inline
from lingraft.report.page.writing import DASH, count, span

DRAWN = 60
"""So many trainings are drawn; all are in the table and in the file."""
TOLD = 24
"""Points of a drawing whose figures the pointer is told, about."""
KINDS = {
    "task": "on the task",
    "reference": "reference task (language modelling)",
    "language": "language adapters",
    "second": "second stages",
}
HEADER = ["training", "kind", "language", "seed", "steps", "tokens", "time", "loss at the end", "last held-out loss"]


def _kind(kind: str) -> str:
    return KINDS.get(kind, kind)


def _held(entry: dict[str, Any]) -> float | None:
    return next((p["held_out_loss"] for p in reversed(entry["curve"]) if p.get("held_out_loss") is not None), None)


def training_figures(trainings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The drawings of the first trainings: `kind`, `language`, `name`, `svg`."""
    drawn = [entry for entry in trainings if len(_rows(entry["curve"])) > 1][:DRAWN]
    domains = {kind: _domain([e for e in drawn if e["kind"] == kind]) for kind in {e["kind"] for e in drawn}}
    figures = []
    for entry in drawn:
        rows = _rows(entry["curve"])
        held = _held(entry)
        says = f"{entry['label']}: loss from {rows[0]['loss']:.3f} to {rows[-1]['loss']:.3f} in {entry['steps']} steps"
        says += f", held out {held:.3f}." if held is not None else "."
        figures.append(
            {
                "kind": entry["kind"],
                "language": entry["language"] or "",
                "name": entry["label"],
                "svg": inline(training(domains[entry["kind"]]).with_rows(rows), says),
                "last": f"{rows[-1]['loss'] if entry['final_loss'] is None else entry['final_loss']:.3f}",
                "held": "" if held is None else f"{held:.3f}",
            }
        )
    return figures


def _rows(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    points = [p for p in curve if p.get("loss") is not None and math.isfinite(p["loss"])]
    every = math.ceil(len(points) / TOLD)
    return [
        {
            "step": point["step"],
            "loss": point["loss"],
            "held": point.get("held_out_loss"),
            "says": _told(point) if n % every == 0 or n == len(points) - 1 else "",
        }
        for n, point in enumerate(points)
    ]


def _told(point: dict[str, Any]) -> str:
    held = point.get("held_out_loss")
    return f"step {point['step']}: loss {point['loss']:.3f}" + ("" if held is None else f", held out {held:.3f}")


def _domain(entries: list[dict[str, Any]]) -> tuple[float, float]:
    losses = [
        value
        for entry in entries
        for point in entry["curve"]
        for value in (point.get("loss"), point.get("held_out_loss"))
        if value is not None and math.isfinite(value)
    ]
    low, high = min(losses, default=0.0), max(losses, default=1.0)
    return (0.0 if low < 0.5 * high else low * 0.95, high * 1.02 or 1.0)


def training_rows(trainings: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each training."""
    return [
        [
            entry["label"],
            _kind(entry["kind"]),
            name_of(entry["language"] or DASH),
            DASH if entry["seed"] is None else str(entry["seed"]),
            count(entry["steps"]),
            count(entry["tokens"]),
            span(entry["seconds"]),
            DASH if entry["final_loss"] is None else f"{entry['final_loss']:.3f}",
            DASH if (held := _held(entry)) is None else f"{held:.3f}",
        ]
        for entry in trainings
    ]


def trainings_file(trainings: list[dict[str, Any]], files: Files) -> str:
    """A line for each training as CSV, its figures as they are."""
    names = ("key", "label", "kind", "language", "seed", "family", "steps", "tokens", "seconds", "final_loss")
    rows = [[*(entry[name] for name in names), _held(entry)] for entry in trainings]
    return files.add("trainings.csv", [*names, "final_held_out_loss"], rows)


def losses_file(trainings: list[dict[str, Any]], files: Files) -> str:
    """All points of all trainings as CSV."""
    names = ("step", "loss", "held_out_loss", "learning_rate")
    rows = [
        [entry["key"], entry["label"], entry["kind"], entry["language"], entry["seed"], *(p.get(n) for n in names)]
        for entry in trainings
        for p in entry["curve"]
    ]
    return files.add("losses.csv", ["key", "training", "kind", "language", "seed", *names], rows)
