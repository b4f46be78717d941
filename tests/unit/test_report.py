"""Reports, from a run made by hand: every figure is worked out on paper."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lingraft.commands.reporting import show_report
from lingraft.digests import digest_value
from lingraft.errors import StoreError, UserError
from lingraft.metrics import Prediction
from lingraft.predictions import write_evaluation
from lingraft.report import readings
from lingraft.report.results import FORMAT, results
from lingraft.report.tables import (
    NO_DATA,
    average_table,
    csv_text,
    curve_table,
    difference_table,
    language_table,
    markdown,
    notes,
    p_value,
    percent,
)
from lingraft.report.terminal import lines, show
from lingraft.store import Store, write_json

Right = Mapping[str, Mapping[str, Sequence[str]]]
"""Method → language → for each seed, which items were answered rightly, as in "1100"."""
RIGHT: Right = {
    "vanilla": {"en": ["1000"], "sw": ["0000"], "vi": ["1000"]},
    "eng-ft": {"en": ["1111", "1110"], "sw": ["1000", "1100"], "vi": ["1100", "1100"]},
    "tgt-ft": {"sw": ["1111", "1111"], "vi": ["1110", "1110"]},
    "adamergex": {"sw": ["1100", "1110"], "vi": ["1000", "1100"]},
}
CURVE = [
    {"weight": 0.0, "gold_log_likelihood": -0.9, "accuracy": 0.5, "scores": 2},
    {"weight": 0.5, "gold_log_likelihood": -0.7, "accuracy": 0.6, "scores": 2},
    {"weight": 1.0, "gold_log_likelihood": -0.8, "accuracy": 0.7, "scores": 2},
]


def predictions(right: str, names: Sequence[str]) -> list[Prediction]:
    """Two candidates, the first is gold; sure of three quarters."""
    likely = (math.log(0.75), math.log(0.25))
    return [Prediction(n, 0, likely if r == "1" else likely[::-1], "?") for r, n in zip(right, names, strict=True)]


def make_run(
    folder: Path,
    right: Right = RIGHT,
    *,
    absent: Sequence[Sequence[str]] = (),
    names: Mapping[str, Sequence[str]] | None = None,
    chosen: Mapping[str, Any] | None = None,
    **experiment: Any,
) -> Path:
    """Writes a store and a manifest with the library's own functions."""
    store = Store(folder / "store")

    def made(kind: str, *what: Any, **files: Any) -> str:
        """A finished step with JSON files, or what the caller adds to it."""
        place = f"{kind}/{digest_value(what, 24)}"
        with store.making(*place.split("/"), {"what": what}) as work:
            for name, value in files.items():
                write_json(work / f"{name}.json", value)
        return place

    cells: list[dict[str, Any]] = []
    for method, by_language in right.items():
        for language, seeds in by_language.items():
            for seed, answers in enumerate(seeds):
                predicted = ("predict", digest_value([method, language, seed], 24))
                items = (names or {}).get(language, [f"i{n}" for n in range(len(answers))])
                found = predictions(answers, items)
                with store.making(*predicted, {}) as work:
                    # Items are matched by name, whatever their order in the file.
                    write_evaluation(work, found[::-1] if seed else found, ["yes", "no"])
                place = "/".join(predicted)
                cell = {"method": method, "language": language, "seed": seed}
                cells.append(cell | {"predict": place, "score": place, "adapter": None})
                if method == "adamergex":
                    cells[-1]["adapter"] = made("merge", language, seed)
    selections: list[dict[str, Any]] = []
    if "adamergex" in right:
        chosen = {"weight": 0.5, "criterion": "gold_log_likelihood", "curve": CURVE} if chosen is None else chosen
        path = made("select", selected=chosen)
        selections.append({"method": "adamergex", "language": None, "path": f"{path}/selected.json"})
    compared = made("compare", similarity={"cosine": 0.25, "norms": [3.0, 4.0]})
    manifest = {
        "format": FORMAT,
        "experiment": {
            "name": "by-hand",
            "task": "topics",
            "source": "en",
            "targets": ["sw", "vi"],
            "development": ["tr"],
            "seeds": [0, 1],
            "note": None,
        }
        | experiment,
        "backbone": {"name": "fake", "digest": "fake:1"},
        "store": "store",
        "cells": cells,
        "selections": selections,
        "comparisons": [{"language": "sw", "seed": 0, "path": f"{compared}/similarity.json"}],
        "absent": [list(a) for a in absent],
        "plan": "x",
    }
    write_json(folder / "manifest.json", manifest)
    return folder


