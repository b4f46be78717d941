"""What all adapter folders in PEFT's layout share: their files, the shape of a site, and what is refused."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lingraft import bounded
from lingraft.algebra import Site
from lingraft.errors import AdapterError
from lingraft.tensors import DTYPES, Spec, TensorFile

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SIDECAR = "lingraft.json"
PREFIX = "base_model.model."
FLOATS = frozenset(DTYPES[kind] for kind in ("F64", "F32", "F16", "BF16"))

Config = Mapping[str, Any]
Values = Iterator[np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Place:
    """One site's shape.

    Attributes:
        shapes: The shape of every tensor, by role.
        scaling: The factor the model applies to the site's action.
    """

    shapes: Mapping[str, tuple[int, ...]]
    scaling: float = 1.0


@dataclass(frozen=True)
class Opened:
    """An adapter's tensors, opened: what there is, and how to read a site.

    Attributes:
        layout: The shape of every site, by module path, in order.
        read: Reads one site, in the types of the file.
        others: Names of tensors that belong to no site: a head.
    """

    layout: dict[str, Place]
    read: Callable[[str], Site]
    others: tuple[str, ...]


class Layout(Protocol):
    """How adapters of one structure are laid out in PEFT's folders."""

    @property
    def structure(self) -> str:
        """The structure's name in lingraft."""
        ...

    @property
    def peft_type(self) -> str:
        """The structure's name in `adapter_config.json`."""
        ...

    def check(self, config: Config, where: Path) -> None:
        """Refuses a configuration of which a merge would drop a part in silence."""
        ...

    def open(self, config: Config, tensors: TensorFile) -> Opened:
        """Finds the sites of a tensor file."""
        ...

    def encode(
        self, layout: Mapping[str, Place], read: Callable[[str], Site], dtype: np.dtype[Any]
    ) -> tuple[list[Spec], Values]:
        """The file's tensors, announced and then one at a time."""
        ...

    def announced(self, layout: Mapping[str, Place], specs: Iterable[Spec]) -> Mapping[str, Place]:
        """The sites with the shapes that `encode` announced, where these show only when they are computed."""
        ...

    def config_for(self, config: Config, layout: Mapping[str, Place]) -> dict[str, Any]:
        """PEFT's configuration for sites of these shapes."""
        ...

    def kind(self, config: Config) -> dict[str, Any]:
        """What must be equal in two adapters before their numbers can be compared, besides the shapes."""
        ...

    def size(self, place: Place) -> int | None:
        """A site's rank, bottleneck or number of virtual tokens."""
        ...


