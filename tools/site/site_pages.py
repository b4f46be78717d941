"""Pages that are made of the code and of the repository's other files whenever the site is built."""

import importlib.util
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; `|` in a cell is text."""
    cells = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])


# The configuration


def configuration() -> str:
    """Every key of an experiment, from its schema: type, default, meaning."""
    from lingraft.config import Experiment

    parts = [
        "# Every key of an experiment",
        "Made from the code; `lingraft schema` prints the same as a JSON schema, which editors can check a file against. "
        "What the keys are for, with an example: [experiments](../experiments.md). Unknown keys are errors. A value can be "
        "overridden on the command line: `lingraft run my.yaml training.epochs=1`.",
        "## The experiment itself",
        _doc(Experiment),
        _keys(Experiment, ""),
    ]
    for name, model in below(Experiment).items():
        parts += [f"## `{name}`", _doc(model), _keys(model, f"{name}.")]
    return "\n\n".join(part for part in parts if part) + "\n"


def below(model: Any) -> dict[str, Any]:
    """The configurations inside another: where each stands first, and what it is."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = _model_of(field.annotation)
        if inner is not None and inner not in found.values():
            found[f"{name}.NAME" if _is_mapping(field.annotation) else name] = inner
    return found


def keys(model: Any, before: str = "") -> set[str]:
    """All keys of a configuration, dotted; a name that the user chooses is `NAME`."""
    found = set()
    for name, field in model.model_fields.items():
        found.add(before + name)
        inner = _model_of(field.annotation)
        if inner is not None:
            found |= keys(inner, f"{before}{name}." + ("NAME." if _is_mapping(field.annotation) else ""))
    return found


def _is_mapping(kind: Any) -> bool:
    return typing.get_origin(kind) is dict


def _model_of(kind: Any) -> Any:
    from lingraft.config import Config

    if isinstance(kind, type) and issubclass(kind, Config):
        return kind
    return next((found for part in typing.get_args(kind) if (found := _model_of(part)) is not None), None)


def _doc(model: Any) -> str:
    return re.sub(r"\s+", " ", (model.__doc__ or "").strip())


def _keys(model: Any, before: str) -> str:
    rows = []
    for name, field in model.model_fields.items():
        said = _sentence(field.description or "")
        inner = _model_of(field.annotation)
        if inner is not None:
            said = f"{said} {_doc(inner)}".strip()
        rows.append([f"`{before}{name}`", _kind(field), _default(field), said])
    return table(["key", "type", "default", "meaning"], rows)


def _sentence(text: str) -> str:
    text = text.replace("{", "&#123;").replace("}", "&#125;").replace("<", "&lt;")
    return text if not text or text.endswith(".") else f"{text}."


def _kind(field: Any) -> str:
    bounds = []
    for rule in field.metadata:
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if getattr(rule, name, None) is not None:
                bounds.append(f"{sign} {getattr(rule, name):g}")
    return ", ".join([_named(field.annotation), *bounds])


