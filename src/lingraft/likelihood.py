"""Label likelihood by a decoder: which candidate does the model find likeliest after the prompt?

Only positions that tell candidates apart go through the output embedding. Where the candidates' first differing tokens
are all different, one position of one forward pass over the prompt decides (`first_token`); otherwise every candidate is
scored whole.

What rows have in common is read once, where that saves tokens: of the candidates of an item their prompt, of all items what
they begin with alike. Keys and values of it are kept, and the rest is read on from them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch

from lingraft import caching, processes
from lingraft.backbones import Backbone
from lingraft.batching import Counterpart, counterpart, cut, shared_start
from lingraft.errors import DataError, UserError
from lingraft.fusion.attaching import fusing
from lingraft.journal import Journal
from lingraft.losses import project, summed_cross_entropy
from lingraft.memory import by_halves
from lingraft.metrics import Prediction
from lingraft.tasks.items import Example

Progress = Callable[[int, int], None]
_WORTH = 0.9
"""What rows have in common is read once where no more than this share of the tokens is read then: keys take time to copy."""
_COPIED = 8
"""Columns of copied keys, as a multiple of a batch's tokens, up to which an item's candidates share them."""


@dataclass(frozen=True)
class Query:
    """One row of a batch: ids to read, and for positions of it the tokens whose likelihood is asked for."""

    ids: tuple[int, ...]
    position: int
    asked: tuple[tuple[int, ...], ...]
    """Per position from `position` on, the tokens. For `first_token` one position with a token a candidate."""
    truncated: bool
    prompt: int = 0
    """Tokens before the answer: those that are mixed with the counterpart's."""
    source: Counterpart | None = None


Item = Sequence[Query]
"""All rows of an item: one that decides among its candidates, or one a candidate."""


def label_queries(backbone: Backbone, examples: Sequence[Example], scoring: str, max_length: int) -> list[list[Query]]:
    """What is read and asked of every example, for `label_likelihoods`.

    Raises:
        UserError: The candidates of an item cannot be told apart.
    """
    prefix = backbone.prefix
    found: list[list[Query]] = []
    for example in examples:
        source = counterpart(backbone, example, max_length)
        queries = _compared(backbone, prefix, example, scoring, max_length)
        found.append(queries if source is None else [replace(q, source=source) for q in queries])
    return found


def label_likelihoods(
    backbone: Backbone,
    examples: Sequence[Example],
    queries: Sequence[Item],
    *,
    normalised: bool,
    batch_tokens: int,
    progress: Progress | None,
    journal: Journal | None = None,
) -> list[Prediction]:
    """See `evaluation.predict`; the adapter is on the model already."""
    found: list[Prediction] = []
    answers = _answers(backbone, queries, batch_tokens, progress, journal, "labels")
    for example, item, values in zip(examples, queries, answers, strict=True):
        if len(values) == 1 and len(example.candidates) > 1:
            scores = tuple(values[0])
        else:
            scores = tuple(sum(v) / (max(1, len(v)) if normalised else 1) for v in values)
        truncated = any(query.truncated for query in item)
        found.append(Prediction(example.id, example.gold, scores, example.prompt, truncated))
    return found


def gold_queries(backbone: Backbone, examples: Sequence[Example], max_length: int) -> list[list[Query]]:
    """What is read and asked of every example, for `gold_likelihoods`.

    Raises:
        DataError: An item has no right answer.
    """
    prefix = backbone.prefix
    found: list[list[Query]] = []
    for example in examples:
        prompt, whole = _encoded(backbone, [example.prompt, example.prompt + example.completion])
        shared = shared_start([prompt, whole])
        made = _whole(backbone, prefix, prompt, example, whole, shared, max_length, example.completion)
        if not made.asked:
            raise DataError(
                f"item {example.id} has no right answer to read",
                remedy="add the answer to the item's row, or leave the row out",
            )
        found.append([replace(made, source=counterpart(backbone, example, max_length))])
    return found


