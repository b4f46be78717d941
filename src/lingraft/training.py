"""Training an adapter, or the parts of one, on a base model that nothing else changes."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lingraft import __version__, lottery, processes
from lingraft.adapter import Adapter
from lingraft.attaching import Part, part, peft_config, tensors_on
from lingraft.backbones import Backbone, environment
from lingraft.cards import Facts, write_card
from lingraft.checkpoints import BEST, CHECKPOINT
from lingraft.config import AdapterConfig, TrainingConfig
from lingraft.errors import AdapterError, LingraftError, UserError
from lingraft.fusion.attaching import put_on
from lingraft.fusion.stages import SecondStage
from lingraft.heads import Head
from lingraft.lanes import MOST, lane_name, parameters_of, random_layers, side_by_side, tensors_of_lane
from lingraft.layouts import layout_of
from lingraft.layouts.common import CONFIG, SIDECAR, WEIGHTS
from lingraft.rows import REMEDY
from lingraft.serving import TOGETHER
from lingraft.stacks import check_stack, described, write_note
from lingraft.stepping import Learner, Progress, learn, learn_together, objective_of
from lingraft.store import write_json
from lingraft.structures import fresh, fresh_coupling
from lingraft.tensors import write_all


@dataclass(frozen=True)
class Job:
    """One training of an adapter on the base alone.

    Attributes:
        sequences: What to learn, all of one type.
        out: The folder to write to.
        adapter: The adapter's structure.
        training: How it is trained.
        head: The head of an encoder; None: the one the sequences are for.
        seed: Initial weights, order, dropout and drawn positions.
        start_from: An adapter to go on from, instead of the initial weights.
        provenance: Written to the sidecar.
        progress: Called after every step.
    """

    sequences: Sequence[Any]
    out: Path
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    head: Head | None = None
    seed: int = 0
    start_from: Path | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    progress: Progress | None = None


@dataclass(frozen=True)
class _Begun:
    """What a training starts from.

    Attributes:
        job: The training.
        head: The head of an encoder.
        made: PEFT's configuration.
        tensors: The tensors it starts from.
        notes: For the sidecars of all that it writes.
        own: For the adapter's own sidecar.
    """

    job: Job
    head: Head | None
    made: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    notes: dict[str, Any]
    own: dict[str, Any]


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of tensors in float32, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


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
    beneath: Sequence[Adapter] = (),
    provenance: dict[str, Any] | None = None,
    trackers: Sequence[str] = (),
    progress: Progress | None = None,
    checkpoint_seconds: float = 30.0,
) -> dict[str, Any]:
    """Trains an adapter and writes it, in PEFT's layout, into a folder that exists.

    Run again on a folder that holds a checkpoint, it goes on from there. A language adapter (`adapter.invertible`) is two
    adapters, learned together and written into a stack folder (`lingraft.stacks`).

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
        beneath: Adapters on the base, frozen, the lowest first: what is trained stands on them (MAD-X, LF-SFT).
        provenance: Written to the sidecar.
        trackers: accelerate's trackers, such as `tensorboard`; they write below `out/trackers`.
        progress: Called after every step.
        checkpoint_seconds: A checkpoint is due when so much time has passed.

    Returns:
        Steps, tokens, seconds, the last loss and the numeric environment.

    Raises:
        AdapterError: The adapter to start from does not fit, or what is beneath.
        UserError: The sequences are not for this kind of model, or the structure cannot be trained so.
        BackboneError: An encoder's checkpoint has no language model to be trained with.
        LingraftError: The loss became NaN or infinite.
    """
    adapter, training = adapter or AdapterConfig(), training or TrainingConfig()
    job = Job(sequences, out, adapter, training, head, seed, start_from, provenance or {}, progress)
    return train_one(
        backbone, job, second=second, beneath=beneath, trackers=trackers, checkpoint_seconds=checkpoint_seconds
    )


def train_one(
    backbone: Backbone,
    job: Job,
    *,
    second: SecondStage | None = None,
    beneath: Sequence[Adapter] = (),
    trackers: Sequence[str] = (),
    checkpoint_seconds: float = 30.0,
) -> dict[str, Any]:
    """As `train`, of a training that is a value."""
    with processes.own_folder(job.out) as out:
        return _train_one(backbone, replace(job, out=out), second, beneath, trackers, checkpoint_seconds)


def _train_one(
    backbone: Backbone,
    job: Job,
    second: SecondStage | None,
    beneath: Sequence[Adapter],
    trackers: Sequence[str],
    checkpoint_seconds: float,
) -> dict[str, Any]:
    begun = _begin(backbone, job, beneath, second)
    sequences, out, adapter, seed = job.sequences, job.out, job.adapter, job.seed
    head, made, parts = begun.head, begun.made, [part(one) for one in beneath]
    watched: dict[str, Any] = {
        "trackers": trackers,
        "progress": job.progress,
        "checkpoint_seconds": checkpoint_seconds,
    }
    if adapter.family == "sparse":
        learned = lottery.learn_difference(
            backbone, head, begun.tensors, parts, sequences, out, adapter, job.training, seed, **watched
        )
        summary = learned.summary
        made |= {"target_modules": learned.modules, "entries": learned.entries}
        _write(out, backbone, made, learned.tensors, begun.notes | begun.own, head)
    elif adapter.invertible:
        summary = _train_two(backbone, begun, parts, watched)
    else:
        extra: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            if second is not None:
                stack.enter_context(backbone.merged(second.first))
            model = stack.enter_context(backbone.attached(peft_config(made), begun.tensors, head, parts))
            if second is not None:
                further = stack.enter_context(put_on(backbone, model, second, seed=seed))
                if backbone.fuser is not None and backbone.fuser.translator is not None:
                    second = replace(second, encoder=backbone.fuser.translator.digest)
                extra = dict(further.state_dict()) if further is not None else {}  # The tensors themselves, not copies.
            summary = _learn(backbone, model, job, watched)
            final = _arrays(tensors_on(model))
        if second is not None:
            second.write(out, extra)
            begun.own["second"] = second.notes()
        _write(out, backbone, made, final, begun.notes | begun.own, head)
    return _ended(backbone, out, summary)


def train_together(
    backbone: Backbone,
    jobs: Sequence[Job],
    *,
    trackers: Sequence[str] = (),
    checkpoint_seconds: float = 30.0,
) -> list[dict[str, Any] | LingraftError]:
    """Trains adapters of one shape together, a step of each in every pass through the model.

    Each has the batches, the drawn positions, the schedule, the clipping, the optimizer, the checkpoint and the files that it has
    alone, and ends with the same numbers but for rounding: products have other numbers of rows. A training that was killed here may
    go on alone, and the other way round.

    Args:
        backbone: The frozen base model.
        jobs: The trainings; `why_apart` says None of any two.
        trackers: accelerate's trackers.
        checkpoint_seconds: As for `train`.

    Returns:
        For each what `train` gives, or why it failed; the others' ends do not depend on that.

    Raises:
        UserError: They cannot be trained together.
        AdapterError: The model cannot tell their rows apart.
    """
    for job in jobs:
        if reason := why_apart(backbone, jobs[0], job):
            raise UserError(f"these adapters cannot be trained together: {reason}", remedy=REMEDY)
    with ExitStack() as folders:
        jobs = [replace(job, out=folders.enter_context(processes.own_folder(job.out))) for job in jobs]
        return _train_all(backbone, jobs, trackers, checkpoint_seconds)


def _train_all(
    backbone: Backbone, jobs: Sequence[Job], trackers: Sequence[str], checkpoint_seconds: float
) -> list[dict[str, Any] | LingraftError]:
    outcomes: list[dict[str, Any] | LingraftError | None] = [None] * len(jobs)
    begun: dict[int, _Begun] = {}
    for number, job in enumerate(jobs):
        with _failing(outcomes, number):
            begun[number] = _begin(backbone, job)
    waiting = list(begun)
    while waiting:
        some, waiting = waiting[:MOST], waiting[MOST:]
        _learn_together(backbone, {n: begun[n] for n in some}, outcomes, trackers, checkpoint_seconds)
    return [outcome or {} for outcome in outcomes]


def _learn_together(
    backbone: Backbone,
    begun: Mapping[int, _Begun],
    outcomes: list[dict[str, Any] | LingraftError | None],
    trackers: Sequence[str],
    checkpoint_seconds: float,
) -> None:
    """Trains what has begun and writes it; how each ended is put among the outcomes."""
    first, *_ = begun.values()
    with side_by_side(backbone, first.made, [one.tensors for one in begun.values()], first.head) as model:
        model.train()
        learners: dict[int, Learner] = {}
        for lane, (number, one) in enumerate(begun.items()):
            job = one.job
            with _failing(outcomes, number):
                learners[number] = Learner(
                    parameters_of(model, lane),
                    job.sequences,
                    job.out,
                    job.training,
                    job.seed,
                    lane=lane_name(lane),
                    trackers=trackers,
                    progress=job.progress,
                    checkpoint_seconds=checkpoint_seconds,
                )
        if not learners:
            return
        ended = learn_together(backbone, model.get_base_model(), list(learners.values()))
        outcomes_of = dict(zip(learners, ended, strict=True))
        final = {n: _arrays(tensors_of_lane(model, lane)) for lane, n in enumerate(begun)}
    for number, outcome in outcomes_of.items():
        if isinstance(outcome, LingraftError):
            outcomes[number] = outcome
            continue
        one = begun[number]
        with _failing(outcomes, number):
            _write(one.job.out, backbone, one.made, final[number], one.notes | one.own, one.head)
            outcomes[number] = _ended(backbone, one.job.out, outcome)


def why_apart(backbone: Backbone, first: Job, second: Job) -> str | None:
    """Why two trainings cannot share passes through the model, or None where they can."""
    adapter = first.adapter
    if adapter != second.adapter:
        return "they are of different shapes"
    if adapter.family not in TOGETHER or adapter.invertible:
        return f"{'a coupling' if adapter.invertible else adapter.family} is trained alone"
    if type(first.sequences[0]) is not type(second.sequences[0]):
        return "they learn from different kinds of sequences"
    heads = [_head_of(backbone, job) for job in (first, second)]
    if heads[0] != heads[1]:
        return "they have different heads"
    head = heads[0]
    model = backbone.model if head is None else backbone.headed(head).model
    if adapter.family == "lora" and adapter.dropout and backbone.kind == "encoder-decoder":
        return "what is dropped out before LoRA is drawn for all texts of an encoder-decoder at once"
    if name := random_layers(model):
        return f"the base model itself drops out at random ({name}), which would be drawn for all at once"
    return None


@contextmanager
def _failing(outcomes: list[Any], number: int) -> Iterator[None]:
    """Puts an error of one training among the outcomes."""
    try:
        yield
    except LingraftError as error:
        outcomes[number] = error


def _head_of(backbone: Backbone, job: Job) -> Head | None:
    """The head that a training has on an encoder."""
    if backbone.kind == "encoder" and job.head is None:
        return getattr(job.sequences[0], "head", Head("masked_lm"))
    return job.head


def _begin(backbone: Backbone, job: Job, beneath: Sequence[Adapter] = (), second: SecondStage | None = None) -> _Begun:
    """What a training starts from.

    Raises:
        AdapterError: The adapter to start from does not fit, or what is beneath.
        UserError: The sequences are not for this kind of model, or the structure cannot be trained so.
        BackboneError: An encoder's checkpoint has no language model to be trained with.
    """
    objective_of(backbone, job.sequences)
    if second is not None:
        backbone.check_whole("a second stage")
    head = _head_of(backbone, job)
    _check(job.adapter, beneath, job.start_from, second)
    for one in beneath:
        backbone.check_belongs(one)
    made, tensors = fresh(backbone, job.adapter, job.seed, head)
    heads = _of_head(made, tensors)
    # Adapters that are merged must have started alike; heads are not merged.
    init_hash = hash_tensors({name: t for name, t in tensors.items() if name not in heads})
    if job.start_from is not None:
        tensors = _tensors_of(job.start_from, tensors, heads)
    if second is not None:
        tensors = tensors | _heads_of(second.first, tensors, heads)
    notes: dict[str, Any] = {
        "backbone": {"name": backbone.located.name, "digest": backbone.digest},
        **({"beneath": described(beneath)} if beneath else {}),
        "provenance": {"how": "train", "seed": job.seed, "lingraft": __version__, **job.provenance},
    }
    own: dict[str, Any] = {"init_sha256": init_hash, **({"head": head.as_dict()} if head is not None else {})}
    return _Begun(job, head, made, tensors, notes, own)


def _ended(backbone: Backbone, out: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Takes away what a training that is written needs no longer."""
    for left in (CHECKPOINT, BEST, lottery.SELECTION):
        (out / left).unlink(missing_ok=True)
        for damaged in out.rglob(f"damaged-*.{left}"):
            damaged.unlink()
    return {**summary, "environment": environment(backbone)}


