"""What a training reads and in which order: token sequences, batches, their parts, the positions that take a loss.

All of it is a function of the data, the configuration and a seed.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lingraft.config import TrainingConfig
from lingraft.errors import DataError
from lingraft.tasks.items import Example

if TYPE_CHECKING:
    from lingraft.backbones import Backbone


@dataclass(frozen=True)
class TokenSequence:
    """Token ids, and from which position on the loss is taken (the first predicted position)."""

    ids: tuple[int, ...]
    start: int


def answer_sequences(backbone: "Backbone", examples: Sequence[Example], max_length: int) -> list[TokenSequence]:
    """Prompt and gold answer as ids; the loss is on the answer and the end of text only.

    A prompt that is too long loses its beginning, never the answer.

    Raises:
        DataError: There is no example.
    """
    if not examples:
        raise DataError("there is nothing to train on")
    prompts = [backbone.encode(e.prompt) for e in examples]
    whole = [backbone.encode(e.prompt + e.candidates[e.gold]) for e in examples]
    end = [backbone.tokenizer.eos_token_id] if backbone.tokenizer.eos_token_id is not None else []
    found = []
    for prompt, ids in zip(prompts, whole, strict=True):
        # Where a token crosses the boundary, the loss starts with that token.
        shared = next(
            (i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b),
            min(len(prompt), len(ids)),
        )
        ids = [*ids, *end]
        cut = max(0, len(backbone.prefix) + len(ids) - max_length)
        ids = [*backbone.prefix, *ids[cut:]]
        found.append(TokenSequence(tuple(ids), max(1, len(backbone.prefix) + shared - cut)))
    return found


def text_sequences(segments: Sequence[Sequence[int]]) -> list[TokenSequence]:
    """Language modelling: the loss is on every position but the first.

    Raises:
        DataError: There is no segment.
    """
    if not any(len(ids) > 1 for ids in segments):
        raise DataError(
            "the reference text is too short for one segment",
            remedy="give more text, or a smaller segment_tokens",
        )
    return [TokenSequence(tuple(ids), 1) for ids in segments]


def derived_seed(*parts: object) -> int:
    """A seed that is a function of its parts."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 1


def batches(lengths: Sequence[int], config: TrainingConfig, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, as indices.

    With `group_by_length` a batch holds examples of similar length, which saves padding; without, the order depends on
    the seed and the number of examples alone, so that parallel texts are read in the same order in two languages.
    """
    order = np.random.default_rng(derived_seed("order", seed, epoch)).permutation(len(lengths)).tolist()
    size = config.batch_size
    if config.group_by_length:
        pool = size * 8
        pools = [sorted(order[i : i + pool], key=lambda n: lengths[n]) for i in range(0, len(order), pool)]
        order_of_batches = [p[i : i + size] for p in pools for i in range(0, len(p), size)]
        shuffled = np.random.default_rng(derived_seed("batches", seed, epoch)).permutation(len(order_of_batches))
        return [order_of_batches[i] for i in shuffled]
    return [order[i : i + size] for i in range(0, len(order), size)]


def steps_of(count: int, config: TrainingConfig) -> int:
    """The number of optimiser steps for so many examples; part of an epoch is rounded up."""
    return math.ceil(config.epochs * math.ceil(count / config.batch_size))


def micro_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Splits a batch into parts of near-equal length, longest first, so that little is padding.

    The gradients of the parts add up to the batch's: the split changes speed, not what is learned.
    """
    parts: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        widest = lengths[parts[-1][0]] if parts else 0
        # A part below some 256 tokens wastes more in small matrix products than padding would.
        if parts and (lengths[index] > 0.75 * widest or widest * len(parts[-1]) < 256):
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def loss_positions(chosen: Sequence[TokenSequence], share: float, seed: int) -> list[np.ndarray[Any, Any]]:
    """For every sequence, the positions whose *next* token takes a loss: all from its start on, or a drawn share of them."""
    found = [np.arange(s.start - 1, len(s.ids) - 1) for s in chosen]
    if share >= 1:
        return found
    rng = np.random.default_rng(seed)
    drawn = [where[rng.random(len(where)) < share] for where in found]
    # At least one position, or a batch of short sequences would have no loss at all.
    return drawn if any(len(where) for where in drawn) else found
