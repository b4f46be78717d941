"""The wheel installs and works in an empty environment, without torch."""

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_installs_and_works_in_an_empty_environment(tmp_path: Path) -> None:
    def command(*words: str | Path) -> str:
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    command(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    command(python, "-m", "pip", "install", "--quiet", wheel)
    assert "graft" in command(tmp_path / "env/bin/lingraft", "--help").lower()
    assert "topics" in command(tmp_path / "env/bin/lingraft", "tasks", "--json")
    check = (
        "import lingraft, importlib.util as u; from lingraft import Adapter, transfer;"
        "from lingraft.tasks.table import find_task as c; from lingraft.tasks.sources import bundled_or as b;"
        "t = c('topics'); print(len(t.examples(t.sources('sw', 'test', b('bundled')))), u.find_spec('torch'))"
    )
    assert command(python, "-c", check).split() == ["105", "None"]
    # What the small install cannot do, it says, with the command that helps.
    recipe = ["quickstart", "--out", "run"]
    refused = subprocess.run(
        [tmp_path / "env/bin/lingraft", *recipe], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert refused.returncode == 2 and "pip install 'lingraft[demo]'" in refused.stderr
