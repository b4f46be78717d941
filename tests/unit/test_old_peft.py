"""Folders as PEFT 0.10 wrote them: the configurations below are its own, with none of the fields that came later."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingraft import Adapter
from tests.unit.adapters import PREFIX, close, peft_deltas, write_folder

COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": "",
    "inference_mode": True,
    "revision": None,
    "task_type": "CAUSAL_LM",
}
LORA = {
    **COMMON,
    "alpha_pattern": {"v_proj": 9},
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 6,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "rank_pattern": {"q_proj": 2},
    "target_modules": ["q_proj", "v_proj"],
    "use_dora": False,
    "use_rslora": True,
}
IA3 = {
    **COMMON,
    "fan_in_fan_out": False,
    "feedforward_modules": ["down_proj"],
    "init_ia3_weights": True,
    "modules_to_save": None,
    "peft_type": "IA3",
    "target_modules": ["down_proj", "k_proj", "v_proj"],
}
PREFIX_TUNING = {
    **COMMON,
    "encoder_hidden_size": 16,
    "num_attention_heads": 2,
    "num_layers": 2,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": 3,
    "peft_type": "PREFIX_TUNING",
    "prefix_projection": False,
    "token_dim": 16,
}
ATTENTION = "model.layers.{}.self_attn.{}"


def folder_of(path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    write_folder(path, {n: random.normal(size=s).astype(np.float32) for n, s in shapes.items()}, config)
    return path


def lora_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in (0, 1):
        for name, rank, out in (("q_proj", 2, 32), ("v_proj", 4, 16)):
            module = PREFIX + ATTENTION.format(layer, name)
            shapes |= {f"{module}.lora_A.weight": (rank, 32), f"{module}.lora_B.weight": (out, rank)}
    return shapes


def test_lora_is_read_with_its_patterns_and_roots(tmp_path: Path) -> None:
    adapter = Adapter.load(folder_of(tmp_path / "a", LORA, lora_shapes()))
    scalings = {module.rsplit(".", 1)[-1]: place.scaling for module, place in adapter.layout.items()}
    assert scalings == {"q_proj": pytest.approx(6 / 2**0.5), "v_proj": pytest.approx(9 / 4**0.5)}


def test_a_merge_of_old_adapters_opens_in_todays_peft(tmp_path: Path) -> None:
    task, target, source = (Adapter.load(folder_of(tmp_path / str(n), LORA, lora_shapes(), n)) for n in range(3))
    (target - source).onto(task, space="product").save(tmp_path / "out")
    before = [peft_deltas(tmp_path / str(n)) for n in range(3)]
    after = peft_deltas(tmp_path / "out")
    assert all(close(after[m], before[0][m] + before[1][m] - before[2][m], 1e-6) for m in before[0])


def test_ia3_and_prefix_are_read(tmp_path: Path) -> None:
    shapes = {
        f"{PREFIX}{ATTENTION.format(0, 'k_proj')}.ia3_l": (16, 1),
        f"{PREFIX}model.layers.0.mlp.down_proj.ia3_l": (1, 48),
    }
    ia3 = Adapter.load(folder_of(tmp_path / "ia3", IA3, shapes))
    assert {m: p.shapes["l"] for m, p in ia3.layout.items()} == {
        "model.layers.0.mlp.down_proj": (1, 48),
        ATTENTION.format(0, "k_proj"): (16, 1),
    }
    prefix = Adapter.load(folder_of(tmp_path / "prefix", PREFIX_TUNING, {"prompt_embeddings": (3, 64)}))
    assert {m: p.shapes for m, p in prefix.layout.items()} == {
        f"layers.{n}": {"key": (3, 16), "value": (3, 16)} for n in (0, 1)
    }
