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

VERSIONS = {"train": 1, "merge": 1, "predict": 1, "score": 2, "read": 1, "project": 1, "select": 1, "compare": 1}
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
        selections: The choice of λ, by method and, where it is chosen without labels, target language.
        comparisons: The likeness of the references' updates, by (language, seed).
        absent: (method, language, reason) where there are no data.
    """

    experiment: Experiment
    steps: tuple[Step, ...]
    cells: tuple[Cell, ...]
    selections: Mapping[tuple[str, str | None], Step]
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
        self.selections: dict[tuple[str, str | None], Step] = {}

    def plan(self) -> Plan:
        """See `make_plan`."""
        experiment = self.experiment
        cells: list[Cell] = []
        absent: list[tuple[str, str, str]] = []
        self.rows_digest(experiment.source, "train")
        for row in self.methods:
            if row.adapter == "graft":
                for language in experiment.targets if row.criterion != "labels" else (None,):
                    self.selections[row.name, language] = self.selection(row, language)
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
                for seed in self.seeds(row) if row.adapter != "none" else self.seeds(row)[:1]:
                    cells.append(self.cell(row, language, seed))
        comparisons: dict[tuple[str, int], Step] = {}
        if self.selections:
            for row in (m for m in self.methods if m.references == ("target", "source") and m.adapter == "graft"):
                for language in experiment.targets:
                    for seed in self.seeds(row):
                        comparisons[language, seed] = self.comparison(language, seed)
        ends = [
            *comparisons.values(),
            *self.selections.values(),
            *(step for c in cells for step in (c.score, c.adapter) if step),
        ]
        return Plan(experiment, ordered(ends), tuple(cells), self.selections, comparisons, tuple(absent))

    def seeds(self, row: Method) -> tuple[int, ...]:
        """The seeds of a method."""
        return self.experiment.seeds_of.get(row.name, self.experiment.seeds)

    def judging(self, row: Method) -> tuple[int, ...]:
        """The seeds on which a method's λ is chosen."""
        own, some = self.seeds(row), self.experiment.selection.seeds
        return own if some is None else tuple(seed for seed in own if seed in some) or own

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

    def projected_adapter(self, language: str, seed: int) -> Step:
        """T trained on with the labels it gave to the source side of parallel text, on this language's side."""
        config, labels = self.experiment.reference, self._projected_labels(seed)
        path = reference_path(config, language, self.experiment.data_dir)
        return self._training(
            {"projected": config.segment_tokens, "task": self.task.spec(), "language": language},
            self.experiment.projection_values,
            seed,
            {"start_from": labels.inputs["adapter"], "labels": labels},
            {"text": digest_file(path)},
            f"train {self.task.name} {language} projected seed {seed}",
        )

    def _projected_labels(self, seed: int) -> Step:
        experiment = self.experiment
        reference = experiment.reference
        if reference.unit != "line":
            raise ConfigError(
                "projected labels need parallel text, line by line", remedy="give such text and reference.unit=line"
            )
        self.task.of_text(())  # A task that cannot be asked of plain text is said now.
        path = reference_path(reference, experiment.source, experiment.data_dir)
        config = {
            "task": self.task.spec(),
            "language": experiment.source,
            "projected": reference.segment_tokens,
            "max_segments": reference.max_segments,
            "projection": experiment.projection.key(),
            "scoring": experiment.evaluation.scoring,
            "max_length": experiment.training.max_length,
            "dtype": self.dtype,
        }
        inputs = {"adapter": self.task_adapter(experiment.source, seed)}
        reads = {**self.base, "text": digest_file(path)}
        return self.step("project", config, inputs, reads, f"label {experiment.source} text seed {seed}")

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
            "projected-target": lambda: self.projected_adapter(language, seed),
            "projected-source": lambda: self.projected_adapter(self.experiment.source, seed),
            "projected-other": lambda: self.projected_adapter(self.other_language(language), seed),
            "task": lambda: self.task_adapter(self.experiment.source, seed),
        }
        return {
            "task": self.task_adapter(self.experiment.source, seed),
            "target_ref": makers[row.references[0]](),
            "source_ref": makers[row.references[1]](),
        }

    def graft_config(self, row: Method) -> dict[str, Any]:
        """How a graft is merged, its weight aside.

        Raises:
            ConfigError: The method does not know the structure.
        """
        merge = self.experiment.merge
        modules = merge.modules if isinstance(merge.modules, str) else list(merge.modules)
        if row.rule != "transfer":
            if self.experiment.adapter.family not in ("lora", "ia3"):
                raise ConfigError(
                    f"the method '{row.name}' is for LoRA and (IA)³, not for the structure '{self.experiment.adapter.family}'",
                    remedy="leave it out of `methods`",
                )
            return {"rule": row.rule, "space": None, "modules": modules, "out_rank": None}
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
        config, reads = self._asked(graft, language, split, limit)
        config["scoring"] = self.experiment.evaluation.scoring
        return self.step("predict", config, inputs, reads, f"predict {label} {language} {split}")

    def _asked(
        self, graft: Plain | None, language: str, split: str, limit: int | None
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Which items a model is given, and what is put on it: configuration, and digests of what is read."""
        config: dict[str, Any] = {
            "task": self.task.spec(),
            "language": language,
            "split": split,
            "limit": limit,
            "max_length": self.experiment.training.max_length,
            "dtype": self.dtype,
            "graft": graft,
        }
        return config, {**self.base, "rows": self.rows_digest(language, split)}

    def scores(self, prediction: Step) -> Step:
        """The metrics of predictions."""
        return self.step("score", {}, {"predict": prediction}, {}, prediction.label.replace("predict", "score", 1))

    def selection(self, row: Method, language: str | None = None) -> Step:
        """The choice of a method's λ, over all seeds: on the development languages, or without labels for one target.

        Raises:
            ConfigError: There are no development languages to choose on.
        """
        chosen = self.experiment.selection
        if chosen.weight is not None:
            return self.step("select", {"weight": chosen.weight}, {}, {}, f"λ of {row.name}: {chosen.weight}, as given")
        if language is not None and row.criterion == "norms":
            return self._by_norms(row, language)
        if language is None and not self.experiment.development:
            raise ConfigError(
                f"'{row.name}' needs development languages to choose λ on",
                remedy="add development: [..], languages that are not targets, or fix selection.weight, or choose without "
                f"labels: {row.name}:entropy",
            )
        weights = sorted({row.neutral, *(w for w in chosen.weights if not row.neutral or w < row.neutral)})
        inputs: dict[str, Step] = {}
        for weight in weights:
            for code in self.experiment.development if language is None else (language,):
                for split in chosen.splits:
                    for seed in self.judging(row):
                        inputs[f"{weight!r}/{code}/{split}/{seed}"] = self._candidate(row, weight, code, split, seed)
        config: dict[str, Any] = {"weights": weights, "criterion": _CRITERION[row.criterion]}
        if row.neutral:
            config["neutral"] = row.neutral
        return self.step("select", config, inputs, {}, f"select λ of {row.name}" + (f" {language}" if language else ""))

    def _by_norms(self, row: Method, language: str) -> Step:
        inputs: dict[str, Step] = {}
        for seed in self.judging(row):
            parts = self.graft_inputs(row, language, seed)
            inputs[f"references/{seed}"] = self._likeness(parts["target_ref"], parts["source_ref"], language, seed)
            inputs[f"task/{seed}"] = self._likeness(parts["task"], parts["target_ref"], language, seed, "task and ")
        config = {"criterion": "norms", "highest": max(self.experiment.selection.weights)}
        return self.step("select", config, inputs, {}, f"select λ of {row.name} {language}")

    def _candidate(self, row: Method, weight: float, language: str, split: str, seed: int) -> Step:
        """What a weight is judged by: scores of answers, or the likelihood of the items as text."""
        limit = self.experiment.selection.limit
        if weight == row.neutral:
            graft, inputs = None, {"adapter": self.task_adapter(self.experiment.source, seed)}
            label = f"eng-ft seed {seed}"
        else:
            graft = {**self.graft_config(row), "weight": weight}
            inputs = self.graft_inputs(row, language, seed)
            label = f"{row.name.partition(':')[0]} λ={weight:g} seed {seed}"
        if row.criterion == "likelihood":
            return self.reading(inputs, graft, language, split, limit, label)
        return self.scores(self.prediction(inputs, graft, language, split, limit, label))

    def reading(
        self, inputs: Mapping[str, Step], graft: Plain | None, language: str, split: str, limit: int | None, label: str
    ) -> Step:
        """The likelihood of items as text; their labels are not looked at."""
        config, reads = self._asked(graft, language, split, limit)
        return self.step("read", config, inputs, reads, f"read {label} {language} {split}")

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
            inputs = {**self.graft_inputs(row, language, seed), "selection": self._chosen(row, language)}
            return self.step("merge", self.graft_config(row), inputs, {}, f"merge {row.name} {language} seed {seed}")
        if row.adapter == "sequential":
            return self.task_adapter(self.experiment.source, seed, start_from=self.reference_adapter(language, seed))
        if row.adapter == "projected":
            return self.projected_adapter(language, seed)
        return self.task_adapter(language if row.adapter == "target" else self.experiment.source, seed)

    def _chosen(self, row: Method, language: str) -> Step:
        return self.selections[row.name, None if row.criterion == "labels" else language]

    def comparison(self, language: str, seed: int) -> Step:
        """How alike the updates of the two references are: cos(ΔR_t, ΔR_s)."""
        target, source = (self.reference_adapter(code, seed) for code in (language, self.experiment.source))
        return self._likeness(target, source, f"{language} {self.experiment.source}", seed)

    def _likeness(self, x: Step, y: Step, languages: str, seed: int, more: str = "") -> Step:
        inputs = {"target_ref": x, "source_ref": y}
        return self.step("compare", {}, inputs, {}, f"compare {more}references {languages} seed {seed}")


_CRITERION = {"labels": "gold_log_likelihood", "entropy": "entropy", "likelihood": "text_log_likelihood"}
"""What of a candidate's figures a criterion compares."""


def characters(experiment: Experiment, steps: Sequence[Step]) -> dict[str, int]:
    """Characters that steps read, by key, for estimates: files only, the hub's rows are not fetched for one."""
    data_dir = bundled_or(experiment.data_dir)
    task = choice_task(experiment.task, experiment.tasks)
    sizes: dict[str, int] = {}
    for step in steps:
        config = step.config
        path: Path | None = None
        if "reference" in config or "projected" in config:
            path = reference_path(experiment.reference, config["language"], experiment.data_dir)
        elif "split" in config and data_dir is not None:
            path = getattr(task.source(config["language"], config["split"], data_dir), "path", None)
        if path is not None:
            size = len(path.read_text(encoding="utf-8", errors="replace"))
            sizes[step.key] = int(size * (config["training"]["epochs"] if step.kind == "train" else 1))
    return sizes
