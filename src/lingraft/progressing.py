"""How far a running experiment is: kept while it runs, and in a file that other processes may read.

The process that carries a run out writes `OUT/progress/<host>-<pid>.json`, at most once a second, by a thread of its own: it can
neither delay a training nor make it fail. The file says how the process ended, too; one that was killed leaves it as it was.
"""

import hashlib
import math
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from stat import S_ISREG
from typing import Any

from lingraft import bounded
from lingraft.escaping import in_json, one_line
from lingraft.replacing import is_half, write_text

FOLDER = "progress"
POINTS = 120
"""Points of a curve, at most."""
LIGHT = ("score", "select", "merge", "compare")
"""Kinds of steps that take next to no time."""
SILENT = 60.0
"""Seconds without a sign of life after which that is said."""
GONE = 300.0
"""Seconds after which a process that cannot be asked for is taken for gone."""
_FORMAT = 1
_LARGEST = 1 << 20
_FILES = 500
_SOME = 20
_RUNNING = 64
_SIGN = 5.0
"""Seconds between signs of life, where nothing happens."""
_PAUSE = 1.0
_AGAIN = 30.0
"""Seconds until a folder that took no file is tried again: a disk may be full, or a connection gone, for a while."""


@dataclass(frozen=True)
class Running:
    """A step that is being made.

    Attributes:
        label: For people.
        kind: The step's kind.
        done: How much of it is done.
        total: Of how much; 0: that is not known yet.
        note: What it says of itself.
        seconds: Since it began.
        left: Seconds left; None: unknown.
        losses: Step and loss of a training, means of equally many steps.
    """

    label: str
    kind: str = ""
    done: int = 0
    total: int = 0
    note: str = ""
    seconds: float = 0.0
    left: float | None = None
    losses: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class State:
    """How far a process is with a run.

    Attributes:
        name: The experiment's.
        host: Where it runs.
        pid: Its number there.
        machine: Tells machines, and containers on them, apart.
        processes: How many of a launcher work together.
        only: Whether it makes some steps of the plan alone.
        began: When it began, seconds since 1970.
        at: When this was written.
        plan: Steps of the whole plan.
        kept: How many of them were finished when it began.
        total: Steps that it is to make.
        finished: Steps that it made, or that others made meanwhile.
        failed: Steps that failed.
        running: What is being made now.
        left: Seconds left; None: unknown.
        sure: Whether the time of all sorts of steps has been measured.
        failures: The last failures: a label and what is wrong.
        notices: The last things to know.
        outcome: None while it runs; `done`, `failed` or `interrupted`.
        why: Of an end that is not good.
    """

    name: str = ""
    host: str = ""
    pid: int = 0
    machine: str = ""
    processes: int = 1
    only: bool = False
    began: float = 0.0
    at: float = 0.0
    plan: int = 0
    kept: int = 0
    total: int = 0
    finished: int = 0
    failed: int = 0
    running: tuple[Running, ...] = ()
    left: float | None = None
    sure: bool = True
    failures: tuple[tuple[str, str], ...] = ()
    notices: tuple[str, ...] = ()
    outcome: str | None = None
    why: str = ""


class Curve:
    """A loss, step by step, in few points: each is the mean of equally many steps."""

    def __init__(self) -> None:
        self._points: list[tuple[int, float]] = []
        self._bin: list[float] = []
        self._each, self._last = 1, 0

    def add(self, step: int, loss: float) -> None:
        """A step's loss; a step that was told already, or a loss that is no number, adds nothing."""
        if step <= self._last or not math.isfinite(loss):
            return
        self._last = step
        self._bin.append(loss)
        if len(self._bin) < self._each:
            return
        self._points.append((step, sum(self._bin) / len(self._bin)))
        self._bin = []
        if len(self._points) == POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [(b[0], (a[1] + b[1]) / 2) for a, b in pairs]
            self._each *= 2

    def points(self) -> tuple[tuple[int, float], ...]:
        """Steps and means, no more than `POINTS`; the last is of the last steps, however few they are."""
        rest = [(self._last, sum(self._bin) / len(self._bin))] if self._bin else []
        return (*self._points, *rest)


@dataclass
class _Work:
    """A step on the board."""

    label: str
    kind: str
    sort: str
    began: float
    done: int = 0
    total: int = 0
    note: str = ""
    curve: Curve = field(default_factory=Curve)
    first: tuple[int, float] | None = None

    def told(self, done: int, total: int, note: str, loss: float | None, now: float) -> None:
        # Loading the model, and what a checkpoint has kept, tell nothing about the rest.
        if self.first is None or done <= 1 or done < self.done:
            self.first = (done, now)
        self.done, self.total, self.note = done, total, note
        if loss is not None:
            self.curve.add(done, loss)

    def left(self, now: float) -> float | None:
        if self.first is None or self.done <= self.first[0] or not self.total:
            return None
        done, since = self.first
        return (now - since) / (self.done - done) * max(0, self.total - self.done)


