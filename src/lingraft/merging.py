"""Merging adapters on disk, and measuring how alike two of them are. Reads and writes one site at a time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lingraft import __version__, roles
from lingraft.adapter import Adapter, Notes, completed, content_digest, part_of, rebuilt
from lingraft.algebra import Family, Site
from lingraft.divergence import Divergence, check_rank, kept_rank, warn_of_unlike_starts
from lingraft.errors import AdapterError, UserError, suggestion
from lingraft.families import combining, family, ia3, lora
from lingraft.families.measures import distance, inner_product
from lingraft.fitting import check_fit
from lingraft.layouts.common import Place
from lingraft.layouts.lora import place as lora_place
from lingraft.layouts.lora import rank_of, weight_shape

GRAFTS = ("transfer", "cross", "arimerge", "arimerge-add")
"""Methods that merge a task's adapter with two references."""
COMBINATIONS = ("linear", "cat", "ties", "dare", "knots")
"""Methods that combine any number of adapters."""


def divergence_of(target_ref: Path, source_ref: Path) -> tuple[Divergence, dict[str, Any]]:
    """The divergence of two reference adapters on disk, and its provenance."""
    found = Adapter.load(target_ref) - Adapter.load(source_ref)
    provenance = {
        "how": "divergence",
        "inputs": {"target_ref": content_digest(target_ref), "source_ref": content_digest(source_ref)},
        "lingraft": __version__,
    }
    return found, provenance


LANGUAGE_SPACES: Mapping[str, str] = {"invertible": "difference", "bottleneck": "cross", "sparse": "difference"}
"""Where language adapters are merged among themselves, by structure: all of them by plain differences.

A bottleneck's own rule is for another adapter than the two that differ. Of language adapters themselves it would keep what the
source's rows span, and λ = 1 would not be the target's.
"""


@dataclass(frozen=True)
class Graft:
    """How a divergence is grafted onto a task.

    Attributes:
        weight: λ ≥ 0.
        method: One of `GRAFTS`.
        space: For `transfer`, where the structure is merged; None for its own rule.
        modules: Which sites are merged.
        rules: Weights of their own for some of the sites.
        out_rank: The rank to compress to, in LoRA's product space.
        guards: Values for the rule's guards.
    """

    weight: float
    method: str = "transfer"
    space: str | None = None
    modules: str | Sequence[str] = "all"
    rules: Sequence[tuple[str, float]] = ()
    out_rank: int | None = None
    guards: Mapping[str, float | None] | None = None

    def onto(self, task: Adapter, divergence: Divergence) -> Adapter:
        """The merged adapter, not yet computed.

        Raises:
            UserError: The method is unknown or does not go with the other options.
            AdapterError: The adapters do not fit together.
        """
        if self.method not in GRAFTS:
            raise UserError(f"unknown method '{self.method}'", remedy=suggestion(self.method, GRAFTS))
        if self.method.startswith("arimerge"):
            if (
                self.space is not None
                or self.out_rank is not None
                or any(g is not None for g in (self.guards or {}).values())
            ):
                raise UserError("AriMerge has no space, output rank or guard", remedy="leave these options out")
            return arimerge(
                task,
                divergence,
                self.weight,
                added=self.method == "arimerge-add",
                modules=self.modules,
                rules=self.rules,
            )
        if self.method == "cross" and self.space not in (None, "cross"):
            raise UserError("the cross rule has no other space", remedy="leave --space out")
        space = "cross" if self.method == "cross" else self.space
        return (divergence * self.weight).onto(
            task, space=space, modules=self.modules, rules=self.rules, out_rank=self.out_rank, **(self.guards or {})
        )

    def space_of(self, structure: str) -> str:
        """Where adapters of a structure are merged, for people."""
        if self.method.startswith("arimerge"):
            return f"{structure}, coefficients λ and 1 − λ"
        return self._rule(structure).name.replace("/", ", ") + " space"

    def _rule(self, structure: str) -> Family:
        return family(structure, "cross" if self.method == "cross" else self.space)

    def provenance(self, task: Adapter, inputs: Mapping[str, str]) -> dict[str, Any]:
        """How the merge came about.

        Args:
            task: The task's adapter, as loaded.
            inputs: What it and the references are: names and digests.
        """
        transfers = not self.method.startswith("arimerge")
        return {
            "how": self.method,
            "weight": self.weight,
            "rules": [list(rule) for rule in self.rules],
            "space": self._rule(task.structure).name.partition("/")[2] if transfers else None,
            "modules": self.modules if isinstance(self.modules, str) else list(self.modules),
            "out_rank": self.out_rank,
            "guards": {k: v for k, v in (self.guards or {}).items() if v is not None},
            "inputs": dict(inputs),
            "lingraft": __version__,
        }


