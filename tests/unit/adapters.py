"""Random LoRA folders in PEFT's layout, made by numpy alone, and what they do to a model: the tests' second opinion."""

import copy
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch

PREFIX = "base_model.model."
LAYER = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
SHAPES = {f"model.layers.{layer}.{name}": shape for layer in (0, 1) for name, shape in LAYER.items()}
"""The linear layers of `tiny_llama`: out × in."""
FEW = {module: SHAPES[module] for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")}


def write_adapter(
    folder: Path,
    seed: int,
    *,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    rank: int = 2,
    alpha: float = 4,
    dtype: Any = np.float32,
    others: Mapping[str, np.ndarray] | None = None,
    sidecar: Mapping[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Writes an adapter with Gaussian factors and returns its folder."""
    random = np.random.default_rng(seed)
    tensors = dict(others or {})
    for module, (out, width) in shapes.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = random.normal(size=(rank, width)).astype(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = random.normal(size=(out, rank)).astype(dtype)
    write_folder(folder, tensors, config_of(shapes, r=rank, lora_alpha=alpha, **config))
    if sidecar is not None:
        (folder / "lingraft.json").write_text(json.dumps({"format": 1, "kind": "adapter", "family": "lora", **sidecar}))
    return folder


def config_of(shapes: Mapping[str, tuple[int, int]] = SHAPES, **values: Any) -> dict[str, Any]:
    """PEFT's configuration for these modules."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "target_modules": sorted(shapes),
        "bias": "none",
        "init_lora_weights": True,
        **values,
    }


def write_folder(folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    """Writes PEFT's two files by the safetensors library, not by the code under test."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(arrays, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))


def rewrite(folder: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    """Replaces every tensor of a float32 or float16 folder by what `change` makes of its name and value."""
    path = folder / "adapter_model.safetensors"
    tensors = {name: change(name, tensor) for name, tensor in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    return folder


def tensors_of(folder: Path) -> dict[str, Any]:
    """The folder's tensors as torch reads them."""
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def factors_of(folder: Path, module: str) -> tuple[np.ndarray, np.ndarray]:
    """A and B in float64."""
    tensors = tensors_of(folder)
    a, b = (tensors[f"{PREFIX}{module}.lora_{role}.weight"].double().numpy() for role in ("A", "B"))
    return a, b


def updates_of(folder: Path) -> dict[str, np.ndarray]:
    """The weight update of every module in float64, for a folder with one rank and one alpha."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("rank_pattern") and not config.get("alpha_pattern") and not config.get("use_rslora")
    names = [name for name in tensors_of(folder) if name.endswith(".lora_A.weight")]
    found = {}
    for module in (name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in names):
        a, b = factors_of(folder, module)
        found[module] = config["lora_alpha"] / config["r"] * b @ a
    return found


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder that is not hidden (`.x.lock` and `.x.partial/` may stay), with its bytes."""
    visible = [p for p in folder.rglob("*") if not any(q.startswith(".") for q in p.relative_to(folder).parts)]
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in visible}


@functools.cache
def _tiny_llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def tiny_llama() -> Any:
    """A fresh copy of one random two-layer model, in float32."""
    return copy.deepcopy(_tiny_llama())


def peft_deltas(folder: Path) -> dict[str, np.ndarray]:
    """The update of every adapted module as PEFT computes it."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = PeftModel.from_pretrained(tiny_llama(), folder)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {
        name.removeprefix(PREFIX): layer.get_delta_weight("default").detach().double().numpy()
        for name, layer in layers.items()
    }


def peft_merged_changes(folder: Path) -> dict[str, np.ndarray]:
    """How PEFT's `merge_and_unload` changes every parameter of the model."""
    from peft import PeftModel

    base = tiny_llama()
    merged = PeftModel.from_pretrained(tiny_llama(), folder).merge_and_unload()
    before = dict(base.named_parameters())
    after = dict(merged.named_parameters())
    assert set(before) == set(after)
    return {
        name.removesuffix(".weight"): (after[name] - before[name]).detach().double().numpy() for name in sorted(before)
    }


def peft_adapter(folder: Path, seed: int, **lora: Any) -> Path:
    """An adapter made and saved by PEFT itself, its LoRA parameters random."""
    import torch
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **lora))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def close(x: Any, y: Any, relative: float) -> bool:
    """Whether two arrays differ by at most `relative` of the second's norm."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    assert x.shape == y.shape
    return bool(np.linalg.norm(x - y) <= relative * np.linalg.norm(y))


# Adapters of other structures


OTHERS = ("ia3", "prefix", "bottleneck", "invertible", "sparse")
"""The structures besides LoRA."""
STRUCTURES = ("lora", *OTHERS)
TYPES = {
    "ia3": "IA3",
    "prefix": "PREFIX_TUNING",
    "bottleneck": "BOTTLENECK",
    "invertible": "INVERTIBLE",
    "sparse": "SPARSE",
}


def write_structure(
    folder: Path,
    structure: str,
    seed: int,
    *,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    size: int = 4,
    spread: float = 0.3,
    dtype: Any = np.float32,
    others: Mapping[str, np.ndarray] | None = None,
    sidecar: Mapping[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Writes a random adapter of any structure for a Llama whose linear layers have these shapes.

    Args:
        folder: Where to.
        structure: One of `STRUCTURES`.
        seed: Draws the numbers.
        shapes: Out × in of the linear layers.
        size: The rank, the number of virtual tokens, the width of a bottleneck, or how many entries differ in a weight.
        spread: The standard deviation; around 1 for (IA)³.
        dtype: The type on disk.
        others: Further tensors, such as a head.
        sidecar: What lingraft noted.
        **config: Changes to PEFT's configuration.
    """
    if structure == "lora":
        return write_adapter(
            folder,
            seed,
            shapes=shapes,
            rank=size,
            alpha=config.pop("lora_alpha", 4),
            dtype=dtype,
            others=others,
            sidecar=sidecar,
            **config,
        )
    random = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        return random.normal(0, spread, size=shape).astype(dtype)

    tensors, made = _MAKERS[structure](shapes, size, drawn, random)
    values = {
        "peft_type": TYPES[structure],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        **made,
        **config,
    }
    write_folder(folder, {**tensors, **(others or {})}, values)
    if sidecar is not None:
        note = {"format": 1, "kind": "adapter", "family": structure, **sidecar}
        (folder / "lingraft.json").write_text(json.dumps(note))
    return folder


