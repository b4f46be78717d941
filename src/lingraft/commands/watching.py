"""How a command shows that it is at work."""

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console

from lingraft.commands.drawing import View, duration
from lingraft.progressing import Board

__all__ = ["Watcher", "duration", "is_live", "stderr"]

if TYPE_CHECKING:
    from lingraft.plan import Step

_OFTEN = 30.0
"""Seconds between lines about one step where there is no terminal."""


def stderr() -> Console:
    """Where messages go: results alone are on standard output."""
    return Console(stderr=True)


def is_live(console: Console) -> bool:
    """Whether lines can be drawn over one another: on a terminal that can move, whatever colours are asked for."""
    try:
        tty = console.file.isatty()
    except (AttributeError, ValueError):
        return False
    return tty and console.is_terminal and os.environ.get("TERM", "") not in ("dumb", "unknown")


class Watcher:
    """Shows a run: a line for all steps and one for each that is being made on a terminal, a line a step elsewhere."""

    def __init__(self, quiet: bool) -> None:
        from rich.live import Live

        self.console = stderr()
        live = is_live(self.console) and not quiet
        self._board, self._began = Board(), time.monotonic()
        self._live = (
            Live(console=self.console, get_renderable=self._view, refresh_per_second=4, transient=True)
            if live
            else None
        )
        self._quiet = quiet
        self._lines = not quiet and not live
        self._said: dict[str, float] = {}

    def __enter__(self) -> "Watcher":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _view(self) -> View:
        now = time.monotonic()
        state = self._board.state(now)
        return View(state, "all steps" if state.total else "", now - self._began if state.total else None)

    def planned(self, todo: Mapping[str, int], known: Mapping[str, float]) -> None:
        """The steps of a run are about to begin."""
        self._board.expect(todo, known)

    def step(self, step: "Step", number: int, total: int) -> None:
        """A step of a run begins."""
        self._begin(step.label, f"[{number}/{total}] ", step.key, step.kind, total, step.sort)

    def begin(self, label: str) -> None:
        """The only work begins."""
        self._begin(label)

    def _begin(
        self, label: str, before: str = "", key: str = "", kind: str = "", total: int = 0, sort: str = ""
    ) -> None:
        now = self._said[key] = time.monotonic()
        self._board.begin(key, label, now, kind=kind, sort=sort, total=total)
        if self._lines:
            self.console.print(before + label, markup=False, highlight=False)

    def progress(self, done: int, total: int, note: str, loss: float | None = None) -> None:
        """The only work goes on."""
        self._advance("", done, total, note, loss)

    def step_progress(self, step: "Step", done: int, total: int, note: str, loss: float | None) -> None:
        """A step goes on."""
        if step.key not in self._said:
            self._begin(step.label, key=step.key, kind=step.kind)
        self._advance(step.key, done, total, note, loss)

    def ended(self, step: "Step") -> None:
        """A step has ended."""
        self._said.pop(step.key, None)
        self._board.ended(step.key, time.monotonic())

    def failure(self, step: "Step", error: Exception) -> None:
        """A step failed; the run goes on with what does not need it."""
        self._board.failure(step.label, str(error))
        self.console.print(f"failed: {step.label}\n{error}", markup=False, highlight=False)

    def notice(self, text: str) -> None:
        """Something that whoever watches should know."""
        if not self._quiet:
            self.console.print(text, markup=False, highlight=False)

    def _advance(self, key: str, done: int, total: int, note: str, loss: float | None) -> None:
        """Work goes on; without a terminal that is said twice a minute."""
        now = time.monotonic()
        self._board.progress(key, done, total, note, loss, now)
        if not self._lines or not 1 < done < total or now - self._said.get(key, now) <= _OFTEN:
            return
        self._said[key] = now
        work = self._board.work(key, now)
        if work is not None:
            which = f"{work.label}: " if len(self._said) > 1 else ""
            left = f", {duration(work.left)} left" if work.left is not None else ""
            self.console.print(f"  {which}{done}/{total} {note}{left}", markup=False, highlight=False)