def plain(found: dict[str, Any], width: int = 200) -> str:
    out = io.StringIO()
    show(found, Console(file=out, width=width))
    return out.getvalue()


# Figures.


def test_accuracy_is_the_mean_over_seeds(tmp_path: Path):
    methods = results(make_run(tmp_path))["methods"]
    sw = methods["eng-ft"]["languages"]["sw"]
    assert sw["by_seed"] == [0.25, 0.5]
    assert sw["value"] == 0.375
    assert methods["eng-ft"]["languages"]["en"]["value"] == 0.875
    assert methods["adamergex"]["languages"]["vi"]["value"] == 0.375
    assert methods["vanilla"]["languages"]["sw"]["by_seed"] == [0.0]


def test_macro_f1_and_log_likelihood_are_means_over_seeds(tmp_path: Path):
    sw = results(make_run(tmp_path))["methods"]["eng-ft"]["languages"]["sw"]
    # Gold is always the first class: F1 of 1 right of 4 is 2/5, of 2 right 4/6; the other class has none.
    assert sw["also"]["macro_f1"] == pytest.approx((2 / 5 / 2 + 4 / 6 / 2) / 2)
    of_seed = [(n * math.log(0.75) + (4 - n) * math.log(0.25)) / 4 for n in (1, 2)]
    assert sw["also"]["gold_log_likelihood"] == pytest.approx(sum(of_seed) / 2, abs=1e-6)


def test_the_average_is_over_targets_without_the_source(tmp_path: Path):
    methods = results(make_run(tmp_path))["methods"]
    assert methods["eng-ft"]["average"]["value"] == pytest.approx((0.375 + 0.5) / 2)
    assert methods["adamergex"]["average"]["value"] == pytest.approx((0.625 + 0.375) / 2)


def test_differences_are_against_eng_ft(tmp_path: Path):
    methods = results(make_run(tmp_path))["methods"]
    assert methods["adamergex"]["languages"]["sw"]["difference"] == pytest.approx(0.25)
    assert methods["adamergex"]["languages"]["vi"]["difference"] == pytest.approx(-0.125)
    assert methods["adamergex"]["average"]["difference"] == pytest.approx(0.0625)
    assert methods["vanilla"]["languages"]["en"]["difference"] == pytest.approx(0.25 - 0.875)
    assert "difference" not in methods["eng-ft"]["languages"]["sw"]
    assert "difference" not in methods["eng-ft"]["average"]
    low, high = methods["adamergex"]["average"]["difference_interval"]
    assert low <= 0.0625 <= high


def test_gap_closed_is_a_ratio_of_sums_not_a_mean_of_ratios(tmp_path: Path):
    methods = results(make_run(tmp_path))["methods"]
    # Gained +0.25 of a gap of 0.625 in Swahili, −0.125 of 0.25 in Vietnamese.
    assert methods["adamergex"]["languages"]["sw"]["gap_closed"]["value"] == pytest.approx(0.4)
    assert methods["adamergex"]["languages"]["vi"]["gap_closed"]["value"] == pytest.approx(-0.5)
    assert methods["adamergex"]["average"]["gap_closed"]["value"] == pytest.approx(1 / 7)
    low, high = methods["adamergex"]["average"]["gap_closed"]["interval"]
    assert low <= 1 / 7 <= high
    assert "gap_closed" not in methods["tgt-ft"]["average"]


@pytest.mark.parametrize("ceiling", ["1000", "0000"])
def test_where_there_is_no_gap_none_is_closed(tmp_path: Path, ceiling: str):
    right = {
        "eng-ft": {"sw": ["1000"]},
        "tgt-ft": {"sw": [ceiling]},
        "adamergex": {"sw": ["1110"]},
    }
    found = results(make_run(tmp_path, right, targets=["sw"], seeds=[0]))
    gap = found["methods"]["adamergex"]["average"]["gap_closed"]
    assert (gap["value"], gap["interval"]) == (None, None)
    assert "there is no gap" in gap["why"]
    assert average_table(found)[1][2][-1] == "–"
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))


