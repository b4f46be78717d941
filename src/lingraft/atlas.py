"""Changes beside one another: which adapters or divergences pull a model the same way, layer by layer, and which belong
together.

The cosine of two changes is that of `merging.similarity`: of weight updates for LoRA, of `l − 1` for (IA)³, of the numbers
elsewhere. Here all pairs are had from one product of matrices a site, and for LoRA without forming any update: with the
factors of n adapters stacked, `⟨B_i A_i, B_j A_j⟩ = Σ (BᵀB ⊙ AAᵀ)` over the block (i, j).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lingraft.adapter import Adapter
from lingraft.algebra import Site
from lingraft.errors import AdapterError, MissingExtra
from lingraft.families.measures import change
from lingraft.fitting import check_fit
from lingraft.roles import layer_of

ALL = "all"
"""The layer that is all of them."""
_COLUMNS = 1 << 19
"""Numbers of an adapter that are multiplied at once."""
Matrix = np.ndarray[Any, np.dtype[np.float64]]


def atlas(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """The cosines of all pairs of changes.

    Args:
        adapters: By name, adapters of one structure and base model, or divergences as adapters (`Divergence.as_adapter`).

    Returns:
        `structure`; `names`; `layers`, `all` and the numbers in the sites' paths; `cosines`, by layer a symmetric matrix in
        the order of the names (None where one of two is zero, or they have no site in common: only sites that both have
        count); `norms`, by layer of each over all of its sites.

    Raises:
        AdapterError: They do not fit together, or hold numbers that are too large.
    """
    names, parts = list(adapters), list(adapters.values())
    if not parts:
        raise AdapterError("there is nothing to compare", remedy="give two adapters or more")
    structure = parts[0].structure
    for name, part in list(adapters.items())[1:]:
        shared = [module for module in parts[0].modules if module in part.layout]
        check_fit({names[0]: parts[0], name: part}, shared, any_rank=structure == "lora", compared=True)
    # Products, and for each pair the first one's own, of the sites that both have.
    sums: dict[str, tuple[Matrix, Matrix]] = {}
    for module in dict.fromkeys(module for part in parts for module in part.modules):
        having = [n for n, part in enumerate(parts) if module in part.layout]
        products = _products(structure, module, [parts[n].site(module) for n in having])
        number = layer_of(module)
        layer = "-" if number is None else str(number)
        whole, own = sums.setdefault(layer, (np.zeros((len(parts),) * 2), np.zeros((len(parts),) * 2)))
        place = np.ix_(having, having)
        whole[place] += products
        own[place] += np.diag(products)[:, None]
    layers = sorted(sums, key=lambda layer: (len(layer), layer))
    by_layer = {layer: sums[layer] for layer in layers}
    total = (
        np.sum([whole for whole, _ in by_layer.values()], axis=0),
        np.sum([own for _, own in by_layer.values()], axis=0),
    )
    if not np.isfinite(total[0]).all():
        raise AdapterError(
            "the numbers are too large to be measured", remedy="look for very large values in the adapters"
        )
    everything = {ALL: total, **by_layer}
    return {
        "structure": structure,
        "names": names,
        "layers": list(everything),
        "cosines": {layer: _cosines(*pair) for layer, pair in everything.items()},
        "norms": {layer: [max(float(n), 0.0) ** 0.5 for n in np.diag(own)] for layer, (_, own) in everything.items()},
    }


def clusters(cosines: Sequence[Sequence[float | None]]) -> tuple[list[int], list[list[float]]]:
    """What belongs together, by average linkage of `1 − cosine`.

    Args:
        cosines: A symmetric matrix; unknown ones count as 0.

    Returns:
        The order of the leaves in which neighbours are most alike (Bar-Joseph et al. 2001), and scipy's linkage: rows of two
        clusters, their distance, and how many are in both.

    Raises:
        MissingExtra: scipy is not installed.
    """
    if len(cosines) < 2:
        return list(range(len(cosines))), []
    try:
        from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    except ImportError:
        raise MissingExtra("scipy", "report") from None
    upper = [1.0 - (value or 0.0) for n, row in enumerate(cosines) for value in row[n + 1 :]]
    distances = np.clip(np.array(upper, dtype=np.float64), 0.0, 2.0)
    tree = linkage(distances, "average")
    # With equal distances everywhere every order is as good.
    tree = optimal_leaf_ordering(tree, distances) if len(cosines) > 2 else tree
    rows = [[int(a), int(b), float(height), int(count)] for a, b, height, count in tree]
    return [int(n) for n in leaves_list(tree)], rows


def _cosines(products: Matrix, own: Matrix) -> list[list[float | None]]:
    """Products over norms; exactly 1 of what is compared with itself."""
    norms = np.sqrt(np.clip(own, 0, None))
    scale = norms * norms.T
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.clip(np.where(scale > 0, products / scale, np.nan), -1.0, 1.0)
    rows: list[list[float | None]] = [[None if np.isnan(value) else float(value) for value in row] for row in found]
    for n, row in enumerate(rows):
        if row[n] is not None:
            row[n] = 1.0
    return rows


def _products(structure: str, module: str, sites: Sequence[Site]) -> Matrix:
    """The inner products of all pairs of a site's changes, as `families.measures.inner_product` has them; symmetric."""
    if structure == "lora":
        found = _of_updates(sites)
    elif structure == "sparse":
        found = _of_entries(sites)
    else:
        rows = [change(structure, site) for site in sites]
        if len({row.shape for row in rows}) > 1:
            raise AdapterError("the adapters' shapes differ", where=module, remedy="give adapters of equal settings")
        found = np.zeros((len(rows), len(rows)))
        for start in range(0, rows[0].size, _COLUMNS):
            part = np.array([row[start : start + _COLUMNS] for row in rows], dtype=np.float64)
            found += part @ part.T
    return np.triu(found) + np.triu(found, 1).T


