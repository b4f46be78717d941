"""Intervals that cover, tests that reject as often as they say, and languages that are one cluster."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lingraft.significance import (
    draws,
    holm,
    interval,
    mean_interval,
    mean_intervals,
    paired_test,
    paired_tests,
    statistic_interval,
)

FEW = arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.floats(-2, 2, width=16))


@given(st.integers(1, 40), st.integers(0, 3))
def test_every_draw_is_as_large_as_the_sample(items: int, seed: int):
    found = draws(items, seed, count=20)
    assert found.shape == (20, items)
    assert (found.sum(axis=1) == items).all()
    assert (found >= 0).all()


def test_draws_depend_on_the_seed_alone():
    assert (draws(7, 1, 50) == draws(7, 1, 50)).all()
    assert (draws(7, 1, 50) != draws(7, 2, 50)).any()


def test_every_item_is_drawn_once_on_average():
    assert draws(5, 0, 10_000).mean(axis=0) == pytest.approx(np.ones(5), abs=0.05)


def test_the_interval_is_of_the_middle_95_percent():
    assert interval(np.arange(1001.0)) == pytest.approx((25, 975))
    assert interval(np.arange(1001.0), level=0.5) == pytest.approx((250, 750))


def test_what_is_not_finite_is_left_out():
    assert interval(np.array([np.nan, 1.0, np.inf, 1.0])) == (1.0, 1.0)
    assert np.isnan(interval(np.array([np.nan, -np.inf]))).all()


def test_an_interval_covers_the_true_mean_about_as_often_as_it_says():
    samples = np.random.default_rng(0).random((300, 60)) < 0.6
    means = draws(60, 0, 2_000) @ samples.T.astype(float) / 60
    covered = [low <= 0.6 <= high for low, high in (interval(column) for column in means.T)]
    assert 0.90 <= np.mean(covered) <= 0.98


def test_a_mean_interval_is_near_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(size=200)
    half = 1.96 * values.std() / np.sqrt(200)
    assert mean_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_translations_of_the_same_items_do_not_narrow_the_interval():
    values = (np.random.default_rng(2).random(50) < 0.7).astype(float)
    one = mean_interval(values)
    assert mean_interval(np.stack([values, values], axis=1)) == one
    # Wrongly taken for new items they would.
    low, high = mean_interval(np.concatenate([values, values]))
    assert high - low < 0.85 * (one[1] - one[0])


def test_languages_that_differ_do_narrow_the_interval():
    values = np.random.default_rng(3).random((50, 4))
    (low, high), (low1, high1) = mean_interval(values), mean_interval(values[:, 0])
    assert high - low < 0.7 * (high1 - low1)


def test_the_interval_of_a_constant_is_a_point():
    assert mean_interval(np.ones((5, 2))) == (1.0, 1.0)


def test_the_interval_of_a_statistic_of_one_column_is_that_of_its_mean():
    values = np.random.default_rng(4).random(30)
    found = statistic_interval(values[:, None], lambda means: means[:, 0])
    assert found == pytest.approx(mean_interval(values))


def test_a_ratio_is_resampled_as_a_whole():
    column = np.random.default_rng(5).random(30) + 0.5
    pair = np.stack([column / 2, column], axis=1)
    found = statistic_interval(pair, lambda means: means[:, 0] / means[:, 1])
    assert found == pytest.approx((0.5, 0.5))


def test_no_difference_has_p_one():
    assert paired_test(np.zeros(20)) == 1
    assert paired_test(np.zeros((20, 3))) == 1


def test_a_huge_difference_has_the_smallest_p():
    assert paired_test(np.ones(60), count=999) == pytest.approx(1 / 1000)


def test_few_items_cannot_have_a_small_p():
    # Of the 16 signs of four equal differences, two give a sum as large.
    assert paired_test(np.ones(4)) == pytest.approx(2 / 16, abs=0.01)
    assert paired_test(np.array([1.0, 1.0, 1.0, -1.0])) == pytest.approx(10 / 16, abs=0.02)


@settings(max_examples=30)
@given(FEW)
def test_p_is_the_same_whichever_is_subtracted(differences: np.ndarray):
    p = paired_test(differences, count=200)
    assert p == paired_test(-differences, count=200)
    assert 1 / 201 <= p <= 1


@settings(max_examples=30)
@given(FEW)
def test_a_language_said_twice_is_no_new_evidence(differences: np.ndarray):
    twice = np.concatenate([differences, differences], axis=1)
    assert paired_test(twice, count=200) == paired_test(differences, count=200)


def test_without_a_difference_p_is_below_five_percent_in_about_five_percent():
    random = np.random.default_rng(6)
    below = [paired_test(random.normal(size=20), seed=n, count=400) <= 0.05 for n in range(300)]
    assert 0.02 <= np.mean(below) <= 0.09


# Random numbers that are kept.


def test_kept_draws_are_those_of_the_generator_and_cannot_be_changed():
    first = draws(6, 3, 40)
    expected = np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), size=40)
    assert (first == expected).all()
    assert draws(6, 3, 40) is first
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 9
    assert (draws(6, 3, 41) != 0).any()


def test_a_kept_sign_gives_the_p_of_a_fresh_one():
    values = np.random.default_rng(0).normal(size=30)
    signs = np.random.default_rng(0).integers(0, 2, size=(500, 30)) * 2.0 - 1.0
    expected = (np.count_nonzero(np.abs(signs @ values) >= abs(values.sum()) - 1e-12) + 1) / 501
    assert paired_test(values, count=500) == paired_test(values, count=500) == expected


def test_what_is_kept_has_a_bound(monkeypatch: pytest.MonkeyPatch):
    from lingraft import significance

    monkeypatch.setattr(significance, "_KEPT", type(significance._KEPT)())
    monkeypatch.setattr(significance, "_MOST_BYTES", 800)
    for items in (5, 4, 3, 2, 50):
        draws(items, 0, 10)
    assert sum(values.nbytes for values in significance._KEPT.values()) <= 800
    assert ("draws", 2, 0, 10) in significance._KEPT
    assert ("draws", 5, 0, 10) not in significance._KEPT


# Several at once.


def plain_interval(values: np.ndarray) -> tuple[float, float]:
    """One by one, with nothing kept: what figures were made with before there was anything faster."""
    per_item = values.reshape(len(values), -1).mean(axis=1)
    drawn = np.random.default_rng(0).multinomial(len(per_item), np.full(len(per_item), 1 / len(per_item)), size=10_000)
    return interval(drawn.astype(np.float64) @ per_item / len(per_item))


def plain_test(values: np.ndarray) -> float:
    per_item = values.reshape(len(values), -1).mean(axis=1)
    signs = np.random.default_rng(0).integers(0, 2, size=(10_000, len(per_item))) * 2.0 - 1.0
    as_large = np.count_nonzero(np.abs(signs @ per_item) >= abs(per_item.sum()) - 1e-12)
    return float((as_large + 1) / 10_001)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32), st.booleans()), max_size=6))
@settings(deadline=None, max_examples=25)
def test_several_are_bit_for_bit_what_they_are_one_by_one(shapes: list[tuple[int, int, int, bool]]):
    values = []
    for items, languages, seed, whole in shapes:
        random = np.random.default_rng(seed)
        values.append(random.integers(-1, 2, (items, languages)) / (1 if whole else 3))
    assert mean_intervals(values) == [plain_interval(v) for v in values]
    assert paired_tests(values) == [plain_test(v) for v in values]


def test_many_of_one_size_are_too():
    random = np.random.default_rng(0)
    values = [random.integers(-1, 2, 40).astype(float) for _ in range(66)] + [random.random(40)]
    assert mean_intervals(values) == [plain_interval(v) for v in values]
    assert paired_tests(values) == [plain_test(v) for v in values]


# Holm.

PS = st.lists(st.floats(0, 1), max_size=12)


@given(PS)
def test_holm_is_monotone_no_smaller_than_the_raw_and_at_most_one(ps: list[float]):
    found = holm(ps)
    assert len(found) == len(ps)
    assert all(raw <= adjusted <= 1 for raw, adjusted in zip(ps, found, strict=True))
    ranked = sorted(zip(ps, found, strict=True))
    assert [adjusted for _, adjusted in ranked] == sorted(found)


@given(PS, st.randoms(use_true_random=False))
def test_holm_does_not_depend_on_the_order(ps: list[float], random):
    order = list(range(len(ps)))
    random.shuffle(order)
    assert holm([ps[n] for n in order]) == [holm(ps)[n] for n in order]


@given(st.floats(0, 1))
def test_holm_leaves_a_single_p(p: float):
    assert holm([p]) == [p]


@given(PS)
def test_holm_is_between_the_raw_and_bonferroni(ps: list[float]):
    assert all(adjusted <= min(1.0, len(ps) * raw) for raw, adjusted in zip(ps, holm(ps), strict=True))


def test_holm_on_paper():
    # 0.01 · 4, then 0.02 · 3, then 0.03 · 2 (no smaller than the one before), then 0.5.
    assert holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert holm([0.2, 0.2, 0.2]) == pytest.approx([0.6, 0.6, 0.6])
    assert holm([]) == []


def test_under_no_difference_holm_rarely_finds_one():
    random = np.random.default_rng(5)
    families = [holm(list(random.random(20))) for _ in range(400)]
    assert np.mean([min(family) < 0.05 for family in families]) < 0.08
