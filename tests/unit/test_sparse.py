"""Sparse differences: the formula, merging bit for bit, tied embeddings, PEFT's life cycle, and the files."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_model_status, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from lingraft.adapter import Adapter
from lingraft.algebra import Site
from lingraft.errors import AdapterError, ConfigError
from lingraft.layouts.common import Place
from lingraft.layouts.sparse import SparseLayout
from lingraft.modules.sparse import SharingLayer, SparseConfig, SparseLayer
from lingraft.tensors import TensorFile, write_tensors
from tests.conftest import save_tiny_model

IDS = torch.tensor([[1, 20, 30, 40, 50, 60]])
LAYOUT = SparseLayout()

pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters", "ignore:Adapter name")

BERT = {
    "bert.embeddings.word_embeddings": 40,
    "bert.embeddings.LayerNorm": 5,
    "bert.encoder.layer.0.attention.self.query": 30,
    "bert.encoder.layer.0.attention.self.query.bias": 7,
    "bert.encoder.layer.1.output.dense.bias": 3,
}
LLAMA = {"model.embed_tokens": 60, "model.layers.0.mlp.up_proj": 20, "model.layers.1.self_attn.q_proj": 9}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {"llama": {"tie_word_embeddings": True}, "gemma3_text": {"tie_word_embeddings": True}, "bert": {}, "t5": {}}
    return {
        name: save_tiny_model(
            tmp_path_factory.mktemp(name), name, **changes, **({"head_dim": 8} if "gemma" in name else {})
        )
        for name, changes in made.items()
    }


def bert(folders: Mapping[str, Path], dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForMaskedLM.from_pretrained(folders["bert"], dtype=dtype).eval()


def llama(folders: Mapping[str, Path], dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=dtype).eval()


def layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer, str]]:
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            for kind in ("weight", "bias"):
                yield name.removeprefix("base_model.model."), module, kind


def shake(model: nn.Module, seed: int = 1, name: str = "default", spread: float = 0.5) -> None:
    """Random values at random entries."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer, kind in layers(model):
        values, indices = layer.part(kind, "values"), layer.part(kind, "indices")
        if name in values:
            size = getattr(layer.get_base_layer(), kind).numel()
            where = torch.randperm(size, generator=generator)[: len(values[name])].sort().values
            indices[name].copy_(where)
            values[name].data.copy_(torch.randn(len(where), generator=generator) * spread)


def by_hand(base: Any, wrapped: nn.Module, names: tuple[str, ...] = ("default",)) -> Any:
    """A copy of the base with the differences in its weights, the output embedding left alone."""
    changed = copy.deepcopy(base)
    output = changed.get_output_embeddings()
    if output is not None:
        output.weight = nn.Parameter(output.weight.detach().clone())
    for path, layer, kind in layers(wrapped):
        for name in names:
            if name in layer.part(kind, "values"):
                weight = getattr(changed.get_submodule(path), kind)
                where = layer.part(kind, "indices")[name]
                flat = weight.data.view(-1)
                flat[where] = (flat[where].float() + layer.part(kind, "values")[name].data).to(weight.dtype)
    return changed


@torch.no_grad()
def logits(model: Any, **more: Any) -> torch.Tensor:
    return model(input_ids=IDS, **more).logits


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# The formula


@pytest.mark.parametrize(
    ("base", "x"),
    [
        (nn.Linear(5, 4).double(), torch.randn(3, 5, dtype=torch.float64)),
        (nn.Embedding(7, 3, padding_idx=0).double(), torch.tensor([[0, 2, 2, 6]])),
        (nn.LayerNorm(6).double(), torch.randn(3, 6, dtype=torch.float64)),
    ],
    ids=["linear", "embedding", "norm"],
)
def test_forward_is_that_of_a_module_with_the_changed_weight(base: nn.Module, x: torch.Tensor) -> None:
    kinds = [kind for kind in ("weight", "bias") if getattr(base, kind, None) is not None]
    layer = SparseLayer(copy.deepcopy(base), "default", dict.fromkeys(kinds, 3))
    shake(nn.Sequential(layer))
    for kind in kinds:
        flat = getattr(base, kind).data.view(-1)
        flat[layer.part(kind, "indices")["default"]] += layer.part(kind, "values")["default"].data.double()
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=1e-15)
    torch.testing.assert_close(layer.weight, base.weight, rtol=0, atol=0)


