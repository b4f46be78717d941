"""Stacks: several adapters on one model, the lowest first, and folders that hold the parts of one.

A stack folder has a folder in PEFT's layout for every part, named by its structure, and a note that says in which order they
stand:

    lang-sw/lingraft.json                  {"kind": "stack", "parts": ["invertible", "bottleneck"], …}
    lang-sw/invertible/, lang-sw/bottleneck/
"""

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lingraft.adapter import Adapter, AdapterWarning, content_digest
from lingraft.cards import Facts, write_card
from lingraft.digests import digest_value
from lingraft.errors import AdapterError
from lingraft.fitting import base_digest
from lingraft.layouts import LAYOUTS
from lingraft.layouts.common import SIDECAR, read_sidecar
from lingraft.store import write_json

KIND = "stack"
Adapters = Adapter | Sequence[Adapter] | None
"""What can be put on a model: an adapter, several that stand on one another (the lowest first), or none."""


def is_stack(folder: Path) -> bool:
    """Whether a folder says that it holds the parts of a stack."""
    return (read_sidecar(folder) or {}).get("kind") == KIND


def parts_of(folder: Path) -> list[Path]:
    """The folders of a stack's parts, the lowest first; an adapter's folder is its own only part.

    Raises:
        AdapterError: The note names something that is no part.
    """
    if not is_stack(folder):
        return [folder]
    names = (read_sidecar(folder) or {}).get("parts")
    # A name out of a file becomes a path only if it is one of ours.
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name in LAYOUTS for name in names):
        raise AdapterError(
            "the parts of this stack cannot be read",
            where=folder / SIDECAR,
            remedy="make the adapter again, or copy it again whole",
        )
    return [folder / name for name in names]


def load_stack(paths: Sequence[Path | str]) -> tuple[Adapter, ...]:
    """Opens adapters that stand on one another.

    Args:
        paths: Folders of adapters and of stacks, the lowest first.

    Raises:
        AdapterError: One cannot be opened, or they cannot stand on one another.
    """
    found = tuple(Adapter.load(part) for path in paths for part in parts_of(Path(path)))
    check_stack(found)
    if found:
        _compare(found[-1], found[:-1])
    return found


def _compare(top: Adapter, beneath: Sequence[Adapter]) -> None:
    """Warns where an adapter was trained on top of other structures than those it is put on."""
    notes = top.sidecar.get("beneath")
    then = [str(note.get("structure")) for note in notes if isinstance(note, dict)] if isinstance(notes, list) else []
    now = [adapter.structure for adapter in beneath]
    # A language adapter's own coupling is not beneath it: both are learned together.
    if now not in (then, [*then, "invertible"]):
        warnings.warn(
            f"{top.path}: this adapter was trained on top of {', '.join(then) or 'nothing'}, and stands on "
            f"{', '.join(now) or 'nothing'}",
            AdapterWarning,
            stacklevel=3,
        )


def as_stack(adapter: Adapters) -> tuple[Adapter, ...]:
    """One adapter, several or none as a stack."""
    if adapter is None:
        return ()
    return (adapter,) if isinstance(adapter, Adapter) else tuple(adapter)


def check_stack(stack: Sequence[Adapter], *, covered: bool = False) -> None:
    """Makes sure that adapters can stand on one another.

    Args:
        stack: The adapters, the lowest first.
        covered: Whether another one is to stand on the last of them.

    Raises:
        AdapterError: They belong to different base models, or one must stand alone, on top or below.
    """
    bases = {digest for adapter in stack if (digest := base_digest(adapter))}
    if len(bases) > 1:
        raise AdapterError(
            f"the adapters of a stack belong to different base models: {', '.join(sorted(b[:24] for b in bases))}",
            remedy="give adapters of one base model",
        )
    if len(stack) + covered > 1 and (second := next((a for a in stack if "second" in a.sidecar), None)) is not None:
        raise AdapterError("a second stage stands on its first one alone", where=second.path, remedy="give it alone")
    for below in stack if covered else stack[:-1]:
        if below.structure == "prefix":
            raise AdapterError("nothing can stand on a prefix", where=below.path, remedy="give it last")
    for below, above in pairwise(stack):
        if above.structure == "sparse" and below.structure != "sparse":
            raise AdapterError(
                f"a sparse difference changes the base's own weights: it cannot stand on {below.structure}",
                where=above.path,
                remedy="give sparse differences first",
            )


def write_note(folder: Path, parts: Sequence[str], notes: Mapping[str, Any]) -> None:
    """Notes in a folder whose parts are written which they are, the lowest first."""
    said = {"format": 1, **notes, "kind": KIND, "parts": list(parts)}
    write_json(folder / SIDECAR, said)
    write_card(folder, Facts(None, said))


def stack_digest(folder: Path) -> str:
    """Of an adapter's folder its tensors' digest, of a stack's that of all of its parts."""
    if not is_stack(folder):
        return content_digest(folder)
    return digest_value([content_digest(part) for part in parts_of(folder)])


def described(stack: Sequence[Adapter]) -> list[dict[str, Any]]:
    """What an adapter notes of those it was trained on top of."""
    return [
        {
            "structure": adapter.structure,
            "digest": content_digest(adapter.path) if adapter.path is not None else None,
            "language": (adapter.sidecar.get("provenance") or {}).get("language"),
        }
        for adapter in stack
    ]
