"""What an encoder is asked for: the head on top of it, its kind and size, and where it stands in an adapter's files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lingraft.adapter import Adapter
from lingraft.errors import AdapterError, UserError
from lingraft.layouts.common import PREFIX

HeadKind = Literal["classification", "multiple_choice", "span", "masked_lm"]
TASK_TYPES: Mapping[str, str | None] = {
    "classification": "SEQ_CLS",
    "span": "QUESTION_ANS",
    "multiple_choice": None,
    "masked_lm": None,
}
"""PEFT's name of what a head is for; it has none for the last two."""
AUTO_CLASSES: Mapping[str, str] = {
    "classification": "AutoModelForSequenceClassification",
    "multiple_choice": "AutoModelForMultipleChoice",
    "span": "AutoModelForQuestionAnswering",
    "masked_lm": "AutoModelForMaskedLM",
}
"""The class of transformers whose head it is, so that plain PEFT opens what was trained."""


@dataclass(frozen=True)
class Head:
    """A head on an encoder.

    Attributes:
        kind: `classification` (one of a fixed number of labels), `multiple_choice` (a score an option), `span` (where the answer
            starts and ends) or `masked_lm` (the checkpoint's own, frozen).
        labels: For classification, how many labels there are.
    """

    kind: HeadKind
    labels: int = 0

    def __post_init__(self) -> None:
        if (self.kind == "classification") != (self.labels > 0):
            raise UserError(
                f"a head for {self.kind} cannot have {self.labels} labels",
                remedy="give a task of choice two labels or more",
            )

    @property
    def trained(self) -> bool:
        """Whether it is trained and saved with the adapter."""
        return self.kind != "masked_lm"

    @property
    def task_type(self) -> str | None:
        """PEFT's name of the task."""
        return TASK_TYPES[self.kind]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the sidecar."""
        return {"kind": self.kind, "labels": self.labels}


def tensor_prefix(structure: str) -> str:
    """What the names of a head's tensors start with in PEFT's files; a prefix is kept beside the model, not around it."""
    return "base_model." if structure == "prefix" else PREFIX


def head_of(adapter: Adapter) -> Head:
    """The head an adapter was trained with, from PEFT's configuration and the head's own tensors: a merge keeps both.

    Raises:
        AdapterError: Its number of labels cannot be told.
    """
    task = adapter.config.get("task_type")
    if task == "QUESTION_ANS":
        return Head("span")
    if task != "SEQ_CLS":
        return Head("multiple_choice") if adapter.others else Head("masked_lm")
    last = ("classifier.weight", "classifier.out_proj.weight", "score.weight")
    shapes = {
        read().shape for name, read in adapter.others.items() if name.endswith(last) and "pre_classifier" not in name
    }
    if len(shapes) != 1:
        raise AdapterError(
            "this adapter is for classification, but holds no classifier",
            where=adapter.path,
            remedy="train it again, or give the task's adapter first: a merge keeps that one's head",
        )
    return Head("classification", int(shapes.pop()[0]))
