"""Plans of MAD-X and LF-SFT: which adapters are trained on what, what is shared, how languages are grafted, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingraft.config import AdapterConfig, Experiment, TrainingConfig, validated
from lingraft.errors import ConfigError, DataError, UserError
from lingraft.locating import Located
from lingraft.methods import METHODS, method
from lingraft.plan import Plan, Step, characters, make_plan
from lingraft.tasks.sources import BUNDLED

STACKS = ("madx", "lfsft")
BASE: dict[str, Any] = {
    "name": "small",
    "backbone": "fake",
    "data_dir": "bundled",
    "task": "topics",
    "targets": ["sw", "vi"],
    "development": ["tr"],
    "reference": {"text": "udhr/{language}.txt"},
    "methods": ["eng-ft", "madx", "lfsft"],
    "selection": {"weights": [0.5, 1.5]},
}


def planned(**changes: Any) -> Plan:
    experiment = validated(Experiment, BASE | changes)
    return make_plan(experiment, Located("fake", "fake:1", "gguf", None, experiment.backbone))


def encoder(folder: Path, **changes: Any) -> Plan:
    """The same on an encoder, whose folder says what it is."""
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    reference = {"task": "mlm", "text": "udhr/{language}.txt"}
    experiment = validated(Experiment, BASE | {"reference": reference} | changes)
    return make_plan(experiment, Located("fake", "fake:1", "folder", folder, experiment.backbone))


def trained(plan: Plan) -> dict[str, Step]:
    return {step.label: step for step in plan.steps if step.kind == "train"}


def asked(plan: Plan, name: str) -> dict[str, dict[str, str]]:
    """By language, what a method's prediction reads: labels by role."""
    cells = [c for c in plan.cells if c.method == name]
    return {c.language: {role: step.label for role, step in c.predict.inputs.items()} for c in cells}


# Which steps.


@pytest.mark.parametrize("stack", STACKS)
def test_a_language_adapter_lies_beneath_the_task_s_which_was_trained_on_the_source_s(stack: str) -> None:
    plan = planned(methods=[stack])
    steps = trained(plan)
    assert set(steps) == {f"train {stack} clm {c} seed 0" for c in ("en", "sw", "vi")} | {
        f"train {stack} topics en seed 0"
    }
    task = steps[f"train {stack} topics en seed 0"]
    assert {role: step.label for role, step in task.inputs.items()} == {"beneath": f"train {stack} clm en seed 0"}
    assert asked(plan, stack) == {
        language: {"adapter": task.label, "beneath": f"train {stack} clm {language} seed 0"}
        for language in ("en", "sw", "vi")
    }
    assert all(c.predict.config["graft"] is None for c in plan.cells)
    # Nothing is chosen: development languages are not read at all.
    assert not plan.selections and not plan.comparisons and not any("tr" in label.split() for label in steps)


@pytest.mark.parametrize("stack", STACKS)
def test_structures_and_values_are_those_of_the_method(stack: str) -> None:
    values = {"training": {"epochs": 7, "learning_rate": 1e-3}, "reference_training": {"epochs": 2}}
    own = trained(planned(methods=[stack], **{stack: values}))
    assert own[f"train {stack} topics en seed 0"].config["training"]["epochs"] == 7
    assert own[f"train {stack} clm sw seed 0"].config["training"]["epochs"] == 2
    plain = trained(planned(methods=[stack], training={"epochs": 5}, reference_training={"epochs": 4}))
    assert plain[f"train {stack} topics en seed 0"].config["training"]["epochs"] == 5
    assert plain[f"train {stack} clm sw seed 0"].config["training"]["epochs"] == 4


def test_mad_x_s_adapters() -> None:
    changes = {"madx": {"language_reduction": 4, "task_reduction": 8, "leave_out_last": True}}
    steps = trained(planned(methods=["madx"], **changes))
    language = AdapterConfig(family="bottleneck", reduction=4, positions="madx", invertible=True, leave_out_last=True)
    task = AdapterConfig(family="bottleneck", reduction=8, positions="madx", leave_out_last=True)
    assert steps["train madx clm sw seed 0"].config["adapter"] == language.key()
    assert steps["train madx topics en seed 0"].config["adapter"] == task.key()


def test_lf_sft_s_differences() -> None:
    changes = {"lfsft": {"language_entries": 50, "task_entries": 70, "first_epochs": 0.5, "modules": ["q_proj"]}}
    steps = trained(planned(methods=["lfsft"], **changes))
    language = AdapterConfig(family="sparse", entries=50, modules=("q_proj",), l1=0.1)
    task = AdapterConfig(family="sparse", entries=70, modules=("q_proj",), first_epochs=0.5)
    assert steps["train lfsft clm sw seed 0"].config["adapter"] == language.key()
    assert steps["train lfsft topics en seed 0"].config["adapter"] == task.key()


