"""What one step asks of the machine it runs on: processors, GPUs, memory; from the plan alone, before any data are read."""

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from lingraft.config import AdapterConfig, Experiment
from lingraft.costs.arithmetic import Memory, adapter_parameters, peak_memory
from lingraft.costs.shapes import Shape, reader_of, shape_named
from lingraft.errors import UserError

if TYPE_CHECKING:
    from lingraft.plan import Step

LOADING = frozenset({"train", "predict", "read", "project", "states", "translate"})
"""Kinds of steps that load a model; the others read files and reckon."""
OVERHEAD = 0.6e9
"""Bytes of a process that has imported torch, transformers and PEFT: 0.42 GB were measured, on Linux without a GPU."""
DRIVER = 3e9
"""Bytes of memory of the host that a GPU's driver and libraries are given beside that; a usual figure, not measured."""
LIGHT = 1e9
"""Bytes of a step without a model: 0.06 GB were measured; ROUGE's dictionaries are larger."""
SPARE = 1.25
"""What is asked for over what is reckoned: an allocator holds more than what is in use."""
_READ_TOKENS = 2048
_TRANSLATED_TOKENS = 4096
"""Tokens that are read at once, at most: by `evaluation` and by `translation`, which import torch."""
_CACHE_TOKENS, _CACHE_BYTES = 32_768, 2**32
"""What a batch that is written keeps, at most: `generation` takes as many texts as that."""
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Needs:
    """What a step asks for.

    Attributes:
        cpus: Processors.
        gpus: GPUs; 0 where it computes on processors, or loads no model.
        memory: Bytes of the host's memory, spare included; None where the model's sizes are not known.
        gpu_memory: Bytes on every GPU; 0 where it needs none, None where the model's sizes are not known.
    """

    cpus: int
    gpus: int
    memory: int | None
    gpu_memory: int | None


def needs_of(
    step: "Step", experiment: Experiment, shape: Shape | None, *, accelerator: bool = True, cpus: int = 2
) -> Needs:
    """What a step asks for; `experiment.resources` goes before what is derived, for steps that load a model.

    Memory is of the largest part that may go through the model at once, whatever the data: an upper bound but for what the
    arithmetic leaves out.

    Args:
        step: Of the experiment's plan.
        experiment: Says which device, and how much goes through the model at once.
        shape: The base's sizes (`shape_for`); None: not known.
        accelerator: Whether `device: auto` will find a GPU where the step runs.
        cpus: For a step that loads a model, where `resources.cpus` says nothing: one computes, or keeps a GPU busy, and one
            reads and tokenises.
    """
    if step.kind not in LOADING:
        return Needs(1, 0, _asked(LIGHT + _merged(step, shape)), 0)
    own = experiment.resources
    device = experiment.backbone.device
    gpus = int(device.startswith("cuda") or (device == "auto" and accelerator))
    gpus = gpus if own.gpus is None else own.gpus
    try:
        held, weights = _held(step, experiment, shape)
    except UserError:  # A module that the model does not have: said where it is loaded.
        held = weights = None
    memory = gpu_memory = None
    if held is not None and weights is not None:
        # Weights pass through the host on their way to a GPU.
        memory = _asked(OVERHEAD + (DRIVER + weights if gpus else held))
        gpu_memory = _asked(held) if gpus else 0
    elif not gpus:
        gpu_memory = 0
    if own.memory is not None:
        memory = size_of(own.memory)
    return Needs(cpus if own.cpus is None else own.cpus, gpus, memory, gpu_memory)


def size_of(text: str) -> int:
    """Bytes of a size that `resources.memory` allows, such as `24GB`."""
    number, unit = text[:-2], text[-2:]
    return ceil(float(number) * {"MB": 1e6, "GB": 1e9, "TB": 1e12}[unit])


def beneath_of(step: "Step", shape: Shape) -> float:
    """Numbers of the adapters that a step's own stands on; sparse differences are in the base's weights, and cost nothing."""
    grafted = "beneath" in (step.config.get("graft") or {})
    below = step.inputs.get("target_ref" if grafted else "beneath")
    if below is not None and below.kind == "merge":  # It is as large as what it merges.
        below = below.inputs["target_ref"]
    if below is None:
        return 0
    adapter = AdapterConfig(**below.config["adapter"])
    return 0 if adapter.family == "sparse" else adapter_parameters(shape, adapter)


def encoder_of(step: "Step") -> tuple[Shape | None, str | None]:
    """The translation encoder that a step runs, its sizes and its name."""
    trained = step.inputs.get("adapter", step) if step.kind != "train" else step
    fusion = trained.config.get("second", {}).get("fusion", {})
    name = fusion.get("encoder")
    found = None if name is None else shape_named(name)
    return None if found is None else reader_of(found), name


