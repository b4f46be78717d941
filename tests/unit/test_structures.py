"""Every structure on a model: trained, opened by PEFT, merged and opened again; prefixes in scoring and generation."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lingraft.adapter import Adapter
from lingraft.architectures import kind_of
from lingraft.backbones import Backbone, peft_config
from lingraft.batching import text_sequences
from lingraft.config import AdapterConfig, BackboneConfig, TrainingConfig
from lingraft.errors import AdapterError, UserError
from lingraft.layouts.prefix import TENSOR
from lingraft.locating import locate
from lingraft.merging import Combination, Graft
from lingraft.prefixes import keys_and_values, refusal
from lingraft.roles import plays_any, select
from lingraft.stepping import batch_loss
from lingraft.structures import IA3_ROLES, fresh
from lingraft.training import _names, hash_tensors, train
from tests.conftest import save_tiny_model
from tests.unit.adapters import PREFIX, numbers_of

WINDOW = 8
CONFIGS = {
    "lora": AdapterConfig(rank=2, dropout=0),
    "ia3": AdapterConfig(family="ia3"),
    "prefix": AdapterConfig(family="prefix", tokens=5),
    "pfeiffer": AdapterConfig(family="bottleneck", reduction=8),
    "houlsby": AdapterConfig(family="bottleneck", reduction=4, positions="houlsby", activation="gelu"),
}
TRAINING = TrainingConfig(learning_rate=0.03, epochs=1, batch_size=2, clip=10, warmup=0, schedule="constant")


def opened(folder: Path) -> Backbone:
    return Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")))


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A tiny Gemma 3: one layer with a window, one without, and heads of a width of their own."""
    # With tied embeddings a random model says the last word again, whatever stands before it.
    changes = {"head_dim": 12, "sliding_window": WINDOW, "tie_word_embeddings": False}
    kinds = ["sliding_attention", "full_attention"]
    return opened(save_tiny_model(tmp_path_factory.mktemp("gemma"), "gemma3_text", layer_types=kinds, **changes))


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A tiny Mistral: both layers have a window."""
    return opened(save_tiny_model(tmp_path_factory.mktemp("mistral"), "mistral", sliding_window=WINDOW))


@pytest.fixture(scope="session", params=["llama", "gemma"])
def backbone(request: pytest.FixtureRequest, tiny: Backbone, gemma: Backbone) -> Backbone:
    return {"llama": tiny, "gemma": gemma}[request.param]


Three = tuple[Path, Path, Path]


@pytest.fixture(scope="session", params=CONFIGS)
def trained(
    request: pytest.FixtureRequest, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Backbone, Three]:
    """Task and two references of a structure, three steps each from one start."""
    where = tmp_path_factory.mktemp(f"{request.param}")
    random = np.random.default_rng(0)
    for name in ("task", "target", "source"):
        (where / name).mkdir()
        sequences = text_sequences([random.integers(3, 200, size=20).tolist() for _ in range(6)])
        train(backbone, sequences, where / name, adapter=CONFIGS[request.param], training=TRAINING)
    return request.param, backbone, (where / "task", where / "target", where / "source")


IDS = torch.from_numpy(np.random.default_rng(1).integers(3, 200, size=(2, 30)))


def ours(backbone: Backbone, adapter: Adapter | Path | None, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits of the base with an adapter on it."""
    loaded = Adapter.load(adapter) if isinstance(adapter, Path) else adapter
    with backbone.with_adapter(loaded), torch.no_grad():
        return backbone.model(input_ids=ids).logits


def in_peft(backbone: Backbone, folder: Path) -> Any:
    from peft import PeftModel

    base = copy.deepcopy(backbone.model)
    return PeftModel.from_pretrained(base, folder).eval()


