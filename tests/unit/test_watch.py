"""`lingraft watch`: what a run writes of itself, what is read of it, how it is drawn, and how the verb ends."""

import fcntl
import json
import math
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from lingraft.cli import main
from lingraft.commands.drawing import View, bar, clock, sparkline
from lingraft.progressing import (
    FOLDER,
    GONE,
    POINTS,
    SILENT,
    Board,
    Curve,
    Recorder,
    Running,
    State,
    combined,
    sign,
    state_of,
    states,
)

NOW = 1_000_000.0


@given(st.lists(st.floats(0, 20, allow_nan=False), max_size=2000))
def test_a_curve_has_few_points_whose_mean_is_the_losses(losses: list[float]) -> None:
    curve = Curve()
    for step, loss in enumerate(losses, 1):
        curve.add(step, loss)
    points = curve.points()
    assert len(points) <= POINTS and len(points) >= min(len(losses), POINTS // 2)
    assert [step for step, _ in points] == sorted({step for step, _ in points})
    if losses:
        assert points[-1][0] == len(losses)
        ends = [0, *(step for step, _ in points)]
        for (_, mean), a, b in zip(points, ends, ends[1:], strict=False):
            assert mean == pytest.approx(sum(losses[a:b]) / (b - a))


def test_a_curve_takes_no_loss_twice_and_none_that_is_no_number() -> None:
    curve = Curve()
    for step, loss in ((1, 3.0), (1, 9.0), (2, math.nan), (3, math.inf), (4, 1.0)):
        curve.add(step, loss)
    assert curve.points() == ((1, 3.0), (4, 1.0))


def board(**todo: int) -> Board:
    found = Board()
    found.expect(todo, {})
    return found


def test_the_time_left_is_that_of_what_was_measured() -> None:
    found = board(train=3, score=5)
    assert found.state(0.0).left is None
    found.begin("a", "train a", 0.0, kind="train")
    assert (found.state(1.0).left, found.state(1.0).sure) == (None, False)
    found.progress("a", 0, 0, "loading the base model", None, 5.0)
    found.progress("a", 1, 11, "loss 2", 2.0, 10.0)
    found.progress("a", 6, 11, "loss 1", 1.0, 20.0)
    assert found.state(20.0).running[0].left == pytest.approx(10), "2 s a step, 5 steps"
    assert found.state(20.0).left == pytest.approx(10 + 2 * 30) and found.state(20.0).sure, "scores take no time"
    found.ended("a", 30.0)
    assert found.state(30.0).left == pytest.approx(60) and found.state(30.0).finished == 1


def test_two_at_a_time_take_half_as_long() -> None:
    found = board(train=4)
    for key in "ab":
        found.begin(key, key, 0.0, kind="train")
    for key in "ab":
        found.progress(key, 0, 10, "", None, 0.0)
        found.progress(key, 5, 10, "", None, 10.0)
    assert found.state(10.0).left == pytest.approx((2 * 10 + 2 * 20) / 2)


def test_what_a_checkpoint_has_kept_makes_nothing_faster() -> None:
    found = board(train=1)
    found.begin("a", "a", 0.0, kind="train")
    found.progress("a", 501, 1000, "", None, 1.0)
    found.progress("a", 511, 1000, "", None, 11.0)
    assert found.work("a", 11.0).left == pytest.approx(489)  # pyright: ignore


def test_rates_of_before_count_until_there_are_own_ones() -> None:
    found = Board()
    found.expect({"train/reference": 2, "predict/test": 1}, {"train/reference": 7.0})
    assert found.state(0.0).left == 14.0 and not found.state(0.0).sure


def test_a_step_that_fails_is_not_finished() -> None:
    found = board(train=2)
    found.begin("a", "train a", 0.0, kind="train", total=2)
    found.ended("a", 1.0)
    found.failure("train a", "it broke")
    state = found.state(1.0)
    assert (state.finished, state.failed, state.failures) == (0, 1, (("train a", "it broke"),))


def recorder(out: Path, said: list[str] | None = None, **about: Any) -> Recorder:
    return Recorder(out, State(name="tiny", plan=4, **about), (said if said is not None else []).append)


def test_what_a_run_writes_is_what_is_read(tmp_path: Path) -> None:
    writer = recorder(tmp_path)
    assert states(tmp_path) == []
    writer.start({"train": 2}, {})
    writer.tell(lambda b, now: b.begin("a", "train a", now, kind="train", total=2))
    for step in range(1, 4):
        writer.tell(lambda b, now, s=step: b.progress("a", s, 9, f"loss {s}", float(s), now))
    writer._write()
    (state,) = states(tmp_path)
    assert (state.name, state.plan, state.total, state.outcome, sign(state)) == ("tiny", 4, 2, None, "alive")
    assert (state.pid, state.running[0].label, state.running[0].done) == (os.getpid(), "train a", 3)
    assert state.running[0].losses == ((1, 1.0), (2, 2.0), (3, 3.0))
    writer.end("failed", "it broke")
    (state,) = states(tmp_path)
    assert (state.outcome, state.why, state.running, sign(state)) == ("failed", "it broke", (), "over")
    assert not [t for t in threading.enumerate() if t.name == "lingraft-progress"]
    assert [p.name for p in (tmp_path / FOLDER).iterdir()] == [
        f"{re.sub('[^A-Za-z0-9_-]', '-', state.host)}-{os.getpid()}.json"
    ]


def test_a_sign_of_life_comes_without_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lingraft import progressing

    monkeypatch.setattr(progressing, "_PAUSE", 0.02)
    monkeypatch.setattr(progressing, "_SIGN", 0.1)
    writer = recorder(tmp_path)
    writer.start({"train": 1}, {})
    first = states(tmp_path)[0].at
    end = time.monotonic() + 5
    while states(tmp_path)[0].at <= first and time.monotonic() < end:
        time.sleep(0.02)
    assert states(tmp_path)[0].at > first
    writer.end("done")


def test_a_run_that_was_refused_writes_nothing(tmp_path: Path) -> None:
    recorder(tmp_path).end("failed", "a mistake")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file_is_said_once_and_hurts_nothing(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file")
    said: list[str] = []
    writer = recorder(tmp_path, said)
    writer.start({"train": 1}, {})
    for _ in range(3):
        writer.tell(lambda b, now: b.notice("x"))
    writer.end("done")
    assert len(said) == 1 and "cannot be written" in said[0] and "nothing else is lost" in said[0]


def test_a_folder_that_takes_files_again_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lingraft import progressing

    monkeypatch.setattr(progressing, "_PAUSE", 0.02)
    monkeypatch.setattr(progressing, "_AGAIN", 0.05)
    (tmp_path / FOLDER).write_text("a file")
    said: list[str] = []
    writer = recorder(tmp_path, said)
    writer.start({"train": 1}, {})
    writer.tell(lambda b, now: b.notice("x"))
    (tmp_path / FOLDER).unlink()
    end = time.monotonic() + 5
    while not states(tmp_path) and time.monotonic() < end:
        time.sleep(0.02)
    assert states(tmp_path)[0].notices == ("x",) and len(said) == 1
    writer.end("done")
    assert states(tmp_path)[0].outcome == "done" and len(said) == 1


def test_a_disk_that_never_answers_keeps_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lingraft import progressing

    monkeypatch.setattr(progressing, "_PAUSE", 0.01)
    monkeypatch.setattr(progressing, "_SIGN", 0.05)
    writer = recorder(tmp_path)
    writer.start({"train": 1}, {})
    answers = threading.Event()
    monkeypatch.setattr(progressing, "write_text", lambda *_: answers.wait(10))
    time.sleep(0.2)
    began = time.monotonic()
    writer.end("done")
    assert time.monotonic() - began < 5
    answers.set()


def test_a_path_that_is_not_utf_8_hides_nothing(tmp_path: Path) -> None:
    writer = recorder(tmp_path)
    writer.start({"train": 1}, {})
    writer.tell(lambda b, now: b.failure("train a", "cannot read /x/\udcff.csv"))
    writer.end("failed", "cannot read /x/\udcff.csv")
    (state,) = states(tmp_path)
    assert state.why == "cannot read /x/\\udcff.csv" and state.failures[0][1] == state.why


def test_halves_of_killed_processes_are_cleared_and_those_at_work_are_not(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir()
    old, new = folder / ".a-7.json.0123abcd.half", folder / ".b-8.json.0123abcd.half"
    for path in (old, new, folder / ".mine.half"):
        path.write_text("{")
        os.utime(path, (1, 1) if path != new else None)
    writer = recorder(tmp_path)
    writer.start({"train": 1}, {})
    writer.end("done")
    assert {p.name for p in folder.iterdir() if p.name.startswith(".")} == {new.name, ".mine.half"}


def test_a_new_run_clears_what_ended_ones_left_and_strangers_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir()
    write(tmp_path, "old", outcome="failed")
    write(tmp_path, "at-work", pid=os.getppid(), machine="")
    (folder / "notes.txt").write_text("mine")
    (folder / "other.json").write_text("[1, 2]")
    recorder(tmp_path).start({"train": 1}, {})
    names = {p.name for p in folder.iterdir()}
    assert {"notes.txt", "other.json", "at-work.json"} <= names and "old.json" not in names


def test_a_task_of_some_steps_clears_nothing(tmp_path: Path) -> None:
    write(tmp_path, "old", outcome="done", only=True)
    recorder(tmp_path, only=True).start({"train": 1}, {})
    assert len(states(tmp_path)) == 2


def write(out: Path, file: str, /, **changes: Any) -> State:
    """A file of another process, which is on another machine unless it says otherwise."""
    (out / FOLDER).mkdir(exist_ok=True, parents=True)
    now = time.time()
    given = {
        "name": "tiny",
        "host": "elsewhere",
        "pid": 7,
        "machine": "x",
        "began": now - 60,
        "at": now,
        "plan": 9,
        "total": 9,
    }
    state = State(**{**given, **changes})
    (out / FOLDER / f"{file}.json").write_text(json.dumps({"format": 1, **asdict(state)}))
    return state


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["label", "losses", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(State.__dataclass_fields__, JSON)))
def test_whatever_is_in_a_file_it_is_a_state_that_can_be_drawn_or_none(values: dict[str, Any]) -> None:
    state = state_of({"format": 1, **values, "pid": 7})
    assert state is not None
    sign(state, NOW)
    one = combined([state], NOW)
    assert one is not None and all(cell_len(line.plain) <= 60 for line in View(one, one.name or "x").lines(60, 20))


def test_halves_links_pipes_and_strangers_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "good")
    folder = tmp_path / FOLDER
    (folder / "half.json").write_text('{"format": 1, "pid": 7, "na')
    (folder / ".good.json.0a1b2c3d.half").write_text("{}")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "large.json").write_text(json.dumps({"format": 1, "pid": 7, "name": "x" * (2 << 20)}))
    (folder / "other.json").write_text('{"format": 2, "pid": 7}')
    (folder / "bytes.json").write_bytes(b"\xff\xfe")
    (folder / "link.json").symlink_to("good.json")
    os.mkfifo(folder / "pipe.json")
    (folder / "folder.json").mkdir()
    assert [state.name for state in states(tmp_path)] == ["tiny"]


