"""Choice tasks: a prompt, a few candidate answers, one of them right."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lingraft.errors import ConfigError, DataError, UserError, suggestion
from lingraft.languages import LANGUAGES
from lingraft.prompts import fields_of, fill
from lingraft.tasks.items import Example
from lingraft.tasks.sources import BUNDLED, FileSource, HubSource, Row, Source

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Hub:
    """Where a task lies on the hub: repository, configuration (a template) and the names of its splits."""

    repository: str
    config: str
    splits: Mapping[str, str]


@dataclass(frozen=True)
class ChoiceTask:
    """One row of the table of tasks.

    Attributes:
        name: What users call it.
        template: The prompt, with `{field}` for the row's values.
        answers: Label in the data → text the model should answer.
        label_field: The field that holds the label.
        id_field: The field that names the item; None: its row number.
        layouts: For every split, paths below the data folder in order of preference; `{language}` and `{flores}` are filled.
        hubs: Where it lies on the hub, by split and whether the language is the source's; see `Hub`.
        licence: What to tell the user on first use.
        companion: A path whose rows correct the main ones (see `repair`); used where the file exists.
        hub_companion: The same on the hub.
        repair: Combines the rows with the companion's.
        note: Said in the report.
    """

    name: str
    template: str
    answers: Mapping[str, str]
    label_field: str
    id_field: str | None
    layouts: Mapping[str, tuple[str, ...]]
    hubs: Callable[[str, str], Hub | None] = field(default=lambda language, split: None)
    licence: str | None = None
    companion: Mapping[str, str] = field(default_factory=dict)
    hub_companion: Mapping[str, Hub] = field(default_factory=dict)
    repair: Callable[[list[Row], list[Row]], list[Row]] | None = None
    note: str | None = None

    def source(self, language: str, split: str, data_dir: Path | None, revision: str | None = None) -> Source:
        """Where the rows of a language and split are.

        Raises:
            DataError: There are none.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split '{split}'", remedy=suggestion(split, SPLITS))
        if data_dir is None:
            hub = self.hubs(language, split)
            if hub is None or split not in hub.splits:
                raise DataError(
                    f"the task '{self.name}' has no '{split}' data for '{language}' on the hub",
                    remedy="give --data-dir",
                )
            return HubSource(hub.repository, self._fill(hub.config, language), hub.splits[split], revision)
        tried = [data_dir / self._fill(pattern, language) for pattern in self.layouts.get(split, ())]
        for path in tried:
            if path.is_file():
                return FileSource(path)
        if not tried:
            raise DataError(f"the task '{self.name}' has no '{split}' split")
        raise DataError(
            f"the task '{self.name}' has no '{split}' data for '{language}'",
            where=" or ".join(str(p) for p in tried),
            remedy=f"check --data-dir and the language; data are here for: {', '.join(self._languages(split, data_dir)) or 'none'}",
        )

    def sources(self, language: str, split: str, data_dir: Path | None, revision: str | None = None) -> list[Source]:
        """The rows' source and, where it exists, the companion's."""
        found = [self.source(language, split, data_dir, revision)]
        if data_dir is None and split in self.hub_companion:
            hub = self.hub_companion[split]
            found.append(HubSource(hub.repository, hub.config, hub.splits[split]))
        if data_dir is not None and split in self.companion:
            path = data_dir / self._fill(self.companion[split], language)
            if path.is_file():
                found.append(FileSource(path))
        return found

    def examples(self, sources: Sequence[Source]) -> list[Example]:
        """Reads rows and makes prompts.

        Raises:
            DataError: A row lacks a field, has an unknown label, or an id stands twice.
        """
        rows = sources[0].rows()
        if self.repair is not None and len(sources) > 1:
            rows = self.repair(rows, sources[1].rows())
        if not rows:
            raise DataError(f"the task '{self.name}' found no rows")
        labels, candidates = list(self.answers), tuple(" " + text for text in self.answers.values())
        examples: list[Example] = []
        seen: dict[str, str] = {}
        for number, row in enumerate(rows):
            name = self._value(row, self.id_field) if self.id_field else str(number)
            if name in seen:
                raise DataError(f"the id '{name}' stands here and at {seen[name]}", where=row.place)
            seen[name] = row.place
            label = self._value(row, self.label_field)
            if label not in self.answers:
                raise DataError(f"unknown label '{label}'", where=row.place, remedy=suggestion(label, labels))
            try:
                prompt = fill(self.template, row.fields)
            except DataError as error:
                raise DataError(error.what, where=row.place, remedy="correct the prompt template or the file") from None
            examples.append(Example(name, prompt, candidates, labels.index(label)))
        return examples

    def of_text(self, texts: Sequence[str]) -> list[Example]:
        """Items without labels, made of running text; an item's name is its place, its gold label means nothing.

        Raises:
            ConfigError: The prompt has not exactly one field to put a text into.
        """
        names = sorted(set(fields_of(self.template)))
        if len(names) != 1:
            raise ConfigError(
                f"the task '{self.name}' cannot be asked of plain text: its prompt has the fields {', '.join(names)}",
                remedy="use methods that need no projected labels",
            )
        candidates = tuple(" " + text for text in self.answers.values())
        return [
            Example(str(place), fill(self.template, {names[0]: text}), candidates, 0)
            for place, text in enumerate(texts)
        ]

    def spec(self) -> dict[str, object]:
        """What of the task can change a result, for step keys."""
        return {
            "task": self.name,
            "template": self.template,
            # Pairs: their order decides between equals, and a mapping would lose it in the key.
            "answers": [list(pair) for pair in self.answers.items()],
            "label_field": self.label_field,
            "id_field": self.id_field,
        }

    def _fill(self, pattern: str, language: str) -> str:
        if "{flores}" in pattern:
            known = LANGUAGES.get(language)
            # A path that cannot exist: the message then lists what was looked for.
            flores = known.flores if known else language
            pattern = pattern.replace("{flores}", flores)
        return pattern.replace("{language}", language)

    def _languages(self, split: str, data_dir: Path) -> list[str]:
        found = {
            code
            for code in LANGUAGES
            for p in self.layouts.get(split, ())
            if (data_dir / self._fill(p, code)).is_file()
        }
        return sorted(found)

    @staticmethod
    def _value(row: Row, name: str) -> str:
        if name not in row.fields:
            raise DataError(f"this row has no field '{name}'", where=row.place, remedy=suggestion(name, row.fields))
        return row.fields[name]


def bundled_or(data_dir: str | Path | None) -> Path | None:
    """The data folder that a user's word means: `bundled` is lingraft's own, None the hub.

    Raises:
        DataError: There is no such folder.
    """
    if data_dir is None:
        return None
    if str(data_dir) == "bundled":
        return BUNDLED
    path = Path(data_dir)
    if not path.is_dir():
        raise DataError("there is no such data folder", where=path, remedy="check --data-dir")
    return path