def theirs(backbone: Backbone, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return in_peft(backbone, folder)(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def assert_close(x: torch.Tensor, y: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert x.shape == y.shape
    assert float((x - y).abs().max()) <= tolerance * (1 + float(y.abs().max()))


def assert_differ(x: torch.Tensor, y: torch.Tensor) -> None:
    assert float((x - y).abs().max()) > 1e-3 * float(y.abs().max())


# Trained, opened by PEFT, merged, opened again


def test_what_was_trained_acts_in_peft_as_here(trained: tuple[str, Backbone, Three]) -> None:
    _, backbone, folders = trained
    base = ours(backbone, None)
    for folder in folders:
        here = ours(backbone, folder)
        assert_differ(here, base)
        assert_close(theirs(backbone, folder), here)
    assert torch.equal(ours(backbone, None), base)


def test_every_part_of_an_adapter_learns(trained: tuple[str, Backbone, Three]) -> None:
    structure, backbone, (task, _, _) = trained
    _, start = fresh(backbone, CONFIGS[structure], 0)
    learned = {name: torch.from_numpy(array) for name, array in Adapter.load(task).tensors()}
    assert set(learned) == set(start)
    for name, tensor in start.items():
        assert learned[name].shape == tensor.shape
        assert not torch.equal(learned[name], tensor), name


@pytest.mark.parametrize("how", [{}, {"method": "cross"}], ids=["own", "cross"])
def test_a_merge_acts_in_peft_as_here(trained: tuple[str, Backbone, Three], how: Any, tmp_path: Path) -> None:
    _, backbone, folders = trained
    task, target, source = (Adapter.load(folder) for folder in folders)
    merged = Graft(0.7, **how).onto(task, target - source)
    merged.save(tmp_path / "out")
    here = ours(backbone, merged)
    assert_close(ours(backbone, tmp_path / "out"), here)
    assert_close(theirs(backbone, tmp_path / "out"), here, 1e-4)
    assert_differ(here, ours(backbone, folders[0]))


def test_a_merge_at_zero_or_of_equal_references_acts_as_the_task(trained: tuple[str, Backbone, Three]) -> None:
    _, backbone, folders = trained
    task, target, source = (Adapter.load(folder) for folder in folders)
    alone = ours(backbone, task)
    assert torch.equal(ours(backbone, Graft(0).onto(task, target - source)), alone)
    assert_close(ours(backbone, Graft(1.3).onto(task, target - target)), alone)


def test_cat_of_trained_adapters_acts_in_peft_as_here(trained: tuple[str, Backbone, Three], tmp_path: Path) -> None:
    _, backbone, folders = trained
    parts = [Adapter.load(folder) for folder in folders[:2]]
    merged = Combination("cat").of(parts, (1, 1))
    merged.save(tmp_path / "out")
    assert_close(theirs(backbone, tmp_path / "out"), ours(backbone, merged), 1e-4)


def test_cat_in_some_layers_alone_acts_in_peft_as_here(tiny: Backbone, tmp_path: Path) -> None:
    """The layers then have bottlenecks of two widths."""
    folders = []
    for n in range(2):
        (tmp_path / str(n)).mkdir()
        sequences = text_sequences([[1, *range(5 + n, 40)]] * 4)
        train(tiny, sequences, tmp_path / str(n), adapter=CONFIGS["houlsby"], training=TRAINING, seed=0)
        folders.append(Adapter.load(tmp_path / str(n)))
    merged = Combination("cat", modules="layer:1,attention.output").of(folders, (1, -0.5))
    assert {merged.files.size(place) for place in merged.layout.values()} == {8, 16}
    merged.save(tmp_path / "out")
    assert_close(theirs(tiny, tmp_path / "out"), ours(tiny, merged))
    assert_differ(ours(tiny, merged), ours(tiny, folders[0]))


def test_a_prefix_that_peft_trained_with_a_projection_acts_here_as_there(tiny: Backbone, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        get_peft_model(copy.deepcopy(tiny.model), config).save_pretrained(tmp_path / "a")
    adapter = Adapter.load(tmp_path / "a")
    assert_close(theirs(tiny, tmp_path / "a"), ours(tiny, adapter))
    assert_differ(ours(tiny, adapter), ours(tiny, None))
    merged = Graft(0.5).onto(adapter, adapter - adapter)
    merged.save(tmp_path / "out")
    assert_close(theirs(tiny, tmp_path / "out"), ours(tiny, adapter))


@pytest.mark.parametrize("structure", ["lora", "ia3"])
def test_merge_and_unload_adds_our_own_effect(
    tiny: Backbone, structure: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folders = []
    for n, name in enumerate(("task", "target", "source")):
        (tmp_path / name).mkdir()
        sequences = text_sequences([[1, *range(5 + n, 40)]] * 4)
        train(tiny, sequences, tmp_path / name, adapter=CONFIGS[structure], training=TRAINING)
        folders.append(Adapter.load(tmp_path / name))
    merged = Graft(0.6).onto(folders[0], folders[1] - folders[2])
    merged.save(tmp_path / "out")
    before = {n.removesuffix(".weight"): p.double().numpy() for n, p in tiny.model.named_parameters()}
    unloaded = in_peft(tiny, tmp_path / "out").merge_and_unload()
    after = {n.removesuffix(".weight"): p.detach().double().numpy() for n, p in unloaded.named_parameters()}
    assert set(after) == set(before)
    for name, weight in before.items():
        expected = weight
        if name in merged.layout:
            site = merged.site(name)
            t = {role: tensor.astype(np.float64) for role, tensor in site.tensors.items()}
            expected = weight * t["l"] if structure == "ia3" else weight + site.scaling * t["B"] @ t["A"]
            assert np.abs(expected - weight).max() > 1e-4
        np.testing.assert_allclose(after[name], expected, rtol=0, atol=1e-6)


# (IA)³ on every architecture

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str]] = {
    "llama": ("AutoModelForCausalLM", SIZES, ("self_attn.k_proj", "self_attn.v_proj"), "mlp.down_proj"),
    "gemma3_text": ("AutoModelForCausalLM", SIZES, ("self_attn.k_proj", "self_attn.v_proj"), "mlp.down_proj"),
    "qwen2": ("AutoModelForCausalLM", SIZES, ("self_attn.k_proj", "self_attn.v_proj"), "mlp.down_proj"),
    "qwen3": ("AutoModelForCausalLM", SIZES, ("self_attn.k_proj", "self_attn.v_proj"), "mlp.down_proj"),
    "mistral": ("AutoModelForCausalLM", SIZES, ("self_attn.k_proj", "self_attn.v_proj"), "mlp.down_proj"),
    "t5": (
        "AutoModelForSeq2SeqLM",
        T5,
        ("SelfAttention.k", "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v"),
        "DenseReluDense.wo",
    ),
    "xlm-roberta": (
        "AutoModelForSequenceClassification",
        {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")},
        ("attention.self.key", "attention.self.value"),
        "output.dense",
    ),
}


def random_model(architecture: str, **changes: Any) -> Any:
    import transformers

    kind, sizes, _, _ = ARCHITECTURES[architecture]
    config = transformers.AutoConfig.for_model(architecture, **{**sizes, **changes})
    return getattr(transformers, kind).from_config(config).eval()


class Stub:
    """As much of a backbone as a fresh adapter needs."""

    digest = "sha256:0"
    located = SimpleNamespace(name="stub")
    target_modules = Backbone.target_modules

    def __init__(self, model: Any) -> None:
        self.model = model
        self.kind = kind_of({**model.config.to_dict(), "architectures": [type(model).__name__]})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ia3_scales_keys_values_and_the_feed_forward_input_in_every_architecture(architecture: str) -> None:
    from peft import get_peft_model, set_peft_model_state_dict
    from peft.tuners.ia3 import IA3Layer

    _, _, attention, output = ARCHITECTURES[architecture]
    model = random_model(architecture)
    stub: Any = Stub(model)
    made, tensors = fresh(stub, CONFIGS["ia3"], 0)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    keys = [n for n in linear if n.endswith(attention)]
    outputs = [n for n in linear if n.endswith(output) and not n.endswith("attention.output.dense")]
    layers = {"t5": (2 * (2 + 4), 4)}.get(architecture, (4, 2))
    assert (len(keys), len(outputs)) == layers
    assert sorted(made["target_modules"]) == sorted([*keys, *outputs])
    assert sorted(made["feedforward_modules"]) == sorted(outputs)
    assert sorted(select(linear, IA3_ROLES)) == sorted(made["target_modules"])
    assert all(bool((t == 1).all()) for t in tensors.values())
    # As it is written to disk, in short names where they are unique, PEFT finds the same modules and shapes.
    short = {name: _names(stub, made[name]) for name in ("target_modules", "feedforward_modules")}
    wrapped = get_peft_model(model, peft_config({**made, **short, "task_type": None}))
    found = {n.removeprefix(PREFIX): m for n, m in wrapped.named_modules() if isinstance(m, IA3Layer)}
    assert set(found) == set(made["target_modules"])
    for module, layer in found.items():
        assert layer.is_feedforward == (module in outputs)
        inner, outer = layer.base_layer.in_features, layer.base_layer.out_features
        expected = (1, inner) if module in outputs else (outer, 1)
        assert tuple(tensors[f"{PREFIX}{module}.ia3_l"].shape) == expected == tuple(layer.ia3_l["default"].shape)
    result = set_peft_model_state_dict(wrapped, tensors)
    assert not result.unexpected_keys and not [k for k in result.missing_keys if "ia3_" in k]


# LoRA on every layer that plays a role

LAYERS = {
    "gpt_neox": ("GPTNeoXForCausalLM", 8),
    "falcon": ("FalconForCausalLM", 8),
    "phi3": ("Phi3ForCausalLM", 8),
    "t5": ("T5ForConditionalGeneration", 2 * 6 + 2 * 10),
    "mt5": ("MT5ForConditionalGeneration", 2 * 7 + 2 * 11),
    "distilbert": ("DistilBertForMaskedLM", 12),
    "albert": ("AlbertForMaskedLM", 6),
}


@pytest.mark.parametrize("architecture", LAYERS)
def test_all_layers_of_an_architecture_play_a_role(architecture: str) -> None:
    name, count = LAYERS[architecture]
    sizes = T5 if "t5" in architecture else {k: v for k, v in SIZES.items() if k != "head_dim"}
    if architecture == "distilbert":
        sizes = {"vocab_size": 40, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    if architecture == "phi3":
        sizes = {**sizes, "pad_token_id": 0}
    if architecture == "albert":  # All its layers are one.
        sizes = {**ENCODER, "embedding_size": 16}
    model: Any = Stub(on_paper(name, **sizes))
    found = model.target_modules("all")
    assert len(found) == count and all(plays_any(module) for module in found)


def test_where_a_layer_plays_no_role_modules_are_named() -> None:
    for name in ("MPNetForMaskedLM", "FunnelForMaskedLM"):
        changes = {"d_model": 32, "d_inner": 48, "n_head": 4, "d_head": 8, "vocab_size": 40}
        model: Any = Stub(on_paper(name, **(ENCODER if name.startswith("MPNet") else changes)))
        with pytest.raises(UserError, match="not all layers of") as caught:
            model.target_modules("all")
        assert "adapter.modules" in (caught.value.remedy or "")
    mpnet: Any = Stub(on_paper("MPNetForMaskedLM", **ENCODER))
    assert len(mpnet.target_modules("attn.q,output.dense")) == 4


def test_other_modules_for_ia3_are_a_choice(tiny: Backbone) -> None:
    made, tensors = fresh(tiny, AdapterConfig(family="ia3", modules="attention.query,up_proj"), 0)
    assert {m.rsplit(".", 1)[1] for m in made["target_modules"]} == {"q_proj", "up_proj"}
    assert {tuple(t.shape) for n, t in tensors.items() if "up_proj" in n} == {(1, 32)}


# Initial weights


@pytest.mark.parametrize("structure", CONFIGS)
def test_initial_weights_are_a_function_and_leave_the_global_state_alone(backbone: Backbone, structure: str) -> None:
    config = CONFIGS[structure]
    torch.manual_seed(1)
    np.random.seed(1)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].tolist()  # pyright: ignore
    first = hash_tensors(fresh(backbone, config, 0)[1])
    assert torch.equal(torch.get_rng_state(), before) and np.random.get_state()[1].tolist() == numpys  # pyright: ignore
    torch.manual_seed(99)
    np.random.seed(99)
    assert hash_tensors(fresh(backbone, config, 0)[1]) == first
    assert (hash_tensors(fresh(backbone, config, 1)[1]) == first) == (structure == "ia3"), "ones are ones"


@pytest.mark.parametrize(
    ("structure", "change"),
    [
        ("ia3", {"modules": "q_proj"}),
        ("prefix", {"tokens": 6}),
        ("pfeiffer", {"reduction": 4}),
        ("pfeiffer", {"positions": "houlsby"}),
    ],
)
def test_another_configuration_has_other_initial_weights(tiny: Backbone, structure: str, change: Any) -> None:
    config = CONFIGS[structure]
    other = AdapterConfig.model_validate({**config.key(), **change})
    assert hash_tensors(fresh(tiny, other, 0)[1]) != hash_tensors(fresh(tiny, config, 0)[1])


def test_another_base_has_other_initial_weights(tiny: Backbone, tmp_path: Path) -> None:
    stub: Any = Stub(tiny.model)
    for structure in ("lora", "pfeiffer"):
        assert hash_tensors(fresh(stub, CONFIGS[structure], 0)[1]) != hash_tensors(
            fresh(tiny, CONFIGS[structure], 0)[1]
        )


@pytest.mark.parametrize("structure", CONFIGS)
def test_an_untrained_adapter_hardly_changes_the_model(tiny: Backbone, structure: str, tmp_path: Path) -> None:
    train(tiny, text_sequences([[1, 2]]), tmp_path, adapter=CONFIGS[structure], training=TrainingConfig(epochs=0))
    base, here = ours(tiny, None), ours(tiny, tmp_path)
    if structure in ("lora", "ia3"):
        assert torch.equal(here, base)
    elif structure != "prefix":
        assert float((here - base).abs().max()) < 0.05 * float(base.abs().max())
    assert Adapter.load(tmp_path).sidecar["init_sha256"] == hash_tensors(fresh(tiny, CONFIGS[structure], 0)[1])


def test_a_fresh_prefix_acts_as_the_text_it_was_made_of(backbone: Backbone) -> None:
    """Keys and values of a text, before another one, are the text itself before it."""
    text = torch.tensor([[1, 50, 60, 70, 80]])
    prefix = keys_and_values(backbone.model, text)
    with on(backbone, prefix), torch.no_grad():
        behind = backbone.model(input_ids=IDS).logits
        masked = backbone.model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
    with torch.no_grad():
        whole = backbone.model(input_ids=torch.cat([text.expand(2, -1), IDS], dim=1)).logits[:, 5:]
    assert_close(behind, whole)
    assert_close(masked, whole)


# Prefixes


@contextmanager
def on(backbone: Backbone, prefix: torch.Tensor | int) -> Iterator[Any]:
    """The base with a prefix, random where only its length is given."""
    made, tensors = fresh(backbone, AdapterConfig(family="prefix", tokens=5), 0)
    value = tensors[TENSOR]
    if isinstance(prefix, int):
        value = torch.from_numpy(np.random.default_rng(3).normal(0, 0.7, size=(prefix, value.shape[1])).astype("f"))
    else:
        value = prefix
    with backbone.attached(peft_config({**made, "num_virtual_tokens": len(value)}), {TENSOR: value}) as wrapped:
        wrapped.eval()
        yield wrapped


def generated(backbone: Backbone, ids: torch.Tensor, cached: bool) -> torch.Tensor:
    return backbone.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        use_cache=cached,
        pad_token_id=0,
    )


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 5), (1, 30), (2, 1), (2, 7), (2, 30)])
@pytest.mark.parametrize("tokens", [1, 4])
def test_cached_generation_is_uncached_generation(backbone: Backbone, batch: int, length: int, tokens: int) -> None:
    ids = IDS[:batch, :length]
    bare = generated(backbone, ids, True)
    with on(backbone, tokens):
        cached, whole = generated(backbone, ids, True), generated(backbone, ids, False)
        alone = [generated(backbone, row[None], True)[0] for row in ids]
    assert cached.tolist() == whole.tolist() == [row.tolist() for row in alone]
    if tokens > 1:
        assert cached.tolist() != bare.tolist()
    assert generated(backbone, ids, True).tolist() == bare.tolist()


