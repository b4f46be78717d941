"""Steps made by all processes of a launcher together, as torchrun and `accelerate launch` start them.

The first process runs the schedule; the others do what it says. A step that loads the base model is made by all of them, in one
folder of the store, which is the first one's; other steps are the first one's alone.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lingraft import processes
from lingraft.costs.needs import LOADING
from lingraft.errors import LingraftError
from lingraft.plan import Step
from lingraft.session import Session
from lingraft.workers.local import Local, carried_out


class Launched(Local):
    """The first of a launcher's processes, which the others follow; the base model is loaded in all of them."""

    def start(self, group: Sequence[Step]) -> None:
        """Makes the steps, together with the other processes, and comes back when they are made.

        Raises:
            LingraftError: A step that all processes make failed: the others cannot be asked how far they are.
        """
        together = group[0].kind in LOADING
        begun: list[Step] = []

        def tell(steps: Sequence[Step]) -> None:
            begun.extend(steps)
            if together and steps:
                processes.shared(lambda: list(steps))

        self._make(group, tell)
        for step, error in self._ended:
            if together and error is not None and step in begun:
                raise error


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
