"""`lingraft run`, `quickstart` and `tune`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lingraft import processes
from lingraft.commands.reporting import show_report
from lingraft.commands.watching import Watcher, duration, stderr
from lingraft.config import Experiment, load_experiment
from lingraft.errors import writing
from lingraft.languages import name_of

if TYPE_CHECKING:
    from lingraft.runner import Events
    from lingraft.slurm import Options

SHORT = (
    "training.epochs=1",
    "reference_training.epochs=1",
    "reference.max_segments=16",
    "selection.weights=[0.5, 1]",
    "selection.limit=14",
    "evaluation.limit=28",
    "targets=[sw, vi]",
)
"""What `quickstart --short` changes: enough to see that everything works, too little to learn anything."""


@dataclass(frozen=True)
class Where:
    """Where steps are made and kept.

    Attributes:
        store: The folder of finished steps, or an fsspec URL; None: `store` beside the run.
        on: `local` or `ray`.
        address: Of a running Ray cluster.
        only: Keys of the only steps to make.
    """

    store: str | None = None
    on: str = "local"
    address: str | None = None
    only: tuple[str, ...] = ()


def run_experiment(
    path: Path,
    overrides: Sequence[str],
    data_dir: str | None,
    out: Path | None,
    where: Where,
    as_json: bool,
    *,
    dry_run: bool = False,
    device: str = "H100",
    export: "Options | None" = None,
) -> dict[str, Any] | None:
    """`lingraft run` and `lingraft quickstart`, in one process or in each of several that a launcher started."""
    with processes.said_once():
        return _ran(path, overrides, data_dir, out, where, as_json, dry_run, device, export)


def _ran(
    path: Path,
    overrides: Sequence[str],
    data_dir: str | None,
    out: Path | None,
    where: Where,
    as_json: bool,
    dry_run: bool,
    device: str,
    export: "Options | None",
) -> dict[str, Any] | None:
    from lingraft.runner import run

    experiment = load_experiment(path, overrides)
    if data_dir is not None:
        experiment = experiment.model_copy(update={"data_dir": data_dir})
    out = out or Path("runs") / experiment.name
    if dry_run:
        return _dry_run(experiment, out, where.store, device, as_json)
    if export is not None:
        return _export(experiment, out, where.store, export, as_json)
    quiet = as_json or not processes.is_main()
    _notices(experiment, quiet)
    with Watcher(quiet) as watcher, writing(out):
        outcome = run(
            experiment,
            out,
            store=where.store,
            on=where.on,
            address=where.address,
            only=where.only,
            events=_events(watcher),
        )
    if not processes.is_main():
        return None
    if where.only:
        return {"made": outcome.ran, "finished": outcome.kept} if as_json else None
    if outcome.ran == 0:
        done = f"all {outcome.kept} steps are finished" if outcome.kept else "no method has data"
        stderr().print(f"nothing to do: {done}", highlight=False)
    return show_report(out, as_json, fresh=outcome.ran > 0)


def tune_experiment(
    path: Path, overrides: Sequence[str], data_dir: str | None, store: str | None, as_json: bool
) -> dict[str, Any] | None:
    """`lingraft tune`."""
    from lingraft.methods import method
    from lingraft.report.terminal import show_tuning
    from lingraft.report.tuning import tuning
    from lingraft.runner import tune
    from lingraft.store import open_store

    experiment = load_experiment(path, overrides)
    if data_dir is not None:
        experiment = experiment.model_copy(update={"data_dir": data_dir})
    shelf = store or str(Path("runs") / "store")
    _notices(experiment, as_json)
    with Watcher(as_json) as watcher, writing(open_store(shelf).root):
        plan, kept = tune(experiment, shelf, events=_events(watcher))
    found = tuning(plan, kept)
    if as_json:
        return found
    show_tuning(found, {name: method(name).title for name in found}, Console())
    return None


def _events(watcher: Watcher) -> "Events":
    from lingraft.runner import Events

    return Events(watcher.step, watcher.step_progress, watcher.ended, watcher.failure, watcher.notice, watcher.planned)


def _notices(experiment: Experiment, quiet: bool) -> None:
    from lingraft.tasks.table import find_task

    if quiet:
        return
    named = [experiment.task, *([experiment.reference.task] if experiment.reference.labelled else [])]
    for task in (find_task(name, experiment.tasks) for name in dict.fromkeys(named)):
        if task.licence:
            stderr().print(f"data: {task.licence}", style="dim", markup=False, highlight=False)


def _dry_run(experiment: Experiment, out: Path, store: str | None, device: str, as_json: bool) -> dict[str, Any] | None:
    from lingraft.estimating import estimates
    from lingraft.locating import locate
    from lingraft.plan import make_plan
    from lingraft.report.terminal import lines, show_cost
    from lingraft.runner import pending
    from lingraft.store import open_store
    from lingraft.tasks.sources import without_the_hub

    with without_the_hub() as unresolved:
        located = locate(experiment.backbone)
        plan = make_plan(experiment, located)
    shelf = open_store(store or out.parent / "store")
    found = estimates(plan, shelf, located, device)
    waiting = [{"kind": s.kind, "key": s.key, "label": s.label} for s in pending(plan, shelf)]
    if as_json:
        return {**found, "pending": waiting, "absent": plan.absent, "unresolved": sorted(set(unresolved))}
    console = Console()
    trainings = [w["label"] for w in waiting if w["kind"] == "train"]
    if trainings:
        console.print("would train:", style="bold")
        for label in trainings:
            console.print(f"  {label}", markup=False, highlight=False)
    rows = [[kind, str(n["pending"]), str(n["finished"])] for kind, n in found["steps"].items()]
    lines(["steps", "to do", "finished"], rows, console)
    for name, code, reason in plan.absent:
        console.print(f"no data: {name}, {name_of(code)}: {reason}", markup=False, highlight=False)
    console.print("time here: " + duration(found["seconds"]), highlight=False)
    if found["cost"]:
        show_cost(found["cost"], console)
        if found["cost"].get("disk", 0) > 0:
            console.print(f"source states: {_bytes(found['cost']['disk'])} on disk", highlight=False)
    if unresolved:
        console.print(
            "the hub does not answer: commits were not looked up, and finished steps on its models or data are not recognised",
            style="dim",
        )
    return None


def _export(
    experiment: Experiment, out: Path, store: str | None, options: "Options", as_json: bool
) -> dict[str, Any] | None:
    from lingraft.locating import locate
    from lingraft.plan import make_plan
    from lingraft.report.terminal import lines
    from lingraft.slurm import export
    from lingraft.store import open_store

    located = locate(experiment.backbone)
    plan = make_plan(experiment, located)
    found = export(plan, open_store(store or out.parent / "store"), located, out, options)
    if as_json:
        return found
    console = Console()
    rows = [
        [
            array["name"],
            str(array["tasks"]),
            str(array["steps"]),
            str(array["cpus"]),
            str(array["gpus"]),
            "unknown" if array["memory"] is None else _bytes(array["memory"]),
            "site's" if array["hours"] is None else str(array["hours"]),
        ]
        for array in found["arrays"]
    ]
    lines(["array", "tasks", "steps", "cpus", "gpus", "memory", "hours"], rows, console)
    if not found["steps"]:
        console.print("all steps are finished: only the report is left to write", highlight=False)
    console.print(f"submit with: bash {found['submit']}", markup=False, highlight=False)
    return None


def _bytes(count: float) -> str:
    """A size on disk, in powers of ten as `fusion.cache_limit` has it."""
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
