"""Brings the rows of every source of a task, file or hub, to the fields that its prompts name."""

import re
from dataclasses import replace

from lingraft.errors import DataError
from lingraft.tasks.sources import Row, value_of

_ASKED = {"cause": "What was the cause?", "effect": "What happened as a result?"}
_RELATION_NAMES = {"0": "entailment", "1": "neutral", "2": "contradiction", "contradictory": "contradiction"}
_CALCULATION = re.compile(r"<<[^<>]*>>")
# `Question:`, `Step-by-Step Answer:` and their translations; French has a blank before the colon, Chinese a wide one.
_LABEL = re.compile(r"^[^:：\d]{1,40}[:：]\s*")


def with_fields(row: Row, **fields: str) -> Row:
    """The row with further or other values."""
    return replace(row, fields={**row.fields, **fields})


def with_question(row: Row, number: int) -> Row:
    """XCOPA: the question as an encoder reads it behind the premise."""
    question = value_of(row, "question")
    return with_fields(row, asked=_ASKED.get(question, f"What is the {question}?"))


def english_question(rows: list[Row], english: list[Row]) -> list[Row]:
    """XCOPA's `question` is wrong in some languages: takes it from the English item of the same index."""
    right = {row.fields.get("idx"): row.fields["question"] for row in english if "question" in row.fields}
    return [with_fields(row, question=right.get(row.fields.get("idx"), row.fields.get("question", ""))) for row in rows]


def relation(row: Row, number: int) -> Row | None:
    """XNLI: premise, hypothesis and the label's name; items on which the annotators did not agree (`-`) do not count."""
    premise, hypothesis = (
        _first(row, names) for names in (("premise", "sentence1"), ("hypothesis", "hypo", "sentence2"))
    )
    label = _first(row, ("gold_label", "label"))
    if label == "-":
        return None
    pair = row.fields.get("pairID", "")
    # Pairs are counted from 1: so numbered, an item is the same in files without the numbers and on the hub.
    name = str(int(pair) - 1) if pair.isdecimal() else row.fields.get("id") or pair or str(number)
    return with_fields(row, id=name, premise=premise, hypothesis=hypothesis, label=_RELATION_NAMES.get(label, label))


def _first(row: Row, names: tuple[str, ...]) -> str:
    """The value of the first of some fields; with a language behind it (`sentence1_sw`) it is the same field."""
    for name in names:
        for field, value in row.fields.items():
            if field == name or re.fullmatch(rf"{name}_[a-z]{{2,3}}", field):
                return value
    return value_of(row, names[0])


def sentiment(row: Row, number: int) -> Row:
    """NusaX: the label by its name; the hub has numbers, and tells what they mean."""
    return with_fields(row, label=row.fields.get("label_name") or value_of(row, "label"))


def problem(row: Row, number: int) -> Row:
    """MGSM and GSM8K: id, question, the reasoning with `#### n` as its last line where there is one, and the number."""
    answer = row.fields.get("answer", "")
    if "####" in answer:
        return _school_problem(row, number, answer)
    if "index" in row.fields:
        return _exemplar(row, f"exemplar-{row.fields['index']}", value_of(row, "number"))
    if "answer_number" in row.fields and answer not in ("", "null"):
        return _exemplar(row, f"exemplar-{number + 1}", row.fields["answer_number"])
    asked, figure = value_of(row, "question"), _first(row, ("number", "answer_number"))
    return with_fields(row, id=str(number), question=asked.strip(), answer="", number=figure.strip())


def _school_problem(row: Row, number: int, answer: str) -> Row:
    reasoning, _, figure = answer.rpartition("####")
    lines = [_CALCULATION.sub("", line).strip() for line in reasoning.strip().split("\n")]
    if not figure.strip():
        raise DataError(
            "this answer has no number after '####'",
            where=row.place,
            remedy="write #### and the number at the end of the answer",
        )
    figure = figure.strip()
    text = "\n".join([*lines, f"#### {figure}"])
    return with_fields(
        row, id=f"gsm8k-{number}", question=value_of(row, "question").strip(), answer=text, number=figure
    )


def _exemplar(row: Row, name: str, figure: str) -> Row:
    question, answer = (_LABEL.sub("", value_of(row, key)).strip() for key in ("question", "answer"))
    return with_fields(row, id=name, question=question, answer=f"{answer}\n#### {figure}", number=figure)
