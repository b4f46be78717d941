"""The entries of greatest magnitude are those that a stable sort of all of them puts first."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft.errors import UserError
from lingraft.selecting import Part, largest

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.1754944e-38, 1.1754942e-38, 3.4028235e38, -3.4028235e38, 1.0000001]
FEW = st.sampled_from([np.float32(v) for v in SPECIAL])
ANY = st.floats(width=32, allow_nan=False, allow_infinity=False).map(np.float32)
SHORT = st.floats(width=32, allow_nan=False, allow_infinity=False).map(
    lambda v: np.float32(np.float32(v).astype(ml_dtypes.bfloat16)) if abs(v) < 3e38 else np.float32(0)
)


def arrays_of(values: st.SearchStrategy) -> st.SearchStrategy:
    one = st.lists(values, max_size=40).map(lambda found: np.array(found, np.float32))
    return st.lists(one, min_size=1, max_size=4).filter(lambda arrays: sum(map(len, arrays)) > 0)


def parts_of(arrays: list[np.ndarray]) -> list[Part]:
    def reader(array: np.ndarray):
        return lambda start, stop: array[start:stop]

    return [Part(f"p{n}", len(array), reader(array)) for n, array in enumerate(arrays)]


def by_sorting(arrays: list[np.ndarray], k: int) -> dict[str, list[int]]:
    """Of all entries in order of part and index, the first K by magnitude; equal ones stay in order."""
    everything = [(part, i) for part, array in enumerate(arrays) for i in range(len(array))]
    magnitude = np.abs(np.concatenate(arrays).astype(np.float64))
    first = np.lexsort((np.arange(len(magnitude)), -magnitude))[:k]
    found: dict[str, list[int]] = {f"p{n}": [] for n in range(len(arrays))}
    for part, i in sorted(everything[n] for n in first):
        found[f"p{part}"].append(i)
    return found


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(arrays=st.one_of(arrays_of(FEW), arrays_of(ANY), arrays_of(SHORT)), data=st.data())
def test_what_is_chosen_is_what_a_stable_sort_puts_first(arrays: list[np.ndarray], data: st.DataObject) -> None:
    entries = sum(map(len, arrays))
    k = data.draw(st.one_of(st.just(1), st.just(entries), st.integers(1, entries)))
    found = largest(parts_of(arrays), k, chunk=data.draw(st.integers(1, 50)))
    assert {name: indices.tolist() for name, indices in found.items()} == by_sorting(arrays, k)
    assert all(indices.dtype == np.int64 for indices in found.values())


def test_ties_go_to_the_earlier_part_and_the_lower_index_and_zeros_fill_up() -> None:
    arrays = [np.array([0, 2, -1], np.float32), np.array([1, -2, 0, 1], np.float32)]

    def chosen(k: int) -> list[list[int]]:
        return [indices.tolist() for indices in largest(parts_of(arrays), k, chunk=2).values()]

    assert chosen(1) == [[1], []]
    assert chosen(2) == [[1], [1]]
    assert chosen(3) == [[1, 2], [1]]
    assert chosen(4) == [[1, 2], [0, 1]]
    assert chosen(6) == [[0, 1, 2], [0, 1, 3]]
    assert chosen(7) == [[0, 1, 2], [0, 1, 2, 3]]


def test_neighbours_in_the_last_bit_are_told_apart() -> None:
    base = np.float32(0.1)
    array = np.array([base, np.nextafter(base, np.float32(1)), np.nextafter(base, np.float32(0))], np.float32)
    assert largest(parts_of([array]), 1)["p0"].tolist() == [1]
    assert largest(parts_of([array]), 2)["p0"].tolist() == [0, 1]


def test_an_array_that_is_not_contiguous_is_read_all_the_same() -> None:
    array = np.array([5, 0, 1, 9, 3, 8], np.float32)[::2]
    assert largest(parts_of([array]), 2)["p0"].tolist() == [0, 2]


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_by_the_name_of_its_part(value: float) -> None:
    arrays = [np.ones(3, np.float32), np.array([0, value], np.float32)]
    with pytest.raises(UserError, match="NaN or infinite") as caught:
        largest(parts_of(arrays), 1)
    assert caught.value.where == "p1"


@pytest.mark.parametrize("k", [-1, 0, 6])
def test_more_than_there_is_is_refused_and_said(k: int) -> None:
    with pytest.raises(UserError, match="there are 5"):
        largest(parts_of([np.ones(2, np.float32), np.ones(3, np.float32)]), k)


def test_a_reader_that_does_not_keep_its_word_is_found_out() -> None:
    with pytest.raises(ValueError, match="not 3 float32"):
        largest([Part("x", 3, lambda start, stop: np.ones(stop - start))], 1)
    with pytest.raises(ValueError, match="not 3 float32"):
        largest([Part("x", 3, lambda start, stop: np.ones(2, np.float32))], 1)
    given_out = iter(np.array([[3, 0, 0], [3, 0, 0], [1, 1, 1]], np.float32))
    with pytest.raises(ValueError, match="changed"):
        largest([Part("x", 3, lambda start, stop: next(given_out))], 1)
    given_out = iter(np.array([[1, 0, 0], [1, 0, 0], [2, 2, 2]], np.float32))
    with pytest.raises(ValueError, match="changed"):
        largest([Part("x", 3, lambda start, stop: next(given_out))], 1)
    with pytest.raises(ValueError, match="same name"):
        largest([Part("x", 1, lambda start, stop: np.ones(1, np.float32))] * 2, 1)


@pytest.mark.parametrize("kind", ["normal", "equal"])
def test_memory_is_the_result_and_a_few_chunks(kind: str) -> None:
    entries, k, chunk = 4_000_000, 100_000, 1 << 16
    array = np.ones(entries, np.float32)
    if kind == "normal":
        array = np.random.default_rng(0).standard_normal(entries, dtype=np.float32)
    parts = parts_of([array[: entries // 2], array[entries // 2 :]])
    tracemalloc.start()
    try:
        found = largest(parts, k, chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(len(indices) for indices in found.values()) == k
    # Counts of 2^16 bins, of which a few copies; of a chunk its bits, what is counted as int64, masks and indices.
    assert peak < 8 * k + 6 * 8 * (1 << 16) + 40 * chunk
