"""What every rule computes: the formulas in float64 over random inputs, the guards, and what the guards must not do."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lingraft.algebra import Site, transfer
from lingraft.errors import AdapterError, UserError
from lingraft.families import FAMILIES, bottleneck, family, ia3, invertible, lora, own_space, prefix
from lingraft.families.measures import distance, inner_product
from lingraft.families.pseudoinverse import RCOND
from lingraft.families.sparse import Sparse, dense

LIBRARIES: dict[str, Callable[[np.ndarray], Any]] = {"numpy": np.asarray, "torch": torch.from_numpy}
SEEDS = st.integers(0, 2**32 - 1)
WEIGHTS = st.floats(0.01, 3)
QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)
FLOOR, BOUND = 0.1, 10.0


def normal(seed: int, *shape: int, centre: float = 0.0) -> np.ndarray:
    return centre + np.random.default_rng(seed).normal(size=shape)


def three(make: Callable[[int], dict[str, np.ndarray]], seed: int) -> tuple[Site, Site, Site]:
    """Task, target reference, source reference."""
    return Site(make(seed)), Site(make(seed + 1)), Site(make(seed + 2))


def assert_equal(found: Site, expected: dict[str, np.ndarray], tolerance: float = 1e-12) -> None:
    assert set(found.tensors) == set(expected)
    for role, right in expected.items():
        left = np.asarray(found.tensors[role], dtype=np.float64)
        assert left.shape == right.shape
        assert np.linalg.norm(left - right) <= tolerance * (1 + np.linalg.norm(right)), role


def vector(values: Any, dtype: Any = np.float64) -> Site:
    return Site({"l": np.array(values, dtype).reshape(-1, 1)})


# (IA)³


@st.composite
def tame(draw: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors that the guard leaves alone: |s| ≥ 0.1 and |t / s| ≤ 10."""
    n = draw(st.integers(1, 8))
    task = draw(arrays(np.float64, n, elements=st.floats(-5, 5)))
    size = draw(arrays(np.float64, n, elements=st.floats(FLOOR, 5)))
    source = size * draw(arrays(np.float64, n, elements=st.sampled_from([-1.0, 1.0])))
    ratio = draw(arrays(np.float64, n, elements=st.floats(-9.999, 9.999)))
    return task, ratio * source, source


@pytest.mark.parametrize("library", LIBRARIES)
def test_ia3_multiplies_by_the_ratio_away_from_the_guard(library: str) -> None:
    @QUICK
    @given(tame(), WEIGHTS)
    def holds(vectors: Any, weight: float) -> None:
        task, target, source = (vector(v).map(LIBRARIES[library]) for v in vectors)
        t, r_t, r_s = (v.reshape(-1, 1) for v in vectors)
        assert_equal(transfer(ia3.RATIO, task, target, source, weight), {"l": t * (1 + weight * (r_t / r_s - 1))})
        ratio = ia3.RATIO.difference(target, source)
        assert_equal(ratio, {"l": r_t / r_s})
        assert_equal(ia3.RATIO.apply(source, ratio), {"l": r_t})
        assert ia3.RATIO.guarded(target, source) == 0

    holds()


@pytest.mark.parametrize(
    ("target", "source", "ratio", "guarded"),
    [
        (0.0, 0.0, 1.0, False),
        (-0.0, 0.0, 1.0, False),
        (0.05, 0.05, 1.0, False),
        (-3.0, -3.0, 1.0, False),
        (0.05, 0.0, 1.5, True),
        (-0.05, 0.0, 0.5, True),
        (0.05, -0.0, 1.5, True),
        (0.05, -0.01, 0.4, True),
        (1.0, 0.0, 10.0, True),
        (-2.0, 0.0, -10.0, True),
        (1.0, 1e-300, 10.0, True),
        (1.0, -1e-300, -9.0, True),
        (5.0, 0.2, 10.0, True),
        (-5.0, 0.2, -10.0, True),
        (2.0, 0.25, 8.0, False),
        (-2.0, 0.25, -8.0, False),
        (0.0, 0.5, 0.0, False),
    ],
)
def test_the_guard_by_hand(target: float, source: float, ratio: float, guarded: bool) -> None:
    x, y = vector([target]), vector([source])
    assert float(ia3.RATIO.difference(x, y).tensors["l"][0, 0]) == pytest.approx(ratio, abs=1e-14)
    assert ia3.RATIO.guarded(x, y) == int(guarded)


