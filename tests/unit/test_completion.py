"""`lingraft completion` and the values that a shell is given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from lingraft.cli import main
from lingraft.config import TEXT_TASKS
from lingraft.languages import LANGUAGES
from lingraft.tasks.table import TASKS
from tests.unit.adapters import write_adapter


def completed(*words: str) -> list[str]:
    """What stands for the last word."""
    complete = ShellComplete(main, {}, "lingraft", "_LINGRAFT_COMPLETE")
    return [
        item.value if item.type == "plain" else item.type
        for item in complete.get_completions(list(words[:-1]), words[-1])
    ]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_printed(shell: str) -> None:
    plain = CliRunner().invoke(main, ["completion", shell])
    assert plain.exit_code == 0 and "_LINGRAFT_COMPLETE" in plain.stdout and "lingraft" in plain.stdout
    found = json.loads(CliRunner().invoke(main, ["completion", shell, "--json"]).stdout)
    assert found == {"shell": shell, "script": plain.stdout.removesuffix("\n")}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_help_says_where_to_put_it(shell: str) -> None:
    said = CliRunner().invoke(main, ["completion", "--help"]).stdout
    assert f"lingraft completion {shell} > ~/" in said


def test_the_script_is_bash() -> None:
    script = CliRunner().invoke(main, ["completion", "bash"]).stdout
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0


def test_bash_gets_names_as_they_would_be_typed(tmp_path: Path) -> None:
    for name in ("run one", "run$(touch x)", "run*", "run[1]", "run\ntwo", "run\\b"):
        (tmp_path / name / "progress").mkdir(parents=True)
    verb = tmp_path / "bin" / "lingraft"
    verb.parent.mkdir()
    verb.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lingraft "$@"\n')
    verb.chmod(0o755)
    script = CliRunner().invoke(main, ["completion", "bash"]).stdout
    script += (
        "\nCOMP_WORDS=(lingraft watch r); COMP_CWORD=2; COMPREPLY=(); before=$-\n_lingraft_completion lingraft\n"
        '[[ $before == $- ]] || echo "options changed"\n'
        # What is inserted, read again as a shell reads what was typed.
        'for word in "${COMPREPLY[@]}"; do eval "printf \'%s\\\\n\' $word"; done\n'
    )
    env = os.environ | {"PATH": f"{verb.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash"], input=script, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=60)
    assert done.stderr == ""
    assert sorted(done.stdout.splitlines()) == sorted(["run one", "run$(touch x)", "run*", "run[1]", "run\\b"])
    assert not (tmp_path / "x").exists()


def test_a_folder_that_may_not_be_looked_into_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)

    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refused)
    assert completed("watch", "r") == completed("inspect", "r") == ["dir"]


def test_verbs_options_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert completed("wa") == ["watch"]
    assert completed("merge", "--weight") == ["--weight", "--weight-of"]
    assert set(completed("train", "--task", "")) == {*TASKS, *TEXT_TASKS}
    assert completed("evaluate", "--task", "xcopa-") == ["xcopa-raw"]
    assert completed("train", "--task", "clm", "--language", "sw") == ["sw"]
    assert set(completed("train", "--language", "")) == set(LANGUAGES)
    assert set(completed("evaluate", "--task", "xcopa", "--language", "")) == set(TASKS["xcopa"].languages)
    assert set(completed("evaluate", "--task", "topics", "--prompt", "")) == set(TASKS["topics"].prompts)
    assert completed("run", "x.yaml", "targ") == ["targets="]
    assert completed("run", "x.yaml", "task=xcopa-") == ["task=xcopa-raw"]
    assert completed("completion", "z") == ["zsh"]


def test_folders_are_those_that_are_meant_or_lead_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a", "runs/b"):
        (tmp_path / name).mkdir(parents=True)
        write_adapter(tmp_path / name, 0)
    (tmp_path / "runs/other").mkdir()
    (tmp_path / "runs/done").mkdir()
    (tmp_path / "runs/done/manifest.json").write_text("{}")
    (tmp_path / "small.yaml").write_text("")
    assert completed("inspect", "") == ["dir"], "the shell goes on itself"
    assert completed("inspect", "runs/") == ["runs/a", "runs/b"]
    assert completed("merge", "--task", "runs/b") == ["runs/b"]
    assert completed("report", "runs/") == completed("watch", "runs/") == ["runs/done"]
    assert completed("run", "") == ["small.yaml"]
    assert completed("inspect", "nowhere/") == ["dir"]


def test_every_folder_of_an_adapter_or_a_run_completes() -> None:
    """A new option that takes an adapter is not forgotten."""
    for name, command in main.commands.items():
        for param in command.params:
            if param.name in (
                "run_dir",
                "target_ref",
                "source_ref",
                "divergence_dir",
                "start_from",
                "first_stage",
                "beneath",
            ):
                assert param._custom_shell_complete is not None, f"{name}: {param.name}"
    assert isinstance(main, click.Group)


@pytest.mark.parametrize(
    "words", ["lingraft train --task ", "lingraft evaluate --language s", "lingraft inspect ", "lingraft run x.yaml t"]
)
def test_a_shell_that_asks_waits_for_no_torch(words: str) -> None:
    code = (
        "import sys\nfrom lingraft.cli import main\n"
        "try:\n    main(prog_name='lingraft')\nexcept SystemExit: pass\n"
        "bad = [m for m in ('torch', 'transformers', 'peft', 'rich', 'lingraft.backbones') if m in sys.modules]\n"
        "print(bad, file=sys.stderr)\n"
    )
    asked = {"_LINGRAFT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert done.stderr.strip() == "[]", done.stderr
    assert done.stdout.startswith(("plain,", "dir,"))
