"""Tensor files: what is written is what the safetensors library reads, and the reverse."""

import gc
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft.errors import AdapterError
from lingraft.tensors import DTYPES, TensorFile, finite, write_all, write_tensors

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
BF16 = np.dtype(ml_dtypes.bfloat16)


def random_tensor(seed: int, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=shape) * 3
    return (np.abs(values) if kind == "U8" else values).astype(DTYPES[kind])


def same(ours: np.ndarray, theirs: torch.Tensor) -> bool:
    """Equal in shape and value; every type here fits float64 exactly."""
    assert tuple(theirs.shape) == ours.shape
    return np.array_equal(ours.astype(np.float64), theirs.double().numpy())


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def test_torch_reads_what_is_written_and_so_do_we(tmp_path: Path) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(parts=st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), max_size=5))
    def holds(parts: list[tuple[str, tuple[int, ...]]]) -> None:
        tensors = {f"t{n}": random_tensor(n, kind, shape) for n, (kind, shape) in enumerate(parts)}
        write_all(tmp_path / "x.safetensors", tensors)
        theirs = safetensors.torch.load_file(tmp_path / "x.safetensors")
        ours = TensorFile(tmp_path / "x.safetensors")
        assert set(theirs) == set(ours.names) == set(tensors)
        for (name, tensor), (kind, shape) in zip(tensors.items(), parts, strict=True):
            assert theirs[name].dtype == TORCH[kind]
            assert same(tensor, theirs[name])
            assert (ours.shape(name), ours.dtype(name)) == (shape, DTYPES[kind])
            assert ours.read(name).tobytes() == tensor.tobytes()

    holds()


def test_every_type_we_name_is_tested_against_torch() -> None:
    assert set(TORCH) == set(DTYPES)


def test_values_that_are_not_contiguous_are_written_in_order(tmp_path: Path) -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_all(tmp_path / "x", {"t": matrix.T, "every other": matrix[:, ::2]})
    found = safetensors.torch.load_file(tmp_path / "x")
    assert same(matrix.T, found["t"])
    assert same(matrix[:, ::2], found["every other"])


def test_values_are_rounded_to_the_announced_type(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(50,)).astype(np.float32)
    write_tensors(tmp_path / "x", [("t", (50,), BF16)], [values])
    found = safetensors.torch.load_file(tmp_path / "x")["t"]
    assert torch.equal(found, torch.from_numpy(values).to(torch.bfloat16))


def test_values_are_asked_for_one_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    def values() -> Any:
        for number in range(3):
            alive.append((tmp_path / "x").stat().st_size)
            yield np.full(100_000, number, np.float32)

    write_tensors(tmp_path / "x", [(f"t{n}", (100_000,), np.dtype(np.float32)) for n in range(3)], values())
    assert alive[0] < 400_000 <= alive[1] < 800_000 <= alive[2]


def test_no_tensors_make_a_file_that_can_be_read(tmp_path: Path) -> None:
    write_all(tmp_path / "x", {})
    assert safetensors.torch.load_file(tmp_path / "x") == {}
    assert TensorFile(tmp_path / "x").names == ()


def test_notes_are_kept_beside_the_format(tmp_path: Path) -> None:
    write_all(tmp_path / "x", {"t": np.zeros(1)}, {"made": "ñow"})
    assert TensorFile(tmp_path / "x").metadata == {"format": "pt", "made": "ñow"}


def test_equal_content_gives_equal_bytes_in_whatever_order(tmp_path: Path) -> None:
    tensors = {"b": np.ones((2, 3), BF16), "a": np.arange(5), "c": np.zeros((), np.float32)}
    write_all(tmp_path / "x", tensors)
    write_all(tmp_path / "y", dict(reversed(tensors.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    write_all(tmp_path / "z", {**tensors, "a": np.arange(5) + 1})
    assert (tmp_path / "x").read_bytes() != (tmp_path / "z").read_bytes()


@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 1), (6,), (2, 4)])
def test_another_shape_than_announced_raises(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="announced"):
        write_tensors(tmp_path / "x", [("t", (2, 3), np.dtype(np.float32))], [np.zeros(shape, np.float32)])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_more_or_fewer_values_than_announced_raise(tmp_path: Path, count: int) -> None:
    specs = [(f"t{n}", (2,), np.dtype(np.float32)) for n in range(2)]
    with pytest.raises(ValueError, match="zip"):
        write_tensors(tmp_path / "x", specs, [np.zeros(2, np.float32)] * count)


@pytest.mark.parametrize("content", [b"", b"not a tensor file", b"\xff" * 64], ids=["empty", "text", "garbage"])
def test_a_file_that_is_not_safetensors_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        TensorFile(tmp_path / "x")
    assert caught.value.where == str(tmp_path / "x")


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        TensorFile(tmp_path / "x")
    assert caught.value.where == str(tmp_path / "x")


