"""Label likelihood by a decoder: which candidate does the model find likeliest after the prompt?

Only positions that tell candidates apart go through the output embedding. Where the candidates' first differing tokens
are all different, one position of one forward pass over the prompt decides (`first_token`); otherwise every candidate is
scored whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from lingraft.backbones import Backbone
from lingraft.batching import Counterpart, counterpart, cut, shared_start
from lingraft.errors import DataError, UserError
from lingraft.fusion.attaching import fusing
from lingraft.losses import project, summed_cross_entropy
from lingraft.metrics import Prediction
from lingraft.tasks.items import Example

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Query:
    """One row of a batch: ids to read, and for positions of it the tokens whose likelihood is asked for."""

    example: int
    ids: tuple[int, ...]
    position: int
    asked: tuple[tuple[int, tuple[int, ...]], ...]
    """Per position from `position` on: (offset, tokens). For `first_token` one offset with a token a candidate."""
    candidate: int | None
    truncated: bool
    prompt: int = 0
    """Tokens before the answer: those that are mixed with the counterpart's."""
    source: Counterpart | None = None


def label_likelihoods(
    backbone: Backbone,
    examples: Sequence[Example],
    *,
    scoring: str,
    normalised: bool,
    max_length: int,
    batch_tokens: int,
    progress: Progress | None,
) -> list[Prediction]:
    """See `evaluation.predict`; the adapter is on the model already."""
    queries = [q for n, e in enumerate(examples) for q in _queries(backbone, n, e, scoring, max_length)]
    scores = [[0.0] * len(e.candidates) for e in examples]
    truncated = [False] * len(examples)
    for query, values in _answers(backbone, queries, batch_tokens, progress):
        truncated[query.example] |= query.truncated
        if query.candidate is None:
            scores[query.example] = values
        else:
            scores[query.example][query.candidate] = sum(values) / (max(1, len(values)) if normalised else 1)
    return [
        Prediction(e.id, e.gold, tuple(s), e.prompt, cut) for e, s, cut in zip(examples, scores, truncated, strict=True)
    ]


def gold_likelihoods(
    backbone: Backbone, examples: Sequence[Example], *, max_length: int, batch_tokens: int, progress: Progress | None
) -> list[tuple[float, bool]]:
    """For every example, the mean log-likelihood of a token of the right answer after the prompt, and whether it was cut."""
    queries: list[_Query] = []
    for number, example in enumerate(examples):
        prompt, whole = backbone.encode(example.prompt), backbone.encode(example.prompt + example.completion)
        shared = shared_start([prompt, whole])
        made = _whole(backbone, number, example, whole, shared, max_length, example.completion, None)
        queries.append(replace(made, source=counterpart(backbone, example, max_length)))
    found = [(0.0, False)] * len(examples)
    for query, values in _answers(backbone, queries, batch_tokens, progress):
        if not values:
            raise DataError(f"item {examples[query.example].id} has no right answer to read")
        found[query.example] = (sum(values) / len(values), query.truncated)
    return found


def _whole(
    backbone: Backbone,
    number: int,
    example: Example,
    ids: list[int],
    shared: int,
    max_length: int,
    completion: str,
    candidate: int | None,
    longest: int | None = None,
) -> _Query:
    """Asks for the likelihood of all ids from `shared` on; `longest`: of the longest candidate, so that all are cut alike."""
    rest = tuple(ids[shared:])
    excess = len(backbone.prefix) + shared + (longest or len(rest)) - max_length
    text = example.prompt + completion
    kept = (*backbone.prefix, *cut(backbone, text, ids, excess, example.cuttables, example.id))
    asked = tuple((offset, (token,)) for offset, token in enumerate(rest))
    before = len(backbone.prefix) + shared_start([backbone.encode(example.prompt), ids]) - max(0, excess)
    return _Query(number, kept, len(kept) - len(rest) - 1, asked, candidate, excess > 0, max(1, before))


def _begins(rows: Sequence[list[int]]) -> bool:
    """Whether a row is the beginning of another."""
    return any(a is not b and b[: len(a)] == a for a in rows for b in rows)


