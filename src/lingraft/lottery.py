"""LF-SFT's training (Ansell et al., 2022, arXiv:2110.07560, section 3): which numbers of a model change, and by how much.

First phase: everything but norms and the output embedding is fine-tuned, and the K entries that moved most are kept, the lottery's
winners. Second phase: the model starts again where it was, and only these entries learn. Their differences from the start are
the adapter. `select: gradient` replaces the first phase, for models too large to be fine-tuned fully: the entries are those of
the greatest summed gradients, and nothing moves meanwhile.
"""

import copy
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lingraft import checkpoints, processes
from lingraft.attaching import Part, settle, stacked
from lingraft.backbones import Backbone
from lingraft.batching import derived_seed, steps_of
from lingraft.checkpoints import BEST, CHECKPOINT
from lingraft.config import AdapterConfig, TrainingConfig
from lingraft.differences import Gathered, Learned, Weight, parts_of, trainable_weights
from lingraft.errors import UserError
from lingraft.heads import Head
from lingraft.layouts.common import PREFIX
from lingraft.modules.sparse import parted
from lingraft.selecting import largest
from lingraft.stepping import Progress, Room, batch_loss, check_loss, divided, learn, length_of, schedule

FIRST = "first"
"""The folder of the first phase's log, and of its checkpoint while it runs."""
SELECTION = "selection.safetensors"
"""The entries that the first phase chose, while the second runs."""


@dataclass(frozen=True)
class Difference:
    """A sparse difference that was learned.

    Attributes:
        summary: Steps, tokens and seconds of both phases, the second's last loss, and `first`, the first phase's own figures.
        modules: The paths of the modules that change.
        entries: How many entries change, by site.
        tensors: Its tensors and its head's, by PEFT's names.
    """

    summary: dict[str, Any]
    modules: list[str]
    entries: dict[str, int]
    tensors: dict[str, np.ndarray[Any, Any]]


def learn_difference(
    backbone: Backbone,
    head: Head | None,
    tensors: Mapping[str, torch.Tensor],
    beneath: Sequence[Part],
    sequences: Sequence[Any],
    out: Path,
    adapter: AdapterConfig,
    training: TrainingConfig,
    seed: int,
    *,
    trackers: Sequence[str] = (),
    progress: Progress | None = None,
    checkpoint_seconds: float = 30.0,
) -> Difference:
    """Learns a sparse difference in two phases, from where a killed one stopped; the base is the same before and after.

    Args:
        backbone: The base model.
        head: The head of an encoder; None: its language model.
        tensors: The head's initial tensors by PEFT's names, where it is trained. It is learned whole.
        beneath: Sparse differences that are in the weights meanwhile.
        sequences: What to learn, all of one type.
        out: The folder of logs and checkpoints.
        adapter: How many entries, of which modules, and how they are chosen.
        training: How both phases are trained.
        seed: Order, dropout and drawn positions.
        trackers: accelerate's trackers.
        progress: Called after every step, over both phases.
        checkpoint_seconds: As for `stepping.learn`.

    Raises:
        UserError: There are fewer entries than are asked for, or weights would decay.
    """
    if training.weight_decay:
        raise UserError(
            "a sparse difference is trained without weight decay, which would move what shall not change",
            remedy="use training.weight_decay=0",
        )
    epochs = training.epochs if adapter.first_epochs is None else adapter.first_epochs
    first = training.model_copy(update={"epochs": epochs})
    learned_from, _ = divided(sequences, training, seed)
    steps = [steps_of(len(learned_from), values) for values in (first, training)]
    backbone.check_whole("a sparse difference")
    with backbone.bare(head) as model, ExitStack() as put:
        # Before anything is put on: what is beneath is no part of N.
        size = sum(p.numel() for p in model.parameters())
        names = put.enter_context(stacked(model, beneath))
        settle(model, names, beneath, merged=names)
        put.enter_context(backbone.sped(model))
        weights = trainable_weights(model, adapter.modules)
        check_entries(adapter.entries, weights)
        shared = _Shared(backbone, model, weights, sequences, adapter, seed, size, checkpoint_seconds)
        place = out / FIRST
        place.mkdir(exist_ok=True)
        if not processes.shared(lambda: _whole(out / SELECTION) is not None):
            heads, told = _Heads(backbone, model, head, tensors), _shifted(progress, 0, sum(steps))
            _keep(out / SELECTION, *_chosen(shared, heads, place, first, told))
        for left in (CHECKPOINT, f".{CHECKPOINT}", BEST):
            (place / left).unlink(missing_ok=True)
        winners, figures = processes.shared(lambda: _kept(out / SELECTION))
        heads, told = _Heads(backbone, model, head, tensors), _shifted(progress, steps[0], sum(steps))
        learned, summary = _fine_tuned(shared, heads, winners, out, training, told, trackers)
        found = {name: tensor.cpu().numpy() for name, tensor in learned.tensors().items()} | heads.tensors()
    entries = {site: len(indices) for site, indices in winners.items() if len(indices)}
    both = {name: summary[name] + figures[name] for name in ("steps", "tokens")}
    seconds = round(summary["seconds"] + figures["seconds"], 2)
    modules = sorted({parted(site)[0] for site in entries})
    return Difference({**summary, **both, "seconds": seconds, "first": figures}, modules, entries, found)


