"""Evaluation: scores are the model's own likelihoods, whatever the batches."""

from pathlib import Path

import pytest
import torch

from lingraft.adapter import Adapter
from lingraft.backbones import Backbone
from lingraft.batching import answer_sequences
from lingraft.config import AdapterConfig, TrainingConfig
from lingraft.errors import DataError, UserError
from lingraft.evaluation import evaluate, predict
from lingraft.predictions import read_predictions, read_scores
from lingraft.tasks.items import Example
from lingraft.training import train

DISTINCT = [
    Example(str(i), f"Text: {'word ' * i}end\nTopic:", (" apple", " banana", " cherry"), i % 3) for i in range(9)
]
SHARED = [Example(str(i), f"Pick {'x' * i}:", (" (A) one", " (A) two", " (A)"), i % 3) for i in range(5)]


def likelihood(backbone: Backbone, prompt: str, answer: str) -> float:
    """The plain definition: the sum of the answer's token log-likelihoods, one forward pass a candidate."""
    first, whole = backbone.encode(prompt), backbone.encode(prompt + answer)
    ids = torch.tensor([[*backbone.prefix, *whole]])
    with torch.no_grad():
        table = torch.log_softmax(backbone.model(input_ids=ids).logits[0].float(), dim=-1)
    start = len(backbone.prefix) + len(first)
    return sum(float(table[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))


@pytest.mark.parametrize("examples", [DISTINCT, SHARED])
def test_sequence_scores_are_the_likelihoods_of_whole_answers(tiny: Backbone, examples: list[Example]) -> None:
    for found, example in zip(predict(tiny, None, examples, scoring="sequence"), examples, strict=True):
        # Of SHARED one candidate is the beginning of the others: there the end of text is part of every answer.
        end = "<eos>" if examples is SHARED else ""
        expected = torch.tensor([likelihood(tiny, example.prompt, c + end) for c in example.candidates])
        # Tokens that all candidates share are left out of every score: the differences are what counts.
        ours = torch.tensor(found.scores)
        assert torch.allclose(ours - ours[0], expected - expected[0], atol=1e-4)


def test_first_token_scores_are_the_likelihoods_of_the_first_tokens_that_differ(tiny: Backbone) -> None:
    for found, example in zip(predict(tiny, None, DISTINCT), DISTINCT, strict=True):
        ids = torch.tensor([[*tiny.prefix, *tiny.encode(example.prompt + " ")]])
        with torch.no_grad():
            table = torch.log_softmax(tiny.model(input_ids=ids).logits[0, -1], dim=-1)
        expected = [float(table[tiny.encode(c.strip())[0]]) for c in example.candidates]
        assert found.scores == pytest.approx(expected, abs=1e-4)


def test_the_batch_size_does_not_change_a_score(tiny: Backbone) -> None:
    one = predict(tiny, None, DISTINCT + SHARED, batch_tokens=1)
    many = predict(tiny, None, DISTINCT + SHARED, batch_tokens=4096)
    for a, b in zip(one, many, strict=True):
        assert a.id == b.id and a.scores == pytest.approx(b.scores, abs=1e-4)


def test_first_token_is_refused_where_it_cannot_tell_candidates_apart(tiny: Backbone) -> None:
    with pytest.raises(UserError, match="do not tell them apart"):
        predict(tiny, None, SHARED, scoring="first_token")


def test_a_long_prompt_loses_its_beginning(tiny: Backbone) -> None:
    long = Example("l", "z" * 900 + " Topic:", (" apple", " banana"), 0)
    (found,) = predict(tiny, None, [long], max_length=64)
    kept = tiny.encode(long.prompt + " ")[-(64 - len(tiny.prefix) - len("banana")) :]
    (short,) = predict(tiny, None, [Example("s", tiny.tokenizer.decode(kept)[:-1], long.candidates, 0)])
    assert found.scores == pytest.approx(short.scores, abs=1e-4)


def test_nothing_to_evaluate_is_said(tiny: Backbone) -> None:
    with pytest.raises(DataError):
        predict(tiny, None, [])


def test_evaluation_writes_what_it_gives(tiny: Backbone, tmp_path: Path) -> None:
    scores = evaluate(tiny, None, DISTINCT, tmp_path)
    assert read_scores(tmp_path) == scores
    again = read_predictions(tmp_path)
    assert sum(p.answer == p.gold for p in again) / 9 == scores["accuracy"]["value"]
    assert again[0].prompt == DISTINCT[0].prompt


def test_plain_peft_gives_the_same_scores(tiny: Backbone, tiny_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    values = TrainingConfig(learning_rate=0.02, epochs=5, clip=1.0)
    train(tiny, answer_sequences(tiny, DISTINCT, 128), tmp_path, adapter=AdapterConfig(rank=4), training=values)
    ours = predict(tiny, Adapter.load(tmp_path), DISTINCT)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path).eval()
    for found, example in zip(ours, DISTINCT, strict=True):
        ids = torch.tensor([[*tiny.prefix, *tiny.encode(example.prompt + " ")]])
        with torch.no_grad():
            table = torch.log_softmax(model(input_ids=ids).logits[0, -1], dim=-1)
        expected = [float(table[tiny.encode(c.strip())[0]]) for c in example.candidates]
        assert found.scores == pytest.approx(expected, abs=1e-4)