def _named(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _named(parts[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_named(part) for part in parts if part is not type(None))
    if origin is tuple:
        inner = _named(parts[0])
        return f"list of {inner}" if "," not in inner else f"list of: {inner}"
    if origin is dict:
        return f"mapping to {_named(parts[1])}"
    known = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return known.get(kind, "a mapping, see below")


def _default(field: Any) -> str:
    if field.is_required():
        return "**required**"
    value = field.default
    if value is None:
        return "absent"
    if _model_of(field.annotation) is not None and not isinstance(value, Mapping):
        return "see below"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in value)}]`"
    return "`{}`" if value == {} else f"`{value}`"


# Tables of the code


def methods() -> str:
    """The table of methods."""
    from lingraft.methods import CRITERIA, METHODS

    kinds = {
        "none": "no adapter",
        "source": "T",
        "target": "the target's own labels",
        "sequential": "T on top of R_t",
        "projected": "projected labels",
        "graft": "a graft, λ is chosen",
        "second": "a second stage",
        "stack": "a stack",
    }
    rows = [[f"`{m.name}`", m.title, m.says, kinds[m.adapter]] for m in METHODS.values()]
    criteria = [[f"`METHOD:{name}`", says] for name, says in CRITERIA.items() if name != "labels"]
    fused = ", ".join(f"`{name}`" for name, m in METHODS.items() if m.second in ("fused", "fused-mt"))
    return "\n\n".join(
        [
            "# The table of methods",
            "Made from the code; `lingraft methods` prints it. T is the task's adapter from the source language, R_t and R_s are "
            "the reference adapters of target and source. The formulas behind the names: [methods](../methods/formulas.md).",
            table(["name", "in tables", "what it is", "what is asked"], rows),
            "## Variants",
            "A method with a λ takes a criterion by which λ is chosen, without any label: "
            "[what they do](../protocol.md#λ-without-labels).",
            table(["name", "λ is"], criteria),
            f"{fused} take a fusion function after the colon, such as `flare:mul`: [φ](../fusion.md#φ).\n",
        ]
    )


def tasks() -> str:
    """The table of tasks."""
    from lingraft.commands.listings import list_tasks

    kinds = {"choice": "one of its labels", "extraction": "part of the context", "number": "a number"}
    kinds |= {"summary": "a sentence", "text": "plain text"}
    parts = [
        "# The table of tasks",
        "Made from the code; `lingraft tasks` prints it. What the tasks are, where their data come from and how answers are "
        "judged: [tasks](../tasks.md).",
    ]
    for task in list_tasks(as_json=True) or []:
        if task["kind"] == "text":
            continue
        rows = [
            ["answer", ", ".join(f"`{label}`" for label in task["labels"]) or kinds[task["kind"]]],
            ["figure", task["metric"].replace("_", " ")],
            ["languages", " ".join(task["languages"] or ["any"])],
            ["trained on", " ".join(task["train_languages"] or ["any"]) if "train" in task["splits"] else "nothing"],
            ["splits", ", ".join(task["splits"])],
            ["prompts", ", ".join(f"`{prompt}`" for prompt in task["prompts"])],
            ["on the hub", ", ".join(f"`{name}`" for name in task["hub"])],
            ["licence", task["licence"] or ""],
            ["note", task["note"] or ""],
        ]
        parts += [f"## `{task['name']}`", table(["what", "which"], [row for row in rows if row[1]])]
    from lingraft.config import TEXT_TASKS

    texts = [[f"`{name}`", says] for name, says in TEXT_TASKS.items()]
    parts += ["## Reference tasks on plain text", table(["name", "what is learned"], texts)]
    return "\n\n".join(parts) + "\n"


def languages() -> str:
    """The table of languages."""
    from lingraft.languages import LANGUAGES

    rows = [[f"`{one.code}`", one.name, f"`{one.flores}`"] for one in LANGUAGES.values()]
    return "\n\n".join(
        [
            "# Languages known by name",
            "Made from the code. Your own files may use any code; this table is asked where a data set spells languages in its "
            "own way, and for names in tables.",
            table(["code", "language", "FLORES code"], rows) + "\n",
        ]
    )


def errors() -> str:
    """What can be said to a user, from the sources."""
    path = ROOT / "tools" / "error_catalogue.py"
    if not path.exists():
        return "# Errors\n\nEvery error says what is wrong, where, and what to do.\n"
    return loaded(path).markdown()


def loaded(path: Path) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATED = {
    "reference/configuration.md": configuration,
    "reference/errors.md": errors,
    "reference/languages.md": languages,
    "reference/methods.md": methods,
    "reference/tasks.md": tasks,
}
"""Pages that no file holds, and what makes them."""


# Files of the repository outside docs/


def copied() -> dict[str, str]:
    """Pages that are files of the repository: where each stands in the site, by its path in the repository."""
    found = {
        "CHANGELOG.md": "project/changelog.md",
        "CONTRIBUTING.md": "project/contributing.md",
        "SECURITY.md": "project/security-policy.md",
    }
    for path in results():
        found[f"benchmarks/results/{path.name}"] = f"results/{path.name}"
    for path in sorted(ROOT.glob("recipes/*/README.md")):
        found[path.relative_to(ROOT).as_posix()] = f"results/recipes-{path.parent.name}.md"
    for path in sorted(ROOT.glob("examples/notebooks/*.ipynb")):
        found[path.relative_to(ROOT).as_posix()] = f"notebooks/{path.stem}.md"
    return found


def attached() -> dict[str, str]:
    """Files that pages show or link to, and which are no pages themselves."""
    found = {}
    for kind in ("svg", "csv", "png"):
        for path in sorted(ROOT.glob(f"benchmarks/results/*.{kind}")):
            found[path.relative_to(ROOT).as_posix()] = f"results/{path.name}"
    for path in sorted(ROOT.glob("recipes/**/*.yaml")):
        found[path.relative_to(ROOT).as_posix()] = path.relative_to(ROOT).as_posix()
    return found


def results() -> list[Path]:
    """The pages of results."""
    return sorted((ROOT / "benchmarks" / "results").glob("*.md"))


def introduced() -> list[Path]:
    """The pages of results in the order in which their first page introduces them; what it does not name comes last."""
    text = (ROOT / "docs" / "results" / "index.md").read_text(encoding="utf-8")
    places = {path: text.find(f"benchmarks/results/{path.name})") for path in results()}
    return sorted(places, key=lambda path: (places[path] < 0, places[path]))


COMMIT = re.compile(r"\b(?=[0-9a-f]*[0-9])[0-9a-f]{7}\b")
MACHINE = re.compile(r"(?:\b(?:loaded )?2[- ]cores?(?: of(?: an)?)?|\btwo cores\)?)\s*\(?\s*AMD EPYC", re.DOTALL)


def machines() -> str:
    """The table of where and from which commits the results were made, as each page says at its head."""
    rows = []
    for path in results():
        text = path.read_text(encoding="utf-8")
        head = "\n".join(text.split("\n")[:16]).split("\n## ")[0]
        title = head.split("\n")[0].removeprefix("# ")
        commits = list(dict.fromkeys(COMMIT.findall(head)))
        machine = "2 cores of an AMD EPYC" if MACHINE.search(head) else "named on the page"
        rows.append([f"[{title}]({path.name})", machine, ", ".join(f"`{c}`" for c in commits) or "named on the page"])
    return table(["page", "machine", "commits named there"], rows)


def decisions() -> str:
    """The list of decisions, from their headings."""
    lines = []
    for path in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md")):
        title = path.read_text(encoding="utf-8").split("\n")[0].removeprefix("# ")
        number, said = re.split(r"\W+", title, maxsplit=1)
        lines.append(f"{int(number)}. [{said}](../decisions/{path.name})")
    return "\n".join(lines)


# The command line


def command_line() -> str:
    """Every verb with its usage and options, in the order of the work."""
    from lingraft.cli import main

    parts = [
        "# Command line",
        "Made from the code; every verb prints the same with `--help`. Every verb also has `--json`, which prints the result "
        "or the error as JSON, and `--debug`, which shows an error's traceback. Exit codes: 0 done, 1 failed, 2 a mistake in the "
        "request. How the verbs are used together: [the command line in use](../command-line.md).",
        table(["verb", "what it does"], [[_link(name), _first(verb)] for name, verb in verbs(main)]),
        *(_verb(name, verb) for name, verb in verbs(main)),
    ]
    return "\n\n".join(parts) + "\n"


def verbs(group: Any, before: str = "") -> list[tuple[str, Any]]:
    """The verbs of a group, those of groups in it included, in their order."""
    found = []
    for name, verb in group.commands.items():
        found += verbs(verb, f"{before}{name} ") if hasattr(verb, "commands") else [(before + name, verb)]
    return found


def _link(name: str) -> str:
    return f"[`{name}`](#lingraft-{name.replace(' ', '-')})"


def _text(text: str) -> str:
    """Text as Markdown that shows it: angles and braces are no HTML and no macros."""
    return re.sub(r"([<>{}*_\[\]])", r"\\\1", text)


def _first(verb: Any) -> str:
    return _text(re.sub(r"\s+", " ", (verb.help or "").strip().split("\n\n")[0]))


def _verb(name: str, verb: Any) -> str:
    import click

    context = click.Context(verb, info_name=name, parent=click.Context(click.Group(), info_name="lingraft"))
    usage = re.sub(r"\s+", " ", " ".join(["lingraft", name, *verb.collect_usage_pieces(context)]))
    paragraphs = [_text(re.sub(r"\s+", " ", part.strip())) for part in (verb.help or "").split("\n\n")]
    rows = []
    for option in verb.params:
        if not isinstance(option, click.Option) or option.name in ("as_json", "debug", "help"):
            continue
        names = ", ".join(f"`{one}`" for one in (*option.opts, *option.secondary_opts))
        rows.append([names, _values(option, context), _text(option.help or ""), _given(option)])
    options = table(["option", "value", "what it says", "default"], rows) if rows else ""
    return "\n\n".join(part for part in [f"## lingraft {name}", f"```text\n{usage}\n```", *paragraphs, options] if part)


def _values(option: Any, context: Any) -> str:
    import click

    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return ", ".join(f"`{one}`" for one in option.type.choices)
    return f"`{option.make_metavar(context)}`" + (
        ", repeated" if option.multiple and "epeated" not in (option.help or "") else ""
    )


def _given(option: Any) -> str:
    if option.required:
        return "**required**"
    value = option.default
    plain = isinstance(value, str | int | float | Path) and not isinstance(value, bool)
    if option.secondary_opts and isinstance(value, bool):
        return f"`{(option.opts if value else option.secondary_opts)[0]}`"
    return f"`{value}`" if plain else ""


GENERATED["reference/cli.md"] = command_line
