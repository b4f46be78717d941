"""Adapters and divergences as values: read lazily from PEFT's folders, combined with `-`, `*` and `+`, saved again.

    divergence = Adapter.load("clm-sw") - Adapter.load("clm-en")
    grafted = Adapter.load("topics-en") + 0.6 * divergence
    grafted.save("topics-sw")

Nothing is computed before `site` or `save` asks for it, and then one site at a time. Neither torch nor the base model
is needed.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lingraft import roles
from lingraft.algebra import Site, transfer
from lingraft.digests import digest_file
from lingraft.errors import AdapterError
from lingraft.families import family
from lingraft.families.lora import compress, unstack
from lingraft.peft_layout import (
    CONFIG,
    PREFIX,
    SIDECAR,
    WEIGHTS,
    Place,
    check_folder,
    config_for,
    place_of,
    read_config,
    read_sidecar,
)
from lingraft.store import appearing, write_json
from lingraft.tensors import DTYPES, Spec, TensorFile, write_tensors


class AdapterWarning(UserWarning):
    """Something about a merge that deserves a look but does not make it wrong."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in PEFT's layout, its tensors read when asked for.

    Attributes:
        config: The contents of `adapter_config.json`.
        layout: The shape of every site, by module path (`model.layers.0.self_attn.q_proj`).
        dtype: The type of its tensors on disk.
        sidecar: What lingraft knows beyond PEFT: the backbone's digest, the hash of the initial weights, provenance.
        others: Tensors that are not LoRA factors (a head), by their full name; a merge takes the task adapter's.
        energy: For a compressed merge, the share of each site's energy that was kept; filled as sites are computed.
    """

    config: Mapping[str, Any]
    layout: Mapping[str, Place]
    dtype: np.dtype[Any]
    sidecar: Mapping[str, Any]
    read: Callable[[str], Site] = field(repr=False)
    others: Mapping[str, Callable[[], np.ndarray[Any, Any]]] = field(default_factory=dict, repr=False)
    energy: dict[str, float] = field(default_factory=dict, repr=False)
    path: Path | None = None

    structure = "lora"

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Opens an adapter folder; reads the configuration and the tensor file's header.

        Raises:
            AdapterError: The folder is not a LoRA adapter in safetensors that lingraft can compute with.
        """
        folder = Path(path)
        adapter = _open(folder)
        if adapter.sidecar.get("kind") == "divergence":
            raise AdapterError(
                "this is a divergence, not an adapter",
                where=folder,
                remedy="graft it: lingraft merge --divergence DIR --task DIR",
            )
        return adapter

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the sites, sorted."""
        return tuple(self.layout)

    def site(self, module: str) -> Site:
        """One site's tensors in float32 (float64 stays), A: rank × in, B: out × rank."""
        site = self.read(module)
        return site.map(lambda t: t if t.dtype == np.float64 else np.asarray(t, dtype=np.float32))

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
        specs: list[Spec] = []
        for module, place in self.layout.items():
            specs.append((f"{PREFIX}{module}.lora_A.weight", (place.rank, place.in_features), self.dtype))
            specs.append((f"{PREFIX}{module}.lora_B.weight", (place.out_features, place.rank), self.dtype))
        rest = {name: read() for name, read in sorted(self.others.items())}
        specs += [(name, value.shape, value.dtype) for name, value in rest.items()]

        def values() -> Any:
            for module in self.layout:
                site = self.read(module)
                for role in ("A", "B"):
                    with np.errstate(over="ignore"):  # Rounding may overflow float16: the check below says so.
                        rounded = np.asarray(site.tensors[role], dtype=self.dtype)
                    if not np.isfinite(rounded).all():
                        place = f"{module}.lora_{role}"
                        raise AdapterError(
                            f"a value is NaN or infinite in {self.dtype}",
                            where=f"{self.path}: {place}" if self.path else place,
                            remedy="look for NaN and very large values in the adapters it is made of",
                        )
                    yield rounded
            for name, value in rest.items():
                if not np.isfinite(np.asarray(value, dtype=np.float32)).all():
                    raise AdapterError("a value is NaN or infinite", where=name)
                yield value

        write_tensors(folder / WEIGHTS, specs, values())
        write_json(folder / CONFIG, config_for(self.config, self.layout))
        made = {"provenance": dict(provenance)} if provenance is not None else {}
        write_json(folder / SIDECAR, {**self.sidecar, **made})


