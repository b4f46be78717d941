"""What does a FLARE training step cost beside a LoRA step on the same batch?

    .venv/bin/python benchmarks/fusion.py [--quick] [--out benchmarks/results/fusion.json]

The demo model (Gemma 3 270M, LoRA on all linear layers) reads random ids of about the lengths of questions with their contexts in
German and English (XQuAD). Forward and backward of one batch of eight, the ways in turn; medians and the spread. The source's
own pass is timed alone: the goal is a step of at most 1.3 LoRA steps beyond it. `--model` takes another decoder; `--quick`
has two short texts: with a tiny model it shows only that all of it runs.
"""

import argparse
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lingraft import __version__
from lingraft.adapter import Adapter
from lingraft.backbones import Backbone, environment, peft_config
from lingraft.batching import Counterpart, TokenSequence, micro_batches
from lingraft.config import FUSION_FUNCTIONS, AdapterConfig, BackboneConfig, FusionConfig, TrainingConfig
from lingraft.fusion.attaching import put_on
from lingraft.fusion.sources import states_of
from lingraft.fusion.stages import SecondStage, second_adapter
from lingraft.locating import locate
from lingraft.stepping import batch_loss
from lingraft.store import write_json
from lingraft.structures import fresh
from lingraft.training import train

LENGTHS = ((210, 165), (240, 190), (180, 150), (225, 170), (260, 210), (200, 160), (190, 150), (230, 185))
"""Target and source tokens: about those of XQuAD in German and English."""
ANSWER = 5


def batch(backbone: Backbone, lengths: tuple[tuple[int, int], ...], fused: bool) -> list[TokenSequence]:
    """Sequences of random ids."""
    rng, found = np.random.default_rng(0), []
    for target, source in lengths:
        ids, beside = (rng.integers(5, 200, size=n).tolist() for n in (target, source))
        found.append(TokenSequence(tuple(ids), target - ANSWER, source=Counterpart(tuple(beside)) if fused else None))
    return found


def timed(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    """Median and spread of every way's seconds; the ways take turns, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number:
                times[name].append(time.perf_counter() - began)
    return {n: {"median": statistics.median(t), "least": min(t), "most": max(t)} for n, t in times.items()}


def measure(backbone: Backbone, lengths: tuple[tuple[int, int], ...], rounds: int) -> dict[str, Any]:
    """Steps of LoRA and of every fusion function."""
    config = AdapterConfig(rank=8, dropout=0)
    plain, fused = (batch(backbone, lengths, with_source) for with_source in (False, True))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        first = Path(place)
        train(backbone, plain[:1], first, adapter=config, training=TrainingConfig(epochs=0))
        for function in FUSION_FUNCTIONS:
            fusion = FusionConfig(function=function, plain="all")
            made, tensors = fresh(backbone, second_adapter(config, fusion), 0)
            stage = SecondStage(Adapter.load(first), "fused", fusion, language="de")
            with ExitStack() as stack:
                stack.enter_context(backbone.merged(stage.first))
                model = stack.enter_context(backbone.attached(peft_config(made), tensors))
                stack.enter_context(put_on(backbone, model, stage))
                model.train()
                ways = {
                    "lora": partial(_step, backbone, model, plain),
                    "fused": partial(_step, backbone, model, fused),
                    "source pass": partial(_source_pass, backbone, fused),
                }
                times = timed(ways, rounds)
                extra = sum(tensor.numel() for tensor in backbone.fuser.extra.parameters())
            beyond = times["fused"]["median"] - times["source pass"]["median"]
            found[function] = {
                **times,
                "ratio": times["fused"]["median"] / times["lora"]["median"],
                "ratio beyond the source pass": beyond / times["lora"]["median"],
                "parameters beyond LoRA's": extra,
            }
            print(
                f"{function:16} LoRA {times['lora']['median']:.2f} s, FLARE {times['fused']['median']:.2f} s "
                f"({found[function]['ratio']:.2f}), source pass {times['source pass']['median']:.2f} s, "
                f"beyond it {found[function]['ratio beyond the source pass']:.2f}",
                flush=True,
            )
    return found


def _step(backbone: Backbone, model: Any, sequences: list[TokenSequence]) -> None:
    """Forward and backward of a batch."""
    batch_loss(backbone, sequences, backward=lambda loss: loss.backward())
    model.zero_grad(set_to_none=True)


def _source_pass(backbone: Backbone, sequences: list[TokenSequence]) -> None:
    """What is read of the counterparts, alone."""
    places = list(dict.fromkeys(backbone.fuser.places.values()))
    with backbone.fuser.off():
        for part in _parts(sequences):
            rows = [s.source for s in part if s.source is not None]
            states_of(backbone, places, rows, max(s.start for s in part))


def _parts(sequences: list[TokenSequence]) -> list[list[TokenSequence]]:
    """The parts in which training reads the batch."""
    return [[sequences[i] for i in part] for part in micro_batches([len(s.ids) for s in sequences])]


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="two short texts and one round: shows only that all of it runs"
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lengths, rounds = (LENGTHS, options.rounds) if not options.quick else (((30, 20), (20, 25)), 1)
    backbone = Backbone(locate(BackboneConfig(model=options.model, revision=None)))
    found = {
        "lingraft": __version__,
        "machine": platform.machine(),
        "threads": options.threads,
        "environment": environment(backbone),
        "batch": [list(pair) for pair in lengths],
        "functions": measure(backbone, lengths, rounds),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    if options.out:
        write_json(options.out, found)
    else:
        print(json.dumps(found["functions"], indent=1))


if __name__ == "__main__":
    main()
