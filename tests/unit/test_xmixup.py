"""X-Mixup: its formulas by hand, the same numbers inside real layers, its losses, and that it learns."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AlbertConfig, AlbertModel

from lingraft.backbones import Backbone, peft_config
from lingraft.config import AdapterConfig, BackboneConfig, MixupConfig
from lingraft.encoding import LabelledSequence, Row, _logits
from lingraft.errors import BackboneError, UserError
from lingraft.fusion.xmixup import Mixup, Read, Texts, alignment, mixed, ratio, site_of
from lingraft.fusion.xmixup_losses import labelled_loss, paired_loss
from lingraft.heads import Head
from lingraft.locating import locate
from lingraft.losses import project, summed_cross_entropy
from lingraft.structures import fresh
from lingraft.transduction import _padded, _states
from tests.conftest import save_tiny_model

HEAD = Head("classification", 3)
SOURCES = [(1, 40, 41, 42, 2), (1, 50, 51, 2), (1, 60, 61, 62, 63, 64, 2)]
TARGETS = [(1, 140, 141, 2), (1, 150, 151, 152, 153, 2), (1, 160, 2)]
LABELS = (0, 1, 2)


def opened(folder: Path) -> Backbone:
    return Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")))


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    names = ("bert", "xlm-roberta", "t5", "mt5")
    return {n: opened(save_tiny_model(tmp_path_factory.mktemp(f"mixup-{n}"), n)) for n in names}


@pytest.fixture(params=["bert", "xlm-roberta"])
def encoder(request: pytest.FixtureRequest, backbones: dict[str, Backbone]) -> Backbone:
    return backbones[request.param]


@pytest.fixture(params=["bert", "xlm-roberta", "t5", "mt5"])
def any_backbone(request: pytest.FixtureRequest, backbones: dict[str, Backbone]) -> Backbone:
    return backbones[request.param]


def model_of(backbone: Backbone) -> Any:
    return backbone.headed(HEAD).model if backbone.kind == "encoder" else backbone.model


def texts(backbone: Backbone, rows: Sequence[tuple[int, ...]], there: Sequence[bool] = ()) -> Texts:
    """Rows as a headed encoder's logits, or as T5's encoder states."""
    lengths = [len(row) if not there or there[n] else 0 for n, row in enumerate(rows)]
    if backbone.kind == "encoder":
        made = [Row(row, (0,) * len(row)) for row in rows]
        return Texts(lambda: _logits(backbone, model_of(backbone), made, "classification"), lengths)

    def run() -> torch.Tensor:
        ids, mask = _padded(backbone, rows)
        return backbone.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state

    return Texts(run, lengths)


def made(value: torch.Tensor, last: torch.Tensor | None = None, there: torch.Tensor | None = None) -> Read:
    last = torch.zeros(len(value), 1, 2) if last is None else last
    there = torch.ones(last.shape[:2], dtype=torch.bool) if there is None else there
    return Read(value, there, last, last)


# The formulas


def test_alignment_by_hand() -> None:
    # Scores ln 3 and 0: of the source 3/4 and 1/4; of the one target token, asked from the source's side, everything.
    query, key = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[math.log(3), 5.0], [0.0, 7.0]]]])
    weights, entropy = alignment(
        query, key, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool), 1.0
    )
    assert weights.flatten().tolist() == pytest.approx([0.75, 0.25])
    assert float(entropy) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_an_alignment_that_knows_nothing_has_the_entropy_of_both_lengths() -> None:
    there = torch.tensor([[True, True, True, False]])
    source_there = torch.tensor([[True, True, False]])
    weights, entropy = alignment(torch.zeros(1, 2, 4, 3), torch.ones(1, 2, 3, 3), there, source_there, 1.0)
    assert float(entropy) == pytest.approx(math.log(2) + math.log(3))
    assert weights[0, 0, 0].tolist() == [0.5, 0.5, 0.0]


def test_an_alignment_of_one_to_one_has_no_entropy() -> None:
    same = 100 * torch.eye(4)[None, None]
    everything = torch.ones(1, 4, dtype=torch.bool)
    weights, entropy = alignment(same, same, everything, everything, 1.0)
    assert torch.equal(weights[0, 0], torch.eye(4))
    assert float(entropy) == 0


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_padding_says_nothing_and_order_of_the_source_neither(seed: int, t: int, s: int, more: int, also: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    query, key = torch.randn(1, 2, t + more, 4, generator=rng), torch.randn(1, 2, s + also, 4, generator=rng)
    there = torch.arange(t + more)[None] < t
    source_there = torch.arange(s + also)[None] < s
    weights, entropy = alignment(query, key, there, source_there, 0.5)
    assert torch.equal(weights[..., s:], torch.zeros(1, 2, t + more, also))
    bare, alone = alignment(query[:, :, :t], key[:, :, :s], there[:, :t], source_there[:, :s], 0.5)
    torch.testing.assert_close((weights[:, :, :t, :s], entropy), (bare, alone))
    order = torch.randperm(s, generator=rng)
    turned, still = alignment(query[:, :, :t], key[:, :, order], there[:, :t], source_there[:, :s], 0.5)
    torch.testing.assert_close((turned, still), (bare[..., order], alone))
    assert 0 <= float(entropy) <= math.log(s) + math.log(t) + 1e-5


def test_ratio_and_mix_by_hand() -> None:
    one, zero = torch.ones(()), torch.zeros(())
    found = ratio(torch.tensor([0.0, math.log(3)]), one, zero, 0.5)
    assert found.tolist() == pytest.approx([0.75, 1 - 0.5 * 0.75])
    own, aligned = torch.full((2, 1, 2), 8.0), torch.full((2, 1, 2), -8.0)
    assert mixed(own, aligned, found)[:, 0, 0].tolist() == pytest.approx([4.0, 2.0])
    assert torch.equal(mixed(own, aligned, torch.ones(2)), own)
    assert torch.equal(mixed(own, aligned, torch.zeros(2)), aligned)


def test_gradients_of_the_formulas() -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, 2, 3, 2), (2, 2, 4, 2), (2, 3, 2), (), ()]
    values = [torch.randn(s, generator=rng, dtype=torch.float64, requires_grad=True) for s in shapes]
    there = torch.tensor([[True, True, True], [True, True, False]])
    source_there = torch.tensor([[True, True, True, True], [True, False, False, False]])

    def whole(query: Any, key: Any, own: Any, weight: Any, bias: Any) -> torch.Tensor:
        weights, entropy = alignment(query, key, there, source_there, 0.7)
        aligned = (weights.mean(1)) @ key.mean(1)
        return mixed(own, aligned, ratio(entropy, weight, bias, 0.5))

    assert torch.autograd.gradcheck(whole, tuple(values))


# In real layers


@pytest.mark.parametrize("layer", [0, None])
def test_a_layer_mixes_what_the_formulas_say(any_backbone: Backbone, layer: int | None) -> None:
    backbone, model = any_backbone, model_of(any_backbone)
    mixup = Mixup(backbone, MixupConfig(layer=layer, most=0.8))
    mixup.load_state_dict({"weight": torch.tensor(0.7), "bias": torch.tensor(-0.4)})
    with torch.no_grad():
        plain = mixup.read(model, texts(backbone, TARGETS))
        source, target = mixup.both(model, texts(backbone, SOURCES), texts(backbone, TARGETS))
    number = 1 if layer is None else layer
    bert = backbone.kind == "encoder"
    block = model.base_model.encoder.layer[number].attention if bert else model.encoder.block[number].layer[0]
    core, norm = (block.self, block.output.LayerNorm) if bert else (block.SelfAttention, block.layer_norm)
    names = ("query", "key", "value") if bert else ("q", "k", "v")
    last = block.output.dense if bert else core.o
    for row, (s, t) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        h_s, h_t = source.states[row, : len(s)], plain.states[row, : len(t)]
        given = (h_t, h_s, h_s) if bert else (norm(h_t), norm(h_s), norm(h_s))
        q, k, v = (getattr(core, n)(x).view(len(x), 4, 8).transpose(0, 1) for n, x in zip(names, given, strict=True))
        with torch.no_grad():
            scores = q @ k.transpose(1, 2) / (math.sqrt(8) if bert else 1)
            both = [torch.distributions.Categorical(logits=x).entropy().mean() for x in (scores, scores.mT)]
            mu = 1 - 0.8 / (1 + math.exp(-(0.7 * float(sum(both)) - 0.4)))
            context = functional.scaled_dot_product_attention(q, k, v, scale=8**-0.5 if bert else 1.0)
            expected = mu * h_t + (1 - mu) * last(context.transpose(0, 1).flatten(1))
            expected = norm(expected) if bert else expected
        torch.testing.assert_close(target.states[row, : len(t)], expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain.value, target.value)


def test_nothing_is_left_behind(any_backbone: Backbone) -> None:
    backbone, model = any_backbone, model_of(any_backbone)
    mixup = Mixup(backbone, MixupConfig())
    before = torch.random.get_rng_state()
    with torch.no_grad():
        plain = texts(backbone, TARGETS).run()
        mixup.both(model, texts(backbone, SOURCES), texts(backbone, TARGETS))

        def fail() -> torch.Tensor:
            texts(backbone, TARGETS).run()
            raise RuntimeError("in the middle")

        with pytest.raises(RuntimeError, match="middle"):
            mixup.both(model, texts(backbone, SOURCES), Texts(fail, [len(t) for t in TARGETS]))
        assert torch.equal(texts(backbone, TARGETS).run(), plain)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_texts_without_a_source_are_as_they_were_bit_for_bit(any_backbone: Backbone) -> None:
    backbone, model = any_backbone, model_of(any_backbone)
    mixup = Mixup(backbone, MixupConfig())
    plain = texts(backbone, TARGETS).run()
    with torch.no_grad():
        source, target = mixup.both(model, texts(backbone, SOURCES, [True, False, False]), texts(backbone, TARGETS))
    same = [torch.equal(a, b) for a, b in zip(target.value, plain, strict=True)]
    assert same == [False, True, True]
    assert source.there.any(1).tolist() == [True, False, False]


def test_no_share_for_the_source_mixes_only_by_the_norm(backbones: dict[str, Backbone]) -> None:
    """With μ = 1 a pre-norm layer is as it was, and BERT's norm is applied to what it made."""
    for name in ("t5", "bert"):
        backbone, model = backbones[name], model_of(backbones[name])
        mixup = Mixup(backbone, MixupConfig(most=0))
        with torch.no_grad():
            plain = mixup.read(model, texts(backbone, TARGETS))
            _, target = mixup.both(model, texts(backbone, SOURCES), texts(backbone, TARGETS))
            norm = model.base_model.encoder.layer[1].attention.output.LayerNorm if name == "bert" else lambda x: x
            assert torch.equal(target.states, norm(plain.states))


