"""Runs a plan: finished steps are skipped, a failure stops what depends on it, and everything finished is kept."""

import os
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lingraft.answers.scoring import MAIN
from lingraft.config import Experiment
from lingraft.costs import cost, shape_for
from lingraft.digests import digest_value
from lingraft.errors import Interrupted, LingraftError, RunFailed, UserError, suggestion
from lingraft.execution import SELECTED, SIMILARITY, Session, check_data, execute, execute_together, shape_of
from lingraft.locating import Located, locate
from lingraft.plan import Plan, Step, characters, make_plan, ordered
from lingraft.store import Store, write_json
from lingraft.tasks.table import find_task

MANIFEST = "manifest.json"
# Characters a second of Gemma 3 270M in bfloat16 on two CPU cores, until this store has measured its own.
_DEMO_RATES = {"train": 910.0, "predict": 3_200.0}


@dataclass
class Events:
    """What a run tells whoever watches it; every member may be replaced."""

    step: Callable[[Step, int, int], None] = field(default=lambda step, number, total: None)
    progress: Callable[[int, int, str], None] = field(default=lambda done, total, note: None)
    failure: Callable[[Step, LingraftError], None] = field(default=lambda step, error: None)


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    plan: Plan
    ran: int
    kept: int
    manifest: Path


def pending(plan: Plan, store: Store) -> list[Step]:
    """The steps that are not finished, in order."""
    return [step for step in plan.steps if not store.has(step.kind, step.key)]


def run(
    experiment: Experiment,
    out: str | Path,
    *,
    store: str | Path | None = None,
    on: str = "local",
    events: Events | None = None,
) -> Outcome:
    """Carries out an experiment; run again, it does only what is not finished.

    Args:
        experiment: What to compare.
        out: The folder of this run's manifest, report and adapters.
        store: The folder of finished steps, shared between runs; None: `store` beside `out`.
        on: Where to run; `local` is this process.
        events: Whom to tell.

    Returns:
        How many steps ran and how many were there already.

    Raises:
        RunFailed: Some steps failed.
        Interrupted: Ctrl-C.
        UserError: The experiment cannot be planned.
    """
    if on != "local":
        raise UserError(f"unknown runner '{on}'", remedy=suggestion(on, ["local"]))
    out, events = Path(out), events or Events()
    located = locate(experiment.backbone)
    plan = make_plan(experiment, located)
    shelf = Store(Path(store) if store is not None else out.parent / "store")
    todo = pending(plan, shelf)
    if todo:
        session = Session(experiment, located, shelf, events.progress)
        check_data(todo, session)
        _run_steps(todo, session, events)
    write_manifest(plan, located, shelf, out)
    return Outcome(plan, len(todo), len(plan.steps) - len(todo), out / MANIFEST)


def tune(experiment: Experiment, store: str | Path, *, events: Events | None = None) -> tuple[Plan, Store]:
    """Does what the choice of λ on the development languages needs, and nothing else: no target's item is read.

    Args:
        experiment: Its methods with a weight are tuned.
        store: The folder of finished steps.
        events: Whom to tell.

    Returns:
        The plan, whose selections are now finished, and the store.

    Raises:
        RunFailed: Some steps failed.
        Interrupted: Ctrl-C.
        UserError: The experiment cannot be planned, or has nothing to choose.
    """
    events, located = events or Events(), locate(experiment.backbone)
    plan = make_plan(experiment, located)
    wanted = [s for (_, language), s in plan.selections.items() if language is None and "weights" in s.config]
    if not wanted:
        raise UserError(
            "there is no weight to choose on development languages",
            remedy="give methods such as adamergex-product, and leave selection.weight out",
        )
    shelf = Store(Path(store))
    todo = [step for step in ordered(wanted) if not shelf.has(step.kind, step.key)]
    if todo:
        session = Session(experiment, located, shelf, events.progress)
        check_data(todo, session)
        _run_steps(todo, session, events)
    return plan, shelf


def _run_steps(todo: Sequence[Step], session: Session, events: Events) -> None:
    failed: set[str] = set()
    errors: list[LingraftError] = []
    # A tracker is of one training.
    most = 1 if session.experiment.trackers else session.experiment.speed.together
    shapes = {step.key: shape_of(step) for step in todo} if most > 1 else {}
    left = list(todo)
    while left:
        if any(needed.key in failed for needed in left[0].inputs.values()):
            failed.add(left.pop(0).key)
            continue
        done = len(todo) - len(left)
        group = _next_group(left, shapes, most, failed)
        left = [step for step in left if step not in group]
        try:
            for number, step in enumerate(group, done + 1):
                events.step(step, number, len(todo))
            found = _make(group, session)
        except KeyboardInterrupt:
            session.release()
            raise Interrupted(
                f"interrupted during {', '.join(repr(step.label) for step in group)} ({done} of {len(todo)} steps done)",
                remedy="run the same command again: finished steps are kept, a training goes on from its last checkpoint, and an "
                "evaluation from its last batch",
            ) from None
        for step, error in found:
            failed.add(step.key)
            errors.append(error)
            events.failure(step, error)
            if isinstance(error, UserError) and not done and len(group) == 1:
                raise error
    session.release()
    if errors:
        own, stopped = len(errors), len(failed) - len(errors)
        outcome = RunFailed(
            f"{own} step{'s' if own > 1 else ''} failed and {stopped} that depend on them did not run; the rest is finished",
            remedy="mend the cause and run the same command again",
        )
        outcome.exit_code = max(1, min(error.exit_code for error in errors))
        raise outcome