def _check(adapter: AdapterConfig, beneath: Sequence[Adapter], start_from: Path | None, second: Any) -> None:
    """Refuses what cannot be trained together.

    Raises:
        UserError: There is some of it.
        AdapterError: What is beneath cannot stand below.
    """
    check_stack(beneath, covered=True)
    several = adapter.invertible or adapter.family == "sparse"
    if several and (start_from is not None or second is not None):
        what = "a language adapter with a coupling" if adapter.invertible else "a sparse difference"
        raise UserError(f"{what} starts anew, on the base or on what is beneath", remedy="leave --start-from out")
    if second is not None and beneath:
        raise UserError("a second stage stands on its first one alone", remedy="leave --beneath out")
    if adapter.family == "sparse" and any(one.structure != "sparse" for one in beneath):
        raise UserError(
            "a sparse difference changes the base's own weights: only others of its kind can be beneath",
            remedy="leave --beneath out, or train another structure",
        )
    if adapter.invertible and any(one.structure == "invertible" for one in beneath):
        raise UserError("there is a coupling behind the embeddings already", remedy="leave --beneath out")


def _learn(backbone: Backbone, model: Any, job: Job, watched: dict[str, Any]) -> dict[str, Any]:
    """Trains all of a PEFT model's parameters that are not frozen."""
    model.train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return learn(
        backbone, model.get_base_model(), parameters, job.sequences, job.out, job.training, job.seed, **watched
    )


