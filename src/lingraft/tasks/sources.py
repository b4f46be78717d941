"""Where rows come from: a file of the user's, or a data set on the hub. A mistake is named by file and line."""

import csv
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lingraft.digests import digest_file
from lingraft.errors import BackboneError, DataError, MissingExtra

BUNDLED = Path(__file__).parents[1] / "data"


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
        raise DataError("this file is empty", where=path)
    return text


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, stripped; an empty one keeps its place (parallel text), those at the end are left out."""
    # Not str.splitlines: a line separator (U+2028) or a next-line character inside a sentence would shift parallel lines.
    return [line.strip() for line in re.split(r"\r\n|\r|\n", read_text(path).rstrip())]


@dataclass(frozen=True)
class FileSource:
    """Rows of a .jsonl, .tsv (unquoted, as SIB-200 has it) or .csv file."""

    path: Path

    def digest(self) -> str:
        """SHA-256 of the file."""
        return digest_file(self.path)

    def rows(self) -> list[Row]:
        """All rows, every value as text.

        Raises:
            DataError: The file is missing, empty or malformed.
        """
        text = read_text(self.path)
        suffix = self.path.suffix.lower()
        if suffix in (".jsonl", ".json"):
            return [self._json_row(line, n) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        if suffix not in (".tsv", ".csv"):
            raise DataError(f"unknown file type '{suffix}'", where=self.path, remedy="use .jsonl, .tsv or .csv")
        file = io.StringIO(text, newline="")
        tabs = suffix == ".tsv"
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file, strict=True)
        try:
            header = next(reader)
            rows = [self._table_row(header, values, reader.line_num) for values in reader if values]
        except csv.Error as error:
            raise DataError(f"this line is malformed ({error})", where=f"{self.path}:{reader.line_num}") from None
        if not rows:
            raise DataError("this file has a header and no rows", where=self.path)
        return rows

    def _json_row(self, line: str, number: int) -> Row:
        where = f"{self.path}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"this line is not JSON ({error.msg})", where=where) from None
        if not isinstance(value, dict):
            raise DataError("this line is not a JSON object", where=where)
        return Row({str(k): _as_text(v) for k, v in value.items()}, where)

    def _table_row(self, header: list[str], values: list[str], number: int) -> Row:
        where = f"{self.path}:{number}"
        if len(values) != len(header):
            raise DataError(f"this line has {len(values)} columns, the header {len(header)}", where=where)
        return Row(dict(zip(header, values, strict=True)), where)


@dataclass(frozen=True)
class HubSource:
    """Rows of a data set on the Hugging Face hub, at a pinned commit.

    The commit is looked up once, when none is given; it enters the digest, so that a data set that changes upstream is
    new work and not a silent difference.
    """

    repository: str
    config: str
    split: str
    revision: str | None = None

    def pinned(self) -> str:
        """The commit of the data set.

        Raises:
            MissingExtra: huggingface_hub is not installed.
            DataError: The hub does not answer, or has no such data set.
        """
        if self.revision:
            return self.revision
        return hub_commit(self.repository, "dataset")

    def digest(self) -> str:
        """Repository, commit, configuration and split."""
        return f"hub:{self.repository}@{self.pinned()}:{self.config}:{self.split}"

    def rows(self) -> list[Row]:
        """All rows, every value as text.

        Raises:
            MissingExtra: `datasets` is not installed.
            DataError: The data set cannot be loaded.
        """
        try:
            import datasets
        except ImportError:
            raise MissingExtra("datasets", "training") from None
        where = f"hub data set {self.repository}, {self.config}, {self.split}"
        folder = Path(self.repository).is_dir()
        try:
            table = datasets.load_dataset(
                self.repository, self.config, split=self.split, revision=None if folder else self.pinned()
            )
        except Exception as error:
            raise DataError(
                f"the data set cannot be loaded ({type(error).__name__}: {error})",
                where=where,
                remedy="check the connection, or give the upstream files with --data-dir",
            ) from error
        return [Row({str(k): _as_text(v) for k, v in row.items()}, f"{where}, row {n}") for n, row in enumerate(table)]  # pyright: ignore[reportAttributeAccessIssue]


def hub_commit(repository: str, kind: str) -> str:
    """The commit that a hub repository's main branch points at: from the hub, or from the local cache when offline.

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
    cached = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}" / "refs" / "main"
    if not constants.HF_HUB_OFFLINE:
        try:
            info = HfApi().repo_info(repository, repo_type=kind, timeout=10)
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
    problem = DataError if kind == "dataset" else BackboneError
    raise problem(
        f"the hub's {kind} '{repository}' was not found ({reason}), and the local cache does not have it",
        remedy="check the name and the connection, or use local files",
    )


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
