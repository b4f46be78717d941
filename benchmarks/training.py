"""What does a training step cost, beside transformers' Trainer with PEFT on the same batches?

    .venv/bin/python benchmarks/training.py [--quick] [--data-dir DIR] [--encoder FOLDER] [--ways peer,ours,…] [--cases label,…]
    .venv/bin/python benchmarks/training.py --profile-only [--json benchmarks/results/profile.json]

Both sides train as their users have it: `lingraft.training.train` and `Trainer.train`, each in a process of its own that stops
after every step until the next is asked for, so that steps take turns. Both start from the same adapter (written by lingraft,
opened by PEFT), read the same batches in the same order, and have the same optimiser, learning rate, clipping and precision
(bfloat16). A step is all there is of one: batch, padding, forward, backward, clipping, update, log. Tokens are counted without
padding. Medians of the rounds, after one step that is not counted. Losses are compared without dropout, in bfloat16, where the
sides round differently, and in float32; with dropout only speed is.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common

BATCH, LENGTH, ANSWER = 8, 128, 3
RATE, CLIP, RANK = 2e-4, 0.3, 8
SEED = 0


@dataclass(frozen=True)
class Way:
    """How a side trains.

    Attributes:
        title: What the page calls it.
        peer: Whether it is Trainer with PEFT.
        speed: Values of `SpeedConfig` that differ from the usual.
        training: Values of `TrainingConfig` that do.
        lanes: Adapters that are trained at once, each on a batch of its own.
        same: Whether its losses are to equal the usual way's.
    """

    title: str
    peer: bool = False
    speed: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    lanes: int = 1
    same: bool = True


WAYS = {
    "peer": Way("Trainer + PEFT", peer=True),
    "ours": Way("lingraft"),
    "positions": Way("a fifth of the positions", training={"loss_positions": 0.2}, same=False),
    "packing": Way("packing", speed={"packing": True}),
    "checkpointing": Way("gradient checkpointing", speed={"gradient_checkpointing": True}),
    "compile": Way("torch.compile", speed={"compile": True}),
    "alone": Way("one adapter after the other"),
    "together": Way("two adapters in one pass", speed={"together": 2}, lanes=2),
}
DEFAULT_WAYS = ("peer", "ours", "positions", "packing", "checkpointing", "alone", "together")


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        title: What the page calls it.
        ways: Which ways are asked, as far as they are wanted.
        objective: `label`, `lm` or `classification`.
        mixed: Real texts; else as many ids as `LENGTH`.
        dropout: LoRA's; above 0, losses are not compared.
        batch: Sequences in a batch.
        length: Tokens of a sequence that is not a real text.
        dtype: Of the base model; empty: as asked for.
    """

    title: str
    ways: tuple[str, ...]
    objective: str = "label"
    mixed: bool = False
    dropout: float = 0.0
    batch: int = BATCH
    length: int = LENGTH
    dtype: str = ""


CASES = {
    "label": Case(f"label only, {BATCH} × {LENGTH}", ("peer", "ours", "checkpointing", "compile")),
    "lm": Case(
        f"causal LM, all positions, {BATCH} × {LENGTH}",
        ("peer", "ours", "positions", "checkpointing", "compile"),
        "lm",
    ),
    "label-mix": Case("label only, texts as long as they are", ("peer", "ours", "packing"), mixed=True),
    "label-dropout": Case(f"label only, {BATCH} × {LENGTH}, dropout 0.05", ("peer", "ours"), dropout=0.05),
    "lm-dropout": Case(f"causal LM, {BATCH} × {LENGTH}, dropout 0.05", ("peer", "ours"), "lm", dropout=0.05),
    "encoder": Case("encoder, classification", ("peer", "ours"), "classification", mixed=True),
    "encoder-dropout": Case(
        "encoder, classification, dropout as it ships", ("peer", "ours"), "classification", mixed=True, dropout=0.05
    ),
    "label-exact": Case("label only, 4 × 32, float32", ("peer", "ours"), batch=4, length=32, dtype="float32"),
    "lm-exact": Case("causal LM, 4 × 32, float32", ("peer", "ours"), "lm", batch=4, length=32, dtype="float32"),
    "together": Case("two adapters, label only, 4 × 128 each", ("alone", "together"), batch=4),
}


# What both sides read: made once, by lingraft, in a process of its own


