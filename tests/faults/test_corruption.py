"""Bytes that are not what they were: in finished steps, in work that was begun, between runs and during one.

What is damaged is noticed before anything is computed from it, set aside, and made anew with the right content.
"""

import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest

from tests.faults.children import damage
from tests.faults.laboratory import Laboratory, finished

HOW = ("flip", "truncate", "empty", "delete", "add")
FILES = {
    "train kind en": ("adapter_model.safetensors", "adapter_config.json", "lingraft.json", "metrics.jsonl"),
    "predict eng-ft seed 0 id": ("predictions.jsonl",),
    "score eng-ft seed 0 id": ("scores.json",),
    "select λ of adamergex": ("selected.json",),
    "merge adamergex sw": ("adapter_model.safetensors", "adapter_config.json", "lingraft.json"),
    "compare references sw": ("similarity.json",),
}
CASES = [(label, name, how) for label, names in FILES.items() for name in names for how in HOW]
SMOKE = [("train kind en", "adapter_model.safetensors", "flip"), ("score eng-ft seed 0 id", "scores.json", "truncate")]


def step_of(lab: Laboratory, label: str) -> str:
    return next(name for name, record in sorted(lab.baseline.items()) if record["label"].startswith(label))


def set_aside(store: Path) -> list[str]:
    folder = store / "damaged"
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.exists() else []


def repair(lab: Laboratory, store: Path) -> None:
    """What nobody has to read is found by the store's own verb."""
    child = lab.start(store, arguments=("store", "verify", "--repair", str(store)))
    assert child.wait() == 0, child.said()


@pytest.mark.parametrize(
    ("label", "name", "how"), [case if case in SMOKE else pytest.param(*case, marks=pytest.mark.full) for case in CASES]
)
def test_a_damaged_step_is_noticed_and_made_anew(lab: Laboratory, label: str, name: str, how: str) -> None:
    step = step_of(lab, label)
    # What was computed from it is to be computed again, and the report reads what is left.
    store = lab.copy(without=lab.dependants(step))
    damage(store / step, how, name)
    child = lab.finish(store)
    assert step.partition("/")[2] in child.said().replace("\n", "") and "set aside" in " ".join(child.said().split())
    assert set_aside(store) == [f"{step.replace('/', '-')}-0"]
    lab.check(store)
    shutil.rmtree(store)


@pytest.mark.full
@pytest.mark.parametrize("what", ["flip", "truncate", "empty", "no JSON", "delete"])
def test_a_damaged_record(lab: Laboratory, what: str) -> None:
    step = step_of(lab, "train kind en")
    store = lab.copy(without=lab.dependants(step))
    path = store / step / "step.json"
    if what == "no JSON":
        path.write_text("[" * 2000, encoding="utf-8")
    else:
        damage(store / step, what, "step.json")
    lab.finish(store)
    lab.check(store)


@pytest.mark.full
def test_everything_is_damaged_at_once(lab: Laboratory) -> None:
    rng = random.Random(0)
    store = lab.copy(without=lab.steps("score") + lab.steps("select"))
    for step in finished(store):
        if rng.random() < 0.5:
            damage(store / step, rng.choice(HOW[:4]))
    lab.finish(store)
    repair(lab, store)
    lab.finish(store)
    lab.check(store)


@pytest.mark.full
@pytest.mark.parametrize("label", list(FILES))
def test_a_step_damaged_as_soon_as_it_has_appeared(lab: Laboratory, label: str) -> None:
    """The process that made it reads it again before it computes from it."""
    step = step_of(lab, label)
    store = lab.copy(without=[step, *lab.dependants(step)])
    child = lab.start(store, flip=(step,), log=lab.path("log"))
    # It is damaged each time it is made: that is not tried for ever.
    code = child.wait()
    assert code in (0, 1), child.said()
    repair(lab, store)
    lab.finish(store)
    lab.check(store)


@pytest.mark.full
def test_bytes_change_while_a_run_is_at_work(lab: Laboratory) -> None:
    """Every half second a file of some finished step is damaged; then the disk is well again."""
    rng, store, stop = random.Random(1), lab.path("store"), threading.Event()
    hit: list[str] = []

    def harm() -> None:
        while not stop.wait(0.25):
            there = finished(store)
            if there:
                step = rng.choice(there)
                try:
                    damage(store / step, "flip")
                    hit.append(step)
                except OSError:
                    continue

    thread = threading.Thread(target=harm, daemon=True)
    thread.start()
    try:
        child = lab.start(store, pause=0.05)
        code = child.wait()
    finally:
        stop.set()
        thread.join(10)
    assert code in (0, 1) and hit, child.said()
    repair(lab, store)
    # Nothing was computed from what was damaged: whatever fits its record has the right content.
    for step in finished(store):
        record = json.loads((store / step / "step.json").read_text(encoding="utf-8"))
        assert record["files"] == lab.baseline[step]["files"], f"{record['label']} was made from damaged bytes"


