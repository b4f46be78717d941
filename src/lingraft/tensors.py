"""Tensor files: safetensors, read lazily header first, written as a stream one tensor at a time."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
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
            self._file = safe_open(path, framework="numpy")
            self.names: tuple[str, ...] = tuple(sorted(self._file.keys()))
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"this tensor file cannot be read ({error})", where=path) from None

    @property
    def metadata(self) -> dict[str, str]:
        """The file's own key-value notes."""
        return dict(self._file.metadata() or {})

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype[Any]:
        """A tensor's type, without reading it.

        Raises:
            AdapterError: The type is one lingraft does not compute with.
        """
        kind = self._file.get_slice(name).get_dtype()
        if kind not in DTYPES:
            raise AdapterError(f"tensor '{name}' has the unsupported type {kind}", where=self.path)
        return DTYPES[kind]

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """One tensor, in its own type."""
        self.dtype(name)
        return self._file.get_tensor(name)


Spec = tuple[str, tuple[int, ...], np.dtype[Any]]


def write_tensors(
    path: Path,
    specs: Iterable[Spec],
    values: Iterable[np.ndarray[Any, Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors one after the other; only one is in memory at a time.

    Args:
        path: The new file.
        specs: Name, shape and type of every tensor, in the order of `values`.
        values: The tensors.
        metadata: Notes for the header; PEFT and transformers expect `format`.

    Raises:
        ValueError: A tensor does not have the shape that was announced.
    """
    specs = list(specs)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, shape, dtype in specs:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for (name, shape, dtype), value in zip(specs, values, strict=True):
            if value.shape != shape:
                raise ValueError(f"{name}: shape {value.shape} was announced as {shape}")
            array = np.ascontiguousarray(value, dtype=dtype)
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
