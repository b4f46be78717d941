"""LoRA's layers computed as one node of the graph, as plain PEFT computes them but for rounding, with less time and memory.

PEFT's own forward keeps a float32 copy of every layer's input, the dropped-out copy and its mask, and draws that mask number by
number. Here the input is kept once, in the base's type; what is dropped out is a list of places, and the update is added into the
layer's output, forward and backward. The files, the parameters and the adapters' names stay PEFT's.

While several adapters are trained together (`Rows.lanes`), each one's factors see its own rows, and the base sees all of them at
once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.autograd.function import once_differentiable

from lingraft.dropping import drawn, dropped, number_of
from lingraft.errors import AdapterError
from lingraft.rows import REMEDY, Rows


@dataclass(frozen=True)
class _Piece:
    """One adapter on some of the tokens.

    Attributes:
        first: The first token.
        last: The token behind the last.
        scaling: The update's factor, that of dropout included.
        places: Those of these tokens' numbers, laid out in a row, that are dropped out; None: none are.
    """

    first: int
    last: int
    scaling: float
    places: torch.Tensor | None


def _updated(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    given: torch.Tensor | None,
    pieces: Sequence[_Piece],
    factors: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The layer's output and input, tokens × width, and what every adapter made of its tokens at its rank."""
    dtype: Any = given.dtype if weight is None else weight.dtype  # pyright: ignore[reportOptionalMemberAccess]
    flat = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
    out = (
        given.reshape(-1, given.shape[-1]).clone(memory_format=torch.contiguous_format)  # pyright: ignore[reportOptionalMemberAccess]
        if weight is None
        else torch.nn.functional.linear(flat, weight, bias)
    )
    lowered = []
    for piece, a, b in zip(pieces, factors[::2], factors[1::2], strict=True):
        h = dropped(_of(flat, piece), piece.places) @ a.to(dtype).T
        _of(out, piece).addmm_(h, (b * piece.scaling).to(dtype).T)
        lowered.append(h)
    return out, flat, lowered


def _of(states: torch.Tensor, piece: _Piece) -> torch.Tensor:
    """A piece's tokens."""
    return states if piece.last - piece.first == len(states) else states[piece.first : piece.last]


class _LowRank(torch.autograd.Function):
    """`x·Wᵀ + b + Σ scaling · drop(x)·Aᵀ·Bᵀ`, W and b frozen; without W the first part is given."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        given: torch.Tensor | None,
        pieces: Sequence[_Piece],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        out, flat, lowered = _updated(x, weight, bias, given, pieces, factors)
        ctx.save_for_backward(flat, weight, *factors, *lowered)
        ctx.pieces, ctx.shape, ctx.dtype = pieces, x.shape, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        flat, weight, *rest = ctx.saved_tensors
        count = len(ctx.pieces)
        factors, lowered = rest[: 2 * count], rest[2 * count :]
        dtype = flat.dtype
        slope = upstream[0].reshape(-1, upstream[0].shape[-1]).to(dtype)
        below: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            below = torch.zeros_like(flat) if weight is None else slope @ weight
        found: list[torch.Tensor | None] = []
        for number, piece in enumerate(ctx.pieces):
            a, b = factors[2 * number], factors[2 * number + 1]
            mine = _of(slope, piece)
            through = mine @ (b * piece.scaling).to(dtype)
            if ctx.needs_input_grad[5 + 2 * number]:
                found.append((through.T @ dropped(_of(flat, piece), piece.places)).to(a.dtype))
                found.append((mine.T @ lowered[number]).to(b.dtype) * piece.scaling)
            else:
                found += [None, None]
            if below is None:
                continue
            if piece.places is None:
                _of(below, piece).addmm_(through, a.to(dtype))
            else:
                _of(below, piece).add_(dropped(through @ a.to(dtype), piece.places, fresh=True))
        if below is not None:
            below = below.view(ctx.shape).to(ctx.dtype)
        return (
            below,
            None,
            None,
            upstream[0].reshape(*ctx.shape[:-1], upstream[0].shape[-1]) if ctx.needs_input_grad[3] else None,
            None,
            *found,
        )


def _forward(layer: Any, rows: Rows, number: int, usual: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """What a LoRA layer gives: computed here, or where it does something unusual by PEFT."""
    lanes = bool(rows.lanes)
    names = [n for n in ([name for name, _ in rows.lanes] or layer.active_adapters) if n in layer.lora_A]
    if (
        args
        or kwargs
        or layer.disable_adapters
        or layer.merged
        or not names
        or not all(_plain(layer, n) for n in names)
    ):
        if lanes and not layer.disable_adapters:
            raise AdapterError("adapters of this kind cannot be trained together", remedy=REMEDY)
        return usual(x, *args, **kwargs)
    spans = [span for _, span in rows.spans(x.shape[0])] if lanes else [slice(0, x.shape[0])] * len(names)
    each = math.prod(x.shape[1:-1])
    pieces: list[_Piece] = []
    factors: list[torch.Tensor] = []
    for name, span in zip(names, spans, strict=True):
        share = float(getattr(layer.lora_dropout[name], "p", 0.0)) if layer.training else 0.0
        places = drawn(x, share, number, rows.segments, span) if share else None
        scaling = layer.scaling[name] / (1 - share)
        pieces.append(_Piece(span.start * each, span.stop * each, scaling, places))
        factors += [layer.lora_A[name].weight, layer.lora_B[name].weight]
    base = layer.base_layer
    own = (base.weight, base.bias, None) if _bare(base) else (None, None, base(x))
    out: Any = (
        _LowRank.apply(x, *own, pieces, *factors) if torch.is_grad_enabled() else _updated(x, *own, pieces, factors)[0]
    )
    # Viewed here: autograd lets nobody write over a view that a function of one's own gives (OLMo clips q, k and v in place).
    return out.view(*x.shape[:-1], out.shape[-1])


def _plain(layer: Any, name: str) -> bool:
    """Whether an adapter is LoRA and nothing more: no variant, no bias, nobody listening in (as fusion does)."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    heard = down._forward_hooks or up._forward_hooks or down._forward_pre_hooks
    return not (heard or name in layer.lora_variant or up.bias is not None)


def _bare(base: Any) -> bool:
    """Whether a base layer is a linear map that nothing else listens to or changes."""
    listens = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    if (
        type(base) is not torch.nn.Linear
        or listens
        or "forward" in vars(base)
        or any(p.requires_grad for p in base.parameters())
    ):
        return False
    # Autocast makes one type of weights in several: T5's `wo` stays in float32 where the rest is in float16.
    device = base.weight.device.type
    return not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == base.weight.dtype


def quicken(model: torch.nn.Module, rows: Rows) -> None:
    """Has the LoRA layers of a model that PEFT has put on computed here, as long as they are on it.

    Args:
        model: The model.
        rows: What they are told of the batch.
    """
    for name, layer in model.named_modules():
        if type(layer) is LoraLinear:
            layer.forward = partial(_forward, layer, rows, number_of(name), layer.forward)
