"""What each kind of step does: from its inputs' folders to files in a working folder."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingraft import __version__
from lingraft.adapter import Adapter
from lingraft.answers.scoring import Rule, score_generated
from lingraft.cards import hub_datasets
from lingraft.config import AdapterConfig, FusionConfig, MixupConfig, ProjectionConfig, TrainingConfig
from lingraft.digests import digest_value
from lingraft.errors import AdapterError, LingraftError, writing
from lingraft.journal import JOURNAL
from lingraft.layouts.common import read_sidecar
from lingraft.merging import Graft, energy_kept, similarity
from lingraft.metrics import Generated
from lingraft.plan import Step
from lingraft.predictions import (
    SCORES,
    read_generated,
    read_predictions,
    read_scores,
    score,
    write_generated,
    write_predictions,
    write_scored,
)
from lingraft.serving import TOGETHER
from lingraft.session import ROWS, Session, parts_of_graft
from lingraft.stacks import load_stack, parts_of, stack_digest, write_note
from lingraft.store import read_json, write_json
from lingraft.tasks.items import sampled
from lingraft.tasks.projection import projected_examples, projected_labels, shortened
from lingraft.tasks.translating import canonical_rows, rendered, translated_rows

if TYPE_CHECKING:
    from lingraft.backbones import Backbone
    from lingraft.fusion.stages import SecondStage
    from lingraft.heads import Head
    from lingraft.training import Job

SELECTED = "selected.json"
SIMILARITY = "similarity.json"
READING = "reading.json"
LABELS = "labels.json"


def execute(step: Step, session: Session, work: Path) -> None:
    """Makes a step in its working folder; figures go to `extra.json`, which the store puts into the record."""
    began = time.monotonic()
    try:
        extra = _EXECUTORS[step.kind](step, session, work)
    except BaseException:
        session.release()
        raise
    _record(step, work, began, extra)


def _record(step: Step, work: Path, began: float, extra: Mapping[str, Any]) -> None:
    """Writes what the store is to put into the record."""
    seconds = round(time.monotonic() - began, 3)
    write_json(
        work / "extra.json",
        {"label": step.label, "lingraft": __version__, "wall_seconds": seconds, **extra},
        durable=False,
    )


def shape_of(step: Step) -> str | None:
    """What trainings have in common that may share passes through the model; None: it is trained alone, or is no training."""
    config = step.config
    if step.kind != "train" or config.get("initial") or {"second", "beneath"} & {*config, *step.inputs}:
        return None
    adapter = AdapterConfig(**config["adapter"])
    if adapter.invertible or adapter.family not in TOGETHER:
        return None
    return digest_value([config["adapter"], config.get("head"), "reference" in config])


def execute_together(steps: Sequence[Step], session: Session, works: Sequence[Path]) -> list[LingraftError | None]:
    """Makes trainings of one shape in their working folders, together where the model allows it.

    Args:
        steps: The trainings, of one `shape_of`.
        session: What they share.
        works: Their working folders.

    Returns:
        For each why it failed, or None.
    """
    from lingraft import training

    began = time.monotonic()
    failed: list[LingraftError | None] = [None] * len(steps)
    jobs: dict[int, tuple[training.Job, dict[str, Any]]] = {}
    progress = _summed(session)
    for number, (step, work) in enumerate(zip(steps, works, strict=True)):
        try:
            jobs[number] = _job(step, session, work, progress(number))
        except LingraftError as error:
            failed[number] = error
    alone: list[int] = []
    for group in _fitting({n: job for n, (job, _) in jobs.items()}, session):
        if len(group) == 1:
            alone += group
            continue
        some = [jobs[n][0] for n in group]
        try:
            outcomes = training.train_together(session.backbone, some, trackers=session.experiment.trackers)
        except AdapterError:  # The model mixes the rows of its batch, as experts do.
            alone += group
            continue
        for n, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, LingraftError):
                failed[n] = outcome
            else:
                environment = {**outcome["environment"], "together": len(group)}
                _record(steps[n], works[n], began, {**outcome, "environment": environment, **jobs[n][1]})
    for n in alone:
        try:
            execute(steps[n], session, works[n])
        except LingraftError as error:
            failed[n] = error
    return failed


def _fitting(jobs: "Mapping[int, Job]", session: Session) -> list[list[int]]:
    """Trainings that may share passes through the model, by their numbers."""
    from lingraft.training import why_apart

    groups: list[list[int]] = []
    for number, job in jobs.items():
        found = [g for g in groups if why_apart(session.backbone, jobs[g[0]], job) is None]
        if found:
            found[0].append(number)
        else:
            groups.append([number])
    return groups


def _summed(session: Session) -> Callable[[int], Callable[[int, int, float], None]]:
    """The progress of several trainings as that of one."""
    known: dict[int, tuple[int, int, float]] = {}

    def of(number: int) -> Callable[[int, int, float], None]:
        def progress(done: int, total: int, loss: float) -> None:
            known[number] = done, total, loss
            dones, totals, losses = zip(*known.values(), strict=True)
            mean = sum(losses) / len(losses)
            session.progress(sum(dones), sum(totals), f"loss {mean:.3f}, {len(losses)} together", mean)

        return progress

    return of


def _job(
    step: Step, session: Session, work: Path, progress: Callable[[int, int, float], None]
) -> "tuple[Job, dict[str, Any]]":
    """A training, and what its record says of its data."""
    from lingraft.training import Job

    config = step.config
    values = TrainingConfig(**config["training"])
    sequences, what = _sequences(step, session, values)
    start = step.inputs.get("start_from")
    job = Job(
        sequences,
        work,
        AdapterConfig(**config["adapter"]),
        values,
        _head(config),
        config["seed"],
        None if start is None else session.folder(start),
        {"language": config["language"], **what, **_datasets(step), "training": values.key(), "step": step.key},
        progress,
    )
    return job, {k: what[k] for k in ("truncated", "left_out", "without_counterpart") if what.get(k)}


def _datasets(step: Step) -> dict[str, Any]:
    found = hub_datasets([digest for name, digest in step.reads.items() if name != "backbone"])
    return {"datasets": found} if found else {}


def _train(step: Step, session: Session, work: Path) -> dict[str, Any]:
    from lingraft import training

    def told(done: int, total: int, loss: float) -> None:
        session.progress(done, total, f"loss {loss:.3f}", loss)

    job, counts = _job(step, session, work, told)
    return (
        training.train_one(
            session.backbone,
            job,
            second=_second(step, session),
            beneath=_beneath(step, session),
            trackers=session.experiment.trackers,
        )
        | counts
    )


def _beneath(step: Step, session: Session) -> tuple[Adapter, ...]:
    """The adapters that a step's own adapter stands on, the lowest first."""
    return load_stack([session.folder(step.inputs["beneath"])]) if "beneath" in step.inputs else ()