def test_text_of_strangers_is_text(tmp_path: Path) -> None:
    write(
        tmp_path,
        "x",
        name="\x1b[2Jtiny[red]",
        running=({"label": "a\x1b]0;x\x07[/b]\nb", "note": "\u202e"},),
        failures=(("f\r\x1b[1A", "[link=x]y"),),
    )
    said = CliRunner().invoke(main, ["watch", str(tmp_path), "--once"])
    assert said.exit_code == 0 and "\x1b" not in said.stdout and "\u202e" not in said.stdout
    assert "\\x1b[2Jtiny[red]: 0 of 9 steps" in said.stdout and "[/b] b" in said.stdout and "[link=x]y" in said.stdout


def test_signs_of_life() -> None:
    away = State(pid=7, machine="elsewhere", at=NOW)
    assert sign(away, NOW + SILENT - 1) == "alive"
    assert sign(away, NOW + SILENT + 1) == "silent"
    assert sign(away, NOW + GONE + 1) == "gone"
    assert sign(replace(away, outcome="done"), NOW + GONE + 1) == "over"


def test_a_process_of_this_machine_is_asked_for(tmp_path: Path) -> None:
    writer = recorder(tmp_path)
    writer.start({}, {})
    here = states(tmp_path)[0]
    assert sign(here) == "alive" and sign(here, here.at + 1e6) == "silent", "it is there, and says nothing"
    with subprocess.Popen(["sleep", "60"]) as other:
        gone = replace(here, pid=other.pid)
        assert sign(gone) == "alive"
        other.kill()
        end = time.monotonic() + 5
        while sign(gone) == "alive" and time.monotonic() < end:
            time.sleep(0.01)
        assert sign(gone) == "gone", "it was killed, and its parent has not asked"
    assert sign(gone) == "gone"
    writer.end("done")