def check_entries(wanted: int, weights: Mapping[str, Weight]) -> None:
    """Makes sure that there are as many entries as shall change: said before the first phase, not after it.

    Args:
        wanted: K.
        weights: What may change.

    Raises:
        UserError: There are not.
    """
    there = sum(weight.parameter.numel() for weight in weights.values())
    if wanted > there:
        raise UserError(
            f"{wanted} entries shall change, and the modules have {there}",
            remedy=f"give fewer, for example adapter.entries={max(1, there // 35)}",
        )


class _Heads:
    """An encoder's head, trained whole: copies in the model's place, which `Backbone.bare` puts back."""

    def __init__(self, backbone: Backbone, model: Any, head: Head | None, tensors: Mapping[str, torch.Tensor]) -> None:
        self.parameters: dict[str, torch.nn.Parameter] = {}
        if head is None or not head.trained:
            return
        for path in backbone.headed(head).modules:
            mine = copy.deepcopy(model.get_submodule(path)).requires_grad_(True)
            start = f"{PREFIX}{path}."
            mine.load_state_dict({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, mine)
            self.parameters |= {f"{start}{n}": p for n, p in mine.named_parameters()}

    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        """The trained head by PEFT's names."""
        return {name: p.detach().float().cpu().numpy() for name, p in self.parameters.items()}


@dataclass(frozen=True)
class _Shared:
    """What both phases have."""

    backbone: Backbone
    model: Any
    weights: Mapping[str, Weight]
    sequences: Sequence[Any]
    adapter: AdapterConfig
    seed: int
    size: int
    checkpoint_seconds: float


def _chosen(
    shared: _Shared, heads: _Heads, out: Path, training: TrainingConfig, progress: Progress | None
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """The first phase: the K entries, and the figures."""
    if shared.adapter.select == "gradient":
        sums, figures = _summed_gradients(shared, out, training, progress)
        return largest(parts_of(sums), shared.adapter.entries), figures
    learned, figures = _fine_tuned(shared, heads, None, out, training, progress)
    return largest(parts_of(learned.parameters), shared.adapter.entries), figures


def _fine_tuned(
    shared: _Shared,
    heads: _Heads,
    support: Mapping[str, Any] | None,
    out: Path,
    training: TrainingConfig,
    progress: Progress | None,
    trackers: Sequence[str] = (),
) -> tuple[Learned, dict[str, Any]]:
    """Fine-tuning of all entries, or of some: what was learned, no longer in the weights, and the figures."""
    with Learned(shared.weights, support) as learned:
        shared.model.train()
        figures = learn(
            shared.backbone,
            shared.model,
            {**learned.parameters, **heads.parameters},
            shared.sequences,
            out,
            training,
            shared.seed,
            trackers=trackers,
            progress=progress,
            checkpoint_seconds=shared.checkpoint_seconds,
            before_update=lambda: learned.penalty(shared.adapter.l1, shared.size),
            after_update=learned.refresh,
            fused=True,
        )
    return learned, figures


def _summed_gradients(
    shared: _Shared, out: Path, training: TrainingConfig, progress: Progress | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The sizes of the gradients at the start, summed over steps, and the figures."""
    seed, (sequences, _) = shared.seed, divided(shared.sequences, training, shared.seed)
    total, lengths = steps_of(len(sequences), training), [length_of(s) for s in sequences]
    began = last = time.monotonic()
    with Gathered(shared.weights) as gathered:
        done, tokens, spent, fewer = _resumed(out / CHECKPOINT, gathered)
        room = Room(shared.backbone.speed.part_tokens if fewer is None else fewer, fewer is not None)
        shared.model.train()
        for step, indices in schedule(lengths, training, seed, done, total):

            def begin(step: int = step) -> None:
                for weight in shared.weights.values():
                    weight.parameter.grad = None
                torch.manual_seed(derived_seed("step", seed, step))

            begin()
            loss = batch_loss(
                shared.backbone,
                [sequences[i] for i in indices],
                share=training.loss_positions,
                seed=derived_seed("positions", seed, step),
                backward=torch.Tensor.backward,
                model=shared.model,
                room=room,
                again=begin,
                step=f"step {step + 1} of {total} of the first phase",
            )
            check_loss(loss, step, total)
            gathered.absorb()
            tokens += sum(lengths[i] for i in indices)
            if progress is not None:
                progress(step + 1, total, loss)
            if time.monotonic() - last > shared.checkpoint_seconds and step + 1 < total and processes.is_main():
                _save(out / CHECKPOINT, gathered, step + 1, tokens, spent + time.monotonic() - began, room)
                last = time.monotonic()
    figures = {"steps": total, "tokens": tokens, "seconds": round(spent + time.monotonic() - began, 2)}
    return gathered.values, figures


def _save(path: Path, gathered: Gathered, step: int, tokens: int, seconds: float, room: Room) -> None:
    values = {site: tensor.cpu().numpy() for site, tensor in gathered.values.items()}
    notes = {"step": str(step), "tokens": str(tokens), "seconds": f"{seconds:.3f}"}
    if checkpoints.all_finite(values):
        checkpoints.write(path, values, {**notes, "part_tokens": str(room.tokens)} if room.less else notes)


def _resumed(path: Path, gathered: Gathered) -> tuple[int, int, float, int | None]:
    """Reads the sums of a first phase that was stopped: steps, tokens, seconds, and the tokens of a part where memory lacked."""

    def found() -> tuple[int, int, float, int | None]:
        saved = _whole(path)
        if saved is None:
            return 0, 0, 0.0, None
        tensors, notes = saved
        for site, tensor in gathered.values.items():
            tensor.copy_(torch.from_numpy(tensors[site]))
        fewer = int(notes["part_tokens"]) if "part_tokens" in notes else None
        return int(notes["step"]), int(notes["tokens"]), float(notes["seconds"]), fewer

    figures = processes.shared(found)
    for tensor in gathered.values.values() if figures[0] else ():
        processes.spread(tensor)
    return figures


def _whole(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]] | None:
    """What a file holds, or None where there is none; a damaged one is set aside."""
    if not path.exists():
        return None
    try:
        return checkpoints.read(path)
    except checkpoints.DamagedCheckpoint as error:
        checkpoints.warn_of(error, checkpoints.set_aside(path))
        return None


def _keep(path: Path, winners: Mapping[str, np.ndarray[Any, Any]], figures: Mapping[str, Any]) -> None:
    """Writes a selection, complete when it is there."""
    there = {site: indices.astype(np.int64) for site, indices in winners.items() if len(indices)}
    checkpoints.write(path, there, {"first": json.dumps(figures)})


def _kept(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Reads a selection and the first phase's figures.

    Raises:
        DamagedCheckpoint: It is not what was written.
    """
    winners, notes = checkpoints.read(path)
    return winners, json.loads(notes["first"])


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """The progress of one phase as a part of both."""
    if progress is None:
        return None
    return lambda done, _, loss: progress(before + done, total, loss)
