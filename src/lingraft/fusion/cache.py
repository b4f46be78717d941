"""Source states on disk: computed once from the first stage, read at every step of the second.

What a text's states are depends on the first stage, the backbone under it and the token ids alone. They are many: the
four-byte id of a token becomes layers × width values. Their size is therefore said before a byte is written.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lingraft.digests import digest_bytes, digest_value
from lingraft.errors import AdapterError, StoreError, UserError, writing
from lingraft.store import read_json, write_json

FORMAT = "lingraft source states 1"
STATES = "states.bin"
"""The entries one after the other: layers × columns × width values each, bfloat16, the low byte first."""
INDEX = "states.json"
"""Where every entry begins; written last, so that a folder without it holds nothing."""

_PARTIALS = (f".{STATES}.partial", f".{INDEX}.partial")
_ITEM = 2
Compute = Callable[[Sequence["Request"]], Sequence[Sequence[torch.Tensor]]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """A text whose states are wanted.

    Attributes:
        ids: Its token ids.
        types: Their token types; none for models that have none.
        columns: For how many columns, from the first on, states are wanted: fewer than there are ids, or more, which are
            states of padding behind the text.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    columns: int

    @property
    def key(self) -> str:
        """What the text's entry is found by."""
        return digest_value([self.ids, self.types], 24)

    @property
    def length(self) -> int:
        """Columns that are read for it."""
        return max(len(self.ids), self.columns)


def size_of(requests: Iterable[Request], layers: int, width: int) -> int:
    """Bytes that the states of so many layers take; a text that is asked for twice is kept once, with the most columns."""
    return sum(r.columns for r in _distinct(requests).values()) * layers * width * _ITEM


def _distinct(requests: Iterable[Request]) -> dict[str, Request]:
    """By key, the longest first: memory is at its most at once, not at the end."""
    found: dict[str, Request] = {}
    for request in requests:
        known = found.get(request.key)
        if known is None or known.columns < request.columns:
            found[request.key] = request
    return dict(sorted(found.items(), key=lambda entry: (-entry[1].length, entry[0])))


def write_states(
    folder: Path,
    digest: str,
    requests: Iterable[Request],
    compute: Compute,
    *,
    layers: Sequence[str],
    width: int,
    limit_bytes: float,
    batch_tokens: int,
    progress: Progress | None = None,
) -> None:
    """Computes the states of all texts, batch by batch, and writes them; what the folder held of the kind is replaced.

    The caller sees to it that nobody else writes into the folder.

    Args:
        folder: Where the two files go; made if absent.
        digest: Of the first stage and the backbone under it.
        requests: The texts.
        compute: The states of some texts: for every text one tensor a layer, columns × width; further columns are left out.
        layers: The layers' names, in the order of `compute`.
        width: Values of a state.
        limit_bytes: What the states may take.
        batch_tokens: Padded tokens of a batch.
        progress: Called with the texts done and the texts in all.

    Raises:
        UserError: The states would take more than the limit.
        StoreError: The disk has no room for them, or refused to take them; nothing is left behind.
        ValueError: `compute` gave other shapes than were announced.
    """
    wanted = _distinct(requests)
    size = size_of(wanted.values(), len(layers), width)
    check_size(size, limit_bytes, where=folder)
    try:
        with _refusals(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name in (INDEX, STATES, *_PARTIALS):
                (folder / name).unlink(missing_ok=True)
            _check_room(folder, size + 100 * len(wanted))
            partial = folder / _PARTIALS[0]
            checksum = _write(partial, wanted, compute, (len(layers), width), batch_tokens, progress)
            partial.replace(folder / STATES)
            index: dict[str, Any] = {"format": FORMAT, "digest": digest, "layers": list(layers), "width": width}
            index |= {"bytes": size, "sha256": checksum, "entries": _places(wanted, len(layers) * width * _ITEM)}
            write_json(folder / INDEX, index)
    except BaseException:
        for name in (INDEX, STATES, *_PARTIALS):
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)
        raise


def check_size(size: int, limit_bytes: float, *, where: str | Path) -> None:
    """Makes sure that states take no more than is allowed.

    Raises:
        UserError: They do.
    """
    if size > limit_bytes:
        raise UserError(
            f"the source states would take {_amount(size)}, and {_amount(limit_bytes)} are allowed",
            where=where,
            remedy="raise fusion.cache_limit (GB), or compute them at every step: fusion.cache=false",
        )


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StoreError(
            f"the source states take {_amount(size)}, and {_amount(free)} are free on the disk",
            where=folder,
            remedy="free some space, or compute them at every step: fusion.cache=false",
        )


def _write(
    path: Path,
    wanted: Mapping[str, Request],
    compute: Compute,
    shape: tuple[int, int],
    batch_tokens: int,
    progress: Progress | None,
) -> str:
    """Writes the entries and returns their SHA-256."""
    checksum, done = hashlib.sha256(), 0
    with path.open("wb") as file:
        for batch in _batches(list(wanted.values()), batch_tokens):
            for request, states in zip(batch, compute(batch), strict=True):
                data = _raw(states, shape, request.columns).data
                checksum.update(data)
                file.write(data)
            done += len(batch)
            if progress is not None:
                progress(done, len(wanted))
        file.flush()
        os.fsync(file.fileno())
    return checksum.hexdigest()


