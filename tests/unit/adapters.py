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
