"""The table of tasks. A new task is a row here, or a few lines of YAML in an experiment."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lingraft.config import CustomTask
from lingraft.errors import UserError, suggestion
from lingraft.prompts import Prompt, fields_of
from lingraft.tasks import wordings
from lingraft.tasks.choice import ChoiceTask
from lingraft.tasks.formats import exemplar_rows, numbered_rows, squad_rows
from lingraft.tasks.rows import english_question, problem, relation, sentiment, with_question
from lingraft.tasks.sources import Only
from lingraft.tasks.task import Hub, Layout, Task
from lingraft.tasks.text import TextTask

_UPSTREAM = {"train": "train", "validation": "dev", "test": "test"}
_SAME = {"train": "train", "validation": "validation", "test": "test"}
_ENGLISH = ("en",)


def _codes(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _paths(*paths: str, languages: tuple[str, ...] | None = None) -> tuple[Layout, ...]:
    return tuple(Layout(path, languages=languages) for path in paths)


def _squad(*paths: str, only: Only | None = None, languages: tuple[str, ...] | None = None) -> tuple[Layout, ...]:
    return tuple(Layout(path, squad_rows, only, languages) for path in paths)


_TOPICS = ChoiceTask(
    name="topics",
    prompts=wordings.TOPICS,
    answers={topic: topic for topic in wordings.TOPIC_NAMES},
    label_field="category",
    id_field="index_id",
    head="classification",
    parts=("{text}",),
    layouts={
        split: _paths(
            f"sib200/{{flores}}/{theirs}.tsv",
            f"data/annotated/{{flores}}/{theirs}.tsv",
            f"topics/{{language}}/{split}.tsv",
        )
        for split, theirs in _UPSTREAM.items()
    },
    hubs=(Hub("Davlan/sib200", "{flores}", _SAME),),
    licence="SIB-200: Apache-2.0, text CC BY-SA 4.0; lingraft's bundled sentences: CC0",
)

_COPA = Hub("aps/super_glue", "copa", {"train": "train", "validation": "validation"}, _ENGLISH)
_XCOPA_LANGUAGES = _codes("et ht id it qu sw ta th tr vi zh")
_XCOPA = ChoiceTask(
    name="xcopa",
    prompts=wordings.XCOPA,
    answers={"0": "(A)", "1": "(B)"},
    id_field="idx",
    canonical=with_question,
    head="multiple_choice",
    parts=("{premise} {asked}",),
    options=("{choice1}", "{choice2}"),
    layouts={
        "train": _paths("copa_{language}/train.jsonl"),
        "validation": _paths(
            "xcopa/data/{language}/val.{language}.jsonl",
            "data/{language}/val.{language}.jsonl",
            "copa_{language}/val.jsonl",
        ),
        "test": _paths("xcopa/data/{language}/test.{language}.jsonl", "data/{language}/test.{language}.jsonl"),
    },
    hubs=(
        _COPA,
        Hub("cambridgeltl/xcopa", "{language}", {"validation": "validation", "test": "test"}, _XCOPA_LANGUAGES),
    ),
    languages=_XCOPA_LANGUAGES,
    licence="XCOPA: CC BY 4.0; COPA: BSD-2-Clause",
    companion={"validation": Layout("copa_en/val.jsonl")},
    hub_companion={"validation": _COPA},
    repair=english_question,
    note="XCOPA's question field is wrong in some languages: on validation it is taken from the English item, "
    "on test, which has no English file, it is used as it is.",
)

_XNLI_LANGUAGES = _codes("ar bg de el en es fr hi ru sw th tr ur vi zh")


def _xnli_layouts(split: str) -> tuple[Layout, ...]:
    ours = Only("language", "{language}")
    return (
        *_paths(f"xnli/{{language}}.genre.{split}.tsv", f"{{language}}.genre.{split}.tsv"),
        *(Layout(f"{folder}xnli.{split}.tsv", None, ours, _XNLI_LANGUAGES) for folder in ("XNLI-1.0/", "xnli/", "")),
    )


_XNLI = ChoiceTask(
    name="xnli",
    prompts=wordings.XNLI,
    answers={label: label for label in wordings.RELATIONS},
    id_field="id",
    canonical=relation,
    head="classification",
    parts=("{premise}", "{hypothesis}"),
    layouts={
        "train": (
            *_paths(
                *(
                    f"{folder}multinli.train.{{language}}.tsv"
                    for folder in ("XNLI-MT-1.0/multinli/", "multinli/", "xnli/", "")
                ),
                languages=_XNLI_LANGUAGES,
            ),
            # Its rows of other languages are items of XNLI's dev and test sets.
            Layout("xnli/watson_train.csv", None, Only("lang_abv", "en"), _ENGLISH),
        ),
        "validation": _xnli_layouts("dev"),
        "test": _xnli_layouts("test"),
    },
    hubs=(Hub("facebook/xnli", "{language}", _SAME, _XNLI_LANGUAGES),),
    languages=_XNLI_LANGUAGES,
    sample={"test": 1000},
    licence="XNLI: CC BY-NC 4.0, for measuring only; MultiNLI: OANC and others",
    note="XNLI's training sets in other languages than English are machine translations of MultiNLI.",
)

_NUSAX_LANGUAGES = _codes("ace ban bbc bjn bug en id jv mad min nij su")
_NUSAX = ChoiceTask(
    name="nusax",
    prompts=wordings.NUSAX,
    answers={label: label for label in wordings.SENTIMENTS},
    id_field="id",
    canonical=sentiment,
    head="classification",
    parts=("{text}",),
    layouts={
        split: _paths(
            f"nusax/sentiment/{{name}}/{theirs}.csv",
            f"datasets/sentiment/{{name}}/{theirs}.csv",
            f"sentiment/{{name}}/{theirs}.csv",
        )
        for split, theirs in (("train", "train"), ("validation", "valid"), ("test", "test"))
    },
    languages=_NUSAX_LANGUAGES,
    hubs=(Hub("indonlp/NusaX-senti", "{iso}", _SAME, _NUSAX_LANGUAGES, export=True),),
    metric="accuracy",
    licence="NusaX: CC BY-SA 4.0",
)

_MGSM_LANGUAGES = _codes("bn de en es fr ja ru sw te th zh")
_EXEMPLARS = tuple(
    Layout(f"{folder}exemplars{suffix}", exemplar_rows, Only("language", "{language}"), _MGSM_LANGUAGES)
    for folder in ("mgsm/", "")
    for suffix in (".json", ".py")
)
_MGSM = TextTask(
    name="mgsm",
    kind="number",
    prompts=wordings.MGSM,
    id_field="id",
    canonical=problem,
    layouts={
        "train": _paths("gsm8k/train.jsonl", "grade_school_math/data/train.jsonl", languages=_ENGLISH),
        "validation": _EXEMPLARS,
        "test": tuple(Layout(path, numbered_rows) for path in ("mgsm/mgsm_{language}.tsv", "mgsm_{language}.tsv")),
    },
    hubs=(
        Hub("openai/gsm8k", "main", {"train": "train"}, _ENGLISH),
        # The hub calls the exemplars its training set.
        Hub("juletxara/mgsm", "{language}", {"validation": "train", "test": "test"}, _MGSM_LANGUAGES, export=True),
    ),
    languages=_MGSM_LANGUAGES,
    metric="accuracy",
    licence="MGSM: CC BY 4.0; GSM8K: MIT",
    note="Trained on GSM8K's English reasoning without its calculator annotations; '#### n' stays the last line. Validation are "
    "MGSM's eight worked exemplars of each language, less their 'Question:' and 'Step-by-Step Answer:' and with the same last "
    "line: too few to choose a weight on by accuracy.",
)

_XQUAD_LANGUAGES = _codes("ar de el en es hi ro ru th tr vi zh")
_MLQA_LANGUAGES = _codes("ar de en es hi vi zh")
_XQUAD = TextTask(
    name="xquad",
    kind="extraction",
    prompts=wordings.XQUAD,
    id_field="id",
    head="span",
    parts=("{question}", "{context}"),
    context="context",
    layouts={
        "train": _squad("squad/train-v1.1.json", "train-v1.1.json", languages=_ENGLISH),
        "validation": _squad(
            *(
                f"{folder}dev-context-{{language}}-question-{{language}}.json"
                for folder in ("MLQA_V1/dev/", "mlqa/dev/", "mlqa/", "")
            ),
            languages=_MLQA_LANGUAGES,
        ),
        "test": _squad("xquad/xquad.{language}.json", "xquad.{language}.json"),
    },
    hubs=(
        Hub("rajpurkar/squad", "plain_text", {"train": "train"}, _ENGLISH),
        Hub("facebook/mlqa", "mlqa.{language}.{language}", {"validation": "validation"}, _MLQA_LANGUAGES, export=True),
        Hub("google/xquad", "xquad.{language}", {"test": "validation"}, _XQUAD_LANGUAGES),
    ),
    languages=_XQUAD_LANGUAGES,
    note="XQuAD has a test set only: the validation items are MLQA's dev set.",
    metric="exact_match",
    licence="XQuAD, SQuAD: CC BY-SA 4.0; MLQA: CC BY-SA 3.0",
)

_TYDIQA_LANGUAGES = _codes("ar bn en fi id ko ru sw te")
_TYDIQA_HUB = "google-research-datasets/tydiqa"
# A tenth of the training items, drawn by their ids, is there to choose on: the dev set is the test.
_HELD_OUT, _REST = (Only("id", "{name}-*", part) for part in ((0.0, 0.1), (0.1, 1.0)))
_ITS_OWN = Only("id", "{name}-*")


def _tydiqa(split: str, only: Only) -> tuple[Layout, ...]:
    upstream = _squad(
        f"tydiqa_goldp/{{name}}_tydiqa_{split}.json",
        f"language_data/{{name}}/{{name}}_tydiqa_{split}.json",
        f"{{name}}_tydiqa_{split}.json",
        f"tydiqa-goldp-v1.1-{split}/tydiqa-goldp-{split}-{{name}}.json",
        f"tydiqa-goldp-v1.1-{split}/tydiqa.goldp.{{language}}.{split}.json",
        f"tydiqa-goldp-v1.1-{split}/tydiqa.{{language}}.{split}.json",
        only=only,
    )
    whole = (f"{folder}tydiqa-goldp-v1.1-{split}.json" for folder in ("tydiqa_goldp/", ""))
    return (*upstream, *_squad(*whole, only=only, languages=_TYDIQA_LANGUAGES))


def _tydiqa_hub(ours: str, theirs: str, only: Only) -> Hub:
    return Hub(_TYDIQA_HUB, "secondary_task", {ours: theirs}, _TYDIQA_LANGUAGES, only)


_TYDIQA = replace(
    _XQUAD,
    name="tydiqa",
    prompts=wordings.TYDIQA,
    layouts={
        "train": _tydiqa("train", _REST),
        "validation": _tydiqa("train", _HELD_OUT),
        "test": _tydiqa("dev", _ITS_OWN),
    },
    hubs=(
        _tydiqa_hub("train", "train", _REST),
        _tydiqa_hub("validation", "train", _HELD_OUT),
        _tydiqa_hub("test", "validation", _ITS_OWN),
    ),
    languages=_TYDIQA_LANGUAGES,
    licence="TyDiQA: Apache-2.0",
    note="TyDiQA-GoldP has no public test set: its dev set is the test, and a tenth of the training items, drawn by their ids, "
    "is held out of the training for validation.",
)

_XQUAD_TYDIQA = replace(
    _XQUAD,
    name="xquad-tydiqa",
    layouts={
        "train": tuple(replace(layout, languages=_ENGLISH) for layout in _tydiqa("train", _ITS_OWN)),
        "validation": _tydiqa("dev", _ITS_OWN),
        "test": _XQUAD.layouts["test"],
    },
    hubs=(
        replace(_tydiqa_hub("train", "train", _ITS_OWN), languages=_ENGLISH),
        _tydiqa_hub("validation", "validation", _ITS_OWN),
        _XQUAD.hubs[-1],
    ),
    licence="XQuAD: CC BY-SA 4.0; TyDiQA: Apache-2.0",
    note="XQuAD's test, trained on TyDiQA-GoldP's English part; TyDiQA's dev set in other languages is the validation.",
)


def _of_articles(low: float, high: float) -> tuple[Layout, ...]:
    return tuple(replace(layout, only=Only("title", "*", (low, high))) for layout in _XQUAD.layouts["test"])


_XQUAD_ARTICLES = replace(
    _XQUAD,
    name="xquad-articles",
    # The titles are English in every file: an item is in the same part in all languages.
    layouts={"train": _of_articles(0.0, 0.5), "validation": _of_articles(0.5, 0.6), "test": _of_articles(0.6, 1.0)},
    hubs=(),  # The hub's rows have no titles.
    licence="XQuAD: CC BY-SA 4.0",
    note="XQuAD's test set, divided by article, drawn by their titles: 706 questions to train on, 118 for validation, 366 for the "
    "test, the same in every language. It is for methods that need items with labels and translations in all "
    "languages, and is not comparable with XQuAD's published figures.",
)

_XLSUM_LANGUAGES = _codes(
    "am ar az bn cy en es fa fr gd gu ha hi id ig ja ko ky mr my ne om pa pcm ps pt rn ru si so sr sw ta te th ti tr uk ur "
    "uz vi yo zh"
)
_XLSUM = TextTask(
    name="xlsum",
    kind="summary",
    prompts=wordings.XLSUM,
    id_field="id",
    context="text",
    layouts={
        split: _paths(
            f"xlsum/{{language}}/{split}.jsonl",
            *(f"{folder}{{name}}_{theirs}.jsonl" for folder in ("XLSum_complete_v2.0/", "xlsum/", "")),
            *(f"{folder}{{name}}_{split}.jsonl" for folder in ("XLSum_complete_v2.0/", "xlsum/", "")),
        )
        for split, theirs in (("train", "train"), ("validation", "val"), ("test", "test"))
    },
    names={"pcm": "pidgin", "sr": "serbian_cyrillic", "zh": "chinese_simplified"},
    languages=_XLSUM_LANGUAGES,
    hubs=(Hub("csebuetnlp/xlsum", "{name}", _SAME, _XLSUM_LANGUAGES, export=True),),
    sample={"test": 500},
    metric="rouge_l",
    licence="XL-Sum: CC BY-NC-SA 4.0",
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _TOPICS,
        _XCOPA,
        replace(_XCOPA, name="xcopa-raw", companion={}, hub_companion={}, repair=None, note=None),
        _XNLI,
        _NUSAX,
        _MGSM,
        _XQUAD,
        _XQUAD_TYDIQA,
        _XQUAD_ARTICLES,
        _TYDIQA,
        _XLSUM,
    )
}


def find_task(name: str, custom: Mapping[str, CustomTask] | None = None) -> Task:
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
    fields = tuple(dict.fromkeys(fields_of(config.prompt)))
    # An encoder reads one text or two; of a task of more fields nobody said which.
    encoded = 1 <= len(fields) <= 2
    return ChoiceTask(
        name=name,
        prompts={"default": Prompt(config.prompt)},
        answers=answers,
        label_field=config.label_field,
        id_field=config.id_field,
        head="classification" if encoded else None,
        parts=tuple(f"{{{field}}}" for field in fields) if encoded else (),
        layouts={split: (Layout(inside(path)),) for split, path in config.files.items()},
        licence=config.licence,
    )


def inside(path: str) -> str:
    """A path of a recipe, which must stay below the data folder whoever wrote it.

    Raises:
        UserError: It leads out of it.
    """
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise UserError(f"the path '{path}' leads out of the data folder", remedy="give a path below --data-dir")
    return path
