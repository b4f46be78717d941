"""Combinations of any number of adapters, site by site: linear, concatenated, TIES, DARE, KnOTS.

Each takes sites of one place and a weight for each. What counts is how far a number is from the one that does nothing: 1 for
(IA)³, 0 elsewhere.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from array_api_compat import array_namespace

from lingraft.algebra import Array, Site
from lingraft.errors import AdapterError
from lingraft.families.lora import LoraProduct, in_units, thin_svd
from lingraft.families.sparse import aligned

Numbers = Callable[[str, Sequence[Array]], Array]
"""From a role and the sites' tensors of that role, as distances from doing nothing, to the combined one."""


def _by_number(structure: str, sites: Sequence[Site], numbers: Numbers) -> Site:
    """Combines tensor by tensor."""
    if structure == "lora":
        sites = [sites[0], *(in_units(site, sites[0]) for site in sites[1:])]
    if structure == "sparse":
        sites = aligned(sites)
    still = 1 if structure == "ia3" else 0
    tensors = {}
    for role, first in sites[0].tensors.items():
        if role in ("indices", "shape"):
            tensors[role] = first
        else:
            tensors[role] = numbers(role, [site.tensors[role] - still for site in sites]) + still
    return Site(tensors, sites[0].scaling)


def linear(structure: str, sites: Sequence[Site], weights: Sequence[float]) -> Site:
    """`Σ wᵢ xᵢ` (for (IA)³ `1 + Σ wᵢ (xᵢ − 1)`), tensor by tensor; LoRA in units of the first one's scaling.

    An adapter averaged with itself is itself, and `[1, λ, −λ]` is AdaMergeX on LoRA's factors.
    """
    return _by_number(structure, sites, lambda role, xs: sum(w * x for w, x in zip(weights, xs, strict=True)))


def concatenated(structure: str, sites: Sequence[Site], weights: Sequence[float]) -> Site:
    """The exact combination of what the adapters do.

    LoRA: the factors stacked, `Σ wᵢ sᵢ Bᵢ Aᵢ`. (IA)³: one after the other, `Π (1 + wᵢ (lᵢ − 1))`. Bottlenecks: side by side,
    each branch times its weight. Sparse: the sum. A prefix: its virtual tokens behind those of the others.

    Raises:
        AdapterError: A prefix has another weight than 1, or the structure has no such combination.
    """
    if structure == "lora":
        rule = LoraProduct()
        parts = [rule.scale(site, weight) for site, weight in zip(sites, weights, strict=True)]
        total = rule.scale(Site(parts[0].tensors, 1.0), parts[0].scaling)
        for part in parts[1:]:
            total = rule.apply(total, part)
        return total
    if structure == "sparse":
        return linear(structure, sites, weights)
    xp = array_namespace(*sites[0].tensors.values())
    if structure == "ia3":
        product = xp.ones_like(sites[0].tensors["l"])
        for site, weight in zip(sites, weights, strict=True):
            product = product * (1 + weight * (site.tensors["l"] - 1))
        return Site({"l": product})
    if structure == "bottleneck":
        return Site(
            {
                "down": xp.concat([s.tensors["down"] for s in sites], axis=0),
                "down_bias": xp.concat([s.tensors["down_bias"] for s in sites]),
                "up": xp.concat([w * s.tensors["up"] for w, s in zip(weights, sites, strict=True)], axis=1),
                "up_bias": sum(w * s.tensors["up_bias"] for w, s in zip(weights, sites, strict=True)),
            }
        )
    if structure == "prefix":
        if any(weight != 1 for weight in weights):
            raise AdapterError(
                "virtual tokens have no weight: a prefix can be concatenated at weight 1 only",
                remedy="give every prefix the weight 1, or leave --method cat out",
            )
        return Site({role: xp.concat([s.tensors[role] for s in sites], axis=0) for role in sites[0].tensors})
    raise AdapterError(f"adapters of the structure '{structure}' cannot be concatenated", remedy="use --method linear")


