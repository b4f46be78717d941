"""MAD-X and LF-SFT from experiment to report on tiny models: what stands on what, grafted languages, and sparse AdaMergeX."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingraft.adapter import Adapter
from lingraft.backbones import Backbone
from lingraft.config import load_experiment
from lingraft.errors import UserError
from lingraft.evaluation import predict
from lingraft.locating import locate
from lingraft.plan import Step, make_plan
from lingraft.report.results import results
from lingraft.report.tables import markdown
from lingraft.report.tuning import tuning, tuning_table
from lingraft.runner import run, tune
from lingraft.stacks import is_stack, load_stack, parts_of
from lingraft.store import Store, read_json
from lingraft.tasks.table import find_task
from tests.conftest import save_tiny_model
from tests.integration.test_pipeline import make_experiment

METHODS = ("eng-ft", "adamergex", "madx", "lfsft", "madx-graft", "lfsft-graft")
SMALL = (
    f"methods=[{', '.join(METHODS)}]",
    "seeds=[0]",
    "selection.weights=[0.5]",
    "madx={language_reduction: 2, task_reduction: 4}",
    "lfsft={language_entries: 300, task_entries: 500, l1: 0.1, first_epochs: 1, reference_first_epochs: 1}",
    "lfsft.training={learning_rate: 0.001, epochs: 1, batch_size: 4, clip: 1.0, max_length: 64}",
    "lfsft.reference_training={learning_rate: 0.001, epochs: 1, batch_size: 4, clip: 1.0, max_length: 64}",
)
MLM = ("reference={task: mlm, text: '{language}.txt', unit: line, segment_tokens: 32}",)


def models(folder: Path, kind: str) -> Path:
    return save_tiny_model(folder / kind, {"decoder": "llama", "encoder": "xlm-roberta"}[kind])


@pytest.fixture(scope="module", params=["decoder", "encoder"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of an experiment that has been carried out, into `out` and `store`, and its overrides."""
    folder = tmp_path_factory.mktemp(request.param)
    path = make_experiment(folder, models(folder, request.param))
    overrides = [*SMALL, *(MLM if request.param == "encoder" else ())]
    run(load_experiment(path, overrides), folder / "out")
    return folder, overrides


def planned(folder: Path, overrides: Sequence[str]) -> tuple[Any, Any]:
    experiment = load_experiment(folder / "tiny.yaml", overrides)
    located = locate(experiment.backbone)
    return make_plan(experiment, located), located


def place(folder: Path, step: Step) -> Path:
    return Store(folder / "store").path(step.kind, step.key)


def said(folder: Path, step: Step) -> str:
    return (place(folder, step) / "predictions.jsonl").read_text(encoding="utf-8")


def tensors(folder: Path) -> dict[str, bytes]:
    """An adapter's numbers, to the last bit."""
    return {name: value.tobytes() for name, value in Adapter.load(folder).tensors()}


def test_every_number_of_the_table_is_there(finished: tuple[Path, list[str]]) -> None:
    found = results(finished[0] / "out")
    assert tuple(found["methods"]) == METHODS
    for name, row in found["methods"].items():
        source = {"en"} if name in ("eng-ft", "madx", "lfsft") else set()
        assert set(row["languages"]) == source | {"sw", "de"}
        assert row["average"] is not None and (name == "eng-ft" or "difference" in row["average"])
    assert set(found["selections"]) == {"adamergex", "madx-graft", "lfsft-graft"}
    curves = {name: [p["weight"] for p in found["selections"][name]["curve"]] for name in found["selections"]}
    assert curves == {"adamergex": [0, 0.5], "madx-graft": [0, 0.5, 1], "lfsft-graft": [0, 0.5, 1]}
    head = markdown(found).split("\n\n")[2].splitlines()[2:]
    titles = ["MAD-X", "LF-SFT", "MAD-X, grafted languages", "LF-SFT, grafted languages"]
    assert [line.split(" | ")[0].removeprefix("| ") for line in head][2:] == titles
    # Two references of the experiment's own structure were compared, no language adapters.
    assert len(found["references"]) == 2