FINITE = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**126), max_value=2.0**126),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1e38 / 2, -1e38 / 2, 0.1, -0.1, 1.0]),
    st.floats(-2, 2, width=32),
).map(np.float32)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_no_finite_vectors_give_a_ratio_that_is_not_finite_and_the_guarded_are_counted(library: str) -> None:
    @settings(QUICK, max_examples=200)
    @given(arrays(np.float32, (2, 6), elements=FINITE), WEIGHTS)
    def holds(drawn: np.ndarray, weight: float) -> None:
        target, source = (vector(v, np.float32).map(LIBRARIES[library]) for v in drawn)
        ratio = np.asarray(ia3.RATIO.difference(target, source).tensors["l"])[:, 0]
        assert ratio.dtype == np.float32
        assert np.isfinite(ratio).all() and (np.abs(ratio) <= BOUND).all()
        merged = transfer(ia3.RATIO, vector([1.5] * 6, np.float32).map(LIBRARIES[library]), target, source, weight)
        assert np.isfinite(np.asarray(merged.tensors["l"])).all()
        t, s = drawn.astype(np.float64)
        small = np.abs(drawn[1]) < np.float32(FLOOR)
        unguarded = 1 + (t - s) / np.where(small, np.where(s < 0, -FLOOR, FLOOR), s)
        assume(not (np.abs(np.abs(unguarded) - BOUND) < 1e-5).any())
        hit = (small & (t != s)) | (np.abs(unguarded) > BOUND)
        assert ia3.RATIO.guarded(target, source) == hit.sum()
        np.testing.assert_allclose(ratio, np.clip(unguarded, -BOUND, BOUND), rtol=1e-5, atol=1e-6)

    holds()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_vectors_whose_difference_overflows_have_a_ratio_all_the_same() -> None:
    x, y = vector([3e38, -3e38, 3e38], np.float32), vector([-3e38, 3e38, 1e38], np.float32)
    np.testing.assert_allclose(ia3.RATIO.difference(x, y).tensors["l"][:, 0], [-1, -1, 3], rtol=1e-6)
    assert ia3.RATIO.guarded(x, y) == 0


def test_vectors_around_one_stay_tame_where_the_bare_ratio_does_not() -> None:
    target, source = vector(normal(1, 400_000) * 0.3 + 1), vector(normal(2, 400_000) * 0.3 + 1)
    bare = np.abs(target.tensors["l"] / source.tensors["l"])
    assert bare.max() > 1000
    assert np.abs(ia3.RATIO.difference(target, source).tensors["l"]).max() <= BOUND


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weight", [0.3, 1, 7.0])
def test_equal_ia3_references_return_the_task_bit_for_bit_even_where_they_are_zero(dtype: Any, weight: float) -> None:
    reference = vector([0, -0.0, 1e-30, 0.09, 1, -3, 1e30], dtype)
    task = vector([1, 0, -2, 1e-20, 1 / 3, 1e20, 0.7], dtype)
    merged = transfer(ia3.RATIO, task, reference, reference, weight)
    assert merged.tensors["l"].tobytes() == task.tensors["l"].tobytes()
    assert ia3.RATIO.guarded(reference, reference) == 0


