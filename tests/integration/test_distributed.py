"""Several processes in one training: the adapter of one process, files of one, no process left waiting."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lingraft.adapter import Adapter
from tests.conftest import save_tiny_model
from tests.integration import distributed_worker as worker

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def launch(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=given, timeout=300)


def run(mode: str, out: Path, **environment: str) -> dict[str, object]:
    ended = launch(*TORCHRUN, "-m", "tests.integration.distributed_worker", mode, str(worker.place(out)), **environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads((out / "said.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    save_tiny_model(folder / "llama")
    save_tiny_model(folder / "bert", "bert")
    return folder


@pytest.fixture(scope="module")
def killed(made: Path) -> subprocess.CompletedProcess[str]:
    """A launch whose second process is killed in the middle of an epoch."""
    out = worker.place(made / "two")
    ended = launch(*TORCHRUN, "-m", "tests.integration.distributed_worker", "die", str(out))
    shutil.copytree(out / "killed", made / "left")
    return ended


@pytest.fixture(scope="module")
def two(made: Path, killed: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """What two processes made together, each with the whole base."""
    return run("data", made / "two")


@pytest.fixture(scope="module")
def one(made: Path) -> dict[str, object]:
    """The same by one process."""
    out = worker.place(made / "one")
    decoder = worker.backbone(made / "llama")
    worker.families(decoder, out)
    worker.encoder(worker.backbone(made / "bert"), out)
    held_out = worker.others(decoder, out)
    worker.sparse(decoder, out)
    worker.go_on(decoder, out / "whole")
    worker.train(
        worker.backbone(made / "llama", part_tokens=40),
        worker.answer_sequences(decoder, worker.EXAMPLES, 128),
        worker.place(out / "short"),
        adapter=worker.LORA,
        training=worker.SOON,
    )
    return {"held_out": held_out, "asked": worker.asked(decoder, out / "lora")}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    adapter = Adapter.load(folder)
    return {
        name: np.array(array) for name, array in [*adapter.tensors(), *((n, r()) for n, r in adapter.others.items())]
    }


def same(ours: Path, theirs: Path, tolerance: float = 1e-5) -> None:
    found, expected = tensors(ours), tensors(theirs)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=tolerance, atol=tolerance, err_msg=name)


TRAINED = [*worker.FAMILIES, "encoder", "held", "alone", "lane0", "lane1"]


@pytest.mark.parametrize("name", [*TRAINED, "sparse", "whole", "short"])
def test_two_processes_learn_the_adapter_of_one(made: Path, one: object, two: object, name: str) -> None:
    same(made / "two" / name, made / "one" / name)
    ours, alone = ((made / n / name / "metrics.jsonl").read_text().splitlines() for n in ("two", "one"))
    assert [json.loads(line)["tokens"] for line in ours] == [json.loads(line)["tokens"] for line in alone]
    for line, expected in zip(ours, alone, strict=True):
        assert json.loads(line)["loss"] == pytest.approx(json.loads(expected)["loss"], rel=1e-4)


def test_what_is_held_out_is_read_by_both(one: dict[str, dict], two: dict[str, dict]) -> None:
    assert two["held_out"]["step"] == one["held_out"]["step"]
    assert two["held_out"]["loss"] == pytest.approx(one["held_out"]["loss"], rel=1e-5)


def test_a_training_of_two_that_was_stopped_goes_on_to_the_same_bytes(made: Path, two: object) -> None:
    names = ("adapter_model.safetensors", "adapter_config.json")
    for name in names:
        assert (made / "two/stopped" / name).read_bytes() == (made / "two/whole" / name).read_bytes()
    steps = [json.loads(line)["step"] for line in (made / "two/stopped/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))


def test_memory_that_one_process_lacks_is_saved_by_both(made: Path, two: dict[str, object]) -> None:
    assert isinstance(two["short"], int) and two["short"] < 4096
    lines = [json.loads(line) for line in (made / "two/short/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["part_tokens"] == two["short"]


def test_a_killed_process_ends_the_launch_and_a_later_one_goes_on(
    made: Path, killed: subprocess.CompletedProcess[str], two: object
) -> None:
    assert killed.returncode != 0
    own = (made / "two/killed/adapter_model.safetensors").read_bytes()
    assert own == (made / "two/whole/adapter_model.safetensors").read_bytes()


def test_one_process_goes_on_with_what_two_began(
    made: Path, killed: subprocess.CompletedProcess[str], two: object
) -> None:
    assert len((made / "left/metrics.jsonl").read_text().splitlines()) < 12
    assert (made / "left/checkpoint.safetensors").exists()
    worker.go_on(worker.backbone(made / "llama"), made / "left")
    same(made / "left", made / "two/whole")


def test_a_process_waits_for_as_long_as_the_first_one_may_wait(two: dict[str, float]) -> None:
    assert two["patience"] > 24 * 3600  # torch gives up after half an hour, with NCCL after ten minutes.


def test_two_processes_give_the_answers_of_one_to_the_last_bit(two: dict[str, object], made: Path) -> None:
    decoder = worker.backbone(made / "llama")
    assert two["asked"] == worker.asked(decoder, made / "two/lora")


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
WITHOUT = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.parametrize("by", ["fsdp", pytest.param("deepspeed", marks=WITHOUT)])
def test_a_sharded_base_learns_the_same(made: Path, one: dict[str, list], by: str) -> None:
    config = made / "zero.json"
    config.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    given = SHARDED if by == "fsdp" else {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
    said = run("sharded", made / by, **given)
    assert said["share"] == pytest.approx([0.5, 0.5], abs=0.05)
    for name in TRAINED:
        same(made / by / name, made / "one" / name)
    same(made / by / "again", made / "one/lora")
    scores, texts = said["asked"]  # pyright: ignore[reportGeneralTypeIssues]
    np.testing.assert_allclose(scores, one["asked"][0], rtol=1e-4)
    assert texts == one["asked"][1]


def rows(made: Path) -> list[str]:
    """What both commands are given."""
    from tests.integration.test_pipeline import make_experiment

    folder = worker.place(made / "task")
    if not (folder / "tiny.yaml").exists():
        make_experiment(folder, made / "llama")
    return [
        *("--model", str(made / "llama"), "--dtype", "float32", "--device", "cpu", "--language", "en"),
        *("--data-dir", str(folder / "data"), "--task", "kind", "--tasks", str(folder / "tiny.yaml")),
    ]


def test_the_commands_work_under_both_launchers(made: Path) -> None:
    from click.testing import CliRunner

    from lingraft.cli import main

    trained = ["train", *rows(made), "training.epochs=1", "training.batch_size=4", "training.max_length=64"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    ended = launch(*accelerate, *plain, "-m", "lingraft", *trained, "--out", str(made / "T"))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stderr.count("steps,") == 1
    assert json.loads((made / "T/step.json").read_text())["environment"]["processes"] == 2
    alone = CliRunner().invoke(main, [*trained, "--out", str(made / "T1")])
    assert alone.exit_code == 0, alone.output
    same(made / "T", made / "T1")
    asked = ["evaluate", *rows(made), "--adapter", str(made / "T")]
    ended = launch(*TORCHRUN, "-m", "lingraft", *asked, "--out", str(made / "E"))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("items") == 1
    alone = CliRunner().invoke(main, [*asked, "--out", str(made / "E1")])
    assert alone.exit_code == 0, alone.output
    assert (made / "E/predictions.jsonl").read_bytes() == (made / "E1/predictions.jsonl").read_bytes()
    assert sorted(p.name for p in made.glob(".T*")) == sorted(p.name for p in made.glob(".T*.lock"))


def test_a_mistake_is_said_once(made: Path) -> None:
    out = worker.place(made / "there")
    ended = launch(*TORCHRUN, "-m", "lingraft", "train", *rows(made), "--out", str(out))
    assert ended.returncode != 0
    assert ended.stderr.count("error: ") == 1 and "the output exists already" in ended.stderr
