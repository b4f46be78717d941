"""Bottleneck adapters as a method of PEFT's own: what PEFT saves, loads, switches and unloads, it does with these too.

A bottleneck adapter (Houlsby et al., 2019, arXiv:1902.00751, section 2.1; its placement after Pfeiffer et al., 2021,
arXiv:2005.00247) is a small network behind a sub-layer of the model, with y the output of the sub-layer:

    y + W_up · act(W_down · y + b_down) + b_up

It stands on the last linear layer of the sub-layer, whose output is y: in a Llama `self_attn.o_proj` and `mlp.down_proj`
(both: Houlsby; the second alone: Pfeiffer). A sub-layer's output in this sense comes before the model adds its residual.

Or it stands on a norm that follows the residual (post-norm encoders: BERT's `output.LayerNorm`), with s the norm's input, sub-layer
plus residual (MAD-X: Pfeiffer et al., 2020, arXiv:2005.00052, section 3.2, where the adapter reads normalised states):

    norm(s + W_up · act(W_down · norm(s) + b_down) + b_up)

Several active adapters act one after the other, each on what the one before gives (MAD-X's stacking: language, then task).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
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
        target_modules: The linear layers whose output is adapted, or the norms whose input is, matched as PEFT matches modules for
            LoRA: path ends in a list, or one regular expression for whole paths.
        bottleneck_size: The width b between W_down (b × d) and W_up (d × b).
        bottleneck_pattern: Other widths for some modules: a path end or regular expression → its width.
        activation: relu, gelu (exact), silu or tanh.
        positions: What `target_modules` amounts to, houlsby, pfeiffer or madx. Information for readers; nothing reads it.
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
    """A linear layer with bottleneck adapters behind it, or a norm with adapters before it.

    The active adapters act in the order in which they were set: `set_adapter(["language", "task"])`. A new adapter's `up` is zero,
    so that it changes nothing. lingraft trains from small weights in both layers instead, which can be inverted when they are
    merged.

    Args:
        base_layer: The linear layer, or the norm that follows a residual; its own weights are not touched.
        adapter_name: The name of the first adapter.
        size: The width of its bottleneck.
        activation: A name in `ACTIVATIONS`.

    Attributes:
        width: d, the width of the layer's output.
        on_norm: Whether the layer is a norm.

    Raises:
        AdapterError: The layer is neither linear nor a norm over one axis.
    """

    adapter_layer_names: tuple[str, ...] = ("bottleneck_down", "bottleneck_up")
    other_param_names: tuple[str, ...] = ("activation",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, size: int, activation: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.width, self.on_norm = _width(self.get_base_layer())
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.activation: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, size, activation)

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks is the base layer's: a norm's `eps`."""
        return own_or_base(self, name)

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
        move_beside(self.get_base_layer(), (self.bottleneck_down, self.bottleneck_up), adapter_name, device)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output with the active adapters, in their order.

        Args:
            x: The base layer's input (… × its width).
            *args: More of the base layer's arguments.
            **kwargs: More of the base layer's arguments.

        Returns:
            … × d, in the dtype of the base layer's output; every adapter computes in its own (float32, unless somebody cast it).
        """
        names = [] if self.disable_adapters else [n for n in self.active_adapters if n in self.bottleneck_down]
        return self.acted([partial(self.branch, name) for name in names], x, *args, **kwargs)

    def acted(
        self, branches: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The base layer's output with branches, one after the other.

        Args:
            branches: What each adds to what it reads.
            x: As for `forward`, like the rest.
            *args: More of the base layer's arguments.
            **kwargs: More of the base layer's arguments.
        """
        base_layer = self.base_layer
        if self.on_norm:
            for branch in branches:  # A norm takes what it was built for: the sum keeps its dtype.
                x = (x + branch(base_layer(x, *args, **kwargs))).to(x.dtype)
            return base_layer(x, *args, **kwargs)
        base = result = base_layer(x, *args, **kwargs)
        for branch in branches:
            result = result + branch(result)
        return result.to(base.dtype)

    def branch(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """up(act(down(states))) of one adapter."""
        down = self.bottleneck_down[name]
        dtype: Any = down.weight.dtype
        # Autocast casts by itself; twice would be a copy for nothing.
        if states.dtype != dtype and not torch.is_autocast_enabled(states.device.type):
            states = self._cast_input_dtype(states, dtype)
        return self.bottleneck_up[name](self.activation[name](down(states)))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses.

        Args:
            safe_merge: Not used.
            adapter_names: Not used.

        Raises:
            AdapterError: Always.
        """
        raise not_mergeable("a bottleneck adapter")

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

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # A base layer goes back. PEFT would hand it its own `weight`, which an encoder's embeddings do not have.
            setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise not_mergeable("a bottleneck adapter")


def _width(layer: nn.Module) -> tuple[int, bool]:
    """The width of a layer's output, and whether the layer is a norm.

    transformers' `Conv1D` (GPT-2), a linear layer by another name, calls its width nf.
    """
    for name in ("out_features", "nf"):
        width = getattr(layer, name, None)
        if isinstance(width, int):
            return width, False
    shape = getattr(layer, "normalized_shape", None) or getattr(getattr(layer, "weight", None), "shape", ())
    if len(shape) == 1:
        return int(shape[0]), True
    raise AdapterError(
        f"a bottleneck adapter stands on a linear layer or a norm, not on {type(layer).__name__}",
        remedy="choose in `target_modules` the last linear layer of each sub-layer, such as `mlp.down_proj`, or the norm behind it",
    )


def own_or_base(layer: nn.Module, name: str) -> Any:
    """An attribute of a tuner layer or, where it has none, of the layer that it is put around.

    Private names are not passed on: the marks of transformers and accelerate are of the very module they were put on.

    Raises:
        AttributeError: Neither has it.
    """
    try:
        return nn.Module.__getattr__(layer, name)
    except AttributeError:
        if name.startswith("_") or name == "base_layer":
            raise
        return getattr(nn.Module.__getattr__(layer, "base_layer"), name)


def move_beside(
    base: nn.Module, branches: Iterable[nn.ModuleDict], adapter_name: str, device: torch.device | None = None
) -> None:
    """Moves an adapter to the device of a base layer and leaves its dtype.

    Args:
        base: The base layer.
        branches: The adapters' modules, by the adapters' names.
        adapter_name: The adapter.
        device: Another device than the base layer's.
    """
    beside = next(chain(base.parameters(), base.buffers()), None)
    target = device or (beside.device if beside is not None else None)
    for branch in branches:
        if target and adapter_name in branch:
            module: Any = branch[adapter_name]
            if module.weight.device.type != "meta":
                module.to(target)


def not_mergeable(what: str) -> AdapterError:
    """The error for merging what cannot be merged into the weights."""
    return AdapterError(
        f"{what} cannot be merged into the model: a nonlinear layer does not fold into a weight",
        remedy="keep the adapter attached; `unload` gives back the base model without it",
    )
