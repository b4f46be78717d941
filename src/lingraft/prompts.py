"""Prompts: pure functions from a row's fields to the text a model reads, and the wording of every task."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lingraft.errors import DataError

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Prompt:
    """One wording of a task.

    Attributes:
        template: The prompt, with `{field}` for the row's values and `{language_name}` for the language's English name.
        answers: Label → text of the answer, where this wording asks for other answers than the task's own.
        marker: What stands before the answer in a generated text; None: the text is the answer.
        new_tokens: How many tokens a model may write.
        stop: Where a generated text ends, besides the end of text.
        generate: Whether the answer can only be generated: reasoning comes before it, so no candidate follows the prompt.
        lead: What stands between prompt and answer.
        readings: Label → further texts that a generated answer may name it by.
    """

    template: str
    answers: Mapping[str, str] | None = None
    marker: str | None = None
    new_tokens: int = 16
    stop: tuple[str, ...] = ("\n",)
    generate: bool = False
    lead: str = " "
    readings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def fields_of(template: str) -> tuple[str, ...]:
    """The names in braces, in order."""
    return tuple(_FIELD.findall(template))


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Puts a row's values in place of `{field}`, once: braces inside a value mean nothing.

    Raises:
        DataError: The row lacks a field.
    """
    return fill_with_span(template, fields, None)[0]


def fill_with_span(template: str, fields: Mapping[str, str], name: str | None) -> tuple[str, tuple[int, int] | None]:
    """As `fill`, and where the value of the field `name` stands: its first and last character (exclusive).

    Returns:
        The text and the span of the field's first occurrence; None where the template does not have it.

    Raises:
        DataError: The row lacks a field.
    """
    pieces: list[str] = []
    span: tuple[int, int] | None = None
    length = done = 0
    for match in _FIELD.finditer(template):
        found = match.group(1)
        if found not in fields:
            raise DataError(
                f"the prompt asks for '{found}', which the row does not have (it has {', '.join(fields)})",
                remedy="use one of these fields in the prompt, or add the column to the data",
            )
        pieces += [template[done : match.start()], fields[found]]
        start = length + match.start() - done
        length, done = start + len(fields[found]), match.end()
        if found == name and span is None:
            span = (start, length)
    return "".join([*pieces, template[done:]]), span


def xlt(
    task: str, request: str, repeat: str, goal: str, output: str, constraint: str = "", tokens: int = 256
) -> Prompt:
    """Cross-lingual-thought prompting: six slots around the request (Huang et al. 2023, arXiv 2305.07004).

    Args:
        task: The name of the task, with its article.
        request: The task's input.
        repeat: What to say again in English, and how: `retell the question`.
        goal: What to do.
        output: What to tell in the end; `{output}:` is what it is read after.
        constraint: How to tell it.
        tokens: How much room the model has to think.
    """
    told = f"the {output} {constraint}" if constraint else f"the {output}"
    template = (
        f"I want you to act as {task} expert for {{language_name}} .\n{request}\n"
        f"You should {repeat} in English.\nYou should {goal} .\nYou should step-by-step answer the request.\n"
        f"You should tell me {told} in this format '{output}:'."
    )
    return Prompt(template, marker=f"{output}:", new_tokens=tokens, stop=(), generate=True)
