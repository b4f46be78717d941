"""Invertible couplings (MAD-X) as a method of PEFT's own.

A coupling is a bijection behind the embeddings, whose inverse stands before the output embedding (MAD-X: Pfeiffer et al., 2020,
arXiv:2005.00052, section 3.3; additive coupling layers: NICE, Dinh et al., 2015, arXiv:1410.8516). With x = [x1; x2] cut in the
middle, and F and G two small networks W_up · act(W_down · x + b_down) + b_up,

    y1 = x1 + F(x2),  y2 = x2 + G(y1)      and back      x2 = y2 - G(y1),  x1 = y1 - F(x2)

`InvertibleLayer` holds the networks and stands on the embeddings. The embeddings of an encoder-decoder's other half
(`CoupledLayer`) and the output embedding (`InverseLayer`) have no numbers of their own: they refer to the first.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from lingraft.errors import AdapterError, ConfigError, suggestion
from lingraft.modules.bottleneck import ACTIVATIONS, INITIAL_STD, move_beside, not_mergeable, own_or_base

PEFT_TYPE = "INVERTIBLE"
PREFIX = "invertible_"


@dataclass
class InvertibleConfig(PeftConfig):
    """Where the coupling stands and how wide its networks are.

    Args:
        target_modules: The embeddings: a decoder's `model.embed_tokens`, an encoder's `bert.embeddings`, both `embed_tokens` of an
            encoder-decoder, which share one coupling. Matched as PEFT matches modules for LoRA: path ends in a list, or one regular
            expression for whole paths; when the adapter is put on, the list becomes that of the whole paths.
        coupling_size: The width c between W_down (c × d/2) and W_up (d/2 × c); MAD-X takes d/4.
        activation: relu, gelu (exact), silu or tanh.
        modules_to_save: Modules trained and saved whole beside the adapter, such as a classifier.
        exclude_modules: Modules left out although `target_modules` matches them.

    Raises:
        ConfigError: The width is no positive whole number, or the activation is unknown.
    """

    target_modules: list[str] | str | None = None
    coupling_size: int = 160
    activation: str = "relu"
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"'{self.activation}' is not known",
                where="activation",
                remedy=suggestion(str(self.activation), ACTIVATIONS),
            )
        if type(self.coupling_size) is not int or self.coupling_size < 1:
            raise ConfigError(
                f"a coupling cannot be {self.coupling_size!r} wide", where="coupling_size", remedy="give 1 or more"
            )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data; sets are sorted so that equal ones are equal."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}


class InvertibleLayer(nn.Module, BaseTunerLayer):
    """Embeddings with couplings behind them, one after the other in the order in which they were set active.

    Args:
        base_layer: The embeddings; their own weights are not touched.
        adapter_name: The name of the first adapter.
        size: The width of its networks.
        activation: A name in `ACTIVATIONS`.

    Attributes:
        width: d, the width of the embeddings' output.

    Raises:
        AdapterError: The layer holds no embedding, or its width is odd.
    """

    adapter_layer_names: tuple[str, ...] = (
        "invertible_F_down",
        "invertible_F_up",
        "invertible_G_down",
        "invertible_G_up",
    )
    other_param_names: tuple[str, ...] = ("activation",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, size: int, activation: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.width = _width(self.get_base_layer())
        self.invertible_F_down = nn.ModuleDict()
        self.invertible_F_up = nn.ModuleDict()
        self.invertible_G_down = nn.ModuleDict()
        self.invertible_G_up = nn.ModuleDict()
        self.activation: dict[str, Any] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, size, activation)

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks is the embeddings': `word_embeddings`, `padding_idx`."""
        return own_or_base(self, name)

    def update_layer(self, adapter_name: str, size: int, activation: str) -> None:
        """Adds a coupling: weights from N(0, 0.02²), biases of zero.

        Args:
            adapter_name: Its name; an adapter of that name is replaced.
            size: The width of its networks.
            activation: A name in `ACTIVATIONS`.
        """
        half = self.width // 2
        for name in self.adapter_layer_names:
            linear = nn.Linear(*((half, size) if name.endswith("down") else (size, half)), dtype=torch.float32)
            nn.init.normal_(linear.weight, std=INITIAL_STD)
            nn.init.zeros_(linear.bias)
            getattr(self, name)[adapter_name] = linear
        self.activation[adapter_name] = ACTIVATIONS[activation]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves an adapter beside the embeddings; unlike PEFT's, never rounds it to their dtype on the way."""
        branches = [getattr(self, name) for name in self.adapter_layer_names]
        move_beside(self.get_base_layer(), branches, adapter_name, device)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The embeddings (… × d) after the active couplings, in the embeddings' dtype.

        Args:
            *args: The embeddings' arguments.
            **kwargs: More of them.
        """
        return self.couple(self.base_layer(*args, **kwargs))

    def couple(self, states: torch.Tensor) -> torch.Tensor:
        """The active couplings in their order; sums in float32 at least, the result in the dtype of the states.

        Args:
            states: … × d.
        """
        names = self._acting()
        if not names:
            return states
        first, second = _halves(states)
        with torch.autocast(states.device.type, enabled=False):
            for name in names:
                first = first + self._network("F", name, second)
                second = second + self._network("G", name, first)
        return torch.cat((first, second), dim=-1).to(states.dtype)

    def inverse(self, states: torch.Tensor) -> torch.Tensor:
        """What `couple` makes the states of: the inverses in the reverse order.

        Args:
            states: … × d.

        Returns:
            … × d, in the dtype of the states; sums in float32 at least.
        """
        names = self._acting()
        if not names:
            return states
        first, second = _halves(states)
        # A network must give here what it gave there: half precision would round what differs in a last digit to something else.
        with torch.autocast(states.device.type, enabled=False):
            for name in reversed(names):
                second = second - self._network("G", name, first)
                first = first - self._network("F", name, second)
        return torch.cat((first, second), dim=-1).to(states.dtype)

    def _acting(self) -> list[str]:
        return [] if self.disable_adapters else [n for n in self.active_adapters if n in self.activation]

    def _network(self, net: Literal["F", "G"], name: str, x: torch.Tensor) -> torch.Tensor:
        down, up = (
            (self.invertible_F_down, self.invertible_F_up)
            if net == "F"
            else (self.invertible_G_down, self.invertible_G_up)
        )
        first: Any = down[name]
        return up[name](self.activation[name](first(x.to(first.weight.dtype))))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses.

        Args:
            safe_merge: Not used.
            adapter_names: Not used.

        Raises:
            AdapterError: Always.
        """
        raise not_mergeable("a coupling")

    def unmerge(self) -> None:
        """Does nothing: nothing was ever merged."""


