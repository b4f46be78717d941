"""One holder at a time; whoever dies, or stands still for too long, is followed by exactly one other."""

import errno
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lingraft import leases
from lingraft.errors import AlreadyMade, Busy, UserError
from lingraft.leases import leased
from lingraft.store import Store, appearing

# Takes a lease, says so, and waits to be killed.
HOLDER = """
import sys, time
from pathlib import Path
from lingraft import leases
if "--no-flock" in sys.argv:
    leases.fcntl = None
if "--idle-flock" in sys.argv:  # It says yes to everyone.
    leases.fcntl.flock = lambda *_: None
with leases.leased(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
# Waits for a signal file, tries to take a lease, says how it went, and holds on to it.
RACER = """
import sys, time
from pathlib import Path
from lingraft import leases
from lingraft.errors import Busy
if "--no-flock" in sys.argv:
    leases.fcntl = None
if "--idle-flock" in sys.argv:  # It says yes to everyone.
    leases.fcntl.flock = lambda *_: None
path = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    lease = leases.take(path)
except Busy:
    print("busy", flush=True)
else:
    print("held", lease.held(), flush=True)
    sys.stdin.readline()
"""


def started(script: str, *arguments: str, prefix: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    command = [*prefix, sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def killed(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def lease_of_another(path: Path, silent: float, **changes: Any) -> None:
    """The file of a holder on another host, whose last sign of life is so many seconds old."""
    holder = {
        "host": "elsewhere",
        "boot": "another-kernel",
        "space": "pid:[1]",
        "pid": 4321,
        "start": 5,
        "token": secrets.token_hex(8),
        "since": "2026-01-02 03:04:05 UTC",
        "seconds": 30.0,
        "locked": True,
        "earlier": [],
    }
    path.write_text(json.dumps(holder | changes))
    os.utime(path, (time.time() - silent,) * 2)


def without_locks(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(leases.fcntl, "flock", refuse)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".ab.lock"


def test_a_lease_is_one_file_and_leaves_none(path: Path):
    with leased(path) as lease:
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        assert lease.held()
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(path.parent.iterdir()) == []


def test_a_second_one_is_told_who_holds_it_and_since_when(path: Path):
    with leased(path), pytest.raises(Busy) as caught, leased(path):
        pytest.fail("two hold it")
    assert f"process {os.getpid()} on " in caught.value.what
    assert "since 20" in caught.value.what
    assert "last sign of life 20" in caught.value.what
    assert caught.value.where == str(path.with_name("ab"))
    with leased(path):
        pass


@pytest.mark.parametrize("flock", [(), ("--no-flock",), ("--idle-flock",)])
def test_a_killed_holder_is_followed_at_once(path: Path, flock: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    if "--idle-flock" in flock:
        monkeypatch.setattr(leases.fcntl, "flock", lambda *_: None)
    process = started(HOLDER, str(path), *flock)
    assert said(process) == "held"
    with pytest.raises(Busy, match=f"process {process.pid} "), leased(path):
        pytest.fail("two hold it")
    killed(process)
    with leased(path) as lease:
        assert lease.certain
        assert len(lease.earlier) == 1


def test_a_stopped_holder_keeps_what_it_has_locked(path: Path, monkeypatch: pytest.MonkeyPatch):
    process = started(HOLDER, str(path))
    assert said(process) == "held"
    process.send_signal(signal.SIGSTOP)
    try:
        os.utime(path, (0, 0))
        with pytest.raises(Busy), leased(path):
            pytest.fail("two hold it")
    finally:
        killed(process)


@pytest.mark.parametrize(("silent", "free"), [(29, False), (1000, True)])
def test_a_holder_elsewhere_is_given_up_by_the_clock_of_the_file_system(
    path: Path, monkeypatch: pytest.MonkeyPatch, silent: float, free: bool
):
    lease_of_another(path, silent)
    # This host's clock is wrong by years, and is not asked.
    monkeypatch.setattr(leases.time, "time", lambda: 5e9)
    assert leases.is_free(path) == free
    if not free:
        with pytest.raises(Busy, match="process 4321 on elsewhere, since 2026-01-02 03:04:05 UTC"), leased(path):
            pytest.fail("two hold it")
        return
    token = json.loads(path.read_text())["token"]
    with leased(path) as lease:
        assert lease.earlier == (token,)
        assert not lease.certain
        assert not any(p.name != path.name for p in path.parent.iterdir())


def test_a_process_number_means_nothing_on_another_kernel(path: Path):
    lease_of_another(path, 0, pid=2**22 + 1)
    with pytest.raises(Busy), leased(path):
        pytest.fail("a living holder was given up")


def test_a_process_that_has_a_dead_ones_number_does_not_keep_its_lease(path: Path, monkeypatch: pytest.MonkeyPatch):
    host, boot, space, pid, start = leases.this_process()
    this = {"host": host, "boot": boot, "space": space, "pid": pid, "locked": False}
    lease_of_another(path, 0, **this, start=start)
    with pytest.raises(Busy), leased(path):
        pytest.fail("a living holder was given up")
    lease_of_another(path, 0, **this, start=start - 1)
    with leased(path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": 1}', "[" * 100_000])
def test_a_file_that_says_nothing_counts_until_it_is_old(path: Path, text: str):
    path.write_text(text)
    with pytest.raises(Busy), leased(path):
        pytest.fail("it was taken")
    os.utime(path, (0, 0))
    with leased(path):
        pass


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError(),
        OSError(errno.ENOLCK, "no locks"),
        OSError(errno.ENOSYS, "none"),
        OSError(errno.EINVAL, "x"),
    ],
)
def test_where_files_cannot_be_locked_leases_hold_all_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    without_locks(monkeypatch, error)
    with leased(path):
        assert not json.loads(path.read_text())["locked"]
        with pytest.raises(Busy), leased(path):
            pytest.fail("two hold it")
    with leased(path):
        pass


def test_where_there_are_no_hard_links_leases_hold_all_the_same(path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    with leased(path), pytest.raises(Busy), leased(path):
        pytest.fail("two hold it")
    assert list(path.parent.iterdir()) == []
    lease_of_another(path, 1000)
    with leased(path) as lease:
        assert lease.held()


def test_where_there_are_no_hard_links_a_guard_may_go_at_any_moment(path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links")

    guard, really = path.with_name(f"{path.name}.guard"), Path.stat

    def stat(self: Path, **options: Any) -> os.stat_result:
        if self == guard:
            guard.unlink(missing_ok=True)
        return really(self, **options)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "stat", stat)
    guard.touch()
    with leased(path) as lease:
        assert lease.held()


def test_signs_of_life_are_given_while_it_is_held(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LINGRAFT_LEASE_SECONDS", "0.3")
    with leased(path):
        for _ in range(3):
            os.utime(path, (0, 0))
            deadline = time.monotonic() + 30
            while path.stat().st_mtime == 0 and time.monotonic() < deadline:
                time.sleep(0.02)
            assert path.stat().st_mtime > 0


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
def test_a_patience_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv("LINGRAFT_LEASE_SECONDS", value)
    with pytest.raises(UserError, match="LINGRAFT_LEASE_SECONDS"):
        leases.patience()


def test_a_new_lease_that_was_mistaken_for_a_stale_one_is_put_back(path: Path):
    lease_of_another(path, 0, token="aa")
    assert not leases._remove(path, "bb")
    assert json.loads(path.read_text())["token"] == "aa"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert leases._remove(path, "aa")
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("flock", [(), ("--no-flock",), ("--idle-flock",)])
def test_of_twenty_that_race_for_a_stale_lease_exactly_one_holds_it(path: Path, flock: tuple[str, ...]):
    lease_of_another(path, 1000)
    racers = [started(RACER, str(path), *flock) for _ in range(20)]
    try:
        assert {said(r) for r in racers} == {"ready"}
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("\n")
            racer.stdin.flush()
        outcomes = sorted(said(r) for r in racers)
        assert outcomes == ["busy"] * 19 + ["held True"]
    finally:
        for racer in racers:
            killed(racer)
    with leased(path):  # The winner is dead.
        pass
    assert list(path.parent.iterdir()) == []


def test_a_process_with_another_host_name_is_named_by_it(path: Path):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-u", "true"], capture_output=True).returncode:
        pytest.skip("host names cannot be set apart here")
    script = "import socket; socket.sethostname('far-away')\n" + HOLDER
    process = started(script, str(path), prefix=("unshare", "-u"))
    assert said(process) == "held"
    with pytest.raises(Busy, match="on far-away"), leased(path):
        pytest.fail("two hold it")
    killed(process)
    with leased(path):
        pass


# What a holder does that has been given up.


def overtaken(path: Path) -> None:
    """Another host takes over the lease."""
    path.unlink()
    lease_of_another(path, 0)


@pytest.fixture
def making() -> Callable[[Store], Any]:
    return lambda store: store.making("train", "ab", {"n": 1})


def test_a_holder_that_lost_its_lease_does_not_finish(tmp_path: Path, making: Callable[[Store], Any]):
    store = Store(tmp_path)
    with pytest.raises(Busy, match="another took over") as caught, making(store) as work:
        (work / "a.txt").write_text("mine")
        overtaken(tmp_path / "train/.ab.lock")
    assert not isinstance(caught.value, AlreadyMade)
    assert not store.has("train", "ab")
    # What is the other's is left alone.
    assert [p.name for p in (tmp_path / "train").iterdir()] == [".ab.lock"]


def test_two_that_both_believe_they_hold_it_never_write_to_one_folder(tmp_path: Path, making: Callable[[Store], Any]):
    slow, quick = Store(tmp_path), Store(tmp_path)
    with pytest.raises(Busy, match="another took over"), making(slow) as first:
        (first / "checkpoint").write_text("of the slow one")
        # It stands still for so long that it is given up, on a file system without locks.
        file = tmp_path / "train/.ab.lock"
        value = json.loads(file.read_text())
        file.unlink()
        lease_of_another(file, 1000, token=value["token"])
        with making(quick) as second:
            assert second != first
            assert (second / "checkpoint").read_text() == "of the slow one"
            with pytest.raises(FileNotFoundError):
                (first / "late.txt").write_text("late")
            (second / "result").write_text("of the quick one")
    assert sorted(quick.record("train", "ab")["files"]) == ["checkpoint", "result"]
    assert [p.name for p in (tmp_path / "train").iterdir()] == ["ab"]


def test_who_follows_a_killed_one_goes_on_with_its_work(tmp_path: Path):
    script = """
import sys, time
from pathlib import Path
from lingraft.store import Store
with Store(sys.argv[1]).making("train", "ab", {"n": 1}) as work:
    before = (work / "half").read_text() if (work / "half").exists() else ""
    (work / "half").write_text(before + "x")
    print("held", flush=True)
    time.sleep(60)
"""
    for _ in range(3):
        process = started(script, str(tmp_path))
        assert said(process) == "held"
        killed(process)
    with Store(tmp_path).making("train", "ab", {"n": 1}) as work:
        assert (work / "half").read_text() == "xxx"
    assert [p.name for p in (tmp_path / "train").iterdir()] == ["ab"]


def test_single_outputs_are_leased_too(tmp_path: Path):
    lease_of_another(tmp_path / ".out.lock", 0)
    with pytest.raises(Busy, match="elsewhere"), appearing(tmp_path / "out", {"n": 1}):
        pytest.fail("two are at work")


def test_a_link_in_the_place_of_a_lease_is_none(tmp_path: Path) -> None:
    path = tmp_path / ".step.lock"
    for leads_to in ("nothing", "."):
        path.symlink_to(leads_to)
        with leased(path) as lease:
            assert lease.held() and not path.is_symlink()
        assert not path.exists()
