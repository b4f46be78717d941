"""Encoders: what they read, every structure under every head, masked text, prefixes in front of an encoder's layers."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft.adapter import Adapter
from lingraft.architectures import kind_of
from lingraft.backbones import Backbone, peft_config
from lingraft.batching import text_sequences
from lingraft.config import AdapterConfig, BackboneConfig, TrainingConfig
from lingraft.encoding import (
    MaskedSequence,
    Row,
    _item,
    _shares,
    forward,
    labelled_sequences,
    mask,
    masked_sequences,
    predict_choice,
    predict_span,
)
from lingraft.errors import AdapterError, BackboneError, DataError, UserError
from lingraft.heads import AUTO_CLASSES, Head, head_of
from lingraft.layouts.prefix import TENSOR
from lingraft.locating import architecture_of, locate
from lingraft.merging import Graft
from lingraft.prefixes import _ATTENDING
from lingraft.stepping import batch_loss
from lingraft.structures import fresh
from lingraft.tasks.items import Example
from lingraft.training import hash_tensors, train
from tests.conftest import save_tiny_model

STRUCTURES = {
    "lora": AdapterConfig(rank=4, dropout=0.1),
    "ia3": AdapterConfig(family="ia3"),
    "prefix": AdapterConfig(family="prefix", tokens=4),
    "bottleneck": AdapterConfig(family="bottleneck", reduction=4),
}
HEADS = {
    "classification": Head("classification", 3),
    "multiple_choice": Head("multiple_choice"),
    "span": Head("span"),
    "masked_lm": Head("masked_lm"),
}
TRAINING = TrainingConfig(learning_rate=0.005, epochs=20, batch_size=6, clip=5, warmup=0, schedule="constant")
FASTER = TRAINING.model_copy(update={"learning_rate": 0.02})


def opened(folder: Path) -> Backbone:
    return Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")))


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    names = ("bert", "xlm-roberta")
    return {name: opened(save_tiny_model(tmp_path_factory.mktemp(name), name)) for name in names}


@pytest.fixture(scope="session", params=["bert", "xlm-roberta"])
def encoder(request: pytest.FixtureRequest, encoders: dict[str, Backbone]) -> Backbone:
    return encoders[request.param]


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A BERT whose checkpoint has neither a pooler nor a language model's head."""
    from transformers import AutoModel

    folder = save_tiny_model(tmp_path_factory.mktemp("bare"), "bert")
    AutoModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)
    return opened(folder)


def items(kind: str, count: int = 12) -> list[Example]:
    """Learnable from a few items: the letter that is repeated is the label, the right option, or the answer."""
    found, random = [], np.random.default_rng(0)
    for n in range(count):
        gold, length = n % 3, 2 + int(random.integers(5))
        letter = "xyz"[gold]
        if kind == "classification":
            found.append(Example(str(n), "", ("x", "y", "z"), gold, parts=(letter * length,)))
        elif kind == "multiple_choice":
            options = ("xx", "yy", "zz")[: 3 if n % 2 or gold == 2 else 2]
            found.append(Example(str(n), "", options, gold, parts=("which", letter * length), options=options))
        else:
            start = int(random.integers(6))
            text = "o" * start + "q" * 2 + "o" * (8 - start)
            found.append(Example(str(n), "", parts=("where", text), references=("qq",), span=(start, start + 2)))
    return found


def sequences_of(backbone: Backbone, kind: str) -> list[Any]:
    if kind == "masked_lm":
        return masked_sequences(backbone, [backbone.encode("ababcabcababcabc" * 2)] * 12)
    return labelled_sequences(backbone, items(kind), HEADS[kind], 64).sequences


def logits_of(model: Any, backbone: Backbone, rows: list[Row]) -> torch.Tensor:
    """What a plain model says, row by row."""
    found = []
    for row in rows:
        given = forward(backbone, [row])
        if "MultipleChoice" in type(model.get_base_model()).__name__:
            given = {name: value[:, None] for name, value in given.items()}
        with torch.no_grad():
            out = model.get_base_model()(**given)
        found.append(
            torch.stack([out.start_logits[0], out.end_logits[0]]) if hasattr(out, "start_logits") else out.logits[0]
        )
    return torch.cat([value.reshape(-1) for value in found])


def logits_of_peft(model: Any, backbone: Backbone, rows: list[Row]) -> torch.Tensor:
    """What PEFT's own forward says, which puts the prefix in front itself."""
    found = []
    for row in rows:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([row.ids]), attention_mask=torch.ones(1, len(row.ids), dtype=torch.long))
        found.append(
            torch.stack([out.start_logits[0], out.end_logits[0]]) if hasattr(out, "start_logits") else out.logits[0]
        )
    return torch.cat([value.reshape(-1) for value in found])


# Trained, saved, opened again


