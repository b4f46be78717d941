"""Plans with two languages: what is shared, what a change makes new, and what is refused before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from lingraft.architectures import guessed_kind
from lingraft.config import Experiment, load_experiment, validated
from lingraft.errors import ConfigError, DataError, UserError
from lingraft.locating import Located, locate
from lingraft.methods import method
from lingraft.plan import Plan, characters, make_plan
from lingraft.plan.planner import Planner

LANGUAGES = ("en", "sw", "vi")
METHODS = (
    "eng-ft", "translate-test", "translate-train", "input-fusion", "x-mixup", "flare", "flare:mul", "flare-mt",
    "flare-graft",
)  # fmt: skip
READING = {"input-fusion", "x-mixup", "flare", "flare:mul", "flare-graft"}
"""The second stages that read counterparts."""
MINE = {
    "files": {"train": "{language}/train.jsonl", "validation": "{language}/dev.jsonl", "test": "{language}/test.jsonl"},
    "prompt": "{text}",
    "labels": ["a", "b"],
    "id_field": "id",
}


def model_folder(folder: Path, kind: str, **more: Any) -> Path:
    """What planning reads of a model: a configuration, and weights to take a digest of."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **more}))
    write_weights(folder, kind)
    return folder


def write_weights(folder: Path, about: str) -> None:
    """A safetensors file without tensors, which says something."""
    header = json.dumps({"__metadata__": {"about": about}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """An experiment on an encoder, with a translation model beside it."""
    for language in LANGUAGES:
        for split in ("train", "dev", "test"):
            path = tmp_path / f"data/{language}/{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            found = [{"id": n, "text": f"{language} {split} {n}", "label": "ab"[n % 2]} for n in range(4)]
            path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return {
        "name": "two",
        "backbone": str(model_folder(tmp_path / "bert", "bert", architectures=["BertForMaskedLM"])),
        "data_dir": str(tmp_path / "data"),
        "task": "mine",
        "tasks": {"mine": MINE, "other": MINE},
        "targets": ["sw", "vi"],
        "reference": {"task": "other", "split": "validation"},
        "fusion": {"encoder": str(model_folder(tmp_path / "nllb", "m2m_100"))},
        "selection": {"weight": 0.5},
        "methods": list(METHODS),
    }


def planned(base: dict[str, Any], **changes: Any) -> Plan:
    experiment = validated(Experiment, base | changes)
    return make_plan(experiment, locate(experiment.backbone))


def on_decoder(base: dict[str, Any], **changes: Any) -> Plan:
    experiment = validated(Experiment, base | {"backbone": "fake"} | changes)
    return make_plan(experiment, Located("fake", "fake:1", "gguf", None, experiment.backbone))


def changed(one: Plan, two: Plan) -> set[str]:
    """The methods that have new work in the second plan."""
    before = {step.key for step in one.steps}
    return {cell.method for cell in two.cells if cell.score.key not in before}


def labels(plan: Plan, kind: str) -> set[str]:
    return {step.label for step in plan.steps if step.kind == kind}


def edit(base: dict[str, Any], file: str, word: str = "other") -> None:
    path = Path(base["data_dir"]) / file
    path.write_text(path.read_text().replace(" 0", f" {word}"))


# What a change makes new


SECOND = {name for name in METHODS if name not in ("eng-ft", "translate-test")}
FUSED = {"flare", "flare:mul", "flare-graft"}
VALUES = {"learning_rate": 0.5, "epochs": 1, "batch_size": 2, "max_length": 64}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fusion": {"cache_limit": 3}}, set()),
        ({"fusion": {"cache": True}}, FUSED),
        ({"fusion": {"function": "add"}}, {"flare", "flare-mt", "flare-graft"}),
        ({"fusion": {"layer_offset": 1}}, FUSED),
        ({"fusion": {"decoding": "continuation", "mask_padding": True}}, FUSED),
        ({"fusion": {"modules": "attention.key"}}, SECOND),
        ({"fusion": {"plain": "all"}}, SECOND),
        ({"mixup": {"layer": 0}}, {"x-mixup"}),
        ({"mixup": {"most": 0.25}}, {"x-mixup"}),
        ({"fusion_training": VALUES}, SECOND),
        ({"selection": {"weight": 0.75}}, {"flare-graft"}),
        ({"translation": {"missing": "skip"}}, {*SECOND, "translate-test"}),
        ({"translation": {"beams": 4}}, set()),
        ({"translation": {"model": "nllb"}}, {*SECOND, "translate-test"}),
        ({"translation": {"model": "nllb", "splits": ["test"]}}, {*READING, "translate-test"}),
        ({"translation": {"model": "nllb", "splits": ["train"]}}, SECOND),
        ({"translation": {"model": "nllb", "splits": ["validation"]}}, set()),
        ({"training": VALUES}, set(METHODS)),
    ],
)
def test_a_change_makes_new_what_depends_on_it(
    base: dict[str, Any], changes: dict[str, Any], expected: set[str]
) -> None:
    before = planned(base)
    if "model" in changes.get("translation", {}):
        changes = {"translation": changes["translation"] | {"model": base["fusion"]["encoder"]}}
    changes = {name: (base.get(name, {}) if name == "fusion" else {}) | value for name, value in changes.items()}
    assert changed(before, planned(base, **changes)) == expected