def _train_two(backbone: Backbone, begun: _Begun, parts: list[Part], watched: dict[str, Any]) -> dict[str, Any]:
    """Trains bottlenecks and a coupling together, and writes them as the parts of a stack, the coupling the lower one."""
    job, head, made, tensors, notes = begun.job, begun.head, begun.made, begun.tensors, begun.notes
    coupling, start = fresh_coupling(backbone, job.adapter, job.seed)
    both = [*parts, Part(peft_config(coupling), start, trained=True)]
    with backbone.attached(peft_config(made), tensors, head, both) as model:
        summary = _learn(backbone, model, job, watched)
        lower, upper = _arrays(tensors_on(model, f"beneath{len(parts)}")), _arrays(tensors_on(model))
    written = {"invertible": (coupling, lower, start), "bottleneck": (made, upper, tensors)}
    for folder, (config, arrays, initial) in written.items():
        (job.out / folder).mkdir(exist_ok=True)
        own = {"init_sha256": hash_tensors(initial), **({"head": head.as_dict()} if head is not None else {})}
        _write(job.out / folder, backbone, config, arrays, {**notes, **own}, head)
    write_note(job.out, list(written), {"family": "madx", **notes})
    return summary


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """On the processor, floats in float32."""
    found = {name: t.detach().cpu() for name, t in tensors.items()}
    return {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in found.items()}


