"""A run in a few lines of a terminal, of any width, with or without signs beyond ASCII."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lingraft.escaping import one_line
from lingraft.progressing import Running, State

_HEIGHTS, _PLAIN_HEIGHTS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
_GAP = 2
_LABEL = 22
"""Columns that a label keeps while other things may still go."""


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """A curve in one line of text: lowest and highest are those of the curve; of several values in a column the mean."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [n * len(values) // count for n in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    signs = _PLAIN_HEIGHTS if ascii_only else _HEIGHTS
    low, high = min(means), max(means)
    scale = (len(signs) - 1) / (high - low) if high > low else 0.0
    return "".join(signs[round((value - low) * scale)] for value in means)


def bar(done: float, total: float, width: int, ascii_only: bool = False) -> str:
    """How much is done, as a line of `width` columns."""
    full = 0 if total <= 0 else min(width, int(width * done / total))
    return ("#" if ascii_only else "━") * full + ("." if ascii_only else "─") * (width - full)


def clock(seconds: float | None) -> str:
    """A time as 0:42 or 1:02:03."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float | None) -> str:
    """About how long, for people."""
    if seconds is None:
        return "unknown until this model has been measured here (run once, or wait for the first steps)"
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def time_left(state: State) -> str:
    """How long a run still takes, for people; nothing where no step was measured yet."""
    if state.left is None:
        return ""
    said = duration(state.left)
    return f"{said if state.sure else said.replace('about', 'more than')} left"


@dataclass(frozen=True)
class View:
    """A run as lines that fit wherever they are shown.

    Attributes:
        state: How far it is.
        title: What stands in front of the first line; empty: nothing is said of the whole.
        elapsed: Seconds since the run began; None: that is not shown.
        notes: Lines below, such as failures, with a style each.
        most: Lines, at most; None: as many as the terminal has.
    """

    state: State
    title: str = ""
    elapsed: float | None = None
    notes: tuple[tuple[str, str], ...] = ()
    most: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, self.most or max(1, console.height - 1)
        for text in self.lines(width, height, options.ascii_only):
            text.no_wrap, text.overflow = True, "crop"
            yield text

    def lines(self, width: int, height: int, ascii_only: bool = False) -> list[Text]:
        """The lines, none wider than `width` and no more than `height`."""
        found = [self._head(width, ascii_only)] if self.title else []
        notes = self.notes[-max(0, min(len(self.notes), (height - len(found)) // 2)) :] if self.notes else ()
        room = height - len(found) - len(notes)
        works = self.state.running
        shown = works if len(works) <= room else works[: max(0, room - 1)]
        found += _table(shown, width, ascii_only)
        if len(shown) < len(works) and len(found) + len(notes) < height:
            found.append(Text(f"and {len(works) - len(shown)} more", style="dim"))
        found += [Text(text, style=style) for text, style in notes]
        more = "..." if ascii_only else "…"
        return [_cut(text, width, more) for text in found[:height]]

    def _head(self, width: int, ascii_only: bool) -> Text:
        state = self.state
        parts = [(f"{state.finished}/{state.total} steps" if state.total else "", "bold")]
        parts += [(f"{state.failed} failed", "bold red")] if state.failed else []
        parts.append((time_left(state), ""))
        if self.elapsed is not None:
            parts.append((f"{clock(self.elapsed)} so far", "dim"))
        parts = [(text, style) for text, style in parts if text]
        while len(parts) > 1 and _width(parts) + min(cell_len(self.title), 12) > width:
            parts.pop()
        line = Text(one_line(self.title), style="bold")
        line.truncate(max(1, width - _width(parts)), overflow="ellipsis" if not ascii_only else "crop")
        for number, (text, style) in enumerate(parts):
            line.append(" " * _GAP).append(text, style)
            left = width - cell_len(line.plain) - _width(parts[number + 1 :])
            if not number and state.total and left >= 8 + _GAP:
                line.append(" " * _GAP).append(
                    bar(state.finished, state.total, min(left - _GAP, 30), ascii_only), "cyan"
                )
        return line


def _width(parts: Sequence[tuple[str, str]]) -> int:
    return sum(_GAP + cell_len(text) for text, _ in parts)


def _cut(text: Text, width: int, more: str) -> Text:
    """A text that is no wider; what is cut away shows."""
    if cell_len(text.plain) <= width:
        return text
    text.truncate(max(0, width - len(more)))
    return text.append(more[:width])


def _table(works: Sequence[Running], width: int, ascii_only: bool) -> list[Text]:
    """A line for each step. Where there is little room the bar goes first, then the curve, the note, and the time left."""
    if not works:
        return []
    labels = [one_line(work.label) for work in works]
    columns: dict[str, list[str]] = {
        "count": [f"{work.done}/{work.total}" if work.total else "" for work in works],
        "note": [one_line(work.note) for work in works],
        "curve": list(_curves(works, 24 if width >= 120 else 12, ascii_only)),
        "left": [_time(work) for work in works],
        "bar": [bar(work.done, work.total, 20 if width >= 120 else 10, ascii_only) for work in works],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    wanted = min(_LABEL, max(map(cell_len, labels)))
    for name in ("bar", "curve", "note", "left", "count"):
        if wanted + _taken(columns) <= width:
            break
        columns.pop(name, None)
    place = max(1, min(max(map(cell_len, labels)), width - _taken(columns)))
    lines: list[Text] = []
    for number, label in enumerate(labels):
        more = "..." if ascii_only else "…"
        line = _cut(Text(label), place, more)
        line.append(" " * (place - cell_len(line.plain)))
        for name in [name for name in ("bar", "count", "note", "curve", "left") if name in columns]:
            wide = max(map(cell_len, columns[name]))
            cell = columns[name][number]
            cell = cell.rjust(wide) if name in ("count", "left") else set_cell_size(cell, wide)
            line.append(" " * _GAP).append(cell, {"bar": "cyan", "curve": "green", "left": "dim"}.get(name, ""))
        lines.append(line)
    return lines


def _time(work: Running) -> str:
    return f"{clock(work.left)} left" if work.left is not None else f"{clock(work.seconds)} so far"


def _taken(columns: dict[str, list[str]]) -> int:
    return sum(_GAP + max(map(cell_len, cells)) for cells in columns.values())


def _curves(works: Sequence[Running], width: int, ascii_only: bool) -> Iterator[str]:
    for work in works:
        yield sparkline([loss for _, loss in work.losses], width, ascii_only) if len(work.losses) > 1 else ""
