"""What a run costs: parameters against real models, arithmetic and saved bytes against torch's own counts, and laws."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lingraft.config import AdapterConfig, BackboneConfig, validated
from lingraft.config import Experiment as ExperimentConfig
from lingraft.costs import cost, reading, shape_for
from lingraft.costs.arithmetic import Work, adapter_parameters, gpu_hours, inference_flops, peak_memory, training_flops
from lingraft.costs.shapes import KNOWN, reader_of, shape_named, shape_of
from lingraft.errors import BackboneError, UserError
from lingraft.locating import Located, locate
from lingraft.plan import Plan, make_plan
from lingraft.tasks.sources import without_the_hub
from tests.conftest import save_tiny_model

SMALL = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
SMALL_T5 = {
    "vocab_size": 300,
    "d_model": 48,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 112,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "llama, tied": ("llama", {**GROUPED, "tie_word_embeddings": True}),
    "llama, wide heads and biases": ("llama", {**GROUPED, "head_dim": 20, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", GROUPED),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 20}),
    "gemma": ("gemma", {**GROUPED, "head_dim": 20}),
    "gemma2": ("gemma2", {**GROUPED, "head_dim": 20}),
    "gemma3": ("gemma3_text", {**GROUPED, "head_dim": 20}),
    "bert": ("bert", {**SMALL, "max_position_embeddings": 64}),
    "xlm-r": ("xlm-roberta", {**SMALL, "type_vocab_size": 1, "max_position_embeddings": 66}),
    "t5": ("t5", SMALL_T5),
    "t5, gated": ("t5", {**SMALL_T5, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("mt5", SMALL_T5),
    "umt5": ("umt5", SMALL_T5),
}
SMALL_NLLB = {
    "vocab_size": 300,
    "d_model": 48,
    "encoder_layers": 8,
    "decoder_layers": 6,
    "encoder_ffn_dim": 112,
    "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 130,
    "pad_token_id": 0,
}


def built(architecture: str, sizes: dict[str, Any], device: str = "cpu") -> Any:
    config = AutoConfig.for_model(architecture, **sizes)
    auto: Any = AutoModelForCausalLM
    if architecture in ("bert", "xlm-roberta"):
        auto = AutoModel
    elif config.is_encoder_decoder:
        auto = AutoModelForSeq2SeqLM
    with torch.device(device):
        return auto.from_config(config, attn_implementation="eager")


def counted(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", [*MODELS, "m2m_100"])
def test_parameters_and_linear_layers_are_those_of_the_real_model(name: str) -> None:
    model = built(*MODELS.get(name, (name, SMALL_NLLB)), device="meta")
    shape = shape_of(model.config.to_dict())
    assert shape.parameters == counted(model)
    layers = {
        path: (m.in_features, m.out_features)
        for path, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and path != "lm_head" and "pooler" not in path
    }
    assert {layer.path: (layer.inputs, layer.outputs) for layer in shape.linear} == layers


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("NousResearch/Llama-2-7b-hf", 6_738_415_616),
        ("FacebookAI/xlm-roberta-base", 278_043_648),
        ("google-t5/t5-base", 222_903_552),
        ("google/mt5-base", 582_401_280),
        ("google/gemma-3-270m", 268_098_176),
        ("FacebookAI/xlm-roberta-large", 559_890_432),
        ("google/mt5-xl", 3_742_619_648),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("google/gemma-2-9b", 9_241_705_984),
        ("facebook/nllb-200-distilled-600M", 615_073_792),
        ("facebook/nllb-200-3.3B", 3_344_863_232),
    ],
)
def test_known_backbones_have_their_published_sizes(name: str, parameters: int) -> None:
    config = dict(KNOWN[name])
    shape = shape_of(config)
    assert shape.parameters == parameters
    # transformers makes every new T5 with one embedding, and keeps two where a checkpoint has them, as mT5's do.
    second = shape.vocabulary * shape.width if "mt5" in name else 0
    assert counted(built(config.pop("model_type"), config, device="meta")) + second == parameters


def test_the_language_part_of_a_model_with_several_parts_is_counted() -> None:
    config = KNOWN["google/gemma-3-270m"]
    whole = {"model_type": "gemma3", "text_config": config, "vision_config": {"model_type": "siglip"}}
    assert shape_of(whole) == shape_of(config)


def test_what_is_not_known_is_said() -> None:
    with pytest.raises(BackboneError, match="'mamba'"):
        shape_of({"model_type": "mamba"})
    with pytest.raises(BackboneError, match="hidden_size"):
        shape_of({"model_type": "llama"})
    with pytest.raises(UserError, match="unknown device 'H1000'"):
        gpu_hours(1.0, "H1000")


ADAPTERS = {
    "lora": AdapterConfig(),
    "lora on two roles": AdapterConfig(rank=4, modules=("attention.query", "v_proj")),
    "lora in the lower layer": AdapterConfig(modules="layer:0"),
    "ia3": AdapterConfig(family="ia3"),
    "prefix": AdapterConfig(family="prefix", tokens=5),
    "pfeiffer": AdapterConfig(family="bottleneck", reduction=2),
    "houlsby": AdapterConfig(family="bottleneck", positions="houlsby"),
    "madx": AdapterConfig(family="bottleneck", positions="madx", reduction=2),
    "madx without the last layer": AdapterConfig(family="bottleneck", positions="madx", leave_out_last=True),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_has_as_many_numbers_as_a_fresh_one(name: str, tiny: Any) -> None:
    from lingraft.structures import fresh

    _, tensors = fresh(tiny, ADAPTERS[name], seed=0)
    shape = shape_of(tiny.model.config.to_dict())
    assert adapter_parameters(shape, ADAPTERS[name]) == sum(t.numel() for t in tensors.values())


@pytest.mark.parametrize("architecture", ["llama", "bert", "mt5"])
def test_a_language_adapter_has_as_many_numbers_as_a_fresh_one(architecture: str, tmp_path: Path) -> None:
    """MAD-X's: a bottleneck a layer, by stack without the last where that is asked, and one coupling."""
    from lingraft.backbones import Backbone
    from lingraft.structures import fresh, fresh_coupling

    folder = save_tiny_model(tmp_path / architecture, architecture)
    backbone = Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")))
    shape = shape_of(backbone.model.config.to_dict())
    for leave_out in (False, True):
        config = AdapterConfig(
            family="bottleneck", positions="madx", reduction=2, invertible=True, leave_out_last=leave_out
        )
        made = {**fresh(backbone, config, 0)[1], **fresh_coupling(backbone, config, 0)[1]}
        assert adapter_parameters(shape, config) == sum(t.numel() for t in made.values())