def prepare(asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Writes the adapter both sides start from, and gives the batches, their tokens and the arithmetic of a step."""
    from lingraft.backbones import Backbone
    from lingraft.batching import batches
    from lingraft.config import AdapterConfig, BackboneConfig, TrainingConfig
    from lingraft.locating import locate
    from lingraft.training import train

    case = Case(**asked["case"])
    if case.objective == "classification" and not case.dropout:
        asked["model"] = str(_without_dropout(Path(asked["model"]), folder / "model"))
    config = BackboneConfig(model=asked["model"], dtype=asked["dtype"], device=asked["device"])
    backbone = Backbone(locate(config))
    count = case.batch * (1 if not case.mixed else asked["steps"])
    items, data = _items(backbone, case, count, asked)
    sequences = _sequences(items)
    start = folder / "start"
    start.mkdir()
    adapter = AdapterConfig(rank=asked["rank"], dropout=case.dropout)
    train(backbone, sequences, start, adapter=adapter, training=TrainingConfig(epochs=0), seed=SEED)
    lengths = [len(item["ids"]) for item in items]
    values = TrainingConfig(batch_size=case.batch, group_by_length=False)
    order: list[list[int]] = []
    while len(order) < asked["steps"]:
        order += batches(lengths, values, SEED, len(order) // math.ceil(len(items) / case.batch))
    order = order[: asked["steps"]]
    return {
        "model": str(backbone.folder),
        "located": asked["model"],
        "start": str(start),
        "items": items,
        "order": order,
        "data": data,
        "tokens": [sum(lengths[n] for n in batch) for batch in order],
        "flops": [flops(backbone.model, [items[n] for n in batch], asked["rank"]) for batch in order],
    }


def _items(backbone: Any, case: Case, count: int, asked: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Sequences as plain values: ids, and where the loss begins, or the label."""
    import numpy as np

    from lingraft.batching import answer_sequences
    from lingraft.encoding import labelled_sequences
    from lingraft.heads import Head

    if not case.mixed:
        rng, words = np.random.default_rng(SEED), min(20_000, backbone.model.config.get_text_config().vocab_size)
        start = asked["length"] - ANSWER if case.objective == "label" else 1
        ids = rng.integers(5, words, size=(count, asked["length"])).tolist()
        return [{"ids": row, "start": start} for row in ids], f"random ids, {count} × {asked['length']}"
    data_dir = Path(asked["data"]) if asked["data"] else None
    examples, data = common.rows_of("topics", "en", "train", data_dir, count)
    if len(examples) < count:  # As many batches as there are rounds, whatever the data.
        examples = (examples * math.ceil(count / len(examples)))[:count]
    if case.objective == "classification":
        head = Head("classification", len(examples[0].candidates))
        found = labelled_sequences(backbone, examples, head, 256).sequences
        return [
            {"ids": s.rows[0].ids, "types": s.rows[0].types, "label": s.target[0], "labels": head.labels} for s in found
        ], data
    return [{"ids": s.ids, "start": s.start} for s in answer_sequences(backbone, examples, 256)], data


def _sequences(items: Sequence[Mapping[str, Any]]) -> list[Any]:
    """lingraft's own of plain values."""
    from lingraft.batching import TokenSequence
    from lingraft.encoding import LabelledSequence, Row
    from lingraft.heads import Head

    return [
        LabelledSequence((Row(tuple(i["ids"]), tuple(i["types"])),), (i["label"],), Head("classification", i["labels"]))
        if "label" in i
        else TokenSequence(tuple(i["ids"]), i["start"])
        for i in items
    ]


def _without_dropout(model: Path, folder: Path) -> Path:
    """An encoder's folder with all dropout of its configuration off: losses can be compared."""
    folder.mkdir()
    for part in model.resolve().iterdir():
        if part.name != "config.json":
            (folder / part.name).symlink_to(part)
    config = json.loads((model / "config.json").read_text())
    off = {name: 0.0 for name in config if "dropout" in name and isinstance(config[name], float)}
    usual = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    (folder / "config.json").write_text(json.dumps({**config, **usual, **off}))
    return folder


def flops(model: Any, items: Sequence[Mapping[str, Any]], rank: int) -> float:
    """The arithmetic of a step, in GFLOP: two a weight and token for every product whose result is used.

    Frozen layers: forward, and the gradient of their input, which the first layer's query, key and value need not have. LoRA:
    forward and both gradients. Attention: scores and values forward, and twice that backward; of a causal one the half that is
    seen. The vocabulary: forward and the input's gradient, at the positions that take a loss.
    """
    import torch

    text = model.config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or hidden // heads)
    layers = text.num_hidden_layers
    frozen = first = low = 0
    for name, module in model.named_modules():
        inside = ".layers." in name or ".layer." in name
        if not isinstance(module, torch.nn.Linear) or not inside:
            continue
        frozen += module.weight.numel()
        low += rank * sum(module.weight.shape)
        if any(part in name for part in ("layers.0.", "layer.0.")) and name.rpartition(".")[2][0] in "qkv":
            first += module.weight.numel()
    tokens = sum(len(item["ids"]) for item in items)
    squares = sum(len(item["ids"]) ** 2 for item in items)
    seen = 1.0 if "label" in items[0] else 0.5
    attention = 3 * 4 * layers * width * seen * squares
    places = sum(len(item["ids"]) - item["start"] for item in items) if "start" in items[0] else 0
    total = tokens * (4 * frozen - 2 * first + 6 * low) + attention + 4 * places * hidden * text.vocab_size
    return total / 1e9


# The two sides, step by step


class Gate:
    """Where a training stops until its next step is asked for; counts from there to where it stops again."""

    def __init__(self, device: str) -> None:
        self.asked, self.device = common.Asked(), device
        self.loaded = self.steps = 0
        self.began = 0.0

    def ready(self) -> None:
        """The model is there."""
        self.loaded = common.memory("VmRSS") or 0
        self.held = common.peak_memory()
        common.forget_peak()
        self.asked.say(loaded_mib=common.mib(self.loaded), versions=common.versions(*_PACKAGES))
        self.wait()

    def wait(self) -> None:
        """Until a step is asked for."""
        while (asked := self.asked.wait())["do"] != "step":
            self.asked.say(**self.memory())
        del asked
        self.began = time.perf_counter()

    def memory(self) -> dict[str, Any]:
        """The most that was held since the model was there, and beyond it."""
        peak = common.memory("VmHWM") or 0
        found = {
            "loaded_mib": common.mib(self.loaded),
            "loading_peak_mib": self.held,
            "peak_mib": common.mib(peak),
            "beyond_model_mib": common.mib(peak - self.loaded),
        }
        if self.device != "cpu":
            import torch

            found["gpu_peak_mib"] = common.mib(torch.cuda.max_memory_allocated())
        return found

    def step(self, loss: float) -> None:
        """A step is done."""
        self.asked.say(seconds=time.perf_counter() - self.began, loss=loss)
        self.wait()


_PACKAGES = ("torch", "transformers", "peft", "accelerate", "lingraft")


def peers_side(spec: Mapping[str, Any]) -> None:
    """Trainer with PEFT, as both document it."""
    import torch
    from peft import PeftModel
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    torch.set_num_threads(spec["threads"])
    gate = Gate(spec["device"])
    labelled = "label" in spec["items"][0]
    loader = AutoModelForSequenceClassification if labelled else AutoModelForCausalLM
    sizes = {"num_labels": spec["items"][0]["labels"], "ignore_mismatched_sizes": True} if labelled else {}
    model = loader.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]), **sizes)
    model = PeftModel.from_pretrained(model, spec["start"], is_trainable=True)
    for parameter in model.parameters():
        if parameter.requires_grad:  # A head, too, is trained in full precision.
            parameter.data = parameter.data.float()
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    rows = []
    for number in (n for batch in spec["order"] for n in batch):
        item = spec["items"][number]
        ids = item["ids"]
        row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        start = item.get("start", 0)
        row["labels"] = item["label"] if labelled else [-100] * start + ids[start:]
        rows.append(row)
    collator = DataCollatorWithPadding(tokenizer) if labelled else DataCollatorForSeq2Seq(tokenizer, padding="longest")

    class Stopping(TrainerCallback):
        """Waits between steps."""

        def on_train_begin(self, *given: Any, **named: Any) -> None:
            gate.ready()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            gate.step(trainer.last)

    class InOrder(Trainer):
        """Reads the rows as they stand, and keeps the last loss."""

        last = float("nan")

        def _get_train_sampler(self, *given: Any, **named: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

        def training_step(self, *given: Any, **named: Any) -> Any:
            loss = super().training_step(*given, **named)
            self.last = float(loss.detach())
            return loss

    with tempfile.TemporaryDirectory() as folder:
        values = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=len(spec["order"][0]),
            num_train_epochs=1,
            learning_rate=spec["rate"],
            lr_scheduler_type="constant",
            max_grad_norm=spec["clip"],
            weight_decay=0.0,
            bf16=spec["dtype"] == "bfloat16",
            use_cpu=spec["device"] == "cpu",
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=SEED,
        )
        trainer = InOrder(model=model, args=values, train_dataset=rows, data_collator=collator, callbacks=[Stopping()])
        trainer.train()