def test_a_text_is_the_same_alone_and_in_a_batch(any_backbone: Backbone) -> None:
    backbone, model = any_backbone, model_of(any_backbone)
    mixup = Mixup(backbone, MixupConfig())
    with torch.no_grad():
        _, all_ = mixup.both(model, texts(backbone, SOURCES), texts(backbone, TARGETS))
        for row, (s, t) in enumerate(zip(SOURCES, TARGETS, strict=True)):
            _, one = mixup.both(model, texts(backbone, [s]), texts(backbone, [t]))
            torch.testing.assert_close(one.last[0], all_.last[row, : len(t)], rtol=1e-4, atol=1e-5)


def test_attention_back_ends_agree(any_backbone: Backbone) -> None:
    backbone, model = any_backbone, model_of(any_backbone)
    mixup = Mixup(backbone, MixupConfig())
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [c._attn_implementation for c in configs]
    found = []
    try:
        for way in ("eager", "sdpa"):
            for config in configs:
                config._attn_implementation = way
            with torch.no_grad():
                found.append(mixup.both(model, texts(backbone, SOURCES), texts(backbone, TARGETS))[1].value)
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation = old
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_source_and_the_ratio(any_backbone: Backbone) -> None:
    backbone, model = any_backbone, model_of(any_backbone)
    mixup = Mixup(backbone, MixupConfig())
    with torch.no_grad():
        source = mixup.read(model, texts(backbone, SOURCES, [True, True, False]))
    source.states.requires_grad_()
    target = mixup.read(model, texts(backbone, TARGETS), source)
    slopes = torch.autograd.grad(target.last.square().sum(), [source.states, mixup.weight, mixup.bias])
    assert all(torch.isfinite(slope).all() and slope.any() for slope in slopes)
    reached = slopes[0].abs().sum(-1) > 0
    assert torch.equal(reached, source.there)


