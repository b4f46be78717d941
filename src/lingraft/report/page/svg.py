"""SVG within a page: only shapes and text pass, with one name for the whole; nothing of it is a link, a style or a script."""

import re
import xml.etree.ElementTree as ET

from lingraft.escaping import in_html

SHAPES = frozenset(("svg", "g", "path", "line", "rect", "text", "tspan"))
_KEPT = frozenset(
    re.split(
        " ",
        "d x y x1 y1 x2 y2 dx dy width height transform fill stroke stroke-width stroke-dasharray stroke-linecap "
        "stroke-linejoin stroke-miterlimit fill-opacity stroke-opacity opacity text-anchor font-size font-weight viewBox",
    )
)
_SAID = {"opacity": "1", "font-weight": "normal", "stroke-opacity": "1", "fill-opacity": "1"}
_OUTWARD = re.compile(r"url\s*\(|:", re.IGNORECASE)
"""What no value that is kept has: a way out of the drawing."""


def inline(text: str, says: str, kind: str = "") -> str:
    """A rendered drawing as an element of a page.

    Args:
        text: The drawing, as Vega renders it.
        says: What a reader who does not see it is told.
        kind: A class, as `wide` or `narrow`.
    """
    root = ET.fromstring(text)
    head = f'<svg class="{in_html(kind)}" role="img" aria-label="{in_html(says)}" focusable="false"'
    return _element(root, head)


def _element(node: ET.Element, head: str = "") -> str:
    name = node.tag.rpartition("}")[2]
    if name not in SHAPES or (name == "path" and not node.get("d")) or _unseen(node):
        return ""
    kept = "".join(
        f' {key}="{in_html(value)}"'
        for key, value in node.attrib.items()
        if key in _KEPT and _SAID.get(key) != value and not _OUTWARD.search(value)
    )
    # Vega describes marks for those who do not see them; they have the table, and the pointer gets the descriptions.
    tip = node.get("aria-label")
    if tip and name != "svg" and node.get("aria-roledescription") != "group mark container":
        kept += f' data-tip="{in_html(tip)}"'
    inside = in_html(node.text or "") + "".join(_element(child) for child in node)
    if not inside and name in ("g", "text"):
        return ""
    return f"{head or '<' + name}{kept}>{inside}</{name}>" if inside else f"<{name}{kept}/>"


def _unseen(node: ET.Element) -> bool:
    """Backgrounds that are there for pointers only."""
    return node.get("class") in ("background", "foreground") or node.get("display") == "none"
