"""Exact match and F1 of extracted answers, as the evaluation of MLQA defines them (Lewis et al. 2020), for more languages.

MLQA lower-cases, takes punctuation out, then the language's articles, and cuts at white space; Chinese it cuts at every Han
character. For its seven languages that is kept, article lists included. Beyond it:

- Both texts are first brought to one spelling (`normalising.unified`); Turkish case is right.
- Thai, Japanese, Khmer, Lao and Burmese are cut like Chinese, at characters with their marks. MLQA's range of Han
  (U+4E00-U+9FA5) is widened to all of it.
- Other languages have no articles taken out: figures made so elsewhere stay comparable, and a short list would meet other words.
- What would leave nothing, such as the answer "The", is compared as it is.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from lingraft.answers.normalising import base_language, is_punctuation, lowered, segments, unified
from lingraft.errors import DataError

ARTICLES = {
    "en": r"\b(?:a|an|the)\b",
    "es": r"\b(?:un|una|unos|unas|el|la|los|las)\b",
    "vi": r"\b(?:của|là|cái|chiếc|những)\b",
    "de": r"\b(?:ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    # Inside words too: so does MLQA's own expression.
    "ar": "ال",
}
"""What MLQA takes out, by language; Hindi and Chinese have none."""


def normalised(text: str, language: str) -> str:
    """The tokens that count, with a space between them."""
    text = lowered(unified(text), language)
    kept = "".join(c for c in text if not is_punctuation(c))
    articles = ARTICLES.get(base_language(language))
    if articles:
        kept = re.sub(articles, " ", kept)
    return " ".join(segments(kept, language)) or " ".join(text.split())


def tokens(text: str, language: str) -> list[str]:
    """The tokens that F1 counts: words, in languages without spaces characters."""
    return normalised(text, language).split()


def exact_match(answer: str, references: Sequence[str], language: str) -> float:
    """1 if the answer is one of the references, normalised; else 0.

    Raises:
        DataError: There is no reference.
    """
    return best(lambda reference: float(normalised(answer, language) == normalised(reference, language)), references)


def f1(answer: str, references: Sequence[str], language: str) -> float:
    """The harmonic mean of the shares of tokens that answer and reference have in common; the best reference counts.

    Raises:
        DataError: There is no reference.
    """
    return best(lambda reference: _f1(tokens(answer, language), tokens(reference, language)), references)


def best(figure: Callable[[str], float], references: Sequence[str]) -> float:
    """The largest figure that one of the references gives.

    Raises:
        DataError: There is no reference.
    """
    if not references:
        raise DataError("an item has no right answer to compare with", remedy="leave it out, or give it a reference")
    return max(figure(reference) for reference in references)


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference))
