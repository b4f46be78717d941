"""Base models: what is opened, what is refused, and that adapters leave no trace."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from lingraft.backbones import Backbone, peft_config
from lingraft.batching import text_sequences
from lingraft.config import AdapterConfig, BackboneConfig
from lingraft.errors import AdapterError, BackboneError, MissingExtra, UserError
from lingraft.locating import locate
from lingraft.structures import fresh
from lingraft.training import train
from tests.conftest import save_tiny_model


def weights(backbone: Backbone) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_a_folders_digest_changes_with_its_weights_and_its_tokenizer_only(tiny_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    config = BackboneConfig(model=str(copy))
    assert locate(config).digest == locate(BackboneConfig(model=str(tiny_folder))).digest
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "model.safetensors").write_bytes(raw)
    changed = locate(config).digest
    assert changed != locate(BackboneConfig(model=str(tiny_folder))).digest
    (copy / "README.md").write_text("a note")
    assert locate(config).digest == changed


def test_pickled_weights_are_refused_with_the_remedy(tiny_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(BackboneError, match="pickles") as caught:
        locate(BackboneConfig(model=str(copy)))
    assert "save_pretrained" in (caught.value.remedy or "")


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "a/b/c", "missing.gguf"])
def test_a_missing_model_is_named(model: str) -> None:
    with pytest.raises(BackboneError) as caught:
        locate(BackboneConfig(model=model))
    assert caught.value.where


def test_a_hub_model_is_read_offline_from_the_cache_at_its_pinned_commit(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    located = locate(BackboneConfig(model="someone/tiny", dtype="float32", device="cpu"))
    assert located.digest == f"hub:someone/tiny@{commit}"
    assert located.config.revision == commit
    loaded = Backbone(located)
    assert weights(loaded) == weights(
        Backbone(locate(BackboneConfig(model=str(tiny_folder), dtype="float32", device="cpu")))
    )


def test_a_hub_model_that_is_nowhere_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match="not found"):
        locate(BackboneConfig(model="someone/absent"))


def test_a_gguf_file_is_expanded_once_into_safetensors(tiny_folder: Path, tmp_path: Path) -> None:
    """A GGUF of the tiny model is written with the gguf package, as llama.cpp's converter would."""
    path = write_gguf(tiny_folder, tmp_path / "tiny.gguf")
    located = locate(BackboneConfig(model=str(path), dtype="float32", device="cpu"))
    first = Backbone(located)
    original = Backbone(locate(BackboneConfig(model=str(tiny_folder), dtype="float32", device="cpu")))
    ids = torch.tensor([[1, 70, 80, 90]])
    with torch.no_grad():
        ours, theirs = first.model(input_ids=ids).logits, original.model(input_ids=ids).logits
    # The weights went through bfloat16.
    assert torch.allclose(ours, theirs, atol=0.1)
    assert weights(Backbone(located)) == weights(first)


def write_gguf(folder: Path, path: Path) -> Path:
    import gguf
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokens, key=tokens.get))
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    outer["lm_head.weight"] = "output.weight"
    for name, tensor in load_file(folder / "model.safetensors").items():
        value = tensor.float().numpy()
        if name in outer:
            writer.add_tensor(outer[name], value)
            continue
        _, _, layer, *rest = name.split(".")
        module = ".".join(rest[:-1])
        if module in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp's rotary order
            heads = config["num_attention_heads" if "q_proj" in module else "num_key_value_heads"]
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"blk.{layer}.{names[module]}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text", "qwen2", "qwen3", "mistral"])
def test_states_times_the_embedding_are_the_models_own_logits(architecture: str, tmp_path: Path) -> None:
    # Loading checks it; a soft cap (gemma2) would break it if it were forgotten.
    extra = {"head_dim": 8, "query_pre_attn_scalar": 8} if architecture.startswith("gemma") else {}
    folder = save_tiny_model(tmp_path / architecture, architecture, **extra)
    loaded = Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")))
    assert (loaded.softcap is not None) == (architecture == "gemma2")


def test_an_architecture_whose_logits_are_scaled_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "granite", "granite", logits_scaling=4.0)
    with pytest.raises(BackboneError, match="logits"):
        Backbone(locate(BackboneConfig(model=str(folder), dtype="float32", device="cpu")))


