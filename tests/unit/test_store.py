"""Folders appear whole or not at all, whatever interrupts their making."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingraft import store
from lingraft.digests import canonical, digest_bytes, digest_file, digest_value
from lingraft.errors import StoreError, UserError
from lingraft.store import RECORD, Store, appearing, content_hashes, read_json, write_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3),
    max_leaves=10,
)
# Begins on a target, says so, and waits to be killed.
HOLDER = """
import sys, time
from pathlib import Path
from lingraft.store import appearing
with appearing(Path(sys.argv[1]), {"n": 1}) as work:
    (work / "half.txt").write_text("half")
    print("begun", flush=True)
    time.sleep(60)
"""


def begun(target: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def partial_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def interrupted(target: Path, record: dict[str, int], text: str = "half") -> None:
    with pytest.raises(ZeroDivisionError), appearing(target, record) as work:
        (work / "half.txt").write_text(text)
        raise ZeroDivisionError


def test_a_folder_appears_only_when_complete(tmp_path: Path):
    target = tmp_path / "deep" / "target"
    with appearing(target, {"n": 1}) as work:
        (work / "a.txt").write_text("a")
        assert not target.exists()
        assert work.parent == target.parent
    assert sorted(p.name for p in target.iterdir()) == ["a.txt", RECORD]
    assert not partial_of(target).exists()


def test_the_record_holds_what_was_asked_what_was_added_and_the_hash_of_every_file(tmp_path: Path):
    target = tmp_path / "target"
    with appearing(target, {"kind": "train", "n": 1}) as work:
        (work / "a.txt").write_text("a")
        (work / "sub").mkdir()
        (work / "sub" / "b.bin").write_bytes(b"\0b")
        write_json(work / "extra.json", {"seconds": 1.5})
    record = read_json(target / RECORD)
    hashes = {"a.txt": hashlib.sha256(b"a").hexdigest(), "sub/b.bin": hashlib.sha256(b"\0b").hexdigest()}
    said = {"kind": "train", "n": 1, "seconds": 1.5, "files": hashes}
    assert record == {**said, "seal": digest_value(said)}
    assert content_hashes(target) == hashes
    assert not (target / "extra.json").exists()
    assert not (target / "intent.json").exists()


def test_an_error_keeps_the_work_and_makes_no_target(tmp_path: Path):
    target = tmp_path / "target"
    interrupted(target, {"n": 1})
    assert not target.exists()
    assert (partial_of(target) / "half.txt").read_text() == "half"


def test_the_same_record_goes_on_where_it_stopped(tmp_path: Path):
    target = tmp_path / "target"
    interrupted(target, {"n": 1})
    with appearing(target, {"n": 1}) as work:
        assert (work / "half.txt").read_text() == "half"
    assert (target / "half.txt").is_file()


def test_another_record_begins_anew(tmp_path: Path):
    target = tmp_path / "target"
    interrupted(target, {"n": 1})
    with appearing(target, {"n": 2}) as work:
        assert [p.name for p in work.iterdir()] == ["intent.json"]
    assert not (target / "half.txt").exists()


@pytest.mark.parametrize("intent", [None, "", "{", "[1"])
def test_a_partial_folder_without_a_readable_intent_is_discarded(tmp_path: Path, intent: str | None):
    target = tmp_path / "target"
    partial_of(target).mkdir()
    (partial_of(target) / "stray.txt").write_text("stray")
    if intent is not None:
        (partial_of(target) / "intent.json").write_text(intent)
    with appearing(target, {"n": 1}):
        pass
    assert sorted(p.name for p in target.iterdir()) == [RECORD]


def test_tuples_in_a_record_do_not_prevent_going_on(tmp_path: Path):
    target = tmp_path / "target"
    interrupted(target, {"weights": (1, 2)})  # pyright: ignore[reportArgumentType]
    with appearing(target, {"weights": (1, 2)}) as work:
        assert (work / "half.txt").exists()


def test_an_existing_target_is_refused_and_left_alone(tmp_path: Path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"), appearing(target, {"n": 1}):
        pytest.fail("the block must not run")
    assert [p.name for p in target.iterdir()] == ["mine.txt"]


def test_two_processes_never_work_on_one_target_and_a_killed_one_leaves_none(tmp_path: Path):
    target = tmp_path / "target"
    process = begun(target)
    try:
        with pytest.raises(StoreError, match="another process"), appearing(target, {"n": 1}):
            pytest.fail("the block must not run")
        with appearing(tmp_path / "other", {"n": 1}):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not target.exists()
    # The dead process's lock is gone with it, and its work can be gone on with.
    with appearing(target, {"n": 1}) as work:
        assert (work / "half.txt").read_text() == "half"
    assert target.is_dir()


def test_a_kill_at_any_moment_leaves_the_target_whole_or_absent(tmp_path: Path):
    script = """
