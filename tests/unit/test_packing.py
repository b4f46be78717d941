"""Several texts in one row: where they stand, and that none of them notices."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lingraft.attaching import peft_config
from lingraft.backbones import Backbone
from lingraft.batching import TokenSequence, loss_positions, micro_batches, text_sequences
from lingraft.causal import NEXT_TOKENS
from lingraft.config import AdapterConfig, BackboneConfig, SpeedConfig
from lingraft.errors import UserError
from lingraft.locating import locate
from lingraft.packing import packed, parts
from lingraft.structures import fresh
from tests.conftest import save_tiny_model

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(LENGTHS, st.integers(0, 80))
def test_texts_stand_side_by_side_within_rows(lengths: list[int], width: int):
    places = packed(lengths, width)
    taken = Counter(
        (place.row, place.start + n) for place, length in zip(places, lengths, strict=True) for n in range(length)
    )
    assert max(taken.values()) == 1
    assert {row for row, _ in taken} == set(range(1 + max(place.row for place in places)))
    assert max(column for _, column in taken) < max(width, *lengths)


@given(LENGTHS, st.integers(0, 80))
def test_at_most_one_row_is_half_empty(lengths: list[int], width: int):
    """Two half-empty rows would have been one: first fit."""
    width = max(width, *lengths)
    filled = Counter[int]()
    for place, length in zip(packed(lengths, width), lengths, strict=True):
        filled[place.row] += length
    assert sum(2 * used <= width for used in filled.values()) <= 1


def test_by_hand():
    # Longest first: 5 and 3 share the first row, 4 and 2 the second.
    places = packed([2, 5, 3, 4], 8)
    assert [(place.row, place.start) for place in places] == [(1, 4), (0, 0), (0, 5), (1, 0)]


@given(LENGTHS, st.integers(1, 120))
def test_parts_hold_every_text_once_and_stay_within_their_bound(lengths: list[int], tokens: int):
    found = micro_batches(lengths, tokens, packed=True)
    assert found == parts(lengths, tokens)
    assert sorted(n for part in found for n in part) == list(range(len(lengths)))
    for part in found:
        inside = [lengths[n] for n in part]
        rows = 1 + max(place.row for place in packed(inside))
        assert len(part) == 1 or rows * max(inside) <= tokens


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "eager": ("llama", {}),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    architecture, changes = KINDS[request.param]
    return request.param, save_tiny_model(tmp_path_factory.mktemp(request.param), architecture, **changes)


def loaded(folder: Path, **speed: Any) -> Backbone:
    return Backbone(
        locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")), SpeedConfig.model_validate(speed)
    )


def texts(seed: int = 0) -> list[TokenSequence]:
    rng = np.random.default_rng(seed)
    return text_sequences([rng.integers(3, 200, size=n).tolist() for n in (23, 9, 14, 6, 2, 17)])


def gradients(backbone: Backbone, family: str, dropout: float = 0.0) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of the texts and the gradients of an adapter's parameters, or of the embedding's where there is none."""
    chosen = texts()
    if family == "none":
        weight = backbone.model.get_input_embeddings().weight.requires_grad_()  # pyright: ignore[reportOptionalMemberAccess]
        weight.grad = None
        losses = _run(backbone, backbone.model, chosen)
        found = {"embedding": weight.grad.clone()}
        weight.requires_grad_(False)
        return losses, found
    kept = {"dropout": dropout} if family == "lora" else {}
    made, tensors = fresh(backbone, AdapterConfig.model_validate({"family": family, **kept}), 0)
    torch.manual_seed(1)
    moved = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    with backbone.attached(peft_config(made), moved) as model:
        model.train()
        losses = _run(backbone, model.get_base_model(), chosen)
        return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _run(backbone: Backbone, model: Any, chosen: list[TokenSequence]) -> list[float]:
    drawn = NEXT_TOKENS.draw(backbone, chosen, 0.7, 5)
    losses = [0.0] * len(chosen)
    for part in micro_batches([d.length for d in drawn], 64, packed=backbone.packs):
        found = NEXT_TOKENS.summed(backbone, model, [drawn[n] for n in part])
        found.sum().backward()
        for n, loss in zip(part, found.tolist(), strict=True):
            losses[n] = loss
    return losses


@pytest.mark.parametrize("family", ["none", "lora", "bottleneck", "ia3"])
def test_packed_texts_have_the_loss_and_gradients_of_texts_alone(folder: tuple[str, Path], family: str):
    name, path = folder
    attention = {"attention": "eager"} if name == "eager" else {}
    apart, together = loaded(path, **attention), loaded(path, packing=True, **attention)
    assert together.packs and not apart.packs
    losses, slopes = gradients(apart, family)
    others, same = gradients(together, family)
    assert others == pytest.approx(losses, rel=1e-5)
    assert slopes.keys() == same.keys() and slopes
    for key, slope in slopes.items():
        scale = float(slope.abs().max())
        torch.testing.assert_close(same[key], slope, rtol=1e-4, atol=1e-5 * scale + 1e-9)