@dataclass
class Board:
    """What is known of a run while it goes on: a state that is told what happens. It knows no clock and no file.

    Attributes:
        about: What stays as it is: name, host, plan and the like.
        todo: How many steps of each sort are to be made.
        known: Mean seconds of a step, by its sort, as measured before.
    """

    about: State = field(default_factory=State)
    todo: Counter[str] = field(default_factory=Counter[str])
    known: Mapping[str, float] = field(default_factory=dict[str, float])
    total: int = 0
    finished: int = 0
    _works: dict[str, _Work] = field(default_factory=dict[str, _Work])
    _ended: Counter[str] = field(default_factory=Counter[str])
    _seconds: Counter[str] = field(default_factory=Counter[str])
    _failures: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    _notices: list[str] = field(default_factory=list[str])
    _failed: int = 0

    def expect(self, todo: Mapping[str, int], known: Mapping[str, float]) -> None:
        """What is to be made: steps by their sort, and the seconds that one takes as far as that was measured."""
        self.todo, self.known, self.total = Counter(todo), known, sum(todo.values())

    def begin(self, key: str, label: str, now: float, *, kind: str = "", sort: str = "", total: int = 0) -> None:
        """A step begins."""
        self._works[key] = _Work(label, kind, sort or kind, now)
        self.total = max(self.total, total)

    def progress(self, key: str, done: int, total: int, note: str, loss: float | None, now: float) -> None:
        """A step goes on; one that is not known is not shown."""
        if key in self._works:
            self._works[key].told(done, total, note, loss, now)

    def work(self, key: str, now: float) -> Running | None:
        """A step that is being made."""
        return _shown(self._works[key], now) if key in self._works else None

    def ended(self, key: str, now: float) -> None:
        """A step is made, or has failed."""
        work = self._works.pop(key, None)
        self.finished += 1
        if work is not None:
            self._ended[work.sort] += 1
            self._seconds[work.sort] += now - work.began  # pyright: ignore[reportArgumentType]

    def failure(self, label: str, what: str) -> None:
        """A step has failed; where it had begun, `ended` was told before."""
        self._failed += 1
        self.finished = max(0, self.finished - 1)
        self._failures = [*self._failures, (label, what)][-_SOME:]

    def notice(self, text: str) -> None:
        """Something to know."""
        self._notices = [*self._notices, text][-_SOME:]

    def state(self, now: float) -> State:
        """How far it is."""
        left, sure = self._left(now)
        return replace(
            self.about,
            total=max(self.total, self.about.total),
            finished=self.finished,
            failed=self._failed,
            running=tuple(_shown(work, now) for work in list(self._works.values())[:_RUNNING]),
            left=left,
            sure=sure,
            failures=tuple(self._failures),
            notices=tuple(self._notices),
        )

    def _left(self, now: float) -> tuple[float | None, bool]:
        """Seconds left, from what steps of each sort have taken; and whether that is known of all sorts."""
        means = dict(self.known) | {sort: self._seconds[sort] / n for sort, n in self._ended.items()}
        works = list(self._works.values())
        for work in works:
            left = work.left(now)
            if left is not None:
                means.setdefault(work.sort, now - work.began + left)
        waiting = self.todo - self._ended - Counter(work.sort for work in works)
        sure, known, seconds = True, False, 0.0
        for work in works:
            left = work.left(now)
            if left is None and work.sort in means:
                left = max(0.0, means[work.sort] - (now - work.began))
            sure, known = sure and left is not None, known or left is not None
            seconds += left or 0.0
        for sort, count in waiting.items():
            if sort in means:
                known, seconds = True, seconds + count * means[sort]
            elif sort.partition("/")[0] not in LIGHT:
                sure = False
        return (seconds / max(1, len(works)) if known else None), sure


def _shown(work: _Work, now: float) -> Running:
    left = work.left(now)
    return Running(work.label, work.kind, work.done, work.total, work.note, now - work.began, left, work.curve.points())