def test_floor_and_bound_are_options() -> None:
    rule = family("ia3", None, floor=0.5, bound=2.0, rcond=None)
    x, y = vector([0.4, 3.0, 3.0]), vector([0.1, 1.0, 2.0])
    np.testing.assert_allclose(rule.difference(x, y).tensors["l"][:, 0], [1.6, 2.0, 1.5])
    assert rule.guarded(x, y) == 2
    assert FAMILIES["ia3"]["ratio"].difference(x, y).tensors["l"][1, 0] == 3


# Prefixes


def prefix_of(m: int, d: int) -> Callable[[int], dict[str, np.ndarray]]:
    return lambda seed: {role: normal(seed + n * 1000, m, d) for n, role in enumerate(("key", "value"))}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_prefix_is_multiplied_from_the_left_by_target_times_inverse_source(library: str) -> None:
    @QUICK
    @given(SEEDS, WEIGHTS, st.integers(1, 6))
    def holds(seed: int, weight: float, m: int) -> None:
        sites = three(prefix_of(m, 40), seed)
        expected, literal = {}, {}
        for role in ("key", "value"):
            t, r_t, r_s = (site.tensors[role] for site in sites)
            d = r_t @ np.linalg.pinv(r_s)
            expected[role] = (np.eye(m) + weight * (d - np.eye(m))) @ t
            literal[role] = weight * d @ t
        there = [site.map(LIBRARIES[library]) for site in sites]
        assert_equal(transfer(prefix.BY_LAYER, *there, weight), expected, 1e-11)
        assert_equal(transfer(prefix.PrefixLiteral(), *there, weight), literal, 1e-11)

    holds()


@QUICK
@given(SEEDS, WEIGHTS)
def test_the_flat_factor_is_one_of_all_tensors_side_by_side(seed: int, weight: float) -> None:
    def make(n: int) -> dict[str, np.ndarray]:
        return {f"{layer}.{role}": normal(n + 7 * layer, 4, 10) for layer in (10, 2) for role in ("value", "key")}

    task, target, source = three(make, seed)
    r_t, r_s = (np.concatenate(list(site.tensors.values()), axis=1) for site in (target, source))
    factor = np.eye(4) + weight * (r_t @ np.linalg.pinv(r_s) - np.eye(4))
    expected = {role: factor @ t for role, t in task.tensors.items()}
    merged = transfer(prefix.FLAT, task, target, source, weight)
    assert_equal(merged, expected, 1e-11)
    assert list(merged.tensors) == list(task.tensors)
    by_layer = transfer(prefix.BY_LAYER, task, target, source, weight)
    assert np.abs(by_layer.tensors["2.key"] - merged.tensors["2.key"]).max() > 1e-3 * weight


def test_with_equal_references_the_left_form_returns_the_task_and_the_right_form_does_not() -> None:
    errors = []
    for seed in range(10):
        task, reference, _ = three(lambda n: {"key": normal(n, 8, 64)}, 10 * seed)
        t, r = task.tensors["key"], reference.tensors["key"]
        ours = transfer(prefix.BY_LAYER, task, reference, reference, 1.0).tensors["key"]
        assert np.linalg.norm(ours - t) <= 1e-15 * np.linalg.norm(t)
        errors.append(np.linalg.norm(t @ (np.linalg.pinv(r) @ r) - t) / np.linalg.norm(t))
    assert np.mean(errors) == pytest.approx(0.93, abs=0.02)  # √(1 − 8/64)


def test_the_printed_form_shrinks_the_task_where_languages_agree() -> None:
    task, reference, _ = three(prefix_of(3, 12), 5)
    for weight in (0.25, 1.0):
        merged = transfer(prefix.PrefixLiteral(), task, reference, reference, weight)
        assert_equal(merged, {role: weight * t for role, t in task.tensors.items()}, 1e-11)


# Bottlenecks


