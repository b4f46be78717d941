"""Evaluation: what does a model, with or without an adapter, say to items? By label likelihood, or by what it writes."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lingraft import __version__, encoding, generation, likelihood, transduction
from lingraft.adapter import Adapter
from lingraft.backbones import Backbone, environment
from lingraft.digests import digest_value
from lingraft.divergence import Divergence
from lingraft.errors import DataError, UserError
from lingraft.fusion.attaching import with_adapter
from lingraft.journal import Journal
from lingraft.live import grafted, is_line
from lingraft.merging import Graft
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


class Questions:
    """Items and how they are asked of a base model, for several evaluations: what is read of them is made once, when needed.

    Args:
        backbone: The base model; its tokenizer is what counts.
        examples: The items.
        asking: How they are asked.

    Raises:
        DataError: There is no example.
    """

    def __init__(self, backbone: Backbone, examples: Sequence[Example], asking: Asking | None = None) -> None:
        if not examples:
            raise DataError(
                "there is nothing to evaluate",
                remedy="look at the data of this split: every row was left out, or there is none",
            )
        self.backbone, self.examples, self.asking = backbone, examples, asking or Asking()

    @property
    def choice(self) -> bool:
        """Whether the items have candidates."""
        return bool(self.examples[0].candidates)

    @cached_property
    def labels(self) -> list[list[likelihood.Query]]:
        """What a decoder reads to score candidates."""
        return likelihood.label_queries(self.backbone, self.examples, self.asking.scoring, self.asking.max_length)

    @cached_property
    def gold(self) -> list[list[likelihood.Query]]:
        """What a decoder reads to score right answers."""
        return likelihood.gold_queries(self.backbone, self.examples, self.asking.max_length)

    @cached_property
    def prompts(self) -> list[generation.Prompt]:
        """What a decoder reads before it writes."""
        asking = self.asking
        return generation.prompts_of(
            self.backbone, self.examples, new_tokens=asking.new_tokens, max_length=asking.max_length
        )

    def journal(self, path: Path, adapter: str) -> Journal:
        """A journal that an evaluation which was killed goes on from, given the same items, model and environment again.

        Args:
            path: Its file.
            adapter: A digest of what is on the model.
        """
        return Journal(path, digest_value([__version__, self._digest, adapter, environment(self.backbone)]))

    @cached_property
    def _digest(self) -> str:
        asked = [asdict(example) for example in self.examples]
        return digest_value([self.backbone.digest, asdict(self.asking), asked])


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
    examples: Sequence[Example] | Questions,
    asking: Asking | None = None,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> list[Prediction] | list[Generated]:
    """What a model says to items.

    Args:
        backbone: The base model.
        adapter: The adapter to put on it, a stack of them, the lowest first, or None.
        examples: The items, or `Questions` of them, which are asked as they say.
        asking: How they are asked.
        progress: Called with the items or rows done and their number in all.
        journal: Where finished batches are written as they come; what it holds is not computed again. See `Questions.journal`.
            Encoders, which are fast, take none.

    Returns:
        In the order of the examples: `Prediction` where candidates were scored, else `Generated`. For free text the likelihood of
        the right answer, the mean of its tokens after the prompt, is there too.

    Raises:
        UserError: What is asked for cannot tell the candidates apart.
        DataError: There is no example, or one is too long for the model even without its context.
    """
    questions = examples if isinstance(examples, Questions) else Questions(backbone, examples, asking)
    examples, asking, choice = questions.examples, questions.asking, questions.choice
    length, tokens = asking.max_length, asking.batch_tokens or _READ
    if backbone.kind == "encoder":
        answers = encoding.predict_choice if choice else encoding.predict_span
        return answers(backbone, adapter, examples, max_length=length, batch_tokens=tokens, progress=progress)
    if backbone.kind == "encoder-decoder":
        return _transduced(backbone, adapter, examples, asking, choice, progress, journal)
    with with_adapter(backbone, adapter), torch.inference_mode():
        if choice and asking.scoring not in ("generation", "gold"):
            return likelihood.label_likelihoods(
                backbone,
                examples,
                questions.labels,
                normalised=asking.normalised,
                batch_tokens=tokens,
                progress=progress,
                journal=journal,
            )
        return _generated(questions, progress, journal)


def grid(
    backbone: Backbone,
    task: Adapter,
    divergence: Divergence,
    graft: Graft,
    weights: Sequence[float],
    examples: Sequence[Example] | Questions,
    asking: Asking | None = None,
    progress: Progress | None = None,
) -> Generator[tuple[float, list[Prediction] | list[Generated]], None, None]:
    """What a merge says to items at every weight λ, on one loaded model.

    Where the merge is a line in λ, it is put on the model once and its weight changed in place.

    Args:
        backbone: The base model; it carries the merge from the first value that is taken to the last.
        task: The task's adapter.
        divergence: The two references.
        graft: How they are merged; its own weight is not looked at.
        weights: The weights, in the order in which they are wanted.
        examples: As for `ask`.
        asking: As for `ask`.
        progress: As for `ask`, for every weight from the beginning.

    Yields:
        A weight, and what `ask` gives for it.

    Raises:
        AdapterError: The adapters do not fit together, or not on this base.
        DataError: As `ask`.
        UserError: As `ask`.
    """
    questions = examples if isinstance(examples, Questions) else Questions(backbone, examples, asking)
    # An encoder answers by a head, which is its adapter's.
    if backbone.kind == "encoder" or not is_line(graft, task):
        for weight in weights:
            yield weight, ask(backbone, replace(graft, weight=weight).onto(task, divergence), questions, None, progress)
        return
    if not weights:
        return
    with grafted(backbone, task, divergence, replace(graft, weight=weights[0])) as live:
        for weight in weights:
            live.set_weight(weight)
            yield weight, ask(backbone, None, questions, None, progress)


def _transduced(
    backbone: Backbone,
    adapter: Adapters,
    examples: Sequence[Example],
    asking: Asking,
    choice: bool,
    progress: Progress | None,
    journal: Journal | None,
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
            journal=journal,
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
        journal=journal,
    )


def _generated(questions: Questions, progress: Progress | None, journal: Journal | None) -> list[Generated]:
    backbone, asking, examples = questions.backbone, questions.asking, questions.examples
    written = asking.scoring != "gold"
    gold: list[tuple[float, bool]] | None = None
    if not questions.choice or not written:
        # An answer in other words than the prompt's labels has no likelihood: a choice task that is written has none.
        gold = likelihood.gold_likelihoods(
            backbone,
            questions.gold,
            batch_tokens=asking.batch_tokens or _READ,
            progress=None if written else progress,
            journal=journal,
        )
    texts: Sequence[str | None] = [None] * len(examples)
    truncated = [False] * len(examples) if gold is None else [cut for _, cut in gold]
    if written:
        texts = generation.written(
            backbone,
            questions.prompts,
            new_tokens=asking.new_tokens,
            stop=asking.stop,
            batch_tokens=asking.batch_tokens,
            progress=progress,
            journal=journal,
        )
        truncated = [cut or prompt.truncated for cut, prompt in zip(truncated, questions.prompts, strict=True)]
    return [
        Generated(e.id, e.prompt, text, right(e), None if gold is None else gold[n][0], cut)
        for n, (e, text, cut) in enumerate(zip(examples, texts, truncated, strict=True))
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
