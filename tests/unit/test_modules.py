"""Bottleneck adapters: the formula, PEFT's life cycle around it, and PEFT learning of them by `import lingraft`."""

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import (
    PeftModel,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from lingraft import _peft_hook
from lingraft.errors import AdapterError, ConfigError
from lingraft.modules import register
from lingraft.modules.bottleneck import ACTIVATIONS, BottleneckConfig, BottleneckLayer, BottleneckModel
from tests.conftest import save_tiny_model

DECODER = ["self_attn.o_proj", "mlp.down_proj"]
IDS = torch.tensor([[1, 20, 30, 40, 50, 60]])

# PEFT warns of the name 'en', which is a part of 'bottleneck_'; the tests show that it does no harm.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter name 'en'", "ignore:.*is_gradient_checkpointing")


@pytest.fixture
def base(tiny_folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


def shake(model: nn.Module, seed: int = 1, name: str = "default") -> None:
    """Random values in an adapter, so that it is no identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, BottleneckLayer):
            for branch in (module.bottleneck_down, module.bottleneck_up):
                for parameter in branch[name].parameters():
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


REFERENCE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda h: np.maximum(h, 0),
    "gelu": lambda h: h * (1 + np.vectorize(math.erf)(h / 2**0.5)) / 2,
    "silu": lambda h: h / (1 + np.exp(-h)),
    "tanh": np.tanh,
}


def by_formula(layer: BottleneckLayer, y: np.ndarray, activation: str, name: str = "default") -> np.ndarray:
    """The branch of one adapter, without the base's output, in float64."""
    down, up = (b[name].double().state_dict() for b in (layer.bottleneck_down, layer.bottleneck_up))
    h = REFERENCE[activation](y @ down["weight"].numpy().T + down["bias"].numpy())
    return h @ up["weight"].numpy().T + up["bias"].numpy()


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_forward_is_the_formula(activation: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(7, 5).double()
    layer = BottleneckLayer(linear, "default", 3, activation)
    shake(layer)
    layer.double()
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    y = linear(x).detach().numpy()
    expected = y + by_formula(layer, y, activation)
    assert layer(x).dtype == torch.float64
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_a_fresh_adapter_is_the_identity_and_starts_as_documented(base: nn.Module) -> None:
    before = logits(base)
    torch.manual_seed(0)
    wrapped = get_peft_model(base, BottleneckConfig(target_modules=DECODER, bottleneck_size=64))
    assert torch.equal(logits(wrapped), before)
    state = get_peft_model_state_dict(wrapped)
    assert {k: tuple(v.shape) for k, v in state.items() if ".0." in k} == {
        f"base_model.model.model.layers.0.{module}.bottleneck_{end}": shape
        for module in DECODER
        for end, shape in {
            "down.weight": (64, 32),
            "down.bias": (64,),
            "up.weight": (32, 64),
            "up.bias": (32,),
        }.items()
    }
    assert len(state) == 16
    downs = torch.cat([v.flatten() for k, v in state.items() if k.endswith("down.weight")])
    assert downs.dtype == torch.float32
    assert float(downs.std()) == pytest.approx(0.02, rel=0.05)
    assert float(downs.mean()) == pytest.approx(0, abs=0.002)
    assert all(not v.any() for k, v in state.items() if not k.endswith("down.weight"))


def test_gradients_flow_only_into_the_adapter_and_train_it(base: nn.Module) -> None:
    before = {k: v.clone() for k, v in base.state_dict().items()}
    wrapped = get_peft_model(base, BottleneckConfig(target_modules=DECODER, bottleneck_size=4, task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = wrapped(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # After the first step W_up is no longer zero, and W_down learns too.
    got = {n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()}
    assert got == {n for n, _ in wrapped.named_parameters() if ".bottleneck_" in n}
    assert losses[-1] < losses[0]
    restored = wrapped.unload()
    assert set(restored.state_dict()) == set(before)
    assert all(torch.equal(v, before[k]) for k, v in restored.state_dict().items())


def test_unloading_restores_the_base_bit_for_bit(base: nn.Module) -> None:
    before, kinds = logits(base), {n: type(m) for n, m in base.named_modules()}
    ids = {n: id(p) for n, p in base.named_parameters()}
    wrapped = get_peft_model(base, BottleneckConfig(target_modules=DECODER))
    shake(wrapped)
    assert not torch.allclose(logits(wrapped), before)
    restored = wrapped.unload()
    assert torch.equal(logits(restored), before)
    assert {n: type(m) for n, m in restored.named_modules()} == kinds
    assert {n: id(p) for n, p in restored.named_parameters()} == ids


def test_two_adapters_are_switched_disabled_added_and_deleted(base: nn.Module) -> None:
    before = logits(base)
    wrapped = get_peft_model(base, BottleneckConfig(target_modules=DECODER, bottleneck_size=4), adapter_name="en")
    wrapped.add_adapter("de", BottleneckConfig(target_modules=DECODER, bottleneck_size=6, activation="tanh"))
    shake(wrapped, 1, "en")
    shake(wrapped, 2, "de")
    english = logits(wrapped)
    wrapped.set_adapter("de")
    german = logits(wrapped)
    assert {n.split(".")[-2] for n, p in wrapped.named_parameters() if p.requires_grad} == {"de"}
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), before)
    assert torch.equal(logits(wrapped), german)
    wrapped.set_adapter("en")
    assert torch.equal(logits(wrapped), english)
    assert len({float(v.sum()) for v in (before, english, german)}) == 3
    assert get_model_status(wrapped).available_adapters == ["de", "en"]
    wrapped.delete_adapter("de")
    assert torch.equal(logits(wrapped), english)
    assert not [n for n, _ in wrapped.named_parameters() if ".de." in n]


def two_adapters(base_layer: nn.Module) -> BottleneckLayer:
    """Adapters called en and de, in float64, both active."""
    layer = BottleneckLayer(base_layer, "en", 3, "relu")
    layer.update_layer("de", 4, "tanh")
    shake(layer, 1, "en")
    shake(layer, 2, "de")
    layer.double()
    layer.set_adapter(["en", "de", "absent"])
    return layer


def test_active_adapters_act_one_after_the_other_in_their_order() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(7, 5).double()
    layer = two_adapters(linear)
    x = torch.randn(6, 7, dtype=torch.float64)
    y = linear(x).detach().numpy()
    english = y + by_formula(layer, y, "relu", "en")
    both = english + by_formula(layer, english, "tanh", "de")
    np.testing.assert_allclose(layer(x).detach().numpy(), both, rtol=1e-12, atol=1e-12)
    layer.set_adapter(["de", "en"])
    german = y + by_formula(layer, y, "tanh", "de")
    other = german + by_formula(layer, german, "relu", "en")
    np.testing.assert_allclose(layer(x).detach().numpy(), other, rtol=1e-12, atol=1e-12)
    assert not np.allclose(both, other)


class RootMeanSquare(nn.Module):
    """A norm that is none of torch's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps = 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, RootMeanSquare])
def test_on_a_norm_the_adapters_read_normalised_states_and_write_to_the_sum(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    norm = kind(5).double()
    norm.weight.data.uniform_(0.5, 1.5)
    layer = two_adapters(norm)
    h, residual = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)

    def plain(s: np.ndarray) -> np.ndarray:
        return norm(torch.from_numpy(s)).detach().numpy()

    s = (h + residual).numpy()
    one = s + by_formula(layer, plain(s), "relu", "en")
    both = one + by_formula(layer, plain(one), "tanh", "de")
    np.testing.assert_allclose(layer(h + residual).detach().numpy(), plain(both), rtol=1e-12, atol=1e-12)
    # One adapter alone, in the words of the adapters library: h + up(relu(down(LN(h + r)))), then LN(· + r).
    layer.set_adapter("en")
    before = h.numpy() + by_formula(layer, plain(s), "relu", "en")
    np.testing.assert_allclose(layer(h + residual).detach().numpy(), plain(before + residual.numpy()), rtol=1e-12)
    for off in (lambda: layer.set_adapter([]), lambda: layer.enable_adapters(False)):
        layer.set_adapter("en")
        off()
        assert torch.equal(layer(h + residual), norm(h + residual))


def test_a_wrapped_norm_shows_the_attributes_of_the_norm() -> None:
    norm = nn.LayerNorm(6, eps=1e-3)
    layer = BottleneckLayer(norm, "default", 2, "relu")
    assert (layer.weight, layer.bias, layer.eps, layer.normalized_shape) == (norm.weight, norm.bias, 1e-3, (6,))
    assert (layer.width, layer.on_norm) == (6, True)
    norm._mark = True
    assert not hasattr(layer, "_mark") and not hasattr(layer, "in_features")
    assert not hasattr(BottleneckLayer(nn.RMSNorm(6), "default", 2, "relu"), "bias")
    linear = BottleneckLayer(nn.Linear(3, 4), "default", 2, "relu")
    assert (linear.in_features, linear.out_features, linear.on_norm) == (3, 4, False)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_a_part_computes_in_its_own_dtype(kind: type[nn.Module]) -> None:
    """A frozen language adapter that somebody cast beside a trained one in float32."""
    torch.manual_seed(0)
    base = (nn.Linear(6, 6) if kind is nn.Linear else nn.LayerNorm(6)).bfloat16()
    layer = BottleneckLayer(base, "language", 4, "relu")
    layer.update_layer("task", 3, "relu")
    for seed, name in enumerate(("language", "task")):
        shake(layer, seed, name)
        for branch in (layer.bottleneck_down, layer.bottleneck_up):
            branch[name].to(torch.bfloat16 if name == "language" else torch.float32)
    layer.set_adapter(["language", "task"])
    seen: list[torch.dtype] = []
    for name in ("language", "task"):
        layer.bottleneck_up[name].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x = torch.randn(3, 6).bfloat16()

    def branch(name: str, states: torch.Tensor) -> torch.Tensor:
        down, up = layer.bottleneck_down[name], layer.bottleneck_up[name]
        return up(torch.relu(down(states.to(down.weight.dtype))))

    if kind is nn.Linear:
        y = base(x)
        y = y + branch("language", y)
        expected = (y + branch("task", y)).bfloat16()
    else:
        s = (x + branch("language", base(x))).bfloat16()
        expected = base((s + branch("task", base(s))).bfloat16())
    seen.clear()
    found = layer(x)
    assert seen == [torch.bfloat16, torch.float32]
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_a_bfloat16_base_keeps_its_dtype_and_the_adapter_float32(tiny_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).eval()
    wrapped = get_peft_model(base, BottleneckConfig(target_modules=DECODER, bottleneck_size=4))
    adapter = {n: p for n, p in wrapped.named_parameters() if ".bottleneck_" in n}
    assert {p.dtype for p in adapter.values()} == {torch.float32}
    # Initial values that were rounded to the base's dtype on their way would survive another rounding.
    down = next(p for n, p in adapter.items() if "bottleneck_down" in n and p.ndim == 2)
    assert not torch.equal(down, down.bfloat16().float())
    shake(wrapped)
    layer = next(m for m in wrapped.modules() if isinstance(m, BottleneckLayer))
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    y = layer.base_layer(x)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    assert torch.equal(layer(x), (y + up(torch.relu(down(y.float())))).bfloat16())
    assert logits(wrapped).dtype == torch.bfloat16
    wrapped.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    for low_memory in (False, True):
        fresh = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).eval()
        again = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_memory)
        loaded = get_peft_model_state_dict(again)
        assert all(v.dtype == torch.float32 and torch.equal(v, state[k]) for k, v in loaded.items())
        assert torch.equal(logits(again), logits(wrapped))


def test_it_works_under_autocast(base: nn.Module) -> None:
    wrapped = get_peft_model(base, BottleneckConfig(target_modules=DECODER, bottleneck_size=4))
    shake(wrapped)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = wrapped(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in wrapped.parameters() if p.requires_grad)
    assert loss.item() == pytest.approx(wrapped(input_ids=IDS, labels=IDS).loss.item(), rel=0.05)


def test_merging_is_refused_and_leaves_the_adapter_where_it_is(base: nn.Module) -> None:
    wrapped = get_peft_model(base, BottleneckConfig(target_modules=DECODER))
    shake(wrapped)
    adapted = logits(wrapped)
    layer = next(m for m in wrapped.modules() if isinstance(m, BottleneckLayer))
    for refused in (wrapped.merge_and_unload, wrapped.merge_adapter, layer.merge):
        with pytest.raises(AdapterError, match="keep the adapter attached"):
            refused()
    assert torch.equal(logits(wrapped), adapted)
    wrapped.unmerge_adapter()
    assert torch.equal(logits(wrapped), adapted)


def test_a_pattern_gives_other_widths(base: nn.Module, tmp_path: Path) -> None:
    pattern = {"o_proj": 3, r"layers\.1\.mlp\.down_proj": 5}
    config = BottleneckConfig(target_modules=DECODER, bottleneck_size=8, bottleneck_pattern=pattern)
    wrapped = get_peft_model(base, config)
    wrapped.save_pretrained(tmp_path)
    found = {
        k.split("layers.")[1].removesuffix(".bottleneck_down.bias"): len(v)
        for k, v in load_file(tmp_path / "adapter_model.safetensors").items()
        if k.endswith("bottleneck_down.bias")
    }
    assert found == {"0.self_attn.o_proj": 3, "1.self_attn.o_proj": 3, "0.mlp.down_proj": 8, "1.mlp.down_proj": 5}
    again = PeftModel.from_pretrained(wrapped.unload(), tmp_path)
    assert again.peft_config["default"].bottleneck_pattern == pattern


def test_two_adapters_are_saved_and_opened_under_their_names(base: nn.Module, tmp_path: Path) -> None:
    wrapped = get_peft_model(base, BottleneckConfig(target_modules=DECODER, bottleneck_size=4), adapter_name="en")
    wrapped.add_adapter("default", BottleneckConfig(target_modules=["mlp.down_proj"], bottleneck_size=6))
    expected = {}
    for seed, name in enumerate(("default", "en")):
        if name == "en":
            shake(wrapped, seed, name)
        wrapped.set_adapter(name)
        expected[name] = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    restored = wrapped.unload()
    # PEFT gives the adapter called `default` the folder itself.
    again = PeftModel.from_pretrained(restored, tmp_path / "en", adapter_name="en")
    again.load_adapter(tmp_path, "default")
    for name in ("en", "default"):
        again.set_adapter(name)
        assert torch.equal(logits(again), expected[name])


def test_layers_and_exclusions_narrow_the_choice(base: nn.Module) -> None:
    def adapted(**choice: object) -> list[str]:
        wrapped = get_peft_model(base, BottleneckConfig(**choice))
        found = [
            n.removeprefix("base_model.model.model.layers.")
            for n, m in wrapped.named_modules()
            if isinstance(m, BottleneckLayer)
        ]
        wrapped.unload()
        return found

    assert adapted(target_modules=DECODER, layers_to_transform=[1]) == ["1.self_attn.o_proj", "1.mlp.down_proj"]
    assert adapted(target_modules=DECODER, layers_to_transform=1, layers_pattern="layers") == [
        "1.self_attn.o_proj",
        "1.mlp.down_proj",
    ]
    assert adapted(target_modules=DECODER, exclude_modules=["mlp.down_proj"]) == [
        "0.self_attn.o_proj",
        "1.self_attn.o_proj",
    ]
    assert adapted(target_modules=r"model\.layers\.0\..*down_proj") == ["0.mlp.down_proj"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"activation": "rleu"}, "did you mean 'relu'"),
        ({"positions": "everywhere"}, "houlsby, pfeiffer"),
        ({"bottleneck_size": 0}, "give 1 or more"),
        ({"bottleneck_pattern": {"o_proj": "4"}}, "o_proj"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_wrong_configuration_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BottleneckConfig(target_modules=DECODER, **wrong)


def test_targets_have_to_be_given_and_linear_or_norms(base: nn.Module) -> None:
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(base, BottleneckConfig())
    with pytest.raises(AdapterError, match="a linear layer or a norm, not on Embedding"):
        get_peft_model(base, BottleneckConfig(target_modules=["embed_tokens"]))
    with pytest.raises(AdapterError, match="a linear layer or a norm, not on LayerNorm"):
        BottleneckLayer(nn.LayerNorm((2, 3)), "default", 2, "relu")


SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PADS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**SIZES, **PADS, "num_key_value_heads": 2, "head_dim": 8}
ENCODER = ["attention.output.dense", "output.dense"]
T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
ARCHITECTURES = {
    "llama": (AutoModelForCausalLM, LLAMA, DECODER, 4),
    "gemma3_text": (AutoModelForCausalLM, LLAMA, DECODER, 4),
    "qwen2": (AutoModelForCausalLM, LLAMA, DECODER, 4),
    "qwen3": (AutoModelForCausalLM, LLAMA, DECODER, 4),
    "bert": (AutoModelForMaskedLM, SIZES, ENCODER, 4),
    "roberta": (AutoModelForMaskedLM, SIZES, ENCODER, 4),
    "xlm-roberta": (AutoModel, SIZES, ENCODER, 4),
    "t5": (AutoModelForSeq2SeqLM, T5, ["SelfAttention.o", "DenseReluDense.wo"], 8),
    "mt5": (AutoModelForSeq2SeqLM, T5, ["SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"], 10),
    "gpt2": (
        AutoModelForCausalLM,
        {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, **PADS},
        ["attn.c_proj", "mlp.c_proj"],
        4,
    ),
}


def outputs(model: nn.Module, encoder_decoder: bool) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **({"decoder_input_ids": IDS[:, :3]} if encoder_decoder else {}))[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str, tmp_path: Path) -> None:
    auto, sizes, targets, places = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    base = auto.from_config(AutoConfig.for_model(architecture, **sizes)).eval()
    two = base.config.is_encoder_decoder
    before = outputs(base, two)
    wrapped = get_peft_model(base, BottleneckConfig(target_modules=targets, bottleneck_size=4))
    layers = [m for m in wrapped.modules() if isinstance(m, BottleneckLayer)]
    assert len(layers) == places
    assert torch.equal(outputs(wrapped, two), before)
    for i, layer in enumerate(layers):
        up = layer.bottleneck_up["default"]
        up.bias.data.copy_(torch.randn(up.bias.shape, generator=torch.Generator().manual_seed(i)))
        assert not torch.allclose(outputs(wrapped, two), before), f"place {i} is not reached"
        up.bias.data.zero_()
    shake(wrapped)
    adapted = outputs(wrapped, two)
    wrapped.save_pretrained(tmp_path)
    restored = wrapped.unload()
    assert torch.equal(outputs(restored, two), before)
    assert torch.equal(outputs(PeftModel.from_pretrained(restored, tmp_path), two), adapted)


def test_modules_to_save_travel_with_the_adapter(base: nn.Module, tmp_path: Path) -> None:
    config = BottleneckConfig(target_modules=["mlp.down_proj"], modules_to_save=["norm"])
    wrapped = get_peft_model(base, config)
    shake(wrapped)
    wrapped.base_model.model.model.norm.modules_to_save["default"].weight.data.mul_(1.5)
    wrapped.save_pretrained(tmp_path)
    adapted = logits(wrapped)
    again = PeftModel.from_pretrained(wrapped.unload(), tmp_path)
    assert torch.equal(logits(again), adapted)


def test_injection_without_a_peft_model(base: nn.Module) -> None:
    config = BottleneckConfig(target_modules=DECODER, bottleneck_size=4)
    donor = get_peft_model(base, config)
    shake(donor)
    adapted, state = logits(donor), get_peft_model_state_dict(donor)
    plain = inject_adapter_in_model(config, donor.unload())
    plain.peft_config = {"default": config}
    assert not set_peft_model_state_dict(plain, state).unexpected_keys
    assert torch.equal(logits(plain), adapted)


def test_equal_adapters_are_saved_as_equal_bytes(base: nn.Module, tmp_path: Path) -> None:
    for folder, targets in (("a", {"mlp.down_proj", "self_attn.o_proj"}), ("b", sorted(DECODER))):
        wrapped = get_peft_model(base, BottleneckConfig(target_modules=targets))
        shake(wrapped)
        wrapped.save_pretrained(tmp_path / folder)
        wrapped.unload()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"


def test_registering_twice_changes_nothing() -> None:
    tables = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    before = [dict(t) for t in tables]
    register()
    assert [dict(t) for t in tables] == before
    assert [t["BOTTLENECK"] for t in tables] == [BottleneckConfig, BottleneckModel, "bottleneck_"]


# A fresh Python: what `import lingraft` does to `import peft`.


def fresh(code: str, *arguments: object, cwd: Path | None = None) -> str:
    """What a fresh Python prints; nothing may go to its standard error."""
    command = [sys.executable, "-W", "error::ImportWarning", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "PEFT was not told" not in done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("imports", ["import lingraft, peft", "import peft, lingraft", "import lingraft.modules, peft"])
def test_a_saved_folder_opens_in_a_fresh_process(imports: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    config = BottleneckConfig(target_modules=DECODER, bottleneck_size=4, activation="gelu", task_type="CAUSAL_LM")
    wrapped = get_peft_model(base, config)
    shake(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    code = f"""
{imports}
import sys, torch
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = peft.PeftModel.from_pretrained(base, sys.argv[2]).eval()
assert not any(p.requires_grad for p in model.parameters())
with torch.no_grad():
    torch.save(model(input_ids=torch.tensor({IDS.tolist()})).logits, sys.argv[3])
print(type(model).__name__, model.peft_config["default"].activation)
"""
    printed = fresh(code, model, tmp_path / "adapter", tmp_path / "logits.pt")
    assert printed.splitlines()[-1] == "PeftModelForCausalLM gelu"
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(wrapped))


def test_importing_lingraft_and_finding_peft_imports_nothing_heavy() -> None:
    code = """
import sys, lingraft, lingraft._peft_hook
from importlib.util import find_spec
spec = find_spec("peft")
assert spec.name == "peft" and spec.origin.endswith("__init__.py") and spec.submodule_search_locations
assert spec.loader.is_package("peft") and spec.loader.path == spec.origin
assert find_spec("no_such_package_at_all") is None
lingraft._peft_hook.install()
assert sum(type(f).__module__ == "lingraft._peft_hook" for f in sys.meta_path) == 1
print([m for m in ("torch", "peft", "transformers", "lingraft.modules") if m in sys.modules])
"""
    assert fresh(code) == "[]"


STAND_IN = """
import sys, types, importlib, lingraft
stand_in = types.ModuleType("lingraft.modules")
stand_in.register = lambda: print("registered")
sys.modules["lingraft.modules"] = stand_in
sys.path.insert(0, sys.argv[1])
"""


@pytest.fixture
def small_peft(tmp_path: Path) -> Path:
    """A package called peft that is imported at once."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("print('peft runs')\n")
    (tmp_path / "peft" / "config.py").write_text("")
    return tmp_path


def test_peft_keeps_its_own_loader_and_can_be_reloaded(small_peft: Path) -> None:
    code = (
        STAND_IN
        + """
import peft.config
from importlib.machinery import SourceFileLoader
assert type(peft.__loader__) is type(peft.__spec__.loader) is SourceFileLoader
assert importlib.import_module("peft") is peft is importlib.reload(peft)
assert type(peft.__loader__) is type(peft.__spec__.loader) is SourceFileLoader
"""
    )
    assert fresh(code, small_peft).split("\n") == ["peft runs", "registered"] * 2


def test_another_hook_of_the_same_kind_does_no_harm(small_peft: Path) -> None:
    code = (
        STAND_IN
        + """
from importlib.util import find_spec
class Other:
    asking = False
    def find_spec(self, name, path=None, target=None):
        if name == "peft" and not self.asking:
            self.asking = True
            try:
                return find_spec(name)
            finally:
                self.asking = False
sys.meta_path.insert(int(sys.argv[2]), Other())
import peft
"""
    )
    for place in (0, 1):
        assert fresh(code, small_peft, place).split("\n") == ["peft runs", "registered"]


def test_errors_of_peft_itself_are_its_own(small_peft: Path) -> None:
    (small_peft / "peft" / "__init__.py").write_text("raise RuntimeError('broken')\n")
    code = (
        STAND_IN
        + """
try:
    import peft
except RuntimeError as error:
    print(error, "peft" in sys.modules)
sys.modules["peft"] = None
try:
    import peft
except ModuleNotFoundError:
    print("absent")
"""
    )
    assert fresh(code, small_peft).split("\n") == ["broken False", "absent"]


def test_a_failure_of_ours_does_not_break_peft(small_peft: Path) -> None:
    """A stand-in without what `lingraft.modules` needs, before and after `import lingraft`."""
    for imports in ("import lingraft, peft", "import peft, lingraft"):
        code = f"import sys; sys.path.insert(0, sys.argv[1])\n{imports}\nprint(peft.__name__)"
        command = [sys.executable, "-W", "error", "-c", code, str(small_peft)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split("\n")[:2] == ["peft runs", "peft"]
        assert "PEFT was not told of lingraft's adapters" in done.stderr


def test_a_partly_imported_peft_does_not_stop_either_import(small_peft: Path) -> None:
    (small_peft / "peft" / "__init__.py").write_text("import lingraft\nfrom . import config\nclass PeftConfig: pass\n")
    code = "import sys; sys.path.insert(0, sys.argv[1])\nimport peft\nprint(lingraft := peft.lingraft.__name__)"
    done = subprocess.run([sys.executable, "-c", code, str(small_peft)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "lingraft"), done.stderr
    assert "PEFT was not told" in done.stderr


def test_a_failure_is_logged_with_its_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise KeyError("tables")

    monkeypatch.setattr("lingraft.modules.register", fail)
    with caplog.at_level(logging.WARNING, logger="lingraft"):
        _peft_hook.install()
    assert "tables" in caplog.text
