"""Runs a plan: finished steps are skipped, a failure stops what depends on it, and everything finished is kept."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from lingraft import processes
from lingraft.checking import check_data
from lingraft.config import Experiment
from lingraft.errors import (
    AlreadyMade,
    Busy,
    Damaged,
    Interrupted,
    LingraftError,
    RunFailed,
    StoreError,
    TransientError,
    UserError,
    suggestion,
)
from lingraft.execution import shape_of
from lingraft.locating import locate
from lingraft.manifests import MANIFEST, write_manifest
from lingraft.plan import Plan, Step, make_plan, ordered
from lingraft.progressing import LIGHT, Recorder, State
from lingraft.schedule import Schedule
from lingraft.session import Session
from lingraft.store import Store, open_store
from lingraft.workers import Workers
from lingraft.workers.local import Local

PLACES = ("local", "ray")
TRIES = 3
"""How often a step is begun that fails for what a retry can mend, or for which one input is found damaged."""
_SAMPLES = 3
"""Finished steps of a sort that are asked how long they took."""
_PAUSE = 2.0
"""Seconds until a step is asked for again that another process is making."""


@dataclass
class Events:
    """What a run tells whoever watches it; every member may be replaced.

    Attributes:
        step: A step begins, with its number and how many there are.
        progress: A step goes on: how much of it is done, of how much, a note, and of a training the loss.
        ended: A step is made, or has failed.
        failure: Why it failed.
        notice: Something to know.
        begin: The first steps are about to begin: how many there are of each sort, and the mean seconds of a step of the sorts that
            were measured before.
    """

    step: Callable[[Step, int, int], None] = field(default=lambda step, number, total: None)
    progress: Callable[[Step, int, int, str, float | None], None] = field(
        default=lambda step, done, total, note, loss: None
    )
    ended: Callable[[Step], None] = field(default=lambda step: None)
    failure: Callable[[Step, LingraftError], None] = field(default=lambda step, error: None)
    notice: Callable[[str], None] = field(default=lambda text: None)
    begin: Callable[[Mapping[str, int], Mapping[str, float]], None] = field(default=lambda todo, known: None)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: how many steps it made, and how many were there or were made by others."""

    plan: Plan
    ran: int
    kept: int
    manifest: Path


def pending(plan: Plan, store: Store) -> list[Step]:
    """The steps that are not finished, in order."""
    return [step for step in plan.steps if not store.has(step.kind, step.key)]


def run(
    experiment: Experiment,
    out: str | Path,
    *,
    store: str | Path | None = None,
    on: str = "local",
    address: str | None = None,
    only: Collection[str] = (),
    events: Events | None = None,
) -> Outcome:
    """Carries out an experiment; run again, it does only what is not finished.

    Several runs may share a store, at the same time and on several hosts: what one is making the others wait for.

    Args:
        experiment: What to compare.
        out: The folder of this run's manifest, report and adapters.
        store: The folder of finished steps, shared between runs, or an fsspec URL; None: `store` beside `out`.
        on: Where to run; `local` is this process, `ray` a Ray cluster.
        address: Of a Ray cluster; None: one is started here.
        only: Keys of steps of the plan: those are made, and what is found damaged of their inputs; no manifest is written.
        events: Whom to tell.

    Returns:
        How many steps ran and how many were there already.

    Raises:
        RunFailed: Some steps failed.
        Interrupted: Ctrl-C.
        UserError: The experiment cannot be planned.
        LingraftError: What the only steps need is not finished.
    """
    if on not in PLACES:
        raise UserError(f"unknown runner '{on}'", remedy=suggestion(on, PLACES))
    if on == "ray" and processes.world() > 1:
        raise UserError("Ray starts processes itself", remedy="leave the launcher out, or --on ray")
    out, events = Path(out), events or Events()
    located = locate(experiment.backbone)
    plan = make_plan(experiment, located)
    where = str(store if store is not None else out.parent / "store")
    shelf = open_store(where)
    steps, lacking = _only(plan, only, shelf) if only else (plan.steps, [])
    for step, error in lacking:
        events.failure(step, error)
    if not only:
        _check_results(plan, shelf, events)
    todo = [step for step in steps if not shelf.has(step.kind, step.key)]
    session = Session(experiment, located, shelf)

    def workers() -> Workers:
        if on == "local":
            return Local(session, told.progress)
        from lingraft.workers.cluster import Cluster

        return Cluster(session, where, address, todo, told.progress, told.notice)

    kept = len(plan.steps) - len(todo) if not only else sum(shelf.has(s.kind, s.key) for s in plan.steps)
    about = State(name=experiment.name, processes=processes.world(), only=bool(only), plan=len(plan.steps), kept=kept)
    with _recording(out, about, events) as told:

        def begun() -> None:
            told.begin(Counter(step.sort for step in todo), _measured(plan, shelf))

        made = (_make_launched if processes.world() > 1 else _make)(todo, session, workers, told, begun)
        if lacking:
            raise RunFailed(
                f"{len(lacking)} of the steps were not made: what they need is not finished",
                remedy="make that first: see why it failed",
            )
        if not only and processes.is_main():
            write_manifest(plan, located, shelf, out)
    # Of a few steps' inputs some may have been made anew as well.
    return Outcome(plan, made, max(0, len(steps) - made), out / MANIFEST)


