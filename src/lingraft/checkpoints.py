"""Files from which a training goes on: tensors and notes under one hash, so that a damaged one is never gone on from."""

import hashlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lingraft import processes
from lingraft.errors import AdapterError, LingraftError
from lingraft.tensors import TensorFile, finite, write_all

if TYPE_CHECKING:
    from torch.optim import Optimizer

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
BEST = "best.safetensors"
"""The parameters at the least loss of what is held out, so far; whoever writes what was learned removes it."""
_HASH = "sha256"
_LOG = "log"
_FORMAT = "format"
"""Written by `tensors`, for other tools."""


class DamagedCheckpoint(AdapterError):
    """A file's content is not what was written."""


class TrainingWarning(UserWarning):
    """Something of a training that whoever reads its result should know."""


def _digest(tensors: Mapping[str, np.ndarray[Any, Any]], notes: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(notes):
        digest.update(f"{name}\0{notes[name]}\0".encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def all_finite(tensors: Mapping[str, np.ndarray[Any, Any]]) -> bool:
    """Whether no tensor holds NaN or infinity."""
    return all(finite(array) for array in tensors.values() if array.dtype.kind not in "iub")


def write(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]], notes: Mapping[str, str]) -> None:
    """Writes a file that is complete, and durable, when it is there.

    Args:
        path: The file; a hidden one beside it is written first.
        tensors: What it holds.
        notes: What is said of it.
    """
    partial = path.with_name(f".{path.name}")
    write_all(partial, tensors, {**notes, _HASH: _digest(tensors, notes)})
    partial.replace(path)


def read(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """The tensors and notes of a file that `write` made.

    Raises:
        DamagedCheckpoint: It is not what was written.
    """
    try:
        file = TensorFile(path)
        tensors = {name: file.read(name) for name in file.names}
    except AdapterError as error:
        raise DamagedCheckpoint(error.what, where=path) from None
    notes = {name: value for name, value in file.metadata.items() if name != _FORMAT}
    if (said := notes.pop(_HASH, None)) is None:
        raise DamagedCheckpoint("it holds no hash: another version of lingraft wrote it", where=path)
    if said != _digest(tensors, notes):
        raise DamagedCheckpoint("the content of this file is not what was written", where=path)
    return tensors, notes


def set_aside(path: Path) -> Path:
    """Renames a damaged file, so that nothing goes on from it, and says to what."""
    number = 0
    while (target := path.with_name(f"damaged-{number}.{path.name}")).exists():
        number += 1
    path.replace(target)
    return target


def warn_of(error: DamagedCheckpoint, aside: Path) -> None:
    """Says that a damaged file was set aside."""
    warnings.warn(
        f"a checkpoint cannot be gone on from ({error.what}); it was renamed to {aside.name}, and the training begins anew",
        TrainingWarning,
        stacklevel=3,
    )


def save(
    out: Path,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: "Optimizer",
    step: int,
    seconds: float,
    tokens: int,
    part_tokens: int | None = None,
) -> bool:
    """Writes a checkpoint, and says whether it did: not before something has been learned, and never of numbers that are none."""
    if not optimizer.state:
        return False
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach().cpu().numpy()
        # A parameter that no gradient has reached yet, such as an expert no token was sent to, has no state.
        if state := optimizer.state.get(parameter):
            tensors[f"mean/{name}"] = state["exp_avg"].cpu().numpy()
            tensors[f"variance/{name}"] = state["exp_avg_sq"].cpu().numpy()
            tensors[f"updates/{name}"] = state["step"].cpu().numpy().reshape(1)
    if not all_finite(tensors):
        return False
    notes = {"step": str(step), "seconds": f"{seconds:.3f}", "tokens": str(tokens), _LOG: _digest_of_log(out, step)}
    write(out / CHECKPOINT, tensors, notes if part_tokens is None else {**notes, "part_tokens": str(part_tokens)})
    return True


def resume(
    out: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: "Optimizer"
) -> tuple[int, float, int, int | None]:
    """Loads the last checkpoint, if there is one; steps that were logged after it are taken out of the log.

    The first process reads it, and the others get from it what it has read.

    Returns:
        Steps, seconds, tokens, and the tokens of a part where memory did not suffice for as many as were asked for.
    """

    def found() -> tuple[int, float, int, int | None, list[str]]:
        (out / f".{CHECKPOINT}").unlink(missing_ok=True)
        if not (out / CHECKPOINT).exists():
            (out / METRICS).unlink(missing_ok=True)
            return 0, 0.0, 0, None, []
        try:
            saved, notes = read(out / CHECKPOINT)
            step = int(notes["step"])
            if (out / BEST).exists():
                read(out / BEST)
            _cut_log(out, step, notes.get(_LOG))
        except DamagedCheckpoint as error:
            aside = [set_aside(out / name) for name in (CHECKPOINT, BEST) if (out / name).exists()]
            (out / METRICS).unlink(missing_ok=True)
            warn_of(error, aside[0])
            return 0, 0.0, 0, None, []
        stated = [name for name in parameters if f"mean/{name}" in saved]
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.from_numpy(saved[f"parameter/{name}"]).to(parameter.device))
            for name in stated:
                _set_state(optimizer, parameters[name], [saved[f"{part}/{name}"] for part in _STATE])
        part_tokens = int(notes["part_tokens"]) if "part_tokens" in notes else None
        return step, float(notes["seconds"]), int(notes["tokens"]), part_tokens, stated

    step, seconds, tokens, part_tokens, stated = processes.shared(found)
    for parameter in parameters.values() if step else ():
        processes.spread(parameter.data)
    for name in stated:
        if not processes.is_main():
            empty = np.zeros(tuple(parameters[name].shape), np.float32)
            _set_state(optimizer, parameters[name], [np.zeros(1, np.float32), empty, empty])
        for held in optimizer.state[parameters[name]].values():
            moved = held.to(parameters[name].device)
            processes.spread(moved)
            held.copy_(moved)
    return step, seconds, tokens, part_tokens


