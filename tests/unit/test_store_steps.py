"""A finished step is what it was, or it is said what is wrong with it, and it is made anew."""

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lingraft import store as storing
from lingraft.digests import digest_value
from lingraft.errors import AlreadyMade, Busy, Damaged, StoreError
from lingraft.store import DAMAGED, RECORD, SEAL, Store, content_hashes, open_store, read_json, verify, write_json

FILES = {"a.txt": b"alpha", "below/b.bin": b"\0" * 300, "below/deep/c": b""}


def made(store: Store, key: str = "ab", files: dict[str, bytes] = FILES) -> Path:
    with store.making("train", key, {"n": 1, "config": {"language": "sw"}}) as work:
        for name, content in files.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(content)
        write_json(work / "extra.json", {"label": f"train {key}", "wall_seconds": 2.0})
    return store.path("train", key)


def afresh() -> None:
    """As another process would see it."""
    storing._VERIFIED.clear()


@pytest.fixture
def shelf(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def flipped(path: Path, at: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (lambda f: flipped(f / "a.txt"), "1 file is changed: 'a.txt'"),
    "shorter": (lambda f: (f / "below/b.bin").write_bytes(b""), "1 file is changed: 'below/b.bin'"),
    "missing": (lambda f: (f / "below/deep/c").unlink(), "1 file is missing: 'below/deep/c'"),
    "too many": (lambda f: (f / "below/new").write_bytes(b"?"), "1 file is too many: 'below/new'"),
    "a link": (lambda f: (f / "below/link").symlink_to("/etc/hosts"), "1 file is too many: 'below/link'"),
    "a folder": (lambda f: ((f / "a.txt").unlink(), (f / "a.txt").mkdir()), "1 file is missing: 'a.txt'"),
    "record": (
        lambda f: (f / RECORD).write_text((f / RECORD).read_text().replace('"n": 1', '"n": 2')),
        "its seal does not fit",
    ),
    "half": (lambda f: (f / RECORD).write_text((f / RECORD).read_text()[:50]), "this file is damaged"),
    "empty": (lambda f: (f / RECORD).write_bytes(b""), "this file is damaged"),
    "list": (lambda f: (f / RECORD).write_text("[1]"), "not one of lingraft's"),
    "bare": (lambda f: (f / RECORD).write_text('{"n": 1}'), "holds no hashes"),
}


@pytest.mark.parametrize("how", BREAKS)
def test_what_was_done_to_a_step_is_found_set_aside_and_made_good(shelf: Store, how: str):
    folder = made(shelf)
    assert shelf.folder("train", "ab") == folder
    before = content_hashes(folder)
    act, says = BREAKS[how]
    act(folder)
    with pytest.raises(Damaged, match=says) as caught:
        shelf.folder("train", "ab")
    assert (caught.value.kind, caught.value.key, caught.value.where) == ("train", "ab", str(folder))
    assert shelf.check("train", "ab") == caught.value.what
    aside = shelf.set_aside("train", "ab")
    assert aside == str(shelf.root / DAMAGED / "train-ab-0")
    assert (shelf.root / DAMAGED / "train-ab-0").is_dir()
    note = json.loads((shelf.root / DAMAGED / "train-ab-0.json").read_text())
    assert (note["kind"], note["key"], note["why"]) == ("train", "ab", caught.value.what)
    assert not shelf.has("train", "ab")
    assert content_hashes(made(shelf)) == before
    assert shelf.check("train", "ab") is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_stays_unseen(tmp_path: Path, data: st.DataObject):
    shelf = Store(tmp_path / "store")
    folder = shelf.path("train", "ab") if shelf.has("train", "ab") else made(shelf)
    path = folder / data.draw(st.sampled_from(["a.txt", "below/b.bin", RECORD]))
    whole = path.read_bytes()
    content = bytearray(whole)
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        afresh()
        # Of the record only what it says counts: a space that became another says the same.
        if path.name != RECORD or _says(content) != _says(whole):
            with pytest.raises(Damaged):
                shelf.folder("train", "ab")
    finally:
        path.write_bytes(whole)
    assert shelf.folder("train", "ab") == folder


def test_no_flipped_bit_of_a_record_stays_unseen(shelf: Store):
    path = made(shelf) / RECORD
    whole = path.read_bytes()
    seal = whole.index(b'"seal"')
    for at in range(len(whole)):
        for bit in range(8) if seal <= at < seal + 8 else [at % 8]:
            content = bytearray(whole)
            content[at] ^= 1 << bit
            path.write_bytes(content)
            said = verify(path.parent)
            assert (said is None) == (_says(content) == _says(whole)), (at, bit, content[at - 10 : at + 10])


@pytest.mark.parametrize("text", ['{"files": {}, "seal": "?", "n": NaN}', '{"files": {}, "seal": "?", "n": "\\udc00"}'])
def test_a_record_with_what_no_record_has_is_damaged_and_no_crash(shelf: Store, text: str):
    (made(shelf) / RECORD).write_text(text)
    assert "its seal does not fit" in str(shelf.check("train", "ab"))


def _says(text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def test_a_change_is_seen_by_the_process_that_had_verified(shelf: Store):
    folder = made(shelf)
    assert shelf.folder("train", "ab") == folder
    stat = (folder / "a.txt").stat()
    (folder / "a.txt").write_bytes(b"omega")  # As long as before.
    os.utime(folder / "a.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(Damaged):
        shelf.folder("train", "ab")


def test_files_are_read_once_by_a_process(shelf: Store, monkeypatch: pytest.MonkeyPatch):
    made(shelf)
    afresh()
    read: list[Path] = []
    monkeypatch.setattr(storing, "digest_bytes", lambda path: read.append(path) or digest_bytes(path))
    from lingraft.digests import digest_bytes

    for _ in range(3):
        shelf.folder("train", "ab")
        Store(shelf.root).folder("train", "ab")
    assert sorted(p.name for p in read) == ["a.txt", "b.bin", "c"]


def test_threads_may_read_a_step_at_once(shelf: Store):
    folder = made(shelf, files={f"{n}.bin": bytes([n]) * (1 << 20) for n in range(8)})
    afresh()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: shelf.folder("train", "ab"), range(16))) == {folder}


def test_steps_of_older_stores_without_a_seal_are_read(shelf: Store):
    folder = made(shelf)
    record = read_json(folder / RECORD)
    assert record.pop(SEAL) == digest_value(record)
    write_json(folder / RECORD, record)
    assert shelf.folder("train", "ab") == folder
    assert shelf.record("train", "ab") == record
    flipped(folder / "a.txt")
    with pytest.raises(Damaged):
        shelf.folder("train", "ab")


def test_a_crash_that_brings_back_what_was_of_the_making_only_does_no_harm(shelf: Store):
    folder = made(shelf)
    for name in ("intent.json", "extra.json", ".nfs00001"):
        (folder / name).write_text("{}")
    assert shelf.folder("train", "ab") == folder
    assert verify(folder) is None


def test_what_is_whole_is_not_set_aside(shelf: Store):
    folder = made(shelf)
    assert shelf.set_aside("train", "ab") is None
    assert shelf.set_aside("train", "cd") is None
    assert folder.is_dir()
    assert shelf.has("train", "ab")
    assert not (shelf.root / DAMAGED).exists()


def test_of_many_that_find_a_damage_one_sets_it_aside(shelf: Store):
    for attempt in range(5):
        flipped(made(shelf) / "a.txt")
        together = threading.Barrier(8)

        def one(_: int, together: threading.Barrier = together) -> str | None:
            together.wait()
            try:
                return shelf.set_aside("train", "ab")
            except Busy:
                return None

        with ThreadPoolExecutor(8) as pool:
            found = set(pool.map(one, range(8))) - {None}
        assert found == {str(shelf.root / DAMAGED / f"train-ab-{attempt}")}
    assert len(list((shelf.root / DAMAGED).iterdir())) == 10


def test_a_folder_without_its_record_makes_way(shelf: Store):
    (made(shelf) / RECORD).unlink()
    assert not shelf.has("train", "ab")
    with pytest.raises(StoreError, match="missing"):
        shelf.folder("train", "ab")
    made(shelf)
    assert shelf.check("train", "ab") is None
    assert (shelf.root / DAMAGED / "train-ab-0/a.txt").read_bytes() == b"alpha"


def test_a_step_that_another_finished_meanwhile_is_said_to_be_made(shelf: Store):
    made(shelf)
    with pytest.raises(AlreadyMade), shelf.making("train", "ab", {"n": 1}):
        pytest.fail("it is made twice")
    with pytest.raises(AlreadyMade), shelf.making("train", "cd", {"n": 1}):
        # Another host that nothing kept from it.
        (shelf.root / "train/cd").mkdir()
        (shelf.root / "train/cd/step.json").write_text("{}")
    assert sorted(p.name for p in (shelf.root / "train").iterdir()) == ["ab", "cd"]


@pytest.mark.parametrize(
    ("kind", "key"),
    [("..", "ab"), ("train", ".."), ("train", "../../etc"), ("train", "a/b"), ("/etc", "ab"), ("train", ""), ("", "ab"),
     ("train", "AB"), ("train", "ab\n"), ("damaged", "ab"), ("tra in", "ab"), ("train", "ab.")],
)  # fmt: skip
def test_no_name_leaves_the_store(shelf: Store, kind: str, key: str):
    for ask in (shelf.path, shelf.has, shelf.folder, shelf.record, shelf.set_aside, shelf.drop):
        with pytest.raises(StoreError, match="no step is called"):
            ask(kind, key)
    with pytest.raises(StoreError, match="no step is called"):
        shelf.making(kind, key, {})


def test_a_link_in_the_place_of_a_step_is_refused(shelf: Store, tmp_path: Path):
    elsewhere = made(Store(tmp_path / "other"))
    (shelf.root / "train").mkdir(parents=True)
    (shelf.root / "train/ab").symlink_to(elsewhere)
    for ask in (shelf.folder, shelf.record):
        with pytest.raises(StoreError, match="a link"):
            ask("train", "ab")
    with pytest.raises(StoreError, match="a link"), shelf.making("train", "ab", {}):
        pytest.fail("it is written through the link")
    shelf.set_aside("train", "ab")
    assert not (shelf.root / "train/ab").is_symlink()
    assert verify(elsewhere) is None


def test_what_a_full_disk_stopped_goes_on_later(shelf: Store, monkeypatch: pytest.MonkeyPatch):
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == RECORD:
            real(path, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match="no space is left"), shelf.making("train", "ab", {"n": 1}) as work:
        (work / "checkpoint").write_text("much work")
    assert not shelf.has("train", "ab")
    monkeypatch.undo()
    with shelf.making("train", "ab", {"n": 1}) as work:
        assert (work / "checkpoint").read_text() == "much work"
        assert not (work / RECORD).exists()
    assert sorted(shelf.record("train", "ab")["files"]) == ["checkpoint"]


def test_everything_is_on_the_disk_before_the_folder_has_its_name(shelf: Store, monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []
    sync, rename = storing._sync_path, Path.rename
    monkeypatch.setattr(storing, "_sync_path", lambda path: (done.append(path.name), sync(path))[1])
    monkeypatch.setattr(Path, "rename", lambda self, target: (done.append("rename"), rename(self, target))[1])
    monkeypatch.setattr(storing, "_QUICK", -1.0)
    made(shelf)
    at = done.index("rename")
    # Files and the record in any order, then folders from the lowest up, the name, and that it has it.
    assert sorted(done[:4]) == ["a.txt", "b.bin", "c", RECORD]
    assert done[4:6] == ["deep", "below"]
    assert done[6].endswith(".partial")
    assert done[7:] == ["rename", "train"]
    assert at == 7


@pytest.mark.parametrize("form", ["{}", "file://{}", "file:{}", "local://{}"])
def test_a_folder_may_be_a_url(tmp_path: Path, form: str):
    store = open_store(form.format(tmp_path / "x y"))
    assert store.root == tmp_path / "x y"
    assert store.url is None


def test_steps_and_their_sizes_are_listed_in_order(shelf: Store):
    for key in ("cd", "ab"):
        made(shelf, key)
    with pytest.raises(ZeroDivisionError), shelf.making("predict", "ef", {}):
        raise ZeroDivisionError
    (shelf.root / "train/notes.txt").write_text("mine")
    assert list(shelf.steps()) == [("train", "ab"), ("train", "cd")]
    assert list(Store(shelf.root / "nothing").steps()) == []
    for at, (count, when) in shelf.sizes().items():
        assert count == 305 + (shelf.path(*at) / RECORD).stat().st_size
        assert when == (shelf.path(*at) / RECORD).stat().st_mtime


def test_the_store_does_not_import_what_it_may_not_need():
    heavy = ("torch", "fsspec", "numpy", "pydantic")
    script = f"import sys, lingraft.store, lingraft.commands.storing\nprint([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
