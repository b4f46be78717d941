"""What a decoder learns from: the next token, at every position or at some of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lingraft.backbones import Backbone
from lingraft.batching import TokenSequence, loss_positions
from lingraft.fusion.attaching import fusing
from lingraft.losses import Drawn, Objective, summed_cross_entropy


def _next_tokens(backbone: Backbone, chosen: Sequence[TokenSequence], share: float, seed: int) -> list[Drawn]:
    """With every sequence the positions whose next token takes a loss."""
    positions = loss_positions(chosen, share, seed)
    return [Drawn((s, where), len(where), len(s.ids)) for s, where in zip(chosen, positions, strict=True)]


def _summed_next_tokens(backbone: Backbone, model: Any, part: Sequence[Drawn]) -> torch.Tensor:
    """Summed cross-entropy over the positions given; padding stands on the right, where a causal model does not look."""
    chosen, positions = [d.item[0] for d in part], [d.item[1] for d in part]
    width = max(len(s.ids) for s in chosen)
    ids = torch.full((len(chosen), width), backbone.pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for row, sequence in enumerate(chosen):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        attention[row, : len(sequence.ids)] = 1
    ids = ids.to(backbone.device)
    answers = [len(s.ids) - s.start for s in chosen]
    beside = fusing(backbone, [s.source for s in chosen], [s.start for s in chosen], written=answers)
    with backbone.autocast(), beside:
        states = backbone.hidden(ids, attention.to(backbone.device))
    rows = torch.from_numpy(np.repeat(np.arange(len(chosen)), [len(p) for p in positions])).to(backbone.device)
    columns = torch.from_numpy(np.concatenate(positions)).to(backbone.device)
    weight = backbone.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    return summed_cross_entropy(states[rows, columns], weight, ids[rows, columns + 1], backbone.softcap)


NEXT_TOKENS = Objective(_next_tokens, _summed_next_tokens)
"""A decoder's objective."""
