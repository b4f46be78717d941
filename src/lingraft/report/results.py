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
from lingraft.predictions import read_scores
from lingraft.remote import shown, url_of
from lingraft.report.readings import Readings, opened
from lingraft.report.tables import METRICS
from lingraft.significance import mean_interval, mean_intervals, paired_tests, statistic_interval
from lingraft.store import Store, open_store, read_json

BASELINE, CEILING = "eng-ft", "tgt-ft"
UNFUSED = "translate-train"
"""What second stages are measured against: the same training, in which nothing is mixed."""
MANIFEST = "manifest.json"
FORMAT = 2
"""Of the manifest."""
_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "memory")
"""Where a manifest may say that its store is, other than a folder: not whatever host a stranger likes to be asked."""
Array = np.ndarray[Any, np.dtype[np.float64]]


def results(run: Path, *, keep: bool = False) -> dict[str, Any]:
    """All figures of a finished run; whatever is read of its store is verified anew.

    Args:
        run: The run's folder, which holds `manifest.json`.
        keep: Whether the answers are wanted again: `examples` then need not read them once more.

    Returns:
        `metric`, what a `value` is; `languages`, `methods` (per method: per language, `average` over all targets that have
        data and over each of the `groups`, with `value`, difference to Eng-FT with interval and p, gap closed, and below
        `also` every other figure), `selections` (per method, for all targets or per target), `references`, `absent`, and the
        experiment. Second stages have their difference to the one without fusion below `against_unfused`.

    Raises:
        UserError: This is not a run, or it is not finished.
    """
    manifest = manifest_of(run)
    experiment = manifest["experiment"]
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in manifest["cells"]:
        cells.setdefault((cell["method"], cell["language"]), []).append(cell)
    metric = metric_of(manifest)
    store = opened(run, store_of(run, manifest), metric, anew=True)
    right = {key: _right(store, group, keep) for key, group in cells.items()}
    # Those without data anywhere have a row too, which says so.
    asked = [method(name).name for name in experiment.get("methods", ())]
    names = dict.fromkeys([*asked, *(name for name, _ in cells)])
    experiment = _with_data(experiment, {language for _, language in cells})
    table = {name: _method(name, metric, experiment, cells, right, store) for name in names}
    return {
        "manifest": digest_bytes(run / MANIFEST),
        "name": experiment["name"],
        "metric": metric,
        "experiment": manifest["experiment"],
        "backbone": manifest["backbone"],
        "source": experiment["source"],
        "targets": manifest["experiment"]["targets"],
        "seeds": experiment["seeds"],
        "items": {language: max(len(r.ids) for (_, c), r in right.items() if c == language) for (_, language) in right},
        "samples": _samples(right),
        "chance_and_size_warning": experiment.get("note"),
        "methods": table,
        "selections": _selections(manifest["selections"], store),
        "references": [
            {k: c[k] for k in ("language", "seed")} | read_json(store.file(c["path"])) for c in manifest["comparisons"]
        ],
        "absent": manifest["absent"],
        "adapters": _adapters(manifest, store),
    }


def manifest_of(run: Path) -> dict[str, Any]:
    """What a finished run wrote for its report.

    Raises:
        UserError: This is not a run, or it is not finished, or another version of lingraft wrote it.
    """
    path = run / MANIFEST
    if not path.is_file():
        raise UserError(
            "this folder is not a finished run", where=run, remedy="give the --out folder of `lingraft run`"
        )
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            "this run was written by another version of lingraft",
            where=run,
            remedy="give its `lingraft run` command again: what is finished is kept",
        )
    manifest = {"steps": [], "metric": "accuracy", **manifest}
    if not _is_like(manifest, _MANIFEST) or manifest["metric"] not in METRICS:
        raise UserError(
            "the run's manifest is not one that lingraft wrote",
            where=path,
            remedy="give its `lingraft run` command again: what is finished is kept",
        )
    return manifest


_MANIFEST: dict[str, Any] = {
    "experiment": {"name": str, "task": str, "source": str, "targets": [str], "seeds": [int]},
    "backbone": {"name": str, "digest": str},
    "metric": str,
    "store": str,
    "cells": [{"method": str, "language": str, "seed": int, "predict": str, "score": str}],
    "selections": [{"method": str, "path": str}],
    "comparisons": [{"language": str, "seed": int, "path": str}],
    "absent": [(str, str, str)],
    "steps": [str],
}
"""What is read of a manifest, which may be somebody else's."""