def test_an_encoder_s_language_adapters_learn_with_its_masked_head_and_the_task_with_its_own(tmp_path: Path) -> None:
    for stack in STACKS:
        steps = trained(encoder(tmp_path, methods=[stack]))
        assert steps[f"train {stack} mlm sw seed 0"].config["head"] == {"kind": "masked_lm", "labels": 0}
        assert steps[f"train {stack} topics en seed 0"].config["head"]["kind"] == "classification"


# What is shared.


def test_both_methods_leave_what_other_methods_need_as_it_was() -> None:
    before, after = planned(methods=["eng-ft", "adamergex"]), planned(methods=["eng-ft", "adamergex", *STACKS])
    assert {step.key for step in before.steps} <= {step.key for step in after.steps}
    assert len({step.label for step in after.steps}) == len(after.steps)


@pytest.mark.parametrize("stack", STACKS)
def test_the_graft_shares_every_training_with_the_method_it_grafts(stack: str) -> None:
    one, both = planned(methods=[stack]), planned(methods=[stack, f"{stack}-graft", f"{stack}-graft:entropy"])
    more = set(trained(both)) - set(trained(one))
    assert more == {f"train {stack} clm tr seed 0"}
    assert len({step.label for step in both.steps}) == len(both.steps)


def test_another_task_shares_language_adapters_and_another_task_s_training_leaves_them_alone() -> None:
    one, two = (trained(planned(training={"epochs": n}, reference_training={"epochs": 2})) for n in (1, 2))
    new = {label for label in two if two[label].key != one[label].key}
    assert new == {"train topics en seed 0", "train madx topics en seed 0", "train lfsft topics en seed 0"}


def test_changed_text_of_the_source_changes_what_was_trained_on_top_of_it(tmp_path: Path) -> None:
    data = Path(shutil.copytree(BUNDLED, tmp_path / "data"))
    before = trained(planned(data_dir=str(data), methods=["madx"]))
    path = data / "udhr/en.txt"
    path.write_text(path.read_text() + "More.\n")
    after = trained(planned(data_dir=str(data), methods=["madx"]))
    changed = {label for label in after if after[label].key != before[label].key}
    assert changed == {"train madx clm en seed 0", "train madx topics en seed 0"}


@pytest.mark.parametrize("stack", STACKS)
def test_a_sample_of_items_is_no_reason_to_read_the_text_again(stack: str) -> None:
    values = {"epochs": 2}
    one, two = (
        trained(planned(methods=[stack], **{stack: {"reference_training": values | more}}))
        for more in ({}, {"limit": 9})
    )
    assert one[f"train {stack} clm sw seed 0"].key == two[f"train {stack} clm sw seed 0"].key


# Grafts of what lies beneath.


@pytest.mark.parametrize("stack", STACKS)
def test_a_graft_is_of_the_language_adapters_and_the_task_s_stands_on_it(stack: str) -> None:
    plan = planned(methods=[f"{stack}-graft"])
    cell = next(c for c in plan.cells if c.language == "sw")
    assert {c.language for c in plan.cells} == {"sw", "vi"}
    assert set(cell.predict.inputs) == {"adapter", "beneath"}
    merge = cell.predict.inputs["beneath"]
    assert merge is cell.adapter and merge.kind == "merge"
    assert {role: step.label for role, step in merge.inputs.items()} == {
        "target_ref": f"train {stack} clm sw seed 0",
        "source_ref": f"train {stack} clm en seed 0",
        "selection": f"select λ of {stack}-graft",
    }
    assert cell.predict.inputs["adapter"].label == f"train {stack} topics en seed 0"
    assert not plan.comparisons, "their parts are not one update that could be compared"


@pytest.mark.parametrize("stack", STACKS)
def test_its_grid_has_the_source_s_and_the_target_s_language_adapter_in_it(stack: str) -> None:
    plan = planned(methods=[f"{stack}-graft"])
    select = plan.selections[f"{stack}-graft", None]
    assert select.config["weights"] == [0.0, 0.5, 1.0, 1.5] and "neutral" not in select.config
    by_weight = {role.split("/")[0]: score.inputs["predict"] for role, score in select.inputs.items()}
    nothing, half = by_weight["0.0"], by_weight["0.5"]
    assert nothing.config["graft"] is None
    assert nothing.inputs["beneath"].label == f"train {stack} clm en seed 0"
    assert half.config["graft"]["weight"] == 0.5 and "beneath" in half.config["graft"]
    assert {role: step.label for role, step in half.inputs.items()} == {
        "adapter": f"train {stack} topics en seed 0",
        "target_ref": f"train {stack} clm tr seed 0",
        "source_ref": f"train {stack} clm en seed 0",
    }


