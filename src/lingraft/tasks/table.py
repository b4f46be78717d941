"""The table of tasks. A new choice task is a row here, or a few lines of YAML in an experiment."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lingraft import prompts
from lingraft.config import CustomTask
from lingraft.errors import UserError, suggestion
from lingraft.tasks.choice import ChoiceTask, Hub
from lingraft.tasks.sources import Row

_TOPICS = ("science/technology", "travel", "politics", "sports", "health", "entertainment", "geography")
_UPSTREAM = {"train": "train", "validation": "dev", "test": "test"}


def _english_question(rows: list[Row], english: list[Row]) -> list[Row]:
    """XCOPA's `question` is wrong in some languages: takes it from the English item of the same index."""
    right = {row.fields.get("idx"): row.fields["question"] for row in english if "question" in row.fields}
    return [
        replace(
            row,
            fields={
                **row.fields,
                "question": right.get(row.fields.get("idx"), row.fields.get("question", "")),
            },
        )
        for row in rows
    ]


def _sib_hub(language: str, split: str) -> Hub:
    return Hub("Davlan/sib200", "{flores}", {"train": "train", "validation": "validation", "test": "test"})


_COPA = Hub("aps/super_glue", "copa", {"train": "train", "validation": "validation"})


def _copa_hub(language: str, split: str) -> Hub:
    if language == "en":
        return _COPA
    return Hub("cambridgeltl/xcopa", "{language}", {"validation": "validation", "test": "test"})


_XCOPA = ChoiceTask(
    name="xcopa",
    template=prompts.XCOPA,
    answers={"0": "(A)", "1": "(B)"},
    label_field="label",
    id_field="idx",
    layouts={
        "train": ("copa_{language}/train.jsonl",),
        "validation": (
            "xcopa/data/{language}/val.{language}.jsonl",
            "data/{language}/val.{language}.jsonl",
            "copa_{language}/val.jsonl",
        ),
        "test": ("xcopa/data/{language}/test.{language}.jsonl", "data/{language}/test.{language}.jsonl"),
    },
    hubs=_copa_hub,
    licence="XCOPA: CC BY 4.0; COPA: BSD-2-Clause",
    companion={"validation": "copa_en/val.jsonl"},
    hub_companion={"validation": _COPA},
    repair=_english_question,
    note="XCOPA's question field is wrong in some languages: on validation it is taken from the English item, "
    "on test, which has no English file, it is used as it is.",
)

TASKS: dict[str, ChoiceTask] = {
    "topics": ChoiceTask(
        name="topics",
        template=prompts.TOPICS,
        answers={topic: topic for topic in _TOPICS},
        label_field="category",
        id_field="index_id",
        layouts={
            split: (
                f"sib200/{{flores}}/{theirs}.tsv",
                f"data/annotated/{{flores}}/{theirs}.tsv",
                f"topics/{{language}}/{split}.tsv",
            )
            for split, theirs in _UPSTREAM.items()
        },
        hubs=_sib_hub,
        licence="SIB-200: Apache-2.0, text CC BY-SA 4.0; lingraft's bundled sentences: CC0",
    ),
    "xcopa": _XCOPA,
    "xcopa-raw": replace(_XCOPA, name="xcopa-raw", companion={}, hub_companion={}, repair=None, note=None),
}


def choice_task(name: str, custom: Mapping[str, CustomTask] | None = None) -> ChoiceTask:
    """A task of the table, or of the user's own.

    Raises:
        UserError: There is no such task.
    """
    if custom and name in custom:
        return _from_config(name, custom[name])
    if name not in TASKS:
        raise UserError(f"unknown task '{name}'", remedy=suggestion(name, [*TASKS, *(custom or {})]))
    return TASKS[name]


def _from_config(name: str, config: CustomTask) -> ChoiceTask:
    labels = config.labels
    answers = dict(labels) if isinstance(labels, Mapping) else {label: label for label in labels}
    return ChoiceTask(
        name=name,
        template=config.prompt,
        answers=answers,
        label_field=config.label_field,
        id_field=config.id_field,
        layouts={split: (_inside(path),) for split, path in config.files.items()},
        licence=config.licence,
    )


def _inside(path: str) -> str:
    """A task's path, which must stay below the data folder whatever a shared recipe says."""
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise UserError(f"the task's path '{path}' leads out of the data folder", remedy="give a path below --data-dir")
    return path
