"""Prefixes in PEFT's folders: one tensor of virtual tokens × (layers · 2 · width), keys before values in every layer."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lingraft.algebra import Site
from lingraft.errors import AdapterError
from lingraft.layouts.common import Config, Opened, Place, Values, shown
from lingraft.tensors import Spec, TensorFile

TENSOR = "prompt_embeddings"
ROLES = ("key", "value")


def site_name(layer: int) -> str:
    """What the site of a layer is called."""
    return f"layers.{layer}"


@dataclass(frozen=True)
class PrefixLayout:
    """`prompt_embeddings`; a site is a layer, with `key` and `value` (virtual tokens × width)."""

    structure: str = "prefix"
    peft_type: str = "PREFIX_TUNING"

    def check(self, config: Config, where: Path) -> None:
        """Refuses a prefix that two stacks of layers share.

        Raises:
            AdapterError: It is one.
        """
        submodules = config.get("num_transformer_submodules") or 1
        if submodules != 1:
            raise AdapterError(
                f"this prefix is shared by {shown(submodules)} stacks of layers, which a merge by layer cannot tell apart",
                where=where,
                remedy="train it for the decoder or the encoder alone",
            )

    def open(self, config: Config, tensors: TensorFile) -> Opened:
        """See `Layout.open`.

        Raises:
            AdapterError: The tensor is missing, or its shape does not fit the configuration.
        """
        if TENSOR not in tensors.names:
            raise AdapterError(
                f"this file has no tensor '{TENSOR}'",
                where=tensors.path,
                remedy="give an adapter of the structure that its adapter_config.json names",
            )
        shape = tensors.shape(TENSOR)
        layers, tokens = config.get("num_layers"), config.get("num_virtual_tokens")
        if type(layers) is not int or layers < 1 or len(shape) != 2 or shape[0] != tokens or 0 in shape:
            raise AdapterError(
                f"a prefix of shape {shape} does not fit {shown(tokens)} virtual tokens in {shown(layers)} layers",
                where=tensors.path,
                remedy="make the adapter again: its configuration is of another one",
            )
        width, rest = divmod(shape[1], 2 * layers)
        if rest:
            raise AdapterError(
                f"{shape[1]} numbers do not divide among {layers} layers' keys and values",
                where=tensors.path,
                remedy="make the adapter again: its configuration is of another one",
            )
        layout = {site_name(n): Place(dict.fromkeys(ROLES, (shape[0], width))) for n in range(layers)}

        @lru_cache(maxsize=1)
        def whole() -> np.ndarray[Any, Any]:
            return tensors.read(TENSOR).reshape(shape[0], layers, 2, width)

        def read(module: str) -> Site:
            layer = int(module.removeprefix("layers."))
            return Site({role: whole()[:, layer, n] for n, role in enumerate(ROLES)})

        return Opened(layout, read, tuple(n for n in tensors.names if n != TENSOR))

    def encode(
        self, layout: Mapping[str, Place], read: Callable[[str], Site], dtype: np.dtype[Any]
    ) -> tuple[list[Spec], Values]:
        """See `Layout.encode`."""
        places = list(layout.values())
        tokens, width = places[0].shapes["key"]

        def values() -> Values:
            parts: list[np.ndarray[Any, Any]] = []
            for module in layout:
                site = read(module)
                parts += [site.tensors[role] for role in ROLES]
            yield np.concatenate(parts, axis=1)

        return [(TENSOR, (tokens, 2 * width * len(places)), dtype)], values()

    def announced(self, layout: Mapping[str, Place], specs: Iterable[Spec]) -> Mapping[str, Place]:
        """The layout as it is."""
        return layout

    def config_for(self, config: Config, layout: Mapping[str, Place]) -> dict[str, Any]:
        """The configuration with the number of virtual tokens; the prefix is stored as it is used, projected."""
        tokens = next(iter(layout.values())).shapes["key"][0]
        return {**config, "num_virtual_tokens": tokens, "inference_mode": True}

    def kind(self, config: Config) -> dict[str, Any]:
        """How the width splits into heads."""
        return {"heads": config.get("num_attention_heads")}

    def size(self, place: Place) -> int | None:
        """The number of virtual tokens."""
        return place.shapes["key"][0]
