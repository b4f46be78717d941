"""What models said to items, and the metrics of choice tasks: accuracy, macro-F1, the log-likelihood of the gold labels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """What a model said to one item, and why.

    Attributes:
        id: The item.
        gold: The index of the right candidate.
        scores: Log-likelihood of every candidate after the prompt, in nats.
        prompt: The text the model read.
        truncated: Whether the prompt was too long for the model and lost some of its context.
    """

    id: str
    gold: int
    scores: tuple[float, ...]
    prompt: str = ""
    truncated: bool = False

    @property
    def answer(self) -> int:
        """The index of the likeliest candidate; the first of equals."""
        return max(range(len(self.scores)), key=lambda i: self.scores[i])

    @property
    def gold_log_likelihood(self) -> float:
        """log p(gold | one of the candidates), in nats: the scores normalised over the candidates."""
        top = max(self.scores)
        return self.scores[self.gold] - top - math.log(sum(math.exp(s - top) for s in self.scores))

    @property
    def entropy(self) -> float:
        """The entropy of the distribution over the candidates, in nats: how undecided the model is, whatever is right."""
        top = max(self.scores)
        weights = [math.exp(s - top) for s in self.scores]
        total = sum(weights)
        # log total − Σ p·(s − top): no logarithm of a weight that underflowed to zero.
        return math.log(total) - sum(w / total * (s - top) for w, s in zip(weights, self.scores, strict=True))


@dataclass(frozen=True)
class Generated:
    """What a model wrote after one item's prompt, or (an encoder) marked in its context.

    Attributes:
        id: The item.
        prompt: The text the model read; it is not part of `text`.
        text: What it wrote, as it is; None where only the right answer's likelihood was asked for.
        references: All right answers; for a choice task the name of the right label.
        gold_log_likelihood: Mean log-likelihood of a token of the right answer after the prompt, in nats; None: not asked for.
        truncated: Whether the prompt was too long for the model and lost some of its context.
    """

    id: str
    prompt: str
    text: str | None
    references: tuple[str, ...]
    gold_log_likelihood: float | None = None
    truncated: bool = False


@dataclass(frozen=True)
class Scored:
    """What was read in a generated text, and what it is worth.

    Attributes:
        id: The item.
        answer: The answer that was read in the text; None: it cannot be parsed.
        reason: How it was read, or why it cannot be.
        figures: The item's figure by metric, from 0 to 1.
    """

    id: str
    answer: str | None
    reason: str
    figures: Mapping[str, float]


def accuracy(predictions: Sequence[Prediction]) -> float:
    """The share of right answers."""
    return sum(p.answer == p.gold for p in predictions) / len(predictions)


def gold_log_likelihood(predictions: Sequence[Prediction]) -> float:
    """Mean log-likelihood of the gold label among the candidates, in nats."""
    return sum(p.gold_log_likelihood for p in predictions) / len(predictions)


def entropy(predictions: Sequence[Prediction]) -> float:
    """Mean entropy of the answers, in nats: between 0 and the logarithm of the number of candidates."""
    return sum(p.entropy for p in predictions) / len(predictions)


def macro_f1(predictions: Sequence[Prediction]) -> float:
    """Mean F1 over the classes that occur as gold or as an answer."""
    classes = sorted({p.gold for p in predictions} | {p.answer for p in predictions})
    return sum(_f1(predictions, c) for c in classes) / len(classes)


def _f1(predictions: Sequence[Prediction], label: int) -> float:
    right = sum(p.gold == label and p.answer == label for p in predictions)
    named = sum(p.answer == label for p in predictions) + sum(p.gold == label for p in predictions)
    return 2 * right / named if named else 0.0