@pytest.fixture(scope="session", params=[(s, h) for s in STRUCTURES for h in HEADS], ids=lambda p: "-".join(p))
def trained(
    request: pytest.FixtureRequest, encoder: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, Backbone, Path]:
    structure, kind = request.param
    folder = tmp_path_factory.mktemp(f"{structure}-{kind}")
    values = TRAINING if structure == "lora" else FASTER
    train(encoder, sequences_of(encoder, kind), folder, adapter=STRUCTURES[structure], training=values)
    return structure, kind, encoder, folder


def test_the_loss_falls(trained: tuple[str, str, Backbone, Path]) -> None:
    structure, kind, backbone, folder = trained
    head, chosen = HEADS[kind], sequences_of(backbone, kind)
    made, tensors = fresh(backbone, STRUCTURES[structure], 0, head)

    def loss(model: Any) -> float:
        return batch_loss(backbone, chosen, model=model.get_base_model(), seed=5)

    with backbone.attached(peft_config(made), tensors, head) as model:
        before = loss(model)
    with backbone.with_adapter(Adapter.load(folder)) as model:
        after = loss(model)
    assert after < 0.95 * before


def test_what_was_trained_says_in_plain_peft_what_it_says_here(trained: tuple[str, str, Backbone, Path]) -> None:
    import transformers
    from peft import PeftModel

    structure, kind, backbone, folder = trained
    head, adapter = HEADS[kind], Adapter.load(folder)
    assert head_of(adapter) == head
    sizes = {"num_labels": 3} if kind == "classification" else {}
    base = getattr(transformers, AUTO_CLASSES[kind]).from_pretrained(backbone.folder, **sizes)
    rows = (
        [Row(s.ids, (0,) * len(s.ids)) for s in sequences_of(backbone, kind)[:2]]
        if kind == "masked_lm"
        else [row for e in items(kind) for row in _item(backbone, e, head, 64, False)]
    )
    theirs = PeftModel.from_pretrained(base, folder).eval()
    if structure == "prefix":  # PEFT's own forward has no prefix for these heads, and leaves segments out.
        if kind not in ("classification", "span"):
            return
        rows = [replace(row, types=(0,) * len(row.types)) for row in rows]
        here = logits_of_peft(theirs, backbone, rows)
    else:
        here = logits_of(theirs, backbone, rows)
    with backbone.with_adapter(adapter) as wrapped:
        assert torch.allclose(logits_of(wrapped, backbone, rows), here, atol=1e-5)


def test_predictions_come_from_the_folder_alone(trained: tuple[str, str, Backbone, Path]) -> None:
    _, kind, backbone, folder = trained
    if kind == "masked_lm":
        with pytest.raises(AdapterError, match="head for masked_lm, not for"):
            predict_choice(backbone, Adapter.load(folder), items("classification"))
        return
    again, predict = opened(backbone.folder), predict_span if kind == "span" else predict_choice
    here, there = (predict(b, Adapter.load(folder), items(kind)) for b in (backbone, again))
    assert here == there
    few = predict(backbone, Adapter.load(folder), items(kind), batch_tokens=1)
    for one, other in zip(here, few, strict=True):
        assert one.gold_log_likelihood == pytest.approx(other.gold_log_likelihood, abs=1e-4)


def test_the_base_is_as_before(encoder: Backbone) -> None:
    names = [n for n, _ in encoder.model.named_modules()]
    before = {n: p.clone() for n, p in encoder.model.named_parameters()}
    for kind, head in HEADS.items():
        if kind == "masked_lm":
            continue
        headed = encoder.headed(head)
        kept = {path: headed.model.get_submodule(path) for path in headed.modules}
        start = {path: hash_tensors(dict(m.state_dict())) for path, m in kept.items()}
        for config in STRUCTURES.values():
            made, tensors = fresh(encoder, config, 0, head)
            with encoder.attached(peft_config(made), tensors, head) as model:
                chosen = sequences_of(encoder, kind)[:2]
                model.train()
                optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
                batch_loss(encoder, chosen, model=model.get_base_model(), backward=lambda loss: loss.backward())
                optimizer.step()
            for path, module in kept.items():
                assert headed.model.get_submodule(path) is module
                assert hash_tensors(dict(module.state_dict())) == start[path]
            assert not headed.model.training and not any(p.requires_grad for p in headed.model.parameters())
    assert [n for n, _ in encoder.model.named_modules()] == names
    assert all(torch.equal(p, before[n]) for n, p in encoder.model.named_parameters())


def test_heads_share_the_layers_and_nothing_else(encoder: Backbone) -> None:
    models = [encoder.headed(head).model for head in HEADS.values()]
    assert len({id(m.base_model.encoder) for m in models}) == 1 == len({id(m.base_model.embeddings) for m in models})
    assert encoder.headed(HEADS["span"]) is encoder.headed(Head("span"))


