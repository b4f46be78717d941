"""Tensor files: safetensors, read lazily header first, written as a stream one tensor at a time.

The safetensors library checks a file; its tensors are then read into arrays of our own. A mapped file would be as fast,
but all its pages would count as this process's memory, and a file cut short while it is mapped ends the process.
"""

import json
import math
import os
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lingraft.errors import AdapterError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# glibc gives memory back as soon as an array is freed, and the next one faults its pages in again: half the time of a merge.
# Once a block of this size has been freed it keeps what is smaller. The block is never touched, so it costs no memory.
np.empty(16 << 20, np.uint8)


_EXPONENT = {DTYPES["F16"]: 0x7C00, DTYPES["BF16"]: 0x7F80}
"""The bits of the exponent: all are set in NaN and infinity, and in nothing else."""


def finite(array: np.ndarray[Any, Any]) -> bool:
    """Whether no value is NaN or infinite."""
    mask = _EXPONENT.get(array.dtype)
    if mask is None:
        return bool(np.isfinite(array).all())
    # numpy's own test of the two narrow types takes ten times as long.
    return not array.size or int((array.view(np.uint16) & np.uint16(mask)).max()) < mask


class TensorFile:
    """A safetensors file, opened once; a tensor is read when it is asked for.

    Args:
        path: The file.

    Raises:
        AdapterError: The file is missing, truncated or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="numpy"):
                pass  # The header fits the file: types, shapes, offsets, without gaps or overlaps.
            self._file = path.open("rb", buffering=0)
            weakref.finalize(self, self._file.close)
            size = int.from_bytes(self._file.read(8), "little")
            header: dict[str, Any] = json.loads(self._file.read(size))
        except (OSError, SafetensorError, ValueError) as error:
            raise AdapterError(
                f"this tensor file cannot be read ({error})", where=path, remedy="make it again, or copy it again whole"
            ) from None
        self._lock = Lock()
        self._metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._tensors = {
            name: (entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
            for name, entry in header.items()
        }
        self.names: tuple[str, ...] = tuple(sorted(header))

    @property
    def metadata(self) -> dict[str, str]:
        """The file's own key-value notes."""
        return dict(self._metadata)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it.

        Raises:
            AdapterError: There is no such tensor.
        """
        return self._entry(name)[1]

    def dtype(self, name: str) -> np.dtype[Any]:
        """A tensor's type, without reading it.

        Raises:
            AdapterError: There is no such tensor, or the type is one lingraft does not compute with.
        """
        kind = self._entry(name)[0]
        if kind not in DTYPES:
            raise AdapterError(
                f"tensor '{name}' has the unsupported type {kind}",
                where=self.path,
                remedy="save the adapter in float32, float16 or bfloat16",
            )
        return DTYPES[kind]

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """One tensor, in its own type, as an array of its own.

        Raises:
            AdapterError: There is no such tensor, its type is unsupported, or the file has changed and ends too early.
        """
        _, shape, offset = self._entry(name)
        dtype = self.dtype(name)
        raw = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        done = 0
        # More than once where there is much to read: Linux gives 2 GiB at a time at most.
        while done < raw.size and (count := self._pread(raw[done:], offset + done)):
            done += count
        if done < raw.size:
            raise AdapterError(
                f"this file ends within tensor '{name}': it was changed",
                where=self.path,
                remedy="make the adapter again, or copy it again whole",
            )
        try:
            return raw.view(dtype).reshape(shape)
        except ValueError as error:  # numpy has at most 64 axes, each of a size it can count to.
            raise AdapterError(
                f"tensor '{name}' has a shape that numpy cannot hold ({error})",
                where=self.path,
                remedy="make it again, or copy it again whole",
            ) from None

    def _pread(self, into: np.ndarray[Any, Any], offset: int) -> int:
        """Reads at a place of the file; several threads may."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [into.data], offset)
        with self._lock:  # Windows and macOS before 11 read from where the file stands.
            self._file.seek(offset)
            return self._file.readinto(into.data) or 0

    def _entry(self, name: str) -> tuple[str, tuple[int, ...], int]:
        try:
            return self._tensors[name]
        except KeyError:
            raise AdapterError(
                f"there is no tensor '{name}'", where=self.path, remedy="make it again, or copy it again whole"
            ) from None


Spec = tuple[str, tuple[int, ...], np.dtype[Any]]


def write_tensors(
    path: Path,
    specs: Iterable[Spec],
    values: Iterable[np.ndarray[Any, Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors one after the other; only one is in memory at a time.

    In the file wider types come first, as the library orders them: every tensor then starts at a multiple of its item size.

    Args:
        path: The new file.
        specs: Name, shape and type of every tensor, in the order of `values`.
        values: The tensors.
        metadata: Notes for the header; PEFT and transformers expect `format`.

    Raises:
        ValueError: A tensor does not have the shape that was announced.
    """
    specs = list(specs)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape, dtype in specs}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offsets: dict[str, int] = {}
    end = 0
    for name, shape, dtype in sorted(specs, key=lambda spec: -spec[2].itemsize):
        offsets[name], end = end, end + sizes[name]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for (name, shape, dtype), value in zip(specs, values, strict=True):
            if value.shape != shape:
                raise ValueError(f"{name}: shape {value.shape} was announced as {shape}")
            array = np.ascontiguousarray(value, dtype=dtype)
            file.seek(8 + len(text) + offsets[name])
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def write_all(
    path: Path, tensors: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a mapping of tensors, sorted by name, so that equal content gives equal bytes."""
    names = sorted(tensors)
    specs = [(name, tensors[name].shape, tensors[name].dtype) for name in names]
    write_tensors(path, specs, (tensors[name] for name in names), metadata)
