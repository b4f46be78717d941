"""What of an adapter's folder is published, and what speaks against it; nothing is sent here."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from lingraft.adapter import PARTS, Adapter, content_digest, is_divergence
from lingraft.bounded import read
from lingraft.cards import CARD, Facts, base_model, card, is_hub_id
from lingraft.digests import digest_bytes, digest_value
from lingraft.divergence import Divergence
from lingraft.errors import LingraftError, StoreError
from lingraft.fusion.stages import FIRST, TENSORS, second_stage
from lingraft.layouts import LAYOUTS
from lingraft.layouts.common import CONFIG, SIDECAR, WEIGHTS
from lingraft.stacks import load_stack
from lingraft.store import RECORD, read_json
from lingraft.tensors import TensorFile, finite

_BELONGING = (CARD, CONFIG, SIDECAR, WEIGHTS, TENSORS)
_FOLDERS = frozenset({*LAYOUTS, *PARTS, FIRST})
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"})
_FRONT = re.compile(r"\A---\n(.*?\n)---(?:\n|\Z)", re.DOTALL)
_PATH = re.compile(
    r"(?:^|[\s\"'=(,;])(?:~[\\/]|file:|/(?:home|Users|root|mnt|media|tmp|var|data|scratch|work|opt|srv|private|gpfs|lustre)/|[A-Za-z]:\\|\\\\\w)"
)
"""Places of a machine in a text."""


@dataclass(frozen=True)
class Said:
    """Something that speaks against publishing.

    Attributes:
        what: What it is, in one sentence.
        remedy: What to do about it.
    """

    what: str
    remedy: str


@dataclass(frozen=True)
class Sent:
    """A file to be published.

    Attributes:
        name: Its path in the repository.
        size: Its bytes.
        content: What is sent: the file, or what takes its place.
        changed: Whether it is not the folder's own file.
    """

    name: str
    size: int
    content: Path | bytes
    changed: bool = False


@dataclass(frozen=True)
class Parcel:
    """What would be published.

    Attributes:
        files: The files, in order.
        left_out: Names of others in the folder, with why.
        warned: What should be looked at.
        refused: Why it is not published.
    """

    files: list[Sent] = field(default_factory=list[Sent])
    left_out: list[str] = field(default_factory=list[str])
    warned: list[Said] = field(default_factory=list[Said])
    refused: list[Said] = field(default_factory=list[Said])

    @cached_property
    def front(self) -> str:
        """The card's front matter, as it is written."""
        found = next((file for file in self.files if file.name == CARD), None)
        matched = _FRONT.match(_text(found.content)) if found else None
        return matched[1] if matched else ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {
            "files": [{"path": f.name, "bytes": f.size, "changed": f.changed} for f in self.files],
            "left_out": self.left_out,
            "card": _loaded(self.front),
            "warnings": [{"what": said.what, "remedy": said.remedy} for said in self.warned],
            "refused": [{"what": said.what, "remedy": said.remedy} for said in self.refused],
        }


def parcel_of(folder: Path, repository: str) -> Parcel:
    """Looks through an adapter's folder.

    Args:
        folder: The adapter's folder: one adapter, a divergence, a stack, or a second stage with its first.
        repository: Where it is to go, OWNER/NAME.
    """
    parcel = Parcel()
    if repository.count("/") != 1 or not is_hub_id(repository):
        parcel.refused.append(Said(f"'{repository}' is no OWNER/NAME", "give the owner's name, a slash, and a name"))
    found = _belonging(folder, parcel)
    _look_at_numbers(found, folder, parcel)
    _look_at_record(found, folder, parcel)
    texts = _texts(found, folder, parcel)
    _look_at_card(found, texts, folder, parcel)
    for name in dict.fromkeys([*found, *texts]):
        content = texts.get(name, folder / name)
        if isinstance(content, Path):
            parcel.files.append(Sent(name, content.stat().st_size, content))
        else:
            same = name in found and (folder / name).read_bytes() == content
            parcel.files.append(Sent(name, len(content), content, changed=not same))
    parcel.files.sort(key=lambda file: file.name)
    return parcel