def test_remote_code_is_not_run_unless_asked_for(tiny_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_folder, tmp_path / "remote")
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["model_type"] = "unheard_of"
    (copy / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(BackboneError):
        Backbone(locate(BackboneConfig(model=str(copy), device="cpu")))
    assert not marker.exists()


def test_attaching_and_detaching_leaves_the_base_as_it_was(tiny: Backbone, tmp_path: Path) -> None:
    before, names = weights(tiny), [n for n, _ in tiny.model.named_modules()]
    train(tiny, text_sequences([[1, 5, 6, 7, 8]] * 4), tmp_path, adapter=AdapterConfig(rank=2))
    assert weights(tiny) == before
    assert [n for n, _ in tiny.model.named_modules()] == names
    assert not any(p.requires_grad for p in tiny.model.parameters())


def test_an_adapter_of_another_base_is_refused(tiny: Backbone, tmp_path: Path) -> None:
    from lingraft.adapter import Adapter

    train(tiny, text_sequences([[1, 5, 6, 7, 8]] * 4), tmp_path, adapter=AdapterConfig(rank=2))
    sidecar = json.loads((tmp_path / "lingraft.json").read_text())
    sidecar["backbone"]["digest"] = "folder:another"
    (tmp_path / "lingraft.json").write_text(json.dumps(sidecar))
    with pytest.raises(AdapterError, match="another base model"), tiny.with_adapter(Adapter.load(tmp_path)):
        pass


def test_an_adapter_that_fits_nowhere_is_refused_and_leaves_no_trace(tiny: Backbone, tmp_path: Path) -> None:
    from peft import LoraConfig

    tensors = fresh(tiny, AdapterConfig(rank=2, modules="q_proj"), 0)[1]
    wrong = {name.replace("layers.0", "layers.9"): t for name, t in tensors.items()}
    names = [n for n, _ in tiny.model.named_modules()]
    with (
        pytest.raises(AdapterError, match="does not fit"),
        tiny.attached(LoraConfig(r=2, target_modules=["q_proj"]), wrong),
    ):
        pass
    assert [n for n, _ in tiny.model.named_modules()] == names


def test_modules_are_chosen_by_name_and_by_role(tiny: Backbone) -> None:
    everything = tiny.target_modules("all")
    assert len(everything) == 14
    assert tiny.target_modules(("attention.query", "down_proj")) == [
        m for m in everything if m.endswith(("q_proj", "down_proj"))
    ]
    with pytest.raises(UserError, match="q_proy") as caught:
        tiny.target_modules("q_proy")
    assert "q_proj" in (caught.value.remedy or "")


def test_an_error_of_the_work_on_an_adapted_model_is_not_taken_for_the_adapters(tiny: Backbone, tmp_path: Path) -> None:
    tensors = fresh(tiny, AdapterConfig(rank=2, modules="q_proj"), 0)[1]
    made = peft_config(fresh(tiny, AdapterConfig(rank=2, modules="q_proj"), 0)[0])
    with pytest.raises(RuntimeError, match="size mismatch of mine"), tiny.attached(made, tensors):
        raise RuntimeError("size mismatch of mine")
    wrong = {name: torch.zeros(3, 3) for name in tensors}
    with pytest.raises(AdapterError, match="another shape"), tiny.attached(made, wrong):
        pass


class Quantised:
    """A configuration as it will be read: a base in fewer bits."""

    def __init__(self, kind: str, device: str = "cpu") -> None:
        self.quantization, self.device = kind, device


def test_fewer_bits_need_bitsandbytes_and_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from lingraft.backbones import _quantisation

    found: dict[str, object] = {"bitsandbytes": None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found.get(name, object()))
    assert (
        _quantisation(Quantised("none"), torch.bfloat16)
        == {}
        == _quantisation(BackboneConfig(model="x"), torch.float32)
    )
    with pytest.raises(MissingExtra, match="bitsandbytes") as missing:
        _quantisation(Quantised("nf4"), torch.bfloat16)
    assert "lingraft[quantization]" in (missing.value.remedy or "")
    found["bitsandbytes"] = object()
    for kind in ("nf4", "int8"):
        with pytest.raises(UserError, match=f"a base in {kind} needs a CUDA device") as caught:
            _quantisation(Quantised(kind), torch.bfloat16)
        assert "quantization=none" in (caught.value.remedy or "")


def test_fewer_bits_are_asked_for_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """NF4 with double quantisation, computing in the configured type (Dettmers et al., 2023)."""
    from lingraft.backbones import _quantisation

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("lingraft.backbones.device_name", lambda name: "cuda:0")
    made = _quantisation(Quantised("nf4", "auto"), torch.bfloat16)
    config = made["quantization_config"]
    assert made["device_map"] == {"": torch.device("cuda:0")}
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert _quantisation(Quantised("int8"), torch.bfloat16)["quantization_config"].load_in_8bit