def test_a_sparse_difference_changes_at_most_what_there_is() -> None:
    shape = shape_of(KNOWN["FacebookAI/xlm-roberta-base"])
    assert adapter_parameters(shape, AdapterConfig(family="sparse", entries=7_667_712)) == 7_667_712
    few = AdapterConfig(family="sparse", entries=10**12, modules="layer:0")
    assert adapter_parameters(shape, few) == shape.projections / 12
    named = AdapterConfig(family="sparse", entries=10**12, modules="word_embeddings")
    assert adapter_parameters(shape, named) == adapter_parameters(shape, AdapterConfig(family="sparse", entries=10**12))


def test_both_phases_of_a_sparse_difference_take_their_memory() -> None:
    """By hand, in bfloat16: 16 bytes a number and its start in the first phase; 20 an entry and its start in the second."""
    shape = shape_of(KNOWN["NousResearch/Llama-2-7b-hf"])
    numbers = 32_000 * 4096 + shape.projections + 65 * 4096
    for change, expected in {
        (): 18 * numbers,
        (("select", "gradient"),): 6 * numbers,
    }.items():
        config = AdapterConfig(family="sparse", entries=1_000_000, **dict(change))  # pyright: ignore[reportArgumentType]
        # Beside it, for a moment, the gradient of the largest matrix.
        assert peak_memory(shape, config, "bfloat16", 1, 64).adapter == expected + 2 * 4096 * 11_008


def test_lora_on_llama_2_has_the_numbers_of_its_published_files() -> None:
    shape = shape_of(KNOWN["NousResearch/Llama-2-7b-hf"])
    # Of a layer at rank 8, by hand: 8 · (4 · 2 · 4096 + 3 · (4096 + 11008)).
    assert adapter_parameters(shape, AdapterConfig(rank=8)) == 32 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    # (IA)³: a key and a value of 4096 and 11008 before the output of the feed-forward part.
    assert adapter_parameters(shape, AdapterConfig(family="ia3")) == 32 * (4096 + 4096 + 11008)


