"""Adapters as values: read lazily from PEFT's folders, combined with `-`, `*` and `+`, saved again.

    divergence = Adapter.load("clm-sw") - Adapter.load("clm-en")
    grafted = Adapter.load("topics-en") + 0.6 * divergence
    grafted.save("topics-sw")

Nothing is computed before `site` or `save` asks for it, and then one site at a time. Neither torch nor the base model
is needed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lingraft.algebra import Site
from lingraft.cards import Facts, origin, write_card
from lingraft.digests import digest_file, digest_value
from lingraft.errors import AdapterError
from lingraft.layouts import LAYOUTS, layout_of
from lingraft.layouts.common import (
    CONFIG,
    FLOATS,
    SIDECAR,
    WEIGHTS,
    Layout,
    Place,
    check_folder,
    check_tensors,
    read_config,
    read_sidecar,
)
from lingraft.store import appearing, write_json
from lingraft.tensors import TensorFile, finite, write_tensors

if TYPE_CHECKING:
    from lingraft.divergence import Divergence

PATTERNS = ("target_modules", "feedforward_modules")
NARROWING = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
"""Fields of PEFT's configuration that may hold patterns, and those that leave modules out."""
BEGINNINGS = frozenset(
    {
        "init_lora_weights",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "auto_mapping",
    }
)
"""Fields that say how an adapter began or where it ran: of one that is finished PEFT needs none of them."""
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
        return open_adapter(folder)

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
        """PEFT's configuration for the sites as they are, named one by one: no pattern of the file is matched with anything."""
        found = {k: v for k, v in self.files.config_for(self.config, self.layout).items() if k not in BEGINNINGS}
        if any(isinstance(found.get(name), str) for name in PATTERNS) or any(found.get(name) for name in NARROWING):
            found = retargeted(found, self.layout)
        if isinstance(found.get("feedforward_modules"), str):  # (IA)³: their vectors are over inputs.
            found["feedforward_modules"] = [m for m, place in self.layout.items() if place.shapes["l"][0] == 1]
        return found

    def __sub__(self, source: "Adapter") -> "Divergence":
        from lingraft.divergence import Divergence

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
        """Writes the adapter's files into a folder that exists, one site at a time.

        Raises:
            AdapterError: It is a second stage, which is more than its own files; or a number came out as NaN or infinite.
        """
        if "second" in self.sidecar:
            raise AdapterError(
                "a second stage is more than its own tensors", where=self.path, remedy="copy its whole folder instead"
            )
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
                    raise AdapterError(
                        "a value is NaN or infinite",
                        where=name,
                        remedy="train it again, with a lower learning rate, or merge with a smaller weight",
                    )
                yield value

        write_tensors(folder / WEIGHTS, announced, values())
        config = self.files.config_for(self.config, self.files.announced(self.layout, specs))
        write_json(folder / CONFIG, config)
        made = {"provenance": dict(provenance)} if provenance is not None else {}
        notes = {**self.sidecar, **made, **made_of(self.parts)}
        write_json(folder / SIDECAR, notes)
        write_card(folder, Facts(config, notes))


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


def completed(adapters: Sequence[Adapter], sites: Iterable[str]) -> tuple[Adapter, ...]:
    """Adapters with sites that only some of them have: a sparse difference without one changes no entry there.

    Args:
        adapters: Those to be merged; of another structure they stay as they are.
        sites: The sites that all must have.
    """
    if any(adapter.structure != "sparse" for adapter in adapters):
        return tuple(adapters)
    having = {site: next((a for a in adapters if site in a.layout), None) for site in sites}
    return tuple(
        _completed(adapter, {s: a for s, a in having.items() if a and s not in adapter.layout}) for adapter in adapters
    )


