"""Permissions that are taken away while a run is at work: what is wrong is said, and with them back the same command finishes."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.laboratory import Laboratory, finished, until

PLACES: dict[str, Callable[[Path], list[Path]]] = {
    "the store": lambda store: [store],
    "a kind's folder": lambda store: [store / "predict"],
    "all folders": lambda store: [store, *(p for p in store.iterdir() if p.is_dir())],
}


@pytest.mark.parametrize(
    ("where", "mode"),
    [
        ("all folders", 0o500),
        *(
            pytest.param(where, mode, marks=pytest.mark.full)
            for where in PLACES
            for mode in (0o500, 0o000)
            if (where, mode) != ("all folders", 0o500)
        ),
    ],
)
def test_permissions_revoked_in_the_middle(lab: Laboratory, where: str, mode: int) -> None:
    store = lab.path("store")
    store.mkdir()
    out = lab.path("out")
    out.mkdir()
    # Something of every kind's folder is there, and something is still to come in each.
    child = lab.start(store, "--out", str(out), pause=0.02, powers=False)
    assert until(lambda: len(finished(store)) >= 12, child)
    places = PLACES[where](store)
    before = {place: place.stat().st_mode for place in places}
    for place in reversed(places):
        place.chmod(mode)
    try:
        if where == "the store" and mode == 0o500 and all((store / kind).exists() for kind in kinds(lab)):
            lab.finish(store)
            return
        lab.failed(child, "permission")
    finally:
        for place in places:
            place.chmod(before[place])
    lab.check_visible(store)
    lab.finish(store, "--out", str(out), powers=False)
    lab.check(store)


def kinds(lab: Laboratory) -> set[str]:
    return {name.partition("/")[0] for name in lab.baseline}


@pytest.mark.full
def test_a_step_that_may_not_be_read(lab: Laboratory) -> None:
    (adapter,) = lab.steps("train", "train kind en")
    store = lab.copy(without=lab.dependants(adapter))
    out = lab.path("out")
    out.mkdir()
    (file,) = (store / adapter).glob("*.safetensors")
    file.chmod(0)
    child = lab.start(store, "--out", str(out), powers=False)
    code = child.wait()
    # It is as good as damaged; either is right, what is wrong is said.
    assert code in (0, 1) and "Traceback" not in child.said() and "unexpected" not in child.said(), child.said()
    if code:
        assert "ermission" in child.said()
        file.chmod(0o644)
        lab.finish(store, "--out", str(out), powers=False)
    lab.check(store)


@pytest.mark.full
def test_a_cache_that_may_not_be_written_to(lab: Laboratory) -> None:
    cache = lab.path("cache")
    cache.mkdir()
    store = lab.path("store")
    store.mkdir()
    out = lab.path("out")
    out.mkdir()
    cache.chmod(0o500)
    lab.finish(store, "--out", str(out), environment={"LINGRAFT_CACHE": str(cache)}, powers=False)
    lab.check(store)


@pytest.mark.full
def test_a_disk_that_turns_read_only(lab: Laboratory) -> None:
    folder = lab.path("disk")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m,mode=0777", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        store, out = folder / "store", lab.path("out")
        child = lab.start(store, "--out", str(out), pause=0.02)
        assert until(lambda: len(finished(store)) >= 12, child)
        for _ in range(200):  # Refused while a file is open for writing.
            done = subprocess.run(["mount", "-o", "remount,ro", str(folder)], capture_output=True)
            if not done.returncode:
                break
        else:
            pytest.skip("the disk is never free to be made read-only")
        lab.failed(child, "read-only")
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True, capture_output=True)
        lab.check_visible(store)
        lab.finish(store, "--out", str(out))
        lab.check(store)
    finally:
        if subprocess.run(["umount", str(folder)], capture_output=True).returncode:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True)
