"""From an experiment to the unique steps it takes. Planning reads configurations and digests, never a model.

A step's key hashes its configuration, its inputs' keys, the digests of the data and base weights it reads, and the
version of its kind. The key is its path in the store, so the same work is planned once and never done twice, whichever
experiment asks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lingraft.config import Experiment, TrainingConfig
from lingraft.digests import digest_file, digest_value
from lingraft.errors import ConfigError, DataError
from lingraft.families import family
from lingraft.locating import Located
from lingraft.methods import Method, method
from lingraft.tasks.choice import ChoiceTask, bundled_or
from lingraft.tasks.reference import reference_path
from lingraft.tasks.table import choice_task

VERSIONS = {"train": 1, "merge": 1, "predict": 1, "score": 1, "select": 1, "compare": 1}
"""The version of each kind of step: raised when a fix changes its results, which makes the kind's steps new work."""

Plain = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """What to make from what.

    Attributes:
        kind: One of `VERSIONS`.
        config: Everything asked for that can change the result.
        inputs: Steps whose folders are read, by role.
        reads: Digests of data files and base weights, by name.
        label: For people; not part of the key.
    """

    kind: str
    config: Plain
    inputs: Mapping[str, "Step"] = field(default_factory=dict[str, "Step"])
    reads: Mapping[str, str] = field(default_factory=dict[str, str])
    label: str = ""

    @cached_property
    def key(self) -> str:
        """24 hexadecimal digits of the hash of all that can change the result."""
        return digest_value(self.identity(), 24)

    def identity(self) -> dict[str, Any]:
        """What the key hashes; also the step's record."""
        return {
            "kind": self.kind,
            "version": VERSIONS[self.kind],
            "config": dict(self.config),
            "inputs": {role: step.key for role, step in self.inputs.items()},
            "reads": dict(self.reads),
        }


@dataclass(frozen=True)
class Cell:
    """One number of the table: a method, a language, a seed."""

    method: str
    language: str
    seed: int
    predict: Step
    score: Step
    adapter: Step | None


@dataclass(frozen=True)
class Plan:
    """An experiment's steps in an order in which they can run, and what they are for.

    Attributes:
        experiment: What was asked.
        steps: Every step once, inputs first.
        cells: The numbers of the table.
        selections: The choice of λ, by method.
        comparisons: The likeness of the references' updates, by (language, seed).
        absent: (method, language, reason) where there are no data.
    """

    experiment: Experiment
    steps: tuple[Step, ...]
    cells: tuple[Cell, ...]
    selections: Mapping[str, Step]
    comparisons: Mapping[tuple[str, int], Step]
    absent: tuple[tuple[str, str, str], ...]


def ordered(targets: Iterable[Step]) -> tuple[Step, ...]:
    """All steps that the targets need, each once, inputs first."""
    found: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.key in found:
            return
        for needed in step.inputs.values():
            visit(needed)
        found[step.key] = step

    for target in targets:
        visit(target)
    return tuple(found.values())


def make_plan(experiment: Experiment, located: Located) -> Plan:
    """Plans an experiment.

    Raises:
        UserError: A method or task is unknown, data or a development language is missing.
    """
    return _Planner(experiment, located).plan()


