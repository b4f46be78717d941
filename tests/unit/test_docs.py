"""The table of laws in the documentation is the table of families."""

import os
from pathlib import Path

from lingraft.algebra import Law
from lingraft.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "algebra.md"
BEGIN, END = "<!-- laws: ", "<!-- end of laws -->"


def table() -> str:
    laws = list(Law)
    lines = ["| rule | " + " | ".join(f"`{law.value}`" for law in laws) + " |", "|---" * (len(laws) + 1) + "|"]
    for structure, spaces in FAMILIES.items():
        for space, rule in spaces.items():
            lines.append(
                f"| {structure}/{space} | " + " | ".join("kept" if law in rule.laws else "–" for law in laws) + " |"
            )
    return "\n".join(lines)


def test_the_table_of_laws_is_the_table_of_families() -> None:
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    note, rest = rest.split("-->\n", 1)
    _, tail = rest.split(END)
    expected = f"{head}{BEGIN}{note}-->\n{table()}\n{END}{tail}"
    if os.environ.get("UPDATE"):
        PAGE.write_text(expected, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == expected
