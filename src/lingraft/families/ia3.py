"""(IA)³ multiplies activations by a vector, so its divergences multiply (AdaMergeX, eq. 8-9).

A site holds `l`, the vector. Where it is 1 everywhere the adapter does nothing.
"""

from lingraft.algebra import Array, Site
from lingraft.families.elementwise import Additive, Multiplicative

RATIO = Multiplicative("ia3/ratio")
"""`D = l_t ⊘ l_s` and `l_T ⊙ (1 + λ(D − 1))`."""

CROSS = Additive("ia3/cross")
"""LoRA's rule: `l_T + λ(l_t − l_s)`."""


def analogy(task: Site, target_ref: Site, source_ref: Site, weight: float) -> Site:
    """AriMerge for (IA)³ (Zhang et al. 2023): `l = (1 − λ) + λ·l_T + (1 − λ)(l_t − l_s)`."""
    rest = 1 - weight

    def mixed(role: str) -> Array:
        t, s = target_ref.tensors[role], source_ref.tensors[role]
        return rest + weight * task.tensors[role] + rest * (t - s)

    return Site({role: mixed(role) for role in task.tensors}, task.scaling)
