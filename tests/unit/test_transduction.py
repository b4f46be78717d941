"""Encoder-decoders: pairs, spans left out, the model's own loss and words, and every structure on T5 and mT5."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft.adapter import Adapter
from lingraft.backbones import Backbone, peft_config
from lingraft.config import AdapterConfig, BackboneConfig, TrainingConfig
from lingraft.encoding import predict_choice as encoder_choice
from lingraft.errors import AdapterError, BackboneError, DataError, UserError
from lingraft.heads import Head
from lingraft.locating import locate
from lingraft.merging import Graft
from lingraft.stepping import batch_loss
from lingraft.structures import fresh
from lingraft.tasks.items import Example
from lingraft.training import train
from lingraft.transduction import (
    PairSequence,
    answer_sequences,
    corrupted,
    generate,
    predict_choice,
    prefix_lm_sequences,
    read,
    span_corruption_sequences,
    spans,
)
from tests.conftest import SENTINELS, save_tiny_model

STRUCTURES = {
    "lora": AdapterConfig(rank=4, dropout=0.1),
    "ia3": AdapterConfig(family="ia3"),
    "bottleneck": AdapterConfig(family="bottleneck", reduction=4),
}
TRAINING = TrainingConfig(learning_rate=0.02, epochs=14, batch_size=6, clip=5, warmup=0, schedule="constant")
CANDIDATES = (" yes", " no", " perhaps so")
ITEMS = [Example(str(n), "xyz"[n % 3] * (2 + n % 4), CANDIDATES, n % 3) for n in range(12)]


def opened(folder: Path) -> Backbone:
    return Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    return {name: opened(save_tiny_model(tmp_path_factory.mktemp(name), name)) for name in ("t5", "mt5")}


@pytest.fixture(scope="session", params=["t5", "mt5"])
def backbone(request: pytest.FixtureRequest, models: dict[str, Backbone]) -> Backbone:
    return models[request.param]


def their_loss(model: Any, pairs: list[PairSequence]) -> float:
    """transformers' own mean loss, pair by pair."""
    total, count = 0.0, 0
    for pair in pairs:
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([pair.source]), labels=torch.tensor([pair.target])).loss
        total, count = total + float(loss) * len(pair.target), count + len(pair.target)
    return total / count


# What is read and written


def test_pairs_are_the_prompt_and_the_stripped_answer(backbone: Backbone) -> None:
    pair = answer_sequences(backbone, ITEMS[:1], 100, 100).sequences[0]
    assert backbone.tokenizer.decode(pair.source) == "xx<eos>"
    assert backbone.tokenizer.decode(pair.target) == "yes<eos>"
    free = Example("1", "Write.", answer=" some words", references=("some words",))
    assert (
        backbone.tokenizer.decode(answer_sequences(backbone, [free], 99, 99).sequences[0].target) == "some words<eos>"
    )
    with pytest.raises(DataError, match="nothing to train on"):
        answer_sequences(backbone, [], 10, 10)


def test_a_long_prompt_loses_what_may_be_cut_first(backbone: Backbone) -> None:
    prompt = "Text: " + "o" * 40 + "p" * 40 + " Question?"
    example = Example("1", prompt, (" a", " b"), cuttable=(6, 86))
    text, cut = read(backbone, example, 40)
    assert cut and len(text) == 40
    assert backbone.tokenizer.decode(text[:-1]) == "Text: " + "o" * (39 - 6 - 10) + " Question?"
    with pytest.raises(DataError, match="item 1 is too long for the model even without its context"):
        read(backbone, example, 12)  # Less than the question and the frame.
    text, cut = read(backbone, Example("1", prompt, (" a", " b")), 40)
    assert cut and backbone.tokenizer.decode(text[:-1]) == prompt[-39:]
    assert read(backbone, example, 1000) == ((*backbone.encode(prompt), 2), False)


def test_what_was_cut_is_counted(backbone: Backbone) -> None:
    long = Example("1", "q" * 50, (" yes", " no"), 0)
    encoded = answer_sequences(backbone, [*ITEMS, long], 30, 30)
    assert encoded.truncated == 1
    short = answer_sequences(backbone, ITEMS, 30, 4)
    assert short.truncated == sum(len(c.strip()) + 1 > 4 for e in ITEMS for c in [e.completion])
    assert all(len(pair.target) <= 4 for pair in short.sequences)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 400), st.integers(0, 2**32))
