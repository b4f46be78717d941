"""The rows of the table of tasks: where each finds its files and hub data, what it makes of them, what it says of bad ones."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingraft.config import CustomTask, validated
from lingraft.errors import ConfigError, DataError, LingraftError, UserError
from lingraft.languages import LANGUAGES
from lingraft.tasks.formats import exemplar_rows, numbered_rows, squad_rows
from lingraft.tasks.items import Example
from lingraft.tasks.sources import FileSource, HubSource, Only, Row
from lingraft.tasks.table import TASKS, find_task


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def jsonl(path: Path, rows: Iterable[Any]) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def squad(path: Path, *questions: tuple[str, str, list[tuple[str, int]]], context: str = "Nia owns a boat.") -> Path:
    qas = [
        {"id": name, "question": asked, "answers": [{"text": t, "answer_start": s} for t, s in answers]}
        for name, asked, answers in questions
    ]
    document = {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": context, "qas": qas}]}]}
    return write(path, json.dumps(document, ensure_ascii=False))


def read(task: str, language: str, split: str, folder: Path, prompt: str = "default") -> list[Example]:
    row = TASKS[task]
    return row.examples(row.sources(language, split, folder), language=language, prompt=prompt)


def refused(action: Callable[[], object], match: str) -> LingraftError:
    with pytest.raises(LingraftError, match=match) as caught:
        action()
    assert isinstance(caught.value, UserError)
    return caught.value


# The table.


def test_the_table_has_every_task_of_the_papers():
    assert set(TASKS) >= {"mgsm", "xcopa", "xnli", "xquad", "xquad-tydiqa", "xlsum", "topics", "nusax", "tydiqa"}
    assert all(find_task(name) is row and row.name == name for name, row in TASKS.items())


def test_specs_tell_tasks_and_wordings_apart():
    specs = [json.dumps(row.spec(prompt)) for row in TASKS.values() for prompt in row.prompts]
    assert len(specs) == len(set(specs))


def test_the_specs_of_the_first_tasks_are_what_they_were():
    assert TASKS["topics"].spec() == {
        "task": "topics",
        "template": "Text: {text}\nTopic:",
        "answers": [[t, t] for t in TASKS["topics"].answers],
        "label_field": "category",
        "id_field": "index_id",
    }
    assert list(TASKS["xcopa"].spec()) == ["task", "template", "answers", "label_field", "id_field"]
    assert TASKS["xcopa"].spec()["answers"] == [["0", "(A)"], ["1", "(B)"]]


def test_languages_of_the_paper_are_in_the_table():
    assert {"ace", "ban", "bbc", "bjn", "bug", "jv", "mad", "min", "nij", "su", "fi", "ro", "bg"} <= set(LANGUAGES)
    for row in TASKS.values():
        assert set(row.languages) <= set(LANGUAGES)
        assert len(set(row.languages)) == len(row.languages)


@pytest.mark.parametrize("task", [name for name, row in TASKS.items() if row.kind != "choice"])
def test_free_text_cannot_be_asked_of_plain_text(task: str):
    with pytest.raises(ConfigError, match="cannot be asked of plain text"):
        TASKS[task].of_text(["a"])


def test_the_list_of_tasks_has_all_and_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from lingraft.commands.listings import list_tasks
    from lingraft.config import TEXT_TASKS

    monkeypatch.setenv("COLUMNS", "80")
    assert list_tasks(as_json=False) is None
    printed = capsys.readouterr().out
    found = list_tasks(as_json=True)
    assert found is not None
    assert [task["name"] for task in found] == [*TASKS, *TEXT_TASKS]
    assert all(f" {task['name']} " in printed for task in found)
    assert max(map(len, printed.splitlines())) <= 80
    mgsm = next(task for task in found if task["name"] == "mgsm")
    assert (mgsm["kind"], mgsm["metric"], mgsm["train_languages"]) == ("number", "accuracy", ["en"])
    assert mgsm["hub"] == ["openai/gsm8k", "juletxara/mgsm"]
    assert mgsm["prompts"] == ["default", "paper", "xlt", "xlt-adamergex"]
    assert json.loads(json.dumps(found)) == found


# Where files lie: as in a folder of all data sets, and as a clone of the upstream repository has them.

PLACES = [
    ("topics", "sw", "validation", ["sib200/swh_Latn/dev.tsv", "data/annotated/swh_Latn/dev.tsv", "topics/sw/validation.tsv"]),
    ("xcopa", "sw", "test", ["xcopa/data/sw/test.sw.jsonl", "data/sw/test.sw.jsonl"]),
    ("xnli", "sw", "validation", ["xnli/sw.genre.dev.tsv", "sw.genre.dev.tsv", "XNLI-1.0/xnli.dev.tsv", "xnli.dev.tsv"]),
    ("xnli", "en", "train", ["XNLI-MT-1.0/multinli/multinli.train.en.tsv", "multinli/multinli.train.en.tsv"]),
    ("nusax", "bbc", "validation", ["nusax/sentiment/toba_batak/valid.csv", "datasets/sentiment/toba_batak/valid.csv"]),
    ("mgsm", "th", "test", ["mgsm/mgsm_th.tsv", "mgsm_th.tsv"]),
    ("mgsm", "th", "validation", ["mgsm/exemplars.json", "mgsm/exemplars.py", "exemplars.py"]),
    ("mgsm", "en", "train", ["gsm8k/train.jsonl", "grade_school_math/data/train.jsonl"]),
    ("xquad", "el", "test", ["xquad/xquad.el.json", "xquad.el.json"]),
    ("xquad", "en", "train", ["squad/train-v1.1.json", "train-v1.1.json"]),
    ("xquad", "vi", "validation", ["MLQA_V1/dev/dev-context-vi-question-vi.json"]),
    ("xquad-articles", "vi", "train", ["xquad/xquad.vi.json", "xquad.vi.json"]),
    ("xquad-tydiqa", "fi", "validation", ["tydiqa_goldp/finnish_tydiqa_dev.json", "tydiqa-goldp-v1.1-dev.json"]),
    ("tydiqa", "sw", "train", ["language_data/swahili/swahili_tydiqa_train.json", "tydiqa-goldp-v1.1-train.json"]),
    ("tydiqa", "ko", "test", ["korean_tydiqa_dev.json", "tydiqa-goldp-v1.1-dev/tydiqa-goldp-dev-korean.json"]),
    ("xlsum", "zh", "test", ["xlsum/zh/test.jsonl", "XLSum_complete_v2.0/chinese_simplified_test.jsonl"]),
    ("xlsum", "sw", "validation", ["xlsum/sw/validation.jsonl", "XLSum_complete_v2.0/swahili_val.jsonl"]),
]  # fmt: skip


@pytest.mark.parametrize(("task", "language", "split", "paths"), PLACES)
def test_a_file_is_found_in_every_layout_the_first_first(
    task: str, language: str, split: str, paths: list[str], tmp_path: Path
):
    for path in reversed(paths):
        write(tmp_path / path, "x")
        source = TASKS[task].source(language, split, tmp_path)
        assert isinstance(source, FileSource)
        assert source.path == tmp_path / path


HUBS = [
    ("topics", "sw", "validation", "Davlan/sib200", "swh_Latn", "validation"),
    ("xcopa", "en", "train", "aps/super_glue", "copa", "train"),
    ("xcopa", "sw", "test", "cambridgeltl/xcopa", "sw", "test"),
    ("xnli", "bg", "test", "facebook/xnli", "bg", "test"),
    ("nusax", "bbc", "train", "indonlp/NusaX-senti", "bbc", "train"),
    ("nusax", "en", "test", "indonlp/NusaX-senti", "eng", "test"),
    ("nusax", "jv", "test", "indonlp/NusaX-senti", "jav", "test"),
    ("mgsm", "en", "train", "openai/gsm8k", "main", "train"),
    ("mgsm", "te", "test", "juletxara/mgsm", "te", "test"),
    ("mgsm", "te", "validation", "juletxara/mgsm", "te", "train"),
    ("xquad", "en", "train", "rajpurkar/squad", "plain_text", "train"),
    ("xquad", "vi", "validation", "facebook/mlqa", "mlqa.vi.vi", "validation"),
    ("xquad", "ro", "test", "google/xquad", "xquad.ro", "validation"),
    ("xquad-tydiqa", "en", "train", "google-research-datasets/tydiqa", "secondary_task", "train"),
    ("xquad-tydiqa", "ru", "validation", "google-research-datasets/tydiqa", "secondary_task", "validation"),
    ("tydiqa", "sw", "test", "google-research-datasets/tydiqa", "secondary_task", "validation"),
    ("tydiqa", "sw", "validation", "google-research-datasets/tydiqa", "secondary_task", "train"),
    ("xlsum", "zh", "test", "csebuetnlp/xlsum", "chinese_simplified", "test"),
    ("xlsum", "gd", "validation", "csebuetnlp/xlsum", "scottish_gaelic", "validation"),
    ("xlsum", "sr", "test", "csebuetnlp/xlsum", "serbian_cyrillic", "test"),
    ("xlsum", "pcm", "test", "csebuetnlp/xlsum", "pidgin", "test"),
]


@pytest.mark.parametrize(("task", "language", "split", "repository", "config", "theirs"), HUBS)
def test_the_hub_is_asked_in_its_own_codes(
    task: str, language: str, split: str, repository: str, config: str, theirs: str
):
    source = TASKS[task].source(language, split, None)
    assert isinstance(source, HubSource)
    assert (source.repository, source.config, source.split) == (repository, config, theirs)


def test_the_nusax_codes_of_the_hub():
    codes = {TASKS["nusax"].source(c, "test", None).config for c in TASKS["nusax"].languages}  # pyright: ignore
    assert sorted(codes) == ["ace", "ban", "bbc", "bjn", "bug", "eng", "ind", "jav", "mad", "min", "nij", "sun"]


@pytest.mark.parametrize(
    ("task", "language", "split", "says", "remedy"),
    [
        ("xquad", "sw", "test", "no 'test' data for 'sw' on the hub", "it has: ar, de, el, en, es, hi, ro, ru, th, tr, vi, zh; or"),
        ("xquad", "fr", "test", "no 'test' data for 'fr' on the hub", "it has: ar, de"),
        ("xquad", "el", "validation", "no 'validation' data for 'el' on the hub", "it has: ar, de, en, es, hi, vi, zh; or"),
        ("mgsm", "sw", "train", "no 'train' data for 'sw' on the hub", "it has: en; or"),
        ("xlsum", "de", "test", "no 'test' data for 'de' on the hub", "it has: am, ar"),
        ("xcopa", "en", "test", "no 'test' data for 'en' on the hub", "it has: et, ht"),
        ("xquad-articles", "en", "train", "no 'train' data for 'en' on the hub", "give --data-dir"),
    ],
)  # fmt: skip
def test_what_the_hub_does_not_have_is_said_before_it_is_asked(
    task: str, language: str, split: str, says: str, remedy: str
):
    error = refused(lambda: TASKS[task].source(language, split, None), says)
    assert error.remedy is not None
    assert error.remedy.startswith(remedy)


def test_a_given_commit_is_that_of_the_data_set_with_the_test():
    revisions = [TASKS["mgsm"].source("en", split, None, "abc").revision for split in ("train", "test")]  # pyright: ignore
    assert revisions == [None, "abc"]


@pytest.mark.parametrize(
    ("task", "language", "split", "says", "remedy"),
    [
        ("xquad", "el", "validation", "no 'validation' data for 'el'", "it has: ar, de, en, es, hi, vi, zh"),
        ("mgsm", "sw", "train", "no 'train' data for 'sw'", "it has: en"),
        ("xquad-tydiqa", "sw", "train", "no 'train' data for 'sw'", "it has: en"),
    ],
)
def test_what_a_task_never_has_is_said(tmp_path: Path, task: str, language: str, split: str, says: str, remedy: str):
    assert refused(lambda: TASKS[task].source(language, split, tmp_path), says).remedy == remedy


def test_a_language_without_a_file_lists_those_that_have_one(tmp_path: Path):
    for name in ("xquad/xquad.ar.json", "xquad.th.json"):
        write(tmp_path / name, "{}")
    error = refused(lambda: TASKS["xquad"].source("sw", "test", tmp_path), "no 'test' data for 'sw'")
    assert error.where == f"{tmp_path}/xquad/xquad.sw.json or {tmp_path}/xquad.sw.json"
    assert error.remedy is not None
    assert error.remedy.endswith("data are here for: ar, th")


# XNLI.


def test_xnli_reads_every_layout_alike(tmp_path: Path):
    expected = [("entailment", ("Mvua inanyesha.", "Ni maji."), "Premise: Mvua inanyesha. Hypothesis: Ni maji.")]
    layouts = {
        "xnli/sw.genre.dev.tsv": "genre\tlabel\tsentence1_sw\tsentence2_sw\nfiction\tentailment\tMvua inanyesha.\tNi maji.\n",
        "XNLI-1.0/xnli.dev.tsv": (
            "language\tgold_label\tsentence1_binary_parse\tsentence1\tsentence2\tpairID\n"
            "de\tneutral\t\tEs regnet.\tEs ist warm.\t8\nsw\tentailment\t\tMvua inanyesha.\tNi maji.\t8\n"
            "sw\t-\t\tMvua inanyesha.\tNi baridi.\t9\n"
        ),
    }
    for number, (path, text) in enumerate(layouts.items()):
        folder = tmp_path / str(number)
        write(folder / path, text)
        items = read("xnli", "sw", "validation", folder)
        found = [(e.completion.strip(), e.parts, e.prompt.split("premise. ")[1].split("\n")[0]) for e in items]
        assert found == expected


def test_xnlis_ids_are_shared_by_translations(tmp_path: Path):
    rows = "".join(f"{c}\tneutral\tp{i}\th{i}\t{i}\n" for c in ("ar", "sw") for i in (3, 1))
    write(tmp_path / "xnli.test.tsv", "language\tgold_label\tsentence1\tsentence2\tpairID\n" + rows)
    ids = [[e.id for e in read("xnli", c, "test", tmp_path)] for c in ("ar", "sw")]
    # XNLI counts pairs from 1; a file without their numbers, and the hub, from 0.
    assert ids == [["2", "0"], ["2", "0"]]


def test_xnli_trains_on_multinli_and_its_translations(tmp_path: Path):
    header = "premise\thypo\tlabel\n"
    write(tmp_path / "multinli.train.en.tsv", header + 'She said "go.\tShe spoke.\tentailment\nA.\tB.\tcontradictory\n')
    assert [e.completion for e in read("xnli", "en", "train", tmp_path)] == [" entailment", " contradiction"]


def test_xnli_never_trains_on_rows_of_its_dev_and_test_sets(tmp_path: Path):
    rows = "".join(f"{c}1,p,h,{c},Language,{label}\n" for c, label in (("en", 2), ("sw", 0), ("th", 1)))
    write(tmp_path / "xnli/watson_train.csv", "id,premise,hypothesis,lang_abv,language,label\n" + rows)
    assert [(e.id, e.completion) for e in read("xnli", "en", "train", tmp_path)] == [("en1", " contradiction")]
    refused(lambda: TASKS["xnli"].source("sw", "train", tmp_path), "no 'train' data for 'sw'")


def test_xnlis_labels_have_names_on_the_hub():
    rows = [{"premise": "p", "hypothesis": "h", "label": n} for n in (0, 1, 2)]
    assert [e.completion for e in hub_items("xnli", rows)] == [" entailment", " neutral", " contradiction"]


def test_an_unknown_relation_is_named(tmp_path: Path):
    path = write(tmp_path / "sw.genre.test.tsv", "genre\tlabel\tsentence1_sw\tsentence2_sw\nf\tneutrl\ta\tb\n")
    error = refused(lambda: read("xnli", "sw", "test", tmp_path), "unknown label 'neutrl'")
    assert (error.where, error.remedy) == (f"{path}:2", "did you mean 'neutral'?")


def test_a_file_of_many_languages_without_this_one_says_so(tmp_path: Path):
    path = write(tmp_path / "xnli.dev.tsv", "language\tgold_label\tsentence1\tsentence2\nar\tneutral\ta\tb\n")
    assert refused(lambda: read("xnli", "sw", "validation", tmp_path), "found no rows for 'sw'").where == str(path)


# MGSM.


def test_a_school_problem_keeps_its_reasoning_and_loses_its_calculator(tmp_path: Path):
    answer = "Two and two are <<2+2=4>>4 .  \nTimes 500: $<<4*500=2000>>2,000.\n#### 2,000"
    jsonl(tmp_path / "gsm8k/train.jsonl", [{"question": " How much? ", "answer": answer}] * 2)
    first, second = read("mgsm", "en", "train", tmp_path)
    assert first.prompt == "Let's think step by step. Question: How much?\nAnswer:"
    assert first.completion == " Two and two are 4 .\nTimes 500: $2,000.\n#### 2,000"
    assert first.references == ("2,000",)
    assert (first.id, second.id) == ("gsm8k-0", "gsm8k-1")


def test_a_school_problem_without_a_number_is_named(tmp_path: Path):
    path = jsonl(tmp_path / "gsm8k/train.jsonl", [{"question": "q", "answer": "It is two.\n####"}])
    assert refused(lambda: read("mgsm", "en", "train", tmp_path), "no number after '####'").where == f"{path}:1"


def test_an_exam_has_no_header_and_its_rows_numbers_are_ids(tmp_path: Path):
    write(tmp_path / "mgsm_es.tsv", 'El "gato", ¿cuánto?\t1,250\r\n¿Y luego?\t3\n')
    assert [row.fields["number"] for row in numbered_rows(tmp_path / "mgsm_es.tsv")] == ["1,250", "3"]
    items = read("mgsm", "es", "test", tmp_path)
    assert [(e.id, e.references, e.answer) for e in items] == [("0", ("1,250",), " 1,250"), ("1", ("3",), " 3")]
    assert 'Question: El "gato", ¿cuánto?\n' in items[0].prompt


@pytest.mark.parametrize("line", ["only a question", "a\tb\tc"])
def test_an_exam_with_other_columns_is_named(tmp_path: Path, line: str):
    path = write(tmp_path / "mgsm_es.tsv", f"q\t1\n{line}\n")
    assert refused(lambda: numbered_rows(path), "not a question and a number").where == f"{path}:2"


EXEMPLARS = {
    "en": ("Question: How many: 3 or 4?", "Step-by-Step Answer: He had 3. 3 + 1 = 4. The answer is 4."),
    "fr": ("Question : Combien ?", "Réponse étape par étape : Il en avait 3. La réponse est 4."),
    "zh": ("问题：多少？", "逐步解答：他有 3 个。答案是 4。"),
    "th": ("โจทย์: เท่าไร", "คำตอบทีละขั้นตอน: เขามี 3 ลูก คำตอบคือ 4"),
}
STRIPPED = {
    "en": ("How many: 3 or 4?", " He had 3. 3 + 1 = 4. The answer is 4.\n#### 4"),
    "fr": ("Combien ?", " Il en avait 3. La réponse est 4.\n#### 4"),
    "zh": ("多少？", " 他有 3 个。答案是 4。\n#### 4"),
    "th": ("เท่าไร", " เขามี 3 ลูก คำตอบคือ 4\n#### 4"),
}


@pytest.mark.parametrize("language", EXEMPLARS)
def test_exemplars_lose_their_labels_and_end_like_the_training(tmp_path: Path, language: str):
    pairs = {code: {"1": {"q": q, "a": a}} for code, (q, a) in EXEMPLARS.items()}
    value = {"EXEMPLAR_NUMBER_ANSWERS": [4], "MGSM_EXEMPLARS": pairs}
    write(tmp_path / "json/exemplars.json", json.dumps(value, ensure_ascii=False))
    code = '"""Notes."""\n' + "".join(f"{name} = {found!r}\n" for name, found in value.items())
    write(tmp_path / "py/mgsm/exemplars.py", code)
    question, answer = EXEMPLARS[language]
    rows = [{"question": question, "answer": answer, "answer_number": 4, "equation_solution": "3 + 1 = 4."}]
    for items in (
        read("mgsm", language, "validation", tmp_path / "json"),
        read("mgsm", language, "validation", tmp_path / "py"),
        hub_items("mgsm", rows),
    ):
        (item,) = items
        assert (item.prompt.split("Question: ", 1)[1].removesuffix("\nAnswer:"), item.answer) == STRIPPED[language]
        assert (item.id, item.references) == ("exemplar-1", ("4",))


def test_the_hubs_exam_has_no_reasoning():
    rows = [{"question": "q", "answer": None, "answer_number": n, "equation_solution": None} for n in (5, 7)]
    assert [(e.id, e.answer) for e in hub_items("mgsm", rows)] == [("0", " 5"), ("1", " 7")]


def test_exemplars_in_python_are_read_and_never_run(tmp_path: Path):
    path = write(tmp_path / "exemplars.py", f"MGSM_EXEMPLARS = open({str(tmp_path / 'made')!r}, 'w')\n")
    refused(lambda: exemplar_rows(path), "not literals")
    assert not (tmp_path / "made").exists()
    refused(lambda: exemplar_rows(write(path, "MGSM_EXEMPLARS = (")), "not literals")


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"EXEMPLAR_NUMBER_ANSWERS": [1], "MGSM_EXEMPLARS": {"en": {"1": {"q": ""}}}}']
)
def test_other_json_than_exemplars_is_named(tmp_path: Path, text: str):
    path = write(tmp_path / "exemplars.json", text)
    assert refused(lambda: exemplar_rows(path), "does not hold MGSM's exemplars").where == str(path)


# Extraction.


def test_an_answer_is_a_span_of_the_context_and_all_answers_are_right(tmp_path: Path):
    squad(tmp_path / "xquad.sw.json", ("q", "What?", [("boat", 11), ("a boat", 9), ("boat", 11)]))
    (item,) = read("xquad", "sw", "test", tmp_path)
    assert item.prompt == "Nia owns a boat. Question: What?\nAnswer:"
    assert (item.answer, item.references) == (" boat", ("boat", "a boat"))
    assert (item.parts, item.span) == (("What?", "Nia owns a boat."), (11, 15))


@given(st.text(min_size=1), st.data())
def test_every_part_of_a_context_can_be_an_answer(context: str, data: st.DataObject):
    start = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(start + 1, len(context)))
    answers = json.dumps({"text": [context[start:end]], "answer_start": [start]})
    row = Row({"id": "1", "context": context, "question": "?", "answers": answers}, "here")
    (item,) = TASKS["tydiqa"].examples([Rows((row,))])
    assert item.span == (start, end)
    assert item.cuttable is not None and item.span is not None
    assert item.prompt[slice(*item.cuttable)][slice(*item.span)] == item.references[0]


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([("boat", 10)], "the answer 'boat' does not stand at character 10"),
        ([("boat", 11), ("ship", 11)], "the answer 'ship' does not stand"),
        ([("boat", 99)], "does not stand at character 99"),
        ([("boat", -5)], "no answer, or an empty one"),
        ([("", 0)], "no answer, or an empty one"),
        ([], "no answer, or an empty one"),
    ],
)
def test_an_answer_that_is_not_where_it_should_be_is_named_with_its_item(
    tmp_path: Path, answers: list[tuple[str, int]], says: str
):
    path = squad(tmp_path / "xquad.sw.json", ("q0", "?", [("Nia", 0)]), ("q1", "?", answers))
    error = refused(lambda: read("xquad", "sw", "test", tmp_path), says)
    assert error.where == f"{path}, item q1"
    assert error.remedy is not None


def test_a_question_id_that_stands_twice_is_named(tmp_path: Path):
    path = squad(tmp_path / "xquad.sw.json", ("q", "?", [("Nia", 0)]), ("q", "!", [("boat", 11)]))
    error = refused(lambda: read("xquad", "sw", "test", tmp_path), "the id 'q' stands here and at")
    assert error.where == f"{path}, item q"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "no list 'data'"),
        ('{"data": {}}', "no list 'data'"),
        ('{"data": []}', "has no questions"),
        ('{"data": [{}]}', r"not SQuAD's form \(KeyError: 'paragraphs'\)"),
        ('{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q"}]}]}]}', r"\(KeyError: 'id'\)"),
        ('{"data": [{"paragraphs": [{"qas": [{"id": "1"}]}]}]}', r"\(KeyError: 'context'\)"),
        ('{"data": [3]}', "not SQuAD's form"),
    ],
)
def test_json_of_another_form_than_squads_is_named(tmp_path: Path, text: str, says: str):
    path = write(tmp_path / "x.json", text)
    error = refused(lambda: squad_rows(path), says)
    assert (error.where or "").startswith(str(path))


@pytest.mark.parametrize("answers", ["null", "3", '[{"text": "a"}]', '{"text": ["a"], "answer_start": []}', "no json"])
def test_answers_of_another_form_are_named(answers: str):
    row = Row({"id": "1", "context": "a", "question": "?", "answers": answers}, "here")
    assert refused(lambda: TASKS["xquad"].examples([Rows((row,))]), "not SQuAD's").where == "here"


def tydiqa(folder: Path, count: int = 200, split: str = "train") -> None:
    for code in ("english", "swahili"):
        asked = [(f"{code}-{n}-0", "?", [("boat", 11)]) for n in range(count)]
        squad(folder / f"tydiqa_goldp/{code}_tydiqa_{split}.json", *asked)


def test_a_tenth_of_tydiqas_training_is_held_out_and_left_out_of_it(tmp_path: Path):
    tydiqa(tmp_path)
    train, held = ({e.id for e in read("tydiqa", "sw", split, tmp_path)} for split in ("train", "validation"))
    assert train.isdisjoint(held)
    assert train | held == {f"swahili-{n}-0" for n in range(200)}
    assert 8 <= len(held) <= 35
    sources = [TASKS["tydiqa"].source("sw", split, tmp_path) for split in ("train", "validation")]
    assert len({source.digest() for source in sources}) == 2


def test_what_is_held_out_is_the_same_wherever_the_rows_come_from(tmp_path: Path):
    tydiqa(tmp_path)
    documents = [json.loads(path.read_text()) for path in sorted((tmp_path / "tydiqa_goldp").iterdir())]
    whole = {"data": [article for document in documents for article in document["data"]]}
    write(tmp_path / "whole/tydiqa-goldp-v1.1-train.json", json.dumps(whole))
    for split in ("train", "validation"):
        apart, together = (read("tydiqa", "sw", split, folder) for folder in (tmp_path, tmp_path / "whole"))
        assert apart == together
    file, hub = (TASKS["tydiqa"].source("sw", "validation", folder) for folder in (tmp_path, None))
    assert file.only == hub.only == Only("id", "swahili-*", (0.0, 0.1))  # pyright: ignore


@given(st.lists(st.text(min_size=1), unique=True), st.floats(0, 1))
def test_parts_of_the_hashes_divide_the_rows(names: list[str], cut: float):
    rows = [Row({"id": name}, "here") for name in names]
    low, high = Only("id", "*", (0.0, cut)), Only("id", "*", (cut, 1.0))
    assert all(low.counts(row) != high.counts(row) for row in rows)


def test_xquad_trained_on_tydiqa_holds_nothing_out(tmp_path: Path):
    tydiqa(tmp_path, 20)
    tydiqa(tmp_path, 3, "dev")
    assert len(read("xquad-tydiqa", "en", "train", tmp_path)) == 20
    assert [e.id for e in read("xquad-tydiqa", "sw", "validation", tmp_path)] == [f"swahili-{n}-0" for n in range(3)]


def test_xquads_articles_are_divided_alike_in_every_language_and_none_is_in_two_parts(tmp_path: Path):
    task, found = TASKS["xquad-articles"], {}
    for language, context in (("en", "Nia owns a boat."), ("vi", "Nia có một chiếc boat.")):
        place, articles = context.index("boat"), []
        for n in range(60):
            answers = [{"text": "boat", "answer_start": place}]
            qas = [{"id": f"{n}-{q}", "question": "?", "answers": answers} for q in range(2)]
            articles.append({"title": f"Article {n}", "paragraphs": [{"context": context, "qas": qas}]})
        write(tmp_path / f"xquad.{language}.json", json.dumps({"data": articles}))
        parts = {split: [e.id for e in read(task.name, language, split, tmp_path)] for split in task.layouts}
        whole = [name for ids in parts.values() for name in ids]
        assert sorted(whole) == sorted(f"{n}-{q}" for n in range(60) for q in range(2))
        assert all({f"{name[:-1]}0", f"{name[:-1]}1"} <= set(ids) for ids in parts.values() for name in ids)
        assert all(parts.values())
        found[language] = parts
    assert found["en"] == found["vi"]
    # Where a part is told by nothing but its name, a step's key could not tell it from another.
    assert len({task.source("en", split, tmp_path).digest() for split in task.layouts}) == 3


@pytest.mark.parametrize("task", ["xnli", "nusax", "tydiqa", "xquad", "xquad-articles"])
def test_the_wording_of_flare_has_a_cue_that_its_paper_has(task: str):
    prompt = TASKS[task].prompt("flare")
    cue = {"xnli": "\nLabel:", "nusax": "\nSentiment:"}.get(task, "\nAnswer:")
    assert (prompt.template.endswith(cue), prompt.lead, prompt.generate) == (True, " ", False)


# NusaX, XL-Sum.


def test_nusax_is_read(tmp_path: Path):
    write(tmp_path / "nusax/sentiment/ngaju/test.csv", 'id,text,label\n7,"A, ""b""\nc",negative\n9,d,neutral\n')
    items = read("nusax", "nij", "test", tmp_path)
    assert [(e.id, e.prompt, e.completion) for e in items] == [
        ("7", 'Text: A, "b"\nc\nSentiment:', " negative"),
        ("9", "Text: d\nSentiment:", " neutral"),
    ]
    assert TASKS["nusax"].metric == "accuracy"  # macro-F1 stands beside it


def test_xlsum_is_read_and_its_article_may_be_cut(tmp_path: Path):
    row = {"id": "a1", "url": "u", "title": "T", "summary": "S one.\nS two.", "text": "Long {title}."}
    jsonl(tmp_path / "XLSum_complete_v2.0/swahili_val.jsonl", [row])
    (item,) = read("xlsum", "sw", "validation", tmp_path)
    assert item.prompt == "Summarize the context in one sentence. Title: T Context: Long {title}.\nSummary:"
    assert item.cuttable is not None
    assert item.prompt[slice(*item.cuttable)] == "Long {title}."
    assert (item.answer, item.references, item.candidates) == (" S one.\nS two.", ("S one.\nS two.",), ())


@pytest.mark.parametrize("field", ["title", "text", "summary", "id"])
def test_an_article_without_a_field_is_named(tmp_path: Path, field: str):
    row = {"id": "a1", "title": "T", "summary": "S", "text": "L"}
    del row[field]
    path = jsonl(tmp_path / "xlsum/sw/test.jsonl", [row])
    assert refused(lambda: read("xlsum", "sw", "test", tmp_path), f"'{field}'").where == f"{path}:1"


def test_published_comparisons_draw_samples():
    assert {name: dict(row.sample) for name, row in TASKS.items() if row.sample} == {
        "xnli": {"test": 1000},
        "xlsum": {"test": 500},
    }


# Files.


def test_an_array_of_json_is_read_like_its_lines(tmp_path: Path):
    rows = [{"id": 1, "text": "é"}, {"id": 2, "text": [1]}]
    array = FileSource(write(tmp_path / "x.json", json.dumps(rows, indent=1))).rows()
    lines = FileSource(jsonl(tmp_path / "y.json", rows)).rows()
    assert [row.fields for row in array] == [row.fields for row in lines]


@pytest.mark.parametrize(
    ("text", "says", "where"),
    [('[{"a": 1},\n {"a"}]', "not JSON", ":2"), ('[{"a": 1}, 3]', "not a JSON object", ", element 1")],
)
def test_a_bad_array_is_named(tmp_path: Path, text: str, says: str, where: str):
    path = write(tmp_path / "x.json", text)
    assert refused(FileSource(path).rows, says).where == f"{path}{where}"


# The hub, without a connection.


class Rows:
    """A source of rows that are here."""

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self.found = rows

    def digest(self) -> str:
        return "given"

    def rows(self) -> list[Row]:
        return list(self.found)


def hub_items(task: str, rows: list[dict[str, Any]]) -> list[Example]:
    with pytest.MonkeyPatch.context() as patch:
        loaded(patch, rows)
        return TASKS[task].examples([HubSource("some/set", "config", "test", "abc")])


def loaded(patch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Has `datasets` give these rows, and gives how it is asked."""
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[Any, ...]] = []

    def load(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((*arguments, options))
        return rows

    patch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_data_set_that_is_a_script_is_read_from_the_hubs_conversion(monkeypatch: pytest.MonkeyPatch):
    asked = loaded(monkeypatch, [{"id": "1", "text": "t", "label": "neutral"}])
    source = TASKS["nusax"].source("ban", "test", None, "0123")
    assert len(TASKS["nusax"].examples([source])) == 1
    files = {"test": "hf://datasets/indonlp/NusaX-senti@0123/ban/test/*.parquet"}
    assert asked == [("parquet", {"data_files": files, "split": "test", "streaming": False})]
    assert source.digest() == "hub:indonlp/NusaX-senti@0123:ban:test"


def test_the_conversions_commit_is_that_of_its_own_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refs = tmp_path / "datasets--csebuetnlp--xlsum/refs"
    write(refs / "main", "aaaa")
    write(refs / "refs/convert/parquet", "bbbb")
    assert TASKS["xlsum"].source("sw", "test", None).digest() == "hub:csebuetnlp/xlsum@bbbb:swahili:test"


def test_rows_are_streamed_as_they_are_asked_for(monkeypatch: pytest.MonkeyPatch):
    asked = loaded(monkeypatch, [{"id": f"{code}-{n}"} for n in range(3) for code in ("english", "swahili")])
    source = HubSource("some/set", "config", "train", "abc", Only("id", "swahili-*"))
    assert [row.fields["id"] for row in source.streamed()] == ["swahili-0", "swahili-1", "swahili-2"]
    assert asked[0][-1]["streaming"] is True
    assert list(source.streamed()) == source.rows()
    assert source.digest() == "hub:some/set@abc:config:train:id=swahili-*"


def test_the_hubs_answers_are_read(monkeypatch: pytest.MonkeyPatch):
    answers = {"text": ["boat", "a boat"], "answer_start": [11, 9]}
    rows = [
        {"id": f"{code}-1", "title": "T", "context": "Nia owns a boat.", "question": "?", "answers": answers}
        for code in ("english", "swahili")
    ]
    loaded(monkeypatch, rows)
    source = TASKS["tydiqa"].source("sw", "test", None, "abc")
    (item,) = TASKS["tydiqa"].examples([source], language="sw")
    assert (item.id, item.references, item.span) == ("swahili-1", ("boat", "a boat"), (11, 15))


def test_labels_that_the_hub_numbers_have_the_names_it_tells(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive", "neutral"]),
        }
    )
    table = datasets.Dataset.from_dict({"id": ["a", "b"], "text": ["t", "u"], "label": [2, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    items = TASKS["nusax"].examples([TASKS["nusax"].source("en", "test", None, "abc")])
    assert [e.completion for e in items] == [" neutral", " negative"]


def test_contexts_that_lost_their_leading_blanks_on_the_hub_keep_their_answers():
    def item(context: str, answers: object) -> Example:
        row = {"id": "1", "question": "?", "context": context, "answers": json.dumps(answers)}
        return TASKS["tydiqa"].examples([Rows((Row(row, "here"),))])[0]

    # Two blanks stood before "Nia".
    converted = {"text": ["boat", "a boat"], "answer_start": [13, 11]}
    assert item("Nia owns a boat.", converted).span == (11, 15)
    assert item("  Nia owns a boat.", converted).span == (13, 17)
    for context, answers in (
        ("Nia owns a boat.", {"text": ["boat", "a boat"], "answer_start": [13, 10]}),
        (" Nia owns a boat.", converted),
        ("Nia owns a boat.", [{"text": "boat", "answer_start": 13}]),
    ):
        refused(lambda context=context, answers=answers: item(context, answers), "does not stand at character")


def test_a_source_that_lacks_the_dividing_field_is_named():
    with pytest.raises(DataError, match="no field 'id'"):
        Only("id").counts(Row({"name": "1"}, "here"))


def test_a_split_that_a_task_of_one_s_own_does_not_have_is_said(tmp_path: Path):
    own = validated(CustomTask, {"files": {"train": "{language}.tsv"}, "prompt": "{text}", "labels": ["a", "b"]})
    error = refused(
        lambda: find_task("mine", {"mine": own}).source("en", "test", tmp_path), "'mine' has no 'test' split"
    )
    assert error.remedy == "it has: train"
