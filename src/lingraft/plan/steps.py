"""Steps, cells and plans: what an experiment takes, as values.

A step's key hashes its configuration, its inputs' keys, the digests of the data and base weights it reads, and the
version of its kind. The key is its path in the store, so the same work is planned once and never done twice, whichever
experiment asks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lingraft.config import Experiment
from lingraft.digests import digest_value

VERSIONS = {
    "train": 2,
    "merge": 1,
    "predict": 1,
    "score": 2,
    "read": 1,
    "project": 1,
    "select": 1,
    "compare": 1,
    "translate": 1,
    "states": 1,
}
"""The version of each kind of step: raised when a fix changes its results, which makes the kind's steps new work."""

Plain = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """What to make from what.

    Attributes:
        kind: One of `VERSIONS`.
        config: Everything asked for that can change the result.
        inputs: Steps whose folders are read, by role.
        reads: Digests of data files and base weights, by name.
        label: For people; not part of the key.
    """

    kind: str
    config: Plain
    inputs: Mapping[str, "Step"] = field(default_factory=dict[str, "Step"])
    reads: Mapping[str, str] = field(default_factory=dict[str, str])
    label: str = ""

    @cached_property
    def key(self) -> str:
        """24 hexadecimal digits of the hash of all that can change the result."""
        return digest_value(self.identity(), 24)

    @property
    def sort(self) -> str:
        """What it has in common with steps that take about as long."""
        what = ("reference", "second", "projected") if self.kind == "train" else ()
        return f"{self.kind}/{next((name for name in what if name in self.config), self.config.get('split', ''))}"

    def identity(self) -> dict[str, Any]:
        """What the key hashes; also the step's record."""
        return {
            "kind": self.kind,
            "version": VERSIONS[self.kind],
            "config": dict(self.config),
            "inputs": {role: step.key for role, step in self.inputs.items()},
            "reads": dict(self.reads),
        }


@dataclass(frozen=True)
class Cell:
    """One number of the table: a method, a language, a seed.

    `adapter` is what is evaluated; where a task's adapter stands on others, what lies beneath it.
    """

    method: str
    language: str
    seed: int
    predict: Step
    score: Step
    adapter: Step | None


@dataclass(frozen=True)
class Plan:
    """An experiment's steps in an order in which they can run, and what they are for.

    Attributes:
        experiment: What was asked.
        steps: Every step once, inputs first.
        cells: The numbers of the table.
        selections: The choice of λ, by method and, where it is chosen without labels, target language.
        comparisons: The likeness of the references' updates, by (language, seed).
        absent: (method, language, reason) where there are no data.
    """

    experiment: Experiment
    steps: tuple[Step, ...]
    cells: tuple[Cell, ...]
    selections: Mapping[tuple[str, str | None], Step]
    comparisons: Mapping[tuple[str, int], Step]
    absent: tuple[tuple[str, str, str], ...]


def ordered(targets: Iterable[Step]) -> tuple[Step, ...]:
    """All steps that the targets need, each once, inputs first."""
    found: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.key in found:
            return
        for needed in step.inputs.values():
            visit(needed)
        found[step.key] = step

    for target in targets:
        visit(target)
    return tuple(found.values())
