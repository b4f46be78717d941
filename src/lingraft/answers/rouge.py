"""ROUGE-L of summaries in many languages: the subsequence by `rouge-score`, the tokens by us.

The usual tokenizer keeps a-z and 0-9 alone: two identical Thai sentences get 0. Here punctuation parts tokens and every other
character counts. Languages without spaces are cut at characters, whatever is installed; `segmentation="words"` cuts Chinese,
Japanese and Thai by dictionary and never falls back in silence.

The script of XL-Sum's authors (Hasan et al. 2021) always cuts Chinese, Japanese, Thai and Burmese by dictionary or syllable,
keeps the punctuation of those four as tokens, and in their evaluation stems 18 languages. Nearest to it is
`segmentation="words", stem=True`: still without punctuation, Burmese by character, Bengali unstemmed, Japanese by IPADIC where
theirs has UniDic, and with Snowball's stemmers, which cover languages that theirs leave alone.
"""

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

from lingraft.answers.matching import best
from lingraft.answers.normalising import UNSPACED, base_language, is_punctuation, lowered, segments, unified
from lingraft.errors import MissingExtra, UserError, suggestion

Segmentation = Literal["characters", "words"]
SEGMENTATIONS = ("characters", "words")
SEGMENTERS = {"zh": "jieba", "ja": "fugashi", "th": "pythainlp"}
"""The package that cuts a language into words; Khmer, Lao and Burmese have none here and are always cut at characters."""

STEMMERS = {
    "ar": "arabic", "ca": "catalan", "cs": "czech", "da": "danish", "de": "german", "el": "greek", "en": "porter", "es": "spanish",
    "et": "estonian", "eu": "basque", "fa": "persian", "fi": "finnish", "fr": "french", "ga": "irish", "hi": "hindi",
    "hu": "hungarian", "hy": "armenian", "id": "indonesian", "it": "italian", "lt": "lithuanian", "ne": "nepali", "nl": "dutch",
    "no": "norwegian", "pl": "polish", "pt": "portuguese", "ro": "romanian", "ru": "russian", "sr": "serbian", "sv": "swedish",
    "ta": "tamil", "tr": "turkish",
}  # fmt: skip
"""Snowball's stemmer of a language."""


def rouge_l(
    answer: str,
    references: Sequence[str],
    language: str,
    segmentation: Segmentation = "characters",
    stem: bool = False,
) -> float:
    """The F-measure of the longest common subsequence of tokens (Lin 2004), over all sentences at once; the best reference counts.

    Args:
        answer: A summary.
        references: Right summaries.
        language: Its code.
        segmentation: How `UNSPACED` languages are cut; other languages are cut at white space and punctuation.
        stem: Whether tokens of more than three characters are stemmed, where the language has a stemmer.

    Raises:
        MissingExtra: `rouge-score`, or the language's segmenter or stemmer, is not installed.
        DataError: There is no reference.
    """
    scorer = _scorer(base_language(language), segmentation, stem)
    return best(lambda reference: float(scorer.score(reference, answer)["rougeL"].fmeasure), references)


def segmentation(language: str, how: Segmentation = "characters") -> str:
    """What cuts a language's texts: `whitespace`, `characters` or `words (<package>)`.

    Raises:
        UserError: There is no such segmentation.
    """
    if how not in SEGMENTATIONS:
        raise UserError(f"unknown segmentation '{how}'", remedy=suggestion(how, SEGMENTATIONS))
    base = base_language(language)
    if base not in UNSPACED:
        return "whitespace"
    return f"words ({SEGMENTERS[base]})" if how == "words" and base in SEGMENTERS else "characters"


def tokenizer(language: str, how: Segmentation = "characters", stem: bool = False) -> Callable[[str], list[str]]:
    """What makes tokens of a text.

    Raises:
        MissingExtra: The language's segmenter or stemmer is not installed.
        UserError: There is no such segmentation.
    """
    base = base_language(language)
    words = _segmenter(base) if segmentation(base, how).startswith("words") else None
    stemmed = _stemmer(STEMMERS[base]) if stem and base in STEMMERS else None

    def tokens(text: str) -> list[str]:
        text = lowered(unified(text), base)
        plain = "".join(" " if is_punctuation(c) else c for c in text)
        # A text of punctuation alone is still equal to itself.
        found = " ".join(words(plain)).split() if words else segments(plain, base)
        found = found or text.split()
        return [stemmed(t) if len(t) > 3 else t for t in found] if stemmed else found

    return tokens


@cache
def _scorer(language: str, how: Segmentation, stem: bool) -> Any:
    scorer = _module("rouge_score.rouge_scorer", "rouge-score", "rouge")
    return scorer.RougeScorer(["rougeL"], tokenizer=_Tokenizer(tokenizer(language, how, stem)))


class _Tokenizer:
    """A function in the shape that `rouge-score` asks for."""

    def __init__(self, tokenize: Callable[[str], list[str]]) -> None:
        self.tokenize = tokenize


@cache
def _segmenter(language: str) -> Callable[[str], list[str]]:
    return {"zh": _chinese, "ja": _japanese, "th": _thai}[language]()


def _chinese() -> Callable[[str], list[str]]:
    jieba = _module("jieba", "jieba", "rouge-words")
    jieba.setLogLevel(logging.WARNING)
    # One of our own: words that a user added to the shared one must not change a figure.
    cutter = jieba.Tokenizer()
    # Its own way of starting leaves a file in the folder for temporary files, and trusts the one it finds there.
    cutter.FREQ, cutter.total = cutter.gen_pfdict(cutter.get_dict_file())
    cutter.initialized = True
    return cutter.lcut


def _japanese() -> Callable[[str], list[str]]:
    dictionary = _module("ipadic", "ipadic", "rouge-words")
    tagger = _module("fugashi", "fugashi", "rouge-words").GenericTagger(dictionary.MECAB_ARGS)
    return lambda text: [word.surface for word in tagger(text)]


def _thai() -> Callable[[str], list[str]]:
    # Else the mere import makes a folder in the user's home.
    if "PYTHAINLP_READ_MODE" not in os.environ:
        os.environ.setdefault("PYTHAINLP_READ_ONLY", "1")
    module = _module("pythainlp.tokenize", "pythainlp", "rouge-words")
    return lambda text: module.word_tokenize(text, engine="newmm")


@cache
def _stemmer(algorithm: str) -> Callable[[str], str]:
    return _module("snowballstemmer", "snowballstemmer", "rouge").stemmer(algorithm).stemWord


def _module(name: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise MissingExtra(package, extra) from None
