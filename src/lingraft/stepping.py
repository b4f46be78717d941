"""The loop of a training: batches, their loss, updates, and checkpoints from which it goes on exactly.

Everything random is a function of (seed, step): the order of the examples, dropout, the positions that take a loss. So a
checkpoint is tensors and a step number, and a training that was killed goes on to the very bytes of one that was not.

Of several processes (`processes`) each computes some of a batch's parts, and gradients and losses are added up: every process then
takes the same step. The first one alone writes.

A step changes parameters only when its loss and its gradients have been looked at, and are numbers. Where memory does not suffice,
the same step is computed again in smaller parts.
"""

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from lingraft import processes
from lingraft.backbones import Backbone
from lingraft.batching import TokenSequence, batches, derived_seed, fewer_tokens, passes, steps_of
from lingraft.causal import NEXT_TOKENS
from lingraft.checkpoints import METRICS, Best, TrainingWarning, resume, save
from lingraft.config import TrainingConfig
from lingraft.encoding import LABELLED, MASKED, LabelledSequence, MaskedSequence
from lingraft.errors import LingraftError, UserError
from lingraft.losses import Drawn, Objective
from lingraft.memory import give_back, out_of_memory
from lingraft.transduction import CORRUPTED, PAIRED, CorruptedSequence, PairSequence

Progress = Callable[[int, int, float], None]
"""Called with the steps done, the steps in all, and the loss."""


def learning_rate(step: int, total: int, config: TrainingConfig) -> float:
    """The rate at a step (counted from 0): linear warm-up, then cosine, linear or constant."""
    warm = math.ceil(config.warmup * total)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    share = (step - warm) / max(1, total - warm)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}[config.schedule]
    return config.learning_rate * factor


_OBJECTIVES: dict[type, tuple[str, Objective]] = {
    TokenSequence: ("decoder", NEXT_TOKENS),
    LabelledSequence: ("encoder", LABELLED),
    MaskedSequence: ("encoder", MASKED),
    PairSequence: ("encoder-decoder", PAIRED),
    CorruptedSequence: ("encoder-decoder", CORRUPTED),
}
"""By the type of the sequences, which models can learn from them, and how."""


def objective_of(backbone: Backbone, sequences: Sequence[Any]) -> Objective:
    """How a model learns from sequences.

    Raises:
        UserError: They are not for this kind of model.
    """
    kind, found = _OBJECTIVES[type(sequences[0])]
    if kind != backbone.kind:
        wanted, given = (f"{'a' if name == 'decoder' else 'an'} {name}" for name in (kind, backbone.kind))
        raise UserError(
            f"these sequences are for {wanted}, and {backbone.located.name} is {given}",
            remedy="read the data with the backbone that is trained",
        )
    return found


def length_of(sequence: Any) -> int:
    """A sequence's tokens."""
    return len(sequence.ids) if isinstance(sequence, TokenSequence) else sequence.length


def batch_loss(
    backbone: Backbone,
    chosen: Sequence[Any],
    *,
    share: float = 1.0,
    seed: int = 0,
    backward: Callable[[torch.Tensor], None] | None = None,
    model: Any = None,
    room: "Room | None" = None,
    again: Callable[[], object] = lambda: None,
    step: str = "a batch",
) -> float:
    """Mean cross-entropy of a batch over what takes a loss; computed in parts of near-equal length.

    With several processes each computes all of it.

    Args:
        backbone: The model, its adapter attached.
        chosen: The batch, of sequences of one type.
        share: The share of positions that take a loss, in causal language modelling.
        seed: Draws them, or the positions that are masked.
        backward: Called with every part's share of the loss; the gradients add up.
        model: Of an encoder, the model with its head; None: its language model.
        room: How many tokens go through the model at once, fewer when memory did not suffice; None: as `speed` says, always.
        again: Called before it is computed again for that reason: gradients of the first attempt are there.
        step: What it is, in messages.

    Raises:
        LingraftError: There is a room, and memory does not suffice for a single text.
    """
    objective, model = objective_of(backbone, chosen), backbone.model if model is None else model
    batches = [("", objective.draw(backbone, chosen, share, seed))]
    if room is None:
        return float(_mean_losses(backbone, model, objective, batches, backward)[0])
    while (
        found := _tried(backbone, lambda: _mean_losses(backbone, model, objective, batches, backward, room))
    ) is None:
        again()
        room.shrink(backbone, batches, step)
    return float(found[0])


