"""Training an adapter: accelerate and one short loop with our own loss, batches and exact resume.

Everything random is a function of (seed, step): the order of the examples, dropout, the positions that take a loss. So a
checkpoint is tensors and a step number, and a training that was killed goes on to the very bytes of one that was not.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import get_peft_model_state_dict

from lingraft import __version__
from lingraft.adapter import Adapter
from lingraft.backbones import Backbone, environment, peft_config
from lingraft.batching import TokenSequence, batches, derived_seed, loss_positions, micro_batches, steps_of
from lingraft.config import AdapterConfig, TrainingConfig
from lingraft.encoding import LABELLED, MASKED, LabelledSequence, MaskedSequence
from lingraft.errors import AdapterError, LingraftError, UserError
from lingraft.fusion.attaching import fusing, put_on
from lingraft.fusion.stages import SecondStage
from lingraft.heads import Head
from lingraft.layouts.common import CONFIG, SIDECAR, WEIGHTS
from lingraft.losses import Drawn, Objective, summed_cross_entropy
from lingraft.store import write_json
from lingraft.structures import fresh
from lingraft.tensors import TensorFile, write_all
from lingraft.transduction import CORRUPTED, PAIRED, CorruptedSequence, PairSequence

if TYPE_CHECKING:
    from torch.optim import Optimizer

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
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


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of tensors in float32, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _next_tokens(backbone: Backbone, chosen: Sequence[TokenSequence], share: float, seed: int) -> list[Drawn]:
    """With every sequence the positions whose next token takes a loss."""
    positions = loss_positions(chosen, share, seed)
    return [Drawn((s, where), len(where), len(s.ids)) for s, where in zip(chosen, positions, strict=True)]


def _summed_next_tokens(backbone: Backbone, model: Any, part: Sequence[Drawn]) -> torch.Tensor:
    """Summed cross-entropy over the positions given; padding stands on the right, where a causal model does not look."""
    chosen, positions = [d.item[0] for d in part], [d.item[1] for d in part]
    width = max(len(s.ids) for s in chosen)
    ids = torch.full((len(chosen), width), backbone.pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for row, sequence in enumerate(chosen):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        attention[row, : len(sequence.ids)] = 1
    ids = ids.to(backbone.device)
    answers = [len(s.ids) - s.start for s in chosen]
    beside = fusing(backbone, [s.source for s in chosen], [s.start for s in chosen], written=answers)
    with backbone.autocast(), beside:
        states = backbone.hidden(ids, attention.to(backbone.device))
    rows = torch.from_numpy(np.repeat(np.arange(len(chosen)), [len(p) for p in positions])).to(backbone.device)
    columns = torch.from_numpy(np.concatenate(positions)).to(backbone.device)
    weight = backbone.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    return summed_cross_entropy(states[rows, columns], weight, ids[rows, columns + 1], backbone.softcap)


_OBJECTIVES: dict[type, tuple[str, Objective]] = {
    TokenSequence: ("decoder", Objective(_next_tokens, _summed_next_tokens)),
    LabelledSequence: ("encoder", LABELLED),
    MaskedSequence: ("encoder", MASKED),
    PairSequence: ("encoder-decoder", PAIRED),
    CorruptedSequence: ("encoder-decoder", CORRUPTED),
}
"""By the type of the sequences, which models can learn from them, and how."""


def _objective(backbone: Backbone, sequences: Sequence[Any]) -> Objective:
    """How a model learns from sequences.

    Raises:
        UserError: They are not for this kind of model.
    """
    kind, found = _OBJECTIVES[type(sequences[0])]
    if kind != backbone.kind:
        wanted, given = (f"{'a' if name == 'decoder' else 'an'} {name}" for name in (kind, backbone.kind))
        raise UserError(f"these sequences are for {wanted}, and {backbone.located.name} is {given}")
    return found


def _length(sequence: Any) -> int:
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
    objective, model = _objective(backbone, chosen), backbone.model if model is None else model
    drawn = objective.draw(backbone, chosen, share, seed)
    count = sum(d.terms for d in drawn)
    if count == 0:  # a batch of empty lines
        return 0.0
    total = 0.0
    for part in micro_batches([d.length for d in drawn]):
        if not any(drawn[i].terms for i in part):
            continue
        loss = objective.summed(backbone, model, [drawn[i] for i in part]) / count
        total += float(loss.detach())
        if backward is not None:
            backward(loss)
    return total


def train(
    backbone: Backbone,
    sequences: Sequence[Any],
    out: Path,
    *,
    adapter: AdapterConfig | None = None,
    training: TrainingConfig | None = None,
    head: Head | None = None,
    seed: int = 0,
    start_from: Path | None = None,
    second: SecondStage | None = None,
    provenance: dict[str, Any] | None = None,
    trackers: Sequence[str] = (),
    progress: Progress | None = None,
    checkpoint_seconds: float = 30.0,
) -> dict[str, Any]:
    """Trains an adapter and writes it, in PEFT's layout, into a folder that exists.

    Run again on a folder that holds a checkpoint, it goes on from there.

    Args:
        backbone: The frozen base model.
        sequences: What to learn, all of one type: from `answer_sequences` or `text_sequences`, for an encoder from
            `labelled_sequences` or `masked_sequences`, for an encoder-decoder from `lingraft.transduction`.
        out: The folder to write to.
        adapter: The adapter's structure.
        training: How it is trained.
        head: The head of an encoder, which is trained and saved with the adapter; None: the one the sequences are for.
        seed: Initial weights, order, dropout and drawn positions.
        start_from: An adapter to go on from, instead of the initial weights.
        second: What is trained is a second stage on top of this first one; an encoder's head goes on from the first's.
        provenance: Written to the sidecar.
        trackers: accelerate's trackers, such as `tensorboard`; they write below `out/trackers`.
        progress: Called after every step.
        checkpoint_seconds: A checkpoint is due when so much time has passed.

    Returns:
        Steps, tokens, seconds, the last loss and the numeric environment.

    Raises:
        AdapterError: The adapter to start from does not fit.
        UserError: The sequences are not for this kind of model.
        BackboneError: An encoder's checkpoint has no language model to be trained with.
        LingraftError: The loss became NaN or infinite.
    """
    adapter, training = adapter or AdapterConfig(), training or TrainingConfig()
    if backbone.kind == "encoder" and head is None:
        _objective(backbone, sequences)
        head = getattr(sequences[0], "head", Head("masked_lm"))
    made, tensors = fresh(backbone, adapter, seed, head)
    heads, saved = _of_head(made, tensors), sorted(made.get("modules_to_save", ()))
    # Adapters that are merged must have started alike; heads are not merged.
    init_hash = hash_tensors({name: t for name, t in tensors.items() if name not in heads})
    if start_from is not None:
        tensors = _tensors_of(start_from, tensors, heads)
    if second is not None:
        tensors = tensors | _heads_of(second.first, tensors, heads)
    config = peft_config(made)
    extra: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        if second is not None:
            stack.enter_context(backbone.merged(second.first))
        model = stack.enter_context(backbone.attached(config, tensors, head))
        if second is not None:
            further = stack.enter_context(put_on(backbone, model, second, seed=seed))
            if backbone.fuser is not None and backbone.fuser.translator is not None:
                second = replace(second, encoder=backbone.fuser.translator.digest)
            extra = dict(further.state_dict()) if further is not None else {}  # The tensors themselves, not copies.
        model.train()
        summary = _loop(backbone, model, sequences, out, training, seed, trackers, progress, checkpoint_seconds)
        final = {name: t.detach().float().cpu().numpy() for name, t in get_peft_model_state_dict(model).items()}
    write_all(out / WEIGHTS, final)
    if second is not None:
        second.write(out, extra)
    names = {field: _names(backbone, made[field], head) for field in _MODULES if field in made}
    if saved:  # PEFT adds names of its own.
        names["modules_to_save"] = saved
    _write_config(out / CONFIG, config, names)
    sidecar = {
        "format": 1,
        "kind": "adapter",
        "family": adapter.family,
        "backbone": {"name": backbone.located.name, "digest": backbone.digest},
        "init_sha256": init_hash,
        **({"head": head.as_dict()} if head is not None else {}),
        **({"second": second.notes()} if second is not None else {}),
        "provenance": {"how": "train", "seed": seed, "lingraft": __version__, **(provenance or {})},
    }
    write_json(out / SIDECAR, sidecar)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return {**summary, "environment": environment(backbone)}


_MODULES = ("target_modules", "feedforward_modules")


def _names(backbone: Backbone, modules: Sequence[str], head: Head | None = None) -> list[str]:
    """What the configuration calls the modules: `q_proj` where that names just them, as other tools expect, else paths.

    On an encoder it must name just them under every head, whose layers PEFT would adapt as well.
    """
    leaves = sorted({module.rsplit(".", 1)[-1] for module in modules})
    if head is not None:
        models = (backbone.model, backbone.headed(head).model)
        found = {n for m in models for n, _ in m.named_modules() if n.rsplit(".", 1)[-1] in leaves}
        return leaves if found == set(modules) else list(modules)
    return leaves if set(backbone.target_modules(tuple(leaves))) == set(modules) else list(modules)


def _of_head(made: dict[str, Any], tensors: dict[str, torch.Tensor]) -> set[str]:
    """The names of a head's tensors."""
    modules = tuple(f".{name}." for name in made.get("modules_to_save", ()))
    return {name for name in tensors if any(part in name for part in modules)}