def bottleneck_of(b: int, d: int) -> Callable[[int], dict[str, np.ndarray]]:
    return lambda seed: {
        "down": normal(seed, b, d),
        "down_bias": normal(seed + 100, b),
        "up": normal(seed + 200, d, b),
        "up_bias": normal(seed + 300, d),
    }


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_bottleneck_is_multiplied_on_the_bottlenecks_side_and_its_biases_add(library: str) -> None:
    @QUICK
    @given(SEEDS, WEIGHTS, st.integers(1, 5))
    def holds(seed: int, weight: float, b: int) -> None:
        sites = three(bottleneck_of(b, 40), seed)
        t, r_t, r_s = (site.tensors for site in sites)
        one = np.eye(b)
        down = one + weight * (r_t["down"] @ np.linalg.pinv(r_s["down"]) - one)
        up = one + weight * (np.linalg.pinv(r_s["up"]) @ r_t["up"] - one)
        expected = {
            "down": down @ t["down"],
            "down_bias": t["down_bias"] + weight * (r_t["down_bias"] - r_s["down_bias"]),
            "up": t["up"] @ up,
            "up_bias": t["up_bias"] + weight * (r_t["up_bias"] - r_s["up_bias"]),
        }
        there = [site.map(LIBRARIES[library]) for site in sites]
        assert_equal(transfer(bottleneck.Bottleneck(), *there, weight), expected, 1e-11)

    holds()


# References of which a part says nothing


def with_spectrum(seed: int, d: int, values: list[float]) -> np.ndarray:
    """A thin matrix with these singular values."""
    m = len(values)
    u, _ = np.linalg.qr(normal(seed, m, m))
    v, _ = np.linalg.qr(normal(seed + 1, d, m))
    return (u * np.array(values)) @ v.T


POOR = {
    "one direction missing": ([1.0, 0.5, 0.1, 0.0], 1),
    "just below the cut": ([1.0, 0.5, 0.1, 0.0099], 1),
    "just above the cut": ([1.0, 0.5, 0.1, 0.0101], 0),
    "rank one": ([3.0, 0.0, 0.0, 0.0], 3),
    "nothing at all": ([0.0, 0.0, 0.0, 0.0], 4),
    "nearly nothing": ([1e-9, 1e-9, 1e-9, 1e-9], 4),
    "small but sound": ([1e-4, 1e-4, 5e-5, 5e-5], 0),
}


def poor_sites(rule: Any, values: list[float]) -> tuple[Site, Site, Site]:
    """Sites of a rule whose source reference has matrices of this spectrum."""
    if rule.name.startswith("bottleneck"):
        task, target, source = three(bottleneck_of(4, 20), 3)
        poor = {"down": with_spectrum(8, 20, values), "up": with_spectrum(9, 20, values).T}
        return task, target, Site({**source.tensors, **poor})
    task, target, _ = three(prefix_of(4, 20), 3)
    return task, target, Site({"key": with_spectrum(8, 20, values), "value": with_spectrum(9, 20, values)})


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("rule", [prefix.BY_LAYER, prefix.FLAT, bottleneck.Bottleneck()], ids=str)
@pytest.mark.parametrize(("values", "cut"), POOR.values(), ids=POOR)
def test_a_poor_source_reference_does_no_harm(rule: Any, values: list[float], cut: int, dtype: Any) -> None:
    task, target, source = (site.map(lambda t: t.astype(dtype)) for site in poor_sites(rule, values))
    for weight in (0.5, 2.0):
        same = transfer(rule, task, source, source, weight)
        assert_equal(same, dict(task.tensors), 1e-14 if dtype is np.float64 else 1e-6)
    matrices = [r for r, t in source.tensors.items() if t.ndim == 2]
    if rule is not prefix.FLAT:
        assert rule.guarded(target, source) == cut * len(matrices)
    delta = rule.difference(target, source)
    for role, factor in delta.tensors.items():
        if factor.ndim != 2:
            continue
        assert np.isfinite(factor).all()
        used = matrices if role == "factor" else [role]
        change = sum(np.linalg.norm(target.tensors[r] - source.tensors[r]) ** 2 for r in used) ** 0.5
        great = max(np.linalg.norm(source.tensors[r], 2) for r in used)
        if great < 1e-8:
            assert np.array_equal(factor, np.eye(4))
        else:
            assert np.linalg.norm(factor - np.eye(4), 2) <= 1.01 * change / (RCOND * great)


