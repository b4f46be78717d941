"""How a command shows that it is at work."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import TaskID

    from lingraft.plan import Step


def stderr() -> Console:
    """Where messages go: results alone are on standard output."""
    return Console(stderr=True)


class Watcher:
    """Shows a run: a bar for all steps and one for each that is being made on a terminal, a line a step elsewhere."""

    def __init__(self, quiet: bool) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = stderr()
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            transient=True,
        )
        self._quiet = quiet
        self._lines = not quiet and not self.console.is_terminal
        self._all = self.bars.add_task("all steps", total=None, note="", visible=False)
        self._works: dict[str, _Work] = {}
        self._finished = 0

    def __enter__(self) -> "Watcher":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def step(self, step: "Step", number: int, total: int) -> None:
        """A step of a run begins."""
        self.bars.update(self._all, completed=self._finished, total=total, visible=True)
        self.begin(step.label, f"[{number}/{total}] ", step.key)

    def begin(self, label: str, before: str = "", key: str = "") -> None:
        """Work that is shown by one bar begins."""
        from rich.markup import escape

        if key in self._works:
            self.bars.remove_task(self._works[key].bar)
        now = time.monotonic()
        bar = self.bars.add_task(escape(label), total=None, note="")
        self._works[key] = _Work(label, bar, began=now, said=now)
        if self._lines:
            self.console.print(before + label, markup=False, highlight=False)

    def progress(self, done: int, total: int, note: str) -> None:
        """The only work goes on."""
        self._advance("", done, total, note)

    def step_progress(self, step: "Step", done: int, total: int, note: str) -> None:
        """A step goes on."""
        if step.key not in self._works:
            self.begin(step.label, key=step.key)
        self._advance(step.key, done, total, note)

    def ended(self, step: "Step") -> None:
        """A step has ended."""
        work = self._works.pop(step.key, None)
        if work is not None:
            self.bars.remove_task(work.bar)
        self._finished += 1
        self.bars.update(self._all, completed=self._finished)

    def failure(self, step: "Step", error: Exception) -> None:
        """A step failed; the run goes on with what does not need it."""
        self.console.print(f"failed: {step.label}\n{error}", markup=False, highlight=False)

    def notice(self, text: str) -> None:
        """Something that whoever watches should know."""
        if not self._quiet:
            self.console.print(text, markup=False, highlight=False)

    def _advance(self, key: str, done: int, total: int, note: str) -> None:
        """Work goes on; without a terminal that is said twice a minute."""
        if key not in self._works:
            return
        work = self._works[key]
        self.bars.update(work.bar, completed=done, total=total or None, note=note)
        now = time.monotonic()
        if done <= 1:  # loading the model tells nothing about the rest
            work.began = now
        if self._lines and 1 < done < total and now - work.said > 30:
            work.said = now
            left = (now - work.began) / (done - 1) * (total - done)
            which = f"{work.label}: " if len(self._works) > 1 else ""
            self.console.print(f"  {which}{done}/{total} {note}, {duration(left)} left", markup=False, highlight=False)


@dataclass
class _Work:
    """What one bar shows."""

    label: str
    bar: "TaskID"
    began: float
    said: float


def duration(seconds: float | None) -> str:
    """About how long, for people."""
    if seconds is None:
        return "unknown until this model has been measured here (run once, or wait for the first steps)"
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
