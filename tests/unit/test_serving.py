"""Plans of all tasks and backbones: what is written, what is scored, what nobody has labels for, and what is refused at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from lingraft.config import Experiment, ReferenceConfig, TrainingConfig, load_experiment, validated
from lingraft.errors import ConfigError, DataError, UserError
from lingraft.locating import Located
from lingraft.plan import Plan, Step, make_plan
from lingraft.protocols import PAPER_TARGETS
from lingraft.report.results import results
from lingraft.report.tables import notes
from lingraft.tasks.reference import reference_text
from lingraft.tasks.table import TASKS
from tests.unit.test_report import make_run

RECIPES = Path(__file__).parents[2] / "recipes" / "adamergex"
FILES = {
    "gsm8k/train.jsonl",
    "mgsm/exemplars.json",
    *(f"mgsm/mgsm_{code}.tsv" for code in ("en", "sw", "th", "de")),
    "copa_en/train.jsonl",
    *(f"xcopa/data/{code}/{part}.{code}.jsonl" for code in ("sw", "th", "vi") for part in ("val", "test")),
    "squad/train-v1.1.json",
    *(f"xquad/xquad.{code}.json" for code in ("en", "th", "vi")),
    *(f"nusax/sentiment/{name}/{part}.csv" for name in ("english", "javanese", "thai") for part in ("train", "valid", "test")),
    *(f"text/{code}.txt" for code in ("en", "sw", "th", "vi", "de", "fr", "jv", "id")),
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files that are there: a plan reads their bytes, not their rows."""
    for name in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")
    return tmp_path


def planned(data: Path, kind: str = "decoder", **changes: Any) -> Plan:
    tree = {
        "name": "x",
        "backbone": "fake",
        "data_dir": str(data),
        "task": "mgsm",
        "targets": ["sw"],
        "development": ["de"],
        "reference": {"text": "text/{language}.txt"},
        "methods": ["vanilla", "eng-ft", "adamergex"],
        "selection": {"weights": [1.0]},
    }
    experiment = validated(Experiment, tree | changes)
    names = {"decoder": "llama", "encoder": "xlm-roberta", "encoder-decoder": "t5"}
    folder = data / kind
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": names[kind], "architectures": ["XForMaskedLM"]}))
    if kind == "decoder":
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return make_plan(experiment, Located("fake", "fake:1", "folder", folder, experiment.backbone))


def steps(plan: Plan, kind: str) -> list[Step]:
    return [step for step in plan.steps if step.kind == kind]


# What is written, and what is scored.


def test_free_answers_are_written_for_the_test_and_only_judged_by_likelihood_for_the_choice(data: Path) -> None:
    plan = planned(data)
    tests = [s for s in steps(plan, "predict") if s.config["split"] == "test"]
    choices = [s for s in steps(plan, "predict") if s.config["split"] == "validation"]
    assert {s.config["scoring"] for s in tests} == {"generation"} and {s.config["scoring"] for s in choices} == {"gold"}
    assert all(s.config["new_tokens"] == TASKS["mgsm"].new_tokens() for s in tests)
    rules = [s.config["rule"] for s in steps(plan, "score")]
    assert rules == [TASKS["mgsm"].rule()] * len(rules)
    assert {s.config["language"] for s in steps(plan, "score")} == {"en", "sw", "de"}


def test_thinking_aloud_is_written_beside_candidates_that_are_scored(data: Path) -> None:
    plan = planned(
        data, task="xcopa", development=["vi"], methods=["vanilla", "xlt", "eng-ft", "xlt-eng-ft", "adamergex"]
    )
    by_method = {c.method: c.predict.config for c in plan.cells if c.language == "sw"}
    for name in ("vanilla", "eng-ft", "adamergex"):
        assert by_method[name]["scoring"] == "auto" and "prompt" not in by_method[name]
    for name in ("xlt", "xlt-eng-ft"):
        assert by_method[name]["scoring"] == "generation" and by_method[name]["prompt"] == "xlt"
        assert by_method[name]["task"]["template"] == TASKS["xcopa"].prompt("xlt").template
    trained = {s.config["task"]["template"] for s in steps(plan, "train") if "task" in s.config}
    assert trained == {TASKS["xcopa"].prompt().template}  # T is T whatever it is asked in.