def test_without_a_ceiling_there_is_no_gap_to_close(tmp_path: Path):
    right = {m: RIGHT[m] for m in ("eng-ft", "adamergex")}
    average = results(make_run(tmp_path, right))["methods"]["adamergex"]["average"]
    assert "gap_closed" not in average
    assert average["difference"] == pytest.approx(0.0625)


def test_without_eng_ft_there_is_nothing_to_compare_with(tmp_path: Path):
    found = results(make_run(tmp_path, {"adamergex": RIGHT["adamergex"]}))
    assert "difference" not in found["methods"]["adamergex"]["average"]
    assert average_table(found)[1][0][-3:] == ["–", "–", "–"]


def test_languages_with_other_items_are_averaged_but_not_resampled_together(tmp_path: Path):
    found = results(make_run(tmp_path, names={"vi": ["a", "b", "c", "d"]}))
    average = found["methods"]["adamergex"]["average"]
    assert average["value"] == pytest.approx(0.5)
    assert average["interval"] is None
    assert "difference" not in average
    assert found["methods"]["adamergex"]["languages"]["vi"]["difference"] == pytest.approx(-0.125)
    assert average_table(found)[1][3][1:] == ["50.0", "–", "–", "–"]
    assert plain(found)


def test_a_clear_difference_has_a_small_p_and_none_has_p_one(tmp_path: Path):
    right = {
        "eng-ft": {"sw": ["0" * 40]},
        "adamergex": {"sw": ["1" * 40]},
        "vanilla": {"sw": ["0" * 40]},
    }
    methods = results(make_run(tmp_path, right, targets=["sw"], seeds=[0]))["methods"]
    assert methods["adamergex"]["average"]["p"] < 0.001
    assert methods["adamergex"]["average"]["difference_interval"] == [1.0, 1.0]
    assert methods["vanilla"]["average"]["p"] == 1


def test_a_run_that_is_moved_with_its_store_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    methods = results(make_run(tmp_path / "here"))["methods"]
    (tmp_path / "here").rename(tmp_path / "there")
    assert results(tmp_path / "there")["methods"] == methods
    monkeypatch.chdir(tmp_path)
    assert results(Path("there"))["methods"] == methods


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="not a finished run"):
        results(tmp_path)


@pytest.mark.parametrize("kind", ["predict", "select", "compare"])
def test_a_corrupted_step_is_an_error_and_no_number(tmp_path: Path, kind: str):
    run = make_run(tmp_path)
    path = next(p for p in sorted((tmp_path / "store" / kind).glob("*/*")) if p.name != "step.json")
    path.write_bytes(path.read_bytes().replace(b"0", b"1"))
    with pytest.raises(StoreError, match="changed") as caught:
        results(run)
    assert caught.value.where == str(path.parent)
    assert "lingraft run" in str(caught.value.remedy)


@pytest.mark.parametrize("place", ["../../etc", "predict/../../etc", "/etc/x", "predict", ""])
def test_no_place_in_a_manifest_leads_out_of_the_store(tmp_path: Path, place: str):
    run = make_run(tmp_path)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["cells"][0]["predict"] = place
    write_json(run / "manifest.json", manifest)
    with pytest.raises(StoreError, match="no step is called"):
        results(run)


# Tables.


def test_tables_have_a_row_a_method_and_languages_by_name(tmp_path: Path):
    found = results(make_run(tmp_path))
    header, rows = language_table(found)
    assert header == ["method", "English", "Swahili", "Vietnamese"]
    assert [row[0] for row in rows] == ["Vanilla", "Eng-FT", "Tgt-FT", "AdaMergeX"]
    assert all(len(row) == len(header) for row in rows)
    assert rows[1][1].startswith("87.5 [")
    # Grafts and ceilings are not made for the source: nothing is missing there.
    assert rows[3][1] == rows[2][1] == ""
    header, averages = average_table(found)
    assert header == ["method", "average of targets", "against Eng-FT", "p", "gap closed"]
    assert [row[0] for row in averages] == [row[0] for row in rows]
    assert all(len(row) == len(header) for row in averages)
    assert averages[3][1].startswith("50.0 [")
    assert averages[3][2].startswith("+6.2 [")
    assert averages[3][4].startswith("14 % [")


