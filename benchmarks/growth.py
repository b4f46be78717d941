"""How does the cost grow: with tasks and languages, tokens a batch, ranks, and the model's size?

    .venv/bin/python benchmarks/growth.py [--quick] [--rounds 3] [--out benchmarks/results/growth.json]

Steps of an experiment are counted by planning it (files with made-up rows for so many tasks and languages; English labels in,
AdaMergeX and what it is compared with out), its time is lingraft's own estimate for the demo model, its bytes those of one
adapter, written, times the adapters. Label-only training steps (forward, backward, update) are measured, each in a process of its
own: the demo model in bfloat16 by batch and by rank, and random models of 0.1 to 1 billion parameters at 4 × 128.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

TASKS, LANGUAGES = (1, 2, 4, 8), (1, 2, 4, 8, 16)
TOKENS = (128, 256, 512, 1024, 2048, 4096)
RANKS = (1, 4, 16, 64, 256)
LENGTH, ANSWER = 128, 3
MODELS = {
    "0.1": {"hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 12, "num_attention_heads": 10},
    "0.3": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 19, "num_attention_heads": 16},
    "0.5": {"hidden_size": 1280, "intermediate_size": 3840, "num_hidden_layers": 22, "num_attention_heads": 20},
    "1.0": {"hidden_size": 1792, "intermediate_size": 5376, "num_hidden_layers": 23, "num_attention_heads": 28},
}
"""About so many billions of parameters, with 32,000 tied embeddings."""


def plans(options: argparse.Namespace, place: Path, adapter_bytes: int) -> list[dict[str, Any]]:
    """Steps, seconds and bytes of tasks × languages; tasks share one store, so that what they share is done once."""
    from lingraft.config import Experiment
    from lingraft.languages import LANGUAGES as KNOWN
    from lingraft.locating import locate
    from lingraft.plan import make_plan
    from lingraft.runner import estimates
    from lingraft.store import Store

    tasks, counts = (TASKS[:2], LANGUAGES[:2]) if options.quick else (TASKS, LANGUAGES)
    codes = [code for code in KNOWN if code not in ("en", "fr")][: max(counts)]
    for code in ("en", "fr", *codes):
        (place / "text").mkdir(exist_ok=True)
        (place / "text" / f"{code}.txt").write_text(
            "".join(f"line {n} in {code}, some twenty words of text\n" for n in range(100))
        )
        for number in range(max(tasks)):
            folder = place / f"task{number}" / code
            folder.mkdir(parents=True, exist_ok=True)
            for split in ("train", "validation", "test"):
                rows = "".join(f"{n}\t{'ab'[n % 2]}\titem {n} of {number} in {code}\n" for n in range(100))
                (folder / f"{split}.tsv").write_text("id\tlabel\ttext\n" + rows)
    found = []
    for many in tasks:
        for few in counts:
            steps: dict[str, str] = {}
            seconds = 0.0
            began = time.perf_counter()
            for number in range(many):
                splits = ("train", "validation", "test")
                files = {split: f"task{number}/{{language}}/{split}.tsv" for split in splits}
                own = {"files": files, "prompt": "{text}\nlabel:", "labels": [" a", " b"], "id_field": "id"}
                experiment = Experiment.model_validate(
                    {
                        "name": "growth",
                        "backbone": options.model,
                        "data_dir": str(place),
                        "task": f"mine{number}",
                        "tasks": {f"mine{number}": {**own, "labels": {"a": " a", "b": " b"}}},
                        "targets": codes[:few],
                        "development": ["fr"],
                        "reference": {"text": "text/{language}.txt", "unit": "line", "segment_tokens": 128},
                    }
                )
                located = locate(experiment.backbone)
                plan = make_plan(experiment, located)
                new = {step.key: step.kind for step in plan.steps if step.key not in steps}
                said = estimates(plan, Store(place / "store"), located)["seconds"]
                # What tasks share is counted with the first: by the share of the new among this plan's trainings.
                trained = [step.key for step in plan.steps if step.kind in ("train", "predict")]
                seconds += (said or 0.0) * sum(key in new for key in trained) / len(trained)
                steps |= new
            kinds = list(steps.values())
            found.append(
                {
                    "tasks": many,
                    "languages": few,
                    "steps": len(kinds),
                    "trained": kinds.count("train"),
                    "merged": kinds.count("merge"),
                    "predicted": kinds.count("predict"),
                    "estimated_s": seconds or None,
                    "planning_s": time.perf_counter() - began,
                    "bytes": adapter_bytes * (kinds.count("train") + kinds.count("merge")),
                }
            )
    return found


def step(spec: dict[str, Any]) -> dict[str, Any]:
    """A label-only training step, in this process."""
    import torch

    from lingraft.attaching import peft_config
    from lingraft.backbones import Backbone
    from lingraft.batching import TokenSequence
    from lingraft.config import AdapterConfig, BackboneConfig
    from lingraft.locating import locate
    from lingraft.stepping import batch_loss
    from lingraft.structures import fresh

    torch.set_num_threads(spec["threads"])
    backbone = Backbone(locate(BackboneConfig(model=spec["model"], dtype="bfloat16", device="cpu")))
    made, tensors = fresh(backbone, AdapterConfig(rank=spec["rank"]), 0)
    words = min(20_000, backbone.model.config.get_text_config().vocab_size)
    rows, length = spec["rows"], spec["length"]
    ids = torch.randint(5, words, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = [TokenSequence(tuple(row), length - ANSWER) for row in ids]
    parameters = sum(p.numel() for p in backbone.model.parameters())
    loaded = common.memory("VmRSS") or 0
    common.forget_peak()
    with backbone.attached(peft_config(made), tensors) as wrapped:
        wrapped.train()
        learned = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=1e-4)

        def once() -> None:
            batch_loss(backbone, sequences, backward=torch.Tensor.backward)
            torch.nn.utils.clip_grad_norm_(learned, 0.3)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        times = common.in_turn({"step": once}, spec["rounds"])["step"]
    peak = common.memory("VmHWM") or 0
    return {
        **times,
        "tokens": rows * length,
        "rank": spec["rank"],
        "parameters": parameters,
        "trained": sum(p.numel() for p in learned),
        "loaded_mib": common.mib(loaded),
        "peak_mib": common.mib(peak),
        "beyond_model_mib": common.mib(peak - loaded),
    }


def bytes_of_an_adapter(model: str) -> int:
    """What a rank-8 adapter of all linear layers takes on the disk, its notes included."""
    from lingraft.backbones import Backbone
    from lingraft.batching import TokenSequence
    from lingraft.config import BackboneConfig, TrainingConfig
    from lingraft.locating import locate
    from lingraft.training import train

    backbone = Backbone(locate(BackboneConfig(model=model, device="cpu")))
    with tempfile.TemporaryDirectory() as folder:
        train(backbone, [TokenSequence((5, 6, 7), 1)], Path(folder), training=TrainingConfig(epochs=0))
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def main() -> None:
    parser = common.arguments(__doc__, "growth.json", rounds=3)
    parser.add_argument("--sizes", default=",".join(MODELS), help="billions of parameters of random models")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--random", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--bytes", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("\n" + json.dumps(step(options.one)))
    elif options.random:
        name, folder = options.random
        common.tiny_model(Path(folder), words=32_000, dtype="bfloat16", **_sizes(name))
        print("\n" + json.dumps(folder))
    elif options.bytes:
        print("\n" + json.dumps(bytes_of_an_adapter(options.model)))
    else:
        with tempfile.TemporaryDirectory() as place:
            run(options, Path(place))


def _sizes(name: str) -> dict[str, int]:
    return {**MODELS[name], "num_key_value_heads": MODELS[name]["num_attention_heads"] // 2}


def run(options: argparse.Namespace, place: Path) -> None:
    """All curves."""
    tokens, ranks, sizes = TOKENS, RANKS, [name for name in options.sizes.split(",") if name]
    length, rounds = LENGTH, options.rounds
    if options.quick:
        options.model = str(common.tiny_model(place / "tiny"))
        tokens, ranks, sizes, length, rounds = TOKENS[:1], RANKS[:1], [], 16, 1

    def measured(model: str, rows: int, rank: int) -> dict[str, Any]:
        spec = {"model": model, "rows": rows, "length": length, "rank": rank, "rounds": rounds}
        found = common.alone(
            sys.executable,
            __file__,
            "--one",
            json.dumps({**spec, "threads": options.threads}),
            threads=options.threads,
        )
        print(
            f"{found['parameters'] / 1e9:.2f}e9 parameters, {found['tokens']} tokens, rank {rank}: "
            f"{found['median_s']:.2f} s, {found['peak_mib']} MiB",
            flush=True,
        )
        return found

    by_tokens = [measured(options.model, max(1, count // LENGTH), 8) for count in tokens]
    by_rank = [measured(options.model, 4, rank) for rank in ranks]
    by_size = []
    for name in sizes:
        with tempfile.TemporaryDirectory() as folder:
            common.alone(sys.executable, __file__, "--random", name, folder, threads=options.threads)
            by_size.append(measured(folder, 4, 8))
    size = common.alone(sys.executable, __file__, "--bytes", "--model", options.model, threads=options.threads)
    (place / "data").mkdir()
    found = common.heading(
        options,
        adapter_bytes=size,
        plans=plans(options, place / "data", size),
        tokens=by_tokens,
        ranks=by_rank,
        sizes=by_size,
    )
    common.write(options.out, found)
    for row in found["plans"]:
        print(f"{row['tasks']} tasks × {row['languages']} languages: {row['steps']} steps, {row['bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
