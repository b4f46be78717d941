"""What does a step cost beyond its work, and how fast is a store verified?

    .venv/bin/python benchmarks/store.py [--quick] [--rounds 3] [--gib 2] [--steps 1000] [--place DIR]
                                         [--out benchmarks/results/store.json]

In turn, `--rounds` times: so many steps of one small file; what the disk takes for as many synced files; a store of so many GiB,
in steps of four files, read as `dd` does, with nothing cached, and verified, with nothing cached. Caches are dropped through
/proc/sys/vm/drop_caches, which takes root; without it files are read past them (O_DIRECT) and `verify` is left out.
"""

import mmap
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from lingraft.commands.storing import verify_store
from lingraft.store import Store

CACHES = Path("/proc/sys/vm/drop_caches")
FILES = 4


def drop() -> bool:
    """Whether the system's cache of files could be emptied."""
    os.sync()
    try:
        CACHES.write_text("3")
    except OSError:
        return False
    return True


def small_steps(place: Path, steps: int) -> float:
    """Seconds for steps of one small file."""
    store = Store(place / "small")
    began = time.perf_counter()
    for number in range(steps):
        with store.making("score", f"{number:08x}", {"n": number}) as work:
            (work / "scores.json").write_text("{}")
    seconds = time.perf_counter() - began
    shutil.rmtree(store.root)
    return seconds


def synced_files(place: Path, files: int) -> float:
    """Seconds for so many small files, each synced: what the disk asks."""
    folder = place / "synced"
    folder.mkdir()
    began = time.perf_counter()
    for number in range(files):
        with (folder / str(number)).open("wb") as file:
            file.write(b"{}")
            file.flush()
            os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


def filled(place: Path, size: int) -> Store:
    """A store of so many bytes."""
    store, block = Store(place / "large"), os.urandom(1 << 20)
    each = size // 8 // FILES >> 20
    for number in range(8):
        with store.making("train", f"{number:08x}", {"n": number}) as work:
            for name in range(FILES):
                with (work / f"{name}.bin").open("wb") as file:
                    for turn in range(each):
                        file.write(turn.to_bytes(8, "big") + block[8:])
    return store


def raw_read(store: Store) -> float:
    """Bytes a second of reading every file in turn, past the cache."""
    buffer, count, began = mmap.mmap(-1, 8 << 20), 0, time.perf_counter()
    for path in sorted(store.root.rglob("*.bin")):
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        while read := os.readv(handle, [buffer]):
            count += read
        os.close(handle)
    return count / (time.perf_counter() - began)


def verified(store: Store) -> float:
    """Bytes a second of `lingraft store verify`."""
    found, well = verify_store(str(store.root), repair=False, as_json=True)
    if not well:
        raise SystemExit("the store is damaged")
    return found["bytes"] / found["seconds"]


def main() -> None:
    parser = common.arguments(__doc__, "store.json", rounds=3)
    parser.add_argument("--gib", type=float, default=2, help="size of the store that is verified")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--place", type=Path, help="folder on the disk to be measured")
    asked = parser.parse_args()
    if asked.quick:
        asked.gib, asked.steps = 0.03, 5
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=asked.place) as temporary:
        place = Path(temporary)
        store = filled(place, int(asked.gib * 2**30))
        for _ in range(asked.rounds):
            figures: dict[str, Any] = {
                "steps_seconds": small_steps(place, asked.steps),
                "synced_seconds": synced_files(place, asked.steps),
            }
            dropped = drop()
            figures["raw_megabytes_per_second"] = raw_read(store) / 1e6
            if dropped and drop():
                figures["verify_megabytes_per_second"] = verified(store) / 1e6
                figures["share"] = figures["verify_megabytes_per_second"] / figures["raw_megabytes_per_second"]
            rounds.append(figures)
            print({name: round(value, 2) for name, value in figures.items()}, flush=True)
    common.write(asked.out, common.heading(asked, steps=asked.steps, gib=asked.gib, measured=rounds))


if __name__ == "__main__":
    main()