def test_second_stages_are_measured_against_the_one_without_fusion(tmp_path: Path):
    fused = {"sw": [[1, 1, 1, 0], [1, 1, 1, 1]], "vi": [[1, 1, 0, 0], [1, 1, 1, 1]]}
    right = {"eng-ft": RIGHT["eng-ft"], "translate-train": RIGHT["tgt-ft"], "flare": fused}
    found = results(make_run(tmp_path, right))
    average = found["methods"]["flare"]["average"]
    rows = {row[0]: row for row in average_table(found)[1]}
    assert average_table(found)[0][-2:] == ["against LoRA", "p"]
    unfused = found["methods"]["translate-train"]["average"]["value"]
    assert average["against_unfused"]["difference"] == pytest.approx(average["value"] - unfused)
    assert average["difference"] == pytest.approx(average["value"] - found["methods"]["eng-ft"]["average"]["value"])
    assert rows["FLARE"][-2].startswith(f"{100 * average['against_unfused']['difference']:+.1f}")
    assert rows["LoRA (translate-train)"][-2:] == ["", ""]
    assert "against_unfused" not in found["methods"]["translate-train"]["average"]


def test_a_target_without_data_says_so_and_has_no_average(tmp_path: Path):
    right = {**RIGHT, "tgt-ft": {"sw": RIGHT["tgt-ft"]["sw"]}}
    found = results(make_run(tmp_path, right, absent=[("tgt-ft", "vi", "no labelled training data")]))
    assert language_table(found)[1][2][3] == NO_DATA
    assert average_table(found)[1][2][1:] == ["–"] * 4
    assert found["methods"]["tgt-ft"]["average"] is None
    assert "Tgt-FT, Vietnamese: no labelled training data." in notes(found)
    # What can be said of the other language is said.
    assert found["methods"]["adamergex"]["languages"]["sw"]["gap_closed"]["value"] == pytest.approx(0.4)
    assert "gap_closed" not in found["methods"]["adamergex"]["average"]


def test_the_curve_marks_the_chosen_weight_once(tmp_path: Path):
    _, rows = curve_table(results(make_run(tmp_path)))
    assert [row[1] for row in rows] == ["0", "0.5", "1"]
    assert [row[4] for row in rows] == ["", "chosen", ""]
    assert rows[1][2:4] == ["-0.7000", "60.0"]


def test_notes_say_what_was_tuned_where_and_what_the_intervals_cover(tmp_path: Path):
    said = notes(results(make_run(tmp_path, note="Small data.")))
    assert "2 seeds" in said[0]
    assert "do not cover" not in said[0]
    assert said[1] == "λ was chosen on Turkish only, and frozen before the test languages were scored."
    assert said[-1] == "Small data."


def test_one_seed_comes_with_a_warning(tmp_path: Path):
    right = {"eng-ft": {"sw": ["1000"], "vi": ["1000"]}}
    found = results(make_run(tmp_path, right, seeds=[0], development=[]))
    assert "do not cover how much trainings differ" in notes(found)[0]
    assert len(notes(found)) == 1


def test_a_star_stands_at_what_is_significant_among_all_comparisons(tmp_path: Path):
    right = {
        "eng-ft": {"sw": ["0" * 40], "vi": ["0" * 40]},
        "adamergex": {"sw": ["1" * 40], "vi": ["0" * 34 + "1" * 6]},
    }
    found = results(make_run(tmp_path, right, seeds=[0]))
    raw = found["methods"]["adamergex"]["languages"]["vi"]["p"]
    assert 0.025 < raw < 0.05
    header, rows = difference_table(found)
    assert header == ["against Eng-FT", "Swahili", "Vietnamese"]
    # Of two comparisons the larger p is left as it is.
    assert rows[0][1].startswith("+100.0* [")
    assert rows[0][2].startswith("+15.0* [")
    more = {**right, "vanilla": {"sw": ["0" * 40], "vi": ["0" * 40]}}
    found = results(make_run(tmp_path / "more", more, seeds=[0]))
    _, rows = difference_table(found)
    assert not any("*" in row[2] for row in rows)
    assert "* [" in average_table(found)[1][1][2]
    said = next(note for note in notes(found) if "Holm" in note)
    assert "for 4 differences of methods and languages, and for 2 of averages" in said
    assert said in plain(found)
    assert said in markdown(found)


