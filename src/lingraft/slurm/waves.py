"""A plan's pending steps as job arrays: which steps one task makes, what it asks for, and which arrays it waits for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from lingraft.costs import Needs
from lingraft.costs.needs import LOADING
from lingraft.plan import Step

LIGHT = 100
"""Steps without a model that one task makes: a second or less each, and a process takes some to begin."""
GIB = 2**30
T = TypeVar("T")


@dataclass(frozen=True)
class Packing:
    """How many steps one task makes, and how many tasks an array has, at most.

    Attributes:
        together: Trainings in a task: as many as share passes through the model.
        asked: Evaluations and merges in a task: the model is loaded once for all of them.
        largest: Tasks of an array: Slurm's `MaxArraySize` less one.
    """

    together: int = 1
    asked: int = 8
    largest: int = 1000

    def of(self, kind: str) -> int:
        """How many steps of a kind one task makes."""
        if kind == "train":
            return self.together
        if kind in ("states", "translate"):
            return 1
        return self.asked if kind in LOADING or kind == "merge" else LIGHT


@dataclass(frozen=True)
class Array:
    """A job array: tasks of one wave that ask for the same.

    Attributes:
        name: Unique in an export, such as `01-gpu`.
        needs: What one task asks for.
        tasks: The steps of each, inputs first.
        after: Names of the arrays that make inputs of these; all of earlier waves.
    """

    name: str
    needs: Needs
    tasks: tuple[tuple[Step, ...], ...]
    after: tuple[str, ...]


def arrays(steps: Sequence[Step], needs: Callable[[Step], Needs], packing: Packing) -> list[Array]:
    """Divides steps into arrays.

    Every step is in one task of one array. What it needs of the other steps is made in an earlier wave, or before it in its own
    task: a score goes with the predictions it is of, so that it waits in no queue.

    Args:
        steps: The pending ones, inputs first; inputs that are not among them count as finished.
        needs: What a step asks for.
        packing: How many go together.
    """
    hosts = _hosts(steps)
    guests: dict[str, list[Step]] = {}
    for step in steps:
        guests.setdefault(hosts[step.key], []).append(step)
    leads = [step for step in steps if hosts[step.key] == step.key]
    waves = _waves(leads, hosts)
    found: list[Array] = []
    where: dict[str, str] = {}
    for wave in range(1, max(waves.values(), default=0) + 1):
        mine = [step for step in leads if waves[step.key] == wave]
        names: dict[str, int] = {}
        for sort, size, group in _sorted(mine, needs, packing):
            tasks = [[step for lead in some for step in guests[lead.key]] for some in _cut(group, size)]
            for part in _cut(tasks, packing.largest):
                names[sort] = names.get(sort, 0) + 1
                name = f"{wave:02d}-{sort}" + (f"-{names[sort]}" if names[sort] > 1 else "")
                inside = [step for task in part for step in task]
                # What an earlier wave makes; inputs in the same task stand in no array yet.
                after = dict.fromkeys(
                    where[needed.key] for step in inside for needed in step.inputs.values() if needed.key in where
                )
                found.append(Array(name, _most([needs(s) for s in inside]), tuple(map(tuple, part)), tuple(after)))
        where |= {step.key: array.name for array in found for task in array.tasks for step in task}
    return found


def _hosts(steps: Sequence[Step]) -> dict[str, str]:
    """By key, the step whose task makes it too: a score's predictions, where they are pending; else itself."""
    hosts: dict[str, str] = {}
    for step in steps:
        pending = {hosts[needed.key] for needed in step.inputs.values() if needed.key in hosts}
        hosts[step.key] = pending.pop() if step.kind == "score" and len(pending) == 1 else step.key
    return hosts


def _waves(leads: Sequence[Step], hosts: Mapping[str, str]) -> dict[str, int]:
    """The wave of every task's first step: one more than the latest of what it needs."""
    waves: dict[str, int] = {}
    for lead in leads:
        needed = {hosts[n.key] for n in lead.inputs.values() if n.key in hosts}
        waves[lead.key] = 1 + max((waves[key] for key in needed), default=0)
    return waves


def _sorted(
    steps: Sequence[Step], needs: Callable[[Step], Needs], packing: Packing
) -> list[tuple[str, int, list[Step]]]:
    """Steps of a wave by what they ask for and how many go together: those with GPUs, on processors, and without a model."""

    def sort(step: Step) -> tuple[str, int, int, int, int]:
        asked = needs(step)
        name = "light" if step.kind not in LOADING else "gpu" if asked.gpus else "cpu"
        # Without a model the little memory that is needed makes no array of its own; unknown memory stands apart.
        memory = 0 if name == "light" else -1 if asked.memory is None else gib(asked.memory)
        return name, packing.of(step.kind), asked.cpus, asked.gpus, memory

    order = {step.key: place for place, step in enumerate(steps)}
    grouped = [(key, list(group)) for key, group in groupby(sorted(steps, key=sort), sort)]
    grouped.sort(key=lambda pair: order[pair[1][0].key])
    return [(key[0], key[1], group) for key, group in grouped]


def _most(asked: Sequence[Needs]) -> Needs:
    """What is enough for each of some steps."""

    def largest(values: list[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return max(known) if len(known) == len(values) else None

    return Needs(
        cpus=max(n.cpus for n in asked),
        gpus=max(n.gpus for n in asked),
        memory=largest([n.memory for n in asked]),
        gpu_memory=largest([n.gpu_memory for n in asked]),
    )


def gib(count: int) -> int:
    """Bytes in whole GiB, rounded up."""
    return -(-count // GIB)


def _cut(values: Sequence[T], size: int) -> list[Sequence[T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