def test_what_was_trained_lies_where_it_should(finished: tuple[Path, list[str]]) -> None:
    folder, overrides = finished
    plan, _ = planned(folder, overrides)
    structures: dict[str, list[str]] = {}
    for step in plan.steps:
        if step.kind in ("train", "merge"):
            where = place(folder, step)
            structures[step.label.replace(" mlm ", " clm ")] = [Adapter.load(p).structure for p in parts_of(where)]
            assert is_stack(where) == (len(structures[step.label.replace(" mlm ", " clm ")]) == 2)
    for language in ("en", "sw", "de", "id"):
        assert structures[f"train madx clm {language} seed 0"] == ["invertible", "bottleneck"]
        assert structures[f"train lfsft clm {language} seed 0"] == ["sparse"]
    assert structures["train madx kind en seed 0"] == ["bottleneck"]
    assert structures["train lfsft kind en seed 0"] == ["sparse"]
    assert structures["merge madx-graft sw seed 0"] == ["invertible", "bottleneck"]
    assert structures["merge lfsft-graft sw seed 0"] == ["sparse"]


def test_a_second_run_does_nothing(finished: tuple[Path, list[str]]) -> None:
    folder, overrides = finished
    outcome = run(load_experiment(folder / "tiny.yaml", overrides), folder / "out")
    assert outcome.ran == 0 and outcome.kept == len(outcome.plan.steps)


@pytest.mark.parametrize("stack", ["madx", "lfsft"])
def test_the_target_s_language_adapter_lies_beneath_the_task_s(finished: tuple[Path, list[str]], stack: str) -> None:
    folder, overrides = finished
    plan, located = planned(folder, overrides)
    cell = next(c for c in plan.cells if (c.method, c.language) == (stack, "sw"))
    beneath, task = (place(folder, cell.predict.inputs[role]) for role in ("beneath", "adapter"))
    source = place(folder, cell.predict.inputs["adapter"].inputs["beneath"])
    kind = find_task("kind", plan.experiment.tasks)
    items = kind.examples(kind.sources("sw", "test", folder / "data"), language="sw", prompt=plan.experiment.prompt)
    backbone = Backbone(located)
    scores = {
        name: np.array([p.scores for p in predict(backbone, load_stack(paths), items, max_length=64)])
        for name, paths in {"target": [beneath, task], "source": [source, task]}.items()
    }
    stored = [json.loads(line)["scores"] for line in said(folder, cell.predict).splitlines()]
    assert np.allclose(scores["target"], stored, atol=1e-4)
    # It matters what lies there: on another language's the model says something else.
    assert not np.allclose(scores["source"], scores["target"], atol=1e-4)


@pytest.mark.parametrize("stack", ["madx", "lfsft"])
def test_a_graft_of_weight_one_is_the_method_itself_and_of_zero_the_source_s(
    finished: tuple[Path, list[str]], stack: str, tmp_path: Path
) -> None:
    folder, overrides = finished
    made: dict[float, str] = {}
    for weight in (0.0, 1.0):
        changed = [*overrides, f"methods=[{stack}, {stack}-graft]", f"selection={{weight: {weight}}}"]
        store = folder / "store"
        run(load_experiment(folder / "tiny.yaml", changed), tmp_path / f"out{weight:g}", store=store)
        plan, _ = planned(folder, changed)
        cell = next(c for c in plan.cells if (c.method, c.language) == (f"{stack}-graft", "sw"))
        ends = {1.0: "target_ref", 0.0: "source_ref"}
        assert cell.adapter is not None
        for part, own in zip(
            parts_of(place(folder, cell.adapter)),
            parts_of(place(folder, cell.adapter.inputs[ends[weight]])),
            strict=True,
        ):
            assert tensors(part) == tensors(own)
        made[weight] = said(folder, cell.predict)
    direct = next(c for c in planned(folder, overrides)[0].cells if (c.method, c.language) == (stack, "sw"))
    assert made[1.0] == said(folder, direct.predict) != made[0.0]


@pytest.mark.parametrize("stack", ["madx", "lfsft"])
def test_halfway_every_part_is_the_mean_of_both(finished: tuple[Path, list[str]], stack: str, tmp_path: Path) -> None:
    folder, overrides = finished
    changed = [*overrides, f"methods=[{stack}-graft]", "selection={weight: 0.5}", "targets=[sw]"]
    run(load_experiment(folder / "tiny.yaml", changed), tmp_path / "out", store=folder / "store")
    merge = planned(folder, changed)[0].cells[0].adapter
    assert merge is not None
    folders = [
        parts_of(place(folder, step)) for step in (merge, merge.inputs["target_ref"], merge.inputs["source_ref"])
    ]
    compared = 0
    for part in zip(*folders, strict=True):
        merged, target, source = map(Adapter.load, part)
        assert merged.sidecar["provenance"]["weight"] == 0.5
        for module in merged.modules:
            if stack == "lfsft":
                half, t, s = (dense(adapter, module) for adapter in (merged, target, source))
                assert np.allclose(half, (t + s) / 2, atol=1e-6)
                compared += 1
                continue
            for role, value in merged.site(module).tensors.items():
                mean = (target.site(module).tensors[role] + source.site(module).tensors[role]) / 2
                assert np.allclose(value, mean, atol=1e-6)
                compared += 1
    assert compared > 2


