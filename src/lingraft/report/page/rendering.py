"""The page as HTML: one file, which asks for nothing from anywhere and lets nothing but its own script and style run."""

import base64
import hashlib
import re
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from lingraft.escaping import printable
from lingraft.languages import name_of
from lingraft.report.page import colours, comparing, learning, weights, writing
from lingraft.report.page.files import Files, island, packed, shown
from lingraft.report.page.heat import MARKS, ROOMY, columns, heat
from lingraft.report.page.likeness import atlas
from lingraft.report.tables import METRICS, also_tables, average_tables, csv_text, notes, reference_table, weight_table

VERDICTS = {
    "better": ("▲", "Better than the baseline"),
    "worse": ("▼", "Worse than the baseline"),
    "undecided": ("≈", "Not told apart from the baseline"),
    "unknown": ("?", "No comparison could be made"),
}
_TAG = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")


def page(contents: dict[str, Any]) -> str:
    """The page of what `contents` gives; equal contents give equal bytes.

    Args:
        contents: Plain values; see `contents.contents`.
    """
    style, script = _style(), _text("page.js")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return _template().render(style=Markup(style), script=Markup(script), policy=Markup(policy), **_view(contents))


def language_tag(code: str) -> str:
    """A code as the value of `lang`: itself where it is a language tag, else "undetermined"."""
    return code if _TAG.fullmatch(code) else "und"


def _text(name: str) -> str:
    return resources.files(__package__ or "").joinpath(name).read_text(encoding="utf-8")


@cache
def _style() -> str:
    """The style, with the ramps and, where the reader or the system asks for it, the colours of the dark."""
    text = _text("style.css")
    dark = re.search(r"/\* dark \*/(.*?)/\* end \*/", text, re.DOTALL)
    colours_of = dark[1] if dark else ""
    text = text.replace(dark[0] if dark else "", "")
    for mark, value in (
        ("/* light ramps */", colours.variables("light")),
        ("/* dark theme */", colours_of + colours.variables("dark")),
        ("/* ramp rules */", colours.rules() + colours.heights()),
    ):
        text = text.replace(mark, value)
    return text


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _finished(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_finished, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "svg": Markup,  # What charts and svg made: shapes and escaped text.
        "language": name_of,
        "tag": language_tag,
        "tight": writing.tight,
        **{name: getattr(writing, name) for name in ("share", "signed", "between", "count", "span", "size", "p_value")},
    }
    return environment.from_string(_text("template.html.j2"))


def _view(contents: dict[str, Any]) -> dict[str, Any]:
    """What the template asks for."""
    found, head, marks, files = contents["found"], contents["headline"], contents["marks"], Files()
    files.put("results.csv", csv_text(found))
    comparing.marks_file(found, marks, files)
    figures = comparing.language_figures(found, head["method"], marks)
    return {
        "found": found,
        "metric": METRICS[found["metric"]],
        "head": head,
        "verdict": _verdict(head),
        "baseline": found["methods"].get(head["baseline"], {}).get("title") or head["baseline"],
        "heat": heat(found, marks),
        "columns": columns(found),
        "roomy": len(columns(found)) <= ROOMY,
        "steps": range(colours.STEPS),
        "meanings": list(MARKS.values()),
        "marked": _marked(marks),
        "forest": comparing.forest_figure(found, head["method"], marks),
        "averages": [
            (header, rows, comparing.averages_file(found, marks, files)) for header, rows in average_tables(found)
        ],
        "also": [(title, *table, comparing.also_file(found, title, files)) for title, table in also_tables(found)],
        "bars": figures,
        "language_table": (comparing.LANGUAGE_HEADER, comparing.language_rows(found, marks)),
        **_weights(found, files),
        "atlas": _atlas(contents, files),
        "references": _references(found, files),
        **_trainings(contents["trainings"], files),
        **_examples(contents["examples"]),
        "spending": _spending(contents["spending"], files),
        **_provenance(contents["provenance"], files),
        "published": _tables([contents["published"]], files, "paper") if contents["published"] else [],
        "notes": notes(found),
        "files": packed(files.texts),
        "names": sorted(files.texts),
        "island": island,
    }


