"""What do a stack of MAD-X and a sparse difference cost: a forward pass, a swap, and the memory of learning K entries?

    .venv/bin/python benchmarks/adapters.py [--quick] [--out benchmarks/results/adapters.json]

The demo model (Gemma 3 270M, bfloat16, one thread) reads eight texts of 128 random ids: alone, with a language adapter's coupling
and bottlenecks (reduction 2), and with a task adapter (reduction 16) on top; the three take turns. The goal is at most 15 % on
top of the bare pass. Then the stack is exchanged for another language's in place, and K entries are learned for two steps in a
process of their own: the goal is at most 20 bytes an entry for what is kept of them (index, value, gradient, moments), and one
largest tensor; the entries' start values and the copy of a tied embedding are reported beside. Digests of the
base before and after stand beside the figures. `--model` takes another decoder; `--quick` shows only that all of it runs.
"""

import argparse
import hashlib
import json
import multiprocessing
import platform
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lingraft import __version__
from lingraft.adapter import Adapter
from lingraft.backbones import Backbone, environment
from lingraft.batching import TokenSequence
from lingraft.config import AdapterConfig, BackboneConfig, TrainingConfig
from lingraft.differences import Learned, trainable_weights
from lingraft.locating import locate
from lingraft.stacks import load_stack
from lingraft.stepping import batch_loss
from lingraft.store import write_json
from lingraft.training import train

LANGUAGE = AdapterConfig(family="bottleneck", reduction=2, positions="madx", invertible=True)
TASK = AdapterConfig(family="bottleneck", reduction=16, positions="madx")
K = 7_667_712
"""LF-SFT's entries of a language."""


def sequences(count: int, length: int) -> list[TokenSequence]:
    """Texts of random ids."""
    rng = np.random.default_rng(0)
    return [TokenSequence(tuple(rng.integers(5, 200, size=length).tolist()), 1) for _ in range(count)]


def digest(backbone: Backbone) -> str:
    """Of all of the base's tensors."""
    found = hashlib.sha256()
    for name, tensor in backbone.model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def made(backbone: Backbone, place: Path, texts: list[TokenSequence]) -> dict[str, tuple[Adapter, ...]]:
    """Two language adapters, and a task adapter on the first."""
    values = TrainingConfig(epochs=0)
    for name, seed in (("first", 0), ("second", 1)):
        (place / name).mkdir()
        train(backbone, texts[:1], place / name, adapter=LANGUAGE, training=values, seed=seed)
    (place / "task").mkdir()
    beneath = load_stack([place / "first"])
    train(backbone, texts[:1], place / "task", adapter=TASK, training=values, beneath=beneath)
    return {name: load_stack([place / name, place / "task"]) for name in ("first", "second")} | {"language": beneath}


