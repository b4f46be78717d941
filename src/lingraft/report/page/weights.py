"""The weights λ: the curves of those chosen on labels, and what was chosen for each target without."""

from typing import Any

from lingraft.languages import name_of
from lingraft.report.page.charts import curves, names_apart
from lingraft.report.page.files import Files
from lingraft.report.page.svg import inline
from lingraft.report.tables import curve_table, labelled

TOGETHER = 4
"""Up to so many curves share one drawing; more have one each, on the same scale."""
CRITERIA = {
    "gold_log_likelihood": "mean gold log-likelihood, nats",
    "entropy": "mean entropy of the answers, nats",
    "text_log_likelihood": "log-likelihood of the items as text",
}


def curve_rows(title: str, selection: dict[str, Any], figure: str = "gold_log_likelihood") -> list[dict[str, Any]]:
    """A selection's points as rows of a drawing; those without the figure are left out."""
    return [
        {
            "method": title,
            "weight": point["weight"],
            "value": point[figure],
            "chosen": int(point["weight"] == selection["weight"]),
            "says": f"{title}: λ = {point['weight']:g}, {point[figure]:.4f}"
            + (" (chosen)" if point["weight"] == selection["weight"] else ""),
        }
        for point in selection["curve"]
        if point.get(figure) is not None
    ]


def weight_figures(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The drawings of the curves chosen on the development languages: one of all, or one a method on the same scale."""
    chosen = {name: s for name, s in labelled(found).items() if s["curve"]}
    if not chosen:
        return []
    titles = names_apart([found["methods"][name]["title"] for name in chosen])
    rows = {t: curve_rows(t, s) for t, s in zip(titles, chosen.values(), strict=True)}
    return _figures(rows, CRITERIA["gold_log_likelihood"])


def _figures(rows: dict[str, list[dict[str, Any]]], title: str) -> list[dict[str, Any]]:
    rows = {name: points for name, points in rows.items() if points}
    if not rows:
        return []
    says = {name: _says(name, points) for name, points in rows.items()}
    if len(rows) <= TOGETHER:
        flat = [point for points in rows.values() for point in points]
        text = " ".join(says.values())
        drawn = [
            inline(curves(flat, list(rows), width, title=title), text, kind)
            for width, kind in ((860, "wide"), (304, "narrow"))
        ]
        return [{"name": "", "wide": drawn[0], "narrow": drawn[1]}]
    values = [point["value"] for points in rows.values() for point in points]
    room = 0.05 * (max(values) - min(values)) or 0.05
    domain = (min(values) - room, max(values) + room)
    return [
        {
            "name": name,
            "svg": inline(curves(points, [name], 304, legend=False, domain=domain, title=title), says[name]),
        }
        for name, points in rows.items()
    ]


def _says(name: str, points: list[dict[str, Any]]) -> str:
    chosen = next((point for point in points if point["chosen"]), None)
    best = f"λ = {chosen['weight']:g} was chosen, at {chosen['value']:.4f}" if chosen else "the chosen λ is not on it"
    return f"{name}: a curve of {len(points)} points; {best}."


def own_figures(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Where λ was chosen for each target by itself, without labels: a method's curves of all targets."""
    groups = []
    for name, selection in found["selections"].items():
        if "by_language" not in selection:
            continue
        by_language = {code: own for code, own in selection["by_language"].items() if own.get("curve")}
        if not by_language:
            continue
        criterion = str(next(iter(by_language.values())).get("criterion", ""))
        rows = {name_of(code): curve_rows(name_of(code), own, criterion) for code, own in by_language.items()}
        figures = _figures(rows, CRITERIA[criterion] if criterion in CRITERIA else criterion.replace("_", " "))
        if figures:
            groups.append({"title": found["methods"][name]["title"], "figures": figures})
    return groups


def weights_file(found: dict[str, Any], files: Files) -> str:
    """All points of all curves as CSV."""
    rows: list[list[Any]] = []
    for name, selection in found["selections"].items():
        for code, own in selection.get("by_language", {"": selection}).items():
            points = own.get("curve") or [{"weight": own["weight"]}]
            rows += [
                [
                    name,
                    code,
                    point["weight"],
                    *(point.get(figure) for figure in ("gold_log_likelihood", "entropy", "accuracy")),
                    point.get(own.get("criterion", "")),
                    str(point["weight"] == own["weight"]),
                ]
                for point in points
            ]
    header = ["method", "language", "weight", "gold_log_likelihood", "entropy", "accuracy", "criterion", "chosen"]
    return files.add("weights.csv", header, rows)


def table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """All points of the curves on the development languages as text, or None where there are none."""
    header, rows = curve_table(found)
    return ([*header[:-1], "chosen"], rows) if rows else None
