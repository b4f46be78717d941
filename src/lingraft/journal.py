"""What an evaluation has found so far, item by item, in a file: one that was killed goes on from there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lingraft.errors import writing

JOURNAL = "items.partial.jsonl"


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
        # Written anew: what is added must not stand behind half a line.
        self._write("w", lines)

    def _lines(self) -> list[dict[str, Any]]:
        """The lines up to the first that is damaged."""
        found: list[dict[str, Any]] = []
        try:
            with self.path.open("rb") as file:
                for raw in file:
                    line = json.loads(raw)
                    whole = {"part", "item", "found"} == set(line) and isinstance(line["item"], int)
                    if not raw.endswith(b"\n") or not (whole or (not found and "about" in line)):
                        break
                    found.append(line)
        except (OSError, ValueError, TypeError):
            pass
        return found

    def _write(self, mode: str, lines: list[dict[str, Any]]) -> None:
        with writing(self.path), self.path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def known(self, part: str) -> dict[int, Any]:
        """What was found already, by the items' numbers.

        Args:
            part: What of the items: an evaluation may read them more than once.
        """
        return dict(self._found.get(part, {}))

    def add(self, part: str, found: Mapping[int, Any]) -> None:
        """Writes what was found of a batch; values are plain, and come back the same to the last bit."""
        self._write("a", [{"part": part, "item": number, "found": value} for number, value in found.items()])
        self._found.setdefault(part, {}).update(found)

    def close(self) -> None:
        """Removes the file: the evaluation is complete."""
        self.path.unlink(missing_ok=True)
