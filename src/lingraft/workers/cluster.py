"""Steps made by actors on a Ray cluster, which keep the loaded base model from one step to the next.

Ray carries what it is given between its own processes with pickle: a cluster is trusted like the machine itself.
"""

import logging
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Hashable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingraft import __version__
from lingraft.config import Experiment
from lingraft.costs import Needs, needs_of, shape_for
from lingraft.costs.needs import LOADING
from lingraft.errors import LingraftError, MissingExtra, TransientError, UserError
from lingraft.locating import locate
from lingraft.plan import Step, ordered
from lingraft.session import Session
from lingraft.store import open_store
from lingraft.workers import Ended, Notice, Progress
from lingraft.workers.local import make

STALLED = "LINGRAFT_STALLED"
"""The environment's name for the seconds without a sign of life after which an actor is taken for stuck, and ended."""
_STALLED = 300.0
_HEADLESS = 10.0
"""Seconds without an answer of the cluster's head after which it is taken for gone; Ray itself waits a minute, and exits."""
_LOOK = 2.0
"""Seconds between looks at the actors and at the cluster."""
_STARTING = 60.0
"""Seconds after which it is said that an actor waits for the cluster."""


class Maker:
    """An actor: makes steps on some machine of the cluster.

    Args:
        experiment: What the steps are of.
        digest: The base model's, as the runner knows it.
        store: The store's folder or URL.
        folder: The runner's working folder, which relative paths begin at.
        probe: The name of a file that the runner has put into a store that is a folder; empty: none.
        version: The runner's lingraft.
    """

    def __init__(self, experiment: Experiment, digest: str, store: str, folder: str, probe: str, version: str) -> None:
        self._experiment, self._digest, self._store = experiment, digest, store
        self._folder, self._probe, self._version = folder, probe, version
        self._session: Session | None = None
        self._progress: tuple[int, int, str, float | None] = (0, 0, "", None)

    def pulse(self) -> tuple[int, int, str, float | None]:
        """A sign of life: how far the step is, and of a training the loss."""
        return self._progress

    def make(self, group: Sequence[Step]) -> tuple[list[Ended] | LingraftError, list[str]]:
        """Makes steps, and gives what became of each, or why none can be made on this machine, and what was said meanwhile."""
        self._progress = (0, 0, "", None)
        said: list[str] = []
        with _hearing(said):
            try:
                if self._session is None:
                    self._session = self._opened()
            except TransientError as error:
                return [(step, error) for step in group], said
            except LingraftError as error:
                return error, said
            return make(group, self._session), said

    def _opened(self) -> Session:
        """What the steps share.

        Raises:
            UserError: This machine has another lingraft, another base model, or does not see the store.
        """
        host = socket.gethostname()
        if self._version != __version__:
            raise UserError(
                f"lingraft is {__version__} on {host} and {self._version} here", remedy="install one version everywhere"
            )
        with suppress(OSError):
            os.chdir(self._folder)
        store = open_store(self._store)
        if self._probe and not (store.root / self._probe).is_file():
            raise UserError(
                f"{host} does not see the store",
                where=store.root,
                remedy="put --store into a folder that all machines share, or give a URL such as s3://bucket/folder",
            )
        located = locate(self._experiment.backbone)
        if located.digest != self._digest:
            raise UserError(
                f"the base model on {host} is another one than here ({located.digest}, not {self._digest})",
                remedy="give all machines the same model",
            )
        return Session(self._experiment, located, store, self._told)

    def _told(self, done: int, total: int, note: str, loss: float | None = None, /) -> None:
        self._progress = (done, total, note, loss)


@contextmanager
def _hearing(said: list[str]) -> Any:
    """Collects what lingraft says meanwhile: nobody looks at an actor's own output."""

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, handler = logging.getLogger("lingraft"), Kept(logging.INFO)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category.__module__.startswith("lingraft"):
            said.append(f"warning: {message}")

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown
        log.removeHandler(handler)


@dataclass
class _Actor:
    """An actor, what it holds of the cluster, and what it is at."""

    handle: Any
    node: str
    needs: Needs
    began: float
    group: tuple[Step, ...] = ()
    answer: Any = None
    pulse: Any = None
    asked: float = 0.0
    alive: bool = False
    said: bool = False


@dataclass
class _Room:
    """What a machine of the cluster has left."""

    cpus: float
    gpus: float
    memory: float

    def holds(self, needs: Needs) -> bool:
        """Whether a step fits."""
        return self.cpus >= needs.cpus and self.gpus >= needs.gpus and self.memory >= (needs.memory or 0)

    def less(self, needs: Needs) -> "_Room":
        """What is left beside it."""
        return _Room(self.cpus - needs.cpus, self.gpus - needs.gpus, self.memory - (needs.memory or 0))


