"""Who makes steps: this process, or actors on a Ray cluster."""

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from lingraft.errors import LingraftError
from lingraft.plan import Step

Ended = tuple[Step, LingraftError | None]
"""A step that was made, or why it was not."""
Progress = Callable[[Step, int, int, str, float | None], None]
"""Called with a step that is being made, how much of it is done, of how much, a note, and of a training the loss."""
Notice = Callable[[str], None]
"""Called with what whoever watches should know."""


class Workers(Protocol):
    """What the runner asks of whoever makes its steps."""

    def sort(self, step: Step) -> Hashable:
        """What a step asks for; steps of one sort are taken in their order."""
        ...

    def room(self, step: Step) -> bool:
        """Whether a step that is ready could begin now."""
        ...

    def start(self, group: Sequence[Step]) -> None:
        """Begins steps, for which there is room; several are trainings that go on together.

        A group that has begun ends, sooner or later, in `ended`.
        """
        ...

    def ended(self, seconds: float) -> list[Ended]:
        """The steps that have ended; waits for the first of them, no longer than so many seconds."""
        ...

    def stop(self) -> None:
        """Lets go of everything; what is being made is left as it is."""
        ...