def _asked(count: float) -> int:
    """Bytes with what is spare, in whole MB."""
    return ceil(count * SPARE / 1e6) * 10**6


def _merged(step: "Step", shape: Shape | None) -> float:
    """Bytes of a merge or a comparison: one site of three adapters and their product in float64, and the adapters' files."""
    if step.kind not in ("merge", "compare") or shape is None:
        return 0
    site = max(layer.inputs * layer.outputs for layer in shape.linear)
    return 4 * 8 * site + sum(4 * _numbers(adapter, shape) for adapter in step.inputs.values())


def _numbers(step: "Step", shape: Shape) -> float:
    """How many numbers an adapter has; a merge is as large as what it merges."""
    while step.kind == "merge":
        step = step.inputs["task"]
    return adapter_parameters(shape, AdapterConfig(**step.config["adapter"])) if "adapter" in step.config else 0


def _held(step: "Step", experiment: Experiment, shape: Shape | None) -> tuple[float | None, float | None]:
    """Bytes at the peak of a step that loads a model, and those of weights among them; None where sizes are not known."""
    if step.kind == "translate":
        reader = shape_named(step.config["model"])
        if reader is None:
            return None, None
        found = peak_memory(reader, None, step.config["dtype"], 8, _TRANSLATED_TOKENS / 8)
        return found.total, found.weights
    if shape is None:
        return None, None
    found = _trained(step, experiment, shape) if step.kind == "train" else _read(step, experiment, shape)
    more = 0.0
    beside, name = encoder_of(step)
    if name is not None:
        if beside is None:
            return None, None
        more = peak_memory(beside, None, experiment.backbone.dtype, 1, _READ_TOKENS).total
    return found.total + more, found.weights + more


def _trained(step: "Step", experiment: Experiment, shape: Shape) -> Memory:
    """The peak of a training: one part of a batch goes through the model at a time."""
    config, speed = step.config, experiment.speed
    adapter, values = AdapterConfig(**config["adapter"]), config["training"]
    length = _length(step)
    tokens = max(length, min(speed.part_tokens, speed.together * values["batch_size"] * length))
    # A counterpart may be as long, and is read beside; with X-Mixup it is learned from too.
    two = config.get("counterpart", {}).get("form") == "beside"
    found = peak_memory(
        shape,
        adapter,
        config["dtype"],
        ceil(tokens / length) * (2 if config.get("second", {}).get("kind") == "mixup" else 1),
        length,
        quantization=experiment.backbone.quantization,
        output_length=values.get("max_output", 128) if shape.kind == "encoder-decoder" else 0,
        source_length=length if two else 0,
        beneath=beneath_of(step, shape),
    )
    saved = found.activations
    if speed.gradient_checkpointing:  # What enters a block is kept, and one block's own at a time.
        blocks = shape.layers + shape.output_layers
        saved = saved / blocks + blocks * tokens * shape.width * _SIZES[config["dtype"]]
    return Memory(found.weights, found.adapter * speed.together, saved, found.logits, found.sources)


def _read(step: "Step", experiment: Experiment, shape: Shape) -> Memory:
    """The peak of reading, or of writing with a cache of keys and values."""
    config, length = step.config, _length(step)
    dtype = config.get("dtype", experiment.backbone.dtype)
    tokens, cache = max(_READ_TOKENS, length), 0.0
    new = config.get("new_tokens") or 0
    if new and shape.kind == "decoder":
        each = 2 * shape.layers * shape.key_value * _SIZES[dtype]
        most = min(_CACHE_TOKENS, _CACHE_BYTES // each)
        items = config.get("limit")
        tokens = max(length + new, min(most, items * (length + new)) if items else most)
        cache = tokens * each
    form = config.get("counterpart", {}).get("form")
    found = peak_memory(
        shape,
        None,
        dtype,
        ceil(tokens / length),
        length,
        quantization=experiment.backbone.quantization,
        source_length=length if form == "beside" or step.kind == "states" else 0,
        beneath=beneath_of(step, shape),
    )
    # A graft is merged in memory: three adapters and what comes of them.
    adapters = [s for role, s in step.inputs.items() if role in ("adapter", "task", "target_ref", "source_ref")]
    on = 4.0 * sum(_numbers(adapter, shape) for adapter in adapters) * (2 if config.get("graft") else 1)
    return Memory(found.weights, found.adapter + on, found.activations, found.logits + cache, found.sources)


def _length(step: "Step") -> int:
    """Tokens of a step's longest text, at most."""
    config: dict[str, Any] = dict(step.config)
    if "reference" in config:
        return config["reference"]["segment_tokens"]
    if isinstance(config.get("projected"), int) and step.kind == "train":
        return config["projected"]
    return (config.get("training") or config)["max_length"]
