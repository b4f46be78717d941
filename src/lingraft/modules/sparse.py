"""Sparse differences (LF-SFT) as a method of PEFT's own: what PEFT saves, loads, switches and merges, it does with these too.

A sparse difference (Ansell et al., 2022, arXiv:2110.07560, section 3) adds to some entries of the model's weights and biases:

    θ = θ0 + φ_language + φ_task

Its sites are called like the module whose weight they change, or `<module>.bias`. `merge_adapter` adds the values into the
weights in place, which costs nothing when the model is run; `unmerge_adapter` puts the start values back bit for bit. Several
adapters are added one after the other, in their order, each onto the rounded result of those before.

The output embedding stays as it is, also where it is tied to the input embedding, which then has a weight of its own while it
is changed. `merge_and_unload` therefore gives a model whose embeddings are no longer tied, and PEFT notes so in its
configuration.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge, check_target_module_exists
from torch import nn

from lingraft.errors import AdapterError, ConfigError

PEFT_TYPE = "SPARSE"
PREFIX = "sparse_"
KINDS = {"weight": "sparse_", "bias": "sparse_bias_"}
"""What can be changed of a module, and how the names of its tensors begin."""
ROLES = ("values", "indices", "shape")
_BIAS = ".bias"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def site_name(module: str, kind: str) -> str:
    """What the weight or bias of a module is called."""
    return module if kind == "weight" else f"{module}.{kind}"


def parted(site: str) -> tuple[str, str]:
    """The module of a site, and whether it is its `weight` or `bias`."""
    return (site.removesuffix(_BIAS), "bias") if site.endswith(_BIAS) else (site, "weight")


@dataclass
class SparseConfig(PeftConfig):
    """Which weights and biases are changed, and how many entries of each.

    Args:
        target_modules: The modules, matched as PEFT matches them for LoRA; absent: those that `entries` names. Of these only
            modules that `entries` names have differences.
        entries: The number of entries that change, by site: the path of a module for its weight, and `<module>.bias`.
        modules_to_save: Modules trained and saved whole beside the adapter, such as a classifier.
        exclude_modules: Modules left out although `target_modules` matches them.
        layers_to_transform: Only the layers of these indices.
        layers_pattern: The name of the model's list of layers, where PEFT does not find it by itself.

    Raises:
        ConfigError: A number of entries is no positive whole number.
    """

    target_modules: list[str] | str | None = None
    entries: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        for site, count in self.entries.items():
            if type(count) is not int or count < 1:
                raise ConfigError(
                    f"{count!r} entries cannot change",
                    where=f"entries.{site}",
                    remedy="give 1 or more, or leave it out",
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("`layers_pattern` says nothing alone", remedy="give `layers_to_transform` as well")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data; what PEFT makes sets or tuples of is a sorted list, so that equal ones are equal."""
        return {k: sorted(v) if isinstance(v, set | tuple) else v for k, v in super().to_dict().items()}

    @property
    def modules(self) -> dict[str, dict[str, int]]:
        """By module, how many entries of its weight and its bias change."""
        found: dict[str, dict[str, int]] = {}
        for site, count in self.entries.items():
            module, kind = parted(site)
            found.setdefault(module, {})[kind] = count
        return found