def _second(step: Step, session: Session) -> "SecondStage | None":
    """The second stage that a training is, on its first."""
    from lingraft.fusion.cache import StateCache
    from lingraft.fusion.stages import SecondStage

    config = step.config.get("second")
    if config is None:
        return None
    folder = session.folder(step.inputs["stage1"])
    beside = step.config.get("counterpart", {})
    cache = None
    if "states" in step.inputs:
        states = session.folder(step.inputs["states"])
        cache = StateCache.open(states, step.inputs["states"].key, verify=True)
    return SecondStage(
        Adapter.load(folder),
        config["kind"],
        FusionConfig(**config["fusion"]) if "fusion" in config else None,
        MixupConfig(**config["mixup"]) if "mixup" in config else None,
        step.config["language"],
        cache,
        form=beside.get("form", "alone"),
        source=beside.get("language", ""),
    )


def _head(config: Mapping[str, Any]) -> "Head | None":
    from lingraft.heads import Head

    return Head(**config["head"]) if "head" in config else None


def _sequences(step: Step, session: Session, values: TrainingConfig) -> tuple[list[Any], dict[str, Any]]:
    """What a training reads, and what its adapter's provenance says of it."""
    from lingraft import reading

    config, backbone = step.config, session.backbone
    if "reference" in config:
        lines, reference = session.lines(config["language"]), session.experiment.reference
        return reading.of_text(backbone, lines, reference), {"reference": config["reference"]}
    if config.get("initial"):
        # One sequence, read zero times: the adapter stays what all trainings of the seed start from.
        return reading.untrained(backbone), {"initial": True}
    what: dict[str, Any] = {"task": config["task"]["task"]}
    if "projected" in config:
        labels = read_json(session.folder(step.inputs["labels"]) / LABELS)["labels"]
        task = session.task(config["task"]["task"])
        items = projected_examples(task, _shortened(config, session), labels)
        what["projected"] = len(items)
    else:
        items = session.asked(step, values.limit)
        if skipped := session.skipped(step):
            what["without_counterpart"] = skipped
    sequences, counts = reading.of_items(backbone, items, values, _head(config))
    return sequences, what | counts


