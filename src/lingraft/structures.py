"""A fresh adapter of every structure: PEFT's configuration for a base model, and the initial weights.

Initial weights are a function of (base model, adapter configuration, seed), never of the global random state: adapters that
are to be merged must start alike.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lingraft import roles
from lingraft.batching import derived_seed
from lingraft.config import AdapterConfig
from lingraft.errors import AdapterError
from lingraft.heads import Head, tensor_prefix
from lingraft.layouts.common import PREFIX
from lingraft.layouts.prefix import TENSOR, site_name
from lingraft.modules.bottleneck import INITIAL_STD
from lingraft.prefixes import attention_shape, keys_and_values
from lingraft.tasks.reference import bundled_text

if TYPE_CHECKING:
    from lingraft.backbones import Backbone

IA3_ROLES = ("attention.key", "attention.value", "feed_forward.output")
"""What (IA)³ scales (Liu et al. 2022): keys, values, and the input of the feed-forward part's last layer."""
BOTTLENECK_ROLES = {
    "pfeiffer": ("feed_forward.output",),
    "houlsby": ("attention.output", "feed_forward.output"),
}
"""The layers whose output a bottleneck adapter changes, before the residual is added."""
Fresh = tuple[dict[str, Any], dict[str, torch.Tensor]]
"""PEFT's configuration, and the initial tensors by PEFT's names, in float32."""


def fresh(backbone: "Backbone", config: AdapterConfig, seed: int, head: Head | None = None) -> Fresh:
    """An untrained adapter.

    Args:
        backbone: The base model.
        config: The adapter's structure.
        seed: Draws what is drawn.
        head: The head of an encoder, part of the adapter where it is trained; None: none.

    Raises:
        UserError: The base has none of the modules.
        AdapterError: The base cannot serve the structure.
        BackboneError: The checkpoint has no such head, and it cannot be trained.
    """
    made, tensors = _MAKERS[config.family](backbone, config, seed)
    task = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}.get(backbone.kind)
    if head is not None:
        task, modules, drawn = head.task_type, backbone.headed(head).modules, _head(backbone, head, seed)
        if modules:
            # PEFT finds modules by the ends of their paths.
            made["modules_to_save"] = [path.rsplit(".", 1)[-1] for path in modules]
            start = tensor_prefix(config.family)
            tensors = {**tensors, **{f"{start}{name}": tensor for name, tensor in drawn.items()}}
    return {**made, "task_type": task, "base_model_name_or_path": backbone.located.name}, tensors


def _head(backbone: "Backbone", head: Head, seed: int) -> dict[str, torch.Tensor]:
    """A head's tensors by their paths in the model: the checkpoint's where it has them, else as transformers draws them.

    Matrices are Gaussian with the configuration's deviation, biases zero, the weights of norms one.
    """
    headed = backbone.headed(head)
    config: Any = headed.model.config
    spread = float(getattr(config, "initializer_range", INITIAL_STD) or INITIAL_STD)
    found: dict[str, torch.Tensor] = {}
    for path in headed.modules:
        for name, tensor in headed.model.get_submodule(path).state_dict().items():
            whole = f"{path}.{name}"
            if whole not in headed.drawn:
                found[whole] = tensor.detach().float().cpu().clone()
            elif tensor.dim() > 1:
                parts = ("head", backbone.digest, head.kind, head.labels, whole, seed)
                values = np.random.default_rng(derived_seed(*parts)).normal(0, spread, size=tuple(tensor.shape))
                found[whole] = torch.from_numpy(values.astype(np.float32))
            else:
                found[whole] = (torch.zeros if name.endswith("bias") else torch.ones)(tensor.shape)
    return found


def sites(made: dict[str, Any]) -> list[str]:
    """What the sites of an adapter with this configuration are called."""
    return made.get("target_modules") or [site_name(n) for n in range(made["num_layers"])]