_STATE = ("updates", "mean", "variance")


def _set_state(optimizer: "Optimizer", parameter: torch.nn.Parameter, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
    """Gives an optimizer its state of a parameter: the updates that were made, mean and variance."""
    updates, mean, variance = (torch.from_numpy(array.copy()) for array in arrays)
    steps = updates[0]
    optimizer.state[parameter] = {
        "step": steps.to(parameter.device) if optimizer.param_groups[0]["fused"] else steps,
        "exp_avg": mean.to(parameter.device),
        "exp_avg_sq": variance.to(parameter.device),
    }


def _cut_log(out: Path, step: int, digest: str | None) -> None:
    """Takes the steps after a checkpoint out of the log.

    Raises:
        DamagedCheckpoint: The steps before it are not what they were.
    """
    if not digest or digest != _digest_of_log(out, step):
        raise DamagedCheckpoint("its log is not what was written", where=out / METRICS)
    lines = (out / METRICS).read_bytes().splitlines(keepends=True)[:step]
    os.truncate(
        out / METRICS, sum(map(len, lines))
    )  # Written anew it could be lost by a kill, and the checkpoint with it.


def _digest_of_log(out: Path, step: int) -> str:
    """Of a log's first lines, one a step; of one that lacks some, another than any."""
    try:
        lines = (out / METRICS).read_bytes().splitlines(keepends=True)[:step]
    except OSError:
        return ""
    return hashlib.sha256(b"".join(lines)).hexdigest() if len(lines) == step else ""


class Best:
    """The parameters at the least loss of what is held out, on disk: of a training that goes on, those of before."""

    def __init__(self, out: Path, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.path, self.parameters = out / BEST, parameters
        self.least = math.inf
        self.path.with_name(f".{BEST}").unlink(missing_ok=True)
        if not (out / CHECKPOINT).exists():
            self.path.unlink(missing_ok=True)
        if self.path.exists():
            self.least = float(read(self.path)[1]["loss"])

    def look(self, step: int, loss: float) -> float:
        """Keeps the parameters where the loss is less than ever; gives it back."""
        if loss < self.least:
            self.least = loss
            if processes.is_main():
                tensors = {name: p.detach().cpu().numpy() for name, p in self.parameters.items()}
                write(self.path, tensors, {"loss": repr(loss), "step": str(step)})
        return loss

    def take(self) -> dict[str, Any]:
        """Makes the parameters those that were kept, and says of which step and loss they are.

        Raises:
            LingraftError: The loss was never a number.
        """

        def kept() -> dict[str, Any] | None:
            if not self.path.exists():
                return None
            tensors, notes = read(self.path)
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(torch.from_numpy(tensors[name]).to(parameter.device))
            return {"loss": float(notes["loss"]), "step": int(notes["step"])}

        figures = processes.shared(kept)
        if figures is None:
            raise LingraftError("the loss of what is held out was never a number", remedy="lower the learning rate")
        for parameter in self.parameters.values():
            processes.spread(parameter.data)
        return figures
