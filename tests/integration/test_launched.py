"""`lingraft run` in the processes of a launcher: the steps of one process, each made once, by all of them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lingraft.adapter import Adapter
from lingraft.config import load_experiment
from lingraft.predictions import read_predictions
from lingraft.runner import run
from lingraft.store import Store, read_json
from tests.conftest import save_tiny_model
from tests.integration.test_pipeline import make_experiment

SMALL = ["seeds=[0]", "targets=[sw]", "methods=[eng-ft, adamergex-product]", "speed.together=2"]


def launched(folder: Path, *overrides: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lingraft"]
    command += ["run", "tiny.yaml", *SMALL, *overrides, "--out", "out", "--store", "store"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_a_run_of_two_processes_makes_the_steps_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_experiment(tmp_path, save_tiny_model(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    done = launched(tmp_path)
    assert done.returncode == 0, done.stderr
    alone = run(load_experiment(path, SMALL), tmp_path / "alone", store=tmp_path / "ours")
    ours, theirs = Store(tmp_path / "ours"), Store(tmp_path / "store")
    assert list(theirs.steps()) == list(ours.steps()) and alone.ran == len(alone.plan.steps)
    assert read_json(tmp_path / "out/manifest.json")["cells"] == read_json(tmp_path / "alone/manifest.json")["cells"]
    for kind, key in ours.steps():
        record = theirs.record(kind, key)
        if kind == "train":
            assert record["environment"]["processes"] == 2
            _close(Adapter.load(ours.folder(kind, key)), Adapter.load(theirs.folder(kind, key)))
        elif kind == "predict":
            pairs = zip(
                read_predictions(ours.folder(kind, key)), read_predictions(theirs.folder(kind, key)), strict=True
            )
            for one, two in pairs:
                assert one.scores == pytest.approx(two.scores, abs=1e-3)
    assert done.stderr.count("train kind en seed 0") == 1, "one process speaks"
    again = launched(tmp_path)
    assert again.returncode == 0 and "nothing to do" in again.stderr


def _close(one: Any, two: Any) -> None:
    for (name, a), (other, b) in zip(one.tensors(), two.tensors(), strict=True):
        assert name == other and a == pytest.approx(b, abs=2e-3)


def test_a_step_that_fails_ends_the_launch_with_one_message(tmp_path: Path) -> None:
    make_experiment(tmp_path, save_tiny_model(tmp_path / "model"))
    failed = launched(tmp_path, "training.learning_rate=1e30", "training.clip=1e30")
    assert failed.returncode != 0
    assert failed.stderr.count("became") == 1, failed.stderr
