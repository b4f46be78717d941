"""Layers of adapters that are trained together: the base is computed once, and every row of the batch meets its own adapter.

LoRA's layers know of it themselves (`lowrank`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.ia3.layer import Linear as IA3Linear
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

from lingraft.errors import AdapterError
from lingraft.modules.bottleneck import BottleneckLayer
from lingraft.rows import REMEDY, Rows


def serve(model: torch.nn.Module, rows: Rows) -> None:
    """Has the adapters' layers on a model ask which rows are whose, as long as they are on it.

    Args:
        model: The model, all adapters on it.
        rows: What they are told of the batch.

    Raises:
        AdapterError: A layer can serve one adapter at a time.
    """
    for name, layer in model.named_modules():
        if type(layer) is IA3Linear:
            layer.forward = partial(_scaled, layer, rows, layer.forward)
        elif type(layer) is BottleneckLayer:
            layer.forward = partial(_behind, layer, rows, layer.forward)
        elif type(layer) is ModulesToSaveWrapper:
            layer.forward = partial(_whole, layer, rows, layer.forward)
        elif isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and type(layer) is not LoraLinear:
            raise AdapterError(
                f"adapters cannot be trained together on a layer of the type {type(layer).__name__}",
                where=name,
                remedy=REMEDY,
            )


def _each(rows: Rows, compute: Callable[[str, torch.Tensor], torch.Tensor], x: torch.Tensor) -> Any:
    """What every adapter makes of its rows, in their order."""
    return torch.cat([compute(name, x[span]) for name, span in rows.spans(x.shape[0])])


def _scaled(layer: Any, rows: Rows, usual: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """(IA)³: what goes in or comes out, times every row's own factors."""
    if not rows.lanes:
        return usual(x, *args, **kwargs)

    def scale(name: str, states: torch.Tensor) -> torch.Tensor:
        return (states * layer.ia3_l[name].flatten()).to(states.dtype)

    if layer.is_feedforward:
        return layer.base_layer(_each(rows, scale, x), *args, **kwargs)
    return _each(rows, scale, layer.base_layer(x, *args, **kwargs))


def _behind(layer: BottleneckLayer, rows: Rows, usual: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A bottleneck behind a linear layer, or before a norm, of every row's own."""
    if not rows.lanes:
        return usual(x, *args, **kwargs)
    return layer.acted([lambda states: _each(rows, layer.branch, states)], x, *args, **kwargs)


def _whole(layer: Any, rows: Rows, usual: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A head: every row goes through its own."""
    if not rows.lanes:
        return usual(x, *args, **kwargs)
    return _each(rows, lambda name, states: layer.modules_to_save[name](states, *args, **kwargs), x)
