"""Losses that project only the positions they need, and never hold positions × vocabulary at once.

A model's own loss projects every position through the output embedding: for 262,144 tokens of vocabulary that is most of
a training step and most of its memory. Here the frozen embedding is applied to chunks of positions, and the gradient
with respect to the states is made in the forward pass, while the chunk's logits are at hand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Drawn:
    """One sequence of a batch, with whatever was drawn for this step.

    Attributes:
        item: What the objective reads.
        terms: How many terms of the loss it has.
        length: Its tokens: parts of a batch are of near-equal length.
        seed: What is dropped out of it is a function of this.
    """

    item: Any
    terms: int
    length: int
    seed: int = 0


@dataclass(frozen=True)
class Objective:
    """What sequences of one type teach.

    Attributes:
        draw: From the backbone, a batch, the share of positions that take a loss, and a seed, what is drawn for every sequence.
        summed: From the backbone, the model with its adapter and some of what was drawn, the loss summed over the terms: of every
            sequence its own, in a row, or one scalar where they cannot be told apart.
    """

    draw: Callable[[Any, Sequence[Any], float, int], list[Drawn]]
    summed: Callable[[Any, Any, Sequence[Drawn]], torch.Tensor]


def project(
    states: torch.Tensor, weight: torch.Tensor, softcap: float | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits in float32: `states @ weightᵀ + bias`, bounded by the soft cap where there is one.

    Args:
        states: positions × width.
        weight: vocabulary × width.
        softcap: c of `c · tanh(x / c)`.
        bias: vocabulary, where the output embedding has one.
    """
    logits = torch.nn.functional.linear(states.to(weight.dtype), weight, bias).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


CHUNK = 256
"""Positions whose logits are held at a time, in the embedding's own type: 134 MB in bfloat16 at 262,144 tokens."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of every position against its label; the output embedding is frozen and gets no gradient."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        softcap: float | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        losses = torch.empty(len(states), dtype=torch.float32, device=states.device)
        gradient = torch.empty_like(states)
        # Buffers are made once and written over: fresh memory for every chunk costs more than the arithmetic on it.
        held = torch.empty(min(CHUNK, len(states)), len(weight), dtype=weight.dtype, device=states.device)
        rows = 8 if states.device.type == "cpu" else CHUNK  # so few stay in a processor's cache
        block = torch.empty(min(rows, len(held)), len(weight), dtype=torch.float32, device=states.device)
        for start in range(0, len(states), CHUNK):
            part = states[start : start + CHUNK].to(weight.dtype)
            logits = torch.mm(part, weight.t(), out=held[: len(part)])
            if bias is not None:
                logits += bias
            for first in range(0, len(part), rows):
                here = logits[first : first + rows]
                gold = labels[start + first : start + first + len(here), None]
                losses[start + first : start + first + len(here)] = _loss_and_slope(
                    here, gold, softcap, block[: len(here)]
                )
            gradient[start : start + CHUNK] = logits @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype)[:, None], None, None, None, None


def _loss_and_slope(
    logits: torch.Tensor, gold: torch.Tensor, softcap: float | None, work: torch.Tensor
) -> torch.Tensor:
    """The loss of each of a few rows; the rows are overwritten by the loss's slope, softmax − one-hot."""
    work.copy_(logits)
    if softcap is not None:
        work.div_(softcap).tanh_()
        slope = 1 - work.square()
        work.mul_(softcap)
    top = work.amax(dim=-1, keepdim=True)
    right = work.gather(1, gold)
    norm = work.sub_(top).exp_().sum(dim=-1, keepdim=True)
    work.div_(norm).scatter_add_(1, gold, torch.full_like(gold, -1, dtype=work.dtype))
    if softcap is not None:
        work.mul_(slope)
    logits.copy_(work)
    return (norm.log() + top - right)[:, 0]


def summed_cross_entropy(
    states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy summed over positions, in float32.

    Args:
        states: positions × width, before the output embedding.
        weight: The output embedding, vocabulary × width, frozen.
        labels: positions, the right token of each.
        softcap: The bound of the logits, if the architecture has one.
        bias: vocabulary, frozen, where the output embedding has one.

    Returns:
        A scalar that can be differentiated with respect to `states`.
    """
    return cross_entropies(states, weight, labels, softcap, bias).sum()


def cross_entropies(
    states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `summed_cross_entropy`, of every position its own (positions)."""
    return _ChunkedCrossEntropy.apply(states, weight, labels, softcap, bias)  # pyright: ignore[reportReturnType]


def by_sequence(losses: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The losses of positions summed by sequence.

    Args:
        losses: Positions, those of a sequence in a row.
        counts: How many are every sequence's.
    """
    return torch.stack([part.sum() for part in losses.split(list(counts))])