def made(**changes: Any) -> State:
    return State(**{"pid": 7, "machine": "x", "at": NOW, "began": NOW - 60, "plan": 10, "total": 10, **changes})


def test_tasks_that_make_some_steps_each_are_one_run() -> None:
    tasks = [
        made(only=True, kept=2, finished=3, total=3, outcome="done", began=NOW - 50),
        made(only=True, kept=3, finished=1, total=2, began=NOW - 40, running=(Running("b"),), left=30.0),
        made(only=True, kept=5, finished=0, total=1, began=NOW - 30, running=(Running("c"),), left=90.0),
    ]
    one = combined(tasks, NOW)
    assert one is not None
    assert (one.total, one.finished, one.outcome, one.left, one.processes) == (8, 4, None, 90.0, 2)
    assert [work.label for work in one.running] == ["b", "c"]
    ended = combined(
        [replace(t, outcome="done") for t in tasks[:2]] + [replace(tasks[2], outcome="failed", why="x")], NOW
    )
    assert ended is not None and (ended.outcome, ended.why) == ("failed", "x")


def test_what_went_before_a_run_does_not_count() -> None:
    before = made(outcome="failed", began=NOW - 500, why="x", failures=(("a", "b"),))
    now = made(kept=4, total=6, finished=2)
    assert combined([before, now], NOW) == replace(now, sure=False)
    after = combined([before, replace(now, outcome="done")], NOW)
    assert after is not None and (after.outcome, after.why, after.failures) == ("done", "", ())