def test_a_fresh_one_changes_nothing_and_reads_like_its_base(folders: dict[str, Path]) -> None:
    base = bert(folders)
    before = logits(base)
    wrapped = get_peft_model(base, SparseConfig(entries=BERT))
    assert torch.equal(logits(wrapped), before)
    embedding = base.get_submodule("bert.embeddings.word_embeddings")
    assert isinstance(embedding, SparseLayer)
    assert embedding.embedding_dim == 32
    assert embedding.padding_idx == 0
    assert base.get_submodule("bert.encoder.layer.0.attention.self.query").in_features == 32
    assert not hasattr(embedding, "in_features")
    # A module of which only the bias changes has no tensors for its weight.
    only_bias = base.get_submodule("bert.encoder.layer.1.output.dense")
    assert not len(only_bias.sparse_values)
    assert len(only_bias.sparse_bias_values["default"]) == 3
    state = get_peft_model_state_dict(wrapped)
    assert len(state) == 3 * len(BERT)
    assert {t.dtype for n, t in state.items() if n.endswith("values")} == {torch.float32}
    assert {t.dtype for n, t in state.items() if not n.endswith("values")} == {torch.int64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["llama", "bert"])
def test_functional_merged_and_by_hand_are_one_and_unmerging_is_exact(
    folders: dict[str, Path], which: str, dtype: torch.dtype
) -> None:
    make, entries = {"llama": (llama, LLAMA), "bert": (bert, BERT)}[which]
    base, plain = make(folders, dtype), make(folders, dtype)
    before, parameters = weights_of(base), {n: id(p) for n, p in base.named_parameters()}
    start = logits(base)
    wrapped = get_peft_model(base, SparseConfig(entries=entries), adapter_name="one")
    wrapped.add_adapter("two", SparseConfig(entries=entries))
    shake(wrapped, 1, "one")
    shake(wrapped, 2, "two")
    wrapped.base_model.set_adapter(["one", "two"])
    expected = logits(by_hand(plain, wrapped, ("one", "two")))
    assert not torch.allclose(expected, start)
    functional = logits(wrapped)
    assert torch.equal(functional, expected)
    wrapped.merge_adapter()
    assert torch.equal(logits(wrapped), expected)
    wrapped.unmerge_adapter()
    assert torch.equal(logits(wrapped), functional)
    wrapped.merge_adapter(["two"])
    assert torch.equal(logits(wrapped), logits(by_hand(plain, wrapped, ("two",))))
    wrapped.merge_adapter(["one"])
    assert torch.equal(logits(wrapped), logits(by_hand(plain, wrapped, ("two", "one"))))
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), start)
    wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    restored = wrapped.unload()
    assert_same(restored, before)
    assert {n: id(p) for n, p in restored.named_parameters()} == parameters
    assert restored.get_output_embeddings().weight is restored.get_input_embeddings().weight


def test_a_scaling_embedding_keeps_its_scale(folders: dict[str, Path]) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders["gemma3_text"], dtype=torch.float32).eval()
    plain = copy.deepcopy(base)
    wrapped = get_peft_model(base, SparseConfig(entries={"model.embed_tokens": 200}))
    shake(wrapped)
    expected = logits(by_hand(plain, wrapped))
    assert not torch.allclose(expected, logits(plain))
    assert torch.equal(logits(wrapped), expected)
    wrapped.merge_adapter()
    assert torch.equal(logits(wrapped), expected)


@pytest.mark.parametrize("which", ["llama", "bert"])
def test_the_output_embedding_stays_as_it_is(folders: dict[str, Path], which: str) -> None:
    base = {"llama": llama, "bert": bert}[which](folders)
    output, source = base.get_output_embeddings(), base.get_input_embeddings()
    assert output.weight is source.weight
    before = output.weight.detach().clone()
    name = next(n for n, m in base.named_modules() if m is source)
    wrapped = get_peft_model(base, SparseConfig(entries={name: 100}))
    shake(wrapped)
    states = torch.randn(3, 32)
    expected = output(states)
    wrapped.merge_adapter()
    assert torch.equal(output.weight, before)
    assert torch.equal(output(states), expected)
    assert not torch.equal(source.weight, before)
    assert base.get_output_embeddings().weight is output.weight
    wrapped.unmerge_adapter()
    assert source.weight is output.weight


