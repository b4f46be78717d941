"""What standard output and standard error can be given: any text in any encoding, and readers that stop reading."""

import codecs
import io
import json
import os
import sys
from typing import Any

from lingraft.escaping import in_json

_SIGNS = {
    **{
        "λ": "lambda",
        "φ": "phi",
        "Δ": "d",
        "‖": "||",
        "−": "-",
        "–": "-",
        "—": "-",
        "×": "x",
        "·": "-",
        "…": "...",
        "→": "->",
    },
    **{
        "≥": ">=",
        "≤": "<=",
        "±": "+-",
        "≈": "~",
        "²": "2",
        "½": "1/2",
        "¹": "1",
        "‹": "<",
        "›": ">",
        "“": '"',
        "”": '"',
        "’": "'",
    },
    **{
        "━": "#",
        "─": "-",
        "╸": "#",
        "╺": "-",
        "│": "|",
        "█": "#",
        "✓": "ok",
        "✗": "no",
        "ₜ": "_t",
        "ₛ": "_s",
        "á": "a",
        "\u00a0": " ",
    },
}
"""How signs are written where the encoding has none; of others the escape."""
_HANDLER = "lingraft.signs"


def _spelt(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_SIGNS.get(sign) or sign.encode("unicode_escape").decode("ascii") for sign in text), error.end


codecs.register_error(_HANDLER, _spelt)


def prepare() -> None:
    """Has standard output and standard error take every sign, in whatever encoding the locale or PYTHONIOENCODING chose."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors=_HANDLER)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that standard output can be given: where its encoding lacks a letter, as the escapes that JSON has."""
    text = in_json(value, indent)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return json.dumps(json.loads(text), indent=indent)
    return text


def stop_writing() -> None:
    """Nobody reads standard output any more: what is still to be written goes nowhere, and the end of Python says nothing of it."""
    empty = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            try:
                os.dup2(empty, stream.fileno())
            except (OSError, ValueError):  # It is no file, as in a test.
                continue
    os.close(empty)
