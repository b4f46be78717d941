"""JSON that others wrote, read within bounds: whatever is in it, there is a value or one error."""

import json
from pathlib import Path
from typing import Any

LARGEST = 64 << 20
"""Bytes of a file that is read whole: the index of the largest checkpoints has a sixth of it."""


def parse(text: str) -> Any:
    """A value from JSON.

    Raises:
        ValueError: It is none, nests too deeply, or has half a character in it.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\u" in text:  # Nothing else brings half a character in; looking for it costs as much as reading.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a character, a surrogate without the other") from None
    return value


def read(path: Path, most: int = LARGEST) -> Any:
    """The value of a JSON file of at most so many bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too large, or not JSON within bounds.
    """
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{size} bytes are out of all proportion")
    return parse(path.read_text(encoding="utf-8"))