def test_the_experiment_s_wording_is_trained_and_asked_and_xlt_keeps_its_own(data: Path) -> None:
    plan = planned(
        data, task="xcopa", development=["vi"], prompt="paper", methods=["eng-ft", "xlt-eng-ft", "adamergex"]
    )
    trained = {s.config["task"]["template"] for s in steps(plan, "train") if "task" in s.config}
    asked = {c.method: c.predict.config["prompt"] for c in plan.cells}
    assert trained == {TASKS["xcopa"].prompt("paper").template}
    assert asked == {"eng-ft": "paper", "xlt-eng-ft": "xlt", "adamergex": "paper"}


def test_the_source_language_need_not_be_scored(data: Path) -> None:
    assert {c.language for c in planned(data).cells} == {"en", "sw"}
    assert {c.language for c in planned(data, evaluation={"source": False}).cells} == {"sw"}


def test_candidates_may_be_written_instead_and_the_choice_stays_with_likelihood(data: Path) -> None:
    plan = planned(data, task="xcopa", development=["vi"], evaluation={"scoring": "generation", "written_limit": 7})
    tests = [s.config for s in steps(plan, "predict") if s.config["split"] == "test"]
    choices = [s.config for s in steps(plan, "predict") if s.config["split"] == "validation"]
    assert {(c["scoring"], c["limit"]) for c in tests} == {("generation", 7)}
    assert {(c["scoring"], c["limit"]) for c in choices} == {("auto", None)}


def test_a_task_s_published_sample_is_taken_unless_another_is_asked_for(data: Path) -> None:
    for code in ("en", "sw"):
        (data / "xnli").mkdir(exist_ok=True)
        (data / f"xnli/{code}.genre.test.tsv").write_text("x\n")
    (data / "xnli/watson_train.csv").write_text("x\n")
    for limit, expected in ((None, 1000), (50, 50)):
        plan = planned(data, task="xnli", development=[], methods=["eng-ft"], evaluation={"limit": limit})
        assert {s.config["limit"] for s in steps(plan, "predict")} == {expected}


def test_options_that_came_later_are_in_no_key_until_they_are_used() -> None:
    assert not {"limit", "max_output"} & TrainingConfig().key().keys()
    assert TrainingConfig(limit=5).key()["limit"] == 5
    text = ReferenceConfig(text="{language}.txt")
    assert set(text.key("text", "data_dir")) == {"task", "unit", "segment_tokens", "max_segments"}
    assert ReferenceConfig(hub="a/b").key()["hub"] == "a/b"


def test_reasoning_has_no_likelihood_so_a_weight_is_chosen_after_the_default_prompt(data: Path) -> None:
    plan = planned(data, task="xcopa", development=["vi"], prompt="xlt")
    choices = [s.config for s in steps(plan, "predict") if s.config["split"] == "validation"]
    tests = [s.config for s in steps(plan, "predict") if s.config["split"] == "test"]
    assert {(c["scoring"], c.get("prompt")) for c in choices} == {("auto", None)}
    assert {(c["scoring"], c["prompt"]) for c in tests} == {("generation", "xlt")}


# Reference tasks.


def test_a_task_with_labels_is_the_reference_of_another(data: Path) -> None:
    plan = planned(
        data, task="xcopa", targets=["th"], development=["vi"], reference={"task": "nusax"}, selection={"weight": 1.0}
    )
    trained = {(s.config["task"]["task"], s.config["language"]) for s in steps(plan, "train")}
    assert trained == {("xcopa", "en"), ("nusax", "th"), ("nusax", "en")}


def test_a_sample_of_training_items_leaves_the_reference_text_as_it_was(data: Path) -> None:
    whole, sample = planned(data), planned(data, training={"limit": 9})
    keys = [{s.key for s in steps(p, "train") if "reference" in s.config} for p in (whole, sample)]
    assert keys[0] == keys[1] and len(keys[0]) == 3


def test_the_task_itself_may_be_the_reference_from_another_split(data: Path) -> None:
    (data / "copa_en/val.jsonl").write_text("x\n")
    reference = {"task": "xcopa", "split": "validation"}
    plan = planned(data, task="xcopa", development=[], reference=reference, selection={"weight": 1.0})
    trained = {(s.config["language"], s.config["split"]) for s in steps(plan, "train")}
    assert trained == {("en", "train"), ("en", "validation"), ("sw", "validation")}


