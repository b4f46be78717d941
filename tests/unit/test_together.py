"""Adapters that are trained together end as they do one by one, but for rounding, and one's failure is its own."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft.adapter import Adapter
from lingraft.attaching import peft_config
from lingraft.backbones import Backbone
from lingraft.batching import answer_sequences, text_sequences
from lingraft.causal import NEXT_TOKENS
from lingraft.checkpoints import CHECKPOINT, METRICS
from lingraft.config import AdapterConfig, BackboneConfig, SpeedConfig, TrainingConfig
from lingraft.encoding import labelled_sequences, masked_sequences
from lingraft.errors import LingraftError, UserError
from lingraft.heads import Head
from lingraft.lanes import lane_name, parameters_of, random_layers, side_by_side
from lingraft.layouts.common import CONFIG, SIDECAR
from lingraft.locating import locate
from lingraft.stepping import _mean_losses
from lingraft.structures import fresh
from lingraft.tasks.items import Example
from lingraft.training import Job, train, train_together, why_apart
from lingraft.transduction import answer_sequences as pairs
from lingraft.transduction import span_corruption_sequences
from tests.conftest import save_tiny_model

ADAPTERS = {
    "lora": AdapterConfig(rank=3, dropout=0.2),
    "ia3": AdapterConfig(family="ia3"),
    "bottleneck": AdapterConfig(family="bottleneck", reduction=4, positions="houlsby"),
    "madx": AdapterConfig(family="bottleneck", reduction=4, positions="madx"),
}
WORDS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg"]
LABELS, CHOICE = Head("classification", 2), Head("multiple_choice")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def loaded(architecture: str, **speed: Any) -> Backbone:
        folder = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture)
        config = BackboneConfig(model=str(folder), dtype="float32", device="cpu")
        return Backbone(locate(config), SpeedConfig(**speed))

    return loaded


def examples(count: int, shift: int = 0) -> list[Example]:
    words = [WORDS[(n + shift) % len(WORDS)] for n in range(count)]
    return [
        Example(str(n), f"Text: {w}\nTopic:", (" yes", " no"), (n + shift) % 2, parts=(w,)) for n, w in enumerate(words)
    ]


def texts(backbone: Backbone, count: int, shift: int = 0) -> list[list[int]]:
    # Of one letter alone all keys would be alike, and their gradients nothing but rounding.
    return [
        backbone.encode(" ".join(WORDS[(3 * n * k + shift) % len(WORDS)] for k in range(2 + n))) for n in range(count)
    ]


def adapter_of(backbone: Backbone, name: str) -> AdapterConfig:
    """What is dropped out of an encoder-decoder is drawn for all texts at once."""
    config = ADAPTERS[name]
    return (
        config if backbone.kind != "encoder-decoder" or name != "lora" else config.model_copy(update={"dropout": 0.0})
    )


def choices(count: int, shift: int) -> list[Example]:
    """Questions with different numbers of options: an item is several rows."""
    options = [tuple(WORDS[: 2 + (n + shift) % 3]) for n in range(count)]
    return [Example(str(n), "", gold=n % 2, parts=("which",), options=some) for n, some in enumerate(options)]


def sequences(backbone: Backbone, kind: str, count: int, shift: int = 0) -> list[Any]:
    made = {
        "answers": lambda: answer_sequences(backbone, examples(count, shift), 128),
        "text": lambda: text_sequences(texts(backbone, count, shift)),
        "labels": lambda: labelled_sequences(backbone, examples(count, shift), LABELS, 64).sequences,
        "choices": lambda: labelled_sequences(backbone, choices(count, shift), CHOICE, 64).sequences,
        "masked": lambda: masked_sequences(backbone, texts(backbone, count, shift)),
        "pairs": lambda: pairs(backbone, examples(count, shift), 64, 16).sequences,
        "spans": lambda: span_corruption_sequences(backbone, texts(backbone, count, shift)),
    }
    return made[kind]()


def folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


VALUES = TrainingConfig(learning_rate=0.002, epochs=2, batch_size=2, clip=1e6)


def jobs_of(backbone: Backbone, kind: str, adapter: AdapterConfig, out: Path) -> list[Job]:
    """Three trainings that differ in everything in which they may."""
    head = {"labels": LABELS, "choices": CHOICE}.get(kind)
    return [
        Job(sequences(backbone, kind, 5), folder(out / "0"), adapter, VALUES, head, seed=0),
        Job(
            sequences(backbone, kind, 7, 3),
            folder(out / "1"),
            adapter,
            VALUES.model_copy(update={"batch_size": 3, "clip": 1e-3, "schedule": "linear", "weight_decay": 0.1}),
            head,
            seed=1,
        ),
        Job(
            sequences(backbone, kind, 3, 5),
            folder(out / "2"),
            adapter,
            VALUES.model_copy(update={"epochs": 5, "held_out": 0.3, "evaluate_every": 2, "loss_positions": 0.5}),
            head,
            seed=2,
        ),
    ]


def alone(backbone: Backbone, job: Job, **options: Any) -> dict[str, Any]:
    return train(
        backbone,
        job.sequences,
        job.out,
        adapter=job.adapter,
        training=job.training,
        head=job.head,
        seed=job.seed,
        start_from=job.start_from,
        provenance=dict(job.provenance),
        progress=job.progress,
        **options,
    )


def elsewhere(jobs: Sequence[Job], out: Path) -> list[Job]:
    return [replace(job, out=folder(out / job.out.name)) for job in jobs]


def assert_alike(ours: Path, theirs: Path, noise: str = "nothing") -> None:
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    for name in (CONFIG, SIDECAR):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    a, b = (Adapter.load(path) for path in (ours, theirs))
    found = {n: np.array(t) for n, t in a.tensors()} | {n: r() for n, r in a.others.items()}
    wanted = {n: np.array(t) for n, t in b.tensors()} | {n: r() for n, r in b.others.items()}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.endswith(noise):
            continue
        # Adam divides by the gradients' own size, however small: what is rounding in those is more here.
        assert np.linalg.norm(found[name] - tensor) <= 1e-3 * np.linalg.norm(tensor), name
    logs = [[json.loads(line) for line in (path / METRICS).read_text().splitlines()] for path in (ours, theirs)]
    assert len(logs[0]) == len(logs[1])
    for mine, other in zip(*logs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-7)


CASES = [
    *(("llama", kind, name) for kind in ("answers", "text") for name in ("lora", "ia3", "bottleneck")),
    ("gemma3_text", "answers", "lora"),
    ("gemma3_text", "text", "bottleneck"),
    *(("bert", kind, name) for kind in ("labels", "masked") for name in ("lora", "ia3", "bottleneck", "madx")),
    ("bert", "choices", "lora"),
    ("roberta", "labels", "lora"),
    *(("t5", kind, name) for kind in ("pairs", "spans") for name in ("lora", "ia3", "bottleneck")),
]


@pytest.mark.parametrize(("architecture", "kind", "name"), CASES)
def test_together_is_one_by_one(load: Any, tmp_path: Path, architecture: str, kind: str, name: str) -> None:
    backbone = load(architecture)
    jobs = jobs_of(backbone, kind, adapter_of(backbone, name), tmp_path / "together")
    outcomes = train_together(backbone, jobs)
    for job, apart, outcome in zip(jobs, elsewhere(jobs, tmp_path / "alone"), outcomes, strict=True):
        summary = alone(backbone, apart)
        assert isinstance(outcome, dict)
        assert outcome.keys() == summary.keys()
        assert {k: outcome[k] for k in ("steps", "tokens")} == {k: summary[k] for k in ("steps", "tokens")}
        # What all options have in common makes no difference between them: its gradient is rounding alone.
        assert_alike(job.out, apart.out, noise="classifier.bias" if kind == "choices" else "nothing")
    clipped = [json.loads(line)["gradient_norm"] > 1e-3 for line in (jobs[1].out / METRICS).read_text().splitlines()]
    assert any(clipped)  # Else nothing of clipping would have been seen.


@settings(max_examples=8, deadline=None)
@given(st.data())
@pytest.mark.parametrize("name", ["lora", "ia3", "bottleneck"])
def test_gradients_are_those_of_each_alone(tiny: Backbone, name: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    counts = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    batches = [
        text_sequences([rng.integers(3, 200, size=rng.integers(2, 120)).tolist() for _ in range(n)]) for n in counts
    ]
    config = ADAPTERS[name]
    made, like = fresh(tiny, config, 0)
    torch.manual_seed(sum(counts))
    tensors = [{n: torch.randn_like(t) * 0.3 + t for n, t in like.items()} for _ in counts]
    drawn = [NEXT_TOKENS.draw(tiny, batch, 0.7, number) for number, batch in enumerate(batches)]
    with side_by_side(tiny, made, tensors, None) as model:
        model.train()
        lanes = [(lane_name(n), mine) for n, mine in enumerate(drawn)]
        losses = _mean_losses(tiny, tiny.model, NEXT_TOKENS, lanes, torch.Tensor.backward)
        found = [{n: p.grad for n, p in parameters_of(model, lane).items()} for lane in range(len(counts))]
    for number, mine in enumerate(drawn):
        with tiny.attached(peft_config(made), tensors[number]) as model:
            model.train()
            loss = _mean_losses(tiny, tiny.model, NEXT_TOKENS, [("", mine)], torch.Tensor.backward)
            wanted = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert float(losses[number]) == pytest.approx(float(loss[0]), rel=1e-5)
        assert list(found[number]) == list(wanted)
        # Of a text of one token no attention depends on its keys: their gradient is rounding of the others', and nothing else.
        rounding = 1e-5 * torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
        for key, gradient in wanted.items():
            assert torch.dist(found[number][key], gradient) <= 1e-4 * gradient.norm() + rounding, key


@pytest.mark.parametrize("speed", [{"gradient_checkpointing": True}, {"packing": True}, {"part_tokens": 16}], ids=str)
def test_what_else_changes_speed_changes_nothing_here(load: Any, tmp_path: Path, speed: dict[str, Any]) -> None:
    backbone = load("llama", **speed)
    jobs = jobs_of(backbone, "answers", ADAPTERS["lora"], tmp_path / "together")
    train_together(backbone, jobs)
    for job, apart in zip(jobs, elsewhere(jobs, tmp_path / "alone"), strict=True):
        alone(backbone, apart)
        assert_alike(job.out, apart.out)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["lora", "bottleneck"])
def test_a_group_that_was_killed_goes_on_together_or_alone(load: Any, tmp_path: Path, name: str) -> None:
    backbone = load("llama")
    whole = jobs_of(backbone, "answers", ADAPTERS[name], tmp_path / "whole")
    outcomes = train_together(backbone, whole)
    steps = [outcome["steps"] for outcome in outcomes]  # pyright: ignore[reportArgumentType, reportCallIssue]
    for lane, total in enumerate(steps):
        for at in range(1, total + 1):

            def stop(done: int, total: int, loss: float, at: int = at) -> None:
                if done == at:
                    raise Stop

            jobs = elsewhere(whole, tmp_path / f"{lane}-{at}")
            jobs[lane] = replace(jobs[lane], progress=stop)
            with pytest.raises(Stop):
                train_together(backbone, jobs, checkpoint_seconds=0.0)
            jobs[lane] = replace(jobs[lane], progress=None)
            if at % 2:
                assert all(isinstance(outcome, dict) for outcome in train_together(backbone, jobs))
            else:
                for job in jobs:
                    alone(backbone, job)
            for job, wanted in zip(jobs, whole, strict=True):
                assert_alike(job.out, wanted.out)


def test_a_training_whose_loss_is_no_number_fails_alone(load: Any, tmp_path: Path) -> None:
    backbone = load("llama")
    jobs = jobs_of(backbone, "answers", ADAPTERS["lora"], tmp_path / "together")
    mad = jobs[1].training.model_copy(update={"learning_rate": 1e25, "clip": 1e30, "warmup": 0, "weight_decay": 0})
    jobs[1] = replace(jobs[1], training=mad)
    outcomes = train_together(backbone, jobs)
    with pytest.raises(LingraftError, match="the loss became") as alone_error:
        alone(backbone, *elsewhere(jobs[1:2], tmp_path / "alone"))
    assert isinstance(outcomes[1], LingraftError)
    assert str(outcomes[1]).replace("inf", "nan") == str(alone_error.value).replace("inf", "nan")
    assert not (jobs[1].out / "adapter_model.safetensors").exists()
    for n in (0, 2):
        (apart,) = elsewhere(jobs[n : n + 1], tmp_path / "alone")
        alone(backbone, apart)
        assert_alike(jobs[n].out, apart.out)


def test_a_start_that_does_not_fit_fails_alone(load: Any, tmp_path: Path) -> None:
    backbone = load("llama")
    jobs = jobs_of(backbone, "answers", ADAPTERS["lora"], tmp_path)
    other = folder(tmp_path / "other")
    train(backbone, jobs[0].sequences, other, adapter=AdapterConfig(rank=2), training=VALUES)
    jobs[0] = replace(jobs[0], start_from=other)
    jobs[2] = replace(jobs[2], sequences=jobs[2].sequences[:1])  # Nothing of which could be held out.
    outcomes = train_together(backbone, jobs)
    assert "another structure" in str(outcomes[0]) and "held out" in str(outcomes[2])
    assert isinstance(outcomes[1], dict) and outcomes[1]["steps"] > 0
    assert not (jobs[1].out / CHECKPOINT).exists()


def test_the_base_is_the_same_before_and_after(load: Any, tmp_path: Path) -> None:
    backbone = load("bert")
    before = {n: t.clone() for n, t in backbone.model.state_dict().items()}
    layers = [type(m) for m in backbone.headed(LABELS).model.modules()]
    train_together(backbone, jobs_of(backbone, "labels", ADAPTERS["bottleneck"], tmp_path))
    assert [type(m) for m in backbone.headed(LABELS).model.modules()] == layers
    assert not any(p.requires_grad for p in backbone.model.parameters())
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not backbone.rows.lanes


def test_what_cannot_be_trained_together_is_said(load: Any, tmp_path: Path) -> None:
    backbone, encoder = load("llama"), load("bert")
    lora = Job(sequences(backbone, "text", 2), tmp_path, ADAPTERS["lora"])
    assert why_apart(backbone, lora, replace(lora, training=VALUES, seed=3)) is None
    assert "shapes" in str(why_apart(backbone, lora, replace(lora, adapter=AdapterConfig(rank=2))))
    for adapter in (
        AdapterConfig(family="prefix", tokens=2),
        AdapterConfig(family="sparse", entries=5),
        AdapterConfig(family="bottleneck", positions="madx", invertible=True),
    ):
        one = replace(lora, adapter=adapter)
        assert "alone" in str(why_apart(backbone, one, one))
        with pytest.raises(UserError, match="cannot be trained together"):
            train_together(backbone, [one, one])
    labels = Job(sequences(encoder, "labels", 2), tmp_path, ADAPTERS["ia3"])
    masked = replace(labels, sequences=sequences(encoder, "masked", 2))
    assert "sequences" in str(why_apart(encoder, labels, masked))
    assert "heads" in str(why_apart(encoder, labels, replace(labels, head=Head("classification", 3))))
    writer = load("t5")
    pair = Job(sequences(writer, "pairs", 2), tmp_path, ADAPTERS["lora"])
    assert "dropped out" in str(why_apart(writer, pair, pair))


def test_a_base_that_drops_out_is_trained_on_one_by_one(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "bert", "bert", hidden_dropout_prob=0.1)
    backbone = Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")))
    job = Job(sequences(backbone, "masked", 2), tmp_path, ADAPTERS["ia3"])
    assert "drops out" in str(why_apart(backbone, job, job))


def test_noise_of_a_router_is_drawn_for_all_rows_too(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "llama", "llama", router_jitter_noise=0.01)
    backbone = Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")))
    assert random_layers(backbone.model) == "router_jitter_noise"
