"""The table of methods: what a method trains, merges and tunes. A row is a method; the planner turns rows into steps."""

from dataclasses import dataclass
from typing import Literal

from lingraft.errors import UserError, suggestion

Reference = Literal["target", "source", "other", "initial"]


@dataclass(frozen=True)
class Method:
    """One way to get a model for a target language.

    Attributes:
        name: What users write.
        title: What tables print.
        says: One line on what it does.
        adapter: What is evaluated: nothing, the task's adapter in the `source` or the `target` language, one trained on the
            source's task `sequential`ly after the target's reference task, or a `graft`.
        references: For a graft, whose difference is added: the reference adapter of the target, the source or another language,
            or the `initial` adapter, which is untrained (LoRA: an update of zero).
        space: For a graft, where it is merged; None for the structure's own rule.
    """

    name: str
    title: str
    says: str
    adapter: Literal["none", "source", "target", "sequential", "graft"]
    references: tuple[Reference, Reference] = ("target", "source")
    space: str | None = None


_ROWS = (
    Method("vanilla", "Vanilla", "the base model, no adapter", "none"),
    Method("eng-ft", "Eng-FT", "the task's adapter from the source language, as it is (λ = 0)", "source"),
    Method("tgt-ft", "Tgt-FT", "an adapter trained on the target's own labels: the ceiling", "target"),
    Method(
        "adamergex", "AdaMergeX", "T + λ(R_t − R_s) by the structure's own rule (LoRA: A and B separately)", "graft"
    ),
    Method(
        "adamergex-product",
        "AdaMergeX (product)",
        "T + λ(R_t − R_s) in the weight updates, exact (LoRA)",
        "graft",
        space="product",
    ),
    Method(
        "adamergex-cross",
        "AdaMergeX (cross rule)",
        "the rule of another structure: LoRA multiplied, the others added",
        "graft",
        space="cross",
    ),
    Method(
        "control-add",
        "control: no subtraction",
        "T + λ·R_t: the source's reference is not subtracted",
        "graft",
        ("target", "initial"),
    ),
    Method(
        "control-other",
        "control: other language",
        "T + λ(R_other − R_s): another language's divergence",
        "graft",
        ("other", "source"),
    ),
    Method(
        "control-sequential",
        "control: sequential",
        "the task trained on top of the target's reference adapter",
        "sequential",
    ),
)

METHODS = {row.name: row for row in _ROWS}


def method(name: str) -> Method:
    """A row of the table.

    Raises:
        UserError: There is no such method.
    """
    if name not in METHODS:
        raise UserError(f"unknown method '{name}'", remedy=suggestion(name, METHODS))
    return METHODS[name]
