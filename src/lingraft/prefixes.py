"""Prefixes on a loaded model: virtual keys and values before those of the text, put there by a hook of our own.

PEFT holds the parameters and the file. It hands a prefix to the model through its own wrapper's forward and generation code,
which break with nearly every version of transformers; a hook on the decoder sees every call, in training, scoring and
generation, with a cache and without, and needs the cache's public methods only.

An encoder keeps no keys and values. There the prefix stands before those that every layer hands to transformers' attention
interface, under a name of our own in its table; the mask is widened for it, and the text's positions come behind it, as in PEFT.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lingraft.architectures import kind_of
from lingraft.errors import AdapterError


def refusal(model: Any, structure: str) -> str | None:
    """Why a model cannot serve an adapter of a structure, or None where it can.

    Args:
        model: A transformers model.
        structure: `lora`, `ia3`, `prefix`, `bottleneck`, …
    """
    if structure != "prefix":
        return None
    if _encodes(model):
        name = type(model).__name__
        return (
            None if _dispatches(model) else f"{name} computes attention in a way of its own, which takes no other keys"
        )
    if _recomputes(model):
        return "gradient checkpointing computes keys and values again and loses those of the prefix"
    return refuses_keys(model)


def refuses_keys(model: Any) -> str | None:
    """Why a decoder cannot read on from keys and values that it is handed, or None where it can.

    Args:
        model: A transformers model.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} has two stacks of layers, and a prefix here is of one"
    if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
        return f"{name} takes no keys and values from outside"
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


def _encodes(model: Any) -> bool:
    return kind_of(model.config.to_dict()) == "encoder"


def _dispatches(model: Any) -> bool:
    """Whether a model's attention goes through transformers' table of attention functions."""
    return hasattr(sys.modules[type(model.base_model).__module__], "ALL_ATTENTION_FUNCTIONS")


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
    if _encodes(model):
        found: list[torch.Tensor] = []

        def record(inner: _Attention, module: Any, query: Any, key: Any, value: Any, mask: Any, given: Any) -> Any:
            found.extend(states[0].transpose(0, 1).flatten(1).float() for states in (key, value))
            return inner(module, query, key, value, mask, **given)

        with _attention_through(model, record), torch.no_grad():
            model.base_model(input_ids=ids)
        return torch.cat(found, dim=1).cpu()
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


_Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
_ATTENDING: dict[int, Callable[..., Any]] = {}
"""By the identity of a layer's attention, what computes it instead of transformers' function."""


def _registered(usual: str) -> str:
    """The name, in transformers' table, of attention that goes through `_ATTENDING`, and else is as usual.

    Raises:
        AdapterError: The usual attention takes no mask that could be widened.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if usual not in ("eager", "sdpa"):
        raise AdapterError(
            f"a prefix cannot be put on this model: its attention is '{usual}'", remedy="load it with sdpa or eager"
        )
    name = f"lingraft-{usual}"
    if name in ALL_ATTENTION_FUNCTIONS:
        return name

    def through(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **given: Any) -> Any:
        default = sys.modules[type(module).__module__].eager_attention_forward
        inner = ALL_ATTENTION_FUNCTIONS.get_interface(usual, default)
        function = _ATTENDING.get(id(module))
        if function is None:
            return inner(module, query, key, value, attention_mask, **given)
        return function(inner, module, query, key, value, attention_mask, given)

    AttentionInterface.register(name, through)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[usual])
    return name


@contextmanager
def _attention_through(model: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Has every attention of an encoder computed by `function(inner, module, query, key, value, mask, given)`.

    Args:
        model: An encoder with any head.
        function: Gets what the layer hands over (batch × heads × length × width), and `inner`, which would compute it otherwise.

    Raises:
        AdapterError: The model's attention takes no mask that could be widened.
    """
    # Encoders with several heads share their layers, so there may be a configuration a head.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    name = _registered((model.base_model.config._attn_implementation or "eager").removeprefix("lingraft-"))
    earlier = dict(_ATTENDING)
    _ATTENDING.update((id(module), function) for module in model.modules())
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        for module in model.modules():
            if (old := earlier.get(id(module))) is not None:
                _ATTENDING[id(module)] = old
            else:
                _ATTENDING.pop(id(module), None)


