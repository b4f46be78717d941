"""What the documentation says is so: commands parse, code compiles, links lead somewhere, names exist, tables are the code's."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from lingraft.algebra import Law
from lingraft.cli import main
from lingraft.config import Experiment, load_experiment, parse_yaml
from lingraft.families import FAMILIES

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "site"))
import site_pages  # noqa: E402 - the site's own module, which is not installed

PAGE = ROOT / "docs" / "algebra.md"
BEGIN, END = "<!-- laws: ", "<!-- end of laws -->"
DOCS = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
        *(ROOT / "recipes").rglob("README.md"),
        *(ROOT / "benchmarks" / "results").glob("*.md"),
    ]
)
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCS]
every = pytest.mark.parametrize("name", NAMES)
FENCED = re.compile(
    r"^(?P<indent> *)(?P<fence>```+)(?P<kind>[\w+-]*)[^\n]*\n(?P<body>.*?)^(?P=indent)(?P=fence) *$", re.M | re.S
)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?:    [^\n]*\n(?:\n(?=    ))*)+")
INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, *kinds: str) -> list[str]:
    """The fenced blocks of some kinds."""
    return [found["body"] for found in FENCED.finditer(text) if found["kind"] in kinds]


def table() -> str:
    laws = list(Law)
    lines = ["| rule | " + " | ".join(f"`{law.value}`" for law in laws) + " |", "|---" * (len(laws) + 1) + "|"]
    for structure, spaces in FAMILIES.items():
        for space, rule in spaces.items():
            lines.append(
                f"| {structure}/{space} | " + " | ".join("kept" if law in rule.laws else "–" for law in laws) + " |"
            )
    return "\n".join(lines)


def test_the_table_of_laws_is_the_table_of_families() -> None:
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    note, rest = rest.split("-->\n", 1)
    _, tail = rest.split(END)
    expected = f"{head}{BEGIN}{note}-->\n{table()}\n{END}{tail}"
    if os.environ.get("UPDATE"):
        PAGE.write_text(expected, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == expected


# Commands


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """Every `lingraft …` of a page, and whether it is a whole command or a mention in a sentence."""
    bodies = blocks(text, "bash", "sh", "console", "") + INDENTED.findall(FENCED.sub("\n", text))
    for body in bodies:
        for line in re.sub(r"\s*\\\n\s*", " ", body).split("\n"):
            line = re.sub(r"^\s*(?:\$ )?(?:\.venv/bin/)?", "", line)
            for part in line.split(" && "):
                if part.startswith("lingraft "):
                    yield part, True
    for mention in INLINE.findall(FENCED.sub("\n", text)):
        if mention.startswith("lingraft "):
            yield mention.replace("\n", " "), False


def problem(command: str, whole: bool) -> str | None:
    """What the command line would say about a command, where it is not that something was left out on purpose."""
    command = re.sub(r"\$\([^)]*\)", "X", re.split(r"\s+#|\s{2,}|\s\(|\s\\?[|>]", command)[0])
    command = re.sub(r"(?<=\s)\[([^\]=]*)\](…?)", r"\1", command.replace("[ADAPTER=WEIGHT]", ""))
    words = [word for word in shlex.split(command)[1:] if word.strip("….,") and "…" not in word]
    words = [word.split("|")[0] if re.fullmatch(r"[\w|.-]+", word) else word for word in words]
    short = not whole or "…" in command
    found: click.Command = main
    while words and isinstance(found, click.Group):
        if words[0].startswith("-") or (short and not re.fullmatch(r"[a-z-]+", words[0])):
            return None
        if words[0] not in found.commands:
            return f"there is no verb '{words[0]}'"
        found = found.commands[words.pop(0)]
    if isinstance(found, click.Group):
        return None
    try:
        asked = found.make_context(found.name, words)
    except click.exceptions.Exit:
        return None
    except click.MissingParameter as missing:
        return None if short else missing.format_message()
    except click.UsageError as error:
        return None if short and "requires an argument" in error.format_message() else error.format_message()
    keys = [one.split("=")[0] for one in asked.params.get("overrides", ()) if "=" in one]
    return next((f"there is no key '{key}'" for key in keys if key.isascii() and key not in KEYS), None)


KEYS = site_pages.keys(Experiment)


@every
def test_commands_parse(name: str) -> None:
    found = {command: problem(command, whole) for command, whole in commands(text_of(name))}
    assert not {command: said for command, said in found.items() if said}


def test_commands_are_found_and_looked_at() -> None:
    """The test above is worth nothing where it finds no commands, or lets everything pass."""
    assert sum(len(list(commands(text_of(name)))) for name in NAMES) > 100
    assert problem("lingraft graft x", True) == "there is no verb 'graft'"
    assert "No such option" in (problem("lingraft merge --wieght 1 --out x", True) or "")
    assert problem("lingraft run x.yaml training.epoch=1", True) == "there is no key 'training.epoch'"
    assert "Missing" in (problem("lingraft train --model demo", True) or "")
    assert problem("lingraft train --model demo …", True) is None


# Code, configurations, links, names


@every
def test_python_compiles(name: str) -> None:
    for block in blocks(text_of(name), "python", "py"):
        ast.parse(block)


@every
def test_experiments_are_valid(name: str, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(text_of(name), "yaml", "yml")):
        tree = parse_yaml(block.replace("{…}", "{}"))
        if isinstance(tree, dict) and "name" in tree and "task" in tree:
            path = tmp_path / f"{number}.yaml"
            path.write_text(block.replace("{…}", "{}"), encoding="utf-8")
            load_experiment(path)
        elif isinstance(tree, dict):
            assert set(tree) <= set(Experiment.model_fields), f"unknown keys in {block}"


@every
def test_links_lead_somewhere(name: str) -> None:
    text = FENCED.sub("", text_of(name))
    made = {(ROOT / "docs" / page).resolve() for page in site_pages.GENERATED}
    for link in re.findall(r"\]\(([^()\s#]+)(?:#[^()\s]*)?\)", text):
        if re.match(r"^[a-z]+:", link):
            continue
        target = ((ROOT / name).parent / link).resolve()
        assert target.exists() or target in made, f"{name}: {link}"


@every
def test_no_path_of_a_machine(name: str) -> None:
    assert not re.findall(r"(?<![\w.~}])/(?:tmp|work|root|home|Users)/\S*", text_of(name))


def variables(text: str) -> set[str]:
    return set(re.findall(r"\bLINGRAFT_[A-Z_]+\b", text))


def test_variables_exist_and_are_all_explained() -> None:
    known = {one for path in (ROOT / "src").rglob("*.py") for one in variables(path.read_text(encoding="utf-8"))}
    named = {name: variables(text_of(name)) - known for name in NAMES}
    assert not {name: strange for name, strange in named.items() if strange}
    assert known <= variables(text_of("docs/reference/environment.md"))


PARTS = {key.split(".")[0] for key in KEYS if "." in key} - {"tasks"}
FILES = (".py", ".md", ".json", ".yaml", ".safetensors")


def in_code(dotted: str) -> bool:
    """Whether a name is a module's, or in a module."""
    *modules, name = dotted.split(".")
    places = [ROOT / "src" / "lingraft" / "/".join(modules), ROOT / "src" / "lingraft" / dotted.replace(".", "/")]
    sources = [path for place in places for path in (place.with_suffix(".py"), place / "__init__.py") if path.exists()]
    return any(
        source.stem == name or re.search(rf"\b{name}\b", source.read_text(encoding="utf-8")) for source in sources
    )


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("benchmarks/")])
def test_keys_that_are_named_exist(name: str) -> None:
    for mention in INLINE.findall(FENCED.sub("\n", text_of(name))):
        found = re.match(rf"^((?:{'|'.join(sorted(PARTS))})\.[a-z_0-9.]+?)\.?(?:[:=\s(]|$)", mention)
        if found and not found[1].endswith(FILES):
            assert found[1] in KEYS or in_code(found[1]), f"`{mention}`"