def _text(content: Path | bytes) -> str:
    raw = content.read_bytes() if isinstance(content, Path) else content
    return raw.decode("utf-8", "replace").replace("\r\n", "\n")


def _loaded(front: str) -> dict[str, Any] | None:
    """Front matter as a mapping; None: it is none."""
    try:
        found = yaml.safe_load(front)
        json.dumps(found)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


# Which files


def _belonging(folder: Path, parcel: Parcel) -> list[str]:
    """The files of the folder that are an adapter's, by their paths in it."""
    found: list[str] = []
    for name, path in _walk(folder):
        last = PurePosixPath(name).name
        if path.is_symlink():
            parcel.refused.append(Said(f"'{name}' is a link", "put the file itself in its place, or remove it"))
        elif path.is_dir():  # One that is not gone into.
            parcel.left_out.append(f"{name}/ ({'hidden' if last.startswith('.') else 'not of an adapter'})")
        elif ".partial" in name or last.startswith("checkpoint"):
            parcel.refused.append(
                Said(f"'{name}' is of a training that has not ended", "let it end, or remove what is left of it")
            )
        elif path.suffix.lower() in _PICKLES:
            parcel.refused.append(
                Said(
                    f"'{name}' may be a pickle, which can run code where it is opened",
                    "remove it: safetensors hold it all",
                )
            )
        elif last in _BELONGING:
            found.append(name)
        else:
            why = (
                "hidden"
                if last.startswith(".")
                else "the store's own record"
                if name == RECORD
                else "not of an adapter"
            )
            parcel.left_out.append(f"{name} ({why})")
    return found


def _walk(folder: Path, below: str = "") -> Iterator[tuple[str, Path]]:
    """Every file by its path; folders that are parts of adapters are gone into, and links are not followed."""
    for path in sorted(folder.iterdir()):
        name = f"{below}{path.name}"
        if path.is_dir() and not path.is_symlink() and (path.name in _FOLDERS and below.count("/") < 2):
            yield from _walk(path, f"{name}/")
        elif path.is_dir() and not path.is_symlink() and path.name.endswith(".partial"):
            yield f"{name}/.partial", path / ".partial"
        else:
            yield name, path


# What is in them


def _look_at_numbers(found: list[str], folder: Path, parcel: Parcel) -> None:
    """Makes sure that the adapter opens, and that all of its numbers are numbers."""
    again = "train or merge it again, or get it from where it came from"
    try:
        if is_divergence(folder):
            Divergence.load(folder)
        else:
            loaded: tuple[Adapter, ...] = load_stack([folder])
            second_stage(loaded[-1])
    except LingraftError as error:
        parcel.refused.append(Said(f"it cannot be opened: {error.what}", error.remedy or again))
    for name in found:
        if not name.endswith(".safetensors"):
            continue
        try:
            file = TensorFile(folder / name)
            wrong = next((tensor for tensor in file.names if not finite(file.read(tensor))), None)
        except LingraftError as error:
            parcel.refused.append(Said(error.what, error.remedy or again))
            continue
        if wrong is not None:
            parcel.refused.append(Said(f"'{name}' has a value that is NaN or infinite, in {wrong}", again))


def _look_at_record(found: list[str], folder: Path, parcel: Parcel) -> None:
    """Compares tensors and configuration with what the folder's record says of them; a card may be changed."""
    if not (folder / RECORD).is_file():
        return
    try:
        record = read_json(folder / RECORD)
    except StoreError as error:
        parcel.warned.append(Said(f"the folder's record cannot be read: {error.what}", "make the adapter again"))
        return
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, Mapping):
        return
    for name in found:
        if PurePosixPath(name).name == CARD or name not in files or digest_bytes(folder / name) == files[name]:
            continue
        said = Said(
            f"'{name}' is not what it was when the folder was made", "make the adapter again, or load and save it"
        )
        (parcel.refused if name.endswith(".safetensors") else parcel.warned).append(said)


