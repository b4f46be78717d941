"""Labels by projection: what the task's adapter says of the source side of parallel text is taken to hold for the other side.

Known as annotation projection (Yarowsky et al. 2001) and, with a model's labels, as translate-train by distillation. Nobody
labels anything in the target language, and the text need not be of the task's domain.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from lingraft.config import ProjectionConfig
from lingraft.digests import digest_value
from lingraft.errors import DataError
from lingraft.metrics import Prediction
from lingraft.tasks.items import Example
from lingraft.tasks.task import Task

Labels = list[tuple[int, int]]
"""(line, label) pairs, in the order of the lines."""


def shortened(
    lines: Sequence[str], encode: Callable[[str], list[int]], decode: Callable[[list[int]], str], tokens: int
) -> list[str]:
    """Lines cut to so many tokens at most; an incomplete character at a cut is left out."""
    found: list[str] = []
    for line in lines:
        ids = encode(line)
        found.append(line if len(ids) <= tokens else decode(ids[:tokens]).rstrip("�"))
    return found


def projected_labels(predictions: Sequence[Prediction], config: ProjectionConfig) -> Labels:
    """The lines that get a label, and which.

    Args:
        predictions: What T says of the lines; an item's name is its line's place.
        config: How sure T must be, and how many lines a label may have.

    Raises:
        DataError: No line gets a label.
    """
    by_label: dict[int, list[int]] = {}
    for said in predictions:
        # The chosen label's probability among the candidates: that of gold, were it gold.
        sure = math.exp(replace(said, gold=said.answer).gold_log_likelihood)
        if sure >= config.confidence:
            by_label.setdefault(said.answer, []).append(int(said.id))
    # Which of too many are kept is drawn by their places alone, so that it is the same whatever the text.
    kept = [
        (line, label)
        for label, lines in by_label.items()
        for line in sorted(lines, key=lambda n: digest_value(n))[: config.per_label]
    ]
    if not kept:
        raise DataError(
            f"T is sure of no line's label (confidence {config.confidence})", remedy="lower projection.confidence"
        )
    return sorted(kept)


def projected_examples(task: Task, texts: Sequence[str], labels: Labels) -> list[Example]:
    """The task's items from the other side of the parallel text; a line that is empty there is left out.

    Raises:
        DataError: The text has fewer lines than the labels are for.
    """
    if labels and labels[-1][0] >= len(texts):
        raise DataError(
            f"the text has {len(texts)} lines, and line {labels[-1][0] + 1} got a label: it is not parallel",
            remedy="give reference text whose lines are translations of one another",
        )
    items = task.of_text(texts)
    return [replace(items[line], gold=label) for line, label in labels if texts[line]]