@given(st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0]), min_size=1))
def test_the_other_methods_grids_are_what_was_asked_for(weights: list[float]) -> None:
    plan = planned(methods=["adamergex", "madx-graft"], selection={"weights": weights})
    assert plan.selections["adamergex", None].config["weights"] == sorted({0.0, *weights})
    assert plan.selections["madx-graft", None].config["weights"] == sorted({0.0, 1.0, *weights})


@pytest.mark.parametrize(("criterion", "kind"), [("entropy", "score"), ("likelihood", "read")])
def test_a_weight_may_be_chosen_without_labels_for_each_target(criterion: str, kind: str) -> None:
    name = f"madx-graft:{criterion}"
    plan = planned(methods=[name], development=[])
    assert set(plan.selections) == {(name, "sw"), (name, "vi")}
    select = plan.selections[name, "sw"]
    assert {step.kind for step in select.inputs.values()} == {kind}
    if kind == "read":
        assert select.inputs["0.0/sw/validation/0"].inputs["beneath"].label == "train madx clm en seed 0"


def test_a_given_weight_is_merged_with_no_development_language() -> None:
    plan = planned(methods=["lfsft-graft"], development=[], selection={"weight": 0.75})
    assert plan.selections["lfsft-graft", None].config == {"weight": 0.75}
    assert not any("validation" in step.label for step in plan.steps)


def test_the_rows_say_what_they_are() -> None:
    assert [METHODS[name].title for name in ("madx", "lfsft", "madx-graft", "lfsft-graft")] == [
        "MAD-X",
        "LF-SFT",
        "MAD-X, grafted languages",
        "LF-SFT, grafted languages",
    ]
    assert method("madx-graft:entropy").stack == "madx"
    assert {name for name, row in METHODS.items() if row.stack} == {"madx", "lfsft", "madx-graft", "lfsft-graft"}
    with pytest.raises(UserError, match="has no weight to choose"):
        method("madx:entropy")
    with pytest.raises(UserError, match="the ratio of norms has no meaning"):
        method("lfsft-graft:norms")


# AdaMergeX on sparse differences.


def test_adamergex_merges_sparse_differences_like_any_structure() -> None:
    plan = planned(methods=["adamergex", "eng-ft"], adapter={"family": "sparse", "entries": 40})
    merge = next(step for step in plan.steps if step.kind == "merge")
    assert merge.config["space"] == "difference"
    assert set(merge.inputs) == {"task", "target_ref", "source_ref", "selection"}
    assert len(plan.comparisons) == 2


@pytest.mark.parametrize("name", ["adamergex-product", "arimerge", "projection-graft", "translate-train", "flare"])
def test_what_is_lora_s_alone_is_refused_for_sparse_differences(name: str, tmp_path: Path) -> None:
    data = Path(shutil.copytree(BUNDLED, tmp_path / "data"))
    for code in ("sw", "vi"):
        shutil.copy(data / "topics/en/train.tsv", data / f"topics/{code}/train.tsv")
    changes = {"reference": {"text": "udhr/{language}.txt", "unit": "line"}, "data_dir": str(data)}
    with pytest.raises(UserError, match="sparse"):
        planned(methods=[name], adapter={"family": "sparse"}, **changes)


# Refusals.


@pytest.mark.parametrize("name", ["madx", "lfsft", "madx-graft", "lfsft-graft"])
@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ({"task": "none"}, "there is no reference task"),
        ({"task": "xnli"}, "'xnli' is not that"),
        ({"task": "mlm", "text": "udhr/{language}.txt"}, "'mlm' is not"),
    ],
)
def test_language_adapters_learn_language_modelling_on_plain_text(
    name: str, reference: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        planned(methods=[name], reference=reference)
    assert caught.value.remedy is not None and "reference.task=clm" in caught.value.remedy


def test_a_language_without_text_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    data = Path(shutil.copytree(BUNDLED, tmp_path / "data"))
    (data / "udhr/sw.txt").unlink()
    with pytest.raises(DataError, match="'sw'"):
        planned(methods=["madx"], data_dir=str(data))


@pytest.mark.parametrize("changes", [{"methods": ["lfsft"]}, {"methods": ["eng-ft"], "adapter": {"family": "sparse"}}])
def test_quantised_weights_cannot_be_changed_number_by_number(changes: dict[str, Any]) -> None:
    backbone = {"model": "fake", "quantization": "nf4"}
    with pytest.raises(ConfigError, match="a sparse difference changes weights of the base"):
        planned(backbone=backbone, **changes)
    assert planned(backbone=backbone, methods=["madx"]).cells


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": ["lfsft"], "lfsft": {"training": {"weight_decay": 0.1}}},
        {"methods": ["lfsft-graft"], "reference_training": {"weight_decay": 0.1}},
        {"methods": ["eng-ft"], "adapter": {"family": "sparse"}, "training": {"weight_decay": 0.1}},
    ],
)
def test_sparse_differences_do_not_decay(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="without weight decay"):
        planned(**changes)


