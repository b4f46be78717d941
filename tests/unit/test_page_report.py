"""`lingraft report --html`: where the page goes, what is refused before anything is read, and the drawing beside the report."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("altair")
pytest.importorskip("jinja2")
pytest.importorskip("vl_convert")

from click.testing import CliRunner

from lingraft.cli import main
from lingraft.commands.reporting import show_report
from lingraft.errors import MissingExtra, StoreError, UserError
from lingraft.report.figures import draw_curves
from lingraft.report.page.contents import contents
from lingraft.report.page.rendering import page
from lingraft.report.results import results
from tests.unit.test_atlas import train_steps
from tests.unit.test_page import Parsed
from tests.unit.test_report import RIGHT, make_run


def finished(folder: Path, right: Any = RIGHT, **experiment: Any) -> Path:
    """A run made by hand whose manifest lists its steps, as those of real runs do."""
    make_run(folder, right, **experiment)
    manifest = json.loads((folder / "manifest.json").read_text())
    places = [
        *(c["predict"] for c in manifest["cells"]),
        *(c["path"].rpartition("/")[0] for c in manifest["selections"]),
    ]
    manifest["steps"] = list(dict.fromkeys(places))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("run"))


def test_the_page_is_written_and_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "report.html"
    assert show_report(run, as_json=False, html=target) is None
    parsed = Parsed(target.read_text(encoding="utf-8"))
    assert "by-hand" in parsed.text and "AdaMergeX" in parsed.text
    assert str(target) in " ".join(capsys.readouterr().err.split("\n"))


def test_json_says_where_the_page_is(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    done = CliRunner().invoke(main, ["report", str(run), "--html", str(target), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["html"] == str(target)
    assert target.is_file()
    assert "html" not in json.loads((run / "results.json").read_text()), "results are results"


def test_the_page_is_written_where_the_results_are_known(run: Path, tmp_path: Path) -> None:
    show_report(run, as_json=True)
    found = show_report(run, as_json=True, fresh=False, html=tmp_path / "again.html")
    assert found is not None and found["html"] == str(tmp_path / "again.html")
    assert (tmp_path / "again.html").is_file()


def test_the_page_of_a_run_is_the_same_each_time(run: Path, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        show_report(run, as_json=True, html=tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_page_is_the_same_whether_or_not_the_atlas_is_known(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    train_steps(run, ("en", "sw", "vi", "tr"))
    pages = [page(contents(run)) for _ in range(2)]
    assert (run / "atlas.json").is_file()
    assert "Most alike are" in pages[0]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("name", ["manifest.json", "results.json", "report.md"])
def test_no_file_of_the_runs_own_is_replaced(run: Path, name: str) -> None:
    before = (run / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="one of the run's own files"):
        show_report(run, True, html=run / name)
    assert (run / "manifest.json").read_bytes() == before


def test_a_name_that_cannot_be_is_refused_in_words(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written here"):
        show_report(run, True, html=tmp_path / ("x" * 300 + ".html"))


def test_a_folder_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names a folder"):
        show_report(run, as_json=True, html=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        show_report(run, as_json=True, html=tmp_path / "none" / "report.html")


def test_a_missing_extra_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "vl_convert" else there(name, *more)
    )
    with pytest.raises(MissingExtra, match="vl-convert-python") as raised:
        show_report(tmp_path / "no run", as_json=True, html=tmp_path / "report.html")
    assert raised.value.remedy == "pip install 'lingraft[report]'"


def test_without_the_extra_the_rest_of_the_report_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    absent = ("altair", "jinja2", "vl_convert")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in absent else there(name, *more))
    folder = finished(tmp_path)
    show_report(folder, as_json=True)
    assert (folder / "report.md").is_file() and not (folder / "lambda.svg").exists()


def test_a_page_replaces_a_link_and_does_not_follow_it(run: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "report.html").symlink_to(tmp_path / "precious")
    show_report(run, as_json=True, html=tmp_path / "report.html")
    assert (tmp_path / "precious").read_text() == "mine"
    assert "<!doctype html>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_damaged_store_gives_no_page(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    victim = next((folder / "store" / "predict").glob("*/predictions.jsonl"))
    victim.write_text("{")
    with pytest.raises(StoreError):
        show_report(folder, as_json=True, html=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "right",
    [
        {"vanilla": {"sw": ["10"]}},
        {"eng-ft": {"en": ["11"], "sw": ["10"]}, "adamergex": {"sw": ["11"]}},
        {"vanilla": {"sw": ["10"]}, "eng-ft": {"sw": ["11"], "vi": ["10"]}},
    ],
    ids=["one method", "no ceiling", "a language missing"],
)
def test_runs_of_all_sizes_have_a_page(tmp_path: Path, right: dict[str, Any]) -> None:
    text = page(contents(finished(tmp_path, right, seeds=[0])))
    assert next(a["id"] for a in Parsed(text).all("section")) == "answer"


def test_no_path_of_this_machine_is_on_the_page(run: Path) -> None:
    assert str(run) not in page(contents(run)).replace("&#39;", "'")


def test_the_drawing_of_curves_is_the_same_each_time(run: Path, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw_curves(results(run), tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "AdaMergeX" in text and "var(--" not in text, "a file of its own has plain colours"
