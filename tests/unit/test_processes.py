"""What a launcher asks for is done or refused; alone, nothing is exchanged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lingraft import processes
from lingraft.errors import LingraftError, UserError
from lingraft.processes import Sharding


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The second of two processes."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_alone_everything_is_what_it_was(tmp_path: Path) -> None:
    tensor = torch.arange(3.0)
    processes.start(torch.device("cpu"))
    processes.add(tensor)
    processes.spread(tensor)
    processes.barrier()
    assert tensor.tolist() == [0, 1, 2]
    assert (processes.world(), processes.rank(), processes.is_main()) == (1, 0, True)
    assert processes.shared(lambda: 5) == 5 and processes.gathered("a") == ["a"]
    assert processes.described() == {} and processes.sharding() is None and not processes.divides()
    with processes.own_folder(tmp_path) as folder:
        assert folder == tmp_path
    with pytest.raises(KeyError), processes.said_once():
        raise KeyError
    assert not torch.distributed.is_initialized()


def test_alone_all_batches_are_computed_but_those_that_are_known() -> None:
    computed: list[Any] = []
    after: list[Any] = []

    def compute(batch: Any) -> dict[int, int]:
        computed.append(batch)
        return {n: -n for n in batch}

    found = processes.computed([[1, 2], [3], [4, 5]], compute, {3: 30, 4: 40}, lambda *said: after.append(said))
    assert found == {1: -1, 2: -2, 3: 30, 4: -4, 5: -5}
    assert computed == [[1, 2], [4, 5]]
    assert after == [([3], {}), ([1, 2], {1: -1, 2: -2}), ([4, 5], {4: -4, 5: -5})]


def test_who_is_who_is_read_from_the_environment(launched: pytest.MonkeyPatch) -> None:
    assert (processes.world(), processes.rank(), processes.local_rank(), processes.is_main()) == (2, 1, 1, False)
    with processes.own_folder(Path("/nowhere")) as folder:
        assert folder.is_dir() and folder != Path("/nowhere")
    assert not folder.exists()
    with processes.made_once(lambda: pytest.fail("only the first process makes it")) as folder:
        assert folder.is_dir()


FSDP = {"ACCELERATE_USE_FSDP": "true"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        (FSDP, Sharding()),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, Sharding()),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, Sharding(reshard=False)),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, Sharding(reshard=False)),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "no_shard"}, None),
        (ZERO, None),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, None),
    ],
)
def test_how_the_base_is_held(launched: pytest.MonkeyPatch, given: dict[str, str], expected: Sharding | None) -> None:
    for name, value in given.items():
        launched.setenv(name, value)
    assert processes.sharding() == expected
    assert processes.described() == {"processes": 2, "base": "whole" if expected is None else "sharded"}


@pytest.mark.parametrize("by", ["stage", "file"])
def test_deepspeeds_third_stage_shards_the_base(launched: pytest.MonkeyPatch, tmp_path: Path, by: str) -> None:
    launched.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    if by == "stage":
        launched.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    else:
        path = tmp_path / "zero.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 9}}))
        launched.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    found = processes.sharding()
    assert found is not None and found.deepspeed is not None
    zero = found.deepspeed["zero_optimization"]
    assert zero["stage"] == 3 and (by == "stage" or zero["stage3_prefetch_bucket_size"] == 9)


REFUSED = {
    "mixed precision": {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "compilation": {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
    "Megatron": {"ACCELERATE_USE_MEGATRON_LM": "true"},
    "gradient accumulation": {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    "kept on the processor": {**FSDP, "FSDP_OFFLOAD_PARAMS": "true"},
    "activation checkpointing": {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
    "hybrid": {**FSDP, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"},
    "offload_param": {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
    "cannot be read": {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nowhere/zero.json"},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_not_be_done_is_refused(launched: pytest.MonkeyPatch, what: str) -> None:
    for name, value in REFUSED[what].items():
        launched.setenv(name, value)
    with pytest.raises(UserError, match=what):
        processes.sharding()


def test_what_accelerate_says_by_default_is_fine(launched: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"):
        launched.setenv(name, "no")
    launched.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    processes.check_launcher()


def test_more_processes_than_gpus_are_refused(launched: pytest.MonkeyPatch) -> None:
    from lingraft.backbones import device_name

    launched.setattr(torch.cuda, "is_available", lambda: True)
    launched.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 1 of this host has no GPU"):
        device_name("auto")
    launched.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_name("auto") == device_name("cuda") == "cuda:1"
    assert device_name("cpu") == "cpu" and device_name("cuda:0") == "cuda:0"


def test_processes_of_one_host_do_not_share_a_gpu(launched: pytest.MonkeyPatch) -> None:
    from lingraft.backbones import device_name

    launched.setattr(torch.cuda, "is_available", lambda: True)
    launched.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="'cuda:1'"):
        device_name("cuda:1")
    launched.setenv("LOCAL_WORLD_SIZE", "1")
    assert device_name("cuda:1") == "cuda:1"


def test_what_broke_a_connection_is_said(launched: pytest.MonkeyPatch) -> None:
    def broken(tensor: torch.Tensor) -> None:
        raise RuntimeError("duplicate GPU detected\nand much more")

    launched.setattr(torch.distributed, "all_reduce", broken)
    launched.setattr("signal.signal", lambda *given: None)
    with pytest.raises(LingraftError, match=r"has ended or cannot be reached \(duplicate GPU detected\)"):
        processes.add(torch.zeros(1))


ALONE = [
    ["tune", "x.yaml"],
    ["report", "runs/x"],
    ["store", "ls"],
    ["tasks"],
    ["run", "x.yaml", "--dry-run"],
    ["run", "x.yaml", "--export", "slurm"],
    ["quickstart", "--dry-run"],
]


@pytest.mark.parametrize("words", ALONE, ids=" ".join)
def test_a_verb_of_one_process_is_refused_once(launched: pytest.MonkeyPatch, words: list[str]) -> None:
    from click.testing import CliRunner

    from lingraft.cli import main

    launched.setattr("time.sleep", lambda seconds: None)
    launched.setattr("signal.signal", lambda *given: None)
    silent = CliRunner().invoke(main, words)
    assert (silent.exit_code, silent.output) == (2, "")
    for name in ("RANK", "LOCAL_RANK"):
        launched.setenv(name, "0")
    said = CliRunner().invoke(main, words)
    assert said.exit_code == 2 and said.output.count("error: ") == 1
    assert "for one process, and a launcher started 2" in said.output


def test_a_sharded_base_is_not_written_into(tiny: Any, launched: pytest.MonkeyPatch) -> None:
    launched.setattr(tiny, "sharded", True)
    with pytest.raises(UserError, match="not with a sharded base"):
        tiny.check_whole("a sparse difference")


@pytest.mark.parametrize("error", [KeyError("k"), LingraftError("lost")])
def test_the_others_end_silently_with_the_same_code(launched: pytest.MonkeyPatch, error: Exception) -> None:
    launched.setattr("time.sleep", lambda seconds: None)
    launched.setattr("signal.signal", lambda *given: None)
    with pytest.raises(SystemExit) as caught, processes.said_once():
        raise error
    assert caught.value.code == 1