FLOPS = {
    "llama": ("llama", {**GROUPED, "num_hidden_layers": 8, "intermediate_size": 192}),
    "gemma3": ("gemma3_text", {**GROUPED, "num_hidden_layers": 8, "intermediate_size": 192, "head_dim": 20}),
    "xlm-r": ("xlm-roberta", {**SMALL, "num_hidden_layers": 8, "max_position_embeddings": 130}),
    "mt5": ("mt5", {**SMALL_T5, "num_layers": 8, "num_decoder_layers": 8}),
}


def passed(model: Any, length: int) -> Any:
    """The last states of a forward pass, before the output embedding; of an encoder-decoder the logits of 16 tokens."""
    ids = torch.arange(length)[None] % 290 + 5
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, decoder_input_ids=ids[:, :16]).logits
    if model.config.model_type == "xlm-roberta":
        return model(input_ids=ids).last_hidden_state
    return model.model(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", FLOPS)
@pytest.mark.parametrize("length", [24, 96])
def test_arithmetic_is_what_torch_counts(name: str, length: int) -> None:
    from peft import LoraConfig, get_peft_model

    model = built(*FLOPS[name])
    shape = shape_of(model.config.to_dict())
    work = Work(items=1, tokens=length, length=length)
    if shape.kind == "encoder-decoder":
        work = Work(items=1, tokens=length, length=length, scored=16, outputs=16, output_length=16)
    with FlopCounterMode(display=False) as read, torch.no_grad():
        passed(model, length)
    assert inference_flops(shape, work) == pytest.approx(read.get_total_flops(), rel=0.1)

    targets = sorted({layer.path.rsplit(".", 1)[-1] for layer in shape.linear})
    if shape.kind == "encoder":
        targets = [layer.path for layer in shape.linear]
    wrapped: Any = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    with FlopCounterMode(display=False) as both:
        passed(wrapped.base_model.model, length).sum().backward()
    assert training_flops(shape, work, trained) == pytest.approx(both.get_total_flops(), rel=0.1)


@pytest.mark.parametrize(("kind", "sizes"), [("mt5", FLOPS["mt5"][1]), ("m2m_100", SMALL_NLLB)])
def test_a_text_that_is_read_for_its_states_goes_through_the_encoder_alone(kind: str, sizes: dict[str, Any]) -> None:
    model = built(kind, sizes).eval()  # In training M2M-100 leaves out layers at random.
    shape = reader_of(shape_of(model.config.to_dict()))
    with FlopCounterMode(display=False) as read, torch.no_grad():
        model.get_encoder()(input_ids=torch.arange(64)[None] + 5)
    assert inference_flops(shape, Work(items=1, tokens=64, length=64)) == pytest.approx(read.get_total_flops(), rel=0.1)
    decoder = shape_of(MODELS["llama"][1] | {"model_type": "llama"})
    assert reader_of(decoder) == decoder


def test_positions_that_take_a_loss_are_projected_twice() -> None:
    from lingraft.losses import summed_cross_entropy

    shape = shape_of(MODELS["llama"][1] | {"model_type": "llama"})
    states = torch.randn(64, shape.width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        summed_cross_entropy(states, torch.randn(shape.vocabulary, shape.width), torch.zeros(64).long()).backward()
    assert training_flops(shape, Work(scored=64)) == counter.get_total_flops()


def test_what_is_written_costs_what_reading_it_would() -> None:
    shape = shape_of(MODELS["llama"][1] | {"model_type": "llama"})
    read = inference_flops(shape, Work(items=2, tokens=100, scored=100))
    assert inference_flops(shape, Work(items=2, written=100)) == pytest.approx(
        read + 4 * shape.attention * shape.layers * 100 * 25
    )


def saved_bytes(architecture: str, sizes: dict[str, Any], targets: list[str], length: int) -> int:
    """Bytes that torch keeps between the two passes of a LoRA training in bfloat16, parameters aside."""
    from peft import LoraConfig, get_peft_model

    config = AutoConfig.for_model(architecture, **sizes)
    model: Any = AutoModelForCausalLM.from_config(config).bfloat16()
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=targets, lora_dropout=0.0))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    own = {t.untyped_storage().data_ptr() for t in [*wrapped.parameters(), *wrapped.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        states = wrapped.base_model.model.model(input_ids=torch.ones(1, length).long(), use_cache=False)
    assert states.last_hidden_state.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["all"]])
