"""How the command line behaves among other programs: JSON, exit codes, pipes, signals, colours, widths, encodings."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from lingraft.cli import main
from tests.unit.adapters import FEW, write_adapter

LINGRAFT = [sys.executable, "-m", "lingraft"]
PLAIN = {
    k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHONIOENCODING", "TERM")
}


def verbs(group: click.Group = main, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All commands that do something, with the words that name them."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, (*before, name))
        else:
            yield (*before, name), command


VERBS = {" ".join(words): command for words, command in verbs()}


def ran(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*LINGRAFT, *arguments], env=PLAIN | env, cwd=cwd, capture_output=True, timeout=60)


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_json_and_debug(name: str) -> None:
    options = {option for param in VERBS[name].params for option in param.opts}
    assert {"--json", "--debug"} <= options


@pytest.mark.parametrize("name", VERBS)
def test_a_mistake_of_usage_is_json_too(name: str) -> None:
    found = CliRunner().invoke(main, [*name.split(), "--no-such-option", "--json"])
    assert found.exit_code == 2 and found.stderr == ""
    said = json.loads(found.stdout)
    assert set(said) == {"error", "where", "remedy", "exit_code"} and said["exit_code"] == 2
    assert said["remedy"] == f"see main {name} --help" or said["remedy"].endswith(f"{name} --help")


@pytest.mark.parametrize(
    "arguments", [["trian"], ["store", "veryfi"], [], ["store"], ["merge", "--weight", "heavy"], ["report"]]
)
def test_mistakes_before_a_verb_are_json_too(arguments: list[str]) -> None:
    found = CliRunner().invoke(main, [*arguments, "--json"])
    assert found.exit_code == 2 and json.loads(found.stdout)["exit_code"] == 2


def test_json_after_two_dashes_is_an_argument() -> None:
    found = CliRunner().invoke(main, ["report", "--", "one", "--json"])
    assert found.exit_code == 2 and found.stdout == "" and "Usage" in found.stderr


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three adapters, a store, and a folder in which no run has begun."""
    folder = tmp_path_factory.mktemp("here")
    for seed, name in enumerate(("task", "target", "source")):
        write_adapter(folder / name, seed, shapes=FEW)
    (folder / "store").mkdir()
    (folder / "run").mkdir()
    (folder / "x.yaml").write_text("name: x\nbackbone: model\ntask: topics\ntargets: [sw]\ndata_dir: bundled\n")
    return folder


ASKED: dict[str, list[str]] = {
    "quickstart": ["--ray-address", "auto"],
    "run": ["x.yaml"],
    "tune": ["x.yaml"],
    "train": ["--model", "no", "--task", "topics", "--language", "en", "--data-dir", "bundled", "--out", "o"],
    "evaluate": ["--model", "no", "--task", "topics", "--language", "en", "--data-dir", "bundled", "--out", "o"],
    "divergence": ["--target-ref", "target", "--source-ref", "source", "--out", "divergence"],
    "merge": ["task=0.5", "target=0.5", "--out", "merged"],
    "convert": ["nothing.bin", "--out", "o"],
    "inspect": ["task", "target"],
    "report": ["run"],
    "watch": ["run"],
    "store ls": ["store"],
    "store verify": ["store"],
    "store gc": ["store"],
    "push": ["task", "nobody/nothing", "--dry-run"],
    "completion": ["bash"],
    "tasks": [],
    "methods": [],
    "schema": [],
}
"""A request to every verb that costs next to nothing; some are mistakes, and their answer is JSON as well."""


def test_every_verb_is_asked() -> None:
    assert set(ASKED) == set(VERBS)


@pytest.mark.parametrize("name", ASKED)
def test_what_every_verb_says_in_json_can_be_parsed(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    found = CliRunner().invoke(main, [*name.split(), *ASKED[name], "--json"])
    assert found.exit_code in (0, 2), found.output
    said = json.loads(found.stdout)
    if found.exit_code:
        assert set(said) == {"error", "where", "remedy", "exit_code"} and said["remedy"]
    assert "unexpected" not in found.output


def test_without_anything_it_says_what_there_is() -> None:
    found = ran()
    assert found.returncode == 2 and b"Usage: lingraft" in found.stdout + found.stderr


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("wathc", "watch"), ("mergr", "merge")])
def test_a_misspelt_verb_is_told_the_nearest(typed: str, meant: str) -> None:
    assert f"Did you mean '{meant}'?" in CliRunner().invoke(main, [typed]).stderr


def test_a_misspelt_option_is_told_the_nearest() -> None:
    assert "--weight" in CliRunner().invoke(main, ["merge", "--wieght", "1"]).stderr


@pytest.mark.parametrize("arguments", [["methods"], ["methods", "--json"], ["schema"], ["--help"]], ids=" ".join)
def test_a_reader_that_stops_reading_is_no_error_to_tell(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*LINGRAFT, *arguments], stdout=writing, stderr=subprocess.PIPE, env=PLAIN, timeout=60)
    os.close(writing)
    assert done.stderr == b"" and done.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("as_json", [True, False])
def test_a_verb_that_is_ended_says_so(here: Path, number: int, as_json: bool, tmp_path: Path) -> None:
    code = (
        "import time, sys\nfrom lingraft import cli\nfrom lingraft.commands import listings\n"
        "def wait(as_json):\n    print('here', flush=True, file=sys.stderr)\n    time.sleep(30)\n"
        "listings.list_tasks = wait\ncli.main(prog_name='lingraft')\n"
    )
    arguments = ["tasks", "--json"] if as_json else ["tasks"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=PLAIN
    ) as process:
        assert process.stderr is not None and process.stderr.readline() == b"here\n"
        time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 1 and b"Traceback" not in err
    if as_json:
        assert json.loads(out)["error"] == "interrupted"
    else:
        assert err.startswith(b"error: interrupted\n  to do: run the same command again")


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONUTF8": "0", "LC_ALL": "POSIX"},
    ],
)
@pytest.mark.parametrize(
    "arguments", [["methods"], ["methods", "--json"], ["merge", "--help"], ["inspect", "task", "target"]], ids=" ".join
)
def test_any_encoding_takes_what_is_said(here: Path, env: dict[str, str], arguments: list[str]) -> None:
    done = ran(*arguments, cwd=here, **env)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr and b"Error" not in done.stderr
    if "--json" in arguments:
        encoding = env.get("PYTHONIOENCODING", "utf-8")
        assert json.loads(done.stdout.decode(encoding)) == json.loads(ran(*arguments, cwd=here).stdout)


def test_ascii_gets_words_for_signs(here: Path) -> None:
    said = ran("methods", PYTHONIOENCODING="ascii").stdout.decode("ascii")
    assert "lambda = 0" in said and "\\u" not in said


@pytest.mark.parametrize("env", [{"NO_COLOR": "1", "FORCE_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1"}, {}])
def test_no_colours_where_they_are_not_wanted(here: Path, env: dict[str, str]) -> None:
    said = ran("methods", **env).stdout
    assert b"\x1b[3" not in said and b"\x1b[9" not in said


def test_colours_where_they_are_forced(here: Path) -> None:
    assert b"\x1b[" in ran("methods", FORCE_COLOR="1", TERM="xterm-256color").stdout


@pytest.mark.parametrize("columns", [20, 40, 200])
@pytest.mark.parametrize("verb", ["methods", "tasks"])
def test_tables_keep_to_the_width(columns: int, verb: str) -> None:
    from rich.cells import cell_len

    lines = ran(verb, COLUMNS=str(columns)).stdout.decode().splitlines()
    assert lines and max(map(cell_len, lines)) <= columns
