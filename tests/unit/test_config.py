"""Experiments as values: what YAML means, and what each mistake is told."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lingraft.config import (
    AdapterConfig,
    CustomTask,
    Experiment,
    SelectionConfig,
    TrainingConfig,
    epochs_read,
    load_experiment,
    parse_override,
    parse_yaml,
    validated,
)
from lingraft.errors import ConfigError

YAML = """
name: small
backbone: some-model
task: topics
targets: [sw, "no"]
development: [tr]
reference: {text: "udhr/{language}.txt"}
training: {learning_rate: 5e-4, epochs: 2}
data_dir: bundled
"""


def written(folder: Path, text: str = YAML) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def tree(**changes: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "backbone": "some-model",
        "task": "topics",
        "targets": ["sw", "vi"],
        "development": ["tr"],
        "reference": {"text": "udhr/{language}.txt"},
    } | changes


def refusal(**changes: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        validated(Experiment, tree(**changes))
    return caught.value


def test_an_experiment_is_read_from_yaml_with_defaults_for_the_rest(tmp_path: Path):
    experiment = load_experiment(written(tmp_path))
    assert experiment.targets == ("sw", "no")
    assert experiment.source == "en"
    assert experiment.training.learning_rate == 5e-4
    assert experiment.training.batch_size == TrainingConfig().batch_size
    assert experiment.seeds == (0,)


def test_overrides_replace_values_at_any_depth(tmp_path: Path):
    overrides = ["training.epochs=1", "targets=[vi, de]", "adapter.rank=4", "selection.weights=[1, 5e-1]", "source=de"]
    with pytest.raises(ConfigError, match="source language 'de'"):
        load_experiment(written(tmp_path), overrides)
    experiment = load_experiment(written(tmp_path), overrides[:-1])
    assert experiment.training.epochs == 1
    assert experiment.training.learning_rate == 5e-4
    assert experiment.targets == ("vi", "de")
    assert experiment.adapter.rank == 4
    assert experiment.selection.weights == (0.5, 1.0)


def test_the_later_of_two_overrides_wins(tmp_path: Path):
    assert load_experiment(written(tmp_path), ["task=xcopa", "task=topics", "name=a", "name=b"]).name == "b"


def test_an_absent_reference_training_is_the_training(tmp_path: Path):
    path = written(tmp_path)
    assert load_experiment(path).reference_values == load_experiment(path).training
    changed = load_experiment(path, ["reference_training.epochs=7"])
    assert (changed.reference_values.epochs, changed.training.epochs) == (7, 2)


@pytest.mark.parametrize("text", ["targets", "=3", "targets=[sw", "name={"])
def test_an_override_that_cannot_be_read_is_named(text: str):
    with pytest.raises(ConfigError) as caught:
        parse_override(text)
    assert f"'{text}'" in caught.value.what
    assert caught.value.remedy


def test_a_misspelt_key_names_the_nearest_right_key(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        load_experiment(written(tmp_path, YAML.replace("targets:", "tragets:")))
    assert "unknown key 'tragets'" in caught.value.what
    assert "missing key 'targets'" in caught.value.what
    assert caught.value.remedy == "did you mean 'targets'?"
    assert caught.value.where == str(tmp_path / "experiment.yaml")


@pytest.mark.parametrize(
    ("override", "key", "right"),
    [
        ("training.learning_rat=1", "training.learning_rat", "learning_rate"),
        ("reference_training.epoch=1", "reference_training.epoch", "epochs"),
        ("selection.weigths=[1]", "selection.weigths", "weights"),
        ("adapter.alfa=1", "adapter.alfa", "alpha"),
        ("backbone.dtpe=float32", "backbone.dtpe", "dtype"),
        ("tasks.mine={files: {test: x.tsv}, promt: x, prompt: x, labels: [a, b]}", "tasks.mine.promt", "prompt"),
    ],
)
def test_a_misspelt_nested_key_names_the_nearest_right_key(tmp_path: Path, override: str, key: str, right: str):
    with pytest.raises(ConfigError) as caught:
        load_experiment(written(tmp_path), [override])
    assert f"unknown key '{key}'" in caught.value.what
    assert caught.value.remedy == f"did you mean '{right}'?"


def test_a_key_like_no_other_is_answered_with_all_the_keys():
    error = refusal(merge={"zzz": 1})
    assert error.remedy == "use one of: modules, out_rank"


def test_all_mistakes_are_named_at_once():
    error = refusal(tragets=[], training={"epochs": -1, "batch_size": 0}, adapter={"rank": 0}, name="a b")
    for key in ("tragets", "training.epochs", "training.batch_size", "adapter.rank", "name"):
        assert key in error.what


@pytest.mark.parametrize("text", ["5e-4", "5.0e-4", "5.e-4", "+5e-4", "0.0005", ".5e-3"])
def test_every_way_to_write_a_float_is_a_float(text: str):
    assert parse_yaml(text) == 5e-4


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_python_and_json_floats_are_read_as_themselves(value: float):
    read = parse_yaml(repr(value))
    assert isinstance(read, float)
    assert read == value


@pytest.mark.parametrize("word", ["no", "NO", "yes", "on", "off", "y", "n"])
def test_words_that_are_not_true_or_false_stay_words(word: str):
    assert parse_yaml(f"[{word}]") == [word]


def test_norwegian_is_a_language(tmp_path: Path):
    assert load_experiment(written(tmp_path, YAML.replace('"no"', "no"))).targets == ("sw", "no")


def test_true_and_false_are_booleans():
    assert parse_yaml("[true, false, True, False]") == [True, False, True, False]


def test_yaml_builds_plain_values_only(tmp_path: Path):
    with pytest.raises(ConfigError, match="this is not YAML"):
        load_experiment(written(tmp_path, "name: !!python/object/apply:os.getcwd []\n"))


def test_a_backbone_may_be_given_by_its_name_alone():
    experiment = validated(Experiment, tree())
    assert experiment.backbone.model == "some-model"
    assert experiment.backbone.dtype == "bfloat16"


def test_a_part_of_a_backbone_given_by_its_name_can_be_overridden(tmp_path: Path):
    backbone = load_experiment(written(tmp_path), ["backbone.dtype=float32", "backbone.device=cpu"]).backbone
    assert (backbone.model, backbone.dtype, backbone.device) == ("some-model", "float32", "cpu")


def test_a_target_language_cannot_be_tuned_on():
    assert "must not be tuned on a test language" in refusal(development=["vi"]).what


@pytest.mark.parametrize("where", ["targets", "development"])
def test_the_source_language_is_neither_target_nor_development(where: str):
    assert "the source language 'en'" in refusal(**{where: ["en", "th"]}).what


@pytest.mark.parametrize(
    ("name", "values"), [("targets", ["sw", "sw"]), ("development", ["tr", "tr"]), ("seeds", [1, 1])]
)
def test_duplicates_are_refused(name: str, values: list[Any]):
    assert f"'{name}' names something twice" in refusal(**{name: values}).what


@pytest.mark.parametrize("name", ["targets", "seeds"])
def test_empty_lists_are_refused(name: str):
    assert name in refusal(**{name: []}).what


@pytest.mark.parametrize("code", ["../etc", "", "s w", "1a", "[sw]"])
def test_language_codes_cannot_be_paths(code: str):
    assert "targets.0" in refusal(targets=[code]).what


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "[bold]"])
def test_the_name_cannot_be_a_path_or_markup(name: str):
    assert refusal(name=name).what.startswith("name:")


@given(st.lists(st.floats(0, 100), min_size=1).filter(any))
def test_weights_are_sorted_unique_and_above_zero(weights: list[float]):
    found = SelectionConfig(weights=tuple(weights)).weights
    assert list(found) == sorted(set(weights) - {0.0})


@pytest.mark.parametrize("weights", [[], [0]])
def test_there_is_a_weight_to_choose(weights: list[float]):
    assert "give at least one weight above 0" in refusal(selection={"weights": weights}).what


def test_a_fixed_weight_needs_no_others():
    assert SelectionConfig(weight=0.5, weights=()).weight == 0.5


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf"), 101])
def test_a_weight_is_a_share_that_makes_sense(weight: float):
    assert "selection.weight" in refusal(selection={"weight": weight}).what
    assert "selection.weights" in refusal(selection={"weights": [weight]}).what


def test_a_relative_data_folder_is_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    path = written(folder, YAML.replace("data_dir: bundled", "data_dir: ../data"))
    assert load_experiment(path).data_dir == str(folder / "../data")
    # A path that is typed is relative to where it is typed.
    assert load_experiment(path, ["data_dir=data"]).data_dir == "data"


def test_a_relative_folder_of_the_reference_text_is_relative_to_the_file_too(tmp_path: Path):
    text = YAML.replace('{language}.txt"}', '{language}.txt", data_dir: texts}')
    assert load_experiment(written(tmp_path, text)).reference.data_dir == str(tmp_path / "texts")
    bundled = text.replace("data_dir: texts", "data_dir: bundled")
    assert load_experiment(written(tmp_path, bundled)).reference.data_dir == "bundled"


def test_absolute_and_bundled_data_folders_stay_as_they_are(tmp_path: Path):
    assert load_experiment(written(tmp_path)).data_dir == "bundled"
    path = written(tmp_path, YAML.replace("data_dir: bundled", "data_dir: /somewhere"))
    assert load_experiment(path).data_dir == "/somewhere"


def test_values_are_frozen_all_the_way_down():
    experiment = validated(Experiment, tree())
    with pytest.raises(ValidationError, match="frozen"):
        experiment.task = "xcopa"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="frozen"):
        experiment.training.epochs = 9  # pyright: ignore[reportAttributeAccessIssue]


def test_an_experiment_written_as_json_is_read_back_as_itself():
    tasks = {"mine": {"files": {"test": "x.tsv"}, "prompt": "{a}", "labels": {"0": "yes", "1": "no"}}}
    experiment = validated(Experiment, tree(tasks=tasks, training={"epochs": 0.5}, seeds=[0, 1]))
    assert validated(Experiment, json.loads(experiment.model_dump_json())) == experiment


def test_the_schema_refuses_unknown_keys_and_knows_every_field():
    schema = json.loads(json.dumps(Experiment.model_json_schema()))
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Experiment.model_fields)
    assert set(schema["required"]) == {"name", "backbone", "task", "targets"}


def test_a_choice_needs_two_labels():
    with pytest.raises(ConfigError, match="at least two labels"):
        validated(CustomTask, {"files": {"test": "x.tsv"}, "prompt": "{a}", "labels": ["a"]})


def test_a_file_that_is_not_yaml_is_named_with_its_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="this is not YAML") as caught:
        load_experiment(written(tmp_path, "name: x\ntask: topics\ntargets: [sw\nseeds: [0]\n"))
    assert caught.value.where == f"{tmp_path / 'experiment.yaml'}:4"


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", ""])
def test_an_experiment_is_a_mapping(tmp_path: Path, text: str):
    with pytest.raises(ConfigError, match="mapping of keys to values"):
        load_experiment(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such experiment") as caught:
        load_experiment(tmp_path / "none.yaml")
    assert caught.value.where == str(tmp_path / "none.yaml")


def test_a_folder_or_bytes_instead_of_a_file_is_an_error_of_the_user(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_experiment(tmp_path)
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_experiment(path)


def test_language_and_task_adapters_have_the_published_values() -> None:
    asked = validated(Experiment, tree())
    language, task = asked.madx.language_adapter, asked.madx.task_adapter
    assert (language.family, language.positions, language.reduction, language.invertible) == (
        "bottleneck",
        "madx",
        2,
        True,
    )
    assert (task.positions, task.reduction, task.invertible) == ("madx", 16, False)
    language, task = asked.lfsft.language_adapter, asked.lfsft.task_adapter
    assert (language.family, language.entries, language.l1) == ("sparse", 7_667_712, 0.1)
    assert (task.family, task.entries, task.l1) == ("sparse", 14_155_776, 0)
    assert asked.stack("madx") is asked.madx and asked.stack("lfsft") is asked.lfsft


@pytest.mark.parametrize("family", ["lora", "bottleneck", "sparse"])
@given(epochs=st.floats(0, 9), first=st.none() | st.floats(0, 9))
def test_only_sparse_differences_read_their_data_in_two_phases(family: str, epochs: float, first: float | None) -> None:
    adapter = {"family": family, **({"first_epochs": first} if family == "sparse" else {})}
    more = 0 if family != "sparse" else epochs if first is None else first
    assert epochs_read(adapter, {"epochs": epochs}) == epochs + more


def test_keys_of_structures_do_not_know_of_what_came_later() -> None:
    assert set(AdapterConfig(family="bottleneck").key()) == {"family", "reduction", "positions", "activation"}
    assert AdapterConfig(family="bottleneck", leave_out_last=True).key()["leave_out_last"] is True
    assert set(AdapterConfig(family="sparse").key()) == {"family", "entries", "modules", "l1", "select", "first_epochs"}


def test_a_coupling_is_for_language_adapters_alone() -> None:
    error = refusal(adapter={"family": "bottleneck", "positions": "madx", "invertible": True})
    assert "adapter.invertible: a coupling belongs to language adapters" in error.what


@pytest.mark.parametrize(
    ("part", "right"), [({"madx": {"language_reductions": 3}}, "language_reduction"), ({"lfsft": {"k": 3}}, "l1")]
)
def test_a_misspelt_key_of_a_stack_names_the_right_ones(part: dict[str, Any], right: str) -> None:
    assert right in (refusal(**part).remedy or "")
