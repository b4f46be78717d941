"""What `lingraft train` and `evaluate` read beside a task's items: their counterparts in the source language."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lingraft.errors import DataError, UserError

if TYPE_CHECKING:
    from lingraft.fusion.stages import Form
    from lingraft.tasks.items import Example
    from lingraft.tasks.sources import Source
    from lingraft.tasks.task import Task

OPTIONS = ("source_language", "source_data", "missing")
"""The options that name counterparts; None where they were not given."""
SOURCE = "en"


def spelt(names: Sequence[str]) -> str:
    """Options as they are written."""
    return ", ".join("--" + name.replace("_", "-") for name in names)


def refuse_unread(options: dict[str, Any], why: str) -> None:
    """Refuses options of counterparts where none is read.

    Raises:
        UserError: There are some.
    """
    if given := [name for name in OPTIONS if options[name] is not None]:
        raise UserError(f"{spelt(given)}: {why}, so nothing is read of counterparts", remedy="leave it out")


@dataclass(frozen=True)
class Counterparts:
    """What is read of items' counterparts, and where they are.

    Attributes:
        form: What is read; `alone` and `itself` need no counterpart.
        language: The source language.
        task: The task as the counterparts' rows have it.
        sources: Their rows.
        missing: Whether an item without counterpart is an error or left out.
    """

    form: "Form" = "alone"
    language: str = ""
    task: "Task | None" = None
    sources: "tuple[Source, ...]" = ()
    missing: Literal["error", "skip"] = "error"

    def record(self) -> dict[str, Any]:
        """What of it can change a result."""
        if self.task is None:
            return {"form": self.form}
        rows = [source.digest() for source in self.sources]
        return {"form": self.form, "language": self.language, "rows": rows, "missing": self.missing}

    def beside(self, items: "list[Example]", prompt: str, what: str) -> "tuple[list[Example], int]":
        """Items with what is read beside them, and how many were left out because they have no counterpart.

        Args:
            items: All items of a split.
            prompt: The wording, which is the counterparts' too.
            what: What is paired, for messages.

        Raises:
            DataError: Items and counterparts do not fit together.
        """
        from lingraft.tasks.pairs import all_concatenated, paired

        if self.form == "itself":
            return [replace(item, source=item.asked) for item in items], 0
        if self.task is None:
            return items, 0
        others = self.task.examples(self.sources, language=self.language, prompt=prompt)
        try:
            found = paired(items, others, missing=self.missing, what=what)
        except DataError as error:
            remedy = "give the same items in both languages, by --source-language or --source-data"
            if self.missing == "error":
                remedy += "; --missing skip leaves out those without counterpart, where they have ids"
            raise DataError(error.what, where=error.where, remedy=remedy) from None
        read = all_concatenated(found.examples) if self.form == "concatenated" else found.examples
        return read, len(found.skipped)


def counterparts(
    form: "Form", task: "Task", split: str, data_dir: Path | None, options: dict[str, Any], source: str, remedy: str
) -> Counterparts:
    """Finds the counterparts of a task's items.

    Args:
        form: What is read of them: `beside` or `concatenated`.
        task: The task.
        split: The items' split, and theirs.
        data_dir: The folder of the task's own rows; None: the hub.
        options: Of the command: `OPTIONS`.
        source: The source language where none is given.
        remedy: What to do where there are none.

    Raises:
        DataError: There are none.
    """
    language, missing = options["source_language"] or source, options["missing"] or "error"
    try:
        if options["source_data"] is not None:
            task, sources = _of_file(task, options["source_data"])
        else:
            sources = tuple(task.sources(language, split, data_dir))
    except DataError as error:
        said = f"every item's counterpart in '{language}' is needed, and they are not there: {error.what}"
        raise DataError(said, where=error.where, remedy=remedy) from None
    return Counterparts(form, language, task, sources, missing)


def _of_file(task: "Task", path: Path) -> "tuple[Task, tuple[Source, ...]]":
    """Rows of a task in a file of their own, with ids, or of a task without ids in the items' order."""
    from lingraft.tasks.sources import FileSource
    from lingraft.tasks.translating import ROW, rendered

    source = FileSource(path)
    rows = source.rows()
    made = rendered(task, answers=False)
    if task.id_field is None and ROW not in rows[0].fields:
        made = replace(made, id_field=None)
    return made, (source,)