def test_another_encoder_is_new_work_for_flare_mt_alone(base: dict[str, Any], tmp_path: Path) -> None:
    before = planned(base)
    other = model_folder(tmp_path / "other", "m2m_100", d_model=8)
    assert changed(before, planned(base, fusion={"encoder": str(other)})) == {"flare-mt"}
    write_weights(Path(base["fusion"]["encoder"]), "changed")
    assert changed(before, planned(base)) == {"flare-mt"}


def test_an_encoder_is_trained_with_and_asked_with_at_the_commit_that_was_planned(base: dict[str, Any]) -> None:
    commits = ["0" * 40, "1" * 40]
    plans = [planned(base, fusion={"encoder": "some/encoder", "encoder_revision": commit}) for commit in commits]
    assert changed(*plans) == {"flare-mt"}
    for plan, commit in zip(plans, commits, strict=True):
        adapter = next(c.adapter for c in plan.cells if c.method == "flare-mt")
        assert adapter is not None
        # What is trained with, and what the adapter's note says, is made of this.
        assert adapter.config["second"]["fusion"]["encoder_revision"] == commit
        assert adapter.reads["encoder"] == f"hub:some/encoder@{commit}"


@pytest.mark.parametrize(
    ("file", "language", "expected"),
    [
        ("en/test.jsonl", "sw", {*READING, "translate-test"}),
        ("sw/test.jsonl", "sw", set(METHODS)),
        ("sw/test.jsonl", "vi", set()),
        ("sw/train.jsonl", "sw", SECOND),
        ("sw/train.jsonl", "vi", set()),
        ("sw/dev.jsonl", "sw", {"flare-graft"}),
        ("en/dev.jsonl", "sw", {"flare-graft"}),
        ("en/train.jsonl", "vi", set(METHODS)),
    ],
)
def test_changed_rows_are_new_work_for_the_methods_that_read_them(
    base: dict[str, Any], file: str, language: str, expected: set[str]
) -> None:
    before = {step.key for step in planned(base).steps}
    edit(base, file)
    cells = [c for c in planned(base).cells if c.language == language]
    assert {c.method for c in cells if c.score.key not in before} == expected


def test_a_target_is_no_work_for_another(base: dict[str, Any]) -> None:
    both, one = planned(base), planned(base, targets=["sw"])
    known = {step.key for step in both.steps}
    assert [step.label for step in one.steps if step.key not in known] == []


# What is shared


