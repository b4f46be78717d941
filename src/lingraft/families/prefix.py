"""A prefix inserts vectors: keys and values (m × d each, m ≪ d) before those of the text (AdaMergeX, eq. 10).

A site is a layer, and holds `key` and `value`; in `flat` granularity it is all layers at once, with `0.key`, `0.value`, ….
The divergence is a factor from the left, m × m: it mixes the virtual tokens. (A factor from the right, d × d, is known on m
of its d dimensions only.)
"""

from dataclasses import dataclass

from array_api_compat import array_namespace

from lingraft.algebra import ALL_LAWS, Array, Law, Site
from lingraft.families.elementwise import Additive, fitting, flat
from lingraft.families.pseudoinverse import RCOND, cut_off, left_factor, pseudo_inverse, scaled

CROSS = Additive("prefix/cross")
"""LoRA's rule: `T + λ(R_t − R_s)`."""


@dataclass(frozen=True)
class Prefix:
    """`D = R_t · R_s⁺`, `(I + λ(D − I)) · T`: a factor for every layer, and in it for keys and values; or one for all.

    Attributes:
        whole: One factor for all tensors side by side (m × sum of d).
        rcond: Singular values of R_s below this share of the greatest count as zero.
    """

    name: str
    whole: bool = False
    rcond: float = RCOND
    # The factor maps R_s onto the rows that R_s spans: R_t itself may need others.
    laws: frozenset[Law] = ALL_LAWS - {Law.INVERSE}

    def difference(self, x: Site, y: Site) -> Site:
        """The factors, m × m, by role; of all tensors at once, as `factor`."""
        fitting(x, y)
        x, y = self._parts(x), self._parts(y)
        return Site({role: left_factor(t, y.tensors[role], self.rcond) for role, t in x.tensors.items()}, x.scaling)

    def scale(self, delta: Site, weight: float) -> Site:
        """`I + weight · (D − I)`."""
        return delta.map(lambda t: scaled(t, weight))

    def apply(self, x: Site, delta: Site) -> Site:
        """`D · x`."""
        factors = dict.fromkeys(x.tensors, delta.tensors["factor"]) if self.whole else delta.tensors
        return Site({role: factors[role] @ t for role, t in x.tensors.items()}, x.scaling)

    def effect(self, x: Site) -> Array:
        """All numbers of the prefix."""
        return flat(x)

    def guarded(self, x: Site, y: Site) -> int:
        """How many singular values of the source's prefix count as zero."""
        return sum(cut_off(t, self.rcond) for t in self._parts(y).tensors.values())

    def _parts(self, x: Site) -> Site:
        if not self.whole:
            return x
        tensors = [x.tensors[role] for role in sorted(x.tensors)]
        return Site({"factor": array_namespace(*tensors).concat(tensors, axis=1)}, x.scaling)


BY_LAYER = Prefix("prefix/layer")
FLAT = Prefix("prefix/flat", whole=True)


@dataclass(frozen=True)
class PrefixLiteral:
    """The formula as printed: `λ · R_t · R_s⁺ · T`. It shrinks the task with λ and does not return it where languages agree."""

    name: str = "prefix/literal"
    rcond: float = RCOND
    laws: frozenset[Law] = frozenset({Law.UNIT})

    def difference(self, x: Site, y: Site) -> Site:
        """`x · y⁺` of every tensor, m × m."""
        fitting(x, y)
        return Site({r: t @ pseudo_inverse(y.tensors[r], self.rcond) for r, t in x.tensors.items()}, x.scaling)

    def scale(self, delta: Site, weight: float) -> Site:
        """`weight · D`."""
        return delta.map(lambda t: t * weight)

    def apply(self, x: Site, delta: Site) -> Site:
        """`D · x`."""
        return Site({role: delta.tensors[role] @ t for role, t in x.tensors.items()}, x.scaling)

    def effect(self, x: Site) -> Array:
        """All numbers of the prefix."""
        return flat(x)

    def guarded(self, x: Site, y: Site) -> int:
        """How many singular values of the source's prefix count as zero."""
        return sum(cut_off(t, self.rcond) for t in y.tensors.values())
