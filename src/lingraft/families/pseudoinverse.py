"""The change that leads from one thin matrix to another as a small square factor, by the Moore-Penrose inverse.

`R_t · R_s⁺` is computed as `I + (R_t − R_s) · R_s⁺`, which is the same where the rows of R_s are independent. Where they are
not, the printed form also projects: with equal references it would cut off a part of the task. This one leaves the task as
it is wherever the references agree, and wherever the source reference says nothing.
"""

from array_api_compat import array_namespace

from lingraft.algebra import Array

RCOND = 1e-2
"""Singular values of R_s below this share of the greatest count as zero: they would be divided by."""


FLOOR = 1e-8
"""Singular values below this count as zero too: a reference that is nearly nothing says nothing."""


def identity_like(square: Array) -> Array:
    """The identity matrix of a square array's size and type."""
    xp = array_namespace(square)
    return xp.eye(int(square.shape[-1]), dtype=square.dtype)


def pseudo_inverse(y: Array, rcond: float) -> Array:
    """The Moore-Penrose inverse of a thin matrix, small singular values left out."""
    xp = array_namespace(y)
    u, s, v = xp.linalg.svd(y, full_matrices=False)
    kept = s > _least(s, rcond)
    inverse = xp.where(kept, 1 / xp.where(kept, s, xp.ones_like(s)), xp.zeros_like(s))
    return xp.matrix_transpose(v) @ (inverse[:, None] * xp.matrix_transpose(u))


def _least(s: Array, rcond: float) -> float:
    return max(rcond * float(s[0]), FLOOR)


def left_factor(x: Array, y: Array, rcond: float) -> Array:
    """`I + (x − y) · y⁺` (m × m), for x and y of m × d: `left_factor(x, y) @ y ≈ x`."""
    change = (x - y) @ pseudo_inverse(y, rcond)
    return identity_like(change) + change


def scaled(factor: Array, weight: float) -> Array:
    """`I + weight · (D − I)`: no change at 0, D at 1."""
    one = identity_like(factor)
    return one + weight * (factor - one)


def cut_off(y: Array, rcond: float) -> int:
    """How many singular values of y count as zero."""
    xp = array_namespace(y)
    s = xp.linalg.svdvals(y)
    return int(xp.sum(xp.astype(s <= _least(s, rcond), xp.int64)))
