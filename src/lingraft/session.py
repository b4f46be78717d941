"""What the steps of one run share: the experiment, the store, the loaded base model, and the items asked last."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lingraft import roles
from lingraft.adapter import Adapter
from lingraft.config import Experiment
from lingraft.digests import digest_value
from lingraft.errors import AdapterError
from lingraft.locating import Located
from lingraft.merging import Graft, content_digest, divergence_of
from lingraft.methods import method
from lingraft.plan import Step
from lingraft.plan.two_languages import translated_file
from lingraft.store import Store
from lingraft.tasks.items import Example, subset
from lingraft.tasks.pairs import all_concatenated, paired
from lingraft.tasks.reference import reference_text
from lingraft.tasks.sources import FileSource, bundled_or
from lingraft.tasks.table import find_task
from lingraft.tasks.task import Task
from lingraft.tasks.translating import rendered

if TYPE_CHECKING:
    from lingraft.backbones import Backbone
    from lingraft.divergence import Divergence
    from lingraft.evaluation import Asking, Questions
    from lingraft.live import LiveGraft

ROWS = "rows.jsonl"
"""What a step has translated."""


class Progress(Protocol):
    """Told how far a step is: how much is done, of how much, a note, and of a training the loss."""

    def __call__(self, done: int, total: int, note: str, loss: float | None = None, /) -> None:
        """Tells it."""
        ...


def _silent(done: int, total: int, note: str, loss: float | None = None, /) -> None:
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
            backbone, (merge, task, divergence, _) = (
                self.backbone,
                parts_of_graft(step.inputs, graft, graft["weight"], self),
            )
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


def parts_of_graft(
    inputs: Mapping[str, Step], config: Mapping[str, Any], weight: float, session: Session
) -> "tuple[Graft, Adapter, Divergence, dict[str, str]]":
    """How a graft is merged and what from: the task's adapter, the references' difference, and everything's digests."""
    folders = {role: session.folder(inputs[role]) for role in ("task", "target_ref", "source_ref")}
    divergence, _ = divergence_of(folders["target_ref"], folders["source_ref"])
    options = {k: config[k] for k in ("space", "modules", "out_rank")}
    graft = Graft(weight, method=config.get("rule", "transfer"), **options)
    names = {role: content_digest(folder) for role, folder in folders.items()}
    return graft, Adapter.load(folders["task"]), divergence, names
