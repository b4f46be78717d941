"""The upstream files are read as they are: every task, language and split of them."""

import csv
import io
import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from lingraft.languages import name_of
from lingraft.tasks.items import Example, subset
from lingraft.tasks.table import TASKS

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the upstream files are not here ({SHARED})")


@cache
def read(task: str, language: str, split: str) -> tuple[Example, ...]:
    return tuple(TASKS[task].examples(TASKS[task].sources(language, split, SHARED), language=language))


XQUAD = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
MGSM = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
NUSAX = ("ace", "ban", "bbc", "bjn", "bug", "en", "id", "jv", "mad", "min", "nij", "su")
COUNTS = {
    **{("xquad", c, "test"): 1190 for c in XQUAD},
    **{("xquad-tydiqa", c, "test"): 1190 for c in XQUAD},
    ("xquad-tydiqa", "en", "train"): 3696,
    **{("xquad-tydiqa", c, "validation"): n for c, n in (("ar", 921), ("en", 440), ("id", 565), ("ru", 812), ("sw", 499))},
    **{("tydiqa", c, "test"): n for c, n in (("ar", 921), ("en", 440), ("id", 565), ("ru", 812), ("sw", 499))},
    **{("mgsm", c, "test"): 250 for c in MGSM},
    **{("mgsm", c, "validation"): 8 for c in MGSM},
    ("mgsm", "en", "train"): 7473,
    **{("nusax", c, s): n for c in NUSAX for s, n in (("train", 500), ("validation", 100), ("test", 400))},
    ("xnli", "en", "train"): 6870,
    ("xnli", "sw", "validation"): 2490,
    ("xnli", "sw", "test"): 5010,
}  # fmt: skip


@pytest.mark.parametrize(("task", "language", "split"), COUNTS)
def test_every_item_is_read(task: str, language: str, split: str):
    items = read(task, language, split)
    assert len(items) == COUNTS[task, language, split]
    assert all(e.prompt and e.completion.strip() and e.references for e in items)


HERE = {
    **{"topics": "sw", "xcopa": "th", "xnli": "sw", "nusax": "ban", "mgsm": "zh"},
    **{"xquad": "ar", "xquad-tydiqa": "th", "tydiqa": "id"},
}
ASKED = [(task, prompt) for task in HERE for prompt in TASKS[task].prompts]


@pytest.mark.parametrize(("task", "prompt"), ASKED)
def test_every_wording_can_be_asked_of_them(task: str, prompt: str):
    row, language = TASKS[task], HERE[task]
    items = row.examples(row.sources(language, "test", SHARED), language=language, prompt=prompt)
    assert len({e.prompt for e in items}) > 0.97 * len(items)
    assert [e.id for e in items] == [e.id for e in read(task, language, "test")]
    assert all(
        (f" for{'' if 'ada' in prompt else ' '}{name_of(language)}" in e.prompt) == ("xlt" in prompt) for e in items
    )


@pytest.mark.parametrize("language", ["en", "sw"])
def test_tydiqas_training_and_validation_are_all_of_its_training_file(language: str):
    train, held = ({e.id for e in read("tydiqa", language, split)} for split in ("train", "validation"))
    assert len(train) + len(held) == {"en": 3696, "sw": 2755}[language]
    assert train.isdisjoint(held)
    assert 0.08 < len(held) / (len(train) + len(held)) < 0.12


@pytest.mark.parametrize("language", XQUAD)
def test_xquads_items_are_the_same_in_every_language(language: str):
    items, english = read("xquad", language, "test"), read("xquad", "en", "test")
    assert [e.id for e in items] == [e.id for e in english]
    for item in items:
        assert item.span is not None and item.cuttable is not None
        assert item.parts[1][slice(*item.span)] == item.references[0]
        assert item.prompt[slice(*item.cuttable)] == item.parts[1]


@pytest.mark.parametrize("language", MGSM)
def test_mgsms_items_are_the_same_in_every_language(language: str):
    for split in ("test", "validation"):
        items, english = read("mgsm", language, split), read("mgsm", "en", split)
        assert [(e.id, e.references) for e in items] == [(e.id, e.references) for e in english]
    numbers = {e.references[0] for e in read("mgsm", language, "test")}
    assert {"114,200", "2,125", "276,000", "5,600"} <= numbers


@pytest.mark.parametrize("language", MGSM)
def test_the_exemplars_have_lost_their_labels(language: str):
    raw = json.loads((SHARED / "mgsm/exemplars.json").read_text(encoding="utf-8"))["MGSM_EXEMPLARS"][language]
    for item, pair in zip(read("mgsm", language, "validation"), raw.values(), strict=True):
        question = item.prompt.removeprefix("Let's think step by step. Question: ").removesuffix("\nAnswer:")
        answer = item.answer.strip().rsplit("\n", 1)[0]
        assert pair["q"].endswith(question) and pair["a"].endswith(answer)
        label_of_question, label_of_answer = pair["q"].removesuffix(question), pair["a"].removesuffix(answer)
        assert label_of_question.strip()[-1] in ":：" and label_of_answer.strip()[-1] in ":："
        assert len(label_of_question) < 15 and len(label_of_answer) < 35


def test_reasoning_has_no_calculator_and_ends_in_the_number():
    for item in read("mgsm", "en", "train"):
        assert "<<" not in item.answer and ">>" not in item.answer
        assert item.answer.rsplit("\n", 1)[1] == f"#### {item.references[0]}"


@pytest.mark.parametrize("language", NUSAX)
def test_nusaxs_items_are_the_same_in_every_language(language: str):
    for split in ("train", "validation", "test"):
        items, english = ({e.id: e.gold for e in read("nusax", c, split)} for c in (language, "en"))
        assert items == english


def test_xnli_is_balanced_and_its_sample_is_drawn_by_ids():
    items = read("xnli", "sw", "test")
    assert set(Counter(e.gold for e in items).values()) == {1670}
    drawn = subset(items, TASKS["xnli"].sample["test"])
    assert len(drawn) == 1000
    assert {e.id for e in drawn} < {e.id for e in items}


def test_no_english_training_pair_of_xnli_is_in_its_test():
    """The file's other rows are: they are never read."""
    text = (SHARED / "xnli/watson_train.csv").read_text(encoding="utf-8")
    rows = {row["id"]: row for row in csv.DictReader(io.StringIO(text, newline=""))}
    assert {rows[e.id]["lang_abv"] for e in read("xnli", "en", "train")} == {"en"}
    assert Counter(row["lang_abv"] for row in rows.values())["sw"] == 385


def test_what_upstream_does_not_have_is_said():
    from lingraft.errors import DataError

    for task, language, split in (
        ("xquad", "sw", "test"),
        ("xquad", "fr", "test"),
        ("mgsm", "sw", "train"),
        ("xcopa", "en", "test"),
    ):
        with pytest.raises(DataError, match=f"no '{split}' data for '{language}'"):
            read(task, language, split)