def _verdict(head: dict[str, Any]) -> tuple[str, str]:
    """The verdict's sign and words. Where there is a baseline, languages one by one may have been compared."""
    sign, words = VERDICTS.get(head["verdict"], VERDICTS["unknown"])
    return sign, "No comparison on average" if sign == "?" and head["baseline"] is not None else words


def _tables(tables: list[Any], files: Files, name: str) -> list[tuple[list[str], list[list[str]], str]]:
    """Tables with the names of their files."""
    many = len(tables) > 1
    return [
        (header, rows, files.add(f"{name}-{n}.csv" if many else f"{name}.csv", header, rows))
        for n, (header, rows) in enumerate(tables, start=1)
    ]


def _references(found: dict[str, Any], files: Files) -> list[tuple[list[str], list[list[str]], str]]:
    """The likeness of the references, and its file with the figures as they are."""
    if not found["references"]:
        return []
    rows = [[entry["language"], entry["seed"], entry["cosine"], *entry["norms"]] for entry in found["references"]]
    header = ["language", "seed", "cosine", "norm_of_target", "norm_of_source"]
    return [(*reference_table(found), files.add("references.csv", header, rows))]


def _marked(marks: dict[str, Any]) -> dict[str, int]:
    entries = [entry for by_language in marks.values() for entry in by_language.values()]
    return {"tests": len(entries), "significant": sum(bool(entry["significant"]) for entry in entries)}


def _weights(found: dict[str, Any], files: Files) -> dict[str, Any]:
    own = weight_table(found)
    return {
        "weight_figures": weights.weight_figures(found),
        "own_figures": weights.own_figures(found),
        "own_weights": own if own[1] else None,
        "weights_file": weights.weights_file(found, files) if found["selections"] else None,
        "curve_points": weights.table(found),
    }


def _atlas(contents: dict[str, Any], files: Files) -> dict[str, Any] | None:
    return atlas(contents["divergences"], files) if contents["divergences"] else None


def _trainings(entries: list[dict[str, Any]], files: Files) -> dict[str, Any]:
    figures = learning.training_figures(entries)
    rows = learning.training_rows(entries)
    if entries:
        learning.losses_file(entries, files)
        learning.trainings_file(entries, files)
    kinds = dict.fromkeys(figure["kind"] for figure in figures)
    return {
        "training_figures": figures,
        "training_kinds": {kind: learning.KINDS.get(kind, kind) for kind in kinds},
        "training_languages": list(dict.fromkeys(figure["language"] for figure in figures if figure["language"])),
        "training_table": (learning.HEADER, rows) if rows else None,
        "held_out": any(figure["held"] for figure in figures),
    }


def _examples(given: dict[str, Any] | None) -> dict[str, Any]:
    if not given or not any(given["items"].values()):
        return {"examples": None, "example_data": ""}
    data = {**given, "strings": shown(given["strings"])}
    data["items"] = {code: {**columns, "id": shown(columns["id"])} for code, columns in given["items"].items()}
    data["names"] = {code: printable(name_of(code)) for code in given["languages"]}
    data["tags"] = {code: language_tag(code) for code in given["languages"]}
    return {"examples": given, "example_data": packed(data)}


def _spending(spent: dict[str, Any] | None, files: Files) -> dict[str, Any] | None:
    if not spent:
        return None
    names = ("kind", "steps", "seconds", "tokens", "bytes")
    files.add("costs.csv", names, [[row.get(name) for name in names] for row in spent["by_kind"]])
    return spent


def _provenance(given: dict[str, Any], files: Files) -> dict[str, Any]:
    names = ("kind", "label", "key", "sha256", "files")
    files.add("steps.csv", names, [[step.get(name) for name in names] for step in given["steps"]])
    files.put("experiment.yaml", given["experiment_yaml"])
    return {"provenance": given}