def test_half_precision_and_dropout(tmp_path: Path) -> None:
    changes = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    folder = save_tiny_model(tmp_path, "bert", **changes)
    backbone = Backbone(locate(BackboneConfig(model=str(folder), dtype="bfloat16", device="cpu")))
    mixup, model = Mixup(backbone, MixupConfig()), model_of(backbone)

    def run(seed: int) -> Read:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return mixup.both(model, texts(backbone, SOURCES), texts(backbone, TARGETS))[1]

    assert torch.equal(run(0).value, run(1).value)
    assert run(0).states.dtype == torch.bfloat16
    assert torch.isfinite(run(0).value).all()
    model.train()
    try:
        assert torch.equal(run(0).value, run(0).value)
        assert not torch.equal(run(0).value, run(1).value)
    finally:
        model.eval()


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_the_alignment_has_the_layers_dropout(backbones: dict[str, Backbone], name: str, tmp_path: Path) -> None:
    changes = (
        {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3} if name == "bert" else {"dropout_rate": 0.3}
    )
    backbone = opened(save_tiny_model(tmp_path, name, **changes))
    mixup, model = Mixup(backbone, MixupConfig()), model_of(backbone)
    with torch.no_grad():
        source = mixup.read(model, texts(backbone, SOURCES))
        own = mixup.read(model, texts(backbone, TARGETS))

    def run(seed: int) -> torch.Tensor:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            return mixup.mix(model, own.states, own.there, source)

    block = model.base_model.get_submodule(mixup.site.path)
    core, holder = (block.self, block.output) if name == "bert" else (block.SelfAttention, block)
    assert torch.equal(run(0), run(1))
    core.training = True
    if isinstance(core.dropout, torch.nn.Module):
        core.dropout.training = True
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    core.eval()
    holder.dropout.training = True
    assert not torch.equal(run(0), run(1))


