"""One maker at a time, among threads, processes and hosts: a file that says who, locked and touched as long as that one lives."""

import errno
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from lingraft.errors import Busy, UserError

try:
    import fcntl
except ImportError:  # Windows: leases go by their sign of life alone.
    fcntl = None

_WAIT = 60.0
_ROUNDS = 20


def patience() -> float:
    """Seconds without a sign of life after which a holder on another host is given up: `$LINGRAFT_LEASE_SECONDS`, or 60.

    Raises:
        UserError: The variable is not a number above 0.
    """
    said = os.environ.get("LINGRAFT_LEASE_SECONDS")
    try:
        value = _WAIT if not said else float(said)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise UserError(
            "LINGRAFT_LEASE_SECONDS must be a number above 0",
            where=said,
            remedy="set LINGRAFT_LEASE_SECONDS=60, or unset it",
        )
    return value


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, as its file says.

    Args:
        host: The host's name, for messages.
        boot: What tells one running kernel from another; empty where the system does not say.
        space: The process namespace, in which `pid` is meant.
        pid: The process.
        start: When the process started, in the kernel's ticks; 0 where the system does not say.
        token: Of this lease alone.
        since: When it was taken, UTC.
        seconds: The holder gives a sign of life several times within so many seconds.
        locked: Whether the holder has the file locked.
        earlier: Tokens of holders that were given up, the last first, whose work this one may go on with.
    """

    host: str
    boot: str
    space: str
    pid: int
    start: int
    token: str
    since: str
    seconds: float
    locked: bool = False
    earlier: tuple[str, ...] = ()


class Lease:
    """A lease that this process holds; see `leased`.

    Args:
        path: Its file.
        holder: What the file says.
        handle: The open, locked file.
        certain: Whether the holders before, whose work may be gone on with, are known to be dead.
    """

    def __init__(self, path: Path, holder: Holder, handle: int, certain: bool) -> None:
        self.path, self.token, self.earlier = path, holder.token, holder.earlier
        self.certain = certain
        self._handle, self._seconds = handle, holder.seconds

    def held(self) -> bool:
        """Whether it is still this process's: one that stood still too long has lost it to another."""
        for _ in range(5):
            with suppress(FileNotFoundError):
                if os.path.samestat(self.path.stat(), os.fstat(self._handle)):
                    return True
            said = _read(self.path)
            if said is not None:
                return said.token == self.token
            time.sleep(0.05)  # Another looks at it closely, and puts it back.
        return False

    def touch(self) -> None:
        """Gives a sign of life, by the clock of the file system."""
        with suppress(OSError):
            os.utime(self._handle if os.utime in os.supports_fd else self.path)

    def release(self) -> None:
        """Gives it back."""
        _PULSE.drop(self)
        with suppress(OSError):
            if self.held():
                self.path.unlink()
        os.close(self._handle)


@contextmanager
def leased(path: Path) -> Generator[Lease, None, None]:
    """Holds the lease of a file for the block. Its folder must exist.

    A holder is given up when its process is gone, or when it is on another host and has given no sign of life for longer
    than it promised, by the clock of the file system.

    Raises:
        Busy: Another holds it.
        OSError: The file cannot be written.
    """
    lease = take(path)
    try:
        yield lease
    finally:
        lease.release()


def take(path: Path) -> Lease:
    """Takes the lease of a file; see `leased`."""
    earlier: tuple[str, ...] = ()
    certain = True
    for _ in range(_ROUNDS):
        if path.is_symlink():  # No lease is one.
            path.unlink(missing_ok=True)
        lease = _create(path, earlier, certain)
        if lease is not None:
            return lease
        with _examined(path) as found:
            if found is None:  # Gone meanwhile.
                continue
            seen, certain = found
            if seen.token not in earlier:
                earlier = (seen.token, *seen.earlier) if seen.token else earlier
            if _remove(path, seen.token):
                lease = _create(path, earlier, certain)
                if lease is not None:
                    return lease
    raise Busy("other processes are about to make this", where=path.parent, remedy="wait for them, or stop them")


def is_free(path: Path) -> bool:
    """Whether a lease's file is a leftover: its holder is gone, or it is no longer there."""
    try:
        with _examined(path):
            return True
    except Busy:
        return False


def is_older(path: Path, seconds: float) -> bool:
    """Whether a file or folder, and all directly in it, is older by the clock of the file system."""
    with suppress(FileNotFoundError):
        there = [path, *path.iterdir()] if path.is_dir() and not path.is_symlink() else [path]
        return _age(path, max(p.lstat().st_mtime for p in there)) > seconds
    return False


def _create(path: Path, earlier: tuple[str, ...], certain: bool) -> Lease | None:
    """Makes the file, with its holder and locked from the first moment; None where there is one already."""
    token = secrets.token_hex(8)
    mine = path.with_name(f"{path.name}.{token}")
    handle = os.open(mine, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        locked = _locked(handle) is True
        holder = Holder(*this_process(), token, now(), patience(), locked, earlier)
        mine.write_text(json.dumps(asdict(holder)) + "\n")  # Closed: on NFS other hosts see it from then on.
        if not _appear(mine, path):
            os.close(handle)
            return None
    except BaseException:
        with suppress(OSError):
            os.close(handle)
        raise
    finally:
        with suppress(OSError):
            mine.unlink()
    lease = Lease(path, holder, handle, certain)
    _PULSE.add(lease)
    return lease


def _appear(mine: Path, path: Path) -> bool:
    """Gives a file a name that nothing has yet."""
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK):
            raise
        # There are no hard links here. An exclusive lock file says who may rename.
        guard = path.with_name(f"{path.name}.guard")
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            with suppress(FileNotFoundError):  # Its owner has just removed it.
                if _age(guard, guard.stat().st_mtime) > patience():
                    guard.unlink()
            return False
        try:
            if path.exists():
                return False
            mine.rename(path)
        finally:
            guard.unlink(missing_ok=True)
    return True


