"""What a backbone learns from: items and running text as the sequences of its architecture."""

from collections.abc import Iterable, Sequence
from typing import Any

from lingraft import batching, encoding, transduction
from lingraft.backbones import Backbone
from lingraft.config import ReferenceConfig, TrainingConfig
from lingraft.errors import ConfigError
from lingraft.heads import Head
from lingraft.serving import LEARNS
from lingraft.tasks.items import Example
from lingraft.tasks.reference import segments


def of_items(
    backbone: Backbone, items: Sequence[Example], values: TrainingConfig, head: Head | None
) -> tuple[list[Any], dict[str, Any]]:
    """Items with their right answers.

    Args:
        backbone: The base model.
        items: The items.
        values: Their greatest lengths.
        head: What an encoder answers with.

    Returns:
        The sequences, and how many were `truncated` and which `left_out`, where any were.

    Raises:
        DataError: There is no item, or one is too long for the model even without its context.
    """
    if backbone.kind == "decoder":
        sequences = batching.answer_sequences(backbone, items, values.max_length)
        truncated = sum(s.truncated for s in sequences)
        return sequences, {"truncated": truncated} if truncated else {}
    if backbone.kind == "encoder":
        if head is None:
            raise ConfigError("an encoder needs a head to learn a task", remedy="give the task's head")
        made = encoding.labelled_sequences(backbone, items, head, values.max_length)
    else:
        made = transduction.answer_sequences(backbone, items, values.max_length, values.max_output)
    counts = {"truncated": made.truncated, "left_out": list(made.left_out)}
    return made.sequences, {name: count for name, count in counts.items() if count}


def untrained(backbone: Backbone) -> list[Any]:
    """One sequence that nobody reads, for an adapter that stays as it starts."""
    if backbone.kind == "decoder":
        return [batching.TokenSequence((0, 0), 1)]
    if backbone.kind == "encoder":
        return [encoding.MaskedSequence((0, 0))]
    return [transduction.PairSequence((0,), (0,))]


def of_text(backbone: Backbone, lines: Iterable[str], config: ReferenceConfig) -> list[Any]:
    """Running text, for the reference task that is asked for.

    Raises:
        ConfigError: The backbone does not learn this task.
        DataError: The text is too short.
    """
    if config.task not in LEARNS[backbone.kind]:
        raise ConfigError(
            f"the reference task '{config.task}' is not one that this backbone ({backbone.kind}) learns",
            remedy=f"use {' or '.join(LEARNS[backbone.kind])}, or a task with labels",
        )
    pieces = segments(lines, backbone.encode, config, backbone.prefix)
    if config.task == "clm":
        return batching.text_sequences(pieces)
    if config.task == "mlm":
        return encoding.masked_sequences(backbone, pieces)
    if config.task == "prefix-lm":
        return transduction.prefix_lm_sequences(backbone, pieces)
    return transduction.span_corruption_sequences(backbone, pieces)
