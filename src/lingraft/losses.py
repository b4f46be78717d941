"""Losses that project only the positions they need, and never hold positions × vocabulary at once.

A model's own loss projects every position through the output embedding: for 262,144 tokens of vocabulary that is most of
a training step and most of its memory. Here the frozen embedding is applied to chunks of positions, and the gradient
with respect to the states is made in the forward pass, while the chunk's logits are at hand.
"""

from typing import Any

import torch


def project(states: torch.Tensor, weight: torch.Tensor, softcap: float | None = None) -> torch.Tensor:
    """Logits in float32: `states @ weightᵀ`, bounded by the soft cap where there is one.

    Args:
        states: positions × width.
        weight: vocabulary × width.
        softcap: c of `c · tanh(x / c)`.
    """
    logits = torch.nn.functional.linear(states.to(weight.dtype), weight).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of positions against labels; the output embedding is frozen and gets no gradient."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        softcap: float | None,
        chunk: int,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        gradient = torch.empty_like(states) if states.requires_grad else None
        for start in range(0, states.shape[0], chunk):
            part = slice(start, start + chunk)
            gold = labels[part, None]
            logits = project(states[part], weight, softcap)
            norm = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += (norm - logits.gather(1, gold)).sum()
            if gradient is None:
                continue
            slope = None if softcap is None else 1 - (logits / softcap).square_()
            # In place: one block of positions × vocabulary in float32 is all that is ever held.
            probabilities = logits.sub_(norm).exp_()
            probabilities.scatter_add_(1, gold, torch.full_like(gold, -1, dtype=probabilities.dtype))
            if slope is not None:
                probabilities.mul_(slope)
            gradient[part] = (probabilities.to(weight.dtype) @ weight).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (
            (None if gradient is None else gradient * upstream[0].to(gradient.dtype)),
            None,
            None,
            None,
            None,
        )


def summed_cross_entropy(
    states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
    chunk: int = 128,
) -> torch.Tensor:
    """Cross-entropy summed over positions, exact, in float32.

    Args:
        states: positions × width, before the output embedding.
        weight: The output embedding, vocabulary × width, frozen.
        labels: positions, the right token of each.
        softcap: The bound of the logits, if the architecture has one.
        chunk: Positions held at a time; the memory is `chunk × vocabulary × 4` bytes and half again for bfloat16.

    Returns:
        A scalar that can be differentiated with respect to `states`.
    """
    return _ChunkedCrossEntropy.apply(states, weight, labels, softcap, chunk)  # pyright: ignore[reportReturnType]