def _write(
    folder: Path,
    backbone: Backbone,
    made: dict[str, Any],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    notes: dict[str, Any],
    head: Head | None,
) -> None:
    """Writes an adapter in PEFT's layout, with lingraft's notes beside it."""
    write_all(folder / WEIGHTS, dict(arrays))
    names = {field: _names(backbone, made[field], head) for field in _MODULES if field in made}
    if "modules_to_save" in made:  # PEFT adds names of its own.
        names["modules_to_save"] = sorted(made["modules_to_save"])
    config = _write_config(folder / CONFIG, peft_config(made), names)
    family = layout_of(made, folder / CONFIG).structure
    said = {"format": 1, "kind": "adapter", "family": family, **notes}
    write_json(folder / SIDECAR, said, durable=False)
    write_card(folder, Facts(config, said))


_MODULES = ("target_modules", "feedforward_modules")


def _names(backbone: Backbone, modules: Sequence[str], head: Head | None = None) -> list[str]:
    """What the configuration calls the modules: `q_proj` where that names just them, as other tools expect, else paths.

    On an encoder it must name just them under every head, whose layers PEFT would adapt as well.
    """
    leaves = sorted({module.rsplit(".", 1)[-1] for module in modules})
    models = (backbone.model,) if head is None else (backbone.model, backbone.headed(head).model)
    found = {n for m in models for n, _ in m.named_modules() if n.rsplit(".", 1)[-1] in leaves}
    return leaves if found == set(modules) else list(modules)


def _of_head(made: dict[str, Any], tensors: dict[str, torch.Tensor]) -> set[str]:
    """The names of a head's tensors."""
    modules = tuple(f".{name}." for name in made.get("modules_to_save", ()))
    return {name for name in tensors if any(part in name for part in modules)}


def _write_config(path: Path, config: Any, names: dict[str, list[str]]) -> dict[str, Any]:
    """Writes PEFT's own fields, its sets sorted, so that equal adapters have equal files; gives what it wrote."""
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    values |= {**names, "inference_mode": True}
    written: dict[str, Any] = json.loads(json.dumps(values, default=lambda v: getattr(v, "value", str(v))))
    write_json(path, written, durable=False)
    return written


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
            remedy="start from an adapter of the same structure, rank and modules",
        )
    return found | {name: like[name] for name in sorted(heads)} | _heads_of(adapter, like, heads)


def _heads_of(adapter: Adapter, like: dict[str, torch.Tensor], heads: set[str]) -> dict[str, torch.Tensor]:
    """Those of an adapter's head's tensors that have the right size."""
    known = {n: torch.from_numpy(np.array(adapter.others[n](), np.float32)) for n in heads & set(adapter.others)}
    return {name: tensor for name, tensor in sorted(known.items()) if tensor.shape == like[name].shape}
