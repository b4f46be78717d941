"""A run's grafted adapters, copied to where a user looks for them, each with a card that has the run's scores.

A copy has a record of its own: the step's, with the card's hash among those of the files and the digest of the step's record below
`collected`. It is whole by the same rule as a step, and a second report copies nothing that is still the same.
"""

import hashlib
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lingraft.cards import CARD, Facts, Score, card
from lingraft.digests import digest_bytes, digest_value
from lingraft.errors import AdapterError, LingraftError, StoreError, UserError
from lingraft.layouts.common import CONFIG, WEIGHTS, read_config, read_sidecar
from lingraft.leases import is_older
from lingraft.store import RECORD, SEAL, content_hashes, read_json, verify, write_json

COLLECTED = "collected"
"""In a copy's record: the digest of the step's."""
_STRAY = 600.0
"""Seconds after which what is being copied is taken for left behind."""


def collect_adapters(found: dict[str, Any], target: Path) -> None:
    """Copies the grafted adapters to where a user looks for them, each folder at once.

    Args:
        found: The run's results (`report.results`).
        target: The folder to copy them into.

    Raises:
        UserError: An adapter's name is no name.
        StoreError: An adapter is not what it was when it was made.
    """
    for entry in found["adapters"]:
        name = f"{entry['method'].replace(':', '-by-')}-{entry['language']}" + (
            f"-seed{entry['seed']}" if len(found["seeds"]) > 1 else ""
        )
        # A run's folder may be somebody else's: what is removed and written below must be in it.
        if not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII) or target.is_symlink():
            raise UserError(f"an adapter of this run cannot be called {name!r}", where=target, remedy="run it again")
        final, left = target / name, _left(target, name)
        partial, before = (target / f".{name}.{secrets.token_hex(4)}" for _ in range(2))
        source = Path(entry["path"])
        text = _card(source, entry, found)
        if _is_current(final, source, text):
            for folder in left:
                _remove(folder)
            continue
        if wrong := verify(source):
            raise StoreError(wrong, where=source, remedy="give the `lingraft run` command again: it is made anew")
        try:
            shutil.copytree(source, partial)
            if text is not None:
                words: dict[str, bytes] = {}
                for folder in (*left, final):
                    words |= _own_words(folder)
                _add_card(partial, source, text, words)
            # Set aside whole: a process that is killed in between has lost nobody's words.
            with suppress(FileNotFoundError):
                final.rename(before)
            try:
                partial.rename(final)
            except OSError:
                if not (final / RECORD).is_file():  # Else another run of the same was faster.
                    raise
            for folder in (*left, before):
                _remove(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _left(target: Path, name: str) -> list[Path]:
    """What reports that were killed have left of a copy; of one that may be at work nothing is taken."""
    found = [p for p in sorted(target.glob(f".{name}.*")) if re.fullmatch(r"\.[\w-]+\.[0-9a-f]{8}", p.name, re.ASCII)]
    return [path for path in found if path.is_dir() and not path.is_symlink() and is_older(path, _STRAY)]


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _is_current(final: Path, source: Path, text: str | None) -> bool:
    """Whether a copy need not be made again: it is of this step, and its card is what it would be, or somebody's own words."""
    try:
        record, origin = read_json(final / RECORD), digest_bytes(source / RECORD)
        if text is None:
            return digest_bytes(final / RECORD) == origin
        if not isinstance(record, dict) or record.get(COLLECTED) != origin:
            return False
        known = record.get("files", {}).get(CARD)
        wanted = hashlib.sha256(text.encode()).hexdigest()
        return known == wanted or _is_edited(final, record)
    except (OSError, StoreError, AttributeError):  # One of them is not there, or no record.
        return False


def _is_edited(folder: Path, record: Mapping[str, Any]) -> bool:
    place, known = folder / CARD, record.get("files", {}).get(CARD)
    return known is not None and place.is_file() and not place.is_symlink() and digest_bytes(place) != known


def _own_words(final: Path) -> dict[str, bytes]:
    """Cards that somebody has changed, to be kept beside the new one when a copy is made again, by name."""
    kept = {p.name: p.read_bytes() for p in final.glob("README.*.md") if p.is_file() and not p.is_symlink()}
    try:
        if _is_edited(final, read_json(final / RECORD)):
            words = (final / CARD).read_bytes()
            kept[f"README.{hashlib.sha256(words).hexdigest()[:8]}.md"] = words
    except (OSError, StoreError, AttributeError):
        pass
    return kept


def _add_card(folder: Path, source: Path, text: str, kept: Mapping[str, bytes]) -> None:
    """Puts the card into a copy, and a record that is of all of it."""
    for name, words in kept.items():
        (folder / name).write_bytes(words)
    (folder / CARD).unlink(missing_ok=True)
    (folder / CARD).write_bytes(text.encode())
    record = {name: value for name, value in read_json(folder / RECORD).items() if name != SEAL}
    record |= {COLLECTED: digest_bytes(source / RECORD), "files": content_hashes(folder)}
    (folder / RECORD).unlink()
    write_json(folder / RECORD, {**record, SEAL: digest_value(record)})


def _card(source: Path, entry: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """The card of an adapter that a run has measured; None where the folder holds no adapter."""
    try:
        notes = read_sidecar(source)
        config = read_config(source) if (source / CONFIG).is_file() else None
        record = read_json(source / RECORD)
    except (AdapterError, StoreError, OSError):  # What is wrong with it is said before it is copied.
        return None
    if notes is None or not isinstance(record, dict):
        return None
    row = found.get("methods", {}).get(entry["method"], {})
    made = notes.get("provenance")
    beneath = notes.get("kind") == "stack" or (isinstance(made, dict) and "spaces" in made)
    warnings = ["Asked with the task's adapter on top of it."] if beneath else []
    files = record.get("files")
    digest = files.get(WEIGHTS) if isinstance(files, Mapping) else None
    return card(
        Facts(
            config,
            notes,
            scores=_scores(entry, found, row),
            digests={f"{WEIGHTS}, SHA-256": digest} if isinstance(digest, str) else {},
            method=f"{row['title']}: {row['says']}" if row.get("says") else row.get("title", ""),
            languages=(entry["language"], found["source"]) if "source" in found else (),
            task="" if beneath else found.get("experiment", {}).get("task", ""),
            warning=" ".join([*warnings, found.get("chance_and_size_warning") or ""]).strip(),
        )
    )


def _scores(entry: Mapping[str, Any], found: Mapping[str, Any], row: Mapping[str, Any]) -> list[Score]:
    """What a run has measured of one adapter: its own value, with the interval of all seeds."""
    language = entry["language"]
    cell = row.get("languages", {}).get(language)
    if not cell:
        return []
    alike = [e["seed"] for e in found["adapters"] if (e["method"], e["language"]) == (entry["method"], language)]
    by_seed = cell.get("by_seed") or [cell["value"]]
    value = by_seed[alike.index(entry["seed"])] if len(by_seed) == len(alike) else cell["value"]
    interval, difference = cell.get("interval"), cell.get("difference_interval")
    experiment = found["experiment"]
    asked = found.get("samples", {}).get(entry["method"], {}).get(language, found.get("items", {}).get(language, 0))
    return [
        Score(
            experiment["task"],
            _dataset(experiment, language),
            language,
            (experiment.get("evaluation") or {}).get("split", "test"),
            found["metric"],
            value,
            (interval[0], interval[1]) if interval else None,
            (cell["difference"], difference[0], difference[1], cell["p"]) if difference else None,
            asked,
            len(by_seed),
        )
    ]


def _dataset(experiment: Mapping[str, Any], language: str) -> str:
    """The hub's name of the data that a run has asked; of files, the task's."""
    from lingraft.tasks.table import find_task

    task: str = experiment["task"]
    if experiment.get("data_dir") is not None or task in (experiment.get("tasks") or {}):
        return task
    try:
        hubs = find_task(task).hubs
    except LingraftError:
        return task
    return next((h.repository for h in hubs if h.languages is None or language in h.languages), task)
