"""Steps made in this process, one after the other."""

from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from pathlib import Path

from lingraft.errors import LingraftError
from lingraft.execution import execute, execute_together
from lingraft.plan import Step
from lingraft.session import Session
from lingraft.workers import Ended, Progress

Begun = Callable[[Sequence[Step]], object]


class Local:
    """This process.

    Args:
        session: What the steps share.
        progress: Told how far a step is.
    """

    def __init__(self, session: Session, progress: Progress) -> None:
        self._session, self._progress = session, progress
        self._ended: list[Ended] = []

    def sort(self, step: Step) -> Hashable:
        """All steps are alike here."""
        return None

    def room(self, step: Step) -> bool:
        """One group at a time."""
        return not self._ended

    def start(self, group: Sequence[Step]) -> None:
        """Makes the steps, and comes back when they are made."""
        self._make(group)

    def _make(self, group: Sequence[Step], begun: Begun = lambda steps: None) -> None:
        def told(done: int, total: int, note: str, loss: float | None = None, /) -> None:
            self._progress(group[0], done, total, note, loss)

        self._session.progress = told
        self._ended = make(group, self._session, begun)

    def ended(self, seconds: float) -> list[Ended]:
        """What was made last."""
        ended, self._ended = self._ended, []
        return ended

    def stop(self) -> None:
        """Takes what is on the base model off it."""
        self._session.release()


def make(group: Sequence[Step], session: Session, begun: Begun = lambda steps: None) -> list[Ended]:
    """Makes a step, or trainings together: their folders appear in the store, unless there is an error.

    Args:
        group: The step, or the trainings.
        session: What they share.
        begun: Told which of them nobody else is making, before they are made.
    """
    found: list[Ended] = []
    try:
        with ExitStack() as everything:
            open_: list[tuple[Step, ExitStack, Path]] = []
            for step in group:
                own = everything.enter_context(ExitStack())
                try:
                    work = own.enter_context(session.store.making(step.kind, step.key, step.identity()))
                except LingraftError as error:
                    found.append((step, error))
                else:
                    open_.append((step, own, work))
            begun([step for step, _, _ in open_])
            errors = carried_out([(step, work) for step, _, work in open_], session)
            for (step, own, _), error in zip(open_, errors, strict=True):
                try:
                    with own:  # Its folder appears.
                        if error is not None:
                            raise error
                except LingraftError as raised:
                    found.append((step, raised))
                else:
                    found.append((step, None))
    except LingraftError as error:  # Of a folder's own end, as when another process has taken it over.
        known = {step.key for step, _ in found}
        return [*found, *((step, error) for step in group if step.key not in known)]
    return found


def carried_out(steps: Sequence[tuple[Step, Path]], session: Session) -> list[LingraftError | None]:
    """Carries out a step, or trainings together, in working folders: for each why it failed, or None."""
    if len(steps) > 1:
        return execute_together([step for step, _ in steps], session, [work for _, work in steps])
    try:
        for step, work in steps:
            execute(step, session, work)
    except LingraftError as error:
        return [error]
    return [None] * len(steps)
