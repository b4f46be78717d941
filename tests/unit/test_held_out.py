"""What is held out of a training: never learned from, and the step of its least loss is what is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lingraft.backbones import Backbone
from lingraft.batching import derived_seed, text_sequences
from lingraft.config import AdapterConfig, TrainingConfig
from lingraft.errors import UserError
from lingraft.stacks import load_stack
from lingraft.stepping import batch_loss, divided
from lingraft.training import train

CONFIGS = {
    "lora": AdapterConfig(rank=2, dropout=0.3),
    "language": AdapterConfig(family="bottleneck", reduction=2, positions="madx", invertible=True),
    "sparse": AdapterConfig(family="sparse", entries=400),
    "gradient": AdapterConfig(family="sparse", entries=400, select="gradient"),
}
VALUES = TrainingConfig(
    learning_rate=0.3, epochs=4, batch_size=2, clip=10, schedule="constant", held_out=0.25, evaluate_every=2
)


def texts(backbone: Backbone) -> list[Any]:
    """Eight texts, of which those that are held out suffer from learning the others."""
    held = divided(range(8), VALUES, 0)[1]
    return text_sequences([backbone.encode(("zx" if n in held else "ab") * (6 + n)) for n in range(8)])


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix == ".safetensors"}


def held_out_loss(backbone: Backbone, held: list[Any], folder: Path) -> float:
    with backbone.with_adapter(load_stack([folder])), torch.no_grad():
        return batch_loss(backbone, held, seed=derived_seed("held out positions", 0))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_of_the_least_held_out_loss_is_kept(tiny: Backbone, tmp_path: Path, name: str) -> None:
    sequences = texts(tiny)
    summary = train(tiny, sequences, made(tmp_path / "out"), adapter=CONFIGS[name], training=VALUES)
    log = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    looked = {note["step"]: note["held_out_loss"] for note in log if "held_out_loss" in note}
    assert sorted(looked) == [2, 4, 6, 8, 10, 12]  # Of eight texts two are held out.
    least = min(looked, key=lambda step: (looked[step], step))
    assert least < 12  # Else the last step would do as well.
    assert summary["held_out"] == {"loss": looked[least], "step": least}
    _, held = divided(sequences, VALUES, 0)
    assert held_out_loss(tiny, list(held), tmp_path / "out") == pytest.approx(looked[least], rel=1e-5)
    assert not list((tmp_path / "out").rglob("*best*"))


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", CONFIGS)
def test_a_killed_training_keeps_the_same_step(tiny: Backbone, tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"adapter": CONFIGS[name], "training": VALUES, "checkpoint_seconds": 0.0}
    total = train(tiny, texts(tiny), made(tmp_path / "whole"), **options)["steps"]
    for at in range(1, total + 1):

        def stop(done: int, total: int, loss: float, at: int = at) -> None:
            if done == at:
                raise Stop

        folder = made(tmp_path / str(at))
        with pytest.raises(Stop):
            train(tiny, texts(tiny), folder, progress=stop, **options)
        train(tiny, texts(tiny), folder, **options)
        assert files(folder) == files(tmp_path / "whole")
        assert not list(folder.rglob("*best*")) and not list(folder.rglob("*checkpoint*"))


def test_a_kill_before_the_adapter_is_written_loses_nothing(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"adapter": CONFIGS["lora"], "training": VALUES, "checkpoint_seconds": 0.0}
    train(tiny, texts(tiny), made(tmp_path / "whole"), **options)

    def stop(*args: Any) -> None:
        raise Stop

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr("lingraft.training._write", stop)
        train(tiny, texts(tiny), made(tmp_path / "parts"), **options)
    train(tiny, texts(tiny), tmp_path / "parts", **options)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_what_is_held_out_is_not_learned_from(tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, read = texts(tiny), []

    def watched(backbone: Backbone, chosen: Any, **options: Any) -> float:
        if options.get("backward") is not None:
            read.extend(chosen)
        return batch_loss(backbone, chosen, **options)

    for place in ("lingraft.stepping.batch_loss", "lingraft.lottery.batch_loss"):
        monkeypatch.setattr(place, watched)
    for name, config in CONFIGS.items():
        train(tiny, sequences, made(tmp_path / name), adapter=config, training=VALUES)
    kept, held = divided(sequences, VALUES, 0)
    assert {s.ids for s in read} == {s.ids for s in kept}
    assert not {s.ids for s in read} & {s.ids for s in held} and len(held) == 2


def test_parallel_texts_are_divided_alike() -> None:
    english, swahili = [f"en {n}" for n in range(20)], [f"sw {n}" for n in range(20)]
    one, other = divided(english, VALUES, 3), divided(swahili, VALUES, 3)
    for mine, theirs in zip(one, other, strict=True):
        assert [text.split()[1] for text in mine] == [text.split()[1] for text in theirs]
    assert len(one[1]) == 5 and divided(english, VALUES, 4)[1] != one[1]
    assert divided(english, TrainingConfig(), 3) == (english, ())


def test_one_sequence_cannot_be_divided(tiny: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing can be held out"):
        train(tiny, texts(tiny)[:1], made(tmp_path / "out"), adapter=CONFIGS["lora"], training=VALUES)


def test_keys_are_those_of_before_where_nothing_is_held_out() -> None:
    assert not {"held_out", "evaluate_every"} & set(TrainingConfig().key())
    assert TrainingConfig(held_out=0.05).key()["held_out"] == 0.05
