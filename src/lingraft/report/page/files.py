"""What a page lets its reader keep: tables as CSV, the experiment's YAML; packed into the page, unpacked by the browser."""

import base64
import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from lingraft.escaping import in_csv, in_json, printable

_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Files:
    """Files by name, in the order in which they were added."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def add(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
        """Adds a table as CSV, numbers in full precision; gives its name."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        for row in (header, *rows):
            writer.writerow([in_csv(cell) if isinstance(cell, str) else "" if cell is None else cell for cell in row])
        return self.put(name, out.getvalue())

    def put(self, name: str, text: str) -> str:
        """Adds a text; gives its name."""
        self.texts[name] = text
        return name


def packed(value: Any) -> str:
    """JSON, compressed, in letters that mean nothing to HTML; equal values give equal bytes."""
    text = in_json(value).encode("utf-8", "backslashreplace")
    return base64.b64encode(gzip.compress(text, 6, mtime=0)).decode("ascii")


def island(value: Any) -> str:
    """JSON in a `script` element that is data: nothing in it ends the element or begins another."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def shown(texts: Iterable[str]) -> list[str]:
    """Texts as they are shown: what turns their direction or controls a terminal becomes its escape."""
    return [printable(text) if _ODD.search(text) else text for text in texts]