def test_one_of_two_that_was_killed_ends_nothing() -> None:
    killed, alive = made(at=NOW - GONE - 1, only=True), made(began=NOW - 10, only=True)
    one = combined([killed, alive], NOW)
    assert one is not None and one.outcome is None
    gone = combined([killed], NOW)
    assert gone is not None and gone.outcome == "killed"


@given(st.lists(st.floats(-5, 5), max_size=300), st.integers(0, 60), st.booleans())
def test_a_sparkline_is_no_wider_and_in_its_own_signs(values: list[float], width: int, plain: bool) -> None:
    line = sparkline(values, width, plain)
    assert len(line) == min(width, len(values)) and (line.isascii() or not plain)


def test_a_sparkline_falls_as_the_loss_does() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([2, 2, 2], 8) == "▁▁▁"
    assert sparkline([8, 4, 1], 8, ascii_only=True) == "#:_"
    assert bar(1, 2, 4) == "━━──" and bar(5, 2, 3) == "━━━" and bar(0, 0, 2, True) == ".."
    assert [clock(s) for s in (None, 0, 61, 3723)] == ["", "0:00", "1:01", "1:02:03"]


WORKS = tuple(
    Running(
        f"train 语言 seed {n}", "train", 30 + n, 120, "loss 1.234", 10.0, 20.0, tuple((i, 9.0 - i) for i in range(9))
    )
    for n in range(4)
)
BUSY = State(name="a run of some length", total=67, finished=12, failed=1, running=WORKS, left=240.0)


@given(st.integers(1, 200), st.integers(1, 30), st.booleans())
def test_no_line_is_wider_than_the_terminal_and_there_are_not_more(width: int, height: int, plain: bool) -> None:
    notes = (("failed: a step that has a long name: and what is wrong with it", "red"), ("Ctrl-C", "dim"))
    lines = View(BUSY, BUSY.name, 133.0, notes).lines(width, height, plain)
    assert 1 <= len(lines) <= height
    assert all(cell_len(line.plain) <= width and "\n" not in line.plain for line in lines)
    if plain:
        assert all(sign.isascii() or sign in "语言" for line in lines for sign in line.plain)


def test_narrow_terminals_lose_the_least_first() -> None:
    """The bar, the curve, the note, the time left: in this order."""
    seen: list[set[str]] = []
    for width in range(140, 20, -1):
        text = View(BUSY).lines(width, 30)[0].plain
        marks = {"bar": "━", "curve": "█", "note": "loss", "left": "left", "count": "30/120"}
        seen.append({name for name, mark in marks.items() if mark in text})
    order = [*dict.fromkeys(frozenset(s) for s in seen)]
    lost = [sorted(a - b) for a, b in pairwise(order)]
    assert lost == [["bar"], ["curve"], ["note"], ["left"], ["count"]]


def test_more_steps_than_lines_are_counted() -> None:
    lines = View(replace(BUSY, running=WORKS * 5), "run").lines(80, 10)
    assert len(lines) == 10 and lines[-1].plain == "and 12 more"


def watched(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["watch", *arguments])