def test_an_encoder_decoders_embeddings_change_together_and_its_output_embedding_does_not(
    folders: dict[str, Path],
) -> None:
    base = AutoModelForSeq2SeqLM.from_pretrained(folders["t5"], dtype=torch.float32).eval()
    plain, before = copy.deepcopy(base), weights_of(base)
    start = logits(base, decoder_input_ids=IDS)
    entries = {
        "shared": 500,
        "encoder.block.0.layer.0.SelfAttention.q": 20,
        "decoder.block.1.layer.2.DenseReluDense.wo": 9,
    }
    wrapped = get_peft_model(base, SparseConfig(entries=entries))
    shake(wrapped)
    changed = by_hand(plain, wrapped)
    for module in (changed.encoder.embed_tokens, changed.decoder.embed_tokens):
        module.weight = changed.shared.weight
    expected = logits(changed, decoder_input_ids=IDS)
    assert not torch.allclose(expected, start)
    assert isinstance(base.encoder.embed_tokens, SharingLayer)
    assert torch.equal(logits(wrapped, decoder_input_ids=IDS), expected)
    assert {n.split(".sparse_")[0] for n in get_peft_model_state_dict(wrapped)} == {
        f"base_model.model.{site}" for site in entries
    }
    assert get_model_status(wrapped).merged_adapters == []
    wrapped.merge_adapter()
    assert torch.equal(logits(wrapped, decoder_input_ids=IDS), expected)
    assert get_model_status(wrapped).merged_adapters == ["default"]
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, decoder_input_ids=IDS), start)
    restored = wrapped.unload()
    assert_same(restored, before)
    assert restored.encoder.embed_tokens.weight is restored.lm_head.weight


def test_a_weight_that_a_model_reads_itself_is_the_changed_one(tmp_path: Path) -> None:
    folder = save_tiny_model(
        tmp_path, "deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=16
    )
    base = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain = copy.deepcopy(base)
    wrapped = get_peft_model(base, SparseConfig(entries={"deberta.encoder.rel_embeddings": 300}))
    shake(wrapped)
    expected = logits(by_hand(plain, wrapped))
    assert not torch.allclose(expected, logits(plain))
    assert torch.equal(logits(wrapped), expected)


def test_gradients_reach_the_values_alone(folders: dict[str, Path]) -> None:
    base = llama(folders)
    wrapped = get_peft_model(base, SparseConfig(entries=LLAMA, task_type="CAUSAL_LM"))
    shake(wrapped)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    got = {n for n, p in wrapped.named_parameters() if p.grad is not None}
    assert got == {f"base_model.model.{site}.sparse_values.default" for site in LLAMA}
    # Each is what the weight itself would get at that entry.
    changed = by_hand(llama(folders), wrapped)
    changed.get_output_embeddings().weight.requires_grad_(False)
    changed(input_ids=IDS, labels=IDS).loss.backward()
    for path, layer, _ in list(layers(wrapped))[::2]:
        whole = changed.get_submodule(path).weight.grad.view(-1)
        torch.testing.assert_close(
            layer.sparse_values["default"].grad, whole[layer.sparse_indices["default"]], rtol=1e-5, atol=1e-7
        )


# PEFT's life cycle


def classifier(folders: Mapping[str, Path]) -> Any:
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=3, dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.filterwarnings("ignore:Some weights")
def test_a_folder_gives_the_same_again_with_its_head_and_a_second_one_beside_it(
    folders: dict[str, Path], tmp_path: Path, low_memory: bool
) -> None:
    config = SparseConfig(entries=BERT, modules_to_save=["classifier"], task_type="SEQ_CLS")
    wrapped = get_peft_model(classifier(folders), config)
    shake(wrapped, 1)
    nn.init.normal_(wrapped.base_model.model.classifier.modules_to_save["default"].weight)
    wrapped.save_pretrained(tmp_path / "one")
    first = logits(wrapped)
    state = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert len(state) == 3 * len(BERT) + 2
    assert Adapter.load(tmp_path / "one").modules == tuple(sorted(BERT))

    more = {"bert.encoder.layer.0.output.dense": 50, **BERT}
    other = get_peft_model(classifier(folders), SparseConfig(entries=more, modules_to_save=["classifier"]))
    shake(other, 2)
    other.save_pretrained(tmp_path / "two")

    again = PeftModel.from_pretrained(classifier(folders), tmp_path / "one", low_cpu_mem_usage=low_memory)
    assert torch.equal(logits(again), first)
    assert all(torch.equal(t, state[n]) for n, t in get_peft_model_state_dict(again).items())
    assert not any(p.requires_grad for p in again.parameters())
    again.load_adapter(tmp_path / "two", adapter_name="second", low_cpu_mem_usage=low_memory)
    assert torch.equal(logits(again), first)
    for _, layer, _ in layers(again):  # PEFT itself has at most one head active.
        layer.set_adapter(["default", "second"])
    both = logits(again)
    for path, layer, kind in layers(again):
        if len(layer.part(kind, "values")) == 2:
            weight = getattr(layer.get_base_layer(), kind).detach().reshape(-1).clone()
            for name in ("default", "second"):
                weight[layer.part(kind, "indices")[name]] += layer.part(kind, "values")[name].detach()
            torch.testing.assert_close(layer.changed(kind).detach().reshape(-1), weight, rtol=0, atol=0)
            assert path.removesuffix(".bias") in {site.removesuffix(".bias") for site in BERT}
    assert not torch.allclose(both, first)
    again.base_model.set_adapter("second")
    third = logits(again)
    again.delete_adapter("second")
    again.set_adapter("default")
    assert torch.equal(logits(again), first)
    assert not torch.allclose(third, first)