def _grafted(
    inputs: Mapping[str, Step], config: Mapping[str, Any], weight: float, session: Session
) -> tuple[Adapter, dict[str, Any]]:
    graft, task, divergence, names = parts_of_graft(inputs, config, weight, session)
    return graft.onto(task, divergence), graft.provenance(task, names)


def _grafted_beneath(
    inputs: Mapping[str, Step], spaces: Mapping[str, str], weight: float, session: Session
) -> tuple[dict[str, Adapter], dict[str, Any]]:
    """Language adapters merged part by part, `L_s + λ(L_t − L_s)`: the parts by their structure, the lowest first."""
    target, source = session.folder(inputs["target_ref"]), session.folder(inputs["source_ref"])
    found: dict[str, Adapter] = {}
    for theirs, own in zip(parts_of(target), parts_of(source), strict=True):
        divergence, part = Adapter.load(theirs) - Adapter.load(own), Adapter.load(own)
        graft = Graft(weight, space=spaces[part.structure])
        # At 0 and 1 they are the source's and the target's themselves, bit for bit.
        ends = {0.0: part, 1.0: divergence.target_ref}
        found[part.structure] = ends[weight] if weight in ends else graft.onto(part, divergence)
    provenance = {
        "how": "transfer",
        "language": inputs["target_ref"].config["language"],
        "weight": weight,
        "spaces": dict(spaces),
        "inputs": {"target_ref": stack_digest(target), "source_ref": stack_digest(source)},
        "lingraft": __version__,
    }
    return found, provenance


def _merge_beneath(step: Step, weight: float, session: Session, work: Path) -> dict[str, Any]:
    """Merged language adapters: a folder of parts, or of the only part."""
    parts, provenance = _grafted_beneath(step.inputs, step.config["beneath"], weight, session)
    provenance["step"] = step.key
    notes = read_sidecar(session.folder(step.inputs["source_ref"])) or {}
    if len(parts) > 1:
        write_note(work, list(parts), {**notes, "provenance": provenance})
    for name, part in parts.items():
        folder = work / name if len(parts) > 1 else work
        folder.mkdir(exist_ok=True)
        part.write(folder, provenance)
    return {"weight": weight}


def _merge(step: Step, session: Session, work: Path) -> dict[str, Any]:
    weight = read_json(session.folder(step.inputs["selection"]) / SELECTED)["weight"]
    if "beneath" in step.config:
        return _merge_beneath(step, weight, session, work)
    merged, provenance = _grafted(step.inputs, step.config, weight, session)
    merged.write(work, {**provenance, "step": step.key})
    guarded = sum(merged.notes.guarded.values())
    return {"weight": weight, "energy_kept": energy_kept(merged), "guarded": guarded}


def _shortened(config: Mapping[str, Any], session: Session) -> list[str]:
    """A language's lines, at most so many tokens of each."""
    backbone = session.backbone
    return shortened(session.parallel(config["language"]), backbone.encode, backbone.decode, config["projected"])


def _project(step: Step, session: Session, work: Path) -> dict[str, Any]:
    from lingraft.backbones import environment
    from lingraft.evaluation import predict

    config, backbone = step.config, session.backbone
    texts = _shortened(config, session)[: config["max_segments"]]
    task = session.task(session.experiment.task)
    items = [item for item, text in zip(task.of_text(texts), texts, strict=True) if text]
    said = predict(
        backbone,
        Adapter.load(session.folder(step.inputs["adapter"])),
        items,
        scoring=config["scoring"],
        max_length=config["max_length"],
        progress=lambda done, total: session.progress(done, total, ""),
    )
    labels = projected_labels(said, ProjectionConfig(**config["projection"]))
    counts = {label: sum(found == n for _, found in labels) for n, label in enumerate(task.answers)}
    write_json(work / LABELS, {"labels": labels, "counts": counts, "lines": len(items)}, durable=False)
    return {"environment": environment(backbone)}


