"""The page's colours: ramps of nine steps whose figures can be read on every step, in light and dark.

They differ in lightness all the way, so they are told apart without seeing hues; orange and blue stay apart in all common
colour blindness.
"""

from functools import cache

STEPS = 9
_INKS = ("#101820", "#ffffff")
_ENDS = {
    "light": {"score": ("#edf3f6", "#7fb3c8", "#0d4a68"), "signed": ("#b35309", "#f6f4ef", "#0b5c94")},
    "dark": {"score": ("#1c2731", "#2f6f8c", "#a5dcee"), "signed": ("#f0a35a", "#252b32", "#74bdf2")},
}
"""By theme, the two ends of a ramp and its middle."""


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


def _channels(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
    return red, green, blue


def luminance(colour: str) -> float:
    """The relative luminance of a colour, as WCAG 2 defines it."""
    red, green, blue = (_linear(c) for c in _channels(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, from 1 to 21, as WCAG 2 defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _between(one: str, other: str, share: float) -> str:
    mixed = (a + (b - a) * share for a, b in zip(_channels(one), _channels(other), strict=True))
    return "#" + "".join(f"{round(255 * c):02x}" for c in mixed)


def ramp(theme: str, kind: str) -> list[tuple[str, str]]:
    """The steps of a ramp: a background, and what can be read on it (4.5 to 1 or more).

    Args:
        theme: `light` or `dark`.
        kind: `score`, from least to most; `signed`, from worse to better.
    """
    low, middle, high = _ENDS[theme][kind]
    half = (STEPS - 1) / 2
    colours = [
        _between(low, middle, n / half) if n <= half else _between(middle, high, n / half - 1) for n in range(STEPS)
    ]
    return [(colour, _ink_on(colour)) for colour in colours]


def _ink_on(colour: str) -> str:
    """What is read best on a colour: the page's inks, or black in the middle where neither suffices."""
    best = max(_INKS, key=lambda ink: contrast(colour, ink))
    return best if contrast(colour, best) >= 4.5 else "#000000"


@cache
def variables(theme: str) -> str:
    """The ramps as CSS variables: `--score-3`, and `--score-3-ink` for what is written on it."""
    return "".join(
        f"--{kind}-{n}:{colour};--{kind}-{n}-ink:{ink};"
        for kind in ("score", "signed")
        for n, (colour, ink) in enumerate(ramp(theme, kind))
    )


@cache
def rules() -> str:
    """The classes of coloured cells: `score-3`, `signed-5`."""
    return "\n".join(
        f".{kind}-{n}{{background:var(--{kind}-{n});color:var(--{kind}-{n}-ink)}}"
        for kind in ("score", "signed")
        for n in range(STEPS)
    )


@cache
def heights() -> str:
    """How high drawings of so many bars will be, so that those out of sight need not be laid out."""
    return "\n".join(f".rows-{n}{{contain-intrinsic-size:auto {22 * n + 84}px}}" for n in range(1, 31))


def score_step(value: float, low: float, high: float) -> int:
    """The step of a value between the least and the most."""
    return round((STEPS - 1) * min(1.0, max(0.0, (value - low) / (high - low)))) if high > low else STEPS // 2


def signed_step(value: float, most: float) -> int:
    """The step of a value between −most and most; the middle is zero."""
    half = STEPS // 2
    return half + round(half * min(1.0, max(-1.0, value / most))) if most > 0 else half
