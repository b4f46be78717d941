"""Every wording of every task, compared byte for byte with what was agreed on.

The agreed texts are in tests/golden/prompts, one file a task, wording and language. After a change that is meant, renew them
with `LINGRAFT_RENEW_GOLDEN=1 pytest tests/unit/test_prompts.py` and read the difference.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingraft.errors import DataError, UserError
from lingraft.prompts import fields_of, fill, fill_with_span, xlt
from lingraft.tasks.items import Example
from lingraft.tasks.sources import Row
from lingraft.tasks.table import TASKS
from lingraft.tasks.wordings import WORDINGS

GOLDEN = Path(__file__).parents[1] / "golden" / "prompts"
RENEW = os.environ.get("LINGRAFT_RENEW_GOLDEN") == "1"


@dataclass(frozen=True)
class Given:
    """A source of one row."""

    fields: dict[str, str]

    def digest(self) -> str:
        return "given"

    def rows(self) -> list[Row]:
        return [Row(self.fields, "here")]


def extraction(context: str, question: str, *answers: str) -> dict[str, str]:
    marked = [{"text": answer, "answer_start": context.index(answer)} for answer in answers]
    return {"id": "q1", "context": context, "question": question, "answers": json.dumps(marked, ensure_ascii=False)}


READING = {
    "en": extraction(
        "The ferry leaves at 7.30. It carries {40} cars.", "When does the ferry leave?", "7.30", "at 7.30"
    ),
    "sw": extraction("Feri huondoka saa moja. Hubeba magari arobaini.", "Feri huondoka lini?", "saa moja"),
    "th": extraction("เรือข้ามฟากออกเวลาเจ็ดโมง บรรทุกรถได้สี่สิบคัน", "เรือออกกี่โมง", "เจ็ดโมง"),
    "zh": extraction("渡轮七点半出发。它可以载四十辆车。", "渡轮几点出发？", "七点半"),
    "ar": extraction("تغادر العبّارة في السابعة. وتحمل أربعين سيارة.", "متى تغادر العبّارة؟", "في السابعة"),
}
CHOOSING = {
    "en": {
        "premise": "The cup fell.",
        "choice1": "It broke.",
        "choice2": "It sang.",
        "question": "effect",
        "label": "0",
    },
    "sw": {
        "premise": "Kikombe kilianguka.",
        "choice1": "Kiliimba.",
        "choice2": "Mtoto alikigusa.",
        "question": "cause",
        "label": "1",
    },
    "th": {"premise": "ถ้วยตกลงพื้น", "choice1": "ถ้วยแตก", "choice2": "ถ้วยร้องเพลง", "question": "effect", "label": "0"},
    "zh": {
        "premise": "杯子掉了下来。",
        "choice1": "它唱了歌。",
        "choice2": "孩子碰了它。",
        "question": "cause",
        "label": "1",
    },
}
ROWS: dict[str, dict[str, dict[str, str]]] = {
    "mgsm": {
        "en": {
            "question": "Asha has 3 bags of 4 mangoes. How many mangoes has she?",
            "answer": "Three bags hold 3*4 = <<3*4=12>>12 mangoes.\n#### 12",
        },
        "sw": {"question": "Asha ana mifuko 3 ya maembe 4. Ana maembe mangapi?", "number": "12"},
        "th": {"question": "อาชามีถุง 3 ถุง ถุงละ 4 ลูก เธอมีมะม่วงกี่ลูก", "number": "12"},
        "zh": {"question": "阿莎有3袋芒果，每袋4个。她有多少个芒果？", "number": "1,200"},
    },
    "xcopa": CHOOSING,
    "xcopa-raw": {"sw": CHOOSING["sw"]},
    "xnli": {
        "en": {"premise": "All shops are shut.", "hypothesis": "One can buy bread.", "label": "2"},
        "sw": {"sentence1_sw": "Maduka yote yamefungwa.", "sentence2_sw": "Leo ni sikukuu.", "label": "neutral"},
        "th": {"premise": "ร้านทุกร้านปิด", "hypothesis": "ร้านขนมปังปิด", "label": "0"},
        "ar": {"sentence1": "كل المتاجر مغلقة.", "sentence2": "المخبز مغلق.", "gold_label": "entailment"},
    },
    "xquad": READING,
    "xquad-tydiqa": {"th": READING["th"]},
    "xquad-articles": {"th": READING["th"]},
    "tydiqa": {language: READING[language] for language in ("en", "sw", "ar")},
    "xlsum": {
        "en": {"title": "New bridge", "text": "The town opened a bridge. Many came.", "summary": "A bridge was opened."},
        "sw": {"title": "Daraja jipya", "text": "Mji ulifungua daraja. Wengi walikuja.", "summary": "Daraja lilifunguliwa."},
        "th": {"title": "สะพานใหม่", "text": "เมืองเปิดสะพาน ผู้คนมากมายมา", "summary": "สะพานเปิดแล้ว"},
        "zh": {"title": "新桥", "text": "小城新桥通车。许多人来了。", "summary": "新桥通车。"},
    },
    "topics": {
        "en": {"text": "The match ended two all.", "category": "sports"},
        "sw": {"text": "Bunge lilipitisha sheria mpya.", "category": "politics"},
        "zh": {"text": "望远镜看到了一颗新星。", "category": "science/technology"},
    },
    "nusax": {
        "en": {"text": "The soup was cold and the waiter rude.", "label": "negative"},
        "id": {"text": "Kamarnya bersih dan pelayannya ramah.", "label": "positive"},
        "su": {"text": "Tokona muka jam dalapan.", "label": "neutral"},
    },
}  # fmt: skip
IDS = {"id": "1", "idx": "1", "index_id": "1"}
CASES = [(task, prompt, language) for task, rows in ROWS.items() for prompt in TASKS[task].prompts for language in rows]


def asked(task: str, prompt: str, language: str) -> Example:
    (item,) = TASKS[task].examples([Given(IDS | ROWS[task][language])], language=language, prompt=prompt)
    return item


def shown(task: str, prompt: str, language: str) -> str:
    """A prompt with a sign where it ends, and below it what else a model or a reader is told."""
    item, row = asked(task, prompt, language), TASKS[task]
    told = {
        "completion": item.completion,
        "candidates": item.candidates,
        "references": item.references,
        "parts": item.parts,
        "options": item.options,
        "generate": row.prompt(prompt).generate,
        "new_tokens": row.new_tokens(prompt),
        "stop": row.stop(prompt),
        "rule": row.rule(prompt),
    }
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in told.items()]
    return f"{item.prompt}¶\n\n" + "\n".join(lines) + "\n"


def test_every_wording_of_every_task_is_here():
    assert {task for task, *_ in CASES} == set(TASKS)
    assert {id(row.prompts) for row in TASKS.values()} == {id(found) for found in WORDINGS.values()}


@pytest.mark.parametrize(("task", "prompt", "language"), CASES)
def test_a_prompt_is_what_was_agreed_on(task: str, prompt: str, language: str):
    path = GOLDEN / f"{task}.{prompt}.{language}.txt"
    found = shown(task, prompt, language).encode()
    if RENEW:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found)
    assert found == path.read_bytes()


def test_nothing_else_is_agreed_on():
    assert {path.name for path in GOLDEN.iterdir()} == {".".join([*case, "txt"]) for case in CASES}


# Laws of all wordings.

ALL = [(task, prompt) for task, row in TASKS.items() for prompt in row.prompts]


@pytest.mark.parametrize(("task", "prompt"), ALL)
def test_between_prompt_and_answer_there_is_one_blank(task: str, prompt: str):
    language = next(iter(ROWS[task]))
    item = asked(task, prompt, language)
    wording = TASKS[task].prompt(prompt)
    if wording.generate and wording.marker and wording.marker.endswith(":"):
        return  # The model first thinks: no answer stands behind the prompt.
    assert (item.prompt[-1] == " ") != (item.completion[0] == " ")
    assert item.prompt.rstrip()[-1] == ":"
    assert not item.completion.startswith("  ")


@pytest.mark.parametrize("task", TASKS)
def test_the_default_cue_ends_in_no_blank(task: str):
    template = TASKS[task].prompt().template
    assert template == template.rstrip()
    assert template.splitlines()[-1] in ("Answer:", "Summary:", "Relationship:", "Topic:", "Sentiment:")


@pytest.mark.parametrize(("task", "prompt"), ALL)
def test_what_may_be_cut_is_the_context_and_nothing_else(task: str, prompt: str):
    for language in ROWS[task]:
        item, context = asked(task, prompt, language), TASKS[task].context
        if context is None:
            assert item.cuttable is None
        else:
            assert item.cuttable is not None
            assert item.prompt[slice(*item.cuttable)] == ROWS[task][language][context]


@pytest.mark.parametrize("task", [name for name, row in TASKS.items() if row.kind == "extraction"])
def test_a_span_is_the_answer_in_the_last_part(task: str):
    for language in ROWS[task]:
        item = asked(task, "default", language)
        assert item.span is not None
        assert " " + item.parts[-1][slice(*item.span)] == item.answer
        assert item.references[0] == item.answer.strip()


@pytest.mark.parametrize("task", TASKS)
def test_an_encoder_reads_what_its_head_needs(task: str):
    row = TASKS[task]
    item = asked(task, "default", next(iter(ROWS[task])))
    assert (row.head is None) == (item.parts == ())
    assert (row.head == "multiple_choice") == (len(item.options) == len(item.candidates) > 0)
    assert (row.head == "span") == (item.span is not None)


@pytest.mark.parametrize("task", TASKS)
def test_xlt_is_for_writing_and_is_read_behind_its_marker(task: str):
    row = TASKS[task]
    wording, rule = row.prompt("xlt"), row.rule("xlt")
    assert wording.generate
    assert wording.template.endswith(f"in this format '{rule['marker']}'.")
    assert wording.template.splitlines()[0].endswith(" expert for {language_name} .")
    assert row.new_tokens("xlt") == (512 if task == "mgsm" else 256)
    for language in ROWS[task]:
        assert "{" not in asked(task, "xlt", language).prompt.replace("{40}", "")


def test_the_published_xlt_of_natural_language_inference():
    assert asked("xnli", "xlt", "en").prompt == (
        "I want you to act as a natural language inference expert for English .\n"
        "Premise: All shops are shut.\n"
        "Hypothesis: One can buy bread.\n"
        "You should retell the premise and hypothesis in English.\n"
        "You should judge whether the hypothesis is true (entailment), false (contradiction), or undetermined (neutral) given the "
        "premise. The relationship can be chosen from entailment, contradiction, and neutral .\n"
        "You should step-by-step answer the request.\n"
        "You should tell me the relationship in this format 'relationship:'."
    )


def test_the_departing_xlt_departs_as_its_code_does():
    said = {task: asked(task, "xlt-adamergex", "th").prompt for task in ("mgsm", "xcopa", "xnli", "xquad", "xlsum")}
    assert all("expert forThai" in prompt for prompt in said.values())
    assert all("in this format" not in prompt for prompt in said.values())
    assert said["mgsm"].startswith("I want you to act as act as an arithmetic")
    tokens = {task: TASKS[task].new_tokens("xlt-adamergex") for task in said}
    assert tokens == {"mgsm": 512, "xcopa": 16, "xnli": 16, "xquad": 16, "xlsum": 64}


@pytest.mark.parametrize(("task", "prompt"), [(t, p) for t, p in ALL if TASKS[t].kind == "choice"])
def test_every_candidate_is_read_as_its_label(task: str, prompt: str):
    from lingraft.answers.scoring import Rule, read
    from lingraft.metrics import Generated

    item = asked(task, prompt, next(iter(ROWS[task])))
    rule = Rule.from_dict(TASKS[task].rule(prompt))
    for label, candidate in zip(TASKS[task].answers, item.candidates, strict=True):
        text = f"{rule.marker or ''}{candidate}\nand so on"
        assert read(Generated("1", "", text, (label,)), rule, "en").answer == label
    assert item.references == (list(TASKS[task].answers)[item.gold],)


@pytest.mark.parametrize("task", [name for name, row in TASKS.items() if row.kind != "choice"])
def test_the_right_answer_is_read_as_right(task: str):
    from lingraft.answers.scoring import MAIN, Rule, read
    from lingraft.metrics import Generated

    pytest.importorskip("rouge_score") if TASKS[task].kind == "summary" else None
    for prompt in TASKS[task].prompts:
        rule = Rule.from_dict(TASKS[task].rule(prompt))
        for language in ROWS[task]:
            item = asked(task, prompt, language)
            said = f"{rule.marker} {item.references[0]}" if prompt == "xlt" else item.answer
            scored = read(Generated(item.id, item.prompt, said, item.references), rule, language)
            assert scored.figures[MAIN[rule.kind]] == 1, (prompt, language, scored)


def test_an_unknown_wording_suggests_the_nearest():
    with pytest.raises(UserError, match="no prompt 'xlr'") as caught:
        TASKS["xnli"].examples([], prompt="xlr")
    assert caught.value.remedy == "did you mean 'xlt'?"


# Filling.


def test_braces_in_the_data_mean_nothing():
    assert fill("{a} {b}", {"a": "{b} {x} {", "b": "{a}"}) == "{b} {x} { {a}"


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.text(), min_size=3))
def test_a_template_is_filled_once(row: dict[str, str]):
    assert fill("<{a}|{b}|{c}>", row) == f"<{row['a']}|{row['b']}|{row['c']}>"


@given(st.lists(st.sampled_from(["{a}", "{b}", "x", "{c}", "{ }"])), st.text(), st.text(), st.text())
def test_the_span_of_a_field_is_where_its_value_stands(pieces: list[str], a: str, b: str, c: str):
    template, row = "".join(pieces), {"a": a, "b": b, "c": c}
    text, span = fill_with_span(template, row, "b")
    assert text == fill(template, row)
    assert (span is None) == ("b" not in fields_of(template))
    if span is not None:
        assert text[slice(*span)] == b
        assert text[: span[0]] == fill(template.split("{b}")[0], row)


def test_only_names_in_braces_are_fields():
    assert fields_of('{a} {"b": 1} {c d} {{e}}') == ("a", "e")
    assert fill('{"x": {a}}', {"a": "1"}) == '{"x": 1}'


def test_a_field_that_is_missing_is_named_with_those_that_are_there():
    with pytest.raises(DataError, match=r"asks for 'c', which the row does not have \(it has a, b\)"):
        fill("{a}{c}", {"a": "", "b": ""})


def test_the_six_slots():
    made = xlt("an odd", "{x}", "repeat the thing", "do it", "result", "in {language_name}", tokens=9)
    assert made.template == (
        "I want you to act as an odd expert for {language_name} .\n{x}\nYou should repeat the thing in English.\n"
        "You should do it .\nYou should step-by-step answer the request.\n"
        "You should tell me the result in {language_name} in this format 'result:'."
    )
    assert (made.marker, made.new_tokens, made.generate) == ("result:", 9, True)
