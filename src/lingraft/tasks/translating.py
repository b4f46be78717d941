"""Rows of a task in another language: which fields are text, and what becomes of an answer that is a part of a text.

An answer of extraction is projected through quotation marks, as in the FLARE paper: it is put between quotation marks in its
context, the context is translated, and what stands between the marks is the answer. The marks then go again. An item
whose marks the translation lost is dropped, and counted.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from lingraft.errors import UserError
from lingraft.prompts import fields_of
from lingraft.tasks.items import Example
from lingraft.tasks.sources import Row, Source, value_of
from lingraft.tasks.task import Task
from lingraft.tasks.text import TextTask

ROW = "lingraft_row"
"""The field that carries the row number of a task without ids, once its rows are no longer in their file."""

_CHOICE_FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "topics": ("text",),
        "nusax": ("text",),
        "xnli": ("premise", "hypothesis"),
        # The question is a code, `cause` or `effect`, which every prompt puts into English.
        "xcopa": ("premise", "choice1", "choice2"),
        "xcopa-raw": ("premise", "choice1", "choice2"),
    }
)
_PAIRS = ('""', "“”", "«»", "「」", "『』", "‹›", "„“")
"""Quotation marks for an answer, the first that its context does not have; translation models keep the first best."""
_MARKS = frozenset("".join(_PAIRS) + "”‟＂")


@dataclass(frozen=True)
class Translated:
    """Rows in the other language.

    Attributes:
        rows: A mapping a row, every value text, in the rows' order.
        dropped: The ids of the rows whose answer the translation lost.
    """

    rows: list[dict[str, str]]
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Unanswered(TextTask):
    """A task of which only what is asked is read."""

    def answered(self, item: Example, row: Row, prompt: object) -> Example:
        """The item as it is: it has no answer."""
        return item


def translated_fields(task: Task) -> tuple[str, ...]:
    """The fields of a row that are text, besides the answers of extraction.

    Of a user's own task they are those that its prompt names.

    Raises:
        UserError: The task's rows cannot be translated.
    """
    if task.kind == "extraction":
        return ("context", "question")
    if task.kind != "choice":
        raise UserError(
            f"the rows of the task '{task.name}' cannot be translated: its answers are written text",
            remedy="take a task of choice or extraction, or aligned rows",
        )
    own = getattr(task, "label_field", None), task.id_field, "language_name"
    named = tuple(name for name in dict.fromkeys(fields_of(task.prompt().template)) if name not in own)
    known = _CHOICE_FIELDS.get(task.name, ())
    # A user's own task may have the name of one of the table.
    return known if known and set(known) <= set(named) else named


def canonical_rows(task: Task, sources: Sequence[Source]) -> list[Row]:
    """The rows that `task.examples` makes items of, brought to the fields that its prompts name.

    A row of a task without ids gets its number as the field `ROW`.

    Raises:
        DataError: A row lacks a field, or a source cannot be read.
    """
    rows = sources[0].rows()
    if task.repair is not None and len(sources) > 1:
        rows = task.repair(rows, sources[1].rows())
    found = [(number, task.canonical(row, number)) for number, row in enumerate(rows)]
    if task.id_field:
        return [row for _, row in found if row is not None]
    return [replace(row, fields={**row.fields, ROW: str(number)}) for number, row in found if row is not None]


def rendered(task: Task, *, answers: bool = True) -> Task:
    """The task as it is read from rows that `translated_rows` made.

    Args:
        task: The task.
        answers: Whether its rows have answers; of a choice task they always do.
    """
    if not answers and task.kind == "extraction":
        values = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
        task = Unanswered(**values)
    return replace(
        task,
        canonical=_as_it_is if task.id_field else _numbered,
        companion={},
        hub_companion={},
        repair=None,
        id_field=task.id_field or ROW,
    )


def _as_it_is(row: Row, number: int) -> Row:
    return row


def _numbered(row: Row, number: int) -> Row:
    """A row that tells which one it translates, and if it does not, the one at its place."""
    return row if ROW in row.fields else replace(row, fields={**row.fields, ROW: str(number)})


def translated_rows(
    task: Task, rows: Sequence[Row], translate: Callable[[list[str]], list[str]], *, answers: bool = True
) -> Translated:
    """Rows with their texts in another language and all else as it was.

    Args:
        task: The task.
        rows: Of `canonical_rows`.
        translate: Gives the translations of texts, in their order; called once, with every text once.
        answers: Whether the answers of extraction come along; of several only the first, which is the one a model learns. False:
            for counterparts and for what is measured on, of which only what is asked is read: rows have no answers then,
            nothing of an answer can come into the text through the marks, and none is dropped.

    Raises:
        UserError: The task's rows cannot be translated.
        DataError: A row lacks a field, or its answer cannot be right.
    """
    names, id_field = translated_fields(task), task.id_field or ROW
    extracts = task.kind == "extraction"
    made: list[tuple[Row, dict[str, str], _Quoted | None]] = []
    dropped: list[str] = []
    for row in rows:
        texts = {name: value_of(row, name) for name in names}
        quoted = None
        if extracts and answers:
            quoted = _quoted(task, row)
            if quoted is None:
                dropped.append(value_of(row, id_field))
                continue
            texts["context"] = quoted.text
        made.append((row, texts, quoted))
    # A text without a word is not for a model, which would write something.
    unique = list(dict.fromkeys(text for _, texts, _ in made for text in texts.values() if text.strip()))
    known = dict(zip(unique, translate(unique), strict=True)) if unique else {}
    found = []
    for row, texts, quoted in made:
        new = {**row.fields, **{name: known.get(text, text) for name, text in texts.items()}}
        if extracts:
            new.pop("answers", None)
        if quoted is not None:
            projected = _unquoted(new["context"], quoted)
            if projected is None:
                dropped.append(value_of(row, id_field))
                continue
            new["context"], text, start = projected
            new["answers"] = json.dumps([{"text": text, "answer_start": start}], ensure_ascii=False)
        found.append(new)
    order = {value_of(row, id_field): place for place, row in enumerate(rows)}
    return Translated(found, tuple(sorted(dropped, key=order.__getitem__)))


@dataclass(frozen=True)
class _Quoted:
    """A context whose answer stands in quotation marks.

    Attributes:
        text: The context with the marks.
        marks: The opening and the closing one, which stand nowhere else in it.
        others: How many others there are: in the answer, and in all of the context.
        blanks: Whether the answer itself begins or ends with a blank.
    """

    text: str
    marks: str
    others: tuple[int, int]
    blanks: bool


def _quoted(task: Task, row: Row) -> _Quoted | None:
    """A row's context with its first answer in quotation marks; None where it has all that there are."""
    context = value_of(row, "context")
    span = task.answered(Example("", ""), row, task.prompt()).span
    there = set(context)
    marks = next((pair for pair in _PAIRS if there.isdisjoint(pair)), None)
    if marks is None or span is None:
        return None
    before, answer, behind = context[: span[0]], context[slice(*span)], context[span[1] :]
    text = f"{before}{marks[0]}{answer}{marks[1]}{behind}"
    return _Quoted(text, marks, (_count(answer), _count(context)), answer != answer.strip())


def _count(text: str) -> int:
    return sum(sign in _MARKS for sign in text)


def _unquoted(text: str, quoted: _Quoted) -> tuple[str, str, int] | None:
    """A translation without the marks, what stood between them, and where it stands now; None where they are lost."""
    places = [place for place, sign in enumerate(text) if sign in quoted.marks]
    if "".join(text[place] for place in places) != quoted.marks:
        # A translation may have the marks of its own language: they can be told where the context had no others.
        places = [] if quoted.others[1] else [place for place, sign in enumerate(text) if sign in _MARKS]
    if len(places) != 2:
        return None
    before, inner, behind = text[: places[0]], text[places[0] + 1 : places[1]], text[places[1] + 1 :]
    answer = inner if quoted.blanks else inner.strip()
    # Had the translation other marks than the context, these might be those of something else.
    if not answer.strip() or (_count(inner), _count(before + inner + behind)) != quoted.others:
        return None
    # Some languages have blanks inside of their marks: those go with them, where they divide no words.
    head, _, tail = inner.partition(answer)
    head = head if before and before[-1].isalnum() else ""
    tail = tail if behind and behind[0].isalnum() else ""
    return f"{before}{head}{answer}{tail}{behind}", answer, len(before) + len(head)
