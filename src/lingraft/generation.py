"""Generation by a decoder: what does the model write after the prompt, taking the likeliest token each time?"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from lingraft.backbones import Backbone
from lingraft.batching import Counterpart, counterpart, cut
from lingraft.errors import UserError
from lingraft.fusion.attaching import fusing
from lingraft.prefixes import attention_shape
from lingraft.tasks.items import Example

Progress = Callable[[int, int], None]
_TAIL = 24
"""Tokens of the end of a text that are looked at for a stop string: more than any stop string is long."""


class _Stop(StoppingCriteria):
    """Ends a row at the first of some strings; the rows of a batch end one by one."""

    def __init__(self, backbone: Backbone, start: int, strings: Sequence[str]) -> None:
        self.backbone, self.start, self.strings = backbone, start, strings

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        written = input_ids[:, max(self.start, input_ids.shape[1] - _TAIL) :]
        texts = self.backbone.tokenizer.batch_decode(written, skip_special_tokens=True)
        ended = [any(s in text.lstrip() for s in self.strings) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def ended(text: str, stop: Sequence[str]) -> str:
    """A text up to the first stop string; white space before the text itself is no stop."""
    text = text.lstrip()
    places = [place for place in (text.find(s) for s in stop) if place >= 0]
    return text[: min(places)] if places else text


def written(
    backbone: Backbone,
    examples: Sequence[Example],
    *,
    new_tokens: int,
    stop: Sequence[str],
    max_length: int,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> list[tuple[str, bool]]:
    """What the model, with an adapter on it or without, writes after every prompt: greedy decoding.

    Args:
        backbone: The base model.
        examples: The items.
        new_tokens: At most so many tokens are written.
        stop: Strings at which a text ends; they are not part of it.
        max_length: Tokens of a prompt; a longer one loses some of its context, or its beginning. What is written comes on top, as
            far as the model has positions.
        batch_tokens: Padded tokens of prompts and texts in a batch; changes speed only. None: as many as keep the keys and values
            within 4 GiB.
        progress: Called with the items done and the items in all.

    Returns:
        For every item the text, and whether its prompt was cut.

    Raises:
        UserError: The model has no positions left for a prompt.
        DataError: A prompt is too long even without its context.
    """
    room = max_length if backbone.longest is None else min(max_length, backbone.longest - new_tokens)
    if room <= len(backbone.prefix):
        raise UserError(
            f"no room is left for a prompt: the model has {backbone.longest} positions, and {new_tokens} tokens are to be written",
            remedy="give a smaller evaluation.new_tokens",
        )
    prompts: list[tuple[int, list[int], bool]] = []
    sources = [counterpart(backbone, example, room) for example in examples]
    for number, example in enumerate(examples):
        ids = backbone.encode(example.prompt)
        excess = len(backbone.prefix) + len(ids) - room
        kept = cut(backbone, example.prompt, ids, excess, example.cuttables, example.id)
        prompts.append((number, [*backbone.prefix, *kept], excess > 0))
    found: list[tuple[str, bool]] = [("", False)] * len(examples)
    finished = 0
    for batch in _batched(prompts, new_tokens, batch_tokens or _affordable(backbone)):
        rows, beside = [ids for _, ids, _ in batch], [sources[number] for number, _, _ in batch]
        texts = _continued(backbone, rows, beside, new_tokens, stop)
        for (number, _, truncated), text in zip(batch, texts, strict=True):
            found[number] = (ended(text, stop), truncated)
        finished += len(batch)
        if progress is not None:
            progress(finished, len(prompts))
    return found


def _affordable(backbone: Backbone) -> int:
    """Tokens whose keys and values take 4 GiB, and no more than 32,768: a step over many rows costs little more than over few."""
    layers, heads, width = attention_shape(backbone.model)
    size = 2 * layers * heads * width * backbone.dtype.itemsize
    return max(1, min(32_768, 2**32 // size))


def _batched(
    prompts: Sequence[tuple[int, list[int], bool]], new_tokens: int, batch_tokens: int
) -> list[list[tuple[int, list[int], bool]]]:
    """Batches of similar length, the longest first."""
    result: list[list[tuple[int, list[int], bool]]] = []
    for prompt in sorted(prompts, key=lambda p: (-len(p[1]), p[0])):
        if result and (len(result[-1]) + 1) * (len(result[-1][0][1]) + new_tokens) <= batch_tokens:
            result[-1].append(prompt)
        else:
            result.append([prompt])
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
    rows: Sequence[list[int]],
    sources: Sequence[Counterpart | None],
    new_tokens: int,
    stop: Sequence[str],
    cached: bool = True,
) -> list[str]:
    width = len(rows[0])
    ids = torch.full((len(rows), width), backbone.pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):  # on the right, where the text begins
        ids[number, width - len(row) :] = torch.tensor(row)
        mask[number, width - len(row) :] = 1
    criteria = StoppingCriteriaList([_Stop(backbone, width, tuple(stop))] if stop else [])
    lengths = [len(row) for row in rows]
    beside = fusing(
        backbone,
        sources,
        lengths,
        starts=[width - length for length in lengths],
        written=[new_tokens] * len(rows),
        cached=cached,
    )
    with backbone.autocast(), _packed_head(backbone), backbone.greedy(new_tokens) as configuration, beside:
        configuration.use_cache = cached
        out = backbone.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids.to(backbone.device),
            attention_mask=mask.to(backbone.device),
            generation_config=configuration,
            stopping_criteria=criteria,
        )
    return backbone.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)  # pyright: ignore[reportIndexIssue, reportArgumentType]
