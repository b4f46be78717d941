"""How a method's weight does on the development languages: what a choice is made by, language by language, with intervals."""

from typing import Any

import numpy as np

from lingraft.errors import StoreError
from lingraft.languages import name_of
from lingraft.methods import method
from lingraft.metrics import Generated
from lingraft.plan import Plan, Step
from lingraft.predictions import read_generated, read_predictions
from lingraft.report.tables import Table, percent
from lingraft.significance import mean_interval
from lingraft.store import Store

Array = np.ndarray[Any, np.dtype[np.float64]]
Scored = dict[str, dict[str, tuple[float, float]]]
"""By language and item: log-likelihood of the gold label and rightness, means over seeds."""


def tuning(plan: Plan, store: Store) -> dict[str, Any]:
    """The curves of every method that chooses its weight by labels; their steps must be finished.

    Returns:
        By method: `neutral`, the weight that is Eng-FT, or of language adapters the source's; `chosen`; and `points`, each with
        its `weight`, `gold_log_likelihood`, `accuracy`, `difference` (mean gold log-likelihood against the neutral weight, nats)
        with its `interval`, and the same `by_language`.
    """
    found: dict[str, Any] = {}
    for (name, language), step in plan.selections.items():
        if language is None and "weights" in step.config:
            found[name] = _curve(step, store)
    return found


def _curve(select: Step, store: Store) -> dict[str, Any]:
    neutral = float(select.config.get("neutral", 0.0))
    scored = {float(weight): _scored(select, repr(weight), store) for weight in select.config["weights"]}
    points = [{"weight": weight, **_point(values, scored[neutral])} for weight, values in scored.items()]
    best = max(points, key=lambda p: (p["gold_log_likelihood"], -abs(p["weight"] - neutral)))
    return {"neutral": neutral, "chosen": best["weight"], "points": points}


def _scored(select: Step, weight: str, store: Store) -> Scored:
    lists: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for role, score in select.inputs.items():
        here, language, split, _ = role.split("/")
        if here != weight:
            continue
        for item, values in _items(score, store):
            lists.setdefault(language, {}).setdefault(f"{split}/{item}", []).append(values)
    return {code: {item: _mean(values) for item, values in items.items()} for code, items in lists.items()}


def _items(score: Step, store: Store) -> list[tuple[str, tuple[float, float]]]:
    """Every item's log-likelihood of the right answer and rightness; of free answers, which are not written here, NaN."""
    predict = score.inputs["predict"]
    folder = store.folder(predict.kind, predict.key)
    if "rule" in score.config:
        return [(g.id, (_given(g), float("nan"))) for g in read_generated(folder)]
    return [(p.id, (p.gold_log_likelihood, float(p.answer == p.gold))) for p in read_predictions(folder)]


def _given(said: Generated) -> float:
    if said.gold_log_likelihood is None:
        raise StoreError(
            f"item {said.id} has no likelihood of its right answer", remedy="delete its folder and run again"
        )
    return said.gold_log_likelihood


def _mean(values: list[tuple[float, float]]) -> tuple[float, float]:
    likelihood, right = np.mean(values, axis=0)
    return float(likelihood), float(right)


def _point(values: Scored, baseline: Scored) -> dict[str, Any]:
    """Means over languages of means over items, as the choice is made; items that are translations are drawn together."""
    by_language = {code: _figures(items, baseline[code]) for code, items in values.items()}
    differences = {code: _differences(items, baseline[code]) for code, items in values.items()}
    ids = [sorted(items) for items in values.values()]
    if all(other == ids[0] for other in ids[1:]):
        bounds = mean_interval(np.stack(list(differences.values()), axis=1))
    else:
        bounds = mean_interval(np.concatenate(list(differences.values())))
    means = {
        m: float(np.mean([np.nan if f[m] is None else f[m] for f in by_language.values()]))
        for m in ("gold_log_likelihood", "accuracy", "difference")
    }
    return {**means, "accuracy": _known(means["accuracy"]), "interval": list(bounds), "by_language": by_language}


def _differences(items: dict[str, tuple[float, float]], baseline: dict[str, tuple[float, float]]) -> Array:
    return np.array([items[i][0] - baseline[i][0] for i in sorted(items)])


def _figures(items: dict[str, tuple[float, float]], baseline: dict[str, tuple[float, float]]) -> dict[str, Any]:
    differences = _differences(items, baseline)
    return {
        "gold_log_likelihood": float(np.mean([v[0] for v in items.values()])),
        "accuracy": _known(float(np.mean([v[1] for v in items.values()]))),
        "difference": float(differences.mean()),
        "interval": list(mean_interval(differences)),
    }


def _known(value: float) -> float | None:
    """None for NaN: free answers are not compared when a weight is chosen."""
    return None if np.isnan(value) else value


def tuning_table(found: dict[str, Any], titles: dict[str, str]) -> Table:
    """Methods × weights: figures over all development languages, then each language's difference."""
    languages = list(dict.fromkeys(c for curve in found.values() for p in curve["points"] for c in p["by_language"]))
    neutral = {name: "source's" if _on_languages(name) else "Eng-FT" for name in found}
    against = " or ".join(dict.fromkeys(neutral.values()))
    header = ["method", "λ", "gold log-likelihood", f"against {against}", "accuracy", *map(name_of, languages), ""]
    rows: list[list[str]] = []
    for name, curve in found.items():
        for point in curve["points"]:
            own = point["weight"] == curve["neutral"]
            mark = " ".join([neutral[name]] * own + ["chosen"] * (point["weight"] == curve["chosen"]))
            rows.append(
                [
                    titles[name],
                    f"{point['weight']:g}",
                    f"{point['gold_log_likelihood']:.4f}",
                    "–" if own else _with_bounds(point),
                    percent(point["accuracy"]),
                    *("–" if own else _with_bounds(point["by_language"][code]) for code in languages),
                    mark,
                ]
            )
    return header, rows


def _on_languages(name: str) -> bool:
    """Whether a weight is one of language adapters, of which 0 is the source's."""
    return method(name).stack is not None


def _with_bounds(point: dict[str, Any]) -> str:
    low, high = point["interval"]
    return f"{point['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
