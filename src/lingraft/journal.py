"""What an evaluation has found so far, item by item, in a file: one that was killed goes on from there."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lingraft.digests import digest_value
from lingraft.errors import writing
from lingraft.replacing import write_text

JOURNAL = "items.partial.jsonl"
_SUM = "sum"


class Journal:
    """A line for every finished item, written as soon as its batch is.

    Args:
        path: The file; what it holds is kept where its first line says that it is of the same evaluation, else it is emptied.
        about: Digest of all that a result depends on: the model, what is on it, the items, how they are asked.
    """

    def __init__(self, path: Path, about: str) -> None:
        self.path = path
        self._found: dict[str, dict[int, Any]] = {}
        lines = self._lines()
        if not lines or lines[0] != {"about": about}:
            lines = [{"about": about}]
        for line in lines[1:]:
            part: dict[int, Any] = self._found.setdefault(str(line["part"]), {})
            part[int(line["item"])] = line["found"]
        with writing(path):  # Written anew: what is added must not stand behind half a line.
            write_text(path, _text(lines))

    def _lines(self) -> list[dict[str, Any]]:
        """The lines up to the first that is damaged."""
        found: list[dict[str, Any]] = []
        try:
            with self.path.open("rb") as file:
                for raw in file:
                    line = json.loads(raw)
                    if not raw.endswith(b"\n") or line.pop(_SUM) != _sum(line):
                        break
                    found.append(line)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass
        return found

    def known(self, part: str) -> dict[int, Any]:
        """What was found already, by the items' numbers.

        Args:
            part: What of the items: an evaluation may read them more than once.
        """
        return dict(self._found.get(part, {}))

    def add(self, part: str, found: Mapping[int, Any]) -> None:
        """Writes what was found of a batch; values are plain, and come back the same to the last bit."""
        lines = [{"part": part, "item": number, "found": value} for number, value in found.items()]
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_text(lines))
        self._found.setdefault(part, {}).update(found)

    def close(self) -> None:
        """Removes the file: the evaluation is complete."""
        self.path.unlink(missing_ok=True)


def _text(lines: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps({**line, _SUM: _sum(line)}, ensure_ascii=False) + "\n" for line in lines)


def _sum(line: Mapping[str, Any]) -> str:
    """A digest of a line, by which it is known to be what was written."""
    return digest_value(line, 8)