def _batches(requests: Sequence[Request], batch_tokens: int) -> Iterator[Sequence[Request]]:
    """Texts of near length together; they come with the longest first."""
    start = 0
    while start < len(requests):
        end = start + max(1, batch_tokens // max(1, requests[start].length))
        yield requests[start:end]
        start = end


def _raw(states: Sequence[torch.Tensor], shape: tuple[int, int], columns: int) -> np.ndarray[Any, Any]:
    """The bytes of an entry."""
    layers, width = shape
    found = torch.stack([state[:columns] for state in states])
    if found.shape != (layers, columns, width):
        raise ValueError(f"states of the shape {tuple(found.shape)} were announced as {(layers, columns, width)}")
    values = found.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
    return values.astype("<i2", copy=False).reshape(-1).view(np.uint8)


def _places(wanted: Mapping[str, Request], column_bytes: int) -> dict[str, list[int]]:
    """Of every entry the first byte and the columns."""
    found, offset = {}, 0
    for key, request in wanted.items():
        found[key] = [offset, request.columns]
        offset += request.columns * column_bytes
    return found


def _amount(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:.3f} MB"


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """Turns every refusal of the operating system into one clear error."""
    try:
        with writing(folder):
            yield
    except OSError as error:
        raise StoreError(
            f"the source states cannot be written ({error.strerror or error})",
            where=folder,
            remedy="check the disk, or compute them at every step: fusion.cache=false",
        ) from error


class StateCache:
    """Source states that were written, mapped into memory: a state is read when it is asked for.

    Attributes:
        layers: The layers' names.
        width: Values of a state.
    """

    def __init__(
        self, states: np.ndarray[Any, Any], layers: Sequence[str], width: int, entries: Mapping[str, tuple[int, int]]
    ) -> None:
        self.layers: tuple[str, ...] = tuple(layers)
        self.width = width
        self._states = states
        self._entries = dict(entries)

    def __len__(self) -> int:
        """The number of texts."""
        return len(self._entries)

    @classmethod
    def open(cls, folder: Path, digest: str, *, verify: bool = False) -> "StateCache":
        """Opens what `write_states` wrote; the files must not be written to while they are open.

        Args:
            folder: Where it is.
            digest: Of the first stage and the backbone under it.
            verify: Read all of it and compare the checksum, too.

        Raises:
            StoreError: A file is missing or damaged.
            AdapterError: The states are those of another first stage.
        """
        index, path = read_json(folder / INDEX), folder / STATES
        try:
            if index["format"] != FORMAT:
                raise ValueError("another format")
            theirs, layers, width = str(index["digest"]), [str(name) for name in index["layers"]], int(index["width"])
            total, checksum = int(index["bytes"]), str(index["sha256"])
            entries = {str(key): (int(first), int(columns)) for key, (first, columns) in index["entries"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _damaged(folder / INDEX, f"this is no index of source states ({error})") from None
        if theirs != digest:
            raise AdapterError(
                f"these are source states of another first stage ({theirs[:40]}…, this one is {digest[:40]}…)",
                where=folder,
                remedy="delete the folder: the states are computed anew",
            )
        column = len(layers) * width * _ITEM
        if any(first < 0 or first % _ITEM or n < 0 or first + n * column > total for first, n in entries.values()):
            raise _damaged(folder / INDEX, "an entry lies outside the source states")
        size = path.stat().st_size if path.is_file() else None
        if size != total:
            raise _damaged(path, "the source states are " + ("missing" if size is None else "not as long as they were"))
        if verify and digest_bytes(path) != checksum:
            raise _damaged(path, "the source states are not those that were written (sha256)")
        mapped = np.memmap(path, np.dtype("<i2"), "r") if total else np.empty(0, np.dtype("<i2"))
        return cls(mapped, layers, width, entries)

    def covers(self, requests: Iterable[Request]) -> bool:
        """Whether there are states of all the texts, for as many columns as are wanted."""
        return all(self._entries.get(request.key, (0, -1))[1] >= request.columns for request in requests)

    def get(self, requests: Sequence[Request]) -> dict[str, torch.Tensor] | None:
        """The states of a batch of texts by layer, batch × columns × width in bfloat16, on the processor.

        A row has the columns its request wants, and zeros behind them up to the most that are wanted.

        Returns:
            None where a text is missing or has too few columns.
        """
        if not self.covers(requests):
            return None
        most = max((request.columns for request in requests), default=0)
        found = np.zeros((len(self.layers), len(requests), most, self.width), np.int16)
        for row, request in enumerate(requests):
            first, columns = self._entries[request.key]
            start, shape = first // _ITEM, (len(self.layers), columns, self.width)
            entry = self._states[start : start + len(self.layers) * columns * self.width].reshape(shape)
            # The only copy: from the mapped file to the row's place in the batch.
            found[:, row, : request.columns] = entry[:, : request.columns]
        return dict(zip(self.layers, torch.from_numpy(found).view(torch.bfloat16).unbind(), strict=True))


def _damaged(path: Path, what: str) -> StoreError:
    return StoreError(what, where=path, remedy="delete the folder: the states are computed anew")
