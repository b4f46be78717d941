"""The laws of every family in every space, and what LoRA's two spaces compute."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lingraft.algebra import Law, Site, transfer
from lingraft.errors import AdapterError, UserError
from lingraft.families import FAMILIES, family
from lingraft.families.lora import LoraFactors, LoraProduct, compress, effect, inner_product, unstack
from tests.unit.largest import Largest

NUMBERS = st.floats(-8, 8, width=32)
SCALINGS = st.sampled_from([0.125, 2 / 3, 1.0, 2.0, 16 / 8**0.5])
WEIGHTS = st.floats(0, 4)
LIBRARIES: dict[str, Callable[[np.ndarray], Any]] = {"numpy": np.asarray, "torch": torch.from_numpy}


@st.composite
def lora_sites(draw: Any, *, equal_ranks: bool) -> tuple[Site, Site, Site]:
    """Three LoRA sites of one weight: scalings differ, ranks too unless they must be equal."""
    out, width, shared = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    sites = []
    for _ in range(3):
        r = shared if equal_ranks else draw(st.integers(1, 5))
        a = draw(arrays(np.float64, (r, width), elements=NUMBERS))
        b = draw(arrays(np.float64, (out, r), elements=NUMBERS))
        sites.append(Site({"A": a, "B": b}, draw(SCALINGS)))
    return sites[0], sites[1], sites[2]


SIXTY_FOURTHS = st.integers(-512, 512).map(lambda n: n / 64)
"""Numbers whose matrices are not all but singular: what a pseudo-inverse divides by is cut off or well above rounding."""


@st.composite
def same_shapes(draw: Any, shapes: Callable[[int, int], dict[str, tuple[int, ...]]], elements: Any) -> tuple[Site, ...]:
    """Three sites with tensors of the same shapes, of two sizes."""
    found = shapes(draw(st.integers(1, 4)), draw(st.integers(1, 6)))
    return tuple(Site({r: draw(arrays(np.float64, s, elements=elements)) for r, s in found.items()}) for _ in range(3))


def bottleneck_shapes(b: int, d: int) -> dict[str, tuple[int, ...]]:
    return {"down": (b, d), "down_bias": (b,), "up": (d, b), "up_bias": (d,)}


def invertible_shapes(c: int, half: int) -> dict[str, tuple[int, ...]]:
    return {f"{net}.{role}": shape for net in "FG" for role, shape in bottleneck_shapes(c, half).items()}


@st.composite
def sparse_sites(draw: Any) -> tuple[Site, ...]:
    """Three sparse differences of one weight, their supports drawn apart."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    sites = []
    for _ in range(3):
        support = sorted(draw(st.sets(st.integers(0, shape[0] * shape[1] - 1), min_size=1)))
        values = draw(arrays(np.float64, len(support), elements=NUMBERS))
        sites.append(Site({"indices": np.array(support), "values": values, "shape": np.array(shape)}))
    return tuple(sites)


PREFIXES = same_shapes(lambda m, d: {"key": (m, d), "value": (m, d)}, SIXTY_FOURTHS)
VECTORS = same_shapes(lambda n, _: {"l": (n, 1)}, NUMBERS)
BOTTLENECKS = same_shapes(bottleneck_shapes, SIXTY_FOURTHS)

STRATEGIES: dict[str, st.SearchStrategy[Any]] = {
    "lora/factors": lora_sites(equal_ranks=True),
    "lora/product": lora_sites(equal_ranks=False),
    "lora/cross": lora_sites(equal_ranks=True),
    "ia3/ratio": VECTORS,
    "ia3/cross": VECTORS,
    "prefix/layer": PREFIXES,
    "prefix/flat": PREFIXES,
    "prefix/literal": PREFIXES,
    "prefix/cross": PREFIXES,
    "bottleneck/inverse": BOTTLENECKS,
    "bottleneck/cross": BOTTLENECKS,
    "invertible/difference": same_shapes(invertible_shapes, NUMBERS),
    "sparse/difference": sparse_sites(),
}
"""By the family's name: three float64 sites that fit together. A new family needs a line here."""

EVERY_FAMILY = [
    pytest.param(rule, id=f"{structure}/{space}")
    for structure, spaces in FAMILIES.items()
    for space, rule in spaces.items()
]
EVERY_LAW = [
    pytest.param(rule, law, id=f"{structure}/{space}-{law.name}")
    for structure, spaces in FAMILIES.items()
    for space, rule in spaces.items()
    for law in Law
    if law in rule.laws
]


