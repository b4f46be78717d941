"""Predictions and scores on disk: what was said to every item, and what it amounts to. Needs no model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from lingraft import metrics
from lingraft.answers.scoring import Rule, score_generated
from lingraft.errors import StoreError
from lingraft.metrics import Generated, Prediction, Scored
from lingraft.significance import mean_interval
from lingraft.store import read_json, write_json

PREDICTIONS = "predictions.jsonl"
SCORED = "scored.jsonl"
SCORES = "scores.json"
DAMAGE = (OSError, ValueError, KeyError, TypeError, RecursionError)
"""What reading lines raises that are not what was written."""


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Accuracy, macro-F1, mean gold log-likelihood and mean entropy; a mean over labels with a 95 % bootstrap interval."""
    right = np.array([float(p.answer == p.gold) for p in predictions])
    likelihood = np.array([p.gold_log_likelihood for p in predictions])
    return {
        "items": len(predictions),
        "accuracy": {"value": metrics.accuracy(predictions), "interval": list(mean_interval(right))},
        "macro_f1": {"value": metrics.macro_f1(predictions)},
        "gold_log_likelihood": {
            "value": metrics.gold_log_likelihood(predictions),
            "interval": list(mean_interval(likelihood)),
        },
        "entropy": {"value": metrics.entropy(predictions)},
        "truncated": {"value": sum(p.truncated for p in predictions) / len(predictions)},
    }


def write_predictions(folder: Path, predictions: Sequence[Prediction], answers: Sequence[str]) -> None:
    """Writes predictions, a line each, with the answer's and the gold label's names."""
    with (folder / PREDICTIONS).open("w", encoding="utf-8") as file:
        for given in predictions:
            # Everything is said of the scores as they are written: between near-equals rounding may change the answer.
            p = replace(given, scores=tuple(round(s, 6) for s in given.scores))
            line = {
                "id": p.id,
                "gold": p.gold,
                "gold_label": answers[p.gold],
                "answer": p.answer,
                "answer_label": answers[p.answer],
                "scores": list(p.scores),
                "prompt": p.prompt,
                **({"truncated": True} if p.truncated else {}),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_generated(folder: Path, generated: Sequence[Generated]) -> None:
    """Writes what a model wrote, a line each."""
    _write_lines(folder / PREDICTIONS, [asdict(g) for g in generated])


def write_scored(folder: Path, scored: Sequence[Scored]) -> None:
    """Writes what was read in generated texts and what it is worth, a line each."""
    _write_lines(folder / SCORED, [asdict(s) for s in scored])


def _write_lines(path: Path, values: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    # Not str.splitlines: JSON leaves U+2028 and its kin as they are, and a prompt may hold them.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _damaged(path: Path, error: Exception) -> StoreError:
    return StoreError(f"predictions cannot be read ({error})", where=path, remedy="delete its folder and run again")


def read_predictions(folder: Path) -> list[Prediction]:
    """Reads what `write_predictions` wrote.

    Raises:
        StoreError: The file is missing or damaged.
    """
    path = folder / PREDICTIONS
    try:
        return [
            Prediction(v["id"], v["gold"], tuple(v["scores"]), v["prompt"], v.get("truncated", False))
            for v in _lines(path)
        ]
    except DAMAGE as error:
        raise _damaged(path, error) from error


def read_generated(folder: Path) -> list[Generated]:
    """Reads what `write_generated` wrote.

    Raises:
        StoreError: The file is missing or damaged.
    """
    path = folder / PREDICTIONS
    try:
        return [Generated(**{**v, "references": tuple(v["references"])}) for v in _lines(path)]
    except DAMAGE as error:
        raise _damaged(path, error) from error


def item_values(predicted: Path, scored: Path, metric: str) -> dict[str, float]:
    """Every item's figure, from 0 to 1: of texts that were read the metric's, of scored candidates whether it is right.

    Args:
        predicted: The folder of the predictions.
        scored: The folder of their scores.
        metric: The metric of texts.

    Raises:
        StoreError: A file is missing or damaged.
    """
    path = scored / SCORED
    if not path.exists():
        return {p.id: float(p.answer == p.gold) for p in read_predictions(predicted)}
    try:
        return {v["id"]: float(v["figures"][metric]) for v in _lines(path)}
    except DAMAGE as error:
        raise _damaged(path, error) from error


def write_evaluation(folder: Path, predictions: Sequence[Prediction], answers: Sequence[str]) -> dict[str, Any]:
    """Writes predictions and their scores; gives the scores."""
    write_predictions(folder, predictions, answers)
    result = score(read_predictions(folder))
    write_json(folder / SCORES, result, durable=False)
    return result


def write_answers(
    folder: Path,
    said: Sequence[Prediction] | Sequence[Generated],
    rule: Mapping[str, Any],
    language: str,
    answers: Sequence[str],
) -> dict[str, Any]:
    """Writes what a model said to items, and what it is worth; gives the scores.

    Args:
        folder: Where to write; must exist.
        said: The answers.
        rule: How texts are read; see `answers.scoring.Rule`.
        language: The items' language.
        answers: The candidates' names, where candidates were scored.
    """
    if not isinstance(said[0], Generated):
        return write_evaluation(folder, said, answers)  # pyright: ignore[reportArgumentType]
    write_generated(folder, said)  # pyright: ignore[reportArgumentType]
    scored, figures = score_generated(read_generated(folder), Rule.from_dict(rule), language)
    write_scored(folder, scored)
    write_json(folder / SCORES, figures, durable=False)
    return figures


def read_scores(folder: Path) -> dict[str, Any]:
    """The scores of an evaluation's folder."""
    return read_json(folder / SCORES)
