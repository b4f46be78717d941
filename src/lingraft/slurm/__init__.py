"""A plan as Slurm job arrays: `lingraft run EXPERIMENT --export slurm` writes scripts, and submits nothing."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lingraft.costs import Needs, cost, needs_of, shape_for
from lingraft.costs.needs import LOADING
from lingraft.costs.reading import Lookup, items_of
from lingraft.costs.shapes import Shape
from lingraft.errors import UserError, writing
from lingraft.locating import Located
from lingraft.plan import Plan, Step
from lingraft.slurm.scripts import (
    SITE,
    Settings,
    environment,
    finish_script,
    key_list,
    list_name,
    resolved,
    sort_of,
    submit_script,
    task_script,
)
from lingraft.slurm.waves import Array, Packing, arrays
from lingraft.store import Store

__all__ = ["Options", "export"]
_LIGHT_HOURS = 4
_UNSURE = 4
"""A task is given so many times its estimate, and an hour: one that needs more is queued again and goes on where it stopped."""


@dataclass(frozen=True)
class Options:
    """How a plan is divided and submitted.

    Attributes:
        settings: Options of `sbatch` as `key=value`, for one sort of job as `gpu.key=value`.
        steps_per_task: Evaluations or merges that one task makes; the model is loaded once for them.
        at_once: Tasks of an array that run at the same time, at most; None: as many as the cluster allows.
        largest: Tasks of an array, at most: the site's `MaxArraySize` less one.
        restarts: How often a task whose time is up is queued again.
        device: The GPU that times are reckoned for; see `costs`.
        command: What runs lingraft; empty: this Python.
    """

    settings: tuple[str, ...] = ()
    steps_per_task: int = 8
    at_once: int | None = None
    largest: int = 1000
    restarts: int = 20
    device: str = "H100"
    command: tuple[str, ...] = ()


def export(plan: Plan, store: Store, located: Located, out: Path, options: Options | None = None) -> dict[str, Any]:
    """Writes the pending steps of a plan as job arrays into `slurm/` below a run's folder.

    Exported again, what is finished by then is left out; `site.sh` stays as it is. Jobs of an earlier export that still wait are
    not disturbed: two that make the same step wait for each other.

    Args:
        plan: What to carry out.
        store: Its finished steps.
        located: The base model.
        out: The run's folder.
        options: How.

    Returns:
        `folder`, `submit` (the script to run), `steps` (how many are pending), `gpu_memory` (bytes that the largest step needs on
        a GPU; 0, or None where the model's sizes are not known) and `arrays`: name, tasks, steps, cpus, gpus, memory, hours and
        the arrays each waits for.

    Raises:
        ConfigError: A setting is no option of `sbatch` for a user to set.
        UserError: A number is not above 0.
        StoreError: The folder cannot be written.
    """
    options = options or Options()
    for name in ("steps_per_task", "at_once", "largest"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"{name.replace('_', ' ')}: {value} is not above 0", remedy="give a number from 1 on")
    experiment, shape = plan.experiment, shape_for(located)
    settings = Settings(options.settings)
    todo = [step for step in plan.steps if not store.has(step.kind, step.key)]
    asked = {step.key: needs_of(step, experiment, shape) for step in todo}
    together = 1 if experiment.trackers else experiment.speed.together
    found = arrays(todo, lambda step: asked[step.key], Packing(together, options.steps_per_task, options.largest))
    lookup = items_of(experiment)
    hours = {array.name: _hours(array, plan, shape, lookup, options.device) for array in found}
    here = (out / "slurm").absolute()
    command = options.command or (sys.executable, "-m", "lingraft.cli")
    distributed = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    said = ["backbone.trust_remote_code=true"] if experiment.backbone.trust_remote_code else []
    words = environment(here, Path.cwd(), store.location, out.absolute(), command, distributed, options.restarts, said)
    with writing(here):
        _clear(here, found)
        (here / "experiment.yaml").write_text(resolved(experiment, located.config.revision), encoding="utf-8")
        _write(here / "task.sh", files("lingraft.slurm").joinpath("task.sh").read_text(encoding="utf-8"))
        if not (here / "site.sh").exists():
            _write(here / "site.sh", SITE)
        for array in found:
            _write(here / f"{list_name(array)}.txt", key_list(array))
            script = task_script(array, experiment.name, here, settings, options.at_once, hours[array.name], words)
            _write(here / f"wave-{array.name}.sh", script)
        _write(here / "finish.sh", finish_script(found, experiment.name, here, settings, words))
        _write(here / "submit.sh", submit_script(found, here))
        (here / "submit.sh").chmod(0o755)
    gpu_memory = [asked[step.key].gpu_memory for step in todo]
    return {
        "folder": str(here),
        "submit": str(here / "submit.sh"),
        "steps": len(todo),
        "gpu_memory": None if None in gpu_memory else max((n for n in gpu_memory if n is not None), default=0),
        "arrays": [_described(array, hours[array.name]) for array in found],
    }


def _described(array: Array, hours: int | None) -> dict[str, Any]:
    needs: Needs = array.needs
    return {
        "name": array.name,
        "tasks": len(array.tasks),
        "steps": sum(map(len, array.tasks)),
        "cpus": needs.cpus,
        "gpus": needs.gpus,
        "memory": needs.memory,
        "hours": hours,
        "after": list(array.after),
    }


def _hours(array: Array, plan: Plan, shape: Shape | None, lookup: Lookup, device: str) -> int | None:
    """Hours that a task is given, from the longest task's estimate; None where none can be made."""
    sort = sort_of(array)
    if sort == "light":
        return _LIGHT_HOURS
    if sort == "cpu" or shape is None:
        return None
    longest = 0.0
    for task in array.tasks:
        steps: list[Step] = [step for step in task if step.kind in LOADING]
        found = cost(plan, shape, steps, device=device, lookup=lookup)
        if found["unknown"]:
            return None
        longest = max(longest, found["gpu_hours"])
    return 1 + -int(-_UNSURE * longest // 1)


def _clear(here: Path, found: Sequence[Array]) -> None:
    """Makes the folders, and takes away what an earlier export would have submitted, and what it says is done."""
    for folder in (here, here / "logs", here / "done"):
        folder.mkdir(parents=True, exist_ok=True)
    for path in here.glob("wave-*.sh"):
        path.unlink()
    for array in found:
        for path in (here / "done").glob(f"{list_name(array)}.*"):
            path.unlink()


def _write(path: Path, text: str) -> None:
    """Line ends of bash, whatever the platform's."""
    path.write_text(text, encoding="utf-8", newline="\n")