def test_saved_activations_are_what_torch_saves(architecture: str, targets: list[str]) -> None:
    sizes = {**GROUPED, "hidden_size": 192, "intermediate_size": 512, "head_dim": 48, "num_key_value_heads": 4}
    shape = shape_of({**sizes, "model_type": architecture})
    adapter = AdapterConfig(rank=2, dropout=0.0, modules="all" if targets == ["all"] else tuple(targets))
    names = sorted({layer.path.rsplit(".", 1)[-1] for layer in shape.linear}) if targets == ["all"] else targets
    counts = [saved_bytes(architecture, {**sizes, "num_hidden_layers": n}, names, 64) for n in (2, 4)]
    per_layer = (counts[1] - counts[0]) / 2
    estimated = peak_memory(shape, adapter, "bfloat16", 1, 64).activations / shape.layers
    assert estimated == pytest.approx(per_layer, rel=0.15)


def test_the_memory_of_weights_and_of_the_adapter_by_hand() -> None:
    shape, adapter = shape_of(KNOWN["NousResearch/Llama-2-7b-hf"]), AdapterConfig()
    whole = peak_memory(shape, adapter, "bfloat16", 1, 128)
    assert whole.weights == 2 * 6_738_415_616
    assert whole.adapter == 16 * 19_988_480
    assert whole.logits == 128 * 32_000 * 6
    small = peak_memory(shape, adapter, "bfloat16", 1, 128, quantization="nf4")
    # Two embeddings and 65 norms stay as they are.
    assert small.weights == 2 * (2 * 32_000 * 4096 + 65 * 4096) + shape.projections * 0.5625
    assert whole.total == whole.weights + whole.adapter + whole.activations + whole.logits


SHAPES = [shape_of({"model_type": kind} | sizes) for kind, sizes in MODELS.values()]
TOKENS = st.integers(1, 4096)


@given(st.sampled_from(SHAPES), TOKENS, TOKENS, st.integers(1, 64), st.sampled_from(sorted(ADAPTERS)))
def test_more_tokens_cost_more(shape: Any, length: int, more: int, batch: int, name: str) -> None:
    if name == "lora on two roles":
        name = "lora"  # v_proj is not a module of every architecture
    adapter = ADAPTERS[name]

    def memory(batch: int, length: int, **kinds: str) -> float:
        return peak_memory(shape, adapter, kinds.pop("dtype", "bfloat16"), batch, length, **kinds).total

    assert memory(batch, length) < memory(batch, length + more) and memory(batch, length) < memory(batch + more, length)
    assert memory(batch, length, quantization="nf4") < memory(batch, length, quantization="int8")
    assert memory(batch, length, quantization="int8") < memory(batch, length) < memory(batch, length, dtype="float32")
    reading = peak_memory(shape, None, "bfloat16", batch, length)
    assert reading.adapter == 0 and reading.weights == peak_memory(shape, adapter, "bfloat16", batch, length).weights
    few, many = Work(1, length, length), Work(1, length + more, length + more)
    assert inference_flops(shape, few) < inference_flops(shape, many)
    assert inference_flops(shape, few) < training_flops(shape, few) < training_flops(shape, few, trained=1)
    assert training_flops(shape, few) < training_flops(shape, many)


@given(st.floats(1e9, 1e24), st.floats(0.05, 1.0))
def test_hours_are_in_proportion(flops: float, utilisation: float) -> None:
    hours = gpu_hours(flops, "A100", utilisation)
    assert hours * 3600 * utilisation * 312e12 == pytest.approx(flops)
    assert gpu_hours(2 * flops, "A100", utilisation) == pytest.approx(2 * hours)
    assert gpu_hours(flops, "H100", utilisation) < hours


def test_data_sets_of_the_hub_are_known_by_their_published_sizes() -> None:
    assert sum((reading.items("mgsm", "en", "train") or {}).values()) == 7_473
    assert sum((reading.items("xlsum", "sw", "test") or {}).values()) == 987
    assert reading.items("xlsum", "el", "test") is None and reading.items("recipes", "en", "test") is None
    english, chinese = reading.items("xquad", "en", "test"), reading.items("xquad", "zh", "test")
    assert english and chinese and sum(english.values()) == sum(chinese.values()) == 1_190
    assert min(chinese)[0] < min(english)[0]