def _adapters_of(step: Step, session: Session) -> tuple[Adapter, ...]:
    """What is put on the base, the lowest first: nothing, an adapter on what lies beneath it, or a graft merged in memory."""
    graft = step.config["graft"]
    if graft is not None and "beneath" not in graft:
        return (_grafted(step.inputs, graft, graft["weight"], session)[0],)
    if graft is None:
        return load_stack([session.folder(step.inputs[role]) for role in ("beneath", "adapter") if role in step.inputs])
    beneath, _ = _grafted_beneath(step.inputs, graft["beneath"], graft["weight"], session)
    return (*beneath.values(), Adapter.load(session.folder(step.inputs["adapter"])))


def _on(step: Step, session: Session) -> "tuple[Backbone, tuple[Adapter, ...]]":
    """The base model, and what is still to be put on it: nothing where a merge is on it already."""
    backbone = session.merged_on(step)
    return (session.backbone, _adapters_of(step, session)) if backbone is None else (backbone, ())


def _predict(step: Step, session: Session, work: Path) -> dict[str, Any]:
    from lingraft.backbones import environment
    from lingraft.evaluation import Asking, ask

    config = step.config
    backbone, adapters = _on(step, session)
    skipped = session.skipped(step)
    asking = Asking(
        scoring=config["scoring"],
        normalised=config.get("normalised", False),
        max_length=config["max_length"],
        new_tokens=config.get("new_tokens", 0),
        stop=tuple(config.get("stop", ())),
    )
    questions = session.questions(step, asking)
    began = time.monotonic()
    journal = questions.journal(work / JOURNAL, step.key)
    said = ask(backbone, adapters, questions, None, lambda done, total: session.progress(done, total, ""), journal)
    if isinstance(said[0], Generated):
        write_generated(work, said)  # pyright: ignore[reportArgumentType]
    else:
        write_predictions(work, said, [label for label, _ in config["task"]["answers"]])  # pyright: ignore[reportArgumentType]
    journal.close()
    return {
        "items": len(said),
        "truncated": sum(item.truncated for item in said),
        **({"without_counterpart": skipped} if skipped else {}),
        "seconds": round(time.monotonic() - began, 3),
        "environment": environment(backbone),
    }


def _read(step: Step, session: Session, work: Path) -> dict[str, Any]:
    from lingraft.backbones import environment
    from lingraft.evaluation import text_log_likelihood

    config = step.config
    backbone, adapters = _on(step, session)
    texts = [e.prompt for e in session.asked(step, config["limit"])]
    value, tokens = text_log_likelihood(backbone, adapters, texts, max_length=config["max_length"])
    write_json(work / READING, {"log_likelihood": value, "tokens": tokens}, durable=False)
    return {"environment": environment(backbone)}


def _score(step: Step, session: Session, work: Path) -> dict[str, Any]:
    folder = session.folder(step.inputs["predict"])
    if "rule" in step.config:
        scored, figures = score_generated(
            read_generated(folder), Rule.from_dict(step.config["rule"]), step.config["language"]
        )
        write_scored(work, scored)
    else:
        figures = score(read_predictions(folder))
    write_json(work / SCORES, figures, durable=False)
    return {}


def _select(step: Step, session: Session, work: Path) -> dict[str, Any]:
    if "weight" in step.config:
        write_json(work / SELECTED, {"weight": step.config["weight"], "curve": []}, durable=False)
    elif step.config["criterion"] == "norms":
        write_json(work / SELECTED, _by_norms(step, session), durable=False)
    else:
        write_json(work / SELECTED, _by_curve(step, session), durable=False)
    return {}


def _by_curve(step: Step, session: Session) -> dict[str, Any]:
    """The weight of the grid that a criterion likes best; of equals the one nearest to the task's adapter itself."""
    by_weight: dict[str, list[dict[str, float]]] = {}
    for role, judged in step.inputs.items():
        by_weight.setdefault(role.split("/")[0], []).append(_judged(session.folder(judged), judged.kind))
    curve = [
        {"weight": float(weight), **{m: sum(r[m] for r in rows) / len(rows) for m in rows[0]}, "scores": len(rows)}
        for weight, rows in by_weight.items()
    ]
    curve.sort(key=lambda point: point["weight"])
    criterion, neutral = step.config["criterion"], step.config.get("neutral", 0.0)
    sign = -1 if criterion == "entropy" else 1
    best = max(curve, key=lambda point: (sign * point[criterion], -abs(point["weight"] - neutral)))
    return {"weight": best["weight"], "criterion": criterion, "curve": curve}


