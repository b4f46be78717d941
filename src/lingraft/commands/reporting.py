"""`lingraft report`: a run's results in the terminal and as files beside its manifest."""

from pathlib import Path
from typing import Any

from rich.console import Console

from lingraft.commands.collecting import collect_adapters
from lingraft.commands.watching import stderr
from lingraft.digests import digest_bytes
from lingraft.errors import UserError, writing


def show_report(
    run_dir: Path, as_json: bool, fresh: bool = True, beside: str | None = None, html: Path | None = None
) -> dict[str, Any] | None:
    """`lingraft report`: prints the results and writes them beside the manifest."""
    from lingraft.replacing import write_text
    from lingraft.report import paper
    from lingraft.report.results import results
    from lingraft.report.tables import csv_text, markdown
    from lingraft.report.terminal import show
    from lingraft.store import read_json, write_json

    known = read_json(run_dir / "results.json") if not fresh and (run_dir / "results.json").is_file() else {}
    if known and known.get("manifest") == digest_bytes(run_dir / "manifest.json"):
        if as_json:
            return known
        stderr().print(f"results: lingraft report {run_dir}", markup=False, highlight=False)
        return None
    found = results(run_dir)
    published = paper.beside(found) if beside else None
    if published and not published[1]:
        raise UserError(
            "the paper has no figure for this task, backbone and structure",
            where=run_dir,
            remedy="leave --beside out; recipes/adamergex and recipes/flare list what the papers have",
        )
    with writing(run_dir):
        write_json(run_dir / "results.json", found)
        write_text(run_dir / "report.md", markdown(found, published))
        write_text(run_dir / "results.csv", csv_text(found))
        collect_adapters(found, run_dir / "adapters")
        drawn = _draw(found, run_dir)
    if as_json:
        return found
    show(found, Console(), published)
    names = ["report.md", "results.csv", "results.json", *drawn]
    stderr().print(f"\nwritten to {run_dir}: {', '.join(names)}", markup=False, highlight=False)
    if found["adapters"]:
        stderr().print(f"adapters, as PEFT folders, in {run_dir / 'adapters'}", markup=False, highlight=False)
    return None


def _draw(found: dict[str, Any], run_dir: Path) -> list[str]:
    import importlib.util

    from lingraft.report.tables import labelled

    if not labelled(found) or importlib.util.find_spec("matplotlib") is None:
        return []
    from lingraft.report.figures import draw_curves

    draw_curves(found, run_dir / "lambda.svg")
    return ["lambda.svg"]
