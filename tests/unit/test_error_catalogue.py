"""Every error that a user may meet says what to do, and the page that lists them is made from the source."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lingraft import errors

ROOT = Path(__file__).parents[2]
WITHOUT_REMEDY: dict[tuple[str, str], str] = {}
"""By module and message: why nothing can be done. There is none now."""


def _catalogue() -> ModuleType:
    spec = importlib.util.spec_from_file_location("error_catalogue", ROOT / "tools" / "error_catalogue.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["error_catalogue"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def catalogue() -> ModuleType:
    return _catalogue()


@pytest.fixture(scope="module")
def entries(catalogue: ModuleType) -> list:
    return catalogue.entries(catalogue.SOURCE)


def test_every_error_says_what_to_do(entries: list) -> None:
    lacking = [
        f"{entry.module}:{entry.line}: {entry.what}"
        for entry in entries
        if entry.exit_code is not None and not entry.remedy and (entry.module, entry.what) not in WITHOUT_REMEDY
    ]
    assert not lacking, "give them a remedy:\n" + "\n".join(lacking)


def test_nearly_all_say_what_is_wrong_in_words_of_their_own(catalogue: ModuleType, entries: list) -> None:
    passed_on = [entry for entry in entries if catalogue.is_passed_on(entry)]
    assert len(passed_on) < len(entries) / 20, [f"{e.module}:{e.line}" for e in passed_on]


def test_all_calls_of_error_classes_are_in_it(catalogue: ModuleType, entries: list) -> None:
    """Another count of the same: no call with a message that is written down is missing."""
    names = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.LingraftError)}
    known = {entry.what for entry in entries}
    for path in (ROOT / "src" / "lingraft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
            if called in names - set(catalogue.INTERNAL) - {"Damaged", "MissingExtra"}:
                text = node.args[0] if node.args else None  # pyright: ignore
                if isinstance(text, ast.Constant):
                    assert text.value in known, f"{path}:{node.lineno}"  # pyright: ignore


def test_exit_codes_and_classes_are_those_of_the_errors(entries: list) -> None:
    for entry in entries:
        kind = getattr(errors, entry.kind, None)
        if kind is not None:
            assert entry.exit_code == kind.exit_code


SOURCE = {
    "errors.py": (ROOT / "src/lingraft/errors.py").read_text(encoding="utf-8"),
    "data.py": """
from lingraft.errors import DataError, MissingExtra, UserError, suggestion
WHERE = "the second row"
TABLE = (("a", "too small", "give more"), ("b", "too large", "give less"))
def refused(what, path, remedy="save it again"):
    return DataError(f"this cannot be read: {what}", where=path, remedy=remedy)
def one(name, path, rows, more):
    raise UserError(f"unknown '{name}' in {WHERE} of {len(rows)}", remedy=suggestion(name, rows))
def two(path):
    raise refused("it is empty", path)
def three(path):
    raise refused("it is old", path, "make it new")
def four(given):
    for name, what, remedy in TABLE:
        if name in given:
            raise UserError(f"{name} is {what}", remedy=remedy)
def five(more):
    raise UserError("a" if more else "b")
def six():
    raise MissingExtra("ray", "ray")
""",
}


def test_helpers_tables_constants_and_alternatives_are_resolved(catalogue: ModuleType, tmp_path: Path) -> None:
    for name, text in SOURCE.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = {e.what: (e.remedy, e.exit_code) for e in catalogue.entries(tmp_path) if e.module == "data"}
    said = "the message names the nearest known word, or all of them"
    assert found == {
        "unknown '‹name›' in the second row of ‹rows›": (said, 2),
        "this cannot be read: it is empty": ("save it again", 2),
        "this cannot be read: it is old": ("make it new", 2),
        "a is too small": ("give more", 2),
        "b is too large": ("give less", 2),
        "a": ("", 2),
        "b": ("", 2),
        "this needs the package 'ray', which is not installed": ("pip install 'lingraft[ray]'", 2),
    }


def test_the_page_lists_them_by_what_one_was_doing(catalogue: ModuleType, entries: list) -> None:
    page = catalogue.markdown()
    for title, _, _ in catalogue.GROUPS:
        assert f"\n## {title}\n" in page
    assert "there is no such run folder" in page and "## Warnings" in page
    assert "## Other" not in page, "a module belongs to no group of tools/error_catalogue.py"
    assert str(ROOT) not in page
