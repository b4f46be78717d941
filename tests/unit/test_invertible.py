"""Couplings: laws of the bijection, outputs against the formulas, PEFT's life cycle, stacks with bottleneck adapters."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    LoraConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from lingraft.adapter import Adapter
from lingraft.attaching import unload
from lingraft.errors import AdapterError, ConfigError
from lingraft.modules.bottleneck import ACTIVATIONS, BottleneckConfig, BottleneckLayer
from lingraft.modules.invertible import CoupledLayer, InverseLayer, InvertibleConfig, InvertibleLayer
from tests.conftest import save_tiny_model

IDS = torch.tensor([[1, 20, 30, 40, 50, 60]])
ANSWER = torch.tensor([[0, 33, 44]])
pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`", "ignore:You are trying to modify", "ignore:.*is_gradient_checkpointing"
)

Tensors = dict[str, torch.Tensor]


def shake(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    """Random values in an adapter, so that it is no identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, BottleneckLayer | InvertibleLayer):
            for branch in module.adapter_layer_names:
                if name in getattr(module, branch):
                    for p in getattr(module, branch)[name].parameters():
                        p.data.copy_(torch.randn(p.shape, generator=generator) / 4)


# The bijection.


def made(half: int, size: int, activation: str, seed: int, spread: float, names: tuple[str, ...] = ("default",)) -> Any:
    """A layer around an embedding, with random couplings, all active."""
    layer = InvertibleLayer(nn.Embedding(3, 2 * half), names[0], size, activation)
    for name in names[1:]:
        layer.update_layer(name, size, activation)
    generator = torch.Generator().manual_seed(seed)
    for p in (p for n, p in layer.named_parameters() if "base_layer" not in n):
        p.data.copy_(spread * torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
    layer.set_adapter(list(names))
    return layer.requires_grad_(False)


couplings = st.builds(
    made,
    half=st.integers(1, 9),
    size=st.integers(1, 9),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    seed=st.integers(0, 1000),
    spread=st.floats(0.01, 0.7),
    names=st.sampled_from([("a",), ("a", "b"), ("b", "a")]),
)


@settings(max_examples=60, deadline=None)
@given(layer=couplings, seed=st.integers(0, 1000), size=st.floats(1e-3, 1e3))
def test_the_inverse_undoes_the_coupling(layer: InvertibleLayer, seed: int, size: float) -> None:
    x = size * torch.randn(2, 3, layer.width, generator=torch.Generator().manual_seed(seed))
    y = layer.couple(x)
    scale = float(torch.maximum(x.abs().max(), y.abs().max()))
    assert float((layer.inverse(y) - x).abs().max()) <= 1e-6 * scale
    assert float((layer.couple(layer.inverse(x)) - x).abs().max()) <= 1e-6 * float(
        torch.maximum(x.abs().max(), layer.inverse(x).abs().max())
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), half=st.integers(1, 4), size=st.integers(1, 4))
def test_the_inverse_is_exact_where_the_sums_are_however_large_the_networks_are(
    seed: int, half: int, size: int
) -> None:
    """Whole numbers below 2^24 are exact in float32; no contraction is needed as in other invertible networks."""
    layer = made(half, size, "relu", 0, 1.0)
    generator = torch.Generator().manual_seed(seed)
    for p in (p for n, p in layer.named_parameters() if "base_layer" not in n):
        p.copy_(torch.randint(-9, 10, p.shape, generator=generator))
    x = torch.randint(-5, 6, (4, 2 * half), generator=generator).float()
    y = layer.couple(x)
    assert float(y.abs().max()) < 2**24
    assert torch.equal(layer.inverse(y), x) and torch.equal(layer.couple(layer.inverse(x)), x)


