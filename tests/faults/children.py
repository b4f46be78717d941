"""A `lingraft` command in a process of its own, forked with everything imported, and what befalls it there.

Operations on the store are counted by Python's audit events, which come just before the operation, and by `os.fsync`: a process
that dies at its n-th moment has done n - 1 of them. Nothing of lingraft is replaced but the time between checkpoints.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import stat
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "peft",
    "rich.progress",
    "rich.table",
    "matplotlib.figure",
    "lingraft.cli",
    "lingraft.evaluation",
    "lingraft.lottery",
    "lingraft.report.figures",
    "lingraft.report.paper",
    "lingraft.report.terminal",
    "lingraft.runner",
    "lingraft.training",
    "lingraft.unpickling",
)
MARK = "LINGRAFT_FAULTS"
"""In the environment of every process that is started here, and of what it starts: how all of them are found and ended."""


@dataclass(frozen=True)
class Spec:
    """A command and what befalls it.

    Attributes:
        arguments: Of `lingraft`.
        folder: Where it runs.
        log: Where its output goes.
        within: The folder whose operations are counted; None: none are.
        counted: Where it writes how many there were, when it ends of itself.
        made: A file to which it adds a line for every step it finished.
        die_at: Kills itself just before this operation, from 1.
        stop_at: Stops itself (SIGSTOP) just before this operation.
        die_at_pass: Kills itself in the pass of so many training steps, from 1.
        powerless: When it kills itself, what was written and not synced is lost by half, as when the power fails.
        flip: Damages these steps ("kind/key") as soon as they have appeared.
        environment: Added.
        powers: Whether it keeps root's power to read and write what its permissions forbid.
        file_limit: Bytes that a file may have.
        host: In network, UTS and, with `pids`, process namespaces of its own, under this name.
        pids: See `host`.
        lockless: `flock` and `lockf` do nothing, as on a shared folder that does not pass locks on between hosts; with
            `pids` the kernel is another one, too.
        pause: Sleeps so many seconds before every commit.
    """

    arguments: tuple[str, ...]
    folder: Path
    log: Path
    within: Path | None = None
    counted: Path | None = None
    made: Path | None = None
    die_at: int | None = None
    stop_at: int | None = None
    die_at_pass: int | None = None
    powerless: bool = False
    flip: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    powers: bool = True
    file_limit: int | None = None
    host: str | None = None
    pids: bool = False
    lockless: bool = False
    pause: float = 0.0


def main(spec: Spec) -> None:
    """What a forked process does; it ends with the command's exit code."""
    os.setsid()
    log = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number, handle in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(handle, number)
    os.environ.update(spec.environment)
    os.chdir(spec.folder)
    if spec.host is not None:
        _other_host(spec)
    if not spec.powers:
        # Its own user still, so that it can read its interpreter, which may be in root's home.
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if _libc().capset(header, none) != 0:
            raise OSError(ctypes.get_errno(), "capset")
    _libc().prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: nothing outlives the tests.
    if spec.file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (spec.file_limit, spec.file_limit))
    if spec.lockless:
        import fcntl

        fcntl.flock = fcntl.lockf = lambda *_: None  # type: ignore[assignment]
    code = 1
    try:
        _befall(spec)
        code = _command(spec.arguments)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        if spec.counted is not None:
            spec.counted.write_text(str(Moments.count), encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        _end_quietly()
        os._exit(code)


def _end_quietly() -> None:
    """What other libraries have asked to be called at the end, such as Ray's ending of its cluster."""
    import atexit

    atexit._run_exitfuncs()


def _command(arguments: tuple[str, ...]) -> int:
    from lingraft.cli import main as lingraft

    sys.argv = ["lingraft", *arguments]
    try:
        lingraft(list(arguments), prog_name="lingraft")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _other_host(spec: Spec) -> None:
    """Goes into namespaces of its own."""
    new_ns, new_uts, new_net, new_pid = 0x00020000, 0x04000000, 0x40000000, 0x20000000
    flags = new_uts | new_net | ((new_pid | new_ns) if spec.pids else 0)
    if _libc().unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    socket.sethostname(spec.host or "")
    if not spec.pids:
        return
    for _ in range(2):  # Its first process takes no signal from within: the command is the second.
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
    # /proc shows the processes of this namespace alone.
    libc = _libc()
    libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)  # MS_REC | MS_PRIVATE
    libc.mount(b"proc", b"/proc", b"proc", 0, None)
    if spec.lockless:  # Where locks are not passed on there is another kernel.
        boot = spec.log.with_name(f"{spec.log.name}.boot")
        boot.write_text(f"{uuid.uuid4()}\n")
        libc.mount(bytes(boot), b"/proc/sys/kernel/random/boot_id", None, 0x1000, None)  # MS_BIND


# What befalls it


class Moments:
    """The operations on the store so far."""

    count = 0
    passes = 0


