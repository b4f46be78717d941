"""The speed benchmarks run on tiny models, and their page is made of their results; nothing timed is looked at."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> None:
    """In this process, which has torch already; what is measured in processes of its own starts them itself."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(BENCHMARKS))
        patched.setattr(sys, "argv", [script, *arguments])
        try:
            importlib.import_module(script).main()
        finally:
            torch.set_num_threads(threads)  # Other tests compare bytes with processes of their own.


def quick(script: str, folder: Path, *arguments: str) -> None:
    out = str(folder / f"{script}.json")
    run(script, "--quick", "--threads", "1", "--rounds", "1", "--out", out, *arguments)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    quick("limits", folder)
    quick("training", folder, "--cases", "label-exact", "--ways", "peer,ours")
    quick("grid", folder)
    return folder


def found(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_both_sides_take_the_same_steps(results: Path) -> None:
    case = found(results, "training")["cases"]["label-exact"]
    peer, ours = (case["ways"][key]["losses"] for key in ("peer", "ours"))
    assert len(ours) == 2
    assert ours == pytest.approx(peer, abs=1e-4)
    # The update counts: the second step's loss on the same texts is another.
    assert abs(ours[0] - ours[1]) > abs(ours[1] - peer[1])
    assert case["compared"]["ours"]["largest_loss_difference"] == max(
        abs(a - b) for a, b in zip(ours, peer, strict=True)
    )


def test_a_grid_in_place_says_what_merged_files_say(results: Path) -> None:
    grid = found(results, "grid")
    exact = grid["in_float32"]
    assert exact["same_answers"] == exact["answers"] == grid["answers"] == 2 * len(grid["weights"])
    assert exact["largest_score_difference"] < 1e-3
    assert grid["changed_by_the_weight"] == 2


def test_the_page_is_of_the_results_alone(results: Path) -> None:
    run("page", "--results", str(results))
    first = (results / "speed.md").read_text(encoding="utf-8")
    figures = found(results, "training")["cases"]["label-exact"]["compared"]["ours"]
    assert f"{figures['times_faster']:.2f}" in first
    assert "GPU: not measured (" in first
    assert "scoring.json: not measured" in first
    assert (results / "speed.svg").stat().st_size > 0
    run("page", "--results", str(results))
    assert (results / "speed.md").read_text(encoding="utf-8") == first


def test_flops_of_a_step_worked_by_hand(monkeypatch: pytest.MonkeyPatch, tiny) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    training = importlib.import_module("training")

    # The tiny Llama: width 32, two layers; q and o 32 × 32, k and v 16 × 32, three of 64 × 32. One text of four tokens, one loss.
    layer = 32 * 32 * 2 + 16 * 32 * 2 + 3 * 64 * 32
    low = 64 * 2 + 48 * 2 + 96 * 3
    first = 32 * 32 + 2 * 16 * 32
    attention = 3 * (2 * 2 * 4 * 4 * 32 / 2) * 2
    words = tiny.model.config.vocab_size
    expected = 4 * (4 * 2 * layer - 2 * first + 6 * 2 * low) + attention + 4 * 32 * words
    assert training.flops(tiny.model, [{"ids": [1, 2, 3, 4], "start": 3}], rank=1) == pytest.approx(expected / 1e9)
