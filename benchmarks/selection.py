"""What does it cost to choose the K numbers of a model that changed most?

    .venv/bin/python benchmarks/selection.py [--quick] [--out benchmarks/results/selection.json]

Gaussian differences in float32 in the sizes of Gemma 3 270M: one embedding of 168 million and 180 tensors of 567,000 each;
K = 7,667,712, LF-SFT's for a language, or the same share of fewer. One thread. Every way runs in a process of its own:
memory is what the process held at most while it chose the first time beyond what it held before, the input; then medians.
`--quick` has tiny sizes: it shows only that all of it runs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import common
from lingraft.selecting import Part, largest
from lingraft.store import write_json

EMBEDDING, OTHERS, OTHER = 262_144 * 640, 180, 567_000
K = 7_667_712
MIB = 1 << 20

Chosen = int
"""How many entries a way chose: more than K where it takes all that equal the K-th."""


def sizes(share: int) -> list[int]:
    """The tensors' numbers of entries, of all together about one in `share`."""
    return [EMBEDDING // share] + [OTHER // share] * OTHERS


def differences(share: int) -> list[np.ndarray]:
    """The input, made a piece at a time so that the process never held more."""
    random = np.random.default_rng(0)
    arrays = [np.empty(size, np.float32) for size in sizes(share)]
    for array in arrays:
        for start in range(0, len(array), MIB):
            piece = array[start : start + MIB]
            random.standard_normal(len(piece), dtype=np.float32, out=piece)
    return arrays


def counting(arrays: list[np.ndarray], k: int) -> Chosen:
    """lingraft."""

    def reader(array: np.ndarray) -> Callable[[int, int], np.ndarray]:
        return lambda start, stop: array[start:stop]

    parts = [Part(str(n), len(array), reader(array)) for n, array in enumerate(arrays)]
    return sum(len(indices) for indices in largest(parts, k).values())


def listing(arrays: list[np.ndarray], k: int) -> Chosen:
    """The way of the method's own code: a list of all magnitudes, partitioned; then a mask by the threshold."""
    import torch

    tensors = [torch.from_numpy(array) for array in arrays]
    found: list[float] = []
    for tensor in tensors:
        found.extend(tensor.abs().tolist())
    threshold = np.partition(found, len(found) - k)[len(found) - k]
    masks = [tensor.abs() >= threshold for tensor in tensors]
    return int(sum(mask.sum() for mask in masks))


def topk(arrays: list[np.ndarray], k: int) -> Chosen:
    """torch.topk on all magnitudes together."""
    import torch

    together = torch.cat([torch.from_numpy(array).abs() for array in arrays])
    return len(torch.topk(together, k, sorted=False).indices.sort().values)


def kthvalue(arrays: list[np.ndarray], k: int) -> Chosen:
    """torch.kthvalue on all magnitudes together, then what is not smaller."""
    import torch

    together = torch.cat([torch.from_numpy(array).abs() for array in arrays])
    threshold = torch.kthvalue(together, len(together) - k + 1).values
    return len(torch.nonzero(together >= threshold))


WAYS: dict[str, Callable[[list[np.ndarray], int], Chosen]] = {
    "lingraft": counting,
    "torch.topk": topk,
    "torch.kthvalue": kthvalue,
    "list and np.partition": listing,
}


def measure(way: str, share: int, rounds: int) -> dict[str, Any]:
    """One way, in this process."""
    if way != "lingraft":
        import torch

        torch.set_num_threads(1)
    arrays, k = differences(share), K // share
    WAYS[way]([array[:1000] for array in arrays[:1]], 10)  # What is imported or set up at the first use.
    common.forget_peak()  # The peak so far is forgotten.
    before = common.memory("VmRSS") or 0
    times, chosen, peak = [], 0, 0
    for turn in range(rounds):
        began = time.perf_counter()
        chosen = WAYS[way](arrays, k)
        times.append(time.perf_counter() - began)
        peak = peak if turn else (common.memory("VmHWM") or 0) - before
    return {
        "way": way,
        "entries": sum(sizes(share)),
        "k": k,
        "chosen": chosen,
        "median_s": statistics.median(times),
        "min_s": min(times),
        "max_s": max(times),
        "rounds": rounds,
        "peak_mib": peak / MIB,
    }


def markdown(results: dict[str, Any]) -> str:
    """The results as they are printed."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in results["machine"].items()),
        "",
        "| entries | K | way | s | MiB beyond the input | chosen |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        spread = f"{row['median_s']:.2f} [{row['min_s']:.2f}, {row['max_s']:.2f}]"
        numbers = f"| {row['entries']:,} | {row['k']:,} | {row['way']} | {spread} |"
        lines.append(f"{numbers} {row['peak_mib']:.0f} | {row['chosen']:,} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/selection.json"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, share, rounds = options.one
        print(json.dumps(measure(way, int(share), int(rounds))))
        return
    # A list of all 270 million would take some 9 GB: it is left to the tenth.
    asked = [(way, share) for share in (1, 10) for way in WAYS if share > 1 or way != "list and np.partition"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    rows = []
    for way, share in asked:
        arguments = [way, str(share * (500 if options.quick else 1)), "5"]
        command = [sys.executable, __file__, "--one", *arguments]
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        rows.append(json.loads(said.splitlines()[-1]))
    machine = {
        "commit": common.commit(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "torch")},
    }
    results = {"machine": machine, "rows": rows}
    write_json(options.out, results)
    print(markdown(results))


if __name__ == "__main__":
    main()
