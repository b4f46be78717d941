"""Drawings as SVG: Vega-Lite, made with Altair and rendered once, so that a page needs no library.

Colours are given as a palette: CSS variables for the page, which so needs no second drawing for dark, or plain ones for files.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import altair as alt
import vl_convert

from lingraft.escaping import one_line

Row = dict[str, Any]
ROWS = "rows"
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
LABELS = 126
"""The most room for titles beside bars."""
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]]


@dataclass(frozen=True)
class Palette:
    """The colours of a drawing."""

    ink: str
    muted: str
    grid: str
    accent: str
    strong: str
    soft: str
    softer: str
    series: tuple[str, ...]


CSS = Palette(
    "var(--ink)",
    "var(--muted)",
    "var(--rule)",
    "var(--accent)",
    "var(--bar-chosen)",
    "var(--bar)",
    "var(--bar-base)",
    tuple(f"var(--c{n})" for n in range(1, 7)),
)
PLAIN = Palette(
    "#1b2228",
    "#56616b",
    "#d9dee3",
    "#0b5c94",
    "#3f8fc6",
    "#b3cee0",
    "#c9ced3",
    ("#0b5c94", "#b35309", "#3f7d4e", "#8a4f9e", "#5b6670", "#a8842c"),
)


def _configured(chart: Any, palette: Palette) -> dict[str, Any]:
    """The Vega-Lite specification of a chart with the page's manners."""
    return (
        chart.configure(background="transparent", padding={"left": 12, "top": 4, "right": 4, "bottom": 4})
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=palette.muted,
            titleColor=palette.muted,
            titleFontWeight="normal",
            titleFontSize=12,
            labelFontSize=12,
            gridColor=palette.grid,
            domainColor=palette.grid,
            tickColor=palette.grid,
            titlePadding=8,
            aria=False,
        )
        .configure_legend(
            labelColor=palette.ink, labelFontSize=12, titleColor=palette.muted, symbolStrokeWidth=0, aria=False
        )
        .to_dict()
    )


def _rendered(specification: dict[str, Any]) -> str:
    return vl_convert.vegalite_to_svg(_clean(specification), allowed_base_urls=[])


