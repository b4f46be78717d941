"""What generated answers are worth, item by item and on the whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np

from lingraft.answers.matching import exact_match, f1
from lingraft.answers.numerals import equal_numbers
from lingraft.answers.parsing import Parsed, label_texts, parse_label, parse_number, parse_text
from lingraft.answers.rouge import SEGMENTATIONS, Segmentation, rouge_l
from lingraft.errors import ConfigError, DataError, suggestion
from lingraft.metrics import Generated, Scored
from lingraft.significance import mean_interval

Kind = Literal["label", "number", "extraction", "summary"]

FIGURES: Mapping[str, tuple[str, ...]] = {
    "label": ("accuracy",),
    "number": ("accuracy",),
    "extraction": ("exact_match", "f1"),
    "summary": ("rouge_l",),
}
"""The figures of an item, by the kind of its answer."""

MAIN: Mapping[str, str] = {kind: figures[0] for kind, figures in FIGURES.items()}
"""The figure that stands for a kind of answer."""


@dataclass(frozen=True)
class Rule:
    """How answers are read in generated text and compared: part of what a step is.

    Attributes:
        kind: What is asked for.
        marker: The text before the answer; the last one counts. None: there is none.
        labels: For labels, the texts that mean one, by its name.
        segmentation: For summaries, how languages without spaces are cut.
        stem: For summaries, whether tokens are stemmed.

    Raises:
        ConfigError: The kind or the segmentation is unknown, labels are missing or out of place, or a text means two of them.
    """

    kind: Kind
    marker: str | None = None
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    segmentation: Segmentation = "characters"
    stem: bool = False

    def __post_init__(self) -> None:
        if self.kind not in FIGURES:
            raise ConfigError(f"unknown kind of answer '{self.kind}'", remedy=suggestion(self.kind, FIGURES))
        if self.segmentation not in SEGMENTATIONS:
            what = f"unknown segmentation '{self.segmentation}'"
            raise ConfigError(what, remedy=suggestion(self.segmentation, SEGMENTATIONS))
        if (self.kind == "label") != bool(self.labels):
            raise ConfigError(
                "a rule names labels if, and only if, labels are asked for",
                where=f"kind {self.kind}",
                remedy="give labels to a task of kind choice, and to no other",
            )
        label_texts(self.labels)

    def as_dict(self) -> dict[str, Any]:
        """The rule as plain data, for JSON."""
        return asdict(self) | {"labels": {label: list(texts) for label, texts in self.labels.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Rule":
        """The rule that `as_dict` made plain.

        Raises:
            ConfigError: A key is unknown, or a value wrong.
        """
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown key '{name}' in a rule of answers", remedy=suggestion(name, known))
        if "kind" not in values:
            raise ConfigError("a rule of answers lacks its kind", remedy=suggestion("", FIGURES))
        labels = {label: tuple(texts) for label, texts in values.get("labels", {}).items()}
        return cls(**{**values, "labels": labels})


def read(generated: Generated, rule: Rule, language: str) -> Scored:
    """Reads and scores an item's answer. What cannot be parsed is None and 0 in every figure.

    Right numbers are read as data files write them, 1,234.5, whatever the language; a model's number is right by its language's
    way of writing or by that one.

    Args:
        generated: What a model wrote.
        rule: How to read it.
        language: The language of the answer.

    Raises:
        DataError: There is no text or no right answer, or the right answer is no label or no number.
        MissingExtra: Summaries need a package that is not installed.
    """
    if generated.text is None:
        raise DataError(
            "an item has no text to read an answer in",
            where=generated.id,
            remedy="make the predictions again: run the same command",
        )
    if not generated.references:
        raise DataError(
            "an item has no right answer to compare with",
            where=generated.id,
            remedy="add the answer to the item's row, or leave the row out",
        )
    parse, compare = _READERS[rule.kind]
    # Before the answer is looked at: a wrong reference must not pass unseen where the answer cannot be parsed.
    right = [_reference(generated, text, rule) for text in generated.references]
    parsed = parse(generated.text, rule, language)
    figures = dict.fromkeys(FIGURES[rule.kind], 0.0)
    if parsed.value is not None:
        figures = compare(parsed.value, right, rule, language)
    if rule.kind == "number" and not figures["accuracy"]:
        # A model that learned from English data may write 1,200 in German text too.
        other = parse_number(generated.text, rule.marker)
        if other.value is not None and (again := compare(other.value, right, rule, language))["accuracy"]:
            return Scored(generated.id, other.value, f"{other.reason}, as English writes numbers", again)
    return Scored(generated.id, parsed.value, parsed.reason, figures)


def score_generated(generated: Sequence[Generated], rule: Rule, language: str) -> tuple[list[Scored], dict[str, Any]]:
    """Scores items, and gives their means with 95 % bootstrap intervals.

    Returns:
        The scored items and `items`, every figure of the kind, for labels `macro_f1` (over the labels that occur as right
        answer or as answer; what cannot be parsed is wrong and of no class), the shares `unparsable` and `truncated`, and
        `gold_log_likelihood` where every item has one. Where no item has a text, no scored items, `items` and the likelihood.

    Raises:
        DataError: There are no items, only some have a text, or as `read`.
    """
    if not generated:
        raise DataError(
            "there are no items to score",
            remedy="look at the data of this split: every row was left out, or there is none",
        )
    if len({g.text is None for g in generated}) > 1:
        missing = next(g.id for g in generated if g.text is None)
        raise DataError(
            "some items have a text and some have none",
            where=missing,
            remedy="make the predictions again: run the same command",
        )
    likelihoods = [g.gold_log_likelihood for g in generated if g.gold_log_likelihood is not None]
    likelihood = {"gold_log_likelihood": _mean(likelihoods)} if len(likelihoods) == len(generated) else {}
    if generated[0].text is None:
        return [], {"items": len(generated), **likelihood}
    scored = [read(g, rule, language) for g in generated]
    result: dict[str, Any] = {"items": len(generated)}
    for name in FIGURES[rule.kind]:
        result[name] = _mean([s.figures[name] for s in scored])
    if rule.kind == "label":
        result["macro_f1"] = {"value": macro_f1([g.references[0] for g in generated], [s.answer for s in scored])}
    result["unparsable"] = {"value": sum(s.answer is None for s in scored) / len(scored)}
    result["truncated"] = {"value": sum(g.truncated for g in generated) / len(generated)}
    return scored, result | likelihood


def macro_f1(gold: Sequence[str], answers: Sequence[str | None]) -> float:
    """Mean F1 over the labels that occur as gold or as an answer; None is an answer of no class."""
    labels = sorted({*gold, *(a for a in answers if a is not None)})
    pairs = list(zip(gold, answers, strict=True))
    right = [sum(g == a == label for g, a in pairs) for label in labels]
    named = [sum((g == label) + (a == label) for g, a in pairs) for label in labels]
    return sum(2 * r / n for r, n in zip(right, named, strict=True)) / len(labels)


def _mean(values: Sequence[float]) -> dict[str, Any]:
    array = np.array(values, dtype=np.float64)
    return {"value": float(array.mean()), "interval": list(mean_interval(array))}


def _reference(generated: Generated, text: str, rule: Rule) -> str:
    """A right answer as answers are compared with it."""
    if rule.kind == "label" and text not in rule.labels:
        raise DataError(
            f"the right answer '{text}' is no label", where=generated.id, remedy=suggestion(text, rule.labels)
        )
    if rule.kind == "number":
        number = parse_number(text).value
        if number is None:
            raise DataError(
                f"the right answer '{text}' is no number",
                where=generated.id,
                remedy="write it in digits, or correct the row",
            )
        return number
    return text


def _label(text: str, rule: Rule, language: str) -> Parsed:
    return parse_label(text, rule.labels, rule.marker)


def _number(text: str, rule: Rule, language: str) -> Parsed:
    return parse_number(text, rule.marker, language)


def _line(text: str, rule: Rule, language: str) -> Parsed:
    return parse_text(text, rule.marker)


def _summary(text: str, rule: Rule, language: str) -> Parsed:
    return parse_text(text, rule.marker, whole=True)


def _same_label(answer: str, right: Sequence[str], rule: Rule, language: str) -> dict[str, float]:
    return {"accuracy": float(answer in right)}


def _same_number(answer: str, right: Sequence[str], rule: Rule, language: str) -> dict[str, float]:
    return {"accuracy": float(any(equal_numbers(answer, r) for r in right))}


def _overlap(answer: str, right: Sequence[str], rule: Rule, language: str) -> dict[str, float]:
    return {"exact_match": exact_match(answer, right, language), "f1": f1(answer, right, language)}


def _rouge(answer: str, right: Sequence[str], rule: Rule, language: str) -> dict[str, float]:
    return {"rouge_l": rouge_l(answer, right, language, rule.segmentation, rule.stem)}


_READERS: Mapping[
    str, tuple[Callable[[str, Rule, str], Parsed], Callable[[str, Sequence[str], Rule, str], dict[str, float]]]
] = {
    "label": (_label, _same_label),
    "number": (_number, _same_number),
    "extraction": (_line, _overlap),
    "summary": (_summary, _rouge),
}