Made = tuple[dict[str, np.ndarray], dict[str, Any]]


def _ia3(shapes: Mapping[str, tuple[int, int]], size: int, drawn: Any, random: Any) -> Made:
    tensors = {}
    for module, (out, inner) in shapes.items():
        if module.endswith(("k_proj", "v_proj", "down_proj")):
            l = drawn(1, inner) if module.endswith("down_proj") else drawn(out, 1)  # noqa: E741
            tensors[f"{PREFIX}{module}.ia3_l"] = (1 + l).astype(l.dtype)
    return tensors, {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def _prefix(shapes: Mapping[str, tuple[int, int]], size: int, drawn: Any, random: Any) -> Made:
    layers = 1 + max(int(module.split(".")[2]) for module in shapes)
    width = next(out for module, (out, _) in shapes.items() if module.endswith("k_proj"))
    made = {
        "num_virtual_tokens": size,
        "num_layers": layers,
        "token_dim": width,
        "num_attention_heads": 2,
        "num_transformer_submodules": 1,
    }
    return {"prompt_embeddings": drawn(size, layers * 2 * width)}, made


def _bottleneck(shapes: Mapping[str, tuple[int, int]], size: int, drawn: Any, random: Any) -> Made:
    tensors = {}
    for module, (out, _) in shapes.items():
        if module.endswith("down_proj"):
            tensors[f"{PREFIX}{module}.bottleneck_down.weight"] = drawn(size, out)
            tensors[f"{PREFIX}{module}.bottleneck_down.bias"] = drawn(size)
            tensors[f"{PREFIX}{module}.bottleneck_up.weight"] = drawn(out, size)
            tensors[f"{PREFIX}{module}.bottleneck_up.bias"] = drawn(out)
    return tensors, {"target_modules": ["down_proj"], "bottleneck_size": size, "activation": "relu"}


def _invertible(shapes: Mapping[str, tuple[int, int]], size: int, drawn: Any, random: Any) -> Made:
    half = next(inner for module, (_, inner) in shapes.items() if module.endswith("q_proj")) // 2
    tensors = {}
    for net in "FG":
        name = f"{PREFIX}model.embed_tokens.invertible_{net}"
        tensors[f"{name}_down.weight"], tensors[f"{name}_down.bias"] = drawn(size, half), drawn(size)
        tensors[f"{name}_up.weight"], tensors[f"{name}_up.bias"] = drawn(half, size), drawn(half)
    return tensors, {"target_modules": ["embed_tokens"], "activation": "relu"}


def _sparse(shapes: Mapping[str, tuple[int, int]], size: int, drawn: Any, random: Any) -> Made:
    tensors = {}
    for module, (out, inner) in shapes.items():
        chosen = np.sort(random.choice(out * inner, size=size, replace=False)).astype(np.int64)
        tensors[f"{PREFIX}{module}.sparse_indices"] = chosen
        tensors[f"{PREFIX}{module}.sparse_values"] = drawn(size)
        tensors[f"{PREFIX}{module}.sparse_shape"] = np.array([out, inner], np.int64)
    return tensors, {"target_modules": sorted(shapes)}


_MAKERS = {
    "ia3": _ia3,
    "prefix": _prefix,
    "bottleneck": _bottleneck,
    "invertible": _invertible,
    "sparse": _sparse,
}


def numbers_of(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder by name, floats in float64."""
    return {name: (t.double() if t.is_floating_point() else t).numpy() for name, t in tensors_of(folder).items()}
