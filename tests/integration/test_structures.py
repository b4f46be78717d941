"""The pipeline on a tiny model with every structure that can be trained: own rule, cross rule and a control."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lingraft.config import load_experiment
from lingraft.errors import UserError
from lingraft.report.results import results
from lingraft.runner import run
from tests.integration.test_pipeline import make_experiment

STRUCTURES = {
    "ia3": "{family: ia3}",
    "prefix": "{family: prefix, tokens: 4}",
    "bottleneck": "{family: bottleneck, reduction: 8, positions: houlsby}",
}
METHODS = "methods=[eng-ft, adamergex, adamergex-cross, control-add]"


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_experiment_with_every_structure(tmp_path: Path, tiny_folder: Path, structure: str) -> None:
    path = make_experiment(tmp_path, tiny_folder)
    overrides = [f"adapter={STRUCTURES[structure]}", METHODS, "seeds=[0]", "selection={weight: 0.5}"]
    run(load_experiment(path, overrides), tmp_path / "out")
    found = results(tmp_path / "out")
    assert set(found["methods"]) == {"eng-ft", "adamergex", "adamergex-cross", "control-add"}
    assert all(set(m["languages"]) >= {"sw", "de"} for m in found["methods"].values())
    adapters = {(a["method"], a["language"]): Path(a["path"]) for a in found["adapters"]}
    ids = torch.tensor([[1, 5, 9, 13]])

    def logits(folder: Path) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(tiny_folder)
        with torch.no_grad():
            return PeftModel.from_pretrained(base, folder)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    own, cross = (logits(adapters[method, "sw"]) for method in ("adamergex", "adamergex-cross"))
    assert torch.isfinite(own).all() and torch.isfinite(cross).all()
    assert not torch.equal(own, cross), "the two rules are not the same"
    how = json.loads((adapters["adamergex", "sw"] / "lingraft.json").read_text())
    assert (how["family"], how["provenance"]["how"], how["provenance"]["weight"]) == (structure, "transfer", 0.5)


def test_a_method_that_a_structure_has_not_is_refused_before_anything_runs(tmp_path: Path, tiny_folder: Path) -> None:
    path = make_experiment(tmp_path, tiny_folder)
    with pytest.raises(UserError, match="'ia3' has no space 'product'"):
        run(load_experiment(path, ["adapter={family: ia3}"]), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.full
def test_the_benchmark_of_merges_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "merge.py"
    subprocess.run(
        [sys.executable, script, "--quick", "--disk", tmp_path, "--memory", tmp_path, "--out", tmp_path / "merge.json"],
        check=True,
        capture_output=True,
    )
    found = json.loads((tmp_path / "merge.json").read_text())
    assert found["weight_in_place"]["largest_difference_to_the_merge"] < 1e-6
