"""How a command shows that it is at work."""

import time
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from lingraft.plan import Step


def stderr() -> Console:
    """Where messages go: results alone are on standard output."""
    return Console(stderr=True)


class Watcher:
    """Shows a run: bars with the time left on a terminal, a line a step elsewhere."""

    def __init__(self, quiet: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console = stderr()
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
            TimeRemainingColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            transient=True,
        )
        self._lines = not quiet and not self.console.is_terminal
        self._began = self._said = time.monotonic()
        self._all = self.bars.add_task("all steps", total=None, note="")
        self._one = self.bars.add_task("", total=None, note="", visible=False)

    def __enter__(self) -> "Watcher":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def step(self, step: "Step", number: int, total: int) -> None:
        """A step of a run begins."""
        self.bars.update(self._all, completed=number - 1, total=total)
        self.begin(step.label, f"[{number}/{total}] ")

    def begin(self, label: str, before: str = "") -> None:
        """Work that is shown by one bar begins."""
        from rich.markup import escape

        self.bars.reset(self._one, total=None, description=escape(label), visible=True)
        self._began = self._said = time.monotonic()
        if self._lines:
            self.console.print(before + label, markup=False, highlight=False)

    def progress(self, done: int, total: int, note: str) -> None:
        """The work goes on; without a terminal that is said twice a minute."""
        self.bars.update(self._one, completed=done, total=total or None, note=note)
        now = time.monotonic()
        if done <= 1:  # loading the model tells nothing about the rest
            self._began = now
        if self._lines and 1 < done < total and now - self._said > 30:
            self._said = now
            left = (now - self._began) / (done - 1) * (total - done)
            self.console.print(f"  {done}/{total} {note}, {duration(left)} left", markup=False, highlight=False)

    def failure(self, step: "Step", error: Exception) -> None:
        """A step failed; the run goes on with what does not need it."""
        self.console.print(f"failed: {step.label}\n{error}", markup=False, highlight=False)


def duration(seconds: float | None) -> str:
    """About how long, for people."""
    if seconds is None:
        return "unknown until this model has been measured here (run once, or wait for the first steps)"
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