def _drawn(kind: str, backbone: "Backbone", module: str, size: int, seed: int) -> np.random.Generator:
    return np.random.default_rng(derived_seed(kind, backbone.digest, size, module, seed))


def _sizes(backbone: "Backbone", module: str) -> tuple[int, int]:
    """Features in and out of a linear layer."""
    layer: Any = backbone.model.get_submodule(module)
    return int(layer.in_features), int(layer.out_features)


def _lora(backbone: "Backbone", config: AdapterConfig, seed: int) -> Fresh:
    """A is uniform in ±1/√in (PEFT's Kaiming initialisation with a = √5), B is zero."""
    modules = backbone.target_modules(config.modules)
    found: dict[str, torch.Tensor] = {}
    for module in modules:
        inner, outer = _sizes(backbone, module)
        rng = _drawn("init", backbone, module, config.rank, seed)
        a = rng.uniform(-1, 1, size=(config.rank, inner)) / math.sqrt(inner)
        found[f"{PREFIX}{module}.lora_A.weight"] = torch.from_numpy(a.astype(np.float32))
        found[f"{PREFIX}{module}.lora_B.weight"] = torch.zeros(outer, config.rank)
    made = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": modules,
    }
    return made, found


def _ia3(backbone: "Backbone", config: AdapterConfig, seed: int) -> Fresh:
    """Ones: the adapter does nothing."""
    modules = backbone.target_modules(IA3_ROLES if config.modules == "all" else config.modules)
    inputs = [module for module in modules if roles.plays(module, "feed_forward")]
    found: dict[str, torch.Tensor] = {}
    for module in modules:
        inner, outer = _sizes(backbone, module)
        found[f"{PREFIX}{module}.ia3_l"] = torch.ones(1, inner) if module in inputs else torch.ones(outer, 1)
    return {"peft_type": "IA3", "target_modules": modules, "feedforward_modules": inputs}, found


def _prefix(backbone: "Backbone", config: AdapterConfig, seed: int) -> Fresh:
    """The base's own keys and values of running text (Li and Liang 2021 found real words the best start)."""
    layers, heads, width = attention_shape(backbone.model)
    text = backbone.encode(bundled_text("en"))
    start = derived_seed("init", backbone.digest, config.tokens, seed) % len(text)
    ids = [*backbone.prefix, *(text[(start + n) % len(text)] for n in range(config.tokens))][: config.tokens]
    made = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": config.tokens,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * width,
        "num_transformer_submodules": 1,
    }
    return made, {TENSOR: keys_and_values(backbone.model, torch.tensor([ids], device=backbone.device))}


def _bottleneck(backbone: "Backbone", config: AdapterConfig, seed: int) -> Fresh:
    """Both matrices Gaussian and small, as in MAD-X: nearly no change, and of full rank, so that they can be inverted."""
    modules = backbone.target_modules(BOTTLENECK_ROLES[config.positions])
    found: dict[str, torch.Tensor] = {}
    sizes: dict[str, int] = {}
    for module in modules:
        _, width = _sizes(backbone, module)
        sizes[module] = size = max(1, int(width / config.reduction))
        rng = _drawn("init", backbone, module, size, seed)
        for name, shape in (("down", (size, width)), ("up", (width, size))):
            values = rng.normal(0, INITIAL_STD, size=shape).astype(np.float32)
            found[f"{PREFIX}{module}.bottleneck_{name}.weight"] = torch.from_numpy(values)
            found[f"{PREFIX}{module}.bottleneck_{name}.bias"] = torch.zeros(shape[0])
    if len(set(sizes.values())) > 1:
        raise AdapterError(f"the layers have different widths, so bottlenecks of {sorted(set(sizes.values()))}")
    made = {
        "peft_type": "BOTTLENECK",
        "target_modules": modules,
        "bottleneck_size": next(iter(sizes.values())),
        "activation": config.activation,
        "positions": config.positions,
    }
    return made, found


_MAKERS = {"lora": _lora, "ia3": _ia3, "prefix": _prefix, "bottleneck": _bottleneck}
