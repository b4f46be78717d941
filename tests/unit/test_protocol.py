"""Divisions of languages, methods with a criterion, projected labels, and reports over groups and fewer seeds."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lingraft.config import Experiment, ProjectionConfig, validated
from lingraft.digests import digest_value
from lingraft.errors import ConfigError, DataError, UserError
from lingraft.languages import LANGUAGES
from lingraft.methods import CRITERIA, METHODS, method
from lingraft.metrics import Prediction, entropy
from lingraft.protocols import PROTOCOLS
from lingraft.report.results import results
from lingraft.report.tables import average_tables, difference_table, markdown, notes, weight_table
from lingraft.store import Store, read_json, write_json
from lingraft.tasks.projection import projected_examples, projected_labels, shortened
from lingraft.tasks.table import TASKS
from tests.unit.test_plan import BASE, LINES, planned
from tests.unit.test_report import make_run, plain

SMALL: dict[str, Any] = {"name": "x", "backbone": "demo", "task": "topics", "reference": {"text": "{language}.txt"}}


def made(**values: Any) -> Experiment:
    return validated(Experiment, SMALL | values)


# The division of languages.


def test_no_language_of_a_protocol_plays_two_parts_and_all_are_known():
    for protocol in PROTOCOLS.values():
        everyone = [protocol.source, *protocol.targets, *protocol.development]
        assert len(set(everyone)) == len(everyone)
        assert set(everyone) <= set(LANGUAGES)


def test_a_protocol_fills_in_what_is_left_out_and_nothing_else():
    whole = made(protocol="low-high")
    assert whole.targets == PROTOCOLS["low-high"].targets
    assert whole.development == PROTOCOLS["low-high"].development
    assert whole.groups == PROTOCOLS["low-high"].groups
    part = made(protocol="low-high", targets=["de", "sw", "yo"], development=["ha"])
    assert part.development == ("ha",)
    assert part.groups == {"low": ("sw", "yo"), "high": ("de",)}
    assert made(protocol="low-high", targets=["sw"], groups={}).groups == {}


def test_a_protocol_s_development_language_cannot_become_a_target():
    with pytest.raises(ConfigError, match=r"ha.*both 'targets' and 'development'"):
        made(protocol="low-high", targets=["sw", "ha"])


def test_an_unknown_protocol_names_the_known():
    with pytest.raises(ConfigError, match=r"unknown protocol 'low'.*low-high"):
        made(protocol="low")


@pytest.mark.parametrize("groups", [{"a": ["sw", "de"]}, {"a": ["sw", "sw"]}, {"a": []}])
def test_a_group_names_targets_once(groups: dict[str, list[str]]):
    with pytest.raises(ConfigError, match="the group 'a'"):
        made(targets=["sw"], groups=groups)


@pytest.mark.parametrize("seeds", [[], [3], [0, 0]])
def test_a_method_has_some_of_the_seeds(seeds: list[int]):
    with pytest.raises(ConfigError, match="seeds of 'vanilla'"):
        made(targets=["sw"], seeds=[0, 1], methods=["vanilla"], seeds_of={"vanilla": seeds})
    with pytest.raises(ConfigError, match="not one of the methods"):
        made(targets=["sw"], methods=["vanilla"], seeds_of={"eng-ft": [0]})
    with pytest.raises(ConfigError, match=r"selection\.seeds"):
        made(targets=["sw"], seeds=[0, 1], selection={"seeds": seeds[:1] or [2]} if seeds != [0, 0] else {"seeds": []})


# Methods with a criterion.


@given(st.sampled_from(sorted(METHODS)), st.sampled_from(sorted(CRITERIA)))
def test_a_criterion_changes_how_a_weight_is_chosen_and_nothing_else(name: str, criterion: str):
    row = METHODS[name]
    if row.adapter != "graft" or (criterion == "norms" and (row.rule != "transfer" or row.stack)):
        with pytest.raises(UserError, match=f"'{name}"):
            method(f"{name}:{criterion}")
        return
    found = method(f"{name}:{criterion}")
    assert found.criterion == criterion
    assert (found.references, found.space, found.rule, found.neutral) == (
        row.references,
        row.space,
        row.rule,
        row.neutral,
    )
    assert (found is row) == (criterion == "labels")


def test_an_unknown_criterion_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="unknown criterion 'entropie'") as caught:
        method("adamergex:entropie")
    assert "entropy" in (caught.value.remedy or "")


def test_weights_without_labels_are_chosen_on_the_target_itself_and_by_labels_never():
    plan = planned(methods=["adamergex", "adamergex:entropy", "adamergex:likelihood", "adamergex:norms"], seeds=[0, 1])
    for (name, language), step in plan.selections.items():
        places = {role.split("/")[1] for role in step.inputs}
        if language is None:
            assert name == "adamergex" and places == {"tr"}
        elif not name.endswith(":norms"):
            assert places == {language}
        kind = {"adamergex:likelihood": "read", "adamergex:norms": "compare"}.get(name, "score")
        assert {s.kind for s in step.inputs.values()} == {kind}
    assert len(plan.selections) == 1 + 3 * 2


def test_without_development_languages_weights_can_still_be_chosen_without_labels():
    assert planned(development=[], methods=["eng-ft", "adamergex:entropy"]).selections
    with pytest.raises(ConfigError, match="needs development languages") as caught:
        planned(development=[], methods=["adamergex"])
    assert "adamergex:entropy" in (caught.value.remedy or "")


def test_a_weight_is_chosen_on_the_seeds_asked_for():
    plan = planned(seeds=[0, 1, 2], selection={"weights": [1.0], "seeds": [1]})
    assert {role.split("/")[-1] for role in plan.selections["adamergex", None].inputs} == {"1"}
    assert {cell.seed for cell in plan.cells if cell.method == "adamergex"} == {0, 1, 2}


def test_arimerge_is_refused_for_structures_without_an_analogy():
    with pytest.raises(ConfigError, match="'arimerge' is for LoRA"):
        planned(methods=["arimerge"], adapter={"family": "prefix"})


# Entropy.


@given(st.lists(st.floats(-800, 0), min_size=1, max_size=7))
def test_entropy_is_between_certainty_and_indifference(scores: list[float]):
    found = Prediction("", 0, tuple(scores)).entropy
    assert -1e-12 <= found <= math.log(len(scores)) + 1e-9
    assert Prediction("", 0, tuple(s - 5 for s in scores)).entropy == pytest.approx(found, abs=1e-9)


def test_entropy_by_hand():
    quarters = Prediction("", 0, (math.log(0.75), math.log(0.25)))
    even = Prediction("", 0, (-3.0, -3.0))
    by_hand = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert quarters.entropy == pytest.approx(by_hand)
    assert entropy([quarters, even]) == pytest.approx((by_hand + math.log(2)) / 2)


# Projected labels.

SHARES = st.floats(0.51, 0.99)


@given(
    st.lists(st.tuples(SHARES, st.booleans()), min_size=1, max_size=30),
    st.floats(0, 1),
    st.one_of(st.none(), st.integers(1, 5)),
)
def test_labels_are_sure_enough_not_too_many_and_in_order(
    lines: list[tuple[float, bool]], confidence: float, per_label: int | None
):
    said = [
        Prediction(str(2 * n), 0, (math.log(p), math.log(1 - p)) if first else (math.log(1 - p), math.log(p)))
        for n, (p, first) in enumerate(lines)
    ]
    assume(all(abs(p - confidence) > 1e-9 for p, _ in lines))  # There rounding decides.
    config = ProjectionConfig(confidence=confidence, per_label=per_label)
    sure = [n for n, (p, _) in enumerate(lines) if p > confidence]
    if not sure:
        with pytest.raises(DataError, match="sure of no line"):
            projected_labels(said, config)
        return
    labels = projected_labels(said, config)
    assert labels == sorted(labels)
    for line, label in labels:
        p, first = lines[line // 2]
        assert line % 2 == 0 and label == (0 if first else 1) and p > confidence
    for label in (0, 1):
        able = [2 * n for n in sure if lines[n][1] == (label == 0)]
        kept = [line for line, found in labels if found == label]
        if per_label is None or len(able) <= per_label:
            assert set(able) <= set(kept)
        else:
            assert len(kept) == per_label
            assert set(able) - set(kept) == set() or max(map(digest_value, kept)) < min(
                digest_value(n) for n in set(able) - set(kept)
            )


def test_projected_items_are_the_other_side_s_lines_with_the_labels():
    task = TASKS["topics"]
    items = projected_examples(task, ["moja", "mbili", "", "nne"], [(1, 3), (2, 0), (3, 6)])
    assert [(e.prompt, e.candidates[e.gold]) for e in items] == [
        ("Text: mbili\nTopic:", " sports"),
        ("Text: nne\nTopic:", " geography"),
    ]
    with pytest.raises(DataError, match="2 lines, and line 4 got a label"):
        projected_examples(task, ["moja", "mbili"], [(3, 0)])


def test_a_task_of_several_fields_cannot_be_asked_of_plain_text():
    with pytest.raises(ConfigError, match="'xcopa' cannot be asked of plain text"):
        TASKS["xcopa"].of_text(["a"])


def test_projection_needs_lines():
    with pytest.raises(ConfigError, match="parallel text"):
        planned(methods=["projection"], reference=BASE["reference"])
    kinds = [s.kind for s in planned(methods=["projection"], reference=LINES, seeds=[0, 1]).steps]
    # T, and from it P_t in two languages; labels once a seed.
    assert kinds.count("train") == 2 * 3 and kinds.count("project") == 2


@given(st.lists(st.text(max_size=12), max_size=6), st.integers(1, 8))
def test_lines_are_cut_to_so_many_tokens(lines: list[str], tokens: int):
    found = shortened(lines, lambda s: [*s.encode()], lambda ids: bytes(ids).decode(errors="replace"), tokens)
    for line, cut in zip(lines, found, strict=True):
        assert len(cut.encode()) <= max(tokens, 0) or cut == line
        assert line.startswith(cut.rstrip("�"))
        assert cut == line or len(line.encode()) > tokens


# Reports.


def test_groups_are_averaged_by_themselves(tmp_path: Path):
    found = results(make_run(tmp_path, groups={"one": ["sw"], "two": ["sw", "vi"]}))
    for row in found["methods"].values():
        assert row["groups"]["two"] == row["average"]
        assert row["groups"]["one"]["value"] == row["languages"]["sw"]["value"]
    one, two = average_tables(found)
    assert one[0][1] == "average of one" and two[0][1] == "average of two"
    assert "average of two" in plain(found).replace("\n", " ") and "average of one" in markdown(found)
    header, rows = difference_table(found)
    assert header[1:] == ["Swahili", "Vietnamese"]
    assert "Eng-FT" not in {row[0] for row in rows}


def test_a_method_of_fewer_seeds_is_compared_with_eng_ft_of_the_same(tmp_path: Path):
    right = {
        "eng-ft": {"sw": ["1000", "0110"], "vi": ["1100", "0000"]},
        "tgt-ft": {"sw": ["1111"], "vi": ["1111"]},
        "adamergex": {"sw": ["1100"], "vi": ["1110"]},
    }
    found = results(make_run(tmp_path, right, seeds_of={"tgt-ft": [0], "adamergex": [0]}))
    average = found["methods"]["adamergex"]["average"]
    # Of seed 0 alone: from 1 + 2 to 2 + 3 of 8; over both seeds Eng-FT has 3 / 8 + 2 / 8.
    assert average["difference"] == pytest.approx(2 / 8)
    assert average["gap_closed"]["value"] == pytest.approx(2 / 5)
    assert found["methods"]["eng-ft"]["average"]["value"] == pytest.approx((3 / 8 + 2 / 8) / 2)
    assert "AdaMergeX: 1 seed, compared with Eng-FT of the same." in notes(found)


def test_weights_chosen_without_labels_are_shown_by_language(tmp_path: Path):
    run = make_run(tmp_path)
    manifest = read_json(run / "manifest.json")
    for cell in [c for c in manifest["cells"] if c["method"] == "adamergex"]:
        manifest["cells"].append(cell | {"method": "adamergex:entropy"})
    for language, weight in (("sw", 0.5), ("vi", 1.25)):
        chosen = {"weight": weight, "curve": [], "criterion": "entropy"}
        manifest["selections"].append(
            {"method": "adamergex:entropy", "language": language, "path": _selected(run, chosen)}
        )
    write_json(run / "manifest.json", manifest)
    found = results(run)
    assert weight_table(found)[1] == [["AdaMergeX, λ by entropy", "0.5", "1.25"]]
    assert "## λ without labels" in markdown(found) and "λ without labels" in plain(found)
    assert any("without a label" in note for note in notes(found))


def test_a_weight_that_was_given_was_not_chosen(tmp_path: Path):
    run = make_run(tmp_path)
    manifest = read_json(run / "manifest.json")
    for entry in manifest["selections"]:
        entry["path"] = _selected(run, {"weight": 0.7, "curve": []})
    write_json(run / "manifest.json", manifest)
    assert "λ was given." in notes(results(run))


def _selected(run: Path, chosen: dict[str, Any]) -> str:
    """A choice of λ in a run's store, and its place there."""
    key = digest_value(chosen, 24)
    with Store(run / "store").making("select", key, {"kind": "select"}) as work:
        write_json(work / "selected.json", chosen)
    return f"select/{key}/selected.json"


def test_a_run_of_another_version_is_refused(tmp_path: Path):
    run = make_run(tmp_path)
    write_json(run / "manifest.json", read_json(run / "manifest.json") | {"format": 1})
    with pytest.raises(UserError, match="another version") as caught:
        results(run)
    assert "run" in (caught.value.remedy or "")
