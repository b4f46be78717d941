"""Texts written a token at a time, those that end leaving their batch, are what transformers' own generation writes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lingraft import caching, generation
from lingraft.adapter import Adapter
from lingraft.backbones import Backbone
from lingraft.config import BackboneConfig
from lingraft.evaluation import Asking, ask
from lingraft.locating import locate
from lingraft.tasks.items import Example
from tests.conftest import save_tiny_model
from tests.unit.adapters import write_structure
from tests.unit.test_likelihood import ARCHITECTURES
from tests.unit.test_live import SHAPES

ITEMS = [Example(str(n), f"{'abc' * n} {chr(100 + n)}:", answer=" x", references=("x",)) for n in range(12)]
STOPS = ((), ("e", "q"), ("a", "t", "o", "z", "\n", "1", "5"))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = save_tiny_model(tmp_path_factory.mktemp(request.param), request.param, **ARCHITECTURES[request.param])
    return Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")))


@pytest.mark.parametrize("structure", ["none", "lora", "prefix"])
@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_texts_are_those_of_generate(
    model: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, structure: str, stop: tuple[str, ...]
) -> None:
    adapter = None
    if structure != "none":
        adapter = Adapter.load(write_structure(tmp_path / "adapter", structure, 2, shapes=SHAPES))
    asking = Asking(scoring="generation", new_tokens=14, stop=stop)
    found = [said.text for said in ask(model, adapter, ITEMS, asking)]  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(caching, "keeps_keys", lambda backbone: False)
    expected = [said.text for said in ask(model, adapter, ITEMS, asking)]  # pyright: ignore[reportAttributeAccessIssue]
    assert found == expected
    assert len(set(found)) > 2


def steps(backbone: Backbone, stop: tuple[str, ...], ends: list[int] | None = None) -> list[int]:
    """The rows of every step."""
    rows: list[int] = []

    def count(module: Any, args: Any, given: dict[str, Any]) -> None:
        rows.append(len(given["input_ids"]))

    handle = backbone.model.register_forward_pre_hook(count, with_kwargs=True)
    own = backbone.model.generation_config.eos_token_id
    try:
        if ends is not None:
            backbone.model.generation_config.eos_token_id = ends
        ask(backbone, None, ITEMS, Asking(scoring="generation", new_tokens=14, stop=stop))
    finally:
        handle.remove()
        backbone.model.generation_config.eos_token_id = own
    return rows


def test_texts_that_have_ended_are_no_longer_computed(model: Backbone) -> None:
    assert steps(model, ()) == [12] * 14
    everything = tuple(chr(n) for n in range(33, 127))
    rows = steps(model, everything)
    assert rows[0] == 12 and rows == sorted(rows, reverse=True)
    assert rows[-1] < 12 or len(rows) == 1


def test_the_model_s_own_ends_of_text_end_texts(model: Backbone) -> None:
    every = list(range(len(model.tokenizer)))
    assert steps(model, (), every) == [12]


def test_rows_leave_the_cache_together_with_what_is_read_of_them(model: Backbone) -> None:
    rows = [(5, 6, 7, 8, 9, 10), (11, 12, 13), (14,)]
    ids, mask = caching.padded(model, rows, left=True)
    cache = caching.empty(model)
    with torch.inference_mode():
        caching.read(model, ids, mask, cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        more, there = torch.tensor([[20], [21]]), torch.cat([mask[[2, 0]], torch.ones(2, 1, dtype=torch.long)], dim=1)
        found = caching.read(model, more, there, cache)[:, -1]
        for row, text in zip(found, [(14, 20), (5, 6, 7, 8, 9, 10, 21)], strict=True):
            ids = torch.tensor([text])
            assert torch.allclose(row, model.hidden(ids, torch.ones_like(ids))[0, -1], atol=1e-4)


def test_a_model_whose_forward_gives_all_logits_is_generated_with_transformers(
    model: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [said.text for said in ask(model, None, ITEMS, Asking(scoring="generation", new_tokens=5))]  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(generation, "_stepwise", None)
    monkeypatch.setattr(generation, "_takes", lambda backbone: {})
    assert [said.text for said in ask(model, None, ITEMS, Asking(scoring="generation", new_tokens=5))] == expected  # pyright: ignore[reportAttributeAccessIssue]
