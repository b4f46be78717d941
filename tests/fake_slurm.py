"""A cluster of one process: `sbatch` and `scontrol` as programs, and a loop that runs what was submitted with bash.

Options are those of `#SBATCH` lines and of the command line, as sbatch reads them. A task runs when what it depends on has ended,
in an order drawn from a seed; no more tasks of an array run at a time than its limit allows.
"""

import argparse
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

_SBATCH = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tests.fake_slurm import sbatch
sbatch(sys.argv[1:])
"""
_SCONTROL = f"""#!{sys.executable}
import os, pathlib, sys
verb, task = sys.argv[1:]
assert verb == "requeue"
(pathlib.Path(os.environ["FAKE_SLURM"]) / f"requeue-{{task}}").touch()
"""
_OPTIONS = (
    "job-name",
    "array",
    "output",
    "open-mode",
    "signal",
    "cpus-per-task",
    "gpus",
    "mem",
    "time",
    "ntasks",
    "nodes",
)
_SITE = ("account", "partition", "qos", "constraint", "gres", "mail-user", "comment")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False)
    for name in (*_OPTIONS, *_SITE, "dependency"):
        made.add_argument(f"--{name}")
    for name in ("requeue", "parsable", "exclusive"):
        made.add_argument(f"--{name}", action="store_true")
    made.add_argument("script", nargs="?")
    return made


def sbatch(arguments: Sequence[str]) -> None:
    """Notes a job, as a copy of its script: later changes of the file do not reach it."""
    folder = Path(os.environ["FAKE_SLURM"])
    if (folder / "refuse").exists() and len(list(folder.glob("job-*.json"))) >= int((folder / "refuse").read_text()):
        sys.exit("sbatch: error: Batch job submission failed: Job violates accounting/QOS policy")
    given = parser().parse_args(list(arguments))
    text = Path(given.script).read_text(encoding="utf-8")
    assert text.startswith("#!/bin/")
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            lines += shlex.split(line.removeprefix("#SBATCH "), comments=True)
        elif line and not line.startswith("#"):
            break  # Slurm reads no option behind the first command.
    options = vars(parser().parse_args(lines)) | {k: v for k, v in vars(given).items() if v}
    number = 100 + len(list(folder.glob("job-*.json")))
    size, _, limit = (options["array"] or "").partition("%")
    if size:
        first, last = map(int, size.split("-"))
        assert 0 <= first <= last <= 1000, "the array is larger than MaxArraySize"
    job = {
        **options,
        "number": number,
        "text": text,
        "cwd": str(Path.cwd()),
        "limit": int(limit or 10**6),
        "array": size,
    }
    (folder / f"job-{number}.json").write_text(json.dumps(job), encoding="utf-8")
    print(f"{number};cluster" if given.parsable else f"Submitted batch job {number}")


@dataclass
class Task:
    """A task of an array, or a job."""

    job: dict[str, Any]
    number: int | None
    restarts: int = 0
    status: int | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return f"{self.job['job_name']}" + ("" if self.number is None else f".{self.number}")


@dataclass
class Cluster:
    """What was submitted into a folder, and how it went."""

    folder: Path
    seed: int = 0
    during: Callable[[Task], int | None] = field(default=lambda task: None)
    tasks: list[Task] = field(default_factory=list)
    began: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir(parents=True, exist_ok=True)
        for name, text in (("sbatch", _SBATCH), ("scontrol", _SCONTROL)):
            path = self.folder / "bin" / name
            path.write_text(text, encoding="utf-8")
            path.chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "FAKE_SLURM": str(self.folder), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def submit(self, script: str | Path, *options: str) -> subprocess.CompletedProcess[str]:
        """Runs a script that submits jobs, from a folder that is not its own."""
        return subprocess.run(
            ["bash", str(script), *options],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def run(self) -> dict[str, int]:
        """Runs everything, and gives the exit status of every task."""
        jobs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob("job-*.json"))]
        for job in jobs:
            numbers: Sequence[int | None] = [None]
            if job["array"]:
                first, last = map(int, job["array"].split("-"))
                numbers = range(first, last + 1)
            self.tasks += [Task(job, number) for number in numbers]
        rng = random.Random(self.seed)
        while any(task.status is None for task in self.tasks):
            ready = [task for task in self.tasks if task.status is None and self._may_begin(task)]
            assert ready, "nothing can begin: a dependency is never satisfied"
            chosen = rng.choice(ready)
            # As many at a time as the array allows, two at most.
            same = [task for task in ready if task.job is chosen.job][: min(2, chosen.job["limit"])]
            for task in same:
                self._begin(task)
            for task in same:
                self._end(task)
        return {task.name: task.status for task in self.tasks if task.status is not None}

    def _may_begin(self, task: Task) -> bool:
        for asked in filter(None, (task.job["dependency"] or "").split(",")):
            kind, *numbers = asked.split(":")
            known = {other.job["number"] for other in self.tasks}
            assert kind in ("afterany", "afterok") and {int(n) for n in numbers} <= known
            before = [other for other in self.tasks if str(other.job["number"]) in numbers]
            if any(other.status is None or (kind == "afterok" and other.status) for other in before):
                return False
        return True

    def _begin(self, task: Task) -> None:
        job, number = task.job, task.number
        own = {"SLURM_JOB_ID": str(job["number"]), "SLURM_CPUS_PER_TASK": job["cpus_per_task"]}
        output = job["output"].replace("%x", job["job_name"]).replace("%j", str(job["number"]))
        if number is not None:
            own |= {"SLURM_ARRAY_JOB_ID": str(job["number"]), "SLURM_ARRAY_TASK_ID": str(number)}
            output = output.replace("%A", str(job["number"])).replace("%a", str(number))
        if task.restarts:
            own["SLURM_RESTART_COUNT"] = str(task.restarts)
        script = self.folder / f"spool-{job['number']}-{number}.sh"  # A task's own: bash reads a script as it goes on.
        script.write_text(job["text"], encoding="utf-8")
        self.began.append(task.name)
        with (Path(job["cwd"]) / output).open("ab") as log:
            # SIGINT reaches a batch script as anything it starts: not ignored.
            task.process = subprocess.Popen(
                ["bash", str(script)],
                cwd=job["cwd"],
                env=self.environment | own,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def _end(self, task: Task) -> None:
        assert task.process is not None
        wanted = self.during(task)
        if wanted == signal.SIGKILL:  # Nothing of a job that is killed survives.
            for process in psutil.Process(task.process.pid).children(recursive=True):
                process.kill()
        if wanted is not None:
            task.process.send_signal(wanted)
        task.status = task.process.wait(timeout=300)
        asked = self.folder / f"requeue-{task.job['number']}_{task.number}"
        lost = wanted in (signal.SIGKILL, signal.SIGTERM) and task.status != 0  # A node fails, or the job is preempted.
        if asked.exists() or (lost and task.job["requeue"]):
            asked.unlink(missing_ok=True)
            task.restarts, task.status = task.restarts + 1, None

    def log(self, name: str) -> str:
        """What a task wrote, all its runs together."""
        (task,) = [task for task in self.tasks if task.name == name]
        end = f"-{task.job['number']}" + ("" if task.number is None else f"_{task.number}")
        return (Path(task.job["cwd"]) / "logs" / f"{task.job['job_name']}{end}.txt").read_text(encoding="utf-8")


def waited_for(folder: Path, pattern: str, seconds: float = 60) -> None:
    """Waits for something in a folder."""
    for _ in range(int(seconds * 50)):
        if list(folder.glob(pattern)):
            return
        time.sleep(0.02)
    raise AssertionError(f"{folder / pattern} has not appeared")


def keys_of(text: str) -> list[str]:
    """Keys in a list."""
    return re.findall(r"[0-9a-f]{24}", text)
