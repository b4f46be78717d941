"""What all tasks share: where the rows of a language and split are, and how a row becomes an item."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lingraft.errors import DataError, UserError, suggestion
from lingraft.languages import LANGUAGES, name_of
from lingraft.prompts import Prompt, fill, fill_with_span
from lingraft.tasks.items import Example
from lingraft.tasks.sources import FileSource, HubSource, Only, Row, Source, value_of

SPLITS = ("train", "validation", "test")
Kind = Literal["choice", "extraction", "number", "summary"]
Head = Literal["classification", "multiple_choice", "span"]


@dataclass(frozen=True)
class Hub:
    """Where a task lies on the hub.

    Attributes:
        repository: The data set.
        config: Its configuration; `{language}` and the like are filled.
        splits: Our names of splits → its names.
        languages: The languages it has; None: any.
        only: Which of its rows count.
        export: Whether to read the hub's conversion to Parquet (see `HubSource`).
    """

    repository: str
    config: str
    splits: Mapping[str, str]
    languages: tuple[str, ...] | None = None
    only: Only | None = None
    export: bool = False


@dataclass(frozen=True)
class Layout:
    """Where a split's file may lie below the data folder, and how it is read.

    Attributes:
        path: The path, with `{language}`, `{name}` (English, small letters), `{iso}` (639-3) or `{flores}`.
        read: Reads a file that its suffix does not explain.
        only: Which of its rows count; the languages' names are filled in.
        languages: The languages it holds; None: one file a language.
    """

    path: str
    read: Callable[[Path], list[Row]] | None = None
    only: Only | None = None
    languages: tuple[str, ...] | None = None


def _as_it_is(row: Row, number: int) -> Row | None:
    return row


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One row of the table of tasks.

    Attributes:
        name: What users call it.
        kind: What an answer is.
        prompts: The wordings, by name; `default` is one of them.
        layouts: For every split, where its file may lie, in order of preference.
        hubs: Where it lies on the hub; the first that has the split and the language.
        id_field: The field that names the item; None: its row number.
        canonical: Brings the row of any source to the fields that the prompts name, given its number; None: the row does not count.
        companion: For some splits, a file whose rows correct the main ones (see `repair`); used where it exists.
        hub_companion: The same on the hub.
        repair: Combines the rows with the companion's.
        head: What an encoder needs on top to serve the task; None: it cannot.
        parts: Templates of what an encoder reads: one text, or two.
        context: The field that may lose its end where the prompt is too long.
        languages: Those of the test set; empty: any.
        names: The data set's own names of languages, where they are not the English ones.
        answers: For choice tasks, label in the data → text of the answer.
        sample: Split → how many items are drawn for a published comparison, where it is not all.
        metric: Its main figure: `accuracy`, `macro_f1`, `exact_match` or `rouge_l`.
        licence: What to tell the user on first use.
        note: Said in the report.
    """

    name: str
    kind: Kind
    prompts: Mapping[str, Prompt]
    layouts: Mapping[str, tuple[Layout, ...]]
    hubs: tuple[Hub, ...] = ()
    id_field: str | None = None
    canonical: Callable[[Row, int], Row | None] = _as_it_is
    companion: Mapping[str, Layout] = field(default_factory=dict)
    hub_companion: Mapping[str, Hub] = field(default_factory=dict)
    repair: Callable[[list[Row], list[Row]], list[Row]] | None = None
    head: Head | None = None
    parts: tuple[str, ...] = ()
    context: str | None = None
    languages: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    sample: Mapping[str, int] = field(default_factory=dict)
    answers: Mapping[str, str] = field(default_factory=dict)
    metric: str = "accuracy"
    licence: str | None = None
    note: str | None = None

    @abstractmethod
    def spec(self, prompt: str = "default") -> dict[str, Any]:
        """What of the task, asked in a wording, can change a result, for step keys."""

    @abstractmethod
    def rule(self, prompt: str = "default") -> dict[str, Any]:
        """How generated text is read: `kind` (label, number, extraction, summary), `marker`, and `labels` with their texts."""

    @abstractmethod
    def of_text(self, texts: Sequence[str]) -> list[Example]:
        """Items without labels, made of running text; an item's name is its place, its gold label means nothing.

        Raises:
            ConfigError: The task cannot be asked of plain text.
        """

    @abstractmethod
    def answered(self, item: Example, row: Row, prompt: Prompt) -> Example:
        """An item with its answer.

        Raises:
            DataError: The row's answer is missing or cannot be right.
        """

    def prompt(self, name: str = "default") -> Prompt:
        """A wording of the task.

        Raises:
            UserError: There is no such wording.
        """
        if name not in self.prompts:
            raise UserError(f"the task '{self.name}' has no prompt '{name}'", remedy=suggestion(name, self.prompts))
        return self.prompts[name]

    def new_tokens(self, prompt: str = "default") -> int:
        """How many tokens a model may write."""
        return self.prompt(prompt).new_tokens

    def stop(self, prompt: str = "default") -> tuple[str, ...]:
        """Where a generated text ends, besides the end of text."""
        return self.prompt(prompt).stop

    def languages_of(self, split: str) -> list[str] | None:
        """The languages that a split is published in; None: one file a language, whichever there are."""
        layouts = self.layouts.get(split, ())
        if any(layout.languages is None for layout in layouts):
            return None
        return list(dict.fromkeys(code for layout in layouts for code in layout.languages or ()))

    def source(self, language: str, split: str, data_dir: Path | None, revision: str | None = None) -> Source:
        """Where the rows of a language and split are.

        Args:
            language: The language.
            split: One of `SPLITS`.
            data_dir: The folder of upstream files; None: the hub.
            revision: The commit of the hub's data set that holds the test; others that serve the task are at their newest.

        Raises:
            UserError: There is no such split.
            DataError: There are no rows.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split '{split}'", remedy=suggestion(split, SPLITS))
        if data_dir is None:
            return self._on_the_hub(language, split, revision)
        layouts = self.layouts.get(split, ())
        if not layouts:
            here = ", ".join(s for s in SPLITS if s in self.layouts)
            raise DataError(f"the task '{self.name}' has no '{split}' split", remedy=f"it has: {here}")
        fitting = [layout for layout in layouts if layout.languages is None or language in layout.languages]
        if not fitting:
            held = dict.fromkeys(code for layout in layouts for code in layout.languages or ())
            raise DataError(
                f"the task '{self.name}' has no '{split}' data for '{language}'", remedy=f"it has: {', '.join(held)}"
            )
        paths = [data_dir / self._fill(layout.path, language) for layout in fitting]
        for layout, path in zip(fitting, paths, strict=True):
            if path.is_file():
                return FileSource(path, layout.read, self._only(layout.only, language))
        raise DataError(
            f"the task '{self.name}' has no '{split}' data for '{language}'",
            where=" or ".join(str(path) for path in dict.fromkeys(paths)),
            remedy=f"check --data-dir and the language; data are here for: {', '.join(self._languages(split, data_dir)) or 'none'}",
        )

    def sources(self, language: str, split: str, data_dir: Path | None, revision: str | None = None) -> list[Source]:
        """The rows' source and, where it exists, the companion's.

        Raises:
            UserError: There is no such split.
            DataError: There are no rows.
        """
        found = [self.source(language, split, data_dir, revision)]
        if data_dir is None and split in self.hub_companion:
            hub = self.hub_companion[split]
            found.append(HubSource(hub.repository, hub.config, hub.splits[split]))
        if data_dir is not None and split in self.companion:
            layout = self.companion[split]
            path = data_dir / self._fill(layout.path, language)
            if path.is_file():
                found.append(FileSource(path, layout.read))
        return found

    def examples(self, sources: Sequence[Source], *, language: str = "en", prompt: str = "default") -> list[Example]:
        """Reads rows and makes items.

        Args:
            sources: Of `sources`.
            language: What the rows are in, for prompts that name it.
            prompt: The wording.

        Raises:
            UserError: There is no such wording.
            DataError: A row lacks a field, its answer cannot be right, or an id stands twice.
        """
        chosen = self.prompt(prompt)
        rows = sources[0].rows()
        if self.repair is not None and len(sources) > 1:
            rows = self.repair(rows, sources[1].rows())
        examples: list[Example] = []
        seen: dict[str, str] = {}
        for number, raw in enumerate(rows):
            row = self.canonical(raw, number)
            if row is None:
                continue
            name = value_of(row, self.id_field) if self.id_field else str(number)
            if name in seen:
                raise DataError(
                    f"the id '{name}' stands here and at {seen[name]}",
                    where=row.place,
                    remedy="give every row an id of its own",
                )
            seen[name] = row.place
            examples.append(self.answered(self._asked(name, row, chosen, language), row, chosen))
        if not examples:
            where = getattr(sources[0], "path", None)
            raise DataError(
                f"the task '{self.name}' found no rows for '{language}'",
                where=where,
                remedy="look at the file and at what the task takes of it (only, languages), or leave the language out",
            )
        return examples

    def _asked(self, name: str, row: Row, chosen: Prompt, language: str) -> Example:
        fields = {"language_name": name_of(language), **row.fields}
        try:
            text, cuttable = fill_with_span(chosen.template, fields, self.context)
            parts = tuple(fill(part, fields) for part in self.parts)
        except DataError as error:
            raise DataError(error.what, where=row.place, remedy="correct the prompt template or the file") from None
        return Example(name, text, cuttable=cuttable, parts=parts)

    def _on_the_hub(self, language: str, split: str, revision: str | None) -> HubSource:
        main = {hub.repository for hub in self.hubs if "test" in hub.splits}
        for hub in self.hubs:
            if split in hub.splits and (hub.languages is None or language in hub.languages):
                return HubSource(
                    hub.repository,
                    self._fill(hub.config, language),
                    hub.splits[split],
                    revision if hub.repository in main else None,
                    self._only(hub.only, language),
                    hub.export,
                )
        held = dict.fromkeys(code for hub in self.hubs if split in hub.splits for code in hub.languages or ())
        raise DataError(
            f"the task '{self.name}' has no '{split}' data for '{language}' on the hub",
            remedy=f"it has: {', '.join(held)}; or give --data-dir" if held else "give --data-dir",
        )

    def _only(self, only: Only | None, language: str) -> Only | None:
        return only and replace(only, like=self._fill(only.like, language))

    def _fill(self, pattern: str, language: str) -> str:
        known = LANGUAGES.get(language)
        # Of a language unknown to the table a path that cannot exist: the message then lists what was looked for.
        flores = known.flores if known else language
        name = self.names.get(language) or (known.name.lower().replace(" ", "_") if known else language)
        codes = {"{flores}": flores, "{iso}": flores.split("_")[0], "{name}": name, "{language}": language}
        for mark, code in codes.items():
            pattern = pattern.replace(mark, code)
        return pattern

    def _languages(self, split: str, data_dir: Path) -> list[str]:
        found = {
            code
            for code in LANGUAGES
            for layout in self.layouts.get(split, ())
            if (layout.languages is None or code in layout.languages)
            and (data_dir / self._fill(layout.path, code)).is_file()
        }
        return sorted(found)