def experiment(**changes: Any) -> ExperimentConfig:
    tree = {
        "name": "costs",
        "backbone": {"model": "x", "dtype": "float32"},
        "task": "topics",
        "targets": ["sw"],
        "development": ["vi"],
        "reference": {"text": "udhr/{language}.txt", "segment_tokens": 64, "max_segments": 10},
        "training": {"epochs": 2, "batch_size": 4},
        "methods": ["vanilla", "eng-ft", "adamergex", "control-add"],
        "selection": {"weights": [1.0]},
        "data_dir": "bundled",
    }
    return validated(ExperimentConfig, {**tree, **changes})


@pytest.fixture
def planned(tiny_folder: Path) -> Any:
    def plan(**changes: Any) -> Plan:
        backbone = {"model": str(tiny_folder), "dtype": "float32"}
        return make_plan(asked := experiment(backbone=backbone, **changes), locate(asked.backbone))

    return plan


def test_the_cost_of_a_plan(planned: Any, tiny_folder: Path) -> None:
    plan = planned()
    shape = shape_of(json.loads((tiny_folder / "config.json").read_text()))
    found = cost(plan, shape)
    trained = [s for s in plan.steps if s.kind == "train" and not s.config.get("initial")]
    # The adapter all start from is no work; the rest is counted once.
    assert found["steps"]["train"]["count"] == len(trained) == 4
    assert found["steps"]["predict"]["count"] == sum(s.kind == "predict" for s in plan.steps)
    assert found["unknown"] == [] and found["memory"] > 4 * shape.parameters
    assert found["flops"] == pytest.approx(sum(row["flops"] for row in found["steps"].values()))
    texts = [s for s in trained if "reference" in s.config]
    alone = cost(plan, shape, texts)
    assert alone["steps"]["train"]["tokens"] == pytest.approx(len(texts) * 2 * 10 * 64)
    assert alone["flops"] < found["flops"]


STACKED = {
    "methods": ["madx", "lfsft"],
    "evaluation": {"source": False},
    "lfsft": {"language_entries": 500, "task_entries": 500, "first_epochs": 1.0, "reference_first_epochs": 2.0},
}


def test_what_stands_beneath_is_read_through_and_two_phases_read_twice(planned: Any, tiny_folder: Path) -> None:
    shape = shape_of(json.loads((tiny_folder / "config.json").read_text()))
    plan = planned(**STACKED)
    costs = {step.label: cost(plan, shape, [step]) for step in plan.steps if step.kind in ("train", "predict")}

    def of(label: str, what: str = "tokens") -> float:
        (row,) = costs[label]["steps"].values()
        return row[what]

    # Of 2 epochs each: language adapters read 10 segments of 64 tokens; LF-SFT reads twice more to select, of the task once.
    assert of("train madx clm sw seed 0") == of("train lfsft clm sw seed 0") / 2 == 2 * 10 * 64
    assert of("train lfsft topics en seed 0") == pytest.approx(1.5 * of("train madx topics en seed 0"))
    # A gradient for every weight is half as much again; bottlenecks beneath are read through, differences are in the weights.
    assert of("train lfsft clm sw seed 0", "flops") > of("train madx clm sw seed 0", "flops") * 1.05
    plain = cost(planned(methods=["eng-ft"], evaluation={"source": False}), shape)
    per_token = {
        name: cells["steps"]["predict"]["flops"] / cells["steps"]["predict"]["tokens"]
        for name, cells in {
            "eng-ft": plain,
            "madx": costs["predict madx seed 0 sw test"],
            "lfsft": costs["predict lfsft seed 0 sw test"],
        }.items()
    }
    assert per_token["madx"] > per_token["eng-ft"] == pytest.approx(per_token["lfsft"])
    language = adapter_parameters(shape, plan.experiment.madx.language_adapter)
    assert per_token["madx"] - per_token["lfsft"] == pytest.approx(2 * language)


