"""Where rows come from: a file of the user's, or a data set on the hub. A mistake is named by file and line."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from lingraft import bounded
from lingraft.digests import digest_file, digest_value
from lingraft.errors import BackboneError, DataError, MissingExtra, suggestion

BUNDLED = Path(__file__).parents[1] / "data"


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


@dataclass(frozen=True)
class Row:
    """One row: its values as text, and where it stands."""

    fields: Mapping[str, str]
    place: str


class Source(Protocol):
    """Rows, and a digest of what they are read from."""

    def digest(self) -> str:
        """What a step's key knows of the rows."""
        ...

    def rows(self) -> list[Row]:
        """All rows, in order."""
        ...


def read_text(path: Path) -> str:
    """A file as UTF-8.

    Raises:
        DataError: It is missing, not UTF-8 (with the line), or empty.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"this file cannot be read ({error.strerror})", where=path, remedy="check the path") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError("this line is not UTF-8", where=f"{path}:{line}", remedy="save the file as UTF-8") from None
    if not text.strip():
        raise DataError("this file is empty", where=path, remedy="fill it, or leave the language out")
    return text


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, stripped; an empty one keeps its place (parallel text), those at the end are left out."""
    # Not str.splitlines: a line separator (U+2028) or a next-line character inside a sentence would shift parallel lines.
    return [line.strip() for line in re.split(r"\r\n|\r|\n", read_text(path).rstrip())]


@dataclass(frozen=True)
class Only:
    """Which rows of a source count: a field's value has a form, and its hash lies in a part of all hashes.

    Attributes:
        field: The field.
        like: Its value, with `*` for anything.
        hashed: The part, from 0 to 1, its end exclusive: what is held out of a training is the same wherever the rows come from.
    """

    field: str
    like: str = "*"
    hashed: tuple[float, float] = (0.0, 1.0)

    def __str__(self) -> str:
        low, high = self.hashed
        return f"{self.field}={self.like}" + ("" if (low, high) == (0, 1) else f"[{low:g},{high:g})")

    def counts(self, row: Row) -> bool:
        """Whether a row counts.

        Raises:
            DataError: It lacks the field.
        """
        (low, high), value = self.hashed, value_of(row, self.field)
        return fnmatchcase(value, self.like) and low <= int(digest_value([self.field, value], 8), 16) / 16**8 < high


def value_of(row: Row, name: str) -> str:
    """A row's value.

    Raises:
        DataError: The row lacks the field.
    """
    if name not in row.fields:
        raise DataError(f"this row has no field '{name}'", where=row.place, remedy=suggestion(name, row.fields))
    return row.fields[name]


