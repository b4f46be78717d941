"""Where figures come from: a YAML that runs again, hashes, data, and nothing of where anything lies on a machine."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft.config import Experiment, load_experiment
from lingraft.report.provenance import command, experiment_yaml, provenance
from lingraft.report.readings import harmless
from lingraft.report.results import results
from lingraft.store import SEAL, read_json, write_json
from tests.unit.test_report import make_run
from tests.unit.test_trainings import TASK, key, with_steps

ROOT = Path(__file__).parents[2]
PLAIN: dict[str, Any] = {
    "name": "plain",
    "backbone": {"model": "demo"},
    "task": "topics",
    "targets": ["sw", "no"],
    "data_dir": "bundled",
}


def again(folder: Path, experiment: Experiment) -> Experiment:
    path = folder / "again.yaml"
    path.write_text(experiment_yaml(experiment.model_dump(mode="json")), encoding="utf-8")
    return load_experiment(path)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_comes_back(tmp_path: Path, path: Path):
    experiment = load_experiment(path)
    found = again(tmp_path, experiment)
    places = {"data_dir", "reference"}
    assert found.model_dump(exclude=places) == experiment.model_dump(exclude=places)
    assert found.reference.model_copy(update={"data_dir": None}) == experiment.reference.model_copy(
        update={"data_dir": None}
    )


@given(
    note=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40),
    rate=st.floats(1e-9, 1, exclude_min=True),
    epochs=st.floats(0, 100),
    text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
)
@settings(max_examples=40, deadline=None)
def test_any_text_and_number_comes_back(
    tmp_path_factory: pytest.TempPathFactory, note: str, rate: float, epochs: float, text: str
):
    training = {"learning_rate": rate, "epochs": epochs}
    task = {"files": {"test": "x.tsv"}, "prompt": f"{text}{{text}}", "labels": {"no": "yes", "1": text, "2e-4": "on"}}
    experiment = Experiment.model_validate(
        {**PLAIN, "note": note, "training": training, "reference_training": {}, "tasks": {"own": task}}
    )
    assert again(tmp_path_factory.mktemp("yaml"), experiment) == experiment


def test_what_a_protocol_filled_in_comes_back_also_where_it_was_emptied(tmp_path: Path):
    values = {**PLAIN, "protocol": "low-high", "targets": ["sw"], "development": [], "groups": {}}
    experiment = Experiment.model_validate(values)
    assert again(tmp_path, experiment) == experiment


def test_that_code_is_run_is_said_in_the_command_and_not_in_the_file(tmp_path: Path):
    experiment = Experiment.model_validate({**PLAIN, "backbone": {"model": "a/b", "trust_remote_code": True}})
    values = experiment.model_dump(mode="json")
    assert not again(tmp_path, experiment).backbone.trust_remote_code
    assert command(values) == "lingraft run plain.yaml --out runs/plain backbone.trust_remote_code=true"
    assert load_experiment(tmp_path / "again.yaml", [command(values).split()[-1]]) == experiment


def test_paths_from_the_root_become_names_and_this_is_said(tmp_path: Path):
    values = Experiment.model_validate(
        {
            **PLAIN,
            "backbone": {"model": "/home/ann/models/tiny"},
            "data_dir": "/home/ann/data",
            "reference": {"text": "{language}.txt", "unit": "line", "data_dir": "C:\\ann\\text"},
            "tasks": {"own": {"files": {"test": "/home/ann/x.tsv"}, "prompt": "/think {t}", "labels": ["/a", "b"]}},
        }
    ).model_dump(mode="json")
    text = experiment_yaml(values)
    assert "ann" not in text
    assert text.startswith("# data_dir was a path of the machine it ran on")
    path = tmp_path / "x.yaml"
    path.write_text(text)
    found = load_experiment(path)
    assert found.backbone.model == "tiny"
    assert found.data_dir == str(tmp_path / "data")
    assert found.tasks["own"].files == {"test": "x.tsv"}
    # What only looks like a path is none.
    assert found.tasks["own"].prompt == "/think {t}"
    assert found.tasks["own"].labels == ("/a", "b")


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for k, v in value.items() for text in (*strings(k), *strings(v))]
    if isinstance(value, list):
        return [text for v in value for text in strings(v)]
    return [value] if isinstance(value, str) else []


def test_no_absolute_path_leaves_the_machine(tmp_path: Path):
    run = make_run(tmp_path, data_dir=str(tmp_path / "data"), backbone={"model": str(tmp_path / "model")})
    steps = [
        (
            "train",
            {
                **TASK,
                "label": f"train {tmp_path}/topics en",
                "environment": {"device": "cpu", "cuda": "/usr/local/cuda-12", "where": "C:\\Users\\ann"},
                "reads": {"backbone": "folder:1", "rows": "abc"},
            },
            "{}",
        ),
        (
            "translate",
            {"config": {"task": "topics", "model": str(tmp_path / "nllb")}, "reads": {"model": "folder:2"}},
            None,
        ),
    ]
    with_steps(run, steps)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["backbone"] = {"name": str(tmp_path / "model"), "digest": "folder:1"}
    write_json(run / "manifest.json", manifest)
    found = provenance(run, results(run))
    for text in strings(found):
        assert str(tmp_path) not in text
        assert not re.search(r"(^|[\s:=])(/(tmp|usr|home|root)|[A-Z]:\\)", text), text
    assert found["backbone"]["name"] == "model"
    assert found["environment"] == {"cuda": "cuda-12", "device": "cpu", "where": "ann"}
    assert {"name": "translation model nllb", "digest": "folder:2"} in found["data"]


def test_steps_have_the_hash_of_their_main_file_or_of_their_record(tmp_path: Path):
    run = with_steps(make_run(tmp_path), [("train", TASK, "{}"), ("merge", {"label": "merge"}, None)])
    predicted = json.loads((run / "manifest.json").read_text())["cells"][0]["predict"]
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["steps"].append(predicted)
    write_json(run / "manifest.json", manifest)
    train, merge, predict = provenance(run, results(run))["steps"]
    seal = read_json(run / "store" / "train" / key(0) / "step.json")[SEAL]
    assert train == {"kind": "train", "label": TASK["label"], "key": key(0), "sha256": seal, "files": 1}
    assert merge["files"] == 0
    files = read_json(run / "store" / predicted / "step.json")["files"]
    assert predict["sha256"] == files["predictions.jsonl"]
    assert predict["files"] == len(files)


def test_data_are_named_by_what_they_are_each_once(tmp_path: Path):
    rows = {**TASK, "config": {**TASK["config"], "split": "train"}, "reads": {"backbone": "b", "rows": "1"}}
    text = {"config": {"reference": {"task": "clm"}, "language": "sw"}, "reads": {"backbone": "b", "text": "2"}}
    run = with_steps(make_run(tmp_path), [("train", rows, None), ("train", rows, None), ("train", text, None)])
    assert provenance(run, results(run))["data"] == [
        {"name": "topics en train", "digest": "1"},
        {"name": "reference text, sw", "digest": "2"},
    ]


def test_an_experiment_of_another_version_is_shown_as_it_is(tmp_path: Path):
    run = with_steps(make_run(tmp_path, invented={"key": [1]}), [])
    found = provenance(run, results(run))
    assert "invented" in found["experiment_yaml"]
    assert found["run"]["name"] == "by-hand"
    assert found["command"] == "lingraft run by-hand.yaml --out runs/by-hand"
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("train on (/home/me/model)", "train on (model)"),
        ("read '/data/x y'", "read 'x y'"),
        ('"C:\\\\me\\\\m"; ~/n', '"m"; n'),
        ("file:///home/me/x", "x"),
        ("clm, 1/2 of s3://bucket/x", "clm, 1/2 of s3://bucket/x"),
    ],
)
def test_no_text_says_where_anything_lies_on_a_machine(text: str, left: str):
    assert harmless(text) == left