def test_a_graft_of_language_adapters_is_as_large_as_they_are(planned: Any, tiny_folder: Path) -> None:
    shape = shape_of(json.loads((tiny_folder / "config.json").read_text()))
    plan = planned(methods=["madx-graft"], selection={"weights": [0.5]})
    by_weight = {
        step.label: cost(plan, shape, [step])["flops"]
        for step in plan.steps
        if step.kind == "predict" and step.config["split"] == "validation"
    }
    assert len(by_weight) == 3 and len(set(by_weight.values())) == 1
    tests = [step for step in plan.steps if step.kind == "predict" and step.config["split"] == "test"]
    direct = planned(methods=["madx"], evaluation={"source": False})
    same = [step for step in direct.steps if step.kind == "predict"]
    assert cost(plan, shape, tests)["flops"] == cost(direct, shape, same)["flops"]


def test_twice_the_epochs_are_twice_the_training(planned: Any, tiny_folder: Path) -> None:
    shape = shape_of(json.loads((tiny_folder / "config.json").read_text()))
    once, twice = (cost(planned(training={"epochs": n}), shape)["steps"] for n in (1, 2))
    assert twice["train"]["tokens"] == pytest.approx(2 * once["train"]["tokens"])
    assert twice["predict"]["tokens"] == once["predict"]["tokens"]


def test_a_limit_bounds_what_is_read(planned: Any, tiny_folder: Path) -> None:
    shape = shape_of(json.loads((tiny_folder / "config.json").read_text()))
    whole = cost(planned(methods=["eng-ft"], selection={"weight": 1.0}), shape)["steps"]
    few = cost(planned(methods=["eng-ft"], training={"epochs": 2, "batch_size": 4, "limit": 21}), shape)["steps"]
    assert few["train"]["tokens"] == pytest.approx(whole["train"]["tokens"] / 10)


def test_what_nothing_is_known_of_is_named_and_not_guessed(planned: Any, tiny_folder: Path) -> None:
    shape = shape_of(json.loads((tiny_folder / "config.json").read_text()))
    plan = planned()
    found = cost(plan, shape, lookup=lambda *_: None)
    assert "train topics en seed 0" in found["unknown"]
    assert found["steps"]["train"]["count"] == 3  # the reference text's


def step(kind: str, inputs: Any = None, **config: Any) -> Any:
    return SimpleNamespace(kind=kind, config=config, label=kind, inputs=inputs or {})


def plan_of(*steps: Any) -> Any:
    return SimpleNamespace(experiment=experiment(), steps=steps)


ASKED = {"task": {"task": "mgsm"}, "language": "th", "split": "test", "max_length": 1024, "limit": None}


def test_writing_takes_at_least_the_time_to_read_all_weights_for_every_token() -> None:
    shape = shape_of(KNOWN["NousResearch/Llama-2-7b-hf"])
    known = {(400, 4): 16}
    asked = cost(plan_of(step("predict", **ASKED)), shape, lookup=lambda *_: known)
    wrote = cost(plan_of(step("predict", **ASKED, new_tokens=512)), shape, lookup=lambda *_: known)
    assert asked["steps"]["predict"]["written"] == 0 and wrote["steps"]["predict"]["written"] == 16 * 512
    assert wrote["gpu_hours"] >= 512 * 4 * shape.parameters / 3.35e12 / 3600
    assert wrote["flops"] > asked["flops"]


def test_prompts_are_read_up_to_the_greatest_length() -> None:
    shape = shape_of(KNOWN["google/gemma-3-270m"])
    found = cost(plan_of(step("predict", **ASKED)), shape, lookup=lambda *_: {(10_000_000, 0): 1})
    assert found["steps"]["predict"]["tokens"] == 1024 + 1


def test_memory_is_that_of_the_longest_text() -> None:
    shape = shape_of(KNOWN["google/gemma-3-270m"])
    values = {"training": {"max_length": 1024, "epochs": 1, "batch_size": 4}, "adapter": {"family": "lora"}}
    asked = {**ASKED, **values, "language": "en"}
    short = cost(plan_of(step("train", **asked)), shape, lookup=lambda *_: {(440, 0): 99, (880, 0): 1})
    long = cost(plan_of(step("train", **asked)), shape, lookup=lambda *_: {(440, 0): 99, (9_999_999, 0): 1})
    assert short["memory"] == peak_memory(shape, AdapterConfig(), "float32", 4, 200).total
    assert long["memory"] == peak_memory(shape, AdapterConfig(), "float32", 4, 1024).total