def test_the_layout_does_not_change_what_is_dropped_out(tmp_path: Path):
    path = save_tiny_model(tmp_path / "model")
    losses, slopes = gradients(loaded(path), "lora", dropout=0.3)
    others, same = gradients(loaded(path, packing=True), "lora", dropout=0.3)
    undropped, _ = gradients(loaded(path), "lora")
    assert others == pytest.approx(losses, rel=1e-5)
    assert undropped != pytest.approx(losses, rel=1e-5)
    for key, slope in slopes.items():
        torch.testing.assert_close(same[key], slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()) + 1e-9)


def test_a_changed_token_changes_no_other_text(folder: tuple[str, Path]):
    """The first token of the first text of a row, which a row's other texts would see if they saw anything."""
    _, path = folder
    backbone = loaded(path, packing=True)
    chosen = texts()
    changed = [TokenSequence((7, *chosen[0].ids[1:]), 1) if n == 3 else s for n, s in enumerate(chosen)]
    changed[3] = TokenSequence((7, *chosen[3].ids[1:]), 1)
    assert changed[3].ids != chosen[3].ids
    before, after = (_summed(backbone, sequences) for sequences in (chosen, changed))
    assert [n for n, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [3]


def _summed(backbone: Backbone, chosen: list[TokenSequence]) -> list[float]:
    with torch.no_grad():
        return NEXT_TOKENS.summed(backbone, backbone.model, NEXT_TOKENS.draw(backbone, chosen, 1.0, 0)).tolist()


def test_texts_do_share_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    backbone = loaded(save_tiny_model(tmp_path / "model"), packing=True)
    seen: list[tuple[int, ...]] = []
    usual = backbone.hidden
    monkeypatch.setattr(
        backbone, "hidden", lambda ids, **given: (seen.append(tuple(ids.shape)), usual(ids, **given))[1]
    )
    _summed(backbone, texts())
    assert seen == [(4, 23)]  # 71 tokens: 23, 17 + 6, 14 + 9, 2; one text a row would be 6 × 23.
    assert [(s.row, s.start, s.length) for s in backbone.rows.segments] == [
        (0, 0, 23),
        (2, 14, 9),
        (2, 0, 14),
        (1, 17, 6),
        (3, 0, 2),
        (1, 0, 17),
    ]


def test_positions_are_those_that_were_drawn(tmp_path: Path):
    """The loss of a text is that of its drawn positions, as the model alone gives them."""
    backbone = loaded(save_tiny_model(tmp_path / "model"), packing=True)
    chosen = texts()
    where = loss_positions(chosen, 0.5, 3)
    drawn = NEXT_TOKENS.draw(backbone, chosen, 0.5, 3)
    with torch.no_grad():
        found = NEXT_TOKENS.summed(backbone, backbone.model, drawn).tolist()
        expected = []
        for sequence, positions in zip(chosen, where, strict=True):
            ids = torch.tensor([sequence.ids])
            logs = backbone.model(input_ids=ids).logits[0].log_softmax(-1)
            expected.append(-float(sum(logs[n, sequence.ids[n + 1]] for n in positions)))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("bloom", "one would see another"),
        ("mamba", "one would see another"),
        ("opt", "one would see another"),
        ("bert", "packed for decoders"),
        ("t5", "packed for decoders"),
    ],
)
def test_what_cannot_be_packed_is_refused_when_it_is_loaded(tmp_path: Path, architecture: str, said: str):
    path = save_tiny_model(tmp_path / "model", architecture)
    loaded(path)
    with pytest.raises(UserError, match=said):
        loaded(path, packing=True)


def test_behind_a_prefix_texts_stand_alone(tmp_path: Path):
    path = save_tiny_model(tmp_path / "model")
    losses, slopes = gradients(loaded(path), "prefix")
    backbone = loaded(path, packing=True)
    others, same = gradients(backbone, "prefix")
    assert others == losses
    assert all(torch.equal(same[key], slope) for key, slope in slopes.items())
    assert backbone.packs


def test_beside_a_counterpart_or_another_adapter_texts_stand_alone(tmp_path: Path):
    backbone = loaded(save_tiny_model(tmp_path / "model"), packing=True)
    with backbone.rows.told(lanes=(("a", 3), ("b", 3))):
        assert not backbone.packs
    assert backbone.packs
    backbone.fuser = object()
    assert not backbone.packs
