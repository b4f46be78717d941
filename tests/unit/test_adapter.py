"""Adapters and divergences on disk: PEFT's layout read and written exactly, or refused with a reason."""

import json
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lingraft import Adapter, Divergence
from lingraft.errors import AdapterError, UserError
from lingraft.layouts.lora import rank_of, weight_shape
from tests.unit.adapters import (
    FEW,
    PREFIX,
    SHAPES,
    close,
    config_of,
    factors_of,
    peft_adapter,
    peft_deltas,
    peft_merged_changes,
    rewrite,
    snapshot,
    tensors_of,
    updates_of,
    write_adapter,
    write_folder,
)

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
TYPE_IDS = ["float32", "float16", "bfloat16"]
Q = "model.layers.0.self_attn.q_proj"


def effect(adapter: Adapter, module: str) -> np.ndarray:
    site = adapter.site(module)
    a, b = (np.asarray(site.tensors[role], dtype=np.float64) for role in ("A", "B"))
    return site.scaling * b @ a


def same_tensors(x: Path, y: Path) -> bool:
    """Whether two folders hold the same tensors, in name, type and every bit."""
    import torch

    ours, theirs = tensors_of(x), tensors_of(y)
    assert set(ours) == set(theirs)
    return all(t.dtype == theirs[n].dtype and torch.equal(t, theirs[n]) for n, t in ours.items())


# Reading and writing


@pytest.mark.parametrize("dtype", DTYPES, ids=TYPE_IDS)
def test_loading_gives_the_numbers_of_the_file(tmp_path: Path, dtype: Any) -> None:
    adapter = Adapter.load(write_adapter(tmp_path / "a", 1, dtype=dtype, rank=2, alpha=5))
    assert adapter.modules == tuple(sorted(SHAPES))
    assert adapter.dtype == np.dtype(dtype)
    for module, shape in SHAPES.items():
        place = adapter.layout[module]
        assert (weight_shape(place), rank_of(place), place.scaling) == (shape, 2, 2.5)
        site = adapter.site(module)
        for role, expected in zip("AB", factors_of(tmp_path / "a", module), strict=True):
            assert site.tensors[role].dtype == np.float32
            assert np.array_equal(site.tensors[role], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=TYPE_IDS)
def test_saving_what_was_loaded_writes_the_same_tensors(tmp_path: Path, dtype: Any) -> None:
    folder = write_adapter(tmp_path / "a", 2, dtype=dtype, alpha=5, rank=3)
    Adapter.load(folder).save(tmp_path / "deep" / "b")
    assert same_tensors(folder, tmp_path / "deep" / "b")
    assert Adapter.load(tmp_path / "deep" / "b").layout == Adapter.load(folder).layout


def test_saving_twice_gives_equal_bytes(tmp_path: Path) -> None:
    adapter = Adapter.load(write_adapter(tmp_path / "a", 3))
    first, second = adapter.save(tmp_path / "b"), adapter.save(tmp_path / "c")
    files = {p.name: p.read_bytes() for p in first.iterdir()}
    assert files == {p.name: p.read_bytes() for p in second.iterdir()}
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "lingraft.json", "step.json"}


def test_tensors_of_mixed_types_are_saved_without_loss(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    random = np.random.default_rng(0)
    tensors = {}
    for number, (module, (out, width)) in enumerate(FEW.items()):
        types = (ml_dtypes.bfloat16, np.float32, np.float16)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = random.normal(size=(2, width)).astype(types[number])
        tensors[f"{PREFIX}{module}.lora_B.weight"] = random.normal(size=(out, 2)).astype(types[number + 1])
    write_folder(folder, tensors, config_of(FEW, r=2, lora_alpha=4))
    Adapter.load(folder).save(tmp_path / "b")
    for module in FEW:
        for ours, theirs in zip(factors_of(tmp_path / "b", module), factors_of(folder, module), strict=True):
            assert np.array_equal(ours, theirs)


def test_tensors_that_are_no_factors_are_kept(tmp_path: Path) -> None:
    head = {
        f"{PREFIX}score.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        f"{PREFIX}steps": np.array(7, dtype=np.int64),
    }
    folder = write_adapter(tmp_path / "a", 4, dtype=ml_dtypes.bfloat16, others=head, modules_to_save=["score"])
    assert set(Adapter.load(folder).others) == set(head)
    Adapter.load(folder).save(tmp_path / "b")
    assert same_tensors(folder, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]


def test_provenance_and_the_sidecar_are_kept(tmp_path: Path) -> None:
    notes = {"backbone": {"name": "tiny", "digest": "d"}, "init_sha256": "i"}
    adapter = Adapter.load(write_adapter(tmp_path / "a", 5, sidecar=notes))
    adapter.save(tmp_path / "b", {"how": "by hand"})
    saved = json.loads((tmp_path / "b" / "lingraft.json").read_text())
    assert saved == {"format": 1, "kind": "adapter", "family": "lora", **notes, "provenance": {"how": "by hand"}}


def test_an_adapter_without_a_sidecar_knows_no_backbone(tmp_path: Path) -> None:
    assert "backbone" not in Adapter.load(write_adapter(tmp_path / "a", 5)).sidecar


@pytest.mark.parametrize("dtype", DTYPES, ids=TYPE_IDS)
def test_peft_opens_a_saved_adapter(tmp_path: Path, dtype: Any) -> None:
    folder = write_adapter(tmp_path / "a", 6, dtype=dtype, alpha=5, rank=3)
    Adapter.load(folder).save(tmp_path / "b")
    deltas = peft_deltas(tmp_path / "b")
    assert set(deltas) == set(SHAPES)
    assert all(close(deltas[m], update, 1e-6) for m, update in updates_of(folder).items())


# Adapters that PEFT made

MADE_BY_PEFT = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 3, "lora_alpha": 6, "use_rslora": True},
    "rank_pattern": {"r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2, "1.mlp.down_proj": 5}},
    "alpha_pattern": {"r": 4, "lora_alpha": 6, "alpha_pattern": {"self_attn.v_proj": 1, r"layers\.0\..*_proj": 9}},
    "all at once": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "v_proj": 3},
        "alpha_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 20, "v_proj": 7},
    },
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("lora", MADE_BY_PEFT.values(), ids=MADE_BY_PEFT)
def test_scalings_and_patterns_are_read_as_peft_reads_them(tmp_path: Path, lora: dict[str, Any]) -> None:
    folder = peft_adapter(tmp_path / "a", 1, target_modules=TARGETS, **lora)
    adapter, deltas = Adapter.load(folder), peft_deltas(folder)
    assert set(adapter.modules) == set(deltas)
    assert len(deltas) == 6
    assert all(close(effect(adapter, m), delta, 1e-6) for m, delta in deltas.items())


@pytest.mark.parametrize("lora", MADE_BY_PEFT.values(), ids=MADE_BY_PEFT)
def test_a_copy_acts_in_peft_as_the_original_does(tmp_path: Path, lora: dict[str, Any]) -> None:
    folder = peft_adapter(tmp_path / "a", 2, target_modules=TARGETS, **lora)
    Adapter.load(folder).save(tmp_path / "b")
    original, copy = peft_deltas(folder), peft_deltas(tmp_path / "b")
    assert set(original) == set(copy)
    assert all(close(copy[m], delta, 1e-6) for m, delta in original.items())


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_variants_made_by_peft_are_refused(tmp_path: Path, lora: dict[str, Any]) -> None:
    folder = peft_adapter(tmp_path / "a", 3, **{"r": 4, "target_modules": TARGETS, **lora})
    refused(folder)


# Refusals


def refused(folder: Path) -> AdapterError:
    """The error that loading gives; it says where or what to do, and leaves the disk as it was."""
    around = folder.parent
    before = sorted(around.rglob("*"))
    with pytest.raises(AdapterError) as caught:
        Adapter.load(folder)
    assert caught.value.where or caught.value.remedy
    assert sorted(around.rglob("*")) == before
    return caught.value


CHANGED_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "LoRA bias": ({"lora_bias": True}, "lora_bias"),
    "bias all": ({"bias": "all"}, "bias='all'"),
    "bias lora_only": ({"bias": "lora_only"}, "bias='lora_only'"),
    "layer replication": ({"layer_replication": [[0, 2], [1, 2]]}, "replicated layers"),
    "target parameters": ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "pissa"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    "OLoRA": ({"init_lora_weights": "olora"}, "olora"),
    "CorDA": ({"init_lora_weights": "corda"}, "corda"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "loftq"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    "QALoRA": ({"use_qalora": True}, "use_qalora"),
    "activated LoRA": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
    "block-diagonal LoRA": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "kasa_config"),
    "MonteCLoRA": ({"monteclora_config": {"samples": 2}}, "monteclora_config"),
}


@pytest.mark.parametrize(("change", "named"), CHANGED_CONFIGS.values(), ids=CHANGED_CONFIGS)
def test_what_is_more_than_a_product_of_factors_is_refused_by_name(tmp_path: Path, change: Any, named: str) -> None:
    error = refused(write_adapter(tmp_path / "a", 1, shapes=FEW, **change))
    assert named in str(error)
    assert error.remedy


def test_all_reasons_for_a_refusal_are_named_at_once(tmp_path: Path) -> None:
    error = refused(write_adapter(tmp_path / "a", 1, shapes=FEW, use_dora=True, bias="all", init_lora_weights="pissa"))
    assert all(reason in str(error) for reason in ("use_dora", "bias='all'", "pissa"))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_read(tmp_path: Path, init: Any) -> None:
    folder = write_adapter(tmp_path / "a", 1, shapes=FEW, init_lora_weights=init)
    assert set(Adapter.load(folder).modules) == set(FEW)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("VERA", "'VERA' cannot be merged"),
        ("lora", "'lora' cannot be merged"),
        ("IA3", "no tensors named …ia3_…"),
        ("PREFIX_TUNING", "no tensor 'prompt_embeddings'"),
        (None, "not an adapter's configuration"),
        (["LORA"], "not an adapter's configuration"),
    ],
)
def test_another_kind_of_adapter_is_refused(tmp_path: Path, kind: Any, message: str) -> None:
    assert message in str(refused(write_adapter(tmp_path / "a", 1, shapes=FEW, peft_type=kind)))


def test_a_missing_folder_is_an_error_with_its_path(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere").where == str(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_adapter(tmp_path / "a", 1, shapes=FEW)
    (folder / name).unlink()
    assert name in str(refused(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_configuration_is_refused_and_nobody_is_told_to_delete_the_adapter(tmp_path: Path, text: str) -> None:
    folder = write_adapter(tmp_path / "a", 1, shapes=FEW)
    (folder / "adapter_config.json").write_text(text)
    error = refused(folder)
    assert "adapter_config.json" in str(error)
    assert "delete" not in str(error)


def test_a_pickle_is_not_opened_and_the_remedy_converts_it(tmp_path: Path) -> None:
    import shlex
    import subprocess
    import sys

    import torch

    folder = write_adapter(tmp_path / "a", 1, shapes=FEW)
    tensors = tensors_of(folder)
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    error = refused(folder)
    assert "pickle" in str(error)
    _, _, command = str(error.remedy).partition("convert it: ")
    python, *rest = shlex.split(command)
    assert python == "python"
    subprocess.run([sys.executable, *rest], check=True)
    assert set(Adapter.load(folder).modules) == set(FEW)
    assert all(torch.equal(t, tensors[name]) for name, t in tensors_of(folder).items())


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_tensor_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = write_adapter(tmp_path / "a", 1, shapes=FEW) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(tmp_path / "a").where == str(path)


def changed(folder: Path, change: dict[str, np.ndarray | None]) -> Path:
    """A folder of an adapter with some tensors replaced, added or (None) left out."""
    write_adapter(folder, 1, shapes=FEW)
    tensors = {name: t.numpy() for name, t in tensors_of(folder).items()}
    tensors.update({k: v for k, v in change.items() if v is not None})
    left = {name: t for name, t in tensors.items() if name not in change or change[name] is not None}
    write_folder(folder, left, config_of(FEW, r=2, lora_alpha=4))
    return folder


CHANGED_TENSORS: dict[str, tuple[dict[str, np.ndarray | None], str]] = {
    "one factor alone": ({f"{PREFIX}{Q}.lora_B.weight": None}, Q),
    "ranks that differ": ({f"{PREFIX}{Q}.lora_B.weight": np.ones((32, 3), np.float32)}, Q),
    "a convolution": ({f"{PREFIX}{Q}.lora_B.weight": np.ones((32, 2, 1, 1), np.float32)}, Q),
    "a magnitude": ({f"{PREFIX}{Q}.lora_magnitude_vector": np.ones(32, np.float32)}, "lora_magnitude_vector"),
    "a bias": ({f"{PREFIX}{Q}.lora_B.bias": np.ones(32, np.float32)}, "lora_B.bias"),
    "an embedding": ({f"{PREFIX}model.embed_tokens.lora_embedding_A": np.ones((2, 9), np.float32)}, "lora_embedding_A"),
    "integers": ({f"{PREFIX}{Q}.lora_B.weight": np.ones((32, 2), np.int64)}, "int64"),
    "a type nobody computes with": ({f"{PREFIX}{Q}.lora_B.weight": np.ones((32, 2), np.int16)}, "I16"),
}


@pytest.mark.parametrize(("change", "named"), CHANGED_TENSORS.values(), ids=CHANGED_TENSORS)
def test_tensors_that_are_not_plain_lora_are_refused_by_name(tmp_path: Path, change: Any, named: str) -> None:
    assert named in str(refused(changed(tmp_path / "a", change)))


def test_a_file_without_factors_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", {f"{PREFIX}score.weight": np.ones((2, 2), np.float32)}, config_of(r=2, lora_alpha=4))
    assert "no tensors named …lora_…" in str(refused(tmp_path / "a"))


# Writing safely


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("role", ["A", "B"])
def test_a_value_that_is_not_finite_is_refused_with_its_place_and_no_folder_appears(
    tmp_path: Path, role: str, value: float
) -> None:
    name = f"{PREFIX}{Q}.lora_{role}.weight"
    folder = changed(tmp_path / "a", {name: np.full((2, 32) if role == "A" else (32, 2), value, np.float32)})
    before = snapshot(tmp_path)
    with pytest.raises(AdapterError, match="NaN or infinite") as caught:
        Adapter.load(folder).save(tmp_path / "out")
    assert f"{Q}.lora_{role}" in str(caught.value.where)
    assert snapshot(tmp_path) == before


def test_a_merge_that_overflows_its_type_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", 1, shapes=FEW, dtype=np.float16)
    rewrite(folder, lambda name, tensor: np.full_like(tensor, 60_000))
    opposite = write_adapter(tmp_path / "b", 1, shapes=FEW, dtype=np.float16)
    rewrite(opposite, lambda name, tensor: np.full_like(tensor, -60_000))
    before = snapshot(tmp_path)
    merged = Adapter.load(folder) + (Adapter.load(folder) - Adapter.load(opposite))
    with pytest.raises(AdapterError, match="infinite in float16"):
        merged.save(tmp_path / "out")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("what", ["adapter", "divergence"])
def test_an_output_that_exists_is_left_alone(tmp_path: Path, what: str) -> None:
    adapter = Adapter.load(write_adapter(tmp_path / "a", 1, shapes=FEW))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="exists already") as caught:
        (adapter if what == "adapter" else adapter - adapter).save(tmp_path / "out")
    assert caught.value.remedy
    assert snapshot(tmp_path) == before


# The arithmetic as it is written


def references(tmp_path: Path, **changes: Any) -> tuple[Path, Path]:
    target = write_adapter(tmp_path / "target", 11, **{"shapes": FEW, **changes})
    return target, write_adapter(tmp_path / "source", 12, **{"shapes": FEW, **changes})


def test_minus_times_and_plus_are_adamergex_in_factors_space(tmp_path: Path) -> None:
    target, source = references(tmp_path)
    task = write_adapter(tmp_path / "task", 13, shapes=FEW)
    grafted = Adapter.load(task) + 0.6 * (Adapter.load(target) - Adapter.load(source))
    grafted.save(tmp_path / "out")
    for module in FEW:
        parts = zip(*(factors_of(folder, module) for folder in (task, target, source, tmp_path / "out")), strict=True)
        for t, r_t, r_s, out in parts:
            np.testing.assert_allclose(out, t + 0.6 * (r_t - r_s), rtol=0, atol=1e-6)


@pytest.mark.parametrize("times", [lambda d: 0.3 * d * 2, lambda d: d * 0.6, lambda d: np.float64(0.6) * d])
def test_weights_multiply_from_either_side(tmp_path: Path, times: Any) -> None:
    target, source = references(tmp_path)
    divergence = times(Adapter.load(target) - Adapter.load(source))
    assert isinstance(divergence, Divergence)
    assert divergence.weight == pytest.approx(0.6)


# Divergences


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "equal scalings": ({"rank": 3, "alpha": 5}, {"rank": 3, "alpha": 5}),
    "scalings a power of two apart": ({"rank": 3, "alpha": 5}, {"rank": 3, "alpha": 20}),
    "unequal ranks": ({"rank": 2, "alpha": 4}, {"rank": 3, "alpha": 6}),
}
UNEQUAL = ({"rank": 3, "alpha": 5}, {"rank": 3, "alpha": 7})


def saved_divergence(tmp_path: Path, t: dict[str, Any], s: dict[str, Any], dtype: Any) -> tuple[Divergence, Divergence]:
    """A divergence, and itself saved and loaded."""
    direct = Adapter.load(write_adapter(tmp_path / "target", 21, shapes=FEW, dtype=dtype, **t)) - Adapter.load(
        write_adapter(tmp_path / "source", 22, shapes=FEW, dtype=dtype, **s)
    )
    direct.save(tmp_path / "divergence")
    return direct, Divergence.load(tmp_path / "divergence")


@pytest.mark.parametrize("dtype", DTYPES, ids=TYPE_IDS)
@pytest.mark.parametrize("space", ["factors", "product"])
@pytest.mark.parametrize(("t", "s"), CASES.values(), ids=CASES)
def test_grafting_a_saved_divergence_equals_grafting_its_references_bit_for_bit(
    tmp_path: Path, t: dict[str, Any], s: dict[str, Any], space: str, dtype: Any
) -> None:
    direct, loaded = saved_divergence(tmp_path, t, s, dtype)
    task = Adapter.load(write_adapter(tmp_path / "task", 23, shapes=FEW, dtype=dtype, rank=t["rank"], alpha=7))
    if space == "factors" and t["rank"] != s["rank"]:
        for divergence in (direct, loaded):
            with pytest.raises(AdapterError, match="--space product"):
                divergence.onto(task, space=space)
        return
    for name, divergence in (("one", direct), ("two", loaded)):
        (divergence * 0.7).onto(task, space=space).save(tmp_path / name)
    assert same_tensors(tmp_path / "one", tmp_path / "two")
    configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("one", "two")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=TYPE_IDS)
@pytest.mark.parametrize("space", ["factors", "product"])
def test_a_saved_divergence_of_any_two_scalings_is_exact_to_float32(tmp_path: Path, space: str, dtype: Any) -> None:
    direct, loaded = saved_divergence(tmp_path, *UNEQUAL, dtype)
    task = Adapter.load(write_adapter(tmp_path / "task", 23, shapes=FEW, dtype=np.float32, rank=3, alpha=7))
    ours, theirs = ((d * 0.7).onto(task, space=space) for d in (loaded, direct))
    for module in FEW:
        assert close(effect(ours, module), effect(theirs, module), 3e-7)
        assert ours.layout[module] == theirs.layout[module]


def test_references_of_different_types_lose_nothing_in_a_saved_divergence(tmp_path: Path) -> None:
    target = write_adapter(tmp_path / "target", 21, shapes=FEW, dtype=ml_dtypes.bfloat16)
    source = write_adapter(tmp_path / "source", 22, shapes=FEW, dtype=np.float32)
    (Adapter.load(target) - Adapter.load(source)).save(tmp_path / "divergence")
    loaded = Divergence.load(tmp_path / "divergence")
    for module in FEW:
        for adapter, folder in ((loaded.target_ref, target), (loaded.source_ref, source)):
            site = adapter.site(module)
            for role, expected in zip("AB", factors_of(folder, module), strict=True):
                assert np.array_equal(site.tensors[role], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=TYPE_IDS)
@pytest.mark.parametrize(("t", "s"), [*CASES.values(), UNEQUAL], ids=[*CASES, "scalings 5:7"])
def test_peft_opens_a_saved_divergence_as_the_difference_of_the_updates(
    tmp_path: Path, t: dict[str, Any], s: dict[str, Any], dtype: Any
) -> None:
    saved_divergence(tmp_path, t, s, dtype)
    target, source = updates_of(tmp_path / "target"), updates_of(tmp_path / "source")
    changes = peft_merged_changes(tmp_path / "divergence")
    for module, change in changes.items():
        expected = target[module] - source[module] if module in FEW else np.zeros_like(change)
        assert np.abs(change - expected).max() <= 3e-6 * (1 + np.abs(expected).max())
    assert set(FEW) <= set(changes)


def test_a_saved_divergence_keeps_the_backbone_and_a_common_start(tmp_path: Path) -> None:
    notes = {"backbone": {"name": "tiny", "digest": "d"}, "init_sha256": "i"}
    target, source = references(tmp_path, sidecar=notes)
    (Adapter.load(target) - Adapter.load(source)).save(tmp_path / "divergence", {"how": "divergence"})
    for part in (
        Divergence.load(tmp_path / "divergence").target_ref,
        Divergence.load(tmp_path / "divergence").source_ref,
    ):
        assert {k: part.sidecar[k] for k in notes} == notes
    saved = json.loads((tmp_path / "divergence" / "lingraft.json").read_text())
    assert saved["kind"] == "divergence"
    assert saved["provenance"] == {"how": "divergence"}


def test_a_saved_divergence_of_unlike_starts_still_warns_in_factors_space(tmp_path: Path) -> None:
    notes = {"backbone": {"name": "tiny", "digest": "d"}}
    target = write_adapter(tmp_path / "target", 1, shapes=FEW, sidecar={**notes, "init_sha256": "i"})
    source = write_adapter(tmp_path / "source", 2, shapes=FEW, sidecar={**notes, "init_sha256": "j"})
    task = Adapter.load(write_adapter(tmp_path / "task", 3, shapes=FEW, sidecar={**notes, "init_sha256": "i"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Nothing to warn of yet: the space is not chosen.
        (Adapter.load(target) - Adapter.load(source)).save(tmp_path / "divergence")
    with pytest.warns(UserWarning, match="initial weights"):
        Divergence.load(tmp_path / "divergence").onto(task)


def test_an_adapter_is_no_divergence_nor_the_reverse(tmp_path: Path) -> None:
    target, source = references(tmp_path)
    (Adapter.load(target) - Adapter.load(source)).save(tmp_path / "divergence")
    with pytest.raises(AdapterError, match="not a divergence") as adapter:
        Divergence.load(target)
    assert "lingraft divergence" in str(adapter.value.remedy)
    assert "--divergence" in str(refused(tmp_path / "divergence").remedy)


def test_a_weighted_divergence_is_not_saved(tmp_path: Path) -> None:
    target, source = references(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(AdapterError, match="weight 1"):
        (0.5 * (Adapter.load(target) - Adapter.load(source))).save(tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_a_divergence_of_references_that_do_not_fit_is_not_saved(tmp_path: Path) -> None:
    target = write_adapter(tmp_path / "target", 1, shapes=FEW)
    source = write_adapter(tmp_path / "source", 2, shapes={m: (width, out) for m, (out, width) in FEW.items()})
    before = snapshot(tmp_path)
    with pytest.raises(AdapterError, match="do not fit together"):
        (Adapter.load(target) - Adapter.load(source)).save(tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_where_a_reference_has_no_site_its_update_there_is_zero(tmp_path: Path) -> None:
    target = write_adapter(tmp_path / "target", 1, shapes=SHAPES)
    source = write_adapter(tmp_path / "source", 2, shapes=FEW)
    saved = (Adapter.load(target) - Adapter.load(source)).save(tmp_path / "out")
    t, s, both = updates_of(target), updates_of(source), peft_deltas(saved)
    assert set(both) == set(SHAPES)
    assert all(close(both[m], t[m] - s.get(m, 0), 1e-6) for m in SHAPES)
    again = Divergence.load(saved)
    assert set(again.source_ref.layout) == set(FEW) and set(again.target_ref.layout) == set(SHAPES)
