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

PAPER = "paper"
_PAPER_LANGUAGES = ("de", "ru", "fr", "es", "zh", "vi", "tr", "ar", "el", "th", "hi", "sw")
PAPER_TARGETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "mgsm": ("de", "ru", "fr", "es", "zh", "th", "sw"),
        "xcopa": ("vi", "tr", "th", "sw"),
        "xnli": _PAPER_LANGUAGES,
        "xquad": tuple(code for code in _PAPER_LANGUAGES if code not in ("fr", "sw")),
        "xlsum": tuple(code for code in _PAPER_LANGUAGES if code not in ("de", "el")),
    }
)
"""The target languages of the AdaMergeX paper (arXiv:2402.18913, section 4.1), by task; of a variant of a task, the task's."""


def division(name: str, task: str | None, source: str | None) -> Protocol:
    """The languages that a protocol fills in.

    The paper tunes λ on the validation split of French, or of Vietnamese where the task has no French, and then reports that
    language with the others: its own protocol, not a held-out one.

    Args:
        name: `low-high` or `paper`.
        task: The experiment's task.
        source: The experiment's source language; None: the protocol's.

    Raises:
        ValueError: There is no such protocol, or the paper does not have the task.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    if name != PAPER:
        raise ValueError(f"unknown protocol '{name}': known are {', '.join([*PROTOCOLS, PAPER])}")
    targets = PAPER_TARGETS.get(task or "") or PAPER_TARGETS.get((task or "").partition("-")[0])
    if targets is None:
        raise ValueError(
            f"the paper has no task '{task}' (it has {', '.join(PAPER_TARGETS)}): give `targets` and no protocol"
        )
    source = source or "en"
    development = next(code for code in ("fr", "vi", "th") if code in targets and code != source)
    return Protocol(source, {"all": tuple(code for code in targets if code != source)}, (development,))
