"""What each kind of step does: from its inputs' folders to files in a working folder."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingraft import __version__, roles
from lingraft.adapter import Adapter
from lingraft.answers.scoring import Rule, score_generated
from lingraft.config import AdapterConfig, Experiment, FusionConfig, MixupConfig, ProjectionConfig, TrainingConfig
from lingraft.digests import digest_value
from lingraft.errors import AdapterError, DataError, LingraftError, writing
from lingraft.journal import JOURNAL
from lingraft.languages import name_of
from lingraft.layouts.common import read_sidecar
from lingraft.locating import Located
from lingraft.merging import Graft, content_digest, divergence_of, energy_kept, similarity
from lingraft.methods import method
from lingraft.metrics import Generated
from lingraft.plan import Step
from lingraft.plan.two_languages import translated_file
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
from lingraft.stacks import load_stack, parts_of, stack_digest, write_note
from lingraft.store import Store, read_json, write_json
from lingraft.tasks.items import Example, sampled, subset
from lingraft.tasks.pairs import all_concatenated, paired
from lingraft.tasks.projection import projected_examples, projected_labels, shortened
from lingraft.tasks.reference import reference_text
from lingraft.tasks.sources import FileSource, bundled_or
from lingraft.tasks.table import find_task
from lingraft.tasks.task import Task
from lingraft.tasks.translating import canonical_rows, rendered, translated_rows

if TYPE_CHECKING:
    from lingraft.backbones import Backbone
    from lingraft.divergence import Divergence
    from lingraft.evaluation import Asking, Questions
    from lingraft.fusion.stages import SecondStage
    from lingraft.heads import Head
    from lingraft.live import LiveGraft
    from lingraft.training import Job

SELECTED = "selected.json"
SIMILARITY = "similarity.json"
READING = "reading.json"
LABELS = "labels.json"
ROWS = "rows.jsonl"
Progress = Callable[[int, int, str], None]


def _silent(done: int, total: int, note: str) -> None:
    pass


@dataclass
class Session:
    """What the steps of one run share: the experiment, the store, and the base model, loaded once when first needed.

    A merge whose weight can be changed in place stays on the model from one step to the next, until anything else asks for the
    model. So do the items that were asked last, and what was tokenised of them.
    """

    experiment: Experiment
    located: Located
    store: Store
    progress: Progress = field(default=_silent)
    _held: ExitStack = field(default_factory=ExitStack, repr=False)
    _merge: "tuple[str, LiveGraft] | None" = field(default=None, repr=False)
    _items: "tuple[str, list[Example]] | None" = field(default=None, repr=False)
    _questions: "Questions | None" = field(default=None, repr=False)

    @property
    def backbone(self) -> "Backbone":
        """The loaded base model, with nothing on it."""
        self.release()
        return self._loaded

    def release(self) -> None:
        """Takes a merge that is still on the base model off it."""
        self._merge = None
        self._held.close()

    @cached_property
    def _loaded(self) -> "Backbone":
        from lingraft.backbones import Backbone
        from lingraft.differences import trainable_weights
        from lingraft.lottery import check_entries
        from lingraft.structures import fresh, fresh_coupling, sites

        self.progress(0, 0, "loading the base model")
        loaded = Backbone(self.located, self.experiment.speed)
        # A module that does not exist is said now, not after an hour of training.
        adapters = [self.experiment.adapter]
        for stack in dict.fromkeys(method(name).stack for name in self.experiment.methods):
            if stack is not None:
                settings = self.experiment.stack(stack)
                adapters += [settings.language_adapter, settings.task_adapter]
        for number, adapter in enumerate(adapters):
            made, _ = fresh(loaded, adapter, 0)
            if not number:
                roles.select(sites(made), self.experiment.merge.modules)
            if adapter.family == "sparse":
                check_entries(adapter.entries, trainable_weights(loaded.model, adapter.modules))
            if adapter.invertible:
                fresh_coupling(loaded, adapter, 0)
        return loaded

    @cached_property
    def data_dir(self) -> Path | None:
        """The data folder, or None for the hub."""
        return bundled_or(self.experiment.data_dir)

    def merged_on(self, step: Step) -> "Backbone | None":
        """The base model with the merge on it that a step asks of, its weight set in place; None: it has to be merged anew.

        Raises:
            AdapterError: The weight is none that the merge can have.
        """
        from lingraft.live import grafted, is_line

        graft = step.config["graft"]
        if graft is None or self._loaded.kind == "encoder":  # An encoder answers by a head, which is its adapter's.
            return None
        if "beneath" in graft or {"beneath", "adapter"} & set(step.inputs):
            return None
        inputs = {role: step.inputs[role].key for role in ("task", "target_ref", "source_ref")}
        key = digest_value([inputs, {k: v for k, v in graft.items() if k != "weight"}])
        if self._merge is None or self._merge[0] != key:
            backbone, (merge, task, divergence, _) = self.backbone, _parts(step.inputs, graft, graft["weight"], self)
            if not is_line(merge, task):
                return None
            try:
                self._merge = (key, self._held.enter_context(grafted(backbone, task, divergence, merge)))
            except AdapterError:  # No line after all; where the adapters do not fit, merging says so.
                return None
        self._merge[1].set_weight(graft["weight"])
        return self._loaded

    def questions(self, step: Step, asking: "Asking") -> "Questions":
        """The items of a step and what is tokenised of them; those of the step before, where they are the same."""
        from lingraft.evaluation import Questions

        examples = self.asked(step, step.config["limit"])
        last = self._questions
        if last is None or last.examples is not examples or last.asking != asking:
            last = self._questions = Questions(self._loaded, examples, asking)
        return last

    def folder(self, step: Step) -> Path:
        """Where a finished step's files are."""
        return self.store.folder(step.kind, step.key)

    def lines(self, language: str) -> Iterable[str]:
        """A language's reference text."""
        return reference_text(self.experiment.reference, language, self.experiment.data_dir).lines()

    def parallel(self, language: str) -> list[str]:
        """A language's reference text where its lines stand beside other languages'."""
        # Of a file all lines, so that texts of different lengths are told apart; of the hub no more than are needed.
        reference = self.experiment.reference
        return list(islice(self.lines(language), reference.max_segments if reference.hub else None))

    def task(self, name: str) -> Task:
        """A task by its name."""
        return find_task(name, self.experiment.tasks)

    def examples(self, task: Task, language: str, split: str, limit: int | None, prompt: str) -> list[Example]:
        """A language's items of a task."""
        folder, revision = self.data_dir, self.experiment.data_revision
        if task.name != self.experiment.task:
            revision = None
            if self.experiment.reference.data_dir is not None:
                folder = bundled_or(self.experiment.reference.data_dir)
        sources = task.sources(language, split, folder, revision)
        return subset(task.examples(sources, language=language, prompt=prompt), limit)

    def asked(self, step: Step, limit: int | None) -> list[Example]:
        """The items that a step's configuration names, with what is read beside them of their counterparts."""
        names = ("task", "prompt", "language", "split", "counterpart", "second", "places")
        made = {role: step.inputs[role].key for role in ("items", "counterparts") if role in step.inputs}
        key = digest_value([{n: step.config[n] for n in names if n in step.config}, made, dict(step.reads), limit])
        if self._items is None or self._items[0] != key:
            self._items = key, self._asked(step, limit)
        return self._items[1]

    def _asked(self, step: Step, limit: int | None) -> list[Example]:
        language = step.config["language"]
        if "counterpart" not in step.config:
            return self._items_of(step, "items", language, limit)
        # What a step has translated are the items that are needed, and no others.
        items = self._items_of(step, "items", language, limit if "counterparts" in step.inputs else None)
        return subset(self._beside(step, items), limit)

    def skipped(self, step: Step) -> int:
        """How many of a step's items have no counterpart and are left out, where that is allowed."""
        if step.config.get("counterpart", {}).get("missing") != "skip":
            return 0
        limit = step.config.get("limit") if "counterparts" in step.inputs else None
        items = self._items_of(step, "items", step.config["language"], limit)
        return len(items) - len(self._beside(step, items))

    def _beside(self, step: Step, items: list[Example]) -> list[Example]:
        asked = step.config["counterpart"]
        if "language" not in asked:
            return [replace(item, source=item.asked) for item in items]
        others = self._items_of(step, "counterparts", asked["language"], None)
        made = bool({"items", "counterparts"} & set(step.inputs))
        if made:  # A translation may have lost an answer, or be of a sample; that is counted there.
            known = {item.id for item in items}
            others = [other for other in others if other.id in known]
        what = (
            f"{step.config['task']['task']}, {step.config['split']}: {step.config['language']} and {asked['language']}"
        )
        missing = asked.get("missing", "error")
        found = paired(items, others, missing=missing, what=what, numbered=False if made else None).examples
        if asked["form"] == "concatenated":
            return all_concatenated(found)
        if asked["form"] == "alone":
            return [replace(item, source=None) for item in found]
        if asked["form"] == "itself":
            return [replace(item, source=item.asked) for item in found]
        if asked["form"] == "instead":
            by_id = {item.id: item for item in others}
            # What is right is what the item says, whatever stands beside its counterpart.
            return [replace(by_id[item.id], gold=item.gold) for item in found]
        return found

    def _items_of(self, step: Step, role: str, language: str, limit: int | None) -> list[Example]:
        """Items of a language: the task's own, or translated by a step or in a file."""
        config = step.config
        task, prompt = self.task(config["task"]["task"]), config.get("prompt", "default")
        if role in step.inputs:
            path: Path | None = self.folder(step.inputs[role]) / ROWS
        else:
            path = self._translated(config, role, language)
        if path is None:
            return self.examples(task, language, config["split"], limit, prompt)
        made = rendered(task, answers=role == "items")
        return subset(made.examples([FileSource(path)], language=language, prompt=prompt), limit)

    def _translated(self, config: Mapping[str, Any], role: str, language: str) -> Path | None:
        """The user's own file of translations, where that is what a step reads."""
        settings, source = self.experiment.translation, self.experiment.source
        # In training the target's items are translations; elsewhere their counterparts are.
        made = role == ("items" if "second" in config or "places" in config else "counterparts")
        if settings.files is None or config["split"] not in settings.splits or not made:
            return None
        if "second" not in config and "places" not in config and "counterpart" not in config:
            return None
        other = source if role == "items" else config["language"]
        return translated_file(self.experiment, self.data_dir, other, language, config["split"])


