"""Folders that appear when they are complete: a step's key is its path, and a finished step is never run again."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

from lingraft.digests import cache_folder, digest_bytes, digest_value
from lingraft.errors import AlreadyMade, Busy, Damaged, StoreError, TransientError, UserError, writing
from lingraft.leases import Lease, is_free, is_older, leased, now, patience
from lingraft.remote import Pointer, Remote, url_of
from lingraft.replacing import is_half, write_text

RECORD = "step.json"
"""The file that makes a folder complete: what was done, from what, with which numeric environment."""
SEAL = "seal"
"""In the record: the digest of the rest of it."""
DAMAGED = "damaged"
"""Below a store: what was set aside."""
_INTENT, _EXTRA = "intent.json", "extra.json"
_OWN = (RECORD, _INTENT, _EXTRA)
_QUICK = 1.0
"""Seconds of work that are rather done again after a power cut than the disk waited for once more: for the folders' entries."""
_STRAY = 3600.0
"""Seconds after which what was being fetched is given up: no lease says who fetches."""
_SMALL = 4 << 20
"""Bytes of a folder that one thread reads faster than several are started."""
_VERIFIED: dict[str, Any] = {}
"""By folder: what it looked like when this process verified it."""


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Writes JSON that a person can read.

    Args:
        path: The file, which appears at once.
        value: Plain data.
        durable: Whether it is on the disk before the call returns; a working folder's files are when the folder appears.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text, durable=durable)


def read_json(path: Path) -> Any:
    """Reads a JSON file that lingraft wrote.

    Raises:
        StoreError: The file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            "a file that should be here is missing", where=path, remedy="run the command that makes it again"
        ) from None
    except RecursionError:
        raise StoreError(
            "this file is nested too deeply", where=path, remedy="run the command that makes it again"
        ) from None
    except (OSError, ValueError) as error:  # Neither UTF-8, nor JSON, or a number of thousands of digits.
        raise StoreError(
            f"this file is damaged ({error})", where=path, remedy="delete its folder and run again"
        ) from None


def content_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by relative path, less the record itself and what is of the making only."""
    return _hashed(folder, {name: stat.st_size for name, stat in _files(folder).items() if name not in _OWN})


def _hashed(folder: Path, sizes: Mapping[str, int], read: Callable[[int], None] | None = None) -> dict[str, str]:
    """SHA-256 of files by relative path, several at a time where that pays.

    Args:
        folder: Where they are.
        sizes: Their bytes.
        read: Told how many bytes were read.
    """

    def one(name: str) -> str:
        value = digest_bytes(folder / name)
        if read is not None:
            read(sizes[name])
        return value

    if len(sizes) < 2 or sum(sizes.values()) < _SMALL:
        return {name: one(name) for name in sizes}
    with ThreadPoolExecutor(min(8, len(sizes), (os.cpu_count() or 1) + 1)) as pool:
        return dict(zip(sizes, pool.map(one, sizes), strict=True))


def _files(folder: Path, below: str = "") -> dict[str, os.stat_result]:
    """Every file of a folder by relative path, in order; a link counts as a file."""
    found: dict[str, os.stat_result] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.is_dir(follow_symlinks=False):
                found |= _files(folder / entry.name, f"{below}{entry.name}/")
            elif not entry.name.startswith(".nfs"):  # Of a file that was deleted while it was open.
                found[below + entry.name] = entry.stat(follow_symlinks=False)
    return found