def test_an_encoder_answers_by_both_texts(encoder: Backbone) -> None:
    mixup, model = Mixup(encoder, MixupConfig()), model_of(encoder)
    pair = texts(encoder, SOURCES, [True, True, False]), texts(encoder, TARGETS)
    with torch.no_grad():
        first, second = mixup.both(model, *pair)
        mean = mixup.logits(model, *pair, "classification")
        mixup.config = MixupConfig(average=False)
        alone = mixup.logits(model, *pair, "classification")
    torch.testing.assert_close(mean[:2], (first.value + second.value)[:2] / 2)
    assert torch.equal(mean[2], second.value[2])
    assert torch.equal(alone, second.value)


def test_generation_mixes_in_the_encoder_alone(backbones: dict[str, Backbone]) -> None:
    from transformers.modeling_outputs import BaseModelOutput

    backbone = backbones["t5"]
    model: Any = backbone.model
    mixup = Mixup(backbone, MixupConfig(layer=0))
    ids, mask = _padded(backbone, TARGETS)
    with torch.no_grad(), backbone.greedy(4) as configuration:
        given = {"attention_mask": mask, "generation_config": configuration}
        given |= {"return_dict_in_generate": True, "output_scores": True}
        source = mixup.read(model, texts(backbone, SOURCES))
        target = mixup.read(model, texts(backbone, TARGETS), source)
        plain = model.generate(input_ids=ids, **given)
        with mixup.mixing(model, source, [len(t) for t in TARGETS]):
            written = model.generate(input_ids=ids, **given)
        states: Any = target.value
        expected = model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=states), **given)
    assert torch.equal(written.sequences, expected.sequences)
    assert torch.equal(written.scores[-1], expected.scores[-1])
    assert not torch.equal(written.scores[0], plain.scores[0])


