"""Training: the loss is on the answer, initial weights are a function, and a resumed run gives the same bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft.adapter import Adapter
from lingraft.backbones import Backbone
from lingraft.batching import (
    TokenSequence,
    answer_sequences,
    batches,
    loss_positions,
    micro_batches,
    steps_of,
    text_sequences,
)
from lingraft.checkpoints import METRICS, resume, save
from lingraft.config import AdapterConfig, TrainingConfig
from lingraft.errors import AdapterError, DataError, LingraftError, UserError
from lingraft.stepping import Learner, batch_loss, learning_rate
from lingraft.structures import fresh
from lingraft.tasks.items import Example
from lingraft.training import hash_tensors, train

SMALL = AdapterConfig(rank=2, dropout=0.1)
EXAMPLES = [
    Example(str(i), f"Text: {w}\nTopic:", (" yes", " no"), i % 2)
    for i, w in enumerate(["a", "bb", "ccc", "dddd", "eeeee"])
]


def tensors_of(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_the_loss_is_on_the_answer_and_the_end_only(tiny: Backbone) -> None:
    (sequence,) = answer_sequences(tiny, EXAMPLES[:1], 512)
    answer = tiny.tokenizer.decode(sequence.ids[sequence.start :])
    assert answer == " yes<eos>"
    assert tiny.tokenizer.decode(sequence.ids[: sequence.start]) == "<bos>Text: a\nTopic:"


def test_a_prompt_that_is_too_long_loses_its_beginning_never_its_answer(tiny: Backbone) -> None:
    example = Example("long", "x" * 600 + " Topic:", (" yes", " no"), 1)
    (sequence,) = answer_sequences(tiny, [example], 64)
    assert len(sequence.ids) == 64
    text = tiny.tokenizer.decode(sequence.ids)
    assert text.startswith("<bos>xxx") and text.endswith(" Topic: no<eos>")
    assert tiny.tokenizer.decode(sequence.ids[sequence.start :]) == " no<eos>"


def test_the_batch_loss_is_the_models_own_loss(tiny: Backbone) -> None:
    chosen = answer_sequences(tiny, EXAMPLES, 512)
    expected, count = 0.0, 0
    for sequence in chosen:
        ids = torch.tensor([sequence.ids])
        with torch.no_grad():
            logits = tiny.model(input_ids=ids).logits[0]
        answer = slice(sequence.start - 1, len(sequence.ids) - 1)
        expected += float(torch.nn.functional.cross_entropy(logits[answer], ids[0, sequence.start :], reduction="sum"))
        count += len(sequence.ids) - sequence.start
    assert batch_loss(tiny, chosen) == pytest.approx(expected / count, rel=1e-5)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    rng = np.random.default_rng(0)
    chosen = text_sequences([rng.integers(3, 200, size=n).tolist() for n in (300, 280, 120, 30, 20, 10)])
    assert len(micro_batches([len(s.ids) for s in chosen])) > 1
    tensors = fresh(tiny, SMALL, 0)[1]
    for name in tensors:
        tensors[name] = torch.randn_like(tensors[name]) * 0.1
    modules = tiny.target_modules(SMALL.modules)

    def gradients() -> list[torch.Tensor]:
        with tiny.attached(LoraConfig(r=2, target_modules=modules), tensors) as model:
            parameters = [p for p in model.parameters() if p.requires_grad]
            batch_loss(tiny, chosen, share=0.5, seed=3, backward=lambda loss: loss.backward())
            return [p.grad.clone() for p in parameters]

    parts = gradients()
    monkeypatch.setattr("lingraft.batching.micro_batches", lambda lengths, _, packed=False: [list(range(len(lengths)))])
    for ours, whole in zip(parts, gradients(), strict=True):
        assert torch.allclose(ours, whole, rtol=1e-4, atol=1e-7)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40))
def test_micro_batches_hold_every_item_once(lengths: list[int]) -> None:
    assert sorted(i for part in micro_batches(lengths) for i in part) == list(range(len(lengths)))


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=40))
def test_no_part_is_larger_than_memory_is_meant_for_unless_it_is_one_text(lengths: list[int]) -> None:
    for part in micro_batches(lengths):
        assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= 4096


@given(st.lists(st.integers(2, 50), min_size=1, max_size=20), st.floats(0.01, 1), st.integers(0, 99))
def test_drawn_positions_are_a_subset_and_never_none(lengths: list[int], share: float, seed: int) -> None:
    chosen = [TokenSequence(tuple(range(n)), 1) for n in lengths]
    drawn = loss_positions(chosen, share, seed)
    assert sum(map(len, drawn)) > 0
    for sequence, where in zip(chosen, drawn, strict=True):
        assert set(where.tolist()) <= set(range(len(sequence.ids) - 1))


@settings(max_examples=50)
@given(st.integers(1, 60), st.integers(1, 9), st.booleans(), st.integers(0, 5))
def test_an_epoch_holds_every_example_once(count: int, size: int, grouped: bool, epoch: int) -> None:
    config = TrainingConfig(batch_size=size, group_by_length=grouped)
    made = batches([(7 * i) % 13 for i in range(count)], config, 0, epoch)
    assert sorted(i for batch in made for i in batch) == list(range(count))
    assert len(made) == -(-count // size)
    assert steps_of(count, config) == 3 * len(made)


def test_without_grouping_two_languages_are_read_in_the_same_order() -> None:
    config = TrainingConfig(batch_size=4, group_by_length=False)
    assert batches(list(range(10)), config, 1, 0) == batches(list(range(10))[::-1], config, 1, 0)


def test_the_schedule_warms_up_and_comes_down() -> None:
    config = TrainingConfig(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[99] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_initial_weights_are_a_function_of_base_configuration_and_seed(tiny: Backbone) -> None:
    first = hash_tensors(fresh(tiny, SMALL, 0)[1])
    torch.manual_seed(99)
    assert hash_tensors(fresh(tiny, SMALL, 0)[1]) == first
    assert hash_tensors(fresh(tiny, SMALL, 1)[1]) != first
    assert hash_tensors(fresh(tiny, AdapterConfig(rank=3), 0)[1]) != first
    assert hash_tensors(fresh(tiny, AdapterConfig(rank=2, modules="q_proj"), 0)[1]) != first


def test_an_untrained_adapter_is_its_initial_weights_and_does_nothing(tiny: Backbone, tmp_path: Path) -> None:
    train(tiny, text_sequences([[1, 2]]), tmp_path, adapter=SMALL, training=TrainingConfig(epochs=0), seed=4)
    adapter = Adapter.load(tmp_path)
    assert all(not np.any(adapter.site(m).tensors["B"]) for m in adapter.modules)
    assert adapter.sidecar["init_sha256"] == hash_tensors(fresh(tiny, SMALL, 4)[1])


def test_training_learns(tiny: Backbone, tmp_path: Path) -> None:
    config = TrainingConfig(learning_rate=0.02, epochs=60, batch_size=5, clip=10.0)
    sequences = answer_sequences(tiny, EXAMPLES, 128)
    before = batch_loss(tiny, sequences)
    summary = train(tiny, sequences, tmp_path, adapter=AdapterConfig(rank=8, dropout=0), training=config)
    with tiny.with_adapter(Adapter.load(tmp_path)):
        after = batch_loss(tiny, sequences)
    assert after < before / 2
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 61))
    assert summary["steps"] == 60 and log[-1]["tokens"] == summary["tokens"] == 60 * sum(len(s.ids) for s in sequences)
    assert summary["environment"]["torch"] == torch.__version__


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(tiny: Backbone, tmp_path: Path) -> None:
    sequences = answer_sequences(tiny, EXAMPLES, 128)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(hash(name) % 1000)
        train(tiny, sequences, folder(tmp_path / name), adapter=SMALL, training=TrainingConfig(batch_size=2), seed=seed)
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "b") != tensors_of(tmp_path / "c")
    assert (tmp_path / "a/adapter_config.json").read_bytes() == (tmp_path / "b/adapter_config.json").read_bytes()


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_training_that_was_stopped_goes_on_to_the_same_bytes(tiny: Backbone, tmp_path: Path, at: int) -> None:
    sequences = answer_sequences(tiny, EXAMPLES, 128)
    options = {"adapter": SMALL, "training": TrainingConfig(batch_size=2, epochs=3), "checkpoint_seconds": 0.0}
    train(tiny, sequences, folder(tmp_path / "whole"), **options)

    def stop(done: int, total: int, loss: float) -> None:
        if done == at:
            raise Stop

    with pytest.raises(Stop):
        train(tiny, sequences, folder(tmp_path / "parts"), progress=stop, **options)
    reached: list[int] = []
    train(tiny, sequences, tmp_path / "parts", progress=lambda done, total, loss: reached.append(done), **options)
    assert reached[0] == at  # the step that was stopped had no checkpoint yet; those before it are not run again
    assert tensors_of(tmp_path / "parts") == tensors_of(tmp_path / "whole")
    assert not list((tmp_path / "parts").glob("*checkpoint*"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 10))


def test_a_checkpoint_holds_parameters_that_no_gradient_has_reached(tmp_path: Path) -> None:
    def made() -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
        parameters = {"used": torch.nn.Parameter(torch.ones(2)), "late": torch.nn.Parameter(torch.ones(2))}
        return parameters, torch.optim.AdamW(parameters.values(), lr=0.1)

    def go(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad(set_to_none=True)
            sum(p.square().sum() for n, p in parameters.items() if n == "used" or step >= 3).backward()  # pyright: ignore
            optimizer.step()

    whole = made()
    go(*whole, range(6))
    stopped, again = made(), made()
    for first, last in ((0, 2), (2, 4), (4, 6)):
        go(*stopped, range(first, last))
        (tmp_path / METRICS).write_text("".join(f'{{"step": {n}}}\n' for n in range(1, last + 1)))
        save(tmp_path, *stopped, step=last, seconds=0.0, tokens=0)
        again = made()
        assert resume(tmp_path, *again)[0] == last
        stopped = again
    for name, parameter in whole[0].items():
        assert torch.equal(parameter, again[0][name])


def test_training_goes_on_from_another_adapter(tiny: Backbone, tmp_path: Path) -> None:
    sequences = answer_sequences(tiny, EXAMPLES, 128)
    train(tiny, sequences, folder(tmp_path / "first"), adapter=SMALL)
    still = TrainingConfig(epochs=0)
    train(tiny, sequences, folder(tmp_path / "same"), adapter=SMALL, training=still, start_from=tmp_path / "first")
    assert tensors_of(tmp_path / "same") == tensors_of(tmp_path / "first")
    other = AdapterConfig(rank=2, modules="q_proj")
    with pytest.raises(AdapterError, match="another structure"):
        train(tiny, sequences, folder(tmp_path / "no"), adapter=other, start_from=tmp_path / "first")


def test_a_loss_that_is_not_finite_stops_with_a_remedy(tiny: Backbone, tmp_path: Path) -> None:
    config = TrainingConfig(learning_rate=1e30, clip=1e30, epochs=20, warmup=0)
    with pytest.raises(LingraftError, match="loss became") as caught:
        train(tiny, answer_sequences(tiny, EXAMPLES, 128), tmp_path, adapter=SMALL, training=config)
    assert "learning rate" in (caught.value.remedy or "")
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_gradients_that_are_not_finite_never_reach_a_checkpoint(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    sequences = [TokenSequence((1, 2, 3), 1)] * 4
    config = TrainingConfig(batch_size=1, epochs=1)
    learner = Learner({"p": parameter}, sequences, tmp_path, config, 0, checkpoint_seconds=0)
    parameter.grad = torch.full((2,), float("inf"))
    norm = float(learner.clipped())
    with pytest.raises(LingraftError, match="gradients' norm became"):
        learner.take(1.0, norm, lambda one: 0.0)
    assert torch.equal(parameter, torch.ones(2))
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_nothing_to_train_on_is_said(tiny: Backbone) -> None:
    with pytest.raises(DataError):
        answer_sequences(tiny, [], 64)
    with pytest.raises(DataError, match="too short"):
        text_sequences([])


def test_an_unknown_tracker_is_a_clear_error(tiny: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tracker"):
        train(tiny, text_sequences([[1, 5, 6]]), tmp_path, adapter=SMALL, trackers=["nonsense"])


def test_metrics_reach_accelerates_trackers(tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    logged: list[dict[str, float]] = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name: None)
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append({**values, "step": step}))
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *a, **k: [])
    train(tiny, text_sequences([[1, 5, 6, 7]]), tmp_path, adapter=SMALL, trackers=["tensorboard"])
    assert [entry["step"] for entry in logged] == [1, 2, 3]
    assert set(logged[0]) == {"loss", "gradient_norm", "learning_rate", "tokens", "step"}
