"""A decoder's keys and values of what it has read already: kept, copied for several rows, and read on from."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from lingraft.backbones import Backbone
from lingraft.prefixes import refuses_keys


def keeps_keys(backbone: Backbone) -> bool:
    """Whether a model can read on from keys and values that were computed before, with everything that is on it now.

    What mixes a counterpart's states in counts the columns of one forward pass, so it cannot.
    """
    model: Any = backbone.model
    if backbone.kind != "decoder" or backbone.fuser is not None or backbone.mixup is not None:
        return False
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    takes = inspect.signature(model.base_model.forward).parameters
    return "position_ids" in takes and "chunked_attention" not in kinds and refuses_keys(model) is None


def empty(backbone: Backbone) -> DynamicCache:
    """A cache without anything in it; layers with a window keep the window only."""
    return DynamicCache(config=backbone.model.config.get_text_config())


def pads_in_front(backbone: Backbone) -> bool:
    """Whether padding may stand in front of a text that is read on from.

    It counts towards a window where a prefix stands before it.
    """
    cache = empty(backbone)
    if not any(cache.is_sliding):
        return True
    one = torch.tensor([[backbone.pad_id]], device=backbone.device)
    read(backbone, one, torch.ones_like(one), cache)
    return cache.get_seq_length() == 1


def padded(
    backbone: Backbone, rows: Sequence[Sequence[int]], *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and their mask on the model's device, rows × the longest row."""
    width = max(map(len, rows))
    ids = [[backbone.pad_id] * (width - len(row)) for row in rows]
    mask = [[0] * len(more) for more in ids]
    ids = [[*more, *row] if left else [*row, *more] for more, row in zip(ids, rows, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [[*more, *one] if left else [*one, *more] for more, one in zip(mask, ones, strict=True)]
    return torch.tensor(ids, device=backbone.device), torch.tensor(mask, device=backbone.device)


def positions(mask: torch.Tensor, length: int) -> torch.Tensor:
    """Where the last columns stand in their texts: padding in front does not count."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]


def read(backbone: Backbone, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """States before the output embedding (rows × length × width); the cache then holds these columns, too.

    Args:
        backbone: The model, with adapters on it or without.
        ids: What is read on, rows × length.
        mask: Of all columns, those in the cache among them; a prefix's are not.
        cache: What was read before.
    """
    states = backbone.model.base_model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions(mask, ids.shape[1]),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    inverse = getattr(backbone.model.get_output_embeddings(), "inverse", None)
    return states if inverse is None else inverse(states)
