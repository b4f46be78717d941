"""What X-Mixup learns from: both texts' right answers, and that both are read and answered alike (`fusion.xmixup`)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from lingraft.config import MixupConfig
from lingraft.fusion.xmixup import Read
from lingraft.heads import HeadKind


def _divergence(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """KL(source ‖ target) of the distributions that logits give over the last dimension."""
    ours, theirs = source.log_softmax(-1), target.log_softmax(-1)
    return (ours.exp() * (ours - theirs)).sum(-1)


def _squared(source: Read, target: Read, *, first: bool) -> torch.Tensor:
    """Mean squared difference of both texts' states, one a text: of their first token's, or of their mean."""
    pooled = []
    for read in (source, target):
        states, there = read.last.float(), read.there[..., None]
        pooled.append(states[:, 0] if first else (states * there).sum(1) / there.sum(1).clamp(min=1))
    return (pooled[0] - pooled[1]).square().mean(-1)


def labelled_loss(
    config: MixupConfig,
    source: Read,
    target: Read,
    task: Callable[[torch.Tensor], torch.Tensor],
    kind: HeadKind,
    counts: Sequence[int],
) -> torch.Tensor:
    """The loss of a headed encoder, summed over items.

    α · task(source) + (1 − α) · task(target) + a · MSE(states) + b · KL(source ‖ target), nothing of it detached. Where the
    answer stands in a source text is not known: of spans, task(target) + a · MSE(states). Without a source, task(target).

    Args:
        config: α, a and b: `source_loss`, `states` and `predictions`.
        source: The counterparts' rows; `value` holds logits as `encoding` makes them.
        target: The rows, mixed.
        task: From logits, the loss of every item against its right answer.
        kind: What the head is for.
        counts: The rows of every item.
    """
    rows, items = source.there.any(1), list(counts)
    distance = _squared(source, target, first=kind != "span") * rows
    loss = config.states * torch.stack([part.mean() for part in distance.split(items)]).sum()
    if kind == "span":
        return task(target.value).sum() + loss
    paired = torch.stack([part.all() for part in rows.split(items)])
    alpha = config.source_loss * paired
    loss = loss + (alpha * task(source.value) + (1 - alpha) * task(target.value)).sum()
    if kind == "multiple_choice":
        sides = zip(source.value.split(items), target.value.split(items), strict=True)
        divergence = torch.stack([_divergence(*side) for side in sides])
    else:
        divergence = _divergence(source.value, target.value)
    return loss + config.predictions * (paired * divergence).sum()


CHUNK = 64
"""Answer tokens whose distributions over the vocabulary are held at a time."""


def paired_loss(
    config: MixupConfig,
    source: Read,
    target: Read,
    task: Callable[[torch.Tensor], torch.Tensor],
    project: Callable[[torch.Tensor], torch.Tensor],
    terms: Sequence[int],
    *,
    alike: bool,
) -> torch.Tensor:
    """The loss of an encoder-decoder, summed over answer tokens: as `labelled_loss`, a text's MSE once for each of them.

    Args:
        config: The weights.
        source: The counterparts, one for every text; `value` holds the decoder's states before every answer token.
        target: The texts, mixed.
        task: The summed loss of such states (tokens × width).
        project: Their logits.
        terms: The answer tokens of every text.
        alike: Whether the answer to both texts is the same, as a label's name is; otherwise task(target) + a · MSE(states).
    """
    loss = (
        config.states * (_squared(source, target, first=False) * torch.tensor(terms, device=target.last.device)).sum()
    )
    if not alike:
        return task(target.value) + loss
    own = config.source_loss * task(source.value) + (1 - config.source_loss) * task(target.value)

    def part(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return _divergence(project(s), project(t)).sum()

    # Logits over a vocabulary are made again for the gradient instead of being held.
    pairs = zip(source.value.split(CHUNK), target.value.split(CHUNK), strict=True)
    kept: list[Any] = [checkpoint(part, s, t, use_reentrant=False, preserve_rng_state=False) for s, t in pairs]
    return own + loss + config.predictions * torch.stack(kept).sum()
