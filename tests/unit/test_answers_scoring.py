"""What generated answers are worth: by hand, and by what must not matter."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingraft.answers.scoring import FIGURES, MAIN, Rule, macro_f1, read, score_generated
from lingraft.errors import ConfigError, DataError
from lingraft.metrics import Generated, Prediction
from lingraft.metrics import macro_f1 as macro_f1_of_indices
from lingraft.significance import mean_interval

LABELS = {"choice1": ("(A)", "A", "1"), "choice2": ("(B)", "B", "2")}
RULES = {
    "label": Rule("label", "Answer:", LABELS),
    "number": Rule("number", "####"),
    "extraction": Rule("extraction"),
    "summary": Rule("summary", "Summary:", stem=True),
}


def item(text: str | None, *references: str, **values) -> Generated:
    return Generated(values.pop("id", "1"), values.pop("prompt", ""), text, references, **values)


@pytest.mark.parametrize(
    ("kind", "language", "text", "reference", "figures"),
    [
        ("label", "en", "I think. Answer: (A)", "choice1", {"accuracy": 1}),
        ("label", "zh", "Answer：B", "choice1", {"accuracy": 0}),
        ("number", "de", "Zusammen\n#### 114.200", "114,200", {"accuracy": 1}),
        ("number", "th", "รวม ๓.๕", "3.5", {"accuracy": 1}),
        ("number", "en", "It is 3.5", "35", {"accuracy": 0}),
        ("extraction", "tr", "IŞIK\nSoru:", "ışık", {"exact_match": 1, "f1": 1}),
        ("extraction", "zh", "北京大学", "北京", {"exact_match": 0, "f1": 4 / 6}),
    ],
)
def test_items_by_hand(kind: str, language: str, text: str, reference: str, figures: dict):
    scored = read(item(text, reference), RULES[kind], language)
    assert scored.answer is not None
    assert scored.figures == pytest.approx(figures)


def test_a_summary_by_hand():
    pytest.importorskip("rouge_score", reason="the extra 'rouge' is not installed")
    rule = Rule("summary", "Summary:")
    scored = read(item("Summary: แมวดำ\n", "แมวน้ำ"), rule, "th")
    assert scored.answer == "แมวดำ"
    assert scored.figures == pytest.approx({"rouge_l": 2 * 3 / (4 + 4)})


@pytest.mark.parametrize(
    ("kind", "reference"), [("label", "choice1"), ("number", "3"), ("extraction", "x"), ("summary", "x")]
)
def test_what_cannot_be_parsed_is_none_and_worth_nothing_and_says_why(kind: str, reference: str):
    scored = read(item("", reference), RULES[kind], "en")
    assert scored.answer is None
    assert scored.reason
    assert dict(scored.figures) == dict.fromkeys(FIGURES[kind], 0)
    assert MAIN[kind] in scored.figures


@given(st.text(), st.text(), st.sampled_from(["label", "number", "extraction"]))
def test_the_prompt_is_never_read(prompt: str, text: str, kind: str):
    reference = {"label": "choice1", "number": "3", "extraction": "x"}[kind]
    bare = read(item(text, reference), RULES[kind], "en")
    for before in (prompt, f"{prompt} Answer: (A)", "#### 3", "x"):
        assert read(item(text, reference, prompt=before), RULES[kind], "en") == bare


def test_labels_as_a_whole_by_hand():
    texts = ["(A)", "(B)", "A or B", "(B)"]
    gold = ["choice1", "choice1", "choice1", "choice2"]
    items = [
        item(t, g, id=str(i), truncated=i == 0, gold_log_likelihood=-float(i))
        for i, (t, g) in enumerate(zip(texts, gold, strict=True))
    ]
    scored, result = score_generated(items, RULES["label"], "en")
    assert [s.answer for s in scored] == ["choice1", "choice2", None, "choice2"]
    assert list(result) == ["items", "accuracy", "macro_f1", "unparsable", "truncated", "gold_log_likelihood"]
    assert result["items"] == 4
    assert result["accuracy"]["value"] == 0.5
    assert result["accuracy"]["interval"] == list(mean_interval(np.array([1.0, 0.0, 0.0, 1.0])))
    # choice1: right 1, gold 3, answered 1; choice2: right 1, gold 1, answered 2.
    assert result["macro_f1"]["value"] == pytest.approx((2 * 1 / 4 + 2 * 1 / 3) / 2)
    assert result["unparsable"]["value"] == 0.25
    assert result["truncated"]["value"] == 0.25
    assert result["gold_log_likelihood"]["value"] == -1.5
    assert json.loads(json.dumps(result)) == result


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12))
def test_macro_f1_of_names_is_that_of_indices(pairs: list[tuple[int, int]]):
    predictions = [Prediction("", g, tuple(float(i == a) for i in range(3))) for g, a in pairs]
    assert macro_f1([str(g) for g, _ in pairs], [str(a) for _, a in pairs]) == pytest.approx(
        macro_f1_of_indices(predictions)
    )


def test_other_kinds_have_no_macro_f1_and_no_likelihood_that_some_lack():
    items = [item("3", "3", gold_log_likelihood=-1.0), item("4", "3")]
    _, result = score_generated(items, RULES["number"], "en")
    assert list(result) == ["items", "accuracy", "unparsable", "truncated"]
    _, result = score_generated([item("red dog", "dog", "red cat")], RULES["extraction"], "en")
    assert result["exact_match"]["value"] == 0
    assert result["f1"]["value"] == pytest.approx(2 / 3)


def test_where_only_the_likelihood_was_asked_for_nothing_else_is_said():
    items = [item(None, "3", gold_log_likelihood=-1.0), item(None, "4", gold_log_likelihood=-2.0)]
    scored, result = score_generated(items, RULES["number"], "en")
    assert scored == []
    assert set(result) == {"items", "gold_log_likelihood"}
    assert result["items"] == 2
    assert result["gold_log_likelihood"]["value"] == -1.5
    with pytest.raises(DataError, match="some have none"):
        score_generated([*items, item("3", "3")], RULES["number"], "en")


def test_wrong_data_are_refused_whatever_was_written():
    for text in ("", "(A)"):
        with pytest.raises(DataError, match="no label"):
            read(item(text, "choice3"), RULES["label"], "en")
    with pytest.raises(DataError, match="no number"):
        read(item("3", "three"), RULES["number"], "en")
    with pytest.raises(DataError, match="no right answer"):
        read(item("3"), RULES["number"], "en")
    with pytest.raises(DataError, match="no text"):
        read(item(None, "3"), RULES["number"], "en")
    with pytest.raises(DataError, match="no items"):
        score_generated([], RULES["number"], "en")


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_is_itself_again_after_json(rule: Rule):
    assert Rule.from_dict(json.loads(json.dumps(rule.as_dict()))) == rule


def test_wrong_rules_are_refused():
    with pytest.raises(ConfigError, match="labels"):
        Rule("label")
    with pytest.raises(ConfigError, match="labels"):
        Rule("number", labels=LABELS)
    with pytest.raises(ConfigError, match="means both"):
        Rule("label", labels={"a": ("x",), "b": ("X",)})
    with pytest.raises(ConfigError, match="kind"):
        Rule("labels")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="segmentation"):
        replace(RULES["summary"], segmentation="word")
    with pytest.raises(ConfigError, match="unknown key"):
        Rule.from_dict({"kind": "number", "markers": "x"})
    with pytest.raises(ConfigError, match="lacks its kind"):
        Rule.from_dict({})


@pytest.mark.parametrize("language", ["de", "fr", "es", "ru"])
def test_a_number_may_be_grouped_as_its_language_has_it_or_as_english_has_it(language: str) -> None:
    rule = Rule("number", marker="####")
    for text, right in (
        ("#### 1,200", 1.0),
        ("#### 1.200", 1.0),
        ("#### 1200", 1.0),
        ("#### 12", 0.0),
        ("#### 120,0", 0.0),
    ):
        scored = read(Generated("x", "?", text, ("1,200",)), rule, language)
        assert scored.figures["accuracy"] == right, text