def our_side(spec: Mapping[str, Any]) -> None:
    """lingraft's own training."""
    import torch

    from lingraft.backbones import Backbone
    from lingraft.config import AdapterConfig, BackboneConfig, SpeedConfig, TrainingConfig
    from lingraft.locating import locate
    from lingraft.training import train

    torch.set_num_threads(spec["threads"])
    gate = Gate(spec["device"])
    config = BackboneConfig(model=spec["located"], dtype=spec["dtype"], device=spec["device"])
    backbone = Backbone(locate(config), SpeedConfig(**spec["speed"]))
    sequences = _sequences(spec["items"])
    batch = len(spec["order"][0])
    values = {
        "learning_rate": spec["rate"],
        "epochs": 1 + len(spec["order"]) * batch // len(sequences),
        "batch_size": batch,
        "warmup": 0,
        "schedule": "constant",
        "clip": spec["clip"],
        "group_by_length": False,
    }
    training = TrainingConfig(**{**values, **spec["training"]})
    adapter = AdapterConfig(rank=spec["rank"], dropout=spec["dropout"])
    given: dict[str, Any] = {
        "adapter": adapter,
        "training": training,
        "progress": lambda step, total, loss: gate.step(loss),
        "checkpoint_seconds": 1e9,
    }
    with tempfile.TemporaryDirectory() as folder:
        if spec["lanes"] == 1:
            gate.ready()
            train(backbone, sequences, Path(folder), seed=SEED, **given)
        else:
            _together(backbone, sequences, Path(folder), spec["lanes"], gate, given)