def test_csv_parses_and_holds_the_full_figures(tmp_path: Path):
    found = results(make_run(tmp_path))
    rows = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert [(r["method"], r["language"]) for r in rows] == [
        ("vanilla", "en"), ("vanilla", "sw"), ("vanilla", "vi"), ("vanilla", "average"),
        ("eng-ft", "en"), ("eng-ft", "sw"), ("eng-ft", "vi"), ("eng-ft", "average"),
        ("tgt-ft", "sw"), ("tgt-ft", "vi"), ("tgt-ft", "average"),
        ("adamergex", "sw"), ("adamergex", "vi"), ("adamergex", "average"),
    ]  # fmt: skip
    assert all(None not in row and None not in row.values() for row in rows)
    last = rows[-1]
    assert float(last["accuracy"]) == 0.5
    assert float(last["difference"]) == 0.0625
    assert float(last["gap_closed"]) == pytest.approx(1 / 7)
    assert float(last["low"]) <= 0.5 <= float(last["high"])
    assert rows[5]["difference"] == rows[5]["gap_closed"] == ""


def test_markdown_is_a_table_whatever_stands_in_a_cell(tmp_path: Path):
    found = results(make_run(tmp_path))
    found["methods"]["eng-ft"]["title"] = "a|b"
    table = [line for line in markdown(found).splitlines() if line.startswith("|")]
    assert any(line.startswith("| a\\|b |") for line in table)
    # Two tables of four methods, a header and a rule each: four and five columns.
    assert [line.replace("\\|", "").count("|") for line in table[:12]] == [5] * 6 + [6] * 6


def test_markdown_has_every_part(tmp_path: Path):
    text = markdown(results(make_run(tmp_path)))
    for part in ("# by-hand", "## λ on the development languages", "## Likeness of the reference updates", "0.250"):
        assert part in text
    assert "λ on the" not in markdown(results(make_run(tmp_path / "few", {"vanilla": RIGHT["vanilla"]})))


@pytest.mark.parametrize(
    ("p", "text"), [(None, "–"), (1e-9, "< 0.001"), (0.00099, "< 0.001"), (0.0123, "0.012"), (1.0, "1.000")]
)
def test_p_values_are_never_zero(p: float | None, text: str):
    assert p_value(p) == text


def test_shares_are_percentages():
    assert (percent(0.12345), percent(1, 0), percent(None)) == ("12.3", "100", "–")


# The terminal.


@pytest.mark.parametrize("name", ["[brackets]", "[/b] x", "[red]a[/red]", "[link=x]"])
def test_brackets_in_names_are_printed_as_they_are(tmp_path: Path, name: str):
    found = results(make_run(tmp_path, note=f"note {name}", name=f"run {name}"))
    found["methods"]["adamergex"]["title"] = f"title{name}"
    text = plain(found)
    for words in (f"note {name}", f"run {name}", f"title{name}"):
        assert words in text
    assert "← chosen" in text


@pytest.mark.parametrize("name", ["[brackets]", "/tmp/[/b]/x"])
def test_brackets_in_a_plain_table_are_printed_as_they_are(name: str):
    out = io.StringIO()
    lines(["", name], [[name, "b"]], Console(file=out, width=100))
    assert out.getvalue().count(name) == 2


def test_a_narrow_terminal_gets_the_figures_without_their_intervals(tmp_path: Path):
    found = results(make_run(tmp_path))
    wide, narrow = plain(found, 120), plain(found, 60)
    interval = language_table(found)[1][1][1].split(" ", 1)[1]
    assert interval in wide
    assert interval not in narrow
    assert "87.5" in narrow
    assert all(len(line) <= 60 for line in narrow.splitlines())


