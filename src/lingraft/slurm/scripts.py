"""The text of an export: job scripts, lists of keys, the experiment as it was resolved. Nothing from data is left unquoted."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from lingraft.config import Experiment, parse_yaml
from lingraft.digests import digest_value
from lingraft.errors import ConfigError
from lingraft.slurm.waves import Array, gib

NOTICE = 120
"""Seconds before the end of a task's time at which it is told."""
_OURS = (
    *("array", "dependency", "output", "error", "open-mode", "job-name", "requeue", "no-requeue", "signal", "chdir"),
    *("wrap", "parsable", "test-only", "wait", "hold", "ntasks", "nodes"),
)
SORTS = ("gpu", "cpu", "light")
SITE = """\
# shellcheck shell=bash
# Read by every job before it begins: modules, environments, caches. Yours to edit; another export leaves it as it is.
# module load cuda
# source ~/miniforge3/bin/activate lingraft
# export HF_HUB_OFFLINE=1
# lingraft=(apptainer exec --nv "$HOME/lingraft.sif" lingraft)
"""


class Settings:
    """What the site wants of `sbatch`: `key=value`, `key`, or for one sort of job `gpu.key=value`.

    Args:
        given: As the user wrote them.

    Raises:
        ConfigError: One is no option of `sbatch` for a user to set, or holds what has a meaning to a shell or in a script.
    """

    def __init__(self, given: Sequence[str] = ()) -> None:
        self._of: dict[str, dict[str, str | None]] = {sort: {} for sort in SORTS}
        for sorted_first in (False, True):  # What is said of one sort of job goes before what is said of all.
            for text in given:
                name, sign, value = text.partition("=")
                sort, dot, key = name.partition(".")
                if not dot:
                    sort, key = "", name
                if bool(dot) is sorted_first:
                    self._take(text, sort, key, value if sign else None)

    def _take(self, text: str, sort: str, key: str, value: str | None) -> None:
        if sort and sort not in SORTS:
            raise ConfigError(f"--slurm {text!r}: there is no sort of job '{sort}'", remedy=f"use {', '.join(SORTS)}")
        if not re.fullmatch("[a-z][a-z0-9-]*", key):
            raise ConfigError(f"--slurm {text!r} is no option of sbatch", remedy="write key=value, such as account=nlp")
        if key in _OURS:
            raise ConfigError(f"--slurm {text!r}: lingraft sets '{key}' itself", remedy="leave it out")
        if value is not None and not re.fullmatch(r"[A-Za-z0-9._:,/=+@%*&|()\[\]-]+", value):
            raise ConfigError(
                f"--slurm {text!r}: the value has blanks, quotes or other signs that job scripts do not hold",
                remedy="give it to slurm/submit.sh instead, which hands its options on to sbatch",
            )
        for one in [sort] if sort else SORTS:
            self._of[one][key] = value

    def lines(self, sort: str, own: Mapping[str, str | None]) -> list[str]:
        """`#SBATCH` lines of a sort of job: the user's own go before what is derived."""
        theirs = self._of[sort]
        instead = {"gpus": {"gres", "gpus-per-node", "gpus-per-task"}, "mem": {"mem-per-cpu", "mem-per-gpu"}}
        kept = {k: v for k, v in own.items() if k not in theirs and not instead.get(k, set()) & set(theirs)}
        every = {**kept, **theirs}
        return [f"#SBATCH --{key}" + ("" if value is None else f"={value}") for key, value in every.items()]


def task_script(
    array: Array, name: str, here: Path, settings: Settings, at_once: int | None, hours: int | None, environment: str
) -> str:
    """The script of a job array.

    Args:
        array: Its tasks.
        name: The experiment's.
        here: The folder of the export.
        settings: The site's.
        at_once: How many of its tasks run at the same time, at most; None: as many as the cluster allows.
        hours: What a task is given; None: the site's own limit.
        environment: The lines that say what is run, and where.
    """
    needs, sort = array.needs, sort_of(array)
    limit = "" if at_once is None else f"%{at_once}"
    own: dict[str, str | None] = {"cpus-per-task": str(needs.cpus)}
    if needs.gpus:
        own["gpus"] = str(needs.gpus)
    if needs.memory is not None:
        own["mem"] = f"{gib(needs.memory)}G"
    if hours is not None:
        own["time"] = f"{hours}:00:00"
    lines = [
        "#!/bin/bash",
        *_header(f"{name}-{array.name}"),
        f"#SBATCH --array=1-{len(array.tasks)}{limit}",
        "#SBATCH --output=logs/%x-%A_%a.txt",
        "#SBATCH --requeue",
        f"#SBATCH --signal=B:USR1@{NOTICE}",
        *settings.lines(sort, own),
        *_begin(here, environment),
        f"task {list_name(array)} {needs.gpus}",
    ]
    return "\n".join(lines) + "\n"