def _is_like(value: Any, shape: Any) -> bool:
    """Whether a value of JSON has a shape: a type; keys that a table must have; what every entry of a list is like; a tuple's."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and _is_like(value[key], of) for key, of in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(_is_like(entry, shape[0]) for entry in value)
    if isinstance(shape, tuple):
        return isinstance(value, list) and len(value) == len(shape) and all(map(_is_like, value, shape))
    return isinstance(value, shape)


def metric_of(manifest: dict[str, Any]) -> str:
    """What a run's answers are measured by."""
    return str(manifest.get("metric", "accuracy"))


def store_of(run: Path, manifest: dict[str, Any]) -> Store:
    """The store that a run's manifest names: a folder, seen from the run's, or a URL."""
    where = str(manifest["store"])
    if (url := url_of(where)) and url.partition("://")[0] not in _STORES:  # The manifest may be somebody else's.
        raise UserError(
            f"the run's manifest leads to {shown(url)}",
            where=run,
            remedy="a report reads folders and " + ", ".join(_STORES) + "; fetch the store, and run again with it",
        )
    return open_store(where if url_of(where) else run.absolute() / where)


def _samples(right: "Answered") -> dict[str, dict[str, int]]:
    """The methods that were asked on fewer items than others: by method and language, on how many."""
    most = {language: max(len(r.ids) for (_, c), r in right.items() if c == language) for (_, language) in right}
    found: dict[str, dict[str, int]] = {}
    for (name, language), answers in right.items():
        if len(answers.ids) < most[language]:
            found.setdefault(name, {})[language] = len(answers.ids)
    return found


def _with_data(experiment: dict[str, Any], languages: set[str]) -> dict[str, Any]:
    """The experiment less the targets for which there are no data at all: nothing is averaged over them."""
    groups = experiment.get("groups") or {}
    return {
        **experiment,
        "targets": [code for code in experiment["targets"] if code in languages],
        "groups": {group: [code for code in codes if code in languages] for group, codes in groups.items()},
    }


def _adapters(manifest: dict[str, Any], store: Readings) -> list[dict[str, Any]]:
    names = {c["method"] for c in manifest["cells"]}
    made = {name for name in names if method(name).adapter in ("graft", "second") and not name.startswith("control")}
    return [
        {
            "method": c["method"],
            "language": c["language"],
            "seed": c["seed"],
            "path": os.path.normpath(_adapter(store, c["adapter"])),
        }
        for c in manifest["cells"]
        if c["method"] in made and c["adapter"]
    ]


def _adapter(store: Readings, place: str) -> Path:
    """Where an adapter is; one that is elsewhere is fetched. Figures do not need it, so it is not read here."""
    return store.folder(place) if store.store.remote else store.store.path(*place.split("/", 1))


def _selections(entries: Sequence[dict[str, Any]], store: Readings) -> dict[str, Any]:
    """The choices of λ by method: one for all targets, or below `by_language` one for each."""
    found: dict[str, Any] = {}
    for entry in entries:
        chosen = read_json(store.file(entry["path"]))
        if entry["language"] is None:
            found[entry["method"]] = chosen
        else:
            found.setdefault(entry["method"], {"by_language": {}})["by_language"][entry["language"]] = chosen
    return found


@dataclass(frozen=True)
class _Answers:
    """What a method's answers in a language are worth, from 0 to 1: items × seeds."""

    ids: list[str]
    seeds: list[int]
    right: Array

    def mean(self, seeds: Sequence[int] | None = None) -> Array:
        """Every item's mean over seeds: all of them, or those given that are here."""
        chosen = [n for n, seed in enumerate(self.seeds) if seeds is None or seed in seeds]
        return self.right[:, chosen or slice(None)].mean(axis=1)


Answered = dict[tuple[str, str], _Answers]
"""By method and language."""


def _right(store: Readings, group: Sequence[dict[str, Any]], keep: bool) -> _Answers:
    ids: list[str] = []
    columns: list[list[float]] = []
    first = min(cell["seed"] for cell in group)
    for cell in group:
        # The lowest seed's answers are those that are shown.
        values = store.values(cell["predict"], cell["score"], keep=keep and cell["seed"] == first)
        ids = sorted(values)
        columns.append([values[name] for name in ids])
    return _Answers(ids, [cell["seed"] for cell in group], np.array(columns).T)