def sites_for(rule: Any) -> st.SearchStrategy[tuple[Site, Site, Site]]:
    if rule.name not in STRATEGIES:
        pytest.fail(f"the family {rule.name} is listed but has no strategy: add one to STRATEGIES in {__file__}")
    return STRATEGIES[rule.name]


def size(site: Site) -> float:
    """A bound of the numbers that the site's effect is summed from: what rounding is relative to."""
    return abs(site.scaling) * float(np.prod([1 + np.linalg.norm(np.asarray(t)) for t in site.tensors.values()]))


def assert_same_effect(rule: Any, x: Site, y: Site, *parts: Site) -> None:
    bound = 1e-12 * (1 + sum(size(site) for site in (x, y, *parts)))
    difference = np.abs(np.asarray(rule.effect(x)) - np.asarray(rule.effect(y)))
    assert difference.shape == tuple(rule.effect(y).shape)
    assert difference.max() <= bound


def assert_law(rule: Any, law: Law, x: Site, y: Site, z: Site, weight: float) -> None:
    d = rule.difference(y, z)
    if law is Law.INVERSE:
        assert_same_effect(rule, rule.apply(z, d), y, z)
    elif law is Law.ZERO:
        assert_same_effect(rule, rule.apply(x, rule.scale(d, 0)), x)
    elif law is Law.UNIT:
        assert_same_effect(rule, rule.scale(d, 1), d)
    elif law is Law.NEUTRAL:
        assert_same_effect(rule, transfer(rule, x, y, y, weight), x, x, y)
    else:
        pytest.fail(f"the law {law} is declared but has no test")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("rule", "law"), EVERY_LAW)
def test_every_family_keeps_the_laws_it_declares(rule: Any, law: Law, library: str) -> None:
    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(sites=sites_for(rule), weight=WEIGHTS)
    def holds(sites: tuple[Site, Site, Site], weight: float) -> None:
        x, y, z = (site.map(LIBRARIES[library]) for site in sites)
        assert_law(rule, law, x, y, z, weight)

    holds()


@pytest.mark.parametrize("rule", EVERY_FAMILY)
def test_every_family_has_a_strategy_a_law_and_its_place_in_the_table(rule: Any) -> None:
    sites_for(rule)
    assert rule.laws
    structure, _, space = rule.name.partition("/")
    assert FAMILIES[structure][space] is rule
    assert family(structure, space) is rule


@pytest.mark.parametrize("rule", EVERY_FAMILY)
def test_numpy_and_torch_agree_and_keep_their_own_arrays(rule: Any) -> None:
    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @given(sites=sites_for(rule), weight=WEIGHTS.filter(bool))
    def agree(sites: tuple[Site, Site, Site], weight: float) -> None:
        ours = transfer(rule, *sites, weight)
        theirs = transfer(rule, *(site.map(torch.from_numpy) for site in sites), weight)
        assert {type(t) for t in ours.tensors.values()} == {np.ndarray}
        assert {type(t) for t in theirs.tensors.values()} == {torch.Tensor}
        assert_same_effect(rule, theirs, ours, *sites)

    agree()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("rule", EVERY_FAMILY)
def test_float32_stays_float32(rule: Any, library: str) -> None:
    def narrow(t: np.ndarray) -> Any:
        return LIBRARIES[library](t.astype(np.float32) if t.dtype.kind == "f" else t)

    @settings(max_examples=5, deadline=None, derandomize=True, database=None)
    @given(sites=sites_for(rule))
    def stays(sites: tuple[Site, Site, Site]) -> None:
        merged = transfer(rule, *(s.map(narrow) for s in sites), 0.3)
        kinds = {
            str(t.dtype).removeprefix("torch.") for r, t in merged.tensors.items() if r not in ("indices", "shape")
        }
        assert kinds == {"float32"}

    stays()


@pytest.mark.parametrize("rule", EVERY_FAMILY)
def test_a_weight_of_zero_returns_the_task_site_itself(rule: Any) -> None:
    task, y, z = gaussian_sites(0, 3, 4, (2, 2, 2))
    assert transfer(rule, task, y, z, 0) is task
    assert transfer(rule, task, y, z, 0.0) is task


