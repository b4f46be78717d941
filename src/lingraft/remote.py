"""Finished steps in an object store, behind any fsspec URL. There is no rename: what is written last makes a step finished.

<kind>/<key>/<attempt>/…   the files, each maker's below a name of its own
<kind>/<key>.json          which attempt counts, and the step's record: written last, and only where there is none
<kind>/<key>.lock          who is making it
damaged/…                  what said which attempt counts, of steps that were set aside
"""

import errno
import json
import re
import secrets
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from lingraft.digests import digest_value
from lingraft.errors import AlreadyMade, Busy, MissingExtra, StoreError, TransientError, UserError
from lingraft.leases import Holder, Pulse, is_dead, now, patience, read_holder, this_process

_FRESH = 5.0
"""Seconds for which a listing answers what is finished."""
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/{1,2}(?!/)")
_ABSENT = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_PULSE = Pulse()


def url_of(where: str | Path) -> str | None:
    """The fsspec URL that a place is, or None for a folder. A `Path` that has swallowed a slash is understood."""
    text = str(where)
    found = _SCHEME.match(text)
    if found is None or found[1].lower() in ("file", "local"):
        return None
    return f"{found[1]}://{text[found.end() :].rstrip('/')}"


def shown(url: str) -> str:
    """A URL without what must not be written down: user, password, query."""
    return re.sub(r"://[^/@]*@", "://", url).partition("?")[0]


@dataclass(frozen=True)
class Pointer:
    """What makes a step finished.

    Args:
        attempt: Below which name its files are.
        record: Its record, as it is in a folder.
    """

    attempt: str
    record: dict[str, Any]

    def text(self) -> bytes:
        """As it is stored, with a seal."""
        value = {"attempt": self.attempt, "record": self.record}
        return json.dumps({**value, "seal": digest_value(value)}, indent=2, sort_keys=True, ensure_ascii=False).encode()

    @classmethod
    def read(cls, text: bytes) -> "Pointer":
        """Opens what is stored.

        Raises:
            StoreError: It is damaged.
        """
        try:
            value = json.loads(text)
            seal = value.pop("seal")
            if (
                seal == digest_value(value)
                and re.fullmatch("[0-9a-f]+", value["attempt"])
                and _harmless(value["record"])
            ):
                return cls(**value)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        raise StoreError(
            "the record is changed: its seal does not fit",
            remedy="run the same command again: it is set aside and made anew",
        )


def _harmless(record: dict[str, Any]) -> bool:
    """Whether no file of a record would be written outside its folder."""
    return all(
        name and "\\" not in name and "\0" not in name and not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
        for name in record["files"]
    )  # fmt: skip


