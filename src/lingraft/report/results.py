"""From a run's manifest to its results: means over seeds, intervals over items, differences to Eng-FT, gap closed."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lingraft.digests import digest_bytes
from lingraft.errors import UserError
from lingraft.methods import METHODS
from lingraft.predictions import read_predictions, read_scores
from lingraft.significance import mean_interval, paired_test, statistic_interval
from lingraft.store import read_json

BASELINE, CEILING = "eng-ft", "tgt-ft"
Array = np.ndarray[Any, np.dtype[np.float64]]


def results(run: Path) -> dict[str, Any]:
    """All figures of a finished run.

    Args:
        run: The run's folder, which holds `manifest.json`.

    Returns:
        `languages`, `methods` (per method: per language and `average`, with accuracy, macro-F1, gold log-likelihood,
        difference to Eng-FT with interval and p, gap closed), `selections`, `references`, `absent`, and the experiment.

    Raises:
        UserError: This is not a run, or it is not finished.
    """
    path = run / "manifest.json"
    if not path.is_file():
        raise UserError(
            "this folder is not a finished run", where=run, remedy="give the --out folder of `lingraft run`"
        )
    manifest = read_json(path)
    store, experiment = run.absolute() / manifest["store"], manifest["experiment"]
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in manifest["cells"]:
        cells.setdefault((cell["method"], cell["language"]), []).append(cell)
    right = {key: _right(store, group) for key, group in cells.items()}
    names = list(dict.fromkeys(method for method, _ in cells))
    table = {name: _method(name, experiment, cells, right, store) for name in names}
    return {
        "manifest": digest_bytes(path),
        "name": experiment["name"],
        "experiment": experiment,
        "backbone": manifest["backbone"],
        "source": experiment["source"],
        "targets": experiment["targets"],
        "seeds": experiment["seeds"],
        "items": {language: len(right[m, language][0]) for (m, language) in right},
        "chance_and_size_warning": experiment.get("note"),
        "methods": table,
        "selections": {name: read_json(store / place) for name, place in manifest["selections"].items()},
        "references": [
            {k: c[k] for k in ("language", "seed")} | read_json(store / c["path"]) for c in manifest["comparisons"]
        ],
        "absent": manifest["absent"],
        "adapters": _adapters(manifest, store),
    }


def _adapters(manifest: dict[str, Any], store: Path) -> list[dict[str, Any]]:
    grafts = {name for name, row in METHODS.items() if row.adapter == "graft" and not name.startswith("control")}
    return [
        {
            "method": c["method"],
            "language": c["language"],
            "seed": c["seed"],
            "path": os.path.normpath(store / c["adapter"]),
        }
        for c in manifest["cells"]
        if c["method"] in grafts
    ]


def _right(store: Path, group: Sequence[dict[str, Any]]) -> tuple[list[str], Array]:
    """The items' ids, and the share of seeds that answered each rightly."""
    ids: list[str] = []
    columns: list[list[float]] = []
    for cell in group:
        predictions = sorted(read_predictions(store / cell["predict"]), key=lambda p: p.id)
        ids = [p.id for p in predictions]
        columns.append([float(p.answer == p.gold) for p in predictions])
    return ids, np.array(columns).mean(axis=0)


def _method(
    name: str,
    experiment: dict[str, Any],
    cells: dict[tuple[str, str], list[dict[str, Any]]],
    right: dict[tuple[str, str], tuple[list[str], Array]],
    store: Path,
) -> dict[str, Any]:
    languages: dict[str, Any] = {}
    for language in [experiment["source"], *experiment["targets"]]:
        if (name, language) not in cells:
            continue
        scores = [read_scores(store / cell["score"]) for cell in cells[name, language]]
        values = [s["accuracy"]["value"] for s in scores]
        languages[language] = {
            "accuracy": float(np.mean(values)),
            "interval": list(mean_interval(right[name, language][1])),
            "by_seed": values,
            "macro_f1": float(np.mean([s["macro_f1"]["value"] for s in scores])),
            "gold_log_likelihood": float(np.mean([s["gold_log_likelihood"]["value"] for s in scores])),
            **_against_baseline(name, [language], right),
        }
    targets = [t for t in experiment["targets"] if (name, t) in right]
    complete = len(targets) == len(experiment["targets"])
    average = None
    if complete:
        own = np.array([languages[t]["accuracy"] for t in targets])
        average = {
            "accuracy": float(own.mean()),
            "interval": _average_interval(name, targets, right),
            **_against_baseline(name, targets, right),
        }
    return {
        "title": METHODS[name].title,
        "says": METHODS[name].says,
        "languages": languages,
        "average": average,
    }


def _aligned(
    names: Sequence[str], languages: Sequence[str], right: dict[tuple[str, str], tuple[list[str], Array]]
) -> Array | None:
    """Items × (method × language) where all the languages hold the same items; None where they do not."""
    ids = [right[name, language][0] for name in names for language in languages]
    if any(other != ids[0] for other in ids[1:]):
        return None
    return np.stack([right[name, language][1] for name in names for language in languages], axis=1)


def _average_interval(
    name: str, languages: Sequence[str], right: dict[tuple[str, str], tuple[list[str], Array]]
) -> list[float] | None:
    columns = _aligned([name], languages, right)
    return None if columns is None else list(mean_interval(columns))


def _against_baseline(
    name: str, languages: Sequence[str], right: dict[tuple[str, str], tuple[list[str], Array]]
) -> dict[str, Any]:
    """Difference to Eng-FT with interval and p, and the gap closed where Tgt-FT exists."""
    if name == BASELINE or any((m, t) not in right for m in (name, BASELINE) for t in languages):
        return {}
    pair = _aligned([name, BASELINE], languages, right)
    if pair is None:
        # Items that are not translations of each other: languages cannot be resampled together.
        return {}
    n = len(languages)
    differences = pair[:, :n] - pair[:, n:]
    found: dict[str, Any] = {
        "difference": float(differences.mean()),
        "difference_interval": list(mean_interval(differences)),
        "p": paired_test(differences),
    }
    if name != CEILING and METHODS[name].adapter != "none" and all((CEILING, t) in right for t in languages):
        three = _aligned([name, BASELINE, CEILING], languages, right)
        if three is not None:
            found["gap_closed"] = _gap_closed(three, n)
    return found


def _gap_closed(columns: Array, n: int) -> dict[str, Any]:
    """(method − Eng-FT) / (Tgt-FT − Eng-FT), a ratio of sums over languages."""

    def ratio(means: Array) -> Array:
        gained = (means[..., :n] - means[..., n : 2 * n]).sum(axis=-1)
        gap = (means[..., 2 * n :] - means[..., n : 2 * n]).sum(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(gap > 0, gained / gap, np.nan)

    value = float(ratio(columns.mean(axis=0)))
    if not np.isfinite(value):
        return {"value": None, "interval": None, "why": "there is no gap: Tgt-FT is not above Eng-FT"}
    return {"value": value, "interval": list(statistic_interval(columns, ratio))}
