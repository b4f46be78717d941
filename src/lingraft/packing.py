"""Where texts stand when several of them share a row."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a text stands: its row and its first column."""

    row: int
    start: int


def packed(lengths: Sequence[int], width: int = 0) -> list[Place]:
    """Lays texts out in few rows: the longest first, each in the first row that has room for it.

    Args:
        lengths: Tokens of every text.
        width: The columns of a row; at least those of the longest text.

    Returns:
        Every text's place, in the order of the lengths; no two overlap.
    """
    width = max(width, *lengths)
    used: list[int] = []
    places = [Place(0, 0)] * len(lengths)
    for number in longest_first(lengths):
        row = next((n for n, taken in enumerate(used) if taken + lengths[number] <= width), len(used))
        if row == len(used):
            used.append(0)
        places[number] = Place(row, used[row])
        used[row] += lengths[number]
    return places


def longest_first(lengths: Sequence[int]) -> list[int]:
    """The numbers of texts, the longest first, equally long ones in their order."""
    return sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))


def parts(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Splits texts into parts that are packed into rows as wide as their longest text.

    Args:
        lengths: Tokens of every text.
        tokens: Tokens of a part with its padding, at most, unless it is one text.

    Returns:
        Numbers of texts; `packed` lays each part out within its bound.
    """
    found: list[list[int]] = []
    rows: list[list[int]] = []
    for number in longest_first(lengths):
        length = lengths[number]
        for part, used in zip(found, rows, strict=True):
            width = lengths[part[0]]
            row = next((n for n, taken in enumerate(used) if taken + length <= width), len(used))
            if row == len(used) and (len(used) + 1) * width > tokens:
                continue
            if row == len(used):
                used.append(0)
            used[row] += length
            part.append(number)
            break
        else:
            found.append([number])
            rows.append([length])
    return found
