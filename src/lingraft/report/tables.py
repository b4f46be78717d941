"""Results as tables: for the terminal, as Markdown, as CSV."""

import csv
import io
from typing import Any

from lingraft.escaping import in_csv, in_markdown, one_line
from lingraft.languages import name_of

NO_DATA = "no data"
AVERAGE = "average"
GROUP = "group:"
"""Before the name of a group of targets, among the marks."""
METRICS = {"accuracy": "accuracy", "exact_match": "exact match", "rouge_l": "ROUGE-L"}
"""What a task is measured by, and its name in texts."""
ALSO = {
    "macro_f1": "macro-F1",
    "f1": "F1",
    "unparsable": "unparsable",
    "truncated": "prompts cut",
}
"""Figures shown beside the metric, as shares, where a run has them."""


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage without its sign, or a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def p_value(p: float | None) -> str:
    """A p-value, never as zero."""
    if p is None:
        return "–"
    if p < 0.001:
        return "< 0.001"
    # What rounding would put on the other side of the level.
    return "< 0.05" if p < 0.05 and f"{p:.3f}" == "0.050" else f"{p:.3f}"


def _with_interval(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return NO_DATA
    if not cell.get("interval"):
        return percent(cell["value"])
    low, high = cell["interval"]
    return f"{percent(cell['value'])} [{percent(low)}, {percent(high)}]"


def _marks(found: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    from lingraft.report.headline import marks  # What only prints lists starts without numpy.

    return marks(found)


def _difference(cell: dict[str, Any] | None, mark: dict[str, Any] | None = None) -> str:
    """A difference with its interval, and a star where it is significant among all that were tested."""
    if not cell or "difference" not in cell:
        return "–"
    low, high = cell["difference_interval"]
    star = "*" if mark and mark["significant"] else ""
    return f"{100 * cell['difference']:+.1f}{star} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _gap(cell: dict[str, Any] | None) -> str:
    gap = (cell or {}).get("gap_closed")
    if not gap or gap["value"] is None:
        return "–"
    low, high = gap["interval"]
    return f"{percent(gap['value'], 0)} % [{percent(low, 0)}, {percent(high, 0)}]"


Table = tuple[list[str], list[list[str]]]
"""A header and rows of text."""


def _shown(found: dict[str, Any]) -> list[str]:
    """The languages of a table: the source where a method has a figure in it, and all targets."""
    scored = any(found["source"] in method["languages"] for method in found["methods"].values())
    return [*([found["source"]] if scored else []), *found["targets"]]


def language_table(found: dict[str, Any]) -> Table:
    """Methods × languages: the metric in percent with its 95 % interval; the source language first."""
    languages = _shown(found)
    rows: list[list[str]] = []
    for method in found["methods"].values():
        cells = [
            _with_interval(method["languages"].get(c)) if c in method["languages"] or c != found["source"] else ""
            for c in languages
        ]
        rows.append([method["title"], *cells])
    return ["method", *map(name_of, languages)], rows


def also_tables(found: dict[str, Any]) -> list[tuple[str, Table]]:
    """Methods × languages for every figure beside the metric that differs from zero somewhere, with its name."""
    languages = _shown(found)
    made: list[tuple[str, Table]] = []
    for name, title in ALSO.items():
        rows = [
            [method["title"], *(percent(method["languages"].get(c, {}).get("also", {}).get(name)) for c in languages)]
            for method in found["methods"].values()
        ]
        if any(cell not in ("–", "0.0") for row in rows for cell in row[1:]):
            made.append((title, (["method", *map(name_of, languages)], rows)))
    return made


def average_table(found: dict[str, Any], group: str | None = None) -> Table:
    """Methods: the average over the target languages or a group of them, the difference to Eng-FT, and the gap closed."""
    rows: list[list[str]] = []
    marked, where = _marks(found), AVERAGE if group is None else f"{GROUP}{group}"
    for name, method in found["methods"].items():
        average = method["average"] if group is None else method["groups"][group]
        shown = _with_interval(average) if average else "–"
        p = p_value((average or {}).get("p"))
        unfused = (average or {}).get("against_unfused") or {}
        more = [_difference(unfused), p_value(unfused.get("p"))] if unfused else ["", ""]
        difference = _difference(average, marked.get(name, {}).get(where))
        rows.append([method["title"], shown, difference, p, _gap(average), *more])
    header = ["method", f"average of {group or 'targets'}", "against Eng-FT", "p", "gap closed"]
    fused = any(row[-2] for row in rows)
    closed = any(row[4] not in ("", "–") for row in rows)
    # Columns that would be empty all the way down are left out.
    kept = [0, 1, 2, 3, *([4] if closed or not fused else []), *([5, 6] if fused else [])]
    header = [*header, "against LoRA", "p"]
    return [header[n] for n in kept], [[row[n] for n in kept] for row in rows]


def average_tables(found: dict[str, Any]) -> list[Table]:
    """The averages over every group of targets, or over all of them where there are no groups."""
    groups = found["experiment"].get("groups") or {}
    return [average_table(found, group) for group in groups] or [average_table(found)]


def difference_table(found: dict[str, Any]) -> Table:
    """Methods × target languages: the difference to Eng-FT, in points, with its 95 % interval."""
    marked = _marks(found)
    rows = [
        [
            method["title"],
            *(_difference(method["languages"].get(code), marked.get(name, {}).get(code)) for code in found["targets"]),
        ]
        for name, method in found["methods"].items()
        if any("difference" in method["languages"].get(code, {}) for code in found["targets"])
    ]
    return ["against Eng-FT", *map(name_of, found["targets"])], rows


def curve_table(found: dict[str, Any]) -> Table:
    """The λ curve of every method tuned on labels of the development languages; the chosen point is marked."""
    header = ["method", "λ", "gold log-likelihood", METRICS[found["metric"]], ""]
    rows = []
    for name, selection in labelled(found).items():
        title = found["methods"][name]["title"]
        if not selection["curve"]:
            rows.append([title, f"{selection['weight']:g}", "", "", "as given"])
        for point in selection["curve"]:
            mark = "chosen" if point["weight"] == selection["weight"] else ""
            figures = [
                f"{point['weight']:g}",
                f"{point['gold_log_likelihood']:.4f}",
                percent(point.get("accuracy")),
            ]
            rows.append([title, *figures, mark])
    return header, rows


def labelled(found: dict[str, Any]) -> dict[str, Any]:
    """The choices of λ that were made once, for all targets."""
    return {name: selection for name, selection in found["selections"].items() if "by_language" not in selection}


def weight_table(found: dict[str, Any]) -> Table:
    """The λ of every method that chooses one for each target language, without labels."""
    rows = [
        [found["methods"][name]["title"], *(f"{selection['by_language'][c]['weight']:.3g}" for c in found["targets"])]
        for name, selection in found["selections"].items()
        if "by_language" in selection
    ]
    return ["λ chosen without labels", *map(name_of, found["targets"])], rows


def reference_table(found: dict[str, Any]) -> Table:
    """cos(ΔR_t, ΔR_s): how alike the updates of the two references are, so how much the subtraction cancels."""
    rows = []
    for entry in found["references"]:
        cosine = "–" if entry["cosine"] is None else f"{entry['cosine']:.3f}"
        rows.append(
            [
                name_of(entry["language"]),
                str(entry["seed"]),
                cosine,
                *(f"{norm:.2f}" for norm in entry["norms"]),
            ]
        )
    return ["language", "seed", "cosine", "norm of target's", "norm of source's"], rows


def notes(found: dict[str, Any]) -> list[str]:
    """What a reader must know to read the tables rightly."""
    seeds, metric = len(found["seeds"]), METRICS[found["metric"]]
    said = [
        f"{metric[0].upper()}{metric[1:]} in percent, {seeds} seed{'s' if seeds > 1 else ''}; 95 % bootstrap intervals over items"
        + (" (one seed: they do not cover how much trainings differ)." if seeds == 1 else " of the seeds' mean."),
    ]
    if labelled(found):
        chosen = any(selection["curve"] for selection in labelled(found).values())
        development = found["experiment"]["development"] if chosen else []
        where = " and ".join(", ".join(name_of(c) for c in development).rsplit(", ", 1))
        said.append(_chosen_on(found, development, where) if where else "λ was given.")
    if len(labelled(found)) < len(found["selections"]):
        said.append(
            "Where a method's name says by what, its λ was chosen for each target by itself, without a label in any."
        )
    said += _starred(found)
    for name, counts in found.get("samples", {}).items():
        few, most = sorted({min(counts.values()), max(counts.values())}), max(found["items"].values())
        said.append(
            f"{found['methods'][name]['title']}: a sample of {' to '.join(map(str, few))} of {most} items, compared on the same."
        )
    fewer = found["experiment"].get("seeds_of") or {}
    said += [
        f"{found['methods'][m]['title']}: {len(s)} seed{'s' if len(s) > 1 else ''}, compared with Eng-FT of the same."
        for m, s in fewer.items()
        if m in found["methods"]
    ]
    missing: dict[tuple[str, str], list[str]] = {}
    for name, code, why in found["absent"]:
        missing.setdefault((code, why), []).append(found["methods"].get(name, {}).get("title", name))
    said += [f"{', '.join(titles)}, {name_of(code)}: {why}." for (code, why), titles in missing.items()]
    if found["chance_and_size_warning"]:
        said.append(found["chance_and_size_warning"])
    return said


def _starred(found: dict[str, Any]) -> list[str]:
    """What the stars mean, and that p is of one comparison alone; nothing where none was made."""
    tested = [where for of in _marks(found).values() for where in of]
    together = sum(where == AVERAGE or where.startswith(GROUP) for where in tested)
    if not tested:
        return []
    return [
        "p is of one comparison; a star stands where it is below .05 after Holm's adjustment, for "
        f"{len(tested) - together} differences of methods and languages, and for {together} of averages by themselves."
    ]


def _chosen_on(found: dict[str, Any], development: list[str], where: str) -> str:
    """On which languages λ was chosen; the paper's protocol reports them too, and that is said."""
    tested = [name_of(code) for code in development if code in found["targets"]]
    if tested:
        return f"λ was chosen on validation items in {where}; {', '.join(tested)} is also a target, so not held out."
    return f"λ was chosen on {where} only, and frozen before the test languages were scored."


def markdown(found: dict[str, Any], published: Table | None = None) -> str:
    """The whole report as Markdown; with a paper's figures beside ours, where they are given.

    Names and notes out of the run's files are text in it, whatever they hold.
    """
    task, backbone = _code(found["experiment"]["task"]), _code(found["backbone"]["name"])
    parts = [f"# {in_markdown(found['name'])}", ""]
    parts += [f"Task {task}, backbone {backbone}, source {in_markdown(name_of(found['source']))}.", ""]
    parts += [*_markdown_table(*language_table(found)), ""]
    for table in average_tables(found):
        parts += [*_markdown_table(*table), ""]
    parts += [*(f"- {in_markdown(note)}" for note in notes(found)), ""]
    if published:
        parts += ["## Beside the paper", "", *_markdown_table(*published), ""]
    for title, table in also_tables(found):
        parts += [f"## {title[0].upper()}{title[1:]}", "", *_markdown_table(*table), ""]
    differences, weights = difference_table(found), weight_table(found)
    if len(found["targets"]) > 1 and differences[1]:
        parts += ["## Language by language", "", *_markdown_table(*differences), ""]
    if weights[1]:
        parts += ["## λ without labels", "", *_markdown_table(*weights), ""]
    if labelled(found):
        parts += ["## λ on the development languages", "", *_markdown_table(*curve_table(found)), ""]
    if found["references"]:
        parts += ["## Likeness of the reference updates", "", *_markdown_table(*reference_table(found)), ""]
    parts += [
        "## Methods",
        "",
        *(f"- **{in_markdown(m['title'])}**: {m['says']}" for m in found["methods"].values()),
        "",
    ]
    return "\n".join(parts)


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(map(in_markdown, cells)) + " |"

    return [line(header), "|" + "---|" * len(header), *map(line, rows)]


def _code(name: str) -> str:
    """A name as Markdown's code, in which nothing is escaped and which a grave accent ends."""
    return f"`{one_line(str(name)).replace('`', 'ˋ')}`"


def csv_text(found: dict[str, Any]) -> str:
    """One line a method and language, full precision, for other programs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["method", "language", found["metric"], "low", "high", "macro_f1", "gold_log_likelihood", "difference", "difference_low",
         "difference_high", "p", "gap_closed"]
    )  # fmt: skip
    for name, method in found["methods"].items():
        for language, cell in method["languages"].items():
            writer.writerow([in_csv(name), in_csv(language), *_csv_figures(cell)])
        for group, average in {**method["groups"], "average": method["average"]}.items():
            if average:
                writer.writerow([in_csv(name), in_csv(group), *_csv_figures(average)])
    return out.getvalue()


def _csv_figures(cell: dict[str, Any]) -> list[Any]:
    low, high = cell.get("interval") or ("", "")
    dlow, dhigh = cell.get("difference_interval") or ("", "")
    also = cell.get("also", {})
    figures = [cell["value"], low, high, also.get("macro_f1", ""), also.get("gold_log_likelihood", "")]
    return [
        *figures,
        cell.get("difference", ""),
        dlow,
        dhigh,
        cell.get("p", ""),
        (cell.get("gap_closed") or {}).get("value", ""),
    ]
