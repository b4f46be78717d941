"""Figures for the report, with matplotlib (the `report` extra)."""

import io
from pathlib import Path
from typing import Any

import matplotlib

from lingraft.escaping import one_line
from lingraft.replacing import write_text
from lingraft.report.tables import labelled

matplotlib.use("svg")
import matplotlib.pyplot as plt


def draw_curves(found: dict[str, Any], path: Path) -> None:
    """Draws the λ curves of a run's results: gold log-likelihood on the development languages, the chosen points marked."""
    # Names are text, and no formulas: a dollar sign in one is a dollar sign.
    plain: dict[Any, Any] = {"text.parse_math": False, "text.usetex": False}
    with plt.rc_context({"svg.hashsalt": "lingraft", "font.size": 10, **plain}):
        figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        for name, selection in labelled(found).items():
            curve = selection["curve"]
            if not curve:
                continue
            weights, values = [p["weight"] for p in curve], [p["gold_log_likelihood"] for p in curve]
            (line,) = axes.plot(
                weights, values, marker="o", markersize=3, label=one_line(found["methods"][name]["title"])
            )
            best = next(p for p in curve if p["weight"] == selection["weight"])
            axes.plot(
                best["weight"],
                best["gold_log_likelihood"],
                marker="o",
                markersize=9,
                fillstyle="none",
                color=line.get_color(),
            )
        axes.set_xlabel("weight λ (ring: chosen)")
        axes.set_ylabel("mean gold log-likelihood, nats")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        plt.close(figure)
    write_text(path, drawn.getvalue())