def verify(folder: Path, read: Callable[[int], None] | None = None) -> str | None:
    """Reads a finished folder and compares it with its record.

    Args:
        folder: The folder.
        read: Told how many bytes were read, file by file, from several threads.

    Returns:
        What is wrong with it, in one sentence; None when nothing is.
    """
    try:
        record = _opened(folder)
        found = _files(folder)
        hashes: Mapping[str, str] = record["files"]
        missing = sorted(hashes.keys() - found.keys())
        # Records once left out those of folders below.
        extra = sorted(n for n in found.keys() - hashes.keys() - set(_OWN) if not n.endswith(f"/{RECORD}"))
        sizes = {name: found[name].st_size for name in hashes if name in found}
        actual = _hashed(folder, sizes, read)
    except StoreError as error:
        return error.what
    except OSError as error:
        return f"it cannot be read ({error.strerror}: {error.filename})"
    changed = [name for name, value in actual.items() if value != hashes[name]]
    parts = [
        f"{len(names)} {'files are' if len(names) > 1 else 'file is'} {how}: {', '.join(map(repr, names[:3]))}"
        for names, how in ((missing, "missing"), (changed, "changed"), (extra, "too many"))
        if names
    ]
    return "; ".join(parts) or None


def _opened(folder: Path) -> dict[str, Any]:
    """A folder's record without its seal.

    Raises:
        StoreError: It is missing or not as it was written.
    """
    record = read_json(folder / RECORD)
    if not isinstance(record, dict):
        raise StoreError(
            "the record is not one of lingraft's",
            where=folder / RECORD,
            remedy="lingraft store verify --repair sets it aside; then run the experiment again",
        )
    return _unsealed(cast(dict[str, Any], record), folder / RECORD)


def _unsealed(sealed: Mapping[str, Any], where: Path | None = None) -> dict[str, Any]:
    record = {name: value for name, value in sealed.items() if name != SEAL}
    if not _fits(sealed, record):
        raise StoreError(
            "the record is changed: its seal does not fit",
            where=where,
            remedy="lingraft store verify --repair sets it aside; then run the experiment again",
        )
    if not isinstance(record.get("files"), dict):
        raise StoreError(
            "the record holds no hashes of files",
            where=where,
            remedy="lingraft store verify --repair sets it aside; then run the experiment again",
        )
    return record