def trimmed(x: Array, density: float) -> Array:
    """The `density` of largest numbers of a tensor, the others zero; of equal ones the first are kept."""
    xp = array_namespace(x)
    row = xp.reshape(x, (-1,))
    keep = max(1, round(density * int(row.shape[0])))
    order = xp.argsort(-xp.abs(row), stable=True)
    place = xp.argsort(order, stable=True)
    return xp.reshape(xp.where(place < keep, row, xp.zeros_like(row)), x.shape)


def elected_mean(xs: Sequence[Array]) -> Array:
    """TIES after trimming: the sign with the greater mass is elected, the mean is over the numbers that agree with it."""
    xp = array_namespace(*xs)
    stacked = xp.stack(list(xs))
    elected = xp.sign(xp.sum(stacked, axis=0))
    agree = xp.astype((xp.sign(stacked) == elected) & (stacked != 0), stacked.dtype)
    count = xp.sum(agree, axis=0)
    return xp.sum(stacked * agree, axis=0) / xp.where(count > 0, count, xp.ones_like(count))


def ties(structure: str, sites: Sequence[Site], weights: Sequence[float], density: float = 0.2) -> Site:
    """TIES (Yadav et al. 2023): trim to the largest, elect a sign, average what agrees. Weights count in the election."""

    def numbers(role: str, xs: Sequence[Array]) -> Array:
        return elected_mean([w * trimmed(x, density) for w, x in zip(weights, xs, strict=True)])

    return _by_number(structure, sites, numbers)


def dare(
    structure: str, sites: Sequence[Site], weights: Sequence[float], drop: float = 0.9, seed: int = 0, module: str = ""
) -> Site:
    """DARE (Yu et al. 2024): drop numbers at random, rescale the rest by `1 / (1 − drop)`, add up.

    What is dropped is a function of the seed, the module, the role and the adapter's place in the list alone.
    """

    def numbers(role: str, xs: Sequence[Array]) -> Array:
        total = 0
        for index, (w, x) in enumerate(zip(weights, xs, strict=True)):
            text = f"{seed}/{module}/{role}/{index}"
            rng = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
            kept = array_namespace(x).asarray(rng.random(tuple(x.shape)) >= drop)
            total = total + (w / (1 - drop)) * array_namespace(x).where(kept, x, x * 0)
        return total

    return _by_number(structure, sites, numbers)


def knots(sites: Sequence[Site], weights: Sequence[float], density: float = 0.2) -> Site:
    """KnOTS with TIES (Stoica et al. 2025) for LoRA: `[ΔW₁ … ΔWₙ] = U Σ [V₁ … Vₙ]ᵀ`, TIES on the Vᵢ, then `U Σ V`.

    The joint SVD is had from the thin factors; no weight update is ever formed. The rank is the sum of the ranks.
    """
    xp = array_namespace(*sites[0].tensors.values())
    outs = xp.concat([site.scaling * site.tensors["B"] for site in sites], axis=1)
    q_b, r_b = xp.linalg.qr(outs)
    inner = [xp.linalg.qr(xp.matrix_transpose(site.tensors["A"])) for site in sites]
    columns, start = [], 0
    for site, (_, r_a) in zip(sites, inner, strict=True):
        rank = int(site.tensors["A"].shape[0])
        columns.append(r_b[:, start : start + rank] @ xp.matrix_transpose(r_a))
        start += rank
    u, s, v = thin_svd(xp, xp.concat(columns, axis=1))
    parts, start = [], 0
    for q_a, r_a in inner:
        width = int(r_a.shape[0])
        parts.append(v[:, start : start + width] @ xp.matrix_transpose(q_a))
        start += width
    merged = elected_mean([w * trimmed(part, density) for w, part in zip(weights, parts, strict=True)])
    root = xp.sqrt(s)
    return Site({"A": merged * root[:, None], "B": (q_b @ u) * root[None, :]})