# Work that was begun


def begun(lab: Laboratory, label: str, passes: int | None = None, point: int | None = None) -> tuple[str, Path, Path]:
    """A store in which one step was begun and its process killed, and the step's working folder."""
    step = step_of(lab, label)
    store = lab.copy(without=[step])
    child = lab.start(store, within=store, die_at_pass=passes, die_at=point)
    assert child.wait() == -9, child.said()
    (work,) = (store / step).parent.glob(".*.partial")
    return step, store, work


@pytest.mark.full
@pytest.mark.parametrize("how", [*HOW[:4], "zeros"])
def test_damaged_work_of_a_training(lab: Laboratory, how: str) -> None:
    """Checkpoint, log and intent of a training that was killed in the middle of an epoch."""
    _, store, work = begun(lab, "train kind en", passes=4)
    names = sorted(path.name for path in work.iterdir() if path.is_file())
    shutil.rmtree(store)
    assert len(names) >= 3, names
    for name in names:
        _, store, work = begun(lab, "train kind en", passes=4)
        if how == "zeros":
            path = work / name
            path.write_bytes(bytes(path.stat().st_size))
        else:
            damage(work, how, name)
        try:
            lab.finish(store)
            lab.check(store)
        except AssertionError as error:
            raise AssertionError(f"{name}, {how}: {error}") from error
        shutil.rmtree(store)


@pytest.mark.full
@pytest.mark.parametrize("how", [*HOW[:4], "another"])
def test_damaged_work_of_an_evaluation(lab: Laboratory, how: str) -> None:
    """The journal of an evaluation that was killed between two batches."""
    label = "predict adamergex seed 0 sw"
    step = step_of(lab, label)
    for point in range(6, 40):
        store = lab.copy(without=[step])
        child = lab.start(store, within=store, die_at=point)
        code = child.wait()
        journals = list(store.glob("predict/.*.partial/items.partial.jsonl"))
        if code == -9 and journals and len(journals[0].read_bytes().splitlines()) > 2:
            break
        shutil.rmtree(store)
        assert code == -9, "no moment was found at which the journal has lines"
    if how == "another":  # A score that was not found so, in a line that looks right.
        lines = journals[0].read_text(encoding="utf-8").splitlines()
        changed = lines[1].translate(str.maketrans("123456", "234567"))
        journals[0].write_text("\n".join([lines[0], changed, *lines[2:]]) + "\n", encoding="utf-8")
    else:
        damage(journals[0].parent, how, journals[0].name)
    lab.finish(store)
    lab.check(store)


@pytest.mark.full
def test_strange_things_where_work_is_to_begin(lab: Laboratory) -> None:
    """Files, links and folders that nobody of lingraft's has put there."""
    step = step_of(lab, "merge adamergex sw")
    kind, _, key = step.partition("/")
    store = lab.copy(without=[step])
    elsewhere = lab.path("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("kept")
    for name in (f".{key}.lock", f".{key}.partial", f".{key}.0123456789abcdef.partial"):
        for made in ("file", "dangling", *(("folder", "link") if name.endswith(".partial") else ())):
            path = store / kind / name
            if made == "file":
                path.write_text("{")
                os.utime(path, (1, 1))
            elif made == "folder":
                path.mkdir()
                (path / "intent.json").write_text("{}")
            else:
                path.symlink_to(elsewhere if made == "link" else elsewhere / "nothing")
            child = lab.start(store)
            code = child.wait()
            assert code == 0 or ("Traceback" not in child.said() and "unexpected" not in child.said()), (
                f"{name} is a {made}:\n{child.said()}"
            )
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)
            if code:
                lab.finish(store)
            lab.check(store)
            shutil.rmtree(store / step)
    assert (elsewhere / "precious").read_text() == "kept"


@pytest.mark.full
def test_a_training_killed_in_the_middle_of_an_epoch_goes_on_from_there(lab: Laboratory) -> None:
    for passes in (1, 4, 7):
        _, store, _ = begun(lab, "train kind en", passes=passes)
        lab.finish(store)
        lab.check(store)
        shutil.rmtree(store)