def _mean_losses(
    backbone: Backbone,
    model: Any,
    objective: Objective,
    batches: Sequence[tuple[str, Sequence[Drawn]]],
    backward: Callable[[torch.Tensor], None] | None = None,
    room: "Room | None" = None,
    world: int = 1,
) -> torch.Tensor:
    """The mean loss of every batch over its own terms, all of them computed in the same parts.

    Args:
        backbone: The model.
        model: Of an encoder, the model with its head.
        objective: How the model learns from the sequences.
        batches: By the names of the adapters on the model what each one's batch is; no name: that of the only adapter.
        backward: Called with every part's share of all losses, of which each reaches its own adapter alone.
        room: How many tokens go through the model at once; None: as `speed` says.
        world: The processes that the parts are divided among. With more than one, this process's share of the losses.
    """
    counts = [sum(d.terms for d in drawn) for _, drawn in batches]
    found = torch.zeros(len(batches), device=backbone.device)
    every = _learned_from(batches)
    lengths = [d.length for _, d in every]
    room = room or Room(backbone.speed.part_tokens)
    level = world > 1 and backbone.sharded
    parts = passes(lengths, room.tokens, packed=_packs(backbone, batches), world=world, level=level)
    for one in parts[processes.rank() if world > 1 else 0]:
        part = list(one.places)
        if len(batches) > 1:
            part.sort(key=lambda place: every[place][0])  # An adapter's rows stand side by side.
        owners, here = [every[i][0] for i in part], [every[i][1] for i in part]
        with _lanes_told(backbone, [name for name, _ in batches], owners, here):
            losses = objective.summed(backbone, model, here)
            if not one.counts:
                losses = losses * 0
            if len(batches) == 1:
                loss = losses.sum() / counts[0]
                found[0] += loss.detach()
            else:
                shares = losses / torch.tensor([counts[o] for o in owners], device=losses.device)
                loss = shares.sum()
                for number in set(owners):
                    first, count = owners.index(number), owners.count(number)
                    found[number] += shares.detach()[first : first + count].sum()
            if backward is not None:
                backward(loss)
    return found


def _learned_from(batches: Sequence[tuple[str, Sequence[Drawn]]]) -> list[tuple[int, Drawn]]:
    """The sequences of batches, with the batch's number; an empty line has nothing to be learned from."""
    return [(number, d) for number, (_, drawn) in enumerate(batches) for d in drawn if d.terms]


def _packs(backbone: Backbone, batches: Sequence[tuple[str, Sequence[Drawn]]]) -> bool:
    return backbone.packs and not batches[0][0]


@dataclass
class Room:
    """How many padded tokens go through the model at once, and whether that was more before memory ran out."""

    tokens: int
    less: bool = False

    def shrink(
        self, backbone: Backbone, batches: Sequence[tuple[str, Sequence[Drawn]]], step: str, world: int = 1
    ) -> None:
        """Halves it, after memory did not suffice for a step that so many processes compute together.

        Raises:
            LingraftError: Its parts are single texts already.
        """
        lengths = [d.length for _, d in _learned_from(batches)]
        fewer = fewer_tokens(lengths, self.tokens, packed=_packs(backbone, batches), world=world)
        if fewer is None:
            raise LingraftError(
                f"there is not enough memory for {step}: a single text of {max(lengths, default=0)} tokens does not fit",
                remedy="lower training.max_length (plain text: reference.segment_tokens), set speed.gradient_checkpointing=true, "
                "or use a device with more memory",
            )
        if not self.less and processes.is_main():
            warnings.warn(
                f"memory did not suffice for {step}: it is computed again in parts of {fewer} tokens instead of {self.tokens} "
                "(speed.part_tokens); the batch stays what it is",
                TrainingWarning,
                stacklevel=2,
            )
        self.tokens, self.less = fewer, True
        give_back()