def _queries(backbone: Backbone, number: int, example: Example, scoring: str, max_length: int) -> list[_Query]:
    source = counterpart(backbone, example, max_length)
    return [replace(q, source=source) for q in _compared(backbone, number, example, scoring, max_length)]


def _compared(backbone: Backbone, number: int, example: Example, scoring: str, max_length: int) -> list[_Query]:
    whole = [backbone.encode(example.prompt + c) for c in example.candidates]
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
    if distinct and scoring in ("auto", "first_token"):
        first = _whole(backbone, number, example, whole[0], shared, max_length, example.candidates[0], None, longest)
        context = first.ids[: first.position + 1]
        return [
            _Query(
                number,
                context,
                len(context) - 1,
                ((0, firsts),),
                None,
                first.truncated,
                min(first.prompt, len(context)),
            )
        ]
    return [
        _whole(backbone, number, example, ids, shared, max_length, text, index, longest)
        for index, (ids, text) in enumerate(zip(whole, example.candidates, strict=True))
    ]


def _answers(backbone: Backbone, queries: Sequence[_Query], batch_tokens: int, progress: Progress | None):
    """Every query with the log-likelihoods it asked for, in the order of batches."""
    finished = 0
    for batch in _batched(queries, batch_tokens):
        yield from zip(batch, _score(backbone, batch), strict=True)
        finished += len(batch)
        if progress is not None:
            progress(finished, len(queries))


def _batched(queries: Sequence[_Query], batch_tokens: int) -> list[list[_Query]]:
    """Batches of similar length, the longest first: memory is at its most at once, not at the end."""
    ordered = sorted(queries, key=lambda q: (-len(q.ids), q.example, q.candidate or 0))
    result: list[list[_Query]] = []
    for query in ordered:
        if result and (len(result[-1]) + 1) * len(result[-1][0].ids) <= batch_tokens:
            result[-1].append(query)
        else:
            result.append([query])
    return result


def _states(
    backbone: Backbone, rows: Sequence[Sequence[int]], queries: Sequence[_Query] = ()
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States before the output embedding, ids and mask of rows, the longest first, padded on the right."""
    ids = torch.full((len(rows), len(rows[0])), backbone.pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    ids, mask = ids.to(backbone.device), mask.to(backbone.device)
    answers = [len(q.ids) - q.prompt for q in queries]
    beside = fusing(backbone, [q.source for q in queries], [q.prompt for q in queries], written=answers)
    with backbone.autocast(), beside:
        return backbone.hidden(ids, mask), ids, mask


def _score(backbone: Backbone, batch: Sequence[_Query]) -> list[list[float]]:
    states, _, _ = _states(backbone, [query.ids for query in batch], batch)
    rows = [row for row, query in enumerate(batch) for _ in query.asked]
    positions = [query.position + offset for query in batch for offset, _ in query.asked]
    weight = backbone.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    picked: list[list[float]] = []
    asked = [tokens for query in batch for _, tokens in query.asked]
    for start in range(0, len(rows), 256):
        part = slice(start, start + 256)
        logits = project(states[rows[part], positions[part]], weight, backbone.softcap)  # pyright: ignore[reportArgumentType]
        norms = torch.logsumexp(logits, dim=-1)
        for line, norm, tokens in zip(logits, norms, asked[part], strict=True):
            picked.append((line[list(tokens)] - norm).tolist())
    values = iter(picked)
    return [[v for _ in query.asked for v in next(values)] for query in batch]


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
    rows = [(*backbone.prefix, *backbone.encode(text))[:max_length] for text in texts]
    rows = sorted((row for row in rows if len(row) > 1), key=len, reverse=True)
    if not rows:
        raise DataError("there is no text to read")
    weight = backbone.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    loss, tokens = 0.0, 0
    for start in range(0, len(rows), batch):
        states, ids, mask = _states(backbone, rows[start : start + batch])
        read = mask[:, 1:].bool()
        labels = ids[:, 1:][read]
        loss += float(summed_cross_entropy(states[:, :-1][read], weight, labels, backbone.softcap))  # pyright: ignore[reportArgumentType]
        tokens += len(labels)
    return -loss / tokens, tokens
