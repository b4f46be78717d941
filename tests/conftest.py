"""A tiny model that runs everywhere: two layers, 32 wide, random weights, a tokenizer of bytes."""

import os
import signal
from pathlib import Path

import pytest

# Before torch is imported: tiny products are slower on two threads, and equal threads give equal bytes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Started in the background (CI), a process inherits that SIGINT is ignored, and so would all that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never write into the user's cache."""
    monkeypatch.setenv("LINGRAFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "deberta-v2", "electra", "modernbert")
ENCODER_DECODERS = ("t5", "mt5", "umt5")
SENTINELS = 20


def byte_tokenizer(architecture: str):
    """A tokenizer of bytes with the special tokens of an architecture, and their ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = ["<mask>"] if architecture in ENCODERS else []
    own += [f"<extra_id_{n}>" for n in range(SENTINELS)] if architecture in ENCODER_DECODERS else []
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet, "ab", *own])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in own])
    first, last = ("<bos>", 1), ("<eos>", 2)
    single, pair, special = "<bos> $A", None, [first]
    names: dict[str, object] = {"bos_token": "<bos>"}
    if architecture in ENCODERS:
        two = "<eos> $B:1 <eos>:1" if architecture in ("bert", "electra", "distilbert") else "<eos> <eos> $B <eos>"
        single, pair, special = "<bos> $A <eos>", f"<bos> $A {two}", [first, last]
        names = {"cls_token": "<bos>", "sep_token": "<eos>", "mask_token": "<mask>"}
    elif architecture in ENCODER_DECODERS:
        single, special, names = "$A <eos>", [last], {"extra_special_tokens": own}
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", **names), len(
        vocabulary
    )


def save_tiny_model(folder: Path, architecture: str = "llama", **changes: object) -> Path:
    """Writes a random two-layer model and its byte tokenizer; an encoder is a masked language model."""
    import torch
    import transformers

    tokenizer, words = byte_tokenizer(architecture)
    tokenizer.save_pretrained(folder)
    sizes = {
        "vocab_size": words,
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
    loader = "AutoModelForCausalLM"
    if architecture in ENCODERS:
        loader = "AutoModelForMaskedLM"
        del sizes["num_key_value_heads"]
        if architecture in ("roberta", "xlm-roberta", "camembert"):
            sizes |= {"max_position_embeddings": 513, "type_vocab_size": 1}
        if architecture == "distilbert":
            sizes |= {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
            for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
                del sizes[name]
        if architecture == "electra":
            sizes["embedding_size"] = 32
        # A usual deviation is a hundredth of what it takes for words to tell apart in 32 dimensions.
        sizes |= {"initializer_range": 0.2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    elif architecture in ENCODER_DECODERS:
        loader = "AutoModelForSeq2SeqLM"
        sizes = {"vocab_size": words, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        sizes |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(architecture, **{**sizes, **changes})
    model = getattr(transformers, loader).from_config(config)
    if loader == "AutoModelForCausalLM":
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