@pytest.mark.parametrize("cut", [1, 100, 30_000, 50_000])
def test_a_file_cut_short_is_refused_with_its_path(tmp_path: Path, cut: int) -> None:
    write_all(tmp_path / "x", {"a": np.zeros(10_000, np.float32), "b": np.zeros(5)})
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole[:-cut])
    with pytest.raises(AdapterError) as caught:
        TensorFile(tmp_path / "x")
    assert caught.value.where == str(tmp_path / "x")


def test_a_file_cut_short_after_it_was_opened_is_an_error_not_a_crash(tmp_path: Path) -> None:
    write_all(tmp_path / "x", {"a": np.ones(100_000, np.float32), "b": np.zeros(5, np.float32)})
    file = TensorFile(tmp_path / "x")
    os.truncate(tmp_path / "x", 4096)
    for name in ("a", "b"):
        with pytest.raises(AdapterError, match=f"ends within tensor '{name}'"):
            file.read(name)


def entry(kind: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)},
        {"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 12, 16)},
        {"a": entry("F32", [3], 0, 8)},
        {"a": entry("F32", [-2], 0, 8)},
    ],
    ids=["overlap", "gap", "shape and size differ", "negative"],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    end = max(each["data_offsets"][1] for each in header.values())
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    with pytest.raises(AdapterError, match="cannot be read"):
        TensorFile(tmp_path / "x")


def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(AdapterError, match="cannot be read"):
        TensorFile(tmp_path / "x")


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    kinds = ["U8", "BF16", "F32", "BOOL", "F64", "F16", "I64", "I32"]
    tensors = {f"{n} {kind}": random_tensor(n, kind, (3,)) for n, kind in enumerate(kinds)}
    write_all(tmp_path / "x", tensors)
    raw = (tmp_path / "x").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0
    for name in tensors:
        assert header[name]["data_offsets"][0] % DTYPES[header[name]["dtype"]].itemsize == 0
    assert all(same(tensor, safetensors.torch.load_file(tmp_path / "x")[name]) for name, tensor in tensors.items())


def test_tensors_at_odd_offsets_are_read_into_aligned_arrays(tmp_path: Path) -> None:
    values = np.array([1.5, -2, 3e-7], np.float32)
    entries = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [3], 1, 13)}
    text = json.dumps(entries).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + b"\x07" + values.tobytes())
    found = TensorFile(tmp_path / "x").read("b")
    assert found.flags.aligned and np.array_equal(found, values)


def test_what_was_read_is_the_readers_own(tmp_path: Path) -> None:
    write_all(tmp_path / "x", {"t": np.ones(3, np.float32)})
    file = TensorFile(tmp_path / "x")
    first = file.read("t")
    first[:] = 5
    assert np.array_equal(file.read("t"), np.ones(3))
    assert np.array_equal(first, np.full(3, 5))


def test_threads_may_read_one_file(tmp_path: Path) -> None:
    tensors = {f"t{n}": np.full(5000, n, np.float32) for n in range(50)}
    write_all(tmp_path / "x", tensors)
    file = TensorFile(tmp_path / "x")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(file.read, list(tensors) * 5))
    assert all(np.array_equal(t, tensors[name]) for name, t in zip(list(tensors) * 5, found, strict=True))


def test_a_file_no_longer_needed_is_closed_without_a_warning(tmp_path: Path) -> None:
    write_all(tmp_path / "x", {"t": np.ones(3, np.float32)})
    file = TensorFile(tmp_path / "x")
    inner = file._file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del file
        gc.collect()
    assert inner.closed


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_all(tmp_path / "x", {"t": np.zeros(1)})
    file = TensorFile(tmp_path / "x")
    for ask in (file.shape, file.dtype, file.read):
        with pytest.raises(AdapterError, match="no tensor 'u'"):
            ask("u")


FLOATS = [np.float16, BF16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found(dtype: Any, bad: float) -> None:
    for place in (0, 500, 999):
        values = np.random.default_rng(0).normal(size=1000).astype(dtype)
        assert finite(values)
        values[place] = bad
        assert not finite(values)
        assert not finite(values.reshape(10, 100).T)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_largest_and_smallest_numbers_are_finite(dtype: Any) -> None:
    limits = ml_dtypes.finfo(dtype)
    extremes = [limits.max, limits.min, limits.tiny, limits.smallest_subnormal, 0.0, -0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert finite(np.array(extremes * 50, dtype=dtype))
        assert finite(np.full(1000, limits.max, dtype=dtype))


def test_no_values_and_whole_numbers_are_finite() -> None:
    assert finite(np.zeros((0, 3), BF16)) and finite(np.zeros(0, np.float32))
    assert finite(np.arange(3)) and finite(np.ones(2, bool)) and finite(np.array(1.0, BF16))


def test_a_type_we_cannot_compute_with_is_named(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"t": np.zeros(2, np.int16)}, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    for ask in (file.dtype, file.read):
        with pytest.raises(AdapterError, match="'t' has the unsupported type I16"):
            ask("t")
