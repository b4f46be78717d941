"""A merge on a loaded model whose weight λ can be changed in place, for all sites at once.

Every merge but a compressed one and the prefix rule as printed is a straight line in λ, `start + λ · slope`. Both are computed
once, by the same rules that merge files; then a change of λ is one multiply-add over one block of memory that all the adapter's
parameters share.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lingraft.adapter import Adapter
from lingraft.attaching import TOP
from lingraft.backbones import Backbone
from lingraft.divergence import Divergence
from lingraft.errors import AdapterError
from lingraft.merging import Graft

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class _Block:
    """Parameters of one type on one device, side by side."""

    values: torch.Tensor
    start: torch.Tensor
    slope: torch.Tensor

    def set(self, weight: float) -> None:
        if weight == 0:  # Not computed: the task's numbers, bit for bit.
            self.values.copy_(self.start)
        elif self.values.dtype == self.start.dtype:
            torch.add(self.start, self.slope, alpha=weight, out=self.values)
        else:
            self.values.copy_(torch.add(self.start, self.slope, alpha=weight))


class LiveGraft:
    """A merged adapter on a model; `set_weight` changes its λ in place.

    Args:
        parameters: The adapter's parameters on the model, by PEFT's names.
        task: The task's adapter.
        divergence: The two references.
        graft: How they are merged; its weight is where λ begins.

    Raises:
        AdapterError: The merge is no line in λ (compressed, or `literal`), or the parameters are not the adapter's.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], task: Adapter, divergence: Divergence, graft: Graft
    ) -> None:
        start, slope = line(graft, task, divergence)
        if set(parameters) != set(start):
            strange = sorted(set(parameters) ^ set(start))
            raise AdapterError(
                f"the model's adapter has other tensors: {len(strange)}, first {strange[0]}",
                remedy="merge adapters of one structure and size, trained on the same base model",
            )
        self._blocks: list[_Block] = []
        self._convex = graft.method.startswith("arimerge")
        kinds = {(p.device, p.dtype) for p in parameters.values()}
        for device, dtype in sorted(kinds, key=str):
            names = [n for n, p in parameters.items() if (p.device, p.dtype) == (device, dtype)]
            values = torch.empty(sum(parameters[n].numel() for n in names), device=device, dtype=dtype)
            offset = 0
            for name in names:
                parameter = parameters[name]
                parameter.data = values[offset : offset + parameter.numel()].view(parameter.shape)
                offset += parameter.numel()
            parts = [
                torch.cat([torch.from_numpy(np.ascontiguousarray(side[n], np.float32)).reshape(-1) for n in names])
                for side in (start, slope)
            ]
            self._blocks.append(_Block(values, parts[0].to(device), parts[1].to(device)))
        self.set_weight(graft.weight)

    def set_weight(self, weight: float) -> None:
        """Changes λ for all sites but those with a weight of their own.

        Raises:
            AdapterError: The weight is negative or not finite.
        """
        if not 0 <= weight < float("inf"):
            raise AdapterError(
                f"the weight λ must be a finite number of at least 0, not {weight}", remedy="give a weight such as 0.5"
            )
        if weight > 1 and self._convex:
            raise AdapterError(
                "AriMerge's weight λ is from 0 to 1", remedy="1 is the task itself, 0 the references alone"
            )
        with torch.no_grad():
            for block in self._blocks:
                block.set(weight)
        self.weight = weight


def is_line(graft: Graft, task: Adapter) -> bool:
    """Whether a merge's weight can be changed in place on a model."""
    return graft.out_rank is None and graft.space != "literal" and task.structure != "sparse"


def line(graft: Graft, task: Adapter, divergence: Divergence) -> tuple[Arrays, Arrays]:
    """Start and slope of a merge as a function of λ, by PEFT's names, in float32.

    Raises:
        AdapterError: The merge is compressed.
    """
    if graft.out_rank is not None:
        raise AdapterError(
            "a compressed merge is no straight line in λ, so its weight cannot be changed in place",
            remedy="leave the output rank out",
        )
    if graft.space == "literal":
        raise AdapterError(
            "space 'literal' (as printed) jumps at λ = 0: it is no straight line, so its weight cannot be changed in place",
            remedy="use space 'layer' or 'flat', or merge for every weight",
        )
    zero, one = (dict(replace(graft, weight=w).onto(task, divergence).tensors()) for w in (0.0, 1.0))
    start: Arrays = {}
    for name, end in one.items():
        begin = zero.get(name)
        if begin is None or begin.shape != end.shape:
            if task.structure != "lora":
                raise AdapterError(
                    f"{name} has another shape at λ = 0, so its weight cannot be changed in place",
                    remedy="merge it anew for every weight",
                )
            # LoRA's product space: at 0 the stack has no part of the references yet; the task's columns come first.
            begin = end.copy()
            if name.endswith("lora_B.weight"):
                begin[:, 0 if zero.get(name) is None else zero[name].shape[1] :] = 0
        start[name] = begin
    return start, {name: end - start[name] for name, end in one.items()}


@contextmanager
def grafted(backbone: Backbone, task: Adapter, divergence: Divergence, graft: Graft) -> Iterator[LiveGraft]:
    """A merge on a base model, whose λ can be changed in place.

        with grafted(backbone, task, divergence, Graft(0.5)) as live:
            for weight in (0.25, 0.5, 0.75):
                live.set_weight(weight)
                …

    Yields:
        The merge; the base is as before when the block ends.

    Raises:
        AdapterError: The adapters do not fit together, or not on this base.
    """
    if task.structure == "sparse":
        raise AdapterError(
            "a sparse difference is added into the base's own weights, so its weight cannot be changed in place",
            remedy="merge it for every weight",
        )
    widest = replace(graft, weight=1.0).onto(task, divergence)
    with backbone.with_adapter(widest) as wrapped:
        yield LiveGraft(adapter_parameters(wrapped), task, divergence, graft)


def adapter_parameters(wrapped: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of a PEFT model's one adapter, by the names PEFT saves them under."""
    learned = getattr(wrapped, "prompt_encoder", None)
    if learned is not None:
        return {"prompt_embeddings": learned["default"].embedding.weight}
    marker = wrapped.base_model.prefix
    ours = f".{TOP}"
    named = {name: p for name, p in wrapped.named_parameters() if marker in name and ours in name}
    return {name.replace(ours, "", 1): p for name, p in named.items()}