@settings(max_examples=20, deadline=None)
@given(layer=couplings, seed=st.integers(0, 1000))
def test_volume_is_kept(layer: InvertibleLayer, seed: int) -> None:
    """Each half-step is a shear: the Jacobian's determinant is 1, in both directions."""
    layer.double()
    x = torch.randn(layer.width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for way in (layer.couple, layer.inverse):
        jacobian: Any = torch.autograd.functional.jacobian(way, x)
        assert float(torch.linalg.det(jacobian)) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_have_the_dtype_of_what_comes_in_and_sums_are_in_float32(dtype: torch.dtype) -> None:
    layer = made(4, 3, "relu", 0, 0.5)
    x = torch.randn(5, 8).to(dtype)
    for way in (layer.couple, layer.inverse):
        assert way(x).dtype == dtype
        wide = x.to(torch.promote_types(dtype, torch.float32))
        assert torch.equal(way(x), way(wide).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer.couple(x)
    assert torch.equal(inside, layer.couple(x))
    for branch in layer.adapter_layer_names:  # A part that somebody cast computes in that dtype, its sums do not.
        getattr(layer, branch).to(torch.bfloat16)
    back = layer.inverse(layer.couple(x.double()))
    torch.testing.assert_close(back, x.double(), rtol=0, atol=0.05)
    assert layer.couple(x).dtype == dtype


# Outputs by the formulas.

ACT = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh}


def net(tensors: Tensors, name: str, x: torch.Tensor, act: str = "relu") -> torch.Tensor:
    """W_up act(W_down x + b_down) + b_up of tensors called …{name}_down.weight and so on."""
    found = {end: v for key, v in tensors.items() for end in ENDS if key.endswith(f"{name}_{end}")}
    return ACT[act](x @ found["down.weight"].T + found["down.bias"]) @ found["up.weight"].T + found["up.bias"]


ENDS = ("down.weight", "down.bias", "up.weight", "up.bias")


def nice(tensors: Tensors, x: torch.Tensor, act: str = "relu") -> torch.Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    y1 = x1 + net(tensors, "invertible_F", x2, act)
    return torch.cat((y1, x2 + net(tensors, "invertible_G", y1, act)), -1)


def unnice(tensors: Tensors, y: torch.Tensor, act: str = "relu") -> torch.Tensor:
    y1, y2 = y[..., : y.shape[-1] // 2], y[..., y.shape[-1] // 2 :]
    x2 = y2 - net(tensors, "invertible_G", y1, act)
    return torch.cat((y1 - net(tensors, "invertible_F", x2, act), x2), -1)


CLASSES = {"bert": AutoModelForMaskedLM, "xlm-roberta": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}


def tiny_model(folder: Path, architecture: str, **changes: object) -> Any:
    """A tiny model in float64, with weights of norms that are no identities."""
    if not folder.exists():
        save_tiny_model(folder, architecture, **changes)
    loader: Any = CLASSES.get(architecture, AutoModelForCausalLM)
    model = loader.from_pretrained(folder, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(7)
    for p in model.parameters():
        if p.ndim == 1:
            p.data.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 5)
    return model


def stacked(base: nn.Module, embeddings: str, places: list[str]) -> tuple[Any, list[Tensors]]:
    """Coupling, language and task bottleneck on a model, lowest first, in float64, and the tensors of each."""
    inject_adapter_in_model(InvertibleConfig(target_modules=[embeddings], coupling_size=8), base, "part0")
    language = BottleneckConfig(target_modules=places, bottleneck_size=16, positions="madx")
    inject_adapter_in_model(language, base, "part1")
    task = BottleneckConfig(target_modules=places, bottleneck_size=3, positions="madx", activation="tanh")
    wrapped: Any = get_peft_model(base, task)
    names = ["part0", "part1", "default"]
    for seed, name in enumerate(names):
        shake(wrapped, name, seed)
    for layer in wrapped.modules():
        if isinstance(layer, BottleneckLayer):
            layer.set_adapter(["part1", "default"])
    wrapped.double()
    return wrapped, [
        {k: v.detach() for k, v in get_peft_model_state_dict(wrapped, adapter_name=n).items()} for n in names
    ]


def at(tensors: Tensors, module: str) -> Tensors:
    return {k: v for k, v in tensors.items() if k.startswith(f"base_model.model.{module}.")}


def causal(length: int) -> torch.Tensor:
    return torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_decoder_with_a_stack_gives_what_the_formulas_give(architecture: str, tied: bool, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    changes = {"tie_word_embeddings": tied, "head_dim": 8}
    base = tiny_model(folder, architecture, **changes)
    wrapped, (coupling, language, task) = stacked(base, "model.embed_tokens", ["mlp.down_proj"])
    plain = tiny_model(folder, architecture)
    gemma = architecture == "gemma3_text"
    with torch.no_grad():
        found = wrapped(input_ids=IDS).logits
        h = nice(coupling, plain.model.embed_tokens(IDS))
        positions = torch.arange(IDS.shape[1])[None]
        for i, layer in enumerate(plain.model.layers):
            kind = (plain.config.layer_types[i],) if gemma else ()
            rotary = plain.model.rotary_emb(h, positions, *kind)
            a = layer.self_attn(
                hidden_states=layer.input_layernorm(h), position_embeddings=rotary, attention_mask=causal(IDS.shape[1])
            )[0]
            if gemma:
                h = h + layer.post_attention_layernorm(a)
                y = layer.mlp(layer.pre_feedforward_layernorm(h))
            else:
                h = h + a
                y = layer.mlp(layer.post_attention_layernorm(h))
            module = f"model.layers.{i}.mlp.down_proj"
            y = y + net(at(language, module), "bottleneck", y)
            y = y + net(at(task, module), "bottleneck", y, "tanh")
            h = h + (layer.post_feedforward_layernorm(y) if gemma else y)
        expected = plain.lm_head(unnice(coupling, plain.model.norm(h)))
        without = plain(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(found, without, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("architecture", ["bert", "xlm-roberta"])
def test_an_encoder_with_a_stack_gives_what_the_formulas_give(architecture: str, tmp_path: Path) -> None:
    folder, name = tmp_path / "model", "bert" if architecture == "bert" else "roberta"
    norms = [f"encoder.layer.{i}.output.LayerNorm" for i in range(2)]
    wrapped, (coupling, language, task) = stacked(tiny_model(folder, architecture), f"{name}.embeddings", norms)
    plain = tiny_model(folder, architecture)
    body = getattr(plain, name)
    with torch.no_grad():
        found = wrapped(input_ids=IDS).logits
        h = nice(coupling, body.embeddings(input_ids=IDS))
        for i, layer in enumerate(body.encoder.layer):
            residual = layer.attention(h)[0]
            dense = layer.output.dense(layer.intermediate(residual))
            norm, module = layer.output.LayerNorm, f"{name}.encoder.layer.{i}.output.LayerNorm"
            # The adapters library: h + W_up ReLU(W_down LN(h + residual)), then LN(· + residual).
            dense = dense + net(at(language, module), "bottleneck", norm(dense + residual))
            dense = dense + net(at(task, module), "bottleneck", norm(dense + residual), "tanh")
            h = norm(dense + residual)
        if architecture == "bert":
            head = plain.cls.predictions
            expected = head.decoder(unnice(coupling, head.transform(h)))
        else:
            head = plain.lm_head
            expected = head.decoder(unnice(coupling, head.layer_norm(nn.functional.gelu(head.dense(h)))))
        without = plain(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, without, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_both_halves_of_an_encoder_decoder_share_one_coupling(tied: bool, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    base = tiny_model(folder, "t5", tie_word_embeddings=tied)
    wrapped: Any = get_peft_model(base, InvertibleConfig(target_modules=["embed_tokens"], coupling_size=8))
    shake(wrapped)
    wrapped.double()
    tensors = {k: v.detach() for k, v in get_peft_model_state_dict(wrapped).items()}
    assert sorted({k.rsplit(".", 2)[0] for k in tensors}) == ["base_model.model.encoder.embed_tokens"]
    assert isinstance(base.encoder.embed_tokens, InvertibleLayer) and isinstance(
        base.decoder.embed_tokens, CoupledLayer
    )
    assert len(tensors) == len([n for n, _ in wrapped.named_parameters() if "invertible_" in n]) == 8
    plain = tiny_model(folder, "t5")
    with torch.no_grad():
        found = wrapped(input_ids=IDS, decoder_input_ids=ANSWER).logits
        read = plain.encoder(inputs_embeds=nice(tensors, plain.encoder.embed_tokens(IDS))).last_hidden_state
        written = nice(tensors, plain.decoder.embed_tokens(ANSWER))
        states = plain.decoder(inputs_embeds=written, encoder_hidden_states=read).last_hidden_state
        if plain.config.scale_decoder_outputs:
            states = states * plain.config.d_model**-0.5
        expected = plain.lm_head(unnice(tensors, states))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# PEFT's life cycle, on one architecture of each kind.

KINDS = {
    "llama": (AutoModelForCausalLM, "model.embed_tokens"),
    "bert": (AutoModelForMaskedLM, "bert.embeddings"),
    "t5": (AutoModelForSeq2SeqLM, "embed_tokens"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {k: save_tiny_model(root / k, k, **({"tie_word_embeddings": True} if k == "llama" else {})) for k in KINDS}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def load(folders: dict[str, Path], kind: str, dtype: torch.dtype = torch.float32) -> Any:
    loader: Any = KINDS[kind][0]
    return loader.from_pretrained(folders[kind], dtype=dtype).eval()


def config(kind: str = "llama", size: int = 8, **more: Any) -> InvertibleConfig:
    return InvertibleConfig(target_modules=[KINDS[kind][1]], coupling_size=size, **more)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        more = {"decoder_input_ids": ANSWER} if model.config.is_encoder_decoder else {}
        return model(input_ids=IDS, **more).logits


def ends(model: nn.Module) -> tuple[int, ...]:
    """How many layers of each kind stand on the model."""
    return tuple(sum(type(m) is c for m in model.modules()) for c in (InvertibleLayer, CoupledLayer, InverseLayer))


def test_a_fresh_coupling_starts_as_documented(folders: dict[str, Path]) -> None:
    torch.manual_seed(0)
    wrapped = get_peft_model(load(folders, "llama"), config(size=64))
    state = get_peft_model_state_dict(wrapped)
    start = "base_model.model.model.embed_tokens.invertible_"
    shapes = {"down.weight": (64, 16), "down.bias": (64,), "up.weight": (16, 64), "up.bias": (16,)}
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        f"{start}{n}_{end}": shape for n in "FG" for end, shape in shapes.items()
    }
    weights = torch.cat([v.flatten() for k, v in state.items() if k.endswith("weight")])
    assert weights.dtype == torch.float32
    assert float(weights.std()) == pytest.approx(0.02, rel=0.05)
    assert all(not v.any() for k, v in state.items() if k.endswith("bias"))


def test_zero_networks_change_nothing_bit_for_bit(kind: str, folders: dict[str, Path]) -> None:
    base = load(folders, kind)
    before = logits(base)
    wrapped = get_peft_model(base, config(kind))
    shake(wrapped)
    for name, p in wrapped.named_parameters():
        if "_up." in name:
            p.data.zero_()
    assert torch.equal(logits(wrapped), before)


def test_a_folder_is_written_and_opened_again(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    base = load(folders, kind)
    before, weights = logits(base), {n: id(p) for n, p in base.named_parameters()}
    kinds = {n: type(m) for n, m in base.named_modules()}
    wrapped: Any = get_peft_model(base, config(kind, activation="gelu"))
    shake(wrapped)
    adapted = logits(wrapped)
    assert not torch.allclose(adapted, before, rtol=0.01, atol=0.01)
    assert ends(wrapped) == (1, 1 if kind == "t5" else 0, 1)
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 8 and all(".invertible_" in k for k in saved)  # No embedding among them.
    restored = wrapped.unload()
    assert torch.equal(logits(restored), before)
    assert {n: type(m) for n, m in restored.named_modules()} == kinds
    assert {n: id(p) for n, p in restored.named_parameters()} == weights
    for low_memory in (False, True):
        again: Any = PeftModel.from_pretrained(load(folders, kind), tmp_path, low_cpu_mem_usage=low_memory)
        assert again.peft_config["default"].activation == "gelu"
        assert torch.equal(logits(again), adapted)


def test_folders_are_merged_and_the_merged_one_is_opened(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors: list[Tensors] = []
    for seed, name in enumerate("ab"):
        wrapped = get_peft_model(load(folders, kind), config(kind))
        shake(wrapped, seed=seed)
        wrapped.save_pretrained(tmp_path / name)
        tensors.append(get_peft_model_state_dict(wrapped))
    a, b = (Adapter.load(tmp_path / name) for name in "ab")
    (a + 0.25 * (b - a)).save(tmp_path / "merged")
    merged: Any = PeftModel.from_pretrained(load(folders, kind), tmp_path / "merged")
    assert ends(merged) == (1, 1 if kind == "t5" else 0, 1)
    for key, value in get_peft_model_state_dict(merged).items():
        torch.testing.assert_close(value, 0.75 * tensors[0][key] + 0.25 * tensors[1][key])


def test_two_couplings_are_loaded_switched_disabled_and_deleted(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    expected = {}
    for seed, (name, size) in enumerate({"xx": 8, "yy": 5}.items()):
        alone = get_peft_model(load(folders, kind), config(kind, size))
        shake(alone, seed=seed)
        expected[name] = logits(alone)
        alone.save_pretrained(tmp_path / name)
    base = load(folders, kind)
    before = logits(base)
    wrapped: Any = PeftModel.from_pretrained(base, tmp_path / "xx", adapter_name="xx")
    wrapped.load_adapter(tmp_path / "yy", "yy")
    count = ends(wrapped)
    assert count == (1, 1 if kind == "t5" else 0, 1)
    assert torch.equal(logits(wrapped), expected["xx"])
    wrapped.set_adapter("yy")
    assert torch.equal(logits(wrapped), expected["yy"])
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), before)
        assert get_model_status(wrapped).enabled is False
    assert torch.equal(logits(wrapped), expected["yy"])
    status = get_model_status(wrapped)
    assert (status.active_adapters, status.enabled, status.available_adapters) == (["yy"], True, ["xx", "yy"])
    wrapped.save_pretrained(tmp_path / "both")
    assert (
        load_file(tmp_path / "both" / "xx" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "xx" / "adapter_model.safetensors").keys()
    )
    wrapped.base_model.set_adapter(["xx", "yy"])
    one = logits(wrapped)
    wrapped.base_model.set_adapter(["yy", "xx"])
    assert not torch.allclose(one, logits(wrapped), rtol=1e-3, atol=1e-3)
    wrapped.set_adapter("yy")
    wrapped.delete_adapter("xx")
    assert torch.equal(logits(wrapped), expected["yy"])
    wrapped.delete_adapter("yy")
    assert torch.equal(logits(base), before)
    assert not [n for n, _ in wrapped.named_parameters() if "invertible_" in n]


def test_switching_one_end_off_switches_both(folders: dict[str, Path]) -> None:
    base = load(folders, "t5")
    before = logits(base)
    wrapped: Any = get_peft_model(base, config("t5"))
    shake(wrapped)
    layer = base.encoder.embed_tokens
    layer.enable_adapters(False)
    assert torch.equal(logits(wrapped), before)
    states = torch.randn(2, 32)
    assert base.lm_head.inverse(states) is states
    layer.enable_adapters(True)
    base.lm_head.enable_adapters(False)  # Not the place to switch: it follows.
    assert not torch.allclose(logits(wrapped), before, rtol=0.01, atol=0.01)


def test_writing_with_a_cache_is_writing_without(folders: dict[str, Path]) -> None:
    for kind in ("llama", "t5"):
        wrapped: Any = get_peft_model(load(folders, kind), config(kind))
        shake(wrapped)
        texts = [
            wrapped.generate(input_ids=IDS, max_new_tokens=12, do_sample=False, use_cache=cache, eos_token_id=None)
            for cache in (True, False)
        ]
        assert torch.equal(*texts) and texts[0].shape[1] > 12


def test_merging_is_refused(kind: str, folders: dict[str, Path]) -> None:
    wrapped: Any = get_peft_model(load(folders, kind), config(kind))
    shake(wrapped)
    adapted = logits(wrapped)
    layers = [m for m in wrapped.modules() if isinstance(m, InvertibleLayer | CoupledLayer | InverseLayer)]
    for refused in (wrapped.merge_and_unload, wrapped.merge_adapter, *(layer.merge for layer in layers)):
        with pytest.raises(AdapterError, match="a coupling cannot be merged"):
            refused()
    wrapped.unmerge_adapter()
    assert torch.equal(logits(wrapped), adapted)


def test_gradients_flow_through_both_ends_into_the_coupling_alone(folders: dict[str, Path]) -> None:
    base = load(folders, "llama")
    wrapped: Any = get_peft_model(base, config(task_type="CAUSAL_LM"))
    shake(wrapped)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    got = {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}
    assert set(got) == {n for n, _ in wrapped.named_parameters() if ".invertible_" in n} and all(
        g.any() for g in got.values()
    )
    wrapped.zero_grad()
    with torch.no_grad():
        states = base.model(input_ids=IDS).last_hidden_state
    nn.functional.cross_entropy(base.lm_head(states)[0], IDS[0]).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in wrapped.named_parameters() if ".invertible_" in n)


def test_a_bfloat16_base_keeps_its_dtype_and_the_coupling_float32(folders: dict[str, Path]) -> None:
    base = load(folders, "llama", torch.bfloat16)
    embedded = base.model.embed_tokens(IDS)
    wrapped: Any = get_peft_model(base, config())
    assert {p.dtype for n, p in wrapped.named_parameters() if "invertible_" in n} == {torch.float32}
    down = next(p for n, p in wrapped.named_parameters() if "F_down" in n)
    assert not torch.equal(down, down.bfloat16().float())
    shake(wrapped)
    layer = base.model.embed_tokens
    assert torch.equal(layer(IDS), layer.couple(embedded.float()).bfloat16())
    assert logits(wrapped).dtype == torch.bfloat16


def test_wrapped_ends_show_the_attributes_of_what_they_stand_on(folders: dict[str, Path]) -> None:
    base = load(folders, "llama")
    embedding, output = base.model.embed_tokens, base.lm_head
    get_peft_model(base, config())
    wrapped = base.get_output_embeddings()
    assert wrapped is base.lm_head and isinstance(wrapped, InverseLayer)
    assert wrapped.weight is output.weight is base.get_input_embeddings().weight
    assert (wrapped.bias, wrapped.in_features, wrapped.out_features) == (None, 32, output.out_features)
    assert base.get_input_embeddings().padding_idx == embedding.padding_idx
    states = torch.randn(3, 32)
    # What lingraft's losses do past the model's own forward: the inverse, then the output embedding's weight.
    torch.testing.assert_close(wrapped.inverse(states) @ wrapped.weight.T, wrapped(states))
    base = load(folders, "bert")
    words = base.bert.embeddings.word_embeddings
    get_peft_model(base, config("bert"))
    assert base.get_input_embeddings() is words is base.bert.embeddings.word_embeddings
    assert base.bert.embeddings.token_type_ids.shape == (1, 512)
    assert base.get_output_embeddings().bias is base.cls.predictions.bias
    assert not hasattr(base.bert.embeddings, "weight") and not hasattr(base.bert.embeddings, "no_such_thing")


def test_a_copied_model_has_its_own_coupling(folders: dict[str, Path]) -> None:
    wrapped: Any = get_peft_model(load(folders, "t5"), config("t5"))
    shake(wrapped)
    twin = copy.deepcopy(wrapped)
    assert torch.equal(logits(twin), logits(wrapped))
    base = twin.base_model.model
    assert base.lm_head.source is base.decoder.embed_tokens.source is base.encoder.embed_tokens
    adapted = logits(wrapped)
    shake(twin, seed=9)
    assert torch.equal(logits(wrapped), adapted) and not torch.allclose(logits(twin), adapted)


def test_an_encoder_with_a_tasks_head_has_the_coupling_at_its_beginning_alone(folders: dict[str, Path]) -> None:
    base: Any = AutoModelForSequenceClassification.from_pretrained(folders["bert"], dtype=torch.float32).eval()
    before = logits(base)
    wrapped = get_peft_model(base, InvertibleConfig(target_modules=["bert.embeddings"], modules_to_save=["classifier"]))
    shake(wrapped)
    assert ends(wrapped) == (1, 0, 0)
    adapted = logits(wrapped)
    assert not torch.allclose(adapted, before)
    with torch.no_grad():
        layer = base.bert.embeddings
        states = base.bert.encoder(layer.couple(layer.base_layer(input_ids=IDS))).last_hidden_state
        torch.testing.assert_close(base.classifier(base.bert.pooler(states)), adapted)


@pytest.mark.parametrize("architecture", ["electra", "albert"])
def test_a_narrow_embedding_has_a_narrow_coupling(architecture: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 99, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    base: Any = AutoModelForMaskedLM.from_config(AutoConfig.for_model(architecture, **sizes)).eval()
    before = logits(base)
    wrapped = get_peft_model(base, InvertibleConfig(target_modules=[f"{architecture}.embeddings"], coupling_size=4))
    shake(wrapped)
    layer = next(m for m in wrapped.modules() if isinstance(m, InvertibleLayer))
    assert layer.width == base.get_output_embeddings().in_features == 16
    adapted = logits(wrapped)
    assert not torch.allclose(adapted, before)
    wrapped.save_pretrained(tmp_path)
    restored: Any = wrapped.unload()
    assert torch.equal(logits(restored), before)
    assert torch.equal(logits(PeftModel.from_pretrained(restored, tmp_path)), adapted)


EMBEDDINGS = {
    "gemma3_text": (AutoModelForCausalLM, "model.embed_tokens"),
    "qwen3": (AutoModelForCausalLM, "model.embed_tokens"),
    "gpt2": (AutoModelForCausalLM, "transformer.wte"),
    "roberta": (AutoModelForMaskedLM, "roberta.embeddings"),
    "camembert": (AutoModelForMaskedLM, "roberta.embeddings"),
    "distilbert": (AutoModelForMaskedLM, "distilbert.embeddings"),
    "deberta-v2": (AutoModelForMaskedLM, "deberta.embeddings"),
    "modernbert": (AutoModelForMaskedLM, "model.embeddings"),
    "mt5": (AutoModelForSeq2SeqLM, "embed_tokens"),
    "umt5": (AutoModelForSeq2SeqLM, "embed_tokens"),
}


@pytest.mark.parametrize("architecture", EMBEDDINGS)
def test_architectures(architecture: str, tmp_path: Path) -> None:
    loader, target = EMBEDDINGS[architecture]
    base: Any = loader.from_pretrained(save_tiny_model(tmp_path / "model", architecture), dtype=torch.float32).eval()
    before, modules = logits(base), dict(base.named_modules())
    wrapped = get_peft_model(base, InvertibleConfig(target_modules=[target], coupling_size=4))
    shake(wrapped)
    adapted = logits(wrapped)
    layer = next(m for m in wrapped.modules() if isinstance(m, InvertibleLayer))
    # Without its inverse the coupling says something else: the output embedding is reached.
    output = base.get_output_embeddings()
    output.inverse = lambda states: states
    assert not torch.allclose(logits(wrapped), adapted, atol=1e-4)
    assert not torch.allclose(adapted, before, atol=1e-4)
    del output.inverse
    layer.enable_adapters(False)
    assert torch.equal(logits(wrapped), before)
    layer.enable_adapters(True)
    wrapped.save_pretrained(tmp_path / "adapter")
    assert dict(wrapped.unload().named_modules()) == modules
    assert torch.equal(logits(base), before)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), adapted)


# What is refused, before anything is replaced.


def test_what_does_not_fit_is_refused_and_leaves_the_model_as_it_was(folders: dict[str, Path]) -> None:
    base = load(folders, "llama")
    for wrong, message in (
        (["mlp.down_proj"], "stands on embeddings, not on Linear"),
        (["embed_tokens", "lm_head"], "stands on embeddings, not on Linear"),
    ):
        with pytest.raises(AdapterError, match=message):
            get_peft_model(base, InvertibleConfig(target_modules=wrong))
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(base, InvertibleConfig(target_modules=["embeddings"]))
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(base, InvertibleConfig())
    own = base.lm_head
    for other in (nn.Linear(48, own.out_features), nn.Linear(32, 7), nn.Identity()):
        base.lm_head = other
        with pytest.raises(AdapterError, match="no inverse fits"):
            get_peft_model(base, config())
    base.lm_head = own
    assert ends(base) == (0, 0, 0)
    # A DeBERTa whose head multiplies with the input embedding itself: there is no layer to put the inverse before.
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    other = AutoModelForMaskedLM.from_config(AutoConfig.for_model("deberta-v2", legacy=False, **sizes))
    with pytest.raises(AdapterError, match="gives 32 logits: no inverse fits"):
        get_peft_model(other, InvertibleConfig(target_modules=["deberta.embeddings"]))
    with pytest.raises(AdapterError, match="even width, and these are 7 wide"):
        InvertibleLayer(nn.Embedding(5, 7), "default", 2, "relu")


def test_a_second_coupling_stands_where_the_first_does(folders: dict[str, Path]) -> None:
    for first, second in ((["embed_tokens"], ["decoder.embed_tokens"]), (["encoder.embed_tokens"], ["embed_tokens"])):
        wrapped: Any = get_peft_model(load(folders, "t5"), InvertibleConfig(target_modules=first))
        with pytest.raises(AdapterError, match=r"there is one on encoder\.embed_tokens"):
            wrapped.add_adapter("yy", InvertibleConfig(target_modules=second))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"activation": "rleu"}, "did you mean 'relu'"),
        ({"coupling_size": 0}, "give 1 or more"),
        ({"coupling_size": 2.0}, "give 1 or more"),
    ],
)
def test_a_wrong_configuration_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InvertibleConfig(target_modules=["embed_tokens"], **wrong)


def test_path_ends_and_expressions_become_whole_paths(folders: dict[str, Path], tmp_path: Path) -> None:
    for i, chosen in enumerate((["embed_tokens"], {"embed_tokens"}, r".*\.embed_tokens", ["model.embed_tokens"])):
        made = InvertibleConfig(target_modules=chosen, coupling_size=4)
        wrapped = get_peft_model(load(folders, "llama"), made)
        shake(wrapped)
        assert made.to_dict()["target_modules"] == ["model.embed_tokens"]
        wrapped.save_pretrained(tmp_path / str(i))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert len({(tmp_path / str(i) / name).read_bytes() for i in range(4)}) == 1
    both = InvertibleConfig(target_modules=["embed_tokens"], exclude_modules=["decoder.embed_tokens"])
    assert ends(get_peft_model(load(folders, "t5"), both)) == (1, 0, 1)


# Stacks of several kinds, by nested injection.

PLACES = {"llama": "mlp.down_proj", "bert": "output.LayerNorm", "t5": "DenseReluDense.wo"}


def stack_configs(kind: str, inference: bool = False) -> list[Any]:
    places = [PLACES[kind]]
    return [
        config(kind, inference_mode=inference),
        BottleneckConfig(target_modules=places, bottleneck_size=6, positions="madx", inference_mode=inference),
        BottleneckConfig(target_modules=places, bottleneck_size=3, positions="madx"),
    ]


def put_on(base: nn.Module, configs: list[Any]) -> Any:
    """A stack as lingraft puts it on: lower parts by injection, the top one as a PEFT model."""
    *lower, top = configs
    for i, part in enumerate(lower):
        inject_adapter_in_model(part, base, f"part{i}")
    return get_peft_model(base, top)


def order(model: nn.Module, names: list[str]) -> None:
    for layer in model.modules():
        if isinstance(layer, BottleneckLayer):
            layer.set_adapter(names)


def test_a_stack_keeps_its_parts_apart_and_comes_off_again(kind: str, folders: dict[str, Path]) -> None:
    base = load(folders, kind)
    before, modules = logits(base), dict(base.named_modules())
    wrapped = put_on(base, stack_configs(kind))
    for seed, name in enumerate(("part0", "part1", "default")):
        shake(wrapped, name, seed)
    states = {n: get_peft_model_state_dict(wrapped, adapter_name=n) for n in ("part0", "part1", "default")}
    assert {n: {".invertible_" in k for k in s} for n, s in states.items()} == {
        "part0": {True},
        "part1": {False},
        "default": {False},
    }
    assert states["part1"].keys() == states["default"].keys() and not set(states["part0"]) & set(states["part1"])
    seen = []
    for names in (["part1", "default"], ["default", "part1"], ["part1"], ["default"], []):
        order(wrapped, names)
        seen.append(logits(wrapped))
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(seen) for b in seen[:i])
    order(wrapped, ["part1", "default"])
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), before)
    assert torch.equal(logits(wrapped), seen[0])
    # The same parts, read from their tensors, give the same.
    twin = put_on(load(folders, kind), stack_configs(kind))
    for name, state in states.items():
        found = set_peft_model_state_dict(twin, state, adapter_name=name)
        assert not found.unexpected_keys
    order(twin, ["part1", "default"])
    assert torch.equal(logits(twin), seen[0])
    unload(base)
    assert dict(base.named_modules()) == modules
    assert torch.equal(logits(base), before)
    assert torch.equal(logits(twin.unload()), before)


def test_a_frozen_part_stays_frozen_while_the_one_above_learns(folders: dict[str, Path]) -> None:
    wrapped = put_on(load(folders, "llama"), stack_configs("llama", inference=True))
    order(wrapped, ["part1", "default"])
    for layer in wrapped.modules():
        if isinstance(layer, BottleneckLayer):
            layer.set_requires_grad("part1", False)
    learning = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in wrapped.named_parameters() if ".bottleneck_" in n and ".default." in n}
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    assert {n for n, p in wrapped.named_parameters() if p.grad is not None} == learning


def test_another_kind_of_adapter_stands_on_a_language_stack(folders: dict[str, Path]) -> None:
    base = load(folders, "llama")
    before = logits(base)
    lower = stack_configs("llama")[:2]
    wrapped = put_on(base, [*lower, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)])
    stood = [n for n, m in wrapped.named_modules() if n.endswith("lora_A")]
    assert stood and not any("lm_head" in n or "bottleneck" in n or "invertible" in n for n in stood)
    for seed, name in enumerate(("part0", "part1")):
        shake(wrapped, name, seed)
    assert not torch.allclose(logits(wrapped), before)
    assert torch.equal(logits(wrapped.unload()), before)
