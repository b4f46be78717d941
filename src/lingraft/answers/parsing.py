"""Answers read in generated text: a label, a number or a line.

What is read is what the model wrote, never its prompt. An answer that cannot be told is None with the reason, not a guess.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from lingraft.answers.normalising import is_mark, is_punctuation, is_unspaced, unified
from lingraft.answers.numerals import numbers_in
from lingraft.errors import ConfigError


@dataclass(frozen=True)
class Parsed:
    """What was read in a text.

    Attributes:
        value: The answer; None: it cannot be told.
        reason: How it was read, or why it cannot be.
    """

    value: str | None
    reason: str


_LIST_COMMAS = ",、،"
_SPLITTERS = "/|&"
_QUOTES = {
    '"': '"', "'": "'", "`": "`", "“": "”", "„": "“”", "‚": "‘’", "‘": "’", "”": "”", "«": "»", "»": "«", "‹": "›",
    "「": "」", "『": "』", "《": "》",
}  # fmt: skip

# "or" and "and": what stands between the members of a list from which nothing was chosen.
_JOINERS = """
or and | oder und | ou et | o u oppure y e ed | или либо и | або чи та | ή και | veya yahut ve | أو او و | या अथवा और | یا اور
বা অথবা এবং | அல்லது மற்றும் | లేదా మరియు | หรือ และ | hoặc hay và | 或 或者 还是 還是 和 与 | または か もしくは と | 또는 혹은 및
atau dan | au ama na | ko kuma | tabi àti | maọbụ ma | noma okanye futhi | cyangwa | ወይም እና | သို့မဟုတ် | või ja | edo eta ala
oswa | utawi utawa
"""


def after_marker(text: str, marker: str | None) -> tuple[str, bool]:
    """The text after the last place where the marker stands.

    Case, white space and markup (`**Answer:**`) do not matter; the colon may be full-width, and a marker without one may be
    followed by one. A marker inside a word is none.

    Returns:
        The rest and whether the marker was found; without it the whole text. Composed (NFC) in either case.
    """
    text = unicodedata.normalize("NFC", text)
    name = unicodedata.normalize("NFC", marker or "").strip()
    core = name.rstrip(":：").strip()
    if not core:
        return text, False
    colon = r"[*_]*\s*[:：﹕]" if core != name else r"(?:[*_]*\s*[:：﹕])?"
    pattern = r"\s+".join(re.escape(word) for word in core.split())
    found = None
    for match in re.finditer(f"({pattern}){colon}", text, re.IGNORECASE):
        if not _inside_word(text, *match.span(1)):
            found = match
    return (text[found.end() :].lstrip("*_ \t"), True) if found else (text, False)


def parse_text(text: str, marker: str | None = None, whole: bool = False) -> Parsed:
    """The first line with anything on it, without the quotation marks or the markup around it.

    Args:
        text: What a model wrote.
        marker: The text before the answer; None: the answer is the text.
        whole: Take all lines, as for a summary.
    """
    rest, how, _ = _rest(text, marker)
    lines = [line.strip() for line in rest.strip().splitlines() if line.strip()]
    if not lines:
        return Parsed(None, f"{how}: nothing is written")
    answer = _unquoted("\n".join(lines) if whole else lines[0])
    if not answer:
        return Parsed(None, f"{how}: nothing but quotation marks")
    return Parsed(answer, f"{how}: {'all' if whole else 'the first line'}")


def parse_label(text: str, labels: Mapping[str, Sequence[str]], marker: str | None = None) -> Parsed:
    """The label that is mentioned first.

    The rule: mentions are found without regard to case, to digits' script and to spelling variants of Unicode. A mention that
    is part of a longer word, or number, is none; in scripts without spaces any place will do, but a character with its marks is
    one. Of mentions that start at one place the longest counts, and nothing is mentioned inside another mention. The first
    mention is the answer, except where it and another label's are joined as in "A or B", "A/B", or in a list that fills its
    line: then none was chosen. A text of one letter is met in its own case alone ("a" is a word), or in either where it is all
    that its line says. Negation is not understood.

    Args:
        text: What a model wrote.
        labels: The texts that mean a label, by the label's name.
        marker: The text before the answer; None: the answer is anywhere.

    Raises:
        ConfigError: A text stands for two labels, or says nothing.
    """
    rest, how, _ = _rest(text, marker)
    if not rest.strip():
        return Parsed(None, f"{how}: nothing is written")
    plain = unified(rest)
    found = list(_mentions(plain, label_texts(labels)))
    if not found:
        return Parsed(None, f"{how}: no label is mentioned")
    if _undecided(plain, found):
        return Parsed(None, f"{how}: undecided between '{found[0].label}' and '{found[1].label}'")
    return Parsed(found[0].label, f"{how}: '{plain[found[0].start : found[0].end]}'")


def parse_number(text: str, marker: str | None = None, language: str | None = None) -> Parsed:
    """The number after the marker, or the last one where there is no marker (the rule of MGSM, Shi et al. 2022).

    After a marker that is the number right behind it, or, where words or an operator come first, the last number of the rest:
    "Answer: 18 a day, not 20" is 18, "Answer: 3 + 4 = 7" is 7. How numbers are read: `numerals.numbers_in`. A fraction such as
    3/4 is not worked out: it cannot be told.

    Args:
        text: What a model wrote.
        marker: The text before the answer.
        language: Tells what `1.234` is, for which see `numerals`.
    """
    rest, how, marked = _rest(text, marker)
    found = numbers_in(rest, language)
    if not found:
        return Parsed(None, f"{how}: no number")
    first = found[0]
    direct = (
        marked
        and not any(c.isalnum() for c in rest[: first.start])
        and not re.match(r"\s*[-−+*×x·/÷=]\s*\(?\d", rest[first.end :])
    )
    number, place = (first, "the number behind it") if direct else (found[-1], "the last number")
    said = rest[number.start : number.end]
    if number.value is None:
        return Parsed(None, f"{how}: '{said}' is of a fraction")
    return Parsed(number.value, f"{how}: {place}, '{said}'")


def label_texts(labels: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, str]]:
    """What is looked for: by folded text its label and the text as it was given.

    Raises:
        ConfigError: A text stands for two labels, or says nothing.
    """
    found: dict[str, tuple[str, str]] = {}
    for label, texts in labels.items():
        for text in texts:
            plain = unified(text).strip()
            if not plain:
                raise ConfigError(f"a text that means '{label}' is empty", where="labels", remedy="leave it out")
            other = found.setdefault(_folded(plain), (label, plain))[0]
            if other != label:
                raise ConfigError(
                    f"'{text}' means both '{other}' and '{label}'", where="labels", remedy="give it to one of them"
                )
    return found


@dataclass(frozen=True)
class _Mention:
    start: int
    end: int
    label: str


def _rest(text: str, marker: str | None) -> tuple[str, str, bool]:
    """What follows the marker, how to say so, and whether there is one."""
    rest, found = after_marker(text, marker)
    if found:
        return rest, f"after '{marker}'", True
    return rest, f"no '{marker}', in the whole text" if marker else "in the text", False


@cache
def _joiners() -> frozenset[str]:
    return frozenset(_folded(unified(word)) for word in [*_JOINERS.replace("|", " ").split(), "ya da"])


def _folded(text: str) -> str:
    """Case-folded, digits as ASCII's, dotted and dotless i alike; as long as it was."""
    return "".join(_folded_character(c) for c in text)