@contextmanager
def _recording(out: Path, about: State, events: Events) -> Iterator[Events]:
    """Has what a run tells written for other processes as well, from when its first steps begin."""
    if not processes.is_main():
        yield events
        return
    recorder = Recorder(out, about, lambda text: events.notice(text))
    try:
        yield _told(events, recorder)
    except BaseException as error:
        recorder.end("interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed", _why(error))
        raise
    recorder.end("done")


def _why(error: BaseException) -> str:
    return error.what if isinstance(error, LingraftError) else f"unexpected {type(error).__name__}: {error}"


def _told(events: Events, recorder: Recorder) -> Events:
    """What a run tells, told to both."""

    def step(step: Step, number: int, total: int) -> None:
        recorder.tell(
            lambda board, now: board.begin(step.key, step.label, now, kind=step.kind, sort=step.sort, total=total)
        )
        events.step(step, number, total)

    def progress(step: Step, done: int, total: int, note: str, loss: float | None) -> None:
        recorder.tell(lambda board, now: board.progress(step.key, done, total, note, loss, now))
        events.progress(step, done, total, note, loss)

    def ended(step: Step) -> None:
        recorder.tell(lambda board, now: board.ended(step.key, now))
        events.ended(step)

    def failure(step: Step, error: LingraftError) -> None:
        recorder.tell(lambda board, now: board.failure(step.label, error.what))
        events.failure(step, error)

    def notice(text: str) -> None:
        recorder.tell(lambda board, now: board.notice(text))
        events.notice(text)

    def begin(todo: Mapping[str, int], known: Mapping[str, float]) -> None:
        recorder.start(todo, known)
        events.begin(todo, known)

    return Events(step, progress, ended, failure, notice, begin)


def _measured(plan: Plan, store: Store) -> dict[str, float]:
    """Mean seconds of a step of each sort, from a few that are finished; of a store behind a URL nothing is asked."""
    found: dict[str, list[float]] = {}
    for step in plan.steps if store.url is None else ():
        times = found.setdefault(step.sort, [])
        if step.kind not in LIGHT and len(times) < _SAMPLES and store.has(step.kind, step.key):
            with suppress(StoreError):
                times.append(float(store.record(step.kind, step.key).get("wall_seconds") or 0))
    return {sort: sum(times) / len(times) for sort, times in found.items() if times}


def tune(experiment: Experiment, store: str | Path, *, events: Events | None = None) -> tuple[Plan, Store]:
    """Does what the choice of λ on the development languages needs, and nothing else: no target's item is read.

    Args:
        experiment: Its methods with a weight are tuned.
        store: The folder of finished steps, or an fsspec URL.
        events: Whom to tell.

    Returns:
        The plan, whose selections are now finished, and the store.

    Raises:
        RunFailed: Some steps failed.
        Interrupted: Ctrl-C.
        UserError: The experiment cannot be planned, or has nothing to choose.
    """
    if processes.world() > 1:
        raise UserError("weights are chosen by one process", remedy="leave the launcher out")
    events, located = events or Events(), locate(experiment.backbone)
    plan = make_plan(experiment, located)
    wanted = [s for (_, language), s in plan.selections.items() if language is None and "weights" in s.config]
    if not wanted:
        raise UserError(
            "there is no weight to choose on development languages",
            remedy="give methods such as adamergex-product, and leave selection.weight out",
        )
    shelf = open_store(store)
    todo = [step for step in ordered(wanted) if not shelf.has(step.kind, step.key)]
    session = Session(experiment, located, shelf)
    _make(todo, session, lambda: Local(session, events.progress), events)
    return plan, shelf


