"""How large an adapter's change is and how alike two are: weight updates for LoRA, `l − 1` for (IA)³, else the numbers."""

import numpy as np

from lingraft.algebra import Array, Site
from lingraft.families import lora
from lingraft.families.elementwise import flat
from lingraft.families.sparse import aligned


def change(structure: str, x: Site) -> Array:
    """What the site changes, as a row of numbers; for structures other than LoRA, whose update is never formed.

    Of a sparse difference, the numbers that are there.
    """
    if structure == "sparse":
        return x.tensors["values"]
    return flat(x) - 1 if structure == "ia3" else flat(x)


def inner_product(structure: str, x: Site, y: Site) -> float:
    """The inner product of two changes; Frobenius for weight updates."""
    if structure == "lora":
        return lora.inner_product(x, y)
    if structure == "sparse":
        x, y = aligned([x, y])
    return float(np.dot(change(structure, x), change(structure, y)))


def distance(structure: str, x: Site, y: Site | None = None) -> float:
    """The norm of the difference of two changes, or of one."""
    if structure == "lora":
        return _norm(x if y is None else lora.LoraProduct().difference(x, y))
    if structure == "sparse" and y is not None:
        x, y = aligned([x, y])
    first = change(structure, x)
    return float(np.linalg.norm(first if y is None else first - change(structure, y)))


def _norm(site: Site) -> float:
    """Frobenius norm of a weight update from its thin factors; stable under cancellation, unlike a Gram matrix."""
    r_b = np.linalg.qr(site.tensors["B"], mode="r")
    r_a = np.linalg.qr(site.tensors["A"].T, mode="r")
    return abs(site.scaling) * float(np.linalg.norm(r_b @ np.transpose(r_a)))
