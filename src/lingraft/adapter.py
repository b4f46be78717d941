"""Adapters and divergences as values: read lazily from PEFT's folders, combined with `-`, `*` and `+`, saved again.

    divergence = Adapter.load("clm-sw") - Adapter.load("clm-en")
    grafted = Adapter.load("topics-en") + 0.6 * divergence
    grafted.save("topics-sw")

Nothing is computed before `site` or `save` asks for it, and then one site at a time. Neither torch nor the base model
is needed.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lingraft import roles
from lingraft.algebra import Family, Site, transfer
from lingraft.digests import digest_file, digest_value
from lingraft.errors import AdapterError
from lingraft.families import FAMILIES, family, own_space
from lingraft.families.lora import compress, unstack
from lingraft.families.prefix import PrefixFlat
from lingraft.fitting import base_digest as base_digest
from lingraft.fitting import check_fit
from lingraft.layouts import LAYOUTS, layout_of
from lingraft.layouts.common import (
    CONFIG,
    SIDECAR,
    WEIGHTS,
    Layout,
    Place,
    check_folder,
    read_config,
    read_sidecar,
)
from lingraft.layouts.lora import place as lora_place
from lingraft.layouts.lora import rank_of, weight_shape
from lingraft.store import appearing, write_json
from lingraft.tensors import DTYPES, TensorFile, finite, write_tensors

PARTS = ("target_ref", "source_ref")
"""The folders of a divergence whose references cannot be stacked into one adapter."""


class AdapterWarning(UserWarning):
    """Something about a merge that deserves a look but does not make it wrong."""


@dataclass(frozen=True)
class Notes:
    """What a merge found out while it was computed, by site.

    Attributes:
        energy: The share of a weight update's energy (squared norm) that was kept at the output rank.
        guarded: Numbers that a guard against division by (nearly) nothing changed.
    """

    energy: dict[str, float] = field(default_factory=dict)
    guarded: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """An adapter in PEFT's layout, its tensors read when asked for.

    Attributes:
        structure: `lora`, `ia3`, `prefix`, `bottleneck`, `invertible` or `sparse`.
        config: The contents of `adapter_config.json`.
        layout: The shape of every site, by module path (`model.layers.0.self_attn.q_proj`).
        dtype: The type of its tensors on disk.
        sidecar: What lingraft knows beyond PEFT: the backbone's digest, the hash of the initial weights, provenance.
        read: Reads one site.
        others: Tensors that belong to no site (a head), by their full name; a merge takes the task adapter's.
        notes: For a merge, what showed while it was computed.
        parts: For a merge, the adapters it is made of.
        path: The folder it was read from.
    """

    structure: str
    config: Mapping[str, Any]
    layout: Mapping[str, Place]
    dtype: np.dtype[Any]
    sidecar: Mapping[str, Any]
    read: Callable[[str], Site] = field(repr=False)
    others: Mapping[str, Callable[[], np.ndarray[Any, Any]]] = field(default_factory=dict, repr=False)
    notes: Notes = field(default_factory=Notes, repr=False)
    parts: "tuple[Adapter, ...]" = field(default=(), repr=False)
    path: Path | None = None

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Opens an adapter folder; reads the configuration and the tensor file's header.

        Raises:
            AdapterError: The folder is not an adapter in safetensors that lingraft can compute with.
        """
        folder = Path(path)
        if is_divergence(folder):
            raise AdapterError(
                "this is a divergence, not an adapter",
                where=folder,
                remedy="graft it: lingraft merge --divergence DIR --task DIR",
            )
        return _open(folder)

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the sites, in order."""
        return tuple(self.layout)

    @property
    def files(self) -> Layout:
        """How adapters of this structure lie on disk."""
        return LAYOUTS[self.structure]

    def site(self, module: str) -> Site:
        """One site's tensors, floats in float32 (float64 stays).

        Raises:
            AdapterError: A number is NaN or infinite.
        """
        site = self.unchecked(module)
        for role, tensor in site.tensors.items():
            if not finite(tensor):
                raise AdapterError(
                    "a value is NaN or infinite",
                    where=f"{self.path or 'a merge'}: {module}.{role}",
                    remedy="train the adapter again with a lower learning rate, or get it from where it came from",
                )
        return site

    def unchecked(self, module: str) -> Site:
        """As `site`, for arithmetic through which NaN and infinity come to light in the result."""
        return self.read(module).map(_wide)

    def tensors(self) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """The sites' tensors by PEFT's names, in float32, one at a time."""
        specs, values = self.files.encode(self.layout, self.site, np.dtype(np.float32))
        for (name, _, _), value in zip(specs, values, strict=True):
            yield name, value

    @property
    def peft_config(self) -> dict[str, Any]:
        """PEFT's configuration for the sites as they are."""
        return self.files.config_for(self.config, self.layout)

    def __sub__(self, source: "Adapter") -> "Divergence":
        return Divergence(self, source)

    def __add__(self, divergence: "Divergence") -> "Adapter":
        return divergence.onto(self)

    def save(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> Path:
        """Writes an ordinary PEFT folder, which appears when it is complete.

        Raises:
            UserError: The folder exists already.
            AdapterError: A tensor came out as NaN or infinite.
        """
        target = Path(path)
        with appearing(target, {"kind": "adapter", **(provenance or {})}) as work:
            self.write(work, provenance)
        return target

    def write(self, folder: Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Writes the adapter's files into a folder that exists, one site at a time."""
        specs, encoded = self.files.encode(self.layout, self.read, self.dtype)
        announced = list(specs)
        rest = {name: read() for name, read in sorted(self.others.items())}
        announced += [(name, value.shape, value.dtype) for name, value in rest.items()]

        def values() -> Iterator[np.ndarray[Any, Any]]:
            for (name, _, dtype), value in zip(specs, encoded, strict=True):
                rounded = value if value.dtype == dtype else _rounded(value, dtype)
                if not finite(rounded):
                    for part in self.parts:  # Was it there before the merge? Then that is what to say.
                        for module in part.layout:
                            part.site(module)
                    raise AdapterError(
                        f"a value is NaN or infinite in {dtype}",
                        where=f"{self.path}: {name}" if self.path else name,
                        remedy="merge with a smaller weight, or adapters of a wider type",
                    )
                yield rounded
            for name, value in rest.items():
                if not finite(value):
                    raise AdapterError("a value is NaN or infinite", where=name)
                yield value

        write_tensors(folder / WEIGHTS, announced, values())
        write_json(folder / CONFIG, self.peft_config)
        made = {"provenance": dict(provenance)} if provenance is not None else {}
        write_json(folder / SIDECAR, {**self.sidecar, **made})


def _wide(tensor: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Floats in float32; float64 and integers as they are."""
    return tensor if tensor.dtype == np.float64 or tensor.dtype.kind == "i" else np.asarray(tensor, dtype=np.float32)


def _rounded(value: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    with np.errstate(over="ignore"):  # float16 may overflow: what comes of it is refused.
        return value.astype(dtype)


def part_of(adapter: Adapter, module: str, shape: tuple[int, int], *, checked: bool = False) -> Site:
    """A LoRA adapter's site, of rank 0 where it has none: an adapter without the site adds nothing there."""
    if module in adapter.layout:
        return adapter.site(module) if checked else adapter.unchecked(module)
    return Site({"A": np.zeros((0, shape[1]), np.float32), "B": np.zeros((shape[0], 0), np.float32)})


def merged_sidecar(first: Adapter) -> dict[str, Any]:
    """What a merged adapter keeps of the notes on the one it is built on."""
    return {k: v for k, v in first.sidecar.items() if k in ("format", "kind", "backbone", "family")}


def rebuilt(
    parts: Sequence[Adapter], layout: Mapping[str, Place], read: Callable[[str], Site], notes: Notes
) -> Adapter:
    """An adapter computed from others: the first one's configuration, type and head, new sites."""
    first = parts[0]
    config = first.config
    if set(layout) - set(first.layout):
        config = {**config, "target_modules": sorted(layout)}
    order = [*first.layout, *sorted(set(layout) - set(first.layout))]
    ordered = {module: layout[module] for module in order}
    sidecar = merged_sidecar(first)
    return Adapter(first.structure, config, ordered, first.dtype, sidecar, read, first.others, notes, tuple(parts))


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
            rules: Weights of their own for some of the sites, by the same names; later ones win.
            out_rank: The rank to compress to, in product space.
            **guards: `floor`, `bound` (ratios) or `rcond` (pseudo-inverses) of the rule.

        Raises:
            AdapterError: The three adapters do not fit together; every mismatch is named at once.
        """
        rule = family(task.structure, space, **guards)
        exact = rule.name == "lora/product"
        check_rank(out_rank, exact)
        named = {"task": task, "target reference": self.target_ref, "source reference": self.source_ref}
        sites = roles.select(list(dict.fromkeys(m for a in named.values() for m in a.layout)), modules)
        check_fit(named, sites, any_rank=exact)
        weights = {m: w for m, w in roles.weights(sites, self.weight, rules).items() if w != 0}
        if not weights:
            return task
        if not exact:
            warn_of_unlike_starts(named)
        return _transferred(rule, task, self.target_ref, self.source_ref, weights, out_rank)

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
        check_fit(named, sites, any_rank=lora)
        with appearing(Path(path), {"kind": "divergence", **(provenance or {})}) as work:
            if lora:
                self.stacked().write(work, provenance)
            else:
                for name, part in zip(PARTS, (self.target_ref, self.source_ref), strict=True):
                    (work / name).mkdir(exist_ok=True)
                    part.write(work / name)
                sidecar = {**merged_sidecar(self.target_ref), "kind": "divergence"}
                write_json(work / SIDECAR, {**sidecar, "provenance": dict(provenance or {})})
        return Path(path)

    def as_adapter(self) -> Adapter:
        """What the divergence adds (for (IA)³: multiplies with) as an adapter of the same structure: to be looked at."""
        target, source = self.target_ref, self.source_ref
        if target.structure == "lora":
            return self.stacked()
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

        hashes = {target.sidecar.get("init_sha256"), source.sidecar.get("init_sha256")}
        sidecar = {
            **{k: v for k, v in target.sidecar.items() if k in ("format", "backbone", "family")},
            "kind": "divergence",
            "target_ranks": {m: ranks[m][0] for m in layout},
            "init_sha256": hashes.pop() if len(hashes) == 1 else None,
        }
        dtype = common([target.dtype, source.dtype])
        if any(place.scaling != scaling(m) for m, place in source.layout.items()):
            # B_s · s_s / s_t has more digits than B_s.
            dtype = common([dtype, np.dtype(np.float32)])
        config = {**target.config, "modules_to_save": None}  # heads have no divergence
        if set(layout) != set(target.layout):
            config["target_modules"] = sorted(layout)
        return Adapter("lora", config, layout, dtype, sidecar, read)

    @classmethod
    def load(cls, path: str | Path) -> "Divergence":
        """Opens a saved divergence.

        Raises:
            AdapterError: The folder is not one.
        """
        folder = Path(path)
        if is_divergence(folder) and all((folder / part).is_dir() for part in PARTS):
            target, source = (_open(folder / part) for part in PARTS)
            return cls(target, source)
        stacked = _open(folder)
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
            sidecar = {**stacked.sidecar, "kind": "adapter"}
            return replace(
                stacked,
                layout=layout,
                sidecar=sidecar,
                read=lambda m: unstack(stacked.site(m), ranks[m])[index],
            )

        return cls(part(0), part(1))


def check_rank(out_rank: int | None, exact: bool) -> None:
    """Makes sure that an output rank can be had.

    Raises:
        AdapterError: It cannot.
    """
    if out_rank is not None and not exact:
        raise AdapterError(
            "an output rank needs LoRA's product space", remedy="add --space product, or leave --out-rank out"
        )
    if out_rank is not None and out_rank < 1:
        raise AdapterError(
            f"an output rank must be at least 1, not {out_rank}", remedy="leave --out-rank out to keep all"
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
        return rule.difference(_whole(target), _whole(source))

    def read(module: str) -> Site:
        if module not in weights:
            return task.read(module)
        if isinstance(rule, PrefixFlat):
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


def content_digest(folder: Path) -> str:
    """SHA-256 of an adapter's tensors: what provenance names its inputs by."""
    if (folder / WEIGHTS).is_file():
        return digest_file(folder / WEIGHTS)
    return digest_value([digest_file(folder / part / WEIGHTS) for part in PARTS])


def is_divergence(folder: Path) -> bool:
    """Whether a folder says that it holds a divergence."""
    return (read_sidecar(folder) or {}).get("kind") == "divergence"


def _open(folder: Path) -> Adapter:
    check_folder(folder)
    config = read_config(folder)
    files = layout_of(config, folder / CONFIG)
    files.check(config, folder / CONFIG)
    sidecar = read_sidecar(folder) or {"format": 1, "kind": "adapter", "family": files.structure}
    tensors = TensorFile(folder / WEIGHTS)
    opened = files.open(config, tensors)
    types: set[np.dtype[Any]] = set()
    for name in set(tensors.names) - set(opened.others):
        dtype = tensors.dtype(name)
        if dtype in _FLOATS:
            types.add(dtype)
        elif files.structure != "sparse":
            raise AdapterError(f"tensor '{name}' holds {dtype}, not floats", where=folder)

    def other(name: str) -> Callable[[], np.ndarray[Any, Any]]:
        return lambda: tensors.read(name)

    others = {name: other(name) for name in opened.others}
    return Adapter(files.structure, config, opened.layout, common(types), sidecar, opened.read, others, path=folder)


_FLOATS = frozenset(DTYPES[kind] for kind in ("F64", "F32", "F16", "BF16"))


def common(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """A type that holds the numbers of all these: the only one, or float32, or float64 where that is among them."""
    kinds = set(dtypes)
    if len(kinds) == 1:
        return kinds.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in kinds else np.float32)