def test_what_is_refused(tiny: Backbone, backbones: dict[str, Backbone], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a decoder"):
        Mixup(tiny, MixupConfig())
    with pytest.raises(UserError, match="layers are 0 to 1"):
        Mixup(backbones["t5"], MixupConfig(layer=2))
    for name in ("distilbert", "modernbert", "deberta-v2"):
        changes = {"relative_attention": True} if name == "deberta-v2" else {}
        with pytest.raises(BackboneError, match="cannot be put on"):
            Mixup(opened(save_tiny_model(tmp_path / name, name, **changes)), MixupConfig())
    # One layer gone through three times.
    shared = AlbertModel(
        AlbertConfig(
            vocab_size=9,
            embedding_size=8,
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=8,
        )
    )
    with pytest.raises(BackboneError, match="AlbertModel"):
        site_of(shared, None)


def test_its_two_numbers_start_as_published(backbones: dict[str, Backbone]) -> None:
    found = Mixup(backbones["bert"], MixupConfig()).state_dict()
    assert {n: (float(t), t.dtype) for n, t in found.items()} == {
        "weight": (1.0, torch.float32),
        "bias": (0.0, torch.float32),
    }


# The losses


def cross_entropy(labels: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda logits: functional.cross_entropy(logits, torch.tensor(labels), reduction="none")


def test_loss_by_hand() -> None:
    half, quarter = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
    first, second = torch.tensor([[[1.0, 2.0], [9, 9]]]), torch.tensor([[[4.0, -2.0], [0, 0]]])
    config = MixupConfig(source_loss=0.4, states=10, predictions=100)
    source, target = made(half, first), made(quarter, second)
    found = labelled_loss(config, source, target, cross_entropy([1]), "classification", [1])
    task = 0.4 * math.log(2) + 0.6 * math.log(4)
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(found) == pytest.approx(task + 10 * (9 + 16) / 2 + 100 * divergence, rel=1e-5)


def test_texts_alike_have_the_task_alone() -> None:
    logits, states = torch.randn(4, 3), torch.randn(4, 5, 2)
    same = made(logits, states)
    task = cross_entropy([0, 1, 2, 0])
    found = labelled_loss(MixupConfig(), same, same, task, "classification", [1] * 4)
    torch.testing.assert_close(found, task(logits).sum())


def test_without_a_source_the_task_alone() -> None:
    source, target = (made(torch.randn(2, 3), torch.randn(2, 4, 2)) for _ in range(2))
    source.there[1] = False
    task = cross_entropy([0, 1])
    both = labelled_loss(MixupConfig(), source, target, task, "classification", [1, 1])
    parts = [Read(*(getattr(r, n)[:1] for n in ("value", "there", "states", "last"))) for r in (source, target)]
    one = labelled_loss(MixupConfig(), parts[0], parts[1], cross_entropy([0]), "classification", [1])
    torch.testing.assert_close(both, one + task(target.value)[1])


def test_options_are_one_distribution() -> None:
    def task(logits: torch.Tensor) -> torch.Tensor:
        return torch.stack([functional.cross_entropy(p, torch.tensor(1)) for p in logits.split([2, 3])])

    source = made(torch.zeros(5), torch.zeros(5, 1, 2))
    target = made(torch.tensor([math.log(3), 0, 0, 0, 0]), torch.full((5, 1, 2), 2.0))
    config = MixupConfig(source_loss=0.4)
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    first = 0.4 * math.log(2) + 0.6 * math.log(4)
    found = labelled_loss(config, source, target, task, "multiple_choice", [2, 3])
    assert float(found) == pytest.approx(first + math.log(3) + divergence + 4 + 4, rel=1e-5)
    # An item of which one option has no source: its states count as far as they can, its answers do not.
    source.there[1] = False
    found = labelled_loss(config, source, target, task, "multiple_choice", [2, 3])
    assert float(found) == pytest.approx(math.log(4) + math.log(3) + 2 + 4, rel=1e-5)


def test_spans_leave_the_source_out() -> None:
    source, target = made(torch.randn(2, 1, 3), torch.ones(1, 2, 2)), made(torch.randn(2, 1, 4), torch.zeros(1, 3, 2))
    source.last[0, 1] = 3
    target.there[0, 2] = False
    target.last[0, 2] = 1000  # padding
    found = labelled_loss(MixupConfig(), source, target, lambda logits: logits[:, :, 0].sum(0), "span", [1])
    assert float(found) == pytest.approx(float(target.value[:, 0, 0].sum()) + 4, rel=1e-5)


def test_pairs_by_hand() -> None:
    # A vocabulary of two whose logits are the states themselves; two texts with one and two answer tokens.
    source = Read(torch.zeros(3, 2), torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, 1, 2), torch.ones(2, 1, 2))
    states = torch.tensor([[math.log(3), 0.0]] * 3, requires_grad=True)
    target = Read(states, source.there, source.states, torch.tensor([[[2.0, 1]], [[1.0, 5]]]))
    config = MixupConfig(states=2, predictions=3)

    def task(x: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(x, torch.ones(3, dtype=torch.long), reduction="sum")

    found = paired_loss(config, source, target, task, lambda x: x, [1, 2], alike=True)
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    own = 3 * (0.4 * math.log(2) + 0.6 * math.log(4))
    assert found.item() == pytest.approx(own + 2 * (0.5 + 2 * 8) + 3 * 3 * divergence, rel=1e-5)
    other = paired_loss(config, source, target, task, lambda x: x, [1, 2], alike=False)
    assert other.item() == pytest.approx(3 * math.log(4) + 2 * (0.5 + 2 * 8), rel=1e-5)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 4)
    values = [torch.randn(5, 4, requires_grad=True) for _ in range(2)]
    found = []
    for size in (64, 2):
        monkeypatch.setattr("lingraft.fusion.xmixup_losses.CHUNK", size)
        reads = [
            Read(v, torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)) for v in values
        ]
        loss = paired_loss(
            MixupConfig(), reads[0], reads[1], lambda x: x.sum(), lambda x: project(x, weight), [5], alike=True
        )
        found.append((loss, *torch.autograd.grad(loss, values)))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", ["span", "multiple_choice"])