def _fits(sealed: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether a record is what its seal says. One of an older store has none; where the damage has hit the seal's name, it is there
    under another."""
    try:
        if SEAL in sealed:
            return sealed[SEAL] == digest_value(record)
        likely = [
            name for name, value in record.items() if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
        ]
        return not any(record[n] == digest_value({k: v for k, v in record.items() if k != n}) for n in likely)
    except ValueError:  # A number or a letter that no record has.
        return False


def _text(record: Mapping[str, Any]) -> bytes:
    """A record as its file holds it."""
    return (json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _look(folder: Path) -> Any:
    """What changes when anything in a folder does."""
    stats = {n: (s.st_size, s.st_mtime_ns, s.st_ino) for n, s in _files(folder).items()}
    return hashlib.sha256((folder / RECORD).read_bytes()).digest(), tuple(stats.items())


@contextmanager
def appearing(target: Path, record: Mapping[str, Any]) -> Generator[Path, None, None]:
    """Gives a working folder that becomes `target` when the block ends without an error.

    The working folder stands beside the target and survives an interruption, so that the work can go on where it
    stopped; it is discarded when its `record` differs. Two processes never work on one target at a time.

    Args:
        target: The folder to appear.
        record: What is being made; written to `step.json` with the hashes of the files.

    Yields:
        The working folder; keys the block adds to `extra.json` there go into the record.

    Raises:
        UserError: The target exists already.
        StoreError: Another process is at work on it, or it cannot be written.
    """
    with _working(target.absolute(), record, _unoccupied) as work:
        yield work


def _unoccupied(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise UserError("the output exists already", where=target, remedy="choose another --out or move it away")


@contextmanager
def _working(target: Path, record: Mapping[str, Any], begin: Callable[[Path], None]) -> Generator[Path, None, None]:
    """A working folder under a lease.

    Args:
        target: The folder to appear.
        record: What is being made.
        begin: Called with the target as soon as nobody else can be at work on it.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with leased(_lease_of(target)) as lease:
            begin(target)
            work, began = _work_of(target, lease.token), time.monotonic()
            try:
                _prepare(work, target, record, lease)
                yield work
                whole = time.monotonic() - began > _QUICK
                _finish(work, target, record, lease, whole)
                if whole:
                    _sync_folder(target.parent)
            except BaseException as error:
                lost = not lease.held()
                _keep(work, target, record, lost or isinstance(error, AlreadyMade))
                if lost and isinstance(error, OSError):
                    raise _overtaken(target) from error
                raise


def _lease_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _overtaken(target: Path) -> Busy:
    return Busy(
        "this process stood still so long that another took over its work", where=target, remedy="wait for the other"
    )


def _work_of(target: Path, token: str) -> Path:
    return target.with_name(f".{target.name}.{token}.partial")


def _prepare(work: Path, target: Path, record: Mapping[str, Any], lease: Lease) -> None:
    """Makes the working folder, which nobody else writes to, with what was kept of the same work."""
    _adopt([_work_of(target, token) for token in lease.earlier], work, lease.certain)
    # Those of leases that a power cut has lost, too: whoever held them is gone, or this one could not be held.
    lost = sorted(set(target.parent.glob(f".{target.name}.*.partial")) - {work})
    _adopt([target.with_name(f".{target.name}.partial")], work, certain=True)
    _adopt(lost, work, certain=False)
    intent = json.loads(json.dumps(record))
    if work.exists():
        with suppress(StoreError):  # Not even begun: there is nothing to keep.
            if not _links(work) and read_json(work / _INTENT) == intent:
                (work / RECORD).unlink(missing_ok=True)
                _clear_halves(work)
                return
        shutil.rmtree(work)
    work.mkdir(parents=True)
    # A crash that damages it costs this attempt, and nothing else.
    (work / _INTENT).write_text(json.dumps(intent), encoding="utf-8")


def _clear_halves(folder: Path) -> None:
    """Removes what `replacing` was about to put in the place of a file when the process ended."""
    for name in _files(folder):
        if is_half(Path(name).name):
            (folder / name).unlink()


def _links(folder: Path) -> bool:
    """Whether there are links in a folder: what is written by their names would go elsewhere."""
    return any(path.is_symlink() for path in folder.rglob("*"))


def _adopt(folders: list[Path], work: Path, certain: bool) -> None:
    """Goes on with the work of those before, or removes it. Of one that may wake up again, a copy is taken."""
    for folder in folders:
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.is_dir() and work.exists():
            shutil.rmtree(folder)
        elif folder.is_dir() and certain:
            folder.rename(work)
        elif folder.is_dir():
            # Renamed first: what the other still writes by name then goes nowhere.
            taken, copy = work.with_name(f"{work.name}.taken"), work.with_name(f"{work.name}.copy")
            folder.rename(taken)
            shutil.copytree(taken, copy)
            copy.rename(work)
            shutil.rmtree(taken, ignore_errors=True)


def _keep(work: Path, target: Path, record: Mapping[str, Any], useless: bool) -> None:
    """After an error: leaves the working folder where the next attempt looks for it."""
    if useless:
        shutil.rmtree(work, ignore_errors=True)
        return
    with suppress(OSError):
        if not (work / _INTENT).exists():
            (work / _INTENT).write_text(json.dumps(record), encoding="utf-8")
    with suppress(OSError):
        work.rename(target.with_name(f".{target.name}.partial"))


def _finish(work: Path, target: Path, record: Mapping[str, Any], lease: Lease, whole: bool) -> None:
    """Makes a working folder the target: its files are on the disk before it has its name."""
    extra: dict[str, Any] = read_json(work / _EXTRA) if (work / _EXTRA).exists() else {}
    said = {**record, **extra, "files": content_hashes(work)}
    said = json.loads(json.dumps(said, allow_nan=False))
    # The whole folder appears at once, so the record needs no rename of its own.
    (work / RECORD).write_bytes(_text({**said, SEAL: digest_value(said)}))
    _sync(work, whole)
    if not lease.held():
        raise _overtaken(target)
    # That these are gone is not synced: they count for nothing, should a crash bring them back.
    (work / _EXTRA).unlink(missing_ok=True)
    (work / _INTENT).unlink()
    try:
        work.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise AlreadyMade("another process has made this meanwhile", where=target) from None
        raise


def _sync(folder: Path, whole: bool) -> None:
    """A folder's files to the disk, side by side, so that a disk takes them up together; then, of a whole one, the folders."""
    names = [name for name in _files(folder) if name not in (_INTENT, _EXTRA)]
    list(_syncing().map(_sync_path, [folder / name for name in names]))
    if whole:
        below = {parent for name in names for parent in Path(name).parents}
        for path in sorted(below, reverse=True):
            _sync_folder(folder / path)


@cache
def _syncing() -> ThreadPoolExecutor:
    """Threads that wait for the disk, kept: starting them takes as long as the disk does."""
    return ThreadPoolExecutor(8, "lingraft-sync")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_syncing.cache_clear)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # Windows cannot open a folder.
        _sync_path(folder)


