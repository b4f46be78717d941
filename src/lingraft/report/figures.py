"""Figures beside the report, as files of their own, with Altair and vl-convert (the `report` extra)."""

from pathlib import Path
from typing import Any

from lingraft.replacing import write_text
from lingraft.report.page.charts import PLAIN, curves, names_apart
from lingraft.report.page.weights import curve_rows
from lingraft.report.tables import labelled


def draw_curves(found: dict[str, Any], path: Path) -> None:
    """Draws the λ curves of a run's results: gold log-likelihood on the development languages, the chosen points marked."""
    chosen = {name: selection for name, selection in labelled(found).items() if selection["curve"]}
    titles = names_apart([found["methods"][name]["title"] for name in chosen])
    rows = [
        row for title, selection in zip(titles, chosen.values(), strict=True) for row in curve_rows(title, selection)
    ]
    write_text(path, curves(rows, titles, 640, palette=PLAIN))