@dataclass
class Cluster:
    """Actors on a Ray cluster.

    Those that load the base model hold as much as the most demanding step of the run; what needs no model is made by small ones, or
    by whichever is idle.

    Args:
        session: The experiment, the base model and the store; the model is not loaded here.
        where: The store's folder or URL, by which actors open it.
        address: Of a running cluster; None: one is started on this machine, and ended at the end.
        steps: The steps to come.
        progress: Told how far a step is.
        notice: Told what whoever watches should know.

    Raises:
        MissingExtra: Ray is not installed.
        UserError: The cluster cannot be reached, or no machine of it is large enough.
    """

    session: Session
    where: str
    address: str | None
    steps: Sequence[Step]
    progress: Progress
    notice: Notice
    _actors: list[_Actor] = field(default_factory=list)
    _rooms: dict[str, _Room] = field(default_factory=dict)
    _left_out: set[str] = field(default_factory=set)
    _looked: float = 0.0
    _headless: float | None = None
    _crowded: float | None = None
    _probe: str = ""

    def __post_init__(self) -> None:
        self._stalled = _seconds(STALLED, _STALLED)
        self._ray = _ray()
        _connect(self._ray, self.address)
        self._head = _head(self._ray)
        self._rooms = nodes = self._nodes()
        shape, cpus = shape_for(self.session.located), _threads(nodes)
        accelerator = any(room.gpus for room in nodes.values())
        # What they need, too: it may be found damaged, and be made anew.
        asked = [
            (step, needs_of(step, self.session.experiment, shape, accelerator=accelerator, cpus=cpus))
            for step in ordered(self.steps)
        ]
        self._light = _most([needs for step, needs in asked if step.kind not in LOADING])
        # Large enough for what needs no model, too: an idle one makes it.
        self._heavy = _most([self._light, *(needs for step, needs in asked if step.kind in LOADING)])
        for needs in (self._heavy, self._light):
            self._check(needs, nodes)
        if self.session.store.url is None:
            self.session.store.root.mkdir(parents=True, exist_ok=True)
            self._probe = f".seen-{uuid.uuid4().hex}"
            (self.session.store.root / self._probe).touch()

    def sort(self, step: Step) -> Hashable:
        """What a step asks for: as much as any that loads the base model, or as any other."""
        return self._heavy if step.kind in LOADING else self._light

    def room(self, step: Step) -> bool:
        """Whether an actor is idle, or there is room for another one.

        Raises:
            LingraftError: The machines that had room for it are gone.
        """
        if self._idle(step) is not None or self._place(step) is not None:
            self._crowded = None
            return True
        now = time.monotonic()
        self._crowded = None if any(actor.group for actor in self._actors) else self._crowded or now
        if self._crowded is not None and now - self._crowded > _STARTING:
            raise LingraftError(
                f"no machine of the cluster is left that is large enough for '{step.label}'",
                remedy="run the same command again when there is one: finished steps are kept",
            )
        return False

    def start(self, group: Sequence[Step]) -> None:
        """Gives steps to an actor."""
        actor = self._idle(group[0]) or self._new(group[0])
        actor.group = tuple(group)
        actor.answer = actor.handle.make.remote(list(group))

    def ended(self, seconds: float) -> list[Ended]:
        """What the actors have made, and what was lost with one that died.

        Raises:
            LingraftError: No machine is left, or none on which a step can be made.
        """
        self._look()
        working = {actor.answer: actor for actor in self._actors if actor.group}
        if not working:
            time.sleep(min(seconds, 0.5))
            return []
        ready, _ = self._ray.wait(list(working), num_returns=1, timeout=seconds or 0.05)
        # All that are ready, not the first alone.
        ready, _ = self._ray.wait(list(working), num_returns=len(working), timeout=0) if ready else ([], [])
        return [ended for answer in ready for ended in self._ended(working[answer])]

    def stop(self) -> None:
        """Ends the actors, and the cluster if it was started here."""
        if self._probe:
            with suppress(OSError):
                (self.session.store.root / self._probe).unlink()
        actors, self._actors = self._actors, []

        def end() -> None:
            with suppress(Exception):  # The cluster may be gone.
                if self._headless is None:
                    for actor in actors:
                        self._ray.kill(actor.handle)
                self._ray.shutdown()

        # Without its head Ray may never come back from this.
        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        ending.join(_HEADLESS)

    def _ended(self, actor: _Actor) -> list[Ended]:
        group, actor.group = actor.group, ()
        try:
            ended, said = self._ray.get(actor.answer)
        except self._ray.exceptions.RayTaskError as error:  # A bug, as it would be here.
            raise error.as_instanceof_cause() from None
        except self._ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            if "creation task" in lines[0]:
                return self._refused(
                    actor,
                    group,
                    UserError(
                        f"a worker cannot start on a machine of the cluster: {lines[-1]}",
                        remedy="install the same lingraft, with what it needs, on all machines",
                    ),
                )
            self._drop(actor)
            return [(step, TransientError(f"its worker died: {lines[0]}", remedy=_REMEDY)) for step in group]
        for text in said:
            self.notice(text)
        return self._refused(actor, group, ended) if isinstance(ended, LingraftError) else ended

    def _refused(self, actor: _Actor, group: Sequence[Step], error: LingraftError) -> list[Ended]:
        """A machine on which nothing can be made is given nothing any more: it would fail one step after the other.

        Raises:
            LingraftError: There is no other that is large enough.
        """
        needs: Needs = self.sort(group[0])  # pyright: ignore[reportAssignmentType]
        self._left_out.add(actor.node)
        for other in [other for other in self._actors if other.node == actor.node and not other.group]:
            self._drop(other)
        self._rooms = self._nodes()
        if not any(room.holds(needs) for room in self._rooms.values()):
            raise error
        self.notice(f"a machine of the cluster is left out: {error.what}")
        return [(step, TransientError(error.what, where=error.where, remedy=error.remedy)) for step in group]

    def _drop(self, actor: _Actor) -> None:
        self._actors.remove(actor)
        with suppress(Exception):
            self._ray.kill(actor.handle)

    def _idle(self, step: Step) -> _Actor | None:
        """An actor that is free and large enough, the smallest of them."""
        needs = self.sort(step)
        free = [actor for actor in self._actors if not actor.group and _covers(actor.needs, needs)]
        return min(free, key=lambda actor: (actor.needs.gpus, actor.needs.memory or 0, actor.needs.cpus), default=None)

    def _new(self, step: Step) -> _Actor:
        """A further actor, on a machine that has room for it; idle ones make room."""
        node, displaced = self._place(step) or ("", [])
        for actor in displaced:
            self._drop(actor)
        needs: Needs = self.sort(step)  # pyright: ignore[reportAssignmentType]
        strategies = self._ray.util.scheduling_strategies
        options: dict[str, Any] = {
            "num_cpus": needs.cpus,
            "num_gpus": needs.gpus,
            "scheduling_strategy": strategies.NodeAffinitySchedulingStrategy(node, soft=True),
            "max_restarts": 0,
            # The threads decide how sums are rounded: as many as are asked for.
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(needs.cpus)}},
        }
        if needs.memory is not None:
            options["memory"] = needs.memory
        maker = self._ray.remote(concurrency_groups={"control": 1})(Maker)
        handle = maker.options(**options).remote(
            self.session.experiment, self.session.located.digest, self.where, str(Path.cwd()), self._probe, __version__
        )
        actor = _Actor(handle, node, needs, time.monotonic())
        self._actors.append(actor)
        return actor

    def _place(self, step: Step) -> tuple[str, list[_Actor]] | None:
        """A machine with room for a further actor, and the idle ones that have to go first."""
        needs: Needs = self.sort(step)  # pyright: ignore[reportAssignmentType]
        nodes = dict(self._rooms)
        for actor in self._actors:
            if actor.node in nodes:
                nodes[actor.node] = nodes[actor.node].less(actor.needs)
        for node, room in nodes.items():
            if room.holds(needs):
                return node, []
        for node, room in nodes.items():
            displaced: list[_Actor] = []
            for actor in self._actors:
                if actor.node == node and not actor.group:
                    displaced.append(actor)
                    room = _Room(
                        room.cpus + actor.needs.cpus,
                        room.gpus + actor.needs.gpus,
                        room.memory + (actor.needs.memory or 0),
                    )
                    if room.holds(needs):
                        return node, displaced
        return None

    def _nodes(self) -> dict[str, _Room]:
        """What every machine of the cluster has."""
        found: dict[str, _Room] = {}
        for node in self._ray.nodes():
            if node["Alive"] and node["NodeID"] not in self._left_out:
                has: Mapping[str, float] = node["Resources"]
                found[node["NodeID"]] = _Room(has.get("CPU", 0), has.get("GPU", 0), has.get("memory", 0))
        return found

    def _check(self, needs: Needs, nodes: Mapping[str, _Room]) -> None:
        if not any(room.holds(needs) for room in nodes.values()):
            has = "; ".join(f"{r.cpus:g} CPUs, {r.gpus:g} GPUs, {r.memory / 1e9:.1f} GB" for r in nodes.values())
            wanted = f"{needs.cpus} CPUs, {needs.gpus} GPUs, {(needs.memory or 0) / 1e9:.1f} GB"
            self._ray.shutdown()
            raise UserError(
                f"no machine of the cluster is large enough: a step needs {wanted}, they have {has or 'nothing'}",
                remedy="set resources.cpus, resources.gpus or resources.memory, or add a machine",
            )

    def _check_head(self, now: float) -> None:
        """Makes sure that the cluster's head is there, before anything is asked of it that would wait.

        Raises:
            LingraftError: It is gone.
        """
        while self._head is not None:
            try:
                socket.create_connection(self._head, timeout=_LOOK).close()
            except OSError:
                self._headless = self._headless or now
                if time.monotonic() - self._headless > _HEADLESS:
                    raise LingraftError(
                        f"the Ray cluster's head at {self._head[0]}:{self._head[1]} is gone",
                        remedy="run the same command again, on a cluster that runs: finished steps are kept",
                    ) from None
                time.sleep(_LOOK / 2)
            else:
                self._headless = None
                return

    def _look(self) -> None:
        """Asks the actors for a sign of life, passes on how far they are, and lets go of those that have none."""
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return
        self._looked = now
        self._check_head(now)
        self._rooms = self._nodes()
        for actor in list(self._actors):
            if actor.pulse is None:
                actor.pulse = actor.handle.pulse.options(concurrency_group="control").remote()
                actor.asked = now
            answered, _ = self._ray.wait([actor.pulse], timeout=0)
            if answered:
                self._answered(actor)
            elif not actor.alive:
                if actor.group and now - actor.began > _STARTING and not actor.said:
                    actor.said = True
                    self.notice(f"'{actor.group[0].label}' waits for the cluster to start its worker")
            elif now - actor.asked > self._stalled:
                if actor.group:
                    self.notice(f"the worker of '{actor.group[0].label}' gives no sign of life and is ended")
                self._ray.kill(actor.handle)  # Its answer is an error now.
                actor.asked = now

    def _answered(self, actor: _Actor) -> None:
        """What an actor says of itself."""
        pulse, actor.pulse = actor.pulse, None
        try:
            done, total, note, loss = self._ray.get(pulse)
        except self._ray.exceptions.RayError:
            if not actor.group:  # Else its answer says so.
                self._drop(actor)
            return
        actor.alive = True
        if actor.group:
            self.progress(actor.group[0], done, total, note, loss)


