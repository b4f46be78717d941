"""Sparse differences (LF-SFT) in PEFT's folders: sorted flat indices, values, and the shape of the weight they add to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lingraft.algebra import Site
from lingraft.errors import AdapterError
from lingraft.layouts.common import FLOATS, PREFIX, Config, Opened, Place, RoleLayout, Values
from lingraft.tensors import Spec, TensorFile


def _place(module: str, shapes: Mapping[str, tuple[int, ...]], config: Config) -> Place:
    if len(shapes["indices"]) != 1 or shapes["values"] != shapes["indices"] or len(shapes["shape"]) != 1:
        raise ValueError(f"{shapes} is not a sparse difference")
    return Place(shapes)


_ROLES = RoleLayout(
    "sparse",
    "SPARSE",
    "sparse_",
    {"indices": "sparse_indices", "values": "sparse_values", "shape": "sparse_shape"},
    _place,
)


@dataclass(frozen=True)
class SparseLayout:
    """`<module>.sparse_indices` (K, int64, ascending), `.sparse_values` (K), `.sparse_shape` (of the weight, int64)."""

    structure: str = "sparse"
    peft_type: str = "SPARSE"

    def check(self, config: Config, where: Path) -> None:
        """Nothing is refused."""

    def open(self, config: Config, tensors: TensorFile) -> Opened:
        """See `Layout.open`."""
        opened = _ROLES.open(config, tensors)

        def read(module: str) -> Site:
            site = opened.read(module)
            indices, shape = site.tensors["indices"], site.tensors["shape"]
            if site.tensors["values"].dtype not in FLOATS:
                raise AdapterError(f"{module}: the values are not floats", where=tensors.path)
            if indices.dtype != np.int64 or shape.dtype != np.int64 or (shape < 1).any():
                raise AdapterError(f"{module}: indices and shape must be positive int64", where=tensors.path)
            inside = indices[0] >= 0 and indices[-1] < np.prod(shape, dtype=np.float64)
            if not inside or not (indices[1:] > indices[:-1]).all():
                raise AdapterError(f"{module}: the indices are not ascending within the weight", where=tensors.path)
            return site

        return Opened(opened.layout, read, opened.others)

    def encode(
        self, layout: Mapping[str, Place], read: Callable[[str], Site], dtype: np.dtype[Any]
    ) -> tuple[list[Spec], Values]:
        """See `Layout.encode`. How large a union of supports is shows only when it is computed: all sites are read at once."""
        arrays: list[tuple[str, np.ndarray[Any, Any]]] = []
        for module in layout:
            site = read(module)
            for role, suffix in _ROLES.suffixes.items():
                arrays.append((f"{PREFIX}{module}.{suffix}", site.tensors[role]))
        kinds = [dtype if name.endswith("values") else np.dtype(np.int64) for name, _ in arrays]
        specs = [(name, array.shape, kind) for (name, array), kind in zip(arrays, kinds, strict=True)]
        return specs, iter([array for _, array in arrays])

    def config_for(self, config: Config, layout: Mapping[str, Place]) -> dict[str, Any]:
        """The configuration as it is."""
        return {**config, "inference_mode": True}

    def kind(self, config: Config) -> dict[str, Any]:
        """Nothing."""
        return {}

    def size(self, place: Place) -> int | None:
        """A sparse difference has no rank."""
        return None
