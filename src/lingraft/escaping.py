"""Text that others wrote, shown as text: in a terminal, in Markdown, in CSV, in HTML and SVG.

Names, labels, errors and notes come out of files that anybody may have written. Each form has characters that mean something to
what displays it; here they lose that meaning, and everything else stays as it is.
"""

import json
import re
import unicodedata
from typing import Any

_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""What turns the direction of the text around it, so that it reads as another."""
_LINES = frozenset("\u2028\u2029")


def printable(text: str) -> str:
    r"""Text for a terminal: control characters and what turns its direction become their escapes, `\x1b`.

    Line ends and tabs stay; so do the joiners that Persian and Indic scripts are written with.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(sign: str) -> str:
    if sign in "\n\t" or not (unicodedata.category(sign) in ("Cc", "Cs") or sign in _BIDI or sign in _LINES):
        return sign
    return sign.encode("unicode_escape").decode("ascii")


def one_line(text: str) -> str:
    """As `printable`, on one line."""
    return printable(" ".join(re.split(r"\r\n|[\r\n]", text)))


def in_json(value: Any, indent: int | None = None) -> str:
    r"""JSON in which letters stay what they are; half a character, as of a path that is not UTF-8, is its escape, `\udcff`."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace").decode()


_MARKUP = re.compile(r"[\\`|]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\]\(|\]\[|!\[|(?<=[hH]ttp):|(?<=[hH]ttps):")
_MARKDOWN = {"<": "&lt;", "&": "&amp;", "](": "]\\(", "][": "]\\[", "![": "!\\[", ":": "\\:"}


def in_markdown(text: str) -> str:
    """Text in a line or a table's cell of Markdown: no HTML, no link, no image, no further cell or line."""
    return _MARKUP.sub(lambda found: _MARKDOWN.get(found[0], f"\\{found[0]}"), one_line(text))


def in_csv(text: str) -> str:
    """Text in a cell of CSV: what a spreadsheet would compute (`=`, `+`, `-`, `@` in front) gets an apostrophe before it."""
    text = printable(text)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}


def in_html(text: str) -> str:
    """Text in an element or a quoted attribute of HTML, XML or SVG."""
    return re.sub(r"[&<>\"']", lambda found: _ENTITIES[found[0]], printable(text))