def test_steps_stand_once_and_after_what_they_need(base: dict[str, Any]) -> None:
    plan = planned(
        base, seeds=[0, 1], fusion=base["fusion"] | {"cache": True}, translation={"model": base["fusion"]["encoder"]}
    )
    seen: set[str] = set()
    for step in plan.steps:
        assert step.key not in seen
        assert {below.key for below in step.inputs.values()} <= seen
        seen.add(step.key)
    kinds = [step.kind for step in plan.steps]
    count = kinds.count("translate")
    assert kinds[:count] == ["translate"] * count and count == 4
    assert len(labels(plan, "translate")) == 4


def test_every_second_stage_stands_on_the_first_of_its_seed(base: dict[str, Any]) -> None:
    plan = planned(base, seeds=[0, 1])
    for cell in plan.cells:
        if cell.method in SECOND:
            assert cell.adapter is not None
            first = cell.adapter.inputs["stage1"]
            if cell.method == "flare-graft":
                assert first.kind == "merge" and first.inputs["target_ref"].config["language"] == cell.language
                first = first.inputs["task"]
            assert (first.config["language"], first.config["seed"]) == ("en", cell.seed)
    firsts = {s.key for s in plan.steps if s.kind == "train" and s.label.startswith("train mine en seed")}
    assert len(firsts) == 2


def test_the_source_language_is_never_translated_into_itself(base: dict[str, Any]) -> None:
    for translation in ({"model": base["fusion"]["encoder"]}, {}):
        plan = planned(base, translation=translation)
        assert not any("en-en" in label for label in labels(plan, "translate"))
        here = {c.method: c.predict.key for c in plan.cells if c.language == "en"}
        assert here["translate-test"] == here["eng-ft"]


def test_translations_are_shared_by_methods_and_seeds(base: dict[str, Any]) -> None:
    plan = planned(base, seeds=[0, 1], translation={"model": base["fusion"]["encoder"]})
    assert labels(plan, "translate") == {
        f"translate mine {pair}" for pair in ("en-sw train", "en-vi train", "sw-en test", "vi-en test")
    }


def test_no_more_is_translated_than_is_read(base: dict[str, Any]) -> None:
    def limits(**changes: Any) -> dict[str, int | None]:
        plan = on_decoder(
            base,
            targets=["sw"],
            methods=["translate-test", "flare"],
            translation={"model": base["fusion"]["encoder"]},
            **changes,
        )
        asked = {c.predict.config["limit"] for c in plan.cells if c.language == "sw"}
        found = {s.config["split"]: s.config.get("limit") for s in plan.steps if s.kind == "translate"}
        assert asked == {found["test"]}
        return found

    written = {"scoring": "generation", "written_limit": 2, "new_tokens": 4}
    assert limits() == {"train": None, "test": None}
    assert limits(fusion_training=VALUES | {"limit": 3}) == {"train": 3, "test": None}
    assert limits(evaluation={"limit": 3}) == {"train": None, "test": 3}
    assert limits(evaluation=written) == {"train": None, "test": 2}
    assert limits(evaluation=written | {"limit": 1}) == {"train": None, "test": 1}
    assert limits(evaluation={"written_limit": 2}) == {"train": None, "test": None}


def test_the_target_needs_no_training_rows_where_they_are_translated(base: dict[str, Any]) -> None:
    folder = Path(base["data_dir"])
    for language in ("sw", "vi"):
        (folder / f"{language}/train.jsonl").rename(folder / f"{language}.jsonl")
    with pytest.raises(DataError, match="'train'"):
        planned(base)
    model = planned(base, translation={"model": base["fusion"]["encoder"]})
    files = planned(base, translation={"files": "{to}.jsonl", "splits": ["train"]})
    for plan in (model, files):
        assert {c.method for c in plan.cells if c.language == "vi"} == set(METHODS)
        sizes = characters(plan.experiment, plan.steps)
        assert all(sizes[c.adapter.key] > 0 for c in plan.cells if c.method in SECOND and c.adapter is not None)


