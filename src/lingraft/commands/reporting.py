"""`lingraft report`: a run's results in the terminal, as files beside its manifest, and as a page."""

import importlib.util
from pathlib import Path
from typing import Any

from rich.console import Console

from lingraft.commands.collecting import collect_adapters
from lingraft.commands.watching import stderr
from lingraft.digests import digest_bytes
from lingraft.errors import MissingExtra, UserError, writing

PAGE = ("altair", "jinja2", "scipy", "vl_convert")
"""What a page is made with: the `report` extra."""
OWN = ("manifest.json", "results.json", "results.csv", "report.md", "lambda.svg", "atlas.json")
"""What else stands in a run's folder."""


def show_report(
    run_dir: Path, as_json: bool, fresh: bool = True, beside: str | None = None, html: Path | None = None
) -> dict[str, Any] | None:
    """`lingraft report`: prints the results and writes them beside the manifest; with `html` as a page, too.

    Args:
        run_dir: The run's folder.
        as_json: Give the results instead of printing them; with `html`, where the page is, too.
        fresh: Read the store again, even where the results are known.
        beside: `paper`: a paper's figures beside the run's.
        html: Where to write the page.
    """
    if html is not None:
        _check_page(html, run_dir)
    from lingraft.replacing import write_text
    from lingraft.report import paper
    from lingraft.report.results import results
    from lingraft.report.tables import csv_text, markdown
    from lingraft.report.terminal import show
    from lingraft.store import read_json, write_json

    known = read_json(run_dir / "results.json") if not fresh and (run_dir / "results.json").is_file() else {}
    if known and isinstance(known, dict) and known.get("manifest") == digest_bytes(run_dir / "manifest.json"):
        if html is not None:
            _write_page(run_dir, known, paper.beside(known) if beside else None, html)
        if as_json:
            return _with_page(known, html)
        stderr().print(f"results: lingraft report {run_dir}", markup=False, highlight=False)
        return None
    found = results(run_dir, keep=html is not None)
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
    if html is not None:
        _write_page(run_dir, found, published, html)
    if as_json:
        return _with_page(found, html)
    show(found, Console(), published)
    names = ["report.md", "results.csv", "results.json", *drawn]
    stderr().print(f"\nwritten to {run_dir}: {', '.join(names)}", markup=False, highlight=False)
    if found["adapters"]:
        stderr().print(f"adapters, as PEFT folders, in {run_dir / 'adapters'}", markup=False, highlight=False)
    return None


def _check_page(path: Path, run_dir: Path) -> None:
    """Whether a page can be made and put there; found out before anything is read.

    Raises:
        MissingExtra: What pages are made with is not installed.
        UserError: The place is a folder, or is in none, or one of the run's own files is there.
    """
    for package in PAGE:
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package.replace("_", "-") + ("-python" if package == "vl_convert" else ""), "report")
    if _is_folder(path):
        raise UserError(
            "--html names a folder", where=path, remedy=f"name the file to write, as {path / 'report.html'}"
        )
    if not _is_folder(path.absolute().parent):
        raise UserError(
            "the folder of the page does not exist", where=path.parent, remedy="make it first, or choose another"
        )
    if path.name in OWN and path.absolute().parent.resolve() == run_dir.resolve():
        raise UserError(
            "--html names one of the run's own files",
            where=path,
            remedy=f"choose another, as {run_dir / 'report.html'}",
        )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # A name that is too long.
        return False


def _write_page(run_dir: Path, found: dict[str, Any], published: Any, path: Path) -> None:
    from lingraft.replacing import write_text
    from lingraft.report.page.contents import contents
    from lingraft.report.page.rendering import page

    text = page(contents(run_dir, published, found))
    try:
        with writing(path):
            write_text(path, text)
    except OSError as error:  # A name that is too long, a place where no file can be.
        raise UserError(
            f"the page cannot be written here ({error.strerror})", where=path, remedy="choose another place or name"
        ) from error
    stderr().print(
        f"page written: {path} ({len(text.encode()) / 1e6:.1f} MB; it needs no network)", markup=False, highlight=False
    )


def _with_page(found: dict[str, Any], html: Path | None) -> dict[str, Any]:
    return found if html is None else {**found, "html": str(html)}


def _draw(found: dict[str, Any], run_dir: Path) -> list[str]:
    from lingraft.report.tables import labelled

    curved = any(selection["curve"] for selection in labelled(found).values())
    if not curved or any(importlib.util.find_spec(package) is None for package in ("altair", "vl_convert")):
        return []
    from lingraft.report.figures import draw_curves

    draw_curves(found, run_dir / "lambda.svg")
    return ["lambda.svg"]
