"""Files put in the place of others: a link that stands there is replaced, and what it leads to stays as it is."""

import os
import re
import secrets
from pathlib import Path


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Writes a text file that appears at once; durable: it is on the disk before the call returns.

    What stands in its place may have come with a folder that others made: were it a link, writing to it would change another file.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.half")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def is_half(name: str) -> bool:
    """Whether a file was to be put in the place of another, which did not come to pass if it is still there."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.half", name) is not None
