"""Choice tasks: a prompt, a few candidate answers, one of them right."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lingraft.errors import ConfigError, DataError, suggestion
from lingraft.prompts import Prompt, fields_of, fill
from lingraft.tasks.items import Example
from lingraft.tasks.sources import Row, value_of
from lingraft.tasks.task import Kind, Task


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(Task):
    """A task whose answers are a few texts.

    Attributes:
        label_field: The field that holds the label.
        options: For multiple choice by an encoder, templates of the options' texts, in the order of `answers`.
    """

    kind: Kind = "choice"
    label_field: str = "label"
    options: tuple[str, ...] = ()

    def answered(self, item: Example, row: Row, prompt: Prompt) -> Example:
        """See `Task.answered`."""
        label, labels = value_of(row, self.label_field), list(self.answers)
        if label not in self.answers:
            raise DataError(f"unknown label '{label}'", where=row.place, remedy=suggestion(label, labels))
        options = tuple(fill(option, row.fields) for option in self.options)
        return replace(
            item, candidates=self._candidates(prompt), gold=labels.index(label), references=(label,), options=options
        )

    def of_text(self, texts: Sequence[str]) -> list[Example]:
        """See `Task.of_text`: the default prompt must have exactly one field to put a text into."""
        prompt = self.prompt()
        names = sorted(set(fields_of(prompt.template)))
        if len(names) != 1:
            raise ConfigError(
                f"the task '{self.name}' cannot be asked of plain text: its prompt has the fields {', '.join(names)}",
                remedy="use methods that need no projected labels",
            )
        candidates = self._candidates(prompt)
        return [
            Example(str(place), fill(prompt.template, {names[0]: text}), candidates, parts=(text,))
            for place, text in enumerate(texts)
        ]

    def spec(self, prompt: str = "default") -> dict[str, Any]:
        """See `Task.spec`."""
        chosen = self.prompt(prompt)
        spec: dict[str, Any] = {
            "task": self.name,
            "template": chosen.template,
            # Pairs: their order decides between equals, and a mapping would lose it in the key.
            "answers": [list(pair) for pair in self._texts(chosen).items()],
            "label_field": self.label_field,
            "id_field": self.id_field,
        }
        # The default wording's key is older than the others.
        return spec if prompt == "default" else {**spec, "prompt": prompt, "lead": chosen.lead}

    def rule(self, prompt: str = "default") -> dict[str, Any]:
        """See `Task.rule`."""
        chosen = self.prompt(prompt)
        labels = {label: [text, *chosen.readings.get(label, ())] for label, text in self._texts(chosen).items()}
        return {"kind": "label", "marker": chosen.marker, "labels": labels}

    def _texts(self, prompt: Prompt) -> dict[str, str]:
        return {label: (prompt.answers or self.answers)[label] for label in self.answers}

    def _candidates(self, prompt: Prompt) -> tuple[str, ...]:
        return tuple(prompt.lead + text for text in self._texts(prompt).values())