class Recorder:
    """Writes how far a run is, by a thread of its own that never keeps the process.

    Args:
        out: The run's folder.
        about: What stays as it is.
        say: Told, once, that it cannot be written.
    """

    def __init__(self, out: Path, about: State, say: Callable[[str], None]) -> None:
        self._path = out / FOLDER / f"{_safe(socket.gethostname())}-{os.getpid()}.json"
        self._say, self._lock, self._over = say, threading.Lock(), threading.Event()
        now = time.time()
        about = replace(about, host=socket.gethostname(), pid=os.getpid(), machine=_machine(), began=now, at=now)
        self._board = Board(about)
        self._changed, self._written, self._next = True, 0.0, 0.0
        self._broken, self._said = "", False
        self._thread: threading.Thread | None = None

    def start(self, todo: Mapping[str, int], known: Mapping[str, float]) -> None:
        """The first steps begin: from now on it is written.

        Args:
            todo: How many steps of each sort are to be made.
            known: Mean seconds of a step, by its sort.
        """
        with self._lock:
            self._board.expect(todo, known)
        if not self._board.about.only:
            _clear(self._path)
        self._write()
        self._thread = threading.Thread(target=self._run, name="lingraft-progress", daemon=True)
        self._thread.start()

    def tell(self, what: Callable[[Board, float], None]) -> None:
        """Something has happened."""
        with self._lock:
            what(self._board, time.monotonic())
            self._changed = True
        if self._broken and not self._said:
            self._said = True
            self._say(self._broken)

    def end(self, outcome: str, why: str = "") -> None:
        """The run is over; what it is that a run was refused for before it began is not written."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(_SIGN)
            if self._thread.is_alive():  # The disk takes nothing and refuses nothing: it would keep this one, too.
                return
        elif outcome == "done":
            _clear(self._path)
        else:
            return
        with self._lock:
            self._board.about = replace(self._board.about, outcome=outcome, why=why)
        self._write()
        self.tell(lambda board, now: None)

    def _run(self) -> None:
        while not self._over.wait(_PAUSE):
            now = time.monotonic()
            if now >= self._next and (self._changed or now - self._written > _SIGN):
                self._write()

    def _write(self) -> None:
        with self._lock:
            self._changed, self._written = False, time.monotonic()
            state = replace(self._board.state(self._written), at=time.time())
            if state.outcome is not None:
                state = replace(state, running=(), left=None)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, in_json(_bounded({"format": _FORMAT, **asdict(state)})))
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            self._next = time.monotonic() + _AGAIN
            self._broken = (
                f"how far the run is cannot be written ({why}): lingraft watch does not see it, nothing else is lost"
            )


def _clear(own: Path) -> None:
    """Removes what processes left here that have ended."""
    for path, state in _files(own.parent.parent):
        if path != own and sign(state) in ("over", "gone"):
            with suppress(OSError):
                path.unlink()
    with suppress(OSError):
        for path in own.parent.iterdir():  # Of processes that were killed while they wrote.
            if is_half(path.name) and time.time() - path.lstat().st_mtime > SILENT:
                path.unlink()


def _bounded(value: Any) -> Any:
    """Texts of no more than a few lines, numbers that JSON has."""
    if isinstance(value, dict):
        return {k: _bounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_bounded(v) for v in value]
    if isinstance(value, str):
        # Half a character, as of a path that is not UTF-8, is one that no reader takes.
        text = value.encode("utf-8", "backslashreplace").decode()
        return text if len(text) <= 400 else text[:399] + "…"
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < 1e6 else round(value, 1)
    return value


def states(out: Path) -> list[State]:
    """How far the processes of a run are, the first to begin first; files that are none of ours are left out."""
    found = [state for _, state in _files(out)]
    return sorted(found, key=lambda state: (state.began, state.host, state.pid))


def _files(out: Path) -> list[tuple[Path, State]]:
    found: list[tuple[float, Path]] = []
    with suppress(OSError):
        for path in (out / FOLDER).iterdir():
            with suppress(OSError):
                if path.suffix == ".json" and not path.name.startswith(".") and S_ISREG(path.lstat().st_mode):
                    found.append((path.lstat().st_mtime, path))
    read: list[tuple[Path, State]] = []
    for _, path in sorted(found, reverse=True)[:_FILES]:
        with suppress(OSError, ValueError):
            state = state_of(bounded.read(path, _LARGEST))
            if state is not None:
                read.append((path, state))
    return read


def sign(state: State, now: float | None = None) -> str:
    """`over`; `alive`; `silent`, without a sign of life for long; `gone`: it was killed."""
    if state.outcome is not None:
        return "over"
    silent = (time.time() if now is None else now) - state.at
    if state.machine == _machine():
        if not _is_there(state.pid):
            return "gone"
        return "silent" if silent > SILENT else "alive"
    return "gone" if silent > GONE else "silent" if silent > SILENT else "alive"


def may_report(state: State) -> bool:
    """Whether the process may still be there, so that a run which is over may yet get its report."""
    return state.machine != _machine() or _is_there(state.pid)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    with suppress(OSError):
        # One that was killed stays until whoever began it has asked what became of it.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    return True


@cache
def _machine() -> str:
    """A name of this machine since it was started, and of the container on it."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)[:60] or "host"


