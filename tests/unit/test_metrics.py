"""Metrics by hand, and predictions that are on disk what they were in memory."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingraft.errors import StoreError
from lingraft.metrics import Prediction, accuracy, gold_log_likelihood, macro_f1
from lingraft.predictions import (
    PREDICTIONS,
    read_predictions,
    read_scores,
    score,
    write_evaluation,
    write_predictions,
)

SCORES = st.lists(st.floats(-50, 0), min_size=2, max_size=4)


def said(gold: int, answer: int, classes: int = 3, name: str = "") -> Prediction:
    return Prediction(name, gold, tuple(0.0 if i == answer else -1.0 for i in range(classes)))


# Rows: gold, columns: answer.
CONFUSION = [[3, 1, 0], [2, 2, 1], [0, 0, 1]]
CONFUSED = [said(g, a) for g, row in enumerate(CONFUSION) for a, n in enumerate(row) for _ in range(n)]


def test_accuracy_is_the_diagonal_of_the_confusion_matrix():
    assert accuracy(CONFUSED) == pytest.approx(6 / 10)


def test_macro_f1_is_the_mean_over_classes_of_two_rights_by_gold_and_answered():
    # Gold 4, 5, 1; answered 5, 3, 2; right 3, 2, 1.
    by_hand = (2 * 3 / (4 + 5) + 2 * 2 / (5 + 3) + 2 * 1 / (1 + 2)) / 3
    assert macro_f1(CONFUSED) == pytest.approx(by_hand)


def test_a_class_that_never_occurs_does_not_count():
    assert macro_f1([said(0, 0), said(1, 1)]) == 1
    assert macro_f1([said(0, 0), said(0, 2)]) == pytest.approx((2 / 3 + 0) / 2)


def test_always_the_largest_class_has_accuracy_but_little_macro_f1():
    found = [said(0, 0)] * 8 + [said(1, 0), said(2, 0)]
    assert accuracy(found) == 0.8
    assert macro_f1(found) == pytest.approx(2 * 8 / 18 / 3)


def test_of_equally_likely_answers_the_first_is_given():
    assert Prediction("", 0, (-1.0, -1.0, -2.0)).answer == 0
    assert Prediction("", 0, (-2.0, -1.0, -1.0)).answer == 1


def test_gold_log_likelihood_is_normalised_over_the_candidates():
    found = [Prediction("", 0, (math.log(0.3), math.log(0.1))), Prediction("", 1, (math.log(0.02), math.log(0.06)))]
    assert gold_log_likelihood(found) == pytest.approx(math.log(0.75))
    assert Prediction("", 1, (-3.0, -3.0, -3.0)).gold_log_likelihood == pytest.approx(math.log(1 / 3))


@given(SCORES, st.floats(-1e4, 1e4))
def test_gold_log_likelihoods_are_of_a_distribution_whatever_all_have_in_common(scores: list[float], common: float):
    moved = [Prediction("", i, tuple(s + common for s in scores)).gold_log_likelihood for i in range(len(scores))]
    assert sum(math.exp(x) for x in moved) == pytest.approx(1)
    given_ = [Prediction("", i, tuple(scores)).gold_log_likelihood for i in range(len(scores))]
    assert moved == pytest.approx(given_, abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1))
def test_metrics_do_not_depend_on_the_order_of_items(pairs: list[tuple[int, int]]):
    found = [said(g, a) for g, a in pairs]
    assert accuracy(found) == accuracy(found[::-1])
    assert macro_f1(found) == pytest.approx(macro_f1(found[::-1]))
    assert 0 <= macro_f1(found) <= 1
    assert (macro_f1(found) == 1) == (accuracy(found) == 1)


def test_a_score_holds_its_items_and_an_interval_around_its_mean():
    found = score(CONFUSED)
    assert found["items"] == 10
    low, high = found["accuracy"]["interval"]
    assert 0 <= low < found["accuracy"]["value"] == 0.6 < high <= 1
    assert found["macro_f1"]["value"] == macro_f1(CONFUSED)
    low, high = found["gold_log_likelihood"]["interval"]
    assert low < found["gold_log_likelihood"]["value"] < high


@given(st.lists(st.tuples(st.text(), st.integers(0, 1), st.floats(-40, 0), st.floats(-40, 0), st.text()), min_size=1))
def test_predictions_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, rows: list):
    folder = tmp_path_factory.mktemp("p")
    predictions = [Prediction(name, gold, (round(a, 6), round(b, 6)), prompt) for name, gold, a, b, prompt in rows]
    write_predictions(folder, predictions, ["x", "y"])
    assert read_predictions(folder) == predictions


def test_a_prompt_with_an_unusual_line_separator_is_one_line(tmp_path: Path):
    predictions = [Prediction("1", 0, (-1.0, -2.0), "one\u2028two\x85three\x1cfour\nfive")]
    write_predictions(tmp_path, predictions, ["x", "y"])
    assert read_predictions(tmp_path) == predictions


def test_predictions_name_the_answer_and_the_gold_label(tmp_path: Path):
    write_predictions(tmp_path, [Prediction("7", 0, (-2.0, -1.0), "λ?")], ["no", "yes"])
    line = json.loads((tmp_path / PREDICTIONS).read_text(encoding="utf-8"))
    assert line == {
        "id": "7",
        "gold": 0,
        "gold_label": "no",
        "answer": 1,
        "answer_label": "yes",
        "scores": [-2.0, -1.0],
        "prompt": "λ?",
    }


def test_the_answer_that_is_written_is_the_answer_that_is_scored(tmp_path: Path):
    # Equal once rounded to six digits, so that the first of equals is the answer, in the file and in the score.
    scores = write_evaluation(tmp_path, [Prediction("1", 1, (-1.0000001, -1.0))], ["x", "y"])
    line = json.loads((tmp_path / PREDICTIONS).read_text(encoding="utf-8"))
    assert line["answer"] == read_predictions(tmp_path)[0].answer == 0
    assert scores["accuracy"]["value"] == 0
    assert read_scores(tmp_path) == scores


@pytest.mark.parametrize("content", [None, "{", '{"id": "1"}\n'])
def test_missing_or_damaged_predictions_are_named(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / PREDICTIONS).write_text(content)
    with pytest.raises(StoreError, match="predictions cannot be read") as caught:
        read_predictions(tmp_path)
    assert caught.value.where == str(tmp_path / PREDICTIONS)