@dataclass(frozen=True)
class RoleLayout:
    """The layout of structures that have one tensor a role, named `<module>.<suffix>`: every such structure is a row.

    Attributes:
        structure: The structure's name in lingraft.
        peft_type: The structure's name in `adapter_config.json`.
        marker: What all tensor names contain; a name with it that is not one of ours is refused.
        suffixes: By role, how the tensor's name ends.
        place: From a module's name, its tensors' shapes and the configuration to its place; raises ValueError for shapes
            that do not fit together.
        sized: The role and axis that give a site's size, where it has one.
        alike: Fields of the configuration that must be equal, with PEFT's defaults.
        configured: Changes to the configuration for sites of these shapes.
        refused: From the configuration, what a merge would drop in silence, by name.
    """

    structure: str
    peft_type: str
    marker: str
    suffixes: Mapping[str, str]
    place: Callable[[str, Mapping[str, tuple[int, ...]], Config], Place]
    sized: tuple[str, int] | None = None
    alike: Mapping[str, Any] = field(default_factory=dict)
    configured: Callable[[Mapping[str, Place]], dict[str, Any]] = lambda layout: {}
    refused: Callable[[Config], Mapping[str, Any]] = lambda config: {}

    def check(self, config: Config, where: Path) -> None:
        """See `Layout.check`."""
        names = [name for name, present in self.refused(config).items() if present]
        if names:
            raise AdapterError(
                f"this adapter does more than plain {self.peft_type}: " + "; ".join(names),
                where=where,
                remedy="train it without that: a merge would silently drop it",
            )

    def open(self, config: Config, tensors: TensorFile) -> Opened:
        """See `Layout.open`.

        Raises:
            AdapterError: A tensor is of another variant, a site lacks one, or shapes do not fit together.
        """
        names, others = self._find(tensors)
        layout: dict[str, Place] = {}
        for module, found in names.items():
            shapes = {role: tensors.shape(name) for role, name in found.items()}
            if any(0 in shape for shape in shapes.values()):
                raise AdapterError(
                    f"{module} has an empty tensor: {shapes}",
                    where=tensors.path,
                    remedy="make the adapter again, or copy it again whole",
                )
            try:
                layout[module] = self.place(module, shapes, config)
            except ValueError as error:
                raise AdapterError(
                    f"{module}: {error}", where=tensors.path, remedy="make the adapter again, or copy it again whole"
                ) from None

        def read(module: str) -> Site:
            return Site({role: tensors.read(n) for role, n in names[module].items()}, layout[module].scaling)

        return Opened(layout, read, others)

    def _find(self, tensors: TensorFile) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
        """Tensor names by module and role, and the names that belong to no site."""
        found: dict[str, dict[str, str]] = {}
        others: list[str] = []
        for name in tensors.names:
            path = name.removeprefix(PREFIX)
            role = next((r for r, suffix in self.suffixes.items() if path.endswith("." + suffix)), None)
            if role is not None:
                names = found.setdefault(path.removesuffix("." + self.suffixes[role]), {})
                if other := names.get(role):
                    raise AdapterError(
                        f"'{other}' and '{name}' are two tensors for one place",
                        where=tensors.path,
                        remedy="save the adapter again from one training",
                    )
                names[role] = name
            elif self.marker in name:
                raise AdapterError(
                    f"tensor '{name}' is of a variant that cannot be merged",
                    where=tensors.path,
                    remedy="train a plain adapter: without DoRA, bias or further modules to save",
                )
            else:
                others.append(name)
        if not found:
            raise AdapterError(
                f"this file has no tensors named …{self.marker}…",
                where=tensors.path,
                remedy="give an adapter of the structure that its adapter_config.json names",
            )
        for module, names in found.items():
            if absent := [suffix for role, suffix in self.suffixes.items() if role not in names]:
                raise AdapterError(
                    f"{module} lacks {', '.join(absent)}",
                    where=tensors.path,
                    remedy="make the adapter again, or copy it again whole",
                )
        return {m: {role: found[m][role] for role in self.suffixes} for m in sorted(found)}, tuple(others)

    def encode(
        self, layout: Mapping[str, Place], read: Callable[[str], Site], dtype: np.dtype[Any]
    ) -> tuple[list[Spec], Values]:
        """See `Layout.encode`."""
        specs: list[Spec] = [
            (f"{PREFIX}{module}.{self.suffixes[role]}", shape, dtype)
            for module, place in layout.items()
            for role, shape in place.shapes.items()
        ]

        def values() -> Values:
            for module, place in layout.items():
                site = read(module)
                for role in place.shapes:
                    yield site.tensors[role]

        return specs, values()

    def announced(self, layout: Mapping[str, Place], specs: Iterable[Spec]) -> Mapping[str, Place]:
        """The layout as it is."""
        return layout

    def config_for(self, config: Config, layout: Mapping[str, Place]) -> dict[str, Any]:
        """See `Layout.config_for`."""
        return {**config, **self.configured(layout), "inference_mode": True}

    def kind(self, config: Config) -> dict[str, Any]:
        """See `Layout.kind`."""
        return {name: config.get(name, default) for name, default in self.alike.items()}

    def size(self, place: Place) -> int | None:
        """See `Layout.size`."""
        return None if self.sized is None else place.shapes[self.sized[0]][self.sized[1]]


def check_folder(folder: Path) -> None:
    """Makes sure that a folder holds an adapter in safetensors.

    Raises:
        AdapterError: It does not; a pickle is refused with the command that converts it.
    """
    if not folder.is_dir():
        raise AdapterError("there is no such adapter folder", where=folder, remedy="check the path")
    if not (folder / CONFIG).is_file() and (read_sidecar(folder) or {}).get("kind") == "stack":
        parts = " or ".join(sorted(part.parent.name for part in folder.glob(f"*/{CONFIG}")))
        raise AdapterError("this is a stack, not an adapter", where=folder, remedy=f"give one of its parts: {parts}")
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"this folder has no {CONFIG}", where=folder, remedy="give the folder of a PEFT adapter")
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise AdapterError(
                "this adapter is a pickle (adapter_model.bin), which can run code when it is opened",
                where=folder,
                remedy='where you trust it, convert it: python -c "import sys, torch; from safetensors.torch import save_file; '
                "d = sys.argv[1]; save_file(torch.load(d + '/adapter_model.bin', weights_only=True), "
                f"d + '/{WEIGHTS}')\" {folder}",
            )
        raise AdapterError(f"this folder has no {WEIGHTS}", where=folder, remedy="give the folder of a PEFT adapter")