def check_data(steps: Sequence[Step], session: Session) -> None:
    """Reads all data that steps will read: a wrong label in the last test file is found before the first training.

    Raises:
        DataError: Something is wrong with them.
    """
    wanted = {
        (s.config["task"]["task"], s.config["language"], s.config["split"], s.config.get("prompt", "default"))
        for s in steps
        if "split" in s.config and not {"second", "places", "into"} & set(s.config)
    }
    for task, language, split, prompt in sorted(wanted):
        session.examples(session.task(task), language, split, None, prompt)
    _check_pairs(steps, session)
    _check_layers(steps, session)
    _check_states(steps, session)
    read = {s.config["language"] for s in steps if "reference" in s.config}
    projected = {s.config["language"] for s in steps if "projected" in s.config}
    if projected:
        projected.add(session.experiment.source)  # Its labels may be finished already.
    for language in sorted(read - projected):
        next(iter(session.lines(language)), None)
    counts = {language: len(session.parallel(language)) for language in sorted(projected)}
    if len(set(counts.values())) > 1:
        raise DataError(
            "the reference text is not parallel: it has "
            + ", ".join(f"{count} lines in {name_of(language)}" for language, count in counts.items()),
            remedy="projected labels need text whose lines are translations of one another",
        )


def _check_pairs(steps: Sequence[Step], session: Session) -> None:
    """Makes sure that items and counterparts that are there already fit together; what is translated first is read later."""
    seen: set[str] = set()
    for step in steps:
        config = step.config
        if not {"second", "counterpart"} & set(config) or {"items", "counterparts"} & set(step.inputs):
            continue
        parts = {name: config.get(name) for name in ("task", "prompt", "language", "split", "counterpart")}
        key = digest_value([parts, "second" in config])
        if key not in seen:
            seen.add(key)
            session.asked(step, None)