def finish_script(arrays: Sequence[Array], name: str, here: Path, settings: Settings, environment: str) -> str:
    """The script of the last job: manifest and report."""
    own: dict[str, str | None] = {"cpus-per-task": "1", "mem": "2G", "time": "1:00:00"}
    lines = [
        "#!/bin/bash",
        *_header(f"{name}-finish"),
        "#SBATCH --output=logs/%x-%j.txt",
        "#SBATCH --requeue",
        *settings.lines("light", own),
        *_begin(here, environment),
        " \\\n  ".join(["finish", *(f"{list_name(array)} {len(array.tasks)}" for array in arrays)]),
    ]
    return "\n".join(lines) + "\n"


def submit_script(arrays: Sequence[Array], here: Path) -> str:
    """The script that submits everything.

    A job begins when those that make its inputs have ended, whether well or not (`afterany`): with `afterok` one failed task
    would keep all tasks of the next array from running, those too that do not need it. A task whose inputs are not there says so
    and ends.
    """
    lines = [
        "#!/bin/bash",
        "# Submits all jobs of this export; options are handed on to sbatch.",
        "# shellcheck disable=SC2016",
        "set -Eeuo pipefail",
        f"cd -- {quote(str(here))}",
        'jobs=() more=("$@")',
        "failed() {",
        '  echo "error: not all was submitted${jobs[*]+; to cancel what was: scancel ${jobs[*]}}" >&2',
        "}",
        "trap failed ERR",
        "submit() {",
        '  job=$(sbatch --parsable ${more[@]+"${more[@]}"} "$@")',
        "  job=${job%%;*}",
        "  [[ $job =~ ^[0-9]+$ ]]",
        '  jobs+=("$job")',
        '  echo "job $job: ${*: -1}"',
        "}",
    ]
    for array in arrays:
        after = "".join(f":${{{_variable(name)}}}" for name in array.after)
        given = f' --dependency="afterany{after}"' if after else ""
        lines += [f"submit{given} wave-{array.name}.sh", f"{_variable(array.name)}=$job"]
    after = "".join(f":${{{_variable(array.name)}}}" for array in arrays)
    lines.append("submit" + (f' --dependency="afterany{after}"' if after else "") + " finish.sh")
    return "\n".join(lines) + "\n"


def environment(
    here: Path,
    where: Path,
    store: str,
    out: Path,
    command: Sequence[str],
    distributed: Sequence[str],
    restarts: int,
    said: Sequence[str] = (),
) -> str:
    """The lines that tell a job what to run: shell words, each quoted; `said` is what a file alone cannot ask for."""
    values = {
        "here": str(here),
        "where": str(where),
        "experiment": str(here / "experiment.yaml"),
        "store": store,
        "out": str(out),
    }
    lines = [f"{name}={quote(value)}" for name, value in values.items()]
    lines.append(f"lingraft=({' '.join(map(quote, command))})")
    lines.append(f"distributed=({' '.join(map(quote, distributed))})")
    lines.append(f"said=({' '.join(map(quote, said))})")
    lines.append(f"restarts={restarts}")
    return "\n".join(lines)


def key_list(array: Array) -> str:
    """A line for every task: its steps' keys."""
    return "".join(",".join(step.key for step in task) + "\n" for task in array.tasks)


def list_name(array: Array) -> str:
    """The name of an array's list, which its content is part of: a job that waits since an earlier export finds its own."""
    return f"steps-{array.name}-{digest_value(key_list(array), 8)}"


def sort_of(array: Array) -> str:
    """`gpu`, `cpu` or `light`."""
    return array.name.split("-")[1]


class _Dumper(yaml.SafeDumper):
    """YAML that `config.parse_yaml` reads back as it was: texts that it takes for numbers are quoted."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    try:
        plain = parse_yaml(value) == value
    except yaml.YAMLError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def resolved(experiment: Experiment, revision: str | None) -> str:
    """An experiment as YAML that means the same from any folder, its model's commit filled in."""
    tree: dict[str, Any] = experiment.model_dump(mode="json")
    for part in (tree, tree["reference"]):
        if part["data_dir"] not in (None, "bundled"):
            part["data_dir"] = str(Path(part["data_dir"]).absolute())
    tree["backbone"]["revision"] = revision
    tree["backbone"]["trust_remote_code"] = False  # The command says it: see `environment`.
    text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return f"# Written with the job scripts beside it: later changes of the original do not reach them.\n{text}"


def _header(name: str) -> list[str]:
    return [f"#SBATCH --job-name={name}", "#SBATCH --ntasks=1", "#SBATCH --nodes=1", "#SBATCH --open-mode=append"]


def _begin(here: Path, environment: str) -> list[str]:
    # Names stand in single quotes whatever is in them, and are used in the file that is read last.
    unfounded = "# shellcheck disable=SC2016,SC2034"
    return [unfounded, environment, "# shellcheck source=/dev/null", '. "$here/task.sh"']


def _variable(name: str) -> str:
    return "job_" + name.replace("-", "_")
