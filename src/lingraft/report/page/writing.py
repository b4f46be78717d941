"""How the page writes numbers: minus signs, thousands, spans of time, sizes."""

import math

from lingraft.report.tables import p_value as p_value

DASH = "–"


def share(value: float | None, digits: int = 1) -> str:
    """A share as a percentage without its sign."""
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 1) -> str:
    """A difference of shares, in points; what rounds to nothing has no sign."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{100 * value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def between(interval: list[float] | None, sign: bool = False, digits: int = 1) -> str:
    """An interval in brackets, or nothing where there is none."""
    if not interval or any(end is None or not math.isfinite(end) for end in interval):
        return ""
    return "[" + ", ".join((signed if sign else share)(end, digits) for end in interval) + "]"


def count(value: float | None) -> str:
    """A whole number, in groups of three."""
    return DASH if value is None else f"{value:,.0f}".replace(",", "\u202f")


def span(seconds: float | None) -> str:
    """A span of time."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float | None) -> str:
    """Bytes."""
    if count is None:
        return DASH
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} B"


def tight(text: str) -> str:
    """A text whose figures stay on one line with their signs of percent."""
    return text.replace(" %", "\u00a0%")