def test_spans_are_t5s(length: int, seed: int) -> None:
    found = spans(length, np.random.default_rng(seed))
    gone = sum(stop - start for start, stop in found)
    assert gone == min(max(1, round(length * 0.15)), length - 1)
    assert len(found) == min(max(1, round(gone / 3)), length - gone)
    last = 0
    for start, stop in found:
        assert last < start < stop <= length, "what stays is at least one token before every span"
        last = stop


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(3, 200), min_size=2, max_size=150), st.integers(0, 2**40), st.integers(0, 9))
def test_a_corrupted_text_and_its_target_are_the_text(
    models: dict[str, Backbone], ids: list[int], seed: int, number: int
) -> None:
    backbone = models["t5"]
    pair = corrupted(backbone, ids, seed, number)
    assert corrupted(backbone, ids, seed, number) == pair
    sentinels = [backbone.tokenizer.convert_tokens_to_ids(f"<extra_id_{n}>") for n in range(SENTINELS)]
    assert pair.source[-1] == pair.target[-1] == 2
    parts: dict[int, list[int]] = {}
    for token in pair.target[:-1]:
        if token in sentinels:
            parts[token] = []
            last = token
        else:
            parts[last].append(token)
    assert list(parts) == sentinels[: len(parts)] == [t for t in pair.source if t in sentinels]
    whole = [w for token in pair.source[:-1] for w in parts.get(token, [token])]
    assert whole == ids


def test_a_tokenizer_without_sentinels_is_refused_with_another_task(
    models: dict[str, Backbone], tmp_path: Path
) -> None:
    with pytest.raises(BackboneError, match="no sentinel <extra_id_20>") as caught:
        corrupted(models["t5"], list(range(3, 200)) * 3, 0, 0)
    assert "prefix-lm" in (caught.value.remedy or "")


def test_the_second_half_is_written_after_the_first(backbone: Backbone) -> None:
    assert prefix_lm_sequences(backbone, [[5, 6, 7, 8, 9], []]) == [
        PairSequence((5, 6, 2), (7, 8, 9)),
        PairSequence((2,), ()),
    ]
    for build in (prefix_lm_sequences, span_corruption_sequences):
        with pytest.raises(DataError, match="too short"):
            build(backbone, [[], [1]])


# Losses


def test_the_loss_is_the_models_own(backbone: Backbone) -> None:
    pairs = answer_sequences(backbone, ITEMS, 100, 100).sequences
    assert batch_loss(backbone, pairs) == pytest.approx(their_loss(backbone.model, pairs), rel=1e-5)
    text = [backbone.encode("some words of text " * n) for n in (1, 2, 4)]
    halves = prefix_lm_sequences(backbone, text)
    assert batch_loss(backbone, halves) == pytest.approx(their_loss(backbone.model, halves), rel=1e-5)
    left_out = span_corruption_sequences(backbone, [*text, []])
    drawn = [corrupted(backbone, ids, 7, number) for number, ids in enumerate(text)]
    assert batch_loss(backbone, left_out, seed=7) == pytest.approx(their_loss(backbone.model, drawn), rel=1e-5)
    assert batch_loss(backbone, left_out, seed=8) != batch_loss(backbone, left_out, seed=7)
    assert batch_loss(backbone, left_out[-1:], seed=7) == 0


def test_gradients_are_the_models_own(backbone: Backbone) -> None:
    pairs = answer_sequences(backbone, ITEMS[:3], 100, 100).sequences
    made, tensors = fresh(backbone, AdapterConfig(rank=2, dropout=0), 0)
    tensors = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) * 0.1 for n, t in tensors.items()}
    with backbone.attached(peft_config(made), tensors) as model:
        parameters = [p for p in model.parameters() if p.requires_grad]
        batch_loss(backbone, pairs, backward=lambda loss: loss.backward())
        ours = [p.grad.clone() for p in parameters if p.grad is not None]
        model.zero_grad()
        count = sum(len(p.target) for p in pairs)
        for pair in pairs:
            out = backbone.model(input_ids=torch.tensor([pair.source]), labels=torch.tensor([pair.target]))
            (out.loss * len(pair.target) / count).backward()
        for mine, p in zip(ours, parameters, strict=True):
            assert p.grad is not None and torch.allclose(mine, p.grad, rtol=1e-3, atol=1e-6)