def _together(
    backbone: Any, sequences: list[Any], folder: Path, lanes: int, gate: Gate, given: Mapping[str, Any]
) -> None:
    """So many adapters at once, all on the same texts, from different seeds: a step is one of each."""
    from lingraft.training import Job, train_together

    progress, seconds = given["progress"], given["checkpoint_seconds"]
    values = {"adapter": given["adapter"], "training": given["training"]}
    jobs = []
    for number in range(lanes):
        (folder / str(number)).mkdir()
        last = number == lanes - 1  # The last of a pass: then all have taken their step.
        jobs.append(Job(sequences, folder / str(number), seed=number, progress=progress if last else None, **values))
    gate.ready()
    train_together(backbone, jobs, checkpoint_seconds=seconds)


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """What one step of ours spends its time on, by operator and by kind of operator."""
    import torch
    from torch.profiler import ProfilerActivity

    from lingraft.attaching import peft_config
    from lingraft.backbones import Backbone
    from lingraft.batching import TokenSequence
    from lingraft.config import AdapterConfig, BackboneConfig
    from lingraft.locating import locate
    from lingraft.stepping import batch_loss
    from lingraft.structures import fresh

    torch.set_num_threads(options.threads)
    length = 16 if options.quick else LENGTH
    backbone = Backbone(locate(BackboneConfig(model=options.model, dtype=options.dtype, device="cpu")))
    made, tensors = fresh(backbone, AdapterConfig(dropout=0.05), SEED)
    words = min(20_000, backbone.model.config.get_text_config().vocab_size)
    ids = torch.randint(5, words, (BATCH, length), generator=torch.Generator().manual_seed(SEED)).tolist()
    found: dict[str, Any] = {}
    with backbone.attached(peft_config(made), tensors) as wrapped:
        wrapped.train()
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RATE)
        for objective in ("label", "lm"):
            start = length - ANSWER if objective == "label" else 1
            sequences = [TokenSequence(tuple(row), start) for row in ids]

            def step(sequences: list[TokenSequence] = sequences) -> None:
                batch_loss(backbone, sequences, backward=torch.Tensor.backward)
                torch.nn.utils.clip_grad_norm_(parameters, CLIP)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            times = common.in_turn({"step": step}, 1 if options.quick else 2)
            with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as watched:
                step()
            averages = watched.key_averages()
            groups: dict[str, float] = {}
            for event in averages:
                name = group(event.key)
                groups[name] = groups.get(name, 0.0) + event.self_cpu_time_total / 1e6
            found[objective] = {
                "seconds": times["step"]["median_s"],
                "groups": dict(sorted(groups.items(), key=lambda pair: -pair[1])),
                "table": averages.table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=48),
            }
    return found