@pytest.mark.parametrize(
    ("file", "lacking"),
    [
        ("sw/train.jsonl", dict.fromkeys(SECOND, "no labelled training data")),
        (
            "en/test.jsonl",
            dict.fromkeys([*READING, "translate-test"], "no test data in English"),
        ),
        ("sw/dev.jsonl", {"flare-graft": "no labelled data of the reference task 'other' in Swahili"}),
    ],
)
def test_missing_rows_are_an_error_and_in_a_published_table_an_empty_cell(
    base: dict[str, Any], file: str, lacking: dict[str, str]
) -> None:
    (Path(base["data_dir"]) / file).unlink()
    base = base | {"targets": ["sw"], "evaluation": {"source": False}}
    experiment = validated(Experiment, base)
    planner = Planner(experiment, locate(experiment.backbone))
    planner.lenient = True
    plan = planner.plan()
    assert {(name, code): reason for name, code, reason in plan.absent} == {
        (name, "sw"): reason for name, reason in lacking.items()
    }
    assert {c.method for c in plan.cells} == set(METHODS) - set(lacking)
    with pytest.raises(DataError) as caught:
        planned(base)
    assert file.startswith("sw/dev") or "translation.model" in (caught.value.remedy or "")


def test_two_texts_are_twice_the_work(base: dict[str, Any]) -> None:
    plan = planned(base)
    sizes = characters(plan.experiment, plan.steps)
    asked = {c.method: sizes[c.predict.key] for c in plan.cells if c.language == "sw"}
    assert {m for m, size in asked.items() if size == 2 * asked["eng-ft"]} == READING
    assert {m for m, size in asked.items() if size == asked["eng-ft"]} == set(METHODS) - READING


def test_second_stages_are_asked_at_the_length_they_learned(base: dict[str, Any]) -> None:
    plan = planned(base, training=VALUES | {"max_length": 32}, fusion_training=VALUES | {"max_length": 48})
    for cell in plan.cells:
        # Two texts in one input have the room of two.
        room = 32 if cell.method not in SECOND else 96 if cell.method == "input-fusion" else 48
        assert cell.predict.config["max_length"] == room, cell.method


def test_files_are_read_in_the_right_direction(base: dict[str, Any]) -> None:
    folder = Path(base["data_dir"])
    for name in ("en-sw.train", "en-vi.train", "sw-en.test", "vi-en.test"):
        (folder / f"{name}.jsonl").write_text(name)
    files = {"files": "{from}-{to}.{split}.jsonl"}
    before = planned(base, translation=files)
    known = {step.key for step in before.steps}
    for name, language, expected in (
        ("en-sw.train", "sw", SECOND),
        ("sw-en.test", "sw", {*READING, "translate-test"}),
        ("sw-en.test", "vi", set()),
    ):
        path = folder / f"{name}.jsonl"
        path.write_text("changed")
        after = planned(base, translation=files)
        path.write_text(name)
        new = {c.method for c in after.cells if c.language == language and c.score.key not in known}
        assert new == expected, name
    (folder / "vi-en.test.jsonl").unlink()
    with pytest.raises(DataError, match="file of translations is missing"):
        planned(base, translation=files)


# Kept states


def test_states_belong_to_a_first_stage_and_its_items_and_not_to_what_is_done_with_them(base: dict[str, Any]) -> None:
    def states(**changes: Any) -> set[str]:
        fusion = base["fusion"] | {"cache": True} | changes.pop("fusion", {})
        return {s.key for s in planned(base, fusion=fusion, **changes).steps if s.kind == "states"}

    first = states()
    assert len(first) == 4, "two languages, and the task's adapter or the language's graft"
    assert len(states(seeds=[0, 1])) == 8
    assert states(fusion={"function": "add", "cache_limit": 1, "plain": "all"}) == first
    assert states(fusion_training=_values(base) | {"learning_rate": 0.5, "epochs": 7}) == first
    for fusion in ({"layer_offset": 1}, {"normalize_source": False}, {"mask_padding": True}, {"modules": "all"}):
        assert not states(fusion=fusion) & first
    for values in ({"max_length": 32}, {"limit": 2}):
        assert not states(fusion_training=_values(base) | values) & first
    assert not states(training=VALUES) & first
    edit(base, "en/train.jsonl")
    assert not states() & first