def _clean(value: Any) -> Any:
    """Texts on one line without control characters: a NUL among them ends the process that draws."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    return [_clean(inner) for inner in value] if isinstance(value, list) else value


class Drawn:
    """A chart that is compiled once and drawn with other rows again and again."""

    def __init__(self, specification: dict[str, Any]) -> None:
        self._vega = vl_convert.vegalite_to_vega(specification)

    def with_rows(self, rows: Sequence[Row]) -> str:
        """The SVG of these rows."""
        vega = copy.copy(self._vega)
        vega["data"] = [{**d, "values": _clean(list(rows))} if d["name"] == ROWS else d for d in vega["data"]]
        return vl_convert.vega_to_svg(vega, allowed_base_urls=[])


def _of(rows: Sequence[Row]) -> Any:
    return alt.Chart(alt.InlineData(values=list(rows), name=ROWS))


def names_apart(titles: Sequence[str]) -> list[str]:
    """Titles on one line each, none twice: rows of a chart are told apart by them."""
    seen: dict[str, int] = {}
    found = []
    for title in map(one_line, titles):
        seen[title] = seen.get(title, 0) + 1
        found.append(title if seen[title] == 1 else f"{title} ({seen[title]})")
    return found


def _labels(limit: int, least: int = 0) -> Any:
    axis = alt.Axis(
        title=None, labelLimit=limit, minExtent=least, domain=False, ticks=False, labelPadding=8, aria=False
    )
    return alt.Y("method:N", sort=None, axis=axis)


@cache
def bars(most: float, labels: int = LABELS, palette: Palette = CSS) -> Drawn:
    """Bars with intervals, 304 wide: rows of `method`, `value`, `low`, `high` (percent), `role`, `figure`, `says`.

    Args:
        most: Where the axis ends.
        labels: The room for the methods' titles, the same in drawings that stand beside each other.
        palette: The colours.
    """
    width = 104 + LABELS - labels
    base = _of([_BAR]).encode(y=_labels(labels, labels + 8))
    x = alt.X(
        "value:Q",
        scale=alt.Scale(domain=[0, most]),
        axis=alt.Axis(title=None, values=[0, most / 2, most], domain=False, labelFlush=False),
    )
    roles = alt.Scale(domain=["chosen", "baseline", "other"], range=[palette.strong, palette.softer, palette.soft])
    bar = base.mark_bar(height=12, cornerRadiusEnd=2).encode(
        x=x, color=alt.Color("role:N", scale=roles, legend=None), description="says:N"
    )
    reach = base.mark_rule(strokeWidth=2, color=palette.ink, aria=False).encode(x="low:Q", x2="high:Q")
    figure = base.mark_text(align="right", fontSize=12, color=palette.ink, aria=False).encode(
        x=alt.value(width + 40), text="figure:N"
    )
    mark = base.mark_text(align="left", fontSize=11, color=palette.ink, aria=False).encode(
        x=alt.value(width + 44), text="mark:N"
    )
    chart = alt.layer(bar, reach, figure, mark).properties(width=width, height=alt.Step(22))
    return Drawn(_configured(chart, palette))


_BAR: Row = {"method": "", "value": 0, "low": 0, "high": 0, "role": "other", "figure": "", "mark": "", "says": ""}


def forest(rows: Sequence[Row], wide: bool, palette: Palette = CSS) -> str:
    """Differences with intervals around zero: rows of `method`, `value`, `low`, `high` (points), `role`, `figure`, `says`."""
    width, limit, room = (480, 200, 165) if wide else (112, 110, 50)
    base = _of(rows).encode(y=_labels(limit))
    axis = alt.Axis(
        title="points" if wide else None,
        tickCount=7 if wide else 3,
        domain=False,
        labelExpr="datum.value === 0 ? '0' : format(datum.value, '+')",
    )
    x = alt.X("value:Q", scale=alt.Scale(nice=True, zero=True), axis=axis)
    roles = alt.Scale(domain=["chosen", "baseline", "other"], range=[palette.accent, palette.muted, palette.muted])
    colour = alt.Color("role:N", scale=roles, legend=None)
    zero = alt.Chart(alt.InlineData(values=[{"x": 0}])).mark_rule(color=palette.ink, aria=False).encode(x="x:Q")
    reach = base.mark_rule(strokeWidth=3, strokeCap="round", aria=False).encode(
        x=alt.X("low:Q"), x2="high:Q", color=colour
    )
    point = base.mark_point(filled=True, size=70, opacity=1).encode(x=x, color=colour, description="says:N")
    text = base.mark_text(align="right", fontSize=12, color=palette.ink, aria=False).encode(
        x=alt.value(width + room), text="figure:N" if wide else "short:N"
    )
    chart = alt.layer(zero, reach, point, text).properties(width=width, height=alt.Step(24))
    return _rendered(_configured(chart, palette))


def curves(
    rows: Sequence[Row],
    names: Sequence[str],
    width: int,
    *,
    palette: Palette = CSS,
    legend: bool = True,
    domain: tuple[float, float] | None = None,
    title: str = "mean gold log-likelihood, nats",
) -> str:
    """λ curves, the chosen points ringed: rows of `method`, `weight`, `value`, `chosen` (0 or 1), `says`.

    Args:
        rows: The points.
        names: The curves, in order.
        width: Of the whole drawing, about, in pixels.
        palette: The colours.
        legend: Whether curves are named below; without it there is one.
        domain: Of the ordinate, where several drawings are to be compared.
        title: Of the ordinate.
    """
    many = len(names)

    def cycled(values: Sequence[Any]) -> list[Any]:
        return [values[n % len(values)] for n in range(many)]

    below = (
        alt.Legend(title=None, orient="bottom", columns=1 if width < 500 else 2, labelLimit=260, symbolSize=60)
        if legend
        else None
    )
    base = _of(rows).encode(
        x=alt.X(
            "weight:Q", axis=alt.Axis(title="weight λ (ring: chosen)", grid=False, tickCount=6 if width > 400 else 4)
        ),
        color=alt.Color("method:N", scale=alt.Scale(domain=list(names), range=cycled(palette.series)), legend=below),
        shape=alt.Shape("method:N", scale=alt.Scale(domain=list(names), range=cycled(SHAPES)), legend=below),
    )
    scale = alt.Scale(zero=False, domain=list(domain)) if domain else alt.Scale(zero=False)
    y = alt.Y("value:Q", scale=scale, axis=alt.Axis(title=title, tickCount=5, domain=False, ticks=False))
    dashes = alt.StrokeDash("method:N", scale=alt.Scale(domain=list(names), range=cycled(DASHES)), legend=None)
    line = base.mark_line(strokeWidth=2, aria=False).encode(y=y, strokeDash=dashes)
    point = base.mark_point(filled=True, size=36, opacity=1).encode(y=y, description="says:N")
    ring = (
        base.mark_point(filled=False, size=240, strokeWidth=2.5, shape="circle", aria=False)
        .transform_filter("datum.chosen == 1")
        .encode(y=y, shape=alt.value("circle"))
    )
    chart = alt.layer(line, point, ring).properties(width=width - 74, height=170 if width < 400 else 260)
    return _rendered(_configured(chart, palette))


@cache
def training(domain: tuple[float, float], palette: Palette = CSS) -> Drawn:
    """Losses of one training, 304 wide: rows of `step`, `loss`, `held` (or None), `says`.

    Args:
        domain: Of the loss, the same for trainings that are compared.
        palette: The colours.
    """
    base = _of([{"step": 0, "loss": 0.0, "held": 0.0, "says": ""}]).encode(
        x=alt.X("step:Q", axis=alt.Axis(title="step", grid=False, tickCount=4, tickMinStep=1))
    )
    scale = alt.Scale(domain=list(domain), zero=False, clamp=True)
    axis = alt.Axis(title=None, tickCount=4, domain=False, ticks=False)
    loss = base.mark_line(strokeWidth=1.75, color=palette.accent, aria=False).encode(
        y=alt.Y("loss:Q", scale=scale, axis=axis)
    )
    # What the pointer meets: nothing to look at, and only as many as it can tell apart.
    dots = (
        base.transform_filter("datum.says != ''")
        .mark_point(filled=True, size=220, opacity=0, clip=True, color=palette.accent)
        .encode(y=alt.Y("loss:Q", scale=scale), description="says:N")
    )
    held = (
        base.transform_filter("isValid(datum.held)")
        .mark_line(strokeWidth=2, strokeDash=[5, 3], color=palette.series[1], aria=False)
        .encode(y=alt.Y("held:Q", scale=scale))
    )
    squares = (
        base.transform_filter("isValid(datum.held)")
        .mark_point(filled=True, shape="square", size=40, opacity=1, color=palette.series[1], aria=False)
        .encode(y=alt.Y("held:Q", scale=scale))
    )
    chart = alt.layer(loss, dots, held, squares).properties(width=252, height=120)
    return Drawn(_configured(chart, palette))


def dendrogram(
    names: Sequence[str],
    order: Sequence[int],
    linkage: Sequence[Sequence[float]],
    wide: bool,
    palette: Palette = CSS,
) -> str:
    """Which languages' divergences are alike: a tree with the leaves at the right, in the order of the atlas.

    Args:
        names: Of the languages.
        order: The leaves from top to bottom, as indices into the names.
        linkage: What was joined to what, at which 1 − cosine (SciPy's format).
        wide: For a desktop; else for a phone.
        palette: The colours.
    """
    heights = [float(row[2]) for row in linkage]
    most, least = max(heights, default=1.0) or 1.0, min(heights, default=0.0)
    # Where all are joined at nearly one height, the axis begins before the first: else the tree would be a comb.
    begin = max(0.0, least - (most - least)) if most - least < 0.25 * most else 0.0
    begin = 0.0 if most - least < 0.01 * most else begin
    place: dict[int, tuple[float, float]] = {leaf: (float(n), begin) for n, leaf in enumerate(order)}
    segments: list[Row] = []
    for n, (left, right, height, _) in enumerate(linkage):
        (one, from_one), (other, from_other) = place[int(left)], place[int(right)]
        says = f"joined at {height:.3f}"
        segments += [
            {"x": from_one, "x2": height, "y": one, "y2": one, "says": says},
            {"x": from_other, "x2": height, "y": other, "y2": other, "says": says},
            {"x": height, "x2": height, "y": one, "y2": other, "says": says},
        ]
        place[len(names) + n] = ((one + other) / 2, float(height))
    width, room = (640, 150) if wide else (180, 100)
    y = alt.Scale(domain=[len(names) - 0.5, -0.5], nice=False, zero=False)
    x = alt.Scale(domain=[most + 0.04 * (most - begin), begin], nice=False, zero=False)
    axis = alt.Axis(title="1 − cosine", tickCount=4, grid=True, domain=False)
    lines = (
        _of(segments)
        .mark_rule(strokeWidth=1.75, color=palette.accent, strokeCap="square")
        .encode(
            x=alt.X("x:Q", scale=x, axis=axis),
            x2="x2:Q",
            y=alt.Y("y:Q", scale=y, axis=None),
            y2="y2:Q",
            description="says:N",
        )
    )
    leaves = [{"name": names[leaf], "y": n} for n, leaf in enumerate(order)]
    labels = (
        alt.Chart(alt.InlineData(values=leaves))
        .mark_text(align="left", dx=8, fontSize=12, color=palette.ink, limit=room, aria=False)
        .encode(x=alt.value(width), y=alt.Y("y:Q", scale=y, axis=None), text="name:N")
    )
    chart = alt.layer(lines, labels).properties(width=width, height=22 * len(names))
    return _rendered(_configured(chart, palette))