@pytest.mark.parametrize(("rcond", "cut"), [(0.5, 3), (0.05, 1), (1e-4, 1)])
def test_the_cut_of_the_pseudo_inverse_is_an_option(rcond: float, cut: int) -> None:
    rule = family("prefix", "layer", rcond=rcond)
    task, target, source = poor_sites(rule, [1.0, 0.4, 0.1, 0.0])
    assert rule.guarded(target, source) == 2 * cut
    t, r_t, r_s = (site.tensors["key"] for site in (task, target, source))
    factor = np.eye(4) + (r_t - r_s) @ np.linalg.pinv(r_s, rcond=rcond)
    np.testing.assert_allclose(transfer(rule, task, target, source, 1.0).tensors["key"], factor @ t, atol=1e-10)


def test_where_the_source_says_nothing_the_task_stays() -> None:
    task, target, _ = three(prefix_of(3, 12), 2)
    nothing = task.map(np.zeros_like)
    assert_equal(transfer(prefix.BY_LAYER, task, target, nothing, 1.5), dict(task.tensors), 0)


# The other kinds' rules


ADDITIVE = {
    "ia3/cross": lambda seed: {"l": normal(seed, 6, 1, centre=1)},
    "prefix/cross": prefix_of(3, 8),
    "bottleneck/cross": bottleneck_of(3, 8),
    "invertible/difference": lambda seed: {
        f"{net}.{role}": t for n, net in enumerate("FG") for role, t in bottleneck_of(3, 8)(seed + 50 * n).items()
    },
}


@pytest.mark.parametrize("name", ADDITIVE)
@QUICK
@given(seed=SEEDS, weight=WEIGHTS)
def test_additive_rules_add_the_difference_tensor_by_tensor(name: str, seed: int, weight: float) -> None:
    sites = three(ADDITIVE[name], seed)
    t, r_t, r_s = (site.tensors for site in sites)
    expected = {role: t[role] + weight * (r_t[role] - r_s[role]) for role in t}
    assert_equal(transfer(family(*name.split("/")), *sites, weight), expected)


def lora_of(seed: int, scaling: float) -> Site:
    return Site({"A": normal(seed, 2, 5), "B": normal(seed + 1, 4, 2)}, scaling)


def test_loras_cross_rule_is_the_ratio_on_both_factors() -> None:
    task, target, source = lora_of(1, 2.0), lora_of(3, 1.0), lora_of(5, 4.0)
    merged = transfer(family("lora", "cross"), task, target, source, 0.6)
    units = {"A": (1, 1), "B": (1.0, 4.0)}  # in units of the target's scaling
    expected = {}
    for role, (one, other) in units.items():
        ratio = np.clip(target.tensors[role] * one / (source.tensors[role] * other), -BOUND, BOUND)
        expected[role] = task.tensors[role] * (1 + 0.6 * (ratio - 1))
    assert_equal(merged, expected)
    assert merged.scaling == 2.0


def test_a_lora_that_was_not_trained_gives_cross_ratios_of_one() -> None:
    task, start = lora_of(1, 2.0), Site({"A": normal(3, 2, 5), "B": np.zeros((4, 2))}, 2.0)
    merged = transfer(family("lora", "cross"), task, start, start, 1.0)
    assert all(np.array_equal(merged.tensors[r], t) for r, t in task.tensors.items())


def test_ia3_and_invertible_tables_hold_these_rules() -> None:
    assert {s: own_space(s) for s in FAMILIES} == {
        "lora": "factors",
        "ia3": "ratio",
        "prefix": "layer",
        "bottleneck": "inverse",
        "invertible": "difference",
        "sparse": "difference",
    }
    assert family("invertible") is invertible.DIFFERENCE