def _values(base: dict[str, Any]) -> dict[str, Any]:
    return validated(Experiment, base).fusion_values.model_dump(mode="json")


# What is refused


@pytest.mark.parametrize("structure", ["ia3", "bottleneck", "prefix"])
@pytest.mark.parametrize("name", ["flare", "translate-train"])
def test_second_stages_are_lora_on_lora(base: dict[str, Any], structure: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' trains a second stage, which is LoRA on LoRA, not {structure}"):
        planned(base, methods=[name], adapter={"family": structure})


def test_a_decoder_has_no_mixup(base: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="'x-mixup' mixes the states of an encoder"):
        on_decoder(base)
    assert on_decoder(base, methods=[name for name in METHODS if name != "x-mixup"]).cells


def test_free_answers_are_not_asked_for_in_the_other_language(base: dict[str, Any], tmp_path: Path) -> None:
    questions: dict[str, Any] = {
        "task": "xquad-articles",
        "tasks": {},
        "reference": {"task": "none"},
        "targets": ["de"],
    }
    with pytest.raises(ConfigError, match="'translate-test' would answer 'xquad-articles' in the source language"):
        on_decoder(base, methods=["translate-test"], **questions)


@pytest.mark.parametrize(
    ("fusion", "match"),
    [
        ({"decoding": "continuation"}, "needs mask_padding"),
        ({"decoding": "continuation", "mask_padding": True, "cache": True}, "cache"),
        ({"function": "sum"}, "function"),
        ({"cache_limit": 0}, "cache_limit"),
        ({"layer_offset": 2}, "layer_offset"),
    ],
)
def test_what_cannot_be_fused_is_said_with_the_configuration(
    base: dict[str, Any], fusion: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        planned(base, fusion=fusion)


def test_translations_come_from_a_model_or_from_files(base: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not both"):
        planned(base, translation={"model": base["fusion"]["encoder"], "files": "{to}.jsonl"})
    with pytest.raises(UserError, match="no such model folder"):
        planned(base, translation={"model": str(Path(base["data_dir"]) / "none")})


def test_a_graft_as_first_stage_needs_what_every_graft_needs(base: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needs a reference task"):
        planned(base, methods=["flare-graft"], reference={"task": "none"})
    with pytest.raises(ConfigError, match="needs development languages"):
        planned(base, methods=["flare-graft"], selection={})
    text = {"task": "clm", "text": "{language}.txt"}
    for language in LANGUAGES:
        (Path(base["data_dir"]) / f"{language}.txt").write_text("text\n")
    with pytest.raises(ConfigError, match="'clm' is not one that an encoder learns"):
        planned(base, methods=["flare-graft"], reference=text)


@pytest.mark.parametrize("name", ["flare:sum", "flare:entropy", "x-mixup:mul", "translate-train:add"])
def test_only_what_fuses_has_functions(base: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name):
        planned(base, methods=[name])


@pytest.mark.parametrize("path", ["../{from}.jsonl", "/etc/{from}", "a/../../{to}.jsonl"])
def test_files_of_translations_stay_below_the_data_folder(base: dict[str, Any], path: str) -> None:
    with pytest.raises(UserError, match="leads out of the data folder"):
        planned(base, translation={"files": path})


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("fusion-*.yaml")), ids=str)
def test_recipes_of_two_languages_can_be_read(path: Path) -> None:
    experiment = load_experiment(path)
    assert all(method(name) for name in experiment.methods)
    assert experiment.fusion_training is not None
    expected = "encoder" if "e5" in path.stem else "decoder"
    assert guessed_kind(experiment.backbone.model) == expected