def test_a_folder_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    said = watched(str(tmp_path / "none"))
    assert said.exit_code == 2 and "there is no such run folder" in said.stderr and "to do" in said.stderr
    (tmp_path / "file").touch()
    assert "this is no folder" in watched(str(tmp_path / "file")).stderr


def test_a_run_that_has_not_begun_says_so(tmp_path: Path) -> None:
    said = watched(str(tmp_path), "--once")
    assert said.exit_code == 0 and "no run has begun here" in said.stdout
    assert json.loads(watched(str(tmp_path), "--json").stdout)["state"] == "waiting"


def test_a_run_that_is_over_says_how(tmp_path: Path) -> None:
    write(tmp_path, "a", outcome="done", finished=9, kept=2)
    said = watched(str(tmp_path))
    assert said.exit_code == 0 and "tiny: 9 steps made, 2 were finished before" in said.stdout
    assert f"results: lingraft report {tmp_path}" in said.stdout
    write(tmp_path, "a", outcome="failed", why="1 step failed", failures=(("train a", "no space"),), finished=3)
    said = watched(str(tmp_path))
    assert said.exit_code == 1 and "failed at 3 of 9 steps: 1 step failed" in said.stdout
    assert "failed: train a: no space" in said.stdout and "mend the cause" in said.stdout
    write(tmp_path, "a", outcome="interrupted", why="interrupted during 'train a'", finished=3)
    said = watched(str(tmp_path), "--once")
    assert said.exit_code == 1 and "tiny: interrupted during 'train a'" in said.stdout


def test_a_run_that_was_killed_is_told_from_one_that_is_at_work(tmp_path: Path) -> None:
    write(tmp_path, "a", at=time.time() - GONE - 5, finished=3)
    said = watched(str(tmp_path))
    assert said.exit_code == 1 and "no sign of life for 5:0" in said.stdout and "killed at 3 of 9 steps" in said.stdout
    assert "give the run command again" in said.stdout
    assert json.loads(watched(str(tmp_path), "--json").stdout)["state"] == "killed"