def test_other_heads_read_and_learn_too(encoder: Backbone, kind: Any) -> None:
    model, mixup = encoder.headed(Head(kind)).model, Mixup(encoder, MixupConfig())
    rows, beside = (
        [Row(r, (0,) * len(r), 1, tuple((n, n + 1) for n in range(len(r) - 2))) for r in many]
        for many in (TARGETS, SOURCES)
    )
    beside[2] = rows[2]  # This one has no source: it stands in for it.
    pair = [
        Texts(partial(_logits, encoder, model, some, kind), [len(r.ids) * n for r, n in zip(some, there, strict=True)])
        for some, there in ((beside, (1, 1, 0)), (rows, (1, 1, 1)))
    ]
    source, target = mixup.both(model, *pair)

    def task(logits: torch.Tensor) -> torch.Tensor:
        if kind == "span":
            return sum(
                functional.cross_entropy(side, torch.ones(3, dtype=torch.long), reduction="none") for side in logits
            )  # pyright: ignore
        return torch.stack([functional.cross_entropy(part, torch.tensor(0)) for part in logits.split([2, 1])])

    counts = [1, 1, 1] if kind == "span" else [2, 1]
    loss = labelled_loss(mixup.config, source, target, task, kind, counts)
    plain = task(_logits(encoder, model, rows, kind))
    slopes = torch.autograd.grad(loss, list(mixup.parameters()))
    assert torch.isfinite(loss) and all(torch.isfinite(s) and s for s in slopes)
    torch.testing.assert_close(task(target.value)[-1], plain[-1])
    answer = mixup.logits(model, pair[0], pair[1], kind)
    if kind == "span":
        assert torch.equal(answer, target.value)
    else:
        torch.testing.assert_close(answer[:2], (source.value + target.value)[:2] / 2)


