"""Reference tasks on plain text, from a file or the hub, cut into segments that are counted in tokens."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lingraft.config import ReferenceConfig
from lingraft.digests import digest_file
from lingraft.errors import DataError, UserError
from lingraft.languages import LANGUAGES
from lingraft.tasks.sources import BUNDLED, HubSource, bundled_or, read_lines


class ReferenceText(Protocol):
    """Running text of one language."""

    def digest(self) -> str:
        """What a step's key knows of the text."""
        ...

    def lines(self) -> Iterable[str]:
        """Its lines, a paragraph each."""
        ...


@dataclass(frozen=True)
class FileText:
    """Text in a file."""

    path: Path

    def digest(self) -> str:
        """SHA-256 of the file."""
        return digest_file(self.path)

    def lines(self) -> list[str]:
        """All lines, in order."""
        return read_lines(self.path)


@dataclass(frozen=True)
class HubText:
    """The field `text` of a hub data set; its rows are fetched as they are read, so that as much comes as is needed."""

    source: HubSource

    def digest(self) -> str:
        """Repository, commit, configuration and split."""
        return self.source.digest()

    def lines(self) -> Iterator[str]:
        """The lines of all documents, in order.

        Raises:
            DataError: A document has no field `text`.
        """
        for row in self.source.streamed():
            if "text" not in row.fields:
                raise DataError(
                    "this document has no field 'text'",
                    where=row.place,
                    remedy="give every document a field named text, or choose another data set: reference.hub",
                )
            yield from (line.strip() for line in row.fields["text"].split("\n") if line.strip())


def reference_text(config: ReferenceConfig, language: str, data_dir: str | Path | None) -> ReferenceText:
    """A language's reference text: a hub data set's, or a file's; see `reference_path`.

    Raises:
        DataError: There is none.
        UserError: The task reads no text.
    """
    if config.hub:
        return HubText(HubSource(config.hub, config.hub_config.replace("{language}", language), "train"))
    return FileText(reference_path(config, language, data_dir))


def reference_path(config: ReferenceConfig, language: str, data_dir: str | Path | None) -> Path:
    """The file of a language's reference text: below the reference's own folder, else the task's, else the bundled data.

    Raises:
        DataError: There is none.
    """
    if config.text is None:
        raise UserError(
            f"the reference task '{config.task}' reads no text file",
            remedy="give reference.text, a path with {language} in it",
        )
    return text_path(config.text, language, bundled_or(config.data_dir or data_dir) or BUNDLED)


def text_path(pattern: str, language: str, data_dir: Path) -> Path:
    """The file of a language's reference text.

    Raises:
        DataError: There is none.
        UserError: The pattern leads out of the data folder.
    """
    if "{language}" not in pattern:
        raise UserError(
            f"the reference text '{pattern}' has no {{language}} in it",
            remedy="write for example text/{language}.txt",
        )
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise UserError(
            f"the reference text '{pattern}' leads out of the data folder",
            remedy="give a path below --data-dir",
        )
    path = data_dir / pattern.replace("{language}", language)
    if not path.is_file():
        here = sorted(c for c in LANGUAGES if (data_dir / pattern.replace("{language}", c)).is_file())
        raise DataError(
            f"there is no reference text for '{language}'",
            where=path,
            remedy=f"put a text file there, one paragraph a line; text is here for: {', '.join(here) or 'no language'}",
        )
    return path


def bundled_text(language: str) -> str:
    """The bundled running text of a language: the Universal Declaration of Human Rights."""
    return "\n".join(read_lines(text_path("udhr/{language}.txt", language, BUNDLED)))


def segments(
    lines: Iterable[str], encode: Callable[[str], list[int]], config: ReferenceConfig, prefix: Sequence[int]
) -> list[list[int]]:
    """Cuts text into segments of tokens: the same unit in every language.

    Args:
        lines: The text, a paragraph a line.
        encode: Text to token ids, without special tokens.
        config: Unit, length and number of segments.
        prefix: Ids every segment starts with (a beginning-of-text token).

    Returns:
        Segments of at most `segment_tokens` ids, the prefix included; of running text, a rest shorter than two ids is
        left out; lines all keep their places.
    """
    room = config.segment_tokens - len(prefix)
    pieces = (encode(line)[:room] for line in lines) if config.unit == "line" else _packed(lines, encode, room)
    found: list[list[int]] = []
    for piece in pieces:
        # A line keeps its place even when it is empty: parallel text stays parallel. It then takes no loss.
        if config.unit == "line" or len(prefix) + len(piece) >= 2:
            found.append([*prefix, *piece])
        if config.max_segments is not None and len(found) == config.max_segments:
            break
    return found


def _packed(lines: Iterable[str], encode: Callable[[str], list[int]], room: int) -> Iterator[list[int]]:
    running: list[int] = []
    for line in filter(None, lines):
        running.extend(encode(line + "\n"))
        while len(running) >= room:
            yield running[:room]
            running = running[room:]
    if running:
        yield running
