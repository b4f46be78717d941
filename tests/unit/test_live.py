"""λ changed in place on a loaded model is the merge at that λ, for every structure whose rule is a straight line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lingraft import Adapter, Divergence
from lingraft.backbones import Backbone
from lingraft.errors import AdapterError, LingraftError
from lingraft.live import LiveGraft, adapter_parameters, grafted, line
from lingraft.merging import Graft
from tests.unit.adapters import rewrite, write_structure

LAYER = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}
SHAPES = {f"model.layers.{layer}.{name}": shape for layer in (0, 1) for name, shape in LAYER.items()}
"""The linear layers of the tiny Llama: out × in."""
HOW: dict[str, tuple[str, dict[str, Any]]] = {
    "lora, factors": ("lora", {}),
    "lora, product": ("lora", {"space": "product"}),
    "lora, cross": ("lora", {"method": "cross"}),
    "lora, arimerge": ("lora", {"method": "arimerge"}),
    "lora, arimerge-add": ("lora", {"method": "arimerge-add"}),
    "lora, some sites": ("lora", {"modules": "attention.query,down_proj"}),
    "lora, rules": ("lora", {"rules": [("layer:1", 0.3), ("attention.query", 0.0)]}),
    "lora, product, rules": ("lora", {"space": "product", "rules": [("layer:1", 0.3), ("attention.query", 0.0)]}),
    "lora, product, some sites": ("lora", {"space": "product", "modules": "feed_forward", "rules": [("layer:0", 2.0)]}),
    "ia3": ("ia3", {}),
    "ia3, rules": ("ia3", {"rules": [("feed_forward", 0.5)]}),
    "ia3, guard": ("ia3", {"guards": {"floor": 0.9, "bound": 1.1}}),
    "ia3, cross": ("ia3", {"method": "cross"}),
    "ia3, arimerge": ("ia3", {"method": "arimerge"}),
    "prefix": ("prefix", {}),
    "prefix, flat": ("prefix", {"space": "flat"}),
    "prefix, rules": ("prefix", {"rules": [("layer:0", 0.4)]}),
    "prefix, cross": ("prefix", {"method": "cross"}),
    "bottleneck": ("bottleneck", {}),
    "bottleneck, rules": ("bottleneck", {"rules": [("layer:1", 1.4)]}),
    "bottleneck, cross": ("bottleneck", {"method": "cross"}),
}
WEIGHTS = (0.25, 1.0, 0.6)
IDS = torch.from_numpy(np.random.default_rng(1).integers(3, 200, size=(2, 15)))
ARIMERGE = [name for name in HOW if "arimerge" in name]


def parts(tmp_path: Path, structure: str, **how: Any) -> tuple[Adapter, Divergence]:
    """A task and a divergence; for LoRA their scalings differ."""
    found = []
    for n, name in enumerate(("task", "target", "source")):
        scaling = {"lora_alpha": (4, 3, 7)[n]} if structure == "lora" else {}
        folder = write_structure(tmp_path / name, structure, n, shapes=SHAPES, **{**scaling, **how})
        if structure == "lora":  # Updates much larger than the weights would multiply every rounding.
            rewrite(folder, lambda name, tensor: (0.2 * tensor).astype(tensor.dtype))
        found.append(Adapter.load(folder))
    return found[0], found[1] - found[2]


def logits(backbone: Backbone) -> torch.Tensor:
    with torch.no_grad():
        return backbone.model(input_ids=IDS).logits


def with_merge(backbone: Backbone, graft: Graft, task: Adapter, divergence: Divergence) -> torch.Tensor:
    with backbone.with_adapter(graft.onto(task, divergence)):
        return logits(backbone)


def assert_close(x: torch.Tensor, y: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert float((x - y).abs().max()) <= tolerance * (1 + float(y.abs().max()))


@pytest.mark.parametrize(("structure", "how"), HOW.values(), ids=HOW)
def test_a_weight_set_in_place_is_the_merge_at_that_weight(
    tiny: Backbone, tmp_path: Path, structure: str, how: dict[str, Any]
) -> None:
    task, divergence = parts(tmp_path, structure)
    base = logits(tiny)
    graft = Graft(0.4, **how)
    expected = {w: with_merge(tiny, replace(graft, weight=w), task, divergence) for w in (0.4, *WEIGHTS, 0.0)}
    with grafted(tiny, task, divergence, graft) as live:
        assert live.weight == 0.4
        assert_close(logits(tiny), expected[0.4])
        for weight in (*WEIGHTS, 0.0):
            live.set_weight(weight)
            assert live.weight == weight
            assert_close(logits(tiny), expected[weight])
    assert float((expected[1.0] - expected[0.25]).abs().max()) > 1e-3
    assert torch.equal(logits(tiny), base), "the base is as before"


@pytest.mark.parametrize(("structure", "how"), HOW.values(), ids=HOW)
def test_back_and_forth_does_not_drift(tiny: Backbone, tmp_path: Path, structure: str, how: dict[str, Any]) -> None:
    task, divergence = parts(tmp_path, structure)
    with tiny.with_adapter(replace(Graft(1.0, **how), weight=1.0).onto(task, divergence)) as wrapped:
        parameters = adapter_parameters(wrapped)
        live = LiveGraft(parameters, task, divergence, Graft(0.3, **how))

        def numbers() -> list[torch.Tensor]:
            return [p.detach().clone() for p in parameters.values()]

        def equal(x: list[torch.Tensor], y: list[torch.Tensor]) -> bool:
            return all(torch.equal(a, b) for a, b in zip(x, y, strict=True))

        first = numbers()
        live.set_weight(0.0)
        nothing = numbers()
        assert not equal(first, nothing)
        for weight in np.random.default_rng(0).uniform(0, 1, size=50):
            live.set_weight(float(weight))
        live.set_weight(0.3)
        assert equal(numbers(), first)
        live.set_weight(0)
        assert equal(numbers(), nothing)


OWN = [name for name in HOW if name not in ARIMERGE and "rules" not in name and "product" not in name]


@pytest.mark.parametrize("name", OWN)
def test_a_weight_of_zero_is_the_task_bit_for_bit(tiny: Backbone, tmp_path: Path, name: str) -> None:
    structure, how = HOW[name]
    task, divergence = parts(tmp_path, structure)
    expected = dict(task.tensors())
    with tiny.with_adapter(Graft(1.0, **how).onto(task, divergence)) as wrapped:
        parameters = adapter_parameters(wrapped)
        live = LiveGraft(parameters, task, divergence, Graft(0.7, **how))
        live.set_weight(0)
        assert set(parameters) == set(expected)
        for key, parameter in parameters.items():
            assert np.array_equal(parameter.detach().numpy(), expected[key]), key


def test_in_product_space_a_weight_of_zero_is_the_task_beside_zeros(tiny: Backbone, tmp_path: Path) -> None:
    task, divergence = parts(tmp_path, "lora")
    graft = Graft(0.7, space="product")
    alone = with_merge(tiny, Graft(0), task, divergence)
    with tiny.with_adapter(graft.onto(task, divergence)) as wrapped:
        parameters = adapter_parameters(wrapped)
        live = LiveGraft(parameters, task, divergence, graft)
        live.set_weight(0)
        for name, tensor in task.tensors():
            found = parameters[name].detach().numpy()
            if name.endswith("lora_A.weight"):
                assert np.array_equal(found[: len(tensor)], tensor)
            else:
                assert np.array_equal(found[:, : tensor.shape[1]], tensor)  # the task's scaling is 1
                assert not found[:, tensor.shape[1] :].any()
        assert_close(logits(tiny), alone, 1e-6)


@pytest.mark.parametrize("rules", [[], [("layer:1", 0.5)]], ids=str)
def test_in_product_space_sites_that_the_task_lacks_are_grafted_too(
    tiny: Backbone, tmp_path: Path, rules: list[tuple[str, float]]
) -> None:
    q = {m: s for m, s in SHAPES.items() if m.endswith("q_proj")}
    task = Adapter.load(write_structure(tmp_path / "q", "lora", 9, shapes=q))
    _, divergence = parts(tmp_path, "lora")
    graft = Graft(0.4, space="product", rules=rules)
    expected = {w: with_merge(tiny, replace(graft, weight=w), task, divergence) for w in (0.0, 0.4, 1.0)}
    with grafted(tiny, task, divergence, graft) as live:
        for weight in (0.4, 1.0, 0.0):
            live.set_weight(weight)
            assert_close(logits(tiny), expected[weight])


def test_in_product_space_sites_that_no_reference_has_stay_the_tasks(tiny: Backbone, tmp_path: Path) -> None:
    few = {m: s for m, s in SHAPES.items() if m.endswith(("q_proj", "v_proj"))}
    task = Adapter.load(write_structure(tmp_path / "all", "lora", 9, shapes=SHAPES, lora_alpha=1))
    assert {place.scaling for place in task.layout.values()} != {1.0}
    target, source = (Adapter.load(write_structure(tmp_path / str(n), "lora", n, shapes=few)) for n in (1, 2))
    graft = Graft(0.4, space="product")
    merged = graft.onto(task, target - source)
    for module in set(SHAPES) - set(few):
        assert merged.layout[module] == task.layout[module]
    expected = {w: with_merge(tiny, replace(graft, weight=w), task, target - source) for w in (0.0, 0.4, 1.0)}
    with grafted(tiny, task, target - source, graft) as live:
        for weight in (0.4, 1.0, 0.0):
            live.set_weight(weight)
            assert_close(logits(tiny), expected[weight])


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_without_meaning_is_refused_and_changes_nothing(tiny: Backbone, tmp_path: Path, weight: float) -> None:
    task, divergence = parts(tmp_path, "ia3")
    with grafted(tiny, task, divergence, Graft(0.5)) as live:
        before = logits(tiny)
        with pytest.raises(AdapterError, match="finite number"):
            live.set_weight(weight)
        assert live.weight == 0.5
        assert torch.equal(logits(tiny), before)


@pytest.mark.parametrize("name", ARIMERGE)
def test_arimerges_weight_ends_at_one_in_place_as_well(tiny: Backbone, tmp_path: Path, name: str) -> None:
    structure, how = HOW[name]
    task, divergence = parts(tmp_path, structure)
    with grafted(tiny, task, divergence, Graft(0.5, **how)) as live:
        live.set_weight(1.0)
        with pytest.raises(LingraftError, match="0 to 1"):
            live.set_weight(1.2)
        assert live.weight == 1.0


def test_a_compressed_merge_is_refused(tiny: Backbone, tmp_path: Path) -> None:
    task, divergence = parts(tmp_path, "lora")
    graft = Graft(0.5, space="product", out_rank=4)
    base = logits(tiny)
    with pytest.raises(AdapterError, match="no straight line") as caught, grafted(tiny, task, divergence, graft):
        pass
    assert "output rank" in str(caught.value.remedy)
    with pytest.raises(AdapterError, match="no straight line"):
        line(graft, task, divergence)
    assert torch.equal(logits(tiny), base)


def test_the_printed_form_for_prefixes_jumps_at_zero_and_is_refused(tiny: Backbone, tmp_path: Path) -> None:
    """`λ·D·T` is no line that begins at the task, which is what a weight of 0 is."""
    task, divergence = parts(tmp_path, "prefix")
    with (
        pytest.raises(AdapterError, match="no straight line"),
        grafted(tiny, task, divergence, Graft(0.5, space="literal")),
    ):
        pass


def test_the_line_goes_through_the_merges(tmp_path: Path) -> None:
    for name, (structure, how) in HOW.items():
        (tmp_path / name).mkdir()
        task, divergence = parts(tmp_path / name, structure)
        start, slope = line(Graft(0.9, **how), task, divergence)
        for weight in (0.5, 1.0):
            merged = dict(Graft(weight, **how).onto(task, divergence).tensors())
            assert set(merged) == set(start)
            for key, tensor in merged.items():
                np.testing.assert_allclose(start[key] + weight * slope[key], tensor, rtol=0, atol=2e-5, err_msg=name)


def test_parameters_of_another_adapter_are_refused(tiny: Backbone, tmp_path: Path) -> None:
    task, divergence = parts(tmp_path, "lora")
    other = Adapter.load(write_structure(tmp_path / "other", "ia3", 1, shapes=SHAPES))
    with tiny.with_adapter(other) as wrapped, pytest.raises(AdapterError, match="other tensors"):
        LiveGraft(adapter_parameters(wrapped), task, divergence, Graft(0.5))


def test_the_base_is_restored_when_the_block_ends_in_an_error(tiny: Backbone, tmp_path: Path) -> None:
    base = logits(tiny)
    for structure in ("lora", "ia3", "prefix", "bottleneck"):
        (tmp_path / structure).mkdir()
        task, divergence = parts(tmp_path / structure, structure)
        with pytest.raises(ZeroDivisionError), grafted(tiny, task, divergence, Graft(0.5)):
            assert not torch.equal(logits(tiny), base)
            raise ZeroDivisionError
        assert torch.equal(logits(tiny), base)
        assert not any(p.requires_grad for p in tiny.model.parameters())


def test_all_parameters_share_one_block_of_memory(tiny: Backbone, tmp_path: Path) -> None:
    task, divergence = parts(tmp_path, "bottleneck")
    with tiny.with_adapter(Graft(1.0).onto(task, divergence)) as wrapped:
        parameters = adapter_parameters(wrapped)
        LiveGraft(parameters, task, divergence, Graft(0.5))
        assert len({p.untyped_storage().data_ptr() for p in parameters.values()}) == 1


@pytest.mark.parametrize("structure", ["lora", "ia3", "prefix", "bottleneck"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_adapters_of_half_precision_are_grafted_in_the_models_type(
    tiny: Backbone, tmp_path: Path, structure: str, dtype: Any
) -> None:
    task, divergence = parts(tmp_path, structure, dtype=dtype)
    expected = with_merge(tiny, Graft(0.6), task, divergence)
    with grafted(tiny, task, divergence, Graft(0.2)) as live:
        live.set_weight(0.6)
        assert_close(logits(tiny), expected)
