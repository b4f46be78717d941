"""`lingraft watch`: a run of another process, as it goes on."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from lingraft import bounded
from lingraft.commands.drawing import View, clock, time_left
from lingraft.commands.terminals import json_text
from lingraft.commands.watching import is_live, stderr
from lingraft.digests import digest_bytes
from lingraft.errors import UserError
from lingraft.escaping import one_line, printable
from lingraft.progressing import State, combined, may_report, sign, states

LOOK = 1.0
"""Seconds between looks at the run's files."""
SAID = 30.0
"""Seconds between lines where there is no terminal and nothing but time goes on."""
_REPORT = 15.0
"""Seconds that a run which is over is given to write its report."""
_SHOWN = 3


def watch_run(run_dir: Path, once: bool, as_json: bool) -> dict[str, Any] | None:
    """`lingraft watch`: shows a run until it is over, or as it is now.

    Args:
        run_dir: The run's folder.
        once: Say how it stands, and end.
        as_json: As JSON; once, too.

    Raises:
        UserError: There is no such folder.
    """
    if not run_dir.is_dir():
        raise UserError(
            "there is no such run folder" if not run_dir.exists() else "this is no folder",
            where=run_dir,
            remedy="give the --out folder of `lingraft run`; it is there once the first step begins",
        )
    if as_json:
        found = _described(run_dir)
        click.echo(json_text(found, 2))
        sys.exit(_code(found["state"]))
    if once:
        state = _seen(run_dir, states(run_dir))
        for line in _told(run_dir, state, states(run_dir)):
            click.echo(line)
        sys.exit(_code(_stands(state)))
    console = Console()
    try:
        state = _live(run_dir, console) if is_live(console) else _lines(run_dir)
    except KeyboardInterrupt:
        stderr().print("the watching has ended; the run goes on", style="dim")
        return None
    for line in _told(run_dir, state, states(run_dir)):
        click.echo(line)
    sys.exit(_code(_stands(state)))


def _stands(state: State | None) -> str:
    """`waiting`, `running`, `done`, `failed`, `interrupted` or `killed`."""
    return "waiting" if state is None else state.outcome or "running"


def _code(stands: str) -> int:
    return 1 if stands in ("failed", "interrupted", "killed") else 0


def _seen(run_dir: Path, found: Sequence[State]) -> State | None:
    """How far the run is; of one that is over and left no such file, that it is done."""
    state = combined(found)
    if state is None and (run_dir / "manifest.json").is_file():
        return State(name=run_dir.resolve().name, outcome="done")
    return state


def _described(run_dir: Path) -> dict[str, Any]:
    found = states(run_dir)
    state = _seen(run_dir, found)
    processes = [{"host": s.host, "pid": s.pid, "sign": sign(s), "silent_seconds": _silent(s)} for s in found]
    stands = _stands(state)
    known = replace(state or State(), outcome=None if stands in ("waiting", "running") else stands)
    values = {k: v for k, v in asdict(known).items() if k not in ("machine", "host", "pid", "outcome")}
    values["failures"] = [{"step": label, "error": what} for label, what in known.failures]
    values["seconds_left"], values["seconds_left_known"] = values.pop("left"), values.pop("sure")
    answer = _answer(run_dir) if stands == "done" else None
    return {"run": str(run_dir), "state": stands, **values, "processes": processes, "answer": answer}


def _silent(state: State) -> float:
    return 0.0 if state.outcome is not None else round(max(0.0, time.time() - state.at), 1)


def _told(run_dir: Path, state: State | None, found: Sequence[State]) -> list[str]:
    """How a run stands, in lines of plain text."""
    folder = one_line(str(run_dir))
    if state is None:
        return [f"{folder}: no run has begun here"]
    stands, again = _stands(state), "give the run command again: what was finished is kept"
    head = f"{one_line(state.name)}: "
    if stands == "running":
        lines = [head + _summary(state)]
        for work in state.running:
            parts = [f"{work.done}/{work.total}" if work.total else "", work.note]
            parts.append(f"{clock(work.left)} left" if work.left is not None else f"{clock(work.seconds)} so far")
            lines.append(f"  {one_line(work.label)}: {', '.join(one_line(p) for p in parts if p)}")
        return [*lines, *_trouble(state, found)]
    if stands == "done":
        made = (
            f"{state.finished} steps made, {state.kept} were finished before" if state.plan else "the run is finished"
        )
        answer = _answer(run_dir)
        return [head + ("all steps are finished" if state.plan and not state.finished else made)] + (
            [answer] if answer else [f"results: lingraft report {folder}"]
        )
    if stands == "killed":
        said = max((_silent(s) for s in found if sign(s) == "gone"), default=0.0)
        what = f"no sign of life for {clock(said)}: the run was killed at {_count(state)}"
    else:
        why = one_line(state.why) or "it does not say why"
        what = why if stands == "interrupted" and state.why else f"{stands} at {_count(state)}: {why}"
    failures = [f"  failed: {one_line(label)}: {one_line(text)}" for label, text in state.failures]
    return [head + what, *failures, f"  to do: {'mend the cause and ' if stands == 'failed' else ''}{again}"]