import sys
from pathlib import Path
from lingraft.store import appearing
print("begun", flush=True)
for number in range(10_000):
    with appearing(Path(sys.argv[1]) / f"{number}", {"n": number}) as work:
        for name in "abcd":
            (work / name).write_text(name * 1000)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    while not (tmp_path / "5").exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    finished = [p for p in tmp_path.iterdir() if not p.name.startswith(".")]
    assert len(finished) >= 5
    for folder in finished:
        assert content_hashes(folder) == read_json(folder / RECORD)["files"]
        assert sorted(content_hashes(folder)) == list("abcd")


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "no space is left"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "reports an error"),
    ],
)
def test_what_the_system_refuses_is_said_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store, "_sync", refuse)
    with pytest.raises(StoreError, match=says) as caught, appearing(tmp_path / "target", {"n": 1}) as work:
        (work / "half.txt").write_text("half")
    assert caught.value.where == str(tmp_path / "target")
    assert caught.value.remedy
    assert not (tmp_path / "target").exists()


def test_a_full_disk_at_the_very_end_makes_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "target"
    with pytest.raises(StoreError, match="no space is left"), appearing(target, {"n": 1}) as work:
        (work / "a.txt").write_text("a")
        monkeypatch.setattr(store, "_sync", full)
    assert not target.exists()


def test_a_file_where_a_folder_is_needed_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "target", tmp_path / "file" / "deep" / "target"):
        with pytest.raises(StoreError, match="a file is where a folder is needed"), appearing(target, {"n": 1}):
            pytest.fail("the block must not run")


def test_other_errors_of_the_system_keep_their_type(tmp_path: Path):
    with pytest.raises(FileNotFoundError), appearing(tmp_path / "target", {"n": 1}):
        (tmp_path / "nowhere").read_text()


def test_json_on_disk_has_sorted_keys_and_one_form(tmp_path: Path):
    write_json(tmp_path / "x.json", {"b": 1, "a": "λ"})
    write_json(tmp_path / "y.json", {"a": "λ", "b": 1})
    assert (tmp_path / "x.json").read_bytes() == (tmp_path / "y.json").read_bytes()
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "a": "λ",\n  "b": 1\n}\n'


def test_json_is_replaced_at_once_and_refuses_what_json_has_not(tmp_path: Path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_missing_or_damaged_file_is_named(tmp_path: Path):
    with pytest.raises(StoreError, match="missing"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(StoreError, match="damaged") as caught:
        read_json(tmp_path / "bad.json")
    assert caught.value.where == str(tmp_path / "bad.json")


@given(JSON)
def test_canonical_json_is_json_and_depends_on_the_value_alone(value: object):
    text = canonical(value)
    assert json.loads(text) == value
    assert canonical(json.loads(text)) == text


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_the_order_of_keys_does_not_change_a_digest(value: dict[str, int]):
    assert digest_value(value) == digest_value(dict(reversed(value.items())))


def test_canonical_json_refuses_nan():
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical(float("nan"))


@pytest.mark.parametrize("size", [10, 1 << 17])
def test_a_remembered_digest_is_the_digest_of_the_present_bytes(tmp_path: Path, size: int):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"a" * size)
    assert digest_file(path) == digest_file(path) == digest_bytes(path)
    path.write_bytes(b"b" * size + b"c")
    assert digest_file(path) == digest_bytes(path)


def test_the_store_finds_what_it_made(tmp_path: Path):
    shelf = Store(tmp_path / "store")
    assert not shelf.has("train", "ab")
    with shelf.making("train", "ab", {"n": 1}):
        assert not shelf.has("train", "ab")
    assert shelf.has("train", "ab")
    assert shelf.path("train", "ab") == tmp_path / "store" / "train" / "ab"
    assert shelf.folder("train", "ab") == tmp_path / "store" / "train" / "ab"
    assert shelf.record("train", "ab") == {"n": 1, "files": {}}
    with pytest.raises(StoreError, match="missing"):
        shelf.record("train", "cd")