@dataclass(frozen=True)
class FileSource:
    """Rows of a file: .jsonl, .json (an array, or lines), .tsv (unquoted, as SIB-200 has it) or .csv.

    Attributes:
        path: The file.
        read: Reads a file of another form; None: by its suffix.
        only: Which of its rows count; None: all.
    """

    path: Path
    read: Callable[[Path], list[Row]] | None = None
    only: Only | None = None

    def digest(self) -> str:
        """SHA-256 of the file, and which of its rows count."""
        return digest_file(self.path) + (f":{self.only}" if self.only else "")

    def rows(self) -> list[Row]:
        """All rows that count, every value as text.

        Raises:
            DataError: The file is missing, empty or malformed.
        """
        found = self._by_suffix() if self.read is None else self.read(self.path)
        return [row for row in found if self.only is None or self.only.counts(row)]

    def _by_suffix(self) -> list[Row]:
        text = read_text(self.path)
        suffix = self.path.suffix.lower()
        if suffix == ".json" and text.lstrip().startswith("["):
            return self._array(text)
        if suffix in (".jsonl", ".json"):
            return [self._json_row(line, n) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        if suffix not in (".tsv", ".csv"):
            raise DataError(f"unknown file type '{suffix}'", where=self.path, remedy="use .jsonl, .json, .tsv or .csv")
        file = io.StringIO(text, newline="")
        tabs = suffix == ".tsv"
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file, strict=True)
        try:
            header = next(reader)
            rows = [self._table_row(header, values, reader.line_num) for values in reader if values]
        except csv.Error as error:
            raise DataError(
                f"this line is malformed ({error})",
                where=f"{self.path}:{reader.line_num}",
                remedy="correct the line: quotes are the usual cause",
            ) from None
        if not rows:
            raise DataError(
                "this file has a header and no rows", where=self.path, remedy="fill it, or leave the language out"
            )
        return rows

    def _array(self, text: str) -> list[Row]:
        rows = parse_json(text, self.path)
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise DataError(
                    "this element is not a JSON object",
                    where=f"{self.path}, element {number}",
                    remedy="give a list of {…}",
                )
        return [row_of(row, f"{self.path}, element {number}") for number, row in enumerate(rows)]

    def _json_row(self, line: str, number: int) -> Row:
        where = f"{self.path}:{number}"
        try:
            value = bounded.parse(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"this line is not JSON ({error.msg})", where=where, remedy="write one {…} a line"
            ) from None
        except ValueError as error:
            raise DataError(
                f"this line is no JSON of a row ({error})", where=where, remedy="write one {…} a line"
            ) from None
        if not isinstance(value, dict):
            raise DataError("this line is not a JSON object", where=where, remedy="write one {…} a line")
        return row_of(value, where)

    def _table_row(self, header: list[str], values: list[str], number: int) -> Row:
        where = f"{self.path}:{number}"
        if len(values) != len(header):
            raise DataError(
                f"this line has {len(values)} columns, the header {len(header)}",
                where=where,
                remedy="quote fields that hold the separator, or correct the line",
            )
        return Row(dict(zip(header, values, strict=True)), where)


@dataclass(frozen=True)
class HubSource:
    """Rows of a data set on the Hugging Face hub, at a pinned commit.

    The commit is looked up once, when none is given; it enters the digest, so that a data set that changes upstream is
    new work and not a silent difference.

    Attributes:
        repository: The data set.
        config: Its configuration.
        split: Its split.
        revision: The commit; None: the newest.
        only: Which of its rows count; None: all.
        export: Whether it is read from the hub's own conversion to Parquet: the repository holds a script, which
            `datasets` runs no more.
    """

    repository: str
    config: str
    split: str
    revision: str | None = None
    only: Only | None = None
    export: bool = False

    def pinned(self) -> str:
        """The commit of the data set.

        Raises:
            MissingExtra: huggingface_hub is not installed.
            DataError: The hub does not answer, or has no such data set.
        """
        if self.revision is not None and is_commit(self.revision, 1):
            return self.revision
        branch = self.revision or (_EXPORT if self.export else None)  # A branch or a tag moves.
        return hub_commit(self.repository, "dataset", *([branch] if branch else []))

    def digest(self) -> str:
        """Repository, commit, configuration, split, and which rows count."""
        rows = f":{self.only}" if self.only else ""
        return f"hub:{self.repository}@{self.pinned()}:{self.config}:{self.split}{rows}"

    def rows(self) -> list[Row]:
        """All rows that count, every value as text.

        Raises:
            MissingExtra: `datasets` is not installed.
            DataError: The data set cannot be loaded.
        """
        return list(self._read(streaming=False))

    def streamed(self) -> Iterator[Row]:
        """The same rows, fetched as they are asked for.

        Raises:
            MissingExtra: `datasets` is not installed.
            DataError: The data set cannot be loaded.
        """
        return self._read(streaming=True)

    def _read(self, streaming: bool) -> Iterator[Row]:
        try:
            import datasets
        except ImportError:
            raise MissingExtra("datasets", "training") from None
        where = f"hub data set {self.repository}, {self.config}, {self.split}"
        folder = Path(self.repository).is_dir()
        try:
            if self.export and not folder:
                files = f"hf://datasets/{self.repository}@{self.pinned()}/{self.config}/{self.split}/*.parquet"
                table = datasets.load_dataset(
                    "parquet", data_files={self.split: files}, split=self.split, streaming=streaming
                )
            else:
                revision = None if folder else self.pinned()
                table = datasets.load_dataset(
                    self.repository, self.config, split=self.split, revision=revision, streaming=streaming
                )
        except Exception as error:
            raise DataError(
                f"the data set cannot be loaded ({type(error).__name__}: {error})",
                where=where,
                remedy="check the connection, or give the upstream files with --data-dir",
            ) from error
        # The hub numbers labels; their names, where it tells them, come beside the numbers.
        features = getattr(table, "features", None) or {}
        names = {str(k): kind.names for k, kind in features.items() if getattr(kind, "names", None)}
        for number, value in enumerate(table):
            told = {f"{k}_name": known[value[k]] for k, known in names.items() if value[k] is not None}  # pyright: ignore
            row = row_of({**value, **told}, f"{where}, row {number}")  # pyright: ignore
            if self.only is None or self.only.counts(row):
                yield row


