"""The sizes of a base model, from its configuration alone: its linear layers one by one, and its parameters, exactly."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingraft.architectures import Kind
from lingraft.errors import BackboneError

if TYPE_CHECKING:
    from lingraft.locating import Located

Plain = Mapping[str, Any]


@dataclass(frozen=True)
class Linear:
    """A linear layer: its path in the model, features in and out, and whether tokens of the output go through it."""

    path: str
    inputs: int
    outputs: int
    of_output: bool = False


@dataclass(frozen=True)
class Shape:
    """The sizes of a base model.

    Attributes:
        kind: What architecture it is.
        linear: Every linear layer of its blocks; not the output embedding, not a pooler.
        rest: Parameters in neither `linear` nor the embeddings of tokens: norms, biases, positions, pooler.
        vocabulary: Tokens.
        width: Features of a state.
        layers: Blocks that tokens of the input go through.
        output_layers: Blocks that tokens of the output go through; 0 but for an encoder-decoder.
        heads: Attention heads.
        attention: Features of all heads' queries together.
        key_value: Features of all heads' keys, which may be fewer.
        feed_forward: Features inside the feed-forward part.
        gated: Whether the feed-forward part multiplies two projections.
        normalised: Features that a block's norms read, for one token.
        tied: Whether the output embedding is the input's, or there is none.
    """

    kind: Kind
    linear: tuple[Linear, ...]
    rest: int
    vocabulary: int
    width: int
    layers: int
    output_layers: int
    heads: int
    attention: int
    key_value: int
    feed_forward: int
    gated: bool
    normalised: int
    tied: bool

    @cached_property
    def embedding(self) -> int:
        """Parameters of the token embeddings, input and output."""
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @cached_property
    def projections(self) -> int:
        """Weights of the linear layers."""
        return sum(layer.inputs * layer.outputs for layer in self.linear)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.embedding + self.projections + self.rest

    @cached_property
    def met(self) -> tuple[int, int]:
        """Weights that a token of the input meets, and one of the output."""
        theirs = sum(layer.inputs * layer.outputs for layer in self.linear if layer.of_output)
        return self.projections - theirs, theirs


# What distinguishes decoders of the Llama kind: norms a block, biases of query, key and value, norms of query and key, tied.
_DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"head_norms": True},
    "gemma": {"tied": True},
    "gemma2": {"norms": 4, "tied": True},
    "gemma3_text": {"norms": 4, "head_norms": True, "tied": True},
}
_ENCODERS = ("bert", "roberta", "xlm-roberta")
_ENCODER_DECODERS = ("t5", "mt5", "umt5")
_TRANSLATORS = ("m2m_100",)


def shape_of(config: Plain) -> Shape:
    """The sizes of a model, from its `config.json`.

    Args:
        config: The file's content; of a model with several parts (`text_config`), its language part is counted.

    Raises:
        BackboneError: The architecture is not known here, or the file lacks a size.
    """
    if "text_config" in config:
        config = config["text_config"]
    kind = config.get("model_type")
    try:
        if kind in _DECODERS:
            return _decoder(config, **_DECODERS[kind])
        if kind in _ENCODERS:
            return _encoder(config)
        if kind in _ENCODER_DECODERS:
            return _encoder_decoder(config)
        if kind in _TRANSLATORS:
            return _translator(config)
    except KeyError as error:
        raise BackboneError(
            f"the model's configuration has no {error}",
            remedy="add it to the model's config.json, or choose another base model",
        ) from None
    raise BackboneError(
        f"the sizes of a '{kind}' model are not known here",
        remedy=f"known are {', '.join([*_DECODERS, *_ENCODERS, *_ENCODER_DECODERS, *_TRANSLATORS])}",
    )


def _decoder(
    config: Plain, norms: int = 2, qkv_bias: bool = False, head_norms: bool = False, tied: bool = False
) -> Shape:
    width, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    inner, size = config["intermediate_size"], config.get("head_dim") or config["hidden_size"] // heads
    query, key = heads * size, (config.get("num_key_value_heads") or heads) * size
    sizes = {
        "self_attn.q_proj": (width, query),
        "self_attn.k_proj": (width, key),
        "self_attn.v_proj": (width, key),
        "self_attn.o_proj": (query, width),
        "mlp.gate_proj": (width, inner),
        "mlp.up_proj": (width, inner),
        "mlp.down_proj": (inner, width),
    }
    biases = query + 2 * key if qkv_bias else 0
    biases += (query + 2 * key + width) if config.get("attention_bias") and not qkv_bias else 0
    biases += (2 * inner + width) if config.get("mlp_bias") else 0
    return Shape(
        kind="decoder",
        linear=tuple(Linear(f"model.layers.{n}.{p}", *s) for n in range(layers) for p, s in sizes.items()),
        rest=layers * (norms * width + (2 * size if head_norms else 0) + biases) + width,
        vocabulary=config["vocab_size"],
        width=width,
        layers=layers,
        output_layers=0,
        heads=heads,
        attention=query,
        key_value=key,
        feed_forward=inner,
        gated=True,
        normalised=norms * width + (query + key if head_norms else 0),
        tied=config.get("tie_word_embeddings", tied),
    )


def _encoder(config: Plain) -> Shape:
    width, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    sizes = {
        **{f"attention.self.{name}": (width, width) for name in ("query", "key", "value")},
        "attention.output.dense": (width, width),
        "intermediate.dense": (width, inner),
        "output.dense": (inner, width),
    }
    # Of a block: two norms of weight and bias, and six biases. Around them: positions, types, a norm, the pooler.
    block = 2 * 2 * width + 5 * width + inner
    around = (config["max_position_embeddings"] + config.get("type_vocab_size", 2) + 2) * width + width * width + width
    return Shape(
        kind="encoder",
        linear=tuple(Linear(f"encoder.layer.{n}.{p}", *s) for n in range(layers) for p, s in sizes.items()),
        rest=layers * block + around,
        vocabulary=config["vocab_size"],
        width=width,
        layers=layers,
        output_layers=0,
        heads=config["num_attention_heads"],
        attention=width,
        key_value=width,
        feed_forward=inner,
        gated=False,
        normalised=2 * width,
        tied=True,
    )


def _encoder_decoder(config: Plain) -> Shape:
    width, inner, heads = config["d_model"], config["d_ff"], config["num_heads"]
    layers, output_layers = config["num_layers"], config.get("num_decoder_layers") or config["num_layers"]
    gated, query = "gated" in config.get("feed_forward_proj", "relu"), heads * config["d_kv"]
    attention = {"q": (width, query), "k": (width, query), "v": (width, query), "o": (query, width)}
    inside = ("wi_0", "wi_1") if gated else ("wi",)
    feed_forward = {**dict.fromkeys(inside, (width, inner)), "wo": (inner, width)}
    linear: list[Linear] = []
    for n in range(layers):
        block = f"encoder.block.{n}.layer"
        linear += [Linear(f"{block}.0.SelfAttention.{p}", *s) for p, s in attention.items()]
        linear += [Linear(f"{block}.1.DenseReluDense.{p}", *s) for p, s in feed_forward.items()]
    for n in range(output_layers):
        block = f"decoder.block.{n}.layer"
        linear += [Linear(f"{block}.0.SelfAttention.{p}", *s, of_output=True) for p, s in attention.items()]
        # Keys and values that the decoder attends to are made of the input's tokens.
        linear += [Linear(f"{block}.1.EncDecAttention.{p}", *s, of_output=p in "qo") for p, s in attention.items()]
        linear += [Linear(f"{block}.2.DenseReluDense.{p}", *s, of_output=True) for p, s in feed_forward.items()]
    # A table of relative positions for each of the two stacks; umT5 has one in every block.
    tables = layers + output_layers if config.get("model_type") == "umt5" else 2
    positions = tables * config.get("relative_attention_num_buckets", 32) * heads
    return Shape(
        kind="encoder-decoder",
        linear=tuple(linear),
        rest=(2 * layers + 3 * output_layers + 2) * width + positions,
        vocabulary=config["vocab_size"],
        width=width,
        layers=layers,
        output_layers=output_layers,
        heads=heads,
        attention=query,
        key_value=query,
        feed_forward=inner,
        gated=gated,
        normalised=2 * width,
        tied=config.get("tie_word_embeddings", True),
    )


def _translator(config: Plain) -> Shape:
    """NLLB and M2M-100; their positions are reckoned, not learned."""
    width, inner = config["d_model"], config["encoder_ffn_dim"]
    layers, output_layers = config["encoder_layers"], config["decoder_layers"]
    outer = config["decoder_ffn_dim"]
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    linear: list[Linear] = []
    for n in range(layers):
        block = f"model.encoder.layers.{n}"
        linear += [Linear(f"{block}.self_attn.{p}", width, width) for p in names]
        linear += [Linear(f"{block}.fc1", width, inner), Linear(f"{block}.fc2", inner, width)]
    for n in range(output_layers):
        block = f"model.decoder.layers.{n}"
        linear += [Linear(f"{block}.self_attn.{p}", width, width, of_output=True) for p in names]
        crossed = ("q_proj", "out_proj")
        linear += [Linear(f"{block}.encoder_attn.{p}", width, width, of_output=p in crossed) for p in names]
        linear += [
            Linear(f"{block}.fc1", width, outer, of_output=True),
            Linear(f"{block}.fc2", outer, width, of_output=True),
        ]
    norms = 2 * width * (2 * layers + 3 * output_layers + 2)
    biases = sum(layer.outputs for layer in linear)
    return Shape(
        kind="encoder-decoder",
        linear=tuple(linear),
        rest=norms + biases,
        vocabulary=config["vocab_size"],
        width=width,
        layers=layers,
        output_layers=output_layers,
        heads=config["encoder_attention_heads"],
        attention=width,
        key_value=width,
        feed_forward=max(inner, outer),
        gated=False,
        normalised=2 * width,
        tied=config.get("tie_word_embeddings", True),
    )


@lru_cache(maxsize=64)
def reader_of(shape: Shape) -> Shape:
    """Of an encoder-decoder its encoder alone, which is all that reads a text for its states; others as they are."""
    if shape.kind != "encoder-decoder":
        return shape
    # The decoder's norms and biases are left in `rest`, which costs memory alone, and little.
    linear = tuple(layer for layer in shape.linear if ".encoder." in f".{layer.path}")
    return replace(shape, kind="encoder", linear=linear, output_layers=0, tied=True)


def _t5_base(inner: int, vocabulary: int, projection: str, tied: bool) -> dict[str, Any]:
    return {
        "d_model": 768,
        "d_kv": 64,
        "num_heads": 12,
        "num_layers": 12,
        "d_ff": inner,
        "vocab_size": vocabulary,
        "feed_forward_proj": projection,
        "tie_word_embeddings": tied,
    }


def _nllb(width: int, inner: int, layers: int) -> dict[str, Any]:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"layers": layers, "ffn_dim": inner, "attention_heads": 16}.items()
    }
    return {"model_type": "m2m_100", "vocab_size": 256_206, "d_model": width, **sides}


KNOWN: dict[str, dict[str, Any]] = {
    "NousResearch/Llama-2-7b-hf": {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "FacebookAI/xlm-roberta-base": {
        "model_type": "xlm-roberta",
        "vocab_size": 250_002,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
    "FacebookAI/xlm-roberta-large": {
        "model_type": "xlm-roberta",
        "vocab_size": 250_002,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
    "google/mt5-xl": {
        "model_type": "mt5",
        "d_model": 2048,
        "d_kv": 64,
        "num_heads": 32,
        "num_layers": 24,
        "d_ff": 5120,
        "vocab_size": 250_112,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.1-8B": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "google/gemma-2-9b": {
        "model_type": "gemma2",
        "vocab_size": 256_000,
        "hidden_size": 3584,
        "intermediate_size": 14_336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
    },
    "facebook/nllb-200-distilled-600M": _nllb(1024, 4096, 12),
    "facebook/nllb-200-3.3B": _nllb(2048, 8192, 24),
    "google-t5/t5-base": {"model_type": "t5", **_t5_base(3072, 32_128, "relu", True)},
    "google/mt5-base": {"model_type": "mt5", **_t5_base(2048, 250_112, "gated-gelu", False)},
    "google/gemma-3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
    },
}
"""Configurations of the papers' backbones, of the demo and of NLLB, by hub id, so that a cost needs no connection."""


def shape_for(located: "Located") -> Shape | None:
    """The sizes of a base model that was found; None where nothing here says them."""
    if located.name in KNOWN:
        return _known(located.name)
    if located.kind == "hub":
        return shape_named(located.name, located.config.revision)
    return _in_file(located.path / "config.json") if located.kind == "folder" and located.path else None


def shape_named(model: str, revision: str | None = None) -> Shape | None:
    """The sizes of a model by its hub id or folder; None where nothing here says them, and nothing is fetched."""
    if model in KNOWN:
        return _known(model)
    if (Path(model) / "config.json").is_file():
        return _in_file(Path(model) / "config.json")
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return _in_file(Path(cached)) if isinstance(cached, str) else None


@cache
def _known(model: str) -> Shape:
    return shape_of(KNOWN[model])


def _in_file(path: Path) -> Shape | None:
    try:
        return shape_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, BackboneError):
        return None
