"""The bundled data keep what they promise, and the upstream files are read as they are."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lingraft.languages import LANGUAGES
from lingraft.tasks.items import Example
from lingraft.tasks.sources import BUNDLED, FileSource, read_lines
from lingraft.tasks.table import TASKS

TOPICS = TASKS["topics"]
TRANSLATED = ("en", "de", "sw", "vi", "tr")
SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the upstream files are not here ({SHARED})")


def read(language: str, split: str, folder: Path = BUNDLED, task: str = "topics") -> list[Example]:
    return TASKS[task].examples(TASKS[task].sources(language, split, folder))


def texts(language: str, split: str) -> list[str]:
    return [row.fields["text"] for row in FileSource(BUNDLED / "topics" / language / f"{split}.tsv").rows()]


def test_english_has_thirty_training_sentences_a_topic():
    counts = Counter(e.gold for e in read("en", "train"))
    assert len(counts) == 7
    assert set(counts.values()) == {30}


@pytest.mark.parametrize(("split", "each"), [("validation", 5), ("test", 15)])
@pytest.mark.parametrize("language", TRANSLATED)
def test_every_language_has_the_same_items_and_labels(language: str, split: str, each: int):
    found, english = read(language, split), read("en", split)
    assert Counter(e.gold for e in found) == dict.fromkeys(range(7), each)
    assert [(e.id, e.gold) for e in found] == [(e.id, e.gold) for e in english]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_english_sentences_have_twelve_to_twenty_five_words(split: str):
    wrong = [(t, n) for t in texts("en", split) if not 12 <= (n := len(t.split())) <= 25]
    assert wrong == []


@pytest.mark.parametrize("language", TRANSLATED)
def test_no_sentence_stands_twice(language: str):
    splits = ("train", "validation", "test") if language == "en" else ("validation", "test")
    found = [" ".join(t.casefold().split()) for split in splits for t in texts(language, split)]
    assert [t for t, n in Counter(found).items() if n > 1] == []


def test_no_id_stands_in_two_splits():
    ids = [e.id for split in ("train", "validation", "test") for e in read("en", split)]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("language", [c for c in TRANSLATED if c != "en"])
def test_translations_are_not_the_english_sentence(language: str):
    for split in ("validation", "test"):
        assert not set(texts(language, split)) & set(texts("en", split))


def test_reference_texts_are_parallel():
    lines = {language: read_lines(BUNDLED / "udhr" / f"{language}.txt") for language in TRANSLATED}
    assert {len(found) for found in lines.values()} == {58}
    lengths = {language: np.log([len(line) for line in found]) for language, found in lines.items()}
    for language in TRANSLATED[1:]:
        # Translations of a paragraph are of like length, so a shift by a line would show here.
        likeness = [np.corrcoef(lengths["en"], np.roll(lengths[language], shift))[0, 1] for shift in range(58)]
        assert likeness[0] > 0.85
        assert likeness[0] > 0.3 + max(likeness[1:])


@pytest.mark.parametrize("folder", ["topics", "udhr"])
def test_bundled_folders_say_where_they_come_from(folder: str):
    assert len((BUNDLED / folder / "NOTICE.txt").read_text(encoding="utf-8")) > 200


def test_bundled_languages_are_those_of_the_table():
    assert {p.name for p in (BUNDLED / "topics").iterdir() if p.is_dir()} == set(TRANSLATED) <= set(LANGUAGES)


@needs_shared
@pytest.mark.parametrize("language", LANGUAGES)
def test_sib200_is_read_in_every_language(language: str):
    if not (SHARED / "sib200" / LANGUAGES[language].flores).is_dir():
        pytest.skip(f"the upstream files hold no {language}")
    counts = {split: len(read(language, split, SHARED)) for split in ("train", "validation", "test")}
    assert counts == {"train": 701, "validation": 99, "test": 204}
    found, english = ({e.id: e.gold for split in counts for e in read(c, split, SHARED)} for c in (language, "en"))
    assert found == english


@needs_shared
def test_every_sib200_language_that_is_here_is_in_the_table():
    here = {p.name for p in (SHARED / "sib200").iterdir() if p.is_dir()}
    assert len(here) >= 43
    assert here <= {row.flores for row in LANGUAGES.values()}


def cause(example: Example) -> bool:
    return "What is the cause?" in example.prompt


@needs_shared
@pytest.mark.parametrize("language", ["et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh"])
def test_xcopa_is_read_in_every_language(language: str):
    validation, test = (read(language, split, SHARED, "xcopa") for split in ("validation", "test"))
    assert (len(validation), len(test)) == (100, 500)
    assert Counter(e.gold for e in test).keys() == {0, 1}
    english = read("en", "validation", SHARED, "xcopa")
    assert [(e.id, cause(e)) for e in validation] == [(e.id, cause(e)) for e in english]
    assert [e.gold for e in validation] == [e.gold for e in english]


@needs_shared
def test_english_copa_is_the_labelled_source():
    assert len(read("en", "train", SHARED, "xcopa")) == 400