def _write_config(path: Path, config: Any, names: dict[str, list[str]]) -> None:
    """Writes PEFT's own fields, its sets sorted, so that equal adapters have equal files."""
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    values |= {**names, "inference_mode": True}
    write_json(path, json.loads(json.dumps(values, default=lambda v: getattr(v, "value", str(v)))))


def _tensors_of(folder: Path, like: dict[str, torch.Tensor], heads: set[str]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter to start from; a head that it has not, or of another size, is a fresh one."""
    adapter = Adapter.load(folder)
    found = {name: torch.from_numpy(np.array(array)) for name, array in adapter.tensors()}
    sites = set(like) - heads
    wrong = sorted(n for n in set(found) ^ sites or {n for n in sites if like[n].shape != found[n].shape})
    if wrong:
        raise AdapterError(
            f"the adapter to start from has another structure: {len(wrong)} tensors, first {wrong[0]}",
            where=folder,
        )
    return found | {name: like[name] for name in sorted(heads)} | _heads_of(adapter, like, heads)


def _heads_of(adapter: Adapter, like: dict[str, torch.Tensor], heads: set[str]) -> dict[str, torch.Tensor]:
    """Those of an adapter's head's tensors that have the right size."""
    known = {n: torch.from_numpy(np.array(adapter.others[n](), np.float32)) for n in heads & set(adapter.others)}
    return {name: tensor for name, tensor in sorted(known.items()) if tensor.shape == like[name].shape}


def _loop(
    backbone: Backbone,
    model: Any,
    sequences: Sequence[Any],
    out: Path,
    config: TrainingConfig,
    seed: int,
    trackers: Sequence[str],
    progress: Progress | None,
    checkpoint_seconds: float,
) -> dict[str, Any]:
    accelerator = _accelerator(trackers, out)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    prepared = accelerator.prepare_optimizer(optimizer)
    total = steps_of(len(sequences), config)
    done, spent, tokens = _resume(out, parameters, optimizer)
    lengths, headed = [_length(s) for s in sequences], model.get_base_model()
    began = last_saved = time.monotonic()
    loss_value = float("nan")
    with (out / METRICS).open("a", encoding="utf-8") as log:
        for step, indices in _schedule(lengths, config, seed, done, total):
            # Dropout draws from the global state: set from (seed, step), it needs no place in a checkpoint.
            torch.manual_seed(derived_seed("step", seed, step))
            chosen = [sequences[i] for i in indices]
            drawn = derived_seed("positions", seed, step)
            loss_value = batch_loss(
                backbone, chosen, share=config.loss_positions, seed=drawn, backward=accelerator.backward, model=headed
            )
            if not math.isfinite(loss_value):
                raise LingraftError(
                    f"the loss became {loss_value} at step {step + 1} of {total}",
                    remedy="lower the learning rate or use float32",
                )
            norm = float(torch.nn.utils.clip_grad_norm_(list(parameters.values()), config.clip))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, config)
            prepared.step()
            prepared.zero_grad(set_to_none=True)
            tokens += sum(lengths[i] for i in indices)
            note = {
                "step": step + 1,
                "loss": loss_value,
                "gradient_norm": norm,
                "learning_rate": group["lr"],
                "tokens": tokens,
            }
            log.write(json.dumps(note) + "\n")
            if trackers:
                accelerator.log({k: v for k, v in note.items() if k != "step"}, step=step + 1)
            if progress is not None:
                progress(step + 1, total, loss_value)
            if time.monotonic() - last_saved > checkpoint_seconds and step + 1 < total:
                log.flush()
                _save(out, parameters, optimizer, step + 1, spent + time.monotonic() - began, tokens)
                last_saved = time.monotonic()
    if trackers:
        accelerator.end_training()
    return {
        "steps": total,
        "tokens": tokens,
        "seconds": round(spent + time.monotonic() - began, 2),
        "loss": _last_loss(out),
    }


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


def _schedule(
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
    parameters: dict[str, torch.nn.Parameter],
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


def _resume(out: Path, parameters: dict[str, torch.nn.Parameter], optimizer: "Optimizer") -> tuple[int, float, int]:
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
                optimizer.state[parameter] = {
                    "step": read("updates")[0],
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
