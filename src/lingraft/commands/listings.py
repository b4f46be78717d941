"""`lingraft tasks` and `methods`."""

from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from lingraft.tasks.task import Task


def list_tasks(as_json: bool) -> list[dict[str, Any]] | None:
    """`lingraft tasks`."""
    from lingraft.config import TEXT_TASKS
    from lingraft.report.terminal import lines
    from lingraft.tasks.table import TASKS

    tasks = [_described(task) for task in TASKS.values()]
    texts = [{"name": name, "kind": "text", "splits": ["text"], "says": says} for name, says in TEXT_TASKS.items()]
    if as_json:
        return [*tasks, *texts]
    rows = [[t["name"], _answers(t), _data(t), " ".join(t["prompts"])] for t in tasks]
    rows += [[t["name"], t["says"], "plain text: a reference task", ""] for t in texts]
    lines(["task", "answers: figure", "languages, licence", "prompts"], rows, Console())
    return None


def _described(task: "Task") -> dict[str, Any]:
    splits = [split for split in ("train", "validation", "test") if task.layouts.get(split)]
    return {
        "name": task.name,
        "kind": task.kind,
        "labels": list(task.answers.values()),
        "metric": task.metric,
        "languages": list(task.languages) or None,
        "splits": splits,
        "train_languages": task.languages_of("train"),
        "sample": dict(task.sample),
        "prompts": list(task.prompts),
        "head": task.head,
        "hub": list(dict.fromkeys(hub.repository for hub in task.hubs)),
        "licence": task.licence,
        "note": task.note,
    }


def _answers(task: dict[str, Any]) -> str:
    said = {"extraction": "part of the context", "number": "a number", "summary": "a sentence"}
    return f"{', '.join(task['labels']) or said[task['kind']]}: {task['metric'].replace('_', ' ')}"


def _data(task: dict[str, Any]) -> str:
    languages = " ".join(task["languages"] or ["any"])
    if "train" in task["splits"] and task["train_languages"] not in (None, task["languages"]):
        languages += f"; trained on {' '.join(task['train_languages'])}"
    return f"{languages}\n{task['licence'] or ''}"


def list_methods(as_json: bool) -> list[dict[str, Any]] | None:
    """`lingraft methods`."""
    from lingraft.config import FUSION_FUNCTIONS
    from lingraft.methods import CRITERIA, METHODS
    from lingraft.report.terminal import lines

    fused = [name for name, row in METHODS.items() if row.second in ("fused", "fused-mt")]
    if as_json:
        return [
            {
                "name": m.name,
                "title": m.title,
                "says": m.says,
                "tunes_weight": m.adapter == "graft",
                "second": m.second,
                "stack": m.stack,
                "functions": list(FUSION_FUNCTIONS) if m.name in fused else [],
            }
            for m in METHODS.values()
        ]
    console = Console()
    lines(["method", "what it does"], [[m.name, m.says] for m in METHODS.values()], console)
    rows = [
        [f"METHOD:{name}", f"a method with a weight, λ by {says}"]
        for name, says in CRITERIA.items()
        if name != "labels"
    ]
    functions = ", ".join(FUSION_FUNCTIONS)
    rows.append(["METHOD:FUNCTION", f"{', '.join(fused)}: φ, which mixes the states, is one of {functions}"])
    lines(["variant", "what it is"], rows, console)
    return None
