"""Several runs on one store: at the same time, on several hosts, one of them stopped, killed or woken up again."""

import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.laboratory import LEASE, Laboratory, finished, made, tail, until, watched


def hosts() -> str | None:
    """Why other hosts cannot be played here, or None."""
    if os.getuid() != 0:
        return "needs root for namespaces of network and host name"
    pid = os.fork()
    if not pid:
        import ctypes

        os._exit(ctypes.CDLL(None).unshare(0x04000000 | 0x40000000) & 1)
    return "namespaces are not permitted here" if os.waitpid(pid, 0)[1] else None


def needs_hosts() -> None:
    if reason := hosts():
        pytest.skip(reason)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.full)])
def test_the_same_experiment_several_times_at_once(lab: Laboratory, count: int) -> None:
    store, notes = lab.path("store"), lab.path("made")
    with watched(lab, store):
        children = [lab.start(store, "--out", str(lab.path("out")), made=notes) for _ in range(count)]
        codes = [child.wait() for child in children]
    assert codes == [0] * count, "\n".join(tail(child.spec.log) for child in children)
    assert Counter(made(notes)) == Counter(lab.baseline.keys())
    lab.check(store)


@pytest.mark.full
def test_several_at_once_with_one_folder_of_results(lab: Laboratory) -> None:
    """The results are written at the same moment, to the same files."""
    store, notes, out = lab.path("store"), lab.path("made"), lab.path("out")
    children = [lab.start(store, "--out", str(out), made=notes) for _ in range(3)]
    codes = [child.wait() for child in children]
    assert codes == [0] * 3, "\n".join(tail(child.spec.log) for child in children)
    assert Counter(made(notes)) == Counter(lab.baseline.keys())
    expected = lab.folder / "out-baseline"
    assert (out / "report.md").read_bytes() == (expected / "report.md").read_bytes()
    assert {p.name for p in (out / "adapters").iterdir()} == {p.name for p in (expected / "adapters").iterdir()}


@pytest.mark.full
def test_a_dozen_started_on_what_is_nearly_finished(lab: Laboratory) -> None:
    """All want the same step at the same moment."""
    (step,) = lab.steps("train", "train kind en")
    for _ in range(3):
        store, notes = lab.copy(without=[step]), lab.path("made")
        with watched(lab, store):
            children = [lab.start(store, "--out", str(lab.path("out")), made=notes) for _ in range(6)]
            codes = [child.wait() for child in children]
        assert codes == [0] * 6, "\n".join(tail(child.spec.log) for child in children)
        assert made(notes) == [step]
        lab.check(store)
        shutil.rmtree(store)


@pytest.mark.full
def test_random_kills_of_two_that_work_together(lab: Laboratory) -> None:
    import random

    rng = random.Random(2)
    store, notes, killed = lab.path("store"), lab.path("made"), 0
    with watched(lab, store):
        pair = [lab.start(store, "--out", str(lab.path("out")), made=notes) for _ in range(2)]
        while killed < 10 and len(finished(store)) < len(lab.baseline):
            time.sleep(rng.uniform(0.05, 0.8))
            victim = rng.randrange(2)
            if pair[victim].alive:
                pair[victim].kill()
                killed += 1
            else:
                assert pair[victim].wait() == 0, tail(pair[victim].spec.log)
            pair[victim] = lab.start(store, "--out", str(lab.path("out")), made=notes)
        codes = [child.wait() for child in pair]
    assert codes == [0, 0], "\n".join(tail(child.spec.log) for child in pair)
    assert killed and max(Counter(made(notes)).values()) == 1
    lab.check(store)


# Stopped and woken up again