@contextmanager
def _examined(path: Path) -> Generator[tuple[Holder, bool] | None, None, None]:
    """A holder that can be given up and whether it is known to be dead; its file is locked meanwhile, where that can be.

    Raises:
        Busy: The holder lives.
    """
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield None
        return
    except PermissionError:
        # Another user's: it cannot be locked, and must not be removed.
        raise busy(path, _read(path), None) from None
    try:
        lock = _locked(handle)
        said, stat = read_holder(os.read(handle, 1 << 16)), os.fstat(handle)
        if lock is False:
            raise busy(path, said, stat.st_mtime)
        try:
            here = path.stat()
        except FileNotFoundError:
            here = None
        if here is None or not os.path.samestat(here, stat):
            yield None
            return
        verdict = None if said is None else is_dead(said, lock is True)
        if verdict is False:
            raise busy(path, said, stat.st_mtime)
        if verdict is None and _age(path, stat.st_mtime) <= (said.seconds if said else patience()):
            raise busy(path, said, stat.st_mtime)
        yield said or Holder("", "", "", 0, 0, "", "", 0.0), verdict is True
    finally:
        os.close(handle)


def is_dead(said: Holder, free: bool) -> bool | None:
    """Whether a holder is dead: True, False, or None where only its sign of life can tell.

    Args:
        said: The holder.
        free: Whether its file could be locked just now.
    """
    _, boot, space, _, _ = this_process()[:5]
    here = said.boot == boot and (boot != "" or said.host == socket.gethostname())
    if not here:
        return None
    # A lock ends with its process, and is seen by all processes of a kernel: if the file system has locks at all.
    free = free and said.locked
    if said.space != space or os.name != "posix":
        return True if free else None
    if _started(said.pid) != said.start:
        return True
    return None if free else False


def _remove(path: Path, token: str) -> bool:
    """Removes the file of a holder that was given up, unless it is another's by now."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    said = _read(aside)
    if (said.token if said else "") == token:
        aside.unlink(missing_ok=True)
        return True
    # Another host was quicker, and this is its new lease.
    _appear(aside, path)
    aside.unlink(missing_ok=True)
    return False


def _age(path: Path, touched: float) -> float:
    """Seconds since a time, by the clock of the file system."""
    clock = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    clock.touch()
    try:
        return clock.stat().st_mtime - touched
    finally:
        clock.unlink(missing_ok=True)


def _locked(handle: int) -> bool | None:
    """Locks an open file: whether that could be done, or None where the file system knows no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, NotImplementedError):
        return None
    return True


def _read(path: Path) -> Holder | None:
    try:
        return read_holder(path.read_bytes())
    except OSError:
        return None


def read_holder(text: bytes) -> Holder | None:
    """What a lease's file says; None where it says nothing that can be read."""
    try:
        value: dict[str, Any] = json.loads(text)
        holder = Holder(**{**value, "earlier": tuple(value["earlier"])})
        # Tokens become parts of names.
        return holder if all(re.fullmatch("[0-9a-f]+", token) for token in (holder.token, *holder.earlier)) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def busy(path: Path, said: Holder | None, touched: float | None) -> Busy:
    """Says who holds a lease, and when there was last a sign of life."""
    what = "another process is making this"
    if said is not None:
        sign = "" if touched is None else f", last sign of life {_clock(touched)}"
        what += f": process {said.pid} on {said.host}, since {said.since}{sign}"
    name = path.name.removeprefix(".").removesuffix(".lock")
    return Busy(what, where=path.with_name(name), remedy="wait for it, or stop it")


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def now() -> str:
    """The time, UTC, for people."""
    return _clock(time.time())


@cache
def _boot() -> tuple[str, str]:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return "", ""


def this_process() -> tuple[str, str, str, int, int]:
    """The first fields of a `Holder`."""
    return socket.gethostname(), *_boot(), os.getpid(), _own_start(os.getpid())


@cache
def _own_start(pid: int) -> int:
    return _started(pid) or 0


def _started(pid: int) -> int | None:
    """When a process started, in the kernel's ticks; 0 where the system does not say, None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, ValueError, IndexError):
        return 0
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return 0


class Touched(Protocol):
    """What gives signs of life."""

    def touch(self) -> None:
        """Gives one."""
        ...


class Pulse:
    """Touches this process's leases, in one thread for all of them."""

    def __init__(self) -> None:
        self._leases: set[Touched] = set()
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wait = 0.0

    def add(self, lease: Touched) -> None:
        """Begins with a lease."""
        with self._change:
            self._leases.add(lease)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="lingraft-leases", daemon=True)
                self._thread.start()
            elif patience() / 6 < self._wait:
                self._change.notify()

    def drop(self, lease: Touched) -> None:
        """Ends with a lease; it is not being touched when this returns."""
        with self._change:
            self._leases.discard(lease)

    def forget(self) -> None:
        """In a forked child: the leases are its parent's."""
        self.__init__()

    def _run(self) -> None:
        with self._change:
            while True:
                for lease in self._leases:
                    lease.touch()
                self._wait = patience() / 6
                self._change.wait(self._wait)


_PULSE = Pulse()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_PULSE.forget)
