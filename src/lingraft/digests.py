"""Hashes: of values (canonical JSON) and of files (remembered by size and time, so that a second look is free)."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lingraft.errors import DataError


def cache_folder() -> Path:
    """Where lingraft keeps what it can make again: `$LINGRAFT_CACHE`, or `~/.cache/lingraft`."""
    chosen = os.environ.get("LINGRAFT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lingraft"


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_value(value: Any, length: int = 64) -> str:
    """SHA-256 of a value's canonical JSON, in `length` hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


def digest_bytes(path: Path) -> str:
    """SHA-256 of a file's bytes, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, remembered for the same path, size, time and inode.

    Raises:
        DataError: The file does not exist or cannot be read.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError("this file cannot be read", where=path, remedy="check the path") from error
    signature = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    note = cache_folder() / "digests" / digest_value(signature, 32)
    # A file smaller than this is hashed faster than its note is found.
    if stat.st_size < 1 << 16:
        return digest_bytes(path)
    try:
        known = note.read_text()
        if len(known) == 64:
            return known
    except OSError:
        pass
    value = digest_bytes(path)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f"{note.name}.{os.getpid()}")
        partial.write_text(value)
        partial.replace(note)
    except OSError:
        pass  # The note only saves time: an unwritable cache must not stop the work.
    return value