def _texts(found: list[str], folder: Path, parcel: Parcel) -> dict[str, bytes]:
    """Configurations, notes and cards as they are published: with no place of this machine in them."""
    values: dict[str, Any] = {}
    for name in found:
        if PurePosixPath(name).name in (CONFIG, SIDECAR):
            try:
                values[name] = read(folder / name)
            except (OSError, ValueError) as error:
                parcel.refused.append(Said(f"'{name}' cannot be read ({error})", "make the adapter again"))
    before = {name: json.dumps(value) for name, value in values.items()}
    _name_the_base(values, parcel)
    _match_the_first_stage(values, before, folder)
    for name, value in values.items():
        for text in _strings(value):
            if _PATH.search(text):
                parcel.refused.append(
                    Said(
                        f"'{name}' names a place of this machine: {text[:120]!r}",
                        "remove it from the file, or make the adapter again",
                    )
                )
    return {
        name: _json(value) if json.dumps(value) != before[name] else (folder / name).read_bytes()
        for name, value in values.items()
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _name_the_base(values: dict[str, Any], parcel: Parcel) -> None:
    """Puts the base model's name in the place of a path to it, in all files: what is published has no use for the path."""
    local: dict[str, str] = {}
    for name, value in values.items():
        if not isinstance(value, dict):
            continue
        place = value if PurePosixPath(name).name == CONFIG else value.get("backbone")
        key = "base_model_name_or_path" if place is value else "name"
        if not isinstance(place, dict) or not isinstance(place.get(key), str):
            continue
        notes = values.get(str(PurePosixPath(name).with_name(SIDECAR)), {})
        if base_model({"base_model_name_or_path": place[key]}, notes if isinstance(notes, dict) else {}) is None:
            last = PureWindowsPath(place[key]).name or place[key]
            local[place[key]] = last
            if last != place[key]:
                place[key] = last
    for path, last in sorted(local.items()):
        parcel.warned.append(
            Said(
                f"the base model is no model of the hub: published as '{last}'"
                if path != last
                else f"'{last}' may be no model of the hub",
                "who loads the adapter has to give the base model; train it on a hub id to have it named",
            )
        )


def _match_the_first_stage(values: dict[str, Any], before: Mapping[str, str], folder: Path) -> None:
    """The digest of a first stage whose configuration is published otherwise than it is here."""
    name = f"{FIRST}/{CONFIG}"
    notes = values.get(SIDECAR)
    if name not in values or json.dumps(values[name]) == before[name] or not isinstance(notes, dict):
        return
    if isinstance(notes.get("second"), dict):
        config = hashlib.sha256(_json(values[name])).hexdigest()
        notes["second"]["stage1"] = digest_value([content_digest(folder / FIRST), config])


def _strings(value: Any) -> Iterator[str]:
    """Every text in plain data, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield str(key)
            yield from _strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)


def _look_at_card(found: list[str], texts: dict[str, bytes], folder: Path, parcel: Parcel) -> None:
    """The card: one is made of the notes where there is none; it needs a licence, and says nothing of this machine."""
    if (folder / CARD).is_file() and not (folder / CARD).is_symlink():
        texts[CARD] = (folder / CARD).read_bytes()
    else:
        config, notes = (json.loads(texts[n]) if n in texts else None for n in (CONFIG, SIDECAR))
        facts = Facts(config if isinstance(config, dict) else None, notes if isinstance(notes, dict) else {})
        texts[CARD] = card(facts).encode()
        parcel.warned.append(
            Said(f"there is no {CARD}: one made of the folder's notes is published", f"write {CARD} to say more")
        )
    said = _text(texts[CARD])
    matched = _FRONT.match(said)
    front = _loaded(matched[1]) if matched else None
    if front is None:
        parcel.warned.append(
            Said(f"{CARD} has no front matter that the hub can read", "begin it with YAML between two lines of ---")
        )
    elif not front.get("license"):
        parcel.warned.append(Said("the card names no licence", f"add a line such as `license: apache-2.0` to {CARD}"))
    cards = {CARD: said} | {n: _text(folder / n) for n in found if n.endswith(f"/{CARD}")}
    for name in (name for name, text in cards.items() if _PATH.search(text)):
        parcel.warned.append(Said(f"{name} names a place of a machine", "look through it, and remove the path"))