def _befall(spec: Spec) -> None:
    from lingraft import stepping, training

    # After every step, whatever it costs: a training of a second has checkpoints to be killed between, too.
    for function in (training.train, training.train_one, training.train_together):
        if "checkpoint_seconds" in (function.__kwdefaults__ or {}):
            function.__kwdefaults__["checkpoint_seconds"] = 0.0
    if spec.die_at_pass is not None:
        _wrap(stepping.Learner, "draw", after=lambda *_: _pass(spec))
    if spec.within is not None:
        _count(spec)
    if spec.made is not None or spec.flip or spec.pause:
        _commits(spec)


def _wrap(
    owner: Any, name: str, *, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> None:
    real = getattr(owner, name)

    def wrapped(*given: Any, **named: Any) -> Any:
        if before is not None:
            before(*given)
        found = real(*given, **named)
        if after is not None:
            after(*given)
        return found

    setattr(owner, name, wrapped)


def _pass(spec: Spec) -> None:
    Moments.passes += 1
    if Moments.passes == spec.die_at_pass:
        os.kill(os.getpid(), signal.SIGKILL)


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_OPERATIONS = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.link": 2, "os.truncate": 1}


def _count(spec: Spec) -> None:
    """Counts the operations on the store, and dies at the one it is told to."""
    root = str(spec.within)
    began = time.time_ns()
    synced: dict[int, tuple[int, int]] = {}

    def inside(path: Any) -> bool:
        if isinstance(path, int):
            try:
                path = Path(f"/proc/self/fd/{path}").readlink()
            except OSError:
                return False
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        # A name alone is one that a tree is removed by, folder by folder: there is no other tree but below the store.
        return name.startswith(root) or bool(name and "/" not in name)

    def moment() -> None:
        Moments.count += 1
        if Moments.count == spec.stop_at:
            os.kill(os.getpid(), signal.SIGSTOP)
        if Moments.count == spec.die_at:
            if spec.powerless:
                _lose(Path(root), began, synced)
            os.kill(os.getpid(), signal.SIGKILL)

    def heard(event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = given
            if isinstance(flags, int) and flags & _WRITES and not isinstance(path, int) and inside(path):
                moment()
        elif event in _OPERATIONS and any(inside(path) for path in given[: _OPERATIONS[event]]):
            moment()

    def sync(handle: int) -> None:
        if inside(handle):
            moment()
            found = os.fstat(handle)
            synced[found.st_ino] = (found.st_size, found.st_mtime_ns)

    sys.addaudithook(heard)
    for name in ("fsync", "fdatasync"):
        _wrap(os, name, before=sync)


def _lose(root: Path, began: int, synced: Mapping[int, tuple[int, int]]) -> None:
    """Takes away half of what was written after the process began and after the file's last fsync."""
    for path in root.rglob("*"):
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_mtime_ns < began:
            continue
        size, at = synced.get(found.st_ino, (0, 0))
        if at != found.st_mtime_ns:
            os.truncate(path, min(found.st_size, size + max(0, found.st_size - size) // 2))


def _commits(spec: Spec) -> None:
    """Does something when a step's folder has appeared: notes it, damages it; or waits before it does."""

    def step_of(target: Any) -> str | None:
        parts = Path(target).parts[-2:]
        hidden = parts[0] == "adapters" or any(part.startswith(".") for part in parts)
        return "/".join(parts) if not hidden and (Path(target) / "step.json").is_file() else None

    def appeared(_: Any, target: Any, **__: Any) -> None:
        name = step_of(target)
        if name is None or "damaged" in Path(target).parts:
            return
        if spec.made is not None:
            handle = os.open(spec.made, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.write(handle, (json.dumps([os.getpid(), name]) + "\n").encode())
            os.close(handle)
        if name in spec.flip:
            damage(Path(target), "flip")

    def waits(source: Any, target: Any, **_: Any) -> None:
        if spec.pause and (Path(source) / "step.json").is_file() and not Path(target).name.startswith("."):
            time.sleep(spec.pause)

    for name in ("rename", "replace"):
        _wrap(os, name, before=waits, after=appeared)


def damage(folder: Path, how: str, name: str | None = None) -> Path:
    """Damages a file of a folder, the first that is not its record where none is named; gives the file.

    Args:
        folder: A step's folder, finished or not.
        how: `flip` a bit in the middle, `truncate` it, `empty` it, `delete` it, `add` another one.
        name: Which file.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "step.json")
    path = folder / name if name is not None else files[0]
    if how == "flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        handle = os.open(path, os.O_WRONLY)  # In place: the same inode, as a disk would have it.
        os.pwrite(handle, bytes(content), 0)
        os.close(handle)
    elif how in ("truncate", "empty"):
        os.truncate(path, path.stat().st_size // 2 if how == "truncate" else 0)
    elif how == "delete":
        path.unlink()
    elif how == "add":
        path = path.with_name("stray.bin")
        path.write_bytes(b"stray")
    else:
        raise ValueError(how)
    return path