def _sync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Store:
    """Finished steps, one folder each, at `<root>/<kind>/<key>`; or a cache of such folders before a store elsewhere.

    Args:
        root: The folder; made when first written to.
        remote: Where steps are finished, if not in this folder.
    """

    def __init__(self, root: str | Path, remote: Remote | None = None) -> None:
        self.root = Path(root).absolute()
        self.remote = remote

    @property
    def url(self) -> str | None:
        """The URL of a store that is not a folder, without user and password."""
        return self.remote.url if self.remote else None

    @property
    def location(self) -> str:
        """What `open_store` opens it by, on any machine: the folder, or the URL without user and password."""
        return self.url or str(self.root)

    def path(self, kind: str, key: str) -> Path:
        """Where the step of this kind and key is, or will be.

        Raises:
            StoreError: No step is called so; names in manifests and records are not to be trusted.
        """
        if not re.fullmatch("[a-z]+", kind) or kind == DAMAGED or not re.fullmatch("[0-9a-f]+", key):
            raise StoreError(
                f"no step is called {f'{kind}/{key}'!r}", where=self.root, remedy="run the experiment again"
            )
        return self.root / kind / key

    def has(self, kind: str, key: str, *, fresh: bool = False) -> bool:
        """Whether the step is finished; elsewhere by a listing, which may be some seconds old, unless it is asked for afresh."""
        path = self.path(kind, key)
        if not self.remote:
            return (path / RECORD).is_file()
        try:
            return self.remote.has(kind, key, fresh=fresh)
        except StoreError:  # What says so is damaged, which is found when it is read.
            return True

    def steps(self) -> Iterator[tuple[str, str]]:
        """Kind and key of every finished step, in order."""
        if self.remote:
            yield from ((kind, key) for kind in self.remote.kinds() for key in self.remote.keys(kind))
            return
        for kind in sorted(_names(self.root)):
            if re.fullmatch("[a-z]+", kind) and kind != DAMAGED:
                for key in sorted(_names(self.root / kind)):
                    if re.fullmatch("[0-9a-f]+", key) and self.has(kind, key):
                        yield kind, key

    def folder(self, kind: str, key: str) -> Path:
        """The folder of a finished step, to be read. Its files are read once by a process, and again when they change.

        Raises:
            Damaged: Its files are not what they were.
            StoreError: There is none.
            TransientError: It is elsewhere, and cannot be fetched.
        """
        path = self.path(kind, key)
        if self.remote:
            pointer = self._pointer(self.remote, kind, key)
            # What was made here, and too late, is not what counts there.
            if self._is_whole(path) and read_json(path / RECORD) == pointer.record:
                return path
            try:
                return self._fetched(self.remote, kind, key)
            except (Damaged, TransientError):
                self.remote.doubt(kind, key)
                raise
        self._check_there(path)
        wrong = self._wrong(path)
        if wrong is not None:
            raise Damaged(kind, key, wrong, where=path)
        return path

    def check(self, kind: str, key: str, read: Callable[[int], None] | None = None) -> str | None:
        """Reads a finished step where it is kept, whatever is known of it.

        Args:
            kind: Its kind.
            key: Its key.
            read: Told how many bytes were read.

        Returns:
            What is wrong with it, or None.
        """
        path = self.path(kind, key)
        if not self.remote:
            return "a link is in its place" if path.is_symlink() else verify(path, read)
        try:
            with self._downloaded(self.remote, kind, key) as folder:
                return verify(folder, read)
        except Damaged as error:
            return error.what

    def record(self, kind: str, key: str) -> dict[str, Any]:
        """The record of a finished step.

        Raises:
            Damaged: It is not what it was.
            StoreError: There is none.
        """
        path = self.path(kind, key)
        if self.remote:
            return _unsealed(self._pointer(self.remote, kind, key).record)
        self._check_there(path)
        try:
            return _opened(path)
        except StoreError as error:
            raise Damaged(kind, key, error.what, where=path) from error

    def set_aside(self, kind: str, key: str) -> str | None:
        """Moves a damaged step to `<root>/damaged`, so that it is made anew, with a note why beside it.

        Of several who find the damage one moves it, and a step that is whole by now stays.

        Returns:
            Where it is kept now; None: nothing was damaged.

        Raises:
            Busy: Another process is at the same, or making it anew.
        """
        path = self.path(kind, key)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._alone(kind, key), leased(_lease_of(path)):
                moved = self._moved(kind, key)
                if self.remote:
                    return self._withdraw(self.remote, kind, key)
                return None if moved is None else str(moved)

    def making(self, kind: str, key: str, record: Mapping[str, Any]) -> AbstractContextManager[Path]:
        """A context that makes the step's folder appear; see `appearing`.

        Raises:
            Busy: Another process or host is at work on it.
            AlreadyMade: It is finished.
            StoreError: It cannot be written.
            TransientError: It belongs elsewhere, and cannot be sent there; another attempt only sends it.
        """
        path = self.path(kind, key)
        if self.remote:
            return self._making_there(self.remote, kind, key, record)

        def begin(target: Path) -> None:
            if target.is_symlink():
                raise StoreError("a link is where a step's folder should be", where=target, remedy="move it away")
            if (target / RECORD).is_file():
                raise AlreadyMade("this step is finished already", where=target)
            if target.exists():  # A folder without its record.
                self._moved(kind, key)

        return _working(path, record, begin)

    def sizes(self) -> dict[tuple[str, str], tuple[int, float]]:
        """Bytes of every finished step, and when it was finished, seconds since 1970; by kind and key, in order."""
        if self.remote:
            return self.remote.sizes()
        found: dict[tuple[str, str], tuple[int, float]] = {}
        for kind, key in self.steps():
            with suppress(FileNotFoundError):
                stats = _files(self.path(kind, key))
                found[kind, key] = sum(s.st_size for s in stats.values()), stats[RECORD].st_mtime
        return found

    def leftovers(self) -> Iterator[tuple[str, int]]:
        """Path below the root and bytes of what no finished step needs and nobody is making: for `gc`."""
        if self.remote:
            yield from self.remote.leftovers()
        for path in self._hidden():
            lease = _lease_of(path.with_name(path.name.split(".")[1]))
            old = is_older(path, max(patience(), _STRAY if path.name.endswith(".fetching") else 0.0))
            if is_free(lease) if path == lease or path.name.endswith(".partial") else old:
                yield path.relative_to(self.root).as_posix(), _size(path)
        for name in sorted(_names(self.root / DAMAGED)):
            yield f"{DAMAGED}/{name}", _size(self.root / DAMAGED / name)

    def busy(self) -> str | None:
        """One of the steps that are being made, or None."""
        held = (p for p in self._hidden() if p.name.endswith(".lock") and not is_free(p))
        here = next((p.relative_to(self.root).as_posix() for p in held), None)
        return here or (self.remote.busy() if self.remote else None)

    def clean(self, names: Iterable[str]) -> None:
        """Removes leftovers, named as `leftovers` names them; what is being made after all stays."""
        there: list[str] = []
        for name in names:
            path = self.root / name
            if not (path.exists() or path.is_symlink()):
                there.append(name)
                continue
            key = path.name.split(".")[1] if path.name.startswith(".") else ""
            lease = _lease_of(path.with_name(key)) if key else None
            with suppress(Busy), writing(path), leased(lease) if lease else nullcontext():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path != lease:  # Its own file goes with the lease.
                    path.unlink(missing_ok=True)
        if self.remote:
            self.remote.remove(there)

    def drop(self, kind: str, key: str) -> None:
        """Removes a finished step.

        Raises:
            Busy: It is being made.
        """
        path = self.path(kind, key)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._alone(kind, key), leased(_lease_of(path)):
                if self.remote:
                    self.remote.drop(kind, key)
                _discard(path)

    def _hidden(self) -> list[Path]:
        """What stands beside the steps: leases, working folders, and what was left of them."""
        kinds = [k for k in sorted(_names(self.root)) if re.fullmatch("[a-z]+", k) and k != DAMAGED]
        own = re.compile(
            r"\.[0-9a-f]+\.(lock|lock\..+|([0-9a-f]+\.)?partial(\.taken|\.copy)?|[0-9a-f]+\.(fetching|gone))"
        )
        return [self.root / k / n for k in kinds for n in sorted(_names(self.root / k)) if own.fullmatch(n)]

    def _check_there(self, path: Path) -> None:
        if path.is_symlink():
            raise StoreError("a link is where a step's folder should be", where=path, remedy="move it away")
        if not (path / RECORD).is_file():
            raise StoreError("this step is missing, or not finished", where=path, remedy="run the experiment again")

    def _wrong(self, path: Path) -> str | None:
        """What is wrong with a folder; what this process has read already is not read again."""
        try:
            look = _look(path)
        except OSError as error:
            return f"it cannot be read ({error})"
        if _VERIFIED.get(str(path)) == look:
            return None
        wrong = verify(path)
        if wrong is None:
            _VERIFIED[str(path)] = look
        return wrong

    def _is_whole(self, path: Path) -> bool:
        return (path / RECORD).is_file() and not path.is_symlink() and self._wrong(path) is None

    def _moved(self, kind: str, key: str) -> Path | None:
        path = self.path(kind, key)
        wrong = "a link is in its place" if path.is_symlink() else verify(path)
        if wrong is None or not (path.exists() or path.is_symlink()):
            return None
        (self.root / DAMAGED).mkdir(exist_ok=True)
        number = 0
        while True:
            target = self.root / DAMAGED / f"{kind}-{key}-{number}"
            number += 1
            with suppress(FileExistsError):
                # The note comes first: it keeps the name for this one.
                with target.with_name(f"{target.name}.json").open("x", encoding="utf-8") as note:
                    note.write(json.dumps({"kind": kind, "key": key, "why": wrong, "when": now()}) + "\n")
                break
        path.rename(target)
        _sync_folder(target.parent)
        _sync_folder(path.parent)
        _VERIFIED.pop(str(path), None)
        return target

    # What is elsewhere.

    def _alone(self, kind: str, key: str) -> AbstractContextManager[None]:
        return self.remote.leased(kind, key) if self.remote else nullcontext()

    def _pointer(self, remote: Remote, kind: str, key: str) -> Pointer:
        try:
            pointer = remote.pointer(kind, key)
        except StoreError as error:
            raise Damaged(kind, key, error.what, where=f"{remote.url}/{kind}/{key}") from error
        if pointer is None:
            raise StoreError(
                "this step is missing, or not finished",
                where=f"{remote.url}/{kind}/{key}",
                remedy="run the experiment again",
            )
        return pointer

    @contextmanager
    def _downloaded(self, remote: Remote, kind: str, key: str) -> Generator[Path, None, None]:
        """A step's files in a folder that goes with the block, unless it is renamed."""
        where = self.path(kind, key)
        pointer = self._pointer(remote, kind, key)
        work = where.with_name(f".{key}.{secrets.token_hex(8)}.fetching")
        with writing(where):
            work.mkdir(parents=True)
            try:
                missing = remote.fetch(kind, key, pointer, work)
                if missing:
                    raise Damaged(kind, key, f"a file is missing: {missing[0]!r}", where=f"{remote.url}/{kind}/{key}")
                (work / RECORD).write_bytes(_text(pointer.record))
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)

    def _fetched(self, remote: Remote, kind: str, key: str) -> Path:
        path = self.path(kind, key)
        with self._downloaded(remote, kind, key) as work:
            wrong = verify(work)
            if wrong is not None:
                raise Damaged(kind, key, wrong, where=f"{remote.url}/{kind}/{key}")
            _discard(path)
            try:
                work.rename(path)
            except OSError as error:
                # Another process fetched it, too.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not self._is_whole(path):
                    raise
        _VERIFIED[str(path)] = _look(path)
        return path

    def _withdraw(self, remote: Remote, kind: str, key: str) -> str | None:
        """Of a step elsewhere that is damaged: says that it is not finished, and gives where that is kept."""
        try:
            pointer = remote.pointer(kind, key, fresh=True)
        except StoreError as error:
            return remote.withdraw(kind, key, None, error.what)
        if pointer is not None and (wrong := self.check(kind, key)) is not None:
            return remote.withdraw(kind, key, pointer, wrong)
        return None

    @contextmanager
    def _making_there(
        self, remote: Remote, kind: str, key: str, record: Mapping[str, Any]
    ) -> Generator[Path, None, None]:
        path = self.path(kind, key)
        made = AlreadyMade("this step is finished already", where=f"{remote.url}/{kind}/{key}")
        if remote.has(kind, key, fresh=True):
            raise made
        with remote.leased(kind, key):
            if remote.has(kind, key, fresh=True):
                raise made
            if self._is_whole(path):  # Made here, and not sent yet.
                self._publish(remote, kind, key)
                raise made
            with _working(path, record, _discard) as work:
                yield work
            self._publish(remote, kind, key)

    def _publish(self, remote: Remote, kind: str, key: str) -> None:
        path = self.path(kind, key)
        try:
            remote.publish(kind, key, path, read_json(path / RECORD))
        except AlreadyMade:
            _discard(path)  # What counts is the other's.
            raise


def _discard(path: Path) -> None:
    """Removes what a cache holds of a step, at once."""
    away = path.with_name(f".{path.name}.{secrets.token_hex(8)}.gone")
    with suppress(FileNotFoundError):
        path.rename(away)
        if away.is_symlink():
            away.unlink()
        shutil.rmtree(away, ignore_errors=True)


def open_store(where: str | Path) -> Store:
    """Opens a store: a folder, or an fsspec URL such as `s3://bucket/prefix`.

    Steps of a URL are kept in `$LINGRAFT_STORE_CACHE` as well, or `stores` in lingraft's cache.

    Raises:
        UserError: The URL cannot be used.
        MissingExtra: What reads such URLs is not installed.
    """
    url = url_of(where)
    if url is None:
        return Store(re.sub(r"^(file|local):/{0,2}(?=/)", "", str(where)))
    remote = Remote(url)
    ends = [os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL")]
    base = os.environ.get("LINGRAFT_STORE_CACHE")
    return Store((Path(base) if base else cache_folder() / "stores") / digest_value([remote.url, ends], 16), remote)


def _size(path: Path) -> int:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            return sum(s.st_size for s in _files(path).values())
        return path.lstat().st_size
    return 0


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
