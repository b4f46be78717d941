"""Any number of adapters combined: against plain numpy, against PEFT, and what is refused."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from lingraft import Adapter, Divergence
from lingraft.adapter import AdapterWarning, content_digest
from lingraft.algebra import Site, transfer
from lingraft.commands.adapters import inspect_folders, save_divergence
from lingraft.errors import AdapterError, UserError
from lingraft.families import combining
from lingraft.families.lora import LoraFactors, effect
from lingraft.families.sparse import dense
from lingraft.layouts.lora import rank_of
from lingraft.merging import COMBINATIONS, Combination, Graft, similarity, verify
from tests.unit.adapters import (
    FEW,
    OTHERS,
    PREFIX,
    SHAPES,
    STRUCTURES,
    close,
    factors_of,
    numbers_of,
    peft_adapter,
    peft_deltas,
    rewrite,
    tensors_of,
    tiny_llama,
    updates_of,
    write_adapter,
    write_structure,
)

NAMES = [f"model.layers.{n}.{rest}" for n in (0, 1) for rest in ("self_attn.k_proj", "mlp.down_proj")]
SMALL = {name: SHAPES[name] for name in (*NAMES, "model.layers.0.self_attn.q_proj")}
"""Layers that an adapter of every structure finds its sites among."""


def folders_of(tmp_path: Path, structure: str, count: int = 2, **how: Any) -> list[Path]:
    return [write_structure(tmp_path / f"in{n}", structure, n + 1, shapes=SMALL, **how) for n in range(count)]


def combined(folders: Sequence[Path], weights: Sequence[float], method: str = "linear", **how: Any) -> Adapter:
    return Combination(method, **how).of([Adapter.load(folder) for folder in folders], weights)


def saved(tmp_path: Path, *args: Any, **how: Any) -> dict[str, np.ndarray]:
    """The numbers a combination writes."""
    return numbers_of(combined(*args, **how).save(tmp_path / "out"))


def lora_sites(
    seed: int, ranks: Sequence[int], out: int = 6, inner: int = 7, scaling: float | None = None
) -> list[Site]:
    random = np.random.default_rng(seed)
    return [
        Site(
            {"A": random.normal(size=(r, inner)), "B": random.normal(size=(out, r))},
            0.5 + 0.7 * n if scaling is None else scaling,
        )
        for n, r in enumerate(ranks)
    ]


# Linear


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_mean_of_an_adapter_with_itself_is_the_adapter(tmp_path: Path, structure: str, dtype: Any) -> None:
    (folder,) = folders_of(tmp_path, structure, 1, dtype=dtype)
    combined([folder] * 2, [0.5, 0.5]).save(tmp_path / "out")
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.allclose(after[name], tensor, rtol=0, atol=1e-7), name


@pytest.mark.parametrize("structure", STRUCTURES)
def test_linear_weighs_what_is_changed_tensor_by_tensor(tmp_path: Path, structure: str) -> None:
    folders = folders_of(tmp_path, structure, 3)
    weights = (0.7, -0.4, 1.5)
    found = saved(tmp_path, folders, weights)
    given = [numbers_of(folder) for folder in folders]
    if structure == "sparse":
        for module in {name.rsplit(".", 1)[0] for name in found}:
            expected = sum(w * dense_of(numbers, module) for w, numbers in zip(weights, given, strict=True))
            assert close(dense_of(found, module), expected, 1e-6)
        return
    still = 1 if structure == "ia3" else 0
    assert set(found) == set(given[0])
    for name, tensor in found.items():
        expected = still + sum(w * (numbers[name] - still) for w, numbers in zip(weights, given, strict=True))
        assert close(tensor, expected, 1e-6), name


def dense_of(numbers: dict[str, np.ndarray], module: str) -> np.ndarray:
    whole = np.zeros(tuple(numbers[f"{module}.sparse_shape"]))
    whole.reshape(-1)[numbers[f"{module}.sparse_indices"]] = numbers[f"{module}.sparse_values"]
    return whole


@pytest.mark.parametrize("weight", [0.3, 1.0, 2.5])
def test_one_and_plus_and_minus_lambda_is_the_transfer_on_loras_factors(tmp_path: Path, weight: float) -> None:
    task, target, source = (Adapter.load(f) for f in folders_of(tmp_path, "lora", 3))
    ours = Combination().of([task, target, source], [1, weight, -weight])
    theirs = Graft(weight).onto(task, Divergence(target, source))
    for module in task.modules:
        for role in "AB":
            x, y = ours.site(module).tensors[role], theirs.site(module).tensors[role]
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


def test_linear_on_lora_is_in_units_of_the_first_ones_scaling() -> None:
    sites = lora_sites(1, (2, 2, 2))
    found = combining.linear("lora", sites, [1, 0.6, -0.6])
    expected = transfer(LoraFactors(), *sites, 0.6)
    assert found.scaling == sites[0].scaling
    for role in "AB":
        np.testing.assert_allclose(found.tensors[role], expected.tensors[role], atol=1e-13)


# Concatenation


def peft_combination(folders: Sequence[Path], weights: Sequence[float], kind: str, **how: Any) -> dict[str, np.ndarray]:
    """The weight updates of PEFT's `add_weighted_adapter`."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = PeftModel.from_pretrained(tiny_llama(), folders[0], adapter_name="0")
    for n, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=str(n))
    names = [str(n) for n in range(len(folders))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(names, list(weights), "made", combination_type=kind, **how)  # pyright: ignore
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {
        name.removeprefix(PREFIX): layer.get_delta_weight("made").detach().double().numpy()
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("how", [{"method": "cat"}, {"method": "linear", "space": "product"}], ids=str)
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_cat_is_exactly_what_peft_computes(tmp_path: Path, kind: str, how: dict[str, Any]) -> None:
    folders = [
        write_adapter(tmp_path / "a", 1, rank=2, alpha=4),
        write_adapter(tmp_path / "b", 2, rank=3, alpha=7),
    ]
    weights = [0.8, 1.7]
    theirs = peft_combination(folders, weights, kind, **({"svd_rank": 5} if kind == "svd" else {}))
    combined(folders, weights, **how).save(tmp_path / "out")
    ours, ours_in_peft = updates_of(tmp_path / "out"), peft_deltas(tmp_path / "out")
    dense_sum = {m: 0.8 * updates_of(folders[0])[m] + 1.7 * updates_of(folders[1])[m] for m in SHAPES}
    for module in SHAPES:
        assert close(ours[module], dense_sum[module], 1e-6)
        assert close(theirs[module], dense_sum[module], 1e-5)
        assert close(ours_in_peft[module], dense_sum[module], 1e-6)


def test_cat_takes_any_ranks_alphas_rslora_and_patterns(tmp_path: Path) -> None:
    folders = [
        peft_adapter(
            tmp_path / "a",
            1,
            r=2,
            lora_alpha=3,
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"q_proj": 5},
            alpha_pattern={"layers.1.self_attn.v_proj": 11},
        ),
        peft_adapter(tmp_path / "b", 2, r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"]),
        peft_adapter(tmp_path / "c", 3, r=1, target_modules=["down_proj"]),
    ]
    weights = [0.5, -1.5, 2.0]
    given = [peft_deltas(folder) for folder in folders]
    combined(folders, weights, "cat").save(tmp_path / "out")
    found = peft_deltas(tmp_path / "out")
    modules = set().union(*given)
    assert set(found) == modules
    for module in modules:
        nothing = np.zeros(SHAPES[module])
        expected = sum(w * updates.get(module, nothing) for w, updates in zip(weights, given, strict=True))
        assert close(found[module], expected, 1e-6)


def test_a_compressed_cat_is_the_best_approximation_and_says_what_it_kept(tmp_path: Path) -> None:
    folders = folders_of(tmp_path, "lora", 2)
    merged = combined(folders, [1, 1], "cat", out_rank=3)
    merged.save(tmp_path / "out")
    for module in SMALL:
        exact = updates_of(folders[0])[module] + updates_of(folders[1])[module]
        u, s, v = np.linalg.svd(exact)
        assert close(updates_of(tmp_path / "out")[module], (u[:, :3] * s[:3]) @ v[:3], 1e-5)
        assert merged.notes.energy[module] == pytest.approx(np.sum(s[:3] ** 2) / np.sum(s**2), rel=1e-5)


def branch(numbers: dict[str, np.ndarray], module: str, y: np.ndarray) -> np.ndarray:
    part = {
        k: numbers[f"{PREFIX}{module}.bottleneck_{k}"] for k in ("down.weight", "down.bias", "up.weight", "up.bias")
    }
    inner = np.maximum(y @ part["down.weight"].T + part["down.bias"], 0)
    return inner @ part["up.weight"].T + part["up.bias"]


def test_cat_of_bottlenecks_is_the_weighted_sum_of_their_branches(tmp_path: Path) -> None:
    folders = folders_of(tmp_path, "bottleneck", 3)
    weights = (0.5, -1.0, 2.0)
    found = saved(tmp_path, folders, weights, "cat")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["bottleneck_size"] == 12 and not config["bottleneck_pattern"]
    y = np.random.default_rng(9).normal(size=(10, 32))
    for module in Adapter.load(tmp_path / "out").modules:
        expected = sum(w * branch(numbers_of(f), module, y) for w, f in zip(weights, folders, strict=True))
        assert close(branch(found, module, y), expected, 1e-6)


def test_cat_of_ia3_is_one_after_the_other(tmp_path: Path) -> None:
    folders = folders_of(tmp_path, "ia3", 3)
    found = saved(tmp_path, folders, (1, 0.5, 1), "cat")
    first, second, third = (numbers_of(folder) for folder in folders)
    for name, tensor in found.items():
        assert tensor.shape == first[name].shape
        assert close(tensor, first[name] * (1 + 0.5 * (second[name] - 1)) * third[name], 1e-6)


def test_cat_of_prefixes_puts_their_tokens_in_a_row(tmp_path: Path) -> None:
    folders = folders_of(tmp_path, "prefix", 2)
    found = saved(tmp_path, folders, (1, 1), "cat")["prompt_embeddings"]
    given = [numbers_of(folder)["prompt_embeddings"] for folder in folders]
    assert np.array_equal(found, np.concatenate(given))
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["num_virtual_tokens"] == 8


@pytest.mark.parametrize("weights", [(1, 0.5), (0, 1), (-1, 1)])
def test_virtual_tokens_have_no_weight(tmp_path: Path, weights: tuple[float, float]) -> None:
    with pytest.raises(AdapterError, match="at weight 1 only"):
        combined(folders_of(tmp_path, "prefix"), weights, "cat").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_virtual_tokens_go_into_all_layers_or_none(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="layers"):
        combined(folders_of(tmp_path, "prefix"), (1, 1), "cat", modules="layer:0").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cat_of_sparse_differences_is_their_sum(tmp_path: Path) -> None:
    folders = folders_of(tmp_path, "sparse")
    cat, plain = (combined(folders, (0.5, 2), method) for method in ("cat", "linear"))
    for module in cat.modules:
        assert np.array_equal(dense(cat.site(module)), dense(plain.site(module)))


def test_couplings_cannot_be_concatenated(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be concatenated") as caught:
        combined(folders_of(tmp_path, "invertible"), (1, 1), "cat").save(tmp_path / "out")
    assert "linear" in str(caught.value.remedy)


@pytest.mark.parametrize("structure", ["bottleneck", "prefix"])
def test_cat_takes_bottlenecks_and_prefixes_of_any_size(tmp_path: Path, structure: str) -> None:
    folders = [write_structure(tmp_path / str(n), structure, n, shapes=SMALL, size=n) for n in (2, 5)]
    merged = combined(folders, (1, 1), "cat")
    merged.save(tmp_path / "out")
    assert {merged.files.size(place) for place in Adapter.load(tmp_path / "out").layout.values()} == {7}


# TIES


def test_ties_by_hand() -> None:
    first = Site({"l": 1 + np.array([[3.0], [-2.0], [0.5], [0.1], [4.0]])})
    second = Site({"l": 1 + np.array([[1.0], [3.0], [-0.4], [2.0], [-4.0]])})
    # The largest three stay: 3, −2, _, _, 4 and _, 3, _, 2, −4. Elected: +, +, none, +, none.
    found = combining.ties("ia3", [first, second], [1, 1], density=0.6).tensors["l"][:, 0] - 1
    np.testing.assert_allclose(found, [3, 3, 0, 2, 0], atol=1e-15)
    # At twice the weight the first one's −2 outweighs 3 and its 4 outweighs −4.
    found = combining.ties("ia3", [first, second], [2, 1], density=0.6).tensors["l"][:, 0] - 1
    np.testing.assert_allclose(found, [6, -4, 0, 2, 8], atol=1e-15)


def test_numbers_that_agree_are_averaged_over_those_that_agree() -> None:
    xs = [np.array([[v] for v in row]) for row in ([1.0, 1.0, -1.0], [2.0, -4.0, 0.0], [6.0, 2.0, 0.0])]
    found = combining.ties("invertible", [Site({"F.down": x}) for x in xs], [1, 1, 1], density=1.0)
    np.testing.assert_allclose(found.tensors["F.down"][:, 0], [3.0, -4.0, -1.0])


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 3])
def test_ties_is_pefts_where_weights_and_scalings_are_one(tmp_path: Path, density: float, count: int) -> None:
    folders = [write_adapter(tmp_path / str(n), n, rank=4, alpha=4) for n in range(count)]
    theirs = peft_combination(folders, [1.0] * count, "ties", density=density)
    combined(folders, [1] * count, "ties", density=density).save(tmp_path / "out")
    ours = updates_of(tmp_path / "out")
    assert all(close(ours[m], theirs[m], 1e-6) for m in SHAPES)


def test_trimming_keeps_exactly_the_share_asked_for_even_of_equal_numbers() -> None:
    kept = combining.trimmed(np.ones((4, 5)), 0.3)
    assert kept.sum() == 6
    assert kept.reshape(-1)[:6].all()
    random = np.random.default_rng(0).normal(size=(7, 9))
    for density in (0.1, 0.5, 0.99, 1.0):
        kept = combining.trimmed(random, density)
        assert np.count_nonzero(kept) == round(density * 63)
        left_out = np.abs(random[kept == 0])
        assert not left_out.size or left_out.max() <= np.abs(kept[kept != 0]).min()
        assert np.array_equal(np.asarray(combining.trimmed(torch.from_numpy(random), density)), kept)


# DARE


def test_dare_with_nothing_dropped_is_linear(tmp_path: Path) -> None:
    for structure in ("lora", "ia3", "sparse"):
        folders = [write_structure(tmp_path / f"{structure}{n}", structure, n, shapes=SMALL) for n in range(3)]
        plain, dropped = (combined(folders, (1, 0.5, -2), m, drop=0.0) for m in ("linear", "dare"))
        for module in plain.modules:
            for role, tensor in plain.site(module).tensors.items():
                np.testing.assert_allclose(dropped.site(module).tensors[role], tensor, rtol=0, atol=1e-6)


def test_dare_is_a_function_of_the_seed_and_the_site_alone(tmp_path: Path) -> None:
    folders = folders_of(tmp_path, "lora")

    def made(**how: Any) -> Adapter:
        np.random.seed(int(how.get("seed", 3)) + 17)
        torch.manual_seed(5)
        return combined(folders, (1, 1), "dare", **{"drop": 0.5, "seed": 3, **how})

    def numbers(adapter: Adapter, module: str) -> bytes:
        return b"".join(t.tobytes() for t in adapter.site(module).tensors.values())

    whole, again, other, few = made(), made(), made(seed=4), made(modules="k_proj")
    for module in reversed(whole.modules):
        assert numbers(whole, module) == numbers(again, module) != numbers(other, module)
        assert (numbers(whole, module) == numbers(few, module)) == module.endswith("k_proj")
    masks = [made().site(m).tensors["A"] == 0 for m in NAMES if m.endswith("k_proj")]
    assert (masks[0] != masks[1]).any()


def test_dare_drops_the_share_rescales_the_rest_and_treats_every_adapter_by_itself() -> None:
    x = Site({"A": np.ones((50, 80)), "B": np.ones((60, 50))}, 1.0)
    once = combining.dare("lora", [x], [1], drop=0.75, seed=1).tensors["A"]
    assert set(np.unique(once)) == {0.0, 4.0}
    assert np.mean(once == 0) == pytest.approx(0.75, abs=0.03)
    twice = combining.dare("lora", [x, x], [1, 1], drop=0.75, seed=1).tensors["A"]
    assert set(np.unique(twice)) == {0.0, 4.0, 8.0}


@pytest.mark.parametrize("structure", ["lora", "ia3", "sparse"])
def test_the_mean_of_many_dares_is_the_linear_combination(structure: str) -> None:
    random = np.random.default_rng(0)
    sites = {
        "lora": lora_sites(2, (3, 3), scaling=2.0),
        "ia3": [Site({"l": random.normal(1, 0.3, size=(8, 1))}) for _ in range(2)],
        "sparse": [
            Site({"indices": np.array(i), "values": random.normal(size=3), "shape": np.array([3, 4])})
            for i in ([0, 4, 9], [1, 4, 11])
        ],
    }[structure]
    expected = combining.linear(structure, sites, [0.7, -0.4])
    role = {"lora": "A", "ia3": "l", "sparse": "values"}[structure]
    drawn = [combining.dare(structure, sites, [0.7, -0.4], 0.5, seed).tensors[role] for seed in range(2000)]
    # The deviation of one draw is at most the size of the numbers.
    size = sum(abs(w) * np.abs(s.tensors[role]).max() for w, s in zip([0.7, -0.4], sites, strict=True))
    np.testing.assert_allclose(np.mean(drawn, axis=0), expected.tensors[role], atol=5 * size / 2000**0.5)


def test_dare_on_torch_is_dare_on_numpy() -> None:
    sites = lora_sites(2, (3, 3))
    ours = combining.dare("lora", sites, [1, 2], 0.5, 7, "m")
    theirs = combining.dare("lora", [s.map(torch.from_numpy) for s in sites], [1, 2], 0.5, 7, "m")
    for role in "AB":
        np.testing.assert_allclose(np.asarray(theirs.tensors[role]), ours.tensors[role], atol=1e-14)


# KnOTS


def dense_knots(updates: list[np.ndarray], weights: Sequence[float], density: float) -> np.ndarray:
    """Joint SVD of the updates side by side, TIES on the parts of V, in float64."""
    joint = np.concatenate(updates, axis=1)
    u, s, v = np.linalg.svd(joint, full_matrices=False)
    rank = int(np.sum(s > 1e-10 * s[0]))
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    parts = []
    for n, w in enumerate(weights):
        part = v[:, n * updates[0].shape[1] : (n + 1) * updates[0].shape[1]]
        keep = round(density * part.size)
        cut = np.sort(np.abs(part), axis=None)[::-1][keep - 1]
        parts.append(w * np.where(np.abs(part) >= cut, part, 0))
    total = sum(parts)
    agree = [(np.sign(p) == np.sign(total)) & (p != 0) for p in parts]
    merged = sum(p * a for p, a in zip(parts, agree, strict=True)) / np.maximum(sum(a.astype(int) for a in agree), 1)
    return (u * s) @ merged


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("ranks", [(2, 2), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_knots_is_the_dense_joint_decomposition(ranks: tuple[int, ...], density: float, library: str) -> None:
    for seed in range(5):
        sites = lora_sites(seed, ranks, out=9, inner=8)
        weights = [1.0, 0.6, 1.4][: len(ranks)]
        there = sites if library == "numpy" else [s.map(torch.from_numpy) for s in sites]
        found = np.asarray(effect(combining.knots(there, weights, density)))
        assert close(found, dense_knots([effect(s) for s in sites], weights, density), 1e-9)


def test_knots_of_one_adapter_is_the_adapter(tmp_path: Path) -> None:
    folders = folders_of(tmp_path, "lora", 1)
    combined(folders, [1], "knots", density=1.0).save(tmp_path / "out")
    before, after = updates_of(folders[0]), peft_deltas(tmp_path / "out")
    assert all(close(after[m], before[m], 1e-5) for m in SMALL)


@pytest.mark.parametrize(("out", "inner"), [(3, 20), (20, 3), (2, 2), (40, 40)])
def test_knots_has_the_rank_it_announces_whatever_the_shape(tmp_path: Path, out: int, inner: int) -> None:
    shapes = {"model.layers.0.self_attn.q_proj": (out, inner)}
    folders = [write_adapter(tmp_path / str(n), n, shapes=shapes, rank=5) for n in range(2)]
    merged = combined(folders, (1, 1), "knots", density=1.0)
    for module in merged.modules:
        assert rank_of(merged.layout[module]) == merged.site(module).tensors["A"].shape[0]
    merged.save(tmp_path / "out")
    expected = dense_knots([updates_of(f)[merged.modules[0]] for f in folders], (1, 1), 1.0)
    assert close(updates_of(tmp_path / "out")[merged.modules[0]], expected, 1e-4)


def test_knots_takes_adapters_that_lack_a_site(tmp_path: Path) -> None:
    q, down = FEW
    folders = [
        write_adapter(tmp_path / "a", 1, shapes=FEW, rank=2),
        write_adapter(tmp_path / "b", 2, shapes={q: FEW[q]}, rank=3),
    ]
    merged = combined(folders, (1, 1), "knots", density=1.0)
    merged.save(tmp_path / "out")
    assert [rank_of(merged.layout[m]) for m in (q, down)] == [5, 2]
    assert close(peft_deltas(tmp_path / "out")[down], updates_of(folders[0])[down], 1e-5)


# What fits and what is refused


@pytest.mark.parametrize("structure", ["prefix", "bottleneck", "invertible"])
@pytest.mark.parametrize("method", ["ties", "dare"])
def test_methods_that_drop_numbers_refuse_structures_that_do_not_start_at_zero(
    tmp_path: Path, structure: str, method: str
) -> None:
    with pytest.raises(AdapterError, match=f"a {structure} adapter's numbers are no changes") as caught:
        combined(folders_of(tmp_path, structure), (1, 1), method)
    assert "linear" in str(caught.value.remedy)


@pytest.mark.parametrize("structure", OTHERS)
def test_knots_is_for_lora(tmp_path: Path, structure: str) -> None:
    with pytest.raises(AdapterError, match=f"KnOTS .*'{structure}'"):
        combined(folders_of(tmp_path, structure), (1, 1), "knots")


@pytest.mark.parametrize(
    ("weights", "how", "said"),
    [
        ((1, float("nan")), {}, "finite number"),
        ((1, float("inf")), {}, "finite number"),
        ((1,), {}, "every adapter a weight"),
        ((1, 1), {"method": "ties", "density": 0.0}, "density is above 0"),
        ((1, 1), {"method": "ties", "density": 1.1}, "density is above 0"),
        ((1, 1), {"method": "ties", "density": float("nan")}, "density is above 0"),
        ((1, 1), {"method": "dare", "drop": 1.0}, "dropped at least 0 and below 1"),
        ((1, 1), {"method": "dare", "drop": -0.1}, "dropped at least 0"),
        ((1, 1), {"method": "dare", "drop": float("nan")}, "dropped at least 0"),
        ((1, 1), {"method": "tie"}, "unknown method 'tie'"),
        ((1, 1), {"space": "cross"}, "has no space 'cross'"),
        ((1, 1), {"method": "cat", "space": "product"}, "'cat' has no space 'product'"),
        ((1, 1), {"out_rank": 2}, "--space product"),
        ((1, 1), {"method": "cat", "out_rank": 0}, "at least 1"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path: Path, weights: Any, how: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        combined(folders_of(tmp_path, "lora"), weights, **how)


def test_nothing_to_combine_and_a_space_of_another_structure_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one adapter"):
        Combination().of([], [])
    with pytest.raises(UserError, match="'ia3' has no space 'product'"):
        combined(folders_of(tmp_path, "ia3"), (1, 1), space="product")


@pytest.mark.parametrize(
    ("wrong", "right"), [("tie", "ties"), ("concat", "cat"), ("knot", "knots"), ("lineer", "linear")]
)
def test_a_misspelt_method_is_an_error_with_the_right_word(tmp_path: Path, wrong: str, right: str) -> None:
    with pytest.raises(UserError) as caught:
        combined(folders_of(tmp_path, "lora"), (1, 1), wrong)
    assert right in str(caught.value.remedy)


@pytest.mark.parametrize("method", COMBINATIONS)
def test_adapters_of_different_structures_are_refused_with_both_names(tmp_path: Path, method: str) -> None:
    folders = [write_structure(tmp_path / s, s, 1, shapes=SMALL) for s in ("lora", "ia3")]
    with pytest.raises(AdapterError, match="adapter 1 lora, adapter 2 ia3"):
        combined(folders, (1, 1), method)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_graft_of_different_structures_is_refused(tmp_path: Path, structure: str) -> None:
    other = "ia3" if structure != "ia3" else "lora"
    task, target = (Adapter.load(f) for f in folders_of(tmp_path, structure))
    source = Adapter.load(write_structure(tmp_path / "other", other, 1, shapes=SMALL))
    with pytest.raises(AdapterError, match=f"different structures: task {structure}.*source reference {other}"):
        Graft(1.0).onto(task, Divergence(target, source))


def test_all_mismatches_of_bottlenecks_are_named_at_once(tmp_path: Path) -> None:
    task = write_structure(
        tmp_path / "a", "bottleneck", 1, shapes=SMALL, size=4, sidecar={"backbone": {"digest": "sha256:aaaa"}}
    )
    other = write_structure(
        tmp_path / "b",
        "bottleneck",
        1,
        shapes=SMALL,
        size=3,
        activation="gelu",
        sidecar={"backbone": {"digest": "sha256:bbbb"}},
    )
    with pytest.raises(AdapterError) as caught:
        combined([task, other], (1, 1))
    message = str(caught.value)
    for part in ("different base models", "sha256:aaaa", "sha256:bbbb", "activation: relu in the adapter 1, gelu"):
        assert part in message
    assert "down (4, 32) in the adapter 1, (3, 32) in the adapter 2" in message
    with pytest.raises(AdapterError) as caught:
        Graft(1.0).onto(Adapter.load(task), Adapter.load(other) - Adapter.load(task))
    assert "activation: relu in the task, gelu in the target reference" in str(caught.value)
    assert "down (4, 32) in the task, (3, 32) in the target reference" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 4}, "heads: 2 in the adapter 1, 4 in the adapter 2"),
        ({"size": 5}, r"key \(4, 16\) in the adapter 1, \(5, 16\)"),
    ],
    ids=str,
)
def test_prefixes_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folders = [
        write_structure(tmp_path / "a", "prefix", 1, shapes=SMALL),
        write_structure(tmp_path / "b", "prefix", 2, shapes=SMALL, **change),
    ]
    with pytest.raises(AdapterError, match=said):
        combined(folders, (1, 1))


def test_an_ia3_vector_over_inputs_does_not_fit_one_over_outputs(tmp_path: Path) -> None:
    square = {"model.layers.0.self_attn.k_proj": (8, 8), "model.layers.0.mlp.down_proj": (8, 8)}
    first = write_structure(tmp_path / "a", "ia3", 1, shapes=square)
    second = rewrite(write_structure(tmp_path / "b", "ia3", 2, shapes=square), lambda name, tensor: tensor.T.copy())
    with pytest.raises(AdapterError, match=r"\(1, 8\) in the adapter 1, \(8, 1\) in the adapter 2"):
        combined([first, second], (1, 1))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", ["linear", "transfer"])
def test_heads_and_modules_to_save_are_the_first_ones(tmp_path: Path, structure: str, method: str) -> None:
    names = (f"{PREFIX}score.weight", f"{PREFIX}model.norm.weight")
    folders = [
        write_structure(
            tmp_path / str(n),
            structure,
            n,
            shapes=SMALL,
            others={name: np.full((3, 2), n + 1, np.float16) for name in names},
            modules_to_save=[f"score{n}"],
        )
        for n in range(3)
    ]
    loaded = [Adapter.load(folder) for folder in folders]
    graft = Graft(0.7).onto(loaded[0], loaded[1] - loaded[2])
    merged = Combination().of(loaded, (0.2, 0.3, 0.5)) if method == "linear" else graft
    merged.save(tmp_path / "out")
    for name in names:
        tensor = tensors_of(tmp_path / "out")[name]
        assert tensor.dtype == torch.float16 and bool((tensor == 1).all())
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"] == ["score0"]


@pytest.mark.parametrize("first", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_types_mix_the_sum_is_in_float32_and_rounded_once_to_the_first_ones(
    tmp_path: Path, structure: str, first: Any
) -> None:
    others = [d for d in (np.float32, np.float16, ml_dtypes.bfloat16) if d is not first]
    weights = (0.5, 0.3, -0.7)
    folders = [
        write_structure(tmp_path / str(n), structure, n, shapes=SMALL, dtype=dtype)
        for n, dtype in enumerate((first, *others))
    ]
    merged = combined(folders, weights)
    assert merged.dtype == np.dtype(first)
    merged.save(tmp_path / "out")
    opened = Adapter.load(tmp_path / "out")
    assert opened.dtype == np.dtype(first)
    for module in merged.modules:
        for role, wide in merged.site(module).tensors.items():
            if wide.dtype.kind == "f":
                assert wide.dtype == np.float32
                rounded = np.asarray(wide.astype(first), np.float32)
                assert np.array_equal(opened.site(module).tensors[role], rounded)


def test_only_the_chosen_sites_are_combined(tmp_path: Path) -> None:
    for structure, chosen in (
        ("lora", "k_proj"),
        ("ia3", "down_proj"),
        ("bottleneck", "layer:1"),
        ("prefix", "layer:0"),
    ):
        folders = [write_structure(tmp_path / f"{structure}{n}", structure, n, shapes=SMALL) for n in range(2)]
        first = Adapter.load(folders[0])
        merged = combined(folders, (0.5, 0.5), modules=chosen)
        changed = {
            m
            for m in first.modules
            if any(not np.array_equal(merged.site(m).tensors[r], t) for r, t in first.site(m).tensors.items())
        }
        assert changed and changed != set(first.modules)
        assert all(
            m.endswith(chosen) or m.split(".")[-1 if structure == "prefix" else 2] == chosen[-1] for m in changed
        )


def test_unlike_starts_warn_where_numbers_are_combined_and_not_where_effects_are(tmp_path: Path) -> None:
    for structure, method, warned in (
        ("lora", "linear", True),
        ("lora", "ties", True),
        ("lora", "cat", False),
        ("lora", "knots", False),
        ("bottleneck", "linear", True),
        ("bottleneck", "cat", False),
        ("prefix", "cat", False),
        ("ia3", "linear", False),
    ):
        folders = [
            write_structure(
                tmp_path / f"{structure}{method}{n}", structure, n, shapes=SMALL, sidecar={"init_sha256": str(n)}
            )
            for n in range(2)
        ]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            combined(folders, (1, 1), method)
        assert any(issubclass(w.category, AdapterWarning) for w in caught) == warned, (structure, method)


# Grafts and divergences of every structure on disk

HOW = {
    "lora": [{}, {"space": "product"}, {"method": "cross"}, {"method": "arimerge"}, {"method": "arimerge-add"}],
    "ia3": [{}, {"method": "cross"}, {"method": "arimerge"}, {"method": "arimerge-add"}],
    "prefix": [{}, {"space": "flat"}, {"space": "literal"}, {"method": "cross"}, {"method": "arimerge-add"}],
    "bottleneck": [{}, {"method": "cross"}, {"method": "arimerge-add"}],
    "invertible": [{}, {"method": "arimerge-add"}],
    "sparse": [{}, {"method": "arimerge-add"}],
}
GRAFTED = [pytest.param(s, how, id=f"{s}-{'-'.join(how.values()) or 'own'}") for s, hows in HOW.items() for how in hows]


@pytest.mark.parametrize(("structure", "how"), GRAFTED)
def test_every_graft_is_written_as_its_formula_says_and_a_saved_divergence_gives_the_same(
    tmp_path: Path, structure: str, how: dict[str, Any]
) -> None:
    task, target, source = (Adapter.load(f) for f in folders_of(tmp_path, structure, 3))
    graft = Graft(0.6, **how)
    graft.onto(task, target - source).save(tmp_path / "out")
    found = verify(tmp_path / "out", [task, target, source], lambda p: graft.onto(p[0], p[1] - p[2]))
    assert found < 1e-5
    far = verify(tmp_path / "out", [task, target, source], lambda p: replace(graft, weight=0.8).onto(p[0], p[1] - p[2]))
    assert far > 1e-3
    (target - source).save(tmp_path / "divergence")
    graft.onto(task, Divergence.load(tmp_path / "divergence")).save(tmp_path / "again")
    assert numbers_of(tmp_path / "again").keys() == numbers_of(tmp_path / "out").keys()
    for name, tensor in numbers_of(tmp_path / "out").items():
        assert np.array_equal(numbers_of(tmp_path / "again")[name], tensor)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_the_guard_changed_is_noted_by_site(tmp_path: Path, structure: str) -> None:
    task, target, source = (Adapter.load(f) for f in folders_of(tmp_path, structure, 3, size=6))
    nothing = replace(source, read=lambda m: source.site(m).map(lambda t: t * 0))
    for space in {"ia3": ("ratio",), "prefix": ("layer", "flat"), "bottleneck": ("inverse",)}.get(structure, (None,)):
        merged = Graft(1.0, space=space).onto(task, target - (source if structure == "sparse" else nothing))
        merged.save(tmp_path / f"out-{space}")
        if structure in ("ia3", "prefix", "bottleneck"):
            assert merged.notes.guarded and all(count > 0 for count in merged.notes.guarded.values()), space
        else:
            assert not merged.notes.guarded


@pytest.mark.parametrize("structure", STRUCTURES)
def test_similarity_of_an_adapter_to_itself_is_one_for_every_structure(tmp_path: Path, structure: str) -> None:
    x, y = (Adapter.load(f) for f in folders_of(tmp_path, structure))
    assert similarity(x, x)["cosine"] == pytest.approx(1)
    assert abs(similarity(x, y)["cosine"]) < 0.9
    shown = (x - y).as_adapter()
    for module in shown.modules:
        shown.site(module)


@pytest.mark.parametrize("wide", [(32, 64), (64, 32)])
def test_sparse_differences_of_different_weights_are_refused_in_words(tmp_path: Path, wide: tuple[int, int]) -> None:
    name = "model.layers.0.mlp.down_proj"
    x = Adapter.load(write_structure(tmp_path / "a", "sparse", 1, shapes={name: (32, 64)}))
    y = Adapter.load(write_structure(tmp_path / "b", "sparse", 2, shapes={name: wide if wide[0] == 64 else (32, 48)}))
    with pytest.raises(AdapterError, match="different shapes"):
        Combination().of([x, y], (1, 1)).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match="different shapes"):
        similarity(x, y)


def test_rank_factors_of_a_combination_are_those_of_its_parts(tmp_path: Path) -> None:
    folders = folders_of(tmp_path, "lora", 2)
    combined(folders, (2, -1), "cat").save(tmp_path / "out")
    for module in SMALL:
        a, b = factors_of(tmp_path / "out", module)
        (a_1, b_1), (a_2, b_2) = (factors_of(folder, module) for folder in folders)
        assert np.array_equal(a, np.concatenate([a_1, a_2]))
        np.testing.assert_allclose(b, np.concatenate([2 * b_1, -b_2], axis=1), rtol=1e-6)


# What a merge must not do in silence


def test_sites_that_are_added_are_not_excluded_any_more(tmp_path: Path) -> None:
    few = {m: s for m, s in SHAPES.items() if not m.endswith("k_proj")}
    narrow = {"target_modules": "all-linear", "exclude_modules": ["k_proj"], "layers_to_transform": None}
    task = write_adapter(tmp_path / "task", 1, shapes=few, **narrow)
    target, source = (write_adapter(tmp_path / name, n) for n, name in ((2, "target"), (3, "source")))
    loaded = [Adapter.load(folder) for folder in (task, target, source)]
    loaded[0].save(tmp_path / "same")
    assert set(peft_deltas(tmp_path / "same")) == set(few)
    (loaded[1] - loaded[2]).onto(loaded[0], space="product").save(tmp_path / "grafted")
    Combination("cat").of(loaded, [1, 1, -1]).save(tmp_path / "cat")
    (loaded[0] - loaded[1]).save(tmp_path / "divergence")
    updates = [updates_of(folder) for folder in (task, target, source)]
    for out in ("grafted", "cat"):
        found = peft_deltas(tmp_path / out)
        assert set(found) == set(SHAPES)
        for m in SHAPES:
            assert close(found[m], updates[0].get(m, 0) + updates[1][m] - updates[2][m], 1e-6)
    assert set(peft_deltas(tmp_path / "divergence")) == set(SHAPES)


@pytest.mark.parametrize("method", ["cat", "knots"])
def test_a_method_that_is_exact_has_no_factors_space(tmp_path: Path, method: str) -> None:
    adapter = Adapter.load(write_adapter(tmp_path / "a", 1, shapes=FEW))
    with pytest.raises(UserError, match="has no space 'factors'"):
        Combination(method, space="factors").of([adapter], [1.0])


def test_the_heads_of_references_are_missed_aloud(tmp_path: Path) -> None:
    head = {f"{PREFIX}embed_tokens.weight": np.ones((4, 3), np.float32)}
    task, source = (Adapter.load(write_adapter(tmp_path / name, 1, shapes=FEW)) for name in ("t", "s"))
    target = Adapter.load(write_adapter(tmp_path / "r", 2, shapes=FEW, others=head))
    with pytest.warns(AdapterWarning, match="target reference also holds 1 tensors"):
        (target - source).onto(task)


def test_a_density_keeps_one_number_at_least() -> None:
    x = np.array([0.5, -2.0, 1.0])
    assert combining.trimmed(x, 0.01).tolist() == [0.0, -2.0, 0.0]


def test_arimerge_takes_no_weighted_divergence(tmp_path: Path) -> None:
    a, b, c = (Adapter.load(write_adapter(tmp_path / str(n), n, shapes=FEW)) for n in range(3))
    with pytest.raises(AdapterError, match="not a weighted divergence"):
        Graft(0.5, "arimerge").onto(a, 2 * (b - c))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_inspect_shows_a_divergences_own_provenance(tmp_path: Path, structure: str) -> None:
    notes = {"init_sha256": "start", "provenance": {"how": "train"}, "backbone": {"digest": "base"}}
    target, source = (write_structure(tmp_path / str(n), structure, n, sidecar=notes) for n in range(2))
    save_divergence(target, source, tmp_path / "out", True)
    found = inspect_folders([tmp_path / "out"], True)
    assert found is not None
    (entry,) = found["adapters"]
    assert (entry["kind"], entry["family"], entry["base_digest"]) == ("divergence", structure, "base")
    assert entry["init_sha256"] == "start"
    inputs = {"target_ref": content_digest(target), "source_ref": content_digest(source)}
    assert (entry["provenance"]["how"], entry["provenance"]["inputs"]) == ("divergence", inputs)