# Learning


def words(label: int, number: int, start: int) -> tuple[int, ...]:
    """A text whose label is a word of its language, among others."""
    return (1, start + 10 + number, start + label, start + 20 + number, 2)


ITEMS = [(label, n) for n in range(4) for label in LABELS]


@pytest.mark.parametrize("name", ["bert", "xlm-roberta"])
def test_an_encoder_learns(backbones: dict[str, Backbone], name: str) -> None:
    backbone = backbones[name]
    mixup = Mixup(backbone, MixupConfig())
    rows = {start: [Row(ids := words(*i, start), (0,) * len(ids)) for i in ITEMS] for start in (30, 130)}
    chosen = [LabelledSequence((row,), (i[0],), HEAD) for row, i in zip(rows[130], ITEMS, strict=True)]
    config, tensors = fresh(backbone, AdapterConfig(rank=4, dropout=0), 0, HEAD)
    with backbone.attached(peft_config(config), tensors, HEAD) as wrapped:
        wrapped.train()
        model = wrapped.get_base_model()
        pair = [
            Texts(partial(_logits, backbone, model, rows[s], "classification"), [len(r.ids) for r in rows[s]])
            for s in (30, 130)
        ]
        parameters = {
            **dict(mixup.named_parameters()),
            **{n: p for n, p in wrapped.named_parameters() if p.requires_grad},
        }
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0)
        losses = []
        for step in range(40):
            source, target = mixup.both(model, *pair)
            task = cross_entropy([s.target[0] for s in chosen])
            loss = labelled_loss(mixup.config, source, target, task, "classification", [1] * len(chosen))
            optimizer.zero_grad()
            loss.backward()
            if step == 1:  # B of a LoRA starts at zero, and so does what reaches A.
                untouched = [n for n, p in parameters.items() if p.grad is None or not p.grad.any()]
            optimizer.step()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            answers = mixup.logits(model, *pair, "classification").argmax(-1).tolist()
    assert losses[-1] < 0.2 * losses[0]
    assert answers == [label for label, _ in ITEMS]
    assert not [n for n in untouched if not n.endswith("key.bias")]
    assert not torch.equal(mixup.weight, torch.ones(()))


def test_an_encoder_decoder_learns(backbones: dict[str, Backbone]) -> None:
    backbone = backbones["t5"]
    mixup = Mixup(backbone, MixupConfig())
    answers = [(70 + label, 2) for label, _ in ITEMS]
    weight: Any = backbone.model.get_output_embeddings().weight  # pyright: ignore
    config, tensors = fresh(backbone, AdapterConfig(rank=8, dropout=0), 0, None)
    with backbone.attached(peft_config(config), tensors) as wrapped:
        wrapped.train()
        labels = torch.tensor([token for answer in answers for token in answer])

        def run(start: int) -> torch.Tensor:
            ids, mask = _padded(backbone, [words(*i, start)[1:] for i in ITEMS])
            read = backbone.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
            return _states(backbone, read, mask, answers)[0]

        first, second = (Texts(partial(run, start), [4] * len(ITEMS)) for start in (30, 130))
        trained = [*mixup.parameters(), *(p for p in wrapped.parameters() if p.requires_grad)]
        optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0)
        losses = []
        for _ in range(40):
            source, target = mixup.both(backbone.model, first, second)
            loss = paired_loss(
                mixup.config,
                source,
                target,
                lambda here: summed_cross_entropy(here, weight, labels),
                partial(project, weight=weight),
                [2] * len(ITEMS),
                alike=True,
            )
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None for p in mixup.parameters())
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
