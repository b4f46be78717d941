"""Intervals and tests. Items that are translations of one another are one cluster: items are drawn, not item × language."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Any

import numpy as np

DRAWS = 10_000
LEVEL = 0.05
"""What an adjusted p stays below where a difference is called significant."""
Values = np.ndarray[Any, np.dtype[np.float64]]

_TOGETHER = 64
"""Columns in one product of matrices."""
_MOST_BYTES = 1 << 28
"""Of random draws that are kept: a table's cells have nearly all the same number of items."""
_KEPT: OrderedDict[tuple[str, int, int, int], Values] = OrderedDict()
_KEEPING = Lock()


def draws(items: int, seed: int = 0, count: int = DRAWS) -> Values:
    """How often each item is drawn in each bootstrap sample: count × items, every row summing to `items`. Not to be written to."""
    return _kept("draws", items, seed, count, _drawn)


def _drawn(items: int, seed: int, count: int) -> Values:
    rng = np.random.default_rng(seed)
    return rng.multinomial(items, np.full(items, 1 / items), size=count).astype(np.float64)


def _signs(items: int, seed: int, count: int) -> Values:
    """A sign for each item of each permutation: count × items of 1 and −1."""
    signs: Any = np.random.default_rng(seed).integers(0, 2, size=(count, items)) * 2.0 - 1.0
    return signs


def _kept(what: str, items: int, seed: int, count: int, make: Callable[[int, int, int], Values]) -> Values:
    """Random numbers that depend on these three alone, kept while there is room; the ones used longest ago go first."""
    key = (what, items, seed, count)
    with _KEEPING:
        if key in _KEPT:
            _KEPT.move_to_end(key)
            return _KEPT[key]
    found = make(items, seed, count)
    found.setflags(write=False)
    with _KEEPING:
        if found.nbytes <= _MOST_BYTES:
            _KEPT[key] = found
        while sum(values.nbytes for values in _KEPT.values()) > _MOST_BYTES:
            _KEPT.popitem(last=False)
    return found


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
    return mean_intervals([values], seed)[0]


def mean_intervals(values: Sequence[Values], seed: int = 0) -> list[tuple[float, float]]:
    """As `mean_interval`, of several: those of one number of items are had together, which is much faster.

    The intervals are bit for bit what they are one by one.
    """
    per_item = [_per_item(v) for v in values]
    found: list[tuple[float, float]] = [(float("nan"), float("nan"))] * len(values)
    for place, sums in _drawn_sums("draws", per_item, seed, DRAWS):
        found[place] = interval(sums / len(per_item[place]))
    return found


def _per_item(values: Values) -> Values:
    return values.reshape(len(values), -1).mean(axis=1)


def _drawn_sums(what: str, columns: Sequence[Values], seed: int, count: int) -> Iterator[tuple[int, Values]]:
    """For each column its place and its sums by draw, or by draw of signs.

    Whole numbers are added up exactly in any order, so that many columns go into one product of matrices; of others the
    order, and with it the last digit, is kept by taking one after the other.
    """
    sizes: dict[int, list[int]] = {}
    for place, column in enumerate(columns):
        sizes.setdefault(len(column), []).append(place)
    for items, places in sizes.items():
        drawn = draws(items, seed, count) if what == "draws" else _kept("signs", items, seed, count, _signs)
        exact = [place for place in places if (columns[place] == np.rint(columns[place])).all()]
        for start in range(0, len(exact), _TOGETHER):
            some = exact[start : start + _TOGETHER]
            # A row a column: what is looked at next lies side by side.
            sums = np.stack([columns[place] for place in some]) @ drawn.T
            yield from zip(some, sums, strict=True)
        for place in set(places) - set(exact):
            yield place, drawn @ columns[place]


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
    return paired_tests([differences], seed, count)[0]


def paired_tests(differences: Sequence[Values], seed: int = 0, count: int = DRAWS) -> list[float]:
    """As `paired_test`, of several, bit for bit what they are one by one: see `mean_intervals`."""
    per_item = [_per_item(d) for d in differences]
    found = [1.0] * len(differences)
    for place, sums in _drawn_sums("signs", per_item, seed, count):
        as_large = np.count_nonzero(np.abs(sums) >= abs(per_item[place].sum()) - 1e-12)
        found[place] = float((as_large + 1) / (count + 1))
    return found


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p-values of a family such that the chance of any false finding in it stays below the level.

    The k-th smallest of m is multiplied by m − k + 1 (k from 1); none becomes smaller than one before it, and none exceeds 1
    (Holm 1979). Nothing is assumed about how the tests depend on one another.

    Args:
        ps: The raw p-values of all tests of the family.

    Returns:
        The adjusted ones, in the same order.
    """
    found, highest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda n: ps[n])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[place]))
        found[place] = highest
    return found
