"""The page: what is on it and what is not, and that nothing of it does anything but what we wrote."""

import base64
import copy
import csv
import gzip
import hashlib
import html.parser
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("altair")
pytest.importorskip("jinja2")
pytest.importorskip("vl_convert")

from lingraft.report.page import writing
from lingraft.report.page.charts import bars, dendrogram, forest, names_apart
from lingraft.report.page.colours import STEPS, contrast, luminance, ramp, score_step, signed_step
from lingraft.report.page.files import Files, island, packed, shown
from lingraft.report.page.rendering import language_tag, page
from lingraft.report.page.svg import SHAPES, inline
from tests.unit import pages

SECTIONS = [
    "answer",
    "scores",
    "languages",
    "weights",
    "atlas",
    "trainings",
    "examples",
    "costs",
    "provenance",
    "methods",
    "notes",
]
HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "' onmouseover='alert(1)",
    "<!--<script>",
    "=cmd|' /C calc'!A0",
    "abc\u202egnp.exe",
    "javascript:alert(1) url(http://evil.example/x)",
    "\x00\x1b]0;x\x07",
]


class Parsed(html.parser.HTMLParser):
    """The elements of a page with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.raw: dict[str, list[tuple[dict[str, str], str]]] = {"script": [], "style": []}
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.elements.append((tag, found))
        self.open.append(tag)
        if tag in self.raw:
            self.raw[tag].append((found, ""))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            attributes, text = self.raw[self.open[-1]][-1]
            self.raw[self.open[-1]][-1] = (attributes, text + data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    def island(self, name: str) -> Any:
        return json.loads(next(text for attributes, text in self.raw["script"] if attributes.get("id") == name))


def unpacked(text: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(text)))


@pytest.fixture(scope="module")
def text() -> str:
    return page(pages.contents())


@pytest.fixture(scope="module")
def parsed(text: str) -> Parsed:
    return Parsed(text)


@pytest.fixture(scope="module")
def attacked() -> str:
    """A page whose every name is hostile."""
    return page(hostile(pages.contents(targets=("sw", "ar"), trainings=2)))


def hostile(contents: dict[str, Any]) -> dict[str, Any]:
    """Contents with all that comes out of files replaced or ended by what means something to a browser."""
    found = copy.deepcopy(contents)
    bad = "".join(HOSTILE)
    for method in found["found"]["methods"].values():
        method["title"] += bad
        method["says"] += bad
    found["found"]["name"] = bad
    found["found"]["chance_and_size_warning"] = bad
    found["found"]["experiment"]["groups"] = {}
    for method in found["found"]["methods"].values():
        method["groups"] = {}
    found["headline"] |= {"question": bad, "answer": bad, "cautions": HOSTILE}
    found["examples"]["strings"] = [text + bad for text in found["examples"]["strings"]]
    for items in found["examples"]["items"].values():
        items["id"] = [name + bad for name in items["id"]]
    for training in found["trainings"]:
        training["label"] = bad
    found["provenance"] |= {"command": bad, "experiment_yaml": bad, "data": [{"name": bad, "digest": bad}]}
    found["provenance"]["steps"] = [{"kind": bad, "label": bad, "key": bad, "sha256": bad, "files": 1}]
    found["spending"]["machine"] = {bad: bad}
    found["divergences"]["says"] = bad
    return found


# What is there.


def test_sections_come_in_the_order_of_a_decision(parsed: Parsed) -> None:
    assert [attributes["id"] for attributes in parsed.all("section")] == SECTIONS


def test_the_navigation_leads_to_every_section(parsed: Parsed) -> None:
    links = [a["href"].lstrip("#") for a in parsed.all("a") if "class" not in a]
    assert links == SECTIONS


def test_the_answer_is_said_in_words_and_a_mark(parsed: Parsed) -> None:
    head = pages.contents()["headline"]
    assert head["answer"] in parsed.text and head["question"] in parsed.text
    assert "≈ Not told apart from the baseline" in parsed.text
    assert head["cautions"][0] in parsed.text
    assert writing.between(head["interval"]) in parsed.text


def test_every_figure_of_the_map_is_in_its_cell(parsed: Parsed) -> None:
    found = pages.contents()["found"]
    for method in found["methods"].values():
        for cell in (method["average"], *method["groups"].values(), *method["languages"].values()):
            assert writing.share(cell["value"]) in parsed.text


def test_marks_are_holms_and_said_in_words(text: str) -> None:
    marks = pages.contents()["marks"]
    significant = [e for by in marks.values() for e in by.values() if e["significant"]]
    assert significant, "the fixture shows marks"
    view = text[text.index('id="map-score"') : text.index("</table>", text.index('id="map-score"'))]
    said = view.count("significantly better than Eng-FT</span>") + view.count("significantly worse than Eng-FT</span>")
    assert said == len(significant)


def test_ids_are_unique_and_labels_lead_to_controls(parsed: Parsed) -> None:
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["for"] for a in parsed.all("label")} <= set(ids)
    controls = [a["id"] for name in ("select", "input") for a in parsed.all(name)]
    assert set(controls) == {a["for"] for a in parsed.all("label")}, "every control has a label"


def test_drawings_have_names_and_tables_can_be_scrolled_by_keyboard(parsed: Parsed) -> None:
    drawings = parsed.all("svg")
    assert drawings and all(a["role"] == "img" and a["aria-label"] for a in drawings)
    regions = [a for _, a in parsed.elements if a.get("class", "").split(" ")[0] == "scroll"]
    assert regions and all(a["tabindex"] == "0" and a["aria-label"] for a in regions)


def test_all_tables_and_the_experiment_can_be_kept(parsed: Parsed) -> None:
    contents = pages.contents()
    files = unpacked(parsed.island("files-data")["gzip"])
    offered = {a["data-file"] for a in parsed.all("button") if "data-file" in a}
    assert offered <= set(files)
    assert {"results.csv", "marks.csv", "weights.csv", "cosines.csv", "losses.csv", "costs.csv", "steps.csv"} <= offered
    assert files["experiment.yaml"] == contents["provenance"]["experiment_yaml"]
    rows = list(csv.reader(io.StringIO(files["cosines.csv"])))
    assert len(rows) == 1 + 7 * 6, "a line for each layer and pair of languages"
    losses = list(csv.DictReader(io.StringIO(files["losses.csv"])))
    assert len(losses) == sum(len(t["curve"]) for t in contents["trainings"])
    assert float(losses[0]["loss"]) == contents["trainings"][0]["curve"][0]["loss"], "in full precision"


def test_the_examples_travel_as_they_are(parsed: Parsed) -> None:
    contents = pages.contents()
    data = unpacked(parsed.island("examples-data")["gzip"])
    assert data["strings"] == contents["examples"]["strings"]
    assert data["items"] == contents["examples"]["items"]
    assert data["tags"]["ar"] == "ar"


def test_equal_contents_give_equal_bytes(text: str) -> None:
    assert page(pages.contents()) == text


# What is not there.


@pytest.mark.parametrize("which", ["text", "attacked"])
def test_nothing_is_fetched(which: str, request: pytest.FixtureRequest) -> None:
    parsed = Parsed(request.getfixturevalue(which))
    for name, attributes in parsed.elements:
        assert not {"src", "srcset", "data", "action", "formaction", "poster", "style"} & set(attributes), (
            name,
            attributes,
        )
        assert not any(key.startswith("on") for key in attributes), (name, attributes)
        assert all(value.startswith("#") for key, value in attributes.items() if key.endswith("href"))
    assert not {"link", "img", "iframe", "object", "embed", "base", "image", "use", "foreignobject"} & {
        n for n, _ in parsed.elements
    }
    for _, style in parsed.raw["style"]:
        assert "url(" not in style and "@import" not in style


@pytest.mark.parametrize("which", ["text", "attacked"])
def test_the_policy_lets_only_our_script_and_style_run(which: str, request: pytest.FixtureRequest) -> None:
    parsed = Parsed(request.getfixturevalue(which))
    policy = next(a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy
    scripts = [text for attributes, text in parsed.raw["script"] if attributes.get("type") != "application/json"]
    assert len(scripts) == 1 and len(parsed.raw["style"]) == 1
    for kind, text in (("script", scripts[0]), ("style", parsed.raw["style"][0][1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_hostile_names_are_text(attacked: str, text: str) -> None:
    honest, parsed = Parsed(text), Parsed(attacked)
    assert "<img" not in attacked and "49" not in parsed.all("title")
    assert {n for n, _ in parsed.elements} <= {n for n, _ in honest.elements}
    assert len(parsed.raw["script"]) == len(honest.raw["script"])
    assert HOSTILE[0] in parsed.text and "{{ 7 * 7 }}{% raw %}" in parsed.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", attacked)
    files = unpacked(parsed.island("files-data")["gzip"])
    for name, content in files.items():
        if name.endswith(".csv"):
            for row in csv.reader(io.StringIO(content)):
                assert not any(re.match(r"\s*[=+@]", cell) for cell in row), name


@settings(max_examples=50, deadline=None)
@given(st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=6))
def test_islands_hold_any_text_and_end_nothing(value: Any) -> None:
    text = island(value)
    assert json.loads(text) == value
    assert not set("<>&") & set(text)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_what_is_packed_comes_out_again_and_is_the_same_each_time(value: list[str]) -> None:
    assert unpacked(packed(value)) == value
    assert packed(value) == packed(value)


def test_half_a_character_does_not_stop_a_page() -> None:
    assert unpacked(packed({"a": "x\udcff"})) == {"a": "x\udcff"}
    assert shown(["x\udcff"]) == ["x\\udcff"]


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_language_tags_are_tags(code: str) -> None:
    assert re.fullmatch(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*", language_tag(code))


def test_cells_of_csv_are_inert_and_numbers_whole() -> None:
    files = Files()
    name = files.add("x.csv", ["a", "b"], [["=1+1", 0.1 + 0.2], [None, -1]])
    assert files.texts[name] == "a,b\n'=1+1,0.30000000000000004\n,-1\n"


# What is absent is said, or left out.


@pytest.mark.parametrize(
    ("change", "present", "said"),
    [
        ({"divergences": None}, True, "No atlas: it needs reference adapters"),
        ({"trainings": []}, True, "No training left a curve"),
        ({"examples": None}, True, "no predictions that could be shown"),
        ({"spending": None}, False, ""),
    ],
    ids=["atlas", "trainings", "examples", "costs"],
)
def test_what_is_absent_is_said_or_left_out(change: dict[str, Any], present: bool, said: str) -> None:
    (key,) = change
    name = {"divergences": "atlas", "spending": "costs"}.get(key, key)
    parsed = Parsed(page({**pages.contents(targets=("sw", "ar"), trainings=2), **change}))
    ids = [a["id"] for a in parsed.all("section")]
    assert (name in ids) == present
    assert said in parsed.text
    assert [a["href"].lstrip("#") for a in parsed.all("a") if "class" not in a] == ids


@pytest.mark.parametrize(
    "shape",
    [
        {"targets": ("sw",), "methods": ("vanilla",), "curves": False},
        {"targets": ("sw",), "methods": ("eng-ft", "adamergex"), "atlas": False},
        {"targets": ("xx-unknown", "sw"), "methods": ("vanilla", "eng-ft")},
    ],
    ids=["one method", "one language", "unknown language"],
)
def test_small_runs_have_a_page(shape: dict[str, Any]) -> None:
    parsed = Parsed(page(pages.contents(**shape, groups=False, trainings=1, items=3)))
    ids = [a["id"] for a in parsed.all("section")]
    assert ids[0] == "answer" and ("weights" in ids) == (shape["methods"][-1] == "adamergex")


def test_a_method_without_figures_and_a_run_without_an_answer() -> None:
    contents = pages.contents(targets=("sw", "ar"), trainings=0)
    contents["found"]["methods"]["adamergex"] |= {
        "languages": {},
        "average": None,
        "groups": {"near": None, "far": None},
    }
    contents["marks"].pop("adamergex")
    nothing = dict.fromkeys(("method", "baseline", "value", "interval", "difference", "difference_interval", "p"))
    contents["headline"] |= {**nothing, "verdict": "unknown", "answer": "There are no figures.", "cautions": []}
    assert "No comparison could be made" in Parsed(page(contents)).text
    contents["headline"] |= {"method": "adamergex", "baseline": "eng-ft"}
    assert "No comparison on average (Eng-FT)" in Parsed(page(contents)).text  # One by one there may be some.


def test_a_papers_figures_stand_beside_when_asked() -> None:
    contents = pages.contents(targets=("sw", "ar"), trainings=0) | {
        "published": [["method", "paper"], [["AdaMergeX", "61.2"]]]
    }
    parsed = Parsed(page(contents))
    assert "paper" in [a["id"] for a in parsed.all("section")] and "61.2" in parsed.text


# Colours.


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["score", "signed"])
def test_every_step_can_be_read(theme: str, kind: str) -> None:
    steps = ramp(theme, kind)
    assert len(steps) == STEPS and all(contrast(colour, ink) >= 4.5 for colour, ink in steps)
    bright = [luminance(colour) for colour, _ in steps]
    if kind == "score":
        assert bright == sorted(bright, reverse=theme == "light"), "told apart without hues"


@given(st.floats(-2, 2), st.floats(-2, 2))
def test_more_is_no_lower_step(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0 <= score_step(low, -1, 1) <= score_step(high, -1, 1) < STEPS
    assert 0 <= signed_step(low, 1) <= signed_step(high, 1) < STEPS
    assert signed_step(0.0, 1) == STEPS // 2


# Numbers.


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (writing.signed(-0.0123), "−1.2"),
        (writing.signed(0.0001), "0.0"),
        (writing.signed(None), "–"),
        (writing.share(float("nan")), "–"),
        (writing.between([0.1, 0.25]), "[10.0, 25.0]"),
        (writing.between([float("nan"), 0.25]), ""),
        (writing.count(1234567), "1\u202f234\u202f567"),
        (writing.span(59.7), "60 s"),
        (writing.span(3661), "1 h 01 min"),
        (writing.size(1_500_000), "1.5 MB"),
        (writing.p_value(0.0), "< 0.001"),
    ],
)
def test_numbers_are_written_as_a_reader_expects(made: str, expected: str) -> None:
    assert made == expected


# Drawings.


@pytest.mark.parametrize("name", HOSTILE)
def test_a_drawing_holds_shapes_and_text_only(name: str) -> None:
    row = {"value": 10, "low": 5, "high": 20, "role": "other", "figure": name, "mark": "", "short": name, "says": name}
    (title,) = names_apart([name])
    drawn = [
        inline(bars(100.0).with_rows([{"method": title, **row}]), name),
        inline(forest([{"method": title, **row}], True), name),
    ]
    for text in drawn:
        tree = ET.fromstring(text)
        assert {node.tag for node in tree.iter()} <= SHAPES
        for node in tree.iter():
            assert not any(
                k.startswith("on") or "href" in k or k in ("style", "id", "class")
                for k in node.attrib
                if node is not tree
            )


def test_a_cosine_that_rounds_to_nothing_has_no_sign() -> None:
    contents = pages.contents(targets=("sw", "ar", "th"), trainings=0)
    for layer in contents["divergences"]["cosines"].values():
        layer[0][1] = layer[1][0] = -0.001
    assert "−0.00" not in page(contents)


def test_rows_of_the_same_title_stay_two_rows() -> None:
    assert names_apart(["a", "b", "a"]) == ["a", "b", "a (2)"]


def test_the_trees_leaves_stand_in_the_order_of_the_atlas() -> None:
    linkage = [[0, 2, 0.1, 2], [1, 3, 0.4, 3]]
    text = dendrogram(["A", "B", "C"], [1, 0, 2], linkage, True)
    heights = {
        n.text: float(re.findall(r",([\d.]+)\)", n.get("transform", ""))[0])
        for n in ET.fromstring(text).iter()
        if n.text and n.text in "ABC"
    }
    assert heights["B"] < heights["A"] < heights["C"]


def test_files_hold_figures_as_they_are_and_no_formulas() -> None:
    contents = pages.contents()
    files = unpacked(Parsed(page(contents)).island("files-data")["gzip"])

    def rows_of(name: str) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(files[name])))

    found = contents["found"]
    (average,) = (row for row in rows_of("averages.csv") if (row["method"], row["over"]) == ("vanilla", "average"))
    cell = found["methods"]["vanilla"]["average"]
    assert float(average["accuracy"]) == cell["value"]
    assert [float(average[n]) for n in ("difference_low", "difference_high")] == cell["difference_interval"]
    assert float(average["gap_high"]) == cell["gap_closed"]["interval"][1]
    assert {row["direction"] for row in rows_of("marks.csv")} <= {"better", "worse"}
    assert rows_of("trainings.csv")[0]["tokens"] == "123456"
    assert float(rows_of("references.csv")[0]["cosine"]) == found["references"][0]["cosine"]
    f1 = found["methods"]["vanilla"]["languages"]["sw"]["also"]["macro_f1"]
    assert float(rows_of("macro_f1.csv")[0]["macro_f1"]) == f1


def test_figures_that_are_none_do_not_stop_a_page() -> None:
    contents = pages.contents(trainings=0)
    for method in contents["found"]["methods"].values():
        for cell in method["languages"].values():
            cell |= {"interval": [math.nan, math.nan], "difference_interval": [math.nan, math.nan]}
    assert not re.search(r"\bnan\b", Parsed(page(contents)).text)


def test_names_of_items_do_not_turn_the_text_around_them() -> None:
    contents = pages.contents(targets=("sw",), items=2)
    contents["examples"]["items"]["sw"]["id"][0] = "a\u202eb"
    assert unpacked(Parsed(page(contents)).island("examples-data")["gzip"])["items"]["sw"]["id"][0] == "a\\u202eb"


def test_all_layers_of_the_atlas_are_rounded_alike() -> None:
    contents = pages.contents(trainings=0)
    contents["divergences"]["cosines"]["all"][0][1] = contents["divergences"]["cosines"]["all"][1][0] = 0.12496
    parsed = Parsed(page(contents))
    assert ">0.12<" in page(contents)
    assert parsed.island("atlas-data")["cosines"]["all"][0][1] == 0.12


def test_a_tree_of_near_equals_is_no_comb() -> None:
    linkage = [[0.0, 1.0, 0.538, 2], [2.0, 3.0, 0.54, 3], [4.0, 5.0, 0.56, 4]]
    svg = dendrogram(["a", "b", "c", "d"], [0, 1, 2, 3], linkage, True)
    assert ">0.55<" in svg
    assert ">0.2<" not in svg
    wide = dendrogram(["a", "b", "c"], [0, 1, 2], [[0.0, 1.0, 0.2, 2], [2.0, 3.0, 0.9, 3]], True)
    assert ">0.0<" in wide
