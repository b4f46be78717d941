"""Source states of a training's counterparts, written to disk before the training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lingraft.adapter import Adapter
from lingraft.backbones import Backbone
from lingraft.batching import Counterpart, TokenSequence
from lingraft.config import FusionConfig
from lingraft.fusion.attaching import fused_modules, name_of
from lingraft.fusion.cache import Request, size_of, write_states
from lingraft.fusion.sources import Point, align, evaluating, points, states_of

_BATCH = 4096
"""Padded tokens that are read at once."""


def requests_of(sequences: Sequence[Any], fusion: FusionConfig) -> list[Request]:
    """Which texts' states a training asks for, and for how many columns.

    Args:
        sequences: What it learns from, of any architecture.
        fusion: How it fuses.
    """
    found: list[Request] = []
    for sequence in sequences:
        for source, prompt in _read(sequence):
            if source is not None:
                columns = align([len(source.ids)], [prompt], mask_padding=fusion.mask_padding)
                found.append(Request(source.ids, source.types, columns.needed[0]))
    return found


def _read(sequence: Any) -> list[tuple[Counterpart | None, int]]:
    """The counterparts of a sequence's rows, and how many tokens of each row are mixed."""
    if isinstance(sequence, TokenSequence):
        return [(sequence.source, sequence.start)]
    if hasattr(sequence, "rows"):
        return [(row.source, len(row.ids)) for row in sequence.rows]
    return [(sequence.counterpart, len(sequence.source))]


def states_size(backbone: Backbone, sequences: Sequence[Any], fusion: FusionConfig) -> int:
    """Bytes that the source states of a training take; the base model alone tells, before there is a first stage."""
    with evaluating(backbone.model):
        places, width = places_of(backbone, fusion)
    return size_of(requests_of(sequences, fusion), len(set(places.values())), width)


def places_of(backbone: Backbone, fusion: FusionConfig) -> tuple[dict[str, Point], int]:
    """Where every fused layer has its source states from, and how wide these are."""
    modules = fused_modules(backbone, fusion)
    found = points(backbone, modules, offset=fusion.layer_offset, normalised=fusion.normalize_source)
    return found, int(backbone.model.get_submodule(modules[0]).in_features)  # pyright: ignore[reportArgumentType]


def store_states(
    backbone: Backbone,
    first: Adapter,
    sequences: Sequence[Any],
    folder: Path,
    *,
    fusion: FusionConfig,
    digest: str,
    limit_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Reads every counterpart once with the first stage's model and writes its states.

    Args:
        backbone: The base model.
        first: The first stage.
        sequences: What the second stage learns from.
        folder: Where to write; it exists.
        fusion: Which layers fuse, and which states they read.
        digest: What the states belong to.
        limit_bytes: The most they may take.
        progress: Told after every batch.

    Returns:
        Their size in bytes.

    Raises:
        UserError: They take more than the limit.
        StoreError: The disk has no room for them.
    """
    wanted = requests_of(sequences, fusion)
    with backbone.merged(first), evaluating(backbone.model):
        found, width = places_of(backbone, fusion)
        places = list(dict.fromkeys(found.values()))

        def compute(batch: Sequence[Request]) -> Sequence[Sequence[torch.Tensor]]:
            rows = [Counterpart(request.ids, request.types) for request in batch]
            states = states_of(backbone, places, rows, max(request.columns for request in batch))
            return [[states[place][row] for place in places] for row in range(len(batch))]

        write_states(
            folder,
            digest,
            wanted,
            compute,
            layers=[name_of(place) for place in places],
            width=width,
            limit_bytes=limit_bytes,
            batch_tokens=_BATCH,
            progress=progress,
        )
    return size_of(wanted, len(places), width)