def _next_group(left: Sequence[Step], shapes: Mapping[str, str | None], most: int, failed: Set[str]) -> list[Step]:
    """The next step, and what is trained with it: trainings of its shape all of whose inputs are there."""
    first, *others = left
    shape, waiting = shapes.get(first.key), failed | {step.key for step in left}
    if shape is None:
        return [first]
    ready = (
        step
        for step in others
        if shapes[step.key] == shape and waiting.isdisjoint(needed.key for needed in step.inputs.values())
    )
    return [first, *islice(ready, most - 1)]


def _make(group: Sequence[Step], session: Session) -> list[tuple[Step, LingraftError]]:
    """Makes a step, or trainings together, and gives those that failed."""
    failed: list[tuple[Step, LingraftError]] = []
    with ExitStack() as everything:
        open_: list[tuple[Step, ExitStack, Path]] = []
        for step in group:
            own = everything.enter_context(ExitStack())
            try:
                work = own.enter_context(session.store.making(step.kind, step.key, step.identity()))
            except LingraftError as error:
                failed.append((step, error))
            else:
                open_.append((step, own, work))
        found = _made([(step, work) for step, _, work in open_], session)
        for (step, own, _), error in zip(open_, found, strict=True):
            try:
                with own:  # Its folder appears, unless there is an error.
                    if error is not None:
                        raise error
            except LingraftError as raised:
                failed.append((step, raised))
    return failed


def _made(steps: Sequence[tuple[Step, Path]], session: Session) -> list[LingraftError | None]:
    """Carries out a step, or trainings together, in working folders: for each why it failed, or None."""
    if len(steps) > 1:
        return execute_together([step for step, _ in steps], session, [work for _, work in steps])
    try:
        for step, work in steps:
            execute(step, session, work)
    except LingraftError as error:
        return [error]
    return [None] * len(steps)


def write_manifest(plan: Plan, located: Located, store: Store, out: Path) -> None:
    """Writes what a report needs to find: the folder of every number, relative to the store."""

    def place(step: Step) -> str:
        return f"{step.kind}/{step.key}"

    manifest: dict[str, Any] = {
        "format": 2,
        "experiment": plan.experiment.model_dump(mode="json"),
        "metric": main_metric(plan.experiment),
        "backbone": {"name": located.name, "digest": located.digest},
        "store": os.path.relpath(store.root, out.absolute()),
        "cells": [
            {
                "method": cell.method,
                "language": cell.language,
                "seed": cell.seed,
                "predict": place(cell.predict),
                "score": place(cell.score),
                "adapter": place(cell.adapter) if cell.adapter else None,
            }
            for cell in plan.cells
        ],
        "selections": [
            {"method": name, "language": language, "path": f"{place(step)}/{SELECTED}"}
            for (name, language), step in plan.selections.items()
        ],
        "comparisons": [
            {"language": language, "seed": seed, "path": f"{place(step)}/{SIMILARITY}"}
            for (language, seed), step in plan.comparisons.items()
        ],
        "absent": [list(entry) for entry in plan.absent],
        "plan": digest_value([step.key for step in plan.steps], 24),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MANIFEST, manifest)


def main_metric(experiment: Experiment) -> str:
    """What the experiment's task is measured by."""
    rule = find_task(experiment.task, experiment.tasks).rule(experiment.prompt)
    return MAIN[rule["kind"]]


def estimates(plan: Plan, store: Store, located: Located, device: str = "H100") -> dict[str, Any]:
    """What a run would do and about how long it takes.

    Rates come from the finished steps of this store on the same base model; the demo model has measured defaults; else the
    time is None.

    Args:
        plan: The plan.
        store: The finished steps.
        located: The base model.
        device: The GPU to reckon hours for; see `costs`.

    Returns:
        `steps` by kind (pending, finished), `seconds` on this machine or None, and `cost`, what the pending steps would take on a
        GPU (see `costs.cost`), or None where the base model's shape is not known without fetching it.
    """
    todo = pending(plan, store)
    kinds: dict[str, dict[str, int]] = {}
    waiting = {step.key for step in todo}
    for step in plan.steps:
        counts = kinds.setdefault(step.kind, {"pending": 0, "finished": 0})
        counts["pending" if step.key in waiting else "finished"] += 1
    sizes = characters(plan.experiment, plan.steps)
    rates = _rates(plan, store, sizes)
    seconds: float | None = 0.0
    for step in todo:
        if step.kind not in ("train", "predict") or step.config.get("initial"):
            continue
        if step.key not in sizes or step.kind not in rates:
            seconds = None
            break
        seconds += sizes[step.key] / rates[step.kind]
    shape = shape_for(located)
    return {
        "steps": kinds,
        "seconds": seconds,
        "cost": None if shape is None else cost(plan, shape, todo, device=device),
    }


def _rates(plan: Plan, store: Store, sizes: dict[str, int]) -> dict[str, float]:
    """Characters a second, by kind."""
    rates = dict(_DEMO_RATES) if plan.experiment.backbone.model == "demo" else {}
    sums: dict[str, list[float]] = {}
    for step in plan.steps:
        if step.key in sizes and step.kind in ("train", "predict") and store.has(step.kind, step.key):
            total = sums.setdefault(step.kind, [0.0, 0.0])
            total[0] += sizes[step.key]
            record = store.record(step.kind, step.key)
            total[1] += (record.get("seconds") or 0) / record.get("environment", {}).get("together", 1)
    return rates | {kind: done / time for kind, (done, time) in sums.items() if time > 0}