_GROUPS = (
    ("matrix products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul", "mkldnn")),
    ("attention", ("attention", "sdpa", "_softmax", "flash")),
    ("dropout, random numbers", ("dropout", "bernoulli", "random", "rand", "uniform", "normal_", "Dropped", "Dropout")),
    ("optimiser, clipping", ("Optimizer", "adam", "_foreach", "clip_grad", "linalg_vector_norm", "lerp", "addcdiv", "addcmul")),
    ("casts, copies", ("_to_copy", "copy_", "aten::to", "clone", "contiguous", "aten::cat", "aten::index", "gather")),
    (
        "elementwise, norms",
        ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::pow", "sqrt", "mean", "sum", "gelu", "silu", "tanh",
         "exp", "neg", "masked", "where", "fill_", "zero_", "aten::ge", "aten::lt", "aten::eq", "bitwise", "__", "cos", "sin",
         "logsumexp", "aten::max", "norm"),
    ),
)  # fmt: skip


def group(name: str) -> str:
    """The kind of an operator; the first whose part its name has."""
    return next((kind for kind, parts in _GROUPS if any(part in name for part in parts)), "other")


# Asking


def measure(name: str, options: argparse.Namespace, model: str, wanted: Sequence[str]) -> dict[str, Any]:
    """All wanted ways of a case, in turn."""
    case = CASES[name]
    chosen = [way for way in case.ways if way in wanted]
    steps = options.rounds + 1
    asked = {
        "case": vars(case),
        "model": model,
        "dtype": case.dtype or options.dtype,
        "device": options.device,
        "rank": RANK,
        "steps": steps,
        "length": 16 if options.quick else case.length,
        "data": str(options.data_dir) if options.data_dir else None,
        "threads": options.threads,
        "rate": RATE,
        "clip": CLIP,
        "dropout": case.dropout,
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "asked.json").write_text(json.dumps(asked))
        made = common.alone(sys.executable, __file__, "--prepare", str(folder), threads=options.threads)
        shared = {**asked, **made}

        def start(key: str) -> common.Worker:
            way = WAYS[key]
            spec = {**shared, "speed": dict(way.speed), "training": dict(way.training), "lanes": way.lanes}
            path = folder / f"{key}.json"
            path.write_text(json.dumps(spec))
            python = options.peer if way.peer else sys.executable
            side = "--peers-side" if way.peer else "--our-side"
            return common.Worker(python, __file__, side, str(path), threads=options.threads)

        makers: dict[str, Callable[[], common.Worker]] = {key: (lambda key=key: start(key)) for key in chosen}
        with common.workers(makers) as running:
            said = _turns(running, steps)
            memory = {key: worker.ask("memory") for key, worker in running.items()}
            versions = {key: worker.ready["versions"] for key, worker in running.items()}
    ways = {
        key: _figures(said[key], [WAYS[key].lanes * t for t in made["tokens"][1:]], memory[key], versions[key])
        for key in chosen
    }
    found = {
        "title": case.title,
        "model": Path(model).name,
        "data": made["data"],
        "batch": case.batch,
        "dropout": case.dropout,
        "dtype": asked["dtype"],
        "tokens": made["tokens"][1:],
        "gflop": made["flops"][1:],
        "ways": ways,
    }
    return found | _compared(case, ways)


def _turns(running: Mapping[str, common.Worker], steps: int) -> dict[str, list[dict[str, Any]]]:
    """What the ways say of their steps, one step of each at a time; two lanes take as many steps as one after the other."""
    said: dict[str, list[dict[str, Any]]] = {key: [] for key in running}
    for _ in range(steps):
        for key, worker in running.items():
            said[key].append(worker.ask("step"))
    return said


