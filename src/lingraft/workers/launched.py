"""Steps made by all processes of a launcher together, as torchrun and `accelerate launch` start them.

The first process runs the schedule; the others do what it says. A step that loads the base model is made by all of them, in one
folder of the store, which is the first one's; other steps are the first one's alone.
"""

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from pathlib import Path

from lingraft import processes
from lingraft.costs.needs import LOADING
from lingraft.errors import LingraftError
from lingraft.plan import Step
from lingraft.session import Session
from lingraft.workers import Ended, Progress
from lingraft.workers.local import carried_out, make


class Launched:
    """The first of a launcher's processes, which the others follow.

    Args:
        session: What the steps share; the base model is loaded in all processes.
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
        """Makes the steps, together with the other processes, and comes back when they are made.

        Raises:
            LingraftError: A step that all processes make failed: the others cannot be asked how far they are.
        """
        self._session.progress = lambda done, total, note: self._progress(group[0], done, total, note)
        together = group[0].kind in LOADING
        began: list[Step] = []

        def tell(steps: Sequence[Step]) -> None:
            began.extend(steps)
            if together and steps:
                processes.shared(lambda: list(steps))

        self._ended = make(group, self._session, tell)
        for step, error in self._ended:
            if together and error is not None and step in began:
                raise error

    def ended(self, seconds: float) -> list[Ended]:
        """What was made last."""
        ended, self._ended = self._ended, []
        return ended

    def stop(self) -> None:
        """Takes what is on the base model off it."""
        self._session.release()


def meet(device: str) -> None:
    """Joins the other processes, before anything is loaded.

    Args:
        device: The experiment's.
    """
    import torch

    from lingraft.backbones import device_name

    processes.start(torch.device(device_name(device)))


def follow(session: Session) -> None:
    """What the other processes do: they make what the first one says, in folders that are thrown away, until it dismisses them.

    Raises:
        LingraftError: A step failed.
    """
    while steps := processes.shared(list[Step]):
        with ExitStack() as folders:
            works = [folders.enter_context(processes.own_folder(Path())) for _ in steps]
            errors: list[LingraftError | None] = carried_out(list(zip(steps, works, strict=True)), session)
            for error in errors:
                if error is not None:
                    raise error


def dismiss() -> None:
    """Tells the others that nothing is left to do."""
    processes.shared(list[Step])
