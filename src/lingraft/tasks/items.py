"""What a model is asked, item by item: one value for choice, extraction, numbers and summaries, for every architecture."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lingraft.digests import digest_value


@dataclass(frozen=True)
class Example:
    """One item as a model sees it.

    A generative model reads `prompt` and is asked for one of the `candidates`, or, where there are none, for free text. An
    encoder reads `parts`, and with `options` one option after the other behind them.

    Attributes:
        id: The item's name; translations of one item share it.
        prompt: The text before the answer.
        candidates: The answers to choose from, each to be appended to the prompt as it is; empty: the answer is free text.
        gold: The index of the right candidate; for free text it means nothing.
        answer: For free text, what a model learns to write after the prompt, to be appended as it is.
        references: For free text, all right answers; the best match counts.
        cuttable: The first and the last character (exclusive) of the part of `prompt` that may lose its end where the prompt is
            too long for the model: the context, never the question. None: the prompt loses its beginning.
        cuttable_before: The same of a counterpart's context, where both texts are one prompt.
        parts: What an encoder reads: one text, or two.
        options: For multiple choice by an encoder, the text of every option, in the order of `candidates`.
        span: For extraction by an encoder, the first and the last character (exclusive) of the answer in the last of `parts`.
        source: The same item in the source language, without its answer (`asked`): what FLARE fuses with.
    """

    id: str
    prompt: str
    candidates: tuple[str, ...] = ()
    gold: int = 0
    answer: str = ""
    references: tuple[str, ...] = ()
    cuttable: tuple[int, int] | None = None
    cuttable_before: tuple[int, int] | None = None
    parts: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    span: tuple[int, int] | None = None
    source: "Example | None" = None

    @property
    def cuttables(self) -> tuple[tuple[int, int], ...]:
        """The parts of the prompt that may lose their end."""
        return tuple(span for span in (self.cuttable_before, self.cuttable) if span is not None)

    @property
    def asked(self) -> "Example":
        """The item without its answer: nothing of a label can come from it."""
        return replace(self, candidates=(), gold=0, answer="", references=(), span=None, source=None)

    @property
    def completion(self) -> str:
        """The right text after the prompt: what training teaches."""
        return self.candidates[self.gold] if self.candidates else self.answer


def sampled(ids: Iterable[str], limit: int | None) -> set[str]:
    """The ids whose hashes are smallest, at most so many: a smaller sample is part of a larger one."""
    return set(sorted(ids, key=lambda name: digest_value(name))[:limit])


def subset(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """A sample that is the same in every language: see `sampled`; in the items' own order."""
    if limit is None or limit >= len(examples):
        return list(examples)
    chosen = sampled((e.id for e in examples), limit)
    return [e for e in examples if e.id in chosen]
