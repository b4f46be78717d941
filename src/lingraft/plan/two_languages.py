"""Plans what reads two languages: counterparts of items, translations, and second stages on a first one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingraft.config import BackboneConfig, Experiment, FusionConfig
from lingraft.digests import digest_file
from lingraft.errors import ConfigError, DataError
from lingraft.fusion.stages import second_adapter
from lingraft.languages import name_of
from lingraft.locating import Located, locate
from lingraft.methods import Method, method
from lingraft.plan.steps import Plain, Step
from lingraft.tasks.table import inside

if TYPE_CHECKING:
    from lingraft.plan.planner import Planner

TRANSLATED_FORM = 1
"""How texts are divided and answers projected when rows are translated: raised when that changes."""


@dataclass(frozen=True)
class Given:
    """What a step is given beyond its items: part of its configuration, its inputs and what it reads."""

    config: Plain = field(default_factory=dict[str, Any])
    inputs: Mapping[str, Step] = field(default_factory=dict[str, Step])
    reads: Mapping[str, str] = field(default_factory=dict[str, str])


class TwoLanguages:
    """The part of a planner that knows of two languages at once."""

    def __init__(self, planner: "Planner") -> None:
        self.planner = planner
        self.experiment = planner.experiment
        self._models: dict[tuple[str, str | None], Located] = {}

    def first_graft(self, row: Method) -> Method | None:
        """The graft that a method's first stage is, where it is one."""
        return method(row.first) if row.adapter == "second" and row.first != "source" else None

    def beside(self, row: Method, language: str, split: str) -> Given:
        """What a method reads beside an item of a language: its counterpart in the source language, or nothing."""
        source, settings = self.experiment.source, self.experiment.translation
        if language == source:
            # What is in the source language already needs no counterpart: it is its own.
            return Given()
        config = self._counterpart(row)
        if "language" not in config.get("counterpart", {}):
            return Given(config)
        if not self._translated(split):
            return Given(config, {}, {"counterpart_rows": self._aligned(source, split)})
        if settings.files is not None:
            return Given(config, {}, self._file("counterpart_rows", language, source, split))
        # Of a counterpart only what is asked is read, so that all methods share one translation.
        return Given(config, {"counterparts": self.translation(language, source, split, answers=False)})

    def lacks(self, row: Method, language: str) -> str | None:
        """What is not there that a method reads or learns from in a language, or None where all is."""
        planner, source, split = self.planner, self.experiment.source, self.experiment.evaluation.split
        learns = row.adapter == "second" and not self._translated("train")
        if learns and not planner.has_rows(planner.task, language, "train"):
            return "no labelled training data"
        if row.reads in ("alone", "itself") or language == source:
            return None
        if not self._translated(split) and not planner.has_rows(planner.task, source, split):
            return f"no {split} data in {name_of(source)}"
        return None

    def _counterpart(self, row: Method) -> dict[str, Any]:
        """What a step's configuration says of the counterparts that a method reads."""
        missing, own = self.experiment.translation.missing, row.reads in ("alone", "itself")
        # Where items without counterpart are left out, methods that need none leave them out too: the same data for all.
        if own and (missing == "error" or row.adapter != "second"):
            return {"counterpart": {"form": "itself"}} if row.reads == "itself" else {}
        more = {"missing": missing} if missing != "error" else {}
        return {"counterpart": {"form": row.reads, "language": self.experiment.source, **more}}

    def second_stage(self, row: Method, language: str, seed: int) -> Step:
        """The adapter of a second stage: trained in a target language on top of the first."""
        planner, experiment = self.planner, self.experiment
        task, prompt, settings = planner.task, experiment.prompt, experiment.translation
        if experiment.adapter.family != "lora":
            raise ConfigError(
                f"'{row.name}' trains a second stage, which is LoRA on LoRA, not {experiment.adapter.family}",
                remedy="use adapter.family=lora, or leave it out of `methods`",
            )
        graft = self.first_graft(row)
        first = planner.task_adapter(experiment.source, seed)
        if graft is not None:
            first = planner.method_adapter(graft, language, seed) or first
        fusion = (
            experiment.fusion
            if row.function is None
            else experiment.fusion.model_copy(update={"function": row.function})
        )
        adapter = second_adapter(experiment.adapter, fusion)
        inputs: dict[str, Step] = {"stage1": first}
        reads: dict[str, str] = {}
        if not self._translated("train"):
            reads["rows"] = self._aligned(language, "train")
        elif settings.files is not None:
            reads |= self._file("rows", experiment.source, language, "train")
        else:
            inputs["items"] = self.translation(experiment.source, language, "train", answers=True)
        if "language" in self._counterpart(row).get("counterpart", {}):
            # Translated or aligned: the counterpart of an item that is learned from is the source's own.
            reads["counterpart_rows"] = self._rows(experiment.source, "train")
        second: dict[str, Any] = {"kind": row.second}
        if row.second in ("fused", "fused-mt"):
            second["fusion"] = self._fusion_key(fusion, row)
        if row.second == "mixup":
            second["mixup"] = experiment.mixup.key()
        what = {
            "task": task.spec(prompt),
            "language": language,
            "split": "train",
            "second": second,
            **self._counterpart(row),
            **({} if prompt == "default" else {"prompt": prompt}),
            **planner.head(task),
        }
        label = f"train {row.name} {task.name} {language} seed {seed}"
        if fusion.cache and row.second == "fused":
            inputs["states"] = self.states(fusion, what, inputs, reads, label)
        if row.second == "fused-mt":
            reads["encoder"] = self._model(fusion.encoder, fusion.encoder_revision).digest
        values = experiment.fusion_values
        if row.reads == "concatenated":
            values = values.model_copy(update={"max_length": longest(what, values.max_length)})
        return planner.training_step(what, values, seed, inputs, reads, label, adapter)

    def states(self, fusion: FusionConfig, what: Plain, inputs: Mapping[str, Step], reads: Plain, label: str) -> Step:
        """Source states of a training's counterparts; they do not depend on how they are fused."""
        values = self.experiment.fusion_values
        places = fusion.model_dump(mode="json", include={"modules", "layer_offset", "normalize_source", "mask_padding"})
        config = {
            **{name: value for name, value in what.items() if name not in ("second", "head")},
            **({"head": what["head"]} if "head" in what else {}),
            "places": places,
            "max_length": values.max_length,
            "limit": values.limit,
            "dtype": self.planner.dtype,
        }
        return self.planner.step(
            "states", config, dict(inputs), {**self.planner.base, **reads}, label.replace("train", "states for", 1)
        )

    def translation(self, language: str, into: str, split: str, *, answers: bool) -> Step:
        """A split's rows, translated by a model, with their answers or as what is asked alone."""
        planner, settings = self.planner, self.experiment.translation
        model = (settings.model or "").replace("{source}", language).replace("{target}", into)
        config = {
            "task": planner.task.name,
            "language": language,
            "into": into,
            "split": split,
            "model": model,
            "beams": settings.beams,
            "answers": answers,
            "form": TRANSLATED_FORM,
            "dtype": planner.dtype,
        }
        if (limit := self._limit(split)) is not None:
            config["limit"] = limit
        reads = {"rows": self._rows(language, split), "model": self._model(model, settings.revision).digest}
        return planner.step("translate", config, {}, reads, f"translate {planner.task.name} {language}-{into} {split}")

    def _model(self, model: str, revision: str | None) -> Located:
        """A model beside the backbone, its commit resolved once."""
        if (model, revision) not in self._models:
            self._models[model, revision] = locate(BackboneConfig(model=model, revision=revision))
        return self._models[model, revision]

    def _limit(self, split: str) -> int | None:
        """How many items are needed of a split: no more of them are translated."""
        experiment, planner = self.experiment, self.planner
        if split == "train":
            return experiment.fusion_values.limit
        wanted = experiment.evaluation.limit or planner.task.sample.get(split)
        return planner.at_most(wanted, planner.scoring(experiment.prompt)["scoring"])

    def _translated(self, split: str) -> bool:
        settings = self.experiment.translation
        return (settings.model is not None or settings.files is not None) and split in settings.splits

    def _rows(self, language: str, split: str) -> str:
        return self.planner.rows_digest(self.planner.task, language, split)

    def _aligned(self, language: str, split: str) -> str:
        """The digest of rows that could also be translated from the other language's.

        Raises:
            DataError: There are none.
        """
        try:
            return self._rows(language, split)
        except DataError as error:
            raise DataError(
                error.what, where=error.where, remedy=f"{error.remedy}; or translate them (translation.model)"
            ) from None

    def _file(self, name: str, language: str, into: str, split: str) -> dict[str, str]:
        """The digest of a file of translated rows.

        Raises:
            DataError: There is no such file.
        """
        path = translated_file(self.experiment, self.planner.data_dir, language, into, split)
        if not path.is_file():
            raise DataError(
                "this file of translations is missing",
                where=path,
                remedy="check translation.files and --data-dir, or give translation.model",
            )
        return {name: digest_file(path)}

    def _fusion_key(self, fusion: FusionConfig, row: Method) -> dict[str, Any]:
        if row.second != "fused-mt":
            return fusion.key("cache", "cache_limit", "encoder", "encoder_revision")
        # The commit that was found is the one to train with, and to ask with later.
        commit = self._model(fusion.encoder, fusion.encoder_revision).config.revision
        unread = ("cache", "cache_limit", "layer_offset", "normalize_source", "mask_padding", "decoding")
        if commit is None:
            return fusion.key(*unread, "encoder_revision")
        return fusion.model_copy(update={"encoder_revision": commit}).key(*unread)


def original(experiment: Experiment, step: Step) -> str:
    """The language in which a step's items were first written: translations are about as long."""
    settings = experiment.translation
    in_files = settings.files is not None and "train" in settings.splits and {"second", "places"} & set(step.config)
    return experiment.source if "items" in step.inputs or in_files else step.config["language"]


def longest(config: Plain, max_length: int) -> int:
    """The most tokens of an input: two texts in one may have twice as many as one."""
    return max_length * (2 if config.get("counterpart", {}).get("form") == "concatenated" else 1)


def texts_of(step: Step) -> int:
    """How many texts a step reads of every item."""
    return 2 if step.config.get("counterpart", {}).get("form") in ("beside", "concatenated") else 1


def translated_file(experiment: Experiment, data_dir: Path | None, language: str, into: str, split: str) -> Path:
    """Where a file of translated rows lies, below the data folder whatever a shared recipe says.

    Raises:
        UserError: It does not.
    """
    path = inside(experiment.translation.files or "")
    for name, value in (("from", language), ("to", into), ("split", split)):
        path = path.replace(f"{{{name}}}", value)
    return (data_dir or Path()) / path