def passes(backbone: Backbone, stacks: dict[str, tuple[Adapter, ...]], texts: list[TokenSequence], rounds: int) -> Any:
    """Seconds of a forward pass: median, spread, and the median of the ratios to the bare pass of the same round."""
    ids = torch.tensor([text.ids for text in texts])
    mask = torch.ones_like(ids)
    ways: dict[str, tuple[Adapter, ...]] = {
        "base": (),
        "language": stacks["language"],
        "language and task": stacks["first"],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, stack in ways.items():
            with backbone.with_adapter(stack), torch.inference_mode(), backbone.autocast():
                if not number:
                    backbone.hidden(ids, mask)
                    continue
                began = time.perf_counter()
                backbone.hidden(ids, mask)
                times[name].append(time.perf_counter() - began)
    return {
        name: {
            "median": statistics.median(found),
            "least": min(found),
            "most": max(found),
            "ratio": statistics.median(a / b for a, b in zip(found, times["base"], strict=True)),
        }
        for name, found in times.items()
    }


def swaps(backbone: Backbone, stacks: dict[str, tuple[Adapter, ...]], rounds: int) -> dict[str, Any]:
    """Seconds to take one language's stack off and put another's on, and whether the base is untouched."""
    before, times = digest(backbone), []
    for number in range(rounds):
        with backbone.with_adapter(stacks["first" if number % 2 else "second"]):
            began = time.perf_counter()
        with backbone.with_adapter(stacks["second" if number % 2 else "first"]):
            times.append(time.perf_counter() - began)
    return {"median": statistics.median(times), "base_unchanged": digest(backbone) == before}


def learning(model: str, entries: int, quick: bool) -> dict[str, Any]:
    """The memory of learning K random entries, in this process."""
    torch.set_num_threads(1)
    backbone = Backbone(locate(BackboneConfig(model=model)))
    before = digest(backbone)
    weights = trainable_weights(backbone.model)
    rng = np.random.default_rng(0)
    total = sum(weight.parameter.numel() for weight in weights.values())
    # About K in all, of every tensor its share: which they are does not change what they cost.
    support = {site: _some(rng, w.parameter.numel(), entries / total) for site, w in weights.items()}
    text = sequences(1, 32 if quick else 128)
    # What a pass needs for itself, twice: whatever is made once is there before it is measured.
    few = {site: indices[:1] for site, indices in support.items()}
    for _ in range(2):
        with _Watched() as bare, Learned(weights, few) as learned:
            batch_loss(backbone, text, backward=torch.Tensor.backward)
            activations = bare.peak() - learned.memory.copies
    with _Watched() as watched, Learned(weights, support) as learned:
        optimizer = torch.optim.AdamW(learned.parameters.values(), lr=1e-4, weight_decay=0, fused=True)
        for _ in range(2):
            batch_loss(backbone, text, backward=torch.Tensor.backward)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            learned.refresh()
        count = sum(map(len, support.values()))
        memory = learned.memory
        moments = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.dim() > 0)
        kept = memory.indices + memory.values + memory.gradients + moments
        largest_tensor = max(w.parameter.numel() * w.parameter.element_size() for w in weights.values())
        found = {
            "entries": count,
            "bytes_an_entry": kept / count,
            "start_values_bytes_an_entry": memory.start / count,
            "copy_of_a_tied_embedding_mib": memory.copies / 2**20,
            "largest_tensor_mib": largest_tensor / 2**20,
            "allowed_mib": (20 * count + largest_tensor) / 2**20,
            "peak_beyond_model_mib": watched.peak() / 2**20,
            "of_that_activations_mib": activations / 2**20,
        }
    return found | {"base_unchanged": digest(backbone) == before}


def _some(rng: np.random.Generator, size: int, share: float) -> np.ndarray[Any, Any]:
    """Ascending random indices of a share of so many entries."""
    steps = rng.geometric(share, size=int(size * share * 1.2) + 1)
    found = np.cumsum(steps) - 1
    return found[found < size]


class _Watched:
    """The most memory this process has resident beyond what it had, looked at every few milliseconds."""

    def __enter__(self) -> "_Watched":
        self._start = self._most = _resident()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._ends.wait(0.005):
            self._most = max(self._most, _resident())

    def peak(self) -> int:
        """Bytes, so far."""
        return self._most - self._start

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._thread.join()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="short texts and one round: shows only that all of it runs"
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--entries", type=int, default=K)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, texts = (1, sequences(2, 16)) if options.quick else (options.rounds, sequences(8, 128))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        memory = pool.apply(learning, (options.model, options.entries, options.quick))
    backbone = Backbone(locate(BackboneConfig(model=options.model)))
    with tempfile.TemporaryDirectory() as place:
        stacks = made(backbone, Path(place), texts)
        found = {
            "lingraft": __version__,
            "machine": platform.machine(),
            "environment": environment(backbone),
            "batch": [len(text.ids) for text in texts],
            "forward_seconds": passes(backbone, stacks, texts, rounds),
            "swap_seconds": swaps(backbone, stacks, rounds),
            "learning": memory,
        }
    if options.out:
        write_json(options.out, found)
    else:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
