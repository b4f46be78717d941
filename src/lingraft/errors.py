"""One tree of errors that a user can act on: what is wrong, where, and what to do."""

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lingraft.escaping import printable


class LingraftError(Exception):
    """A failure with a message written for the person who reads it.

    Args:
        what: What is wrong, in one sentence.
        where: The file, line, key or module it concerns.
        remedy: What to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | Path | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = str(where) if where is not None else None
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  to do: {self.remedy}")
        return printable("\n".join(lines))  # Names in it may come out of anybody's files.

    def __reduce__(self) -> tuple[Any, ...]:
        # As it is, whatever its class is made from: errors come back from other processes.
        return _again, (type(self), self.args, self.__dict__)

    def as_dict(self) -> dict[str, str | int | None]:
        """The error as plain data, for `--json`."""
        return {"error": self.what, "where": self.where, "remedy": self.remedy, "exit_code": self.exit_code}


def _again(kind: type[LingraftError], args: tuple[Any, ...], fields: dict[str, Any]) -> LingraftError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error


class UserError(LingraftError):
    """The request cannot be carried out as it was made (exit code 2)."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class DataError(UserError):
    """A data file is missing, empty or malformed."""


class BackboneError(UserError):
    """A base model cannot be found or must not be loaded."""


class AdapterError(UserError):
    """An adapter cannot be read, or adapters do not fit together."""


class MissingExtra(UserError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package '{package}', which is not installed",
            remedy=f"pip install 'lingraft[{extra}]'",
        )


class StoreError(LingraftError):
    """A folder cannot be written or an artifact is damaged."""


class Busy(StoreError):
    """Another process is making the same; it may be there soon."""


class AlreadyMade(Busy):
    """Another process finished the same meanwhile: there is nothing left to do."""


class Damaged(StoreError):
    """A finished step's files are not what they were when it was finished.

    Args:
        kind: The step's kind.
        key: The step's key.
        what: What is wrong, in one sentence.
        where: Its folder.
    """

    def __init__(self, kind: str, key: str, what: str, *, where: str | Path | None = None) -> None:
        super().__init__(what, where=where, remedy="run the same command again: it is set aside and made anew")
        self.kind, self.key = kind, key


class TransientError(LingraftError):
    """A failure that a retry may mend: a worker died, a connection broke."""


class RunFailed(LingraftError):
    """Some steps of a run failed; the finished ones are kept."""


class Interrupted(LingraftError):
    """The user pressed Ctrl-C; what was finished is kept."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """Names the nearest right word, or all of them.

    Returns:
        A phrase such as "did you mean 'targets'?" for use as a remedy.
    """
    options = [str(k) for k in known]
    near = nearest(name, options)
    return f"did you mean '{near}'?" if near else "use one of: " + ", ".join(options)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The word that was probably meant; None: nothing is near."""
    return next(iter(difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)), None)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals while writing below `path` into clear errors.

    Raises:
        StoreError: No space is left, permission is denied, or the place is read-only.
    """
    remedies = {
        errno.ENOSPC: ("no space is left on the disk", "free some space and run the same command again"),
        errno.EDQUOT: ("your disk quota is used up", "free some space and run the same command again"),
        errno.EFBIG: (
            "a file would be too large for a limit that is set here",
            "raise the limit (ulimit -f) or choose another folder",
        ),
        errno.EACCES: ("permission to write is denied", "choose another folder or change its permissions"),
        errno.EPERM: ("permission to write is denied", "choose another folder or change its permissions"),
        errno.EROFS: ("the file system is read-only", "choose another folder"),
        errno.EIO: ("the disk or the connection to it reports an error", "check it and run the same command again"),
        errno.ENOTDIR: ("a file is where a folder is needed", "move it away or choose another folder"),
        errno.EEXIST: ("a file is where a folder is needed", "move it away or choose another folder"),
    }
    try:
        yield
    except OSError as error:
        if error.errno not in remedies:
            raise
        what, remedy = remedies[error.errno]
        raise StoreError(what, where=error.filename or path, remedy=remedy) from error