@pytest.mark.parametrize("weight", [-1, -1e-9, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rule", EVERY_FAMILY)
def test_a_negative_or_infinite_weight_is_refused(rule: Any, weight: float) -> None:
    with pytest.raises(AdapterError, match="λ must be a finite number"):
        transfer(rule, *gaussian_sites(0, 3, 4, (2, 2, 2)), weight)


def test_an_unknown_structure_or_space_is_an_error_that_names_the_right_word() -> None:
    with pytest.raises(UserError) as wrong_space:
        family("lora", "factor")
    assert "factors" in str(wrong_space.value.remedy)
    with pytest.raises(UserError) as wrong_structure:
        family("lorra", "factors")
    assert "lora" in str(wrong_structure.value.remedy)


def gaussian_sites(seed: int, out: int, width: int, ranks: tuple[int, ...], dtype: Any = np.float64) -> list[Site]:
    """Sites whose scalings all differ."""
    random = np.random.default_rng(seed)
    return [
        Site(
            {"A": random.normal(size=(r, width)).astype(dtype), "B": random.normal(size=(out, r)).astype(dtype)},
            0.5 + n * 0.7,
        )
        for n, r in enumerate(ranks)
    ]


def dense(x: Site) -> np.ndarray:
    return x.scaling * np.asarray(x.tensors["B"], dtype=np.float64) @ np.asarray(x.tensors["A"], dtype=np.float64)


def test_factors_space_merges_a_and_b_separately_in_units_of_the_task() -> None:
    task, t, s = gaussian_sites(3, 5, 6, (2, 2, 2))
    merged = transfer(LoraFactors(), task, t, s, 0.6)
    in_units = [site.tensors["B"] * site.scaling / task.scaling for site in (t, s)]
    assert merged.scaling == task.scaling
    np.testing.assert_allclose(merged.tensors["A"], task.tensors["A"] + 0.6 * (t.tensors["A"] - s.tensors["A"]))
    np.testing.assert_allclose(merged.tensors["B"], task.tensors["B"] + 0.6 * (in_units[0] - in_units[1]), rtol=1e-13)


def test_factors_space_with_equal_scalings_only_subtracts_and_adds() -> None:
    task, t, s = (Site(x.tensors, 2.0) for x in gaussian_sites(4, 5, 6, (2, 2, 2), np.float32))
    merged = transfer(LoraFactors(), task, t, s, 1)
    for role in ("A", "B"):
        expected = task.tensors[role] + (t.tensors[role] - s.tensors[role])
        assert np.array_equal(merged.tensors[role], expected)


@pytest.mark.parametrize("ranks", [(2, 3, 3), (2, 2, 3), (2, 3, 2)])
def test_factors_space_refuses_unequal_ranks_and_says_which_space_takes_them(ranks: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError, match="equal ranks") as refusal:
        transfer(LoraFactors(), *gaussian_sites(0, 4, 5, ranks), 1)
    assert "product" in str(refusal.value.remedy)


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2), (4, 5, 6)])
def test_product_space_is_the_formula_on_weight_updates(ranks: tuple[int, ...]) -> None:
    task, t, s = gaussian_sites(1, 4, 5, ranks)
    merged = transfer(LoraProduct(), task, t, s, 0.7)
    assert merged.tensors["A"].shape[0] == sum(ranks)
    np.testing.assert_allclose(dense(merged), dense(task) + 0.7 * (dense(t) - dense(s)), rtol=0, atol=1e-13)
    np.testing.assert_allclose(effect(merged), dense(merged), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("out", "width", "big_r", "out_rank"),
    [
        (12, 9, 6, 1),
        (12, 9, 6, 3),
        (9, 12, 6, 6),
        (9, 12, 6, 50),
        (4, 9, 6, 3),
        (9, 4, 6, 6),
        (3, 3, 8, 2),
        (1, 5, 3, 2),
    ],
)
def test_compress_is_the_best_approximation_of_its_rank(out: int, width: int, big_r: int, out_rank: int) -> None:
    (x,) = gaussian_sites(5, out, width, (big_r,), np.float32)
    small, kept = compress(x, out_rank)
    u, s, v = np.linalg.svd(dense(x), full_matrices=False)
    k = min(out_rank, big_r, out, width)
    best = (u[:, :k] * s[:k]) @ v[:k]
    assert small.tensors["A"].shape == (k, width)
    assert small.tensors["B"].shape == (out, k)
    assert small.tensors["A"].dtype == small.tensors["B"].dtype == np.float32
    optimum = np.linalg.norm(dense(x) - best)
    exact = k == min(big_r, out, width)  # then the optimum is 0, and only rounding is left
    allowed = 1e-6 * np.linalg.norm(dense(x)) if exact else (1 + 1e-5) * optimum
    assert np.linalg.norm(dense(x) - dense(small)) <= allowed
    assert kept == pytest.approx(np.sum(s[:k] ** 2) / np.sum(s**2), rel=1e-5)