def test_values_of_methods_that_are_not_asked_for_are_not_looked_at() -> None:
    assert planned(methods=["madx"], lfsft={"training": {"weight_decay": 0.1}}, training={"weight_decay": 0.1}).cells


@pytest.mark.parametrize("name", ["control-sequential", "projection"])
def test_a_sparse_difference_does_not_go_on_from_another(name: str) -> None:
    reference = {"text": "udhr/{language}.txt", "unit": "line"}
    with pytest.raises(ConfigError, match=f"'{name}' goes on from another adapter"):
        planned(methods=[name], adapter={"family": "sparse"}, reference=reference)


def test_a_coupling_is_no_adapter_of_an_experiment() -> None:
    with pytest.raises(ConfigError, match="a coupling belongs to language adapters"):
        planned(adapter={"family": "bottleneck", "invertible": True})


@pytest.mark.parametrize("stack", STACKS)
def test_under_the_paper_s_protocol_a_language_without_test_items_has_no_figure(stack: str, tmp_path: Path) -> None:
    data = Path(shutil.copytree(BUNDLED, tmp_path / "data"))
    shutil.copy(data / "udhr/vi.txt", data / "udhr/th.txt")
    asked_about = {"id": "1", "question": "q", "answers": [{"text": "a", "answer_start": 0}]}
    squad = {"data": [{"paragraphs": [{"context": "a b", "qas": [asked_about]}]}]}
    for name in ("squad/train-v1.1", "xquad/xquad.en", "xquad/xquad.th", "MLQA_V1/dev/dev-context-vi-question-vi"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / f"{name}.json").write_text(json.dumps(squad))
    changes = {"protocol": "paper", "task": "xquad", "targets": ["th", "sw"], "development": ["vi"]}
    plan = planned(methods=[stack], data_dir=str(data), **changes)
    assert plan.absent == ((stack, "sw", "no labelled test data"),)
    assert set(asked(plan, stack)) == {"en", "th"}


# Keys and sizes.


GOLDEN: dict[str, str] = {
    "train madx clm sw seed 0": "f55ed29aaef53ab8d24db138",
    "train madx mine en seed 0": "1fb38b6e267202d76a0c5ab0",
    "train lfsft clm sw seed 0": "4be39a055da76fe4a4e7b755",
    "train lfsft mine en seed 0": "64d0ec3afe661b138fd1d61e",
    "predict madx seed 0 sw test": "b79984a4bbf0fefa42a4a486",
    "predict madx-graft λ=0.5 seed 0 tr validation": "b3dfb3ad48a50f8ebf2f5869",
    "predict lfsft-graft λ=0 seed 0 tr validation": "9923f4204ce52ea8e1fd95bb",
    "select λ of madx-graft": "d2239132198f19a8b784bec5",
    "merge madx-graft sw seed 0": "f7c5e9fb4a9175e87831354d",
    "merge lfsft-graft sw seed 0": "14ecf78d72e47085abfadfba",
}


def test_keys_are_the_same_as_ever(tmp_path: Path) -> None:
    """If this fails, every store out there is work lost: change a version instead, or say so in the change log."""
    for language in ("en", "sw", "tr"):
        (tmp_path / f"{language}.tsv").write_text("text\tlabel\nx\ta\ny\tb\n")
        (tmp_path / f"{language}.txt").write_text("text\n")
    files = dict.fromkeys(("train", "validation", "test"), "{language}.tsv")
    plan = planned(
        data_dir=str(tmp_path),
        task="mine",
        tasks={"mine": {"files": files, "prompt": "{text}", "labels": ["a", "b"]}},
        targets=["sw"],
        reference={"text": "{language}.txt"},
        methods=["madx", "lfsft", "madx-graft", "lfsft-graft"],
    )
    found = {step.label: step.key for step in plan.steps}
    assert {label: found[label] for label in GOLDEN} == GOLDEN


def test_both_phases_of_a_sparse_difference_read_the_text() -> None:
    size = len((BUNDLED / "udhr/sw.txt").read_text(encoding="utf-8"))
    for first, epochs in ((None, 6), (1.0, 4), (2.0, 5)):
        changes = {"reference_first_epochs": first, "reference_training": TrainingConfig(epochs=3).model_dump()}
        plan = planned(methods=["madx", "lfsft"], lfsft=changes, madx={"reference_training": {"epochs": 3}})
        read = {label: characters(plan.experiment, [step])[step.key] for label, step in trained(plan).items()}
        assert read["train lfsft clm sw seed 0"] == epochs * size
        assert read["train madx clm sw seed 0"] == 3 * size
