"""Items and their counterparts in another language: paired, put together, and translated with the answers that stand in them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lingraft.config import CustomTask, validated
from lingraft.errors import DataError, LingraftError, UserError
from lingraft.tasks.items import Example
from lingraft.tasks.pairs import all_concatenated, concatenated, paired
from lingraft.tasks.sources import FileSource, Row
from lingraft.tasks.table import TASKS, find_task
from lingraft.tasks.translating import ROW, canonical_rows, rendered, translated_fields, translated_rows

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
IDS = st.lists(st.text(min_size=1), min_size=1, unique=True)


@dataclass(frozen=True)
class Given:
    """A source of rows that are here."""

    found: tuple[dict[str, str], ...]

    def digest(self) -> str:
        return "given"

    def rows(self) -> list[Row]:
        return [Row(fields, f"row {n}") for n, fields in enumerate(self.found)]


def item(name: str, text: str = "Hujambo?", **values: Any) -> Example:
    return Example(
        name, f"Text: {text}\nSentiment:", (" good", " bad"), 1, references=("bad",), parts=(text,), **values
    )


def refused(action: Callable[[], object], match: str) -> LingraftError:
    with pytest.raises(DataError, match=match) as caught:
        action()
    return caught.value


def told(error: LingraftError) -> str:
    return f"{error.what} {error.remedy}"


# Pairing.


@given(IDS, st.randoms())
def test_every_item_gets_the_counterpart_of_its_id_in_whatever_order(ids: list[str], draw: Any):
    counterparts = [item(name, f"source {name}") for name in ids]
    draw.shuffle(counterparts)
    found = paired([item(name) for name in ids], counterparts)
    assert found.skipped == ()
    assert [e.id for e in found.examples] == ids
    assert all(e.source is not None and e.source.parts == (f"source {e.id}",) for e in found.examples)
    assert [replace(e, source=None) for e in found.examples] == [item(name) for name in ids]


def test_nothing_of_a_counterparts_answer_is_kept():
    known = item("a", "source", span=(0, 3), source=item("b"))
    ((found,),) = (paired([item("a")], [known]).examples,)
    source = found.source
    assert source is not None
    assert (source.candidates, source.references, source.answer, source.span, source.source) == ((), (), "", None, None)
    assert (found.gold, found.references) == (1, ("bad",))


@given(IDS, st.data())
def test_items_without_counterpart_are_an_error_or_are_left_out_and_told(ids: list[str], data: st.DataObject):
    here = data.draw(st.lists(st.sampled_from(ids), min_size=1, unique=True))
    assume(len(here) < len(ids))
    examples, counterparts = [item(name) for name in ids], [item(name) for name in here]
    refused(lambda: paired(examples, counterparts, numbered=False), f"{len(ids)} items .* {len(here)} counterparts")
    found = paired(examples, counterparts, missing="skip", numbered=False)
    assert [e.id for e in found.examples] == [name for name in ids if name in here]
    assert found.skipped == tuple(name for name in ids if name not in here)


def test_ids_that_do_not_match_are_counted_and_the_first_are_told():
    examples = [item(f"t{n}") for n in range(5)] + [item("both")]
    counterparts = [item("both"), item("s1"), item("s2")]
    error = refused(lambda: paired(examples, counterparts, what="nusax, train: ban and en"), "6 items")
    assert error.where == "nusax, train: ban and en"
    assert "5 items have no counterpart (t0, t1, t2, …)" in error.what
    assert "2 counterparts belong to no item (s1, s2)" in error.what
    assert "translation.model" in told(error)


def test_a_counterpart_without_item_is_an_error_too_unless_told_otherwise():
    examples, counterparts = [item("a")], [item("a"), item("b")]
    refused(
        lambda: paired(examples, counterparts), r"0 items have no counterpart, 1 counterparts belong to no item \(b\)"
    )
    assert [e.id for e in paired(examples, counterparts, missing="skip").examples] == ["a"]


def test_that_no_item_has_a_counterpart_is_never_skipped():
    refused(lambda: paired([item("a")], [item("b")], missing="skip"), "1 items have no counterpart")
    refused(lambda: paired([], [item("b")], missing="skip"), "0 items")


@pytest.mark.parametrize("missing", ["error", "skip"])
@pytest.mark.parametrize(("mine", "theirs"), [(3, 2), (2, 3)])
def test_row_numbers_of_another_number_of_rows_may_be_shifted(missing: Any, mine: int, theirs: int):
    examples, counterparts = ([item(str(n)) for n in range(count)] for count in (mine, theirs))
    error = refused(lambda: paired(examples, counterparts, missing=missing), "their ids are row numbers")
    assert f"{mine} items cannot be paired with {theirs} counterparts" in error.what


def test_row_numbers_of_as_many_rows_are_ids_and_so_are_those_that_rows_carry():
    examples = [item(str(n)) for n in range(3)]
    assert len(paired(examples, examples).examples) == 3
    assert paired(examples, examples[:2], missing="skip", numbered=False).skipped == ("2",)
    refused(lambda: paired([item("x"), item("y")], [item("x")], missing="skip", numbered=True), "row numbers")


@pytest.mark.parametrize(("mine", "theirs", "side"), [("aa", "a", "items"), ("a", "aa", "counterparts")])
def test_an_id_that_stands_twice_is_named(mine: str, theirs: str, side: str):
    sides = [[item(name) for name in names] for names in (mine, theirs)]
    refused(lambda: paired(*sides, missing="skip"), f"'a' stands 2 times among the {side}")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the upstream files are not here ({SHARED})")
@pytest.mark.parametrize(("split", "count"), [("train", 706), ("validation", 118), ("test", 366)])
def test_xquad_divided_by_article_is_parallel_in_every_split(split: str, count: int):
    task, english = TASKS["xquad-articles"], None
    titles: dict[str, set[str]] = {}
    for language in task.languages:
        sources = task.sources(language, split, SHARED)
        items = task.examples(sources, language=language, prompt="flare")
        titles[language] = {row.fields["title"] for row in sources[0].rows()}
        english = english or task.examples(task.sources("en", split, SHARED), prompt="flare")
        assert len(paired(items, english).examples) == count
        assert [e.id for e in items] == [e.id for e in english]
    others = {row.fields["title"] for s in ("train", "validation", "test") if s != split
              for row in task.source("en", s, SHARED).rows()}  # fmt: skip
    assert len({frozenset(found) for found in titles.values()}) == 1
    assert titles["en"].isdisjoint(others)
    assert len(titles["en"] | others) == 48


# Two texts in one input.


QUESTIONS = (
    {"id": "q", "context": "Nia owns a boat.", "question": "What?", "answers": '[{"text": "boat", "answer_start": 11}]'},
    {"id": "q", "context": "Nia ana mashua mpya.", "question": "Nini?", "answers": '[{"text": "mashua", "answer_start": 8}]'},
)  # fmt: skip


def both(task: str, source: dict[str, str], target: dict[str, str], prompt: str = "default") -> Example:
    first, second = (TASKS[task].examples([Given((row,))], prompt=prompt) for row in (source, target))
    (found,) = paired(second, first).examples
    return found


def test_both_texts_stand_in_one_prompt_and_what_may_be_cut_is_the_items_context():
    found = concatenated(both("xquad", *QUESTIONS, prompt="flare"))
    assert found.prompt == (
        "Context: Nia owns a boat.\nQuestion: What?\nAnswer:\n\nContext: Nia ana mashua mpya.\nQuestion: Nini?\nAnswer:"
    )
    assert found.cuttable is not None
    assert found.prompt[slice(*found.cuttable)] == "Nia ana mashua mpya."
    assert found.parts == ("What?", "Nia owns a boat.", "Nini?", "Nia ana mashua mpya.")
    assert found.span is not None
    assert found.parts[-1][slice(*found.span)] == "mashua"
    assert (found.answer, found.references, found.source) == (" mashua", ("mashua",), None)


def test_pairs_of_texts_stand_in_front_of_the_items_own():
    english = {"id": "1", "premise": "All sing.", "hypothesis": "Asha sings.", "label": "entailment"}
    found = concatenated(both("xnli", english, {**english, "premise": "Wote waimba.", "hypothesis": "Asha aimba."}))
    assert found.parts == ("All sing.", "Asha sings.", "Wote waimba.", "Asha aimba.")
    assert found.cuttable is None
    assert found.completion == " entailment"


def test_options_stay_the_items_and_the_sources_are_read_in_front():
    english = {
        "idx": "1",
        "premise": "The cup fell.",
        "choice1": "It broke.",
        "choice2": "It sang.",
        "question": "effect",
        "label": "0",
    }
    swahili = {**english, "premise": "Kikombe kilianguka.", "choice1": "Kilivunjika.", "choice2": "Kiliimba."}
    found = concatenated(both("xcopa", english, swahili))
    asked = "What happened as a result?"
    assert found.parts == (f"The cup fell. {asked}", "It broke.", "It sang.", f"Kikombe kilianguka. {asked}")
    assert found.options == ("Kilivunjika.", "Kiliimba.")


@given(st.text(), st.text(), st.integers(0, 20), st.integers(0, 20))
def test_putting_together_keeps_the_item_and_moves_what_may_be_cut(mine: str, theirs: str, first: int, length: int):
    source = Example("a", theirs, parts=(theirs,), answer=" secret", references=("secret",), cuttable=(0, 1))
    alone = Example("a", mine, cuttable=(first, first + length), parts=("q", mine), answer=" x", references=("x",))
    found = concatenated(replace(alone, source=source.asked))
    assert found.prompt.startswith(theirs)
    assert found.prompt.endswith(mine)
    assert found.cuttable is not None
    assert found.prompt[slice(*found.cuttable)] == mine[first : first + length]
    assert found.parts[-1] == alone.parts[-1]
    kept = ("id", "candidates", "gold", "answer", "references", "options", "span")
    assert all(getattr(found, name) == getattr(alone, name) for name in kept)


def test_an_item_without_counterpart_cannot_be_put_together():
    assert refused(lambda: all_concatenated([item("a")]), "no counterpart").where == "a"


# Translating rows.


ROWS: dict[str, tuple[dict[str, str], ...]] = {
    "topics": ({"index_id": "5", "text": "The match ended two all.", "category": "sports"},),
    "nusax": ({"id": "7", "text": "Cold soup.", "label": "negative"}, {"id": "9", "text": " ", "label": "neutral"}),
    "xnli": (
        {"pairID": "3", "sentence1": "All sing.", "sentence2": "Asha sings.", "gold_label": "contradictory"},
        {"pairID": "4", "sentence1": "a", "sentence2": "b", "gold_label": "-"},
    ),
    "xcopa": (
        {"idx": "1", "premise": "The cup fell.", "choice1": "It broke.", "choice2": "It sang.", "question": "effect", "label": "0"},
    ),
    "xquad": (QUESTIONS[0], {**QUESTIONS[1], "id": "r"}),
}  # fmt: skip
SHOUTED = {
    "topics": ["THE MATCH ENDED TWO ALL."],
    "nusax": ["COLD SOUP."],
    "xnli": ["ALL SING.", "ASHA SINGS."],
    "xcopa": ["THE CUP FELL.", "IT BROKE.", "IT SANG."],
    "xquad": ['NIA OWNS A "BOAT".', "WHAT?", 'NIA ANA "MASHUA" MPYA.', "NINI?"],
}


def same(texts: list[str]) -> list[str]:
    return list(texts)


def shout(texts: list[str]) -> list[str]:
    return [text.upper() for text in texts]


def reread(task: Any, rows: list[dict[str, str]], folder: Path, **options: Any) -> list[Example]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return rendered(task, **options).examples([FileSource(path)], language="sw")


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_stay_as_they_are_are_read_back_as_the_same_items(name: str, tmp_path: Path):
    task, sources = TASKS[name], [Given(ROWS[name])]
    found = translated_rows(task, canonical_rows(task, sources), same)
    assert found.dropped == ()
    assert reread(task, found.rows, tmp_path) == task.examples(sources, language="sw")


@pytest.mark.parametrize("name", ROWS)
def test_every_text_is_translated_once_and_nothing_else_is(name: str, tmp_path: Path):
    task, asked = TASKS[name], []

    def translate(texts: list[str]) -> list[str]:
        asked.append(texts)
        return shout(texts)

    rows = canonical_rows(task, [Given(ROWS[name])])
    found = translated_rows(task, rows, translate)
    assert [[text.upper() for text in texts] for texts in asked] == [SHOUTED[name]]
    fields = {*translated_fields(task), "answers"}
    for row, new in zip(rows, found.rows, strict=True):
        assert {k: v for k, v in new.items() if k not in fields} == {
            k: v for k, v in row.fields.items() if k not in fields
        }
        assert all(new[name] == row.fields[name].upper() for name in translated_fields(task))
    before, after = task.examples([Given(ROWS[name])]), reread(task, found.rows, tmp_path)
    assert [(e.id, e.gold) for e in after] == [(e.id, e.gold) for e in before]
    if task.kind == "extraction":
        assert [(e.references, e.span) for e in after] == [(("BOAT",), (11, 15)), (("MASHUA",), (8, 14))]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
QUOTED = st.text(st.sampled_from('ab \n"“”«»「」『』‹›„＂'), min_size=1)


@given(TEXT | QUOTED, st.data())
def test_answers_are_where_they_were_where_nothing_is_translated(context: str, data: st.DataObject):
    first = data.draw(st.integers(0, len(context) - 1))
    last = data.draw(st.integers(first + 1, len(context)))
    answer = context[first:last]
    assume(answer.strip())
    answers = json.dumps([{"text": answer, "answer_start": first}], ensure_ascii=False)
    row = {"id": "1", "context": context, "question": "?", "answers": answers}
    task = TASKS["xquad"]
    found = translated_rows(task, canonical_rows(task, [Given((row,))]), same)
    if all(set(pair) & set(context) for pair in ('""', "“”", "«»", "「」", "『』", "‹›", "„“")):
        assert found.dropped == ("1",)
    else:
        assert found.rows == [row]


def project(context: str, answer: str, translation: str) -> tuple[dict[str, str] | None, str]:
    """What becomes of a context and its answer, and the text that was to be translated."""
    answers = json.dumps({"text": [answer, answer], "answer_start": [context.index(answer)] * 2})
    row = {"id": "1", "context": context, "question": "?", "answers": answers}
    task, asked = TASKS["xquad"], []

    def translate(texts: list[str]) -> list[str]:
        asked.extend(texts)
        return [translation, *texts[1:]]

    found = translated_rows(task, canonical_rows(task, [Given((row,))]), translate)
    assert found.dropped == (() if found.rows else ("1",))
    return (found.rows[0] if found.rows else None), asked[0]


@pytest.mark.parametrize(
    ("context", "quoted", "translation", "expected", "answer"),
    [
        ("I own a boat.", 'I own a "boat".', 'Nina "mashua".', "Nina mashua.", "mashua"),
        ("I own a boat.", 'I own a "boat".', "Ich habe ein „Boot“.", "Ich habe ein Boot.", "Boot"),
        ("I own a boat.", 'I own a "boat".', "J'ai un « bateau ».", "J'ai un bateau.", "bateau"),
        ("I own a boat.", 'I own a "boat".', "J'ai un« bateau »vert.", "J'ai un bateau vert.", "bateau"),
        ("I own a boat.", 'I own a "boat".', "我有一条“船”。", "我有一条船。", "船"),
        ('"A boat", I said.', '"A “boat”", I said.', '"Mashua “boti”", nilisema.', '"Mashua boti", nilisema.', "boti"),
        ('A “boat", I said.', "A “«boat»\", I said.", "Mashua “«boti»”.", "Mashua “boti”.", "boti"),
    ],
)  # fmt: skip
def test_answers_are_found_by_their_marks(context: str, quoted: str, translation: str, expected: str, answer: str):
    row, asked = project(context, "boat", translation)
    assert asked == quoted
    assert row is not None
    (found,) = json.loads(row["answers"])
    assert (row["context"], found["text"]) == (expected, answer)
    assert expected[found["answer_start"] :].startswith(answer)


@pytest.mark.parametrize(
    ("context", "translation"),
    [
        ("I own a boat.", "Nina mashua."),
        ("I own a boat.", 'Nina "mashua.'),
        ("I own a boat.", 'Nina "mashua" na "boti".'),
        ("I own a boat.", 'Nina "".'),
        ("I own a boat.", 'Nina " ".'),
        ("I own a boat.", ""),
        # Which of the marks are the answer's, when there were others?
        ('"I own a boat."', '"Nina «mashua»."'),
        ('"I own a boat."', "“Nina mashua.”"),
        ('"I own a boat."', '“Nina "mashua".”'),
    ],
)
def test_an_item_whose_marks_are_lost_is_dropped(context: str, translation: str):
    assert project(context, "boat", translation)[0] is None


def test_dropped_items_are_told_in_their_order_and_the_others_kept():
    marks = '"“”«»「」『』‹›„'
    marks = '""“”«»「」『』‹›„'
    contexts = ["boat 0", "boat lost", "boat 2", f"boat {marks}"]
    answers = json.dumps([{"text": "boat", "answer_start": 0}])
    rows = [{"id": str(n), "context": c, "question": "?", "answers": answers} for n, c in enumerate(contexts)]
    task = TASKS["xquad"]

    def translate(texts: list[str]) -> list[str]:
        return [text.replace('"', "") if "lost" in text else text for text in texts]

    found = translated_rows(task, canonical_rows(task, [Given(tuple(rows))]), translate)
    assert [row["id"] for row in found.rows] == ["0", "2"]
    assert found.dropped == ("1", "3")


def test_of_counterparts_only_what_is_asked_is_translated_and_no_mark_tells_the_answer(tmp_path: Path):
    task, asked = TASKS["xquad"], []

    def translate(texts: list[str]) -> list[str]:
        asked.extend(texts)
        return shout(texts)

    found = translated_rows(task, canonical_rows(task, [Given(ROWS["xquad"])]), translate, answers=False)
    assert asked == ["Nia owns a boat.", "What?", "Nia ana mashua mpya.", "Nini?"]
    assert (found.dropped, [sorted(row) for row in found.rows]) == ((), [["context", "id", "question"]] * 2)
    items = reread(task, found.rows, tmp_path, answers=False)
    assert [e.parts for e in items] == [("WHAT?", "NIA OWNS A BOAT."), ("NINI?", "NIA ANA MASHUA MPYA.")]
    assert all(e == e.asked for e in items)
    refused(lambda: reread(task, found.rows, tmp_path), "no field 'answers'")


def test_a_task_of_ones_own_is_translated_where_its_prompt_reads(tmp_path: Path):
    own = {"files": {"test": "{language}.tsv"}, "prompt": "{title} in {language_name}: {body}", "labels": ["a", "b"]}
    task = find_task("topics", {"topics": validated(CustomTask, own)})
    assert translated_fields(task) == ("title", "body")
    source = Given(tuple({"title": f"t{n}", "body": "same", "label": "b", "url": "u"} for n in range(3)))
    found = translated_rows(task, canonical_rows(task, [source]), shout)
    assert found.rows[2] == {"title": "T2", "body": "SAME", "label": "b", "url": "u", ROW: "2"}
    # A row's number stays its id when another row is gone.
    items = reread(task, found.rows[1:], tmp_path)
    assert [(e.id, e.prompt, e.references) for e in items] == [
        (n, f"T{n} in Swahili: SAME", ("b",)) for n in ("1", "2")
    ]


def test_rows_are_repaired_before_they_are_translated():
    task = TASKS["xcopa"]
    wrong = {**ROWS["xcopa"][0], "question": "cause"}
    (row,) = canonical_rows(task, [Given((wrong,)), Given(ROWS["xcopa"])])
    assert (row.fields["question"], row.fields["asked"]) == ("effect", "What happened as a result?")


@pytest.mark.parametrize("name", ["mgsm", "xlsum"])
def test_written_answers_are_not_translated(name: str):
    with pytest.raises(UserError, match="cannot be translated"):
        translated_rows(TASKS[name], [], same)


def test_a_translation_of_another_number_of_texts_is_refused():
    task = TASKS["xquad"]
    with pytest.raises(ValueError, match="zip"):
        translated_rows(task, canonical_rows(task, [Given(ROWS["xquad"])]), lambda texts: texts[:-1])
