"""From a run's manifest to its results: means over seeds, intervals over items, differences to Eng-FT, gap closed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lingraft.digests import digest_bytes
from lingraft.errors import UserError
from lingraft.methods import method
from lingraft.predictions import read_predictions, read_scores
from lingraft.significance import mean_interval, paired_test, statistic_interval
from lingraft.store import read_json

BASELINE, CEILING = "eng-ft", "tgt-ft"
FORMAT = 2
"""Of the manifest."""
Array = np.ndarray[Any, np.dtype[np.float64]]


def results(run: Path) -> dict[str, Any]:
    """All figures of a finished run.

    Args:
        run: The run's folder, which holds `manifest.json`.

    Returns:
        `languages`, `methods` (per method: per language, `average` over all targets and over each of the `groups`, with
        accuracy, macro-F1, gold log-likelihood, difference to Eng-FT with interval and p, gap closed), `selections` (per
        method, for all targets or per target), `references`, `absent`, and the experiment.

    Raises:
        UserError: This is not a run, or it is not finished.
    """
    path = run / "manifest.json"
    if not path.is_file():
        raise UserError(
            "this folder is not a finished run", where=run, remedy="give the --out folder of `lingraft run`"
        )
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise UserError(
            "this run was written by another version of lingraft",
            where=run,
            remedy="give its `lingraft run` command again: what is finished is kept",
        )
    store, experiment = run.absolute() / manifest["store"], manifest["experiment"]
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in manifest["cells"]:
        cells.setdefault((cell["method"], cell["language"]), []).append(cell)
    right = {key: _right(store, group) for key, group in cells.items()}
    names = list(dict.fromkeys(name for name, _ in cells))
    table = {name: _method(name, experiment, cells, right, store) for name in names}
    return {
        "manifest": digest_bytes(path),
        "name": experiment["name"],
        "experiment": experiment,
        "backbone": manifest["backbone"],
        "source": experiment["source"],
        "targets": experiment["targets"],
        "seeds": experiment["seeds"],
        "items": {language: len(right[m, language].ids) for (m, language) in right},
        "chance_and_size_warning": experiment.get("note"),
        "methods": table,
        "selections": _selections(manifest["selections"], store),
        "references": [
            {k: c[k] for k in ("language", "seed")} | read_json(store / c["path"]) for c in manifest["comparisons"]
        ],
        "absent": manifest["absent"],
        "adapters": _adapters(manifest, store),
    }


def _adapters(manifest: dict[str, Any], store: Path) -> list[dict[str, Any]]:
    names = {c["method"] for c in manifest["cells"]}
    grafts = {name for name in names if method(name).adapter == "graft" and not name.startswith("control")}
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


def _selections(entries: Sequence[dict[str, Any]], store: Path) -> dict[str, Any]:
    """The choices of λ by method: one for all targets, or below `by_language` one for each."""
    found: dict[str, Any] = {}
    for entry in entries:
        chosen = read_json(store / entry["path"])
        if entry["language"] is None:
            found[entry["method"]] = chosen
        else:
            found.setdefault(entry["method"], {"by_language": {}})["by_language"][entry["language"]] = chosen
    return found


@dataclass(frozen=True)
class _Answers:
    """Which items a method answered rightly in a language: items × seeds."""

    ids: list[str]
    seeds: list[int]
    right: Array

    def mean(self, seeds: Sequence[int] | None = None) -> Array:
        """The share of seeds that answered each item rightly: of all seeds, or of those given that are here."""
        chosen = [n for n, seed in enumerate(self.seeds) if seeds is None or seed in seeds]
        return self.right[:, chosen or slice(None)].mean(axis=1)


Answered = dict[tuple[str, str], _Answers]
"""By method and language."""


def _right(store: Path, group: Sequence[dict[str, Any]]) -> _Answers:
    ids: list[str] = []
    columns: list[list[float]] = []
    for cell in group:
        predictions = sorted(read_predictions(store / cell["predict"]), key=lambda p: p.id)
        ids = [p.id for p in predictions]
        columns.append([float(p.answer == p.gold) for p in predictions])
    return _Answers(ids, [cell["seed"] for cell in group], np.array(columns).T)


def _method(
    name: str,
    experiment: dict[str, Any],
    cells: dict[tuple[str, str], list[dict[str, Any]]],
    right: Answered,
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
            "interval": list(mean_interval(right[name, language].mean())),
            "by_seed": values,
            "macro_f1": float(np.mean([s["macro_f1"]["value"] for s in scores])),
            "gold_log_likelihood": float(np.mean([s["gold_log_likelihood"]["value"] for s in scores])),
            **_against_baseline(name, [language], right),
        }
    row = method(name)
    return {
        "title": row.title,
        "says": row.says,
        "languages": languages,
        "average": _together(name, experiment["targets"], languages, right),
        "groups": {
            group: _together(name, codes, languages, right) for group, codes in experiment.get("groups", {}).items()
        },
    }


def _together(
    name: str,
    targets: Sequence[str],
    languages: dict[str, Any],
    right: Answered,
) -> dict[str, Any] | None:
    """A method's figures over several languages; None where it has none in one of them."""
    if any((name, target) not in right for target in targets):
        return None
    return {
        "accuracy": float(np.mean([languages[t]["accuracy"] for t in targets])),
        "interval": _average_interval(name, targets, right),
        **_against_baseline(name, targets, right),
    }


def _aligned(
    parts: Sequence[tuple[str, Sequence[int] | None]], languages: Sequence[str], right: Answered
) -> Array | None:
    """Items × (part × language), a part being a method and the seeds to take; None where languages hold other items."""
    found = [(right[name, language], seeds) for name, seeds in parts for language in languages]
    if any(answers.ids != found[0][0].ids for answers, _ in found[1:]):
        return None
    return np.stack([answers.mean(seeds) for answers, seeds in found], axis=1)


def _average_interval(name: str, languages: Sequence[str], right: Answered) -> list[float] | None:
    columns = _aligned([(name, None)], languages, right)
    return None if columns is None else list(mean_interval(columns))


def _against_baseline(name: str, languages: Sequence[str], right: Answered) -> dict[str, Any]:
    """Difference to Eng-FT with interval and p, and the gap closed where Tgt-FT exists; always of the same seeds."""
    if name == BASELINE or any((m, t) not in right for m in (name, BASELINE) for t in languages):
        return {}
    seeds = right[name, languages[0]].seeds if method(name).adapter != "none" else None
    pair = _aligned([(name, None), (BASELINE, seeds)], languages, right)
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
    if name != CEILING and method(name).adapter != "none" and all((CEILING, t) in right for t in languages):
        ceiling = right[CEILING, languages[0]].seeds
        four = _aligned([(name, None), (BASELINE, seeds), (CEILING, None), (BASELINE, ceiling)], languages, right)
        if four is not None:
            found["gap_closed"] = _gap_closed(four, n)
    return found


def _gap_closed(columns: Array, n: int) -> dict[str, Any]:
    """(method − Eng-FT) / (Tgt-FT − Eng-FT), a ratio of sums over languages."""

    def ratio(means: Array) -> Array:
        gained = (means[..., :n] - means[..., n : 2 * n]).sum(axis=-1)
        gap = (means[..., 2 * n : 3 * n] - means[..., 3 * n :]).sum(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(gap > 0, gained / gap, np.nan)

    value = float(ratio(columns.mean(axis=0)))
    if not np.isfinite(value):
        return {"value": None, "interval": None, "why": "there is no gap: Tgt-FT is not above Eng-FT"}
    return {"value": value, "interval": list(statistic_interval(columns, ratio))}
