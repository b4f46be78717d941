"""Generation by a decoder: what does the model write after the prompt, taking the likeliest token each time?

A text that has ended leaves its batch, so the others' steps are smaller: what transformers' own `generate` computes until the
last text ends.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from lingraft import caching, processes
from lingraft.backbones import Backbone
from lingraft.batching import Counterpart, counterpart, cut
from lingraft.errors import UserError
from lingraft.fusion.attaching import fusing
from lingraft.journal import Journal
from lingraft.memory import by_halves
from lingraft.prefixes import attention_shape
from lingraft.tasks.items import Example

Progress = Callable[[int, int], None]
_TAIL = 24
"""Tokens of the end of a text that are looked at for a stop string: more than any stop string is long."""
_LEFT = 0.8
"""Texts that have ended leave their batch when no more than this share of it goes on: their keys are copied for that."""


@dataclass(frozen=True)
class Prompt:
    """What is read before a text is written.

    Attributes:
        ids: Token ids, the beginning of text among them.
        truncated: Whether some were cut out.
        source: What is read beside it of the item's counterpart.
    """

    ids: tuple[int, ...]
    truncated: bool
    source: Counterpart | None = None


class _Stop(StoppingCriteria):
    """Ends a row at the first of some strings; the rows of a batch end one by one."""

    def __init__(self, backbone: Backbone, start: int, strings: Sequence[str]) -> None:
        self.backbone, self.start, self.strings = backbone, start, strings

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        written = input_ids[:, max(self.start, input_ids.shape[1] - _TAIL) :]
        texts = self.backbone.tokenizer.batch_decode(written, skip_special_tokens=True)
        return torch.tensor([_stops(text, self.strings) for text in texts], device=input_ids.device)


def _stops(text: str, strings: Sequence[str]) -> bool:
    """Whether a text has come to one of some strings; white space before the text itself is none."""
    text = text.lstrip()
    return any(s in text for s in strings)


def ended(text: str, stop: Sequence[str]) -> str:
    """A text up to the first stop string; white space before the text itself is no stop."""
    text = text.lstrip()
    places = [place for place in (text.find(s) for s in stop) if place >= 0]
    return text[: min(places)] if places else text


def prompts_of(backbone: Backbone, examples: Sequence[Example], *, new_tokens: int, max_length: int) -> list[Prompt]:
    """What is read of every item, for `written`.

    Args:
        backbone: The base model.
        examples: The items.
        new_tokens: At most so many tokens will be written.
        max_length: Tokens of a prompt; a longer one loses some of its context, or its beginning. What is written comes on top, as
            far as the model has positions.

    Raises:
        UserError: The model has no positions left for a prompt.
        DataError: A prompt is too long even without its context.
    """
    prefix = backbone.prefix
    room = max_length if backbone.longest is None else min(max_length, backbone.longest - new_tokens)
    if room <= len(prefix):
        raise UserError(
            f"no room is left for a prompt: the model has {backbone.longest} positions, and {new_tokens} tokens are to be written",
            remedy="give a smaller evaluation.new_tokens",
        )
    found: list[Prompt] = []
    for example in examples:
        ids = backbone.encode(example.prompt)
        excess = len(prefix) + len(ids) - room
        kept = cut(backbone, example.prompt, ids, excess, example.cuttables, example.id)
        found.append(Prompt((*prefix, *kept), excess > 0, counterpart(backbone, example, room)))
    return found


def written(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    *,
    new_tokens: int,
    stop: Sequence[str],
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> list[str]:
    """What the model, with an adapter on it or without, writes after every prompt: greedy decoding.

    Args:
        backbone: The base model.
        prompts: What it reads.
        new_tokens: At most so many tokens are written.
        stop: Strings at which a text ends; they are not part of it.
        batch_tokens: Padded tokens of prompts and texts in a batch; changes speed only. None: as many as keep the keys and values
            within 4 GiB.
        progress: Called with the items done and the items in all.
        journal: Batches that it knows are not written again.
    """
    finished = 0

    def write(batch: Sequence[int]) -> dict[int, str]:
        rows, beside = [prompts[n].ids for n in batch], [prompts[n].source for n in batch]
        texts = _continued(backbone, rows, beside, new_tokens, stop)
        return {number: ended(text, stop) for number, text in zip(batch, texts, strict=True)}

    def after(batch: Sequence[int], made: Mapping[int, str]) -> None:
        nonlocal finished
        if journal is not None and made:
            journal.add("texts", made)
        finished += len(batch)
        if progress is not None:
            progress(finished, len(prompts))

    known: dict[int, str] = {} if journal is None else journal.known("texts")
    batches = _batched(prompts, new_tokens, batch_tokens or _affordable(backbone))
    found = processes.computed(batches, partial(by_halves, write), known, after)
    return [found[number] for number in range(len(prompts))]


def _affordable(backbone: Backbone) -> int:
    """Tokens whose keys and values take 4 GiB, and no more than 32,768: a step over many rows costs little more than over few."""
    layers, heads, width = attention_shape(backbone.model)
    size = 2 * layers * heads * width * backbone.dtype.itemsize
    return max(1, min(32_768, 2**32 // size))


def _batched(prompts: Sequence[Prompt], new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Numbers of prompts, those of similar length together, the longest first."""
    result: list[list[int]] = []
    for number in sorted(range(len(prompts)), key=lambda n: (-len(prompts[n].ids), n)):
        widest = len(prompts[result[-1][0]].ids) if result else 0
        if result and (len(result[-1]) + 1) * (widest + new_tokens) <= batch_tokens:
            result[-1].append(number)
        else:
            result.append([number])
    return result