def _figures(
    said: list[dict[str, Any]], tokens: list[int], memory: dict[str, Any], versions: dict[str, str]
) -> dict[str, Any]:
    """Medians of the steps that count."""
    seconds = [step["seconds"] for step in said[1:]]
    speeds = [t / s for t, s in zip(tokens, seconds, strict=True)]
    return {
        **common.spread(seconds),
        "seconds": seconds,
        "tokens_s": statistics.median(speeds),
        "tokens_s_least": min(speeds),
        "tokens_s_most": max(speeds),
        "losses": [step["loss"] for step in said],
        **memory,
        "versions": versions,
    }


def _compared(case: Case, ways: Mapping[str, Any]) -> dict[str, Any]:
    """Every way beside the peer and beside ours as usual: the median of the rounds' ratios, memory, losses."""
    found: dict[str, Any] = {}
    base = next((key for key in ("peer", "alone", "ours") if key in ways), None)
    for key, way in ways.items():
        if base is None or key == base:
            continue
        reference = ways[base]
        ratios = [WAYS[key].lanes * b / s for b, s in zip(reference["seconds"], way["seconds"], strict=True)]
        row = {
            "beside": base,
            "times_faster": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "memory_share": way["peak_mib"] / reference["peak_mib"] if reference["peak_mib"] else None,
        }
        if not case.dropout and WAYS[key].same and WAYS[key].lanes == 1:
            pairs = zip(way["losses"], reference["losses"], strict=True)
            row["largest_loss_difference"] = max(abs(a - b) for a, b in pairs)
        found[key] = row
    return {"compared": found}


def main() -> None:
    parser = common.arguments(__doc__, "training.json")
    common.data_option(parser)
    parser.add_argument("--encoder", type=Path, help="an encoder's folder, for its two cases")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer", type=Path, help="the interpreter of Trainer and PEFT; absent: made in .bench")
    parser.add_argument("--ways", default=",".join(DEFAULT_WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--profile-only", action="store_true", help="only what a step of ours spends its time on")
    parser.add_argument("--json", type=Path, help="where the profile goes")
    for hidden in ("--prepare", "--peers-side", "--our-side"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        asked = json.loads((options.prepare / "asked.json").read_text())
        print("\n" + json.dumps(prepare(asked, options.prepare)))
        return
    if options.peers_side or options.our_side:
        spec = json.loads((options.peers_side or options.our_side).read_text())
        (peers_side if options.peers_side else our_side)(spec)
        os._exit(0)
    if options.profile_only:
        with tempfile.TemporaryDirectory() as place:
            if options.quick:
                options.model = str(common.tiny_model(Path(place)))
            found = common.heading(options, profile=profile(options))
        common.write(options.json or common.RESULTS / "profile.json", found)
        for objective, part in found["profile"].items():
            print(f"{objective}: {part['seconds']:.2f} s\n{part['table']}")
        return
    with tempfile.TemporaryDirectory() as place:
        run(options, Path(place))


def run(options: argparse.Namespace, place: Path) -> None:
    """All cases that are asked for and can be measured."""
    wanted = options.ways.split(",")
    if options.quick:
        options.model, options.rounds = str(common.tiny_model(place / "tiny")), min(options.rounds, 1)
    if options.peer is None:
        needed = "peer" in wanted and not options.quick
        options.peer = common.peer("trainer") if needed else Path(sys.executable)
    cases, skipped = {}, {}
    for name in options.cases.split(","):
        if CASES[name].objective == "classification" and options.encoder is None:
            skipped[name] = "no encoder was given (--encoder)"
            continue
        if not set(CASES[name].ways) & set(wanted):
            skipped[name] = "not asked for"
            continue
        model = str(options.encoder) if CASES[name].objective == "classification" else options.model
        cases[name] = measure(name, options, model, wanted)
        for key, way in cases[name]["ways"].items():
            row = cases[name]["compared"].get(key, {})
            faster = f", {row['times_faster']:.2f} times" if row else ""
            apart = f", losses within {row['largest_loss_difference']:.1e}" if "largest_loss_difference" in row else ""
            print(
                f"{CASES[name].title}; {WAYS[key].title}: {way['median_s']:.2f} s, {way['tokens_s']:.0f} tokens/s, "
                f"{way['peak_mib']} MiB{faster}{apart}",
                flush=True,
            )
        found = common.heading(
            options,
            device=options.device,
            dtype=options.dtype,
            titles={key: way.title for key, way in WAYS.items()},
            cases=cases,
            skipped=skipped,
        )
        common.write(options.out, found)  # After every case: what was measured stays if a later one fails.


if __name__ == "__main__":
    main()