def test_the_adapters_own_generate_is_the_bases(tiny: Backbone) -> None:
    ids = IDS[:, :6]
    with on(tiny, 4):
        expected = generated(tiny, ids, True)
        cache = tiny.model(input_ids=ids, use_cache=True).past_key_values
        assert cache.get_seq_length() == 4 + 6
    assert expected.shape == (2, 18)


def test_one_token_after_the_other_gives_the_logits_of_the_whole_text(backbone: Backbone) -> None:
    """The text is longer than Gemma's window."""
    with on(backbone, 4), torch.no_grad():
        whole = backbone.model(input_ids=IDS, use_cache=False).logits
        again = backbone.model(input_ids=IDS).logits
        cache, steps = None, []
        for n in range(IDS.shape[1]):
            out = backbone.model(input_ids=IDS[:, n : n + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        parts = backbone.model(input_ids=IDS[:, :20], use_cache=True)
        rest = backbone.model(input_ids=IDS[:, 20:], past_key_values=parts.past_key_values).logits
    assert_close(again, whole)
    assert_close(torch.cat(steps, dim=1), whole)
    assert_close(torch.cat([parts.logits, rest], dim=1), whole)


def test_a_padded_batch_gives_the_states_of_each_text_alone(backbone: Backbone) -> None:
    lengths = (30, 9)
    mask = torch.tensor([[int(n < length) for n in range(30)] for length in lengths])
    with on(backbone, 4), torch.no_grad():
        together = backbone.hidden(IDS * mask, mask)
        for row, length in enumerate(lengths):
            ids = IDS[row : row + 1, :length]
            assert_close(together[row : row + 1, :length], backbone.hidden(ids, torch.ones_like(ids)))


def test_a_batch_padded_on_the_left_gives_the_states_of_each_text_alone(tiny: Backbone) -> None:
    lengths = (30, 9)
    mask = torch.tensor([[int(n >= 30 - length) for n in range(30)] for length in lengths])
    with on(tiny, 4), torch.no_grad():
        together = tiny.model(input_ids=IDS * mask, attention_mask=mask).logits
        for row, length in enumerate(lengths):
            ids = IDS[row : row + 1, 30 - length :]
            alone = tiny.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            assert_close(together[row : row + 1, 30 - length :], alone)


def test_pefts_own_forward_gets_the_prefix_once(backbone: Backbone) -> None:
    mask = torch.tensor([[int(n >= 30 - length) for n in range(30)] for length in (30, 9)])
    with on(backbone, 4) as wrapped, torch.no_grad():
        there = wrapped(input_ids=IDS * mask, attention_mask=mask).logits
        here = backbone.model(input_ids=IDS * mask, attention_mask=mask).logits
    assert_close(there * mask[..., None], here * mask[..., None])


def test_with_windows_in_all_layers_a_prefix_reaches_no_further_than_they_do(mistral: Backbone) -> None:
    bare = ours(mistral, None)
    with on(mistral, 4), torch.no_grad():
        after = mistral.model(input_ids=IDS).logits
    reach = 2 * (WINDOW - 1)
    assert_close(after[:, reach:], bare[:, reach:], 1e-4)
    assert_differ(after[:, : WINDOW - 1], bare[:, : WINDOW - 1])
    assert_differ(after[:, WINDOW : WINDOW + 2], bare[:, WINDOW : WINDOW + 2])


@pytest.mark.parametrize("tokens", [WINDOW - 1, WINDOW, 2 * WINDOW])
def test_a_prefix_as_long_as_a_window_or_longer_is_whole(
    gemma: Backbone, mistral: Backbone, tokens: int, tmp_path: Path
) -> None:
    config = AdapterConfig(family="prefix", tokens=tokens)
    for backbone, folder in ((gemma, tmp_path / "gemma"), (mistral, tmp_path / "mistral")):
        _, tensors = fresh(backbone, config, 0)
        assert tensors[TENSOR].shape[0] == tokens
        folder.mkdir()
        train(backbone, text_sequences([IDS[0].tolist()] * 2), folder, adapter=config, training=TRAINING)
        with backbone.with_adapter(Adapter.load(folder)):
            assert generated(backbone, IDS, True).tolist() == generated(backbone, IDS, False).tolist()


def test_gradients_reach_the_whole_prefix_and_nothing_else(backbone: Backbone) -> None:
    before = {n: p.clone() for n, p in backbone.model.named_parameters()}
    chosen = text_sequences([row.tolist() for row in IDS])
    with on(backbone, 4) as wrapped:
        wrapped.train()
        weight = wrapped.prompt_encoder["default"].embedding.weight
        batch_loss(backbone, chosen, backward=lambda loss: loss.backward())
        assert weight.grad is not None and bool(weight.grad.any(dim=1).all())
        layers = weight.grad.view(4, 2, 2, -1)
        assert bool((layers.abs().sum(dim=(0, 3)) > 0).all()), "keys and values of every layer"
        analytic = float((weight.grad * torch.ones_like(weight)).sum())
        with torch.no_grad():
            step = 1e-2
            losses = []
            for sign in (1, -1):
                weight.add_(sign * step)
                losses.append(batch_loss(backbone, chosen))
                weight.sub_(sign * step)
        assert analytic == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.05, abs=2e-4)
        assert all(p.grad is None for p in backbone.model.parameters())
    assert all(torch.equal(p, before[n]) and not p.requires_grad for n, p in backbone.model.named_parameters())


def test_the_base_is_as_before_when_the_prefix_is_off(backbone: Backbone) -> None:
    base = ours(backbone, None)
    hooks = len(backbone.model.base_model._forward_pre_hooks)
    with pytest.raises(ZeroDivisionError), on(backbone, 3):
        assert len(backbone.model.base_model._forward_pre_hooks) == hooks + 1
        raise ZeroDivisionError
    assert len(backbone.model.base_model._forward_pre_hooks) == hooks
    assert torch.equal(ours(backbone, None), base)
    assert not hasattr(backbone.model, "peft_config")


def test_a_prefix_of_another_model_is_refused(tiny: Backbone, gemma: Backbone) -> None:
    made, tensors = fresh(gemma, CONFIGS["prefix"], 0)
    with pytest.raises(AdapterError, match="does not fit this base model"), tiny.attached(peft_config(made), tensors):
        pass


def test_a_mask_of_four_dimensions_is_refused(tiny: Backbone) -> None:
    with on(tiny, 3), pytest.raises(AdapterError, match="batch × length"):
        tiny.model(input_ids=IDS, attention_mask=torch.zeros(2, 1, 30, 30))


# Refusals


def test_gradient_checkpointing_and_a_prefix_do_not_go_together(tiny_folder: Path) -> None:
    backbone = opened(tiny_folder)
    backbone.model.gradient_checkpointing_enable()
    with pytest.raises(AdapterError, match="gradient checkpointing"), on(backbone, 3):
        pass
    assert refusal(backbone.model, "lora") is None
    backbone.model.gradient_checkpointing_disable()
    with on(backbone, 3) as wrapped:
        wrapped.train()
        backbone.model.gradient_checkpointing_enable()
        with pytest.raises(AdapterError, match="gradient checkpointing"):
            backbone.hidden(IDS, torch.ones_like(IDS))
        backbone.model.gradient_checkpointing_disable()
        backbone.hidden(IDS, torch.ones_like(IDS))


def on_paper(name: str, **config: Any) -> Any:
    """A model of a class without weights."""
    import transformers

    kind = getattr(transformers, name)
    with torch.device("meta"):
        return kind(kind.config_class(**config))


ENCODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
REFUSED = {
    "DebertaV2ForMaskedLM": (ENCODER, "attention in a way of its own"),
    "T5ForConditionalGeneration": (T5, "two stacks of layers"),
    "MambaForCausalLM": (
        {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "takes no keys and values",
    ),
    "Lfm2ForCausalLM": ({**SIZES, "layer_types": ["conv", "full_attention"]}, "without keys and values .conv."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_serve_a_prefix_are_refused_with_the_reason(name: str) -> None:
    config, reason = REFUSED[name]
    model = on_paper(name, **config)
    said = refusal(model, "prefix")
    assert said is not None and name in said and re.search(reason, said)
    assert all(refusal(model, structure) is None for structure in ("lora", "ia3", "bottleneck"))
    with pytest.raises(AdapterError, match="cannot be put on this model"):
        keys_and_values(model, torch.tensor([[1, 2]]))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
def test_models_that_serve_a_prefix(name: str) -> None:
    assert refusal(on_paper(name, **SIZES), "prefix") is None


@pytest.mark.parametrize(
    "name", ["BertForMultipleChoice", "XLMRobertaForMaskedLM", "RobertaForQuestionAnswering", "ElectraForMaskedLM"]
)
def test_encoders_that_serve_a_prefix(name: str) -> None:
    assert refusal(on_paper(name, **ENCODER), "prefix") is None


# The configuration

OWN = {
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "modules": "q_proj"},
    "ia3": {"modules": "q_proj"},
    "prefix": {"tokens": 4},
    "bottleneck": {"reduction": 8, "positions": "houlsby", "activation": "gelu"},
}
ALL = {name: value for own in OWN.values() for name, value in own.items()}


@pytest.mark.parametrize("structure", OWN)
def test_a_configuration_has_the_values_of_its_structure_and_refuses_others(structure: str) -> None:
    config = AdapterConfig.model_validate({"family": structure, **OWN[structure]})
    assert config.key() == {"family": structure, **OWN[structure]}
    assert config.key("family") == OWN[structure]
    for name, value in ALL.items():
        if name not in OWN[structure]:
            with pytest.raises(ValidationError, match=f"{name}: not of the structure '{structure}'"):
                AdapterConfig.model_validate({"family": structure, name: value})
    strange = sorted(set(ALL) - set(OWN[structure]))
    with pytest.raises(ValidationError, match=", ".join(strange)):
        AdapterConfig.model_validate({"family": structure, **{name: ALL[name] for name in strange}})


def test_what_another_structure_could_have_been_makes_no_new_key() -> None:
    assert set(AdapterConfig(family="ia3").key()) == {"family", "modules"}
    assert set(AdapterConfig(family="prefix").key()) == {"family", "tokens"}
    assert AdapterConfig().key() != AdapterConfig(family="ia3").key()


@pytest.mark.parametrize(
    "values",
    [
        {"family": "prefix", "tokens": 0},
        {"family": "bottleneck", "reduction": 0.5},
        {"family": "bottleneck", "positions": "parallel"},
        {"family": "bottleneck", "activation": "gleu"},
    ],
    ids=str,
)
def test_values_without_meaning_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AdapterConfig.model_validate(values)


def test_bottlenecks_stand_where_the_positions_say(backbone: Backbone) -> None:
    pfeiffer, houlsby = (fresh(backbone, CONFIGS[name], 0)[0] for name in ("pfeiffer", "houlsby"))
    assert {m.rsplit(".", 1)[1] for m in pfeiffer["target_modules"]} == {"down_proj"}
    assert {m.rsplit(".", 1)[1] for m in houlsby["target_modules"]} == {"down_proj", "o_proj"}
    assert (pfeiffer["bottleneck_size"], houlsby["bottleneck_size"]) == (4, 8)
    assert houlsby["activation"] == "gelu"


def test_equal_seeds_give_equal_bytes_for_every_structure(tiny: Backbone, tmp_path: Path) -> None:
    sequences = text_sequences([row.tolist() for row in IDS])
    for structure, config in CONFIGS.items():
        for name in ("a", "b"):
            folder = tmp_path / f"{structure}-{name}"
            folder.mkdir()
            torch.manual_seed(len(name) + ord(name))
            train(tiny, sequences, folder, adapter=config, training=TRAINING)
        files = ("adapter_model.safetensors", "adapter_config.json")
        for file in files:
            assert (tmp_path / f"{structure}-a" / file).read_bytes() == (
                tmp_path / f"{structure}-b" / file
            ).read_bytes()
        assert numbers_of(tmp_path / f"{structure}-a")
