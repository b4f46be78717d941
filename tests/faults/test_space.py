"""No space left: a full disk, a limit on files. What is wrong is said, and with room again the same command finishes."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.laboratory import Laboratory, finished

FULL = "no space is left"


class Disk:
    """A small disk in memory."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        folder.mkdir()
        self._do("mount", "-t", "tmpfs", "-o", f"size={size},mode=0777", "tmpfs", str(folder))

    def resize(self, size: int) -> None:
        self._do("mount", "-o", f"remount,size={size}", str(self.folder))

    def close(self) -> None:
        if subprocess.run(["umount", str(self.folder)], capture_output=True).returncode:
            subprocess.run(["umount", "-l", str(self.folder)], capture_output=True)

    def _do(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(done.stderr.strip())


@pytest.fixture
def disk(lab: Laboratory) -> Iterator[Disk]:
    try:
        made = Disk(lab.path("disk"), 1 << 20)
    except OSError as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    try:
        yield made
    finally:
        made.close()


def used(folder: Path) -> int:
    """Bytes of a folder on a disk in memory, which gives whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "share", [0.5, *(pytest.param(share, marks=pytest.mark.full) for share in (0.02, 0.1, 0.25, 0.75, 0.9))]
)
def test_a_full_disk(lab: Laboratory, disk: Disk, share: float) -> None:
    whole = used(lab.folder / "baseline")
    disk.resize(int(whole * share))
    store = disk.folder / "store"
    lab.failing(store, FULL, "--out", str(lab.path("out")))
    lab.check_visible(store)
    disk.resize(8 * whole)
    lab.finish(store, "--out", str(lab.path("out")))
    lab.check(store)


@pytest.mark.full
def test_a_disk_that_is_enlarged_little_by_little(lab: Laboratory, disk: Disk) -> None:
    whole, store, out = used(lab.folder / "baseline"), disk.folder / "store", lab.path("out")
    reached = []
    for share in (0.2, 0.4, 0.6, 0.8):
        disk.resize(int(whole * share))
        lab.failing(store, FULL, "--out", str(out))
        lab.check_visible(store)
        reached.append(len(finished(store)))
    assert reached == sorted(reached) and reached[-1] > reached[0]
    disk.resize(8 * whole)
    lab.finish(store, "--out", str(out))
    lab.check(store)


@pytest.mark.full
def test_a_disk_full_while_the_results_are_written(lab: Laboratory, disk: Disk) -> None:
    store = lab.copy()
    disk.resize(8192)
    out = disk.folder / "out"
    lab.failing(store, FULL, "--out", str(out))
    disk.resize(8 << 20)
    lab.finish(store, "--out", str(out))
    assert (out / "report.md").read_text() == (lab.folder / "out-baseline" / "report.md").read_text()
    lab.check(store)


@pytest.mark.full
def test_a_full_disk_below_the_cache(lab: Laboratory, disk: Disk) -> None:
    """The cache only saves time."""
    disk.resize(4096)
    cache = disk.folder / "cache"
    cache.mkdir()
    store = lab.path("store")
    lab.finish(store, environment={"LINGRAFT_CACHE": str(cache)})
    lab.check(store)


@pytest.mark.parametrize("share", [0.9, pytest.param(0.3, marks=pytest.mark.full)])
def test_a_limit_on_the_size_of_files(lab: Laboratory, share: float) -> None:
    """As of a quota or `ulimit -f`: writing beyond it is refused, though there is room."""
    largest = max(path.stat().st_size for path in (lab.folder / "baseline").rglob("*.safetensors"))
    store = lab.path("store")
    child = lab.start(store, file_limit=int(largest * share))
    lab.failed(child, "too large")
    lab.check_visible(store)
    lab.finish(store)
    lab.check(store)