def test_no_reference_is_learned_from_the_rows_of_a_test(data: Path) -> None:
    (data / "tydiqa_goldp").mkdir()
    for name in ("english_tydiqa_train", "english_tydiqa_dev", "swahili_tydiqa_dev"):
        (data / f"tydiqa_goldp/{name}.json").write_text("x\n")
    reference = {"task": "xquad-tydiqa", "split": "validation"}
    with pytest.raises(ConfigError, match="would read the rows of a test"):
        planned(data, task="tydiqa", development=[], reference=reference, selection={"weight": 1.0})


def test_an_encoder_without_a_language_head_has_an_initial_adapter_all_the_same(data: Path) -> None:
    changes = {"task": "xcopa", "targets": ["th"], "development": [], "selection": {"weight": 1.0}}
    plan = planned(data, "encoder", reference={"task": "nusax"}, methods=["control-add"], **changes)
    (initial,) = [s for s in steps(plan, "train") if s.config.get("initial")]
    assert initial.config["head"] == {"kind": "classification", "labels": 3}


def test_labels_of_the_reference_task_may_be_in_another_split(data: Path) -> None:
    reference = {"task": "xcopa", "split": "validation"}
    with pytest.raises(DataError, match="'xcopa' has no 'validation' data for 'en'"):
        planned(data, reference=reference, selection={"weight": 1.0})
    (data / "copa_en/val.jsonl").write_text("x\n")
    plan = planned(data, reference=reference, selection={"weight": 1.0})
    splits = {(s.config["task"]["task"], s.config["split"]) for s in steps(plan, "train")}
    assert splits == {("mgsm", "train"), ("xcopa", "validation")}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "clm"}, "give `text` .* or `hub`"),
        ({"task": "clm", "text": "{language}.txt", "hub": "a/b"}, "give `text` .* or `hub`"),
        ({"task": "nusax", "text": "{language}.txt"}, "has labels: it takes no `text`"),
    ],
)
def test_a_reference_says_what_it_reads(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validated(ReferenceConfig, values)


def test_text_from_the_hub_is_read_as_far_as_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    read: list[int] = []

    def endless(*args: Any, **options: Any) -> Any:
        assert args[1] == "2023.sw" and options["streaming"]
        for number in range(10**9):
            read.append(number)
            yield {"text": f"Title {number}\n\nBody {number}", "id": number}

    monkeypatch.setattr(datasets, "load_dataset", endless)
    config = ReferenceConfig(hub="some/wiki", hub_config="2023.{language}", max_segments=3)
    monkeypatch.setattr("lingraft.tasks.sources.HubSource.pinned", lambda self: "c" * 40)
    text = reference_text(config, "sw", None)
    lines = iter(text.lines())
    assert [next(lines) for _ in range(3)] == ["Title 0", "Body 0", "Title 1"]
    assert len(read) <= 3
    assert text.digest() == f"hub:some/wiki@{'c' * 40}:2023.sw:train"


# The paper's languages.


def test_the_paper_s_protocol_fills_in_its_languages_by_task() -> None:
    for task, targets in PAPER_TARGETS.items():
        experiment = load_experiment(RECIPES / "llama2-lora.yaml", [f"task={task}", "selection.weight=0.5"])
        assert experiment.source == "en" and experiment.targets == targets and experiment.groups == {}
        assert experiment.development == ("fr",) if "fr" in targets else ("vi",)
    experiment = load_experiment(RECIPES / "llama2-lora.yaml", ["task=xnli", "source=fr"])
    assert "fr" not in experiment.targets and experiment.development == ("vi",)
    with pytest.raises(ConfigError, match="the paper has no task 'topics'"):
        load_experiment(RECIPES / "llama2-lora.yaml", ["task=topics"])


def test_cells_that_nobody_has_labels_for_are_absent_under_the_paper_s_protocol_only(data: Path) -> None:
    asked = {"task": "xcopa", "targets": ["sw", "tr"], "development": ["vi"]}
    with pytest.raises(DataError, match="'tr'"):
        planned(data, **asked)
    plan = planned(data, protocol="paper", **asked)
    assert {(c.method, c.language) for c in plan.cells} == {(m, "sw") for m in ("vanilla", "eng-ft", "adamergex")}
    assert ("adamergex", "tr", "no labelled test data") in plan.absent


def test_a_source_without_labels_leaves_the_base_model_alone(data: Path) -> None:
    plan = planned(data, protocol="paper", task="xcopa", source="th", targets=["sw"], development=["vi"])
    assert {c.method for c in plan.cells} == {"vanilla"}
    assert ("adamergex", "sw", "no labelled training data in Thai") in plan.absent
    assert not steps(plan, "train") and not plan.selections


def test_under_the_paper_s_protocol_a_tuned_language_is_reported_and_said_not_to_be_held_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, protocol="paper", development=["sw"])
    assert any("Swahili is also a target, so not held out" in note for note in notes(results(run)))


