"""`lingraft tasks` and `methods`."""

from typing import Any

from rich.console import Console


def list_tasks(as_json: bool) -> list[dict[str, Any]] | None:
    """`lingraft tasks`."""
    from lingraft.report.terminal import lines
    from lingraft.tasks.table import TASKS

    rows = [
        {"name": t.name, "labels": list(t.answers.values()), "splits": list(t.layouts), "licence": t.licence}
        for t in TASKS.values()
    ]
    rows.append(
        {
            "name": "clm",
            "labels": [],
            "splits": ["text"],
            "licence": "reference task: language modelling on plain text",
        }
    )
    if as_json:
        return rows
    table = [[r["name"], ", ".join(r["labels"]) or "–", ", ".join(r["splits"]), r["licence"] or ""] for r in rows]
    lines(["task", "answers", "splits", "licence"], table, Console())
    return None


def list_methods(as_json: bool) -> list[dict[str, Any]] | None:
    """`lingraft methods`."""
    from lingraft.methods import METHODS
    from lingraft.report.terminal import lines

    if as_json:
        return [
            {"name": m.name, "title": m.title, "says": m.says, "tunes_weight": m.adapter == "graft"}
            for m in METHODS.values()
        ]
    lines(["method", "what it does"], [[m.name, m.says] for m in METHODS.values()], Console())
    return None
