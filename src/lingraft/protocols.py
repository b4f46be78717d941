"""Which languages a claim is made on, and which ones every choice is made on: fixed before anything is measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Protocol:
    """A division of languages.

    Attributes:
        source: The language with labels.
        groups: Target languages by group; figures are given for every group.
        development: Languages on which λ and every other choice is made. None of them is a target.
    """

    source: str
    groups: Mapping[str, tuple[str, ...]]
    development: tuple[str, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        """All target languages, group by group."""
        return tuple(code for group in self.groups.values() for code in group)


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        "low-high": Protocol(
            source="en",
            groups=MappingProxyType(
                {
                    "low": ("sw", "yo", "am", "ig", "zu", "so", "rw", "my"),
                    "high": ("de", "th", "tr", "vi", "el", "hi"),
                }
            ),
            # Of both kinds of resource, and of five language families and five scripts.
            development=("ha", "eu", "ta", "te", "id", "ru"),
        )
    }
)
