"""Folders that appear when they are complete: a step's key is its path, and a finished step is never run again."""

import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lingraft.digests import digest_bytes
from lingraft.errors import Busy, StoreError, UserError, writing

RECORD = "step.json"
"""The file that makes a folder complete: what was done, from what, with which numeric environment."""


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that a person can read, durable before the call returns."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> Any:
    """Reads a JSON file that lingraft wrote.

    Raises:
        StoreError: The file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError("a file that should be here is missing", where=path) from None
    except RecursionError:
        raise StoreError("this file is nested too deeply", where=path) from None
    except (OSError, ValueError) as error:  # Neither UTF-8, nor JSON, or a number of thousands of digits.
        raise StoreError(
            f"this file is damaged ({error})", where=path, remedy="delete its folder and run again"
        ) from None


def content_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by relative path, the record itself left out."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != RECORD)
    return {p.relative_to(folder).as_posix(): digest_bytes(p) for p in files}


@contextmanager
def appearing(target: Path, record: Mapping[str, Any]) -> Generator[Path, None, None]:
    """Gives a working folder that becomes `target` when the block ends without an error.

    The working folder stands beside the target and survives an interruption, so that the work can go on where it
    stopped; it is discarded when its `record` differs. Two processes never work on one target at a time.

    Args:
        target: The folder to appear.
        record: What is being made; written to `step.json` with the hashes of the files.

    Yields:
        The working folder; keys the block adds to `extra.json` there go into the record.

    Raises:
        UserError: The target exists already.
        StoreError: Another process is at work on it, or it cannot be written.
    """
    target = target.absolute()
    work = target.with_name(f".{target.name}.partial")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(target.with_name(f".{target.name}.lock"), timeout=0):
                if target.exists() or target.is_symlink():
                    raise UserError(
                        "the output exists already",
                        where=target,
                        remedy="choose another --out or move it away",
                    )
                _prepare(work, record)
                yield work
                (work / "intent.json").unlink()
                extra_file = work / "extra.json"
                extra: dict[str, Any] = read_json(extra_file) if extra_file.exists() else {}
                extra_file.unlink(missing_ok=True)
                write_json(work / RECORD, {**record, **extra, "files": content_hashes(work)})
                _sync(work)
                work.rename(target)
                _sync_folder(target.parent)
        except Timeout:
            raise Busy("another process is making this", where=target, remedy="wait for it, or stop it") from None


def _prepare(work: Path, record: Mapping[str, Any]) -> None:
    intent = json.loads(json.dumps(record))
    if work.exists():
        try:
            if read_json(work / "intent.json") == intent:
                return
        except StoreError:
            pass  # Not even begun: there is nothing to keep.
        shutil.rmtree(work)
    work.mkdir(parents=True)
    write_json(work / "intent.json", intent)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows cannot open a folder.
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Store:
    """Finished steps, one folder each, at `<root>/<kind>/<key>`.

    Args:
        root: The folder; made when first written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def path(self, kind: str, key: str) -> Path:
        """Where the step of this kind and key is, or will be."""
        return self.root / kind / key

    def has(self, kind: str, key: str) -> bool:
        """Whether the step is finished."""
        return (self.path(kind, key) / RECORD).is_file()

    def folder(self, kind: str, key: str) -> Path:
        """The folder of a finished step, to be read.

        Raises:
            Damaged: Its files are not what they were.
        """
        return self.path(kind, key)

    def set_aside(self, kind: str, key: str) -> Path:
        """Moves a damaged step away, so that it is made anew, and says where to."""
        number = 0
        while (target := self.root / "damaged" / f"{kind}-{key}-{number}").exists():
            number += 1
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path(kind, key).rename(target)
        return target

    def record(self, kind: str, key: str) -> dict[str, Any]:
        """The record of a finished step.

        Raises:
            StoreError: It is missing or damaged.
        """
        value: dict[str, Any] = read_json(self.path(kind, key) / RECORD)
        return value

    def making(self, kind: str, key: str, record: Mapping[str, Any]) -> Any:
        """A context that makes the step's folder appear; see `appearing`."""
        return appearing(self.path(kind, key), record)
