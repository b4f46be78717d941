"""Text made comparable: one spelling of what Unicode spells in several ways, case by language, characters as readers see them."""

import re
import string
import unicodedata
from functools import cache

UNSPACED = ("zh", "ja", "th", "km", "lo", "my")
"""The languages written without spaces between words: their tokens are characters, unless words are asked for."""

# Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED_SCRIPTS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_TATWEEL = "\u0640"
_SARA_AM = "\u0e33\u0eb3"
# Signs that stack the next consonant under the one before: Khmer coeng, Burmese virama.
_STACKERS = "\u17d2\u1039"


def base_language(code: str) -> str:
    """`zh` of `zh-Hans` or `zh_CN`."""
    return re.split("[-_]", code.lower(), maxsplit=1)[0]


def unified(text: str) -> str:
    """NFKC without characters that show nothing: format characters (joiners, direction marks, zero-width spaces) and tatweel.

    NFKC makes Arabic presentation forms letters and full-width Latin plain. It takes Thai and Lao sara am apart; here it is put
    together again, whichever order its halves and a tone mark were typed in.
    """
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf" and c != _TATWEEL)
    text = unicodedata.normalize("NFKC", text)
    text = re.sub("\u0e4d([\u0e48-\u0e4b]?)\u0e32", "\\1\u0e33", text)
    return re.sub("\u0ecd([\u0ec8-\u0ecb]?)\u0eb2", "\\1\u0eb3", text)


def lowered(text: str, language: str) -> str:
    """Lower case; in Turkish and Azerbaijani I becomes ı and İ becomes i."""
    if base_language(language) in ("tr", "az"):
        text = text.replace("İ", "i").replace("I", "ı")
    return text.lower()


@cache
def is_punctuation(character: str) -> bool:
    """Whether it is of Unicode's P categories, or of ASCII's punctuation, which also has symbols such as $ and +."""
    return character in string.punctuation or unicodedata.category(character).startswith("P")


@cache
def is_mark(character: str) -> bool:
    """Whether it belongs to the character before it."""
    return unicodedata.category(character).startswith("M") or character in _SARA_AM


@cache
def is_unspaced(character: str) -> bool:
    """Whether its script is written without spaces between words; digits are not meant."""
    return bool(_UNSPACED_SCRIPTS.match(character)) and not character.isdecimal()


def clusters(text: str) -> list[str]:
    """Characters as readers see them: each with its marks, and with what is stacked under it."""
    found: list[str] = []
    for character in text:
        if found and (is_mark(character) or (found[-1][-1] in _STACKERS and not character.isspace())):
            found[-1] += character
        else:
            found.append(character)
    return found


def segments(text: str, language: str) -> list[str]:
    """The tokens between white space; in `UNSPACED` languages characters of unspaced scripts stand alone, other words whole."""
    if base_language(language) not in UNSPACED:
        return text.split()
    return "".join(f" {c} " if is_unspaced(c[0]) else c for c in clusters(text)).split()