def dense(adapter: Adapter, module: str) -> Any:
    """A sparse difference's numbers in place; zeros where it has no such site."""
    if module not in adapter.layout:
        return 0.0
    site = adapter.site(module).tensors
    found = np.zeros(int(np.prod(site["shape"])), np.float32)
    found[site["indices"]] = site["values"]
    return found


def test_the_curves_of_grafted_languages_start_at_the_source_s(
    finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, overrides = finished
    experiment = load_experiment(folder / "tiny.yaml", [*overrides, "methods=[madx-graft]"])
    plan, store = tune(experiment, folder / "store")
    curves = tuning(plan, store)
    header, rows = tuning_table(curves, {"madx-graft": "MAD-X, grafted languages"})
    assert header[3] == "against source's"
    assert [row[1] for row in rows] == ["0", "0.5", "1"]
    assert rows[0][-1].split()[0] == "source's" and sum("chosen" in row[-1] for row in rows) == 1
    both = tune(
        load_experiment(folder / "tiny.yaml", [*overrides, "methods=[adamergex, madx-graft]"]), folder / "store"
    )
    assert tuning_table(tuning(*both), dict.fromkeys(METHODS, "x"))[0][3] == "against Eng-FT or source's"


def test_a_weight_without_labels(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, overrides = finished
    changed = [*overrides, "methods=[madx, 'lfsft-graft:entropy', 'madx-graft:entropy']", "development=[]"]
    run(load_experiment(folder / "tiny.yaml", changed), tmp_path / "out", store=folder / "store")
    found = results(tmp_path / "out")
    for name in ("lfsft-graft:entropy", "madx-graft:entropy"):
        chosen = found["selections"][name]["by_language"]
        assert set(chosen) == {"sw", "de"}
        for selection in chosen.values():
            assert selection["weight"] == min(selection["curve"], key=lambda p: (p["entropy"], p["weight"]))["weight"]


def test_adamergex_on_sparse_differences(tmp_path: Path, tiny_folder: Path) -> None:
    path = make_experiment(tmp_path, tiny_folder)
    changed = [
        "adapter={family: sparse, entries: 400, first_epochs: 1}",
        "training={learning_rate: 0.001, epochs: 1, batch_size: 4, clip: 1.0, max_length: 64}",
        "methods=[eng-ft, adamergex, control-add]",
        "seeds=[0]",
        "selection={weight: 0.5}",
    ]
    run(load_experiment(path, changed), tmp_path / "out")
    found = results(tmp_path / "out")
    assert {name: set(row["languages"]) for name, row in found["methods"].items()} == {
        "eng-ft": {"en", "sw", "de"},
        "adamergex": {"sw", "de"},
        "control-add": {"sw", "de"},
    }
    assert all(entry["cosine"] is not None for entry in found["references"])
    merge = next(
        c.adapter for c in planned(tmp_path, changed)[0].cells if (c.method, c.language) == ("adamergex", "sw")
    )
    assert merge is not None
    parts = {role: Adapter.load(place(tmp_path, merge.inputs[role])) for role in ("task", "target_ref", "source_ref")}
    merged = Adapter.load(place(tmp_path, merge))
    assert merged.modules
    for module in merged.modules:
        task, target, source = (dense(parts[role], module) for role in ("task", "target_ref", "source_ref"))
        assert np.allclose(dense(merged, module), task + 0.5 * (target - source), atol=1e-6)


def test_modules_that_are_not_there_are_said_before_anything_is_trained(tmp_path: Path, tiny_folder: Path) -> None:
    path = make_experiment(tmp_path, tiny_folder)
    with pytest.raises(UserError, match="no_such"):
        run(load_experiment(path, ["methods=[lfsft]", "lfsft.modules=[no_such]"]), tmp_path / "out")
    assert not list((tmp_path / "store").rglob("step.json"))


def test_the_adapters_of_a_graft_are_given_to_the_user(finished: tuple[Path, list[str]]) -> None:
    given = {(a["method"], a["language"]): Path(a["path"]) for a in results(finished[0] / "out")["adapters"]}
    assert {name for name, _ in given} == {"adamergex", "madx-graft", "lfsft-graft"}
    assert [a.structure for a in load_stack([given["madx-graft", "sw"]])] == ["invertible", "bottleneck"]
    assert read_json(given["madx-graft", "sw"] / "lingraft.json")["provenance"]["how"] == "transfer"
