"""`lingraft completion`, and what completes the values of options and arguments. Nothing here imports torch."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

Values = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
_QUOTED = {
    "local IFS=$'\\n'": "local IFS=$'\\n' -; set -f",
    "IFS=',' read type value": "IFS=',' read -r type value",
    "COMPREPLY+=($value)": 'printf -v value %q "$value"; COMPREPLY+=("$value")',
}
"""In click's script for bash: names are inserted as they would be typed, be there spaces, `*` or `$(…)` in them."""
_MOST = 500
"""Folders that are looked into."""


def show_script(shell: str, as_json: bool) -> dict[str, Any] | None:
    """`lingraft completion`."""
    kind = get_completion_class(shell)
    if kind is None:
        from lingraft.errors import UserError

        raise UserError(f"there is no completion for '{shell}'", remedy="use bash, zsh or fish")
    complete = kind(click.Command("lingraft"), {}, "lingraft", "_LINGRAFT_COMPLETE")
    # Without click's own look at the version of bash, which would start it.
    script = complete.source_template % complete.source_vars()
    for as_it_is, quoted in _QUOTED.items():
        script = script.replace(as_it_is, quoted)
    if as_json:
        return {"shell": shell, "script": script}
    click.echo(script)
    return None


def _beginning(found: Iterable[tuple[str, str | None]], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name, help=says) for name, says in found if name.startswith(incomplete)]


def tasks(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The tasks and the sorts of plain text."""
    from lingraft.config import TEXT_TASKS
    from lingraft.tasks.table import TASKS

    found = [(name, task.kind) for name, task in TASKS.items()]
    return _beginning([*found, *((name, "plain text") for name in TEXT_TASKS)], incomplete)


def languages(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The languages of the task that was named, or of all tasks."""
    from lingraft.languages import LANGUAGES, name_of
    from lingraft.tasks.table import TASKS

    task = TASKS.get(str(ctx.params.get("task") or ""))
    codes = task.languages if task is not None and task.languages else sorted(LANGUAGES)
    return _beginning([(code, name_of(code)) for code in codes], incomplete)


def prompts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The wordings of the task that was named, or of all tasks."""
    from lingraft.tasks.table import TASKS

    task = TASKS.get(str(ctx.params.get("task") or ""))
    rows = [task] if task is not None else list(TASKS.values())
    return _beginning([(name, None) for name in dict.fromkeys(n for row in rows for n in row.prompts)], incomplete)


def overrides(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`key=` of an experiment; after `task=` and `source=` their values."""
    from lingraft.config import Experiment

    key, sign, value = incomplete.partition("=")
    known: dict[str, Values] = {"task": tasks, "source": languages}
    if sign:
        found = known[key](ctx, param, value) if key in known else []
        return [CompletionItem(f"{key}={item.value}", help=item.help) for item in found]
    return _beginning([(f"{name}=", None) for name in Experiment.model_fields], incomplete)


def _folders(is_one: Callable[[Path], bool]) -> Values:
    """Completes folders: those that are meant; where there is none yet, any that may lead to one."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = [path for path, is_folder in _entries(incomplete) if is_folder and _holds(path, is_one)]
        return [CompletionItem(path) for path in found] or [CompletionItem(incomplete, type="dir")]

    return complete


def _holds(path: str, is_one: Callable[[Path], bool]) -> bool:
    try:
        return is_one(Path(path))
    except OSError:  # A folder that may not be looked into.
        return False


def _entries(incomplete: str) -> list[tuple[str, bool]]:
    """What the folder that was typed holds, as it would be typed, and whether it is a folder."""
    head, start = os.path.split(incomplete)
    try:
        with os.scandir(head or ".") as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries if entry.name.startswith(start))
    except OSError:
        return []
    # What a shell is given are lines: a name of several would be several.
    found = [entry for entry in found if not re.search(r"[\r\n]", entry[0])]
    shown = [entry for entry in found if start.startswith(".") or not entry[0].startswith(".")]
    return [(os.path.join(head, name), is_folder) for name, is_folder in shown[:_MOST]]  # noqa: PTH118


adapters = _folders(lambda path: (path / "adapter_config.json").is_file() or (path / "lingraft.json").is_file())
runs = _folders(lambda path: (path / "manifest.json").is_file() or (path / "progress").is_dir())


def experiments(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Experiments: YAML files; where there is none yet, whatever may lead to one."""
    found = [path for path, is_folder in _entries(incomplete) if not is_folder and path.endswith((".yaml", ".yml"))]
    return [CompletionItem(path) for path in found] or [CompletionItem(incomplete, type="file")]