def _only(plan: Plan, keys: Collection[str], store: Store) -> tuple[list[Step], list[tuple[Step, LingraftError]]]:
    """Some of a plan's steps; apart those that cannot be made, because something they need is neither finished nor among them.

    Raises:
        UserError: The plan has no such steps.
    """
    known = {step.key: step for step in plan.steps}
    if unknown := sorted(set(keys) - known.keys()):
        raise UserError(
            f"the plan has no step {', '.join(unknown[:3])}{' …' if len(unknown) > 3 else ''}",
            remedy="the experiment, its data or lingraft have changed since the keys were written: write them again",
        )
    wanted = [step for step in plan.steps if step.key in set(keys)]
    there = {step.key for step in wanted if store.has(step.kind, step.key)}
    steps: list[Step] = []
    lacking: dict[str, tuple[Step, LingraftError]] = {}
    for step in wanted:
        outside = (n for n in step.inputs.values() if n.key in lacking or n.key not in keys)
        needed = next((n for n in outside if not store.has(n.kind, n.key)), None)
        if needed is None or step.key in there:
            steps.append(step)
        else:
            lacking[step.key] = (
                step,
                LingraftError(
                    f"'{step.label}' needs '{needed.label}', which is not finished",
                    where=store.path(needed.kind, needed.key),
                    remedy="make that first: run it with --only, or the experiment without --only",
                ),
            )
    return steps, list(lacking.values())


def _check_results(plan: Plan, store: Store, events: Events) -> None:
    """Reads what the report will read: what is damaged of it is set aside, and made anew with the rest."""
    steps = [s for cell in plan.cells for s in (cell.predict, cell.score, cell.adapter) if s is not None]
    for step in {s.key: s for s in [*steps, *plan.selections.values(), *plan.comparisons.values()]}.values():
        while store.has(step.kind, step.key):
            try:
                store.folder(step.kind, step.key)
            except Damaged as damage:
                with suppress(Busy):
                    _set_aside(damage, store, events)
                    break
                time.sleep(_PAUSE)  # Another run has found it as well: it is made anew, not left out.
            except StoreError:
                if store.has(step.kind, step.key):
                    raise
            else:
                break


def _set_aside(damage: Damaged, store: Store, events: Events) -> None:
    """Sets a damaged step aside.

    Raises:
        Busy: Another run does, or is making it anew.
    """
    if store.set_aside(damage.kind, damage.key) is not None:
        events.notice(f"{damage.kind} {damage.key} is damaged ({damage.what}): it is set aside and made anew")


def _make(
    todo: Sequence[Step],
    session: Session,
    workers: Callable[[], Workers],
    events: Events,
    begun: Callable[[], None] = lambda: None,
) -> int:
    """Makes steps, once their data have been looked at, and says how many were made here."""
    if not todo:
        return 0
    check_data(todo, session)
    begun()
    # A tracker is of one training.
    most = 1 if session.experiment.trackers else session.experiment.speed.together
    return carry_out(todo, session.store, workers(), events, most)


def _make_launched(
    todo: Sequence[Step],
    session: Session,
    workers: Callable[[], Workers],
    events: Events,
    begun: Callable[[], None] = lambda: None,
) -> int:
    """Makes steps with all processes of a launcher; the first one decides which."""
    from lingraft.workers.launched import Launched, dismiss, follow, meet

    meet(session.located.config.device)
    if not processes.shared(lambda: bool(todo)):
        return 0
    if not processes.is_main():
        follow(session)
        return 0
    made = _make(todo, session, lambda: Launched(session, events.progress), events, begun)
    dismiss()
    return made


def carry_out(todo: Sequence[Step], store: Store, workers: Workers, events: Events, most: int = 1) -> int:
    """Has steps made by workers.

    Args:
        todo: The steps, inputs first.
        store: Where they appear.
        workers: Who makes them; they are stopped at the end.
        events: Whom to tell.
        most: How many trainings of one shape may go on together.

    Returns:
        How many were made here.

    Raises:
        RunFailed: Some steps failed.
        Interrupted: Ctrl-C.
        UserError: The very first step found the request wrong.
    """
    carrier = _Carrier(Schedule(todo, workers.sort), store, workers, events, most)
    try:
        carrier.go()
    except KeyboardInterrupt:
        running = carrier.schedule.running.values()
        raise Interrupted(
            f"interrupted during {', '.join(repr(step.label) for step in running) or 'a pause'} "
            f"({len(carrier.schedule.finished)} of {carrier.schedule.total} steps done)",
            remedy="run the same command again: finished steps are kept, a training goes on from its last checkpoint, and an "
            "evaluation from its last batch",
        ) from None
    finally:
        workers.stop()
    if carrier.errors:
        failed, stopped = len(carrier.schedule.failed), len(carrier.schedule.stopped)
        outcome = RunFailed(
            f"{failed} step{'s' if failed > 1 else ''} failed and {stopped} that depend on them did not run; the rest is finished",
            remedy="mend the cause and run the same command again",
        )
        outcome.exit_code = max(1, min(error.exit_code for error in carrier.errors))
        raise outcome
    return len(carrier.made)