# Answers


def test_scores_are_the_likelihoods_of_the_candidates(backbone: Backbone) -> None:
    found = predict_choice(backbone, None, ITEMS, batch_tokens=60)
    means = predict_choice(backbone, None, ITEMS, normalised=True)
    for example, sums, mean in zip(ITEMS, found, means, strict=True):
        assert sums.id == example.id and sums.gold == example.gold and sums.prompt == example.prompt
        for number, candidate in enumerate(CANDIDATES):
            pair = PairSequence((*backbone.encode(example.prompt), 2), (*backbone.encode(candidate.strip()), 2))
            expected = -their_loss(backbone.model, [pair])
            assert mean.scores[number] == pytest.approx(expected, rel=1e-4)
            assert sums.scores[number] == pytest.approx(expected * len(pair.target), rel=1e-4)
    with pytest.raises(DataError, match="nothing to evaluate"):
        predict_choice(backbone, None, [])


def test_what_is_written_is_what_the_model_writes(backbone: Backbone) -> None:
    seen: list[tuple[int, int]] = []
    given = generate(backbone, None, ITEMS, max_output=9, batch_tokens=30, progress=lambda a, b: seen.append((a, b)))
    assert seen[-1] == (12, 12) and [g.id for g in given] == [e.id for e in ITEMS]
    for example, one in zip(ITEMS, given, strict=True):
        ids = torch.tensor([(*backbone.encode(example.prompt), 2)])
        out = backbone.model.generate(ids, max_new_tokens=9, do_sample=False)[0]  # pyright: ignore[reportCallIssue]
        assert one.text == backbone.tokenizer.decode(out, skip_special_tokens=True)
        assert one.references == (example.completion.strip(),)
        pair = PairSequence(tuple(ids[0].tolist()), (*backbone.encode(example.completion.strip()), 2))
        assert one.gold_log_likelihood == pytest.approx(-their_loss(backbone.model, [pair]), rel=1e-4)
    silent = generate(backbone, None, ITEMS, write=False)
    assert all(g.text is None for g in silent)
    assert [g.gold_log_likelihood for g in silent] == pytest.approx([g.gold_log_likelihood for g in given], rel=1e-4)
    with pytest.raises(DataError, match="nothing to evaluate"):
        generate(backbone, None, [])


# Every structure


@pytest.fixture(scope="session", params=STRUCTURES)
def trained(
    request: pytest.FixtureRequest, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Backbone, dict[str, Path]]:
    """The task's adapter and two references from one start: one of spans left out, one of halves."""
    where, text = tmp_path_factory.mktemp(request.param), backbone.encode("abc and xyz " * 4)
    sequences = {
        "task": answer_sequences(backbone, ITEMS, 100, 100).sequences,
        "target": span_corruption_sequences(backbone, [text] * 12),
        "source": prefix_lm_sequences(backbone, [text[3:], text[5:]] * 6),
    }
    for name, chosen in sequences.items():
        (where / name).mkdir()
        train(backbone, chosen, where / name, adapter=STRUCTURES[request.param], training=TRAINING)
    return request.param, backbone, {name: where / name for name in sequences}


def test_it_learns_and_says_so_again(trained: tuple[str, Backbone, dict[str, Path]]) -> None:
    _, backbone, folders = trained
    pairs = answer_sequences(backbone, ITEMS, 100, 100).sequences
    before = batch_loss(backbone, pairs)
    adapter = Adapter.load(folders["task"])
    assert adapter.config["task_type"] == "SEQ_2_SEQ_LM"
    with backbone.with_adapter(adapter):
        assert batch_loss(backbone, pairs) < 0.9 * before
    here = predict_choice(backbone, adapter, ITEMS)
    assert here == predict_choice(opened(backbone.folder), Adapter.load(folders["task"]), ITEMS)
    assert here != predict_choice(backbone, None, ITEMS)