def test_a_tuned_language_is_never_reported_on_the_items_it_was_tuned_on() -> None:
    with pytest.raises(ConfigError, match="on the items that are reported"):
        load_experiment(RECIPES / "llama2-lora.yaml", ["evaluation.split=validation"])


# What cannot be.


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("encoder", {}, "'mgsm' is answered in free text.*an encoder serves topics, xcopa"),
        ("encoder", {"task": "xcopa", "development": ["vi"]}, "'clm' is not one that an encoder learns.*reference.task=mlm"),
        (
            "encoder",
            {"task": "xcopa", "development": ["vi"], "reference": {"task": "mlm", "text": "text/{language}.txt"}},
            "'vanilla' asks the model in words",
        ),
        ("encoder-decoder", {}, "'clm' is not one that an encoder-decoder learns.*prefix-lm or span-corruption"),
        ("decoder", {"reference": {"task": "mlm", "text": "text/{language}.txt"}}, "'mlm' is not one that a decoder learns"),
        ("decoder", {"methods": ["adamergex:entropy"]}, "free answers have no entropy"),
        ("decoder", {"task": "nusax", "methods": ["xlt-adamergex"]}, "'nusax' has no prompt 'xlt-adamergex'"),
        ("decoder", {"prompt": "papr"}, "no prompt 'papr'.*paper"),
        ("decoder", {"task": "xquad", "targets": ["th"], "development": ["vi"]}, "λ cannot be chosen on Vietnamese"),
        (
            "encoder-decoder",
            {"reference": {"task": "prefix-lm", "text": "text/{language}.txt"}, "adapter": {"family": "prefix"}},
            "two stacks",
        ),
        ("decoder", {"methods": ["projection"]}, "line by line|plain text"),
    ],
)  # fmt: skip
def test_what_a_backbone_or_task_cannot_do_is_said_before_anything_is_loaded(
    data: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        planned(data, kind, **changes)
    import re

    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


def test_an_encoder_learns_each_task_with_its_head(data: Path) -> None:
    reference = {"task": "mlm", "text": "text/{language}.txt"}
    methods = ["eng-ft", "adamergex"]
    plan = planned(data, "encoder", task="xcopa", development=["vi"], reference=reference, methods=methods)
    heads = {s.label: s.config["head"]["kind"] for s in steps(plan, "train")}
    assert heads["train xcopa en seed 0"] == "multiple_choice" and heads["train mlm sw seed 0"] == "masked_lm"
    assert {s.config["scoring"] for s in steps(plan, "predict")} == {"head"}
    nusax = {"task": "nusax", "targets": ["jv"], "development": [], "selection": {"weight": 1.0}}
    plan = planned(data, "encoder", reference=reference, methods=methods, **nusax)
    trained = {s.label: s.config["head"] for s in steps(plan, "train")}
    assert trained["train nusax en seed 0"] == {"kind": "classification", "labels": 3}


# A method that was asked on a sample.


def test_a_sample_is_compared_on_the_items_it_shares(tmp_path: Path) -> None:
    right = {
        "eng-ft": {"en": ["1111"], "sw": ["1010"], "vi": ["1100"]},
        "xlt": {"en": ["11"], "sw": ["01"], "vi": ["11"]},
    }
    found = results(make_run(tmp_path, right))
    sw = found["methods"]["xlt"]["languages"]["sw"]
    # The first two of Eng-FT's four items: one right of two, as for XLT, and not the same one.
    assert sw["value"] == 0.5 and sw["difference"] == 0
    assert found["methods"]["xlt"]["languages"]["vi"]["difference"] == 0
    assert found["items"]["sw"] == 4 and found["samples"]["xlt"]["sw"] == 2
    assert any("a sample of 2 of 4 items" in note for note in notes(found))
