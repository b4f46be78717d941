"""Sparse differences that change different weights merge on the union of their sites."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from lingraft.adapter import Adapter
from lingraft.divergence import Divergence
from lingraft.layouts.sparse import tensor_name
from lingraft.merging import Combination, Graft
from tests.unit.adapters import write_folder

SHAPES = {"a": (5, 4), "b.bias": (20,), "c": (5, 4), "d": (5, 4)}


def written(folder: Path, sites: Mapping[str, Mapping[int, float]]) -> Adapter:
    tensors = {}
    for site, entries in sites.items():
        tensors[tensor_name(site, "indices")] = np.array(list(entries), np.int64)
        tensors[tensor_name(site, "values")] = np.array(list(entries.values()), np.float32)
        tensors[tensor_name(site, "shape")] = np.array(SHAPES[site], np.int64)
    write_folder(folder, tensors, {"peft_type": "SPARSE"})
    return Adapter.load(folder)


def dense(adapter: Adapter) -> np.ndarray:
    """All sites' differences, one row each; zeros where there is none."""
    found = np.zeros((len(SHAPES), 20))
    for row, site in zip(found, SHAPES, strict=True):
        if site in adapter.layout:
            tensors = adapter.site(site).tensors
            row[tensors["indices"]] = tensors["values"]
    return found


@pytest.mark.parametrize("saved", [False, True])
def test_an_adapter_without_a_site_changes_nothing_there(tmp_path: Path, saved: bool) -> None:
    task = written(tmp_path / "task", {"a": {1: 1.0, 3: 2.0}, "b.bias": {0: 1.0}})
    target = written(tmp_path / "target", {"a": {3: 4.0}, "c": {7: 1.0}})
    source = written(tmp_path / "source", {"c": {7: 0.5, 9: 2.0}, "d": {2: 3.0}})
    divergence = target - source
    if saved:
        divergence.save(tmp_path / "divergence")
        divergence = Divergence.load(tmp_path / "divergence")
    made = {
        "graft": (task + 0.5 * divergence, (1, 0.5, -0.5)),
        "linear": (Combination("linear").of([task, target, source], [1, 2, 3]), (1, 2, 3)),
        "added": (Graft(0.5, method="arimerge-add").onto(task, divergence), (0.5, 0.5, 0)),
    }
    for name, (merged, weights) in made.items():
        merged.save(tmp_path / name)
        expected = sum(w * dense(x) for w, x in zip(weights, (task, target, source), strict=True))
        np.testing.assert_allclose(dense(Adapter.load(tmp_path / name)), expected)
    config = json.loads((tmp_path / "graft" / "adapter_config.json").read_text())
    assert config["entries"] == {"a": 2, "b.bias": 1, "c": 2, "d": 1}
    assert config["target_modules"] == ["a", "b", "c", "d"]
    divergence.onto(task, modules="c").save(tmp_path / "some")
    assert Adapter.load(tmp_path / "some").modules == ("a", "b.bias", "c")