class _Planner:
    def __init__(self, experiment: Experiment, located: Located) -> None:
        self.experiment = experiment
        self.task: ChoiceTask = choice_task(experiment.task, experiment.tasks)
        self.data_dir = bundled_or(experiment.data_dir)
        self.methods = [method(name) for name in dict.fromkeys(experiment.methods)]
        self.base = {"backbone": located.digest}
        self.dtype = experiment.backbone.dtype
        self._digests: dict[tuple[str, str], str] = {}
        self._steps: dict[str, Step] = {}
        self.selections: dict[str, Step] = {}

    def plan(self) -> Plan:
        """See `make_plan`."""
        experiment = self.experiment
        cells: list[Cell] = []
        absent: list[tuple[str, str, str]] = []
        self.rows_digest(experiment.source, "train")
        self.selections = {m.name: self.selection(m) for m in self.methods if m.adapter == "graft"}
        for row in self.methods:
            languages = [*experiment.targets]
            if row.adapter in ("none", "source"):
                split = experiment.evaluation.split
                if self.has_rows(experiment.source, split):
                    languages.insert(0, experiment.source)
                else:
                    # XCOPA has no English test set; the source's own figure is a courtesy, not a result.
                    absent.append((row.name, experiment.source, f"no labelled {split} data"))
            for language in languages:
                if row.adapter == "target" and not self.has_rows(language, "train"):
                    absent.append((row.name, language, "no labelled training data"))
                    continue
                for seed in experiment.seeds if row.adapter != "none" else experiment.seeds[:1]:
                    cells.append(self.cell(row, language, seed))
        comparisons: dict[tuple[str, int], Step] = {}
        if self.selections:
            for language in experiment.targets:
                for seed in experiment.seeds:
                    comparisons[language, seed] = self.comparison(language, seed)
        ends = [
            *comparisons.values(),
            *self.selections.values(),
            *(step for c in cells for step in (c.score, c.adapter) if step),
        ]
        return Plan(experiment, ordered(ends), tuple(cells), self.selections, comparisons, tuple(absent))

    def step(self, kind: str, config: Plain, inputs: Mapping[str, Step], reads: Plain, label: str) -> Step:
        """A step, the same object for the same work."""
        made = Step(kind, config, inputs, reads, label)
        return self._steps.setdefault(made.key, made)

    def rows_digest(self, language: str, split: str) -> str:
        """The digest of a language's rows.

        Raises:
            DataError: There are none.
        """
        if (language, split) not in self._digests:
            sources = self.task.sources(language, split, self.data_dir, self.experiment.data_revision)
            self._digests[language, split] = "+".join(s.digest() for s in sources)
        return self._digests[language, split]

    def has_rows(self, language: str, split: str) -> bool:
        """Whether a language has rows of a split."""
        try:
            self.rows_digest(language, split)
        except DataError:
            return False
        return True

    def task_adapter(self, language: str, seed: int, start_from: Step | None = None) -> Step:
        """The task's adapter in a language, from its initial weights or from another adapter."""
        after = "" if start_from is None else f" after {start_from.config['language']} text"
        return self._training(
            {"task": self.task.spec(), "language": language, "split": "train"},
            self.experiment.training,
            seed,
            {} if start_from is None else {"start_from": start_from},
            {"rows": self.rows_digest(language, "train")},
            f"train {self.task.name} {language}{after} seed {seed}",
        )

    def reference_adapter(self, language: str, seed: int) -> Step:
        """The reference task's adapter in a language."""
        config = self.experiment.reference
        path = reference_path(config, language, self.experiment.data_dir)
        return self._training(
            {"reference": config.key("text", "data_dir"), "language": language},
            self.experiment.reference_values,
            seed,
            {},
            {"text": digest_file(path)},
            f"train {config.task} {language} seed {seed}",
        )

    def initial_adapter(self, seed: int) -> Step:
        """The adapter that all trainings of a seed start from; its update is zero."""
        training = TrainingConfig(epochs=0)
        return self._training(
            {"initial": True, "language": "-"}, training, seed, {}, {}, f"initial adapter seed {seed}"
        )

    def _training(
        self,
        what: Plain,
        training: TrainingConfig,
        seed: int,
        inputs: Mapping[str, Step],
        reads: Plain,
        label: str,
    ) -> Step:
        config = {
            **what,
            "adapter": self.experiment.adapter.key(),
            "training": training.key(),
            "dtype": self.dtype,
            "seed": seed,
        }
        return self.step("train", config, inputs, {**self.base, **reads}, label)

    def other_language(self, language: str) -> str:
        """The language whose divergence controls for another's: the next of the experiment's, in a circle."""
        languages = [*self.experiment.targets, *self.experiment.development]
        if len(languages) < 2:
            raise ConfigError(
                "the control 'control-other' needs at least two languages besides the source",
                remedy="add a language",
            )
        return languages[(languages.index(language) + 1) % len(languages)]

    def graft_inputs(self, row: Method, language: str, seed: int) -> dict[str, Step]:
        """The three adapters of a graft."""
        makers = {
            "target": lambda: self.reference_adapter(language, seed),
            "source": lambda: self.reference_adapter(self.experiment.source, seed),
            "other": lambda: self.reference_adapter(self.other_language(language), seed),
            "initial": lambda: self.initial_adapter(seed),
        }
        return {
            "task": self.task_adapter(self.experiment.source, seed),
            "target_ref": makers[row.references[0]](),
            "source_ref": makers[row.references[1]](),
        }

    def graft_config(self, row: Method) -> dict[str, Any]:
        """How a graft is merged, its weight aside."""
        merge = self.experiment.merge
        modules = merge.modules if isinstance(merge.modules, str) else list(merge.modules)
        return {
            "space": family(self.experiment.adapter.family, row.space).name.partition("/")[2],
            "modules": modules,
            "out_rank": merge.out_rank if row.space == "product" else None,
        }

    def prediction(
        self,
        inputs: Mapping[str, Step],
        graft: Plain | None,
        language: str,
        split: str,
        limit: int | None,
        label: str,
    ) -> Step:
        """Predictions of the base, an adapter, or a graft merged in memory."""
        config = {
            "task": self.task.spec(),
            "language": language,
            "split": split,
            "limit": limit,
            "scoring": self.experiment.evaluation.scoring,
            "max_length": self.experiment.training.max_length,
            "dtype": self.dtype,
            "graft": graft,
        }
        reads = {**self.base, "rows": self.rows_digest(language, split)}
        return self.step("predict", config, inputs, reads, f"predict {label} {language} {split}")

    def scores(self, prediction: Step) -> Step:
        """The metrics of predictions."""
        return self.step("score", {}, {"predict": prediction}, {}, prediction.label.replace("predict", "score", 1))

    def selection(self, row: Method) -> Step:
        """The choice of a method's λ, on the development languages, over all seeds."""
        chosen = self.experiment.selection
        if chosen.weight is not None:
            return self.step("select", {"weight": chosen.weight}, {}, {}, f"λ of {row.name}: {chosen.weight}, as given")
        if not self.experiment.development:
            raise ConfigError(
                f"'{row.name}' needs development languages to choose λ on",
                remedy="add development: [..], languages that are not targets, or fix selection.weight",
            )
        inputs: dict[str, Step] = {}
        for weight in (0.0, *chosen.weights):
            for language in self.experiment.development:
                for split in chosen.splits:
                    for seed in self.experiment.seeds:
                        step = self._candidate(row, weight, language, split, seed)
                        inputs[f"{weight!r}/{language}/{split}/{seed}"] = self.scores(step)
        config = {"weights": [0.0, *chosen.weights], "criterion": "gold_log_likelihood"}
        return self.step("select", config, inputs, {}, f"select λ of {row.name}")

    def _candidate(self, row: Method, weight: float, language: str, split: str, seed: int) -> Step:
        limit = self.experiment.selection.limit
        if weight == 0:
            task = {"adapter": self.task_adapter(self.experiment.source, seed)}
            return self.prediction(task, None, language, split, limit, f"eng-ft seed {seed}")
        graft = {**self.graft_config(row), "weight": weight}
        inputs = self.graft_inputs(row, language, seed)
        return self.prediction(inputs, graft, language, split, limit, f"{row.name} λ={weight:g} seed {seed}")

    def cell(self, row: Method, language: str, seed: int) -> Cell:
        """The steps behind one number of the table."""
        adapter = self.method_adapter(row, language, seed)
        evaluation = self.experiment.evaluation
        inputs = {} if adapter is None else {"adapter": adapter}
        label = row.name if adapter is None else f"{row.name} seed {seed}"
        prediction = self.prediction(inputs, None, language, evaluation.split, evaluation.limit, label)
        return Cell(row.name, language, seed, prediction, self.scores(prediction), adapter)

    def method_adapter(self, row: Method, language: str, seed: int) -> Step | None:
        """The adapter a method evaluates in a language."""
        if row.adapter == "none":
            return None
        if row.adapter == "graft":
            inputs = {**self.graft_inputs(row, language, seed), "selection": self.selections[row.name]}
            return self.step("merge", self.graft_config(row), inputs, {}, f"merge {row.name} {language} seed {seed}")
        if row.adapter == "sequential":
            return self.task_adapter(self.experiment.source, seed, start_from=self.reference_adapter(language, seed))
        return self.task_adapter(language if row.adapter == "target" else self.experiment.source, seed)

    def comparison(self, language: str, seed: int) -> Step:
        """How alike the updates of the two references are: cos(ΔR_t, ΔR_s)."""
        inputs = {
            "target_ref": self.reference_adapter(language, seed),
            "source_ref": self.reference_adapter(self.experiment.source, seed),
        }
        return self.step(
            "compare", {}, inputs, {}, f"compare references {language} {self.experiment.source} seed {seed}"
        )


def characters(experiment: Experiment, steps: Sequence[Step]) -> dict[str, int]:
    """Characters that steps read, by key, for estimates: files only, the hub's rows are not fetched for one."""
    data_dir = bundled_or(experiment.data_dir)
    task = choice_task(experiment.task, experiment.tasks)
    sizes: dict[str, int] = {}
    for step in steps:
        config = step.config
        path: Path | None = None
        if "reference" in config:
            path = reference_path(experiment.reference, config["language"], experiment.data_dir)
        elif "split" in config and data_dir is not None:
            path = getattr(task.source(config["language"], config["split"], data_dir), "path", None)
        if path is not None:
            size = len(path.read_text(encoding="utf-8", errors="replace"))
            sizes[step.key] = int(size * (config["training"]["epochs"] if step.kind == "train" else 1))
    return sizes
