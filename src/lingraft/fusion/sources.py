"""Source states: what the first stage's model holds, layer by layer, while it reads an item's counterpart.

They come from a pass without gradient, with the adapter off and dropout off, and are laid beside the target's columns by the
position in the text: token n beside token n, on whichever side a batch is padded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lingraft import roles
from lingraft.backbones import Backbone
from lingraft.batching import Counterpart, encoder_inputs
from lingraft.errors import BackboneError


@dataclass(frozen=True)
class Columns:
    """Which column of the source stands beside which column of the target.

    Attributes:
        index: batch × columns, the source's column; None: its own.
        where: batch × columns, True where source and target are mixed.
        there: batch × columns, True where the target has a token; in a decoder also behind it, where nothing can be read from.
        needed: How many columns of every source are read.
    """

    index: torch.Tensor | None
    where: torch.Tensor
    there: torch.Tensor
    needed: tuple[int, ...]


def align(
    sources: Sequence[int | None],
    prompts: Sequence[int],
    *,
    starts: Sequence[int] | None = None,
    written: Sequence[int] | None = None,
    continued: Sequence[int] | None = None,
    mask_padding: bool = False,
    causal: bool = True,
) -> Columns:
    """Lays sources beside targets.

    Args:
        sources: Tokens of every source; None: there is none.
        prompts: Tokens of every target before its answer.
        starts: Columns of padding on the left of every target; None: no column.
        written: Columns behind every prompt that what is written may take.
        continued: Tokens that continue every source; they stand beside what is written.
        mask_padding: Whether target tokens behind the source's end are left alone; else padding stands beside them.
        causal: Whether what stands behind a text, its answer or padding, is hidden from it by the model itself.
    """
    count = len(prompts)
    starts, written, continued = starts or [0] * count, written or [0] * count, continued or [0] * count
    width = max(s + p + w for s, p, w in zip(starts, prompts, written, strict=True))
    index = np.tile(np.arange(width), (count, 1))
    where, there = np.zeros((2, count, width), dtype=bool)
    needed = [1] * count
    for row, (source, prompt, start) in enumerate(zip(sources, prompts, starts, strict=True)):
        there[row, start : None if causal else start + prompt] = True
        if source is None:
            continue
        mixed = min(prompt, source) if mask_padding else prompt
        where[row, start : start + mixed] = True
        index[row, start : start + mixed] = np.arange(mixed)
        behind = min(written[row], continued[row])
        first = start + prompt
        where[row, first : first + behind] = True
        index[row, first : first + behind] = source + np.arange(behind)
        needed[row] = max(1, mixed, source + behind if behind else 0)
    same = not any(starts) and not any(continued)
    return Columns(
        None if same else torch.from_numpy(np.where(where, index, 0)),
        torch.from_numpy(where),
        torch.from_numpy(there),
        tuple(needed),
    )


def beside(states: torch.Tensor, columns: Columns) -> torch.Tensor:
    """Source states (batch × source columns × width) in the target's columns; where nothing is mixed they mean nothing."""
    width = columns.where.shape[1]
    if columns.index is None:
        if states.shape[1] < width:
            return torch.nn.functional.pad(states, (0, 0, 0, width - states.shape[1]))
        return states[:, :width]
    rows = torch.arange(len(states), device=states.device)[:, None]
    return states[rows, columns.index.to(states.device)]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """A model without dropout, and as it was afterwards."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def read(backbone: Backbone, rows: Sequence[Counterpart], width: int) -> None:
    """Runs the layers over texts, for the hooks on them.

    Args:
        backbone: The model, its adapter off.
        rows: The texts.
        width: Columns; what a decoder would read behind them says nothing of them, so it is left out.
    """
    causal = backbone.kind == "decoder"
    pairs = [(row.ids[:width] if causal else row.ids, row.types) for row in rows]
    given = encoder_inputs(backbone, pairs, width)
    with torch.no_grad(), backbone.autocast():
        if causal:
            backbone.hidden(given["input_ids"], given["attention_mask"])
        elif backbone.kind == "encoder":
            backbone.model.base_model(**given)
        else:
            backbone.model.get_encoder()(**given)


@dataclass(frozen=True)
class Point:
    """Where source states are taken from.

    Attributes:
        module: The path of the module.
        output: Whether its output is taken, not its input.
        norm: The path of the norm they still have to pass; None: none.
    """

    module: str
    output: bool
    norm: str | None


def points(backbone: Backbone, modules: Sequence[str], *, offset: int, normalised: bool) -> dict[str, Point]:
    """Where the source states of every fused layer are taken from; found by watching one pass, for any architecture.

    Args:
        backbone: The model without an adapter.
        modules: The fused layers.
        offset: 0: the states before their block; 1: those behind it.
        normalised: Whether the states pass the block's norm first, where it has one before attention.

    Raises:
        BackboneError: No norm leads from a block's states to its attention's, so they cannot be normalised.
    """
    blocks = {module: block_of(module) for module in modules}
    if offset == 0 and normalised:
        seen = _inputs(backbone, modules)
        first: dict[int, str] = {}
        return {module: Point(first.setdefault(id(seen[module]), module), False, None) for module in modules}
    if not normalised:
        return {module: Point(block, offset == 1, None) for module, block in blocks.items()}
    return {module: Point(block, True, _norm(backbone, block, module)) for module, block in blocks.items()}


def block_of(module: str) -> str:
    """The path of the block that a layer stands in: up to the first number."""
    parts = module.split(".")
    place = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
    if place is None or roles.layer_of(module) is None:
        raise BackboneError(
            f"'{module}' stands in no numbered block", remedy="name other layers to fuse (fusion.modules)"
        )
    return ".".join(parts[: place + 1])


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))


def _inputs(backbone: Backbone, paths: Sequence[str]) -> dict[str, Any]:
    """What every module is given in a short pass."""
    found: dict[str, Any] = {}

    def note(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: found.__setitem__(path, _first(args, kwargs))

    with _hooked(backbone, {path: note(path) for path in paths}):
        _short(backbone)
    return found


def _norm(backbone: Backbone, block: str, module: str) -> str | None:
    """The path of what stands between a block's input and a layer's; None: nothing."""
    inside: dict[str, tuple[Any, Any]] = {}
    root = backbone.model.get_submodule(block)
    leaves = [f"{block}.{name}" for name, child in root.named_modules() if name and not list(child.children())]
    handles = [
        backbone.model.get_submodule(path).register_forward_hook(
            lambda module, args, kwargs, out, path=path: inside.__setitem__(path, (_first(args, kwargs), out)),
            with_kwargs=True,
        )
        for path in leaves
    ]
    try:
        ends = _inputs(backbone, [block, module])
    finally:
        for handle in handles:
            handle.remove()
    if ends[module] is ends[block]:
        return None
    found = [path for path, (given, out) in inside.items() if given is ends[block] and out is ends[module]]
    if len(found) != 1:
        raise BackboneError(
            f"no norm is known between '{block}' and '{module}'",
            where=backbone.located.name,
            remedy="use fusion.normalize_source=false, or fusion.layer_offset=0",
        )
    return found[0]


def _short(backbone: Backbone) -> None:
    with evaluating(backbone.model):
        read(backbone, [Counterpart((1, 2, 3))], 3)


@contextmanager
def _hooked(backbone: Backbone, notes: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    handles = [
        backbone.model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
        for path, note in notes.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def states_of(
    backbone: Backbone, places: Sequence[Point], rows: Sequence[Counterpart], width: int
) -> dict[Point, torch.Tensor]:
    """Reads texts and takes the states at some places.

    Args:
        backbone: The model, its adapter off and in evaluation mode.
        places: The places.
        rows: The texts.
        width: Columns wanted; shorter texts are padded to so many.

    Returns:
        batch × columns × width of the model; at least as many columns as wanted.
    """
    found: dict[Point, torch.Tensor] = {}

    def taken(place: Point, value: Any) -> None:
        found[place] = value[0] if isinstance(value, tuple) else value

    handles = []
    for place in places:
        module = backbone.model.get_submodule(place.module)
        if place.output:
            handles.append(module.register_forward_hook(lambda m, args, out, place=place: taken(place, out)))
        else:
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, kwargs, place=place: taken(place, _first(args, kwargs)), with_kwargs=True
                )
            )
    try:
        read(backbone, rows, width)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad(), backbone.autocast():
        for place in places:
            if place.norm is not None:
                found[place] = backbone.model.get_submodule(place.norm)(found[place])
    return found
