"""Merging adapters on disk, and measuring how alike two of them are. Reads and writes one site at a time."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lingraft import __version__
from lingraft.adapter import Adapter, Divergence, content_digest
from lingraft.algebra import Site
from lingraft.errors import AdapterError
from lingraft.families import family
from lingraft.families.lora import inner_product


def divergence_of(target_ref: Path, source_ref: Path) -> tuple[Divergence, dict[str, Any]]:
    """The divergence of two reference adapters on disk, and its provenance."""
    found = Adapter.load(target_ref) - Adapter.load(source_ref)
    provenance = {
        "how": "divergence",
        "inputs": {"target_ref": content_digest(target_ref), "source_ref": content_digest(source_ref)},
        "lingraft": __version__,
    }
    return found, provenance


def graft(
    task: Path,
    divergence: Divergence,
    inputs: dict[str, str],
    weight: float,
    *,
    space: str = "factors",
    modules: str | Sequence[str] = "all",
    out_rank: int | None = None,
) -> tuple[Adapter, dict[str, Any]]:
    """The task adapter plus `weight` times the divergence, and how it came about.

    Args:
        task: The task adapter's folder.
        divergence: Two references, loaded.
        inputs: What the references are, for the provenance: names and digests.
        weight: λ ≥ 0.
        space: `factors` or `product`.
        modules: Which sites are merged.
        out_rank: The rank to compress to, in product space.

    Returns:
        The merged adapter, not yet computed, and its provenance.
    """
    base = Adapter.load(task)
    merged = (divergence * weight).onto(base, space=space, modules=modules, out_rank=out_rank)
    provenance = {
        "how": "transfer",
        "weight": weight,
        "space": space,
        "modules": modules if isinstance(modules, str) else list(modules),
        "out_rank": out_rank,
        "inputs": {"task": content_digest(task), **inputs},
        "lingraft": __version__,
    }
    return merged, provenance


def energy_kept(adapter: Adapter) -> dict[str, float] | None:
    """Mean and least share of energy that a compressed merge kept, once it has been computed."""
    if not adapter.energy:
        return None
    values = list(adapter.energy.values())
    return {"mean": float(np.mean(values)), "least": min(values)}


def _norm(site: Site) -> float:
    """Frobenius norm of a weight update from its thin factors; stable under cancellation, unlike a Gram matrix."""
    r_b = np.linalg.qr(site.tensors["B"], mode="r")
    r_a = np.linalg.qr(site.tensors["A"].T, mode="r")
    return abs(site.scaling) * float(np.linalg.norm(r_b @ np.transpose(r_a)))


def _double(site: Site) -> Site:
    return site.map(lambda t: np.asarray(t, dtype=np.float64))


def verify(
    output: Path,
    task: Path,
    divergence: Divergence,
    weight: float,
    *,
    space: str,
    modules: str | Sequence[str],
) -> float:
    """How far a merge on disk is from the formula in float64: ‖ΔW_out − ΔW_expected‖ / ‖ΔW_expected‖ over all sites.

    A compressed merge is compared with the uncompressed one.
    """
    written = Adapter.load(output)

    def precise(adapter: Adapter) -> Adapter:
        return replace(adapter, read=lambda m: _double(adapter.read(m)))

    exact = (Divergence(precise(divergence.target_ref), precise(divergence.source_ref)) * weight).onto(
        precise(Adapter.load(task)), space=space, modules=modules
    )
    rule = family("lora", "product")
    wrong = right = 0.0
    for module in exact.modules:
        expected = exact.site(module)
        wrong += _norm(rule.difference(_double(written.read(module)), expected)) ** 2
        right += _norm(expected) ** 2
    return (wrong / right) ** 0.5 if right else wrong**0.5


def similarity(x: Adapter, y: Adapter) -> dict[str, Any]:
    """How alike two weight updates are.

    Returns:
        `cosine` and the `norms` of both, over all shared sites, and the same `by_layer` (keyed by the number in the path).

    Raises:
        AdapterError: They have no site in common, or shapes differ.
    """
    shared = [m for m in x.modules if m in y.layout]
    if not shared:
        raise AdapterError("the two adapters have no site in common")
    sums: dict[str, np.ndarray[Any, Any]] = {}
    for module in shared:
        p, q = x.layout[module], y.layout[module]
        if p.shape != q.shape:
            raise AdapterError(f"{module} has different shapes in the two adapters")
        a, b = _double(x.read(module)), _double(y.read(module))
        products = np.array([inner_product(a, b), inner_product(a, a), inner_product(b, b)])
        layer = next((part for part in module.split(".") if part.isdigit()), "-")
        sums[layer] = sums.get(layer, 0) + products
    total = np.sum(list(sums.values()), axis=0)
    layers = {layer: _cosine(value) for layer, value in sorted(sums.items(), key=lambda kv: (len(kv[0]), kv[0]))}
    return {
        "cosine": _cosine(total),
        "norms": [max(float(n), 0.0) ** 0.5 for n in total[1:]],
        "by_layer": layers,
    }


def _cosine(products: Any) -> float | None:
    """⟨x, y⟩ / (‖x‖ ‖y‖), or None where one of them is zero."""
    # Gram products of updates that cancel may come out slightly below zero.
    scale = float(np.sqrt(max(products[1], 0) * max(products[2], 0)))
    return float(products[0] / scale) if scale > 0 else None