def _folded_character(character: str) -> str:
    if character in "İı":
        return "i"
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    folded = character.casefold()
    return folded if len(folded) == 1 else character


def _mentions(plain: str, texts: Mapping[str, tuple[str, str]]) -> Iterator[_Mention]:
    """The mentions of labels from left to right; the longest at a place, none inside another."""
    folded = _folded(plain)
    places = [
        (match.start(), -len(wanted), label)
        for wanted, (label, given) in texts.items()
        for match in re.finditer(f"(?={re.escape(wanted)})", folded)
        if _is_mention(plain, folded, match.start(), given)
    ]
    end = 0
    for start, length, label in sorted(places):
        if start >= end:
            end = start - length
            yield _Mention(start, end, label)


def _is_mention(plain: str, folded: str, start: int, given: str) -> bool:
    end = start + len(given)
    if _inside_word(folded, start, end) or _inside_number(folded, start, end):
        return False
    if len(given) > 1 or given.lower() == given.upper() or plain[start] == given:
        return True
    # A letter in the other case: it must be all that the line says.
    line = plain[plain.rfind("\n", 0, start) + 1 : start] + plain[end:].split("\n", 1)[0]
    return not any(c.isalnum() for c in line)


def _inside_word(text: str, start: int, end: int) -> bool:
    """Whether the word, or the character, goes on before or after this stretch of text."""
    if end < len(text) and is_mark(text[end]):
        return True
    return (start > 0 and _joined(text[start - 1], text[start])) or (
        end < len(text) and _joined(text[end - 1], text[end])
    )


def _joined(left: str, right: str) -> bool:
    """Whether two neighbours are of one word: both of words, and neither of a script without spaces."""
    return all((c.isalnum() or is_mark(c)) and not is_unspaced(c) for c in (left, right))


def _inside_number(text: str, start: int, end: int) -> bool:
    """Whether a number's decimals or groups go on before or after this stretch: 1 is not mentioned in 2.1 or 1,000."""
    return bool(
        (text[start].isdigit() and re.search(r"\d[.,]$", text[:start]))
        or (text[end - 1].isdigit() and re.match(r"[.,]\d", text[end:]))
    )


def _undecided(plain: str, mentions: Sequence[_Mention]) -> bool:
    """Whether the first mention is but the first of a list of labels."""
    if len(mentions) < 2 or mentions[0].label == mentions[1].label:
        return False
    between = plain[mentions[0].end : mentions[1].start]
    core = _folded(between).strip("".join(c for c in set(between) if is_punctuation(c) or c.isspace()))
    if core or "\n" in between:
        return core in _joiners()
    if any(c in between for c in _SPLITTERS):
        return True
    if not any(c in between for c in _LIST_COMMAS):
        return False
    # "Yes, no doubt" is no list; "yes, no" and "yes, no or maybe" are.
    tail = plain[mentions[1].end :].split("\n", 1)[0]
    return not any(c.isalnum() for c in tail) or _undecided(plain, mentions[1:])


def _unquoted(text: str) -> str:
    text = text.strip("* ")
    while len(text) > 1 and text[-1] in _QUOTES.get(text[0], "") and not {text[0], text[-1]} & set(text[1:-1]):
        text = text[1:-1].strip("* ")
    return "" if all(is_punctuation(c) and c in _QUOTES for c in text) else text