def gold_likelihoods(
    backbone: Backbone,
    queries: Sequence[Item],
    *,
    batch_tokens: int,
    progress: Progress | None,
    journal: Journal | None = None,
) -> list[tuple[float, bool]]:
    """For every example, the mean log-likelihood of a token of the right answer after the prompt, and whether it was cut."""
    answers = _answers(backbone, queries, batch_tokens, progress, journal, "gold")
    return [(sum(values) / len(values), item[0].truncated) for item, (values,) in zip(queries, answers, strict=True)]


def _encoded(backbone: Backbone, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts, without special tokens; many at once cost little more than one."""
    return backbone.tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]


def _whole(
    backbone: Backbone,
    prefix: Sequence[int],
    prompt: list[int],
    example: Example,
    ids: list[int],
    shared: int,
    max_length: int,
    completion: str,
    longest: int | None = None,
) -> Query:
    """Asks for the likelihood of all ids from `shared` on; `longest`: of the longest candidate, so that all are cut alike."""
    rest = tuple(ids[shared:])
    excess = len(prefix) + shared + (longest or len(rest)) - max_length
    text = example.prompt + completion
    kept = (*prefix, *cut(backbone, text, ids, excess, example.cuttables, example.id))
    if len(kept) <= len(rest):
        raise DataError(
            f"item {example.id}: nothing is left to read before the answer ({len(rest)} tokens)",
            remedy="raise max_length, or give a prompt",
        )
    before = len(prefix) + shared_start([prompt, ids]) - max(0, excess)
    asked = tuple((token,) for token in rest)
    return Query(kept, len(kept) - len(rest) - 1, asked, excess > 0, max(1, before))


def _begins(rows: Sequence[list[int]]) -> bool:
    """Whether a row is the beginning of another."""
    return any(a is not b and b[: len(a)] == a for a in rows for b in rows)


def _compared(
    backbone: Backbone, prefix: Sequence[int], example: Example, scoring: str, max_length: int
) -> list[Query]:
    prompt, *whole = _encoded(backbone, [example.prompt, *(example.prompt + c for c in example.candidates)])
    if _begins(whole):  # Else the shorter one, whose tokens all are the longer's too, would always win.
        end = backbone.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise UserError(
                "one candidate is the beginning of another, and the tokenizer has no end of text to tell them apart",
                where=f"item {example.id}: {', '.join(example.candidates)}",
                remedy="give answers of which none begins another",
            )
        whole = [[*ids, end] for ids in whole]
    # Tokens that all candidates share say nothing about which is right, wherever the prompt itself ends.
    shared = shared_start(whole)
    rests = [ids[shared:] for ids in whole]
    firsts = tuple(rest[0] for rest in rests if rest)
    distinct = len(firsts) == len(rests) == len(set(firsts))
    if scoring == "first_token" and not distinct:
        raise UserError(
            "the candidates' first tokens do not tell them apart",
            where=f"item {example.id}: {', '.join(example.candidates)}",
            remedy="use scoring: sequence (or auto)",
        )
    longest = max(len(rest) for rest in rests)

    def ask(ids: list[int], text: str) -> Query:
        return _whole(backbone, prefix, prompt, example, ids, shared, max_length, text, longest)

    if distinct and scoring in ("auto", "first_token"):
        first = ask(whole[0], example.candidates[0])
        context = first.ids[: first.position + 1]
        return [Query(context, first.position, (firsts,), first.truncated, min(first.prompt, len(context)))]
    return [ask(ids, text) for ids, text in zip(whole, example.candidates, strict=True)]


@dataclass(frozen=True)
class _Batch:
    """Items that are read together.

    Attributes:
        items: Their numbers.
        shared: Whether an item's prompt is read once for all its rows.
    """

    items: tuple[int, ...]
    shared: bool = False


def _answers(
    backbone: Backbone,
    items: Sequence[Item],
    batch_tokens: int,
    progress: Progress | None,
    journal: Journal | None,
    part: str,
) -> list[list[list[float]]]:
    """The log-likelihoods that every item's rows asked for.

    Batches depend on all items, whether a journal knows some already or not: so a run that goes on computes what an
    uninterrupted one would.
    """
    (begun,) = by_halves(lambda _: {0: _start(backbone, items)}, [0]).values()
    finished, total = 0, sum(map(len, items))
    batches = _batched(backbone, items, begun.length, batch_tokens)
    shared = {number for batch in batches if batch.shared for number in batch.items}

    def read(numbers: Sequence[int]) -> dict[int, list[list[float]]]:
        chosen = [items[number] for number in numbers]
        together = not shared.isdisjoint(numbers)
        values = _shared(backbone, chosen) if together else _each(backbone, chosen, begun, batch_tokens)
        return dict(zip(numbers, values, strict=True))

    def after(numbers: Sequence[int], made: Mapping[int, list[list[float]]]) -> None:
        nonlocal finished
        if journal is not None and made:
            journal.add(part, made)
        finished += sum(len(items[number]) for number in numbers)
        if progress is not None:
            progress(finished, total)

    known = {} if journal is None else journal.known(part)
    found = processes.computed([batch.items for batch in batches], partial(by_halves, read), known, after)
    return [found[number] for number in range(len(items))]


@dataclass(frozen=True)
class _Start:
    """What all rows begin with alike: its length, and its keys and values if there is any."""

    length: int = 0
    cache: caching.DynamicCache | None = None


def _start(backbone: Backbone, items: Sequence[Item]) -> _Start:
    rows = [query for item in items for query in item]
    if len(rows) < 2 or not caching.keeps_keys(backbone):
        return _Start()
    # What is asked for has to be behind it.
    length = min(shared_start([query.ids for query in rows]), *(query.position for query in rows))
    total = sum(len(query.ids) for query in rows)
    if not length or length + total - length * len(rows) > _WORTH * total:
        return _Start()
    ids, mask = caching.padded(backbone, [rows[0].ids[:length]])
    cache = caching.empty(backbone)
    with backbone.autocast():
        caching.read(backbone, ids, mask, cache)
    return _Start(length, cache)


def _prompt(item: Item) -> int:
    """How many tokens all rows of an item begin with alike, up to the first position that is asked for."""
    return min(shared_start([query.ids for query in item]), *(query.position + 1 for query in item))


def _tail(query: Query, start: int) -> tuple[int, ...]:
    """A row from a column on; its last token is asked for, not read."""
    return query.ids[start : query.position + len(query.asked)]


def _batched(backbone: Backbone, items: Sequence[Item], start: int, batch_tokens: int) -> list[_Batch]:
    """Batches of similar length, the longest first: memory is at its most at once, not at the end."""
    shared: dict[int, tuple[int, int]] = {}
    if caching.keeps_keys(backbone):
        for number, item in enumerate(items):
            if len(item) < 2:
                continue
            prompt = _prompt(item)
            tails = [len(_tail(query, prompt)) for query in item]
            whole = sum(len(query.ids) - start for query in item)
            copied = len(item) * (prompt + max(tails))
            if prompt + sum(tails) <= _WORTH * whole and copied <= _COPIED * batch_tokens:
                shared[number] = (prompt, max(tails))
    if shared and not caching.pads_in_front(backbone):
        shared = {}
    longest = [max(len(query.ids) for query in item) for item in items]
    found: list[list[int]] = []
    room = rows = 0
    for number in sorted(set(range(len(items))) - set(shared), key=lambda n: (-longest[n], n)):
        rows += len(items[number])
        if not found or rows * room > batch_tokens or rows * (start + room) > _COPIED * batch_tokens:
            found.append([])
            rows, room = len(items[number]), longest[number] - start
        found[-1].append(number)
    return [*map(_Batch, map(tuple, found)), *_sharing(items, shared, batch_tokens)]


def _sharing(items: Sequence[Item], sizes: dict[int, tuple[int, int]], batch_tokens: int) -> list[_Batch]:
    """Batches of items whose rows share their prompt, by the lengths of prompt and longest tail."""
    found: list[list[int]] = []
    prompt = tail = rows = 0
    for number in sorted(sizes, key=lambda n: (-sizes[n][0], -sizes[n][1], n)):
        rows += len(items[number])
        tail = max(tail, sizes[number][1])
        read = (len(found[-1]) + 1) * prompt + rows * tail if found else 0
        if not found or read > batch_tokens or rows * (prompt + tail) > _COPIED * batch_tokens:
            found.append([])
            prompt, tail = sizes[number]
            rows = len(items[number])
        found[-1].append(number)
    return [_Batch(tuple(batch), shared=True) for batch in found]


def _shared(backbone: Backbone, items: Sequence[Item]) -> list[list[list[float]]]:
    """Reads every item's prompt once, and its rows on from there."""
    starts = [_prompt(item) for item in items]
    cache = caching.empty(backbone)
    # Padding stands on the left, so that every tail stands directly behind its prompt, in layers with a window too.
    rows = [item[0].ids[:start] for item, start in zip(items, starts, strict=True)]
    ids, mask = caching.padded(backbone, rows, left=True)
    tails = [[_tail(query, start) for query in item] for item, start in zip(items, starts, strict=True)]
    owners = [(n, r) for n, item in enumerate(tails) for r, tail in enumerate(item) if tail]
    with backbone.autocast():
        ends = caching.read(backbone, ids, mask, cache)[:, -1]
        behind: torch.Tensor | None = None
        if owners:
            chosen = torch.tensor([n for n, _ in owners], device=backbone.device)
            cache.batch_select_indices(chosen)
            ids, more = caching.padded(backbone, [tails[n][r] for n, r in owners])
            behind = caching.read(backbone, ids, torch.cat([mask[chosen], more], dim=1), cache)
    # The rows' first tokens are asked of one state, the prompt's last one.
    firsts = [
        tuple(q.asked[0][0] for q in item if _at_end(q, start)) for item, start in zip(items, starts, strict=True)
    ]
    numbers = [n for n, tokens in enumerate(firsts) if tokens]
    from_ends = dict(zip(numbers, _picked(backbone, ends[numbers], [firsts[n] for n in numbers]), strict=True))
    given = {n: iter(values) for n, values in from_ends.items()}
    place = {owner: row for row, owner in enumerate(owners)}
    at: list[tuple[int, int]] = []
    asked: list[tuple[int, ...]] = []
    for n, (item, start) in enumerate(zip(items, starts, strict=True)):
        for r, query in enumerate(item):
            for column, tokens in enumerate(query.asked, query.position - start):
                if column >= 0:
                    at.append((place[n, r], column))
                    asked.append(tokens)
    later = iter([])
    if behind is not None:
        later = iter(_picked(backbone, behind[[r for r, _ in at], [c for _, c in at]], asked))
    found: list[list[list[float]]] = []
    for n, (item, start) in enumerate(zip(items, starts, strict=True)):
        found.append([])
        for query in item:
            values = [next(given[n])] if _at_end(query, start) else []
            rest = len(query.asked) - len(values)
            found[-1].append([*values, *(value for _ in range(rest) for value in next(later))])
    return found


def _at_end(query: Query, start: int) -> bool:
    """Whether a row's first token is asked of the last column of what was shared."""
    return bool(query.asked) and query.position == start - 1


def _each(backbone: Backbone, items: Sequence[Item], begun: _Start, batch_tokens: int) -> list[list[list[float]]]:
    """Reads every row for itself, from behind what all rows begin with."""
    places = [(n, r) for n, item in enumerate(items) for r in range(len(item))]
    places.sort(key=lambda place: -len(items[place[0]][place[1]].ids))
    found: list[list[list[float]]] = [[[] for _ in item] for item in items]
    while places:  # An item of very many rows is read in several parts.
        width = len(items[places[0][0]][places[0][1]].ids) - begun.length
        count = max(1, min(batch_tokens // width, _COPIED * batch_tokens // (begun.length + width)))
        part, places = places[:count], places[count:]
        queries = [items[n][r] for n, r in part]
        states = _states_of(backbone, queries, begun)
        rows = [row for row, query in enumerate(queries) for _ in query.asked]
        columns = [q.position + offset - begun.length for q in queries for offset in range(len(q.asked))]
        asked = [tokens for query in queries for tokens in query.asked]
        values = iter(_picked(backbone, states[rows, columns], asked))
        for (n, r), query in zip(part, queries, strict=True):
            found[n][r] = [v for _ in query.asked for v in next(values)]
    return found


def _states_of(backbone: Backbone, queries: Sequence[Query], begun: _Start) -> torch.Tensor:
    """States before the output embedding, from behind what all rows begin with; padded on the right."""
    if begun.cache is None:
        beside = fusing(
            backbone,
            [q.source for q in queries],
            [q.prompt for q in queries],
            written=[len(q.ids) - q.prompt for q in queries],
        )
        ids, mask = caching.padded(backbone, [q.ids for q in queries])
        with backbone.autocast(), beside:
            return backbone.hidden(ids, mask)
    ids, mask = caching.padded(backbone, [q.ids[begun.length :] for q in queries])
    cache = deepcopy(begun.cache)
    cache.batch_select_indices(torch.zeros(len(queries), dtype=torch.long, device=backbone.device))
    mask = torch.cat([mask.new_ones(len(queries), begun.length), mask], dim=1)
    with backbone.autocast():
        return caching.read(backbone, ids, mask, cache)


def _picked(backbone: Backbone, states: torch.Tensor, asked: Sequence[tuple[int, ...]]) -> list[list[float]]:
    """Log-likelihoods of tokens after states (positions × width), position by position."""
    weight = backbone.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    values: list[float] = []
    for start in range(0, len(asked), 256):
        logits = project(states[start : start + 256], weight, backbone.softcap)  # pyright: ignore[reportArgumentType]
        part = asked[start : start + 256]
        line = torch.tensor([n for n, tokens in enumerate(part) for _ in tokens], device=logits.device)
        token = torch.tensor([token for tokens in part for token in tokens], device=logits.device)
        values += (logits[line, token] - torch.logsumexp(logits, dim=-1)[line]).tolist()
    rest: Iterable[float] = iter(values)
    return [[next(rest) for _ in tokens] for tokens in asked]


def text_log_likelihood(
    backbone: Backbone, texts: Sequence[str], *, max_length: int = 1024, batch: int = 32
) -> tuple[float, int]:
    """How likely a model finds texts, as language modelling.

    Args:
        backbone: The base model, with an adapter on it or without.
        texts: The texts.
        max_length: Tokens; the rest of a longer text is not read.
        batch: Texts in a batch; changes speed only.

    Returns:
        The mean log-likelihood of a token, in nats, and the number of tokens.

    Raises:
        DataError: There is no text of more than one token.
    """
    prefix = backbone.prefix
    rows = [(*prefix, *ids)[:max_length] for ids in _encoded(backbone, texts)] if texts else []
    rows = sorted((row for row in rows if len(row) > 1), key=len, reverse=True)
    if not rows:
        raise DataError("there is no text to read", remedy="look at the reference text: it has no lines")
    weight = backbone.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    loss, tokens = 0.0, 0
    for start in range(0, len(rows), batch):
        ids, mask = caching.padded(backbone, rows[start : start + batch])
        with backbone.autocast():
            states = backbone.hidden(ids, mask)
        read = mask[:, 1:].bool()
        labels = ids[:, 1:][read]
        loss += float(summed_cross_entropy(states[:, :-1][read], weight, labels, backbone.softcap))  # pyright: ignore[reportArgumentType]
        tokens += len(labels)
    return -loss / tokens, tokens
