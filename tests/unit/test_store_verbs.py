"""`lingraft store ls`, `verify` and `gc`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lingraft.cli import main
from lingraft.commands.collecting import collect_adapters
from lingraft.errors import StoreError
from lingraft.leases import leased
from lingraft.store import DAMAGED, RECORD, Store, verify, write_json
from tests.unit.test_store_steps import flipped, made


def asked(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["store", *map(str, arguments)])


def answered(*arguments: str | Path, code: int = 0) -> Any:
    found = asked(*arguments, "--json")
    assert found.exit_code == code, found.output
    return json.loads(found.stdout)


@pytest.fixture
def shelf(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    for key in ("ab", "cd"):
        made(store, key)
    with store.making("predict", "0123", {"n": 2}) as work:
        (work / "predictions.jsonl").write_text("{}\n")
    return store


def interrupted(store: Store, key: str) -> None:
    with pytest.raises(ZeroDivisionError), store.making("train", key, {}) as work:
        (work / "half").write_bytes(b"x" * 1000)
        raise ZeroDivisionError


def run_with(folder: Path, **manifest: Any) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "manifest.json", {"format": 2, **manifest})
    return folder


def test_steps_are_listed_with_what_is_known_of_them(shelf: Store):
    found = answered("ls", shelf.root)
    assert [(s["kind"], s["key"]) for s in found["steps"]] == [("predict", "0123"), ("train", "ab"), ("train", "cd")]
    first = found["steps"][1]
    assert (first["label"], first["language"], first["seconds"]) == ("train ab", "sw", 2.0)
    assert first["bytes"] == shelf.sizes()["train", "ab"][0]
    assert found["kinds"]["train"] == {"steps": 2, "bytes": 2 * first["bytes"], "seconds": 4.0}
    assert [s["key"] for s in answered("ls", shelf.root, "--kind", "predict")["steps"]] == ["0123"]
    text = asked("ls", shelf.root).output
    assert "train ab" in text
    assert "all" in text


def test_a_damaged_record_does_not_stop_a_listing(shelf: Store):
    (shelf.path("train", "ab") / "step.json").write_text("{")
    assert "damaged" in answered("ls", shelf.root)["steps"][1]["label"]


def test_damage_is_found_and_the_exit_code_says_so(shelf: Store):
    assert answered("verify", shelf.root)["damaged"] == []
    assert "3 steps" in asked("verify", shelf.root).output
    flipped(shelf.path("train", "cd") / "a.txt")
    (shelf.path("predict", "0123") / "predictions.jsonl").unlink()
    found = answered("verify", shelf.root, code=1)
    assert [(d["kind"], d["key"], d["what"]) for d in found["damaged"]] == [
        ("predict", "0123", "1 file is missing: 'predictions.jsonl'"),
        ("train", "cd", "1 file is changed: 'a.txt'"),
    ]
    shown = asked("verify", shelf.root)
    assert shown.exit_code == 1
    assert "--repair" in shown.output
    assert shelf.has("train", "cd")


def test_repair_sets_aside_what_is_damaged_and_nothing_else(shelf: Store):
    flipped(shelf.path("train", "cd") / "a.txt")
    assert [d["moved_to"] for d in answered("verify", shelf.root, "--repair")["damaged"]] == [
        str(shelf.root / DAMAGED / "train-cd-0")
    ]
    assert list(shelf.steps()) == [("predict", "0123"), ("train", "ab")]
    assert answered("verify", shelf.root)["damaged"] == []


def test_what_cannot_be_repaired_now_is_said(shelf: Store):
    flipped(shelf.path("train", "cd") / "a.txt")
    with leased(shelf.root / "train/.cd.lock"):
        found = answered("verify", shelf.root, "--repair", code=1)
    assert found["damaged"][0]["moved_to"] is None
    assert shelf.has("train", "cd")


def test_leftovers_go_and_steps_stay(shelf: Store):
    interrupted(shelf, "ef")
    flipped(shelf.path("train", "cd") / "a.txt")
    shelf.set_aside("train", "cd")
    kind = shelf.root / "train"
    for name in (".aa.lock", ".aa.lock.00ff", ".bb.0123.gone", ".cc.0123.fetching", ".dd.0123.partial"):
        (kind / name).write_text("")
        os.utime(kind / name, (0, 0))
    (kind / ".mine").write_text("not of the store")
    asked_first = answered("gc", shelf.root, "--dry-run")
    assert not asked_first["removed"]
    named = {entry["what"] for entry in asked_first["leftovers"]}
    assert named == {
        *(
            f"train/{n}"
            for n in (".aa.lock", ".aa.lock.00ff", ".bb.0123.gone", ".cc.0123.fetching", ".dd.0123.partial")
        ),
        "train/.ef.partial",
        f"{DAMAGED}/train-cd-0",
        f"{DAMAGED}/train-cd-0.json",
    }
    assert asked_first["bytes"] > 1000
    assert (kind / ".ef.partial").is_dir()
    done = answered("gc", shelf.root)
    assert done["leftovers"] == asked_first["leftovers"]
    assert sorted(p.name for p in kind.iterdir()) == [".mine", "ab"]
    assert list((shelf.root / DAMAGED).iterdir()) == []
    assert answered("gc", shelf.root)["leftovers"] == []
    assert answered("verify", shelf.root)["damaged"] == []


def test_what_is_being_made_stays(shelf: Store):
    with shelf.making("train", "ef", {"n": 1}) as work:
        (work / "half").write_text("half")
        assert answered("gc", shelf.root)["leftovers"] == []
        # Found as a leftover just before somebody went on with it.
        shelf.clean([work.relative_to(shelf.root).as_posix(), "train/.ef.lock"])
        assert (work / "half").read_text() == "half"
    assert shelf.has("train", "ef")


def test_steps_that_no_kept_run_needs_go(shelf: Store, tmp_path: Path):
    one = run_with(tmp_path / "one", steps=["train/ab"])
    two = run_with(tmp_path / "two", steps=["predict/0123", "train/ab", "train/99"])
    planned = answered("gc", shelf.root, "--keep", one, "--keep", two, "--dry-run")
    assert [s["what"] for s in planned["steps"]] == ["train/cd"]
    assert len(list(shelf.steps())) == 3
    assert [s["what"] for s in answered("gc", shelf.root, "--keep", one)["steps"]] == ["predict/0123", "train/cd"]
    assert list(shelf.steps()) == [("train", "ab")]
    assert sorted(p.name for p in (shelf.root / "train").iterdir()) == ["ab"]


@pytest.mark.parametrize(
    ("manifest", "says"),
    [({}, "does not say which steps"), ({"steps": ["train/99"]}, "no step of this run is in this store")],
)
def test_a_run_that_cannot_be_kept_stops_everything(shelf: Store, tmp_path: Path, manifest: dict[str, Any], says: str):
    run = run_with(tmp_path / "run", **manifest)
    interrupted(shelf, "ef")
    assert says in answered("gc", shelf.root, "--keep", run, code=2)["error"]
    assert "not a finished run" in answered("gc", shelf.root, "--keep", tmp_path / "none", code=2)["error"]
    assert len(list(shelf.steps())) == 3
    assert (shelf.root / "train/.ef.partial").is_dir()


def test_no_step_goes_while_one_is_being_made(shelf: Store, tmp_path: Path):
    run = run_with(tmp_path / "run", steps=["train/ab"])
    with shelf.making("train", "ef", {}):
        assert "being made" in answered("gc", shelf.root, "--keep", run, code=1)["error"]
    assert len(list(shelf.steps())) == 4


@pytest.mark.parametrize("verb", ["ls", "verify", "gc"])
def test_verbs_load_no_deep_learning_library(shelf: Store, verb: str):
    heavy = ("torch", "transformers", "peft", "fsspec", "pydantic")
    script = (
        "import sys\nfrom lingraft.cli import main\n"
        f"main(['store', {verb!r}, {str(shelf.root)!r}], standalone_mode=False)\n"
        f"sys.exit(str([m for m in {heavy} if m in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.stderr.strip() == "[]"


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    for verb in ("ls", "verify", "gc"):
        assert "no store here" in answered(verb, tmp_path / "none", code=2)["error"]
        assert "no store here" in asked(verb, tmp_path / "none").stderr
    assert not (tmp_path / "none").exists()


def test_a_reports_adapters_are_copied_once_whoever_else_copies_them(
    shelf: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, target = shelf.path("train", "ab"), tmp_path / "adapters"
    found = {
        "seeds": [0],
        "adapters": [{"method": "adamergex", "language": "sw", "seed": 0, "path": str(source)}],
    }
    collect_adapters(found, target)
    copied = target / "adamergex-sw"
    assert verify(copied) is None
    # Another report of the same puts its copy there in the moment between.
    (copied / RECORD).write_text("{}")
    really = shutil.rmtree

    def gone(path: Path, **options: Any) -> None:
        really(path, **options)
        if path == copied:
            shutil.copytree(source, copied)

    monkeypatch.setattr(shutil, "rmtree", gone)
    collect_adapters(found, target)
    monkeypatch.undo()
    assert verify(copied) is None
    assert [path.name for path in target.iterdir()] == ["adamergex-sw"]
    # What is no longer in the store is said, copied or not.
    really(source)
    with pytest.raises(StoreError, match="missing"):
        collect_adapters(found, target)