@dataclass(frozen=True)
class Divergence:
    """How the target language differs from the source language on the reference task, `weight` times as strong.

    On disk it is a LoRA folder of the two references stacked, `[A_t; A_s]` and `[B_t, −B_s]`: plain PEFT opens it as the
    exact difference of the two updates, and both spaces can be had from it.
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
        space: str = "factors",
        modules: str | Sequence[str] = "all",
        out_rank: int | None = None,
    ) -> Adapter:
        """The task adapter plus this divergence (AdaMergeX).

        Args:
            task: The task's adapter.
            space: `factors` (the paper's) or `product` (exact in the weight update).
            modules: Which sites are merged, by name or role; the others stay the task's.
            out_rank: The rank to compress to, in product space.

        Raises:
            AdapterError: The three adapters do not fit together; every mismatch is named at once.
        """
        rule = family(task.structure, space)
        if out_rank is not None and space != "product":
            raise AdapterError(
                "an output rank needs product space", remedy="add --space product, or leave --out-rank out"
            )
        if out_rank is not None and out_rank < 1:
            raise AdapterError(
                f"an output rank must be at least 1, not {out_rank}", remedy="leave --out-rank out to keep all"
            )
        if not 0 <= self.weight < float("inf"):
            raise AdapterError(f"the weight λ must be a finite number of at least 0, not {self.weight}")
        chosen = frozenset(roles.select(task.layout, modules))
        self._check(task, space, chosen)
        if self.weight == 0:
            return task
        layout = dict(task.layout)
        energy: dict[str, float] = {}
        if space == "product":
            for module in chosen:
                layout[module] = self._stacked_place(task, module, out_rank)

        def read(module: str) -> Site:
            if module not in chosen:
                return task.read(module)
            site = transfer(
                rule,
                task.site(module),
                self.target_ref.site(module),
                self.source_ref.site(module),
                self.weight,
            )
            if out_rank is None:
                return site
            site, energy[module] = compress(site, out_rank)
            return site

        sidecar = {k: v for k, v in task.sidecar.items() if k in ("format", "kind", "backbone", "family")}
        return Adapter(task.config, layout, task.dtype, sidecar, read, task.others, energy)

    def _stacked_place(self, task: Adapter, module: str, out_rank: int | None) -> Place:
        place = task.layout[module]
        rank = sum(a.layout[module].rank for a in (task, self.target_ref, self.source_ref))
        if out_rank is not None:
            rank = min(out_rank, rank, place.in_features, place.out_features)
        return Place(place.in_features, place.out_features, rank, 1.0)

    def _check(self, task: Adapter, space: str, chosen: frozenset[str]) -> None:
        problems: list[str] = []
        named = {"task": task, "target reference": self.target_ref, "source reference": self.source_ref}
        bases = {who: (a.sidecar.get("backbone") or {}).get("digest") for who, a in named.items()}
        if len({b for b in bases.values() if b}) > 1:
            problems.append(
                "they belong to different base models: " + ", ".join(f"{w} {b[:24]}" for w, b in bases.items() if b)
            )
        for who, other in list(named.items())[1:]:
            absent = sorted(m for m in chosen if m not in other.layout)
            if absent:
                problems.append(f"the {who} lacks {len(absent)} sites, first {absent[0]}")
            for module in sorted(chosen & set(other.layout)):
                mine, theirs = task.layout[module], other.layout[module]
                if mine.shape != theirs.shape:
                    problems.append(f"{module}: {mine.shape} in the task, {theirs.shape} in the {who} (out × in)")
                elif space == "factors" and mine.rank != theirs.rank:
                    problems.append(
                        f"{module}: rank {mine.rank} in the task, {theirs.rank} in the {who} (--space product takes any)"
                    )
        if problems:
            shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
            raise AdapterError("the adapters do not fit together:\n  - " + "\n  - ".join(shown))
        hashes = {a.sidecar.get("init_sha256") for a in named.values()}
        if space == "factors" and len(hashes) > 1:
            warnings.warn(
                "the adapters did not start from the same initial weights: in factors space their difference is then mostly noise; "
                "train them with equal seeds, or merge in product space",
                AdapterWarning,
                stacklevel=3,
            )

    def save(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> Path:
        """Writes the divergence as a folder that appears when it is complete.

        Raises:
            AdapterError: The references do not fit together, or the weight is not 1.
        """
        with appearing(Path(path), {"kind": "divergence", **(provenance or {})}) as work:
            self._as_adapter().write(work, provenance)
        return Path(path)

    def _as_adapter(self) -> Adapter:
        if self.weight != 1:
            raise AdapterError("a divergence is saved at weight 1", remedy="give the weight when it is grafted")
        target, source = self.target_ref, self.source_ref
        self._check(target, "product", frozenset(target.layout))
        layout = {
            m: Place(p.in_features, p.out_features, p.rank + source.layout[m].rank, p.scaling)
            for m, p in target.layout.items()
        }

        def read(module: str) -> Site:
            t, s = target.site(module), source.site(module)
            # In units of the target's scaling, so that equal scalings leave the references' numbers bit for bit.
            b_s = s.tensors["B"] if s.scaling == t.scaling else s.tensors["B"] * (s.scaling / t.scaling)
            a = np.concatenate([t.tensors["A"], s.tensors["A"]], axis=0)
            return Site({"A": a, "B": np.concatenate([t.tensors["B"], -b_s], axis=1)}, t.scaling)

        hashes = {target.sidecar.get("init_sha256"), source.sidecar.get("init_sha256")}
        sidecar = {
            **{k: v for k, v in target.sidecar.items() if k in ("format", "backbone", "family")},
            "kind": "divergence",
            "target_ranks": {m: p.rank for m, p in target.layout.items()},
            "init_sha256": hashes.pop() if len(hashes) == 1 else None,
        }
        dtype = _common([target.dtype, source.dtype])
        if any(place.scaling != source.layout[m].scaling for m, place in target.layout.items()):
            # B_s · s_s / s_t has more digits than B_s.
            dtype = _common([dtype, np.dtype(np.float32)])
        config = {**target.config, "modules_to_save": None}  # heads have no divergence
        return Adapter(config, layout, dtype, sidecar, read)

    @classmethod
    def load(cls, path: str | Path) -> "Divergence":
        """Opens a saved divergence.

        Raises:
            AdapterError: The folder is not one.
        """
        stacked = _open(Path(path))
        ranks = stacked.sidecar.get("target_ranks")
        if (
            stacked.sidecar.get("kind") != "divergence"
            or not isinstance(ranks, dict)
            or set(ranks) != set(stacked.layout)
        ):
            raise AdapterError("this folder is not a divergence", where=path, remedy="make one: lingraft divergence")

        def part(index: int) -> Adapter:
            layout = {}
            for module, place in stacked.layout.items():
                first = int(ranks[module])
                layout[module] = replace(place, rank=first if index == 0 else place.rank - first)
            sidecar = {**stacked.sidecar, "kind": "adapter"}
            return replace(
                stacked,
                layout=layout,
                sidecar=sidecar,
                read=lambda m: unstack(stacked.site(m), int(ranks[m]))[index],
            )

        return cls(part(0), part(1))


def base_digest(adapter: Adapter) -> str | None:
    """The digest of the base model the adapter was trained on, where lingraft recorded it."""
    return (adapter.sidecar.get("backbone") or {}).get("digest")


def content_digest(folder: Path) -> str:
    """SHA-256 of an adapter's tensors: what provenance names its inputs by."""
    return digest_file(folder / WEIGHTS)


def _open(folder: Path) -> Adapter:
    check_folder(folder)
    config = read_config(folder)
    sidecar = read_sidecar(folder)
    tensors = TensorFile(folder / WEIGHTS)
    factors: dict[str, dict[str, str]] = {}
    others: list[str] = []
    for name in tensors.names:
        stem, _, ending = name.removeprefix(PREFIX).rpartition(".lora_")
        if stem and ending in ("A.weight", "B.weight"):
            factors.setdefault(stem, {})[ending[0]] = name
        elif "lora_" in name:
            raise AdapterError(f"tensor '{name}' is of a LoRA variant that cannot be merged", where=folder)
        else:
            others.append(name)
    layout = {m: place_of(tensors, config, m, names, folder) for m, names in sorted(factors.items())}
    if not layout:
        raise AdapterError("this adapter has no LoRA factors", where=folder)

    def read(module: str) -> Site:
        return Site({role: tensors.read(factors[module][role]) for role in ("A", "B")}, layout[module].scaling)

    def other(name: str) -> Callable[[], np.ndarray[Any, Any]]:
        return lambda: tensors.read(name)

    types = {name: tensors.dtype(name) for names in factors.values() for name in names.values()}
    for name, dtype in types.items():
        if dtype not in _FLOATS:
            raise AdapterError(f"tensor '{name}' holds {dtype}, not floats", where=folder)
    return Adapter(
        config, layout, _common(types.values()), sidecar, read, {name: other(name) for name in others}, path=folder
    )


_FLOATS = frozenset(DTYPES[kind] for kind in ("F64", "F32", "F16", "BF16"))


def _common(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """A type that holds the numbers of all these: the only one, or float32, or float64 where that is among them."""
    kinds = set(dtypes)
    if len(kinds) == 1:
        return kinds.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in kinds else np.float32)
