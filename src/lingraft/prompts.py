"""Prompts: pure functions from a row's fields to the text a model reads."""

import re
from collections.abc import Mapping

from lingraft.errors import DataError

_FIELD = re.compile(r"\{(\w+)\}")


def fields_of(template: str) -> tuple[str, ...]:
    """The names in braces, in order."""
    return tuple(_FIELD.findall(template))


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Puts a row's values in place of `{field}`, once: braces inside a value mean nothing.

    Raises:
        DataError: The row lacks a field.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in fields:
            raise DataError(f"the prompt asks for '{name}', which the row does not have (it has {', '.join(fields)})")
        return fields[name]

    return _FIELD.sub(value, template)


TOPICS = "Text: {text}\nTopic:"
XCOPA = (
    "Here is a premise and a question. Help me pick the more plausible option. Premise: {premise} "
    "Question: What is the {question}? (A) {choice1} (B) {choice2}\nAnswer:"
)
