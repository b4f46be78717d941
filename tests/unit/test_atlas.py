"""The atlas: laws of the cosines in every structure, agreement with `similarity`, clusters, and the atlas of a run."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingraft.adapter import Adapter
from lingraft.algebra import Site
from lingraft.atlas import ALL, atlas, clusters
from lingraft.commands.adapters import inspect_folders
from lingraft.digests import digest_value
from lingraft.errors import AdapterError, MissingExtra, UserError
from lingraft.families import measures
from lingraft.layouts.common import Place
from lingraft.layouts.lora import place as lora_place
from lingraft.merging import similarity
from lingraft.report.divergences import CACHE, divergences
from lingraft.report.results import results
from lingraft.store import Store, read_json, write_json
from tests.unit.adapters import FEW, write_adapter
from tests.unit.test_report import RIGHT, make_run

SITES = ("model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj", "model.layers.10.mlp.down_proj")
OUT, WIDE, RANK = 6, 5, 2


def lora(random: np.random.Generator) -> Site:
    return Site({"A": random.normal(size=(RANK, WIDE)), "B": random.normal(size=(OUT, RANK))}, 1.5)


def ia3(random: np.random.Generator) -> Site:
    return Site({"l": random.normal(size=(OUT, 1)) + 1})


def prefix(random: np.random.Generator) -> Site:
    return Site({"key": random.normal(size=(3, 4)), "value": random.normal(size=(3, 4))})


def bottleneck(random: np.random.Generator) -> Site:
    sizes = {"down": (2, 4), "down_bias": (2,), "up": (4, 2), "up_bias": (4,)}
    return Site({name: random.normal(size=size) for name, size in sizes.items()})


def sparse(random: np.random.Generator) -> Site:
    chosen = np.sort(random.choice(30, 12, replace=False)).astype(np.int64)
    return Site({"indices": chosen, "values": random.normal(size=12), "shape": np.array([6, 5])})


MADE: dict[str, Callable[[np.random.Generator], Site]] = {
    "lora": lora,
    "ia3": ia3,
    "prefix": prefix,
    "bottleneck": bottleneck,
    "sparse": sparse,
}
STRUCTURES = list(MADE)
CHANGED = {"lora": ("B",), "sparse": ("values",)}


def adapter(structure: str, seed: int, sites: tuple[str, ...] = SITES) -> Adapter:
    random = np.random.default_rng(seed)
    found = {site: MADE[structure](random) for site in SITES}

    def place(site: Site) -> Place:
        if structure == "lora":
            return lora_place(OUT, WIDE, RANK, site.scaling)
        return Place({role: tuple(t.shape) for role, t in site.tensors.items()}, site.scaling)

    layout = {name: place(found[name]) for name in sites}
    return Adapter(structure, {"peft_type": structure}, layout, np.dtype(np.float64), {}, found.__getitem__)


def times(x: Adapter, factor: float) -> Adapter:
    """The adapter whose change is so many times as large."""

    def scaled(module: str) -> Site:
        site = x.read(module)
        if x.structure == "ia3":
            return site.map(lambda t: 1 + factor * (t - 1))
        roles = CHANGED.get(x.structure, tuple(site.tensors))
        return Site({r: t * factor if r in roles else t for r, t in site.tensors.items()}, site.scaling)

    return replace(x, read=scaled)


def cosines(**adapters: Adapter) -> np.ndarray[Any, Any]:
    return np.array(atlas(adapters)["cosines"][ALL], dtype=float)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_is_symmetric_with_ones_on_the_diagonal(structure: str):
    found = atlas({str(n): adapter(structure, n) for n in range(5)})
    assert found["layers"] == [ALL, "0", "2", "10"]
    for layer in found["layers"]:
        matrix = np.array(found["cosines"][layer])
        assert (matrix == matrix.T).all()
        assert (np.diag(matrix) == 1).all()
        assert (abs(matrix) <= 1).all()
    assert found["structure"] == structure
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_agrees_with_similarity_and_inner_product(structure: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lingraft.atlas._COLUMNS", 4)  # Several rounds, as of large adapters.
    monkeypatch.setattr("lingraft.merging.check_fit", lambda *_, **__: None)
    parts = {str(n): adapter(structure, n) for n in range(4)}
    found = atlas(parts)
    for i, x in enumerate(parts.values()):
        for j, y in enumerate(parts.values()):
            alike = similarity(x, y)
            assert found["cosines"][ALL][i][j] == pytest.approx(alike["cosine"], abs=1e-12)
            assert found["norms"][ALL][i] == pytest.approx(alike["norms"][0])
            for layer, cosine in alike["by_layer"].items():
                assert found["cosines"][layer][i][j] == pytest.approx(cosine, abs=1e-12)
            product = sum(measures.inner_product(structure, x.site(m), y.site(m)) for m in SITES)
            norms = found["norms"][ALL][i] * found["norms"][ALL][j]
            assert product == pytest.approx(found["cosines"][ALL][i][j] * norms, abs=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_size_does_not_matter_and_direction_does(structure: str):
    x, y = adapter(structure, 1), adapter(structure, 2)
    plain = cosines(x=x, y=y)
    assert cosines(x=times(x, 7.5), y=times(y, 0.25)) == pytest.approx(plain)
    found = cosines(x=x, minus=times(x, -1.0), y=y)
    assert found[0, 1] == pytest.approx(-1)
    assert found[1, 2] == pytest.approx(-plain[0, 1])


def test_of_lora_the_update_counts_and_not_how_it_is_factored():
    x, y = adapter("lora", 1), adapter("lora", 2)
    m = np.array([[2.0, 1.0], [-1.0, 3.0]])

    def turned(module: str) -> Site:
        site = x.read(module)
        return Site({"A": np.linalg.inv(m) @ site.tensors["A"], "B": site.tensors["B"] @ m}, site.scaling)

    found = cosines(x=x, turned=replace(x, read=turned), y=y)
    assert found[0, 1] == pytest.approx(1)
    assert found[1, 2] == pytest.approx(found[0, 2])
    dense = [
        np.concatenate([(1.5 * a.read(s).tensors["B"] @ a.read(s).tensors["A"]).ravel() for s in SITES]) for a in (x, y)
    ]
    assert found[0, 2] == pytest.approx(dense[0] @ dense[1] / np.linalg.norm(dense[0]) / np.linalg.norm(dense[1]))


def test_ranks_may_differ_and_be_zero():
    x, y = adapter("lora", 1), adapter("lora", 2)
    nothing = replace(x, read=lambda m: Site({"A": np.zeros((0, WIDE)), "B": np.zeros((OUT, 0))}, 2.0))
    wide = replace(y, read=lambda m: Site({"A": np.ones((4, WIDE)), "B": np.ones((OUT, 4))}, 2.0))
    found = atlas({"x": x, "nothing": nothing, "wide": wide, "zero": times(x, 0.0)})
    rows = found["cosines"][ALL]
    assert [rows[0][1], rows[1][1], rows[1][2], rows[3][0]] == [None] * 4
    assert rows[0][2] == pytest.approx(similarity(x, wide)["cosine"])
    assert found["norms"][ALL][1] == found["norms"][ALL][3] == 0


@pytest.mark.parametrize("structure", ["lora", "prefix", "sparse"])
def test_pairs_are_compared_at_the_sites_that_both_have(structure: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lingraft.merging.check_fit", lambda *_, **__: None)
    parts = {
        "all": adapter(structure, 1),
        "first": adapter(structure, 2, SITES[:2]),
        "last": adapter(structure, 3, SITES[1:]),
        "one": adapter(structure, 4, SITES[:1]),
    }
    found, names = atlas(parts), list(parts)
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            if {one, other} == {"last", "one"}:
                assert found["cosines"][ALL][i][j] is None
            else:
                alike = similarity(parts[one], parts[other])
                assert found["cosines"][ALL][i][j] == pytest.approx(alike["cosine"], abs=1e-12)


def test_what_does_not_fit_is_refused():
    with pytest.raises(AdapterError, match="different structures"):
        atlas({"x": adapter("lora", 1), "y": adapter("ia3", 1)})
    with pytest.raises(AdapterError, match="nothing to compare"):
        atlas({})
    with pytest.raises(AdapterError, match="too large"), np.errstate(over="ignore", invalid="ignore"):
        atlas({"x": times(adapter("lora", 1), 1e200), "y": adapter("lora", 2)})


# Clusters.


def test_what_is_alike_stands_together():
    a, b = np.eye(6)[:2]
    rows = np.array([a, b, a + 0.1 * b, b + 0.1 * a, a - 0.05 * b])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    order, linkage = clusters((rows @ rows.T).tolist())
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert {frozenset(order[:2]), frozenset(order[-2:])} & {frozenset({1, 3})}
    assert len(linkage) == 4
    assert linkage[-1][3] == 5
    assert [row[2] for row in linkage] == sorted(row[2] for row in linkage)


def test_few_and_unknown_are_no_trouble():
    assert clusters([]) == ([], [])
    assert clusters([[1.0]]) == ([0], [])
    order, linkage = clusters([[1.0, None], [None, 1.0]])
    assert (sorted(order), linkage) == ([0, 1], [[0, 1, 1.0, 2]])
    order, _ = clusters([[None] * 3] * 3)
    assert sorted(order) == [0, 1, 2]


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    for name in ("scipy", "scipy.cluster", "scipy.cluster.hierarchy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match="scipy"):
        clusters([[1.0, 0.5], [0.5, 1.0]])


# lingraft inspect A B C.


def test_inspect_of_three_shows_a_matrix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folders = [write_adapter(tmp_path / name / "adapter", n, shapes=FEW) for n, name in enumerate("abc")]
    found = inspect_folders(folders, as_json=True)
    assert found is not None
    json.dumps(found, allow_nan=False)
    assert [entry["path"] for entry in found["adapters"]] == [str(f) for f in folders]
    assert found["atlas"]["names"] == ["a/adapter", "b/adapter", "c/adapter"]
    assert set(found["atlas"]["layers"]) == {ALL, "0", "1"}
    assert found["atlas"]["cosines"][ALL][0][1] == pytest.approx(
        similarity(Adapter.load(folders[0]), Adapter.load(folders[1]))["cosine"]
    )
    assert inspect_folders(folders, as_json=False) is None
    text = capsys.readouterr().out
    assert "1.000" in text
    assert "clusters" in text
    monkeypatch.setitem(sys.modules, "scipy.cluster.hierarchy", None)
    inspect_folders(folders, as_json=False)
    assert "in the order given" in capsys.readouterr().out


def test_inspect_of_one_and_two_is_as_before(tmp_path: Path):
    a, b = (write_adapter(tmp_path / name, n, shapes=FEW) for n, name in enumerate("ab"))
    one, two = inspect_folders([a], as_json=True), inspect_folders([a, b], as_json=True)
    assert one is not None and one["similarity"] is None and len(one["adapters"]) == 1
    assert two is not None and set(two) == {"adapters", "similarity"}
    with pytest.raises(UserError, match="given twice"):
        inspect_folders([a, b, a], as_json=True)


# Of a run.


def train_steps(run: Path, languages: tuple[str, ...], *, seeds: tuple[int, ...] = (0,)) -> None:
    """Adds reference adapters to a run made by hand."""
    store, manifest = Store(run / "store"), json.loads((run / "manifest.json").read_text())
    manifest["steps"] = []
    for seed in seeds:
        for number, language in enumerate(languages):
            config = {"reference": {"task": "clm"}, "language": language, "seed": seed, "adapter": {"family": "lora"}}
            key = digest_value([language, seed], 24)
            with store.making(
                "train", key, {"kind": "train", "config": config, "label": f"train clm {language}"}
            ) as work:
                write_adapter(work, 100 * seed + number, shapes=FEW)
            manifest["steps"].append(f"train/{key}")
    write_json(run / "manifest.json", manifest)


def test_the_atlas_of_a_run_is_of_its_references_differences(tmp_path: Path):
    run = make_run(tmp_path)
    train_steps(run, ("en", "tr", "vi", "sw"), seeds=(1, 0))
    found = divergences(run, results(run))
    assert found is not None
    assert found["languages"] == ["sw", "vi", "tr"]
    assert found["seed"] == 0
    refs = {c: Adapter.load(run / "store" / "train" / digest_value([c, 0], 24)) for c in ("en", "sw", "vi", "tr")}
    changes = [(refs[c] - refs["en"]).as_adapter() for c in found["languages"]]
    for i, x in enumerate(changes):
        for j, y in enumerate(changes):
            assert found["cosines"][ALL][i][j] == pytest.approx(similarity(x, y)["cosine"], abs=1e-12)
    assert sorted(found["order"]) == [0, 1, 2]
    assert "Most alike are" in found["says"]
    json.dumps(found, allow_nan=False)


def test_the_atlas_is_kept_until_its_inputs_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path)
    train_steps(run, ("en", "sw", "vi"))
    first = divergences(run, results(run))
    kept = read_json(run / CACHE)
    monkeypatch.setattr("lingraft.report.divergences.atlas", lambda _: pytest.fail("computed again"))
    assert divergences(run, results(run)) == first
    monkeypatch.undo()
    assert json.dumps(divergences(run, results(run))) == json.dumps(first)  # In the same order, too.

    def other(**changed: Any) -> str:
        return json.dumps({**kept, "atlas": kept["atlas"] | changed})

    cosines = kept["atlas"]["cosines"]
    for text in (
        other(names=["sw", "<b>"]),
        other(structure="<script>"),
        other(layers=[ALL, "<img>"]),
        other(cosines={**cosines, ALL: [[1.0, "<b>"], ["<b>", 1.0]]}),
        other(cosines={**cosines, ALL: [[1.0, 1e300], [1e300, 1.0]]}),
        other(cosines={**cosines, ALL: [[1.0, 0.5], [0.25, 1.0]]}),
        other(cosines={**cosines, ALL: [[1.0]]}),
        other(norms={**kept["atlas"]["norms"], ALL: [1.0, -1.0]}),
        other(norms=[]),
        other(cosines={ALL: cosines[ALL]}),
        "{",
        "[]",
        json.dumps({"made_of": "another", "atlas": {"says": "old"}}),
        json.dumps({**kept, "atlas": 1}),
    ):
        (run / CACHE).write_text(text)
        assert divergences(run, results(run)) == first
        assert read_json(run / CACHE) == kept


@pytest.mark.parametrize("languages", [(), ("en", "sw", "tr"), ("sw", "vi")])
def test_without_references_of_two_targets_and_the_source_there_is_none(tmp_path: Path, languages: tuple[str, ...]):
    run = make_run(tmp_path, RIGHT)
    train_steps(run, languages)
    assert divergences(run, results(run)) is None
    assert not (run / CACHE).exists()
