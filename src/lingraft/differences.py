"""Learning differences of a model's weights in place (LF-SFT), with gradients and optimizer states for what changes alone.

The weights of a forward pass are the model's own. What is trained are float32 `values`, the differences from the start: after
every optimizer step the weights become round(start + values), so small steps are not lost in a narrow type. Gradients are
gathered from the weights' as soon as the backward pass has made them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lingraft import roles
from lingraft.errors import AdapterError, UserError
from lingraft.layouts.sparse import tensor_name
from lingraft.modules.sparse import holders, output_embedding, parted, site_name
from lingraft.selecting import Part

CHUNK = 1 << 18
"""Entries computed with at a time on a processor: what is computed of so many stays in its cache. Elsewhere many more."""
_CHUNK_ELSEWHERE = 1 << 25
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class Weight:
    """A weight or bias that may change.

    Attributes:
        holders: The modules that read it, the output embedding not among them; it is changed in all of them.
        kind: `weight` or `bias`: what it is called there.
        tied: Whether the output embedding has it too, and must keep it as it is.
    """

    holders: tuple[nn.Module, ...]
    kind: str
    tied: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """The tensor that the holders have now."""
        return getattr(self.holders[0], self.kind)

    def hold(self, parameter: nn.Parameter) -> None:
        """Gives the holders another tensor."""
        for holder in self.holders:
            setattr(holder, self.kind, parameter)


def trainable_weights(model: Any, chosen: str | Sequence[str] = "all") -> dict[str, Weight]:
    """The weights and biases of the language model's body that LF-SFT may change.

    All but those of norms, heads, a pooler, and the output embedding; embeddings are among them.

    Args:
        model: A transformers model, perhaps with adapters on it, whose own tensors are left out.
        chosen: `all`, or names and roles of modules as `roles.select` takes them; a module's bias goes with its weight.

    Returns:
        By site, sorted: the module's path for its weight, `<module>.bias` for its bias.

    Raises:
        UserError: A name or role matches nothing; or all were chosen, and some parameters are no module's weight or bias.
        AdapterError: A weight is quantised.
    """
    output = output_embedding(model)
    base = getattr(model, "base_model", model)
    prefix = "" if base is model else f"{model.base_model_prefix}."
    found: dict[str, Weight] = {}
    strange: list[str] = []
    seen: set[int] = set()
    for path, module in _own_modules(model):
        inside = path.startswith(prefix) and not path.startswith(f"{prefix}pooler.")
        if not inside or module is output or _is_norm(module):
            continue
        for kind, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if kind not in ("weight", "bias"):
                strange.append(f"{path}.{kind}")
                continue
            if parameter.dtype not in _FLOATS:
                raise AdapterError(
                    f"the entries of a quantised weight cannot change ({path})",
                    remedy="load the base model without quantisation: quantization=none",
                )
            all_holders = [m for _, m in holders(model, parameter)] if kind == "weight" else [module]
            readers = tuple(m for m in all_holders if m is not output)
            found[site_name(path, kind)] = Weight(readers, kind, len(readers) < len(all_holders))
    everything = chosen == "all" or list(chosen) == ["all"]
    if everything and strange:  # Some of the weights for all of them would be a choice that nobody made.
        raise UserError(
            f"not all parameters of {type(model).__name__} are weights and biases of modules: {', '.join(strange[:3])} …",
            remedy="name the modules to change by the ends of their paths (adapter.modules)",
        )
    modules = set(roles.select(sorted({parted(site)[0] for site in found}), chosen))
    return {site: found[site] for site in sorted(found) if parted(site)[0] in modules}


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules by the paths they have without adapters, and none of the adapters'."""
    wrapped = {path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for path, module in model.named_modules():
        parts = path.split(".")
        above = [".".join(parts[:n]) for n in range(1, len(parts))]
        adapters = any(a in wrapped and parts[n] != "base_layer" for n, a in enumerate(above, 1))
        if path not in wrapped and not adapters:
            own = [
                part for n, part in enumerate(parts) if not (part == "base_layer" and ".".join(parts[:n]) in wrapped)
            ]
            yield ".".join(own), module


def _chunk(tensor: torch.Tensor) -> int:
    return CHUNK if tensor.device.type == "cpu" else _CHUNK_ELSEWHERE


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or "norm" in type(module).__name__.lower()


class _Opened:
    """Weights that take gradients; a tied one is a copy of its own meanwhile, and embeddings' gradients are sparse.

    Args:
        weights: By site.
        close: Called first when they are closed.
    """

    def __init__(self, weights: Mapping[str, Weight], close: Callable[[], None] = lambda: None) -> None:
        self.copies = 0
        self._undo = ExitStack()
        try:
            for weight in weights.values():
                self._open(weight)
        except BaseException:
            self._undo.close()
            raise
        self._undo.callback(close)

    def _open(self, weight: Weight) -> None:
        parameter = weight.parameter
        if weight.tied:
            self._undo.callback(weight.hold, parameter)
            parameter = nn.Parameter(parameter.detach().clone())
            weight.hold(parameter)
            self.copies += parameter.numel() * parameter.element_size()
        self._undo.callback(setattr, parameter, "grad", None)
        self._undo.callback(parameter.requires_grad_, parameter.requires_grad and not weight.tied)
        parameter.grad = None
        parameter.requires_grad_(True)
        for holder in weight.holders:
            if isinstance(holder, nn.Embedding) and parameter.device.type in ("cpu", "cuda"):
                self._undo.callback(setattr, holder, "sparse", holder.sparse)
                holder.sparse = True

    def on_gradient(self, weight: Weight, hook: Callable[[torch.Tensor], None]) -> None:
        """Has a function called with a weight's gradient after every backward pass; the gradient itself is dropped."""

        def take(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                hook(gradient)

        self._undo.callback(weight.parameter.register_post_accumulate_grad_hook(take).remove)

    def close(self) -> None:
        """Puts everything back; doing it again does nothing."""
        self._undo.close()


@dataclass(frozen=True)
class Memory:
    """Bytes that learning takes beside the model.

    Attributes:
        indices: Which entries change.
        values: The differences, float32.
        gradients: Theirs, float32.
        optimizer: Adam's two moments, float32.
        start: The entries' start values, in the weights' type.
        copies: Weights of their own for embeddings that are tied to the output embedding.
    """

    indices: int
    values: int
    gradients: int
    optimizer: int
    start: int
    copies: int

    @property
    def total(self) -> int:
        """All together, without what is there for a moment: one tensor's dense gradient."""
        return self.indices + self.values + self.gradients + self.optimizer + self.start + self.copies


class Learned:
    """Learns differences of weights in place: give `parameters` to an optimizer, and after each of its steps call `refresh`.

    Every entry of the weights learns, or given a support only its entries. An entry takes 20 bytes (an int32 index, the
    value, its gradient, Adam's two moments; 24 in tensors of 2³¹ entries and more; 16 where all learn) and its start value in
    the weight's type. Beside these there is for a moment one tensor's dense gradient, in its own type. A tied input embedding
    has a copy of its weight meanwhile, which leaves the output embedding as it is.

    Used as a context manager it closes itself. The differences can be read afterwards too.

    Args:
        weights: What learns, by site, from `trainable_weights`.
        support: By site, the ascending flat indices of the entries that learn; sites that are not in it do not change.
            Absent: every entry.

    Attributes:
        parameters: By site, the differences from the start, flat.
        indices: By site, where they are added; empty where every entry learns.

    Raises:
        ValueError: Indices are not ascending within a weight, or of no weight that may change.
    """

    def __init__(self, weights: Mapping[str, Weight], support: Mapping[str, Any] | None = None) -> None:
        given = None if support is None else {s: torch.as_tensor(i) for s, i in support.items() if len(i)}
        if strange := sorted(set(given or {}) - set(weights)):
            raise ValueError(f"no such weight may change: {', '.join(strange)}")
        self.weights = {site: weight for site, weight in weights.items() if given is None or site in given}
        self.indices: dict[str, torch.Tensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for site, weight in self.weights.items():
            size, device = weight.parameter.numel(), weight.parameter.device
            if given is not None:
                self.indices[site] = _indices(site, given[site], size).to(device)
            count = size if given is None else len(self.indices[site])
            self.parameters[site] = nn.Parameter(torch.zeros(count, device=device))
        self._shapes = {site: tuple(weight.parameter.shape) for site, weight in self.weights.items()}
        self._start: dict[str, torch.Tensor] = {}
        originals = {site: weight.parameter.detach() for site, weight in self.weights.items()}
        self._opened = _Opened(self.weights, self._restore)
        try:
            for site, original in originals.items():
                self._start[site] = self._start_of(site, original)
                self._opened.on_gradient(self.weights[site], self._gatherer(site))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Learned":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start_of(self, site: str, original: torch.Tensor) -> torch.Tensor:
        if site in self.indices:
            return original.view(-1).index_select(0, self.indices[site])
        # A tied weight is a copy: what it is a copy of stays as it is.
        return original.view(-1) if self.weights[site].tied else original.view(-1).clone()

    def _gatherer(self, site: str) -> Callable[[torch.Tensor], None]:
        values, indices = self.parameters[site], self.indices.get(site)
        size = _chunk(values)

        def add(gradient: torch.Tensor) -> None:
            with torch.no_grad():
                if values.grad is None:
                    values.grad = torch.zeros_like(values)
                if gradient.is_sparse:
                    _add_rows(values.grad, _summed(gradient), indices)
                elif indices is None:
                    for part, new in zip(values.grad.split(size), gradient.reshape(-1).split(size), strict=True):
                        part += new
                else:
                    flat = gradient.reshape(-1)
                    for part, where in zip(values.grad.split(size), indices.split(size), strict=True):
                        part += flat.index_select(0, where)

        return add

    def penalty(self, l1: float, count: int) -> None:
        """Adds to the gradients those of λ/N · ‖θ − θ0‖₁ (LT-SFT); called once before each optimizer step.

        Args:
            l1: λ.
            count: N.
        """
        if l1 == 0:
            return
        for values in self.parameters.values():
            if values.grad is None:
                values.grad = torch.zeros_like(values)
            size = _chunk(values)
            for part, value in zip(values.grad.split(size), values.detach().split(size), strict=True):
                part.add_(value.sign(), alpha=l1 / count)

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the weights what the values say: start + values in float32, rounded to the weight's type."""
        for site, weight in self.weights.items():
            flat, start, indices = weight.parameter.data.view(-1), self._start[site], self.indices.get(site)
            size = _chunk(start)
            for first in range(0, len(start), size):
                part = slice(first, first + size)
                wide = torch.promote_types(start.dtype, torch.float32)
                new = (start[part].to(wide) + self.parameters[site].detach()[part]).to(start.dtype)
                if indices is None:
                    flat[part] = new
                else:
                    flat[indices[part].long()] = new

    @torch.no_grad()
    def _restore(self) -> None:
        for site, kept in self._start.items():
            weight, indices = self.weights[site], self.indices.get(site)
            if weight.tied:  # The copy goes.
                continue
            flat = weight.parameter.data.view(-1)
            if indices is None:
                flat.copy_(kept)
            else:
                size = _chunk(kept)
                for part, start in zip(indices.split(size), kept.split(size), strict=True):
                    flat[part.long()] = start

    def close(self) -> None:
        """Gives the model back its weights bit for bit, the very parameters; values and indices stay readable."""
        self._opened.close()
        self._start = {}
        self.weights = {}
        for values in self.parameters.values():
            values.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The sparse difference by PEFT's names: values (float32), indices and shape (int64). Nothing without a support."""
        found: dict[str, torch.Tensor] = {}
        for site, indices in self.indices.items():
            found[tensor_name(site, "indices")] = indices.long()
            found[tensor_name(site, "values")] = self.parameters[site].detach()
            found[tensor_name(site, "shape")] = torch.tensor(self._shapes[site], dtype=torch.int64)
        return found

    @property
    def memory(self) -> Memory:
        """What learning takes, gradients and Adam's moments counted as if they were there already."""

        def size(tensors: Mapping[str, torch.Tensor]) -> int:
            return sum(t.numel() * t.element_size() for t in tensors.values())

        values = size(self.parameters)
        borrowed = {s: t for s, t in self._start.items() if s in self.indices or not self.weights[s].tied}
        return Memory(size(self.indices), values, values, 2 * values, size(borrowed), self._opened.copies)


class Gathered:
    """Sums the magnitudes of the gradients of weights that do not change, to select entries by: |g| summed over steps.

    It takes 4 bytes an entry, and between a step's backward passes the gradients in the weights' type.

    Args:
        weights: By site, from `trainable_weights`.

    Attributes:
        values: By site, the sums, float32, flat.
    """

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self.weights = dict(weights)
        self.values = {
            site: torch.zeros(w.parameter.numel(), device=w.parameter.device) for site, w in self.weights.items()
        }
        self._opened = _Opened(self.weights)

    def __enter__(self) -> "Gathered":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.no_grad()
    def absorb(self) -> None:
        """Adds the magnitudes of the step's gradients, which the backward passes since the last call have summed."""
        for site, weight in self.weights.items():
            gradient, weight.parameter.grad = weight.parameter.grad, None
            if gradient is None:
                continue
            if gradient.is_sparse:
                # A row may be there more than once; only their sum has the magnitude.
                summed = _summed(gradient)
                rows = torch.sparse_coo_tensor(
                    summed.indices(), summed.values().abs(), summed.shape, is_coalesced=True, check_invariants=False
                )
                _add_rows(self.values[site], rows, None)
            else:
                self.values[site] += gradient.reshape(-1).abs()

    def close(self) -> None:
        """Gives the model back its parameters; the sums stay readable."""
        self._opened.close()
        self.weights = {}


def _indices(site: str, indices: torch.Tensor, size: int) -> torch.Tensor:
    """Ascending indices, in as few bytes as reach all entries."""
    if int(indices[0]) < 0 or int(indices[-1]) >= size or not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError(f"{site}: the indices are not ascending within {size} entries")
    return indices.to(torch.int32 if size < 1 << 31 else torch.int64)


def _summed(gradient: torch.Tensor) -> torch.Tensor:
    """An embedding's gradient with every row once; rows of one token are summed in float32, whatever type they have."""
    rows, found = gradient._indices(), gradient._values().float()
    return torch.sparse_coo_tensor(rows, found, gradient.shape, check_invariants=False).coalesce()


def _add_rows(into: torch.Tensor, rows: torch.Tensor, indices: torch.Tensor | None) -> None:
    """Adds an embedding's gradient, of which only some rows are there, to that of its entries.

    Args:
        into: The gradient of all entries, or of those that `indices` names, flat.
        rows: The embedding's gradient, coalesced COO.
        indices: Ascending flat indices into the embedding.
    """
    numbers, found = rows.indices()[0], rows.values()
    width = found.shape[1]
    if indices is None:
        into.view(-1, width).index_add_(0, numbers, found.to(into.dtype))
        return
    # Entries are in order: those of one row stand side by side.
    edges = torch.stack([numbers * width, (numbers + 1) * width]).to(indices.dtype)
    first, behind = torch.searchsorted(indices, edges)
    counts = behind - first
    ends = counts.cumsum(0)
    places = torch.arange(int(counts.sum()), device=into.device)
    places += (first - (ends - counts)).repeat_interleave(counts)
    row = torch.arange(len(numbers), device=into.device).repeat_interleave(counts)
    columns = indices[places].long() - numbers[row] * width
    into.index_add_(0, places, found[row, columns].to(into.dtype))


def parts_of(values: Mapping[str, torch.Tensor]) -> list[Part]:
    """Tensors for `lingraft.selecting.largest`, each read a range at a time, in float32.

    Args:
        values: By site, in the order in which ties are resolved.
    """

    def reader(flat: torch.Tensor) -> Callable[[int, int], Any]:
        return lambda start, stop: flat[start:stop].float().cpu().numpy()

    return [Part(site, tensor.numel(), reader(tensor.detach().reshape(-1))) for site, tensor in values.items()]