def _method(
    name: str,
    metric: str,
    experiment: dict[str, Any],
    cells: dict[tuple[str, str], list[dict[str, Any]]],
    right: Answered,
    store: Readings,
) -> dict[str, Any]:
    languages: dict[str, Any] = {}
    here = [code for code in (experiment["source"], *experiment["targets"]) if (name, code) in cells]
    intervals = mean_intervals([right[name, code].mean() for code in here])
    compared = _against_baseline(name, [[code] for code in here], right)
    for language, bounds, against in zip(here, intervals, compared, strict=True):
        scores = [read_scores(store.folder(cell["score"])) for cell in cells[name, language]]
        values = [s[metric]["value"] for s in scores]
        languages[language] = {
            "value": float(np.mean(values)),
            "interval": list(bounds),
            "by_seed": values,
            "also": _also(scores, metric),
            **against,
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


def _also(scores: Sequence[dict[str, Any]], metric: str) -> dict[str, float]:
    """Every figure beside the metric, means over seeds."""
    names = [n for n, figure in scores[0].items() if isinstance(figure, dict) and n != metric]
    return {n: float(np.mean([s[n]["value"] for s in scores])) for n in names if all(n in s for s in scores)}


def _together(
    name: str,
    targets: Sequence[str],
    languages: dict[str, Any],
    right: Answered,
) -> dict[str, Any] | None:
    """A method's figures over several languages; None where it has none in one of them."""
    if not targets or any((name, target) not in right for target in targets):
        return None
    return {
        "value": float(np.mean([languages[t]["value"] for t in targets])),
        "interval": _average_interval(name, targets, right),
        **_against_baseline(name, [targets], right)[0],
    }


def _aligned(
    parts: Sequence[tuple[str, Sequence[int] | None]], languages: Sequence[str], right: Answered
) -> Array | None:
    """Items × (part × language), a part being a method and the seeds to take; None where languages hold other items.

    A method that was asked on a sample of the items is compared on the sample.
    """
    found = [(right[name, language], seeds) for name, seeds in parts for language in languages]
    fewest = min((answers.ids for answers, _ in found), key=len)
    columns: list[Array] = []
    for answers, seeds in found:
        place = {name: n for n, name in enumerate(answers.ids)}
        if not place.keys() >= set(fewest):
            return None
        columns.append(answers.mean(seeds)[[place[name] for name in fewest]])
    return np.stack(columns, axis=1)


def _average_interval(name: str, languages: Sequence[str], right: Answered) -> list[float] | None:
    columns = _aligned([(name, None)], languages, right)
    return None if columns is None else list(mean_interval(columns))


def _against_baseline(name: str, lists: Sequence[Sequence[str]], right: Answered) -> list[dict[str, Any]]:
    """Over each list of languages: the difference to Eng-FT with interval and p, and the gap closed where Tgt-FT exists.

    Always of the same seeds; nothing where there is no Eng-FT, or languages hold items of their own.
    """

    def all_have(names: Sequence[str], languages: Sequence[str]) -> bool:
        return all((m, t) in right for m in names for t in languages)

    known = [n for n, languages in enumerate(lists) if name != BASELINE and all_have((name, BASELINE), languages)]
    found: list[dict[str, Any]] = [{} for _ in lists]
    for n, difference in zip(known, _differences(name, BASELINE, [lists[n] for n in known], right), strict=True):
        found[n] = difference
    known = [n for n in known if found[n]]
    if method(name).adapter == "second" and name != UNFUSED:
        some = [n for n in known if all_have((UNFUSED,), lists[n])]
        for n, difference in zip(some, _differences(name, UNFUSED, [lists[n] for n in some], right), strict=True):
            found[n]["against_unfused"] = difference
    if name != CEILING and method(name).adapter != "none":
        for n in known:
            if all_have((CEILING,), lists[n]):
                found[n] |= _gap(name, lists[n], right)
    return found


def _gap(name: str, languages: Sequence[str], right: Answered) -> dict[str, Any]:
    """The gap closed over some languages; nothing where they hold items of their own."""
    seeds, ceiling = right[name, languages[0]].seeds, right[CEILING, languages[0]].seeds
    four = _aligned([(name, None), (BASELINE, seeds), (CEILING, None), (BASELINE, ceiling)], languages, right)
    return {} if four is None else {"gap_closed": _gap_closed(four, len(languages))}


def _differences(name: str, other: str, lists: Sequence[Sequence[str]], right: Answered) -> list[dict[str, Any]]:
    """How a method differs from another of the same seeds, over each list; nothing where languages hold items of their own.

    Items that are not translations of each other cannot be resampled together.
    """
    between: dict[int, Array] = {}
    for n, languages in enumerate(lists):
        seeds = right[name, languages[0]].seeds if method(name).adapter != "none" else None
        pair = _aligned([(name, None), (other, seeds)], languages, right)
        if pair is not None:
            between[n] = pair[:, : len(languages)] - pair[:, len(languages) :]
    values = list(between.values())
    bounds = dict(zip(between, mean_intervals(values), strict=True))
    ps = dict(zip(between, paired_tests(values), strict=True))
    return [
        {"difference": float(between[n].mean()), "difference_interval": list(bounds[n]), "p": ps[n]}
        if n in between
        else {}
        for n in range(len(lists))
    ]


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
