"""The heat map: methods × languages, as scores, as differences to Eng-FT, as the gap closed."""

from typing import Any

from lingraft.languages import name_of
from lingraft.report.page.colours import score_step, signed_step
from lingraft.report.page.writing import between, p_value, share, signed
from lingraft.report.tables import METRICS

Cell = dict[str, Any]
MARKS = {"+": ("▲", "significantly better than Eng-FT"), "-": ("▼", "significantly worse than Eng-FT")}
"""What stands beside a figure that differs from the baseline's after Holm's correction."""
ROOMY = 8
"""Up to so many columns a figure's interval stands below it."""


def columns(found: dict[str, Any]) -> list[dict[str, str]]:
    """The columns of the map: all targets together, groups of them, the source where it was scored, the targets."""
    scored = any(found["source"] in method["languages"] for method in found["methods"].values())
    groups = found["experiment"].get("groups") or {}
    return [
        {"kind": "average", "key": "average", "mark": "average", "name": "Average"},
        *({"kind": "group", "key": group, "mark": f"group:{group}", "name": group} for group in groups),
        *([_column("source", found["source"])] if scored else []),
        *(_column("target", code) for code in found["targets"]),
    ]


def _column(kind: str, code: str) -> dict[str, str]:
    return {"kind": kind, "key": code, "mark": code, "name": name_of(code)}


def figures_of(method: dict[str, Any], column: dict[str, str]) -> dict[str, Any] | None:
    """A method's figures in a column, if it has any."""
    if column["kind"] == "average":
        return method["average"]
    return method["groups"].get(column["key"]) if column["kind"] == "group" else method["languages"].get(column["key"])


def mark_of(marks: dict[str, Any], name: str, key: str) -> tuple[str, str]:
    """The mark of a method in a language, and what it means; empty where there is none."""
    entry = marks.get(name, {}).get(key) or {}
    return MARKS[entry["direction"]] if entry.get("significant") else ("", "")


def heat(found: dict[str, Any], marks: dict[str, Any]) -> list[dict[str, Any]]:
    """The map's views that have figures: `key`, `name`, `legend` (low, middle, high, kind), `rows` of a title and cells."""
    over = columns(found)
    cells = {name: [figures_of(method, column) for column in over] for name, method in found["methods"].items()}
    views = [_scores(found, cells, over, marks), _differences(found, cells, over, marks), _gaps(found, cells, over)]
    return [view for view in views if view]


def _rows(found: dict[str, Any], cells: dict[str, list[Cell]]) -> list[dict[str, Any]]:
    return [{"title": found["methods"][name]["title"], "cells": row} for name, row in cells.items()]


def _cell(text: str, kind: str, step: int, sub: str, mark: tuple[str, str], tip: str) -> Cell:
    return {"text": text, "class": f"{kind}-{step}", "sub": sub, "mark": mark[0], "meaning": mark[1], "tip": tip}


_GAP = "Share of the gap between Eng-FT (0) and Tgt-FT (100) that is closed, in percent."
_EMPTY: Cell = {"text": "–", "class": "none", "sub": "", "mark": "", "meaning": "", "tip": ""}


def _scores(found: dict[str, Any], cells: dict[str, Any], over: list[Any], marks: dict[str, Any]) -> dict[str, Any]:
    values = [cell["value"] for row in cells.values() for cell in row if cell]
    low, high = min(values, default=0.0), max(values, default=1.0)

    def made(name: str, column: dict[str, str], cell: Cell | None) -> Cell:
        if not cell:
            return _EMPTY
        mark = mark_of(marks, name, column["mark"])
        interval = between(cell.get("interval"))
        tip = f"{found['methods'][name]['title']}, {column['name']}: {share(cell['value'])} {interval}"
        return _cell(share(cell["value"]), "score", score_step(cell["value"], low, high), interval, mark, tip)

    rows = {n: [made(n, column, c) for column, c in zip(over, row, strict=True)] for n, row in cells.items()}
    legend = {"low": share(low), "middle": "", "high": share(high), "kind": "score"}
    return {
        "key": "score",
        "name": "Score",
        "means": f"{_capital(METRICS[found['metric']])} in percent.",
        "legend": legend,
        "rows": _rows(found, rows),
    }


def _differences(
    found: dict[str, Any], cells: dict[str, Any], over: list[Any], marks: dict[str, Any]
) -> dict[str, Any] | None:
    sizes = [abs(cell["difference"]) for row in cells.values() for cell in row if cell and "difference" in cell]
    if not sizes:
        return None
    most = max(0.01, *sizes)

    def made(name: str, column: dict[str, str], cell: Cell | None) -> Cell:
        if not cell or "difference" not in cell:
            return _EMPTY
        key = column["mark"]
        mark = mark_of(marks, name, key)
        interval = between(cell.get("difference_interval"), sign=True)
        p, adjusted = cell.get("p"), (marks.get(name, {}).get(key) or {}).get("adjusted")
        tip = f"{found['methods'][name]['title']}, {column['name']}: {signed(cell['difference'])} {interval}, p {p_value(p)}"
        tip += f", after Holm {p_value(adjusted)}" if adjusted is not None else ""
        step = signed_step(cell["difference"], most)
        return _cell(signed(cell["difference"]), "signed", step, interval, mark, tip)

    rows = {n: [made(n, column, c) for column, c in zip(over, row, strict=True)] for n, row in cells.items()}
    legend = {"low": signed(-most), "middle": "0", "high": signed(most), "kind": "signed"}
    rows = {n: row for n, row in rows.items() if any(cell is not _EMPTY for cell in row)}
    return {
        "key": "difference",
        "name": "Difference",
        "means": "Difference to Eng-FT in points: orange is worse, blue is better.",
        "legend": legend,
        "rows": _rows(found, rows),
    }


def _gaps(found: dict[str, Any], cells: dict[str, Any], over: list[Any]) -> dict[str, Any] | None:
    def made(name: str, column: dict[str, str], cell: Cell | None) -> Cell:
        gap = (cell or {}).get("gap_closed") or {}
        if gap.get("value") is None:
            return _EMPTY
        interval = between(gap.get("interval"), digits=0)
        tip = f"{found['methods'][name]['title']}, {column['name']}: {share(gap['value'], 0)} % {interval} of the gap"
        step = signed_step(gap["value"], 1.0)
        return _cell(share(gap["value"], 0), "signed", step, interval, ("", ""), tip)

    rows = {n: [made(n, column, c) for column, c in zip(over, row, strict=True)] for n, row in cells.items()}
    rows = {n: row for n, row in rows.items() if any(cell is not _EMPTY for cell in row)}
    legend = {"low": "−100", "middle": "0", "high": "100", "kind": "signed"}
    return (
        {"key": "gap", "name": "Gap closed", "means": _GAP, "legend": legend, "rows": _rows(found, rows)}
        if rows
        else None
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
