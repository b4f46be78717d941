"""Encoders: what they read, how they learn from labels and from masked text, and what they answer.

A head answers: one of the labels, the best of several options, where an answer stands in a text, or (in training alone) the
words under a mask. Heads are transformers' own, so that plain PEFT gives the same answers as lingraft.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from lingraft import processes
from lingraft.backbones import Backbone
from lingraft.batching import Counterpart, derived_seed, encoder_inputs
from lingraft.errors import AdapterError, BackboneError, DataError, UserError
from lingraft.fusion.attaching import fusing, with_adapter
from lingraft.fusion.xmixup import Texts
from lingraft.fusion.xmixup_losses import labelled_loss
from lingraft.heads import Head, HeadKind, head_of
from lingraft.losses import Drawn, Objective, by_sequence, cross_entropies
from lingraft.memory import by_halves
from lingraft.metrics import Generated, Prediction
from lingraft.rows import Segment
from lingraft.stacks import Adapters, as_stack
from lingraft.tasks.items import Example

MASKED_SHARE = 0.15
"""How many tokens are predicted (Devlin et al., 2019): of these 80 % are masked, 10 % replaced at random, 10 % left as they are."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """What an encoder reads at once.

    Attributes:
        ids: Token ids, special tokens among them.
        types: The segment every token belongs to.
        start: The first token of the last part.
        offsets: For every token of the last part, its first and last character (exclusive) there.
        truncated: Whether something had to be left out.
        source: What is read beside it of the item's counterpart.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    start: int = 0
    offsets: tuple[tuple[int, int], ...] = ()
    truncated: bool = False
    source: Counterpart | None = None


@dataclass(frozen=True)
class LabelledSequence:
    """One item with its right answer.

    Attributes:
        rows: One, or for multiple choice one an option.
        target: The label, the right option, or the first and last token (inclusive) of the answer in the row.
        head: What it is for.
    """

    rows: tuple[Row, ...]
    target: tuple[int, ...]
    head: Head

    @property
    def length(self) -> int:
        """Its tokens."""
        return sum(len(row.ids) for row in self.rows)


@dataclass(frozen=True)
class MaskedSequence:
    """A text with its special tokens; what is masked is drawn at every step."""

    ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Its tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class Encoded:
    """Sequences, and what did not fit.

    Attributes:
        sequences: What a model learns from.
        truncated: How many of them lost some of their text.
        left_out: The ids of items without a place: the answer itself had to be cut.
    """

    sequences: list[Any]
    truncated: int
    left_out: tuple[str, ...] = ()


# What is read


def _room(backbone: Backbone, max_length: int) -> int:
    return min(max_length, backbone.longest or max_length)


def _backend(backbone: Backbone) -> Any:
    """The tokenizer that knows characters from tokens; as transformers does, told at every use what not to do."""
    found = getattr(backbone.tokenizer, "backend_tokenizer", None)
    if found is None or not hasattr(found, "post_process"):
        raise BackboneError(
            "this encoder's tokenizer does not say where tokens stand in a text",
            where=backbone.located.name,
            remedy="choose a model with a fast tokenizer (tokenizer.json)",
        )
    found.no_truncation()
    found.no_padding()
    return found


_LEAST = 4
"""Tokens of a context that a window must hold beside its question."""