def test_plain_peft_says_the_same(trained: tuple[str, Backbone, dict[str, Path]], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM

    structure, backbone, folders = trained
    task, target, source = (Adapter.load(folders[name]) for name in ("task", "target", "source"))
    merged = Graft(0.6).onto(task, target - source)
    merged.save(tmp_path / "merged")
    ids = torch.tensor([[40, 41, 42, 43, 2], [50, 51, 52, 53, 2]])
    for folder in (*folders.values(), tmp_path / "merged"):
        base = AutoModelForSeq2SeqLM.from_pretrained(backbone.folder)
        theirs = PeftModel.from_pretrained(base, folder).eval()
        with backbone.with_adapter(Adapter.load(folder)), torch.no_grad():
            ours = backbone.model(input_ids=ids, decoder_input_ids=ids).logits
            expected = theirs(input_ids=ids, decoder_input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.allclose(ours, expected, atol=1e-5 * (1 + float(expected.abs().max()))), structure
    again = predict_choice(backbone, Adapter.load(tmp_path / "merged"), ITEMS)
    assert again == predict_choice(backbone, merged, ITEMS) != predict_choice(backbone, task, ITEMS)
    assert predict_choice(backbone, Graft(0).onto(task, target - source), ITEMS) == predict_choice(
        backbone, task, ITEMS
    )


@pytest.mark.parametrize("what", ["answers", "spans"])
def test_a_training_that_was_stopped_goes_on_to_the_same_bytes(backbone: Backbone, what: str, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, loss: float) -> None:
        if done == 2:
            raise Stop

    text = backbone.encode("abc and xyz " * 4)
    chosen: Any = (
        answer_sequences(backbone, ITEMS, 100, 100).sequences
        if what == "answers"
        else span_corruption_sequences(backbone, [text[n:] for n in range(12)])
    )
    values = TrainingConfig(batch_size=4, epochs=2, learning_rate=0.01)
    options: Any = {"adapter": STRUCTURES["lora"], "training": values, "checkpoint_seconds": 0.0}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    train(backbone, chosen, tmp_path / "whole", **options)
    with pytest.raises(Stop):
        train(backbone, chosen, tmp_path / "parts", progress=stop, **options)
    train(backbone, chosen, tmp_path / "parts", **options)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_a_prefix_is_refused_with_the_reason(backbone: Backbone) -> None:
    with pytest.raises(AdapterError, match="two stacks of layers"):
        fresh(backbone, AdapterConfig(family="prefix", tokens=4), 0)


def test_an_encoder_decoder_has_no_head(backbone: Backbone) -> None:
    with pytest.raises(UserError, match="takes no head"):
        fresh(backbone, STRUCTURES["lora"], 0, Head("span"))
    with pytest.raises(UserError, match="without a task head"):
        encoder_choice(backbone, None, ITEMS)


def test_umt5_and_t5_without_scaling_are_known_by_their_logits(tmp_path: Path) -> None:
    for name, changes, scaled in (("umt5", {}, True), ("t5", {"tie_word_embeddings": False}, False)):
        folder = save_tiny_model(tmp_path / f"{name}{scaled}", name, **changes)
        loaded = opened(folder)
        assert loaded.kind == "encoder-decoder" and (loaded.scale != 1) == scaled
        pairs = answer_sequences(loaded, ITEMS, 100, 100).sequences
        assert batch_loss(loaded, pairs) == pytest.approx(their_loss(loaded.model, pairs), rel=1e-5)


def test_half_precision_trains_and_answers(models: dict[str, Backbone], tmp_path: Path) -> None:
    half = Backbone(locate(BackboneConfig(model=str(models["t5"].folder), dtype="bfloat16", device="cpu")))
    pairs = answer_sequences(half, ITEMS, 100, 100).sequences
    before = batch_loss(half, pairs)
    train(half, pairs, tmp_path, adapter=AdapterConfig(rank=4, dropout=0, modules="attention"), training=TRAINING)
    with half.with_adapter(Adapter.load(tmp_path)):
        assert batch_loss(half, pairs) < 0.75 * before
    found = generate(half, Adapter.load(tmp_path), ITEMS[:2], max_output=4)
    assert all(g.text is not None and g.gold_log_likelihood is not None and g.gold_log_likelihood < 0 for g in found)