class Remote:
    """The far side of a store.

    Args:
        url: An fsspec URL.

    Raises:
        UserError: The URL cannot be used.
        MissingExtra: What reads such URLs is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError:
            raise MissingExtra("fsspec", "remote") from None
        self.url = shown(url)
        scheme = url.partition(":")[0].lower()
        try:
            # Listings are kept here, for as long as they may answer.
            self.fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError:
            extra = "s3" if _ABSENT.get(scheme) == "s3fs" else "remote"
            raise MissingExtra(_ABSENT.get(scheme, f"an fsspec file system for {scheme}://"), extra) from None
        except (ValueError, TypeError) as error:
            raise UserError(
                f"this URL cannot be a store ({_clean(error)})",
                where=self.url,
                remedy="see `fsspec.available_protocols()`",
            ) from None
        self.root = root.rstrip("/")
        self._known: dict[str, tuple[float, frozenset[str]]] = {}
        self._pointers: dict[tuple[str, str], Pointer] = {}

    def has(self, kind: str, key: str, *, fresh: bool = False) -> bool:
        """Whether a step is finished: by a listing that is a few seconds old at most, or asked for just now."""
        if fresh:
            return self.pointer(kind, key, fresh=True) is not None
        when, keys = self._known.get(kind, (float("-inf"), frozenset()))
        if key not in keys and time.monotonic() - when > _FRESH:
            keys = frozenset(self.keys(kind))
        return key in keys

    def kinds(self) -> list[str]:
        """The kinds of which there is something."""
        return sorted(name for name in self._names(self.root) if re.fullmatch("[a-z]+", name) and name != "damaged")

    def keys(self, kind: str) -> list[str]:
        """The finished steps of a kind, in one listing."""
        names = self._names(f"{self.root}/{kind}")
        found = sorted(n.removesuffix(".json") for n in names if re.fullmatch(r"[0-9a-f]+\.json", n))
        self._known[kind] = (time.monotonic(), frozenset(found))
        return found

    def pointer(self, kind: str, key: str, *, fresh: bool = False) -> Pointer | None:
        """What makes a step finished, or None.

        Raises:
            StoreError: It is damaged.
        """
        if not fresh and (kind, key) in self._pointers:
            return self._pointers[kind, key]
        with self._talking():
            try:
                text = self.fs.cat_file(self._pointer(kind, key))
            except FileNotFoundError as error:
                self._check_bucket(error)
                self._forget(kind, key)
                return None
        found = self._pointers[kind, key] = Pointer.read(text)
        return found

    def doubt(self, kind: str, key: str) -> None:
        """Has it asked again which attempt counts: another may by now, made anew elsewhere."""
        self._pointers.pop((kind, key), None)

    def fetch(self, kind: str, key: str, pointer: Pointer, folder: Path) -> list[str]:
        """Copies a step's files into an empty folder, without its record.

        Returns:
            The files that are missing.
        """
        names = list(pointer.record["files"])
        place = f"{self.root}/{kind}/{key}/{pointer.attempt}"
        for parent in {(folder / name).parent for name in names}:
            parent.mkdir(parents=True, exist_ok=True)
        with self._talking():
            try:
                if names:
                    self.fs.get([f"{place}/{name}" for name in names], [str(folder / name) for name in names])
            except FileNotFoundError:
                missing = [name for name in names if not self.fs.exists(f"{place}/{name}")]
                if not missing:
                    raise
                return missing
        return []

    def publish(self, kind: str, key: str, folder: Path, record: dict[str, Any]) -> None:
        """Copies a finished folder there; the step is finished when this returns, and not before.

        Raises:
            AlreadyMade: Another was quicker; nothing of this one counts.
        """
        pointer = Pointer(secrets.token_hex(8), record)
        place, names = f"{self.root}/{kind}/{key}/{pointer.attempt}", list(record["files"])
        with self._talking():
            if names:
                self.fs.put([str(folder / name) for name in names], [f"{place}/{name}" for name in names])
            made = self._create(self._pointer(kind, key), pointer.text())
        # A write that was repeated after a broken connection meets itself.
        if not made and self.pointer(kind, key, fresh=True) != pointer:
            with suppress(Exception), self._talking():
                self.fs.rm(place, recursive=True)
            raise AlreadyMade("another process has made this meanwhile", where=f"{self.url}/{kind}/{key}")
        self._pointers[kind, key] = pointer
        when, keys = self._known.get(kind, (float("-inf"), frozenset()))
        self._known[kind] = (when, keys | {key})

    def withdraw(self, kind: str, key: str, pointer: Pointer | None, why: str) -> str:
        """Says that a step is not finished after all. What said so is kept below `damaged`, its files stay for `gc`.

        Returns:
            Where it is kept.
        """
        name = f"{self.root}/damaged/{kind}-{key}-{pointer.attempt if pointer else secrets.token_hex(8)}.json"
        note = {"kind": kind, "key": key, "why": why, "when": now(), **({} if pointer is None else asdict(pointer))}
        with self._talking():
            self.fs.pipe_file(name, json.dumps(note).encode())
            with suppress(FileNotFoundError):
                self.fs.rm_file(self._pointer(kind, key))
        self._forget(kind, key)
        return f"{self.url}/{name.removeprefix(self.root + '/')}"

    @contextmanager
    def leased(self, kind: str, key: str) -> Generator[None, None, None]:
        """Keeps others from making the same for the block, where they can be kept from it; nothing depends on it.

        Raises:
            Busy: Another is at work on it.
        """
        lease = _RemoteLease(self, f"{self.root}/{kind}/{key}.lock")
        with self._talking():
            lease.take()
        try:
            yield
        finally:
            with suppress(Exception):
                lease.release()

    def leftovers(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of every object that no finished step needs and nobody is making."""
        with self._talking():
            found: dict[str, Any] = self.fs.find(self.root, detail=True)
        sizes = {name.removeprefix(self.root).lstrip("/"): info.get("size") or 0 for name, info in found.items()}
        yield from ((name, size) for name, size in sorted(sizes.items()) if self._is_left(name))

    def _is_left(self, name: str) -> bool:
        step = re.fullmatch(r"([a-z]+)/([0-9a-f]+)/([0-9a-f]+)/.+", name)
        lock = re.fullmatch(r"([a-z]+/[0-9a-f]+\.lock)(\..*)?", name)
        if lock:
            return self._free(lock[1])
        if step:
            return not self._counts(step[1], step[2], step[3]) and self._free(f"{step[1]}/{step[2]}.lock")
        return name.startswith("damaged/")

    def sizes(self) -> dict[tuple[str, str], tuple[int, float]]:
        """Bytes of every finished step, and when it was finished, in one listing."""
        with self._talking():
            listed: dict[str, Any] = self.fs.find(self.root, detail=True)
        found: dict[tuple[str, str], tuple[int, float]] = {}
        sums: dict[tuple[str, str], int] = {}
        for name, info in sorted(listed.items()):
            step = re.fullmatch(r"([a-z]+)/([0-9a-f]+)(\.json|/.+)", name.removeprefix(self.root).lstrip("/"))
            if step is None or step[1] == "damaged":
                continue
            at = (step[1], step[2])
            if step[3] == ".json":
                when = info.get("LastModified") or info.get("created") or info.get("updated")
                found[at] = (0, when.timestamp() if hasattr(when, "timestamp") else 0.0)
            else:
                sums[at] = sums.get(at, 0) + (info.get("size") or 0)
        return {at: (sums.get(at, 0), when) for at, (_, when) in sorted(found.items())}

    def busy(self) -> str | None:
        """One of the steps that are being made, or None."""
        with self._talking():
            names = [str(name).removeprefix(self.root).lstrip("/") for name in self.fs.find(self.root)]
        locks = (name for name in names if re.fullmatch(r"[a-z]+/[0-9a-f]+\.lock", name))
        return next((f"{self.url}/{name}" for name in locks if not self._free(name)), None)

    def remove(self, names: Iterable[str]) -> None:
        """Deletes objects, named as `leftovers` names them."""
        paths = [f"{self.root}/{name}" for name in names]
        with self._talking():
            if paths:
                self.fs.rm(paths)

    def drop(self, kind: str, key: str) -> None:
        """Deletes a finished step: first what makes it finished, then its files."""
        with self._talking():
            with suppress(FileNotFoundError):
                self.fs.rm_file(self._pointer(kind, key))
            with suppress(FileNotFoundError):
                self.fs.rm(f"{self.root}/{kind}/{key}", recursive=True)
        self._forget(kind, key)

    def _counts(self, kind: str, key: str, attempt: str) -> bool:
        try:
            pointer = self.pointer(kind, key)
        except StoreError:
            return True  # Damaged: nothing is deleted before that was looked at.
        return pointer is not None and pointer.attempt == attempt

    def _free(self, name: str) -> bool:
        lease = _RemoteLease(self, f"{self.root}/{name}")
        with self._talking():
            said = lease.said()
            return said is None or lease.given_up(said)

    def _pointer(self, kind: str, key: str) -> str:
        return f"{self.root}/{kind}/{key}.json"

    def _forget(self, kind: str, key: str) -> None:
        self._pointers.pop((kind, key), None)
        when, keys = self._known.get(kind, (float("-inf"), frozenset()))
        self._known[kind] = (when, keys - {key})

    def _names(self, place: str) -> list[str]:
        with self._talking():
            try:
                return [str(name).rstrip("/").rpartition("/")[2] for name in self.fs.ls(place, detail=False)]
            except FileNotFoundError as error:
                self._check_bucket(error)
                return []

    def _create(self, name: str, text: bytes) -> bool:
        """Writes an object unless it is there; where that cannot be asked for in one, it is looked for first."""
        try:
            self.fs.pipe_file(name, text, mode="create")
        except FileExistsError:
            return False
        except (TypeError, ValueError, NotImplementedError):
            if self.fs.exists(name):
                return False
            self.fs.pipe_file(name, text)
        except OSError as error:
            if "precondition" not in str(error).lower() and "conditional" not in str(error).lower():
                raise
            return False
        return True

    def _check_bucket(self, error: FileNotFoundError) -> None:
        if re.search("bucket does not exist|NoSuchBucket", str(error)):
            raise UserError(
                "there is no such bucket", where=self.url, remedy="check the URL, or make the bucket"
            ) from None

    @contextmanager
    def _talking(self) -> Generator[None, None, None]:
        """Turns what goes wrong between here and there into errors one can act on; no secret is in their words.

        Raises:
            UserError: Access is denied, or there is no such bucket.
            TransientError: The connection broke, or the server is in trouble.
        """
        try:
            yield
        except FileNotFoundError as error:
            self._check_bucket(error)
            raise TransientError(
                "an object is missing that was there", where=self.url, remedy="run the same command again"
            ) from error
        except OSError as error:
            if error.errno in _LOCAL and error.filename:
                raise
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            if isinstance(error, PermissionError):
                raise self._denied(error) from None
            raise self._broken(error) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] == "lingraft":
                raise
            name = type(error).__name__
            if "Credential" in name or "Token" in name or "Unauthorized" in name or "Forbidden" in name:
                raise self._denied(error) from None
            if type(error).__module__.partition(".")[0] in ("builtins", "json"):
                raise
            raise self._broken(error) from error

    def _denied(self, error: Exception) -> UserError:
        return UserError(
            f"access to the store is denied ({_clean(error)})", where=self.url, remedy="check your credentials for it"
        )

    def _broken(self, error: BaseException) -> TransientError:
        return TransientError(
            f"the store cannot be reached ({_clean(error)})",
            where=self.url,
            remedy="check the connection and run again",
        )