def _shares(first: int, last: int, room: int, *, keep_last: bool) -> tuple[int, int]:
    """How many tokens of two parts fit; one of them is cut, and the other only where it is longer than half of the room."""
    if keep_last:
        kept_last, kept_first = _shares(last, first, room, keep_last=False)
        return kept_first, kept_last
    kept = min(last, max(room - first, room // 2))
    return min(first, room - kept), kept


def _rows(
    backbone: Backbone,
    first: str | None,
    last: str,
    max_length: int,
    *,
    keep_last: bool = False,
    windows: bool = False,
    shared: bool = False,
) -> list[Row]:
    """One or two texts with their special tokens.

    Args:
        backbone: The encoder.
        first: The first text, such as a question.
        last: The last, which is cut where both are too long.
        max_length: Tokens.
        keep_last: Whether the first is cut instead: the last is an option.
        windows: Whether instead of being cut the last is read in several rows, each a third over the one before; the first, a
            question, is never cut then.
        shared: Whether more than a question stands first, a counterpart's text before it: it loses its beginning where it takes
            more than half of the room.

    Raises:
        UserError: There is no room for text.
        DataError: A question leaves no room for its context.
    """
    backend = _backend(backbone)
    room = _room(backbone, max_length) - backend.num_special_tokens_to_add(first is not None)
    if room < 4:
        raise UserError(f"max_length={max_length} leaves no room for text", remedy="give a greater max_length")
    before = None if first is None else backend.encode(first, add_special_tokens=False)
    behind = backend.encode(last, add_special_tokens=False)
    kept = _shares(0 if before is None else len(before), len(behind), room, keep_last=keep_last)
    cut_before = False
    if shared and windows and before is not None and len(before) > room // 2:
        before.truncate(room // 2, direction="left")
        cut_before = True
    if windows and before is not None:
        if room - len(before) < _LEAST:
            raise DataError(
                f"a question of {len(before)} tokens leaves no room for its context in {room}",
                remedy="raise max_length (training.max_length) or leave the item out",
            )
        kept = len(before), min(len(behind), room - len(before))
    cut_first, cut_last = cut_before or (before is not None and len(before) > kept[0]), len(behind) > kept[1]
    if before is not None:
        # Before an option stands the question, at the end of the first text.
        before.truncate(kept[0], direction="left" if keep_last else "right")
    behind.truncate(kept[1], stride=kept[1] // 3 if windows else 0)
    found = []
    for piece in (behind, *behind.overflowing) if windows else (behind,):
        whole = backend.post_process(piece) if before is None else backend.post_process(before, piece)
        mine = 0 if before is None else 1
        places = [n for n, part in enumerate(whole.sequence_ids) if part == mine]
        start = places[0] if places else len(whole.ids)
        offsets = tuple(whole.offsets[n] for n in places)
        truncated = cut_first or (cut_last and not windows)
        found.append(Row(tuple(whole.ids), tuple(whole.type_ids), start, offsets, truncated))
    return found


def _two(parts: Sequence[str], item: str) -> tuple[str | None, str]:
    """The first text, if there is more than one, and the last.

    Raises:
        DataError: There is none.
    """
    if not parts:
        raise DataError(
            "this item has no text for an encoder", where=item, remedy="take a task that has: lingraft tasks"
        )
    return " ".join(parts[:-1]) if len(parts) > 1 else None, parts[-1]


def _item(backbone: Backbone, example: Example, head: Head, max_length: int, windows: bool) -> list[Row]:
    """What is read of an item under a head, with its counterpart row by row, as far as that has as many.

    Raises:
        DataError: The item has no options, or another number of candidates than the head.
    """
    if head.kind == "classification" and len(example.candidates) != head.labels:
        raise DataError(
            f"a head of {head.labels} labels cannot answer an item of {len(example.candidates)}",
            where=example.id,
            remedy="train a head on this task: its labels are others",
        )
    rows = _texts(backbone, example, head, max_length, windows)
    if example.source is None:
        return rows
    read = _texts(backbone, example.source, head, max_length, windows)
    texts = _read_in(example.source, read, head)
    sources = [Counterpart(row.ids, row.types, text) for row, text in zip(read, texts, strict=True)]
    return [replace(row, source=sources[n] if n < len(sources) else None) for n, row in enumerate(rows)]


def _read_in(example: Example, rows: Sequence[Row], head: Head) -> list[str]:
    """The text of every row: for options the option's, for windows the window's."""
    if head.kind == "multiple_choice":
        return ["\n".join((*example.parts, option)) for option in example.options]
    *before, last = example.parts
    spans = [(row.offsets[0][0], row.offsets[-1][1]) if row.offsets else (0, 0) for row in rows]
    return ["\n".join((*before, last[first:end])) for first, end in spans]


def _texts(backbone: Backbone, example: Example, head: Head, max_length: int, windows: bool) -> list[Row]:
    if head.kind == "multiple_choice":
        if len(example.options) < 2:
            raise DataError(
                "this item has no options to choose from",
                where=example.id,
                remedy="correct the row, or choose a task of another kind",
            )
        first = " ".join(example.parts)
        return [_rows(backbone, first, option, max_length, keep_last=True)[0] for option in example.options]
    first, last = _two(example.parts, example.id)
    return _rows(backbone, first, last, max_length, windows=windows, shared=len(example.parts) > 2)


def _tokens_of(row: Row, span: tuple[int, int]) -> tuple[int, int] | None:
    """The first and last token of characters of the last part; None where they are not all in the row."""
    inside = [n for n, (a, b) in enumerate(row.offsets) if a < span[1] and b > span[0]]
    if not inside or row.offsets[inside[0]][0] > span[0] or row.offsets[inside[-1]][1] < span[1]:
        return None
    return row.start + inside[0], row.start + inside[-1]


def _answer(example: Example) -> tuple[int, int] | None:
    """The characters of the right answer, without blanks around it: no token stands for those alone."""
    if example.span is None:
        return None
    first, last = example.span
    text = example.parts[-1][first:last]
    return first + len(text) - len(text.lstrip()), last - len(text) + len(text.rstrip())


def labelled_sequences(backbone: Backbone, examples: Sequence[Example], head: Head, max_length: int) -> Encoded:
    """Items with their right answers, for training.

    Where two parts are too long together, the last is cut, in multiple choice what stands before the option. Of a text that holds
    an answer the first window that holds it whole is taken; an item whose answer fits in none is left out.

    Raises:
        DataError: There is no example, or one has not what the head needs.
        UserError: The head is not for labels.
    """
    if not examples:
        raise DataError(
            "there is nothing to train on", remedy="look at the data: every row was left out, or there is none"
        )
    if head.kind == "masked_lm":
        raise UserError("masked language modelling has no labels", remedy="use masked_sequences")
    found: list[LabelledSequence] = []
    truncated, left_out = 0, []
    for example in examples:
        rows = _item(backbone, example, head, max_length, head.kind == "span")
        target: tuple[int, ...] = (example.gold,)
        if head.kind == "span":
            span = _answer(example)
            if span is None:
                raise DataError(
                    "this item does not say where its answer stands",
                    where=example.id,
                    remedy="give the place of the answer in the context, or leave the row out",
                )
            places = [(row, place) for row in rows if (place := _tokens_of(row, span))]
            if not places:
                left_out.append(example.id)
                continue
            truncated += len(rows) > 1
            rows, target = [places[0][0]], places[0][1]
        truncated += any(row.truncated for row in rows)
        found.append(LabelledSequence(tuple(rows), target, head))
    if not found:
        raise DataError("no answer fits into max_length", remedy="give a greater max_length")
    return Encoded(found, truncated, tuple(left_out))


def masked_sequences(backbone: Backbone, segments: Sequence[Sequence[int]]) -> list[MaskedSequence]:
    """Text for masked language modelling, with the special tokens around it.

    Raises:
        DataError: There is no segment.
        BackboneError: The tokenizer has no mask.
    """
    if not any(len(ids) > 1 for ids in segments):
        raise DataError(
            "the reference text is too short for one segment", remedy="give more text, or a smaller segment_tokens"
        )
    tokenizer = backbone.tokenizer
    if tokenizer.mask_token_id is None:
        raise BackboneError(
            "this encoder's tokenizer has no mask token",
            where=backbone.located.name,
            remedy="choose an encoder that was trained as a masked language model, or a labelled reference task",
        )
    bare = _backend(backbone).encode("", add_special_tokens=True).ids
    before, behind = bare[: len(bare) - len(bare) // 2], bare[len(bare) - len(bare) // 2 :]
    room = (backbone.longest or max(map(len, segments)) + len(bare)) - len(bare)
    return [MaskedSequence((*before, *ids[:room], *behind)) for ids in segments]


# What is computed


def forward(backbone: Backbone, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """What a model takes for rows, padded on the right."""
    return encoder_inputs(backbone, [(row.ids, row.types) for row in rows])


def _logits(backbone: Backbone, model: Any, rows: Sequence[Row], kind: HeadKind) -> torch.Tensor:
    """In float32: rows × labels; for options rows; for spans 2 × rows × tokens, minus infinity outside of the last part."""
    given = forward(backbone, rows)
    if kind == "multiple_choice":  # One choice at a time, so that items may have different numbers of them.
        given = {name: value[:, None] for name, value in given.items()}
    with backbone.autocast(), fusing(backbone, [row.source for row in rows], [len(row.ids) for row in rows]):
        out = model(**given)
    if kind != "span":
        return out.logits.float()[:, 0] if kind == "multiple_choice" else out.logits.float()
    both = torch.stack([out.start_logits.float(), out.end_logits.float()])
    outside = torch.ones(both.shape[1:], dtype=torch.bool)
    for number, row in enumerate(rows):
        outside[number, row.start : row.start + len(row.offsets)] = False
    return both.masked_fill(outside.to(both.device), -torch.inf)


def _draw_labelled(backbone: Backbone, chosen: Sequence[LabelledSequence], share: float, seed: int) -> list[Drawn]:
    beside = [sum(len(row.source.ids) for row in s.rows if row.source) for s in chosen]
    return [
        Drawn(s, 1, s.length + more, derived_seed("dropout", seed, number))
        for number, (s, more) in enumerate(zip(chosen, beside, strict=True))
    ]


def _segments(part: Sequence[Drawn], rows: Sequence[Sequence[int]]) -> tuple[Segment, ...]:
    """Where texts stand, for dropout.

    Args:
        part: What was drawn.
        rows: The lengths of the rows of each.
    """
    each = [(length, d.seed + number) for d, own in zip(part, rows, strict=True) for number, length in enumerate(own)]
    return tuple(Segment(row, 0, length, seed) for row, (length, seed) in enumerate(each))


def _sides(backbone: Backbone, model: Any, rows: Sequence[Row], kind: HeadKind) -> tuple[Texts, Texts]:
    """Counterparts and rows as X-Mixup reads them; a row without counterpart stands in for one, and nothing is mixed in."""
    beside = [row if row.source is None else Row(row.source.ids, row.source.types) for row in rows]
    lengths = [0 if row.source is None else len(row.source.ids) for row in rows]
    source = Texts(lambda: _logits(backbone, model, beside, kind), lengths)
    return source, Texts(lambda: _logits(backbone, model, rows, kind), [len(row.ids) for row in rows])


def _losses(logits: torch.Tensor, chosen: Sequence[LabelledSequence]) -> torch.Tensor:
    """Cross-entropy of every item; of a span the mean of its two ends, over the tokens of the text alone."""
    entropy = partial(torch.nn.functional.cross_entropy, reduction="none")
    target = torch.tensor([s.target for s in chosen], device=logits.device)
    kind = chosen[0].head.kind
    if kind == "span":
        return (entropy(logits[0], target[:, 0]) + entropy(logits[1], target[:, 1])) / 2
    if kind == "multiple_choice":
        parts = logits.split([len(s.rows) for s in chosen])
        return torch.cat([entropy(part[None], t) for part, t in zip(parts, target, strict=True)])
    return entropy(logits, target[:, 0])


def _summed_labelled(backbone: Backbone, model: Any, part: Sequence[Drawn]) -> torch.Tensor:
    """The loss of every item; with X-Mixup their sum."""
    chosen: list[LabelledSequence] = [d.item for d in part]
    kind, rows = chosen[0].head.kind, [row for s in chosen for row in s.rows]
    mixup = backbone.mixup
    alone = mixup is None or all(row.source is None for row in rows)
    backbone.rows.segments = _segments(part, [[len(r.ids) for r in s.rows] for s in chosen]) if alone else ()
    if mixup is None or alone:
        return _losses(_logits(backbone, model, rows, kind), chosen)
    source, target = mixup.both(model, *_sides(backbone, model, rows, kind))
    counts = [len(s.rows) for s in chosen]
    return labelled_loss(mixup.config, source, target, lambda logits: _losses(logits, chosen), kind, counts)


LABELLED = Objective(_draw_labelled, _summed_labelled)


@dataclass(frozen=True)
class _Masked:
    """Ids with masks in them; where something is predicted, and what."""

    ids: tuple[int, ...]
    positions: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any) -> tuple[frozenset[int], np.ndarray[Any, Any]]:
    """The special ids, and all others; made once, as for 250,000 tokens it takes a quarter of a second."""
    special = frozenset(tokenizer.all_special_ids)
    return special, np.setdiff1d(np.arange(len(tokenizer)), sorted(special))


def mask(backbone: Backbone, ids: Sequence[int], seed: int, number: int) -> _Masked:
    """Masks a text.

    What is drawn for a position depends on the seed, the text's place in its batch, and the position: in parallel text the same
    positions are drawn in both languages.
    """
    special, vocabulary = _vocabulary(backbone.tokenizer)
    whole = np.array(ids)
    free = np.array([n for n, token in enumerate(ids) if token not in special], dtype=int)
    chance, way = (np.random.default_rng([seed, number, n]).random(len(ids)) for n in range(2))
    chosen = free[chance[free] < MASKED_SHARE]
    if len(free) and not len(chosen):  # At least one, or short texts would say nothing.
        chosen = free[[int(np.argmin(chance[free]))]]
    changed = whole.copy()
    others = vocabulary[np.random.default_rng([seed, number, 2]).integers(len(vocabulary), size=len(ids))]
    masked, replaced = chosen[way[chosen] < 0.8], chosen[way[chosen] >= 0.9]
    changed[masked] = backbone.tokenizer.mask_token_id
    changed[replaced] = others[replaced]
    return _Masked(tuple(changed.tolist()), chosen, whole[chosen])


def _draw_masked(backbone: Backbone, chosen: Sequence[MaskedSequence], share: float, seed: int) -> list[Drawn]:
    drawn = [mask(backbone, s.ids, seed, number) for number, s in enumerate(chosen)]
    return [
        Drawn(d, len(d.positions), len(d.ids), derived_seed("dropout", seed, number)) for number, d in enumerate(drawn)
    ]


def _summed_masked(backbone: Backbone, model: Any, part: Sequence[Drawn]) -> torch.Tensor:
    """Cross-entropy summed over every text's masked positions, which alone go through the vocabulary."""
    drawn: list[_Masked] = [d.item for d in part]
    backbone.rows.segments = _segments(part, [[len(d.ids)] for d in drawn])
    given = forward(backbone, [Row(d.ids, (0,) * len(d.ids)) for d in drawn])
    transform, weight, bias = backbone.masked_head()
    rows = np.repeat(np.arange(len(drawn)), [len(d.positions) for d in drawn])
    columns = np.concatenate([d.positions for d in drawn])
    labels = torch.from_numpy(np.concatenate([d.labels for d in drawn])).to(backbone.device)
    with backbone.autocast():
        states = model.base_model(**given).last_hidden_state
        here = transform(states[torch.from_numpy(rows).to(states.device), torch.from_numpy(columns).to(states.device)])
    return by_sequence(cross_entropies(here, weight, labels, None, bias), [len(d.positions) for d in drawn])


MASKED = Objective(_draw_masked, _summed_masked)


# What is answered


def _head(adapter: Adapters, kinds: Sequence[HeadKind]) -> Head:
    """The head that the adapter on top answers with.

    Raises:
        UserError: There is none.
        AdapterError: Its head is for something else.
    """
    stack = as_stack(adapter)
    if not stack:
        raise UserError(
            "an encoder without a task head says nothing", remedy="leave out the methods that have no adapter (vanilla)"
        )
    head = head_of(stack[-1])
    if head.kind not in kinds:
        raise AdapterError(
            f"this adapter has a head for {head.kind}, not for {' or '.join(kinds)}",
            where=stack[-1].path,
            remedy="give one that was trained on the task",
        )
    return head


def _answered(backbone: Backbone, model: Any, rows: Sequence[Row], kind: HeadKind) -> torch.Tensor:
    """The logits of rows, with X-Mixup where that is on the model."""
    if backbone.mixup is None or all(row.source is None for row in rows):
        return _logits(backbone, model, rows, kind)
    return backbone.mixup.logits(model, *_sides(backbone, model, rows, kind), kind)


def _batches(rows: Sequence[Row], batch_tokens: int) -> list[list[int]]:
    """Numbers of rows; those of similar length together, the longest first."""
    found: list[list[int]] = []
    order = sorted(range(len(rows)), key=lambda n: (-len(rows[n].ids), n))
    while order:
        count = max(1, batch_tokens // len(rows[order[0]].ids))
        found.append(order[:count])
        order = order[count:]
    return found


def _read_all(
    backbone: Backbone,
    adapter: Adapters,
    head: Head,
    items: Sequence[Sequence[Row]],
    batch_tokens: int,
    progress: Progress | None,
) -> list[list[torch.Tensor]]:
    """The logits of every row of every item, on the processor."""
    owners = [n for n, rows in enumerate(items) for _ in rows]
    flat = [row for rows in items for row in rows]
    waiting = [len(rows) for rows in items]
    with with_adapter(backbone, adapter, head) as wrapped, torch.inference_mode():
        model = wrapped.get_base_model()

        def read(numbers: Sequence[int]) -> dict[int, torch.Tensor]:
            logits = _answered(backbone, model, [flat[n] for n in numbers], head.kind)
            values = logits.transpose(0, 1).cpu() if head.kind == "span" else logits.cpu()
            return dict(zip(numbers, values, strict=True))

        def after(numbers: Sequence[int], made: Mapping[int, torch.Tensor]) -> None:
            for number in numbers:
                waiting[owners[number]] -= 1
            if progress is not None:
                progress(sum(not left for left in waiting), len(items))

        found = processes.computed(_batches(flat, batch_tokens), partial(by_halves, read), {}, after)
    rest = (found[number] for number in range(len(flat)))
    return [[next(rest) for _ in rows] for rows in items]


def _shown(example: Example) -> str:
    return "\n".join(example.parts)


def predict_choice(
    backbone: Backbone,
    adapter: Adapters,
    examples: Sequence[Example],
    *,
    max_length: int = 512,
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> list[Prediction]:
    """Scores every label, or every option, of every example.

    Args:
        backbone: The encoder.
        adapter: An adapter with a head for classification or multiple choice.
        examples: The items.
        max_length: Tokens; a longer text is cut.
        batch_tokens: Padded tokens in a batch; changes speed only.
        progress: Called with the items done and the items in all.

    Returns:
        Predictions in the order of the examples; scores are log-probabilities.

    Raises:
        UserError: There is no adapter.
        AdapterError: Its head is for something else.
        DataError: There is no example, or one has not what the head needs.
    """
    if not examples:
        raise DataError(
            "there is nothing to evaluate",
            remedy="look at the data of this split: every row was left out, or there is none",
        )
    head = _head(adapter, ("classification", "multiple_choice"))
    items = [_item(backbone, e, head, max_length, False) for e in examples]
    logits = _read_all(backbone, adapter, head, items, batch_tokens, progress)
    found = []
    for example, rows, values in zip(examples, items, logits, strict=True):
        scores = torch.log_softmax(values[0] if head.kind == "classification" else torch.stack(values), dim=0)
        cut = any(row.truncated for row in rows)
        found.append(Prediction(example.id, example.gold, tuple(scores.tolist()), _shown(example), cut))
    return found


def predict_span(
    backbone: Backbone,
    adapter: Adapters,
    examples: Sequence[Example],
    *,
    max_length: int = 384,
    longest: int = 30,
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> list[Generated]:
    """Marks the likeliest answer in the last part of every example.

    A text that is too long is read in windows that overlap by a third; all its windows share one distribution.

    Args:
        backbone: The encoder.
        adapter: An adapter with a head for spans.
        examples: The items.
        max_length: Tokens in a window.
        longest: Tokens in an answer.
        batch_tokens: Padded tokens in a batch; changes speed only.
        progress: Called with the items done and the items in all.

    Returns:
        In the order of the examples; the gold log-likelihood is the mean of those of the right first and last token.

    Raises:
        UserError: There is no adapter.
        AdapterError: Its head is for something else.
        DataError: There is no example, or one has no text.
    """
    if not examples:
        raise DataError(
            "there is nothing to evaluate",
            remedy="look at the data of this split: every row was left out, or there is none",
        )
    head = _head(adapter, ("span",))
    items = [_item(backbone, e, head, max_length, True) for e in examples]
    logits = _read_all(backbone, adapter, head, items, batch_tokens, progress)
    found = []
    for example, rows, values in zip(examples, items, logits, strict=True):
        first, last = _best(rows, values, longest)
        text = example.parts[-1][first:last]
        span = _answer(example)
        gold = None if span is None else _likelihood(rows, values, span)
        cut = any(row.truncated for row in rows)
        found.append(Generated(example.id, _shown(example), text, example.references, gold, cut))
    return found


def _best(rows: Sequence[Row], values: Sequence[torch.Tensor], longest: int) -> tuple[int, int]:
    """The first and last character of the likeliest answer: the greatest sum of a first and a last token's logits."""
    best, place = -float("inf"), (0, 0)
    for row, (starts, ends) in zip(rows, values, strict=True):
        count = len(row.offsets)
        inside = slice(row.start, row.start + count)
        sums = starts[inside, None] + ends[None, inside]
        near = torch.ones(count, count, dtype=torch.bool).triu().tril(longest - 1)
        sums = sums.masked_fill(~near, -torch.inf)
        if count and float(sums.max()) > best:
            best = float(sums.max())
            a, b = divmod(int(sums.argmax()), count)
            place = row.offsets[a][0], row.offsets[b][1]
    return place


def _likelihood(rows: Sequence[Row], values: Sequence[torch.Tensor], span: tuple[int, int]) -> float | None:
    """Mean log-likelihood of an answer's first and last token, each over all windows that hold it; None where there is none."""
    total = 0.0
    for end, character in enumerate((span[0], span[1] - 1)):
        places = [
            (number, row.start + place)
            for number, row in enumerate(rows)
            for place, (first, last) in enumerate(row.offsets)
            if first <= character < last
        ]
        if not places:
            return None
        everything = torch.logsumexp(torch.cat([value[end] for value in values]), dim=0)
        right = torch.logsumexp(torch.stack([values[n][end, place] for n, place in places]), dim=0)
        total += float(right - everything)
    return total / 2
