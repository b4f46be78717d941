"""Which backbones serve which tasks, reference tasks and methods: said before anything is loaded."""

from collections.abc import Sequence
from typing import Any

from lingraft.config import NO_REFERENCE, Experiment, TrainingConfig
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
TOGETHER = ("lora", "ia3", "bottleneck")
"""The structures of which several adapters can be trained in one pass through the model."""


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
        _check_stack(architecture, experiment, row)
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
    _check_sparse(experiment, methods)
    if encoder and experiment.evaluation.scoring not in ("auto",):
        raise ConfigError(
            f"evaluation.scoring={experiment.evaluation.scoring}: an encoder answers with its head", remedy="use auto"
        )


def _check_sparse(experiment: Experiment, methods: Sequence[Method]) -> None:
    """Makes sure that sparse differences can be learned.

    Raises:
        ConfigError: They cannot.
    """
    for row in methods:
        goes_on = row.adapter in ("sequential", "projected") or any("projected" in name for name in row.references)
        if goes_on and experiment.adapter.family == "sparse":
            raise ConfigError(
                f"'{row.name}' goes on from another adapter, and a sparse difference starts at the base's own weights",
                remedy="leave it out of `methods`, or use another structure",
            )
    trainings = _trainings(experiment, methods)
    if any(values.weight_decay for values in trainings):
        raise ConfigError(
            "a sparse difference is trained without weight decay, which would move what shall not change",
            remedy="use weight_decay=0",
        )
    if trainings and experiment.backbone.quantization != "none":
        raise ConfigError(
            f"a sparse difference changes weights of the base, and {experiment.backbone.quantization} weights cannot be changed "
            "number by number",
            remedy="use backbone.quantization=none, or another structure",
        )


def _trainings(experiment: Experiment, methods: Sequence[Method]) -> list[TrainingConfig]:
    """The training values with which sparse differences are learned."""
    found: list[TrainingConfig] = []
    if experiment.adapter.family == "sparse":
        found += [experiment.training, experiment.reference_values]
    if any(row.stack == "lfsft" for row in methods):
        settings = experiment.lfsft
        found += [
            settings.training or experiment.training,
            settings.reference_training or experiment.reference_values,
        ]
    return found


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


def _check_stack(architecture: str, experiment: Experiment, row: Method) -> None:
    """Makes sure that language adapters can be trained.

    Raises:
        ConfigError: They cannot.
    """
    if row.stack is None:
        return
    reference, learns = experiment.reference.task, " or ".join(LEARNS[architecture])
    if reference not in LEARNS[architecture]:
        said = "there is no reference task" if reference == NO_REFERENCE else f"'{reference}' is not that"
        raise ConfigError(
            f"the language adapters of '{row.name}' learn language modelling on plain text, and {said}",
            remedy=f"use reference.task={learns} with reference.text or reference.hub, or leave '{row.name}' out",
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
