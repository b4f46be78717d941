"""The documentation site builds without a warning, loads nothing from elsewhere, and has everything in it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "site"))
import site_formulas  # noqa: E402 - the site's own modules, which are not installed
import site_links  # noqa: E402
import site_notebooks  # noqa: E402
import site_pages  # noqa: E402

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
pytest.importorskip("latex2mathml", reason="the extra `docs` is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (out / "said.txt").write_text(done.stderr, encoding="utf-8")
    return out


def html(site: Path) -> dict[str, str]:
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def test_the_pages_of_the_navigation_are_there(site: Path) -> None:
    said = (site / "said.txt").read_text(encoding="utf-8")
    assert not re.findall(r"as it is not there: (\S+)", said)


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loading = re.compile(
        r"<(?:script|img|iframe|source|embed|object|video|audio)\b[^>]*?\b(?:src|data)=[\"']?(?:https?:)?//[^\"'> ]+"
    )
    styles = re.compile(r"<link\b[^>]*\bhref=[\"']?(?:https?:)?//[^\"'> ]+")
    for name, text in html(site).items():
        without_code = re.sub(r"<(pre|code)\b.*?</\1>", "", text, flags=re.S)
        assert not loading.findall(without_code), name
        assert not [link for link in styles.findall(without_code) if "canonical" not in link], name
    for path in site.rglob("*.css"):
        found = re.findall(r"url\([\"']?((?:https?:)?//[^)\"']+)", path.read_text(encoding="utf-8"))
        assert not found and "@import" not in path.read_text(encoding="utf-8"), path.name


def test_every_formula_is_drawn(site: Path) -> None:
    for name, text in html(site).items():
        assert 'class="arithmatex"' not in text, name
    drawn = (site / "methods" / "formulas.html").read_text(encoding="utf-8")
    assert drawn.count("<math") > 40
    assert "<merror" not in drawn


def test_the_search_knows_the_pages(site: Path) -> None:
    script = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    index = json.loads(script.removeprefix("var __index = "))
    found = {entry["location"].split("#")[0] for entry in index["docs"]}
    assert {"tutorial.html", "algebra.html", "reference/cli.html", "comparison.html"} <= found


@pytest.mark.parametrize("name", ["search_index.js", "search_index.json"])
def test_what_is_written_as_a_sign_is_found_by_its_name(site: Path, name: str) -> None:
    index = json.loads((site / "search" / name).read_text(encoding="utf-8").removeprefix("var __index = "))
    words = {
        entry["location"]: re.split(
            index["config"]["separator"], re.sub(r"<[^>]+>", " ", f"{entry['title']} {entry['text']}")
        )
        for entry in index["docs"]
    }
    assert "lambda" in words["how-to/choose-weight.html"]
    signs = [entry["location"] for entry in index["docs"] if re.search(r"λ(?!\w)", entry["title"] + entry["text"])]
    assert signs and not [location for location in signs if "lambda" not in words[location]]


def test_words_are_found_that_stand_in_brackets_or_behind_dots(site: Path) -> None:
    script = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    separator = json.loads(script)["config"]["separator"]
    assert {"prefix", "epochs", "verify", "0.5"} <= set(re.split(separator, "(prefix) training.epochs, --verify: 0.5"))


def test_every_search_has_a_name(site: Path) -> None:
    """On the page that a server shows for what it does not have, too."""
    pages = html(site)
    assert "404.html" in pages
    assert not [name for name, text in pages.items() if 'role="dialog"' in text.replace('role="dialog" aria-label', "")]


def test_sections_and_headers_have_names(site: Path) -> None:
    for name, text in html(site).items():
        assert 'aria-labelledby="__nav_' not in text, name
        assert not re.findall(r"<th[^>]*></th>", text), name


def test_tables_that_scroll_can_be_reached_with_the_keyboard(site: Path) -> None:
    assert not [name for name, text in html(site).items() if "assets/scrolling.js" not in text]


def test_results_are_listed_as_they_are_introduced() -> None:
    listed = site_pages.introduced()
    assert sorted(listed) == site_pages.results()
    assert listed[0].name == "sib200-low-high.md"
    assert listed != site_pages.results()


def test_public_names_are_in_the_reference(site: Path) -> None:
    import lingraft

    text = "".join(path.read_text(encoding="utf-8") for path in (site / "reference").glob("python-*.html"))
    homes = {name: f"lingraft.{home}.{name}" for name, home in lingraft._HOMES.items()}
    assert set(homes) == set(lingraft.__all__) - {"__version__"}
    assert not [name for name in homes.values() if f'id="{name}"' not in text]


def test_every_verb_is_in_the_reference(site: Path) -> None:
    from lingraft.cli import main

    text = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert not [verb for verb in main.commands if f"lingraft {verb}" not in text and f">{verb}<" not in text]


def test_every_key_is_in_the_reference(site: Path) -> None:
    from lingraft.config import Experiment

    text = (site / "reference" / "configuration.html").read_text(encoding="utf-8")
    told = set(re.findall(r"<code>([\w.]+)</code>", text))
    # What stands in two places is explained in the first: `madx.training.epochs` as `training.epochs`.
    there = {key for key in told for key in (key, key.split(".")[-1])}
    assert set(Experiment.model_fields) <= told
    assert not {key for key in site_pages.keys(Experiment) if key.split(".")[-1] not in there}
    assert len(told & site_pages.keys(Experiment)) > 120


def test_every_result_is_introduced() -> None:
    text = (ROOT / "docs" / "results" / "index.md").read_text(encoding="utf-8")
    assert not [path.name for path in site_pages.results() if f"benchmarks/results/{path.name}" not in text]
    assert not [
        path for path in ROOT.glob("recipes/*/README.md") if f"recipes/{path.parent.name}/README.md" not in text
    ]


def test_links_out_of_the_docs_are_turned_into_pages() -> None:
    places = {"benchmarks/results/a.md": "results/a.md", "docs/b.md": "b.md"}
    text = "[a](../benchmarks/results/a.md#x) [b](b.md) [c](https://x.y) `[d](e.md)`\n\n```\n[f](g.md)\n```\n"
    told: list[str] = []
    mended = site_links.mended(text, "docs/page.md", "page.md", places, lambda link, _: bool(told.append(link)))
    assert mended.startswith("[a](results/a.md#x) [b](b.md) [c](https://x.y)")
    assert "[f](g.md)" in mended
    assert "g.md" not in told
    alone = site_links.mended("see [the page](c.md).", "docs/page.md", "page.md", {}, lambda *_: True)
    assert alone == "see the page."


def test_formulas_become_mathml() -> None:
    page = site_formulas.drawn(
        r'<span class="arithmatex">\(A \lt B_t\)</span><div class="arithmatex">\[\frac{a}{b}\]</div>'
    )
    assert page.count("<math") == 2
    assert "<mfrac>" in page
    assert "arithmatex" not in page


def test_a_notebook_becomes_a_page(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "Text."]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": ["\x1b[1m1\x1b[0m\n"]},
                {"output_type": "display_data", "data": {"image/png": "AAAA", "text/plain": ["<Figure>"]}},
            ],
        },
    ]
    path = tmp_path / "one.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}}), encoding="utf-8")
    page = site_notebooks.page(path)
    assert page.startswith("# Title\n\n*This page is the notebook")
    assert "```python\nprint(1)\n```" in page
    assert "```text\n1\n```" in page
    assert "data:image/png;base64,AAAA" in page
    assert "Figure" not in page
