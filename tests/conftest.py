"""A tiny model that runs everywhere: two layers, 32 wide, random weights, a tokenizer of bytes."""

import os
from pathlib import Path

import pytest

# Before torch is imported: tiny products are slower on two threads, and equal threads give equal bytes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never write into the user's cache."""
    monkeypatch.setenv("LINGRAFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def save_tiny_model(folder: Path, architecture: str = "llama", **changes: object) -> Path:
    """Writes a random two-layer model and its byte tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    sizes = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config)
    # A random head of the usual size cannot say anything with confidence, whatever is learned below it.
    model.get_output_embeddings().weight.data.mul_(20)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """The tiny Llama, loaded in float32."""
    from lingraft.backbones import Backbone
    from lingraft.config import BackboneConfig
    from lingraft.locating import locate

    return Backbone(locate(BackboneConfig(model=str(tiny_folder), dtype="float32", device="cpu")))
