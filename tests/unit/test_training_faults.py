"""Faults of a training: a loss that is no number, memory that does not suffice, damaged checkpoints, a stop at any step."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft import checkpoints
from lingraft.adapter import Adapter
from lingraft.backbones import Backbone
from lingraft.batching import answer_sequences, fewer_tokens, micro_batches, passes, text_sequences
from lingraft.checkpoints import CHECKPOINT, METRICS, DamagedCheckpoint, TrainingWarning, save
from lingraft.config import AdapterConfig, BackboneConfig, SpeedConfig, TrainingConfig
from lingraft.encoding import labelled_sequences, masked_sequences
from lingraft.errors import LingraftError
from lingraft.evaluation import Asking, ask
from lingraft.heads import Head
from lingraft.locating import locate
from lingraft.memory import by_halves, out_of_memory
from lingraft.tasks.items import Example
from lingraft.tensors import write_all
from lingraft.training import train
from lingraft.transduction import answer_sequences as pair_sequences
from lingraft.transduction import prefix_lm_sequences, span_corruption_sequences
from tests.conftest import save_tiny_model

SMALL = AdapterConfig(rank=2, dropout=0.1)
WORDS = ["plum", "the ferry is late", "nine grey geese", "ok", "she waters the garden at dusk"]
EXAMPLES = [Example(str(n), f"Text: {w}\nTopic:", (" yes", " no"), n % 2, parts=(w,)) for n, w in enumerate(WORDS)]
NEVER = 1e9
HEAD = Head("classification", 2)
POISON = 7
"""A token that no byte of the examples is."""


def place(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


class Stop(Exception):
    pass


def stopping(at: int) -> Callable[[int, int, float], None]:
    def stop(done: int, total: int, loss: float) -> None:
        if done == at:
            raise Stop

    return stop


# A loss that is no number


TEXTS = [[1, 20, 21, 22, 23], [1, 30, 31], [1, 40, POISON, 41], [1, 50, 51, 52], [1, 60, 61, 62, 63, 64]]
PAIRS = TrainingConfig(batch_size=2, epochs=2, group_by_length=False)


@pytest.fixture
def poisoned(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """A base that has no states for one text."""
    usual = tiny.hidden

    def hidden(ids: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        states = usual(ids, *args, **given)
        return states * torch.where((ids == POISON).any(dim=1), torch.nan, 1.0)[:, None, None]

    monkeypatch.setattr(tiny, "hidden", hidden)
    return tiny


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_is_no_number_leaves_the_last_good_step(
    poisoned: Backbone, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"adapter": SMALL, "training": PAIRS, "seed": seed, "checkpoint_seconds": NEVER}
    sequences = text_sequences(TEXTS)
    for _ in range(2):  # What stops at a step stops there again.
        with pytest.raises(LingraftError, match="loss became nan at step") as caught:
            train(poisoned, sequences, place(tmp_path / "bad"), **options)
        done = len(logged(tmp_path / "bad"))
        assert f"at step {done + 1} of 6" in caught.value.what
        assert f"2 '{poisoned.decode(TEXTS[2])}'" in caught.value.what
        assert not (tmp_path / "bad/adapter_model.safetensors").exists()
        assert (tmp_path / "bad" / CHECKPOINT).exists() == bool(done)
        if done:
            assert f"step {done} is kept" in (caught.value.remedy or "")
            tensors, notes = checkpoints.read(tmp_path / "bad" / CHECKPOINT)
            assert int(notes["step"]) == done and checkpoints.all_finite(tensors)
    # Mended, it goes on to what it would have been.
    monkeypatch.undo()
    train(poisoned, sequences, tmp_path / "bad", **options)
    train(poisoned, sequences, place(tmp_path / "good"), **options)
    assert weights(tmp_path / "bad") == weights(tmp_path / "good")


def test_parameters_that_are_no_numbers_reach_no_checkpoint(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    assert save(tmp_path, {"p": parameter}, optimizer, 1, 0.0, 0)
    parameter.data[0] = torch.inf
    assert not save(tmp_path, {"p": parameter}, optimizer, 2, 0.0, 0)
    assert checkpoints.read(tmp_path / CHECKPOINT)[1]["step"] == "1"


# Memory


def scarce(backbone: Backbone, monkeypatch: pytest.MonkeyPatch, tokens: int, error: Exception) -> list[int]:
    """Has a base fail for more tokens at once, and gives the sizes that it was given."""
    usual, seen = backbone.hidden, []

    def hidden(ids: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        seen.append(ids.numel())
        if ids.numel() > tokens:
            raise error
        return usual(ids, *args, **given)

    monkeypatch.setattr(backbone, "hidden", hidden)
    return seen


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to …"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("held_out", [0, 0.4])
def test_where_memory_does_not_suffice_the_step_is_done_in_smaller_parts(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, held_out: float
) -> None:
    config = TrainingConfig(batch_size=5, epochs=4, learning_rate=0.01, held_out=held_out)
    sequences = answer_sequences(tiny, EXAMPLES, 128)
    monkeypatch.setattr(tiny, "speed", SpeedConfig(part_tokens=64))
    train(tiny, sequences, place(tmp_path / "small"), adapter=SMALL, training=config)
    monkeypatch.setattr(tiny, "speed", SpeedConfig())
    seen = scarce(tiny, monkeypatch, 64, error)
    with pytest.warns(TrainingWarning, match="memory did not suffice for step 1 of") as said:
        summary = train(tiny, sequences, place(tmp_path / "short"), adapter=SMALL, training=config)
    assert len(said) == 1
    assert max(seen) > 64 and summary["part_tokens"] <= 64
    assert all(note["part_tokens"] == summary["part_tokens"] for note in logged(tmp_path / "short"))
    ours, theirs = (dict(Adapter.load(tmp_path / name).tensors()) for name in ("short", "small"))
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-5, atol=1e-6)
    assert logged(tmp_path / "short")[-1]["tokens"] == logged(tmp_path / "small")[-1]["tokens"]


def test_a_training_goes_on_with_the_parts_that_memory_sufficed_for(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarce(tiny, monkeypatch, 64, FULL[0])
    options: dict[str, Any] = {"adapter": SMALL, "training": TrainingConfig(batch_size=4), "checkpoint_seconds": 0.0}
    sequences = answer_sequences(tiny, EXAMPLES, 128)
    with pytest.warns(TrainingWarning):
        train(tiny, sequences, place(tmp_path / "whole"), **options)
    with pytest.warns(TrainingWarning), pytest.raises(Stop):
        train(tiny, sequences, place(tmp_path / "parts"), progress=stopping(3), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        train(tiny, sequences, tmp_path / "parts", **options)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_the_first_phase_of_a_sparse_difference_is_done_in_smaller_parts(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = AdapterConfig(family="sparse", entries=300, select="gradient")
    options: dict[str, Any] = {"adapter": adapter, "training": TrainingConfig(batch_size=5, epochs=2, weight_decay=0)}
    sequences = answer_sequences(tiny, EXAMPLES, 128)
    monkeypatch.setattr(tiny, "speed", SpeedConfig(part_tokens=64))
    train(tiny, sequences, place(tmp_path / "small"), **options)
    monkeypatch.setattr(tiny, "speed", SpeedConfig())
    scarce(tiny, monkeypatch, 64, FULL[0])
    with pytest.warns(TrainingWarning, match="step 1 of 2 of the first phase"):
        train(tiny, sequences, place(tmp_path / "short"), **options)
    assert weights(tmp_path / "short") == weights(tmp_path / "small")
    with pytest.warns(TrainingWarning), pytest.raises(Stop):
        train(tiny, sequences, place(tmp_path / "parts"), progress=stopping(2), checkpoint_seconds=0.0, **options)
    assert checkpoints.read(tmp_path / "parts/first" / CHECKPOINT)[1]["part_tokens"] == "64"


def test_a_text_for_which_there_is_no_room_is_said(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarce(tiny, monkeypatch, 10, FULL[0])
    with pytest.warns(TrainingWarning), pytest.raises(LingraftError, match="a single text of 48 tokens") as caught:
        train(tiny, answer_sequences(tiny, EXAMPLES, 128), tmp_path, adapter=SMALL)
    assert "max_length" in (caught.value.remedy or "")


def test_other_errors_are_no_want_of_memory(tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scarce(tiny, monkeypatch, 10, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        train(tiny, answer_sequences(tiny, EXAMPLES, 128), tmp_path, adapter=SMALL)
    assert not out_of_memory(ValueError("out of memory")) and all(map(out_of_memory, FULL))


@given(st.integers(1, 40), st.integers(1, 12))
def test_halves_are_computed_down_to_what_there_is_room_for(count: int, room: int) -> None:
    def compute(items: Any) -> dict[int, int]:
        if len(items) > room:
            raise MemoryError
        return {item: item * item for item in items}

    assert by_halves(compute, list(range(count))) == {n: n * n for n in range(count)}
    with pytest.raises(LingraftError, match="single item"):
        by_halves(lambda items: (_ for _ in ()).throw(MemoryError), [1])


@pytest.mark.parametrize("scoring", ["sequence", "gold"])
def test_an_evaluation_is_read_in_halves(tiny: Backbone, monkeypatch: pytest.MonkeyPatch, scoring: str) -> None:
    monkeypatch.setattr("lingraft.caching.keeps_keys", lambda backbone: False)
    asking = Asking(scoring=scoring)
    whole = ask(tiny, None, EXAMPLES, asking)
    seen = scarce(tiny, monkeypatch, 100, FULL[0])
    halves = ask(tiny, None, EXAMPLES, asking)
    assert max(seen) > 100
    for one, other in zip(whole, halves, strict=True):
        said = [getattr(x, "scores", None) or [x.gold_log_likelihood] for x in (one, other)]  # pyright: ignore[reportAttributeAccessIssue]
        np.testing.assert_allclose(*said, rtol=1e-5)


def test_kept_beginnings_are_read_in_halves_or_not_at_all(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "An ode to the long and common beginning. " * 3
    alike = [replace(e, prompt=shown + e.prompt) for e in EXAMPLES]
    usual, most = tiny.model.base_model.forward, [10**6]
    sizes: list[int] = []

    def forward(*args: Any, **given: Any) -> Any:
        sizes.append(given["input_ids"].numel())
        if sizes[-1] > most[0]:
            raise FULL[0]
        return usual(*args, **given)

    monkeypatch.setattr(tiny.model.base_model, "forward", forward)
    whole = ask(tiny, None, alike, Asking())
    most[0] = max(sizes) - 1
    sizes.clear()
    for one, other in zip(whole, ask(tiny, None, alike, Asking()), strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4)  # pyright: ignore[reportAttributeAccessIssue]
    assert max(sizes) > most[0]
    most[0] = 20
    with pytest.raises(LingraftError, match="not enough memory for a single item"):
        ask(tiny, None, alike, Asking())


def test_texts_are_written_in_halves(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = Asking(scoring="generation", new_tokens=3)
    whole = ask(tiny, None, EXAMPLES, asking)
    usual, sizes = tiny.model.forward, []

    def forward(*args: Any, **given: Any) -> Any:
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > 2:
            raise FULL[0]
        return usual(*args, **given)

    monkeypatch.setattr("lingraft.generation._takes", lambda backbone: {"logits_to_keep": None})
    monkeypatch.setattr(tiny.model, "forward", forward)
    assert [w.text for w in ask(tiny, None, EXAMPLES, asking)] == [w.text for w in whole]  # pyright: ignore[reportAttributeAccessIssue]
    assert max(sizes) > 2


# Parts of a batch, for several processes


LENGTHS = st.lists(st.integers(1, 900), max_size=30)


@given(LENGTHS, st.integers(16, 4096), st.integers(1, 5), st.booleans())
def test_every_text_is_in_one_part_of_one_process(lengths: list[int], tokens: int, world: int, level: bool) -> None:
    found = passes(lengths, tokens, world=world, level=level)
    assert len(found) == world
    assert sorted(n for own in found for one in own if one.counts for n in one.places) == list(range(len(lengths)))
    if level:
        assert len({len(own) for own in found}) == 1
        assert all(one.places for own in found for one in own)
    else:
        assert all(one.counts for own in found for one in own)
    loads = [sum(lengths[n] for one in own if one.counts for n in one.places) for own in found]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@given(LENGTHS, st.integers(16, 4096))
def test_one_process_has_the_parts_that_it_always_had(lengths: list[int], tokens: int) -> None:
    assert [list(one.places) for one in passes(lengths, tokens)[0]] == micro_batches(lengths, tokens)


@given(LENGTHS.filter(bool), st.integers(1, 3))
def test_parts_become_smaller_until_each_is_one_text(lengths: list[int], world: int) -> None:
    tokens: int | None = 4096
    while tokens is not None:
        before, fewer = passes(lengths, tokens, world=world), fewer_tokens(lengths, tokens, world=world)
        if fewer is None:
            assert all(len(one.places) == 1 for own in before for one in own)
        else:
            assert fewer < tokens
            assert sum(map(len, passes(lengths, fewer, world=world))) >= sum(map(len, before))
        tokens = fewer


# Checkpoints


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_byte_of_a_checkpoint_can_change_unseen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("one") / CHECKPOINT
    tensors, notes = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(1)}, {"step": "3"}
    checkpoints.write(path, tensors, notes)
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(whole[:at])
    else:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    try:
        found, said = checkpoints.read(path)
    except DamagedCheckpoint:
        return
    # What is left is space between the parts of the header.
    assert said == notes and all(np.array_equal(found[name], array) for name, array in tensors.items())


def truncate(folder: Path) -> None:
    path = folder / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-40])


def flip(folder: Path) -> None:
    path = folder / CHECKPOINT
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(bytes(content))


def lose_steps(folder: Path) -> None:
    (folder / METRICS).write_text("")


def spoil_best(folder: Path) -> None:
    (folder / "best.safetensors").write_bytes(b"nothing")


def of_before_hashes(folder: Path) -> None:
    tensors, notes = checkpoints.read(folder / CHECKPOINT)
    write_all(folder / CHECKPOINT, tensors, notes)


SAID: dict[Any, str] = {
    of_before_hashes: "it holds no hash: another version of lingraft wrote it",
    lose_steps: "its log is not",
}


@pytest.mark.parametrize("damage", [truncate, flip, lose_steps, spoil_best, of_before_hashes])
def test_a_training_begins_anew_where_its_checkpoint_is_damaged(
    tiny: Backbone, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    few = TrainingConfig(batch_size=2, epochs=2, held_out=0.2 if damage is spoil_best else 0, evaluate_every=1)
    options: dict[str, Any] = {"adapter": SMALL, "training": few, "checkpoint_seconds": 0.0}
    sequences = answer_sequences(tiny, EXAMPLES, 128)
    train(tiny, sequences, place(tmp_path / "whole"), **options)
    with pytest.raises(Stop):
        train(tiny, sequences, place(tmp_path / "hurt"), progress=stopping(3), **options)
    damage(tmp_path / "hurt")
    reached: list[int] = []
    with pytest.warns(TrainingWarning, match=r"renamed to damaged-0\.checkpoint") as said:
        train(tiny, sequences, tmp_path / "hurt", progress=lambda done, *_: reached.append(done), **options)
    assert len(said) == 1 and reached[0] == 1
    assert SAID.get(damage, "") in str(said[0].message)
    assert weights(tmp_path / "hurt") == weights(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "hurt").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


def test_the_first_phase_of_a_sparse_difference_is_not_gone_on_from_when_damaged(
    tiny: Backbone, tmp_path: Path
) -> None:
    adapter = AdapterConfig(family="sparse", entries=50, select="gradient")
    config = TrainingConfig(batch_size=2, epochs=1, weight_decay=0)
    options: dict[str, Any] = {"adapter": adapter, "training": config, "checkpoint_seconds": 0.0}
    sequences = answer_sequences(tiny, EXAMPLES, 128)
    train(tiny, sequences, place(tmp_path / "whole"), **options)
    for at, name in ((2, f"first/{CHECKPOINT}"), (4, "selection.safetensors")):
        out = place(tmp_path / str(at))
        with pytest.raises(Stop):
            train(tiny, sequences, out, progress=stopping(at + 1 if at == 2 else at), **options)
        (out / name).write_bytes((out / name).read_bytes()[:-8])
        with pytest.warns(TrainingWarning, match="damaged"):
            train(tiny, sequences, out, **options)
        assert weights(out) == weights(tmp_path / "whole")


# A stop in the middle of an epoch, whatever is learned


def _tiny(folder: Path, architecture: str) -> Backbone:
    made = save_tiny_model(folder / architecture, architecture)
    return Backbone(locate(BackboneConfig(model=str(made), dtype="float32", device="cpu")))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: _tiny(folder, name) for name in ("llama", "bert", "t5")}


KINDS: dict[str, tuple[str, Callable[[Backbone], list[Any]], float]] = {
    "answers": ("llama", lambda b: answer_sequences(b, EXAMPLES, 128), 1.0),
    "text": ("llama", lambda b: text_sequences([b.encode(w * 3) for w in WORDS]), 0.5),
    "labels": ("bert", lambda b: labelled_sequences(b, EXAMPLES, HEAD, 64).sequences, 1.0),
    "masked": ("bert", lambda b: masked_sequences(b, [b.encode(w) for w in WORDS * 3]), 1.0),
    "pairs": ("t5", lambda b: pair_sequences(b, EXAMPLES, 64, 16).sequences, 1.0),
    "continued": ("t5", lambda b: prefix_lm_sequences(b, [b.encode(w) for w in WORDS * 2]), 1.0),
    "corrupted": ("t5", lambda b: span_corruption_sequences(b, [b.encode(w * 2) for w in WORDS * 2]), 1.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_stopped_within_an_epoch_goes_on_to_the_same_bytes(
    bases: dict[str, Backbone], tmp_path: Path, kind: str
) -> None:
    name, made, share = KINDS[kind]
    config = TrainingConfig(batch_size=2, epochs=2, loss_positions=share)
    options: dict[str, Any] = {"adapter": SMALL, "training": config, "checkpoint_seconds": 0.0}
    sequences = made(bases[name])
    per_epoch = -(-len(sequences) // 2)
    train(bases[name], sequences, place(tmp_path / "whole"), **options)
    with pytest.raises(Stop):
        train(bases[name], sequences, place(tmp_path / "parts"), progress=stopping(per_epoch + 2), **options)
    _, notes = checkpoints.read(tmp_path / "parts" / CHECKPOINT)
    assert int(notes["step"]) % per_epoch
    train(bases[name], sequences, tmp_path / "parts", **options)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
