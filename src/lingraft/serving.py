"""Which backbones serve which tasks, reference tasks and methods: said before anything is loaded."""

from collections.abc import Sequence
from typing import Any

from lingraft.config import NO_REFERENCE, Experiment
from lingraft.errors import ConfigError
from lingraft.methods import Method
from lingraft.tasks.table import TASKS
from lingraft.tasks.task import Task

LEARNS = {
    "decoder": ("clm",),
    "encoder": ("mlm",),
    "encoder-decoder": ("prefix-lm", "span-corruption"),
}
"""The reference tasks on plain text, by kind of backbone; a task with labels serves all."""


def check_served(architecture: str, task: Task, experiment: Experiment, methods: Sequence[Method]) -> None:
    """Makes sure that a backbone can do what an experiment asks of it.

    Raises:
        ConfigError: It cannot; says what can.
    """
    encoder = architecture == "encoder"
    if encoder:
        served_head(task)
    # A second stage that does not stand on the source's task adapter stands on a graft.
    grafts = any(row.adapter in ("graft", "sequential") or row.first != "source" for row in methods)
    reference = experiment.reference
    known = reference.labelled or reference.task in (NO_REFERENCE, *LEARNS[architecture])
    if grafts and not known:
        learns = " or ".join(LEARNS[architecture])
        raise ConfigError(
            f"the reference task '{reference.task}' is not one that {_a(architecture)} learns",
            remedy=f"use reference.task={learns}, or a task with labels in all the languages",
        )
    if architecture == "encoder-decoder" and experiment.adapter.family == "prefix":
        raise ConfigError(
            "a prefix cannot be put on an encoder-decoder, which has two stacks of layers",
            remedy="use lora, ia3 or bottleneck",
        )
    for row in methods:
        _check_two_languages(architecture, task, row)
        if encoder and (row.adapter == "none" or row.prompt is not None):
            raise ConfigError(
                f"the method '{row.name}' asks the model in words; an encoder without a trained head says nothing",
                remedy="leave it out of `methods`, or use a decoder or an encoder-decoder",
            )
        if row.criterion == "likelihood" and architecture != "decoder":
            raise ConfigError(
                f"'{row.name}' reads the items as text, which only a decoder does",
                remedy="choose λ by labels or entropy",
            )
        if row.criterion == "entropy" and task.kind != "choice":
            raise ConfigError(
                f"'{row.name}': free answers have no entropy over candidates", remedy="choose λ by labels"
            )
        if row.prompt is not None and row.prompt not in task.prompts:
            raise ConfigError(
                f"the task '{task.name}' has no prompt '{row.prompt}', which the method '{row.name}' asks with",
                remedy=f"leave it out; the task's prompts: {', '.join(task.prompts)}",
            )
    if encoder and experiment.evaluation.scoring not in ("auto",):
        raise ConfigError(
            f"evaluation.scoring={experiment.evaluation.scoring}: an encoder answers with its head", remedy="use auto"
        )


def _check_two_languages(architecture: str, task: Task, row: Method) -> None:
    """Makes sure that a method of two languages can serve the task.

    Raises:
        ConfigError: It cannot.
    """
    if row.reads == "instead" and task.kind != "choice":
        raise ConfigError(
            f"'{row.name}' would answer '{task.name}' in the source language, so there is nothing to compare with",
            remedy="leave it out of `methods`",
        )
    if row.second == "mixup" and architecture == "decoder":
        raise ConfigError(
            f"'{row.name}' mixes the states of an encoder, and this backbone is a decoder",
            remedy="leave it out of `methods`, or use an encoder or an encoder-decoder",
        )


def served_head(task: Task) -> dict[str, Any]:
    """What an encoder answers a task with: the values of a `heads.Head`.

    Raises:
        ConfigError: It cannot; says which tasks an encoder serves.
    """
    if task.head is None:
        serves = ", ".join(name for name, row in TASKS.items() if row.head)
        raise ConfigError(
            f"the task '{task.name}' is answered in free text, which an encoder cannot write",
            remedy=f"use a decoder or an encoder-decoder; an encoder serves {serves}",
        )
    return {"kind": task.head, "labels": len(task.answers) if task.head == "classification" else 0}


def _a(architecture: str) -> str:
    return ("an " if architecture[0] == "e" else "a ") + architecture
