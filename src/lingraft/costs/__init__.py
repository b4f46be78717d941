"""What a run costs, before it is run: tokens, arithmetic, memory and GPU hours. All of it is an estimate, and imports no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lingraft.config import AdapterConfig
from lingraft.costs.arithmetic import (
    adapter_parameters,
    gpu_hours,
    inference_flops,
    peak_memory,
    training_flops,
    writing_hours,
)
from lingraft.costs.reading import Lookup, items_of, work_of
from lingraft.costs.shapes import Shape, shape_for

if TYPE_CHECKING:
    from lingraft.plan import Plan, Step

__all__ = ["cost", "shape_for"]
_READ_AT_ONCE = 8
"""Texts in a batch that is only read; about, as batches are filled by tokens."""


def cost(
    plan: "Plan",
    shape: Shape,
    steps: "Sequence[Step] | None" = None,
    *,
    device: str = "H100",
    utilisation: float = 0.4,
    lookup: Lookup | None = None,
) -> dict[str, Any]:
    """What steps read, write and need.

    Args:
        plan: Whose steps.
        shape: The base's sizes.
        steps: Some of them, such as the pending ones; None: all.
        device: One of `arithmetic.DEVICES`.
        utilisation: See `gpu_hours`.
        lookup: The items of a task, language and split; None: `items_of` the experiment.

    Returns:
        `steps`: by kind, how many, tokens read and written, operations, GPU hours. `flops`, `gpu_hours`: of all. `memory`: bytes at
        the peak. `unknown`: labels of steps whose data nothing is known of; they are in no sum.
    """
    experiment = plan.experiment
    lookup = lookup or items_of(experiment)
    dtype, quantization = experiment.backbone.dtype, experiment.backbone.quantization
    kinds: dict[str, dict[str, float]] = {}
    unknown: list[str] = []
    memory = 0.0
    for step in plan.steps if steps is None else steps:
        if step.kind not in ("train", "predict", "read", "project") or step.config.get("initial"):
            continue
        work = work_of(step, experiment, shape, lookup)
        if work is None:
            unknown.append(step.label)
            continue
        row = kinds.setdefault(step.kind, {"count": 0, "tokens": 0, "written": 0, "flops": 0, "gpu_hours": 0})
        adapter = AdapterConfig(**step.config["adapter"]) if step.kind == "train" else None
        if adapter is None:
            flops = inference_flops(shape, work)
            hours = gpu_hours(flops, device, utilisation)
            hours = max(hours, writing_hours(shape, work.written, dtype, device))
            held = peak_memory(shape, None, dtype, _READ_AT_ONCE, work.longest, quantization=quantization)
        else:
            values = step.config["training"]
            flops = training_flops(shape, work, adapter_parameters(shape, adapter))
            hours = gpu_hours(flops, device, utilisation)
            held = peak_memory(
                shape,
                adapter,
                dtype,
                values["batch_size"],
                work.longest,
                quantization=quantization,
                output_length=work.output_length,
            )
        memory = max(memory, held.total)
        added = {
            "count": 1,
            "tokens": work.tokens + work.outputs,
            "written": work.written,
            "flops": flops,
            "gpu_hours": hours,
        }
        for name, value in added.items():
            row[name] += value
    return {
        "steps": kinds,
        "flops": sum(row["flops"] for row in kinds.values()),
        "gpu_hours": sum(row["gpu_hours"] for row in kinds.values()),
        "device": device,
        "memory": memory,
        "unknown": unknown,
    }
