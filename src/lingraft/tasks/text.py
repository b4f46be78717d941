"""Tasks whose answer is free text: a part of the context, a number, a summary."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lingraft.errors import ConfigError, DataError
from lingraft.prompts import Prompt
from lingraft.tasks.items import Example
from lingraft.tasks.sources import Row, value_of
from lingraft.tasks.task import Kind, Task


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """A task of extraction, of numbers or of summaries."""

    def answered(self, item: Example, row: Row, prompt: Prompt) -> Example:
        """See `Task.answered`."""
        found = _ANSWERS[self.kind](row)
        return replace(item, answer=prompt.lead + found.text, references=found.references, span=found.span)

    def of_text(self, texts: Sequence[str]) -> list[Example]:
        """See `Task.of_text`: a text has no answer of these kinds."""
        raise ConfigError(
            f"the task '{self.name}' cannot be asked of plain text: its answers are free text",
            remedy="use methods that need no projected labels",
        )

    def spec(self, prompt: str = "default") -> dict[str, Any]:
        """See `Task.spec`."""
        chosen = self.prompt(prompt)
        return {
            "task": self.name,
            "kind": self.kind,
            "prompt": prompt,
            "template": chosen.template,
            "lead": chosen.lead,
            "id_field": self.id_field,
        }

    def rule(self, prompt: str = "default") -> dict[str, Any]:
        """See `Task.rule`."""
        return {"kind": self.kind, "marker": self.prompt(prompt).marker, "labels": {}}


@dataclass(frozen=True)
class _Answer:
    text: str
    references: tuple[str, ...]
    span: tuple[int, int] | None = None


def _extraction(row: Row) -> _Answer:
    context = value_of(row, "context")
    found = _aligned(context, *_marked(value_of(row, "answers"), row.place))
    for text, start in found:
        if context[start : start + len(text)] != text:
            raise DataError(
                f"the answer '{text}' does not stand at character {start} of its context",
                where=row.place,
                remedy="correct answer_start (it counts characters, not bytes) or leave the item out",
            )
    text, start = found[0]
    return _Answer(text, tuple(dict.fromkeys(text for text, _ in found)), (start, start + len(text)))


def _aligned(context: str, found: list[tuple[str, int]], converted: bool) -> list[tuple[str, int]]:
    """Answers of the hub's conversions, moved by as many blanks as their context has lost at its beginning."""
    if converted and context == context.lstrip():
        for lost in range(min(start for _, start in found) + 1):
            if all(context.startswith(text, start - lost) for text, start in found):
                return [(text, start - lost) for text, start in found]
    return found


def _marked(text: str, place: str) -> tuple[list[tuple[str, int]], bool]:
    """Answers and where they start, of SQuAD's list of mappings or (True) the hub's mapping of lists."""
    try:
        value = json.loads(text)
        converted = isinstance(value, dict)
        if converted:
            value = [{"text": t, "answer_start": s} for t, s in zip(value["text"], value["answer_start"], strict=True)]
        found = [(str(answer["text"]), int(answer["answer_start"])) for answer in value]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            "this item's 'answers' are not SQuAD's", where=place, remedy="give every answer 'text' and 'answer_start'"
        ) from error
    if not found or any(not answer or start < 0 for answer, start in found):
        raise DataError("this item has no answer, or an empty one", where=place, remedy="leave the item out")
    return found, converted


def _number(row: Row) -> _Answer:
    number = value_of(row, "number")
    # The exam's own items come without reasoning: a model that has learned to reason never learns from them.
    return _Answer(row.fields.get("answer") or number, (number,))


def _summary(row: Row) -> _Answer:
    summary = value_of(row, "summary")
    return _Answer(summary, (summary,))


_ANSWERS: Mapping[Kind, Callable[[Row], _Answer]] = {
    "extraction": _extraction,
    "number": _number,
    "summary": _summary,
}
