"""From an experiment to the unique steps it takes. Planning reads configurations and digests, never a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lingraft.config import NO_REFERENCE, AdapterConfig, Experiment, TrainingConfig, epochs_read
from lingraft.digests import digest_file
from lingraft.errors import ConfigError, DataError
from lingraft.families import family
from lingraft.languages import name_of
from lingraft.locating import Located, architecture_of
from lingraft.methods import Method, method
from lingraft.plan.stacks import Stacks
from lingraft.plan.steps import Cell, Plain, Plan, Step, ordered
from lingraft.plan.two_languages import Given, TwoLanguages, longest, original, texts_of
from lingraft.protocols import PAPER
from lingraft.serving import check_served, served_head
from lingraft.tasks.reference import reference_path, reference_text
from lingraft.tasks.sources import bundled_or
from lingraft.tasks.table import find_task
from lingraft.tasks.task import Task


def make_plan(experiment: Experiment, located: Located) -> Plan:
    """Plans an experiment.

    Raises:
        UserError: A method or task is unknown, data or a development language is missing.
    """
    return Planner(experiment, located).plan()


class Planner:
    """Makes the steps of one experiment; the same work is the same object.

    Args:
        experiment: What is asked.
        located: Its base model.

    Raises:
        UserError: A method or task is unknown, or the base does not serve them.
    """

    def __init__(self, experiment: Experiment, located: Located) -> None:
        self.experiment = experiment
        self.task: Task = find_task(experiment.task, experiment.tasks)
        self.task.prompt(experiment.prompt)  # A wording it does not have is said now.
        reference = experiment.reference
        self.reference_task = find_task(reference.task, experiment.tasks) if reference.labelled else None
        self.data_dir = bundled_or(experiment.data_dir)
        self.methods = [method(name) for name in dict.fromkeys(experiment.methods)]
        self.architecture = architecture_of(located)
        check_served(self.architecture, self.task, experiment, self.methods)
        precision = experiment.backbone.quantization
        self.base = {"backbone": located.digest if precision == "none" else f"{located.digest}:{precision}"}
        self.dtype = experiment.backbone.dtype
        # The paper's tables hold cells for which nobody has labels; elsewhere a language without data is a mistake.
        self.lenient = experiment.protocol == PAPER
        self._digests: dict[tuple[str, str, str], str] = {}
        self._steps: dict[str, Step] = {}
        self.selections: dict[tuple[str, str | None], Step] = {}
        self.two = TwoLanguages(self)
        self.stacks = Stacks(self)

    def plan(self) -> Plan:
        """See `make_plan`."""
        experiment = self.experiment
        cells: list[Cell] = []
        absent: list[tuple[str, str, str]] = []
        if not self.lenient:
            self.rows_digest(self.task, experiment.source, "train")
        languages = {row.name: self.languages(row, absent) for row in self.methods}
        for row in self.methods:
            graft = row if row.adapter == "graft" else self.two.first_graft(row)
            if graft is not None and languages[row.name]:
                for language in languages[row.name] if graft.criterion != "labels" else (None,):
                    self.selections[graft.name, language] = self.selection(graft, language)
        for row in self.methods:
            for language in languages[row.name]:
                for seed in self.seeds(row) if row.adapter != "none" else self.seeds(row)[:1]:
                    cells.append(self.cell(row, language, seed))
        comparisons: dict[tuple[str, int], Step] = {}
        if self.selections:
            # Language adapters of several parts are not compared: the figure is one of the experiment's own references.
            grafts = (m for m in self.methods if m.adapter == "graft" and m.stack is None)
            for row in (m for m in grafts if m.references == ("target", "source")):
                for language in languages[row.name]:
                    for seed in self.seeds(row):
                        comparisons[language, seed] = self.comparison(language, seed)
        ends = [
            *comparisons.values(),
            *self.selections.values(),
            *(step for c in cells for step in (c.score, c.adapter) if step),
        ]
        # Translations first: a language that their model does not know is said before the first training.
        translations = [step for step in self._steps.values() if step.kind == "translate"]
        steps = ordered([*translations, *ends])
        _check_apart(steps, experiment.task)
        return Plan(experiment, steps, tuple(cells), self.selections, comparisons, tuple(absent))

    def languages(self, row: Method, absent: list[tuple[str, str, str]]) -> list[str]:
        """The languages in which a method has a number; those in which it has none are noted, with the reason."""
        experiment = self.experiment
        wanted = [*experiment.targets]
        if row.adapter in ("none", "source", "stack") and experiment.evaluation.source:
            wanted.insert(0, experiment.source)
        found: list[str] = []
        for language in wanted:
            reason = self.lacks(row, language)
            if reason is None:
                found.append(language)
            else:
                absent.append((row.name, language, reason))
        return found

    def lacks(self, row: Method, language: str) -> str | None:
        """Why a method has no number in a language, or None where it has one."""
        experiment, split = self.experiment, self.experiment.evaluation.split
        # XCOPA has no English test set; the source's own figure is a courtesy, not a result.
        courtesy = language == experiment.source
        if (courtesy or self.lenient) and not self.has_rows(self.task, language, split):
            return f"no labelled {split} data"
        if row.adapter == "target" and not self.has_rows(self.task, language, "train"):
            return "no labelled training data"
        if not self.lenient or row.adapter in ("none", "target"):
            return None
        if not self.has_rows(self.task, experiment.source, "train"):
            return f"no labelled training data in {name_of(experiment.source)}"
        if (reason := self.two.lacks(row, language)) is not None:
            return reason
        graft = row.adapter == "graft" or self.two.first_graft(row) is not None
        if graft and self.reference_task is not None:
            for code in (language, experiment.source, *experiment.development):
                if not self.has_rows(self.reference_task, code, experiment.reference.split):
                    return f"no labelled data of the reference task '{self.reference_task.name}' in {name_of(code)}"
        return None

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

    def rows_digest(self, task: Task, language: str, split: str) -> str:
        """The digest of a language's rows of a task.

        Raises:
            DataError: There are none.
        """
        place = (task.name, language, split)
        if place not in self._digests:
            folder = self.data_dir
            if task is not self.task and self.experiment.reference.data_dir is not None:
                folder = bundled_or(self.experiment.reference.data_dir)
            revision = self.experiment.data_revision if task is self.task else None
            sources = task.sources(language, split, folder, revision)
            self._digests[place] = "+".join(s.digest() for s in sources)
        return self._digests[place]

    def has_rows(self, task: Task, language: str, split: str) -> bool:
        """Whether a task has rows of a split in a language."""
        try:
            self.rows_digest(task, language, split)
        except DataError:
            return False
        return True

    def task_adapter(
        self,
        language: str,
        seed: int,
        *,
        start_from: Step | None = None,
        beneath: Step | None = None,
        training: TrainingConfig | None = None,
        adapter: AdapterConfig | None = None,
        named: str = "",
    ) -> Step:
        """The task's adapter in a language, from its initial weights or from another adapter, perhaps on top of others.

        Args:
            language: The labels' language.
            seed: Initial weights, order and dropout.
            start_from: An adapter to go on from.
            beneath: Adapters that it is trained on top of, and that stay as they are.
            training: Its values; None: the experiment's.
            adapter: Its structure; None: the experiment's.
            named: What tells its label from that of the experiment's own.
        """
        inputs = {"start_from": start_from, "beneath": beneath}
        given = {role: step for role, step in inputs.items() if step is not None}
        values = training or self.experiment.training
        return self._labelled(self.task, language, "train", values, seed, given, adapter, named)

    def _labelled(
        self,
        task: Task,
        language: str,
        split: str,
        training: TrainingConfig,
        seed: int,
        inputs: Mapping[str, Step] | None = None,
        adapter: AdapterConfig | None = None,
        named: str = "",
    ) -> Step:
        start_from = (inputs or {}).get("start_from")
        after = "" if start_from is None else f" after {start_from.config['language']} {self.experiment.reference.task}"
        prompt = self.experiment.prompt if task is self.task else "default"
        config: dict[str, Any] = {"task": task.spec(prompt), "language": language, "split": split}
        return self.training_step(
            {**config, **wording(prompt), **self.head(task)},
            training,
            seed,
            inputs or {},
            {"rows": self.rows_digest(task, language, split)},
            f"train {named}{task.name} {language}{after} seed {seed}",
            adapter,
        )

    def head(self, task: Task) -> dict[str, Any]:
        """What an encoder's training has on top of the adapter."""
        if self.architecture != "encoder":
            return {}
        return {"head": served_head(task)}

    def reference_adapter(
        self,
        language: str,
        seed: int,
        adapter: AdapterConfig | None = None,
        training: TrainingConfig | None = None,
        named: str = "",
    ) -> Step:
        """The reference task's adapter in a language.

        Args:
            language: Which language.
            seed: Initial weights, order and what is drawn.
            adapter: Its structure; None: the experiment's.
            training: Its values; None: the experiment's.
            named: What tells its label from that of the experiment's own.

        Raises:
            ConfigError: The experiment has none.
        """
        config = self.experiment.reference
        if config.task == NO_REFERENCE:
            raise ConfigError(
                "a method needs a reference task", remedy="add reference: {task: clm, text: ...}, or leave grafts out"
            )
        if self.reference_task is not None:
            return self._labelled(self.reference_task, language, config.split, self.experiment.reference_values, seed)
        what: dict[str, Any] = {"reference": config.key("text", "data_dir"), "language": language}
        if config.task == "mlm":
            what["head"] = {"kind": "masked_lm", "labels": 0}
        # Plain text has no items and no answers: what is said of these is no reason to read it again.
        return self.training_step(
            what,
            (training or self.experiment.reference_values).model_copy(update=_OF_ITEMS),
            seed,
            {},
            {"text": reference_text(config, language, self.experiment.data_dir).digest()},
            f"train {named}{config.task} {language} seed {seed}",
            adapter,
        )

    def projected_adapter(self, language: str, seed: int) -> Step:
        """T trained on with the labels it gave to the source side of parallel text, on this language's side."""
        config, labels = self.experiment.reference, self._projected_labels(seed)
        path = reference_path(config, language, self.experiment.data_dir)
        return self.training_step(
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
        if self.architecture != "decoder":
            raise ConfigError("projected labels are for decoders", remedy="leave methods with projected labels out")
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
        return self.training_step(
            {"initial": True, "language": "-", **(self.head(self.reference_task) if self.reference_task else {})},
            training,
            seed,
            {},
            {},
            f"initial adapter seed {seed}",
        )

    def training_step(
        self,
        what: Plain,
        training: TrainingConfig,
        seed: int,
        inputs: Mapping[str, Step],
        reads: Plain,
        label: str,
        adapter: AdapterConfig | None = None,
    ) -> Step:
        """The training of an adapter, of the experiment's structure if no other is given."""
        config = {
            **what,
            "adapter": (adapter or self.experiment.adapter).key(),
            "training": training.key(),
            "dtype": self.dtype,
            "seed": seed,
        }
        return self.step("train", config, inputs, {**self.base, **reads}, label)

    def other_language(self, language: str) -> str:
        """The language whose divergence controls for another's: the next of the experiment's, in a circle."""
        languages = list(dict.fromkeys([*self.experiment.targets, *self.experiment.development]))
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
        label: str,
        *,
        prompt: str,
        choosing: bool = False,
        beside: Given | None = None,
        max_length: int | None = None,
    ) -> Step:
        """Predictions of the base, an adapter, or a graft merged in memory; for choosing λ, on fewer items and cheaper."""
        config, reads = self._asked(graft, language, split, choosing, prompt)
        config |= self.scoring(prompt, choosing)
        if max_length is not None:
            config["max_length"] = max_length
        if beside is not None:
            config.update(beside.config)
            reads.update(beside.reads)
            inputs = {**inputs, **beside.inputs}
        config["limit"] = self.at_most(config["limit"], config["scoring"])
        return self.step("predict", config, inputs, reads, f"predict {label} {language} {split}")

    def at_most(self, limit: int | None, scoring: str) -> int | None:
        """How many items are asked where so many are wanted: fewer where the model writes its answers."""
        sample = self.experiment.evaluation.written_limit
        return limit if scoring != "generation" or sample is None else min(sample, limit or sample)

    def scoring(self, prompt: str, choosing: bool = False) -> dict[str, Any]:
        """By what answers are judged: candidates by their likelihood where that can be, else what is written."""
        evaluation, task = self.experiment.evaluation, self.task
        likelihood = task.kind == "choice" and not task.prompt(prompt).generate
        if self.architecture == "encoder":
            return {"scoring": "head"}
        if choosing and task.kind != "choice":
            return {"scoring": "gold"}
        if likelihood and (evaluation.scoring != "generation" or choosing):
            scoring = "auto" if evaluation.scoring == "generation" else evaluation.scoring
            ends = {"ends": True} if _begun(task.prompt(prompt).answers or task.answers) else {}
            return {"scoring": scoring, **({"normalised": True} if evaluation.normalised else {}), **ends}
        wording = task.prompt(prompt)
        tokens = evaluation.new_tokens or wording.new_tokens
        return {"scoring": "generation", "new_tokens": tokens, "stop": list(wording.stop)}

    def _asked(
        self, graft: Plain | None, language: str, split: str, choosing: bool, prompt: str
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Which items a model is given, and what is put on it: configuration, and digests of what is read."""
        limit = self.experiment.selection.limit if choosing else self.experiment.evaluation.limit
        config: dict[str, Any] = {
            "task": self.task.spec(prompt),
            "language": language,
            "split": split,
            "limit": limit or self.task.sample.get(split),
            "max_length": self.experiment.training.max_length,
            "dtype": self.dtype,
            "graft": graft,
            **wording(prompt),
        }
        return config, {**self.base, "rows": self.rows_digest(self.task, language, split)}

    def scores(self, prediction: Step) -> Step:
        """The metrics of predictions."""
        config: dict[str, Any] = {}
        if prediction.config["scoring"] in ("generation", "gold") or self.task.kind != "choice":
            prompt = prediction.config.get("prompt", "default")
            config = {"rule": self.task.rule(prompt), "language": prediction.config["language"]}
        label = prediction.label.replace("predict", "score", 1)
        return self.step("score", config, {"predict": prediction}, {}, label)

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
        if language is None:
            self._check_choosing(row)
        weights = sorted({row.neutral, *(w for w in chosen.weights if not row.neutral or w < row.neutral)})
        if row.stack is not None:  # The method without a graft is one of them.
            weights = sorted({*weights, 1.0})
        inputs: dict[str, Step] = {}
        # The weights of a merge one after the other: it stays on the model meanwhile.
        for code in self.experiment.development if language is None else (language,):
            for split in chosen.splits:
                for seed in self.judging(row):
                    for weight in weights:
                        inputs[f"{weight!r}/{code}/{split}/{seed}"] = self._candidate(row, weight, code, split, seed)
        config: dict[str, Any] = {"weights": weights, "criterion": _CRITERION[row.criterion]}
        if row.neutral:
            config["neutral"] = row.neutral
        return self.step("select", config, inputs, {}, f"select λ of {row.name}" + (f" {language}" if language else ""))

    def _check_choosing(self, row: Method) -> None:
        """Makes sure that there is something to choose λ on."""
        if not self.experiment.development:
            raise ConfigError(
                f"'{row.name}' needs development languages to choose λ on",
                remedy="add development: [..], languages that are not targets, or fix selection.weight, or choose without "
                f"labels: {row.name}:entropy",
            )
        for split in self.experiment.selection.splits:
            for code in self.experiment.development:
                try:
                    self.rows_digest(self.task, code, split)
                except DataError as error:
                    raise DataError(
                        f"λ cannot be chosen on {name_of(code)}: {error.what}",
                        where=error.where,
                        remedy=f"{error.remedy}; or choose on other languages (development), or fix selection.weight",
                    ) from None

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
        label = f"{row.name.partition(':')[0]} λ={weight:g} seed {seed}"
        if row.stack is not None:
            graft, inputs = self.stacks.candidate(row, weight, language, seed)
        elif weight == row.neutral:
            graft, inputs = None, {"adapter": self.task_adapter(self.experiment.source, seed)}
            label = f"eng-ft seed {seed}"
        else:
            graft = {**self.graft_config(row), "weight": weight}
            inputs = self.graft_inputs(row, language, seed)
        # Reasoning has no likelihood: a weight is then chosen by the candidates after the default prompt.
        prompt = self.experiment.prompt if not self.task.prompt(self.experiment.prompt).generate else "default"
        if row.criterion == "likelihood":
            return self.reading(inputs, graft, language, split, label)
        return self.scores(self.prediction(inputs, graft, language, split, label, prompt=prompt, choosing=True))

    def reading(self, inputs: Mapping[str, Step], graft: Plain | None, language: str, split: str, label: str) -> Step:
        """The likelihood of items as text; their labels are not looked at."""
        config, reads = self._asked(graft, language, split, True, self.experiment.prompt)
        return self.step("read", config, inputs, reads, f"read {label} {language} {split}")

    def cell(self, row: Method, language: str, seed: int) -> Cell:
        """The steps behind one number of the table."""
        adapter = self.method_adapter(row, language, seed)
        inputs = {} if adapter is None else {"adapter": adapter}
        if row.stack is not None and adapter is not None:
            inputs = self.stacks.asked(row, adapter, seed)
        label = row.name if adapter is None else f"{row.name} seed {seed}"
        split, prompt = self.experiment.evaluation.split, row.prompt or self.experiment.prompt
        beside = self.two.beside(row, language, split)
        # A second stage is asked with as much room as it was trained with.
        room = longest(beside.config, self.experiment.fusion_values.max_length) if row.adapter == "second" else None
        prediction = self.prediction(
            inputs, None, language, split, label, prompt=prompt, beside=beside, max_length=room
        )
        return Cell(row.name, language, seed, prediction, self.scores(prediction), adapter)

    def method_adapter(self, row: Method, language: str, seed: int) -> Step | None:
        """The adapter a method evaluates in a language; of a stack, what lies beneath the task's."""
        if row.adapter == "none":
            return None
        if row.stack is not None:
            selection = self._chosen(row, language) if row.adapter == "graft" else None
            return self.stacks.beneath(row, language, seed, selection)
        if row.adapter == "graft":
            inputs = {**self.graft_inputs(row, language, seed), "selection": self._chosen(row, language)}
            return self.step("merge", self.graft_config(row), inputs, {}, f"merge {row.name} {language} seed {seed}")
        if row.adapter == "sequential":
            return self.task_adapter(self.experiment.source, seed, start_from=self.reference_adapter(language, seed))
        if row.adapter == "projected":
            return self.projected_adapter(language, seed)
        if row.adapter == "second":
            return self.two.second_stage(row, language, seed)
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


def _check_apart(steps: Sequence[Step], task: str) -> None:
    """Makes sure that no reference task is learned from the rows of a test: data sets share items under other names.

    Raises:
        ConfigError: A training reads a test's rows.
    """
    tested = {step.reads["rows"] for step in steps if step.kind == "predict" and step.config["split"] == "test"}
    for step in steps:
        if step.kind == "train" and step.reads.get("rows") in tested and step.config["task"]["task"] != task:
            raise ConfigError(
                f"'{step.label}' would read the rows of a test",
                remedy="take another reference task, or another reference.split",
            )


def _begun(answers: Mapping[str, str]) -> bool:
    """Whether an answer is the beginning of another: then the end of text belongs to every answer."""
    texts = list(answers.values())
    return any(one != other and other.startswith(one) for one in texts for other in texts)


_CRITERION = {"labels": "gold_log_likelihood", "entropy": "entropy", "likelihood": "text_log_likelihood"}
"""What of a candidate's figures a criterion compares."""


_OF_ITEMS = {name: TrainingConfig.model_fields[name].default for name in TrainingConfig.later}
"""Training values that concern items with answers, at their defaults."""


def wording(prompt: str) -> dict[str, str]:
    """The prompt's name, where it is not the default: earlier steps have none."""
    return {} if prompt == "default" else {"prompt": prompt}


def characters(experiment: Experiment, steps: Sequence[Step]) -> dict[str, int]:
    """Characters that steps read, by key, for estimates: files only, the hub's rows are not fetched for one."""
    data_dir, reference = bundled_or(experiment.data_dir), experiment.reference
    sizes: dict[str, int] = {}
    for step in steps:
        config = step.config
        path: Path | None = None
        lines: int | None = None
        if "reference" in config or "projected" in config:
            if reference.text:
                path = reference_path(reference, config["language"], experiment.data_dir)
                lines = reference.max_segments if reference.unit == "line" else None
        elif "split" in config and data_dir is not None and step.kind != "translate":
            task = find_task(config["task"]["task"], experiment.tasks)
            path = getattr(task.source(original(experiment, step), config["split"], data_dir), "path", None)
        if path is not None:
            text = path.read_text(encoding="utf-8", errors="replace")
            size = len(text) if lines is None else sum(map(len, text.splitlines(keepends=True)[:lines]))
            times = epochs_read(config["adapter"], config["training"]) if step.kind == "train" else 1
            sizes[step.key] = int(size * times * texts_of(step))
    return sizes