def _layers(model: Any) -> dict[int, int]:
    """The number of every attention of an encoder, by identity: the order in which they are called."""
    found: dict[int, int] = {}

    def record(inner: _Attention, module: Any, query: Any, key: Any, value: Any, mask: Any, given: Any) -> Any:
        found[id(module)] = len(found)
        return inner(module, query, key, value, mask, **given)

    with _attention_through(model, record), torch.no_grad():
        model.base_model(input_ids=torch.tensor([[1, 2]], device=model.device))
    return found


@contextmanager
def _before_the_text(model: Any, prefix: torch.Tensor, shape: tuple[int, int, int]) -> Iterator[None]:
    """Puts a prefix before the keys and values of an encoder's layers."""
    layers, heads, width = shape
    numbers = _layers(model)
    if len(numbers) != layers:
        raise AdapterError(
            f"a prefix cannot be put on this model: {len(numbers)} of its {layers} layers show their keys",
            remedy="choose another structure: lora, ia3 or bottleneck",
        )

    def attend(inner: _Attention, module: Any, query: Any, key: Any, value: Any, mask: Any, given: Any) -> Any:
        blocks = prefix.to(key.dtype).view(len(prefix), layers, 2, heads, width).permute(1, 2, 3, 0, 4)
        before = [block.expand(len(key), -1, -1, -1) for block in blocks[numbers[id(module)]]]
        if mask is not None:  # True, or nothing added to the scores: every word sees the prefix.
            mask = torch.nn.functional.pad(mask, (len(prefix), 0), value=mask.dtype == torch.bool)
        return inner(
            module, query, torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2), mask, **given
        )

    base = model.base_model
    takes = inspect.signature(base.forward).parameters
    most = getattr(model.config, "max_position_embeddings", None)

    def behind(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = {**inspect.signature(module.forward).bind_partial(*args).arguments, **given}
        if (
            kwargs.get("position_ids") is None
            and "position_ids" in takes
            and (ids := kwargs.get("input_ids")) is not None
        ):
            count = getattr(base.embeddings, "create_position_ids_from_input_ids", None)
            if count is None:
                places = torch.arange(len(prefix), len(prefix) + ids.shape[1], device=ids.device).expand(len(ids), -1)
            else:  # RoBERTa's begin behind the padding token's, and skip padding.
                places = count(ids, base.embeddings.padding_idx, len(prefix))
            if most is not None and int(places.max()) >= most:
                raise AdapterError(
                    f"a text of {ids.shape[1]} tokens and a prefix of {len(prefix)} are more than the model's {most} positions",
                    remedy="give a max_length (segment_tokens for reference text) that leaves room for the prefix",
                )
            kwargs["position_ids"] = places
        return (), kwargs

    handle = base.register_forward_pre_hook(behind, with_kwargs=True)
    try:
        with _attention_through(model, attend):
            yield
    finally:
        handle.remove()


@contextmanager
def in_front(model: Any, prefix: torch.Tensor) -> Iterator[None]:
    """Puts a prefix in front of whatever the model reads, in all its layers.

    Texts of a batch may be padded on either side; in layers with a window, padding between prefix and text counts towards it.
    A cache that is handed in together with `use_cache=False` is not read: generation hands back the one of the step before.

    Args:
        model: A causal language model, or an encoder with any head.
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
    if _encodes(model):
        with _before_the_text(model, prefix, shape):
            yield
        return
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
                raise AdapterError(
                    "a prefix needs an attention mask of batch × length, or none",
                    remedy="give the mask as the tokenizer makes it",
                )
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
