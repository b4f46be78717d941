"""Methods side by side: the averages' differences to Eng-FT, and every language's bars with intervals and marks."""

import math
from typing import Any

from lingraft.languages import name_of
from lingraft.report.page.charts import LABELS, bars, forest, names_apart
from lingraft.report.page.files import Files
from lingraft.report.page.heat import columns, figures_of, mark_of
from lingraft.report.page.svg import inline
from lingraft.report.page.writing import DASH, between, p_value, share, signed
from lingraft.report.results import BASELINE
from lingraft.report.tables import ALSO, AVERAGE, GROUP


def _role(name: str, chosen: str | None) -> str:
    return "chosen" if name == chosen else "baseline" if name == BASELINE else "other"


def forest_figure(found: dict[str, Any], chosen: str | None, marks: dict[str, Any]) -> dict[str, Any] | None:
    """All methods' differences to Eng-FT on average over the targets, drawn for desktops and for phones."""
    named = dict(zip(found["methods"], names_apart([m["title"] for m in found["methods"].values()]), strict=True))
    rows: list[dict[str, Any]] = []
    for name, method in found["methods"].items():
        average = method["average"] or {}
        if "difference" not in average or not all(map(math.isfinite, average["difference_interval"])):
            continue
        low, high = average["difference_interval"]
        mark, meaning = mark_of(marks, name, "average")
        short = " ".join(filter(None, (signed(average["difference"]), mark)))
        interval = between(average["difference_interval"], sign=True)
        rows.append(
            {
                "method": named[name],
                "value": 100 * average["difference"],
                "low": 100 * low,
                "high": 100 * high,
                "role": _role(name, chosen),
                "short": short,
                "figure": f"{signed(average['difference'])} {interval} {mark}".strip(),
                "says": f"{named[name]}: {signed(average['difference'])} {interval} points, p {p_value(average.get('p'))}"
                + (f", {meaning}" if meaning else ""),
            }
        )
    if not rows:
        return None
    says = f"Differences to Eng-FT on average over the targets, in points, for {len(rows)} methods."
    drawn = [inline(forest(rows, wide), says, "wide" if wide else "narrow") for wide in (True, False)]
    return {"wide": drawn[0], "narrow": drawn[1]}


def language_figures(found: dict[str, Any], chosen: str | None, marks: dict[str, Any]) -> list[dict[str, Any]]:
    """A drawing for each language: bars with intervals, the marks beside the figures."""
    named = dict(zip(found["methods"], names_apart([m["title"] for m in found["methods"].values()]), strict=True))
    over = [column for column in columns(found) if column["kind"] in ("source", "target")]
    ends = [
        end
        for method in found["methods"].values()
        for column in over
        if (cell := figures_of(method, column))
        for end in (cell["value"], *(cell.get("interval") or ()))
        if math.isfinite(end)
    ]
    longest = max(map(len, named.values()), default=0)
    room = min(LABELS, max(48, 7 * longest))
    drawing = bars(max(10.0, math.ceil(10 * max(ends, default=1.0)) * 10.0), room)
    figures = []
    for column in over:
        rows = [
            _bar(named[name], _role(name, chosen), cell, mark_of(marks, name, column["key"]))
            for name, method in found["methods"].items()
            if (cell := figures_of(method, column))
        ]
        if not rows:
            continue
        says = (
            f"{column['name']}: scores of {len(rows)} methods with 95 % intervals; the figures are in the table below."
        )
        svg = inline(drawing.with_rows(rows), says)
        figures.append(
            {"name": column["name"], "items": found["items"].get(column["key"]), "svg": svg, "rows": len(rows)}
        )
    return figures


def _bar(name: str, role: str, cell: dict[str, Any], mark: tuple[str, str]) -> dict[str, Any]:
    low, high = cell.get("interval") or (cell["value"], cell["value"])
    if not (math.isfinite(low) and math.isfinite(high)):
        low = high = cell["value"]
    meaning = f", {mark[1]}" if mark[1] else ""
    return {
        "method": name,
        "value": 100 * cell["value"],
        "low": 100 * low,
        "high": 100 * high,
        "role": role,
        "figure": share(cell["value"]),
        "mark": mark[0],
        "says": f"{name}: {share(cell['value'])} {between(cell.get('interval'))}{meaning}",
    }


