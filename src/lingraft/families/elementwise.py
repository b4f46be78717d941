"""Operators that work number by number: differences that add, and ratios that multiply, with their guard."""

from dataclasses import dataclass

from array_api_compat import array_namespace

from lingraft.algebra import ALL_LAWS, Array, Law, Site
from lingraft.errors import AdapterError


def flat(x: Site) -> Array:
    """All numbers of a site in one row, tensors in the order of their names: the effect of what acts number by number."""
    tensors = [x.tensors[role] for role in sorted(x.tensors)]
    xp = array_namespace(*tensors)
    return xp.concat([xp.reshape(t, (-1,)) for t in tensors])


def fitting(x: Site, y: Site) -> None:
    """Makes sure that two sites hold the same tensors in the same shapes.

    Raises:
        AdapterError: They do not.
    """
    shapes = [{role: tuple(t.shape) for role, t in site.tensors.items()} for site in (x, y)]
    if shapes[0] != shapes[1]:
        raise AdapterError(
            f"the shapes differ: {shapes[0]} and {shapes[1]}",
            remedy="merge adapters of one structure and size, trained on the same base model",
        )


@dataclass(frozen=True)
class Additive:
    """`x − y` and `x + d`, tensor by tensor."""

    name: str
    laws: frozenset[Law] = ALL_LAWS

    def difference(self, x: Site, y: Site) -> Site:
        """`x − y`."""
        fitting(x, y)
        return Site({role: t - y.tensors[role] for role, t in x.tensors.items()}, x.scaling)

    def scale(self, delta: Site, weight: float) -> Site:
        """`weight · d`."""
        return delta.map(lambda t: t * weight)

    def apply(self, x: Site, delta: Site) -> Site:
        """`x + d`."""
        fitting(x, delta)
        return Site({role: t + delta.tensors[role] for role, t in x.tensors.items()}, x.scaling)

    def effect(self, x: Site) -> Array:
        """All numbers of the site."""
        return flat(x)

    def guarded(self, x: Site, y: Site) -> int:
        """None: a difference needs no guard."""
        return 0


def relative(x: Array, y: Array, floor: float) -> Array:
    """`(x − y) / y`, with a denominator of at least `floor` in size; so it is 0 where x = y, whatever y is."""
    xp = array_namespace(x, y)
    least = xp.where(y < 0, xp.full_like(y, -floor), xp.full_like(y, floor))
    divisor = xp.where(xp.abs(y) < floor, least, y)
    return x / divisor - y / divisor  # x − y may overflow


@dataclass(frozen=True)
class Multiplicative:
    """`x ⊘ y` and `x ⊙ d` with a guard, tensor by tensor.

    The ratio is computed as `1 + (x − y) / y`, where a denominator of |y| < `floor` becomes ±`floor`, and clipped to
    ±`bound`. Where the guard does nothing this is x / y; equal values give 1 even where they are zero.

    Attributes:
        floor: The least size of a denominator.
        bound: The greatest size of a ratio.
    """

    name: str
    floor: float = 0.1
    bound: float = 10.0
    # Where the guard is at work the ratio is not x / y, so it does not lead from y to x.
    laws: frozenset[Law] = ALL_LAWS - {Law.INVERSE}

    def difference(self, x: Site, y: Site) -> Site:
        """`x ⊘ y`, guarded."""
        fitting(x, y)
        return Site({role: self._ratio(t, y.tensors[role]) for role, t in x.tensors.items()}, x.scaling)

    def _ratio(self, x: Array, y: Array) -> Array:
        return array_namespace(x, y).clip(1 + relative(x, y, self.floor), -self.bound, self.bound)

    def scale(self, delta: Site, weight: float) -> Site:
        """`1 + weight · (d − 1)`: no change at 0, d at 1."""
        return delta.map(lambda t: 1 + weight * (t - 1))

    def apply(self, x: Site, delta: Site) -> Site:
        """`x ⊙ d`."""
        fitting(x, delta)
        return Site({role: t * delta.tensors[role] for role, t in x.tensors.items()}, x.scaling)

    def effect(self, x: Site) -> Array:
        """All numbers of the site."""
        return flat(x)

    def guarded(self, x: Site, y: Site) -> int:
        """How many entries of `difference(x, y)` the guard changed."""
        count = 0
        for role, t in x.tensors.items():
            other = y.tensors[role]
            xp = array_namespace(t, other)
            change = relative(t, other, self.floor)
            hit = ((xp.abs(other) < self.floor) & (t != other)) | (xp.abs(1 + change) > self.bound)
            count += int(xp.sum(xp.astype(hit, xp.int64)))
        return count
