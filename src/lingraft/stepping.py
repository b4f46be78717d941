"""The loop of a training: batches, their loss, updates, and checkpoints from which it goes on exactly.

Everything random is a function of (seed, step): the order of the examples, dropout, the positions that take a loss. So a
checkpoint is tensors and a step number, and a training that was killed goes on to the very bytes of one that was not.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator

from lingraft.backbones import Backbone
from lingraft.batching import TokenSequence, batches, derived_seed, micro_batches, steps_of
from lingraft.causal import NEXT_TOKENS
from lingraft.config import TrainingConfig
from lingraft.encoding import LABELLED, MASKED, LabelledSequence, MaskedSequence
from lingraft.errors import LingraftError, UserError
from lingraft.losses import Drawn, Objective
from lingraft.tensors import TensorFile, write_all
from lingraft.transduction import CORRUPTED, PAIRED, CorruptedSequence, PairSequence

if TYPE_CHECKING:
    from torch.optim import Optimizer

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
BEST = "best.safetensors"
"""The parameters at the least loss of what is held out, so far; whoever writes what was learned removes it."""
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
        raise UserError(f"these sequences are for {wanted}, and {backbone.located.name} is {given}")
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
) -> float:
    """Mean cross-entropy of a batch over what takes a loss; computed in parts of near-equal length.

    Args:
        backbone: The model, its adapter attached.
        chosen: The batch, of sequences of one type.
        share: The share of positions that take a loss, in causal language modelling.
        seed: Draws them, or the positions that are masked.
        backward: Called with every part's share of the loss; the gradients add up.
        model: Of an encoder, the model with its head; None: its language model.
    """
    objective, model = objective_of(backbone, chosen), backbone.model if model is None else model
    drawn = objective.draw(backbone, chosen, share, seed)
    return float(_mean_losses(backbone, model, objective, [("", drawn)], backward)[0])


def _mean_losses(
    backbone: Backbone,
    model: Any,
    objective: Objective,
    batches: Sequence[tuple[str, Sequence[Drawn]]],
    backward: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """The mean loss of every batch over its own terms, all of them computed in the same parts.

    Args:
        backbone: The model.
        model: Of an encoder, the model with its head.
        objective: How the model learns from the sequences.
        batches: By the names of the adapters on the model what each one's batch is; no name: that of the only adapter.
        backward: Called with every part's share of all losses, of which each reaches its own adapter alone.
    """
    counts = [sum(d.terms for d in drawn) for _, drawn in batches]
    found = torch.zeros(len(batches), device=backbone.device)
    # An empty line has nothing to be learned from.
    every = [(number, d) for number, (_, drawn) in enumerate(batches) for d in drawn if d.terms]
    packed = backbone.packs and not batches[0][0]
    for part in micro_batches([d.length for _, d in every], backbone.speed.part_tokens, packed=packed):
        if len(batches) > 1:
            part.sort(key=lambda place: every[place][0])  # An adapter's rows stand side by side.
        owners, here = [every[i][0] for i in part], [every[i][1] for i in part]
        with _lanes_told(backbone, [name for name, _ in batches], owners, here):
            losses = objective.summed(backbone, model, here)
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
        self._tracking = _accelerator(trackers, out)
        self._progress, self._checkpoint_seconds = progress, checkpoint_seconds
        self._before, self._after = before_update, after_update
        # On a GPU one kernel for many tensors.
        fused = fused or all(p.is_cuda for p in parameters.values())
        self.optimizer = torch.optim.AdamW(
            parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused or None
        )
        self.total = steps_of(len(self.sequences), config)
        self.done, self._spent, self._tokens = _resume(out, parameters, self.optimizer)
        self._best = _Best(out, parameters) if self.held else None
        if self.done and after_update is not None:
            after_update()
        self._lengths = [length_of(s) for s in self.sequences]
        self._schedule = schedule(self._lengths, config, seed, self.done, self.total)
        self._began = self._saved = time.monotonic()
        self._due = checkpoint_seconds
        self._batch: list[int] = []
        self._log = (out / METRICS).open("a", encoding="utf-8")

    def close(self) -> None:
        """Lets go of the log."""
        self._log.close()

    def draw(self, backbone: Backbone, objective: Objective) -> list[Drawn]:
        """The next step's batch."""
        step, self._batch = next(self._schedule)
        chosen = [self.sequences[i] for i in self._batch]
        return objective.draw(backbone, chosen, self.config.loss_positions, derived_seed("positions", self.seed, step))

    def update(self) -> torch.Tensor:
        """Changes the parameters by their gradients, and gives the norm that these had."""
        if self._before is not None:
            self._before()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, self.total, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._after is not None:
            self._after()
        return norm

    def note(self, loss: float, norm: float, held_out_loss: Callable[["Learner"], float]) -> None:
        """Counts the step that was taken, logs it, and keeps what is to be kept of it.

        Args:
            loss: The step's loss.
            norm: The norm of its gradients.
            held_out_loss: Computes the loss of what is held out.

        Raises:
            LingraftError: The loss or its gradients became NaN or infinite.
        """
        check_loss(loss, self.done, self.total)
        check_loss(norm, self.done, self.total, "gradients' norm")
        self.done += 1
        self._tokens += sum(self._lengths[i] for i in self._batch)
        note = {
            "step": self.done,
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": learning_rate(self.done - 1, self.total, self.config),
            "tokens": self._tokens,
        }
        last = self.done == self.total
        if self._best is not None and (self.done % self.config.evaluate_every == 0 or last):
            note["held_out_loss"] = self._best.look(self.done, held_out_loss(self))
        self._log.write(json.dumps(note) + "\n")
        if self._tracking is not None:
            self._tracking.log({k: v for k, v in note.items() if k != "step"}, step=self.done)
        if self._progress is not None:
            self._progress(self.done, self.total, loss)
        if time.monotonic() - self._saved > self._due and not last:
            self._save()

    def _save(self) -> None:
        self._log.flush()
        saving = time.monotonic()
        spent = self._spent + saving - self._began
        _save(self.out, self.parameters, self.optimizer, self.done, spent, self._tokens)
        self._saved = time.monotonic()
        if self._checkpoint_seconds:  # 0: after every step, whatever it costs.
            self._due = max(self._checkpoint_seconds, 20 * (self._saved - saving))

    def finish(self) -> dict[str, Any]:
        """Makes the parameters what is to be kept.

        Returns:
            Steps, tokens, seconds and the last loss; where something is held out, its least loss and the step of that.

        Raises:
            LingraftError: The loss of what is held out was never a number.
        """
        self.close()
        if self._tracking is not None:
            self._tracking.end_training()
        kept: dict[str, Any] = {}
        if self._best is not None and self.total:
            kept["held_out"] = self._best.take()
            if self._after is not None:
                self._after()
        seconds = round(self._spent + time.monotonic() - self._began, 2)
        return {
            **kept,
            "steps": self.total,
            "tokens": self._tokens,
            "seconds": seconds,
            "loss": _last_loss(self.out),
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

    def held_out_loss(learner: Learner) -> float:
        return _held_out_loss(backbone, model, objective, learner)

    try:
        while True:
            for number, learner in enumerate(learners):
                if number not in outcomes and learner.done >= learner.total:
                    outcomes[number] = _finished(learner)
            going = [n for n in range(len(learners)) if n not in outcomes]
            if not going:
                return [outcomes[n] for n in range(len(learners))]
            mine = [learners[n] for n in going]
            # What draws from the global state is set from (seed, step), and needs no place in a checkpoint.
            torch.manual_seed(derived_seed("step", mine[0].seed, mine[0].done))
            batches = [(learner.lane, learner.draw(backbone, objective)) for learner in mine]
            losses = _mean_losses(backbone, model, objective, batches, torch.Tensor.backward)
            norms = torch.stack([learner.update().to(losses.device, losses.dtype) for learner in mine])
            # One look at the device a step.
            for n, loss, norm in zip(going, *torch.stack([losses, norms]).tolist(), strict=True):
                try:
                    learners[n].note(loss, norm, held_out_loss)
                except LingraftError as error:
                    outcomes[n] = error
    finally:
        for learner in learners:
            learner.close()


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
    if not config.held_out:
        return sequences, ()
    if len(sequences) < 2:
        raise UserError("of one sequence nothing can be held out", remedy="use training.held_out=0, or more text")
    count = max(1, round(config.held_out * len(sequences)))
    rng = np.random.default_rng(derived_seed("held out", seed))
    out = set(rng.permutation(len(sequences))[:count].tolist())
    return [s for n, s in enumerate(sequences) if n not in out], [sequences[n] for n in sorted(out)]


def _held_out_loss(backbone: Backbone, model: Any, objective: Objective, learner: Learner) -> float:
    """The mean loss of what is held out, at the same positions every time."""
    model.eval()
    seed = derived_seed("held out positions", learner.seed)
    drawn = objective.draw(backbone, learner.held, learner.config.loss_positions, seed)
    with torch.no_grad():
        loss = float(_mean_losses(backbone, model, objective, [(learner.lane, drawn)])[0])
    model.train()
    return loss


class _Best:
    """The parameters at the least loss of what is held out, on disk: of a training that goes on, those of before."""

    def __init__(self, out: Path, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.path, self.parameters = out / BEST, parameters
        self.path.with_name(f".{BEST}").unlink(missing_ok=True)
        if not (out / CHECKPOINT).exists():
            self.path.unlink(missing_ok=True)

    def look(self, step: int, loss: float) -> float:
        """Keeps the parameters where the loss is less than ever; gives it back."""
        if math.isfinite(loss) and (not self.path.exists() or loss < self._figures()["loss"]):
            partial = self.path.with_name(f".{BEST}")
            tensors = {name: p.detach().cpu().numpy() for name, p in self.parameters.items()}
            write_all(partial, tensors, {"loss": repr(loss), "step": str(step)})
            partial.replace(self.path)
        return loss

    def _figures(self) -> dict[str, Any]:
        found = TensorFile(self.path).metadata
        return {"loss": float(found["loss"]), "step": int(found["step"])}

    def take(self) -> dict[str, Any]:
        """Makes the parameters those that were kept, and says of which step and loss they are.

        Raises:
            LingraftError: The loss was never a number.
        """
        if not self.path.exists():
            raise LingraftError("the loss of what is held out was never a number", remedy="lower the learning rate")
        saved, figures = TensorFile(self.path), self._figures()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.from_numpy(np.array(saved.read(name))).to(parameter.device))
        return figures


def check_loss(value: float, step: int, total: int, what: str = "loss") -> None:
    """Stops a training whose loss, or gradient, is no number.

    Raises:
        LingraftError: It is not.
    """
    if not math.isfinite(value):
        raise LingraftError(
            f"the {what} became {value} at step {step + 1} of {total}",
            remedy="lower the learning rate or use float32",
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


def _save(
    out: Path,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: "Optimizer",
    step: int,
    seconds: float,
    tokens: int,
) -> None:
    if not optimizer.state:  # nothing has been learned yet
        return
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach().cpu().numpy()
        # A parameter that no gradient has reached yet, such as an expert no token was sent to, has no state.
        if state := optimizer.state.get(parameter):
            tensors[f"mean/{name}"] = state["exp_avg"].cpu().numpy()
            tensors[f"variance/{name}"] = state["exp_avg_sq"].cpu().numpy()
            tensors[f"updates/{name}"] = state["step"].cpu().numpy().reshape(1)
    partial = out / f".{CHECKPOINT}"
    write_all(partial, tensors, {"step": str(step), "seconds": f"{seconds:.3f}", "tokens": str(tokens)})
    partial.replace(out / CHECKPOINT)


def _resume(out: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: "Optimizer") -> tuple[int, float, int]:
    """Loads the last checkpoint, if there is one; steps that were logged after it are taken out of the log."""
    (out / f".{CHECKPOINT}").unlink(missing_ok=True)
    if not (out / CHECKPOINT).exists():
        (out / METRICS).unlink(missing_ok=True)
        return 0, 0.0, 0
    saved = TensorFile(out / CHECKPOINT)
    step = int(saved.metadata["step"])
    with torch.no_grad():
        for name, parameter in parameters.items():

            def read(part: str, name: str = name) -> torch.Tensor:
                return torch.from_numpy(np.array(saved.read(f"{part}/{name}")))

            parameter.copy_(read("parameter").to(parameter.device))
            if f"mean/{name}" in saved.names:
                steps = read("updates")[0]
                optimizer.state[parameter] = {
                    "step": steps.to(parameter.device) if optimizer.param_groups[0]["fused"] else steps,
                    "exp_avg": read("mean").to(parameter.device),
                    "exp_avg_sq": read("variance").to(parameter.device),
                }
    lines = (out / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)[:step]
    (out / METRICS).write_text("".join(lines), encoding="utf-8")
    return step, float(saved.metadata["seconds"]), int(saved.metadata["tokens"])


def _last_loss(out: Path) -> float | None:
    """Mean loss of the last tenth of the steps, from the log: one batch alone says little."""
    lines = (out / METRICS).read_text(encoding="utf-8").splitlines()
    if not lines:
        return None
    tail = [json.loads(line)["loss"] for line in lines[-max(1, len(lines) // 10) :]]
    return sum(tail) / len(tail)
