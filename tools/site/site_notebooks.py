"""A notebook as a page: its text, its code, and the outputs that are committed with it."""

import json
import re
from pathlib import Path
from typing import Any

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def page(path: Path) -> str:
    """The Markdown of a notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    language = notebook.get("metadata", {}).get("kernelspec", {}).get("language", "python")
    parts = [part for cell in notebook["cells"] for part in _cell(cell, language)]
    note = f"*This page is the notebook `examples/notebooks/{path.name}`.*"
    title = parts.pop(0) if parts and parts[0].startswith("# ") else f"# {path.stem}"
    return "\n\n".join([*_below(title, note), *parts]) + "\n"


def _below(title: str, note: str) -> list[str]:
    head, _, rest = title.partition("\n")
    return [head, note, *([rest.strip()] if rest.strip() else [])]


def _cell(cell: dict[str, Any], language: str) -> list[str]:
    source = "".join(cell["source"]).rstrip()
    if cell["cell_type"] == "markdown":
        return [source] if source else []
    if cell["cell_type"] != "code" or not source:
        return []
    written = [_fenced(source, "bash" if source.startswith("%%bash") else language)]
    streams = ""
    for output in cell.get("outputs", []):
        if output["output_type"] == "stream":
            if output["name"] == "stdout":
                streams += "".join(output["text"])
            continue
        shown = _shown(output)
        written += [shown] if shown else []
    if streams.strip():
        written.insert(1, _output(streams))
    return written


def _shown(output: dict[str, Any]) -> str | None:
    if output["output_type"] == "error":
        return _output("\n".join(output["traceback"]))
    data = output.get("data", {})
    if "image/svg+xml" in data:
        import base64

        drawing = base64.b64encode("".join(data["image/svg+xml"]).encode()).decode()
        return f"![The cell's drawing](data:image/svg+xml;base64,{drawing})"
    if "image/png" in data:
        return f"![The cell's drawing](data:image/png;base64,{''.join(data['image/png']).strip()})"
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    if "text/plain" in data:
        return _output("".join(data["text/plain"]))
    return None


def _output(text: str) -> str:
    return _fenced(ANSI.sub("", text).rstrip(), "text")


def _fenced(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
