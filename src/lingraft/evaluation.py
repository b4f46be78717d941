"""Evaluation: what does a model, with or without an adapter, say to items? By label likelihood, or by what it writes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lingraft import encoding, generation, likelihood, transduction
from lingraft.backbones import Backbone
from lingraft.errors import DataError, UserError
from lingraft.fusion.attaching import with_adapter
from lingraft.metrics import Generated, Prediction
from lingraft.predictions import score, write_evaluation
from lingraft.stacks import Adapters, load_stack
from lingraft.tasks.items import Example

Progress = Callable[[int, int], None]
_READ = 2048
"""Padded tokens in a batch of texts that are only read."""


@dataclass(frozen=True)
class Asking:
    """How items are asked.

    Attributes:
        scoring: `first_token`, `sequence`, or `auto`, which takes the first where it is unambiguous: candidates are compared by
            likelihood. `generation`: the model writes. `gold`: only the right answer's likelihood is asked for.
        normalised: Compare candidates by the mean over their tokens, not by the sum (`sequence`).
        max_length: Tokens of prompt and candidate, or of the prompt where the model writes; a longer prompt loses some of its
            context, or its beginning.
        new_tokens: For `generation`, at most so many tokens.
        stop: For `generation`, strings at which a text ends.
        batch_tokens: Padded tokens in a batch; changes speed only. None: 2,048 where texts are read, as many as keep the cache
            within 4 GiB where they are written.
    """

    scoring: str = "auto"
    normalised: bool = False
    max_length: int = 1024
    new_tokens: int = 16
    stop: tuple[str, ...] = ("\n",)
    batch_tokens: int | None = None


def predict(
    backbone: Backbone,
    adapter: Adapters,
    examples: Sequence[Example],
    *,
    scoring: str = "auto",
    max_length: int = 1024,
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> list[Prediction]:
    """Scores every candidate of every example.

    Args:
        backbone: The base model.
        adapter: The adapter to put on it, a stack of them, the lowest first, or None.
        examples: The items.
        scoring: As `Asking.scoring`: `first_token`, `sequence` or `auto`.
        max_length: As `Asking.max_length`.
        batch_tokens: As `Asking.batch_tokens`.
        progress: Called with the rows done and the rows in all.

    Returns:
        Predictions in the order of the examples. In `first_token` a candidate's score is the log-likelihood of its first token
        that differs, in `sequence` of all its tokens from there on.

    Raises:
        UserError: `first_token` was asked for and cannot tell the candidates apart, or the items have no candidates.
        DataError: There is no example.
    """
    asking = Asking(scoring=scoring, max_length=max_length, batch_tokens=batch_tokens)
    found = ask(backbone, adapter, examples, asking, progress)
    if any(isinstance(said, Generated) for said in found):
        raise UserError("these items have no candidates to score", remedy="use evaluation.ask")
    return found  # pyright: ignore[reportReturnType]


def ask(
    backbone: Backbone,
    adapter: Adapters,
    examples: Sequence[Example],
    asking: Asking | None = None,
    progress: Progress | None = None,
) -> list[Prediction] | list[Generated]:
    """What a model says to items.

    Args:
        backbone: The base model.
        adapter: The adapter to put on it, a stack of them, the lowest first, or None.
        examples: The items.
        asking: How they are asked.
        progress: Called with the items or rows done and their number in all.

    Returns:
        In the order of the examples: `Prediction` where candidates were scored, else `Generated`. For free text the likelihood of
        the right answer, the mean of its tokens after the prompt, is there too.

    Raises:
        UserError: What is asked for cannot tell the candidates apart.
        DataError: There is no example, or one is too long for the model even without its context.
    """
    asking = asking or Asking()
    if not examples:
        raise DataError("there is nothing to evaluate")
    choice = bool(examples[0].candidates)
    length, tokens = asking.max_length, asking.batch_tokens or _READ
    if backbone.kind == "encoder":
        answers = encoding.predict_choice if choice else encoding.predict_span
        return answers(backbone, adapter, examples, max_length=length, batch_tokens=tokens, progress=progress)
    if backbone.kind == "encoder-decoder":
        return _transduced(backbone, adapter, examples, asking, choice, progress)
    with with_adapter(backbone, adapter), torch.inference_mode():
        if choice and asking.scoring not in ("generation", "gold"):
            return likelihood.label_likelihoods(
                backbone,
                examples,
                scoring=asking.scoring,
                normalised=asking.normalised,
                max_length=asking.max_length,
                batch_tokens=tokens,
                progress=progress,
            )
        return _generated(backbone, examples, asking, choice, progress)


def _transduced(
    backbone: Backbone,
    adapter: Adapters,
    examples: Sequence[Example],
    asking: Asking,
    choice: bool,
    progress: Progress | None,
) -> list[Prediction] | list[Generated]:
    length, tokens = asking.max_length, asking.batch_tokens or _READ
    if choice and asking.scoring not in ("generation", "gold"):
        return transduction.predict_choice(
            backbone,
            adapter,
            examples,
            normalised=asking.normalised,
            max_input=length,
            batch_tokens=tokens,
            progress=progress,
        )
    return transduction.generate(
        backbone,
        adapter,
        examples,
        max_input=length,
        max_output=asking.new_tokens or 1,
        batch_tokens=tokens,
        write=asking.scoring != "gold",
        progress=progress,
    )


def _generated(
    backbone: Backbone, examples: Sequence[Example], asking: Asking, choice: bool, progress: Progress | None
) -> list[Generated]:
    length, tokens = asking.max_length, asking.batch_tokens or _READ
    gold: list[tuple[float, bool]] | None = None
    if not choice or asking.scoring == "gold":
        # An answer in other words than the prompt's labels has no likelihood: a choice task that is written has none.
        gold = likelihood.gold_likelihoods(
            backbone,
            examples,
            max_length=length,
            batch_tokens=tokens,
            progress=progress if asking.scoring == "gold" else None,
        )
    texts: Sequence[tuple[str | None, bool]] = [(None, False)] * len(examples)
    if asking.scoring != "gold":
        texts = generation.written(
            backbone,
            examples,
            new_tokens=asking.new_tokens,
            stop=asking.stop,
            max_length=length,
            batch_tokens=asking.batch_tokens,
            progress=progress,
        )
    return [
        Generated(
            e.id,
            e.prompt,
            text,
            right(e),
            None if gold is None else gold[n][0],
            truncated or (gold is not None and gold[n][1]),
        )
        for n, (e, (text, truncated)) in enumerate(zip(examples, texts, strict=True))
    ]


def right(example: Example) -> tuple[str, ...]:
    """What is right: all right answers, or for a choice the right candidate."""
    return example.references or (example.completion.strip(),)


def text_log_likelihood(
    backbone: Backbone, adapter: Adapters, texts: Sequence[str], *, max_length: int = 1024, batch: int = 32
) -> tuple[float, int]:
    """How likely a model, with or without an adapter, finds texts; see `likelihood.text_log_likelihood`."""
    with with_adapter(backbone, adapter), torch.inference_mode():
        return likelihood.text_log_likelihood(backbone, texts, max_length=max_length, batch=batch)


def evaluate(
    backbone: Backbone,
    adapter: Adapters | str | Path,
    examples: Sequence[Example],
    folder: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Predicts and scores a choice task; with a folder, writes `predictions.jsonl` and `scores.json` there.

    Args:
        backbone: The base model.
        adapter: An adapter, a stack, the folder of either, or None for the base alone.
        examples: The items.
        folder: Where to write; must exist.
        **options: As for `predict`.

    Returns:
        The scores; see `score`.
    """
    loaded = load_stack([adapter]) if isinstance(adapter, str | Path) else adapter
    predictions = predict(backbone, loaded, examples, **options)
    if folder is None:
        return score(predictions)
    return write_evaluation(folder, predictions, [c.strip() for c in examples[0].candidates])
