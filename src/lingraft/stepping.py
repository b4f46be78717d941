"""The loop of a training: batches, their loss, updates, and checkpoints from which it goes on exactly.

Everything random is a function of (seed, step): the order of the examples, dropout, the positions that take a loss. So a
checkpoint is tensors and a step number, and a training that was killed goes on to the very bytes of one that was not.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from lingraft.losses import Objective
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
    count = sum(d.terms for d in drawn)
    if count == 0:  # a batch of empty lines
        return 0.0
    total = 0.0
    for part in micro_batches([d.length for d in drawn], backbone.speed.part_tokens):
        if not any(drawn[i].terms for i in part):
            continue
        loss = objective.summed(backbone, model, [drawn[i] for i in part]) / count
        total += float(loss.detach())
        if backward is not None:
            backward(loss)
    return total


def learn(
    backbone: Backbone,
    model: Any,
    parameters: Mapping[str, torch.nn.Parameter],
    sequences: Sequence[Any],
    out: Path,
    config: TrainingConfig,
    seed: int,
    *,
    trackers: Sequence[str] = (),
    progress: Progress | None = None,
    checkpoint_seconds: float = 30.0,
    before_update: Callable[[], None] | None = None,
    after_update: Callable[[], None] | None = None,
    fused: bool = False,
) -> dict[str, Any]:
    """Trains parameters, from a checkpoint if there is one.

    Args:
        backbone: The model, what is trained on it.
        model: Of an encoder, the model with its head.
        parameters: What is trained, by the names checkpoints have.
        sequences: What to learn, all of one type.
        out: The folder of the checkpoint and the log.
        config: How it is trained.
        seed: Order, dropout and drawn positions.
        trackers: accelerate's trackers.
        progress: Called after every step.
        checkpoint_seconds: A checkpoint is due when so much time has passed, or twenty times what the last one took.
        before_update: Called when a batch's gradients are there, before they are clipped.
        after_update: Called when the parameters have changed, and when a checkpoint has been read.
        fused: Whether the optimizer takes its step without copies of the parameters' size; rounding differs a little.

    Returns:
        Steps, tokens, seconds and the last loss; where something is held out, its least loss and the step of that.

    Raises:
        LingraftError: The loss became NaN or infinite.
        UserError: There is nothing left to learn from, or nothing to hold out.
    """
    sequences, held = divided(sequences, config, seed)
    accelerator = _accelerator(trackers, out)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused or None
    )
    prepared = accelerator.prepare_optimizer(optimizer)
    total = steps_of(len(sequences), config)
    done, spent, tokens = _resume(out, parameters, optimizer)
    best = _Best(out, parameters) if held else None
    if done and after_update is not None:
        after_update()
    lengths = [length_of(s) for s in sequences]
    began = last_saved = time.monotonic()
    due, loss_value = checkpoint_seconds, float("nan")
    with (out / METRICS).open("a", encoding="utf-8") as log:
        for step, indices in schedule(lengths, config, seed, done, total):
            # Dropout draws from the global state: set from (seed, step), it needs no place in a checkpoint.
            torch.manual_seed(derived_seed("step", seed, step))
            chosen = [sequences[i] for i in indices]
            drawn = derived_seed("positions", seed, step)
            loss_value = batch_loss(
                backbone, chosen, share=config.loss_positions, seed=drawn, backward=accelerator.backward, model=model
            )
            check_loss(loss_value, step, total)
            if before_update is not None:
                before_update()
            norm = float(torch.nn.utils.clip_grad_norm_(list(parameters.values()), config.clip))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, config)
            prepared.step()
            prepared.zero_grad(set_to_none=True)
            if after_update is not None:
                after_update()
            tokens += sum(lengths[i] for i in indices)
            note = {
                "step": step + 1,
                "loss": loss_value,
                "gradient_norm": norm,
                "learning_rate": group["lr"],
                "tokens": tokens,
            }
            if best is not None and ((step + 1) % config.evaluate_every == 0 or step + 1 == total):
                note["held_out_loss"] = best.look(step + 1, _held_out_loss(backbone, model, held, config, seed))
            log.write(json.dumps(note) + "\n")
            if trackers:
                accelerator.log({k: v for k, v in note.items() if k != "step"}, step=step + 1)
            if progress is not None:
                progress(step + 1, total, loss_value)
            if time.monotonic() - last_saved > due and step + 1 < total:
                log.flush()
                saving = time.monotonic()
                _save(out, parameters, optimizer, step + 1, spent + saving - began, tokens)
                last_saved = time.monotonic()
                if checkpoint_seconds:  # 0: after every step, whatever it costs.
                    due = max(checkpoint_seconds, 20 * (last_saved - saving))
    if trackers:
        accelerator.end_training()
    kept: dict[str, Any] = {}
    if best is not None and total:
        kept["held_out"] = best.take()
        if after_update is not None:
            after_update()
    return {
        **kept,
        "steps": total,
        "tokens": tokens,
        "seconds": round(spent + time.monotonic() - began, 2),
        "loss": _last_loss(out),
    }


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


def _held_out_loss(backbone: Backbone, model: Any, held: Sequence[Any], config: TrainingConfig, seed: int) -> float:
    """The mean loss of what is held out, at the same positions every time."""
    model.eval()
    drawn = derived_seed("held out positions", seed)
    with torch.no_grad():
        loss = batch_loss(backbone, held, share=config.loss_positions, seed=drawn, model=model)
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


def check_loss(value: float, step: int, total: int) -> None:
    """Stops a training whose loss is no number.

    Raises:
        LingraftError: It is not.
    """
    if not math.isfinite(value):
        raise LingraftError(
            f"the loss became {value} at step {step + 1} of {total}",
            remedy="lower the learning rate or use float32",
        )


def _accelerator(trackers: Sequence[str], out: Path) -> Accelerator:
    if not trackers:
        return Accelerator()
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
