"""Dropout that costs by the number that is dropped, and drops the same of a text wherever the text stands in a batch.

torch draws a random number for every number of a layer's input; with a share of 0.05 that was a fifth of a training step on a
processor. Here the gaps from one dropped number to the next are drawn. What is drawn is a function of (the text's seed, the
layer), so that the layout of a batch (padding, packing, parts, other adapters' texts beside it) changes nothing.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from lingraft.rows import Rows, Segment


def number_of(name: str) -> int:
    """A layer's number, a function of its path."""
    return zlib.crc32(name.encode())


def places_of(count: int, share: float, seed: Sequence[int]) -> np.ndarray[Any, Any]:
    """Which of so many places are dropped, each with the same chance: the gaps between them follow a geometric distribution.

    Args:
        count: Places.
        share: The chance of each, between 0 and 1, both excluded.
        seed: What the draw is a function of.

    Returns:
        Ascending places below `count`.
    """
    rng = np.random.Generator(np.random.SFC64(list(seed)))
    # ⌊E / λ⌋ of an exponential E is geometric with 1 − share = exp(−λ).
    per_gap = -1 / math.log1p(-share)
    expected = count * share
    size = int(expected + 5 * math.sqrt(expected)) + 8
    parts: list[np.ndarray[Any, Any]] = []
    last = -1
    while last < count:
        gaps = rng.standard_exponential(size, dtype=np.float32) * np.float32(per_gap)
        gaps = np.minimum(gaps, count).astype(np.int64)  # A chance of almost nothing has gaps beyond any integer.
        parts.append(np.cumsum(gaps + 1) + last)
        last = int(parts[-1][-1])
    found = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return found[: np.searchsorted(found, count)]


def drawn(
    x: torch.Tensor, share: float, layer: int, segments: Sequence[Segment], rows: slice | None = None
) -> torch.Tensor:
    """The places that are dropped out of states, laid out in a row; on a GPU, where that is cheaper, a mask.

    Args:
        x: The states, batch × length × width where texts are told.
        share: The chance of each place.
        layer: The layer's number.
        segments: Where the texts stand; none, or texts that do not fit the states (an encoder-decoder's two sides have other
            columns): the draw is a function of torch's global state, as torch's own dropout is.
        rows: Of these rows alone, whose first number has place 0; None: of all.
    """
    rows = rows or slice(0, x.shape[0])
    if x.device.type != "cpu":
        return torch.rand(x[rows].shape, device=x.device) < share
    inside = x.dim() == 3 and all(s.row < x.shape[0] and s.start + s.length <= x.shape[1] for s in segments)
    if not segments or not inside:
        seed = int(torch.randint(2**62, ()))
        found = places_of(x[rows].numel(), share, (seed, layer))
        return torch.from_numpy(found).to(x.device)
    width = x.shape[-1]
    line = x.shape[1] * width
    parts = [
        places_of(s.length * width, share, (s.seed, layer)) + ((s.row - rows.start) * line + s.start * width)
        for s in segments
        if rows.start <= s.row < rows.stop
    ]
    return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, np.int64)).to(x.device)


def dropped(states: torch.Tensor, places: torch.Tensor | None, *, fresh: bool = False) -> torch.Tensor:
    """States with 0 at some places.

    Args:
        states: Contiguous.
        places: The places, or a mask that is true there; None: as they are.
        fresh: Whether nobody else has the states, so that they may be written over.
    """
    if places is None:
        return states
    if places.dtype == torch.bool:
        mask = places.view(states.shape)
        return states.masked_fill_(mask, 0) if fresh else states.masked_fill(mask, 0)
    flat = states.view(-1)
    return (flat.index_fill_(0, places, 0) if fresh else flat.index_fill(0, places, 0)).view(states.shape)


class _Drop(torch.autograd.Function):
    """Dropout with places that were drawn: the rest is scaled up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor, share: float) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.places, ctx.scale = places, 1 / (1 - share)
        return dropped(x.contiguous() * ctx.scale, places, fresh=True)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return dropped(upstream[0].contiguous() * ctx.scale, ctx.places, fresh=True), None, None


def _forward(module: Any, rows: Rows, number: int, usual: Any, x: torch.Tensor) -> torch.Tensor:
    # On a GPU torch's own is one kernel.
    if not module.training or not 0 < module.p < 1 or x.device.type != "cpu" or not x.is_floating_point():
        return usual(x)
    return _Drop.apply(x, drawn(x, module.p, number, rows.segments), module.p)  # pyright: ignore[reportReturnType]


@contextmanager
def quick_dropout(model: torch.nn.Module, rows: Rows) -> Iterator[None]:
    """Has a model's own dropout drawn as above; afterwards it is torch's again.

    Args:
        model: The model. Dropout inside its attention, which is a number there and no module, stays torch's.
        rows: What the layers are told of the batch.
    """
    # LoRA's own are read by `lowrank`; where that leaves a layer to PEFT, they are torch's.
    found = [
        (name, m)
        for name, m in model.named_modules()
        if type(m) is torch.nn.Dropout and "lora_dropout" not in name and "forward" not in vars(m)
    ]
    module: Any
    for name, module in found:
        module.forward = partial(_forward, module, rows, number_of(name), module.forward)
    try:
        yield
    finally:
        for _, module in found:
            del module.forward