def _tried(backbone: Backbone, compute: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """What is computed, or None where memory did not suffice.

    Raises:
        LingraftError: It did not, and the other processes wait within the same pass.
    """
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if backbone.sharded:
            raise LingraftError(
                "there is not enough memory for a part of a batch, and with a sharded base it cannot be computed again",
                remedy="lower speed.part_tokens and run the same command again: it goes on from the last checkpoint",
            ) from error
    # Not within the except: the error holds on to all that was computed.
    return None


def _lanes_told(backbone: Backbone, names: Sequence[str], owners: Sequence[int], part: Sequence[Drawn]) -> Any:
    """Tells the layers, until the backward pass is over, which rows of a part belong to which adapter."""
    if not names[0]:
        return nullcontext()
    counts = [0] * len(names)
    for owner, drawn in zip(owners, part, strict=True):
        counts[owner] += _rows_of(drawn)
    return backbone.rows.told(lanes=tuple((n, count) for n, count in zip(names, counts, strict=True) if count))


def _rows_of(drawn: Drawn) -> int:
    """The rows of a batch that a sequence takes."""
    return len(drawn.item.rows) if isinstance(drawn.item, LabelledSequence) else 1


class Learner:
    """A training on its way: what is learned, from what, how far it is, and where its checkpoint and log are.

    One that was stopped stands where its checkpoint does. What changes with a step is its parameters, their optimizer, `done` and
    its files.

    Args:
        parameters: What is trained, by the names checkpoints have.
        sequences: What to learn, all of one type.
        out: The folder of the checkpoint and the log.
        config: How it is trained.
        seed: Order, dropout and drawn positions.
        lane: The adapter's name on a model that has several; empty: it has one.
        trackers: accelerate's trackers.
        progress: Called after every step.
        checkpoint_seconds: A checkpoint is due when so much time has passed, or twenty times what the last one took.
        before_update: Called when a batch's gradients are there, before they are clipped.
        after_update: Called when the parameters have changed, and when a checkpoint has been read.
        fused: Whether the optimizer takes its step without copies of the parameters' size; rounding differs a little.

    Attributes:
        done: The steps that were taken.
        total: The steps in all.
        part_tokens: How many tokens go through the model at once, where memory did not suffice for more; else None.

    Raises:
        UserError: There is nothing left to learn from, or nothing to hold out.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        sequences: Sequence[Any],
        out: Path,
        config: TrainingConfig,
        seed: int,
        *,
        lane: str = "",
        trackers: Sequence[str] = (),
        progress: Progress | None = None,
        checkpoint_seconds: float = 30.0,
        before_update: Callable[[], None] | None = None,
        after_update: Callable[[], None] | None = None,
        fused: bool = False,
    ) -> None:
        self.parameters, self.out, self.config, self.seed, self.lane = parameters, out, config, seed, lane
        self.sequences, self.held = divided(sequences, config, seed)
        out_of = held_out(len(sequences), config, seed)
        self._numbers = [n for n in range(len(sequences)) if n not in out_of]
        self._tracking = _accelerator(trackers, out) if processes.is_main() else None
        self._progress, self._checkpoint_seconds = progress, checkpoint_seconds
        self._before, self._after = before_update, after_update
        # On a GPU one kernel for many tensors.
        fused = fused or all(p.is_cuda for p in parameters.values())
        self.optimizer = torch.optim.AdamW(
            parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused or None
        )
        self.total = steps_of(len(self.sequences), config)
        self.done, self._spent, self._tokens, self.part_tokens = resume(out, parameters, self.optimizer)
        self._best = Best(out, parameters) if self.held else None
        if self.done and after_update is not None:
            after_update()
        self._lengths = [length_of(s) for s in self.sequences]
        self._schedule = schedule(self._lengths, config, seed, self.done, self.total)
        self._began = self._saved = time.monotonic()
        self._kept = self.done
        self._due = checkpoint_seconds
        self._batch: list[int] = []
        self._decode: Callable[[Sequence[int]], str] = str
        self._log = (out / METRICS).open("a", encoding="utf-8")

    def close(self) -> None:
        """Lets go of the log."""
        self._log.close()

    def draw(self, backbone: Backbone, objective: Objective) -> list[Drawn]:
        """The next step's batch."""
        self._decode = backbone.decode
        step, self._batch = next(self._schedule)
        chosen = [self.sequences[i] for i in self._batch]
        return objective.draw(backbone, chosen, self.config.loss_positions, derived_seed("positions", self.seed, step))

    def clipped(self) -> torch.Tensor:
        """Clips the gradients, and gives the norm that they had."""
        if self._before is not None:
            self._before()
        return torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.clip)

    def take(self, loss: float, norm: float, held_out_loss: Callable[["Learner"], float]) -> None:
        """Takes the step, logs it, and keeps what is to be kept of it.

        Args:
            loss: The step's loss.
            norm: The norm of its gradients.
            held_out_loss: Computes the loss of what is held out.

        Raises:
            LingraftError: The loss or its gradients are NaN or infinite. The parameters are those of the step before, and a
                checkpoint of them is there.
        """
        for value, what in ((loss, "loss"), (norm, "gradients' norm")):
            if not math.isfinite(value):
                self._give_up()
                check_loss(value, self.done, self.total, what, self._batch_said(), kept=self._kept)
        self._update()
        self.done += 1
        self._tokens += sum(self._lengths[i] for i in self._batch)
        note = {
            "step": self.done,
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": learning_rate(self.done - 1, self.total, self.config),
            "tokens": self._tokens,
        }
        if self.part_tokens is not None:
            note["part_tokens"] = self.part_tokens
        last = self.done == self.total
        if self._best is not None and (self.done % self.config.evaluate_every == 0 or last):
            note["held_out_loss"] = self._best.look(self.done, held_out_loss(self))
        if processes.is_main():
            self._log.write(json.dumps(note) + "\n")
        if self._tracking is not None:
            self._tracking.log({k: v for k, v in note.items() if k != "step"}, step=self.done)
        if self._progress is not None and processes.is_main():
            self._progress(self.done, self.total, loss)
        if time.monotonic() - self._saved > self._due and not last:
            self._save()

    def _update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, self.total, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._after is not None:
            self._after()

    def _give_up(self) -> None:
        """Keeps where the training stands before a step that cannot be taken."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.done > self._kept:
            self._save()

    def _batch_said(self) -> str:
        """Which sequences the batch has, so that whoever prepared them finds them."""
        shown = [f"{self._numbers[i]}{_begins(self._decode, self.sequences[i])}" for i in self._batch[:_SHOWN]]
        more = len(self._batch) - len(shown)
        return f"sequences (counted from 0) {', '.join(shown)}" + (f" and {more} more" if more else "")

    def _save(self) -> None:
        if not processes.is_main():
            return
        self._log.flush()
        os.fsync(self._log.fileno())
        saving = time.monotonic()
        spent = self._spent + saving - self._began
        if save(self.out, self.parameters, self.optimizer, self.done, spent, self._tokens, self.part_tokens):
            self._kept = self.done
        self._saved = time.monotonic()
        if self._checkpoint_seconds:  # 0: after every step, whatever it costs.
            self._due = max(self._checkpoint_seconds, 20 * (self._saved - saving))

    def finish(self) -> dict[str, Any]:
        """Makes the parameters what is to be kept.

        Returns:
            Steps, tokens, seconds and the last loss; where something is held out, its least loss and the step of that; where memory
            did not suffice, the tokens of a part in the end.

        Raises:
            LingraftError: The loss of what is held out was never a number.
        """
        self.close()
        if self._tracking is not None:
            # Not `end_training`, which takes the processes' connection away.
            for tracker in self._tracking.trackers:
                tracker.finish()
        kept: dict[str, Any] = {}
        if self._best is not None and self.total:
            kept["held_out"] = self._best.take()
            if self._after is not None:
                self._after()
        if self.part_tokens is not None:
            kept["part_tokens"] = self.part_tokens
        seconds = round(self._spent + time.monotonic() - self._began, 2)
        return {
            **kept,
            "steps": self.total,
            "tokens": self._tokens,
            "seconds": seconds,
            "loss": processes.shared(lambda: _last_loss(self.out)),
        }


def learn(
    backbone: Backbone,
    model: Any,
    parameters: Mapping[str, torch.nn.Parameter],
    sequences: Sequence[Any],
    out: Path,
    config: TrainingConfig,
    seed: int,
    **watched: Any,
) -> dict[str, Any]:
    """Trains parameters, from a checkpoint if there is one.

    Args:
        backbone: The model, what is trained on it.
        model: Of an encoder, the model with its head.
        parameters: As for `Learner`, like all that follow.
        sequences: What to learn.
        out: The folder.
        config: How it is trained.
        seed: Order, dropout and drawn positions.
        **watched: The other arguments of `Learner`.

    Returns:
        What `Learner.finish` gives.

    Raises:
        LingraftError: The loss became NaN or infinite.
        UserError: There is nothing left to learn from, or nothing to hold out.
    """
    learner = Learner(parameters, sequences, out, config, seed, **watched)
    (outcome,) = learn_together(backbone, model, [learner])
    if isinstance(outcome, LingraftError):
        raise outcome
    return outcome


def learn_together(backbone: Backbone, model: Any, learners: Sequence[Learner]) -> list[dict[str, Any] | LingraftError]:
    """Takes trainings to their ends, a step of each in every pass through the model; each one's steps are its own.

    Their losses are of disjoint rows and their parameters disjoint, so that each one's gradients are those it has alone, but for
    rounding: products have other numbers of rows. One that fails or ends leaves the others going.

    Args:
        backbone: The model, with all that is trained on it.
        model: Of an encoder, the model with its head.
        learners: The trainings, their sequences of one type.

    Returns:
        For each what `Learner.finish` gives, or why it failed.
    """
    objective = objective_of(backbone, learners[0].sequences)
    outcomes: dict[int, dict[str, Any] | LingraftError] = {}

    asked = backbone.speed.part_tokens
    tokens = min([asked, *(one.part_tokens for one in learners if one.part_tokens is not None)])
    room = Room(tokens, tokens < asked)

    def held_out_loss(learner: Learner) -> float:
        return _held_out_loss(backbone, model, objective, learner, room)

    try:
        while True:
            for number, learner in enumerate(learners):
                if number not in outcomes and learner.done >= learner.total:
                    outcomes[number] = _finished(learner)
            going = [n for n in range(len(learners)) if n not in outcomes]
            if not going:
                return [outcomes[n] for n in range(len(learners))]
            mine = [learners[n] for n in going]
            batches = [(learner.lane, learner.draw(backbone, objective)) for learner in mine]
            figures = _step(backbone, model, objective, mine, batches, room)
            for n, loss, norm in zip(going, *figures, strict=True):
                learners[n].part_tokens = room.tokens if room.less else None
                try:
                    learners[n].take(loss, norm, held_out_loss)
                except LingraftError as error:
                    outcomes[n] = error
    finally:
        for learner in learners:
            learner.close()


def _step(
    backbone: Backbone,
    model: Any,
    objective: Objective,
    learners: Sequence[Learner],
    batches: Sequence[tuple[str, Sequence[Drawn]]],
    room: Room,
) -> tuple[list[float], list[float]]:
    """Makes the gradients of a step, clipped, and gives every training's loss and the norm of its gradients.

    Raises:
        LingraftError: Memory does not suffice for a single text.
    """
    first, world = learners[0], processes.world()
    named = f"step {first.done + 1} of {first.total}"
    while True:
        # What draws from the global state is set from (seed, step), and needs no place in a checkpoint. Processes read other texts.
        own = [processes.rank()] if processes.rank() else []
        torch.manual_seed(derived_seed("step", first.seed, first.done, *own))
        losses = _tried(
            backbone,
            lambda: _mean_losses(backbone, model, objective, batches, torch.Tensor.backward, room, world),
        )
        short = losses is None
        if world == 1 and short:
            told = None
        else:
            losses = torch.zeros(len(batches), device=backbone.device) if losses is None else losses
            losses, told = _added(learners, losses, short)
        if losses is not None:
            norms = torch.stack([learner.clipped().to(losses.device, losses.dtype) for learner in learners])
            # One look at the device a step.
            figures = torch.cat([losses, norms, *([] if told is None else [told])]).tolist()
            short = told is not None and figures[-1] > 0
        if not short:
            count = len(learners)
            if told is not None:
                _forget(learners, figures[2 * count : -1])
            return figures[:count], figures[count : 2 * count]
        for learner in learners:
            learner.optimizer.zero_grad(set_to_none=True)
        room.shrink(backbone, batches, named, world)


def _added(learners: Sequence[Learner], losses: torch.Tensor, short: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Adds up gradients and losses over the processes, all at once.

    Args:
        learners: What is trained.
        losses: This process's shares.
        short: Whether its memory did not suffice.

    Returns:
        The losses; and for every parameter in how many processes it has a gradient, and behind them how many had not enough memory.
        That is None in a process that is alone.
    """
    if processes.world() == 1:
        return losses, None
    parameters = [p for learner in learners for p in learner.parameters.values()]
    there = [float(p.grad is not None) for p in parameters]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    told = torch.tensor([*there, float(short)], device=losses.device)
    flat = torch.cat([*(g.reshape(-1).to(losses.device, torch.float32) for g in gradients), losses, told])
    processes.add(flat)
    *sums, losses, told = flat.split([*(p.numel() for p in parameters), len(losses), len(told)])
    for parameter, total in zip(parameters, sums, strict=True):
        parameter.grad = total.view_as(parameter).to(parameter.device, parameter.dtype)
    return losses, told