def stalled(lab: Laboratory, one: dict[str, object], other: dict[str, object]) -> None:
    """One of two is stopped while it makes a step, for longer than its lease, and then goes on."""
    store, notes = lab.path("store"), lab.path("made")
    with watched(lab, store):
        first = lab.start(store, "--out", str(lab.path("out")), made=notes, pause=0.05, **one)
        assert until(lambda: 4 <= len(finished(store)) < 30, first), first.said()
        until(lambda: list(store.glob("*/.*.partial")), first)
        first.signal(signal.SIGSTOP)
        held = list(store.glob("*/.*.partial"))
        second = lab.start(store, "--out", str(lab.path("out")), made=notes, **other)
        # Where it can tell that the first lives, it does all the rest and waits; else it takes over.
        until(lambda: not second.alive or "waiting" in second.said(), seconds=60)
        time.sleep(2 * LEASE)
        done = len(finished(store))
        first.signal(signal.SIGCONT)
        codes = [first.wait(), second.wait()]
    assert codes == [0, 0], "\n".join(tail(child.spec.log) for child in (first, second))
    assert not held or done >= len(lab.baseline) - 30
    assert max(Counter(made(notes)).values()) == 1
    lab.check(store)


@pytest.mark.full
def test_one_is_stopped_on_the_same_host(lab: Laboratory) -> None:
    stalled(lab, {}, {})


@pytest.mark.full
def test_one_is_stopped_on_another_host_where_locks_are_not_seen(lab: Laboratory) -> None:
    needs_hosts()
    stalled(lab, {"host": "one", "lockless": True, "pids": True}, {"host": "other", "lockless": True, "pids": True})


@pytest.mark.full
@pytest.mark.parametrize("point", range(1, 30, 2))
def test_one_is_stopped_at_any_point_of_a_commit(lab: Laboratory, point: int, tmp_path: Path) -> None:
    """Another takes over while it sleeps, and finishes; when it wakes up, it harms nothing."""
    needs_hosts()
    (step,) = lab.steps("merge", "merge adamergex sw")
    store, notes = lab.copy(without=[step]), lab.path("made")
    far = {"lockless": True, "pids": True, "environment": {"LINGRAFT_LEASE_SECONDS": "1.5"}}
    with watched(lab, store):
        first = lab.start(store, within=store, stop_at=point, made=notes, host="one", **far)
        until(lambda: stopped(first.pid) or not first.alive, seconds=60)
        second = lab.start(store, "--out", str(lab.path("out")), made=notes, host="other", **far)
        code = second.wait()
        first.signal(signal.SIGCONT)
        codes = [first.wait(), code]
    assert codes == [0, 0], "\n".join(tail(child.spec.log) for child in (first, second))
    assert made(notes) == [step]
    lab.check(store)


def stopped(pid: int) -> bool:
    """Whether a process of the session is stopped."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid and fields[0] == "T":
            return True
    return False


# Hosts


@pytest.mark.full
@pytest.mark.parametrize("locks", [True, False])
def test_two_hosts_at_once(lab: Laboratory, locks: bool) -> None:
    needs_hosts()
    store, notes = lab.path("store"), lab.path("made")
    with watched(lab, store):
        children = [
            lab.start(
                store,
                "--out",
                str(lab.path("out")),
                made=notes,
                host=name,
                pids=True,
                lockless=not locks,
            )
            for name in ("one", "other")
        ]
        codes = [child.wait() for child in children]
    assert codes == [0, 0], "\n".join(tail(child.spec.log) for child in children)
    assert Counter(made(notes)) == Counter(lab.baseline.keys())
    lab.check(store)


@pytest.mark.full
@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("names", [("one", "other"), ("same", "same")])
def test_one_host_dies_and_the_other_takes_over(lab: Laboratory, locks: bool, names: tuple[str, str]) -> None:
    """Containers may have the same name, and processes the same numbers."""
    needs_hosts()
    store, notes = lab.path("store"), lab.path("made")
    far = {"pids": True, "lockless": not locks, "made": notes}
    with watched(lab, store):
        first = lab.start(store, host=names[0], pause=0.05, **far)
        assert until(lambda: len(finished(store)) >= 5 and list(store.glob("*/.*.partial")), first), first.said()
        second = lab.start(store, "--out", str(lab.path("out")), host=names[1], **far)
        time.sleep(0.7)
        first.kill()
        code = second.wait()
    assert code == 0, tail(second.spec.log)
    assert max(Counter(made(notes)).values()) == 1
    lab.check(store)