def _check_layers(steps: Sequence[Step], session: Session) -> None:
    """Makes sure that second stages find the layers they mix in: said now, not after the first stage's training.

    Raises:
        UserError: The base model has no such layers.
    """
    seconds = {digest_value(s.config["second"]): s.config["second"] for s in steps if "second" in s.config}
    for second in seconds.values():
        if "mixup" in second:
            from lingraft.fusion.xmixup import site_of

            site_of(session.backbone.model, second["mixup"]["layer"])
        elif "fusion" in second:
            from lingraft.fusion.attaching import fused_modules
            from lingraft.fusion.stored import places_of

            # A translation encoder's states are the same for every layer.
            find = places_of if second["kind"] == "fused" else fused_modules
            find(session.backbone, FusionConfig(**second["fusion"]))


def _check_states(steps: Sequence[Step], session: Session) -> None:
    """Makes sure that source states are not too large, where their items are there already.

    Raises:
        UserError: They are.
    """
    for step in steps:
        if step.kind == "states" and "items" not in step.inputs:
            from lingraft.fusion.cache import check_size
            from lingraft.fusion.stored import states_size

            sequences, fusion = _fusing(step, session)
            size = states_size(session.backbone, sequences, fusion)
            check_size(size, session.experiment.fusion.cache_limit * 1e9, where=step.label)


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
    write_json(work / "extra.json", {"label": step.label, "lingraft": __version__, "wall_seconds": seconds, **extra})


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
            note = f"loss {sum(losses) / len(losses):.3f}, {len(losses)} together"
            session.progress(sum(dones), sum(totals), note)

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
        {"language": config["language"], **what, "training": values.key(), "step": step.key},
        progress,
    )
    return job, {k: what[k] for k in ("truncated", "left_out", "without_counterpart") if what.get(k)}


