"""Tensor files: what is written is what the safetensors library reads, and the reverse."""

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
from lingraft.tensors import DTYPES, TensorFile, write_all, write_tensors

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


def test_a_type_we_cannot_compute_with_is_named(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"t": np.zeros(2, np.int16)}, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    for ask in (file.dtype, file.read):
        with pytest.raises(AdapterError, match="'t' has the unsupported type I16"):
            ask("t")