def combined(found: Sequence[State], now: float | None = None) -> State | None:
    """Several processes of a run as one: what they are at, what is left, and how it ended once all of them have.

    None: there is no process.
    """
    if not found:
        return None
    now = time.time() if now is None else now
    at_work = [state for state in found if sign(state, now) in ("alive", "silent")]
    latest = found[-1]
    # What ended before a whole run began is of another one; tasks that make some steps each are of one.
    counted = [s for s in found if s is latest or s in at_work or (latest.only and s.only)]
    shown, plan = at_work or counted, max(state.plan for state in counted)
    lefts = [state.left for state in shown if state.left is not None]
    return replace(
        latest,
        **_counts(counted, shown, plan),
        processes=sum(state.processes for state in shown),
        only=all(state.only for state in counted),
        began=min(state.began for state in counted),
        at=max(state.at for state in counted),
        plan=plan,
        failed=sum(state.failed for state in counted),
        running=tuple(work for state in at_work for work in state.running),
        left=max(lefts) if lefts else None,
        sure=all(state.sure and state.left is not None for state in shown),
        failures=tuple(failure for state in counted for failure in state.failures)[-_SOME:],
        notices=tuple(notice for state in counted for notice in state.notices)[-_SOME:],
        outcome=None if at_work else _outcome(counted, now),
        why=next((s.why for s in reversed(counted) if s.why), ""),
    )


def _counts(counted: Sequence[State], shown: Sequence[State], plan: int) -> dict[str, int]:
    """How many steps there were, are to be made, and are finished: of a whole run its own counts, of tasks their sums."""
    whole = [state for state in shown if not state.only]
    if whole:
        best = max(whole, key=lambda state: state.kept + state.finished)
        return {"kept": best.kept, "total": best.total, "finished": best.finished}
    if len(counted) == 1:
        return {"kept": counted[0].kept, "total": counted[0].total, "finished": counted[0].finished}
    left = max(0, plan - counted[0].kept)
    return {"kept": counted[0].kept, "total": left, "finished": min(left, sum(s.finished for s in counted))}


def _outcome(found: Sequence[State], now: float) -> str:
    """Of several ends the worst: `killed`, `failed`, `interrupted`, `done`."""
    ends = {"killed" if sign(state, now) == "gone" else str(state.outcome) for state in found}
    return next((end for end in ("killed", "failed", "interrupted") if end in ends), "done")


def state_of(value: Any) -> State | None:
    """A state from what a file holds; None: it is none. Whatever else is in it is taken for nothing."""
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        return None
    if type(value.get("pid")) is not int or value["pid"] < 1:
        return None
    counts = ("pid", "processes", "plan", "kept", "total", "finished", "failed")
    outcome = value.get("outcome")
    numbers: dict[str, Any] = {name: _count(value.get(name)) for name in counts}
    return State(
        name=_text(value.get("name")),
        host=_text(value.get("host")),
        machine=_text(value.get("machine")),
        why=_text(value.get("why")),
        **numbers,
        only=value.get("only") is True,
        sure=value.get("sure") is True,
        began=_number(value.get("began")) or 0.0,
        at=_number(value.get("at")) or 0.0,
        left=_number(value.get("left")),
        running=tuple(_work_of(work) for work in _list(value.get("running"), _RUNNING) if isinstance(work, dict)),
        failures=tuple(
            (_text(pair[0]), _text(pair[1]))
            for pair in _list(value.get("failures"), _SOME)
            if isinstance(pair, list) and len(pair) == 2
        ),
        notices=tuple(_text(text) for text in _list(value.get("notices"), _SOME)),
        outcome=outcome if outcome in ("done", "failed", "interrupted") else None,
    )


def _work_of(value: Mapping[str, Any]) -> Running:
    points = [p for p in _list(value.get("losses"), POINTS) if isinstance(p, list) and len(p) == 2]
    losses = [(_count(step), _number(loss)) for step, loss in points]
    return Running(
        label=_text(value.get("label")),
        kind=_text(value.get("kind")),
        note=_text(value.get("note")),
        done=_count(value.get("done")),
        total=_count(value.get("total")),
        seconds=_number(value.get("seconds")) or 0.0,
        left=_number(value.get("left")),
        losses=tuple((step, loss) for step, loss in losses if loss is not None),
    )


def _text(value: Any) -> str:
    return one_line(value[:400]) if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 1 << 53 else 0


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    return float(value) if good and math.isfinite(value) else None


def _list(value: Any, most: int) -> list[Any]:
    return value[:most] if isinstance(value, list) else []
