"""Prefixes on a loaded model: virtual keys and values before those of the text, put there by a hook of our own.

PEFT holds the parameters and the file. It hands a prefix to the model through its own wrapper's forward and generation code,
which break with nearly every version of transformers; a hook on the decoder sees every call, in training, scoring and
generation, with a cache and without, and needs the cache's public methods only.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lingraft.errors import AdapterError


def refusal(model: Any, structure: str) -> str | None:
    """Why a model cannot serve an adapter of a structure, or None where it can.

    Args:
        model: A transformers model.
        structure: `lora`, `ia3`, `prefix`, `bottleneck`, …
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if structure != "prefix":
        return None
    if name.endswith("ForMultipleChoice"):
        return f"{name} folds the choices into the batch, which a prefix does not know of"
    if _recomputes(model):
        return "gradient checkpointing computes keys and values again and loses those of the prefix"
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} has two stacks of layers, and a prefix here is of one"
    if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
        return f"{name} takes no keys and values from outside"
    if not getattr(config, "is_decoder", True) and name.startswith(("Bert", "Roberta", "XLMRoberta", "DistilBert")):
        return f"{name} is an encoder, whose layers keep no keys and values"
    if getattr(config, "num_kv_shared_layers", 0):
        return f"{name} shares keys and values among layers"
    kinds = set(getattr(config, "layer_types", None) or []) - {
        "full_attention",
        "sliding_attention",
        "chunked_attention",
    }
    if kinds:
        return f"{name} has layers without keys and values ({', '.join(sorted(kinds))})"
    return None


def _recomputes(model: Any) -> bool:
    """Whether gradient checkpointing is on, by its newer name and the older one."""
    name = (
        "is_activation_checkpointing" if hasattr(model, "is_activation_checkpointing") else "is_gradient_checkpointing"
    )
    return bool(getattr(model, name, False))


def attention_shape(model: Any) -> tuple[int, int, int]:
    """Layers, key-value heads and the width of a head."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers), int(heads), int(width)


def keys_and_values(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """A base model's keys and values of a text, as PEFT lays out a prefix.

    Args:
        model: The model, without an adapter.
        ids: Token ids, 1 × n.

    Returns:
        n × (layers · 2 · heads · width), in float32.

    Raises:
        AdapterError: The model cannot serve a prefix.
    """
    if reason := refusal(model, "prefix"):
        raise AdapterError(f"a prefix cannot be put on this model: {reason}", remedy="choose another structure")
    from transformers import DynamicCache

    with torch.no_grad():
        # A cache that knows of windows would keep the last tokens only.
        cache = model.base_model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
    parts = []
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            parts.append(states[0].transpose(0, 1).flatten(1).float())
    return torch.cat(parts, dim=1).cpu()


def _fill(cache: Any, prefix: torch.Tensor, shape: tuple[int, int, int], batch: int, dtype: torch.dtype) -> None:
    """Writes the prefix into an empty cache."""
    layers, heads, width = shape
    blocks = prefix.to(dtype).view(prefix.shape[0], layers, 2, heads, width).permute(1, 2, 3, 0, 4)
    for number, (keys, values) in enumerate(blocks):
        cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), number)


@contextmanager
def in_front(model: Any, prefix: torch.Tensor) -> Iterator[None]:
    """Puts a prefix in front of whatever the model reads, in all its layers.

    Texts of a batch may be padded on either side; in layers with a window, padding between prefix and text counts towards it.
    A cache that is handed in together with `use_cache=False` is not read: generation hands back the one of the step before.

    Args:
        model: A causal language model.
        prefix: Virtual tokens × (layers · 2 · heads · width); gradients flow into it.

    Raises:
        AdapterError: The model cannot serve a prefix, or the prefix is of another shape.
    """
    from transformers import DynamicCache

    if reason := refusal(model, "prefix"):
        raise AdapterError(f"a prefix cannot be put on this model: {reason}", remedy="choose another structure")
    shape = attention_shape(model)
    tokens, wide = prefix.shape
    if wide != 2 * shape[0] * shape[1] * shape[2]:
        raise AdapterError(
            f"the adapter does not fit this base model: a prefix {wide} wide, {2 * shape[0] * shape[1] * shape[2]} expected",
            remedy="use the base model the adapter was trained on",
        )
    config = model.config.get_text_config()
    takes = inspect.signature(model.base_model.forward).parameters

    def before(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if module.training and _recomputes(model):
            raise AdapterError(
                "a prefix cannot be trained with gradient checkpointing, which loses its keys and values",
                remedy="switch it off: model.gradient_checkpointing_disable()",
            )
        bound = inspect.signature(module.forward).bind_partial(*args, **given)
        kwargs = {k: v for k, v in bound.arguments.items() if k != "kwargs"} | bound.arguments.get("kwargs", {})
        read = kwargs.get("input_ids")
        batch, length = (read if read is not None else kwargs["inputs_embeds"]).shape[:2]
        cache = kwargs.get("past_key_values")
        # Without caching the whole text comes again each time; the model still hands back the cache it was given.
        if cache is None or kwargs.get("use_cache") is False:
            cache = DynamicCache(config=config)
        if cache.get_seq_length() == 0:
            _fill(cache, prefix, shape, batch, model.dtype)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor):
            if mask.dim() != 2:
                raise AdapterError("a prefix needs an attention mask of batch × length, or none")
            if mask.shape[1] != cache.get_seq_length() + length:  # PEFT's own forward has widened it already.
                mask = torch.cat([mask.new_ones(batch, tokens), mask], dim=1)
            kwargs["attention_mask"] = mask
        # The text stands behind the prefix, wherever it is padded.
        kwargs |= {"past_key_values": cache, "position_ids": None}
        if isinstance(mask, torch.Tensor) and "position_ids" in takes:
            kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        kwargs.pop("cache_position", None)
        return (), kwargs

    handle = model.base_model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