def shown(value: Any) -> str:
    """A value out of somebody's file as a message shows it: short, and without what would upset a terminal."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


_MOST_DIMENSIONS, _LONGEST_NAME, _LARGEST_SIZE, _DEEPEST = 16, 500, 1 << 40, 50


def check_tensors(tensors: TensorFile) -> None:
    """Makes sure that a file's tensors have names and shapes that a module's can have, those of a head as well.

    Raises:
        AdapterError: A name leads elsewhere or cannot be printed, or a shape is out of all proportion.
    """
    for name in tensors.names:
        # PEFT takes modules' names for patterns: those of a file must not be any.
        if len(name) > _LONGEST_NAME or not name.isprintable() or "" in name.split(".") or set(name) & _SIGNS:
            raise AdapterError(f"{name[:80]!r} is no name of a module's tensor", where=tensors.path, remedy=_AGAIN)
        shape = tensors.shape(name)
        if len(shape) > _MOST_DIMENSIONS or max(shape, default=0) > _LARGEST_SIZE:
            raise AdapterError(f"tensor '{name}' has the shape {shown(shape)}", where=tensors.path, remedy=_AGAIN)


_SIGNS = frozenset("/\\*+?()[]{}|^$")
_LARGEST_NOTE = 16 << 20
_AGAIN = "get the file from where the adapter came from"


def _read(path: Path) -> Any:
    """The contents of a JSON file that can be written again."""
    try:
        value = bounded.read(path, _LARGEST_NOTE)
    except (OSError, ValueError) as error:
        raise AdapterError(f"this file is damaged ({error})", where=path, remedy=_AGAIN) from None
    try:
        level = [value]
        for _ in range(_DEEPEST):
            level = [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]
        if level:
            raise AdapterError("this file is nested too deeply", where=path, remedy=_AGAIN)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise AdapterError("a value is NaN, infinite, or half a character", where=path, remedy=_AGAIN) from None
    return value


def read_sidecar(folder: Path) -> dict[str, Any] | None:
    """What lingraft noted beside an adapter; None beside one made elsewhere.

    Raises:
        AdapterError: The note is damaged.
    """
    if not (folder / SIDECAR).is_file():
        return None
    found = _read(folder / SIDECAR)
    backbone = found.get("backbone") or {} if isinstance(found, dict) else None
    if not isinstance(backbone, dict) or not all(
        _is_note(v) for v in (backbone.get("digest"), found.get("init_sha256"))
    ):
        raise AdapterError(
            "this file is not lingraft's", where=folder / SIDECAR, remedy="delete it: only the provenance is lost"
        )
    return found


def _is_note(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.isprintable())


_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_FITS: Mapping[str, Callable[[Any], bool]] = {
    "base_model_name_or_path": lambda value: value is None or isinstance(value, str),
    "task_type": lambda value: value is None or value in _TASKS,
    "lora_dropout": lambda value: type(value) in (int, float) and 0 <= value < 1,
    "fan_in_fan_out": lambda value: value is None or isinstance(value, bool),
    "modules_to_save": lambda value: value is None or (isinstance(value, list) and all(map(_is_name, value))),
}
"""What the fields may hold that are passed on to PEFT as they are."""


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_NAME


def read_config(folder: Path) -> dict[str, Any]:
    """PEFT's configuration.

    Raises:
        AdapterError: It is damaged.
    """
    config = _read(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterError("this is not an adapter's configuration", where=folder / CONFIG, remedy=_AGAIN)
    if wrong := [name for name, fits in _FITS.items() if name in config and not fits(config[name])]:
        said = ", ".join(f"{name} = {shown(config[name])}" for name in wrong)
        raise AdapterError(f"this is no value of PEFT's: {said}", where=folder / CONFIG, remedy=_AGAIN)
    return config
