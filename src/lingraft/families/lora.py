"""LoRA adds `scaling · B · A` to a weight, so its divergences add.

Two spaces. In *factors* space A and B are merged separately, as the paper does (AdaMergeX, eq. 6-7); this is not linear
in the weight update. In *product* space the updates themselves are merged, exactly, by stacking the factors:

    A = [A_T; A_t; A_s]        B = [s_T·B_T, λ·s_t·B_t, −λ·s_s·B_s]        rank r_T + r_t + r_s

and `compress` brings the rank down by the best approximation in the Frobenius norm, without ever forming the product.
"""

from dataclasses import dataclass

from array_api_compat import array_namespace

from lingraft.algebra import Array, Law, Site
from lingraft.errors import AdapterError

ALL_LAWS = frozenset(Law)


def rank(x: Site) -> int:
    """The rank of a LoRA site: the rows of A."""
    return int(x.tensors["A"].shape[0])


def effect(x: Site) -> Array:
    """The weight update `scaling · B · A` (out × in)."""
    return x.scaling * (x.tensors["B"] @ x.tensors["A"])


@dataclass(frozen=True)
class LoraFactors:
    """Operators on A and B separately. A differing scaling is folded into B, which changes no adapter's effect."""

    name: str = "lora/factors"
    laws: frozenset[Law] = ALL_LAWS

    def difference(self, x: Site, y: Site) -> Site:
        """`A_x − A_y` and `B_x − B_y`, in units of x's scaling."""
        y = _in_units(y, x)
        return Site({role: x.tensors[role] - y.tensors[role] for role in ("A", "B")}, x.scaling)

    def scale(self, delta: Site, weight: float) -> Site:
        """Both factors times the weight."""
        return delta.map(lambda tensor: tensor * weight)

    def apply(self, x: Site, delta: Site) -> Site:
        """`A + ΔA` and `B + ΔB`."""
        delta = _in_units(delta, x)
        return Site({role: x.tensors[role] + delta.tensors[role] for role in ("A", "B")}, x.scaling)

    def effect(self, x: Site) -> Array:
        """See `effect`."""
        return effect(x)


@dataclass(frozen=True)
class LoraProduct:
    """Operators on the weight update, exact at any ranks and scalings: factors are stacked, scalings folded into B."""

    name: str = "lora/product"
    laws: frozenset[Law] = ALL_LAWS

    def difference(self, x: Site, y: Site) -> Site:
        """The update of x minus the update of y, of rank `r_x + r_y`."""
        return _stacked(x, Site({"A": y.tensors["A"], "B": -y.tensors["B"]}, y.scaling))

    def scale(self, delta: Site, weight: float) -> Site:
        """The update times the weight."""
        return Site({"A": delta.tensors["A"], "B": delta.tensors["B"] * weight}, delta.scaling)

    def apply(self, x: Site, delta: Site) -> Site:
        """The update of x plus the difference."""
        return _stacked(x, delta)

    def effect(self, x: Site) -> Array:
        """See `effect`."""
        return effect(x)


def _in_units(y: Site, x: Site) -> Site:
    """The same adapter as `y` with the scaling of `x`, its rank checked."""
    for role in ("A", "B"):
        if x.tensors[role].shape != y.tensors[role].shape:
            raise AdapterError(
                f"the factors have shapes {tuple(x.tensors[role].shape)} and {tuple(y.tensors[role].shape)}: "
                "in factors space adapters must have equal ranks",
                remedy="merge in product space (--space product), which is exact at any ranks",
            )
    if x.scaling == y.scaling:
        return y
    return Site({"A": y.tensors["A"], "B": y.tensors["B"] * (y.scaling / x.scaling)}, x.scaling)


def _stacked(x: Site, y: Site) -> Site:
    """The sum of two updates."""
    xp = array_namespace(x.tensors["A"], y.tensors["A"])
    return Site(
        {
            "A": xp.concat([x.tensors["A"], y.tensors["A"]], axis=0),
            "B": xp.concat([_folded(x), _folded(y)], axis=1),
        }
    )


def _folded(x: Site) -> Array:
    return x.tensors["B"] if x.scaling == 1 else x.tensors["B"] * x.scaling


def compress(x: Site, out_rank: int) -> tuple[Site, float]:
    """The best approximation of the update at a lower rank, by QR of the thin factors and an SVD of the small core.

    Args:
        x: A site of rank R.
        out_rank: The rank to keep.

    Returns:
        A site of rank `min(out_rank, R, in, out)` with the singular values shared evenly between A and B, and the share of the
        update's energy (squared Frobenius norm) that it keeps.
    """
    xp = array_namespace(x.tensors["A"])
    q_b, r_b = xp.linalg.qr(_folded(x))
    q_a, r_a = xp.linalg.qr(xp.matrix_transpose(x.tensors["A"]))
    u, s, v = xp.linalg.svd(r_b @ xp.matrix_transpose(r_a), full_matrices=False)
    k = min(out_rank, int(s.shape[0]))
    total = float(xp.sum(s * s))
    kept = float(xp.sum(s[:k] * s[:k])) / total if total > 0 else 1.0
    root = xp.sqrt(s[:k])
    a = xp.matrix_transpose(q_a @ xp.matrix_transpose(v[:k, :])) * root[:, None]
    return Site({"A": a, "B": (q_b @ u[:, :k]) * root[None, :]}), kept


def unstack(delta: Site, first_rank: int) -> tuple[Site, Site]:
    """Undoes `LoraProduct.difference`: the two adapters a stacked divergence was made of."""
    a, b = delta.tensors["A"], delta.tensors["B"]
    first = Site({"A": a[:first_rank, :], "B": b[:, :first_rank]}, delta.scaling)
    second = Site({"A": a[first_rank:, :], "B": -b[:, first_rank:]}, delta.scaling)
    return first, second


def inner_product(x: Site, y: Site) -> float:
    """The Frobenius inner product of two weight updates, without forming either: Σ (B_xᵀB_y) ⊙ (A_xA_yᵀ)."""
    xp = array_namespace(x.tensors["A"], y.tensors["A"])
    left = xp.matrix_transpose(x.tensors["B"]) @ y.tensors["B"]
    right = x.tensors["A"] @ xp.matrix_transpose(y.tensors["A"])
    return x.scaling * y.scaling * float(xp.sum(left * right))