def _judged(folder: Path, kind: str) -> dict[str, float]:
    if kind == "read":
        return {"text_log_likelihood": read_json(folder / READING)["log_likelihood"]}
    found = read_scores(folder)
    return {m: found[m]["value"] for m in ("gold_log_likelihood", "accuracy", "entropy") if m in found}


def _by_norms(step: Step, session: Session) -> dict[str, Any]:
    """‖ΔT‖ / ‖ΔR_t − ΔR_s‖, the mean over seeds; 0 where the references do not differ."""
    ratios: list[float] = []
    for role, compared in step.inputs.items():
        part, _, seed = role.partition("/")
        if part != "references":
            continue
        found = read_json(session.folder(compared) / SIMILARITY)
        target, source = found["norms"]
        between = target**2 + source**2 - 2 * (found["cosine"] or 0) * target * source
        task = read_json(session.folder(step.inputs[f"task/{seed}"]) / SIMILARITY)["norms"][0]
        ratios.append(task / between**0.5 if between > 0 else 0.0)
    weight = min(sum(ratios) / len(ratios), step.config["highest"])
    return {"weight": weight, "criterion": "norms", "ratios": ratios, "curve": []}


def _compare(step: Step, session: Session, work: Path) -> dict[str, Any]:
    x, y = (Adapter.load(session.folder(step.inputs[role])) for role in ("target_ref", "source_ref"))
    write_json(work / SIMILARITY, similarity(x, y), durable=False)
    return {}


def _commit(digest: str) -> str | None:
    """The commit of a hub model that a plan has found; None: it lies in a folder."""
    return digest.rpartition("@")[2] if digest.startswith("hub:") else None


def _translate(step: Step, session: Session, work: Path) -> dict[str, Any]:
    from lingraft.translation import Translator

    config, experiment = step.config, session.experiment
    task = session.task(config["task"])
    sources = task.sources(config["language"], config["split"], session.data_dir, experiment.data_revision)
    rows = canonical_rows(task, sources)
    name = rendered(task).id_field or ""
    chosen = sampled([row.fields[name] for row in rows], config.get("limit"))
    rows = [row for row in rows if row.fields[name] in chosen]
    session.progress(0, 0, "loading the translation model")
    translator = Translator(
        config["model"],
        config["language"],
        config["into"],
        revision=_commit(step.reads["model"]),
        device=experiment.backbone.device,
        dtype=config["dtype"],
        beams=config["beams"],
    )

    def translate(texts: list[str]) -> list[str]:
        return translator.translate(texts, lambda done, total: session.progress(done, total, ""))

    made = translated_rows(task, rows, translate, answers=config["answers"])
    with writing(work), (work / ROWS).open("w", encoding="utf-8") as file:
        for row in made.rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {"rows": len(made.rows), "dropped": list(made.dropped), "cut": translator.cut}


def fusing(step: Step, session: Session) -> tuple[list[Any], FusionConfig]:
    """What a training that keeps source states learns from, and how it fuses."""
    from lingraft import reading

    config = step.config
    values = session.experiment.fusion_values.model_copy(
        update={"max_length": config["max_length"], "limit": config["limit"]}
    )
    items = session.asked(step, values.limit)
    return reading.of_items(session.backbone, items, values, _head(config))[0], FusionConfig(**config["places"])


def _states(step: Step, session: Session, work: Path) -> dict[str, Any]:
    """Source states of a training's counterparts, computed once."""
    from lingraft.backbones import environment
    from lingraft.fusion.stored import store_states

    backbone = session.backbone
    sequences, fusion = fusing(step, session)
    size = store_states(
        backbone,
        Adapter.load(session.folder(step.inputs["stage1"])),
        sequences,
        work,
        fusion=fusion,
        digest=step.key,
        limit_bytes=int(session.experiment.fusion.cache_limit * 1e9),
        progress=lambda done, total: session.progress(done, total, ""),
    )
    return {"bytes": size, "environment": environment(backbone)}


_EXECUTORS: dict[str, Callable[[Step, Session, Path], dict[str, Any]]] = {
    "train": _train,
    "merge": _merge,
    "predict": _predict,
    "read": _read,
    "project": _project,
    "score": _score,
    "select": _select,
    "compare": _compare,
    "translate": _translate,
    "states": _states,
}
