"""What a run costs, before it is run: tokens, arithmetic, memory, disk and GPU hours.

All of it is an estimate, and imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lingraft.config import AdapterConfig, Experiment
from lingraft.costs.arithmetic import (
    adapter_parameters,
    gpu_hours,
    inference_flops,
    peak_memory,
    stored_bytes,
    training_flops,
    writing_hours,
)
from lingraft.costs.needs import Needs, beneath_of, encoder_of, needs_of
from lingraft.costs.reading import Lookup, Read, beside, items_of, translated, work_of
from lingraft.costs.shapes import Shape, reader_of, shape_for, shape_named

if TYPE_CHECKING:
    from lingraft.plan import Plan, Step

__all__ = ["Needs", "cost", "needs_of", "shape_for"]
_READ_AT_ONCE = 8
"""Texts in a batch that is only read; about, as batches are filled by tokens."""
_KINDS = ("train", "predict", "read", "project", "translate", "states")


@dataclass(frozen=True)
class _Price:
    """What one step costs: tokens, operations, hours, bytes at the peak and on disk; whether it runs a model of unknown sizes."""

    tokens: float
    written: float
    flops: float
    hours: float
    memory: float
    disk: float = 0.0
    unknown: bool = False


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
        the peak. `disk`: bytes of source states that are kept. `unknown`: labels of steps whose data nothing is known of, which are
        in no sum, and of those whose translation model's sizes are not known, whose tokens are counted and no more.
    """
    experiment = plan.experiment
    lookup = lookup or items_of(experiment)
    kinds: dict[str, dict[str, float]] = {}
    unknown: list[str] = []
    memory = disk = 0.0
    reckoned = _Reckoned(experiment, shape, lookup, device, utilisation)
    for step in plan.steps if steps is None else steps:
        if step.kind not in _KINDS or step.config.get("initial"):
            continue
        price = reckoned.price(step)
        if price is None or price.unknown:
            unknown.append(step.label)
        if price is None:
            continue
        row = kinds.setdefault(step.kind, {"count": 0, "tokens": 0, "written": 0, "flops": 0, "gpu_hours": 0})
        memory, disk = max(memory, price.memory), disk + price.disk
        added = {
            "count": 1,
            "tokens": price.tokens,
            "written": price.written,
            "flops": price.flops,
            "gpu_hours": price.hours,
        }
        for name, value in added.items():
            row[name] += value
    return {
        "steps": kinds,
        "flops": sum(row["flops"] for row in kinds.values()),
        "gpu_hours": sum(row["gpu_hours"] for row in kinds.values()),
        "device": device,
        "memory": memory,
        "disk": disk,
        "unknown": unknown,
    }


@dataclass(frozen=True)
class _Reckoned:
    """Prices of an experiment's steps."""

    experiment: Experiment
    shape: Shape
    lookup: Lookup
    device: str
    utilisation: float

    def price(self, step: "Step") -> _Price | None:
        """What a step costs; None where nothing is known of its data."""
        if step.kind == "translate":
            return self._translation(step)
        work = work_of(step, self.experiment, self.shape, self.lookup)
        if work is None:
            return None
        read = beside(step, self.experiment, self.shape, self.lookup)
        if step.kind == "states":
            return self._states(step, read)
        encoder, named = encoder_of(step)
        flops = inference_flops(reader_of(self.shape), read.source)
        more = 0.0 if encoder is None else inference_flops(encoder, read.encoder)
        adapter = AdapterConfig(**step.config["adapter"]) if step.kind == "train" else None
        beneath = beneath_of(step, self.shape)
        if adapter is None:
            held = self._held(None, _READ_AT_ONCE, work.longest, 0, read.source.longest, beneath=beneath)
            flops += inference_flops(self.shape, work) + 2 * beneath * (work.tokens + work.outputs + work.written)
        else:
            mixed = step.config.get("second", {}).get("kind") == "mixup"
            batch = step.config["training"]["batch_size"]
            projection = encoder.width * self.shape.width if encoder else 0
            trained = adapter_parameters(self.shape, adapter) + projection
            if mixed:  # Both texts are learned from.
                flops = training_flops(self.shape, read.source, trained)
            whole = adapter.family == "sparse"
            # Which numbers change is a choice among the base's own: learning them costs no more than their gradients do.
            own = 0 if whole else trained
            flops += training_flops(self.shape, work, own, beneath=beneath, whole=whole)
            states = work.longest if read.columns and not mixed else 0.0
            batch *= 2 if mixed else 1
            held = self._held(adapter, batch, work.longest, work.output_length, states, beneath=beneath)
            held += 16 * projection
        if encoder is not None:
            held += self._held(None, 0, 0, 0, 0, encoder)
        hours = gpu_hours(flops + more, self.device, self.utilisation)
        if adapter is None:
            hours = max(hours, writing_hours(self.shape, work.written, self.experiment.backbone.dtype, self.device))
        tokens = work.tokens + work.outputs + read.source.tokens + read.encoder.tokens
        return _Price(tokens, work.written, flops + more, hours, held, unknown=bool(named) and encoder is None)

    def _held(
        self,
        adapter: AdapterConfig | None,
        batch: int,
        length: float,
        output_length: float,
        source_length: float,
        shape: Shape | None = None,
        *,
        beneath: float = 0,
    ) -> float:
        """Bytes at the peak; of another model than the base, whose weights are whole."""
        backbone = self.experiment.backbone
        return peak_memory(
            shape or self.shape,
            adapter,
            backbone.dtype,
            batch,
            length,
            quantization="none" if shape else backbone.quantization,
            output_length=output_length,
            source_length=source_length,
            beneath=beneath,
        ).total

    def _states(self, step: "Step", read: Read) -> _Price:
        """Counterparts are read once, and their states are written."""
        flops = inference_flops(reader_of(self.shape), read.source)
        hours = gpu_hours(flops, self.device, self.utilisation)
        held = self._held(None, _READ_AT_ONCE, read.source.longest, 0, read.source.longest)
        disk = stored_bytes(self.shape, step.config["places"]["modules"], read.columns)
        return _Price(read.source.tokens, 0, flops, hours, held, disk)

    def _translation(self, step: "Step") -> _Price | None:
        """A translation model reads rows and writes them; of one whose sizes are not known, tokens alone are counted."""
        reader = shape_named(step.config["model"])
        work = translated(step, reader or self.shape, self.lookup)
        if work is None or reader is None:
            return work and _Price(work.tokens, work.written, 0, 0, 0, unknown=True)
        flops = inference_flops(reader, work)
        hours = gpu_hours(flops, self.device, self.utilisation)
        hours = max(hours, writing_hours(reader, work.written, step.config["dtype"], self.device))
        held = self._held(None, _READ_AT_ONCE, work.longest, 0, 0, reader)
        return _Price(work.tokens, work.written, flops, hours, held)