def test_a_long_list_of_targets_never_saves_the_embeddings_themselves(folders: dict[str, Path], tmp_path: Path) -> None:
    base = llama(folders)
    targets = [n for n, m in base.named_modules() if getattr(m, "weight", None) is not None and n != "lm_head"]
    config = SparseConfig(entries=dict.fromkeys(targets, 2), target_modules=["embed_tokens", *targets])
    assert len(config.modules) >= 20
    wrapped = get_peft_model(base, config)
    shake(wrapped)
    wrapped.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".sparse_" in name for name in state)
    again = PeftModel.from_pretrained(llama(folders), tmp_path)
    assert torch.equal(logits(again), logits(wrapped))
    assert get_peft_model_state_dict(again).keys() == state.keys()


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_merging_and_unloading_leaves_the_differences_in_untied_weights(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    wrapped = get_peft_model(llama(folders), SparseConfig(entries=LLAMA))
    shake(wrapped)
    expected = logits(wrapped)
    made = wrapped.merge_and_unload()
    assert not [n for n, _ in made.named_parameters() if "sparse_" in n or "base_layer" in n]
    assert torch.equal(logits(made), expected)
    assert made.config.tie_word_embeddings is False
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again), expected)


def test_a_union_of_supports_is_loaded_whatever_the_configuration_counts(folders: dict[str, Path]) -> None:
    more = {site: count + 1 for site, count in BERT.items()}
    wide, narrow = (get_peft_model(bert(folders), SparseConfig(entries=entries)) for entries in (more, BERT))
    shake(wide)
    set_peft_model_state_dict(narrow, get_peft_model_state_dict(wide))
    assert torch.equal(logits(narrow), logits(wide))
    values = [p for n, p in narrow.named_parameters() if "sparse_" in n]
    assert len(values) == len(BERT)
    assert all(p.requires_grad and p.is_leaf for p in values)
    narrow.merge_adapter()
    with pytest.raises(AdapterError, match="merged"):
        set_peft_model_state_dict(narrow, get_peft_model_state_dict(wide))


# Refusals


def test_values_without_meaning_are_refused() -> None:
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="entries cannot change"):
            SparseConfig(entries={"x": wrong})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="layers_pattern"):
        SparseConfig(layers_pattern="layers")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "of no weight"),
        ({"model.layers.7.mlp.up_proj": 1}, "no module 'model.layers.7.mlp.up_proj'"),
        ({"model.layers.0.mlp.up_proj.bias": 1}, "Linear has no bias"),
        ({"model.layers.0.mlp": 1}, "LlamaMLP has no weight"),
        ({"model.norm": 33}, "33 entries of a weight cannot change: it has 32"),
    ],
)
def test_what_the_model_lacks_is_refused(folders: dict[str, Path], entries: dict[str, int], message: str) -> None:
    with pytest.raises((AdapterError, ConfigError), match=message):
        get_peft_model(llama(folders), SparseConfig(entries=entries))


def test_quantised_weights_are_refused() -> None:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(AdapterError, match="quantised") as error:
        SparseLayer(linear, "default", {"weight": 1})
    assert "quantization=none" in str(error.value)


def test_tensors_of_another_weight_are_refused(folders: dict[str, Path]) -> None:
    wrapped = get_peft_model(llama(folders), SparseConfig(entries={"model.layers.0.mlp.up_proj": 3}))
    name = "base_model.model.model.layers.0.mlp.up_proj.sparse_"
    good = get_peft_model_state_dict(wrapped)
    for role, tensor, message in (
        ("shape", torch.tensor([32, 64]), "does not fit"),
        ("indices", torch.tensor([0, 2, 1]), "ascending"),
        ("indices", torch.tensor([0, 1, 64 * 32]), "ascending"),
        ("indices", torch.tensor([-1, 1, 2]), "ascending"),
        ("indices", torch.tensor([0, 1]), "ascending"),
    ):
        with pytest.raises(AdapterError, match=message):
            set_peft_model_state_dict(wrapped, {**good, f"{name}{role}": tensor})