def arimerge(
    task: Adapter,
    divergence: Divergence,
    weight: float,
    *,
    added: bool = False,
    modules: str | Sequence[str] = "all",
    rules: Sequence[tuple[str, float]] = (),
) -> Adapter:
    """AriMerge (Zhang et al. 2023): coefficients that sum to 1; a weight of 1 is the task itself.

    Args:
        task: The task's adapter.
        divergence: The two references.
        weight: λ, from 0 to 1.
        added: Plain addition `λT + (1 − λ)R_t` instead of the analogy with both references.
        modules: Which sites are merged.
        rules: Weights of their own for some of the sites.

    Raises:
        AdapterError: The adapters do not fit together, or their structure has no analogy.
    """
    target, source = divergence.target_ref, divergence.source_ref
    if divergence.weight != 1:
        raise AdapterError(
            "AriMerge takes the references as they are, not a weighted divergence",
            remedy="give --target-ref and --source-ref instead of --divergence",
        )
    named = {"task": task, "target reference": target, **({} if added else {"source reference": source})}
    analogies = {"lora": lora.analogy, "ia3": ia3.analogy}
    if not added and task.structure not in analogies:
        raise AdapterError(
            f"AriMerge's analogy is for {' and '.join(analogies)}, not for {task.structure}",
            remedy="use --method transfer, cross or arimerge-add",
        )
    sites = roles.select(list(dict.fromkeys(m for a in named.values() for m in a.layout)), modules)
    task, target, source = completed((task, target, source), sites)
    check_fit(dict(zip(named, (task, target, source), strict=False)), sites, any_rank=False)
    weights = roles.weights(sites, weight, rules)
    if not all(0 <= w <= 1 for w in weights.values()):
        raise AdapterError("AriMerge's weight λ is from 0 to 1", remedy="1 is the task itself, 0 the references alone")
    warn_of_unlike_starts(named)

    def read(module: str) -> Site:
        w = weights.get(module, 1.0)
        if w == 1:
            return task.read(module)
        if added:
            return combining.linear(task.structure, [task.site(module), target.site(module)], [w, 1 - w])
        return analogies[task.structure](task.site(module), target.site(module), source.site(module), w)

    return rebuilt((task, target, source), task.layout, read, Notes())


@dataclass(frozen=True)
class Combination:
    """How any number of adapters are combined.

    Attributes:
        method: One of `COMBINATIONS`.
        space: For LoRA: `factors`, where numbers are combined, or for `linear` `product`, which is `cat`.
        modules: Which sites are combined; the others stay the first adapter's.
        out_rank: The rank to compress to, where the result is exact in the weight update.
        density: The share of numbers that TIES and KnOTS keep.
        drop: The share of numbers that DARE drops.
        seed: Draws what DARE drops.
    """

    method: str = "linear"
    space: str | None = None
    modules: str | Sequence[str] = "all"
    out_rank: int | None = None
    density: float = 0.2
    drop: float = 0.9
    seed: int = 0

    def of(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        """The combined adapter, not yet computed: heads and configuration are the first one's.

        Raises:
            UserError: The method is unknown or does not go with the other options.
            AdapterError: The adapters do not fit together.
        """
        self._check(adapters, weights)
        structure = adapters[0].structure
        stacking = structure == "lora" and (self.method in ("cat", "knots") or self.space == "product")
        check_rank(self.out_rank, stacking, can=structure == "lora" and self.method == "linear")
        named = {f"adapter {n + 1}": adapter for n, adapter in enumerate(adapters)}
        sites = roles.select(list(dict.fromkeys(m for a in adapters for m in a.layout)), self.modules)
        adapters = completed(adapters, sites)
        named = dict(zip(named, adapters, strict=True))
        check_fit(named, sites, any_rank=stacking, any_size=self.method == "cat")
        first = adapters[0]
        if structure == "prefix" and self.method == "cat" and set(sites) != set(first.layout):
            raise AdapterError("virtual tokens stand in all layers or in none", remedy="leave --modules out")
        if not stacking and structure != "ia3" and self.method != "cat":
            warn_of_unlike_starts(named)
        notes = Notes()
        shapes = (
            {m: next(weight_shape(a.layout[m]) for a in adapters if m in a.layout) for m in sites} if stacking else {}
        )
        layout = {**first.layout, **{m: self._place(m, adapters, shapes) for m in sites}}
        arithmetic = self._arithmetic(structure, stacking)

        def read(module: str) -> Site:
            if module not in sites:
                return first.read(module)
            parts = [
                part_of(a, module, shapes[module], checked=self.method == "knots") if stacking else a.site(module)
                for a in adapters
            ]
            site = arithmetic(module, parts, weights)
            if self.out_rank is None:
                return site
            site, notes.energy[module] = lora.compress(site, self.out_rank)
            return site

        return rebuilt(adapters, layout, read, notes)

    def _check(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
        if self.method not in COMBINATIONS:
            raise UserError(f"unknown method '{self.method}'", remedy=suggestion(self.method, COMBINATIONS))
        if not adapters or len(adapters) != len(weights):
            raise UserError(
                "give every adapter a weight, and at least one adapter",
                remedy="write ADAPTER=WEIGHT for each, such as runs/a=0.5",
            )
        if not all(math.isfinite(w) for w in weights):
            raise AdapterError("a weight must be a finite number", remedy="give a weight such as 0.5")
        if not 0 < self.density <= 1 or not 0 <= self.drop < 1:
            raise UserError(
                "the density is above 0 and at most 1, the share dropped at least 0 and below 1",
                remedy="give --density 0.2, or --drop 0.9",
            )
        spaces = {"linear": ("factors", "product"), "ties": ("factors",), "dare": ("factors",)}.get(self.method, ())
        if self.space not in (None, *spaces):
            raise UserError(f"'{self.method}' has no space '{self.space}'", remedy="leave --space out")
        structure = adapters[0].structure
        if self.space is not None and structure != "lora":
            raise UserError(f"'{structure}' has no space '{self.space}'", remedy="leave --space out")
        if self.method == "knots" and structure != "lora":
            raise AdapterError(
                f"KnOTS aligns weight updates, which adapters of the structure '{structure}' have not",
                remedy="use --method linear",
            )
        if self.method in ("ties", "dare") and structure not in ("lora", "ia3", "sparse"):
            raise AdapterError(
                f"{self.method} drops numbers that change little, and a {structure} adapter's numbers are no changes: "
                "zero is not where they start",
                remedy="use --method linear",
            )

    def _arithmetic(self, structure: str, stacking: bool) -> Callable[[str, Sequence[Site], Sequence[float]], Site]:
        """The combination of one site."""
        if self.method == "knots":
            return lambda module, sites, weights: combining.knots(sites, weights, self.density)
        if self.method == "cat" or stacking:
            return lambda module, sites, weights: combining.concatenated(structure, sites, weights)
        if self.method == "ties":
            return lambda module, sites, weights: combining.ties(structure, sites, weights, self.density)
        if self.method == "dare":
            return lambda module, sites, weights: combining.dare(
                structure, sites, weights, self.drop, self.seed, module
            )
        return lambda module, sites, weights: combining.linear(structure, sites, weights)

    def _place(self, module: str, adapters: Sequence[Adapter], shapes: Mapping[str, tuple[int, int]]) -> Place:
        """The combined site's shape."""
        if module in shapes:
            out, inner = shapes[module]
            ranks = [rank_of(a.layout[module]) for a in adapters if module in a.layout]
            # The thin SVD of KnOTS has no more singular values than its core has rows or columns.
            rank = min(out, sum(min(r, inner) for r in ranks)) if self.method == "knots" else sum(ranks)
            return lora_place(*shapes[module], kept_rank(rank, shapes[module], self.out_rank), 1.0)
        places = [adapter.layout[module] for adapter in adapters]
        return _side_by_side(adapters[0].structure, places) if self.method == "cat" else places[0]

    def provenance(self, inputs: Sequence[tuple[Path, float]]) -> dict[str, Any]:
        """How the combination came about."""
        return {
            "how": self.method,
            "space": self.space,
            "modules": self.modules if isinstance(self.modules, str) else list(self.modules),
            "out_rank": self.out_rank,
            **({"density": self.density} if self.method in ("ties", "knots") else {}),
            **({"drop": self.drop, "seed": self.seed} if self.method == "dare" else {}),
            "inputs": [{"digest": content_digest(path), "weight": weight} for path, weight in inputs],
            "lingraft": __version__,
        }


def _side_by_side(structure: str, places: Sequence[Place]) -> Place:
    """The shape of concatenated sites; LoRA's is found elsewhere, other structures do not grow."""
    shapes = dict(places[0].shapes)
    if structure == "bottleneck":
        size = sum(place.shapes["down"][0] for place in places)
        d = shapes["down"][1]
        shapes = {"down": (size, d), "down_bias": (size,), "up": (d, size), "up_bias": (d,)}
    elif structure == "prefix":
        size = sum(place.shapes["key"][0] for place in places)
        shapes = {role: (size, shape[1]) for role, shape in shapes.items()}
    return replace(places[0], shapes=shapes)


def energy_kept(adapter: Adapter) -> dict[str, float] | None:
    """Mean and least share of energy that a compressed merge kept, once it has been computed."""
    if not adapter.notes.energy:
        return None
    values = list(adapter.notes.energy.values())
    return {"mean": float(np.mean(values)), "least": min(values)}


def _precise(adapter: Adapter) -> Adapter:
    return replace(adapter, read=lambda m: _double(adapter.read(m)))


def _double(site: Site) -> Site:
    return site.map(lambda t: t if t.dtype.kind == "i" else np.asarray(t, dtype=np.float64))


def verify(output: Path, parts: Sequence[Adapter], merge: Callable[[Sequence[Adapter]], Adapter]) -> float:
    """How far a merge on disk is from the formula in float64: ‖out − expected‖ / ‖expected‖ of the effects, over all sites.

    Args:
        output: The merge's folder.
        parts: The adapters it was made of.
        merge: Merges such adapters; a compressed merge is compared with the uncompressed one.
    """
    written, exact = Adapter.load(output), merge([_precise(part) for part in parts])
    wrong = right = 0.0
    for module in exact.modules:
        expected, found = exact.site(module), _double(written.read(module))
        wrong += distance(exact.structure, found, expected) ** 2
        right += distance(exact.structure, expected) ** 2
    return (wrong / right) ** 0.5 if right else wrong**0.5


def similarity(x: Adapter, y: Adapter) -> dict[str, Any]:
    """How alike two adapters' changes are: weight updates for LoRA, `l − 1` for (IA)³, the numbers themselves elsewhere.

    Returns:
        `cosine` and the `norms` of both, over all shared sites; `by_layer` and `norms_by_layer`, the same by the number in the
        path.

    Raises:
        AdapterError: They have no site in common, or structures or shapes differ.
    """
    shared = [m for m in x.modules if m in y.layout]
    if x.structure == y.structure and not shared:
        raise AdapterError(
            "the two adapters have no site in common", remedy="give adapters of the same modules of one base model"
        )
    check_fit({"first": x, "second": y}, shared, any_rank=x.structure == "lora", compared=True)
    sums: dict[str, np.ndarray[Any, Any]] = {}
    for module in shared:
        a, b = _double(x.site(module)), _double(y.site(module))
        pairs = ((a, b), (a, a), (b, b))
        products = np.array([inner_product(x.structure, left, right) for left, right in pairs])
        number = roles.layer_of(module)
        layer = "-" if number is None else str(number)
        sums[layer] = sums.get(layer, 0) + products
    total = np.sum(list(sums.values()), axis=0)
    if not np.isfinite(total).all():
        raise AdapterError(
            "the numbers are too large to be measured", remedy="look for very large values in the adapters"
        )
    ordered = sorted(sums.items(), key=lambda item: (len(item[0]), item[0]))
    return {
        "cosine": _cosine(total),
        "norms": _norms(total),
        "by_layer": {layer: _cosine(value) for layer, value in ordered},
        "norms_by_layer": {layer: _norms(value) for layer, value in ordered},
    }


def _norms(products: Any) -> list[float]:
    return [max(float(n), 0.0) ** 0.5 for n in products[1:]]


def _cosine(products: Any) -> float | None:
    """⟨x, y⟩ / (‖x‖ ‖y‖), or None where one of them is zero."""
    # Gram products of updates that cancel may come out slightly below zero.
    scale = float(np.sqrt(max(products[1], 0)) * np.sqrt(max(products[2], 0)))
    return float(products[0] / scale) if scale > 0 else None
