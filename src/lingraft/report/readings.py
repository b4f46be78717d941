"""A run's answers, each file read once: what figures are made of, and what examples show."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lingraft.digests import digest_bytes
from lingraft.errors import Damaged, StoreError
from lingraft.predictions import DAMAGE, PREDICTIONS, SCORED
from lingraft.store import Store

_MOST_BYTES = 1 << 28
"""Of answers' files whose lines are kept for the examples; what is beyond it is read again."""
_LAST: "dict[str, Readings]" = {}
"""The run that was read last, by the digest of its manifest and its store."""


@dataclass(frozen=True)
class Made:
    """A step of a run.

    Attributes:
        kind: `train`, `predict`, …
        key: What it is called in the store.
        record: What was noted of it when it was made; empty where the store has it no longer.
    """

    kind: str
    key: str
    record: dict[str, Any]

    @property
    def place(self) -> str:
        """Where it is, relative to the store."""
        return f"{self.kind}/{self.key}"

    @property
    def label(self) -> str:
        """What people call it, without paths of any machine."""
        return harmless(self.record.get("label") or self.place)

    @property
    def config(self) -> dict[str, Any]:
        """What was asked for; empty where that is not known."""
        found = self.record.get("config")
        return found if isinstance(found, dict) else {}


class Readings:
    """The steps that a run's manifest names, in its store.

    Args:
        store: Where they are.
        metric: What answers that were read in texts are measured by.
    """

    def __init__(self, store: Store, metric: str) -> None:
        self.store, self.metric = store, metric
        self._folders: dict[str, Path] = {}
        self._kept: dict[tuple[str, str], tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]] = {}
        self._bytes = 0
        self._made: dict[str, Made] = {}

    def made(self, places: Sequence[str]) -> list[Made]:
        """Steps by their places in the manifest, each place once."""
        for place in places:
            if place not in self._made:
                kind, _, key = place.partition("/")
                self._made[place] = Made(kind, key, self._record(kind, key))
        return [self._made[place] for place in dict.fromkeys(places)]

    def _record(self, kind: str, key: str) -> dict[str, Any]:
        try:
            return self.store.record(kind, key)
        except StoreError:
            if self.store.has(kind, key):
                raise
            return {}  # Of what is in the store no longer, figures may still be.

    def forget(self) -> None:
        """Lets go of the answers."""
        self._kept.clear()
        self._bytes = 0

    def folder(self, place: str) -> Path:
        """The folder of a step by its place in the manifest, whose files are what they were when it was finished.

        Raises:
            StoreError: They are not, or there is none.
        """
        if place not in self._folders:
            kind, _, key = place.partition("/")
            try:
                self._folders[place] = self.store.folder(kind, key)
            except Damaged as error:
                raise StoreError(
                    error.what, where=error.where, remedy="give the `lingraft run` command again: it is made anew"
                ) from error
        return self._folders[place]

    def file(self, place: str) -> Path:
        """A file of a step by its place in the manifest."""
        folder, _, name = place.rpartition("/")
        return self.folder(folder) / name

    def values(self, predicted: str, scored: str, *, keep: bool = False) -> dict[str, float]:
        """Every item's figure, from 0 to 1: of texts that were read the metric's, of scored candidates whether it is right.

        Args:
            predicted: The place of the predictions.
            scored: The place of their scores.
            keep: Whether the lines are wanted again, by `lines`.

        Raises:
            StoreError: A file is missing or damaged.
        """
        lines, read = self._read(predicted, scored, keep)
        path = self.folder(scored) / SCORED if read else self.folder(predicted) / PREDICTIONS
        try:
            if read:
                return {name: float(line["figures"][self.metric]) for name, line in read.items()}
            return {line["id"]: float(answer_of(line) == line["gold"]) for line in lines}
        except (*DAMAGE, AttributeError) as error:
            raise _damaged(path, error) from error

    def lines(self, predicted: str, scored: str) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
        """The lines of predictions as they were written, and by item what was read in texts (empty for candidates).

        Raises:
            StoreError: A file is missing or damaged.
        """
        return self._read(predicted, scored, keep=False)

    def _read(self, predicted: str, scored: str, keep: bool) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
        if (predicted, scored) in self._kept:
            return self._kept[predicted, scored]
        path = self.folder(scored) / SCORED
        try:
            read = {str(line["id"]): line for line in _lines(path)} if path.exists() else {}
            path = self.folder(predicted) / PREDICTIONS
            lines = list(_lines(path))
        except DAMAGE as error:
            raise _damaged(path, error) from error
        size = path.stat().st_size
        if keep and self._bytes + size <= _MOST_BYTES:
            self._kept[predicted, scored] = lines, read
            self._bytes += size
        return lines, read


_ROOTED = re.compile(r"(?:^|(?<=[\s:=,;(\[{\"'“]))(?:file://)?((?:/(?!/)|~/|[A-Za-z]:[\\/])[^\s,;)\]}\"'”]+)")


def harmless(text: Any) -> str:
    """A text without paths from the root: those are the names at their ends."""
    return _ROOTED.sub(lambda found: short_path(found[1]), str(text))


def short_path(text: str) -> str:
    """A path from the root, or from a home, as the name at its end; another text as it is."""
    if PureWindowsPath(text).is_absolute():
        return PureWindowsPath(text).name
    return PurePosixPath(text).name if text.startswith(("/", "~")) else text


def answer_of(line: dict[str, Any]) -> int:
    """The likeliest candidate's number; the first of equals."""
    scores = line["scores"]
    return scores.index(max(scores))


def opened(run: Path, store: Store, metric: str, *, anew: bool = False) -> Readings:
    """The readings of a run: those of a moment ago, where its manifest is the same, unless they are wanted anew.

    Only the last run's are kept.
    """
    key = f"{digest_bytes(run / 'manifest.json')} {store.location}"
    known = None if anew else _LAST.get(key)
    if known is None:
        known = Readings(store, metric)
        _LAST.clear()
        _LAST[key] = known
    return known


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    # Not str.splitlines: JSON leaves U+2028 and its kin as they are, and a prompt may hold them.
    return (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)


def _damaged(path: Path, error: Exception) -> StoreError:
    return StoreError(f"predictions cannot be read ({error})", where=path, remedy="delete its folder and run again")
