"""LoRA adds `scaling · B · A` to a weight, so its divergences add.

Two spaces. In *factors* space A and B are merged separately, as the paper does (AdaMergeX, eq. 6-7); this is not linear
in the weight update. In *product* space the updates themselves are merged, exactly, by stacking the factors:

    A = [A_T; A_t; A_s]        B = [s_T·B_T, λ·s_t·B_t, −λ·s_s·B_s]        rank r_T + r_t + r_s

and `compress` brings the rank down by the best approximation in the Frobenius norm, without ever forming the product.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from array_api_compat import array_namespace

from lingraft.algebra import ALL_LAWS, Array, Law, Site
from lingraft.errors import AdapterError
from lingraft.families.elementwise import Multiplicative


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
        y = in_units(y, x)
        return Site({role: x.tensors[role] - y.tensors[role] for role in ("A", "B")}, x.scaling)

    def scale(self, delta: Site, weight: float) -> Site:
        """Both factors times the weight."""
        return delta.map(lambda tensor: tensor * weight)

    def apply(self, x: Site, delta: Site) -> Site:
        """`A + ΔA` and `B + ΔB`."""
        delta = in_units(delta, x)
        return Site({role: x.tensors[role] + delta.tensors[role] for role in ("A", "B")}, x.scaling)

    def effect(self, x: Site) -> Array:
        """See `effect`."""
        return effect(x)

    def guarded(self, x: Site, y: Site) -> int:
        """None: a difference needs no guard."""
        return 0


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

    def guarded(self, x: Site, y: Site) -> int:
        """None: a difference needs no guard."""
        return 0


@dataclass(frozen=True)
class LoraCross:
    """(IA)³'s rule on A and B: `A_T ⊙ (1 + λ(A_t ⊘ A_s − 1))`, and B likewise. For the paper's ablation: it does harm.

    The guard of (IA)³ would catch nearly every number of a LoRA; this one is only against zeros.
    """

    name: str = "lora/cross"
    floor: float = 1e-6
    bound: float = 10.0
    laws: frozenset[Law] = ALL_LAWS - {Law.INVERSE}

    @property
    def _rule(self) -> Multiplicative:
        return Multiplicative(self.name, self.floor, self.bound)

    def difference(self, x: Site, y: Site) -> Site:
        """`A_x ⊘ A_y` and `B_x ⊘ B_y`, guarded."""
        return self._rule.difference(x, in_units(y, x))

    def scale(self, delta: Site, weight: float) -> Site:
        """`1 + weight · (d − 1)`."""
        return self._rule.scale(delta, weight)

    def apply(self, x: Site, delta: Site) -> Site:
        """`A ⊙ d_A` and `B ⊙ d_B`."""
        return self._rule.apply(x, delta)

    def effect(self, x: Site) -> Array:
        """See `effect`."""
        return effect(x)

    def guarded(self, x: Site, y: Site) -> int:
        """How many entries of `difference(x, y)` the guard changed."""
        return self._rule.guarded(x, in_units(y, x))


def analogy(task: Site, target_ref: Site, source_ref: Site, weight: float) -> Site:
    """AriMerge for LoRA (Zhang et al. 2023); the minus is in B alone, because negating both factors negates nothing.

    `A = λA_T + (1 − λ)(A_t + A_s)`, `B = λB_T + (1 − λ)(B_t − B_s)`, in units of the task's scaling.
    """
    t, s, rest = in_units(target_ref, task), in_units(source_ref, task), 1 - weight
    a = weight * task.tensors["A"] + rest * (t.tensors["A"] + s.tensors["A"])
    b = weight * task.tensors["B"] + rest * (t.tensors["B"] - s.tensors["B"])
    return Site({"A": a, "B": b}, task.scaling)


def in_units(y: Site, x: Site) -> Site:
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
    """The best approximation of the update at a lower rank, from small matrices alone.

    Gram matrices of the thin factors, in float64, where the inputs are narrower: squaring halves the digits, and half of
    float64's are as many as float32 has. Where that might not do, QR of the factors in float64: for float64 inputs, and where
    a singular value that is kept is tiny beside the factors.

    Args:
        x: A site of rank R.
        out_rank: The rank to keep.

    Returns:
        A site of rank `min(out_rank, R, in, out)` with the singular values shared evenly between A and B, and the share of the
        update's energy (squared Frobenius norm) that it keeps.

    Raises:
        AdapterError: A value is NaN, infinite or too large.
    """
    xp = array_namespace(x.tensors["A"])
    dtype = x.tensors["A"].dtype
    a, b = (xp.astype(_checked(xp, tensor), xp.float64) for tensor in (x.tensors["A"], _folded(x)))
    k = min(out_rank, *a.shape, b.shape[0])
    with _blas(xp.__name__).limit(limits=1):
        found = None if dtype == xp.float64 else _by_gram(xp, a, b, k)
        right, left, s = found or _by_qr(xp, a, b, k)
    total = float(xp.sum(s * s))
    kept = float(xp.sum(s[:k] * s[:k])) / total if total > 0 else 1.0
    return Site({"A": xp.astype(right, dtype), "B": xp.astype(left, dtype)}), kept


def _by_gram(xp: Any, a: Array, b: Array, k: int) -> tuple[Array, Array, Array] | None:
    """Factors of rank k and all singular values; None where a kept one is tiny beside the factors, and so not exact."""
    half_a, half_b = _root(xp, a @ a.T), _root(xp, b.T @ b)
    u, s, v = thin_svd(xp, half_b.T @ half_a)
    if not s[k - 1] > 1e-5 * xp.linalg.vector_norm(half_a) * xp.linalg.vector_norm(half_b):
        return None
    root = xp.sqrt(s[:k])
    return (half_b @ (u[:, :k] / root)).T @ a, b @ (half_a @ (v[:k, :].T / root)), s


def _by_qr(xp: Any, a: Array, b: Array, k: int) -> tuple[Array, Array, Array]:
    q_b, r_b = xp.linalg.qr(b)
    q_a, r_a = xp.linalg.qr(a.T)
    u, s, v = thin_svd(xp, r_b @ r_a.T)
    root = xp.sqrt(s[:k])
    return (v[:k, :].T * root).T @ q_a.T, q_b @ (u[:, :k] * root), s


def _root(xp: Any, gram: Array) -> Array:
    """L with `L @ L.T` = the Gram matrix, which may be singular."""
    values, vectors = xp.linalg.eigh(gram)
    return vectors * xp.sqrt(xp.clip(values, 0, None))


def thin_svd(xp: Any, core: Array) -> tuple[Array, Array, Array]:
    """The thin singular value decomposition.

    Raises:
        AdapterError: A value is NaN, infinite or too large.
    """
    u, s, v = xp.linalg.svd(_checked(xp, core), full_matrices=False)
    return u, s, v


def _checked(xp: Any, matrix: Array) -> Array:
    if not bool(xp.all(xp.isfinite(matrix))):
        raise AdapterError(
            "a value is NaN, infinite or too large",
            remedy="look for NaN and very large values in the adapters it is made of",
        )
    return matrix


@cache
def _blas(library: str) -> Any:
    """The threads of linear algebra, found once for each array library; two threads take longer than one on thin factors."""
    from threadpoolctl import ThreadpoolController  # Most merges do without.

    return ThreadpoolController()


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