def _forget(learners: Sequence[Learner], counts: Sequence[float]) -> None:
    """Takes gradients away that no process had: such a parameter is left as it is, as an expert that no token was sent to."""
    parameters = [p for learner in learners for p in learner.parameters.values()]
    for parameter, count in zip(parameters, counts, strict=True):
        if not count:
            parameter.grad = None


def _finished(learner: Learner) -> dict[str, Any] | LingraftError:
    try:
        return learner.finish()
    except LingraftError as error:
        return error


def divided(sequences: Sequence[Any], config: TrainingConfig, seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """What is learned from, and what is held out: of parallel texts the same places in every language.

    Raises:
        UserError: One of them would be empty.
    """
    out = held_out(len(sequences), config, seed)
    if not out:
        return sequences, ()
    return [s for n, s in enumerate(sequences) if n not in out], [sequences[n] for n in sorted(out)]


def held_out(count: int, config: TrainingConfig, seed: int) -> set[int]:
    """The places of what is held out of so many sequences.

    Raises:
        UserError: Nothing would be left.
    """
    if not config.held_out:
        return set()
    if count < 2:
        raise UserError("of one sequence nothing can be held out", remedy="use training.held_out=0, or more text")
    rng = np.random.default_rng(derived_seed("held out", seed))
    return set(rng.permutation(count)[: max(1, round(config.held_out * count))].tolist())


def _held_out_loss(backbone: Backbone, model: Any, objective: Objective, learner: Learner, room: Room) -> float:
    """The mean loss of what is held out, at the same positions every time."""
    seed = derived_seed("held out positions", learner.seed)
    drawn = [(learner.lane, objective.draw(backbone, learner.held, learner.config.loss_positions, seed))]
    world = processes.world()

    def compute() -> torch.Tensor:
        with torch.no_grad():
            return _mean_losses(backbone, model, objective, drawn, None, room, world)

    model.eval()
    try:
        while True:
            found = _tried(backbone, compute)
            told = torch.zeros(2, device=backbone.device)
            told[0 if found is not None else 1] = 1.0 if found is None else found[0]
            processes.add(told)
            loss, short = told.tolist()
            if not short:
                return loss
            room.shrink(backbone, drawn, "the loss of what is held out", world)
    finally:
        model.train()


_SHOWN = 8
"""How many sequences of a batch a message names."""
_FIRST = 16
"""How many tokens of each it shows."""


def _begins(decode: Callable[[Sequence[int]], str], sequence: Any) -> str:
    """How a sequence begins, in quotes; nothing where that cannot be shown."""
    ids = getattr(sequence, "ids", None) or getattr(sequence, "source", None)
    if ids is None and getattr(sequence, "rows", None):
        ids = sequence.rows[0].ids
    if not isinstance(ids, tuple):
        return ""
    text = " ".join(decode(ids[:_FIRST]).split())
    return f" '{text}{'…' if len(ids) > _FIRST else ''}'"


def check_loss(
    value: float, step: int, total: int, what: str = "loss", batch: str = "", *, kept: int | None = None
) -> None:
    """Stops a training whose loss, or gradient, is no number.

    Args:
        value: The number.
        step: The steps that were taken before.
        total: The steps in all.
        what: What it is.
        batch: What the step's batch is.
        kept: The step of which there is a checkpoint; None: that is not known.

    Raises:
        LingraftError: It is not.
    """
    if math.isfinite(value):
        return
    there = f"the checkpoint of step {kept} is kept. " if kept else ""
    raise LingraftError(
        f"the {what} became {value} at step {step + 1} of {total}" + (f"; its batch: {batch}" if batch else ""),
        remedy=f"{there}Look at these texts; lower the learning rate or use float32, which begins anew. The same command again "
        "stops at the same step: its batch, dropout and drawn positions are functions of the seed and the step",
    )


def _accelerator(trackers: Sequence[str], out: Path) -> Accelerator | None:
    if not trackers:
        return None
    try:
        accelerator = Accelerator(log_with=list(trackers), project_dir=str(out / "trackers"))
        accelerator.init_trackers("lingraft")
    except (ValueError, ImportError) as error:
        raise UserError(
            f"a tracker cannot be started: {error}", remedy="install its package, or leave trackers out"
        ) from error
    return accelerator


def schedule(
    lengths: Sequence[int], config: TrainingConfig, seed: int, done: int, total: int
) -> Iterator[tuple[int, list[int]]]:
    """Step numbers and batches from `done` on."""
    per_epoch = math.ceil(len(lengths) / config.batch_size)
    step = done
    while step < total:
        epoch, offset = divmod(step, per_epoch)
        for indices in batches(lengths, config, seed, epoch)[offset:]:
            if step >= total:
                return
            yield step, indices
            step += 1


def _last_loss(out: Path) -> float | None:
    """Mean loss of the last tenth of the steps, from the log: one batch alone says little."""
    lines = (out / METRICS).read_text(encoding="utf-8").splitlines()
    if not lines:
        return None
    tail = [json.loads(line)["loss"] for line in lines[-max(1, len(lines) // 10) :]]
    return sum(tail) / len(tail)