class _Carrier:
    """A schedule on its way: what is begun, and what becomes of it."""

    def __init__(self, schedule: Schedule, store: Store, workers: Workers, events: Events, most: int) -> None:
        self.schedule, self.store, self.workers, self.events, self._most = schedule, store, workers, events, most
        self.made: set[str] = set()
        self.errors: list[LingraftError] = []
        self._begun: dict[str, int] = {}
        self._tries: Counter[tuple[str, str]] = Counter()
        self._paused: dict[str, tuple[Step, float]] = {}
        self._said: set[str] = set()
        self._shapes: dict[str, str | None] = {}

    def go(self) -> None:
        """Until nothing is left to do."""
        while not self.schedule.over:
            self._wake()
            self._begin()
            for step, error in self.workers.ended(self._patience()):
                self._settle(step, error)

    def _begin(self) -> None:
        """Begins what can begin: of every sort, for as long as there is room for it."""
        for sort in self.schedule.sorts:
            while (step := self.schedule.take(sort)) is not None:
                if not self.workers.room(step):
                    self.schedule.put_back(step)
                    break
                group = [step]
                if self._most > 1 and self._shape(step) is not None:
                    group += self.schedule.take_like(step, self._shape, self._most - 1)
                for one in group:
                    if one.key not in self._begun:
                        self._begun[one.key] = len(self._begun) + 1
                        self.events.step(one, self._begun[one.key], self.schedule.total)
                self.workers.start(group)

    def _shape(self, step: Step) -> str | None:
        if step.key not in self._shapes:
            self._shapes[step.key] = shape_of(step)
        return self._shapes[step.key]

    def _patience(self) -> float:
        """Seconds to wait for a step that ends."""
        if not self._paused:
            return 1.0
        if len(self._paused) == len(self.schedule.running) and not self.schedule.sorts:
            time.sleep(max(0.0, min(at for _, at in self._paused.values()) - time.monotonic()))
        return 0.0

    def _wake(self) -> None:
        """Steps whose pause is over are open again; they may be finished by now."""
        now = time.monotonic()
        for key in [key for key, (_, at) in self._paused.items() if at <= now]:
            step, _ = self._paused.pop(key)
            self.schedule.put_back(step)

    def _settle(self, step: Step, error: LingraftError | None) -> None:
        """What becomes of a step that has ended."""
        if error is None or isinstance(error, AlreadyMade):
            if error is None:
                self.made.add(step.key)
            self.schedule.finish(step)
            self.events.ended(step)
        elif isinstance(error, Busy):
            if step.key not in self._said:
                self._said.add(step.key)
                self.events.notice(f"waiting for '{step.label}': {error.what}")
            self._pause(step)
        elif not self._is_again(step, error):
            self._fail(step, error)

    def _pause(self, step: Step) -> None:
        self._paused[step.key] = (step, time.monotonic() + _PAUSE)

    def _is_again(self, step: Step, error: LingraftError) -> bool:
        """Whether a step that failed is to be begun again: when its inputs are whole, or after a pause."""
        # Of several inputs that are damaged one is found at a time.
        cause = (step.key, error.key if isinstance(error, Damaged) else "")
        if self._tries[cause] == TRIES - 1:
            return False
        missing: list[Step] = []
        try:
            if isinstance(error, Damaged):
                _set_aside(error, self.store, self.events)
            missing = _absent(step.inputs.values(), self.store)
        except Busy:  # Another run has found it as well, or is making it anew.
            self._pause(step)
            return True
        except TransientError as broken:
            error = broken
        if missing or isinstance(error, (Damaged, TransientError)):
            self._tries[cause] += 1
        if missing or isinstance(error, Damaged):
            self.schedule.add(missing)
            self.schedule.put_back(step)
            return True
        if isinstance(error, TransientError):
            self.events.notice(f"trying '{step.label}' again: {error.what}")
            self._pause(step)
            return True
        return False

    def _fail(self, step: Step, error: LingraftError) -> None:
        first = not self.schedule.finished and not self.errors and len(self.schedule.running) == 1
        self.schedule.fail(step)
        self.errors.append(error)
        self.events.ended(step)
        self.events.failure(step, error)
        if isinstance(error, UserError) and first:
            raise error


def _absent(steps: Iterable[Step], store: Store) -> list[Step]:
    """Those of the steps that are not in the store, and of what these need, inputs first."""
    found: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.key not in found and not store.has(step.kind, step.key, fresh=True):
            for needed in step.inputs.values():
                visit(needed)
            found[step.key] = step

    for step in steps:
        visit(step)
    return list(found.values())
