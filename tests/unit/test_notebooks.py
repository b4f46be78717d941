"""The notebooks as they are committed: parsed, clean, and with outputs; `tests/notebooks` runs them."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PLACES = re.compile(
    r"/(home|Users|root|tmp|work|var|private|opt|usr)/|(?<![A-Za-z])[A-Za-z]:\\\\|site-packages|0x[0-9a-f]{6,}"
)


def cells(path: Path, kind: str) -> list[Any]:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def test_the_three_are_there():
    names = [path.stem for path in NOTEBOOKS]
    assert names == ["fuse-with-flare", "graft-a-task", "library-of-divergences"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_for_python(path: Path):
    found = nbformat.read(path, 4)
    nbformat.validate(found)
    assert found.metadata.kernelspec.name == "python3"
    assert cells(path, "markdown")[0].source.startswith("# ")
    for cell in cells(path, "code"):
        ast.parse(cell.source)
        assert all(len(line) <= 120 for line in cell.source.splitlines())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_from_top_to_bottom_without_errors(path: Path):
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs and {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_nothing_of_the_machine_it_ran_on(path: Path):
    text = path.read_text(encoding="utf-8")
    assert not PLACES.search(text)
    assert all(not cell.metadata for cell in nbformat.read(path, 4).cells)
    assert len(text) < 100_000 and set(json.loads(text)["metadata"]) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_takes_from_lingraft_is_there(path: Path):
    from importlib import import_module

    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lingraft"):
                module = import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names)