def test_hub_models_that_nothing_here_describes_have_no_shape() -> None:
    config = BackboneConfig(model="someone/unheard-of")
    assert shape_for(Located("someone/unheard-of", "hub:x", "hub", None, config)) is None
    known = BackboneConfig(model="google/mt5-base")
    shape = shape_for(Located("google/mt5-base", "hub:y", "hub", None, known))
    assert shape is not None and shape.kind == "encoder-decoder"


def test_the_shape_of_a_folder(tiny_folder: Path) -> None:
    found = shape_for(locate(BackboneConfig(model=str(tiny_folder))))
    assert found is not None and found.width == 32 and found.key_value == 16


TWO = {
    "task": "nusax",
    "targets": ["jv"],
    "development": [],
    "reference": {"task": "none"},
    "data_dir": None,
    "evaluation": {"source": False},
}


@pytest.fixture
def second(planned: Any, tiny_folder: Path) -> Any:
    """The cost of one kind of step of one method, or of all of a plan's."""
    shape = shape_of(json.loads((tiny_folder / "config.json").read_text()))

    def reckoned(method: str | None = None, kind: str = "train", **changes: Any) -> dict[str, Any]:
        named = (
            {"methods": ["eng-ft", "translate-train", "input-fusion", "flare"]}
            if method is None
            else {"methods": [method]}
        )
        with without_the_hub():
            plan = planned(**{**TWO, **named, **changes})
        steps = [s for s in plan.steps if s.kind == kind and (kind != "train" or "second" in s.config)]
        return cost(plan, shape, steps)

    reckoned.shape = shape  # pyright: ignore[reportFunctionMemberAccess]
    return reckoned


def test_a_second_stage_reads_its_counterparts_too(second: Any) -> None:
    plain, fused, both = (second(name) for name in ("translate-train", "flare", "input-fusion"))
    tokens = [found["steps"]["train"]["tokens"] for found in (plain, fused, both)]
    # 500 items in Javanese, two epochs; the English text is read beside them, or in the same input.
    english, javanese = (items_tokens(language) for language in ("en", "jv"))
    assert tokens[0] == pytest.approx(2 * 500 * (javanese[0] + javanese[1]))
    assert tokens[1] - tokens[0] == pytest.approx(2 * 500 * english[0])
    assert tokens[2] == pytest.approx(tokens[1])
    # Without gradients a text is cheaper than with them.
    assert plain["flops"] < fused["flops"] < both["flops"]
    read = Work(items=1000, tokens=1000 * english[0], length=english[0])
    assert fused["flops"] - plain["flops"] == pytest.approx(inference_flops(second.shape, read))
    assert fused["memory"] > plain["memory"]


def items_tokens(language: str) -> tuple[float, float]:
    """Tokens of a published item and of its answer, as the tiny model's vocabulary has them."""
    shape = shape_of(KNOWN["NousResearch/Llama-2-7b-hf"])
    known = reading.items("nusax", language, "train")
    assert known
    rate = reading.characters_a_token(shape, language)
    prompt, answer = next(iter(known))
    return prompt / rate, answer / rate + 1


def test_what_is_asked_reads_its_counterparts_too(second: Any) -> None:
    plain, fused, both = (
        second(n, "predict")["steps"]["predict"] for n in ("translate-train", "flare", "input-fusion")
    )
    english = items_tokens("en")[0]
    assert fused["tokens"] - plain["tokens"] == pytest.approx(400 * english)
    assert both["tokens"] == pytest.approx(fused["tokens"]) and plain["flops"] < fused["flops"]
    instead = second("translate-test", "predict")["steps"]["predict"]
    assert instead["tokens"] == pytest.approx(400 * sum(items_tokens("en")))


def test_stored_states_take_their_place_on_the_disk_and_are_read_once(second: Any) -> None:
    computed, stored = second("flare"), second("flare", fusion={"cache": True})
    kept = second("flare", "states", fusion={"cache": True})
    assert computed["disk"] == stored["disk"] == 0
    # Beside every token of the Javanese texts, of two layers, 32 features of two bytes.
    assert kept["disk"] == pytest.approx(500 * items_tokens("jv")[0] * 2 * 32 * 2)
    assert kept["flops"] == pytest.approx((computed["flops"] - stored["flops"]) / 2)  # Two epochs.
    assert stored["memory"] == computed["memory"]  # Where they come from, they have to be held.
    few = second("flare", "states", fusion={"cache": True}, training={"limit": 50, "epochs": 2, "batch_size": 4})
    assert few["disk"] == pytest.approx(kept["disk"] / 10)
    masked = second("flare", "states", fusion={"cache": True, "mask_padding": True})
    assert masked["disk"] == pytest.approx(500 * min(items_tokens(c)[0] for c in ("en", "jv")) * 2 * 32 * 2)