# The tutorial, as a newcomer walks it


def walked(page: str, tiny: Path) -> list[str]:
    """The commands of a page, with a tiny model in the demo's place."""
    from lingraft.commands.experiments import SHORT

    recipe = ROOT / "src" / "lingraft" / "recipes" / "quickstart.yaml"
    lines = []
    for block in blocks(text_of(page), "bash"):
        if "pip install" in block:
            continue
        for line in block.strip().split("\n"):
            line = line.replace("--model demo", f"--model {tiny}")
            short = " ".join(shlex.quote(one) for one in (*SHORT, f"backbone={tiny}"))
            line = line.replace("lingraft quickstart --short", f"lingraft run {recipe} {short}")
            lines.append(re.sub(r"^lingraft ", f"{sys.executable} -m lingraft ", line))
    return lines


@pytest.mark.full
@pytest.mark.parametrize("page", ["docs/tutorial.md", "docs/how-to/own-task.md"])
def test_a_page_of_commands_can_be_walked(page: str, tiny_folder: Path, tmp_path: Path) -> None:
    text = text_of(page)
    (named,) = set(re.findall(r"`([a-z]+\.yaml)`", text))
    (experiment,) = [block for block in blocks(text, "yaml") if block.startswith("name:")]
    (tmp_path / named).write_text(experiment.replace("backbone: demo", f"backbone: {tiny_folder}"), encoding="utf-8")
    for line in walked(page, tiny_folder):
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    for block in blocks(text, "python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
