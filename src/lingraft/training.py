"""Training an adapter, or the parts of one, on a base model that nothing else changes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lingraft import __version__, lottery
from lingraft.adapter import Adapter
from lingraft.attaching import Part, part, peft_config, tensors_on
from lingraft.backbones import Backbone, environment
from lingraft.config import AdapterConfig, TrainingConfig
from lingraft.errors import AdapterError, UserError
from lingraft.fusion.attaching import put_on
from lingraft.fusion.stages import SecondStage
from lingraft.heads import Head
from lingraft.layouts import layout_of
from lingraft.layouts.common import CONFIG, SIDECAR, WEIGHTS
from lingraft.stacks import check_stack, described, write_note
from lingraft.stepping import BEST, CHECKPOINT, Progress, learn, objective_of
from lingraft.store import write_json
from lingraft.structures import fresh, fresh_coupling
from lingraft.tensors import write_all


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
    objective_of(backbone, sequences)
    if backbone.kind == "encoder" and head is None:
        head = getattr(sequences[0], "head", Head("masked_lm"))
    _check(adapter, beneath, start_from, second)
    for one in beneath:
        backbone.check_belongs(one)
    made, tensors = fresh(backbone, adapter, seed, head)
    heads = _of_head(made, tensors)
    # Adapters that are merged must have started alike; heads are not merged.
    init_hash = hash_tensors({name: t for name, t in tensors.items() if name not in heads})
    if start_from is not None:
        tensors = _tensors_of(start_from, tensors, heads)
    if second is not None:
        tensors = tensors | _heads_of(second.first, tensors, heads)
    notes: dict[str, Any] = {
        "backbone": {"name": backbone.located.name, "digest": backbone.digest},
        **({"beneath": described(beneath)} if beneath else {}),
        "provenance": {"how": "train", "seed": seed, "lingraft": __version__, **(provenance or {})},
    }
    own: dict[str, Any] = {"init_sha256": init_hash, **({"head": head.as_dict()} if head is not None else {})}
    watched: dict[str, Any] = {"trackers": trackers, "progress": progress, "checkpoint_seconds": checkpoint_seconds}
    parts = [part(one) for one in beneath]
    if adapter.family == "sparse":
        learned = lottery.learn_difference(
            backbone, head, tensors, parts, sequences, out, adapter, training, seed, **watched
        )
        summary = learned.summary
        made |= {"target_modules": learned.modules, "entries": learned.entries}
        _write(out, backbone, made, learned.tensors, {**notes, **own}, head)
    elif adapter.invertible:
        summary = _train_two(
            backbone, head, made, tensors, parts, sequences, out, adapter, training, seed, watched, notes
        )
    else:
        extra: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            if second is not None:
                stack.enter_context(backbone.merged(second.first))
            model = stack.enter_context(backbone.attached(peft_config(made), tensors, head, parts))
            if second is not None:
                further = stack.enter_context(put_on(backbone, model, second, seed=seed))
                if backbone.fuser is not None and backbone.fuser.translator is not None:
                    second = replace(second, encoder=backbone.fuser.translator.digest)
                extra = dict(further.state_dict()) if further is not None else {}  # The tensors themselves, not copies.
            summary = _learn(backbone, model, sequences, out, training, seed, watched)
            final = _arrays(tensors_on(model))
        if second is not None:
            second.write(out, extra)
            own["second"] = second.notes()
        _write(out, backbone, made, final, {**notes, **own}, head)
    for left in (CHECKPOINT, BEST, lottery.SELECTION):
        (out / left).unlink(missing_ok=True)
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


def _learn(
    backbone: Backbone,
    model: Any,
    sequences: Sequence[Any],
    out: Path,
    training: TrainingConfig,
    seed: int,
    watched: dict[str, Any],
) -> dict[str, Any]:
    """Trains all of a PEFT model's parameters that are not frozen."""
    model.train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return learn(backbone, model.get_base_model(), parameters, sequences, out, training, seed, **watched)


def _train_two(
    backbone: Backbone,
    head: Head | None,
    made: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    parts: list[Part],
    sequences: Sequence[Any],
    out: Path,
    adapter: AdapterConfig,
    training: TrainingConfig,
    seed: int,
    watched: dict[str, Any],
    notes: dict[str, Any],
) -> dict[str, Any]:
    """Trains bottlenecks and a coupling together, and writes them as the parts of a stack, the coupling the lower one."""
    coupling, start = fresh_coupling(backbone, adapter, seed)
    both = [*parts, Part(peft_config(coupling), start, trained=True)]
    with backbone.attached(peft_config(made), tensors, head, both) as model:
        summary = _learn(backbone, model, sequences, out, training, seed, watched)
        lower, upper = _arrays(tensors_on(model, f"beneath{len(parts)}")), _arrays(tensors_on(model))
    written = {"invertible": (coupling, lower, start), "bottleneck": (made, upper, tensors)}
    for folder, (config, arrays, initial) in written.items():
        (out / folder).mkdir(exist_ok=True)
        own = {"init_sha256": hash_tensors(initial), **({"head": head.as_dict()} if head is not None else {})}
        _write(out / folder, backbone, config, arrays, {**notes, **own}, head)
    write_note(out, list(written), {"family": "madx", **notes})
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
    _write_config(folder / CONFIG, peft_config(made), names)
    family = layout_of(made, folder / CONFIG).structure
    write_json(folder / SIDECAR, {"format": 1, "kind": "adapter", "family": family, **notes})


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
