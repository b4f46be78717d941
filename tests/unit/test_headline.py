"""The sentence that a run comes down to: which method it is about, what it says, and what a reader is warned of."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lingraft.report.headline import headline, marks, model_name, named_method, p_text
from lingraft.report.results import results
from lingraft.report.tables import p_value
from lingraft.significance import holm
from tests.unit.test_report import RIGHT, make_run

N = 40


def share(right: int, items: int = N) -> str:
    return "1" * right + "0" * (items - right)


def ran(tmp_path: Path, right: Mapping[str, Mapping[str, Sequence[str]]], **experiment: Any) -> dict[str, Any]:
    targets = list(dict.fromkeys(code for cells in right.values() for code in cells if code != "en"))
    return results(
        make_run(tmp_path, right, **({"targets": targets, "seeds": [0], "methods": list(right)} | experiment))
    )


def test_a_clear_gain_is_one_and_says_by_how_much(tmp_path: Path):
    right = {m: {"sw": [share(n)], "vi": [share(n)]} for m, n in (("eng-ft", 10), ("adamergex", 30))}
    said = headline(ran(tmp_path, right))
    assert said["verdict"] == "better"
    assert (said["method"], said["baseline"]) == ("adamergex", "eng-ft")
    assert said["answer"].startswith(
        "On average over Swahili and Vietnamese, AdaMergeX answers 75.0 % right (95 % interval "
    )
    assert "50.0 points more than English fine-tuning (" in said["answer"]
    assert "p < .001" in said["answer"]
    assert said["difference"] == pytest.approx(0.5)
    assert said["answer"].count(". ") == 0
    assert said["answer"].endswith(".")
    assert said["question"].endswith("?")


def test_a_clear_loss_is_one(tmp_path: Path):
    right = {"eng-ft": {"sw": [share(30)]}, "adamergex": {"sw": [share(10)]}}
    said = headline(ran(tmp_path, right))
    assert said["verdict"] == "worse"
    assert said["answer"].startswith("In Swahili, AdaMergeX answers 25.0 % right")
    assert "50.0 points less than English fine-tuning" in said["answer"]


def test_what_cannot_be_told_is_said_so(tmp_path: Path):
    right = {"eng-ft": {"sw": ["10" * 20]}, "adamergex": {"sw": ["01" * 20]}}
    said = headline(ran(tmp_path, right))
    assert said["verdict"] == "undecided"
    assert "within a tenth of a point of English fine-tuning" in said["answer"]
    assert said["answer"].endswith("no difference can be told from these data.")


def test_the_method_is_named_by_its_place_and_kind_and_never_by_figures(tmp_path: Path):
    names = ("vanilla", "madx", "control-add", "adamergex", "adamergex-product", "tgt-ft", "eng-ft")
    for best in names:
        right = {m: {"sw": [share(38 if m == best else 5)]} for m in names}
        found = ran(tmp_path / best, right)
        assert named_method(found) == "adamergex"


@pytest.mark.parametrize(
    ("methods", "named", "baseline"),
    [
        (("vanilla", "eng-ft"), "eng-ft", "vanilla"),
        (("eng-ft", "madx"), "madx", "eng-ft"),
        (("eng-ft", "madx", "translate-train", "flare"), "flare", "translate-train"),
        (("eng-ft", "translate-train"), "translate-train", "eng-ft"),
        (("eng-ft", "projection"), "projection", "eng-ft"),
        (("eng-ft", "translate-test"), "translate-test", "eng-ft"),
        (("eng-ft", "control-add"), "eng-ft", None),
        (("vanilla",), "vanilla", None),
        (("flare", "madx"), "flare", None),
    ],
)
def test_which_method_and_against_what(tmp_path: Path, methods: Sequence[str], named: str, baseline: str | None):
    said = headline(ran(tmp_path, {m: {"sw": [share(10 + n)]} for n, m in enumerate(methods)}))
    assert (said["method"], said["baseline"]) == (named, baseline)
    assert said["verdict"] in ("better", "worse", "undecided") if baseline else said["verdict"] == "unknown"


def test_eng_ft_against_the_base_has_the_recorded_difference_turned_round(tmp_path: Path):
    found = ran(tmp_path, {"vanilla": {"sw": [share(8)]}, "eng-ft": {"sw": [share(30)]}})
    said, cell = headline(found), found["methods"]["vanilla"]["average"]
    assert said["difference"] == -cell["difference"] > 0
    assert said["difference_interval"] == [-cell["difference_interval"][1], -cell["difference_interval"][0]]
    assert said["p"] == cell["p"]
    assert "than the base model" in said["answer"]


def test_a_weight_of_zero_is_english_fine_tuning_itself(tmp_path: Path):
    right = {m: {"sw": [share(20)], "vi": [share(20)]} for m in ("eng-ft", "adamergex")}
    run = make_run(
        tmp_path, right, chosen={"weight": 0.0, "curve": [{"weight": 0.0, "gold_log_likelihood": -1.0}]}, seeds=[0]
    )
    said = headline(results(run))
    assert "and so does English fine-tuning: λ = 0 was chosen" in said["answer"]
    assert said["verdict"] == "undecided"
    assert any(c.startswith("λ = 0 was chosen: there the graft is English fine-tuning") for c in said["cautions"])


def test_no_average_says_where_figures_are_missing(tmp_path: Path):
    right = {"eng-ft": {"sw": [share(9)], "vi": [share(9)]}, "adamergex": {"sw": [share(9)]}}
    said = headline(ran(tmp_path, right, absent=[("adamergex", "vi", "no labelled test data")]))
    assert said["verdict"] == "unknown"
    assert said["value"] is None
    assert "no figures in Vietnamese" in said["answer"]
    assert "No figures: AdaMergeX in Vietnamese (no labelled test data)." in said["cautions"]


def test_languages_with_items_of_their_own_are_counted_one_by_one(tmp_path: Path):
    right = {m: {"sw": [share(n)], "vi": [share(n)]} for m, n in (("eng-ft", 5), ("adamergex", 35))}
    names = {"vi": [f"other{n}" for n in range(N)]}
    said = headline(ran(tmp_path, right, names=names))
    assert said["verdict"] == "unknown"
    assert "better in 2 and worse in 0 of 2 languages" in said["answer"]


def test_groups_are_given_one_by_one(tmp_path: Path):
    right = {m: {"sw": [share(n)], "vi": [share(n + 5)]} for m, n in (("eng-ft", 5), ("adamergex", 25))}
    said = headline(ran(tmp_path, right, groups={"low": ["sw"], "high": ["vi"]}))
    assert ", by group " in said["answer"]
    assert "low +50.0 (+" in said["answer"]
    assert "high +50.0 (+" in said["answer"]


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("accuracy", "answers 75.0 % right"),
        ("exact_match", "an exact match of 75.0 %"),
        ("rouge_l", "a ROUGE-L of 75.0"),
    ],
)
def test_metrics_have_their_words(tmp_path: Path, metric: str, words: str):
    found = ran(tmp_path, {"eng-ft": {"sw": [share(10)]}, "adamergex": {"sw": [share(30)]}})
    assert words in headline({**found, "metric": metric})["answer"]


def test_cautions_of_a_run_by_hand(tmp_path: Path):
    found = ran(
        tmp_path,
        {m: {"sw": [share(10)]} for m in ("eng-ft", "adamergex", "adamergex-product")},
        note="Small.",
        development=["sw"],
    )
    said = headline(found)["cautions"]
    assert said[0] == "Small."
    assert "trained once" in said[1]
    assert any("Swahili, which is also among the targets" in c for c in said)
    assert any(c.startswith("Two methods of this kind were compared") for c in said)
    assert any("Only 40 items a language" in c for c in said)
    several = results(make_run(tmp_path / "more", RIGHT))
    assert any("2 seeds" in c and "not how much trainings differ" in c for c in headline(several)["cautions"])


def test_a_run_without_figures_has_a_headline(tmp_path: Path):
    found = ran(tmp_path, {}, targets=["sw"], methods=[])
    assert headline(found)["verdict"] == "unknown"
    assert headline(found)["method"] is None


def test_reading_the_figures_changes_nothing(tmp_path: Path):
    found = ran(tmp_path, RIGHT, seeds=[0, 1])
    before = copy.deepcopy(found)
    headline(found)
    marks(found)
    assert found == before


# Marks.


def test_marks_are_holms_over_all_languages_and_averages_are_a_family_of_their_own(tmp_path: Path):
    right = {
        "vanilla": {"en": [share(5)], "sw": [share(2)], "vi": [share(12)]},
        "eng-ft": {"en": [share(30)], "sw": [share(14)], "vi": [share(12)]},
        "adamergex": {"sw": [share(20)], "vi": [share(15)]},
    }
    found = ran(tmp_path, right)
    marked = marks(found)
    assert set(marked) == {"vanilla", "adamergex"}
    cells = [(m, code) for m in marked for code in marked[m] if code != "average"]
    assert len(cells) == 5
    raw = [found["methods"][m]["languages"][code]["p"] for m, code in cells]
    assert [marked[m][code]["p"] for m, code in cells] == raw
    assert [marked[m][code]["adjusted"] for m, code in cells] == holm(raw)
    averages = [found["methods"][m]["average"]["p"] for m in marked]
    assert [marked[m]["average"]["adjusted"] for m in marked] == holm(averages)
    for mark in (marked[m][code] for m, code in cells):
        assert mark["significant"] == (mark["adjusted"] < 0.05)
    assert marked["vanilla"]["sw"]["direction"] == "-"
    assert marked["adamergex"]["sw"]["direction"] == "+"


def test_without_a_baseline_nothing_is_marked(tmp_path: Path):
    assert marks(ran(tmp_path, {"adamergex": {"sw": [share(3)]}})) == {}


# Words.


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("google/gemma-3-270m", "google/gemma-3-270m"),
        ("/home/me/models/tiny", "tiny"),
        ("~/m/tiny", "tiny"),
        ("C:\\m\\tiny", "tiny"),
        ("models/tiny", "models/tiny"),
    ],
)
def test_a_model_in_a_folder_is_called_by_its_name(name: str, shown: str):
    assert model_name(name) == shown


@pytest.mark.parametrize(
    ("p", "text"), [(0.00009, "p < .001"), (0.0061, "p = .006"), (0.871, "p = .87"), (1.0, "p > .99")]
)
def test_p_values_in_texts(p: float, text: str):
    assert p_text(p) == text


@pytest.mark.parametrize(("p", "text"), [(0.04996, "p < .05"), (0.05, "p = .050"), (0.0494, "p = .049")])
def test_rounding_does_not_carry_p_over_the_level(p: float, text: str):
    assert p_text(p) == text
    assert p_value(p) == {"p < .05": "< 0.05", "p = .050": "0.050", "p = .049": "0.049"}[text]


# What a sentence must not say.


def test_a_method_with_fewer_seeds_is_not_said_to_have_all(tmp_path: Path):
    right = {"eng-ft": {"sw": [share(9), share(19)]}, "adamergex": {"sw": [share(9)]}}
    found = ran(tmp_path, right, seeds=[0, 1], seeds_of={"adamergex": [0]})
    assert any(c.startswith("AdaMergeX's intervals are of one seed") for c in headline(found)["cautions"])
    assert not any("mean of 2 seeds" in c for c in headline(found)["cautions"])


def test_nothing_is_said_of_trainings_where_there_are_none(tmp_path: Path):
    said = headline(ran(tmp_path, {"vanilla": {"sw": [share(9)]}}))
    assert not any("trained" in c for c in said["cautions"])


def same_adapter(tmp_path: Path, seeds: Sequence[str], grafted: str, curve: bool = True) -> str:
    points = [{"weight": 0.0, "gold_log_likelihood": -1.0}] if curve else []
    right = {"eng-ft": {"sw": seeds}, "adamergex": {"sw": [grafted]}}
    run = make_run(tmp_path, right, chosen={"weight": 0.0, "curve": points}, seeds=[0, 1], targets=["sw"])
    return headline(results(run))["answer"]


def test_one_adapter_of_fewer_seeds_has_not_the_average_of_all(tmp_path: Path):
    said = same_adapter(tmp_path, [share(10), share(30)], share(10))
    assert "and so does English fine-tuning of the same seeds: λ = 0 was chosen" in said


def test_a_weight_that_was_given_was_not_chosen(tmp_path: Path):
    assert "λ = 0 was given, so nothing" in same_adapter(tmp_path, [share(10)], share(10), curve=False)


def test_what_differs_is_not_said_to_be_one_adapter(tmp_path: Path):
    said = same_adapter(tmp_path, [share(10)], share(20))
    assert "one adapter" not in said
    assert "25.0 points more than English fine-tuning" in said


def test_why_there_is_no_difference_is_the_reason(tmp_path: Path):
    right = {"eng-ft": {"sw": [share(5)]}, "adamergex": {"sw": [share(35)], "vi": [share(35)]}}
    said = headline(ran(tmp_path, right))["answer"]
    assert "cannot be told on average (it has no figures in Vietnamese); one by one it is better in 1" in said
    assert "items of their own" not in said


def test_marks_against_another_baseline_are_not_counted(tmp_path: Path):
    right = {
        m: {"sw": [share(n)], "vi": [share(n)]} for m, n in (("eng-ft", 5), ("translate-train", 35), ("flare", 35))
    }
    said = headline(ran(tmp_path, right, names={"vi": [f"other{n}" for n in range(N)]}))
    assert said["baseline"] == "translate-train"
    assert "one by one" not in said["answer"]
    assert said["answer"].endswith("cannot be told on average (its languages have items of their own).")


def test_figures_without_an_average_have_their_unit(tmp_path: Path):
    right = {"eng-ft": {"sw": [share(9)], "vi": [share(9)]}, "adamergex": {"sw": [share(10)]}}
    assert headline(ran(tmp_path, right))["answer"].endswith("; its accuracy is 25.0 % in Swahili.")


def test_the_end_of_an_interval_is_zero_only_where_it_is(tmp_path: Path):
    found = ran(tmp_path, {"eng-ft": {"sw": [share(5)]}, "adamergex": {"sw": [share(35)]}})
    found["methods"]["adamergex"]["average"] |= {"difference": 0.02, "difference_interval": [0.0003, 0.04], "p": 0.03}
    said = headline(found)
    assert said["verdict"] == "better"
    assert "(+0.03 to +4.0, p = .030)" in said["answer"]


def test_counts_of_items_are_of_all_languages_or_of_some(tmp_path: Path):
    right = {m: {"sw": ["1"], "vi": [share(9)]} for m in ("eng-ft", "adamergex")}
    assert any(
        c.startswith("In some languages only 1 item was asked") for c in headline(ran(tmp_path, right))["cautions"]
    )
