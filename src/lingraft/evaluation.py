"""Evaluation by label likelihood: which candidate does the model find likeliest after the prompt?

Only positions that tell candidates apart go through the output embedding. Where the candidates' first differing tokens
are all different, one position of one forward pass over the prompt decides (`first_token`); otherwise every candidate is
scored whole.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lingraft.adapter import Adapter
from lingraft.backbones import Backbone
from lingraft.errors import DataError, UserError
from lingraft.losses import project, summed_cross_entropy
from lingraft.metrics import Prediction
from lingraft.predictions import score, write_evaluation
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


def predict(
    backbone: Backbone,
    adapter: Adapter | None,
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
        adapter: The adapter to put on it, or None.
        examples: The items.
        scoring: `first_token`, `sequence`, or `auto`, which takes the first where it is unambiguous.
        max_length: Tokens; a longer prompt loses its beginning.
        batch_tokens: Padded tokens in a batch; changes speed only.
        progress: Called with the rows done and the rows in all.

    Returns:
        Predictions in the order of the examples. In `first_token` a candidate's score is the log-likelihood of its first token
        that differs, in `sequence` of all its tokens from there on.

    Raises:
        UserError: `first_token` was asked for and cannot tell the candidates apart.
        DataError: There is no example.
    """
    if not examples:
        raise DataError("there is nothing to evaluate")
    queries = _queries(backbone, examples, scoring, max_length)
    scores = [[0.0] * len(e.candidates) for e in examples]
    finished = 0
    with backbone.with_adapter(adapter), torch.inference_mode():
        for batch in _batched(queries, batch_tokens):
            for query, values in zip(batch, _score(backbone, batch), strict=True):
                if query.candidate is None:
                    scores[query.example] = values
                else:
                    scores[query.example][query.candidate] = sum(values)
            finished += len(batch)
            if progress is not None:
                progress(finished, len(queries))
    return [Prediction(e.id, e.gold, tuple(s), e.prompt) for e, s in zip(examples, scores, strict=True)]


def _queries(backbone: Backbone, examples: Sequence[Example], scoring: str, max_length: int) -> list[_Query]:
    found: list[_Query] = []
    for number, example in enumerate(examples):
        whole = [backbone.encode(example.prompt + c) for c in example.candidates]
        shortest = min(len(ids) for ids in whole)
        # Tokens that all candidates share say nothing about which is right, wherever the prompt itself ends.
        shared = next((i for i in range(shortest) if len({ids[i] for ids in whole}) > 1), shortest)
        rests = [tuple(ids[shared:]) for ids in whole]
        firsts = tuple(rest[0] for rest in rests if rest)
        distinct = len(firsts) == len(rests) == len(set(firsts))
        if scoring == "first_token" and not distinct:
            raise UserError(
                "the candidates' first tokens do not tell them apart",
                where=f"item {example.id}: {', '.join(example.candidates)}",
                remedy="use scoring: sequence (or auto)",
            )
        prefix = backbone.prefix
        longest = max(len(rest) for rest in rests)
        context = (*prefix, *whole[0][:shared][-(max_length - len(prefix) - longest) :])
        if distinct and scoring in ("auto", "first_token"):
            found.append(_Query(number, context, len(context) - 1, ((0, firsts),), None))
            continue
        for index, rest in enumerate(rests):
            asked = tuple((offset, (token,)) for offset, token in enumerate(rest))
            found.append(_Query(number, (*context, *rest), len(context) - 1, asked, index))
    return found


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


def _states(backbone: Backbone, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States before the output embedding, ids and mask of rows, the longest first, padded on the right."""
    ids = torch.full((len(rows), len(rows[0])), backbone.pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    ids, mask = ids.to(backbone.device), mask.to(backbone.device)
    half = backbone.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(backbone.device.type, backbone.dtype) if half else nullcontext():
        return backbone.hidden(ids, mask), ids, mask


def _score(backbone: Backbone, batch: Sequence[_Query]) -> list[list[float]]:
    states, _, _ = _states(backbone, [query.ids for query in batch])
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
    backbone: Backbone, adapter: Adapter | None, texts: Sequence[str], *, max_length: int = 1024, batch: int = 32
) -> tuple[float, int]:
    """How likely a model finds texts, as language modelling.

    Args:
        backbone: The base model.
        adapter: The adapter to put on it, or None.
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
    with backbone.with_adapter(adapter), torch.inference_mode():
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            states, ids, mask = _states(backbone, part)
            read = mask[:, 1:].bool()
            labels = ids[:, 1:][read]
            loss += float(summed_cross_entropy(states[:, :-1][read], weight, labels, backbone.softcap))  # pyright: ignore[reportArgumentType]
            tokens += len(labels)
    return -loss / tokens, tokens


def evaluate(
    backbone: Backbone,
    adapter: Adapter | str | Path | None,
    examples: Sequence[Example],
    folder: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Predicts and scores; with a folder, writes `predictions.jsonl` and `scores.json` there.

    Args:
        backbone: The base model.
        adapter: An adapter, its folder, or None for the base alone.
        examples: The items.
        folder: Where to write; must exist.
        **options: As for `predict`.

    Returns:
        The scores; see `score`.
    """
    loaded = Adapter.load(adapter) if isinstance(adapter, str | Path) else adapter
    predictions = predict(backbone, loaded, examples, **options)
    if folder is None:
        return score(predictions)
    return write_evaluation(folder, predictions, [c.strip() for c in examples[0].candidates])