class _Follower(nn.Module, BaseTunerLayer):
    """A place that uses a coupling whose numbers another layer holds; what is active there is active here.

    Args:
        base_layer: The layer in this place.
        source: The layer that holds the coupling.
    """

    def __init__(self, base_layer: nn.Module, source: InvertibleLayer) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        # In a tuple, where torch does not look: its parameters are listed and saved once, where they are.
        self._source = (source,)

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks is the base layer's: `in_features`, `padding_idx`."""
        return own_or_base(self, name)

    @property
    def source(self) -> InvertibleLayer:
        """The layer that holds the coupling."""
        return self._source[0]

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapters of `source`."""
        return self.source.active_adapter

    @property
    def disable_adapters(self) -> bool:
        """Whether `source` is switched off."""
        return self.source.disable_adapters

    def _get_available_adapters(self) -> set[str]:
        return self.source._get_available_adapters()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses, as `InvertibleLayer.merge`.

        Args:
            safe_merge: Not used.
            adapter_names: Not used.
        """
        self.source.merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Does nothing: nothing was ever merged."""


class CoupledLayer(_Follower):
    """Further embeddings behind which the coupling of the first ones acts: those of an encoder-decoder's decoder."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See `InvertibleLayer.forward`.

        Args:
            *args: The embeddings' arguments.
            **kwargs: More of them.
        """
        return self.source.couple(self.base_layer(*args, **kwargs))


class InverseLayer(_Follower):
    """An output embedding that reads the inverse of what it is given."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The logits (… × vocabulary) of states (… × d) in the space of the coupled embeddings.

        Args:
            x: The states.
            *args: More of the base layer's arguments.
            **kwargs: More of the base layer's arguments.
        """
        return self.base_layer(self.inverse(x), *args, **kwargs)

    def inverse(self, states: torch.Tensor) -> torch.Tensor:
        """See `InvertibleLayer.inverse`: what the output embedding is to be multiplied with.

        Args:
            states: … × d.
        """
        return self.source.inverse(states)


class InvertibleModel(BaseTuner):
    """A model with invertible couplings, as PEFT wraps it; made by `peft.get_peft_model`."""

    prefix: str = PREFIX
    tuner_layer_cls = InvertibleLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """PEFT would warn of merging an embedding whose weight is the output embedding's too; a coupling is never merged."""

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Refuses what does not fit before the first layer is replaced, and writes whole paths into the configuration.

        PEFT saves the whole embedding beside an adapter whose target is called just `embed_tokens`.

        Raises:
            AdapterError: The targets are no embeddings of one even width, the output embedding has another, or an earlier coupling
                stands elsewhere.
        """
        config: Any = peft_config
        modules = dict(model.named_modules())
        inside = tuple(f"{path}." for path, module in modules.items() if isinstance(module, BaseTunerLayer))
        paths = [
            path
            for path in modules
            if path and not path.startswith(inside) and self._check_target_module_exists(config, path)
        ]
        if not paths:
            return  # PEFT says so.
        there = [path for path, module in modules.items() if isinstance(module, InvertibleLayer | CoupledLayer)]
        if there and there != paths:
            raise AdapterError(
                f"this coupling stands on {', '.join(paths)}, and there is one on {', '.join(there)}",
                remedy="give couplings that are on one model at a time the same `target_modules`",
            )
        widths = {path: _width(_base(modules[path])) for path in paths}
        if len(set(widths.values())) > 1:
            raise AdapterError(
                f"one coupling cannot have several widths: {widths}",
                remedy="choose layers of one width: adapter.modules",
            )
        _check_output(model, widths[paths[0]])
        config.target_modules = paths

    def _create_and_replace(
        self,
        peft_config: InvertibleConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, InvertibleLayer):
            target.update_layer(adapter_name, peft_config.coupling_size, peft_config.activation)
            return
        if isinstance(target, CoupledLayer):
            return
        source = next((m for m in self.model.modules() if isinstance(m, InvertibleLayer)), None)
        if source is not None:
            self._replace_module(parent, target_name, CoupledLayer(target, source), target)
            return
        layer = InvertibleLayer(target, adapter_name, peft_config.coupling_size, peft_config.activation)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
        output = _output_embedding(self.model)
        if output is not None:
            path = next(path for path, module in self.model.named_modules() if module is output)
            above, _, name = path.rpartition(".")
            self._replace_module(self.model.get_submodule(above), name, InverseLayer(output, layer), output)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's would hand a base layer that goes back its own `weight`, which an encoder's embeddings do not have."""
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise not_mergeable("a coupling")


