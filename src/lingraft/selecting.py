"""The entries of greatest magnitude over many tensors together, exactly, in bounded memory.

Without its sign, a float32's bits are an integer that grows with its magnitude. The K-th greatest is found by counting: once
the upper 16 bits of all entries, then the lower 15 of those that share the K-th's upper ones. A third pass collects. Only
counts, one chunk and the result are held, however many entries there are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lingraft.errors import UserError

CHUNK = 1 << 18
"""Entries read at a time: 1 MiB, so that what is computed of them stays in the processor's cache."""

_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_LOWER = 15
_INFINITE = 0x7F80_0000 >> _LOWER
"""The upper bits of infinity; those of NaN are not smaller, those of every number are."""


@dataclass(frozen=True)
class Part:
    """One tensor, read a range at a time.

    Attributes:
        name: What messages and the result call it.
        size: How many entries it has.
        read: The entries from `start` up to `stop` of the flattened tensor, float32; it is asked for every range three times
            and must answer the same.
    """

    name: str
    size: int
    read: Callable[[int, int], np.ndarray]


def largest(parts: Sequence[Part], k: int, chunk: int = CHUNK) -> dict[str, np.ndarray]:
    """The K entries of greatest magnitude over all parts together.

    Exactly K: of equal magnitudes the earlier part's come first, then the lower index's. Zeros count like any other
    magnitude, so that where fewer than K entries differ from zero, the first zeros fill up.

    Args:
        parts: The tensors.
        k: K, how many entries to choose.
        chunk: How many entries to hold at a time.

    Returns:
        By part, in order, the ascending flat indices of what was chosen (int64, as files of sparse differences hold them);
        none where nothing was.

    Raises:
        UserError: There are fewer than K entries, K is not positive, or an entry is NaN or infinite.
    """
    entries = sum(part.size for part in parts)
    if not 1 <= k <= entries:
        raise UserError(f"{k} entries cannot be chosen: there are {entries}", remedy=f"choose between 1 and {entries}")
    if len({part.name for part in parts}) < len(parts):
        raise ValueError("two parts have the same name")
    threshold, ties = _threshold(parts, k, chunk)
    chosen, done = np.empty(k, np.int64), 0
    found: dict[str, np.ndarray] = {}
    for part in parts:
        first = done
        for start, bits in _magnitudes(part, chunk):
            indices = np.flatnonzero(bits >= threshold)
            equal = np.flatnonzero(bits[indices] == threshold)
            if len(equal) > ties:
                indices = np.delete(indices, equal[ties:])
            ties -= min(ties, len(equal))
            if done + len(indices) > k:
                raise ValueError(f"{part.name}: the entries changed while they were compared")
            np.add(indices, start, out=chosen[done : done + len(indices)])
            done += len(indices)
        found[part.name] = chosen[first:done]
    if done < k:
        raise ValueError("the entries changed while they were compared")
    return found


def _magnitudes(part: Part, chunk: int) -> Iterator[tuple[int, np.ndarray]]:
    """Where a chunk starts, and the bits of its entries without their signs."""
    for start in range(0, part.size, chunk):
        stop = min(start + chunk, part.size)
        values = part.read(start, stop)
        if values.dtype != np.float32 or values.shape != (stop - start,):
            raise ValueError(f"{part.name}: {values.dtype} {values.shape} was read, not {stop - start} float32")
        yield start, np.ascontiguousarray(values).view(np.uint32) & _MAGNITUDE


def _threshold(parts: Sequence[Part], k: int, chunk: int) -> tuple[np.uint32, int]:
    """The bits of the K-th greatest magnitude, and how many entries that equal it belong to the K."""
    counts = np.zeros(1 << 16, np.int64)
    for part in parts:
        for _, bits in _magnitudes(part, chunk):
            counts += np.bincount(bits >> _LOWER, minlength=len(counts))
        if counts[_INFINITE:].any():
            raise UserError(
                "a value is NaN or infinite", where=part.name, remedy="train with a lower rate, or in a wider type"
            )
    upper, above = _bin_of(counts, k)
    counts = np.zeros(1 << _LOWER, np.int64)
    for part in parts:
        for _, bits in _magnitudes(part, chunk):
            alike = bits[bits >> _LOWER == upper]
            if len(alike):
                counts += np.bincount(alike & np.uint32((1 << _LOWER) - 1), minlength=len(counts))
    lower, higher = _bin_of(counts, k - above)
    return np.uint32(upper << _LOWER | lower), k - above - higher


def _bin_of(counts: np.ndarray, k: int) -> tuple[int, int]:
    """The bin of the K-th greatest, and how many entries are in higher ones."""
    reached = np.cumsum(counts[::-1])
    place = int(np.searchsorted(reached, k))
    return len(counts) - 1 - place, int(reached[place] - counts[::-1][place])