def _of_updates(sites: Sequence[Site]) -> Matrix:
    """Of LoRA's updates, from the stacked factors."""
    a = np.concatenate([np.asarray(site.tensors["A"], dtype=np.float64) for site in sites], axis=0)
    b = np.concatenate([np.asarray(site.tensors["B"], dtype=np.float64) * site.scaling for site in sites], axis=1)
    bounds = np.cumsum([0, *(site.tensors["A"].shape[0] for site in sites)])
    # Of rank 0 is a site that adds nothing, of which `reduceat` would make something.
    some = [n for n in range(len(sites)) if bounds[n + 1] > bounds[n]]
    found = np.zeros((len(sites), len(sites)))
    if some:
        blocks = (a @ a.T) * (b.T @ b)
        starts = bounds[some]
        found[np.ix_(some, some)] = np.add.reduceat(np.add.reduceat(blocks, starts, axis=0), starts, axis=1)
    return found


def _of_entries(sites: Sequence[Site]) -> Matrix:
    """Of sparse differences, on the union of their supports."""
    shapes = {tuple(int(n) for n in site.tensors["shape"]) for site in sites}
    if len(shapes) > 1:
        raise AdapterError(
            f"the weights have different shapes: {sorted(shapes)}", remedy="give adapters of one base model"
        )
    union = np.unique(np.concatenate([site.tensors["indices"] for site in sites]))
    found = np.zeros((len(sites), len(sites)))
    for start in range(0, union.size, _COLUMNS):
        columns = union[start : start + _COLUMNS]
        part = np.zeros((len(sites), columns.size))
        for row, site in zip(part, sites, strict=True):
            indices = site.tensors["indices"]
            here = slice(*np.searchsorted(indices, [columns[0], columns[-1] + 1]))
            row[np.searchsorted(columns, indices[here])] = site.tensors["values"][here]
        found += part @ part.T
    return found
