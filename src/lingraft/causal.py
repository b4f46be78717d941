"""What a decoder learns from: the next token, at every position or at some of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lingraft.backbones import Backbone
from lingraft.batching import TokenSequence, derived_seed, loss_positions
from lingraft.fusion.attaching import fusing
from lingraft.losses import Drawn, Objective, by_sequence, cross_entropies
from lingraft.packing import Place, packed
from lingraft.rows import Segment
from lingraft.speeding import FLASH


def _next_tokens(backbone: Backbone, chosen: Sequence[TokenSequence], share: float, seed: int) -> list[Drawn]:
    """With every sequence the positions whose next token takes a loss."""
    positions = loss_positions(chosen, share, seed)
    return [
        Drawn((s, where), len(where), len(s.ids), derived_seed("dropout", seed, number))
        for number, (s, where) in enumerate(zip(chosen, positions, strict=True))
    ]


def _places(backbone: Backbone, lengths: Sequence[int]) -> list[Place]:
    """Where texts stand: each in a row of its own, or packed."""
    if not backbone.packs:
        return [Place(row, 0) for row in range(len(lengths))]
    # Attention with a mask costs by the square of a row; flash attention tells packed texts apart in a single row.
    return packed(lengths, sum(lengths) if backbone.speed.attention == FLASH else 0)


def _summed_next_tokens(backbone: Backbone, model: Any, part: Sequence[Drawn]) -> torch.Tensor:
    """Every text's cross-entropy over the positions given; padding stands on the right, where a causal model does not look."""
    chosen, positions = [d.item[0] for d in part], [d.item[1] for d in part]
    lengths = [len(s.ids) for s in chosen]
    places = _places(backbone, lengths)
    height = 1 + max(place.row for place in places)
    width = max(place.start + length for place, length in zip(places, lengths, strict=True))
    ids = torch.full((height, width), backbone.pad_id, dtype=torch.long)
    # What no text fills counts on from where the last one began anew: a text of its own, which nobody reads.
    used, counted = torch.zeros_like(ids), torch.arange(width).repeat(height, 1)
    for place, length, sequence in sorted(zip(places, lengths, chosen, strict=True), key=lambda one: one[0].start):
        here = slice(place.start, place.start + length)
        ids[place.row, here] = torch.tensor(sequence.ids)
        used[place.row, here] = 1
        counted[place.row, place.start :] = torch.arange(width - place.start)
    ids = ids.to(backbone.device)
    answers = [len(s.ids) - s.start for s in chosen]
    beside = fusing(backbone, [s.source for s in chosen], [s.start for s in chosen], written=answers)
    given: dict[str, torch.Tensor] = {}
    if backbone.packs:
        given = {"position_ids": counted.to(backbone.device)}
    elif not backbone.causal:
        given = {"attention_mask": used.to(backbone.device)}
    with backbone.autocast(), beside:
        # They stay until the next forward pass: a backward pass may compute layers again.
        backbone.rows.segments = tuple(
            Segment(place.row, place.start, length, drawn.seed)
            for place, length, drawn in zip(places, lengths, part, strict=True)
        )
        states = backbone.hidden(ids, **given)
    rows = torch.from_numpy(np.repeat([p.row for p in places], [len(p) for p in positions])).to(backbone.device)
    columns = np.concatenate([p.start + where for p, where in zip(places, positions, strict=True)])
    columns = torch.from_numpy(columns).to(backbone.device)
    weight = backbone.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    losses = cross_entropies(states[rows, columns], weight, ids[rows, columns + 1], backbone.softcap)
    return by_sequence(losses, [len(p) for p in positions])


NEXT_TOKENS = Objective(_next_tokens, _summed_next_tokens)
"""A decoder's objective."""
