"""Predictions and scores on disk: what was said to every item, and what it amounts to. Needs no model."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lingraft import metrics
from lingraft.errors import StoreError
from lingraft.metrics import Prediction
from lingraft.significance import mean_interval
from lingraft.store import read_json, write_json

PREDICTIONS = "predictions.jsonl"
SCORES = "scores.json"


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
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_predictions(folder: Path) -> list[Prediction]:
    """Reads what `write_predictions` wrote.

    Raises:
        StoreError: The file is missing or damaged.
    """
    path = folder / PREDICTIONS
    try:
        # Not str.splitlines: JSON leaves U+2028 and its kin as they are, and a prompt may hold them.
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [Prediction(v["id"], v["gold"], tuple(v["scores"]), v["prompt"]) for v in lines]
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(
            f"predictions cannot be read ({error})", where=path, remedy="delete its folder and run again"
        ) from error


def write_evaluation(folder: Path, predictions: Sequence[Prediction], answers: Sequence[str]) -> dict[str, Any]:
    """Writes predictions and their scores; gives the scores."""
    write_predictions(folder, predictions, answers)
    result = score(read_predictions(folder))
    write_json(folder / SCORES, result)
    return result


def read_scores(folder: Path) -> dict[str, Any]:
    """The scores of an evaluation's folder."""
    return read_json(folder / SCORES)
