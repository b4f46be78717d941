"""The experiment that is disturbed, processes that carry it out, and what has to hold of a store at any moment and in the end."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.conftest import save_tiny_model
from tests.faults.children import MARK, PRELOADED, Spec, main

CHANGES = (
    "methods=[eng-ft, tgt-ft, adamergex, control-add]",
    "seeds=[0]",
    "training.epochs=3",
    "reference_training.epochs=2",
    "reference_training.learning_rate=0.01",
    "reference_training.batch_size=4",
)
"""Of the experiment of tests/integration: four languages, nine trainings, 44 steps, some three seconds."""
PATIENCE = 120.0
"""Seconds after which whatever is waited for counts as hanging."""
LEASE = 4.0
"""Seconds without a sign of life after which a holder on another host is given up."""
VOLATILE = ("wall_seconds", "seconds", "environment", "files", "seal")
"""Fields of a record that say how it went and not what was made; the hashes of the files are compared one by one."""


def tail(log: Path, count: int = 15) -> str:
    """The last lines of a log."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else "(no log)"
    return "\n".join(text.splitlines()[-count:])


class Child:
    """A `lingraft` command at work, the leader of a session of its own."""

    def __init__(self, spec: Spec, process: Any) -> None:
        self.spec, self.process = spec, process
        self.began = time.monotonic()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code, negative for a signal; one that takes too long is killed and fails with its log."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.signal(signal.SIGABRT)
            self.kill()
            raise AssertionError(f"still at work after {seconds:.0f} s:\n{tail(self.spec.log)}")
        return self.process.exitcode

    def signal(self, number: int) -> None:
        """To it and all that it has started in its session."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            if number == signal.SIGKILL:
                self.process.kill()  # It has not become a leader yet.
        except PermissionError:
            pass

    def family(self) -> list[int]:
        """What it has started, and what that has."""
        parents: dict[int, list[int]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
        found = list(parents.get(self.pid, []))
        for pid in found:  # It grows meanwhile.
            found += parents.get(pid, [])
        return found

    def kill(self) -> None:
        family = self.family()
        self.signal(signal.SIGKILL)
        for pid in family:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.join(10)

    def said(self) -> str:
        log = self.spec.log
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


@dataclass
class Found:
    """What has been looked at: folders, files and their bytes."""

    folders: int = 0
    files: int = 0
    bytes: int = 0


@dataclass
class Laboratory:
    """A place with a tiny model, its experiment and the results of a run that nothing disturbed.

    Attributes:
        folder: The place, readable by everybody.
        seconds: How long the undisturbed run took.
        baseline: The record of every step of it, by "kind/key".
        found: What has been looked at so far.
    """

    folder: Path
    seconds: float = 0.0
    baseline: dict[str, dict[str, Any]] = field(default_factory=dict)
    found: Found = field(default_factory=Found)
    _number: int = 0

    @cached_property
    def _context(self) -> Any:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        return context

    @cached_property
    def experiment(self) -> Path:
        from tests.integration.test_pipeline import make_experiment

        return make_experiment(self.folder, save_tiny_model(self.folder / "model"))

    def path(self, name: str) -> Path:
        """A path that is not in use."""
        self._number += 1
        return self.folder / f"{name}-{self._number}"

    def run(self, store: Path, *more: str) -> tuple[str, ...]:
        """The command under test."""
        out = store.parent / f"out-{store.name}"
        return ("run", str(self.experiment), *CHANGES, "--store", str(store), "--out", str(out), *more)

    def start(self, store: Path, *more: str, arguments: Sequence[str] | None = None, **befalls: Any) -> Child:
        """Starts the experiment on a store, or another command; the other arguments are those of `Spec`."""
        environment = {
            MARK: str(self.folder),
            "LINGRAFT_CACHE": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "LINGRAFT_LEASE_SECONDS": str(LEASE),
        }
        environment |= befalls.pop("environment", {})
        spec = Spec(
            tuple(arguments) if arguments is not None else self.run(store, *more),
            self.folder,
            befalls.pop("log", None) or self.path("log"),
            environment=environment,
            **befalls,
        )
        process = self._context.Process(target=main, args=(spec,))
        process.start()
        return Child(spec, process)

    def finish(self, store: Path, *more: str, seconds: float = PATIENCE, **befalls: Any) -> Child:
        """Carries the experiment out, undisturbed."""
        child = self.start(store, *more, **befalls)
        code = child.wait(seconds)
        assert code == 0, f"exit code {code}:\n{tail(child.spec.log)}"
        return child

    def prepare(self) -> None:
        """Carries the experiment out, undisturbed."""
        assert self.experiment.exists()
        self.finish(self.path("warm"), "--dry-run")  # The fork server imports, which is not to count.
        store = self.folder / "baseline"
        began = time.monotonic()
        self.finish(store)
        self.seconds = time.monotonic() - began
        self.baseline = {name: json.loads((store / name / "step.json").read_text()) for name in finished(store)}
        assert len(self.baseline) > 40
        self.check(store)

    def copy(self, name: str = "store", *, without: Sequence[str] = ()) -> Path:
        """The finished store again, less some steps."""
        store = self.path(name)
        shutil.copytree(self.folder / "baseline", store)
        for step in without:
            shutil.rmtree(store / step)
        return store

    def steps(self, kind: str, label: str = "") -> list[str]:
        """The steps of a kind whose label has something in it, as "kind/key"."""
        return sorted(n for n, r in self.baseline.items() if r["kind"] == kind and label in r["label"])

    def readers(self, *steps: str) -> list[str]:
        """The steps that read one of these."""
        keys = {step.rpartition("/")[2] for step in steps}
        return sorted(name for name, record in self.baseline.items() if keys & set(record["inputs"].values()))

    def dependants(self, *steps: str) -> list[str]:
        """The steps that read one of these, or one of those, and so on."""
        all_: set[str] = set()
        new = set(self.readers(*steps))
        while new:
            all_ |= new
            new = set(self.readers(*new)) - all_
        return sorted(all_)

    def failing(self, store: Path, said: str, *more: str, **befalls: Any) -> Child:
        """Starts the experiment and sees it end with exit code 1 and one clear message."""
        child = self.start(store, *more, **befalls)
        self.failed(child, said)
        return child

    def failed(self, child: Child, said: str) -> None:
        """A run has failed with exit code 1, said why in these words, and did not fall over."""
        code = child.wait()
        log = child.said()
        assert code == 1, f"exit code {code}:\n{tail(child.spec.log)}"
        assert said in log, f"not said: {said}\n{tail(child.spec.log)}"
        for never in ("Traceback", "unexpected"):
            assert never not in log, tail(child.spec.log)

    # What has to hold

    def check_folder(self, store: Path, name: str) -> None:
        """A folder that can be seen has the content of the undisturbed run."""
        folder = store / name
        record = json.loads((folder / "step.json").read_text(encoding="utf-8"))
        hashes = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != "step.json":
                content = path.read_bytes()
                hashes[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
                self.found.files += 1
                self.found.bytes += len(content)
        self.found.folders += 1
        assert record["files"] == hashes, f"{name}: the files are not those of its record"
        if not self.baseline:
            return
        expected = self.baseline.get(name)
        assert expected is not None, f"{name} is no step of the plan"
        other = sorted(n for n in {*hashes, *expected["files"]} if hashes.get(n) != expected["files"].get(n))
        assert not other, f"{name} ({record['label']}): {', '.join(other)}: not as in the undisturbed run"
        same = [{k: v for k, v in r.items() if k not in VOLATILE} for r in (record, expected)]
        assert same[0] == same[1], f"{name}: another record than in the undisturbed run"

    def check(self, store: Path) -> None:
        """Every step is there once, with the right content, and nothing is left that is half made or in the way."""
        assert set(finished(store)) == set(self.baseline)
        for name in self.baseline:
            self.check_folder(store, name)
        left = [str(p.relative_to(store)) for p in store.rglob("*.partial")]
        assert left == [], f"half-made folders are left: {left}"
        again = self.finish(store)
        assert "nothing to do" in again.said(), tail(again.spec.log)

    def check_visible(self, store: Path) -> None:
        """As `check` of what is there already, whatever is lacking."""
        for name in finished(store):
            self.check_folder(store, name)

    def end(self) -> None:
        """Ends whatever was started here, by its mark."""
        mark = f"{MARK}={self.folder}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if int(process.name) != os.getpid() and mark in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:
                continue


@contextmanager
def laboratory() -> Iterator[Laboratory]:
    """A laboratory in a temporary folder, which goes with all that was started in it."""
    folder = Path(tempfile.mkdtemp(prefix="lingraft-faults-"))
    folder.chmod(0o755)
    found = Laboratory(folder)
    # What the children's environment is to be from the first: threads are counted when torch is imported.
    fixed = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    before = {name: os.environ.get(name) for name in fixed}
    os.environ.update(fixed)
    try:
        found.prepare()
        yield found
    finally:
        found.end()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def finished(store: Path) -> list[str]:
    """The steps that can be seen in a store, as "kind/key"."""
    marks = store.glob("*/*/step.json")
    names = (f"{m.parent.parent.name}/{m.parent.name}" for m in marks)
    return sorted(n for n in names if not n.startswith((".", "damaged/")) and "/." not in n)


def made(path: Path) -> list[str]:
    """The steps that were finished, each as often as it was."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line)[1] for line in lines]