def test_a_broken_adapter_is_not_merged_where_it_is_asked(folders: dict[str, Path]) -> None:
    base = llama(folders)
    before = weights_of(base)
    wrapped = get_peft_model(base, SparseConfig(entries={"model.norm": 3}))
    base.model.norm.sparse_values["default"].data[1] = torch.nan
    with pytest.raises(ValueError, match="NaNs"):
        wrapped.merge_adapter(safe_merge=True)
    assert_same(wrapped.unload(), before)


# Files


@st.composite
def written(draw: Any) -> dict[str, tuple[tuple[int, ...], list[int], list[float]]]:
    """Sites with a shape, indices and values: weights, biases, or both of a module."""
    names = draw(
        st.lists(st.sampled_from(["a.q", "a.q.bias", "b.embed", "c.dense.bias", "d"]), min_size=1, unique=True)
    )
    found = {}
    for name in names:
        axes = 1 if name.endswith("bias") else 2
        shape = tuple(draw(st.lists(st.integers(1, 5), min_size=axes, max_size=axes)))
        size = int(np.prod(shape))
        chosen = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))
        values = draw(st.lists(st.floats(-4, 4, width=16), min_size=len(chosen), max_size=len(chosen)))
        found[name] = (shape, chosen, values)
    return found


def site_of(shape: tuple[int, ...], chosen: list[int], values: list[float], dtype: Any = np.float32) -> Site:
    return Site(
        {
            "indices": np.array(chosen, np.int64),
            "values": np.array(values, dtype),
            "shape": np.array(shape, np.int64),
        }
    )


@settings(max_examples=60, deadline=None)
@given(sites=written(), dtype=st.sampled_from([np.float16, np.float32]))
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, sites: Any, dtype: Any) -> None:
    made = {name: site_of(*site, dtype) for name, site in sites.items()}
    # The layout that a merge goes by can be another than what it computes.
    stale = {name: Place(dict.fromkeys(("indices", "values", "shape"), (1,))) for name in made}
    specs, values = LAYOUT.encode(stale, lambda name: made[name], np.dtype(dtype))
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    write_tensors(path, specs, values)
    opened = LAYOUT.open({}, TensorFile(path))
    assert list(opened.layout) == sorted(made)
    assert opened.others == ()
    assert LAYOUT.announced(stale, specs) == opened.layout
    for name, site in made.items():
        read = opened.read(name)
        assert all(np.array_equal(read.tensors[role], tensor) for role, tensor in site.tensors.items())
        assert read.tensors["values"].dtype == dtype
    config = LAYOUT.config_for({"target_modules": ["gone"], "peft_type": "SPARSE"}, opened.layout)
    assert config["target_modules"] == sorted({name.removesuffix(".bias") for name in made})
    assert config["entries"] == {name: len(site.tensors["values"]) for name, site in sorted(made.items())}
    assert SparseConfig(entries=config["entries"], target_modules=config["target_modules"]).modules.keys() == set(
        config["target_modules"]
    )


def test_two_sets_of_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    site = site_of((4,), [0, 2], [1.0, 2.0])
    names = [f"base_model.model.a.sparse_bias_{role}" for role in site.tensors]
    names += [f"base_model.model.a.bias.sparse_{role}" for role in site.tensors]
    arrays = [*site.tensors.values(), *site.tensors.values()]
    write_tensors(tmp_path / "x", [(n, a.shape, a.dtype) for n, a in zip(names, arrays, strict=True)], arrays)
    with pytest.raises(AdapterError, match="two tensors for one place"):
        LAYOUT.open({}, TensorFile(tmp_path / "x"))


def test_a_bias_lacking_a_tensor_and_a_strange_one_are_refused(tmp_path: Path) -> None:
    one = np.ones(1, np.int64)
    for number, (names, message) in enumerate(
        (
            (["a.sparse_bias_indices", "a.sparse_bias_shape"], "a.bias lacks sparse_values"),
            (["a.sparse_offset_indices"], "variant"),
            (["a.score"], "no tensors named"),
        )
    ):
        path = tmp_path / str(number)
        write_tensors(path, [(n, (1,), one.dtype) for n in names], [one] * len(names))
        with pytest.raises(AdapterError, match=message):
            LAYOUT.open({}, TensorFile(path))
