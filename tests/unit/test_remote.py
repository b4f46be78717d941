"""A store elsewhere keeps what a folder promises: steps are finished or not there, whole or set aside, made once."""

import errno
import json
import os
import pickle
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lingraft import leases, remote
from lingraft import store as storing
from lingraft.errors import (
    AlreadyMade,
    Busy,
    Damaged,
    LingraftError,
    MissingExtra,
    StoreError,
    TransientError,
    UserError,
)
from lingraft.remote import Pointer, Remote, shown, url_of
from lingraft.report.results import store_of
from lingraft.store import RECORD, Store, content_hashes, open_store, read_json
from tests.unit.test_store_steps import FILES, made

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A local S3 server with a bucket."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place of each kind."""
    place = f"place-{secrets.token_hex(4)}"
    if request.param == "memory":
        return f"memory://{place}/store"
    reached(monkeypatch, request.getfixturevalue("server"))
    fsspec.filesystem("s3").mkdir(place)
    return f"s3://{place}/some/folder"


def reached(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "very-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture
def client(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens the store with a cache of its own, as another machine would."""

    def opened(name: str) -> Store:
        monkeypatch.setenv("LINGRAFT_STORE_CACHE", str(tmp_path / name))
        return open_store(url)

    return opened


def far(store: Store) -> Remote:
    assert store.remote is not None
    return store.remote


def objects(store: Store) -> list[str]:
    there = far(store)
    return sorted(str(n).removeprefix(there.root).lstrip("/") for n in there.fs.find(there.root))


def file_of(store: Store, name: str) -> str:
    pointer = far(store).pointer("train", "ab", fresh=True)
    assert pointer is not None
    return f"{far(store).root}/train/ab/{pointer.attempt}/{name}"


# One makes, another reads.


def test_what_one_client_made_another_reads_byte_for_byte(client: Any):
    one, two = client("one"), client("two")
    assert not one.has("train", "ab")
    folder = made(one)
    assert one.has("train", "ab")
    assert two.has("train", "ab")
    assert list(two.steps()) == [("train", "ab")]
    fetched = two.folder("train", "ab")
    assert fetched != folder
    assert content_hashes(fetched) == content_hashes(folder)
    assert (fetched / RECORD).read_bytes() == (folder / RECORD).read_bytes()
    assert two.record("train", "ab") == one.record("train", "ab")
    assert two.record("train", "ab")["label"] == "train ab"
    assert [p.name for p in (two.root / "train").iterdir()] == ["ab"]
    assert two.folder("train", "ab") == fetched
    assert two.check("train", "ab") is None
    assert two.sizes().keys() == {("train", "ab")}
    assert two.sizes()["train", "ab"][0] == sum(map(len, FILES.values()))


def test_a_step_without_files_is_a_step(client: Any):
    made(client("one"), files={})
    assert client("two").folder("train", "ab").is_dir()


def test_what_says_that_a_step_is_finished_is_written_last(client: Any, monkeypatch: pytest.MonkeyPatch):
    one, two = client("one"), client("two")
    order: list[str] = []
    create = Remote._create

    def watched(self: Remote, name: str, text: bytes) -> bool:
        if name.endswith(".json"):
            order.extend(objects(one))
            assert not two.remote.has("train", "ab", fresh=True)
        return create(self, name, text)

    monkeypatch.setattr(Remote, "_create", watched)
    made(one)
    assert len([n for n in order if n.count("/") > 2]) == len(FILES)
    assert not [n for n in order if n.endswith(".json")]
    # The lease is gone, the files and the record are all there is.
    assert len(objects(one)) == len(FILES) + 1


def test_many_questions_are_few_requests_and_what_is_new_is_seen_soon(client: Any, monkeypatch: pytest.MonkeyPatch):
    one, two = client("one"), client("two")
    asked: list[str] = []
    names = Remote._names
    monkeypatch.setattr(Remote, "_names", lambda self, place: (asked.append(place), names(self, place))[1])
    for number in range(1000):
        assert not two.has("train", f"{number:04x}")
    assert len(asked) <= 2
    made(one)
    now = time.monotonic()
    monkeypatch.setattr(remote.time, "monotonic", lambda: now + remote._FRESH + 1)
    assert two.has("train", "ab")


def test_a_step_is_not_made_twice(client: Any):
    one, two = client("one"), client("two")
    with one.making("train", "ab", {"n": 1}) as work:
        (work / "a.txt").write_text("one")
        with pytest.raises(Busy, match=f"process {os.getpid()} on") as caught, two.making("train", "ab", {"n": 1}):
            pytest.fail("two are at work")
        assert not isinstance(caught.value, AlreadyMade)
    with pytest.raises(AlreadyMade), two.making("train", "ab", {"n": 1}):
        pytest.fail("it is made twice")


def test_makers_that_nothing_keeps_apart_never_mix_their_files(client: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote._RemoteLease, "take", lambda self: None)
    clients = [client(f"c{n}") for n in range(4)]
    together = threading.Barrier(len(clients))

    def one(number: int) -> str:
        try:
            with clients[number].making("train", "ab", {"n": 1}) as work:
                for name in "abc":
                    (work / name).write_text(f"{number} {name}")
                together.wait()
        except AlreadyMade:
            return "made already"
        return "made"

    with ThreadPoolExecutor(len(clients)) as pool:
        assert sorted(pool.map(one, range(len(clients)))) == ["made", *["made already"] * 3]
    contents = set()
    for number, store in enumerate([*clients, client("new")]):
        folder = store.folder("train", "ab")
        contents.add(tuple((folder / name).read_text()[0] for name in "abc"))
        assert store.check("train", "ab") is None, number
    # All clients read the same maker's files.
    assert len(contents) == 1
    assert len(set(contents.pop())) == 1
    assert len(objects(clients[0])) == 4


# Interruptions.


def test_an_upload_that_broke_off_is_sent_again_and_not_made_again(client: Any, monkeypatch: pytest.MonkeyPatch):
    one = client("one")

    def broken(*_: object, **__: object) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "gone")

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "_create", lambda self, name, text: broken() if name.endswith("b.json") else True)
        with pytest.raises(TransientError, match="cannot be reached"):
            made(one)
    assert not far(one).has("train", "ab", fresh=True)
    assert [n for n in objects(one) if n.endswith("a.txt")]
    with pytest.raises(AlreadyMade), one.making("train", "ab", {"n": 1}):
        pytest.fail("it is made again")
    two = client("two")
    assert two.folder("train", "ab")
    # What the broken attempt sent belongs to no step.
    left = list(two.leftovers())
    assert len(left) == len(FILES)
    two.clean([name for name, _ in left])
    assert list(two.leftovers()) == []
    assert two.check("train", "ab") is None


def test_work_that_broke_off_is_gone_on_with(client: Any):
    one = client("one")
    with pytest.raises(ZeroDivisionError), one.making("train", "ab", {"n": 1}) as work:
        (work / "half").write_text("half")
        raise ZeroDivisionError
    assert objects(one) == []
    with one.making("train", "ab", {"n": 1}) as work:
        assert (work / "half").read_text() == "half"


def test_a_download_that_broke_off_leaves_nothing(client: Any, monkeypatch: pytest.MonkeyPatch):
    made(client("one"))
    two = client("two")

    def broken(*_: object, **__: object) -> None:
        raise TimeoutError("too slow")

    with monkeypatch.context() as patch:
        patch.setattr(far(two).fs, "get", broken)
        with pytest.raises(TransientError, match="too slow"):
            two.folder("train", "ab")
    assert list((two.root / "train").iterdir()) == []
    assert two.folder("train", "ab")


def lease_of_another(store: Store, **changes: Any) -> str:
    name = f"{far(store).root}/train/ab.lock"
    holder = {"host": "elsewhere", "boot": "another", "space": "x", "pid": 1, "start": 1, "token": "aa", "since": "then",
              "seconds": 1.5, "locked": False, "earlier": []}  # fmt: skip
    far(store).fs.pipe_file(name, json.dumps(holder | changes).encode())
    return name


def test_a_maker_elsewhere_is_given_up_by_the_clock_of_the_server(client: Any):
    one = client("one")
    lease_of_another(one)
    with pytest.raises(Busy, match="process 1 on elsewhere, since then"), one.making("train", "ab", {"n": 1}):
        pytest.fail("two are at work")
    assert one.busy() is not None
    deadline = time.monotonic() + 60
    while one.busy() is not None and time.monotonic() < deadline:
        time.sleep(0.2)
    made(one)
    assert not [n for n in objects(one) if "lock" in n]


def test_a_dead_process_of_this_host_is_given_up_at_once(client: Any):
    one = client("one")
    host, boot, space, pid, start = leases.this_process()
    lease_of_another(one, host=host, boot=boot, space=space, pid=pid, start=start - 1, seconds=1000)
    made(one)


# Damage.


@pytest.mark.parametrize("how", ["changed", "missing", "record", "not json"])
def test_a_corrupted_object_is_found_set_aside_and_made_anew(client: Any, how: str):
    one, two, three = client("one"), client("two"), client("three")
    made(one)
    fs, pointer = far(one).fs, f"{far(one).root}/train/ab.json"
    if how == "changed":
        fs.pipe_file(file_of(one, "a.txt"), b"omega")
    elif how == "missing":
        fs.rm_file(file_of(one, "below/b.bin"))
    elif how == "record":
        fs.pipe_file(pointer, fs.cat_file(pointer).replace(b'"n": 1', b'"n": 2'))
    else:
        fs.pipe_file(pointer, b"\xff{")
    with pytest.raises(Damaged) as caught:
        two.folder("train", "ab")
    assert caught.value.where == f"{two.url}/train/ab"
    assert two.check("train", "ab") is not None
    aside = two.set_aside("train", "ab")
    assert not two.has("train", "ab")
    assert [f"{two.url}/{n}" for n in objects(two) if n.startswith("damaged/")] == [aside]
    with two.making("train", "ab", {"n": 1}) as work:
        (work / "a.txt").write_bytes(b"alpha")
    assert (three.folder("train", "ab") / "a.txt").read_bytes() == b"alpha"


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_whoever_found_a_damage_reads_what_another_made_anew(client: Any, how: str):
    one, finder, other = client("one"), client("two"), client("three")
    made(one)
    if how == "changed":
        far(one).fs.pipe_file(file_of(one, "a.txt"), b"omega")
        with pytest.raises(Damaged):
            finder.folder("train", "ab")
        assert other.set_aside("train", "ab") is not None
    else:
        assert finder.record("train", "ab")
        other.drop("train", "ab")
    made(other)
    with suppress(LingraftError):
        finder.folder("train", "ab")
    assert (finder.folder("train", "ab") / "a.txt").read_bytes() == b"alpha"


def test_a_whole_step_is_not_set_aside(client: Any):
    one = client("one")
    made(one)
    assert one.set_aside("train", "ab") is None
    assert one.has("train", "ab")
    assert one.check("train", "ab") is None


def test_a_damaged_cache_is_filled_anew(client: Any):
    made(client("one"))
    two = client("two")
    (two.folder("train", "ab") / "a.txt").write_bytes(b"omega")
    assert (two.folder("train", "ab") / "a.txt").read_bytes() == b"alpha"


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/../../../evil", "..\\evil", ""])
def test_no_file_of_a_record_is_written_outside_its_folder(client: Any, tmp_path: Path, name: str):
    one = client("one")
    evil = Pointer("00", {"files": {name: "0" * 64}})
    far(one).fs.pipe_file(f"{far(one).root}/train/ab.json", evil.text())
    with pytest.raises(Damaged, match="seal"):
        one.folder("train", "ab")
    assert not list(tmp_path.rglob("evil"))


def test_of_two_that_made_it_what_was_sent_first_counts_for_both(client: Any, monkeypatch: pytest.MonkeyPatch):
    one, two = client("one"), client("two")
    publish = Remote.publish

    def unreachable(*_: object) -> None:
        raise TransientError("the store cannot be reached")

    monkeypatch.setattr(Remote, "publish", unreachable)
    with pytest.raises(TransientError):
        made(one, files={"a.txt": b"late"})
    monkeypatch.setattr(Remote, "publish", publish)
    made(two, files={"a.txt": b"first"})
    assert (one.folder("train", "ab") / "a.txt").read_bytes() == b"first"


def test_a_store_can_be_sent_to_a_worker(client: Any):
    one = client("one")
    made(one)
    sent = pickle.loads(pickle.dumps(one))  # noqa: S301 - its own
    assert sent.folder("train", "ab") == one.folder("train", "ab")
    assert sent.url == one.url


# Verbs.


def test_what_no_step_needs_can_be_told_and_steps_dropped(client: Any):
    one = client("one")
    made(one)
    made(one, "cd")
    assert list(one.leftovers()) == []
    far(one).fs.pipe_file(f"{far(one).root}/train/ab/00ff/half", b"half")
    far(one).fs.pipe_file(f"{far(one).root}/train/ee/00ff/half", b"half")
    assert [name for name, _ in one.leftovers()] == ["train/ab/00ff/half", "train/ee/00ff/half"]
    with client("two").making("train", "ee", {}):  # It may be this one's.
        assert [name for name, _ in one.leftovers()] == ["train/ab/00ff/half"]
    one.drop("train", "cd")
    assert not far(one).has("train", "cd", fresh=True)
    assert not [n for n in objects(one) if n.startswith("train/cd")]
    assert one.check("train", "ab") is None


# What goes wrong between here and there.


def test_a_bucket_that_is_not_there_is_the_users_mistake(server: str, monkeypatch: pytest.MonkeyPatch):
    reached(monkeypatch, server)
    store = open_store("s3://no-such-bucket-here/x")
    for ask in (lambda: store.has("train", "ab"), lambda: store.folder("train", "ab"), lambda: made(store)):
        with pytest.raises(UserError, match="no such bucket"):
            ask()


def test_a_server_that_does_not_answer_is_a_transient_error(monkeypatch: pytest.MonkeyPatch, server: str):
    reached(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store = open_store("s3://bucket/x")
    with pytest.raises(TransientError, match="cannot be reached") as caught:
        store.has("train", "ab")
    assert "very-secret" not in str(caught.value)
    assert caught.value.where == "s3://bucket/x"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError("The AWS Access Key Id you provided does not exist"), UserError),
        (type("NoCredentialsError", (Exception,), {"__module__": "botocore.exceptions"})("none"), UserError),
        (type("ReadTimeoutError", (Exception,), {"__module__": "botocore.exceptions"})("slow"), TransientError),
        (type("ClientError", (Exception,), {"__module__": "botocore.exceptions"})("503 SlowDown"), TransientError),
        (OSError(errno.EIO, "InternalError"), TransientError),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), TransientError),
        (TimeoutError(), TransientError),
    ],
)
def test_errors_are_the_users_or_transient(monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]):
    there = Remote("memory://errors")

    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(there.fs, "ls", broken)
    with pytest.raises(kind):
        there.keys("train")


def test_a_full_disk_here_is_no_matter_of_the_connection(client: Any, monkeypatch: pytest.MonkeyPatch):
    made(client("one"))
    two = client("two")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/here")

    monkeypatch.setattr(far(two).fs, "get", full)
    with pytest.raises(StoreError, match="no space is left"):
        two.folder("train", "ab")


# Addresses.


@pytest.mark.parametrize(
    ("where", "url"),
    [
        ("s3://bucket/folder/", "s3://bucket/folder"),
        (Path("s3://bucket/folder"), "s3://bucket/folder"),  # A Path swallows a slash.
        ("memory://x", "memory://x"),
        ("runs/store", None),
        (Path("/tmp/s3/x"), None),
        ("file:///tmp/x", None),
        ("C:\\store", None),
    ],
)
def test_urls_are_told_from_folders(where: str | Path, url: str | None):
    assert url_of(where) == url


def test_secrets_in_a_url_are_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LINGRAFT_STORE_CACHE", str(tmp_path))
    assert shown("s3://me:word@host/x?token=1") == "s3://host/x"
    store = open_store("memory://me:word@host/x")
    assert store.url == "memory://host/x"
    made(store)
    for path in tmp_path.rglob("*"):
        assert "word" not in path.name
        assert not path.is_file() or b"word" not in path.read_bytes()
    for name in far(store).fs.find(far(store).root):
        assert b"word" not in far(store).fs.cat_file(name)


def test_what_is_not_known_or_not_installed_is_said(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="cannot be a store"):
        open_store("nonsense://x")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "s3fs", None)
        patch.setitem(sys.modules, "fsspec", fsspec)
        patch.setattr(fsspec.core, "url_to_fs", lambda *_, **__: (_ for _ in ()).throw(ImportError("Install s3fs")))
        with pytest.raises(MissingExtra, match="s3fs") as caught:
            open_store("s3://bucket")
        assert caught.value.remedy == "pip install 'lingraft[s3]'"
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingExtra, match="fsspec") as caught:
        open_store("memory://x")
    assert caught.value.remedy == "pip install 'lingraft[remote]'"


def test_stores_of_different_servers_have_different_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LINGRAFT_CACHE", str(tmp_path))
    monkeypatch.delenv("LINGRAFT_STORE_CACHE", raising=False)
    roots = set()
    for endpoint in ("http://one", "http://two"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        roots.add(open_store("memory://bucket/x").root)
    assert len(roots) == 2
    assert {root.parent for root in roots} == {tmp_path / "stores"}


def test_a_manifest_may_name_a_url(tmp_path: Path):
    assert store_of(tmp_path, {"store": "memory://bucket/x"}).url == "memory://bucket/x"
    assert store_of(tmp_path / "run", {"store": "../store"}).root.resolve() == tmp_path / "store"


def test_the_record_of_a_fetched_step_is_as_its_maker_wrote_it(client: Any):
    one = client("one")
    made(one)
    storing._VERIFIED.clear()
    assert read_json(client("two").folder("train", "ab") / RECORD) == read_json(one.folder("train", "ab") / RECORD)