def _count(state: State) -> str:
    return f"{state.finished} of {state.total} steps"


def _summary(state: State) -> str:
    parts = [_count(state), f"{state.failed} failed" if state.failed else "", time_left(state)]
    return ", ".join(part for part in parts if part)


def _trouble(state: State, found: Sequence[State]) -> list[str]:
    """Failures, and processes of which nothing is heard."""
    lines = [f"failed: {one_line(label)}: {one_line(what)}" for label, what in state.failures]
    for process in found:
        heard = sign(process)
        if heard in ("silent", "gone") and state.outcome is None:
            which = f"process {process.pid} on {one_line(process.host)}"
            lines.append(f"no sign of life for {clock(_silent(process))}: {which}" + (", killed" * (heard == "gone")))
    return lines


def _answer(run_dir: Path) -> str | None:
    """What the run found, in a sentence; None: its report is not there, or of another state of it."""
    from lingraft.report.headline import headline

    try:
        found = bounded.read(run_dir / "results.json")
        if found.get("manifest") != digest_bytes(run_dir / "manifest.json"):
            return None
        return one_line(str(headline(found)["answer"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):  # Anybody may have written it.
        return None


def _is_over(run_dir: Path, state: State | None, since: float) -> bool:
    """Whether there is nothing to wait for: the run is over, and its report is there or is not to be expected."""
    if state is None or state.outcome is None:
        return False
    waits = state.outcome == "done" and may_report(state) and time.monotonic() - since < _REPORT
    return not waits or _answer(run_dir) is not None


def _live(run_dir: Path, console: Console) -> State | None:
    """Draws the run over itself until it is over."""
    from rich.live import Live

    found = states(run_dir)
    state = _seen(run_dir, found)
    over = 0.0 if state is not None and state.outcome is not None else None
    if over is not None:
        return state
    began = time.monotonic()

    def view() -> View:
        return _view(run_dir, state, found, time.monotonic() - began)

    with Live(console=console, get_renderable=view, refresh_per_second=2, screen=True):
        while True:
            time.sleep(LOOK)
            found = states(run_dir)
            state = _seen(run_dir, found)
            if state is None or state.outcome is None:
                over = None
            elif over is None:
                over = time.monotonic()
            if over is not None and _is_over(run_dir, state, over):
                return state


def _view(run_dir: Path, state: State | None, found: Sequence[State], since: float) -> View:
    if state is None:
        waiting = f"{run_dir}: no run has begun here; waiting for {clock(since)}"
        return View(State(), notes=((one_line(waiting), ""), (_KEYS, "dim")))
    heard = [process for process in found if sign(process) in ("alive", "silent")]
    hosts = {process.host for process in heard}
    notes = [(text, "dim") for text in state.notices[-_SHOWN:]]
    notes += [(text, "red") for text in _trouble(state, found)[-_SHOWN:]]
    if len(heard) > 1 or state.processes > 1:
        where = f" on {len(hosts)} hosts" if len(hosts) > 1 else ""
        notes.append((f"{state.processes} processes{where}", "dim"))
    if state.outcome == "done":
        notes.append(("all steps are made; waiting for the report", ""))
    notes.append((_KEYS, "dim"))
    elapsed = max(0.0, time.time() - state.began) if state.began else None
    return View(state, printable(state.name) or "run", elapsed, tuple((one_line(text), style) for text, style in notes))


_KEYS = "Ctrl-C ends the watching, not the run"


def _lines(run_dir: Path) -> State | None:
    """Prints a line where something has changed, at most every 30 seconds, and trouble at once, until the run is over."""
    said, last, over, seen = "", 0.0, None, None
    while True:
        found = states(run_dir)
        state = _seen(run_dir, found)
        now = time.monotonic()
        if state is not None and state.outcome is not None:
            over = (now if seen is not None else 0.0) if over is None else over
            if not over or _is_over(
                run_dir, state, over
            ):  # Over before anything was seen of it: nothing is waited for.
                return state
        else:
            over = None
            text, trouble = _line(run_dir, state, found), (state is None, state is not None and state.failed)
            if trouble != seen or (text != said and now - last >= SAID):
                click.echo(text)
                sys.stdout.flush()
                said, last, seen = text, now, trouble
        time.sleep(LOOK)


def _line(run_dir: Path, state: State | None, found: Sequence[State]) -> str:
    """All of it in one line."""
    if state is None:
        return f"{one_line(str(run_dir))}: no run has begun here; waiting"
    at = [f"{w.label} {w.done}/{w.total} {w.note}".rstrip() if w.total else w.label for w in state.running]
    return one_line("; ".join([f"{state.name}: {_summary(state)}", *at, *_trouble(state, found)]))
