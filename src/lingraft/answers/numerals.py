"""Numbers in text, in every digit system and with every way of grouping digits.

A separator is told by what it separates:

- Spaces, apostrophes and the Arabic ٬ group digits; ٫ starts decimals.
- Of two kinds in one number the last starts the decimals: 1,234.5 and 1.234,5.
- A kind that occurs twice groups: 1.234.567, and in the Indian way 12,34,567.
- One comma or dot that does not have exactly three digits after it, or that follows a 0 or more than three digits, starts
  decimals: 3.5, 3,5, 0,125.
- What is left is 1.234 and 1,234. By the language: where the comma starts decimals (`DECIMAL_COMMA`) the first is 1234 and the
  second 1.234; elsewhere, and where no language is given, the other way round.

Number words, Chinese numerals other than 万 and 亿 behind digits, exponents and fractions are not worked out.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from lingraft.answers.normalising import base_language, is_unspaced

DECIMAL_COMMA = frozenset({
    "ace", "af", "az", "ban", "be", "bg", "bs", "ca", "cs", "da", "de", "el", "es", "et", "eu", "fi",
    "fr", "gl", "hr", "hu", "hy", "id", "is", "it", "jv", "ka", "kk", "ky", "lt", "lv", "min", "mk",
    "nb", "nl", "nn", "no", "pl", "pt", "ro", "ru", "rw", "sk", "sl", "sq", "sr", "su", "sv", "tr",
    "uk", "uz", "vi", "wo",
})  # fmt: skip
"""Languages that write 3,5 for three and a half (CLDR)."""


@dataclass(frozen=True)
class Number:
    """A number in a text.

    Attributes:
        start: Its first character, sign and currency included.
        end: The character after its last.
        value: Its canonical decimal; None: it is a fraction.
    """

    start: int
    end: int
    value: str | None


_SPACES = "\u00a0\u2007\u2009\u202f"
_PLAIN = str.maketrans({**dict.fromkeys(_SPACES, " "), "’": "'", "−": "-", "﹣": "-", "－": "-", "．": ".", "，": ","})
_CURRENCY = "[$¢-¥֏؋৲৳૱௹฿៛₠-⃀﷼﹩＄￠￡￥￦]"
_VULGAR = "[¼-¾⅐-⅞↉]"
# A leading dot starts decimals only where no word ends before it.
_CHUNK = re.compile(rf"(?:(?:(?<![^\s$(=~≈])\.)?[0-9]+(?:[.,'٬٫ ][0-9]+)*)|{_VULGAR}")
_SIGN = re.compile(rf"-(?:{_CURRENCY} ?)?$")
_MYRIADS = {"万": 4, "萬": 4, "亿": 8, "億": 8}
# Where to cut what is not one number, in this order: "5 1,234" is 5 and 1,234.
_CUTS = (" ", "'", "٬", "٫", ",", ".")


def numbers_in(text: str, language: str | None = None) -> list[Number]:
    """The numbers of a text, in its order; their places are places in `text`."""
    # One character for each, so that places stay places.
    plain = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text).translate(_PLAIN)
    found: list[Number] = []
    open_at = -1
    for match in _CHUNK.finditer(plain):
        for start, digits in _pieces(match[0], match.start(), language):
            end = start + len(digits)
            if _is_fraction(plain, start, end, digits):
                found.append(Number(start, end, None))
                continue
            value = Decimal(_value(digits, language) or "0")
            scaled = end < len(plain) and plain[end] in _MYRIADS
            while end < len(plain) and plain[end] in _MYRIADS:
                value, end = value.scaleb(_MYRIADS[plain[end]]), end + 1
            previous = found[-1] if found and start == open_at else None
            if previous is not None and previous.value is not None:
                # 1億2345万 is one number.
                value, start = abs(Decimal(previous.value)) + value, previous.start
                negative = previous.value.startswith("-")
                found.pop()
            else:
                start, negative = _signed_start(plain, start)
            found.append(Number(start, end, canonical(-value if negative else value)))
            open_at = end if scaled else -1
    return found


def canonical(value: Decimal) -> str:
    """A decimal without exponent, leading or trailing zeros: `3.5`, `-2`, `1234`."""
    text = format(value, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def equal_numbers(a: str, b: str) -> bool:
    """Whether two canonical decimals are the same number; what is no decimal equals nothing."""
    try:
        return Decimal(a) == Decimal(b)
    except InvalidOperation:
        return False


def _pieces(chunk: str, start: int, language: str | None) -> Iterator[tuple[int, str]]:
    """The numbers of digits and separators, and where they start."""
    if _value(chunk, language) is not None or re.fullmatch(_VULGAR, chunk):
        yield start, chunk
        return
    cut = next(c for c in _CUTS if c in chunk)
    for part in chunk.split(cut):
        if part:
            yield from _pieces(part, start, language)
        start += len(part) + 1


def _value(chunk: str, language: str | None) -> str | None:
    """Digits and separators as a decimal; None: they are not one number."""
    if chunk.startswith("."):
        return f"0{chunk}" if chunk[1:].isdigit() else None
    parts = re.split("([^0-9])", chunk)
    digits, separators = parts[::2], parts[1::2]
    if not all(digits):
        return None
    if not separators:
        return chunk
    if len(separators) == 1:
        return _one_separator(digits, separators[0], language)
    *groupers, last = separators
    if len(set(groupers)) != 1 or groupers[0] == "٫":
        return None
    if last == groupers[0]:
        return "".join(digits) if _grouped(digits, last) else None
    if last in ".,٫" and _grouped(digits[:-1], groupers[0]):
        return "".join(digits[:-1]) + "." + digits[-1]
    return None


def _one_separator(digits: list[str], separator: str, language: str | None) -> str | None:
    grouped = _grouped(digits, separator)
    if separator in ".,":
        decimal_comma = language is not None and base_language(language) in DECIMAL_COMMA
        groups = grouped and separator == ("." if decimal_comma else ",")
        return "".join(digits) if groups else ".".join(digits)
    if separator == "٫":
        return ".".join(digits)
    return "".join(digits) if grouped else None


def _grouped(digits: list[str], separator: str) -> bool:
    """Whether these are groups of three, or with commas of two and at last three, after a first that starts with no 0."""
    first, *middle, last = digits
    if first.startswith("0") or len(last) != 3:
        return False
    western = len(first) <= 3 and all(len(group) == 3 for group in middle)
    indian = separator in ",٬" and len(first) <= 2 and all(len(group) == 2 for group in middle)
    return western or indian


def _is_fraction(plain: str, start: int, end: int, digits: str) -> bool:
    return bool(
        re.fullmatch(_VULGAR, digits)
        or re.match(rf"[/⁄][0-9]|{_VULGAR}", plain[end:])
        or re.search(r"[0-9][/⁄]$", plain[:start])
    )


def _signed_start(plain: str, start: int) -> tuple[int, bool]:
    """Where a number with its sign starts, and whether it is negative: a minus after a number or a word is none."""
    sign = _SIGN.search(plain[:start])
    if not sign:
        return start, False
    left = plain[: sign.start()]
    after_word = bool(left) and left[-1].isalnum() and not is_unspaced(left[-1])
    if after_word or re.search(rf"(?:[0-9)%]|{_CURRENCY}) *$", left):
        return start, False
    return sign.start(), True