def _clean(error: BaseException) -> str:
    return f"{type(error).__name__}: {shown(' '.join(str(error).split()))[:200]}"


class _RemoteLease:
    """An object that says who is making a step."""

    def __init__(self, remote: Remote, name: str) -> None:
        self.remote, self.fs, self.name = remote, remote.fs, name
        self.holder = Holder(*this_process(), secrets.token_hex(8), now(), patience())

    def take(self) -> None:
        for _ in range(5):
            if self.remote._create(self.name, json.dumps(asdict(self.holder)).encode()):
                _PULSE.add(self)
                return
            said = self.said()
            if said is None:
                continue
            if said.token == self.holder.token:  # A write that was repeated meets itself.
                _PULSE.add(self)
                return
            if not self.given_up(said):
                break
            again = self.said()
            if again is not None and again.token == said.token:
                with suppress(FileNotFoundError):
                    self.fs.rm_file(self.name)
        said = self.said()
        who = "" if said is None else f": process {said.pid} on {said.host}, since {said.since}"
        where = f"{self.remote.url}/{self.name.removeprefix(self.remote.root + '/').removesuffix('.lock')}"
        raise Busy(f"another process is making this{who}", where=where, remedy="wait for it, or stop it")

    def said(self) -> Holder | None:
        try:
            found = read_holder(self.fs.cat_file(self.name))
        except FileNotFoundError:
            return None
        return found or replace(self.holder, token="", host="", boot="?", seconds=patience())

    def given_up(self, said: Holder) -> bool:
        """By its process where that can be seen, else by the clock of the server."""
        dead = is_dead(said, False)
        if dead is not None:
            return dead
        clock = f"{self.name}.{secrets.token_hex(8)}"
        try:
            touched = self.fs.modified(self.name)
            self.fs.pipe_file(clock, b"")
            return (self.fs.modified(clock) - touched).total_seconds() > said.seconds
        except NotImplementedError:
            return True  # No clock, no sign of life: the lease is worth nothing here.
        except FileNotFoundError:
            return True
        finally:
            with suppress(Exception):
                self.fs.rm_file(clock)

    def touch(self) -> None:
        with suppress(Exception):
            said = self.said()
            if said is not None and said.token == self.holder.token:
                self.fs.pipe_file(self.name, json.dumps(asdict(self.holder)).encode())

    def release(self) -> None:
        _PULSE.drop(self)
        said = self.said()
        if said is not None and said.token == self.holder.token:
            self.fs.rm_file(self.name)
