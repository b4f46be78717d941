"""A sparse difference (LF-SFT) adds to some entries of a weight, so its divergences add, on the union of supports.

A site holds `indices` (sorted positions in the flattened weight), `values`, and `shape`, the weight's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from array_api_compat import array_namespace

from lingraft.algebra import ALL_LAWS, Array, Law, Site
from lingraft.errors import AdapterError


def _sum(x: Site, y: Site, weight: float) -> Site:
    """`x + weight · y` on the union of supports."""
    _same_weight(x, y)
    xp = array_namespace(x.tensors["values"], y.tensors["values"])
    indices = xp.concat([x.tensors["indices"], y.tensors["indices"]])
    values = xp.concat([x.tensors["values"], y.tensors["values"] * weight])
    order = xp.argsort(indices)
    indices, values = xp.take(indices, order), xp.take(values, order)
    # An index occurs at most twice, side by side: the second one's value goes to the first.
    twice = indices[1:] == indices[:-1]
    none = xp.zeros((1,), dtype=values.dtype)
    values = values + xp.concat([xp.where(twice, values[1:], xp.zeros_like(values[1:])), none])
    keep = xp.concat([xp.ones((1,), dtype=xp.bool), ~twice])[: indices.shape[0]]
    values = values[: indices.shape[0]]
    return Site({"indices": indices[keep], "values": values[keep], "shape": x.tensors["shape"]}, x.scaling)


def _same_weight(x: Site, y: Site) -> None:
    shapes = [tuple(int(n) for n in site.tensors["shape"]) for site in (x, y)]
    if shapes[0] != shapes[1]:
        raise AdapterError(
            f"the weights have different shapes, {shapes[0]} and {shapes[1]}", remedy="give adapters of one base model"
        )


def aligned(sites: Sequence[Site]) -> list[Site]:
    """The same differences, all on the union of their supports, so that their values can be taken number by number."""
    union = sites[0]
    for other in sites[1:]:
        union = _sum(union, other, 0)
    nothing = Site({**union.tensors, "values": union.tensors["values"] * 0}, union.scaling)
    return [_sum(nothing, site, 1) for site in sites]


def dense(x: Site) -> Array:
    """The difference as a weight, flattened."""
    xp = array_namespace(x.tensors["values"])
    size = 1
    for n in x.tensors["shape"]:
        size *= int(n)
    found = xp.zeros((size,), dtype=x.tensors["values"].dtype)
    found[x.tensors["indices"]] = x.tensors["values"]
    return found


@dataclass(frozen=True)
class Sparse:
    """`x − y` and `x + d` on the union of supports."""

    name: str = "sparse/difference"
    laws: frozenset[Law] = ALL_LAWS

    def difference(self, x: Site, y: Site) -> Site:
        """`x − y`."""
        return _sum(x, y, -1)

    def scale(self, delta: Site, weight: float) -> Site:
        """`weight · d`."""
        return Site({**delta.tensors, "values": delta.tensors["values"] * weight}, delta.scaling)

    def apply(self, x: Site, delta: Site) -> Site:
        """`x + d`."""
        return _sum(x, delta, 1)

    def effect(self, x: Site) -> Array:
        """The difference as a weight, flattened."""
        return dense(x)

    def guarded(self, x: Site, y: Site) -> int:
        """None: a difference needs no guard."""
        return 0
