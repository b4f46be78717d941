"""What a training reads and in which order: token sequences, batches, their parts, the positions that take a loss.

All of it is a function of the data, the configuration and a seed.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lingraft import packing
from lingraft.config import TrainingConfig
from lingraft.errors import DataError
from lingraft.tasks.items import Example

if TYPE_CHECKING:
    from lingraft.backbones import Backbone


@dataclass(frozen=True)
class Counterpart:
    """What is read of an item's counterpart in the source language: never its answer.

    Attributes:
        ids: Token ids, the special tokens of the architecture among them.
        types: The segment every token belongs to, for encoders that know segments.
        text: The text, for a translation encoder, which has ids of its own.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class TokenSequence:
    """Token ids, from which position on the loss is taken (the first predicted position), and whether some were cut out."""

    ids: tuple[int, ...]
    start: int
    truncated: bool = False
    source: Counterpart | None = None


def cut(
    backbone: "Backbone", text: str, ids: list[int], excess: int, cuttable: Sequence[tuple[int, int]], item: str
) -> list[int]:
    """A text's ids less so many of them: from the end of the parts that may be cut, or from the text's beginning.

    Args:
        backbone: Its tokenizer made the ids.
        text: The text.
        ids: Its ids, without special tokens.
        excess: How many are too many; none are cut where it is not above 0.
        cuttable: The parts' first and last characters (exclusive), the longest of which loses a token at a time; none: the whole
            text, whose beginning goes.
        item: The item's name, for the message.

    Raises:
        DataError: The rest of the text, without the parts that may be cut, is still too long.
    """
    if excess <= 0:
        return ids
    if not cuttable:
        return ids[excess:]
    offsets: list[tuple[int, int]] = backbone.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]  # pyright: ignore[reportAssignmentType]
    inside = [[n for n, (a, b) in enumerate(offsets) if first <= a < b <= last] for first, last in cuttable]
    whole = sum(map(len, inside))
    if whole < excess:
        raise DataError(
            f"item {item} is too long for the model even without its context ({len(ids) - whole} tokens)",
            remedy="raise max_length (training.max_length) or leave the item out",
        )
    gone = {max(inside, key=len).pop() for _ in range(excess)}
    return [token for n, token in enumerate(ids) if n not in gone]


def answer_sequences(backbone: "Backbone", examples: Sequence[Example], max_length: int) -> list[TokenSequence]:
    """Prompt and right answer as ids; the loss is on the answer and the end of text only.

    A prompt that is too long loses some of its context, or its beginning; never the answer.

    Raises:
        DataError: There is no example, or one is too long without its context.
    """
    if not examples:
        raise DataError(
            "there is nothing to train on", remedy="look at the data: every row was left out, or the text is empty"
        )
    end = [backbone.tokenizer.eos_token_id] if backbone.tokenizer.eos_token_id is not None else []
    found = []
    for example in examples:
        prompt, ids = backbone.encode(example.prompt), backbone.encode(example.prompt + example.completion)
        # Where a token crosses the boundary, the loss starts with that token.
        shared = shared_start([prompt, ids])
        excess = len(backbone.prefix) + len(ids) + len(end) - max_length
        text = example.prompt + example.completion
        kept = [*backbone.prefix, *cut(backbone, text, ids, excess, example.cuttables, example.id), *end]
        start = max(1, len(backbone.prefix) + shared - max(0, excess))
        found.append(TokenSequence(tuple(kept), start, excess > 0, counterpart(backbone, example, max_length)))
    return found


def counterpart(backbone: "Backbone", example: Example, max_length: int) -> Counterpart | None:
    """What a decoder reads of an item's counterpart: its prompt, which loses its context's end or its beginning if too long.

    Raises:
        DataError: It is too long even without its context.
    """
    source = example.source
    if source is None:
        return None
    ids = backbone.encode(source.prompt)
    excess = len(backbone.prefix) + len(ids) - max_length
    kept = cut(backbone, source.prompt, ids, excess, source.cuttables, f"{source.id} (source)")
    return Counterpart((*backbone.prefix, *kept), text=source.prompt)


def shared_start(rows: Sequence[Sequence[int]]) -> int:
    """How many ids all rows begin with alike."""
    shortest = min(len(row) for row in rows)
    return next((n for n in range(shortest) if len({row[n] for row in rows}) > 1), shortest)


