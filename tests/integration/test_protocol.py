"""The real pipeline with projected labels, weights chosen without labels, AriMerge, groups, and fewer seeds of a method."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from lingraft.adapter import Adapter
from lingraft.backbones import Backbone
from lingraft.config import Experiment, load_experiment
from lingraft.errors import DataError, RunFailed, UserError
from lingraft.evaluation import predict, text_log_likelihood
from lingraft.locating import locate
from lingraft.merging import Graft, divergence_of
from lingraft.plan import Plan, Step
from lingraft.predictions import read_predictions
from lingraft.report.results import results
from lingraft.report.tables import markdown
from lingraft.report.terminal import show_tuning
from lingraft.report.tuning import tuning
from lingraft.runner import Events, run, tune
from lingraft.store import Store, read_json
from tests.integration.test_pipeline import make_experiment

METHODS = (
    "vanilla", "eng-ft", "tgt-ft", "arimerge", "projection", "projection-graft", "adamergex-projected",
    "control-projected-other", "adamergex:entropy", "projection-graft:likelihood", "adamergex-product:norms",
)  # fmt: skip
OVERRIDES = (
    f"methods=[{', '.join(METHODS)}]",
    "projection={confidence: 0.0, per_label: 3}",
    "seeds_of={tgt-ft: [1]}",
    "groups={first: [sw], both: [sw, de]}",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("protocol")
    run(experiment_in(folder, tiny_folder), folder / "out")
    return folder


def experiment_in(folder: Path, model: Path, *more: str) -> Experiment:
    path = folder / "tiny.yaml"
    return load_experiment(path if path.exists() else make_experiment(folder, model), (*OVERRIDES, *more))


@pytest.fixture(scope="module")
def plan(finished: Path, tiny_folder: Path) -> Plan:
    return run(experiment_in(finished, tiny_folder), finished / "out").plan


@pytest.fixture(scope="module")
def found(finished: Path) -> dict[str, Any]:
    return results(finished / "out")


def folder_of(finished: Path, step: Step) -> Path:
    return Store(finished / "store").path(step.kind, step.key)


def test_every_method_has_its_numbers(found: dict[str, Any]) -> None:
    assert tuple(found["methods"]) == METHODS
    for name, method in found["methods"].items():
        seeds = 1 if name in ("vanilla", "tgt-ft") else 2
        assert {len(cell["by_seed"]) for cell in method["languages"].values()} == {seeds}
        assert set(method["groups"]) == {"first", "both"}
        assert method["groups"]["both"] == method["average"]
        assert method["groups"]["first"]["value"] == method["languages"]["sw"]["value"]
    text = markdown(found)
    assert "average of first" in text and "λ chosen without labels" in text and "Tgt-FT: 1 seed" in text


def test_projected_labels_are_what_the_task_adapter_says_of_the_source_lines(
    finished: Path, plan: Plan, tiny_folder: Path
) -> None:
    step = next(s for s in plan.steps if s.kind == "project" and s.inputs["adapter"].config["seed"] == 0)
    labels = read_json(folder_of(finished, step) / "labels.json")
    lines = (finished / "data/en.txt").read_text(encoding="utf-8").split("\n")
    experiment = experiment_in(finished, tiny_folder)
    from lingraft.tasks.table import find_task

    items = find_task("kind", experiment.tasks).of_text(lines)
    said = predict(
        Backbone(locate(experiment.backbone)), Adapter.load(folder_of(finished, step.inputs["adapter"])), items
    )
    assert labels["lines"] == 8 and 0 < len(labels["labels"]) <= 6
    assert all(said[line].answer == label for line, label in labels["labels"])
    assert max(labels["counts"].values()) <= 3


def test_a_projected_adapter_goes_on_from_the_task_adapter(finished: Path, plan: Plan) -> None:
    trained = [s for s in plan.steps if s.kind == "train" and "projected" in s.config]
    # Three languages by target, development and source; two seeds.
    assert sorted(s.config["language"] for s in trained) == ["de", "de", "en", "en", "id", "id", "sw", "sw"]
    for step in trained:
        assert step.inputs["start_from"] is step.inputs["labels"].inputs["adapter"]
        ours, start = (Adapter.load(folder_of(finished, s)) for s in (step, step.inputs["start_from"]))
        name = ours.modules[0]
        assert not np.array_equal(ours.site(name).tensors["B"], start.site(name).tensors["B"])


def test_a_grafted_projection_at_weight_one_is_the_projection(finished: Path, plan: Plan) -> None:
    row = next(c for c in plan.cells if c.method == "projection" and c.language == "sw" and c.seed == 0)
    assert row.adapter is not None
    projected, task = (folder_of(finished, s) for s in (row.adapter, row.adapter.inputs["start_from"]))
    merged = Graft(1.0, space="product").onto(Adapter.load(task), divergence_of(projected, task)[0])
    for module in merged.modules:
        a, b = merged.site(module), Adapter.load(projected).site(module)
        left, right = (x.scaling * x.tensors["B"].astype(float) @ x.tensors["A"].astype(float) for x in (a, b))
        np.testing.assert_allclose(left, right, atol=1e-6)


def test_entropy_chooses_the_least_undecided_weight_and_reads_no_label(finished: Path, plan: Plan) -> None:
    select = plan.selections["adamergex:entropy", "sw"]
    chosen = read_json(folder_of(finished, select) / "selected.json")
    entropies: dict[float, list[float]] = {}
    for role, step in select.inputs.items():
        assert role.split("/")[1:3] == ["sw", "validation"]
        for p in read_predictions(folder_of(finished, step.inputs["predict"])):
            shares = np.exp(p.scores) / np.exp(p.scores).sum()
            entropies.setdefault(float(role.split("/")[0]), []).append(-float((shares * np.log(shares)).sum()))
    means = {weight: sum(values) / len(values) for weight, values in entropies.items()}
    assert chosen["weight"] == min(means, key=means.__getitem__)
    assert {p["weight"]: pytest.approx(p["entropy"]) for p in chosen["curve"]} == means


def test_the_ratio_of_norms_makes_what_is_added_as_large_as_the_task(finished: Path, plan: Plan) -> None:
    select = plan.selections["adamergex-product:norms", "de"]
    chosen = read_json(folder_of(finished, select) / "selected.json")
    merge = next(c for c in plan.cells if c.method == "adamergex-product:norms" and c.language == "de" and c.seed == 0)
    assert merge.adapter is not None
    task, target, source = (
        Adapter.load(folder_of(finished, merge.adapter.inputs[r])) for r in ("task", "target_ref", "source_ref")
    )

    def update(adapter: Adapter, module: str) -> np.ndarray[Any, Any]:
        site = adapter.site(module)
        return site.scaling * site.tensors["B"].astype(float) @ site.tensors["A"].astype(float)

    size = math.sqrt(sum(float((update(task, m) ** 2).sum()) for m in task.modules))
    between = math.sqrt(sum(float(((update(target, m) - update(source, m)) ** 2).sum()) for m in task.modules))
    assert chosen["ratios"][0] == pytest.approx(size / between, rel=1e-5)
    assert chosen["weight"] == pytest.approx(min(1.0, sum(chosen["ratios"]) / 2))


def test_arimerge_falls_back_to_eng_ft_at_one(plan: Plan) -> None:
    select = plan.selections["arimerge", None]
    assert select.config["weights"] == [0.5, 1.0]
    for role, step in select.inputs.items():
        graft = step.inputs["predict"].config["graft"]
        assert (graft is None) == role.startswith("1.0/")
        assert graft is None or graft["rule"] == "arimerge"


def test_the_likelihood_of_text_is_that_of_every_token(tiny_folder: Path, finished: Path) -> None:
    backbone = Backbone(locate(experiment_in(finished, tiny_folder).backbone))
    texts = ["mto mlima kisiwa", "bao", "mchezo timu mto bao timu"]
    value, tokens = text_log_likelihood(backbone, None, texts, batch=2)
    expected: list[float] = []
    for text in texts:
        ids = torch.tensor([[*backbone.prefix, *backbone.encode(text)]])
        with torch.no_grad():
            table = torch.log_softmax(backbone.model(input_ids=ids).logits[0].float(), dim=-1)
        expected += [float(table[n, i]) for n, i in enumerate(ids[0, 1:].tolist())]
    assert tokens == len(expected)
    assert value == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    with pytest.raises(DataError, match="no text"):
        text_log_likelihood(backbone, None, [])


def test_text_that_is_not_parallel_is_said_before_the_first_training(tmp_path: Path, tiny_folder: Path) -> None:
    experiment = experiment_in(tmp_path, tiny_folder)
    with (tmp_path / "data/de.txt").open("a", encoding="utf-8") as file:
        file.write("\nfluss")
    with pytest.raises(DataError, match=r"not parallel.*9 lines in German"):
        run(experiment, tmp_path / "out")
    assert not (tmp_path / "store").exists()


def test_projection_that_trusts_nothing_says_so(tmp_path: Path, tiny_folder: Path) -> None:
    experiment = experiment_in(
        tmp_path, tiny_folder, "projection.confidence=1", "methods=[eng-ft, projection]", "seeds_of={}"
    )
    told: list[str] = []
    with pytest.raises(RunFailed):
        run(experiment, tmp_path / "out", events=Events(failure=lambda step, error: told.append(str(error))))
    assert len(told) == 2 and all(
        "sure of no line's label" in said and "lower projection.confidence" in said for said in told
    )


def test_tuning_reads_no_target_and_agrees_with_the_run(
    finished: Path, found: dict[str, Any], tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = experiment_in(tmp_path, tiny_folder)
    for language in ("sw", "de"):  # Planning asks that they exist, tuning never opens them.
        (tmp_path / f"data/{language}/test.jsonl").write_text("not a row\n", encoding="utf-8")
    plan, store = tune(experiment, tmp_path / "store")
    made = [read_json(p) for p in (tmp_path / "store").glob("*/*/step.json")]
    assert {r["config"]["language"] for r in made if "split" in r["config"]} == {"en", "id"}
    curves = tuning(plan, store)
    assert set(curves) == {n for n, s in found["selections"].items() if "by_language" not in s}
    for name, curve in curves.items():
        chosen = found["selections"][name]
        assert curve["chosen"] == chosen["weight"]
        for ours, theirs in zip(curve["points"], chosen["curve"], strict=True):
            assert ours["gold_log_likelihood"] == pytest.approx(theirs["gold_log_likelihood"])
            assert ours["accuracy"] == pytest.approx(theirs["accuracy"])
            assert ours["interval"][0] - 1e-9 <= ours["difference"] <= ours["interval"][1] + 1e-9
    show_tuning(curves, {name: name for name in curves}, Console(width=200))
    assert "Eng-FT" in capsys.readouterr().out
    with pytest.raises(UserError, match="no weight to choose"):
        tune(experiment_in(tmp_path, tiny_folder, "methods=[vanilla]", "seeds_of={}"), tmp_path / "store")
