"""A bottleneck adapter inserts layers: `y + W_up · f(W_down · y + b_down) + b_up`.

A site holds `down` (b × d), `down_bias` (b), `up` (d × b) and `up_bias` (d). Both changes live in the bottleneck, b × b: a
factor from the left for `down`, from the right for `up` (AdaMergeX groups bottleneck adapters with prefixes; the sides are
inferred: they are the ones on which the inverse is exact). Biases add.
"""

from dataclasses import dataclass

from array_api_compat import array_namespace

from lingraft.algebra import ALL_LAWS, Array, Law, Site
from lingraft.families.elementwise import Additive, fitting, flat
from lingraft.families.pseudoinverse import RCOND, cut_off, left_factor, scaled

CROSS = Additive("bottleneck/cross")
"""LoRA's rule, tensor by tensor: `T + λ(R_t − R_s)`, as published language arithmetic does."""

MATRICES = ("down", "up")


@dataclass(frozen=True)
class Bottleneck:
    """`D_down = R_t · R_s⁺` from the left, `D_up = R_s⁺ · R_t` from the right, biases by difference."""

    name: str = "bottleneck/inverse"
    rcond: float = RCOND
    laws: frozenset[Law] = ALL_LAWS - {Law.INVERSE}

    def difference(self, x: Site, y: Site) -> Site:
        """The two factors (b × b), and the differences of the biases."""
        fitting(x, y)
        xp = array_namespace(x.tensors["down"])
        up = left_factor(xp.matrix_transpose(x.tensors["up"]), xp.matrix_transpose(y.tensors["up"]), self.rcond)
        return Site(
            {
                "down": left_factor(x.tensors["down"], y.tensors["down"], self.rcond),
                "up": xp.matrix_transpose(up),
                **{role: t - y.tensors[role] for role, t in x.tensors.items() if role not in MATRICES},
            },
            x.scaling,
        )

    def scale(self, delta: Site, weight: float) -> Site:
        """`I + weight · (D − I)` for the factors, `weight · d` for the biases."""
        return Site(
            {role: scaled(t, weight) if role in MATRICES else t * weight for role, t in delta.tensors.items()},
            delta.scaling,
        )

    def apply(self, x: Site, delta: Site) -> Site:
        """`D_down · W_down`, `W_up · D_up`, `b + d`."""
        biases = {role: t + delta.tensors[role] for role, t in x.tensors.items() if role not in MATRICES}
        down, up = delta.tensors["down"] @ x.tensors["down"], x.tensors["up"] @ delta.tensors["up"]
        return Site({"down": down, "up": up, **biases}, x.scaling)

    def effect(self, x: Site) -> Array:
        """All numbers of the site."""
        return flat(x)

    def guarded(self, x: Site, y: Site) -> int:
        """How many singular values of the source's matrices count as zero."""
        return sum(cut_off(y.tensors[role], self.rcond) for role in MATRICES)