def test_compress_shares_the_singular_values_evenly() -> None:
    (x,) = gaussian_sites(6, 9, 7, (5,))
    small, _ = compress(x, 3)
    gram_a = small.tensors["A"] @ small.tensors["A"].T
    gram_b = small.tensors["B"].T @ small.tensors["B"]
    singular = np.linalg.svd(dense(x), compute_uv=False)[:3]
    np.testing.assert_allclose(gram_a, np.diag(singular), atol=1e-12)
    np.testing.assert_allclose(gram_b, np.diag(singular), atol=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
def test_compress_of_no_update_is_no_update_and_loses_nothing(library: str) -> None:
    nothing = Site({"A": np.ones((3, 4), np.float32), "B": np.zeros((5, 3), np.float32)}, 2.0).map(LIBRARIES[library])
    small, kept = compress(nothing, 2)
    assert kept == 1.0
    assert np.array_equal(np.asarray(effect(small)), np.zeros((5, 4)))


def test_compress_and_inner_product_never_form_the_weight_update() -> None:
    x, y = (site.map(torch.from_numpy) for site in gaussian_sites(7, 40, 50, (3, 4)))
    with Largest() as seen:
        compress(x, 2)
        inner_product(x, y)
    assert seen.elements < 40 * 50 / 2
    with Largest() as seen:
        effect(x)
    assert seen.elements == 40 * 50


def test_compress_in_torch_equals_numpy() -> None:
    (x,) = gaussian_sites(8, 9, 7, (5,))
    ours, kept = compress(x, 3)
    theirs, kept_there = compress(x.map(torch.from_numpy), 3)
    np.testing.assert_allclose(np.asarray(effect(theirs)), effect(ours), atol=1e-12)
    assert kept == pytest.approx(kept_there)


@pytest.mark.parametrize("ranks", [(2, 2), (1, 3), (4, 2)])
def test_unstack_undoes_the_difference(ranks: tuple[int, int]) -> None:
    x, y = gaussian_sites(9, 5, 6, ranks)
    first, second = unstack(LoraProduct().difference(x, y), ranks[0])
    assert (first.tensors["A"].shape[0], second.tensors["A"].shape[0]) == ranks
    np.testing.assert_allclose(dense(first), dense(x), atol=1e-13)
    np.testing.assert_allclose(dense(second), dense(y), atol=1e-13)


def test_unstack_returns_the_very_numbers_where_no_scaling_was_folded() -> None:
    x, y = (Site(site.tensors, 1.0) for site in gaussian_sites(10, 5, 6, (2, 3), np.float32))
    for found, expected in zip(unstack(LoraProduct().difference(x, y), 2), (x, y), strict=True):
        for role in ("A", "B"):
            assert np.array_equal(found.tensors[role], expected.tensors[role])


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_inner_product_is_frobenius_of_the_weight_updates(library: str) -> None:
    x, y = gaussian_sites(11, 5, 6, (2, 3))
    expected = float(np.sum(dense(x) * dense(y)))
    there = (site.map(LIBRARIES[library]) for site in (x, y))
    assert inner_product(*there) == pytest.approx(expected, rel=1e-12)


def test_arithmetic_changes_none_of_its_inputs() -> None:
    sites = gaussian_sites(12, 4, 5, (2, 2, 2))
    before = [{role: t.copy() for role, t in site.tensors.items()} for site in sites]
    for rule in FAMILIES["lora"].values():
        compress(transfer(rule, *sites, 0.5), 1)
    for site, copy in zip(sites, before, strict=True):
        for role, tensor in copy.items():
            assert np.array_equal(site.tensors[role], tensor)
