"""Intervals and tests. Items that are translations of one another are one cluster: items are drawn, not item × language."""

from collections.abc import Callable
from typing import Any

import numpy as np

DRAWS = 10_000
Values = np.ndarray[Any, np.dtype[np.float64]]


def draws(items: int, seed: int = 0, count: int = DRAWS) -> Values:
    """How often each item is drawn in each bootstrap sample: count × items, every row summing to `items`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(items, np.full(items, 1 / items), size=count).astype(np.float64)


def interval(statistics: Values, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrapped statistics; those that are not finite are left out."""
    finite = statistics[np.isfinite(statistics)]
    if finite.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: Values, seed: int = 0) -> tuple[float, float]:
    """The bootstrap interval of a mean of items.

    Args:
        values: items, or items × languages (translations of one item in one row).
        seed: For the draws.
    """
    per_item = values.reshape(len(values), -1).mean(axis=1)
    return interval(draws(len(per_item), seed) @ per_item / len(per_item))


def statistic_interval(columns: Values, statistic: Callable[[Values], Values], seed: int = 0) -> tuple[float, float]:
    """The bootstrap interval of a function of column means.

    Args:
        columns: items × columns.
        statistic: Takes draws × columns of resampled means, gives one value a draw.
        seed: For the draws.
    """
    means = draws(len(columns), seed) @ columns / len(columns)
    return interval(statistic(means))


def paired_test(differences: Values, seed: int = 0, count: int = DRAWS) -> float:
    """The two-sided p of a paired permutation test: the signs of the items' differences are drawn at random.

    Args:
        differences: items, or items × languages, of method minus baseline; a row's sign is drawn once.
        seed: For the signs.
        count: Draws; the smallest p is 1 / (count + 1).
    """
    per_item = differences.reshape(len(differences), -1).mean(axis=1)
    observed = abs(per_item.sum())
    signs = np.random.default_rng(seed).integers(0, 2, size=(count, len(per_item))) * 2.0 - 1.0
    as_large = np.count_nonzero(np.abs(signs @ per_item) >= observed - 1e-12)
    return float((as_large + 1) / (count + 1))
