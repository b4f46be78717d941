"""Ray's processes that die in the middle of a run: its workers, its scheduler, its head."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.laboratory import Child, Laboratory, finished, tail, until, watched

pytest.importorskip("ray")
pytestmark = pytest.mark.full
ON_RAY = ("--on", "ray", "resources.cpus=1")


@pytest.fixture
def ray_folder() -> Iterator[dict[str, str]]:
    """A place for Ray's sockets, whose names may not be long."""
    folder = tempfile.mkdtemp(prefix="lfr-")
    yield {"RAY_TMPDIR": folder}
    shutil.rmtree(folder, ignore_errors=True)


def started(lab: Laboratory, store: Path, environment: dict[str, str], *more: str) -> Child:
    return lab.start(store, *ON_RAY, "--out", str(lab.path("out")), *more, environment=environment)


def commands(child: Child) -> dict[int, str]:
    """What the processes that it has started are called."""
    found = {}
    for pid in child.family():
        try:
            found[pid] = (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            continue
    return found


def killed(child: Child, name: str, number: int = signal.SIGKILL) -> int:
    """Ends those of its processes that are called so; gives how many."""
    pids = [pid for pid, command in commands(child).items() if name in command.split(" -")[0]]
    for pid in pids:
        os.kill(pid, number)
    return len(pids)


def test_the_same_content_comes_of_a_cluster(lab: Laboratory, ray_folder: dict[str, str]) -> None:
    store = lab.path("store")
    with watched(lab, store):
        child = started(lab, store, ray_folder)
        assert child.wait(240) == 0, tail(child.spec.log)
    lab.check(store)


def test_workers_are_killed(lab: Laboratory, ray_folder: dict[str, str]) -> None:
    """What they were at is made again by others."""
    store = lab.path("store")
    with watched(lab, store):
        child = started(lab, store, ray_folder)
        for enough in (3, 15):
            assert until(lambda enough=enough: len(finished(store)) >= enough, child, 240), child.said()
            until(lambda: "ray::Maker.make" in " ".join(commands(child).values()), child, 60)
            assert killed(child, "ray::Maker") or not child.alive
        assert child.wait(240) == 0, tail(child.spec.log)
    assert "again" in child.said()
    lab.check(store)


def test_a_worker_is_stopped(lab: Laboratory, ray_folder: dict[str, str]) -> None:
    """One that gives no sign of life is ended, and its step is made elsewhere."""
    store = lab.path("store")
    with watched(lab, store):
        child = started(lab, store, {**ray_folder, "LINGRAFT_STALLED": "8"})
        assert until(lambda: len(finished(store)) >= 3, child, 240), child.said()
        until(lambda: "ray::Maker.make" in " ".join(commands(child).values()), child, 60)
        assert killed(child, "ray::Maker", signal.SIGSTOP)
        assert child.wait(300) == 0, tail(child.spec.log)
    lab.check(store)


@pytest.mark.parametrize("name", ["raylet", "gcs_server", "all"])
def test_the_head_is_killed(lab: Laboratory, ray_folder: dict[str, str], name: str) -> None:
    """The run ends with one clear message, and the same command finishes."""
    store = lab.path("store")
    with watched(lab, store):
        child = started(lab, store, ray_folder)
        assert until(lambda: len(finished(store)) >= 5, child, 240), child.said()
        if name == "all":
            for pid in child.family():
                os.kill(pid, signal.SIGKILL)
        else:
            pids = [pid for pid, command in commands(child).items() if Path(command.split(" ")[0]).name == name]
            assert pids, sorted(commands(child).values())
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        code = child.wait(240)
        said = child.said()
        # Workers may outlive their scheduler for as long as it takes to finish.
        assert code in (0, 1), f"exit code {code}, after {time.monotonic() - began:.0f} s:\n{tail(child.spec.log)}"
        if code:
            assert said.count("error:") == 1 and "Traceback" not in said and "unexpected" not in said, said
            again = started(lab, store, ray_folder)
            assert again.wait(240) == 0, tail(again.spec.log)
    lab.check(store)


def test_the_driver_is_killed(lab: Laboratory, ray_folder: dict[str, str]) -> None:
    """Its cluster ends with it, or is in nobody's way."""
    store = lab.path("store")
    with watched(lab, store):
        child = started(lab, store, ray_folder)
        assert until(lambda: len(finished(store)) >= 5, child, 240), child.said()
        family = child.family()
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        again = started(lab, store, ray_folder)
        assert again.wait(240) == 0, tail(again.spec.log)
    gone = until(lambda: not any((Path("/proc") / str(pid)).exists() for pid in family), seconds=60)
    assert gone
    lab.check(store)