def translating(**changes: Any) -> dict[str, Any]:
    return {"translation": {"model": "facebook/nllb-200-distilled-600M", **changes}}


def test_translations_are_written_by_the_model_that_is_named(second: Any) -> None:
    made = second("flare", "translate", **translating())
    row, shape = made["steps"]["translate"], shape_of(KNOWN["facebook/nllb-200-distilled-600M"])
    assert row["count"] == 2 and made["unknown"] == []
    assert row["tokens"] > 0 and row["written"] > 0 and made["memory"] > 4 * shape.parameters
    # Every token of a batch of 16 needs all weights once.
    assert made["gpu_hours"] >= 0.999 * row["written"] / 16 * 4 * shape.parameters / 3.35e12 / 3600
    assert second("flare", "translate", **translating(beams=2))["steps"]["translate"]["written"] == 2 * row["written"]
    assert second("flare", "translate", **translating(splits=["test"]))["steps"]["translate"]["count"] == 1
    strange = second("flare", "translate", **translating(model="someone/a-translator"))
    assert strange["steps"]["translate"]["tokens"] > 0 and strange["flops"] == strange["gpu_hours"] == 0
    assert len(strange["unknown"]) == 2


def test_translated_items_are_those_of_the_source(second: Any) -> None:
    """A second stage learns from as many items as were translated, whatever the target has of its own."""
    numbers = {"en": 30, "jv": 7}

    def lookup(task: str, language: str, split: str, prompt: str) -> dict[tuple[int, int], int]:
        return {(100, 8): numbers[language]}

    config = {
        "task": {"task": "nusax"},
        "language": "jv",
        "split": "train",
        "second": {"kind": "lora"},
        "max_length": 512,
    }
    values = {"epochs": 1, "max_length": 512, "batch_size": 4}
    made = step("train", **config, adapter={"family": "lora"}, training=values)
    for translation, count in (({}, 7), ({"model": "x"}, 30), ({"model": "x", "splits": ["test"]}, 7)):
        asked = experiment(**{**TWO, "methods": ["flare"], "translation": translation})
        work = reading.work_of(made, asked, second.shape, lookup)
        assert work is not None and work.items == count


def test_the_translation_encoder_is_run_and_its_projection_trained(second: Any) -> None:
    plain, fused = second("translate-train"), second("flare-mt")
    reader = reader_of(shape_of(KNOWN["facebook/nllb-200-distilled-600M"]))
    assert fused["flops"] - plain["flops"] > inference_flops(reader, Work(tokens=1000 * items_tokens("jv")[0]))
    # Its weights, and the projection with its gradient and moments.
    assert fused["memory"] == pytest.approx(plain["memory"] + 4 * reader.parameters + 16 * 1024 * 32)
    strange = second("flare-mt", fusion={"encoder": "someone/a-translator"})
    assert strange["unknown"] and strange["steps"]["train"]["count"] == 1


def test_x_mixup_learns_from_both_texts(planned: Any) -> None:
    shape = shape_of({"model_type": "xlm-roberta", **FLOPS["xlm-r"][1]})
    values = {"training": {"max_length": 512, "epochs": 1, "batch_size": 4}, "adapter": {"family": "lora"}}
    asked = {"task": {"task": "nusax"}, "language": "jv", "split": "train", **values}
    beside = {"counterpart": {"form": "beside", "language": "en"}}

    def flops(**config: Any) -> float:
        return cost(plan_of(step("train", **asked, **config)), shape, lookup=lambda *_: {(260, 8): 40})["flops"]

    alone, mixed, fused = (
        flops(second={"kind": "lora"}),
        *(flops(**beside, second={"kind": k}) for k in ("mixup", "fused")),
    )
    assert mixed == pytest.approx(2 * alone, rel=0.3) and alone < fused < mixed


def test_models_without_a_known_name_are_looked_for_on_this_machine(tiny_folder: Path) -> None:
    found = shape_named(str(tiny_folder))
    assert found is not None and found.width == 32
    assert shape_named("no such folder/at all/here") is None and shape_named("someone/unheard-of") is None