def test_a_finished_run_without_such_files_is_one_that_is_done(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    said = watched(str(tmp_path))
    assert said.exit_code == 0 and "the run is finished" in said.stdout


def test_the_answer_of_a_report_that_is_there_ends_it(tmp_path: Path) -> None:
    from lingraft.digests import digest_bytes
    from tests.unit.test_report import make_run

    made_run = make_run(tmp_path)
    out = made_run if isinstance(made_run, Path) else tmp_path / "out"
    assert CliRunner().invoke(main, ["report", str(out)]).exit_code == 0
    assert json.loads((out / "results.json").read_text())["manifest"] == digest_bytes(out / "manifest.json")
    said = watched(str(out))
    answer = json.loads(watched(str(out), "--json").stdout)["answer"]
    assert said.exit_code == 0 and answer and answer in said.stdout
    (out / "results.json").write_text('{"manifest": []}')
    assert "results: lingraft report" in watched(str(out)).stdout


def test_json_has_all_of_it_once(tmp_path: Path) -> None:
    write(tmp_path, "a", running=(asdict(WORKS[0]),), left=5.0, failures=(("x", "y"),))
    found = json.loads(watched(str(tmp_path), "--json").stdout)
    keys = "run state name processes only began at plan kept total finished failed running failures notices why answer"
    assert set(found) == {*keys.split(), "seconds_left", "seconds_left_known"}
    assert found["state"] == "running" and found["seconds_left"] == 5.0
    assert found["processes"] == [
        {"host": "elsewhere", "pid": 7, "sign": "alive", "silent_seconds": found["processes"][0]["silent_seconds"]}
    ]
    assert found["running"][0]["losses"][0] == [0, 9.0] and found["failures"] == [{"step": "x", "error": "y"}]


CHILD = """
import sys, time
from pathlib import Path
from lingraft.progressing import Recorder, State
out = Path(sys.argv[1])
recorder = Recorder(out, State(name="tiny", plan=4), print)
recorder.start({"train": 4}, {})
print("here", flush=True)
for key in "abcd":
    recorder.tell(lambda b, now: b.begin(key, "train " + key, now, kind="train", total=4))
    for step in range(1, 21):
        recorder.tell(lambda b, now: b.progress(key, step, 20, f"loss {9 / step:.3f}", 9 / step, now))
        time.sleep(float(sys.argv[2]) / 80)
    recorder.tell(lambda b, now: b.ended(key, now))
recorder.end("done")
"""


def child(out: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(out), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    return process


def watch_in(out: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lingraft", "watch", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={k: v for k, v in os.environ.items() if k != "COLUMNS"} | env,
    )  # fmt: skip


@pytest.mark.parametrize("env", [{}, {"FORCE_COLOR": "1"}])
def test_a_pipe_gets_a_line_for_a_change_and_ends_with_the_run(tmp_path: Path, env: dict[str, str]) -> None:
    with child(tmp_path, 3), watch_in(tmp_path, **env) as watching:
        (tmp_path / "manifest.json").write_text("{}")
        (tmp_path / "results.json").write_text("{}")
        os.kill(watching.pid, signal.SIGCONT)
        said, errors = watching.communicate(timeout=60)
    lines = said.splitlines()
    assert watching.returncode == 0 and errors == "" and "\x1b" not in said
    assert lines[0].startswith("tiny: 0 of 4 steps; train a") or lines[0].startswith("tiny: ")
    assert "tiny: 4 steps made, 0 were finished before" in lines
    assert len(lines) <= 4


def test_a_run_that_is_killed_while_it_is_watched(tmp_path: Path) -> None:
    with child(tmp_path, 60) as running, watch_in(tmp_path) as watching:
        assert watching.stdout is not None and watching.stdout.readline().startswith("tiny: ")
        running.kill()
        said, _ = watching.communicate(timeout=30)
    assert watching.returncode == 1 and "no sign of life" in said and "give the run command again" in said


class Terminal:
    """A pseudo-terminal with a command in it."""

    def __init__(self, size: tuple[int, int], *command: str, **env: str) -> None:
        self.pid, self._file = pty.fork()
        if not self.pid:
            os.execvpe(command[0], command, PLAIN | {"TERM": "xterm-256color"} | env)
        self.seen = b""
        self.resize(*size)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._file, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        os.kill(self.pid, signal.SIGWINCH)

    def read(self, seconds: float, until: bytes = b"\0never") -> bytes:
        """What it writes meanwhile."""
        end, start = time.monotonic() + seconds, len(self.seen)
        while time.monotonic() < end and until not in self.seen[start:]:
            if select.select([self._file], [], [], 0.05)[0]:
                try:
                    data = os.read(self._file, 65536)
                except OSError:
                    break
                if not data:
                    break
                self.seen += data
        return self.seen[start:]

    def ended(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


PLAIN = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}


def test_a_terminal_shows_it_at_every_size_and_ctrl_c_ends_the_watching_alone(tmp_path: Path) -> None:
    with child(tmp_path, 60) as running:
        terminal = Terminal((100, 12), sys.executable, "-m", "lingraft", "watch", str(tmp_path))
        wide = terminal.read(20, "▁".encode())
        assert b"\x1b[?1049h" in wide and b"train a" in wide and b"steps" in wide
        terminal.resize(34, 5)
        terminal.read(1.2)
        narrow = terminal.read(1.2)
        frames = [f for f in narrow.split(b"\x1b[H") if b"tiny" in f]
        text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", frames[-1]).decode()
        lines = [line.rstrip() for line in text.split("\n")]
        assert len(lines) <= 5 and max(map(cell_len, lines)) <= 34, lines
        assert "█" not in text
        os.kill(terminal.pid, signal.SIGINT)
        end = terminal.read(10, b"goes on")
        assert b"\x1b[?1049l" in end and terminal.ended() == 0
        assert running.poll() is None
        running.kill()


@pytest.mark.parametrize("env", [{"TERM": "dumb"}])
def test_a_terminal_that_cannot_move_gets_lines(tmp_path: Path, env: dict[str, str]) -> None:
    write(tmp_path, "a", finished=3)
    terminal = Terminal((80, 10), sys.executable, "-m", "lingraft", "watch", str(tmp_path), **env)
    assert b"\x1b" not in terminal.read(15, b"steps") and b"tiny: 3 of 9 steps" in terminal.seen
    os.kill(terminal.pid, signal.SIGINT)
    terminal.read(5)
    assert terminal.ended() == 0


def test_telling_costs_a_training_next_to_nothing(tmp_path: Path) -> None:
    writer = recorder(tmp_path)
    writer.start({"train": 1}, {})
    writer.tell(lambda b, now: b.begin("a", "a", now))
    began = time.perf_counter()
    for step in range(1, 2001):
        writer.tell(lambda b, now, s=step: b.progress("a", s, 2000, "loss 1", 1.0, now))
    assert (time.perf_counter() - began) / 2000 < 2e-4, "seconds a step"
    writer.end("done")
