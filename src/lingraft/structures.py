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
from lingraft.differences import trainable_weights
from lingraft.errors import AdapterError
from lingraft.heads import Head, tensor_prefix
from lingraft.layouts.common import PREFIX
from lingraft.layouts.prefix import TENSOR, site_name
from lingraft.modules.bottleneck import INITIAL_STD
from lingraft.modules.sparse import parted
from lingraft.prefixes import attention_shape, keys_and_values
from lingraft.tasks.reference import bundled_text

if TYPE_CHECKING:
    from lingraft.backbones import Backbone

IA3_ROLES = ("attention.key", "attention.value", "feed_forward.output")
"""What (IA)³ scales (Liu et al. 2022): keys, values, and the input of the feed-forward part's last layer."""
BOTTLENECK_ROLES = {
    "pfeiffer": ("feed_forward.output",),
    "houlsby": ("attention.output", "feed_forward.output"),
    "madx": ("feed_forward.output",),
}
"""The layers whose output a bottleneck adapter changes, before the residual is added."""
COUPLING_SHARE = 4
"""MAD-X's coupling maps half of an embedding's width to a quarter of it and back."""
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
    return _for_a_task(backbone, config.family, seed, head, made, tensors)


def fresh_coupling(backbone: "Backbone", config: AdapterConfig, seed: int) -> Fresh:
    """The untrained coupling of a language adapter: behind the embeddings, inverted before the output embedding (MAD-X).

    Nearly no change: all matrices are Gaussian and small, the biases zero.

    Raises:
        AdapterError: The base has no embeddings, or no output embedding, that it could stand on.
    """
    places, width = _embeddings(backbone)
    size = max(1, width // COUPLING_SHARE)
    found: dict[str, torch.Tensor] = {}
    for net in "FG":
        rng = _drawn(f"coupling {net}", backbone, places[0], size, seed)
        for name, shape in (("down", (size, width // 2)), ("up", (width // 2, size))):
            values = rng.normal(0, INITIAL_STD, size=shape).astype(np.float32)
            found[f"{PREFIX}{places[0]}.invertible_{net}_{name}.weight"] = torch.from_numpy(values)
            found[f"{PREFIX}{places[0]}.invertible_{net}_{name}.bias"] = torch.zeros(shape[0])
    made = {
        "peft_type": "INVERTIBLE",
        "target_modules": places,
        "coupling_size": size,
        "activation": config.activation,
    }
    return _for_a_task(backbone, "invertible", seed, None, made, found)


def _embeddings(backbone: "Backbone") -> tuple[list[str], int]:
    """The paths of the modules that make embeddings, and the width of what the output embedding reads."""
    model: Any = backbone.model
    names = [name for name, _ in model.named_modules()]
    if backbone.kind == "encoder":
        found = [f"{model.base_model_prefix}.embeddings"]
    elif backbone.kind == "decoder":
        found = [name for name, module in model.named_modules() if module is model.get_input_embeddings()]
    else:
        found = [name for name in names if name.endswith(".embed_tokens")]
    output = model.get_output_embeddings()
    if not set(found) & set(names) or output is None:
        raise AdapterError(
            f"{type(model).__name__} has no embeddings that a coupling could stand on",
            where=backbone.located.name,
            remedy="train a language adapter without one: adapter.invertible=false",
        )
    return found, int(output.weight.shape[1])


def _for_a_task(
    backbone: "Backbone", structure: str, seed: int, head: Head | None, made: dict[str, Any], tensors: Any
) -> Fresh:
    """Adds what PEFT is told of the base and the task, and the head where one is trained."""
    task = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}.get(backbone.kind)
    if head is not None:
        task, modules, drawn = head.task_type, backbone.headed(head).modules, _head(backbone, head, seed)
        if modules:
            # PEFT finds modules by the ends of their paths.
            made["modules_to_save"] = [path.rsplit(".", 1)[-1] for path in modules]
            start = tensor_prefix(structure)
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
    modules = _behind(backbone, config)
    found: dict[str, torch.Tensor] = {}
    sizes: dict[str, int] = {}
    for module in modules:
        layer: Any = backbone.model.get_submodule(module)
        # DeepSpeed leaves an empty tensor where it shards, and says what its shape was.
        shape = getattr(layer.weight, "ds_shape", layer.weight.shape)
        width = int(shape[0]) if len(shape) == 1 else _sizes(backbone, module)[1]
        sizes[module] = size = max(1, int(width / config.reduction))
        rng = _drawn("init", backbone, module, size, seed)
        for name, shape in (("down", (size, width)), ("up", (width, size))):
            values = rng.normal(0, INITIAL_STD, size=shape).astype(np.float32)
            found[f"{PREFIX}{module}.bottleneck_{name}.weight"] = torch.from_numpy(values)
            found[f"{PREFIX}{module}.bottleneck_{name}.bias"] = torch.zeros(shape[0])
    if len(set(sizes.values())) > 1:
        raise AdapterError(
            f"the layers have different widths, so bottlenecks of {sorted(set(sizes.values()))}",
            remedy="choose layers of one width: adapter.modules",
        )
    made = {
        "peft_type": "BOTTLENECK",
        "target_modules": modules,
        "bottleneck_size": next(iter(sizes.values())),
        "activation": config.activation,
        "positions": config.positions,
    }
    return made, found


def _behind(backbone: "Backbone", config: AdapterConfig) -> list[str]:
    """The modules that bottlenecks stand on.

    MAD-X's read the normalised sum of the feed-forward part and its residual where the model makes one (post-norm encoders):
    there they stand on that norm.

    Raises:
        AdapterError: Without the last layer there are none.
    """
    norms = [name for name, _ in backbone.model.named_modules() if roles.ends_feed_forward(name)]
    if config.positions == "madx" and backbone.kind == "encoder" and norms:
        modules = sorted(norms)
    else:
        modules = backbone.target_modules(BOTTLENECK_ROLES[config.positions])
    if config.leave_out_last:
        last: dict[str, int] = {}
        for module in modules:  # By stack: an encoder-decoder has two.
            stack, number = module.split(".", 1)[0], roles.layer_of(module) or 0
            last[stack] = max(number, last.get(stack, 0))
        modules = [m for m in modules if (roles.layer_of(m) or 0) < last[m.split(".", 1)[0]]]
        if not modules:
            raise AdapterError(
                "without the last layer there is no layer left", remedy="use adapter.leave_out_last=false"
            )
    return modules


def _sparse(backbone: "Backbone", config: AdapterConfig, seed: int) -> Fresh:
    """Nothing: a sparse difference starts at the base's own weights, and which of them change is not known yet."""
    found = trainable_weights(backbone.model, config.modules)
    modules = dict.fromkeys(parted(site)[0] for site in found)
    return {"peft_type": "SPARSE", "target_modules": list(modules), "entries": {}}, {}


_MAKERS = {"lora": _lora, "ia3": _ia3, "prefix": _prefix, "bottleneck": _bottleneck, "sparse": _sparse}