# AriMerge


@QUICK
@given(SEEDS, st.floats(0, 1))
def test_arimerge_for_lora_negates_b_alone_in_units_of_the_task(seed: int, weight: float) -> None:
    task, target, source = lora_of(seed, 2.0), lora_of(seed + 2, 0.5), lora_of(seed + 4, 3.0)
    a, b = task.tensors["A"], task.tensors["B"]
    a_t, b_t = target.tensors["A"], target.tensors["B"] * 0.5 / 2
    a_s, b_s = source.tensors["A"], source.tensors["B"] * 3 / 2
    rest = 1 - weight
    merged = lora.analogy(task, target, source, weight)
    assert_equal(merged, {"A": weight * a + rest * (a_t + a_s), "B": weight * b + rest * (b_t - b_s)})
    assert merged.scaling == 2.0


@QUICK
@given(SEEDS, st.floats(0, 1))
def test_arimerge_for_ia3_keeps_what_does_nothing_doing_nothing(seed: int, weight: float) -> None:
    t, r_t, r_s = (normal(seed + n, 5, 1, centre=1) for n in range(3))
    merged = ia3.analogy(vector(t), vector(r_t), vector(r_s), weight)
    assert_equal(merged, {"l": (1 - weight) + weight * t + (1 - weight) * (r_t - r_s)})
    one = vector([1.0] * 5)
    np.testing.assert_allclose(ia3.analogy(one, one, one, weight).tensors["l"], 1, rtol=0, atol=1e-15)


# Sparse differences


def sparse(entries: dict[int, float], shape: tuple[int, ...] = (3, 4)) -> Site:
    indices = np.array(sorted(entries), np.int64)
    values = np.array([entries[i] for i in sorted(entries)], np.float64)
    return Site({"indices": indices, "values": values, "shape": np.array(shape, np.int64)})


SUPPORTS: dict[str, tuple[dict[int, float], dict[int, float], dict[int, float]]] = {
    "disjoint": ({0: 1.0, 5: 2.0}, {1: 3.0, 11: 4.0}, {2: 5.0}),
    "equal": ({1: 1.0, 4: 2.0}, {1: 3.0, 4: -1.0}, {1: 5.0, 4: 0.5}),
    "nested": ({3: 1.0}, {1: 2.0, 3: 4.0, 7: 1.0}, {3: 8.0, 7: 1.0}),
    "references alone": ({0: 1.0}, {9: 2.0, 10: 3.0}, {9: 2.0, 10: 3.0}),
    "no entries in one": ({0: 1.0, 3: 2.0}, {}, {3: 1.0}),
    "no entries in the task": ({}, {4: 1.0}, {4: 3.0, 5: 1.0}),
    "no entries at all": ({}, {}, {}),
    "the last and the first": ({11: 1.0}, {0: 1.0}, {0: 2.0, 11: 2.0}),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("entries", SUPPORTS.values(), ids=SUPPORTS)
def test_sparse_differences_add_on_the_union_of_supports(entries: Any, library: str) -> None:
    sites = [sparse(e) for e in entries]
    merged = transfer(Sparse(), *(site.map(LIBRARIES[library]) for site in sites), 0.5)
    t, r_t, r_s = (dense(site) for site in sites)
    np.testing.assert_allclose(np.asarray(dense(merged)), t + 0.5 * (r_t - r_s), rtol=1e-15)
    assert np.asarray(merged.tensors["indices"]).tolist() == sorted(set().union(*entries))
    assert np.asarray(merged.tensors["indices"]).dtype == np.int64
    assert np.asarray(merged.tensors["shape"]).tolist() == [3, 4]


@QUICK
@given(st.lists(st.dictionaries(st.integers(0, 29), st.floats(-4, 4)), min_size=3, max_size=3), WEIGHTS)
def test_sparse_differences_add_whatever_their_supports(entries: list[dict[int, float]], weight: float) -> None:
    sites = [sparse(e, (5, 6)) for e in entries]
    merged = transfer(Sparse(), *sites, weight)
    t, r_t, r_s = (dense(site) for site in sites)
    np.testing.assert_allclose(dense(merged), t + weight * (r_t - r_s), rtol=1e-14, atol=1e-13)
    indices = merged.tensors["indices"]
    assert (indices[1:] > indices[:-1]).all()
    assert set(indices.tolist()) == set().union(*entries)


def test_sparse_differences_of_different_weights_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"\(3, 4\) and \(4, 3\)"):
        transfer(Sparse(), sparse({0: 1.0}), sparse({0: 1.0}), sparse({0: 1.0}, (4, 3)), 1.0)