@contextmanager
def watched(lab: Laboratory, store: Path) -> Iterator[None]:
    """Looks at every folder that appears, as soon as it does: it is complete and right, and no other takes its place."""
    stop = threading.Event()
    wrong: list[str] = []
    seen: dict[str, int] = {}

    def look() -> None:
        for name in finished(store):
            try:
                number = (store / name).stat().st_ino
                if seen.get(name) == number:
                    continue
                if name in seen:
                    wrong.append(f"{name} was made twice")
                seen[name] = number
                lab.check_folder(store, name)
            except (AssertionError, OSError, ValueError) as error:
                wrong.append(f"{name}: {error!r}")

    def watch() -> None:
        while not stop.is_set() and not wrong:
            look()
            stop.wait(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)
    look()
    assert not wrong, "\n".join(wrong)


def until(condition: Callable[[], Any], child: Child | None = None, seconds: float = PATIENCE) -> bool:
    """Waits for something; False where the child ended before.

    Raises:
        AssertionError: It has taken too long.
    """
    end = time.monotonic() + seconds
    while not condition():
        if child is not None and not child.alive:
            return False
        if time.monotonic() > end:
            raise AssertionError(f"waited for {seconds:.0f} s" + (f":\n{tail(child.spec.log)}" if child else ""))
        time.sleep(0.005)
    return True


__all__ = ["PATIENCE", "Child", "Found", "Laboratory", "Mapping", "finished", "laboratory", "made", "replace"]
