"""What the machine can do at most: matrix products, memory, disk.

    .venv/bin/python benchmarks/limits.py [--quick] [--out benchmarks/results/limits.json]

The products have the shapes of Gemma 3 270M's layers over 1,024 tokens, and a large square beside them; the arrays are larger than
the caches; the file is brought to the disk (fsync) before the clock stops and is read twice, the second time from memory. Medians.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

TOKENS = 1024
LAYERS = {"query": (640, 1024), "key": (640, 256), "output": (1024, 640), "gate": (640, 2048), "down": (2048, 640)}
"""Width in and out of Gemma 3 270M's linear layers; value is as key, up as gate."""


def rate(seconds: dict[str, Any], work: float) -> dict[str, float]:
    """Work a second: of the median, and of the slowest and fastest."""
    return {
        "median": work / seconds["median_s"],
        "least": work / seconds["max_s"],
        "most": work / seconds["min_s"],
    }


def products(options: argparse.Namespace) -> dict[str, Any]:
    """GFLOP/s by type: the layers' products one after the other, and a square."""
    import torch

    size = 256 if options.quick else 4096
    found = {}
    for name in ("bfloat16", "float32"):
        dtype = getattr(torch, name)
        tokens = 32 if options.quick else TOKENS
        pairs = [(torch.randn(tokens, a).to(dtype), torch.randn(b, a).to(dtype)) for a, b in LAYERS.values()]
        square = torch.randn(size, size).to(dtype)

        def layers(pairs: list[Any] = pairs) -> None:
            for states, weight in pairs:
                for _ in range(4):
                    torch.nn.functional.linear(states, weight)

        def squared(square: Any = square) -> None:
            square @ square

        ways: dict[str, Callable[[], Any]] = {"layers": layers, "square": squared}
        times = common.in_turn(ways, options.rounds)
        work = {"layers": 4 * sum(2 * tokens * a * b for a, b in LAYERS.values()), "square": 2 * size**3}
        found[name] = {way: rate(times[way], work[way] / 1e9) for way in ways}
    return found


def bandwidth(options: argparse.Namespace) -> dict[str, Any]:
    """GB/s that are read and written: a copy, and a + λ·b (triad)."""
    import torch

    count = 1 << (16 if options.quick else 26)
    a, b, c = (torch.ones(count) for _ in range(3))
    ways: dict[str, Callable[[], Any]] = {
        "copy": lambda: c.copy_(a),
        "triad": lambda: torch.add(a, b, alpha=0.5, out=c),
    }
    times = common.in_turn(ways, options.rounds)
    return {
        "copy": rate(times["copy"], 2 * 4 * count / 1e9),
        "triad": rate(times["triad"], 3 * 4 * count / 1e9),
        "array_mib": 4 * count / 2**20,
    }


def disk(options: argparse.Namespace) -> dict[str, Any]:
    """MB/s: written and brought to the disk, read (as far as the system lets go of what it keeps), and read from memory."""
    size = 1 << (16 if options.quick else 28)
    block = os.urandom(min(size, 1 << 24))
    times: dict[str, list[float]] = {"write and fsync": [], "read": [], "read again": []}
    with tempfile.TemporaryDirectory(dir=options.disk) as folder:
        path = Path(folder) / "file"
        for turn in range(options.rounds + 1):
            path.unlink(missing_ok=True)
            found = [_written(path, block, size)]
            if hasattr(os, "posix_fadvise"):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found += [_read(path), _read(path)]
            for name, seconds in zip(times, found, strict=True):
                if turn:
                    times[name].append(seconds)
    return {name: rate(common.spread(found), size / 1e6) for name, found in times.items()} | {"file_mb": size / 1e6}


def _written(path: Path, block: bytes, size: int) -> float:
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    return time.perf_counter() - began


def _read(path: Path) -> float:
    buffer = memoryview(bytearray(1 << 20))
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


def main() -> None:
    parser = common.arguments(__doc__, "limits.json")
    parser.add_argument("--disk", type=Path, help="a folder on the disk that is meant")
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    found = common.heading(
        options,
        products_gflops=products(options),
        memory_gbs=bandwidth(options),
        disk_mbs=disk(options),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )
    common.write(options.out, found)
    for name, rates in found["products_gflops"].items():
        print(f"{name}: " + ", ".join(f"{way} {value['median']:.0f} GFLOP/s" for way, value in rates.items()))
    print(", ".join(f"{way} {found['memory_gbs'][way]['median']:.1f} GB/s" for way in ("copy", "triad")))
    print(", ".join(f"{k} {v['median']:.0f} MB/s" for k, v in found["disk_mbs"].items() if isinstance(v, dict)))


if __name__ == "__main__":
    main()