@pytest.mark.parametrize("kind", ["classification", "masked_lm"])
def test_a_training_that_was_stopped_goes_on_to_the_same_bytes(encoder: Backbone, kind: str, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, loss: float) -> None:
        if done == 2:
            raise Stop

    chosen = sequences_of(encoder, kind)
    values = TrainingConfig(batch_size=4, epochs=2, learning_rate=0.01)
    options: Any = {"adapter": STRUCTURES["lora"], "training": values, "checkpoint_seconds": 0.0, "seed": 3}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    train(encoder, chosen, tmp_path / "whole", **options)
    with pytest.raises(Stop):
        train(encoder, chosen, tmp_path / "parts", progress=stop, **options)
    torch.manual_seed(77)
    train(encoder, chosen, tmp_path / "parts", **options)
    assert_equal_folders(tmp_path)


def assert_equal_folders(tmp_path: Path) -> None:
    for file in ("adapter_model.safetensors", "adapter_config.json", "lingraft.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


# Merging


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_merge_keeps_the_tasks_head(encoder: Backbone, structure: str, tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    head, folders = HEADS["classification"], {}
    for n, name in enumerate(("task", "target", "source")):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        text = [encoder.encode("abc" * (4 + n)), encoder.encode("bca" * 5)] * 4
        chosen = sequences_of(encoder, "classification") if name == "task" else masked_sequences(encoder, text)
        values = TRAINING.model_copy(update={"epochs": 2})
        train(encoder, chosen, folders[name], adapter=STRUCTURES[structure], training=values)
    task, target, source = (Adapter.load(folder) for folder in folders.values())
    assert task.sidecar["init_sha256"] == target.sidecar["init_sha256"]
    assert task.sidecar["head"] == {"kind": "classification", "labels": 3}
    merged = Graft(0.7).onto(task, target - source)
    assert head_of(merged) == head
    assert {n: read().tobytes() for n, read in merged.others.items()} == {
        n: read().tobytes() for n, read in task.others.items()
    }
    merged.save(tmp_path / "merged")
    here = predict_choice(encoder, merged, items("classification"))
    assert predict_choice(encoder, Adapter.load(tmp_path / "merged"), items("classification")) == here
    assert here != predict_choice(encoder, task, items("classification"))
    zero = Graft(0).onto(task, target - source)
    assert predict_choice(encoder, zero, items("classification")) == predict_choice(
        encoder, task, items("classification")
    )
    if structure != "prefix":
        base = transformers.AutoModelForSequenceClassification.from_pretrained(encoder.folder, num_labels=3)
        theirs = PeftModel.from_pretrained(base, tmp_path / "merged").eval()
        rows = [row for e in items("classification") for row in _item(encoder, e, head, 64, False)]
        with encoder.with_adapter(merged) as wrapped:
            assert torch.allclose(logits_of(wrapped, encoder, rows), logits_of(theirs, encoder, rows), atol=1e-5)


def test_a_task_is_learned_on_top_of_a_languages_adapter(encoder: Backbone, tmp_path: Path) -> None:
    """The sites go on from there; the head, which it has not, is a fresh one."""
    still = TrainingConfig(epochs=0)
    for name in ("language", "task", "again"):
        (tmp_path / name).mkdir()
    options: Any = {"adapter": STRUCTURES["lora"]}
    train(encoder, sequences_of(encoder, "masked_lm"), tmp_path / "language", training=TRAINING, **options)
    chosen = sequences_of(encoder, "classification")
    train(encoder, chosen, tmp_path / "task", training=still, start_from=tmp_path / "language", **options)
    language, task = Adapter.load(tmp_path / "language"), Adapter.load(tmp_path / "task")
    for module in language.modules:
        assert np.array_equal(language.site(module).tensors["B"], task.site(module).tensors["B"])
    expected = fresh(encoder, STRUCTURES["lora"], 0, HEADS["classification"])[1]
    assert all(np.array_equal(read(), expected[name].numpy()) for name, read in task.others.items())
    train(encoder, chosen, tmp_path / "task", training=TRAINING, **options)
    train(encoder, chosen, tmp_path / "again", training=still, start_from=tmp_path / "task", **options)
    last, again = Adapter.load(tmp_path / "task"), Adapter.load(tmp_path / "again")
    assert {n: read().tobytes() for n, read in last.others.items()} == {
        n: read().tobytes() for n, read in again.others.items()
    }


# Heads


def test_initial_heads_are_a_function_of_base_head_and_seed(encoder: Backbone, bare: Backbone) -> None:
    def made(backbone: Backbone, head: Head, seed: int) -> str:
        torch.manual_seed(np.random.default_rng().integers(1 << 30))
        state = torch.get_rng_state()
        found = fresh(backbone, STRUCTURES["ia3"], seed, head)[1]
        assert torch.equal(torch.get_rng_state(), state)
        return hash_tensors({name: t for name, t in found.items() if "ia3" not in name})

    first = made(encoder, Head("classification", 3), 0)
    assert (
        made(encoder, Head("classification", 3), 0)
        == first
        == made(opened(encoder.folder), Head("classification", 3), 0)
    )
    others = {made(encoder, Head("classification", n), seed) for n, seed in ((3, 1), (4, 0))}
    assert len({first, *others, made(bare, Head("classification", 3), 0)}) == 4


def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_saved(bare: Backbone, tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    head = HEADS["classification"]
    assert bare.headed(head).modules == ("classifier", "bert.pooler")
    train(bare, sequences_of(bare, "classification"), tmp_path, adapter=STRUCTURES["lora"], training=TRAINING)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier", "pooler"]
    adapter = Adapter.load(tmp_path)
    start = fresh(bare, STRUCTURES["lora"], 0, head)[1]
    for name in ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"):
        whole = f"base_model.model.{name}"
        assert not np.array_equal(adapter.others[whole](), start[whole].numpy())
    torch.manual_seed(1)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(bare.folder, num_labels=3)
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    rows = [row for e in items("classification") for row in _item(bare, e, head, 64, False)]
    with bare.with_adapter(adapter) as wrapped:
        assert torch.allclose(logits_of(wrapped, bare, rows), logits_of(theirs, bare, rows), atol=1e-5)


def test_a_pooler_of_the_checkpoint_stays_as_it_is(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = save_tiny_model(tmp_path / "whole", "bert")
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(folder)
    backbone = opened(folder)
    headed = backbone.headed(Head("classification", 4))
    assert headed.modules == ("classifier",) and headed.drawn == {"classifier.weight", "classifier.bias"}
    # A classifier of the same size is where training starts from.
    assert backbone.headed(Head("classification", 3)).drawn == frozenset()


def test_without_a_language_models_head_there_is_no_masked_text(bare: Backbone, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="no weights for masked language modelling") as caught:
        train(bare, masked_sequences(bare, [bare.encode("abc abc")]), tmp_path)
    assert "reference.task=task" in (caught.value.remedy or "")


@pytest.mark.parametrize("name", ["roberta", "camembert", "distilbert", "deberta-v2", "electra", "modernbert"])
def test_other_encoders_learn_and_open_in_plain_peft(name: str, tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    backbone = opened(save_tiny_model(tmp_path / "base", name))
    backbone.headed(Head("masked_lm"))  # States through the transform are its own logits, or it would be refused.
    for kind in ("classification", "multiple_choice", "span"):
        (tmp_path / kind).mkdir()
        chosen, values = sequences_of(backbone, kind), TRAINING.model_copy(update={"epochs": 3})
        train(backbone, chosen, tmp_path / kind, adapter=STRUCTURES["lora"], training=values)
        adapter = Adapter.load(tmp_path / kind)
        assert head_of(adapter) == HEADS[kind] and len(adapter.modules) == (8 if name == "modernbert" else 12)
        sizes = {"num_labels": 3} if kind == "classification" else {}
        base = getattr(transformers, AUTO_CLASSES[kind]).from_pretrained(backbone.folder, **sizes)
        rows = [row for e in items(kind) for row in _item(backbone, e, HEADS[kind], 64, False)]
        theirs = PeftModel.from_pretrained(base, tmp_path / kind).eval()
        with backbone.with_adapter(adapter) as wrapped:
            assert torch.allclose(logits_of(wrapped, backbone, rows), logits_of(theirs, backbone, rows), atol=1e-5)


# What is read


@given(st.integers(0, 80), st.integers(0, 80), st.integers(4, 60), st.booleans())
def test_parts_share_the_room(first: int, last: int, room: int, keep_last: bool) -> None:
    a, b = _shares(first, last, room, keep_last=keep_last)
    assert 0 <= a <= first and 0 <= b <= last and a + b <= room
    assert a + b == min(room, first + last), "no room is wasted"
    kept, whole = (b, last) if keep_last else (a, first)
    if whole <= room // 2:
        assert kept == whole, "the part to keep is cut only where it is longer than half of the room"


def test_short_texts_are_read_as_transformers_reads_them(encoder: Backbone) -> None:
    for parts in (("one text",), ("a question", "a context")):
        (row,) = _item(encoder, Example("1", "", ("x", "y", "z"), parts=parts), HEADS["classification"], 64, False)
        theirs: Any = encoder.tokenizer(*parts, return_token_type_ids=True)
        assert list(row.ids) == theirs["input_ids"] and list(row.types) == theirs["token_type_ids"]
        a, b = row.offsets[0], row.offsets[-1]
        assert parts[-1][a[0] : b[1]] == parts[-1]


def test_a_long_text_loses_the_end_of_its_last_part_and_it_is_counted(encoder: Backbone) -> None:
    first, last = "q" * 10, "o" * 30 + "p" * 30
    made = [Example("1", "", ("x", "y", "z"), parts=(first, last)), Example("2", "", ("x", "y", "z"), parts=("q", "o"))]
    encoded = labelled_sequences(encoder, made, HEADS["classification"], 40)
    assert encoded.truncated == 1 and encoded.left_out == ()
    row = encoded.sequences[0].rows[0]
    text = encoder.tokenizer.decode(row.ids, skip_special_tokens=True)
    assert len(row.ids) == 40 and text == first + last[: 40 - 10 - (len(row.ids) - 10 - len(row.offsets))]


def test_an_option_is_never_cut(encoder: Backbone) -> None:
    example = Example("1", "", ("a", "b"), parts=("q" * 100,), options=("first option", "other"))
    for option, row in zip(example.options, _item(encoder, example, HEADS["multiple_choice"], 40, False), strict=True):
        assert len(row.ids) == 40 and row.truncated and len(row.offsets) == len(option)


def test_a_model_reads_no_more_than_it_has_positions_for(encoder: Backbone) -> None:
    (row,) = _item(encoder, Example("1", "", ("x",) * 3, parts=("q" * 900,)), HEADS["classification"], 5000, False)
    assert len(row.ids) == encoder.longest == 512
    longest = masked_sequences(encoder, [list(range(3, 40)) * 20])
    assert len(longest[0].ids) == 512
    with torch.no_grad():
        encoder.model(input_ids=torch.tensor([longest[0].ids]))


def test_an_answer_that_was_cut_is_left_out_of_training_and_said(encoder: Backbone) -> None:
    far = Example("far", "", parts=("where", "o" * 50 + "qq" + "o" * 20), span=(50, 52))
    long = Example("long", "", parts=("where", "q" * 70), span=(0, 70))
    encoded = labelled_sequences(encoder, [*items("span"), far, long], HEADS["span"], 40)
    assert encoded.left_out == ("long",) and encoded.truncated == 1
    assert len(encoded.sequences) == 13
    row, (a, b) = encoded.sequences[-1].rows[0], encoded.sequences[-1].target
    assert encoder.tokenizer.decode(row.ids[a : b + 1]) == "qq"
    with pytest.raises(DataError, match="no answer fits"):
        labelled_sequences(encoder, [long], HEADS["span"], 40)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 120), st.integers(12, 60))
def test_windows_hold_the_whole_text_and_every_short_answer(
    encoders: dict[str, Backbone], length: int, room: int
) -> None:
    text = "".join("abcdefgh"[n % 8] for n in range(length))
    rows = _item(encoders["bert"], Example("1", "", parts=("q", text)), HEADS["span"], room, True)
    seen = {n for row in rows for a, b in row.offsets for n in range(a, b)}
    assert seen == set(range(length)) and all(len(row.ids) <= room for row in rows)
    shared = (room - 5) // 3 - 1  # "ab" is one token
    for start in range(max(0, length - shared + 1)):
        assert any(
            row.offsets[0][0] <= start and row.offsets[-1][1] >= start + max(1, shared) for row in rows if row.offsets
        )


def test_items_without_what_a_head_needs_are_refused(encoder: Backbone) -> None:
    with pytest.raises(DataError, match="3 labels cannot answer an item of 2"):
        labelled_sequences(encoder, [Example("1", "", ("a", "b"), parts=("t",))], HEADS["classification"], 64)
    with pytest.raises(DataError, match="no text for an encoder"):
        labelled_sequences(encoder, [Example("1", "", ("a", "b", "c"))], HEADS["classification"], 64)
    with pytest.raises(DataError, match="no options"):
        labelled_sequences(encoder, [Example("1", "", ("a", "b"), parts=("t",))], HEADS["multiple_choice"], 64)
    with pytest.raises(DataError, match="where its answer stands"):
        labelled_sequences(encoder, [Example("1", "", parts=("t", "u"))], HEADS["span"], 64)
    with pytest.raises(DataError, match="nothing to train on"):
        labelled_sequences(encoder, [], HEADS["span"], 64)
    with pytest.raises(UserError, match="no room"):
        labelled_sequences(encoder, items("classification"), HEADS["classification"], 5)
    with pytest.raises(UserError, match="no labels"):
        labelled_sequences(encoder, items("classification"), HEADS["masked_lm"], 64)
    with pytest.raises(UserError, match="cannot have 0 labels"):
        Head("classification")


def test_an_encoder_without_an_adapter_says_nothing(encoder: Backbone) -> None:
    for predict, kind in ((predict_choice, "classification"), (predict_span, "span")):
        with pytest.raises(UserError, match="an encoder without a task head says nothing"):
            predict(encoder, None, items(kind))
        with pytest.raises(DataError, match="nothing to evaluate"):
            predict(encoder, None, [])


def test_sequences_for_another_kind_of_model_are_refused(encoder: Backbone, tiny: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="for a decoder"):
        train(encoder, text_sequences([[1, 2, 3]]), tmp_path)
    with pytest.raises(UserError, match="for an encoder"):
        train(tiny, [MaskedSequence((1, 2, 3))], tmp_path)
    with pytest.raises(UserError, match="takes no head"):
        tiny.headed(HEADS["span"])


# Masked text


def test_the_masked_loss_is_the_models_own(encoder: Backbone) -> None:
    chosen = masked_sequences(encoder, [encoder.encode(t * 4) for t in ("some text here ", "other ", "x y")])
    expected, count = 0.0, 0
    for number, sequence in enumerate(chosen):
        drawn = mask(encoder, sequence.ids, 9, number)
        with torch.no_grad():
            logits = encoder.model(input_ids=torch.tensor([drawn.ids])).logits[0]
        expected += float(
            torch.nn.functional.cross_entropy(logits[drawn.positions], torch.from_numpy(drawn.labels), reduction="sum")
        )
        count += len(drawn.positions)
    assert batch_loss(encoder, chosen, seed=9) == pytest.approx(expected / count, rel=1e-5)


def test_masks_are_bert_s(encoders: dict[str, Backbone]) -> None:
    encoder, ids = encoders["bert"], (1, *[5] * 20000, 2)
    drawn = mask(encoder, ids, 0, 0)
    assert len(drawn.positions) / 20000 == pytest.approx(0.15, abs=0.01)
    assert drawn.labels.tolist() == [5] * len(drawn.positions) and 0 not in drawn.positions
    there = np.array(drawn.ids)[drawn.positions]
    assert (there == encoder.tokenizer.mask_token_id).mean() == pytest.approx(0.8, abs=0.02)
    assert (there == 5).mean() == pytest.approx(0.1, abs=0.02)
    untouched = np.setdiff1d(np.arange(len(ids)), drawn.positions)
    assert (np.array(drawn.ids)[untouched] == np.array(ids)[untouched]).all()
    assert not set(there.tolist()) & (set(encoder.tokenizer.all_special_ids) - {encoder.tokenizer.mask_token_id})


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**40), st.integers(0, 7))
def test_parallel_texts_are_masked_at_the_same_positions(
    encoders: dict[str, Backbone], one: int, two: int, seed: int, number: int
) -> None:
    encoder = encoders["bert"]
    a, b = (set(mask(encoder, (1, *[7 + k] * n, 2), seed, number).positions.tolist()) for k, n in ((0, one), (1, two)))
    assert a and b
    shared = min(one, two)
    if len(a) > 1 and len(b) > 1:  # A text without a draw gets one position of its own.
        assert {p for p in a if p <= shared} == {p for p in b if p <= shared}
    again = mask(encoder, (1, *[7] * one, 2), seed, number)
    assert set(again.positions.tolist()) == a


def test_an_empty_line_takes_no_loss(encoder: Backbone) -> None:
    chosen = masked_sequences(encoder, [encoder.encode("some text"), []])
    assert batch_loss(encoder, chosen, seed=1) == batch_loss(encoder, chosen[:1], seed=1) > 0
    assert batch_loss(encoder, chosen[1:], seed=1) == 0
    with pytest.raises(DataError, match="too short"):
        masked_sequences(encoder, [[], []])


# Answers


def test_scores_are_log_probabilities_and_options_may_differ_in_number(encoder: Backbone, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    for kind in ("classification", "multiple_choice"):
        folder = tmp_path / kind
        folder.mkdir()
        train(encoder, sequences_of(encoder, kind), folder, adapter=STRUCTURES["lora"], training=TRAINING)
        found = predict_choice(
            encoder, Adapter.load(folder), items(kind), batch_tokens=40, progress=lambda a, b: seen.append((a, b))
        )
        assert [p.id for p in found] == [e.id for e in items(kind)] and seen[-1] == (12, 12)
        assert [len(p.scores) for p in found] == [len(e.candidates) for e in items(kind)]
        for p in found:
            assert sum(np.exp(p.scores)) == pytest.approx(1, abs=1e-5)
        assert sum(p.answer == p.gold for p in found) >= 10


def test_a_span_is_found_wherever_it_stands_in_a_long_text(encoder: Backbone, tmp_path: Path) -> None:
    values = TRAINING.model_copy(update={"epochs": 60})
    train(encoder, sequences_of(encoder, "span"), tmp_path, adapter=STRUCTURES["lora"], training=values)
    adapter = Adapter.load(tmp_path)
    short = predict_span(encoder, adapter, items("span"))
    assert sum(g.text == "qq" for g in short) >= 10 and not any(g.truncated for g in short)
    assert all(g.gold_log_likelihood is not None and g.gold_log_likelihood < 0 for g in short)
    # In windows of a few tokens the same answer is found, and the distribution is over all of them.
    for start in (0, 30, 58):
        text = "o" * start + "qq" + "o" * (60 - start)
        long = [Example("1", "", parts=("where", text), span=(start, start + 2))]
        assert set(predict_span(encoder, adapter, long, max_length=24)[0].text or "") == {"q"}
    assert predict_span(encoder, adapter, items("span"), longest=1)[0].text in ("q", "o")


def test_likelihoods_of_all_starts_sum_to_one(encoder: Backbone, tmp_path: Path) -> None:
    from lingraft.encoding import _likelihood

    train(encoder, sequences_of(encoder, "span"), tmp_path, adapter=STRUCTURES["lora"], training=TRAINING)
    rows = _item(encoder, Example("1", "", parts=("where", "cdefg" * 8)), HEADS["span"], 24, True)
    assert len(rows) > 1
    with encoder.with_adapter(Adapter.load(tmp_path)) as wrapped, torch.no_grad():
        from lingraft.encoding import _logits

        values = [_logits(encoder, wrapped.get_base_model(), [row], "span")[:, 0] for row in rows]
    # One token a letter: of first and last token alike the mean is that of a start's and an end's.
    both = [_likelihood(rows, [v[[end, end]] for v in values], (n, n + 1)) for end in range(2) for n in range(40)]
    for end in range(2):
        assert sum(np.exp(np.array(both[40 * end : 40 * end + 40], float))) == pytest.approx(1, abs=1e-4)
    # An answer that is longer than any window still begins in one and ends in one.
    assert _likelihood(rows, values, (0, 40)) == pytest.approx((both[0] + both[79]) / 2)


# Prefixes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefix_stands_before_every_layers_keys(encoder: Backbone, attention: str) -> None:
    """Every layer's attention, computed by hand with the prefix before its keys and values."""
    backbone, head = opened(encoder.folder), HEADS["classification"]
    configs = {id(m.config): m.config for m in backbone.headed(head).model.modules() if hasattr(m, "config")}
    for config in configs.values():
        config._attn_implementation = attention
    made, tensors = fresh(backbone, STRUCTURES["prefix"], 0, head)
    tensors[TENSOR] = torch.from_numpy(np.random.default_rng(3).normal(0, 1, size=tensors[TENSOR].shape).astype("f"))
    rows = [Row((1, *range(5, 5 + n), 2), (0,) * (n + 2)) for n in (9, 4)]
    seen: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
    with backbone.attached(peft_config(made), tensors, head) as wrapped, torch.no_grad():
        model = wrapped.get_base_model()
        layers = [layer.attention.self for layer in model.base_model.encoder.layer]
        handles = [
            layer.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out[0])))
            for layer in layers
        ]
        given = forward(backbone, rows)
        together = model(**given).logits
        for handle in handles:
            handle.remove()
        alone = torch.cat([model(**forward(backbone, [row])).logits for row in rows])
        # Without padding there is no mask to widen.
        assert torch.allclose(together, alone, atol=1e-5)
    assert all(config._attn_implementation == attention for config in configs.values())
    assert len(seen) == 2
    blocks = tensors[TENSOR].view(4, 2, 2, 4, 8)
    for number, (module, states, out) in enumerate(seen):
        q, k, v = (
            layer(states).view(2, -1, 4, 8).transpose(1, 2) for layer in (module.query, module.key, module.value)
        )
        before = [blocks[:, number, part].transpose(0, 1).expand(2, -1, -1, -1) for part in range(2)]
        k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
        scores = q @ k.transpose(2, 3) / 8**0.5
        visible = torch.cat([torch.ones(2, 4), given["attention_mask"].float()], dim=1)[:, None, None, :]
        expected = scores.masked_fill(visible == 0, -torch.inf).softmax(-1) @ v
        expected = expected.transpose(1, 2).flatten(2)
        assert torch.allclose(expected[given["attention_mask"].bool()], out[given["attention_mask"].bool()], atol=1e-5)