def _halves(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x1 and x2, in float32 at least."""
    first, second = states.to(torch.promote_types(states.dtype, torch.float32)).chunk(2, dim=-1)
    return first, second


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _width(embeddings: nn.Module) -> int:
    """The width of what embeddings give: their last norm's (BERT's end with one), or else their table's.

    Raises:
        AdapterError: There is no table of embeddings, or the width is odd.
    """
    tables = [m for m in embeddings.modules() if isinstance(m, nn.Embedding)]
    if not tables:
        raise AdapterError(
            f"a coupling stands on embeddings, not on {type(embeddings).__name__}",
            remedy="choose in `target_modules` the embeddings, such as `model.embed_tokens` or `bert.embeddings`",
        )
    norms = [
        w for m in embeddings.modules() if isinstance(w := getattr(m, "weight", None), nn.Parameter) and w.ndim == 1
    ]
    width = norms[-1].shape[0] if norms else tables[0].embedding_dim
    if width % 2:
        raise AdapterError(
            f"a coupling needs embeddings of an even width, and these are {width} wide",
            remedy="train the adapter without a coupling (invertible=false)",
        )
    return width


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The model's output embedding; None where it has a task's head instead."""
    find: Any = getattr(model, "get_output_embeddings", None)
    return find() if find is not None else None


def _check_output(model: Any, width: int) -> None:
    """Makes sure that the output embedding, where there is one, reads states of the coupling's width and gives logits."""
    output: Any = _output_embedding(model)
    if output is None:
        return
    found = (getattr(output, "in_features", None), getattr(output, "out_features", None))
    expected = (width, model.get_input_embeddings().weight.shape[0])
    if found != expected:
        raise AdapterError(
            f"the embeddings give {expected[1]} words of width {width}, and the output embedding of {type(model).__name__} "
            f"({type(_base(output)).__name__}) takes width {found[0]} and gives {found[1]} logits: no inverse fits before it",
            remedy="train the adapter without a coupling (invertible=false)",
        )
