"""How much is saved by projecting only the positions that have a label, and how exact is the chunked loss?

    .venv/bin/python benchmarks/losses.py [--model demo] [--out benchmarks/results/losses.json]

Each way runs in turn on the same batches; medians of five and the spread. Peak memory is of a process of its own.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import common
from lingraft.backbones import Backbone, environment, peft_config
from lingraft.batching import TokenSequence, micro_batches
from lingraft.config import AdapterConfig, BackboneConfig
from lingraft.locating import locate
from lingraft.losses import summed_cross_entropy
from lingraft.stepping import batch_loss
from lingraft.structures import fresh

ROUNDS = 5


def sequences(task: str) -> list[TokenSequence]:
    """16 sequences of 20 to 60 tokens; the loss on the last three (an answer) or on all."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 60, (16,), generator=generator).tolist()
    ids = [torch.randint(5, 20_000, (n,), generator=generator).tolist() for n in lengths]
    return [TokenSequence(tuple(i), len(i) - 3 if task == "answer" else 1) for i in ids]


def full_logits(backbone: Backbone, chosen: list[TokenSequence]) -> float:
    """The usual way: logits of every position, cross-entropy with ignored labels."""
    width = max(len(s.ids) for s in chosen)
    ids = torch.full((len(chosen), width), backbone.pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, s in enumerate(chosen):
        ids[row, : len(s.ids)] = torch.tensor(s.ids)
        mask[row, : len(s.ids)] = 1
        labels[row, s.start : len(s.ids)] = ids[row, s.start : len(s.ids)]
    with torch.autocast("cpu", backbone.dtype, enabled=backbone.dtype != torch.float32):
        logits = backbone.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    loss.backward()
    return float(loss.detach())


def ours(backbone: Backbone, chosen: list[TokenSequence]) -> float:
    return batch_loss(backbone, chosen, backward=lambda loss: loss.backward())


WAYS = {"full logits": full_logits, "lingraft": ours}


def measure(model: str, dtype: str, task: str, only: str | None) -> dict[str, object]:
    """Median seconds a step of each way, or one way alone (for its memory)."""
    backbone = Backbone(locate(BackboneConfig(model=model, dtype=dtype, device="cpu")))
    made, tensors = fresh(backbone, AdapterConfig(dropout=0), 0)
    chosen = sequences(task)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    losses: dict[str, float] = {}
    with backbone.attached(peft_config(made), tensors) as wrapped:
        wrapped.train()
        for turn in range(1 if only else ROUNDS + 1):
            for name, way in WAYS.items():
                if only and name != only:
                    continue
                began = time.perf_counter()
                losses[name] = way(backbone, chosen)
                if turn or only:
                    times[name].append(time.perf_counter() - began)
    found = {n: {"median_s": statistics.median(t), "min_s": min(t), "max_s": max(t)} for n, t in times.items() if t}
    return {"losses": losses, "times": found, "memory_mib": common.peak_memory(), "environment": environment(backbone)}


def exactness(dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of the loss and its gradient against float64 full logits, at Gemma's vocabulary."""
    torch.manual_seed(0)
    weight, states = (torch.randn(262_144, 640) * 0.05).to(dtype), torch.randn(384, 640).to(dtype).requires_grad_()
    labels = torch.randint(0, 262_144, (384,))
    loss = summed_cross_entropy(states, weight, labels)
    loss.backward()
    exact = states.detach().double().requires_grad_()
    reference = torch.nn.functional.cross_entropy(exact @ weight.double().t(), labels, reduction="sum")
    reference.backward()
    assert states.grad is not None and exact.grad is not None
    return {
        "loss": abs(float(loss.detach()) - float(reference.detach())) / float(reference.detach()),
        "gradient": float((states.grad.double() - exact.grad).norm() / exact.grad.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/losses.json"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        dtype, task, way = options.one
        print(json.dumps(measure(options.model, dtype, task, way)["memory_mib"]))
        return
    results: dict[str, object] = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "commit": common.commit(),
        "parts": [len(p) for p in micro_batches([len(s.ids) for s in sequences("answer")])],
    }
    for dtype in ("bfloat16", "float32"):
        results[f"exactness {dtype}"] = exactness(getattr(torch, dtype))
        for task in ("answer", "clm"):
            found = measure(options.model, dtype, task, None)
            memory = {}
            for way in WAYS:
                command = [sys.executable, __file__, "--model", options.model, "--one", dtype, task, way]
                memory[way] = json.loads(
                    subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
                )
            times = found["times"]
            ratio = times["full logits"]["median_s"] / times["lingraft"]["median_s"]  # type: ignore[index]
            results[f"{task} {dtype}"] = {**found, "memory_mib": memory, "times_faster": ratio}
            print(
                f"{task} {dtype}: {ratio:.2f} times faster; memory of one step {memory} MiB; losses {found['losses']}",
                flush=True,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
