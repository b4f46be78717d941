"""Invertible couplings (MAD-X) as a method of PEFT's own."""

from dataclasses import dataclass
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

PEFT_TYPE = "INVERTIBLE"
PREFIX = "invertible_"


@dataclass
class InvertibleConfig(PeftConfig):
    """Where the coupling stands and how wide its networks are."""

    target_modules: list[str] | str | None = None
    coupling_size: int = 160
    activation: str = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE


class InvertibleLayer(nn.Module, BaseTunerLayer):
    """An embedding with couplings behind it."""


class InvertibleModel(BaseTuner):
    """A model with invertible couplings, as PEFT wraps it."""

    prefix: str = PREFIX
    tuner_layer_cls = InvertibleLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError
