"""Merges on disk: the formula in float64, what PEFT makes of them, what is refused, and how alike two adapters are."""

import json
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lingraft import Adapter, Divergence
from lingraft.adapter import AdapterWarning, content_digest
from lingraft.errors import AdapterError, UserError
from lingraft.layouts.lora import rank_of
from lingraft.merging import Graft, divergence_of, energy_kept, similarity, verify
from tests.unit.adapters import (
    FEW,
    PREFIX,
    SHAPES,
    close,
    factors_of,
    peft_merged_changes,
    rewrite,
    snapshot,
    tensors_of,
    updates_of,
    write_adapter,
)

WEIGHT = 0.7
SPACES = ["factors", "product"]
Three = tuple[Path, Path, Path]


def three(tmp_path: Path, **changes: Any) -> Three:
    """Task, target reference and source reference."""
    named = enumerate(("task", "target", "source"), start=1)
    return tuple(write_adapter(tmp_path / name, seed, **changes) for seed, name in named)  # pyright: ignore


def merge(folders: Three, out: Path, weight: float = WEIGHT, **how: Any) -> Adapter:
    """Grafts, saves, and returns the merged adapter that was saved."""
    task, target, source = folders
    divergence, made = divergence_of(target, source)
    graft = Graft(weight, **how)
    loaded, inputs = Adapter.load(task), {"task": content_digest(task), **made["inputs"]}
    merged, provenance = graft.onto(loaded, divergence), graft.provenance(loaded, inputs)
    merged.save(out, provenance)
    return merged


def formula(folders: Three, space: str, weight: float = WEIGHT) -> dict[str, np.ndarray]:
    """The merged weight updates in float64, for adapters of rank 2 and alpha 4."""
    if space == "product":
        t, r_t, r_s = (updates_of(folder) for folder in folders)
        return {m: t[m] + weight * (r_t[m] - r_s[m]) for m in t}
    found = {}
    for module in updates_of(folders[0]):
        sites = [factors_of(folder, module) for folder in folders]
        a, b = (t + weight * (r_t - r_s) for t, r_t, r_s in zip(*sites, strict=True))
        found[module] = 2.0 * b @ a
    return found


def assert_peft_adds(folder: Path, expected: dict[str, np.ndarray]) -> None:
    """PEFT's `merge_and_unload` changes these weights by these updates, and no others."""
    changes = peft_merged_changes(folder)
    assert set(expected) <= set(changes)
    for module, change in changes.items():
        right = expected.get(module, np.zeros_like(change))
        assert np.abs(change - right).max() <= 2e-6 * (1 + np.abs(right).max()), module


# What plain PEFT makes of the output


@pytest.mark.parametrize("space", SPACES)
def test_peft_adds_the_formula_to_the_base(tmp_path: Path, space: str) -> None:
    folders = three(tmp_path)
    merge(folders, tmp_path / "out", space=space)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == {"factors": 2, "product": 6}[space]
    assert not config["rank_pattern"]
    assert_peft_adds(tmp_path / "out", formula(folders, space))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("modules", ["attention.query,v_proj", "1.mlp.down_proj", ["feed_forward"]])
def test_peft_sees_the_task_alone_where_nothing_was_merged(tmp_path: Path, space: str, modules: Any) -> None:
    folders = three(tmp_path)
    merge(folders, tmp_path / "out", space=space, modules=modules)
    names = {
        "attention.query,v_proj": ("q_proj", "v_proj"),
        "1.mlp.down_proj": ("1.mlp.down_proj",),
        "['feed_forward']": ("gate_proj", "up_proj", "down_proj"),
    }[str(modules)]
    chosen = {m for m in SHAPES if m.endswith(names)}
    assert 0 < len(chosen) < len(SHAPES)
    merged, task = formula(folders, space), updates_of(folders[0])
    assert_peft_adds(tmp_path / "out", {m: merged[m] if m in chosen else task[m] for m in SHAPES})
    before, after = tensors_of(folders[0]), tensors_of(tmp_path / "out")
    for name in before:
        kept = after[name].shape == before[name].shape and bool((after[name] == before[name]).all())
        assert kept == (not any(m in name for m in chosen)), name


@pytest.mark.parametrize("modules", ["all", "q_proj,down_proj"])
def test_peft_adds_the_best_approximation_of_a_compressed_merge(tmp_path: Path, modules: str) -> None:
    folders = three(tmp_path)
    merged = merge(folders, tmp_path / "out", space="product", out_rank=3, modules=modules)
    exact, task = formula(folders, "product"), updates_of(folders[0])
    expected, kept = {}, []
    for module in SHAPES:
        if modules != "all" and not module.endswith(("q_proj", "down_proj")):
            expected[module] = task[module]
            continue
        u, s, v = np.linalg.svd(exact[module])
        expected[module] = (u[:, :3] * s[:3]) @ v[:3]
        kept.append(float(np.sum(s[:3] ** 2) / np.sum(s**2)))
    assert_peft_adds(tmp_path / "out", expected)
    energy = energy_kept(merged)
    assert energy is not None
    assert energy["mean"] == pytest.approx(np.mean(kept), rel=1e-5)
    assert energy["least"] == pytest.approx(min(kept), rel=1e-5)


def test_a_merge_that_was_not_compressed_reports_no_energy(tmp_path: Path) -> None:
    assert energy_kept(merge(three(tmp_path, shapes=FEW), tmp_path / "out", space="product")) is None


def test_an_output_rank_above_the_dimensions_keeps_everything(tmp_path: Path) -> None:
    narrow = {"model.layers.0.self_attn.q_proj": (4, 5)}
    folders = three(tmp_path, shapes=narrow)
    merged = merge(folders, tmp_path / "out", space="product", out_rank=100)
    assert rank_of(merged.layout["model.layers.0.self_attn.q_proj"]) == 4
    assert energy_kept(merged) == {"mean": pytest.approx(1, abs=1e-6), "least": pytest.approx(1, abs=1e-6)}
    for module, expected in formula(folders, "product").items():
        assert close(updates_of(tmp_path / "out")[module], expected, 1e-6)


def test_product_space_takes_any_ranks_scalings_and_rslora(tmp_path: Path) -> None:
    task = write_adapter(tmp_path / "task", 1, rank=2, alpha=4)
    target = write_adapter(tmp_path / "target", 2, rank=3, alpha=5)
    source = write_adapter(tmp_path / "source", 3, rank=4, alpha=6, use_rslora=True)
    merge((task, target, source), tmp_path / "out", space="product")
    expected = {}
    for module in SHAPES:
        a, b = factors_of(source, module)
        update = 6 / 4**0.5 * b @ a
        expected[module] = updates_of(task)[module] + WEIGHT * (updates_of(target)[module] - update)
    assert_peft_adds(tmp_path / "out", expected)


def test_factors_space_takes_unequal_scalings_in_units_of_the_task(tmp_path: Path) -> None:
    task = write_adapter(tmp_path / "task", 1, rank=2, alpha=4)
    target = write_adapter(tmp_path / "target", 2, rank=2, alpha=6)
    source = write_adapter(tmp_path / "source", 3, rank=2, alpha=1)
    merge((task, target, source), tmp_path / "out")
    expected = {}
    for module in SHAPES:
        (a, b), (a_t, b_t), (a_s, b_s) = (factors_of(folder, module) for folder in (task, target, source))
        b_t, b_s = b_t * 6 / 4, b_s * 1 / 4
        expected[module] = 2 * (b + WEIGHT * (b_t - b_s)) @ (a + WEIGHT * (a_t - a_s))
    assert_peft_adds(tmp_path / "out", expected)


# The laws on disk


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "how", [{"space": "factors"}, {"space": "product"}, {"space": "product", "out_rank": 1}], ids=str
)
def test_a_weight_of_zero_writes_the_task_bit_for_bit(tmp_path: Path, how: dict[str, Any], dtype: Any) -> None:
    folders = three(tmp_path, shapes=FEW, dtype=dtype, rank=3, alpha=5)
    merge(folders, tmp_path / "out", 0, **how)
    before, after = tensors_of(folders[0]), tensors_of(tmp_path / "out")
    assert set(before) == set(after)
    assert all(after[n].dtype == t.dtype and bool((after[n] == t).all()) for n, t in before.items())


def test_equal_references_leave_the_factors_bit_for_bit(tmp_path: Path) -> None:
    task, target, _ = three(tmp_path, shapes=FEW)
    merge((task, target, target), tmp_path / "out", 1.3)
    before, after = tensors_of(task), tensors_of(tmp_path / "out")
    assert all(bool((after[n] == t).all()) for n, t in before.items())


@pytest.mark.parametrize("out_rank", [None, 2])
def test_equal_references_leave_the_update_in_product_space(tmp_path: Path, out_rank: int | None) -> None:
    task, target, _ = three(tmp_path, shapes=FEW)
    merge((task, target, target), tmp_path / "out", 1.3, space="product", out_rank=out_rank)
    after = updates_of(tmp_path / "out")
    assert all(close(after[m], update, 1e-6) for m, update in updates_of(task).items())


def half_ulp(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Half the distance of the type's numbers around x."""
    bits, least = {np.float16: (10, -14), ml_dtypes.bfloat16: (7, -126), np.float32: (23, -126)}[dtype]
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-300))), least)
    return 0.5 * 2.0 ** (exponent - bits)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32_and_rounded_once(tmp_path: Path, dtype: Any) -> None:
    folders = three(tmp_path, shapes=FEW, dtype=dtype)
    merge(folders, tmp_path / "out", 1.3)
    for module in FEW:
        for t, r_t, r_s, out in zip(*(factors_of(f, module) for f in (*folders, tmp_path / "out")), strict=True):
            exact = t + 1.3 * (r_t - r_s)
            arithmetic = 4 * 2.0**-24 * (np.abs(t) + 1.3 * np.abs(r_t) + 1.3 * np.abs(r_s))
            assert (np.abs(out - exact) <= half_ulp(exact, dtype) + arithmetic).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_the_stacked_factors_are_rounded_once(tmp_path: Path, dtype: Any) -> None:
    folders = three(tmp_path, shapes=FEW, dtype=dtype, rank=2, alpha=3)
    merge(folders, tmp_path / "out", 0.3, space="product")
    for module in FEW:
        (a, b), (a_t, b_t), (a_s, b_s) = (factors_of(folder, module) for folder in folders)
        out_a, out_b = factors_of(tmp_path / "out", module)
        exact = np.concatenate([1.5 * b, 0.3 * 1.5 * b_t, -0.3 * 1.5 * b_s], axis=1)
        assert np.array_equal(out_a, np.concatenate([a, a_t, a_s]))
        assert (np.abs(out_b - exact) <= half_ulp(exact, dtype) + 4 * 2.0**-24 * np.abs(exact)).all()


def test_the_head_is_the_tasks_own(tmp_path: Path) -> None:
    heads = [np.full((2, 3), value, np.float32) for value in (1, 2, 3)]
    named = zip(("task", "target", "source"), heads, strict=True)
    folders = [
        write_adapter(tmp_path / n, seed, shapes=FEW, others={f"{PREFIX}score.weight": head})
        for seed, (n, head) in enumerate(named)
    ]
    merge((folders[0], folders[1], folders[2]), tmp_path / "out")
    assert np.array_equal(tensors_of(tmp_path / "out")[f"{PREFIX}score.weight"].numpy(), heads[0])


def test_a_merge_says_how_it_came_about(tmp_path: Path) -> None:
    folders = three(tmp_path, shapes=FEW, sidecar={"backbone": {"name": "tiny", "digest": "d"}, "init_sha256": "i"})
    merge(folders, tmp_path / "out", 0.5, modules=["q_proj"])
    saved = json.loads((tmp_path / "out" / "lingraft.json").read_text())
    made = saved["provenance"]
    names = ("task", "target_ref", "source_ref")
    assert made["inputs"] == {n: content_digest(f) for n, f in zip(names, folders, strict=True)}
    assert (made["how"], made["weight"], made["space"], made["modules"]) == ("transfer", 0.5, "factors", ["q_proj"])
    assert saved["backbone"] == {"name": "tiny", "digest": "d"}
    assert "init_sha256" not in saved, "a merged adapter did not start from these weights"


# Refusals


def assert_refused(folders: Three, tmp_path: Path, weight: float = WEIGHT, **how: Any) -> str:
    """Merging raises an AdapterError and leaves the disk as it was."""
    before = snapshot(tmp_path)
    with pytest.raises(AdapterError) as caught:
        merge(folders, tmp_path / "out", weight, **how)
    assert snapshot(tmp_path) == before
    assert list(tmp_path.glob(".*")) == [], "nothing had been begun"
    return str(caught.value)


def test_all_mismatches_are_named_at_once(tmp_path: Path) -> None:
    q, down = FEW
    task = write_adapter(tmp_path / "task", 1, shapes=FEW, sidecar={"backbone": {"digest": "sha256:aaaa"}})
    target = write_adapter(
        tmp_path / "target", 2, shapes={q: (32, 31)}, rank=3, sidecar={"backbone": {"digest": "sha256:bbbb"}}
    )
    source = write_adapter(tmp_path / "source", 3, shapes=FEW, rank=4)
    message = assert_refused((task, target, source), tmp_path)
    for part in ("different base models", "sha256:aaaa", "sha256:bbbb", "target reference lacks 1 sites", down):
        assert part in message
    assert f"{q}: (32, 32) in the task, (32, 31) in the target reference" in message
    for module in FEW:
        assert f"{module}: rank 2 in the task, 4 in the source reference" in message
    assert "product" in message


def test_of_very_many_mismatches_the_first_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    task, target, source = three(tmp_path)
    target = write_adapter(tmp_path / "wide", 2, rank=3)
    message = assert_refused((task, target, source), tmp_path)
    assert message.count("rank 2 in the task") == 8
    assert f"and {len(SHAPES) - 8} more" in message


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_different_base_models_are_refused_whichever_differs(tmp_path: Path, odd: int) -> None:
    folders = [
        write_adapter(tmp_path / str(n), n, shapes=FEW, sidecar={"backbone": {"digest": "b" if n == odd else "a"}})
        for n in range(3)
    ]
    for space in SPACES:
        assert "different base models" in assert_refused((folders[0], folders[1], folders[2]), tmp_path, space=space)


def test_only_chosen_sites_must_be_in_the_references(tmp_path: Path) -> None:
    q, down = FEW
    task = write_adapter(tmp_path / "task", 1, shapes=FEW)
    target, source = (write_adapter(tmp_path / n, 2, shapes={q: FEW[q]}) for n in ("target", "source"))
    assert down in assert_refused((task, target, source), tmp_path)
    assert set(merge((task, target, source), tmp_path / "out", modules="q_proj").modules) == set(FEW)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("space", SPACES)
def test_a_negative_or_infinite_weight_is_refused(tmp_path: Path, space: str, weight: float) -> None:
    assert "λ" in assert_refused(three(tmp_path, shapes=FEW), tmp_path, weight, space=space)


@pytest.mark.parametrize("how", [{"out_rank": 2}, *({"space": "product", "out_rank": k} for k in (0, -1))], ids=str)
def test_an_output_rank_without_meaning_is_refused(tmp_path: Path, how: dict[str, Any]) -> None:
    assert "output rank" in assert_refused(three(tmp_path, shapes=FEW), tmp_path, **how)


@pytest.mark.parametrize("how", [{"space": "factor"}, {"modules": "q_prj"}], ids=str)
def test_a_misspelt_space_or_module_is_an_error_with_the_right_word(tmp_path: Path, how: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        merge(three(tmp_path, shapes=FEW), tmp_path / "out", **how)
    assert {"space": "factors", "modules": "q_proj"}[next(iter(how))] in str(caught.value.remedy)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_an_input_that_cannot_be_read_leaves_nothing_behind(tmp_path: Path, broken: int) -> None:
    folders = three(tmp_path, shapes=FEW)
    path = folders[broken] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert str(path) in assert_refused(folders, tmp_path)


@pytest.mark.parametrize("space", SPACES)
def test_a_nan_in_a_reference_is_refused_and_no_folder_appears(tmp_path: Path, space: str) -> None:
    folders = three(tmp_path, shapes=FEW)
    q = next(iter(FEW))

    def spoil(name: str, tensor: np.ndarray) -> np.ndarray:
        tensor[1, 1] = np.nan if f"{q}.lora_A" in name else tensor[1, 1]
        return tensor

    rewrite(folders[1], spoil)
    before = snapshot(tmp_path)
    with pytest.raises(AdapterError, match="NaN") as caught:
        merge(folders, tmp_path / "out", space=space)
    assert f"{q}.A" in str(caught.value.where)
    assert snapshot(tmp_path) == before
    assert {p.name for p in tmp_path.glob(".*")} <= {".out.partial", ".out.lock"}


def test_a_merge_can_be_repeated_after_a_refusal(tmp_path: Path) -> None:
    folders = three(tmp_path, shapes=FEW)
    good = (folders[1] / "adapter_model.safetensors").read_bytes()
    rewrite(folders[1], lambda name, tensor: tensor * np.nan)
    with pytest.raises(AdapterError):
        merge(folders, tmp_path / "out")
    (folders[1] / "adapter_model.safetensors").write_bytes(good)
    merge(folders, tmp_path / "out")
    merge(folders, tmp_path / "fresh")
    again, fresh = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("out", "fresh"))
    assert again == fresh


# Warnings


def starts(tmp_path: Path, *hashes: str | None) -> Three:
    """Three adapters with these hashes of the initial weights."""
    folders = [
        write_adapter(tmp_path / f"start{n}", n, shapes=FEW, sidecar={"init_sha256": value} if value else {})
        for n, value in enumerate(hashes)
    ]
    return folders[0], folders[1], folders[2]


@pytest.mark.parametrize("hashes", [("i", "i", "j"), ("j", "i", "i"), ("i", "j", "i"), ("i", "i", None)])
def test_different_starts_warn_in_factors_space_only(tmp_path: Path, hashes: tuple[str | None, ...]) -> None:
    folders = starts(tmp_path, *hashes)
    with pytest.warns(AdapterWarning, match="initial weights"):
        merge(folders, tmp_path / "factors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(folders, tmp_path / "product", space="product")


@pytest.mark.parametrize("hashes", [("i", "i", "i"), (None, None, None)])
def test_equal_or_unknown_starts_do_not_warn(tmp_path: Path, hashes: tuple[str | None, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(starts(tmp_path, *hashes), tmp_path / "out")


# Checking a merge


def checked(folders: Three, out: Path, space: str, modules: Any = "all", weight: float = WEIGHT) -> float:
    task, target, source = folders
    return verified(out, task, Adapter.load(target) - Adapter.load(source), weight, space=space, modules=modules)


def verified(out: Path, task: Path, divergence: Divergence, weight: float, **how: Any) -> float:
    parts = [Adapter.load(task), divergence.target_ref, divergence.source_ref]
    return verify(out, parts, lambda three: Graft(weight, **how).onto(three[0], three[1] - three[2]))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("modules", ["all", "q_proj"])
def test_verify_finds_a_right_merge_right(tmp_path: Path, space: str, modules: str) -> None:
    folders = three(tmp_path, shapes=FEW)
    merge(folders, tmp_path / "out", space=space, modules=modules)
    assert checked(folders, tmp_path / "out", space, modules) < 1e-6


@pytest.mark.parametrize("space", SPACES)
def test_verify_measures_the_error_of_a_tampered_merge(tmp_path: Path, space: str) -> None:
    folders = three(tmp_path, shapes=FEW)
    merge(folders, tmp_path / "out", space=space)
    q, down = FEW
    rewrite(tmp_path / "out", lambda name, tensor: tensor * (1.5 if f"{q}.lora_B" in name else 1))
    exact = formula(folders, space)
    norms = {m: np.linalg.norm(update) for m, update in exact.items()}
    expected = 0.5 * norms[q] / (norms[q] ** 2 + norms[down] ** 2) ** 0.5
    assert checked(folders, tmp_path / "out", space) == pytest.approx(expected, rel=1e-5)


def test_verify_tells_the_spaces_weights_and_modules_apart(tmp_path: Path) -> None:
    folders = three(tmp_path, shapes=FEW)
    merge(folders, tmp_path / "out")
    assert checked(folders, tmp_path / "out", "product") > 0.01
    assert checked(folders, tmp_path / "out", "factors", "q_proj") > 0.01
    assert checked(folders, tmp_path / "out", "factors", weight=WEIGHT + 0.1) > 0.01


def test_verify_of_a_compressed_merge_is_what_was_cut_off(tmp_path: Path) -> None:
    folders = three(tmp_path, shapes=FEW)
    merged = merge(folders, tmp_path / "out", space="product", out_rank=2)
    exact = formula(folders, "product")
    energies = {m: np.linalg.norm(update) ** 2 for m, update in exact.items()}
    lost = sum(energies[m] * (1 - merged.notes.energy[m]) for m in FEW) / sum(energies.values())
    assert lost > 0.01
    assert checked(folders, tmp_path / "out", "product") == pytest.approx(lost**0.5, rel=1e-4)


def test_verify_accepts_a_saved_divergence(tmp_path: Path) -> None:
    task, target, source = three(tmp_path, shapes=FEW)
    (Adapter.load(target) - Adapter.load(source)).save(tmp_path / "divergence")
    divergence = Divergence.load(tmp_path / "divergence")
    for space in SPACES:
        graft = Graft(WEIGHT, space=space)
        loaded = Adapter.load(task)
        merged, provenance = graft.onto(loaded, divergence), graft.provenance(loaded, {})
        merged.save(tmp_path / space, provenance)
        assert verified(tmp_path / space, task, divergence, WEIGHT, space=space) < 1e-6


# Similarity


def dense_cosine(x: dict[str, np.ndarray], y: dict[str, np.ndarray], modules: list[str]) -> float:
    a, b = (np.concatenate([z[m].ravel() for m in modules]) for z in (x, y))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_similarity_is_the_cosine_of_the_weight_updates(tmp_path: Path) -> None:
    x = write_adapter(tmp_path / "x", 1, rank=2, alpha=4)
    y = write_adapter(tmp_path / "y", 2, rank=3, alpha=5)
    dense_x, dense_y = updates_of(x), updates_of(y)
    found = similarity(Adapter.load(x), Adapter.load(y))
    assert found["cosine"] == pytest.approx(dense_cosine(dense_x, dense_y, list(SHAPES)), abs=1e-12)
    for norm, dense in zip(found["norms"], (dense_x, dense_y), strict=True):
        assert norm == pytest.approx(sum(np.linalg.norm(u) ** 2 for u in dense.values()) ** 0.5)
    assert list(found["by_layer"]) == ["0", "1"]
    for layer, cosine in found["by_layer"].items():
        modules = [m for m in SHAPES if f"layers.{layer}." in m]
        assert cosine == pytest.approx(dense_cosine(dense_x, dense_y, modules), abs=1e-12)


def test_similarity_orders_layers_by_number(tmp_path: Path) -> None:
    shapes = {f"model.layers.{n}.self_attn.q_proj": (4, 4) for n in (10, 9, 1)}
    adapter = Adapter.load(write_adapter(tmp_path / "x", 1, shapes=shapes))
    found = similarity(adapter, adapter)
    assert list(found["by_layer"]) == ["1", "9", "10"]
    assert found["cosine"] == pytest.approx(1)


def test_similarity_looks_at_shared_sites_only(tmp_path: Path) -> None:
    x, y = write_adapter(tmp_path / "x", 1), write_adapter(tmp_path / "y", 2, shapes=FEW)
    found = similarity(Adapter.load(x), Adapter.load(y))
    assert found["cosine"] == pytest.approx(dense_cosine(updates_of(x), updates_of(y), list(FEW)), abs=1e-12)


def test_similarity_to_no_update_is_undefined(tmp_path: Path) -> None:
    x, y = (write_adapter(tmp_path / n, 1, shapes=FEW) for n in "xy")
    rewrite(y, lambda name, tensor: tensor * ("lora_A" in name))
    found = similarity(Adapter.load(x), Adapter.load(y))
    assert found["cosine"] is None
    assert found["norms"][1] == 0


def test_similarity_refuses_adapters_with_nothing_in_common(tmp_path: Path) -> None:
    q, down = FEW
    x = Adapter.load(write_adapter(tmp_path / "x", 1, shapes={q: (8, 8)}))
    y = Adapter.load(write_adapter(tmp_path / "y", 1, shapes={down: (8, 8)}))
    z = Adapter.load(write_adapter(tmp_path / "z", 1, shapes={q: (8, 9)}))
    with pytest.raises(AdapterError, match="no site in common"):
        similarity(x, y)
    with pytest.raises(AdapterError, match=q):
        similarity(x, z)