def _completed(adapter: Adapter, absent: Mapping[str, Adapter]) -> Adapter:
    if not absent:
        return adapter

    def read(site: str) -> Site:
        if site not in absent:
            return adapter.read(site)
        shape = absent[site].read(site).tensors["shape"]
        return Site({"indices": np.zeros(0, np.int64), "values": np.zeros(0, np.float32), "shape": shape})

    layout = {**adapter.layout, **{site: absent[site].layout[site] for site in sorted(absent)}}
    return replace(adapter, layout=layout, read=read)


def made_of(parts: Sequence[Adapter]) -> dict[str, Any]:
    """What a merge notes of the adapters that it is made of; of those without digest that lie nowhere."""

    def digest(part: Adapter) -> str | None:
        return content_digest(part.path) if part.path is not None else None

    return {"made_of": [origin(p.structure, p.sidecar, digest(p)) for p in parts]} if parts else {}


def merged_sidecar(first: Adapter) -> dict[str, Any]:
    """What a merged adapter keeps of the notes on the one it is built on."""
    return {k: v for k, v in first.sidecar.items() if k in ("format", "kind", "backbone", "family", "head", "beneath")}


def retargeted(config: Mapping[str, Any], layout: Mapping[str, Place]) -> dict[str, Any]:
    """PEFT's configuration for these sites and no others: what left some of them out before must not do so now."""
    narrowing = dict.fromkeys(NARROWING & set(config))
    return {**config, **narrowing, "target_modules": sorted(layout)}


def rebuilt(
    parts: Sequence[Adapter], layout: Mapping[str, Place], read: Callable[[str], Site], notes: Notes
) -> Adapter:
    """An adapter computed from others: the first one's configuration, type and head, new sites."""
    first = parts[0]
    config = first.config
    if set(layout) - set(first.layout):
        config = retargeted(config, layout)
    order = [*first.layout, *sorted(set(layout) - set(first.layout))]
    ordered = {module: layout[module] for module in order}
    sidecar = merged_sidecar(first)
    return Adapter(first.structure, config, ordered, first.dtype, sidecar, read, first.others, notes, tuple(parts))


def content_digest(folder: Path) -> str:
    """SHA-256 of an adapter's tensors: what provenance names its inputs by."""
    if (folder / WEIGHTS).is_file():
        return digest_file(folder / WEIGHTS)
    return digest_value([digest_file(folder / part / WEIGHTS) for part in PARTS])


def is_divergence(folder: Path) -> bool:
    """Whether a folder says that it holds a divergence."""
    return (read_sidecar(folder) or {}).get("kind") == "divergence"


def open_adapter(folder: Path) -> Adapter:
    """Opens a folder in PEFT's layout, an adapter's or a stacked divergence's.

    Raises:
        AdapterError: It cannot be computed with.
    """
    check_folder(folder)
    config = read_config(folder)
    files = layout_of(config, folder / CONFIG)
    files.check(config, folder / CONFIG)
    sidecar = read_sidecar(folder) or {"format": 1, "kind": "adapter", "family": files.structure}
    tensors = TensorFile(folder / WEIGHTS)
    check_tensors(tensors)
    opened = files.open(config, tensors)
    types: set[np.dtype[Any]] = set()
    for name in set(tensors.names) - set(opened.others):
        dtype = tensors.dtype(name)
        if dtype in FLOATS:
            types.add(dtype)
        elif files.structure != "sparse":
            raise AdapterError(
                f"tensor '{name}' holds {dtype}, not floats",
                where=folder,
                remedy="save the adapter in float32, float16 or bfloat16",
            )

    def other(name: str) -> Callable[[], np.ndarray[Any, Any]]:
        return lambda: tensors.read(name)

    others = {name: other(name) for name in opened.others}
    return Adapter(files.structure, config, opened.layout, common(types), sidecar, opened.read, others, path=folder)


def common(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """A type that holds the numbers of all these: the only one, or float32, or float64 where that is among them."""
    kinds = set(dtypes)
    if len(kinds) == 1:
        return kinds.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in kinds else np.float32)