@contextmanager
def _packed_head(backbone: Backbone) -> Iterator[None]:
    """Hands the output embedding contiguous states.

    A model slices the last position out of the prompt's states; torch 2.13 multiplies such a slice in bfloat16 a hundred times
    slower than a copy of it on a processor (a vocabulary of 262,144: 15 s instead of 50 ms for eight prompts).
    """
    head = backbone.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: tuple(a.contiguous() for a in args))  # pyright: ignore[reportOptionalMemberAccess]
    try:
        yield
    finally:
        handle.remove()


def _continued(
    backbone: Backbone,
    rows: Sequence[Sequence[int]],
    sources: Sequence[Counterpart | None],
    new_tokens: int,
    stop: Sequence[str],
    cached: bool = True,
) -> list[str]:
    """Texts after prompts, the longest prompt first; `cached`: whether keys are kept, or all is read again for every token."""
    keeps = cached and "logits_to_keep" in _takes(backbone) and caching.keeps_keys(backbone)
    with backbone.autocast(), _packed_head(backbone), backbone.greedy(new_tokens) as configuration:
        if keeps:
            texts = _stepwise(backbone, rows, new_tokens, stop, configuration.eos_token_id or ())
            return backbone.tokenizer.batch_decode(texts, skip_special_tokens=True)  # pyright: ignore[reportReturnType]
        configuration.use_cache = cached
        return _generated(backbone, rows, sources, new_tokens, stop, configuration)


def _takes(backbone: Backbone) -> Mapping[str, Any]:
    return inspect.signature(backbone.model.forward).parameters


def _stepwise(
    backbone: Backbone, prompts: Sequence[Sequence[int]], new_tokens: int, stop: Sequence[str], ends: Sequence[int]
) -> list[list[int]]:
    """The likeliest tokens after prompts, all texts a token at a time; those that have ended leave the batch."""
    model: Any = backbone.model
    cache = caching.empty(backbone)
    feed, mask = caching.padded(backbone, prompts, left=True)
    texts: list[list[int]] = [[] for _ in prompts]
    there = list(range(len(prompts)))  # The texts that the rows of the cache belong to.
    over: set[int] = set()
    for _ in range(new_tokens):
        places = caching.positions(mask, feed.shape[1])
        out = model(
            input_ids=feed,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        feed = out.logits[:, -1].float().argmax(dim=-1, keepdim=True)
        for number, token in zip(there, feed[:, 0].tolist(), strict=True):
            if number not in over:
                texts[number].append(token)
        going = [number for number in there if number not in over]
        over |= _ended(backbone, {number: texts[number] for number in going}, stop, ends)
        rows = [row for row, number in enumerate(there) if number not in over]
        if not rows:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if len(rows) <= _LEFT * len(there):
            chosen = torch.tensor(rows, device=backbone.device)
            cache.batch_select_indices(chosen)
            feed, mask, there = feed[chosen], mask[chosen], [there[row] for row in rows]
    return texts


def _ended(backbone: Backbone, texts: Mapping[int, list[int]], stop: Sequence[str], ends: Sequence[int]) -> set[int]:
    """Which texts have just come to an end of text, or to a string at which they end."""
    found = {number for number, tokens in texts.items() if tokens[-1] in ends}
    others = [number for number in texts if number not in found]
    if stop and others:
        tails = backbone.tokenizer.batch_decode([texts[n][-_TAIL:] for n in others], skip_special_tokens=True)
        found |= {number for number, tail in zip(others, tails, strict=True) if _stops(tail, stop)}
    return found


def _generated(
    backbone: Backbone,
    rows: Sequence[Sequence[int]],
    sources: Sequence[Counterpart | None],
    new_tokens: int,
    stop: Sequence[str],
    configuration: Any,
) -> list[str]:
    """Texts by transformers' own generation: where counterparts are mixed in, or a model keeps its keys in a way of its own."""
    ids, mask = caching.padded(backbone, rows, left=True)
    width, lengths = ids.shape[1], [len(row) for row in rows]
    beside = fusing(
        backbone,
        sources,
        lengths,
        starts=[width - length for length in lengths],
        written=[new_tokens] * len(rows),
        cached=configuration.use_cache,
    )
    with beside:
        out = backbone.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids,
            attention_mask=mask,
            generation_config=configuration,
            stopping_criteria=StoppingCriteriaList([_Stop(backbone, width, tuple(stop))] if stop else []),
        )
    return backbone.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)  # pyright: ignore[reportIndexIssue, reportArgumentType, reportReturnType]
