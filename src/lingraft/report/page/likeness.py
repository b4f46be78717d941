"""The atlas: which languages' divergences are alike, layer by layer, as a tree and a matrix in its order."""

import itertools
from typing import Any

from lingraft.languages import name_of
from lingraft.report.page.charts import dendrogram, names_apart
from lingraft.report.page.colours import signed_step
from lingraft.report.page.files import Files
from lingraft.report.page.svg import inline


def atlas(found: dict[str, Any], files: Files) -> dict[str, Any]:
    """The atlas as the page shows it: the tree, the matrix of all layers, and what the browser needs for the others.

    Args:
        found: What `divergences` gives.
        files: Takes the cosines as CSV.
    """
    order, codes = found["order"], found["languages"]
    names = names_apart([name_of(code) for code in codes])
    cosines = {layer: [[rows[i][j] for j in order] for i in order] for layer, rows in found["cosines"].items()}
    first = found["layers"][0]
    most = max(
        (
            abs(v)
            for rows in cosines.values()
            for i, row in enumerate(rows)
            for j, v in enumerate(row)
            if i != j and v is not None
        ),
        default=1.0,
    )
    rows = [
        [layer, one, other, found["cosines"][layer][i][j]]
        for layer in found["layers"]
        for (i, one), (j, other) in itertools.combinations(enumerate(codes), 2)
    ]
    files.add("cosines.csv", ["layer", "language", "other", "cosine"], rows)
    norms = [
        [layer, code, norm]
        for layer, by in (found.get("norms") or {}).items()
        for code, norm in zip(codes, by, strict=True)
    ]
    files.add("norms.csv", ["layer", "language", "norm"], norms)
    ordered = [names[n] for n in order]
    says = f"A tree of {len(codes)} languages by the likeness of their divergences, from top to bottom: {', '.join(ordered)}."
    return {
        "says": found["says"],
        "names": ordered,
        "layers": [
            {"key": layer, "name": "all layers" if layer == "all" else f"layer {layer}"} for layer in found["layers"]
        ],
        "cells": [
            [_cell(_rounded(value), most, one == other) for other, value in enumerate(row)]
            for one, row in enumerate(cosines[first])
        ],
        "data": {
            "most": most,
            "cosines": {k: [[_rounded(v) for v in row] for row in rows] for k, rows in cosines.items()},
        },
        "most": f"{most:.2f}",
        "wide": inline(dendrogram(names, order, found["linkage"], True), says, "wide"),
        "narrow": inline(dendrogram(names, order, found["linkage"], False), says, "narrow"),
        "seed": found["seed"],
    }


def _rounded(value: float | None) -> float | None:
    """As it is shown, for every layer alike."""
    return None if value is None else round(value, 2) + 0.0


def _cell(value: float | None, most: float, same: bool) -> dict[str, str]:
    if same:
        return {"text": "1", "class": "same"}
    if value is None:
        return {"text": "–", "class": "none"}
    return {"text": f"{value:.2f}".replace("-", "−"), "class": f"signed-{signed_step(value, most)}"}