def test_a_fresh_prefix_is_the_bases_own_keys_and_values(encoder: Backbone) -> None:
    config = AdapterConfig(family="prefix", tokens=6)
    tensor = fresh(encoder, config, 0)[1][TENSOR]
    assert tensor.shape == (6, 2 * 2 * 32) and torch.equal(tensor, fresh(encoder, config, 0)[1][TENSOR])
    assert not torch.equal(tensor, fresh(encoder, config, 1)[1][TENSOR])


def test_gradients_reach_the_whole_prefix(encoder: Backbone) -> None:
    head = HEADS["classification"]
    made, tensors = fresh(encoder, STRUCTURES["prefix"], 0, head)
    with encoder.attached(peft_config(made), tensors, head) as wrapped:
        wrapped.train()
        chosen = sequences_of(encoder, "classification")
        batch_loss(encoder, chosen, model=wrapped.get_base_model(), backward=lambda loss: loss.backward())
        gradient = wrapped.prompt_encoder["default"].embedding.weight.grad.view(4, 2, 2, -1)
        assert bool((gradient.abs().sum(dim=(0, 3)) > 0).all()), "keys and values of every layer"
    assert not _ATTENDING


def test_a_text_that_leaves_no_positions_for_the_prefix_is_refused(encoder: Backbone, tmp_path: Path) -> None:
    chosen = masked_sequences(encoder, [[5] * 600])
    with pytest.raises(AdapterError, match="512 tokens and a prefix of 4") as caught:
        train(encoder, chosen, tmp_path, adapter=STRUCTURES["prefix"])
    assert "segment_tokens" in (caught.value.remedy or "")
    train(encoder, masked_sequences(encoder, [[5] * 506]), tmp_path, adapter=STRUCTURES["prefix"])


