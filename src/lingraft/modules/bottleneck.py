"""Bottleneck adapters as a method of PEFT's own: what PEFT saves, loads, switches and unloads, it does with these too.

A bottleneck adapter (Houlsby et al., 2019, arXiv:1902.00751, section 2.1; its placement after Pfeiffer et al., 2021,
arXiv:2005.00247) is a small network behind a sub-layer of the model, with y the output of the sub-layer:

    y + W_up · act(W_down · y + b_down) + b_up

It stands on the last linear layer of the sub-layer, whose output is y: in a Llama `self_attn.o_proj` and `mlp.down_proj`
(both: Houlsby; the second alone: Pfeiffer). A sub-layer's output in this sense comes before the model adds its residual.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn

from lingraft.errors import AdapterError, ConfigError, suggestion

PEFT_TYPE = "BOTTLENECK"
PREFIX = "bottleneck_"
INITIAL_STD = 0.02
"""W_down starts from N(0, 0.02²), everything else at zero: an adapter that was not trained changes nothing."""

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
POSITIONS = ("houlsby", "pfeiffer", "madx")


@dataclass
class BottleneckConfig(PeftConfig):
    """Where bottleneck adapters stand, how wide they are and how they bend.

    Args:
        target_modules: The linear layers whose output is adapted, matched as PEFT matches them for LoRA: path ends in a
            list, or one regular expression for whole paths.
        bottleneck_size: The width b between W_down (b × d) and W_up (d × b).
        bottleneck_pattern: Other widths for some modules: a path end or regular expression → its width.
        activation: relu, gelu (exact), silu or tanh.
        positions: What `target_modules` amounts to, houlsby or pfeiffer. Information for readers; nothing reads it.
        modules_to_save: Modules trained and saved whole beside the adapter, such as a classifier.
        exclude_modules: Modules left out although `target_modules` matches them.
        layers_to_transform: Only the layers of these indices.
        layers_pattern: The name of the model's list of layers, where PEFT does not find it by itself.

    Raises:
        ConfigError: A width is no positive whole number, or an activation or position is unknown.
    """

    target_modules: list[str] | str | None = None
    bottleneck_size: int = 64
    bottleneck_pattern: dict[str, int] = field(default_factory=dict)
    activation: str = "relu"
    positions: str = "pfeiffer"
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        for name, known in (("activation", ACTIVATIONS), ("positions", POSITIONS)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"'{value}' is not known", where=name, remedy=suggestion(str(value), known))
        for module, size in {"bottleneck_size": self.bottleneck_size, **self.bottleneck_pattern}.items():
            if type(size) is not int or size < 1:
                raise ConfigError(f"a bottleneck cannot be {size!r} wide", where=module, remedy="give 1 or more")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("`layers_pattern` says nothing alone", remedy="give `layers_to_transform` as well")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data; sets, which PEFT makes of long lists, are sorted so that equal ones are equal."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer with bottleneck adapters behind it.

    A new adapter's `up` is zero, so that it changes nothing. lingraft trains from small weights in both layers instead, which
    can be inverted when they are merged.

    Args:
        base_layer: The linear layer; its own weights are not touched.
        adapter_name: The name of the first adapter.
        size: The width of its bottleneck.
        activation: A name in `ACTIVATIONS`.

    Raises:
        AdapterError: The layer is not linear.
    """

    adapter_layer_names: tuple[str, ...] = ("bottleneck_down", "bottleneck_up")
    other_param_names: tuple[str, ...] = ("activation",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, size: int, activation: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.width = _width(self.get_base_layer())
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.activation: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, size, activation)

    def update_layer(self, adapter_name: str, size: int, activation: str) -> None:
        """Adds an adapter, in its initial state.

        Args:
            adapter_name: Its name; an adapter of that name is replaced.
            size: The width of its bottleneck.
            activation: A name in `ACTIVATIONS`.
        """
        down = nn.Linear(self.width, size, dtype=torch.float32)
        up = nn.Linear(size, self.width, dtype=torch.float32)
        nn.init.normal_(down.weight, std=INITIAL_STD)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self.activation[adapter_name] = ACTIVATIONS[activation]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves an adapter beside its base layer; unlike PEFT's, never rounds it to the base's dtype on the way."""
        base = self.get_base_layer()
        beside = next(chain(base.parameters(), base.buffers()), None)
        target = device or (beside.device if beside is not None else None)
        for branch in (self.bottleneck_down, self.bottleneck_up):
            if target and adapter_name in branch and branch[adapter_name].weight.device.type != "meta":
                branch[adapter_name].to(target)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output and, on top, the branch of every active adapter.

        Args:
            x: The base layer's input (… × its width).
            *args: More of the base layer's arguments.
            **kwargs: More of the base layer's arguments.

        Returns:
            … × d, in the dtype of the base layer's output; the adapters themselves compute in their own.
        """
        base = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return base
        result = base
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                dtype: Any = down.weight.dtype
                result = result + up(self.activation[name](down(self._cast_input_dtype(base, dtype))))
        return result.to(base.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses.

        Args:
            safe_merge: Not used.
            adapter_names: Not used.

        Raises:
            AdapterError: Always.
        """
        raise _not_mergeable()

    def unmerge(self) -> None:
        """Does nothing: nothing was ever merged."""


class BottleneckModel(BaseTuner):
    """A model with bottleneck adapters, as PEFT wraps it; made by `peft.get_peft_model`."""

    prefix: str = PREFIX
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        pattern = peft_config.bottleneck_pattern
        size = pattern.get(get_pattern_key(list(pattern), current_key), peft_config.bottleneck_size)
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, size, peft_config.activation)
            return
        layer = BottleneckLayer(target, adapter_name, size, peft_config.activation)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise _not_mergeable()


def _width(layer: nn.Module) -> int:
    """The width of a linear layer's output; transformers' `Conv1D` (GPT-2), a linear layer by another name, calls it nf."""
    for name in ("out_features", "nf"):
        width = getattr(layer, name, None)
        if isinstance(width, int):
            return width
    raise AdapterError(
        f"a bottleneck adapter stands on a linear layer, not on {type(layer).__name__}",
        remedy="choose in `target_modules` the last linear layer of each sub-layer, such as `mlp.down_proj`",
    )


def _not_mergeable() -> AdapterError:
    return AdapterError(
        "a bottleneck adapter cannot be merged into the model: a nonlinear layer does not fold into a weight",
        remedy="keep the adapter attached; `unload` gives back the base model without it",
    )

