"""PEFT's folders: which files there are, what a configuration says of every site, and what is refused.

Rank and alpha patterns and rsLoRA are read as PEFT reads them. What a merge would drop in silence is refused by name.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingraft.errors import AdapterError, StoreError
from lingraft.store import read_json
from lingraft.tensors import TensorFile

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SIDECAR = "lingraft.json"
PREFIX = "base_model.model."
_VARIANTS = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""PEFT's options that make a LoRA layer compute something else than `s · B · A · x` at every position."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Place:
    """One site's shape: the features going in and out, the rank, and the scaling."""

    in_features: int
    out_features: int
    rank: int
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight it adds to: out × in."""
        return self.out_features, self.in_features


def check_folder(folder: Path) -> None:
    """Makes sure that a folder holds an adapter in safetensors.

    Raises:
        AdapterError: It does not; a pickle is refused with the command that converts it.
    """
    if not folder.is_dir():
        raise AdapterError("there is no such adapter folder", where=folder, remedy="check the path")
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"this folder has no {CONFIG}", where=folder, remedy="give the folder of a PEFT adapter")
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise AdapterError(
                "this adapter is a pickle (adapter_model.bin), which can run code when it is opened",
                where=folder,
                remedy='where you trust it, convert it: python -c "import sys, torch; from safetensors.torch import save_file; '
                "d = sys.argv[1]; save_file(torch.load(d + '/adapter_model.bin', weights_only=True), "
                f"d + '/{WEIGHTS}')\" {folder}",
            )
        raise AdapterError(f"this folder has no {WEIGHTS}", where=folder, remedy="give the folder of a PEFT adapter")


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except StoreError as error:  # Its remedy is for what lingraft can make again; an adapter may be the only copy.
        remedy = "get the file from where the adapter came from"
        raise AdapterError(error.what, where=error.where, remedy=remedy) from None


def read_sidecar(folder: Path) -> dict[str, Any]:
    """What lingraft noted beside an adapter; of an adapter made elsewhere, that it is one.

    Raises:
        AdapterError: The note is damaged.
    """
    if not (folder / SIDECAR).is_file():
        return {"format": 1, "kind": "adapter", "family": "lora"}
    found = _read(folder / SIDECAR)
    if not isinstance(found, dict) or not isinstance(found.get("backbone") or {}, dict):
        raise AdapterError(
            "this file is not lingraft's", where=folder / SIDECAR, remedy="delete it: only the provenance is lost"
        )
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """PEFT's configuration, of plain LoRA only.

    Raises:
        AdapterError: It is damaged, or of another structure, or a merge would silently drop a part of it.
    """
    config = _read(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(f"this is not a LoRA adapter (peft_type {kind})", where=folder / CONFIG)
    init = config.get("init_lora_weights")
    refused = {
        "DoRA (use_dora)": config.get("use_dora"),
        "a LoRA bias (lora_bias)": config.get("lora_bias"),
        f"trained base biases (bias={config.get('bias')!r})": config.get("bias", "none") != "none",
        "replicated layers": config.get("layer_replication"),
        "target_parameters": config.get("target_parameters"),
        **{name: config.get(name) for name in _VARIANTS},
        f"an initialisation that changes the base model ({init})": isinstance(init, str)
        and init.startswith(_CHANGES_BASE),
    }
    found = [what for what, present in refused.items() if present]
    if found:
        raise AdapterError(
            "this adapter does more than add B·A to its weights: " + "; ".join(found),
            where=folder / CONFIG,
            remedy="train it as plain LoRA: a merge would silently drop the rest",
        )
    return config


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: float) -> float:
    """The value for a module as PEFT finds it: a pattern matches the end of the path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(default)


def place_of(
    tensors: TensorFile, config: Mapping[str, Any], module: str, names: Mapping[str, str], folder: Path
) -> Place:
    """The shape and scaling of a site.

    Raises:
        AdapterError: A factor is missing, or the two do not multiply.
    """
    if set(names) != {"A", "B"}:
        raise AdapterError(f"{module} has only one of the two LoRA factors", where=folder)
    a, b = tensors.shape(names["A"]), tensors.shape(names["B"])
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise AdapterError(f"{module}: factors of shapes {a} and {b} do not multiply", where=folder)
    try:
        alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    except (re.error, TypeError, ValueError) as error:
        raise AdapterError(f"alpha cannot be read for {module} ({error})", where=folder / CONFIG) from None
    scaling = alpha / a[0] ** 0.5 if config.get("use_rslora") else alpha / a[0]
    return Place(a[1], b[0], a[0], scaling)


def config_for(config: Mapping[str, Any], layout: Mapping[str, Place]) -> dict[str, Any]:
    """PEFT's configuration for a layout: the commonest rank and alpha, and patterns for the rest."""
    ranks = {m: p.rank for m, p in layout.items()}
    alphas = {m: p.scaling * p.rank for m, p in layout.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        **config,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": False,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "inference_mode": True,
    }