_REMEDY = "see Ray's logs; if it was killed for its memory, raise resources.memory or lower speed.part_tokens"


def _ray() -> Any:
    """Ray, which says nothing to anybody.

    Raises:
        MissingExtra: It is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise MissingExtra("ray", "ray") from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    """Joins a cluster, or starts one on this machine.

    Raises:
        UserError: There is none at the address.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address is None:
        own = {"num_cpus": _cores(), "include_dashboard": False, "object_store_memory": 100 << 20}
        ray.init(address="local", **own, **options)
        return
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at '{address}': {str(error).splitlines()[0]}",
            remedy="start one (ray start --head), or leave --ray-address out: one is started on this machine",
        ) from error


def _head(ray: Any) -> tuple[str, int] | None:
    """Where the cluster's head listens; None: it is reached through a proxy."""
    with suppress(Exception):
        host, _, port = str(ray.get_runtime_context().gcs_address).rpartition(":")
        return host.strip("[]"), int(port)
    return None


def _seconds(name: str, usual: float) -> float:
    """A time that the environment may set.

    Raises:
        UserError: It is no number above 0.
    """
    text = os.environ.get(name, "")
    try:
        found = float(text or usual)
    except ValueError:
        found = 0.0
    if not found > 0:
        raise UserError(f"{name} is '{text}', and no number of seconds", remedy=f"set {name}={usual:g}, or unset it")
    return found


def _cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads(nodes: Mapping[str, _Room]) -> int:
    """Threads of a step, unless the experiment says how many: as here, so that results are as here."""
    here = os.environ.get("OMP_NUM_THREADS", "")
    wanted = int(here) if here.isdigit() and int(here) else _cores()
    return max(1, min([wanted, *(int(room.cpus) for room in nodes.values() if room.cpus >= 1)]))


def _most(needs: Sequence[Needs]) -> Needs:
    """As much as the most demanding."""
    known = [n.memory for n in needs if n.memory is not None]
    on_gpu = [n.gpu_memory for n in needs if n.gpu_memory is not None]
    return Needs(
        max((n.cpus for n in needs), default=1),
        max((n.gpus for n in needs), default=0),
        max(known) if known else None,
        max(on_gpu) if on_gpu else None,
    )


def _covers(has: Needs, needs: Any) -> bool:
    """Whether an actor is large enough for a step."""
    return has.cpus >= needs.cpus and has.gpus >= needs.gpus and (has.memory or 0) >= (needs.memory or 0)
