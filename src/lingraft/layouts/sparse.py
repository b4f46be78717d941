"""Sparse differences (LF-SFT) in PEFT's folders: sorted flat indices, values, and the shape of the tensor they add to.

A site is a weight, called like its module (`model.layers.0.self_attn.q_proj`), or a bias (`…q_proj.bias`).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lingraft.algebra import Site
from lingraft.errors import AdapterError
from lingraft.layouts.common import FLOATS, PREFIX, Config, Opened, Place, Values
from lingraft.tensors import Spec, TensorFile

_BIAS = ".bias"
_ROLES = ("indices", "values", "shape")
_MARKER = "sparse_"
_NAME = re.compile(r"(.+)\.sparse_(bias_)?(indices|values|shape)", re.DOTALL)


def tensor_name(site: str, role: str) -> str:
    """The name in the file of one of a site's tensors."""
    if site.endswith(_BIAS):
        return f"{PREFIX}{site.removesuffix(_BIAS)}.sparse_bias_{role}"
    return f"{PREFIX}{site}.sparse_{role}"


def _found(tensors: TensorFile) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Tensor names by site and role, and the names that belong to no site."""
    found: dict[str, dict[str, str]] = {}
    others: list[str] = []
    for name in tensors.names:
        if match := _NAME.fullmatch(name.removeprefix(PREFIX)):
            module, bias, role = match.groups()
            names = found.setdefault(module + (_BIAS if bias else ""), {})
            if other := names.get(role):
                raise AdapterError(
                    f"'{other}' and '{name}' are two tensors for one place",
                    where=tensors.path,
                    remedy="save the adapter again from one training",
                )
            names[role] = name
        elif _MARKER in name:
            raise AdapterError(
                f"tensor '{name}' is of a variant that cannot be merged",
                where=tensors.path,
                remedy="train a plain sparse adapter: --adapter sparse",
            )
        else:
            others.append(name)
    if not found:
        raise AdapterError(
            f"this file has no tensors named …{_MARKER}…",
            where=tensors.path,
            remedy="give an adapter of the structure that its adapter_config.json names",
        )
    for site, names in found.items():
        if absent := [role for role in _ROLES if role not in names]:
            raise AdapterError(
                f"{site} lacks {', '.join(f'sparse_{role}' for role in absent)}",
                where=tensors.path,
                remedy="make the adapter again, or copy it again whole",
            )
    return {site: {role: found[site][role] for role in _ROLES} for site in sorted(found)}, tuple(others)


def _place(site: str, shapes: Mapping[str, tuple[int, ...]], where: Path) -> Place:
    if any(0 in shape for shape in shapes.values()):
        raise AdapterError(
            f"{site} has an empty tensor: {shapes}",
            where=where,
            remedy="make the adapter again, or copy it again whole",
        )
    if len(shapes["indices"]) != 1 or shapes["values"] != shapes["indices"] or len(shapes["shape"]) != 1:
        raise AdapterError(
            f"{site}: {shapes} is not a sparse difference",
            where=where,
            remedy="make the adapter again, or copy it again whole",
        )
    return Place(shapes)


@dataclass(frozen=True)
class SparseLayout:
    """`<module>.sparse_indices` (K, int64, ascending), `.sparse_values` (K), `.sparse_shape` (of the weight, int64).

    A bias has `<module>.sparse_bias_indices`, `.sparse_bias_values` and `.sparse_bias_shape`.
    """

    structure: str = "sparse"
    peft_type: str = "SPARSE"

    def check(self, config: Config, where: Path) -> None:
        """Nothing is refused."""

    def open(self, config: Config, tensors: TensorFile) -> Opened:
        """See `Layout.open`."""
        names, others = _found(tensors)
        layout = {
            site: _place(site, {role: tensors.shape(name) for role, name in found.items()}, tensors.path)
            for site, found in names.items()
        }

        def read(module: str) -> Site:
            site = Site({role: tensors.read(name) for role, name in names[module].items()}, layout[module].scaling)
            indices, shape = site.tensors["indices"], site.tensors["shape"]
            if site.tensors["values"].dtype not in FLOATS:
                raise AdapterError(
                    f"{module}: the values are not floats",
                    where=tensors.path,
                    remedy="make the adapter again, or copy it again whole",
                )
            if indices.dtype != np.int64 or shape.dtype != np.int64 or (shape < 1).any():
                raise AdapterError(
                    f"{module}: indices and shape must be positive int64",
                    where=tensors.path,
                    remedy="make the adapter again, or copy it again whole",
                )
            inside = indices[0] >= 0 and indices[-1] < np.prod(shape, dtype=np.float64)
            if not inside or not (indices[1:] > indices[:-1]).all():
                raise AdapterError(
                    f"{module}: the indices are not ascending within the weight",
                    where=tensors.path,
                    remedy="make the adapter again, or copy it again whole",
                )
            return site

        return Opened(layout, read, others)

    def encode(
        self, layout: Mapping[str, Place], read: Callable[[str], Site], dtype: np.dtype[Any]
    ) -> tuple[list[Spec], Values]:
        """See `Layout.encode`. How large a union of supports is shows only when it is computed: all sites are read at once.

        A site without entries has no tensors.
        """
        arrays: list[tuple[str, np.ndarray[Any, Any]]] = []
        for module in layout:
            site = read(module)
            if not len(site.tensors["values"]):
                continue
            arrays += [(tensor_name(module, role), site.tensors[role]) for role in _ROLES]
        kinds = [dtype if name.endswith("values") else np.dtype(np.int64) for name, _ in arrays]
        specs = [(name, array.shape, kind) for (name, array), kind in zip(arrays, kinds, strict=True)]
        return specs, iter([array for _, array in arrays])

    def announced(self, layout: Mapping[str, Place], specs: Iterable[Spec]) -> dict[str, Place]:
        """The sites with the shapes that `encode` announced: those of unions of supports, not the task adapter's."""
        shapes = {name: shape for name, shape, _ in specs}
        return {
            module: Place({role: shapes[tensor_name(module, role)] for role in _ROLES}, place.scaling)
            for module, place in layout.items()
            if tensor_name(module, "values") in shapes
        }

    def config_for(self, config: Config, layout: Mapping[str, Place]) -> dict[str, Any]:
        """The configuration with the modules and the number of entries of every site."""
        return {
            **config,
            "target_modules": sorted({site.removesuffix(_BIAS) for site in layout}),
            "entries": {site: place.shapes["values"][0] for site, place in sorted(layout.items())},
            "inference_mode": True,
        }

    def kind(self, config: Config) -> dict[str, Any]:
        """Nothing."""
        return {}

    def size(self, place: Place) -> int | None:
        """A sparse difference has no rank."""
        return None
