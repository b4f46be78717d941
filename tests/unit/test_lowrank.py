"""LoRA's layers as one node: equal to plain PEFT's, forward and backward, and dropout that is a function of text and layer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from lingraft.dropping import _Drop, drawn, dropped, number_of, places_of, quick_dropout
from lingraft.modules.lowrank import quicken
from lingraft.rows import Rows, Segment


class Two(torch.nn.Module):
    """Two linear layers and something between them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 10, dtype=dtype), torch.nn.Linear(10, 4, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def wrapped(names: tuple[str, ...] = ("default",), dropout: float = 0.0, **given: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules=["first", "second"], **given)
    model = get_peft_model(Two(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(names))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True).data.normal_()
    return model


def gradients(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    x = x.clone().requires_grad_()
    out = model(x)
    (out.square().sum()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "out": out.detach(), "x": x.grad}  # type: ignore[dict-item]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert set(a) == set(b)
    for name in a:
        size = max(1.0, float(a[name].abs().max()))
        assert float((a[name] - b[name]).abs().max()) <= tolerance * size, name


@given(rows=st.integers(1, 4), length=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_states_and_gradients_are_pefts(rows: int, length: int, seed: int) -> None:
    x = torch.randn(rows, length, 6, generator=torch.Generator().manual_seed(seed))
    model = wrapped()
    usual = gradients(model, x)
    quicken(model, Rows())
    same(usual, gradients(model, x), 1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), usual["out"])


def test_two_adapters_on_one_layer_add_as_in_peft() -> None:
    x, model = torch.randn(3, 4, 6), wrapped(("one", "two"))
    usual = gradients(model, x)
    quicken(model, Rows())
    same(usual, gradients(model, x))


def test_a_base_layer_that_is_listened_to_is_called() -> None:
    x, model = torch.randn(2, 3, 6), wrapped()
    model.base_model.model.first.base_layer.register_forward_hook(lambda layer, args, out: out + 1)
    usual = gradients(model, x)
    quicken(model, Rows())
    same(usual, gradients(model, x))


@pytest.mark.parametrize("unusual", ["hook", "dora", "bias", "off", "merged"])
def test_what_is_unusual_is_left_to_peft(unusual: str) -> None:
    x = torch.randn(2, 3, 6)
    model = wrapped(use_dora=unusual == "dora", lora_bias=unusual == "bias")
    usual_layer = model.base_model.model.first
    if unusual == "hook":
        for layer in (usual_layer, model.base_model.model.second):
            layer.lora_A["default"].register_forward_hook(lambda layer, args, out: torch.relu(out))
    if unusual == "merged":
        model.merge_adapter()
    if unusual == "off":
        with model.disable_adapter():
            usual = model(x)
        quicken(model, Rows())
        with model.disable_adapter():
            assert torch.equal(model(x), usual)
        return
    usual = model(x)
    quicken(model, Rows())
    assert torch.equal(model(x), usual)


def test_in_bfloat16_as_near_to_exact_as_peft() -> None:
    x, exact = torch.randn(4, 16, 6), wrapped()
    truth = gradients(exact, x)
    errors = []
    for quick in (False, True):
        model = wrapped()
        for layer in (model.base_model.model.first, model.base_model.model.second):
            layer.base_layer.to(torch.bfloat16)
        if quick:
            quicken(model, Rows())
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(model, x)
        errors.append({n: float((found[n].float() - truth[n]).norm() / truth[n].norm()) for n in truth})
    for name, error in errors[1].items():
        assert error < max(1.5 * errors[0][name], 0.004), name


def test_rows_meet_the_adapter_of_their_lane() -> None:
    x, names = torch.randn(5, 4, 6), ("one", "two")
    model, rows = wrapped(names), Rows()
    alone = {}
    for name in names:
        model.base_model.set_adapter([name])
        for n, p in model.named_parameters():
            p.requires_grad_("lora_" in n)
        alone[name] = gradients(model, x[:2] if name == "one" else x[2:])
    quicken(model, rows)
    with rows.told(lanes=(("one", 2), ("two", 3))):
        together = gradients(model, x)
    expected = {key: torch.cat([alone[n][key] for n in names]) for key in ("out", "x")}
    expected |= {key: t for name in names for key, t in alone[name].items() if f".{name}." in key}
    same(expected, together)


def test_rows_that_are_not_the_lanes_are_refused() -> None:
    from lingraft.errors import AdapterError

    model, rows = wrapped(("one", "two")), Rows()
    quicken(model, rows)
    with rows.told(lanes=(("one", 2), ("two", 3))), pytest.raises(AdapterError, match="trained together"):
        model(torch.randn(4, 2, 6))


# Dropout


@given(st.integers(1, 3000), st.floats(0.001, 0.95), st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_places_ascend_and_lie_inside(count: int, share: float, seed: int) -> None:
    found = places_of(count, share, (seed, 1))
    assert np.all(np.diff(found) > 0)
    assert not len(found) or (found[0] >= 0 and found[-1] < count)
    assert np.array_equal(found, places_of(count, share, (seed, 1)))


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3, 0.9])
def test_every_place_is_dropped_with_the_same_chance(share: float) -> None:
    rounds, count = 4000, 40
    hits = np.zeros(count)
    pairs = 0
    for seed in range(rounds):
        found = places_of(count, share, (seed, 7))
        hits[found] += 1
        pairs += np.isin(found + 1, found).sum()
    spread = (rounds * share * (1 - share)) ** 0.5
    assert np.abs(hits - rounds * share).max() < 4.5 * spread
    # Neighbours are dropped together as often as chance has it.
    expected = rounds * (count - 1) * share**2
    assert abs(pairs - expected) < 6 * max(expected, 1) ** 0.5


def test_layers_and_texts_draw_differently() -> None:
    draws = {tuple(places_of(1000, 0.1, seed)) for seed in [(1, 1), (1, 2), (2, 1), (2, 2)]}
    assert len(draws) == 4


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_the_layout_changes_nothing_that_is_dropped(lengths: list[int], more: int) -> None:
    width, share = 16, 0.3

    def kept(layout: list[tuple[int, int]], shape: tuple[int, int]) -> list[torch.Tensor]:
        segments = [Segment(r, s, n, 50 + i) for i, ((r, s), n) in enumerate(zip(layout, lengths, strict=True))]
        x = torch.ones(*shape, width)
        out = dropped(x, drawn(x, share, 3, segments))
        return [out[r, s : s + n] for (r, s), n in zip(layout, lengths, strict=True)]

    apart = kept([(i, 0) for i in range(len(lengths))], (len(lengths), max(lengths) + more))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    packed = kept([(0, s) for s in starts], (1, sum(lengths) + more))
    backwards = kept([(len(lengths) - 1 - i, 0) for i in range(len(lengths))], (len(lengths), max(lengths)))
    for a, b, c in zip(apart, packed, backwards, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_lane_draws_what_its_texts_draw_alone() -> None:
    segments = [Segment(n, 0, 5, 10 + n) for n in range(4)]
    x = torch.ones(4, 5, 8)
    whole = dropped(x, drawn(x, 0.3, 1, segments))
    part = dropped(x[2:], drawn(x, 0.3, 1, segments, slice(2, 4)))
    assert torch.equal(whole[2:], part)


def test_gradients_with_dropout_are_those_of_the_function_that_was_computed() -> None:
    """Plain PEFT, its dropout replaced by the very places that were drawn."""
    segments = tuple(Segment(n, 0, 4, 100 + n) for n in range(3))
    x, share = torch.randn(3, 4, 6), 0.4
    model = wrapped(dropout=share)
    model.train()
    rows = Rows(segments=segments)
    quicken(model, rows)
    quick = gradients(model, x)
    plain = wrapped(dropout=share)
    plain.train()
    for layer in (plain.base_model.model.first, plain.base_model.model.second):
        number = number_of(next(n for n, m in plain.named_modules() if m is layer))
        layer.lora_dropout["default"] = Fixed(lambda s, k=number: drawn(s, share, k, segments), share)
    same(quick, gradients(plain, x))


class Fixed(torch.nn.Module):
    def __init__(self, places: Callable[[torch.Tensor], torch.Tensor], share: float) -> None:
        super().__init__()
        self.places, self.share = places, share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep = dropped(torch.ones_like(x), self.places(x))
        return x * keep / (1 - self.share)


def test_without_texts_dropout_is_a_function_of_the_global_state() -> None:
    x, model = torch.randn(3, 4, 6), wrapped(dropout=0.5)
    model.train()
    quicken(model, Rows())
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_models_own_dropout_is_drawn_so_too_and_is_torchs_again_afterwards() -> None:
    class Dropping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(x)

    model, x = Dropping().train(), torch.ones(2, 3, 8, requires_grad=True)
    rows = Rows(segments=(Segment(0, 0, 3, 5), Segment(1, 0, 3, 6)))
    with quick_dropout(model, rows):
        first, second = model(x), model(x)
        assert torch.equal(first, second)
        assert set(first.unique().tolist()) == {0.0, 2.0}
        first.sum().backward()
        assert torch.equal(x.grad, first.detach())  # type: ignore[arg-type]
        model.eval()
        assert torch.equal(model(x), x)
    assert "forward" not in vars(model.drop)


def test_the_gradient_of_dropout() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([0, 5, 23])
    assert torch.autograd.gradcheck(lambda v: _Drop.apply(v, places, 0.3), (x,))


def test_the_gradients_of_a_layer() -> None:
    from lingraft.modules.lowrank import _LowRank, _Piece

    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    weight, bias = draw(5, 4).detach(), draw(5).detach()
    pieces = [_Piece(0, 2, 0.7, torch.tensor([1, 6])), _Piece(2, 6, 1.3, None)]
    inputs = (draw(2, 3, 4), draw(2, 4), draw(5, 2), draw(2, 4), draw(5, 2))
    assert torch.autograd.gradcheck(lambda x, *f: _LowRank.apply(x, weight, bias, None, pieces, *f), inputs)
    given_ = draw(2, 3, 5)
    assert torch.autograd.gradcheck(
        lambda x, g, *f: _LowRank.apply(x, None, None, g, pieces, *f), (inputs[0], given_, *inputs[1:])
    )


def test_the_first_layer_asks_for_no_gradient_of_what_it_reads() -> None:
    model = wrapped()
    quicken(model, Rows())
    out = model(torch.randn(2, 3, 6))
    out.sum().backward()
    assert out.grad_fn is not None
    node = out.grad_fn.next_functions[0][0]  # behind a view
    assert node is not None
    below = [edge for edge, _ in node.next_functions if edge is not None]
    assert len(below) == 3  # what was read, and two factors
    first = next(edge for edge in below if "Tanh" in edge.name()).next_functions[0][0].next_functions[0][0]
    assert first.next_functions[0][0] is None


def test_what_a_layer_gives_may_be_written_over() -> None:
    """OLMo clips queries, keys and values in place."""

    class Clipping(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.first(x)
            first.clamp_(-0.5, 0.5)
            return self.second(first)

    torch.manual_seed(0)
    model = get_peft_model(Clipping(), LoraConfig(r=3, target_modules=["first", "second"], init_lora_weights=False))
    x = torch.randn(3, 4, 6)
    usual = gradients(model, x)
    quicken(model, Rows())
    same(usual, gradients(model, x))


@pytest.mark.parametrize("cut", ["first token", "channels"])
def test_states_that_are_cut_out_of_others_are_dropped_out_too(cut: str) -> None:
    class Cutting(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(x[:, 0] if cut == "first token" else x[..., :6])))

    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["first", "second"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(Cutting(), config).train()
    rows = Rows(segments=(Segment(0, 0, 4, 1), Segment(1, 0, 4, 2)))
    quicken(model, rows)
    x = torch.randn(2, 4, 6 if cut == "first token" else 9, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_another_type_than_autocast_s_is_as_in_peft(dtype: torch.dtype) -> None:
    """T5's `wo` stays in float32 where the rest of the model is in float16."""
    model, x = wrapped(), torch.randn(3, 4, 6)
    model.base_model.model.second.base_layer.to(dtype)
    with torch.autocast("cpu", dtype):
        usual = gradients(model, x)
        quicken(model, Rows())
        found = gradients(model, x)
    assert found["out"].dtype == usual["out"].dtype
    same({k: v.float() for k, v in usual.items()}, {k: v.float() for k, v in found.items()}, 0.03)


def test_a_chance_of_almost_nothing_drops_almost_nothing() -> None:
    assert sum(len(places_of(1000, 1e-18, (seed, 1))) for seed in range(50)) == 0
