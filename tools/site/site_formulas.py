"""Formulas as MathML, which browsers draw by themselves: nothing is loaded when a page is read."""

import html
import re

WRAPPED = re.compile(r'<(span|div) class="arithmatex">(\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL)


def drawn(page: str) -> str:
    """A page's HTML with the LaTeX that the Markdown extension wrapped turned into MathML."""
    from latex2mathml.converter import convert

    def one(found: re.Match[str]) -> str:
        latex = html.unescape(found.group(3)).strip()
        display = "block" if found.group(2) == r"\[" else "inline"
        mathml = convert(latex, display=display)
        said = html.escape(latex, quote=True)
        mathml = mathml.replace("<math ", f'<math alttext="{said}" ', 1)
        return f'<div class="formula" tabindex="0">{mathml}</div>' if display == "block" else mathml

    return WRAPPED.sub(one, page)