_EXPORT = "refs/convert/parquet"


UNRESOLVED = "unresolved"
"""What stands for a commit that could not be looked up, in a plan that nothing is made of."""
_unresolved: ContextVar[list[str] | None] = ContextVar("unresolved", default=None)


@contextmanager
def without_the_hub() -> Iterator[list[str]]:
    """Lets a plan be made where the hub does not answer, to see what it would do; nothing must be made of it.

    Yields:
        The repositories whose commits could not be looked up; it fills while the plan is made.
    """
    found: list[str] = []
    token = _unresolved.set(found)
    try:
        yield found
    finally:
        _unresolved.reset(token)


def is_commit(revision: str | None, least: int = 40) -> bool:
    """Whether a revision is a commit, of which at least so many digits are given: it stays what it is. Branches and tags move."""
    return revision is not None and re.fullmatch(rf"[0-9a-f]{{{least},40}}", revision) is not None


def hub_commit(repository: str, kind: str, branch: str = "main") -> str:
    """The commit that a hub repository's branch points at: from the hub, or from the local cache when offline.

    Raises:
        MissingExtra: huggingface_hub is not installed.
        DataError: A data set cannot be found (kind `dataset`).
        BackboneError: A model cannot be found (kind `model`).
    """
    try:
        from huggingface_hub import HfApi, constants
    except ImportError:
        raise MissingExtra("huggingface_hub", "training") from None
    if kind == "dataset" and Path(repository).is_dir():
        return "local"
    cached = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}" / "refs" / branch
    if not constants.HF_HUB_OFFLINE:
        try:
            info = HfApi().repo_info(repository, repo_type=kind, revision=branch, timeout=10)
            if info.sha:
                return info.sha
        except Exception as error:  # noqa: BLE001 - whatever the reason, the cache may know
            reason = f"{type(error).__name__}"
        else:
            reason = "it names no commit"
    else:
        reason = "HF_HUB_OFFLINE is set"
    if cached.is_file():
        return cached.read_text().strip()
    if (unresolved := _unresolved.get()) is not None:
        unresolved.append(repository)
        return UNRESOLVED
    problem = DataError if kind == "dataset" else BackboneError
    raise problem(
        f"the hub's {kind} '{repository}' was not found ({reason}), and the local cache does not have it",
        remedy="check the name and the connection, or use local files",
    )


def parse_json(text: str, path: Path) -> Any:
    """A whole file as JSON.

    Raises:
        DataError: It is not JSON (with the line).
    """
    try:
        return bounded.parse(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"this file is not JSON ({error.msg})",
            where=f"{path}:{error.lineno}",
            remedy="correct the place that is named, or download the file again",
        ) from None
    except ValueError as error:
        raise DataError(f"this file is no JSON of rows ({error})", where=path, remedy="give a list of {…}") from None


def row_of(value: Mapping[Any, Any], place: str) -> Row:
    """A row whose values are text: what is not, is its JSON text."""
    return Row({str(k): _as_text(v) for k, v in value.items()}, place)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