def test_an_encoder_that_attends_in_its_own_way_takes_no_prefix(tmp_path: Path) -> None:
    backbone = opened(save_tiny_model(tmp_path / "deberta", "deberta-v2"))
    with pytest.raises(AdapterError, match="in a way of its own"):
        fresh(backbone, STRUCTURES["prefix"], 0)


# Which models


def test_what_a_model_is_is_told_before_it_is_loaded(tmp_path: Path, tiny_folder: Path) -> None:
    for name, kind in (("bert", "encoder"), ("xlm-roberta", "encoder"), ("mt5", "encoder-decoder")):
        located = locate(BackboneConfig(model=str(save_tiny_model(tmp_path / name, name)), device="cpu"))
        assert architecture_of(located) == kind
    assert architecture_of(locate(BackboneConfig(model=str(tiny_folder)))) == "decoder"


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True}, "decoder"),
        ({"model_type": "albert", "architectures": ["AlbertForMaskedLM"]}, "encoder"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "decoder"),
        (
            {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True},
            "encoder-decoder",
        ),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "decoder"),
        ({"model_type": "llama"}, "decoder"),
    ],
)
def test_configurations_say_what_a_model_is(config: dict[str, Any], kind: str) -> None:
    assert kind_of(config) == kind


def test_another_model_is_refused_with_what_is_served(tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    copied = shutil.copytree(tiny_folder, tmp_path / "vit")
    (copied / "config.json").write_text(
        json.dumps({"model_type": "vit", "architectures": ["ViTForImageClassification"]})
    )
    with pytest.raises(BackboneError, match="'vit'") as caught:
        architecture_of(locate(BackboneConfig(model=str(copied))))
    assert "xlm-roberta" in (caught.value.remedy or "")
    (copied / "config.json").write_text("[")
    with pytest.raises(BackboneError, match="cannot be read"):
        architecture_of(locate(BackboneConfig(model=str(copied))))


def test_modules_of_the_head_are_no_place_for_an_adapter(encoder: Backbone) -> None:
    everything = encoder.target_modules("all")
    assert len(everything) == 12 and all(".encoder.layer." in m for m in everything)
    assert encoder.target_modules("dense") == [m for m in everything if m.endswith("dense")]


def test_plain_names_are_written_only_where_they_name_just_the_adapted_layers(
    encoder: Backbone, tmp_path: Path
) -> None:
    chosen, still = sequences_of(encoder, "classification"), TrainingConfig(epochs=0)
    for name, modules in (("short", "attention.query,attention.value"), ("long", "all")):
        (tmp_path / name).mkdir()
        train(encoder, chosen, tmp_path / name, adapter=AdapterConfig(rank=2, modules=modules), training=still)
    written = {
        n: json.loads((tmp_path / n / "adapter_config.json").read_text())["target_modules"] for n in ("short", "long")
    }
    assert written["short"] == ["query", "value"] and len(written["long"]) == 12


# Half precision


def test_in_half_precision_heads_are_whole(encoder: Backbone, tmp_path: Path) -> None:
    half = Backbone(locate(BackboneConfig(model=str(encoder.folder), dtype="bfloat16", device="cpu")))
    for kind in ("classification", "masked_lm"):
        folder = tmp_path / kind
        folder.mkdir()
        train(half, sequences_of(half, kind), folder, adapter=STRUCTURES["lora"], training=TRAINING)
    adapter = Adapter.load(tmp_path / "classification")
    assert {read().dtype for read in adapter.others.values()} == {np.dtype(np.float32)}
    right = predict_choice(half, adapter, items("classification"))
    assert sum(p.answer == p.gold for p in right) >= 10
    whole = copy.deepcopy(encoder.headed(HEADS["classification"]))
    assert all(p.dtype == torch.float32 for path in whole.modules for p in whole.model.get_submodule(path).parameters())


def test_a_question_is_never_cut_and_the_end_of_what_stands_before_options_stays(encoder: Backbone) -> None:
    asked = Example("1", "", parts=("who did it " * 4, "context " * 60))
    for row in _item(encoder, asked, HEADS["span"], 80, True):
        first = len(encoder.encode("who did it " * 4))
        assert row.start >= first  # the whole question stands before every window
    with pytest.raises(DataError, match="leaves no room for its context"):
        _item(encoder, Example("1", "", parts=("who did it " * 30, "context")), HEADS["span"], 80, True)
    choice = Example(
        "2", "", candidates=("a", "b"), parts=("premise " * 40 + "What was the cause?",), options=("yes", "no")
    )
    for row in _item(encoder, choice, HEADS["multiple_choice"], 60, False):
        assert "What was the cause?" in encoder.decode(list(row.ids[: row.start]))
