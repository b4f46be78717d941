"""Examples: what methods answered and why, item by item, each text once, bounded and drawn the same every time."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lingraft.digests import digest_value
from lingraft.errors import StoreError
from lingraft.metrics import Generated, Prediction, Scored
from lingraft.predictions import PREDICTIONS, write_evaluation, write_generated, write_scored
from lingraft.report.examples import examples
from lingraft.report.results import FORMAT, results
from lingraft.store import Store, write_json
from tests.unit.test_report import RIGHT, make_run

LABELS = [["place", "a place"], ["sport", "sport"], ["war", "war"]]


def cell_run(
    folder: Path, cells: Sequence[tuple[str, str, int, Any]], metric: str = "accuracy", **experiment: Any
) -> Path:
    """A run of cells with their own predictions: lists of `Prediction`, or pairs of `Generated` and `Scored`."""
    store, made = Store(folder / "store"), []
    for method, language, seed, answers in cells:
        key = digest_value([method, language, seed], 24)
        record = {"config": {"task": {"task": "kind", "answers": LABELS}, "language": language}}
        with store.making("predict", key, record) as work:
            if isinstance(answers[0], Prediction):
                write_evaluation(work, answers, [label for label, _ in LABELS])
            else:
                write_generated(work, [g for g, _ in answers])
        with store.making("score", key, {}) as work:
            if not isinstance(answers[0], Prediction):
                write_scored(work, [s for _, s in answers])
            mean = sum(s.figures[metric] for _, s in answers) / len(answers) if metric == "rouge_l" else 0.5
            write_json(work / "scores.json", {metric: {"value": mean}})
        place = {"predict": f"predict/{key}", "score": f"score/{key}", "adapter": None}
        made.append({"method": method, "language": language, "seed": seed, **place})
    targets = [code for code in dict.fromkeys(c for _, c, _, _ in cells) if code != "en"]
    plain = {
        "name": "x",
        "task": "kind",
        "source": "en",
        "targets": targets,
        "development": [],
        "seeds": [0],
        "note": None,
    }
    manifest = {
        "format": FORMAT,
        "experiment": plain | experiment,
        "metric": metric,
        "backbone": {"name": "fake", "digest": "fake:1"},
        "store": "store",
        "steps": [],
        "cells": made,
        "selections": [],
        "comparisons": [],
        "absent": [],
        "plan": "x",
    }
    write_json(folder / "manifest.json", manifest)
    return folder


def one(found: dict[str, Any], code: str, method: str, place: int = 0) -> dict[str, Any]:
    """An answer in words."""
    column = {name: values[place] for name, values in found["items"][code]["answers"][method].items()}
    words = {k: None if v == -1 else found["strings"][v] for k, v in column.items() if k != "value"}
    return {**words, "value": column["value"]}


def shown(run: Path, **options: Any) -> dict[str, Any]:
    found = examples(run, results(run), **options)
    json.dumps(found, allow_nan=False)
    return found


def test_candidates_are_answered_by_name_with_likelihoods_in_words(tmp_path: Path):
    said = [
        Prediction("a", 0, (-1.2, -2.314, -9.0), "Where?"),
        Prediction("b", 2, (-3.0, -0.5, -4.0), "What?", truncated=True),
    ]
    found = shown(cell_run(tmp_path, [("eng-ft", "sw", 0, said)]))
    assert found["labels"] == ["place", "sport", "war"]
    assert found["items"]["sw"]["id"] == ["a", "b"]
    assert [found["strings"][n] for n in found["items"]["sw"]["prompt"]] == ["Where?", "What?"]
    assert [found["strings"][n] for n in found["items"]["sw"]["gold"]] == ["place", "war"]
    first = {"answer": "place", "reason": "log-likelihood −1.20; next: sport −2.31", "prompt": None, "value": 1.0}
    assert one(found, "sw", "eng-ft") == first
    second = one(found, "sw", "eng-ft", 1)
    assert second["answer"] == "sport"
    assert second["reason"] == "log-likelihood −0.50; next: place −3.00; the prompt was cut"
    assert second["value"] == 0.0


def test_written_answers_are_what_was_written_and_how_it_was_read(tmp_path: Path):
    texts = [
        (Generated("a", "Sum?", "It is red.", ("red", "crimson")), Scored("a", "red", "after 'is'", {"rouge_l": 0.5})),
        (Generated("b", "Sum?", "", ("blue",)), Scored("b", None, "nothing is written", {"rouge_l": 0.0})),
    ]
    found = shown(cell_run(tmp_path, [("vanilla", "sw", 0, texts)], "rouge_l"))
    assert found["strings"][found["items"]["sw"]["gold"][0]] == "red | crimson"
    assert one(found, "sw", "vanilla") == {
        "answer": "It is red.",
        "reason": "read as “red”: after 'is'",
        "value": 0.5,
        "prompt": None,
    }
    assert one(found, "sw", "vanilla", 1)["reason"] == "cannot be read: nothing is written"
    assert one(found, "sw", "vanilla", 1)["answer"] == ""


def test_only_the_lowest_seed_is_shown_in_the_experiments_order(tmp_path: Path):
    run = make_run(tmp_path)
    found = shown(run)
    assert found["languages"] == ["en", "sw", "vi"]
    assert found["methods"] == ["vanilla", "eng-ft", "tgt-ft", "adamergex"]
    assert found["seed"] == 0
    for name, by_language in RIGHT.items():
        for code, seeds in by_language.items():
            values = found["items"][code]["answers"][name]["value"]
            assert values == [float(r) for r in seeds[0]]
    assert found["left_out"] == 0


def test_differ_names_the_items_on_which_some_are_right_and_some_wrong(tmp_path: Path):
    right = {"vanilla": {"sw": ["0011"]}, "eng-ft": {"sw": ["0101"]}}
    found = shown(make_run(tmp_path, right, targets=["sw"], seeds=[0]))
    assert found["differ"] == {"sw": [1, 2]}


def test_every_text_stands_once(tmp_path: Path):
    found = shown(make_run(tmp_path))
    assert len(found["strings"]) == len(set(found["strings"]))
    used = {n for items in found["items"].values() for n in (*items["gold"], *items["prompt"])}
    for items in found["items"].values():
        for column in items["answers"].values():
            used |= {n for name in ("answer", "reason", "prompt") for n in column[name]}
    assert used - {-1} == set(range(len(found["strings"])))


def test_another_prompt_than_the_items_own_is_carried(tmp_path: Path):
    plain, thought = ([Prediction("a", 0, (-1.0, -2.0, -3.0), text)] for text in ("Q", "Think. Q"))
    found = shown(cell_run(tmp_path, [("vanilla", "sw", 0, plain), ("xlt", "sw", 0, thought)]))
    assert one(found, "sw", "vanilla")["prompt"] is None
    assert one(found, "sw", "xlt")["prompt"] == "Think. Q"


def test_a_method_asked_on_a_sample_has_gaps(tmp_path: Path):
    full = [Prediction(n, 0, (-1.0, -2.0, -3.0), n) for n in "abc"]
    found = shown(cell_run(tmp_path, [("eng-ft", "sw", 0, full), ("xlt", "sw", 0, full[1:2])]))
    column = found["items"]["sw"]["answers"]["xlt"]
    assert found["items"]["sw"]["id"] == ["a", "b", "c"]
    assert [n >= 0 for n in column["answer"]] == [False, True, False]
    assert column["value"] == [None, 1.0, None]


@pytest.mark.parametrize("most", [0, 1, 7, 20, 39, 79, 80, 1000])
def test_no_more_is_carried_than_asked_for_and_what_differs_comes_first(tmp_path: Path, most: int):
    right = {"vanilla": {"sw": ["01" * 10], "vi": ["01" * 10]}, "eng-ft": {"sw": ["0" * 20], "vi": ["0" * 20]}}
    run = make_run(tmp_path, right, targets=["sw", "vi"], seeds=[0])
    found = shown(run, most=most)
    answers = [n for i in found["items"].values() for a in i["answers"].values() for n in a["answer"]]
    assert len(answers) <= most
    assert found["left_out"] == 80 - len(answers)
    for code, items in found["items"].items():
        assert items["id"] == sorted(items["id"], key=lambda name: int(name[1:]))
        assert len(found["differ"][code]) == min(10, len(items["id"]))
    assert shown(run, most=most) == found


def test_a_small_language_leaves_its_room_to_others(tmp_path: Path):
    right = {"eng-ft": {"sw": ["1"], "vi": ["1" * 50]}}
    run = make_run(tmp_path, right, targets=["sw", "vi"], seeds=[0])
    found = shown(run, most=41)
    assert [len(found["items"][code]["id"]) for code in ("sw", "vi")] == [1, 40]


def test_predictions_are_read_once_for_figures_and_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, read = make_run(tmp_path), []
    original = Path.read_text

    def counted(self: Path, *args: Any, **more: Any) -> str:
        read.append(self)
        return original(self, *args, **more)

    monkeypatch.setattr(Path, "read_text", counted)
    found = results(run, keep=True)
    examples(run, found)
    files = [path for path in read if path.name == PREDICTIONS]
    assert len(files) == len(set(files))
    assert files


def test_damaged_lines_are_an_error_that_names_the_folder(tmp_path: Path):
    run = cell_run(tmp_path, [("eng-ft", "sw", 0, [Prediction("a", 0, (-1.0, -2.0, -3.0), "?")])])
    found, place = results(run), json.loads((run / "manifest.json").read_text())["cells"][0]["predict"]
    (run / "store" / place / PREDICTIONS).write_text('{"id": "a"}\n')
    write_json(run / "manifest.json", {**json.loads((run / "manifest.json").read_text()), "plan": "y"})
    with pytest.raises(StoreError, match="changed"):
        examples(run, found)