def encoder_inputs(
    backbone: "Backbone", rows: Sequence[tuple[Sequence[int], Sequence[int]]], width: int = 0
) -> dict[str, Any]:
    """What an encoder takes for rows of ids and segments: padded on the right, at least to a width, with their mask."""
    import torch

    width = max(width, *(len(ids) for ids, _ in rows))
    made = torch.full((len(rows), width), backbone.pad_id, dtype=torch.long)
    segments, mask = torch.zeros_like(made), torch.zeros_like(made)
    for number, (ids, types) in enumerate(rows):
        made[number, : len(ids)] = torch.tensor(ids)
        segments[number, : len(types)] = torch.tensor(types, dtype=torch.long)
        mask[number, : len(ids)] = 1
    given = {"input_ids": made.to(backbone.device), "attention_mask": mask.to(backbone.device)}
    model: Any = backbone.model
    segmented = backbone.kind == "encoder" and (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    if segmented and "token_type_ids" in inspect.signature(model.base_model.forward).parameters:
        given["token_type_ids"] = segments.to(backbone.device)
    return given


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


_PASS = 128
"""Tokens of padding that cost no more than one more pass through the model, whose operations take time however small they are:
some 80 to 100 on one thread, for an encoder of 12 layers as for a decoder of 18."""


def micro_batches(lengths: Sequence[int], part_tokens: int = 4096, *, packed: bool = False) -> list[list[int]]:
    """Splits a batch into parts of near-equal length, longest first, so that little is padding.

    The gradients of the parts add up to the batch's: the split changes speed, not what is learned.

    Args:
        lengths: Tokens of every sequence.
        part_tokens: Padded tokens of a part, at most, unless it is one sequence: activations take memory by the token.
        packed: Several sequences share a row, so that their lengths need not be alike.
    """
    if packed:
        return packing.parts(lengths, part_tokens)
    parts: list[list[int]] = []
    ordered = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for number, index in enumerate(ordered):
        widest = lengths[parts[-1][0]] if parts else 0
        fits = parts and widest * (len(parts[-1]) + 1) <= part_tokens
        alike = lengths[index] > 0.75 * widest or (widest - lengths[index]) * (len(ordered) - number) <= _PASS
        # A part below some 256 tokens wastes more in small matrix products than padding would.
        if fits and (alike or widest * len(parts[-1]) < 256):
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


@dataclass(frozen=True)
class Pass:
    """Texts that go through a model at once.

    Attributes:
        places: Their places in the batch.
        counts: Whether their loss counts; else the pass is there so that all processes make equally many.
    """

    places: tuple[int, ...]
    counts: bool = True


def passes(
    lengths: Sequence[int], part_tokens: int, *, packed: bool = False, world: int = 1, level: bool = False
) -> list[list[Pass]]:
    """By process, the parts of a batch: every text is in one of them.

    Args:
        lengths: Tokens of every text.
        part_tokens: As for `micro_batches`.
        packed: As for `micro_batches`.
        world: The processes; each gets about as many tokens as the others.
        level: Whether all must make equally many passes, because they work together within each.
    """
    mine: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for place in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)) if world > 1 else range(len(lengths)):
        least = loads.index(min(loads))
        mine[least].append(place)
        loads[least] += lengths[place]
    found: list[list[Pass]] = []
    for own in mine:
        parts = micro_batches([lengths[n] for n in own], part_tokens, packed=packed)
        found.append([Pass(tuple(own[n] for n in part)) for part in parts])
    most = max(map(len, found))
    for own in found if level else ():
        while len(own) < most:
            longest = max(own, key=lambda one: len(one.places), default=Pass(()))
            half = len(longest.places) // 2
            if half:
                at = own.index(longest)
                own[at : at + 1] = [Pass(longest.places[:half]), Pass(longest.places[half:])]
            else:
                own.append(Pass((0,), counts=False))
    return found


def fewer_tokens(lengths: Sequence[int], part_tokens: int, *, packed: bool = False, world: int = 1) -> int | None:
    """Half as many tokens a part, or of that the half again, until the parts of a batch are smaller; None: each is one text.

    Args:
        lengths: As for `passes`, like the others.
        part_tokens: What did not fit.
        packed: As above.
        world: As above.
    """
    before = passes(lengths, part_tokens, packed=packed, world=world)
    if all(len(one.places) == 1 for own in before for one in own):
        return None
    while part_tokens > 1:
        part_tokens //= 2
        if passes(lengths, part_tokens, packed=packed, world=world) != before:
            return part_tokens
    return None


def loss_positions(chosen: Sequence[TokenSequence], share: float, seed: int) -> list[np.ndarray[Any, Any]]:
    """For every sequence, the positions whose *next* token takes a loss: all from its start on, or a drawn share of them."""
    found = [np.arange(s.start - 1, len(s.ids) - 1) for s in chosen]
    if share >= 1:
        return found
    rng = np.random.default_rng(seed)
    drawn = [where[rng.random(len(where)) < share] for where in found]
    # At least one position, or a batch of short sequences would have no loss at all.
    return drawn if any(len(where) for where in drawn) else found