def test_a_flat_curve_is_drawn(tmp_path: Path):
    found = results(make_run(tmp_path))
    found["selections"]["adamergex"]["curve"] = [p | {"gold_log_likelihood": -1.0} for p in CURVE]
    assert plain(found).count("█" * 24) == 3


def test_a_given_weight_has_no_curve(tmp_path: Path):
    run = make_run(tmp_path, development=[], chosen={"weight": 0.7, "curve": []})
    found = results(run)
    assert "0.7  as given" in plain(found)
    assert curve_table(found)[1] == [["AdaMergeX", "0.7", "", "", "as given"]]
    assert "λ was given." in notes(found)


def test_a_report_is_written_beside_the_manifest_also_in_a_folder_with_brackets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "400")
    run = make_run(tmp_path / "a [/b] run")
    assert show_report(run, as_json=False) is None
    said = capsys.readouterr()
    assert "by-hand: accuracy, percent" in said.out
    assert f"written to {run}: report.md, results.csv, results.json" in said.err
    assert json.loads((run / "results.json").read_text(encoding="utf-8"))["name"] == "by-hand"
    assert (run / "report.md").read_text(encoding="utf-8").startswith("# by-hand\n")
    adapters = sorted(p.name for p in (run / "adapters").iterdir())
    assert adapters == [f"adamergex-{c}-seed{n}" for c in ("sw", "vi") for n in (0, 1)]
    # Again, the same; as JSON, the figures themselves.
    found = show_report(run, as_json=True)
    assert found is not None
    assert found["methods"]["eng-ft"]["languages"]["sw"]["value"] == 0.375
    assert sorted(p.name for p in (run / "adapters").iterdir()) == adapters


def test_methods_without_data_in_a_language_are_said_in_one_line_and_an_empty_source_takes_no_column(tmp_path: Path):
    right = {"eng-ft": {"sw": ["10"], "vi": ["11"]}, "vanilla": {"sw": ["00"], "vi": ["01"]}}
    absent = [("vanilla", "en", "no labelled test data"), ("eng-ft", "en", "no labelled test data")]
    found = results(make_run(tmp_path, right, absent=absent))
    assert "Vanilla, Eng-FT, English: no labelled test data." in notes(found)
    assert language_table(found)[0] == ["method", "Swahili", "Vietnamese"]


# Files that somebody else may have written.


@pytest.mark.parametrize("name", ["experiment", "backbone", "cells", "selections", "comparisons", "absent", "store"])
@pytest.mark.parametrize("value", [None, 3, [1], {"a": 1}], ids=repr)
def test_a_manifest_of_another_shape_is_refused_in_words(tmp_path: Path, name: str, value: Any):
    run = make_run(tmp_path)
    manifest = json.loads((run / "manifest.json").read_text())
    write_json(run / "manifest.json", {**manifest, name: value})
    with pytest.raises(UserError, match="not one that lingraft wrote"):
        results(run)


@pytest.mark.parametrize("manifest", [[1], "x", {"format": FORMAT}, {"format": FORMAT, "metric": "guesses"}], ids=repr)
def test_what_is_no_manifest_is_refused(tmp_path: Path, manifest: Any):
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(UserError):
        results(tmp_path)


def test_known_results_of_another_shape_are_had_anew(tmp_path: Path):
    run = make_run(tmp_path)
    (run / "results.json").write_text("[1]")
    found = show_report(run, True, fresh=False)
    assert found is not None
    assert found["name"] == "by-hand"


def test_a_second_report_verifies_the_store_again(tmp_path: Path):
    run = make_run(tmp_path)
    results(run)
    path = next((run / "store" / "predict").rglob("predictions.jsonl"))
    path.write_text(path.read_text().replace("0", "1"))
    with pytest.raises(StoreError):
        results(run)


def test_answers_are_kept_only_where_they_are_wanted_again(tmp_path: Path):
    run = make_run(tmp_path)
    for keep in (False, True):
        results(run, keep=keep)
        (kept,) = readings._LAST.values()
        assert bool(kept._kept) == keep