# Shapes, options, measures


RULES = [pytest.param(r, id=r.name) for spaces in FAMILIES.values() for r in spaces.values()]


@pytest.mark.parametrize("rule", [p for p in RULES if p.id and p.id.split("/")[0] in ("ia3", "prefix", "bottleneck")])
def test_sites_of_other_shapes_are_refused_with_both(rule: Any) -> None:
    make = {"ia3": ADDITIVE["ia3/cross"], "prefix": prefix_of(3, 8), "bottleneck": bottleneck_of(3, 8)}
    x = Site(make[rule.name.split("/")[0]](1))
    y = x.map(lambda t: t[..., :-1] if t.shape[-1] > 1 else t[:-1])
    with pytest.raises(AdapterError, match="shapes differ"):
        rule.difference(x, y)


@pytest.mark.parametrize(
    ("structure", "guards", "said"),
    [
        ("lora", {"floor": 0.1}, "lora/factors has no 'floor'"),
        ("ia3", {"rcond": 0.1}, "ia3/ratio has no 'rcond'"),
        ("prefix", {"bound": 3.0}, "prefix/layer has no 'bound'"),
        ("ia3", {"floor": 0.0}, "'floor' must be above 0"),
        ("ia3", {"bound": float("inf")}, "'bound' must be above 0 and finite"),
        ("prefix", {"rcond": float("nan")}, "'rcond' must be above 0 and finite"),
        ("bottleneck", {"rcond": -1.0}, "'rcond' must be above 0"),
    ],
)
def test_a_guard_that_a_rule_has_not_or_that_means_nothing_is_refused(
    structure: str, guards: dict[str, float], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        family(structure, None, **guards)


MEASURED: dict[str, Callable[[int], Site]] = {
    "lora": lambda seed: lora_of(seed, 2.0),
    "ia3": lambda seed: vector(normal(seed, 6, centre=1)),
    "prefix": lambda seed: Site(prefix_of(3, 8)(seed)),
    "bottleneck": lambda seed: Site(bottleneck_of(3, 8)(seed)),
    "sparse": lambda seed: sparse({seed: 1.5, seed + 3: -2.0, 7: 1.0}),
}


def changes(structure: str, site: Site) -> np.ndarray:
    if structure == "lora":
        return (site.scaling * site.tensors["B"] @ site.tensors["A"]).ravel()
    if structure == "sparse":
        return dense(site)
    whole = np.concatenate([t.ravel() for t in site.tensors.values()])
    return whole - 1 if structure == "ia3" else whole


@pytest.mark.parametrize("structure", MEASURED)
def test_inner_products_and_distances_are_those_of_the_changes(structure: str) -> None:
    x, y = (MEASURED[structure](seed) for seed in (1, 2))
    a, b = changes(structure, x), changes(structure, y)
    assert inner_product(structure, x, y) == pytest.approx(a @ b)
    assert distance(structure, x, y) == pytest.approx(np.linalg.norm(a - b))
    assert distance(structure, x) == pytest.approx(np.linalg.norm(a))