class SparseLayer(nn.Module, BaseTunerLayer):
    """A module some of whose weight's and bias's entries are changed.

    Not merged, every forward pass makes the changed weight anew, differentiable in the values: right, simple, and slow.
    `PeftModel.merge_adapter` (lingraft merges by itself) is the fast way.

    Args:
        base_layer: A module with a weight: a linear layer, an embedding, a norm.
        adapter_name: The name of the first adapter.
        entries: How many entries of its `weight` and `bias` change.
        holders: All modules that read this weight, the base layer among them; absent: it alone.
        tied: Whether the model's output embedding has the same weight, which must not change with it.

    Raises:
        AdapterError: The module has no such weight, or a quantised one; or it has fewer entries.
    """

    adapter_layer_names: tuple[str, ...] = ("sparse_values", "sparse_bias_values")
    other_param_names: tuple[str, ...] = ("sparse_indices", "sparse_shape", "sparse_bias_indices", "sparse_bias_shape")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        entries: Mapping[str, int],
        holders: Sequence[nn.Module] = (),
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        for start in KINDS.values():
            setattr(self, f"{start}values", nn.ParameterDict())
            setattr(self, f"{start}indices", BufferDict(persistent=True))
            setattr(self, f"{start}shape", BufferDict(persistent=True))
        self.merged_adapters: list[str] = []
        # In a tuple they are no children of this module.
        self._holders = tuple(holders) or (self.get_base_layer(),)
        self._tied = tied
        # In a tuple: as an attribute of its own it would be a parameter of this module, and saved.
        self._own: tuple[nn.Parameter, ...] = ()
        self._starts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, entries)

    def __getattr__(self, name: str) -> Any:
        """What this layer lacks is the base layer's: `in_features`, `padding_idx`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def part(self, kind: str, role: str) -> Any:
        """The tensors of one role by adapter: the `values` that are added to the `weight`, for instance."""
        return getattr(self, f"{KINDS[kind]}{role}")

    def update_layer(self, adapter_name: str, entries: Mapping[str, int]) -> None:
        """Adds an adapter that changes nothing yet: zeros, at the first entries.

        Args:
            adapter_name: Its name; an adapter of that name is replaced, in what `entries` names.
            entries: How many entries of the `weight` and the `bias` change.

        Raises:
            AdapterError: There are not so many, or the weight cannot be changed.
        """
        for kind, count in entries.items():
            self._make_room(adapter_name, kind, count)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _make_room(self, adapter_name: str, kind: str, count: int) -> nn.Parameter:
        weight = _changeable(self.get_base_layer(), kind)
        if count > weight.numel():
            raise AdapterError(
                f"{count} entries of a {kind} cannot change: it has {weight.numel()}",
                remedy="ask for fewer entries: adapter.entries",
            )
        values = nn.Parameter(torch.zeros(count, dtype=torch.float32))
        self.part(kind, "values")[adapter_name] = values
        self.part(kind, "indices")[adapter_name] = torch.arange(count)
        self.part(kind, "shape")[adapter_name] = torch.tensor(weight.shape, dtype=torch.int64)
        return self.part(kind, "values")[adapter_name]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves an adapter beside its base layer; unlike PEFT's, never rounds it to the base's dtype on the way."""
        target = device or getattr(self.get_base_layer(), "weight").device  # noqa: B009
        for held in (self.part(kind, role) for kind in KINDS for role in ROLES):
            if adapter_name in held and "meta" not in (target.type, held[adapter_name].device.type):
                held[adapter_name].data = held[adapter_name].data.to(target)

    def fit(self, adapter_name: str, kind: str, tensors: Mapping[str, torch.Tensor], frozen: bool) -> None:
        """Makes room for an adapter's tensors as they are: a merge's union of supports has more entries than either.

        Args:
            adapter_name: The adapter that they are to be loaded into.
            kind: `weight` or `bias`.
            tensors: By role.
            frozen: Whether they are not to be trained.

        Raises:
            AdapterError: They belong to another weight, or the adapter is merged.
        """
        weight, indices = _changeable(self.get_base_layer(), kind), tensors["indices"]
        if adapter_name in self.merged_adapters:
            raise AdapterError(f"the adapter '{adapter_name}' is merged", remedy="unmerge it before it is loaded again")
        if tensors["shape"].tolist() != list(weight.shape):
            raise AdapterError(
                f"the adapter does not fit this base model: its difference is one of a {kind} of the shape "
                f"{tuple(tensors['shape'].tolist())}, not {tuple(weight.shape)}",
                remedy="use the base model the adapter was trained on",
            )
        sizes = {tuple(tensors["values"].shape), tuple(indices.shape)}
        if len(sizes) != 1 or indices.dim() != 1 or not len(indices) or not _ascending(indices, weight.numel()):
            raise AdapterError(
                f"the adapter's indices are not ascending within the {kind}",
                remedy="make the adapter again, or copy it again whole",
            )
        held = self.part(kind, "values")
        if adapter_name not in held or len(held[adapter_name]) != len(indices):
            values = self._make_room(adapter_name, kind, len(indices))
            values.requires_grad_(adapter_name in self.active_adapters and not frozen)
            self._move_adapter_to_device_of_base_layer(adapter_name)

    def changed(self, kind: str) -> torch.Tensor | None:
        """The weight or bias with the differences of the active adapters; None where none of them changes it."""
        values, indices = self.part(kind, "values"), self.part(kind, "indices")
        names = [] if self.disable_adapters or self.merged else [n for n in self.active_adapters if n in values]
        if not names:
            return None
        weight = getattr(self.get_base_layer(), kind)
        flat = weight.reshape(-1)
        for name in names:
            where = indices[name]
            flat = flat.index_put((where,), _sum(flat[where], values[name]))
        return flat.view_as(weight)

    @property
    def weight(self) -> torch.Tensor:
        """The weight as the forward pass uses it: some models read an embedding's themselves."""
        changed = self.changed("weight")
        return getattr(self.get_base_layer(), "weight") if changed is None else changed  # noqa: B009

    @property
    def bias(self) -> torch.Tensor:
        """The bias as the forward pass uses it."""
        changed = self.changed("bias")
        return getattr(self.get_base_layer(), "bias") if changed is None else changed  # noqa: B009

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer gives with the differences of the active adapters in its weight and bias.

        Args:
            *args: The base layer's arguments.
            **kwargs: The base layer's arguments.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.call(self.base_layer, *args, **kwargs)

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a module with this layer's weight gives."""
        changed = {kind: tensor for kind in KINDS if (tensor := self.changed(kind)) is not None}
        if not changed:
            return module(*args, **kwargs)
        inner, path = module, ""
        while hasattr(inner, "base_layer"):
            inner, path = getattr(inner, "base_layer"), f"{path}base_layer."  # noqa: B009
        return torch.func.functional_call(module, {f"{path}{k}": t for k, t in changed.items()}, args, kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters into the weight and bias, in place; a weight that the output embedding has too is copied before.

        Args:
            safe_merge: Whether to refuse values that make an entry NaN or infinite.
            adapter_names: The adapters, in this order; None: those that are active.

        Raises:
            ValueError: With `safe_merge`, an entry came out as NaN or infinite.
        """
        with torch.no_grad():
            for name in check_adapters_to_merge(self, adapter_names):
                sums = {kind: self._added(name, kind) for kind in KINDS if name in self.part(kind, "values")}
                if safe_merge and not all(bool(torch.isfinite(new).all()) for _, new in sums.values()):
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                for kind, (where, new) in sums.items():
                    self._write(kind, where, new)
                if sums:
                    self.merged_adapters.append(name)

    def _added(self, name: str, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        where = self.part(kind, "indices")[name]
        start = getattr(self.get_base_layer(), kind).data.view(-1)[where]
        return where, _sum(start, self.part(kind, "values")[name])

    def _write(self, kind: str, where: torch.Tensor, new: torch.Tensor) -> None:
        base: Any = self.get_base_layer()
        if kind == "weight" and self._tied and not self._own:
            self._own = (base.weight,)
            copy = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
            self._hold(copy)
        flat = getattr(base, kind).data.view(-1)
        self._starts.append((flat, where, flat[where]))
        flat[where] = new

    def _hold(self, parameter: nn.Parameter) -> None:
        for holder in self._holders:
            holder.weight = parameter

    def unmerge(self) -> None:
        """Puts back the start values, the last merged adapter's first, and the weight itself where it had been copied."""
        with torch.no_grad():
            while self._starts:
                flat, where, start = self._starts.pop()
                flat[where] = start
            for own in self._own:
                self._hold(own)
            self._own = ()
        self.merged_adapters.clear()


class SharingLayer(nn.Module, BaseTunerLayer):
    """A module that has the weight of another one, which is a `SparseLayer`: an encoder-decoder's embeddings.

    Args:
        base_layer: The module.
        leader: The layer whose differences it reads its weight with.
    """

    def __init__(self, base_layer: nn.Module, leader: SparseLayer) -> None:
        super().__init__()
        self.base_layer = base_layer
        # In a tuple it is no child: its tensors are saved once.
        self._leader = (leader,)
        self._active_adapter = leader.active_adapter
        self.merged_adapters = leader.merged_adapters

    @property
    def weight(self) -> torch.Tensor:
        """The weight as the forward pass uses it."""
        return self._leader[0].weight

    def __getattr__(self, name: str) -> Any:
        """What this layer lacks is the base layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See `SparseLayer.forward`."""
        leader = self._leader[0]
        if leader.disable_adapters and leader.merged:
            leader.unmerge()
        return leader.call(self.base_layer, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Does nothing: the leader does.

        Args:
            safe_merge: Not used.
            adapter_names: Not used.
        """

    def unmerge(self) -> None:
        """Does nothing: the leader does."""


class SparseModel(BaseTuner):
    """A model with sparse differences, as PEFT wraps it; made by `peft.get_peft_model`."""

    prefix: str = PREFIX
    tuner_layer_cls = SparseLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: SparseConfig, model_config: dict[str, Any]) -> SparseConfig:
        modules = peft_config.modules
        if not modules:
            raise ConfigError(
                "this says of no weight how many of its entries change",
                where="entries",
                remedy="set adapter.entries, such as adapter.entries=10000",
            )
        if peft_config.target_modules is None:
            peft_config.target_modules = sorted(modules)
        if not isinstance(peft_config.target_modules, str):
            # Paths in a tuple: PEFT shortens long lists to names such as `embed_tokens`, and then saves that module whole.
            matched = [m for m in sorted(modules) if check_target_module_exists(peft_config, m)]
            peft_config.target_modules = tuple(matched)  # pyright: ignore[reportAttributeAccessIssue]
        return peft_config

    def _prepare_model(self, peft_config: SparseConfig, model: nn.Module) -> None:
        names = {name for name, _ in model.named_modules()}
        if absent := sorted(set(peft_config.modules) - names):
            raise AdapterError(
                f"the adapter does not fit this base model: it has no module '{absent[0]}'",
                remedy="use the base model the adapter was trained on",
            )

    @staticmethod
    def _check_target_module_exists(peft_config: SparseConfig, key: str) -> Any:
        return key in peft_config.modules and check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: SparseConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        entries = peft_config.modules[current_key]
        base: Any = target
        while isinstance(base, BaseTunerLayer):
            if isinstance(base, SparseLayer):
                base.update_layer(adapter_name, entries)
                return
            base = getattr(base, "base_layer")  # noqa: B009
        weight = _changeable(base, "weight")
        sharing = {path: module for path, module in holders(self.model, weight) if module is not base}
        output = output_embedding(self.model)
        others = {path: module for path, module in sharing.items() if module is not output}
        tied = len(others) < len(sharing)
        layer = SparseLayer(target, adapter_name, entries, (base, *others.values()), tied)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
        for path, module in others.items():
            above, _, name = path.rpartition(".")
            self._replace_module(self.model.get_submodule(above), name, SharingLayer(module, layer), module)

    def _check_merge_allowed(self) -> None:
        """It always is: PEFT would warn of tied embeddings, which are dealt with."""

    def _check_tied_modules(self, model: nn.Module, peft_config: SparseConfig) -> None:
        """Likewise."""

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        for path, layer in model.named_modules():
            if isinstance(layer, SparseLayer):
                for kind, start in KINDS.items():
                    names = {role: f"{path}.{start}{role}" for role in ROLES}
                    if (
                        names["values"] not in state_dict
                    ):  # A model without PEFT's wrapper has paths without its beginning.
                        names = {role: f"base_model.model.{name}" for role, name in names.items()}
                    if all(name in state_dict for name in names.values()):
                        tensors = {role: state_dict[name] for role, name in names.items()}
                        layer.fit(adapter_name, kind, tensors, bool(config.inference_mode))
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def output_embedding(model: Any) -> nn.Module | None:
    """A model's output embedding itself, without what adapters put around it; None where there is none."""
    try:
        found = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found.get_base_layer() if isinstance(found, BaseTunerLayer) else found


def holders(model: nn.Module, parameter: nn.Parameter) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have a parameter as their weight, with their paths."""
    for path, module in model.named_modules():
        if module._parameters.get("weight") is parameter:
            yield path, module


def _changeable(layer: nn.Module, kind: str) -> nn.Parameter:
    """A module's weight or bias.

    Raises:
        AdapterError: It has none, or one whose entries cannot be changed.
    """
    found = layer._parameters.get(kind)
    if found is None:
        raise AdapterError(
            f"{type(layer).__name__} has no {kind} of which entries could change",
            remedy="use the base model the adapter was trained on",
        )
    if found.dtype not in _FLOATS:
        raise AdapterError(
            f"the entries of a quantised weight cannot change ({type(layer).__name__}, {found.dtype})".replace(
                "torch.", ""
            ),
            remedy="load the base model without quantisation: quantization=none",
        )
    return found


def _ascending(indices: torch.Tensor, size: int) -> bool:
    """Whether these are int64, ascending, and within a tensor of so many entries."""
    if indices.dtype != torch.int64 or int(indices[0]) < 0 or int(indices[-1]) >= size:
        return False
    return bool((indices[1:] > indices[:-1]).all())


def _sum(start: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Start values plus differences, computed in float32 at least, in the start values' type."""
    wide = torch.promote_types(start.dtype, torch.float32)
    return (start.to(wide) + values.to(wide)).to(start.dtype)