def language_rows(found: dict[str, Any], marks: dict[str, Any]) -> list[list[str]]:
    """Every figure of every language as text, for the table below the bars."""
    rows = []
    for code in dict.fromkeys([found["source"], *found["targets"]]):
        for name, method in found["methods"].items():
            if not (cell := method["languages"].get(code)):
                continue
            entry = marks.get(name, {}).get(code) or {}
            mark, meaning = mark_of(marks, name, code)
            difference = cell.get("difference")
            rows.append(
                [
                    name_of(code),
                    method["title"],
                    f"{share(cell['value'])} {between(cell.get('interval'))}".strip(),
                    f"{signed(difference)} {between(cell.get('difference_interval'), sign=True)}"
                    if difference is not None
                    else DASH,
                    p_value(cell.get("p")),
                    p_value(entry.get("adjusted")),
                    f"{mark} {meaning.removesuffix(' than Eng-FT')}".strip(),
                ]
            )
    return rows


def averages_file(found: dict[str, Any], marks: dict[str, Any], files: Files) -> str:
    """The averages over all targets and over each group as CSV, in full precision."""
    rows: list[list[Any]] = []
    for name, method in found["methods"].items():
        over = {AVERAGE: method["average"], **{f"{GROUP}{group}": c for group, c in (method["groups"] or {}).items()}}
        for where, cell in over.items():
            if not cell:
                continue
            gap, unfused = cell.get("gap_closed") or {}, cell.get("against_unfused") or {}
            rows.append(
                [
                    name,
                    where,
                    *_with_ends(cell, "value", "interval"),
                    *_with_ends(cell, "difference", "difference_interval"),
                    cell.get("p"),
                    (marks.get(name, {}).get(where) or {}).get("adjusted"),
                    *_with_ends(gap, "value", "interval"),
                    *_with_ends(unfused, "difference", "difference_interval"),
                    unfused.get("p"),
                ]
            )
    header = ["method", "over", found["metric"], "low", "high", "difference", "difference_low", "difference_high", "p"]
    header += [
        "p_after_holm",
        "gap_closed",
        "gap_low",
        "gap_high",
        "against_lora",
        "against_lora_low",
        "against_lora_high",
    ]
    return files.add("averages.csv", [*header, "against_lora_p"], rows)


def _with_ends(cell: dict[str, Any], name: str, interval: str) -> list[Any]:
    return [cell.get(name), *(cell.get(interval) or (None, None))]


def also_file(found: dict[str, Any], title: str, files: Files) -> str:
    """A figure beside the metric as CSV, by its title in `tables.ALSO`."""
    figure = next(name for name, of in ALSO.items() if of == title)
    rows = [
        [name, code, cell["also"].get(figure)]
        for name, method in found["methods"].items()
        for code, cell in method["languages"].items()
        if figure in (cell.get("also") or {})
    ]
    return files.add(f"{figure}.csv", ["method", "language", figure], rows)


LANGUAGE_HEADER = ["language", "method", "score [95 %]", "against Eng-FT [95 %]", "p", "p after Holm", "mark"]


_WAYS = {"+": "better", "-": "worse"}
"""Directions as words: signs alone would be taken for formulas."""


def marks_file(found: dict[str, Any], marks: dict[str, Any], files: Files) -> str:
    """The marks as CSV."""
    rows = [
        [
            name,
            key,
            entry.get("p"),
            entry.get("adjusted"),
            _WAYS[entry["direction"]],
            str(bool(entry.get("significant"))),
        ]
        for name, by_language in marks.items()
        for key, entry in by_language.items()
    ]
    return files.add("marks.csv", ["method", "language", "p", "p_after_holm", "direction", "significant"], rows)
