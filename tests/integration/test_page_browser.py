"""The page in a browser: by keyboard, in every script, without a network, for those who do not see it; with hostile names."""

import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("altair")
pytest.importorskip("jinja2")
pytest.importorskip("vl_convert")
pytest.importorskip("playwright")
pytest.importorskip("axe_playwright_python")

import axe_playwright_python.sync_playwright as axe_api
import playwright.sync_api as api

from lingraft.report.page.rendering import page as rendered
from tests.unit import pages
from tests.unit.test_page import HOSTILE, hostile

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(rendered(pages.contents(targets=("sw", "ar", "he", "th", "my"))), encoding="utf-8")
    return path


class Opened:
    """A page in a browser, and what it said on its console."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": DESKTOP, "reduced_motion": "reduce", **options})
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def ready(self) -> Any:
        self.page.wait_for_selector("#items li")
        return self.page


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[Any]:
    contexts = []

    def make(path: Path = file, **options: Any) -> Opened:
        contexts.append(Opened(browser, path, **options))
        return contexts[-1]

    yield make
    for one in contexts:
        one.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_no_violation_of_accessibility_and_a_silent_console(opened: Any, scheme: str, viewport: dict[str, int]) -> None:
    one = opened(color_scheme=scheme, viewport=viewport)
    page = one.ready()
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    page.evaluate("for (const f of document.querySelectorAll('figure')) f.style.contentVisibility = 'visible'")
    found = axe_api.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert one.said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], "no scrolling to the side"
    assert [url for url in one.asked if not url.startswith(("file:", "blob:"))] == [], "nothing is fetched"


def test_everything_is_reached_by_keyboard(opened: Any) -> None:
    page = opened().ready()
    press = page.keyboard.press
    press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the answer"
    press("Enter")
    assert page.evaluate("document.activeElement.id") == "answer"
    page.focus("#heat-score")
    press("ArrowRight")
    assert page.is_visible(".view-difference") and not page.is_visible(".view-score")
    before = page.text_content("#ex-status")
    page.focus("#ex-mode")
    press("ArrowDown")
    assert page.text_content("#ex-status") != before, "a filter's change is said"
    page.focus("#ex-language")
    page.keyboard.type("he")
    assert "he-00" in page.text_content("#items li .item-head")
    page.focus("#ex-next")
    press("Enter")
    assert page.text_content("#ex-status").startswith("Items 21–30 of 30")
    page.focus(".view-difference .scroll")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')")


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_navigation_leads_to_the_section_that_it_names(opened: Any, viewport: dict[str, int]) -> None:
    page = opened(viewport=viewport, reduced_motion="no-preference").ready()
    for name in ("examples", "trainings", "provenance", "scores", "notes"):
        page.evaluate(f"document.querySelector('nav a[href=\"#{name}\"]').click()")
        page.wait_for_timeout(300)
        top = page.evaluate(f"document.getElementById('{name}').getBoundingClientRect().top")
        last = page.evaluate("scrollY + innerHeight >= document.documentElement.scrollHeight - 2")
        assert 55 < top < 90 or (last and top < viewport["height"]), name
        assert page.evaluate("document.querySelector('nav [aria-current]').hash") == f"#{name}"


def test_the_theme_is_chosen_and_kept_for_the_session(opened: Any) -> None:
    page = opened(color_scheme="light").ready()
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.click("#theme")
    assert page.get_attribute("#theme", "aria-pressed") == "true"
    dark = page.evaluate(colour)
    assert dark != light
    page.reload()
    assert page.evaluate(colour) == dark


def test_refused_storage_stops_nothing(browser: Any, file: Path) -> None:
    context = browser.new_context()
    context.add_init_script(
        "Object.defineProperty(window, 'sessionStorage', {get() { throw new DOMException('no'); }})"
    )
    page, said = context.new_page(), []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(file.as_uri())
    page.click("#theme")
    assert page.get_attribute("#theme", "aria-pressed") == "true" and said == []
    context.close()


def test_scripts_run_in_their_own_direction(opened: Any) -> None:
    page = opened().ready()
    page.select_option("#ex-language", "he")
    page.fill("#ex-search", "הממשלה")
    style = page.evaluate(
        """() => { const p = document.querySelector('#items .prompt'); const s = getComputedStyle(p);
        return [s.direction, s.unicodeBidi, s.whiteSpace, p.lang, p.textContent.split("\\n").length]; }"""
    )
    # The wording in front is English, and decides: the whole prompt is one text. The Hebrew line keeps its order in it.
    assert style[1] in ("isolate", "plaintext") and style[2] == "pre-wrap" and style[3:] == ["he", 3]
    assert page.evaluate("getComputedStyle(document.querySelector('#ex-search')).direction") == "rtl"
    assert page.text_content("#ex-status").endswith("of " + page.text_content("#ex-status").rsplit(" ", 1)[1])


def test_an_item_in_arabic_alone_runs_from_the_right(opened: Any, tmp_path: Path) -> None:
    contents = pages.contents(targets=("ar",), atlas=False, curves=False, groups=False, trainings=0, items=3)
    for n in contents["examples"]["items"]["ar"]["prompt"]:
        contents["examples"]["strings"][n] = pages.SENTENCES["ar"]
    path = tmp_path / "ar.html"
    path.write_text(rendered(contents), encoding="utf-8")
    page = opened(path).ready()
    assert page.evaluate("getComputedStyle(document.querySelector('#items .prompt')).direction") == "rtl"


def test_filters_find_what_they_say(opened: Any) -> None:
    page = opened().ready()
    examples = pages.contents(targets=("sw", "ar", "he", "th", "my"))["examples"]
    page.select_option("#ex-language", "")
    total = sum(len(numbers) for numbers in examples["differ"].values())
    assert page.text_content("#ex-status").endswith(f"of {total}")
    page.select_option("#ex-mode", "pair")
    page.select_option("#ex-right", "adamergex")
    page.select_option("#ex-wrong", "eng-ft")
    answers = [
        (i["answers"]["adamergex"]["value"], i["answers"]["eng-ft"]["value"]) for i in examples["items"].values()
    ]
    pairs = sum(a == 1 and b == 0 for one, other in answers for a, b in zip(one, other, strict=True))
    assert page.text_content("#ex-status").endswith(f"of {pairs}")
    page.fill("#ex-search", "no such text anywhere")
    assert page.text_content("#ex-status") == "No item is like that"


def test_layers_and_kinds_are_chosen(opened: Any) -> None:
    page = opened().ready()
    before = page.text_content("#cosines tbody")
    page.select_option("#layer", "3")
    assert page.text_content("#cosines tbody") != before and "layer 3" in page.text_content("#layer-says")
    page.select_option("#training-kind", "task")
    assert page.text_content("#training-count") == "1 of 6"
    assert page.locator("#training-grid figure:visible").count() == 1


def test_tables_are_kept_as_csv_and_their_cells_are_inert(opened: Any, tmp_path: Path) -> None:
    contents = hostile(pages.contents(targets=("sw", "ar"), trainings=2, items=4))
    contents["examples"]["strings"] = ["=1+1\n" + text for text in contents["examples"]["strings"]]
    path = tmp_path / "hostile.html"
    path.write_text(rendered(contents), encoding="utf-8")
    page = opened(path).ready()
    for button, name in (("#scores [data-file='results.csv']", "results.csv"), ("#examples-csv", "examples.csv")):
        with page.expect_download() as download:
            page.click(button)
        assert download.value.suggested_filename == name
        rows = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
        assert len(rows) > 4 and len({len(row) for row in rows}) == 1
        assert not any(cell.lstrip().startswith(("=", "+", "@")) for row in rows for cell in row)


def test_hostile_names_do_nothing(opened: Any, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    path.write_text(rendered(hostile(pages.contents(targets=("sw", "ar"), trainings=2))), encoding="utf-8")
    one = opened(path)
    dialogs: list[str] = []
    one.page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page = one.ready()
    page.select_option("#ex-mode", "all")
    page.fill("#ex-search", HOSTILE[0])
    assert page.locator("#items li.item").count() > 0, "it is text, and found as text"
    page.locator("#map-score td").first.hover()
    page.wait_for_timeout(100)  # Scrolling there hides what was told before.
    page.locator("#map-score td").nth(1).hover()
    assert page.is_visible("#tip")
    assert dialogs == [] and one.said == []
    assert page.locator("img, iframe, #items script").count() == 0


def test_without_scripts_the_page_can_still_be_read(opened: Any) -> None:
    page = opened(java_script_enabled=False).page
    assert (
        page.is_visible("#answer-title")
        and page.is_visible("#map-score")
        and page.is_visible("#languages svg >> nth=0")
    )
    assert page.is_visible("text=This part needs JavaScript")
    assert not page.is_visible("#theme")
    page.click("label[for=heat-gap]")
    assert page.is_visible(".view-gap") and not page.is_visible(".view-score")


def test_a_browser_that_cannot_unpack_says_so(browser: Any, file: Path) -> None:
    context = browser.new_context()
    context.add_init_script("delete window.DecompressionStream")
    page = context.new_page()
    page.goto(file.as_uri())
    page.wait_for_selector("text=A newer browser can.")
    context.close()


def test_what_is_printed_is_light_and_whole(opened: Any) -> None:
    page = opened(color_scheme="dark").ready()
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(250, 249, 246)"
    assert not page.is_visible("nav") and not page.is_visible("#theme")


@pytest.mark.parametrize("width", [320, 640, 1280])
def test_nothing_reaches_beyond_the_page(opened: Any, width: int) -> None:
    page = opened(viewport={"width": width, "height": 800}).ready()
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_chosen_colours_can_be_read(opened: Any) -> None:
    page = opened(forced_colors="active", color_scheme="dark").ready()
    found = axe_api.Axe().run(page, options={"runOnly": ["color-contrast"]})
    assert [v["id"] for v in found.response["violations"]] == []


def test_figures_between_right_and_wrong_are_said(opened: Any, tmp_path: Path) -> None:
    contents = pages.contents(targets=("sw",), items=3)
    contents["found"]["metric"] = "rouge_l"
    contents["examples"]["items"]["sw"]["answers"]["adamergex"]["value"] = [0.251, 0.5, 1.0]
    contents["examples"]["differ"]["sw"] = [0, 1, 2]
    path = tmp_path / "graded.html"
    path.write_text(rendered(contents), encoding="utf-8")
    judged = opened(path).ready().locator(".judged").all_text_contents()
    assert {"✗ wrong (25.1)", "✓ right (50.0)", "✓ right"} <= set(judged)
