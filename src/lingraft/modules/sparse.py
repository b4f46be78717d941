"""Sparse differences (LF-SFT) as a method of PEFT's own."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

PEFT_TYPE = "SPARSE"
PREFIX = "sparse_"


@dataclass
class SparseConfig(PeftConfig):
    """Which weights are changed, and how many entries of each."""

    target_modules: list[str] | str | None = None
    entries: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE


class SparseLayer(nn.Module, BaseTunerLayer):
    """A module some of whose weights' entries are changed."""


class SparseModel(BaseTuner):
    """A model with sparse differences, as PEFT wraps it."""

    prefix: str = PREFIX
    tuner_layer_cls = SparseLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError
