"""Divergences as values: what leads from one language's adapter to another's, grafted onto any task's adapter."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lingraft import __version__, roles
from lingraft.adapter import (
    PARTS,
    Adapter,
    AdapterWarning,
    Notes,
    common,
    completed,
    is_divergence,
    made_of,
    merged_sidecar,
    open_adapter,
    part_of,
    rebuilt,
    retargeted,
)
from lingraft.algebra import Family, Site, transfer
from lingraft.cards import Facts, write_card
from lingraft.errors import AdapterError
from lingraft.families import FAMILIES, family, own_space
from lingraft.families.lora import compress, unstack
from lingraft.families.prefix import Prefix
from lingraft.fitting import check_fit
from lingraft.layouts.common import SIDECAR
from lingraft.layouts.lora import place as lora_place
from lingraft.layouts.lora import rank_of, weight_shape
from lingraft.store import appearing, write_json


@dataclass(frozen=True)
class Divergence:
    """How the target language differs from the source language on the reference task, `weight` times as strong.

    On disk, a divergence of LoRA adapters is a LoRA folder of the two references stacked, `[A_t; A_s]` and `[B_t, −B_s]`: plain
    PEFT opens it as the exact difference of the two updates, and every space can be had from it. A divergence of another
    structure is a folder with the two references in it.
    """

    target_ref: Adapter
    source_ref: Adapter
    weight: float = 1.0

    def __mul__(self, weight: float) -> "Divergence":
        return replace(self, weight=self.weight * weight)

    __rmul__ = __mul__

    def onto(
        self,
        task: Adapter,
        *,
        space: str | None = None,
        modules: str | Sequence[str] = "all",
        rules: Sequence[tuple[str, float]] = (),
        out_rank: int | None = None,
        **guards: float | None,
    ) -> Adapter:
        """The task adapter plus this divergence (AdaMergeX).

        Args:
            task: The task's adapter.
            space: Where the structure is merged; None for its own rule. LoRA: `factors` (the paper's), `product` (exact in the
                weight update). `cross`: the other kind of structure's rule.
            modules: Which sites are merged, by name, role or `layer:0-5`; the others stay the task's.
            rules: Weights of their own for some of the sites, by the same names, not multiplied with the divergence's; later
                ones win.
            out_rank: The rank to compress to, in product space.
            **guards: `floor`, `bound` (ratios) or `rcond` (pseudo-inverses) of the rule.

        Raises:
            AdapterError: The three adapters do not fit together; every mismatch is named at once.
        """
        rule = family(task.structure, space, **guards)
        exact = rule.name == "lora/product"
        check_rank(out_rank, exact, can=task.structure == "lora")
        named = {"task": task, "target reference": self.target_ref, "source reference": self.source_ref}
        sites = roles.select(list(dict.fromkeys(m for a in named.values() for m in a.layout)), modules)
        weights = {m: w for m, w in roles.weights(sites, self.weight, rules).items() if w != 0}
        whole = dict(zip(named, completed(tuple(named.values()), weights or sites), strict=True))
        check_fit(whole, weights or sites, any_rank=exact)
        if exact:  # Where neither reference has a site, nothing is added: it stays as it is.
            known = {*self.target_ref.layout, *self.source_ref.layout}
            weights = {m: w for m, w in weights.items() if m in known}
        made = {
            "how": "cross" if space == "cross" else "transfer",
            "weight": self.weight,
            "space": rule.name.partition("/")[2],
            "modules": modules if isinstance(modules, str) else list(modules),
            "rules": [list(one) for one in rules],
            "out_rank": out_rank,
            "lingraft": __version__,
        }
        if not weights:
            return _noted(task, made, tuple(named.values()))
        warn_of_lost_heads(named)
        if not exact:
            warn_of_unlike_starts(named)
        task, target, source = whole.values()
        return _noted(_transferred(rule, task, target, source, weights, out_rank), made, tuple(named.values()))

    def save(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> Path:
        """Writes the divergence as a folder that appears when it is complete.

        Raises:
            AdapterError: The references do not fit together, or the weight is not 1.
        """
        if self.weight != 1:
            raise AdapterError("a divergence is saved at weight 1", remedy="give the weight when it is grafted")
        lora = self.target_ref.structure == "lora"
        sites = dict.fromkeys([*self.target_ref.layout, *self.source_ref.layout])
        named = {"target reference": self.target_ref, "source reference": self.source_ref}
        check_fit(dict(zip(named, completed(tuple(named.values()), sites), strict=True)), sites, any_rank=lora)
        with appearing(Path(path), {"kind": "divergence", **(provenance or {})}) as work:
            if lora:
                self.stacked().write(work, provenance)
            else:
                for name, part in zip(PARTS, (self.target_ref, self.source_ref), strict=True):
                    (work / name).mkdir(exist_ok=True)
                    part.write(work / name)
                notes = {
                    **merged_sidecar(self.target_ref),
                    "kind": "divergence",
                    "init_sha256": self._init_hash(),
                    "provenance": dict(provenance or {}),
                    **made_of((self.target_ref, self.source_ref)),
                }
                write_json(work / SIDECAR, notes)
                write_card(work, Facts(None, notes))
        return Path(path)

    def as_adapter(self) -> Adapter:
        """What the divergence adds (for (IA)³: multiplies with) as an adapter of the same structure: to be looked at."""
        target, source = self.target_ref, self.source_ref
        if target.structure == "lora":
            return self.stacked()
        target, source = completed((target, source), dict.fromkeys([*target.layout, *source.layout]))
        named = {"target reference": target, "source reference": source}
        check_fit(named, dict.fromkeys([*target.layout, *source.layout]), any_rank=False)
        rule = FAMILIES[target.structure][
            "cross" if target.structure in ("prefix", "bottleneck") else own_space(target.structure)
        ]
        return replace(target, read=lambda m: rule.difference(target.site(m), source.site(m)), path=None)

    def stacked(self) -> Adapter:
        """The exact difference of two LoRA adapters as one, from which both can be had again."""
        target, source = self.target_ref, self.source_ref
        shapes = {m: weight_shape(a.layout[m]) for a in (source, target) for m in a.layout}

        def scaling(module: str) -> float:
            return (target if module in target.layout else source).layout[module].scaling

        ranks = {m: [rank_of(a.layout[m]) if m in a.layout else 0 for a in (target, source)] for m in shapes}
        layout = {m: lora_place(*shapes[m], sum(ranks[m]), scaling(m)) for m in sorted(shapes)}

        def read(module: str) -> Site:
            t, s = (part_of(a, module, shapes[module]) for a in (target, source))
            # In units of the target's scaling, so that equal scalings leave the references' numbers bit for bit.
            b_s = s.tensors["B"] if s.scaling == scaling(module) else s.tensors["B"] * (s.scaling / scaling(module))
            a = np.concatenate([t.tensors["A"], s.tensors["A"]], axis=0)
            return Site({"A": a, "B": np.concatenate([t.tensors["B"], -b_s], axis=1)}, scaling(module))

        sidecar = {
            **{k: v for k, v in target.sidecar.items() if k in ("format", "backbone", "family")},
            "kind": "divergence",
            "target_ranks": {m: ranks[m][0] for m in layout},
            "init_sha256": self._init_hash(),
        }
        dtype = common([target.dtype, source.dtype])
        if any(place.scaling != scaling(m) for m, place in source.layout.items()):
            # B_s · s_s / s_t has more digits than B_s.
            dtype = common([dtype, np.dtype(np.float32)])
        config = {**target.config, "modules_to_save": None}  # heads have no divergence
        if set(layout) != set(target.layout):
            config = retargeted(config, layout)
        return Adapter("lora", config, layout, dtype, sidecar, read, parts=(target, source))

    def _init_hash(self) -> Any:
        """The hash of the initial weights, where both references started from the same."""
        hashes = [part.sidecar.get("init_sha256") for part in (self.target_ref, self.source_ref)]
        return hashes[0] if hashes[0] == hashes[1] else None

    @classmethod
    def load(cls, path: str | Path) -> "Divergence":
        """Opens a saved divergence.

        Raises:
            AdapterError: The folder is not one.
        """
        folder = Path(path)
        if is_divergence(folder) and all((folder / part).is_dir() for part in PARTS):
            target, source = (open_adapter(folder / part) for part in PARTS)
            return cls(target, source)
        stacked = open_adapter(folder)
        ranks = stacked.sidecar.get("target_ranks")
        if (
            stacked.sidecar.get("kind") != "divergence"
            or stacked.structure != "lora"
            or not isinstance(ranks, dict)
            or set(ranks) != set(stacked.layout)
            or not all(isinstance(r, int) and 0 <= r <= rank_of(stacked.layout[m]) for m, r in ranks.items())
        ):
            raise AdapterError("this folder is not a divergence", where=path, remedy="make one: lingraft divergence")

        def part(index: int) -> Adapter:
            layout = {}
            for module, site in stacked.layout.items():
                rank = (ranks[module], rank_of(site) - ranks[module])[index]
                if rank:
                    layout[module] = lora_place(*weight_shape(site), rank, site.scaling)
            sidecar = {**stacked.sidecar, "kind": "adapter", **_known_of(stacked, index)}
            return replace(
                stacked,
                layout=layout,
                sidecar=sidecar,
                read=lambda m: unstack(stacked.site(m), ranks[m])[index],
            )

        return cls(part(0), part(1))


def _noted(adapter: Adapter, made: Mapping[str, Any], parts: tuple[Adapter, ...]) -> Adapter:
    """An adapter that knows what it is made of, however it is saved."""
    return replace(adapter, sidecar={**adapter.sidecar, "provenance": dict(made)}, parts=parts)


def _known_of(stacked: Adapter, index: int) -> dict[str, Any]:
    """Where a part of a stacked divergence comes from: not what the divergence notes of itself."""
    made = stacked.sidecar.get("made_of")
    known = made[index] if isinstance(made, list) and len(made) == len(PARTS) else None
    return {"provenance": known, "made_of": None} if isinstance(known, dict) else {}


def check_rank(out_rank: int | None, exact: bool, *, can: bool) -> None:
    """Makes sure that an output rank can be had.

    Args:
        out_rank: The rank asked for.
        exact: Whether the merge is of weight updates.
        can: Whether it could be.

    Raises:
        AdapterError: It cannot.
    """
    if out_rank is not None and not exact:
        raise AdapterError(
            "only a merge of LoRA's weight updates has an output rank",
            remedy="add --space product, or leave --out-rank out" if can else "leave --out-rank out",
        )
    if out_rank is not None and out_rank < 1:
        raise AdapterError(
            f"an output rank must be at least 1, not {out_rank}", remedy="leave --out-rank out to keep all"
        )


def warn_of_lost_heads(named: Mapping[str, Adapter]) -> None:
    """Warns where a reference holds trained tensors besides its sites that the task has not: a merge does not take them."""
    (_, task), *references = named.items()
    for who, reference in references:
        lost = sorted(set(reference.others) - set(task.others))
        if lost:
            warnings.warn(
                f"the {who} also holds {len(lost)} tensors that no merge takes, first {lost[0]}: heads come from the task",
                AdapterWarning,
                stacklevel=4,
            )


def kept_rank(rank: int, shape: tuple[int, int], out_rank: int | None) -> int:
    """The rank of a merged site: all of it, or what `compress` leaves."""
    return rank if out_rank is None else min(out_rank, rank, *shape)


def warn_of_unlike_starts(named: Mapping[str, Adapter]) -> None:
    """Warns where adapters are merged number by number that did not start from the same initial weights."""
    if len({adapter.sidecar.get("init_sha256") for adapter in named.values()}) > 1:
        warnings.warn(
            "the adapters did not start from the same initial weights: merged number by number, their difference is then mostly "
            "noise; train them with equal seeds, or, where they are LoRA, merge in product space",
            AdapterWarning,
            stacklevel=4,
        )


def _transferred(
    rule: Family, task: Adapter, target: Adapter, source: Adapter, weights: Mapping[str, float], out_rank: int | None
) -> Adapter:
    """The merge, not yet computed."""
    exact = rule.name == "lora/product"
    notes = Notes()
    layout = dict(task.layout)
    parts = (task, target, source)
    shapes: dict[str, tuple[int, int]] = {}
    if exact:
        for module in weights:
            shapes[module] = next(weight_shape(a.layout[module]) for a in parts if module in a.layout)
            rank = sum(rank_of(a.layout[module]) for a in parts if module in a.layout)
            layout[module] = lora_place(*shapes[module], kept_rank(rank, shapes[module], out_rank), 1.0)

    # Guards would hide an infinity; sums do not, and the result is looked at anyway.
    look = Adapter.unchecked if rule.name == "lora/factors" else Adapter.site

    @cache
    def one_for_all() -> Site:
        whole = _whole(target), _whole(source)
        if changed := rule.guarded(*whole):
            notes.guarded["all layers"] = changed
        return rule.difference(*whole)

    def read(module: str) -> Site:
        if module not in weights:
            return task.read(module)
        if isinstance(rule, Prefix) and rule.whole:
            return rule.apply(task.site(module), rule.scale(one_for_all(), weights[module]))
        t, r_t, r_s = (part_of(a, module, shapes[module]) if exact else look(a, module) for a in parts)
        if changed := rule.guarded(r_t, r_s):
            notes.guarded[module] = changed
        site = transfer(rule, t, r_t, r_s, weights[module])
        if out_rank is None:
            return site
        site, notes.energy[module] = compress(site, out_rank)
        return site

    return rebuilt(parts, layout, read, notes)


def _whole(adapter: Adapter) -> Site:
    """All sites as one."""
    return Site({f"{m}.{role}": t for m in adapter.layout for role, t in adapter.site(m).tensors.items()})