def _train(step: Step, session: Session, work: Path) -> dict[str, Any]:
    from lingraft import training

    job, counts = _job(step, session, work, lambda done, total, loss: session.progress(done, total, f"loss {loss:.3f}"))
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


def _parts(
    inputs: Mapping[str, Step], config: Mapping[str, Any], weight: float, session: Session
) -> "tuple[Graft, Adapter, Divergence, dict[str, str]]":
    """How a graft is merged and what from: the task's adapter, the references' difference, and everything's digests."""
    folders = {role: session.folder(inputs[role]) for role in ("task", "target_ref", "source_ref")}
    divergence, _ = divergence_of(folders["target_ref"], folders["source_ref"])
    options = {k: config[k] for k in ("space", "modules", "out_rank")}
    graft = Graft(weight, method=config.get("rule", "transfer"), **options)
    names = {role: content_digest(folder) for role, folder in folders.items()}
    return graft, Adapter.load(folders["task"]), divergence, names


def _grafted(
    inputs: Mapping[str, Step], config: Mapping[str, Any], weight: float, session: Session
) -> tuple[Adapter, dict[str, Any]]:
    graft, task, divergence, names = _parts(inputs, config, weight, session)
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
    write_json(work / LABELS, {"labels": labels, "counts": counts, "lines": len(items)})
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
    write_json(work / READING, {"log_likelihood": value, "tokens": tokens})
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
    write_json(work / SCORES, figures)
    return {}


def _select(step: Step, session: Session, work: Path) -> dict[str, Any]:
    if "weight" in step.config:
        write_json(work / SELECTED, {"weight": step.config["weight"], "curve": []})
    elif step.config["criterion"] == "norms":
        write_json(work / SELECTED, _by_norms(step, session))
    else:
        write_json(work / SELECTED, _by_curve(step, session))
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
    write_json(work / SIMILARITY, similarity(x, y))
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


def _fusing(step: Step, session: Session) -> tuple[list[Any], FusionConfig]:
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
    sequences, fusion = _fusing(step, session)
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
