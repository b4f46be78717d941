"""The paper's figures: nothing but what is printed, beside the run of the same setting and nothing else."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lingraft.config import load_experiment
from lingraft.costs.arithmetic import adapter_parameters
from lingraft.costs.shapes import KNOWN, shape_of
from lingraft.methods import method
from lingraft.protocols import PAPER_TARGETS
from lingraft.report.paper import FIVE, THREE, Published, beside, published
from lingraft.tasks.table import TASKS


def experiment(**changes: Any) -> dict[str, Any]:
    return {
        "task": "xnli",
        "source": "en",
        "targets": list(PAPER_TARGETS.get(changes.get("task", "xnli"), ("sw",))),
        "backbone": {"model": "NousResearch/Llama-2-7b-hf"},
        "adapter": {"family": "lora"},
        "reference": {"task": "clm"},
        "merge": {"modules": ["attention.query", "attention.value"]},
        **changes,
    }


def named(rows: list[Published], method: str, task: str | None) -> list[float]:
    return [row.value for row in rows if row.method == method and row.task == task]


def test_a_setting_of_the_paper_has_its_figures() -> None:
    rows = published(experiment())
    assert named(rows, "adamergex", None) == [33.3] and named(rows, "eng-ft", None) == [31.9]
    assert named(rows, "adamergex-cross", "xnli") == [-39.5]
    assert named(rows, "adamergex", "xnli") == [48.3]
    assert named(published(experiment(merge={"modules": "all"})), "adamergex", "xnli") == [45.2]
    assert named(published(experiment(merge={"modules": ["feed_forward"]})), "adamergex", "xnli") == []
    ia3 = published(experiment(task="xquad", adapter={"family": "ia3"}))
    assert named(ia3, "adamergex", None) == [28.5] and named(ia3, "adamergex-cross", "xquad") == [-0.7]


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "de"},
        {"task": "topics"},
        {"reference": {"task": "xcopa"}},
        {"backbone": {"model": "google/gemma-3-270m"}},
        {"backbone": {"model": "meta-llama/Llama-2-7b-chat-hf"}},
        {"backbone": {"model": "meta-llama/Llama-2-13b-hf"}},
        {"adapter": {"family": "bottleneck"}},
        {"targets": ["sw"]},
        {"evaluation": {"limit": 10}},
        {"evaluation": {"written_limit": 10}},
        {"evaluation": {"split": "validation"}},
        {"backbone": {"model": "NousResearch/Llama-2-7b-hf", "quantization": "nf4"}},
    ],
    ids=str,
)
def test_another_setting_has_none(changes: dict[str, Any]) -> None:
    assert published(experiment(**changes)) == []


@pytest.mark.parametrize("model", ["NousResearch/Llama-2-7b-hf", "/models/Llama-2-7b-hf/", "./llama2-7b"])
def test_a_backbone_is_known_by_the_last_part_of_its_name(model: str) -> None:
    assert published(experiment(backbone={"model": model}))
    assert published(experiment(backbone={"model": "/llama-2-7b/other"})) == []


@pytest.mark.parametrize("task", FIVE)
@pytest.mark.parametrize("family", ["lora", "ia3"])
def test_the_same_average_stands_beside_each_of_the_five_tasks_under_its_own_name(task: str, family: str) -> None:
    rows = published(experiment(task=task, adapter={"family": family}))
    averages = [row for row in rows if row.task is None]
    assert [row.method for row in averages] == ["vanilla", "eng-ft", "xlt", "xlt-eng-ft", "arimerge", "adamergex"]
    assert all(row.text.endswith("average of five tasks") for row in averages)
    assert {row.task for row in rows} <= {None, task}


def test_the_encoder_rows_are_prefix_tuning_s_and_each_task_s_own() -> None:
    encoder = {"backbone": {"model": "FacebookAI/xlm-roberta-base"}, "adapter": {"family": "prefix"}}
    xcopa = published(experiment(task="xcopa", **encoder))
    assert {row.method: row.text for row in xcopa} == {"madx": "59.5", "adamergex": "67.5"}
    xquad = published(experiment(task="xquad", **encoder))
    assert {row.title: row.value for row in xquad} == {"MAD-X": 54.7, "LF-SFT": 66.0, "AdaMergeX": 70.6}
    assert {row.method for row in xquad} == {"madx", "lfsft", "adamergex"}
    assert published(experiment(task="xnli", **encoder)) == []
    assert published(experiment(task="xcopa", **{**encoder, "adapter": {"family": "lora"}})) == []


@pytest.mark.parametrize("targets", [["th", "el", "ru"], ["el", "ru", "sw", "th"], list(PAPER_TARGETS["xquad"])])
def test_the_encoder_s_xquad_is_an_average_over_four_languages_and_that_is_said(targets: list[str]) -> None:
    """Of the four, Swahili has no test set."""
    encoder = {"backbone": {"model": "FacebookAI/xlm-roberta-base"}, "adapter": {"family": "prefix"}}
    rows = published(experiment(task="xquad", **encoder, targets=targets))
    assert [row.text for row in rows if row.method == "lfsft"] == ["66.0, Thai, Greek, Russian, Swahili"]
    assert published(experiment(task="xquad", **encoder, targets=["th", "el"])) == []
    llama = published(experiment(task="xquad", targets=["th", "el", "ru"]))
    assert llama == [], "the main results are averages over other languages"


def test_methods_that_are_run_stand_beside_the_paper_s_figures_of_them() -> None:
    run = found(adamergex=0.6, madx=0.55)
    encoder = {"backbone": {"model": "FacebookAI/xlm-roberta-base"}, "adapter": {"family": "prefix"}}
    run["experiment"] = experiment(task="xcopa", **encoder)
    assert beside(run)[1] == [["AdaMergeX", "60.0", "67.5"], ["MAD-X", "55.0", "59.5"]]
    run["experiment"] = experiment(task="xquad", **encoder)
    rows = {row[0]: row[1:] for row in beside(run)[1]}
    assert rows["LF-SFT"] == ["not run", "66.0, Thai, Greek, Russian, Swahili"]


def found(figure: str = "value", **averages: float | None) -> dict[str, Any]:
    methods = {
        name.replace("_", "-"): {"average": None if share is None else {figure: share}}
        for name, share in averages.items()
    }
    return {"experiment": experiment(), "methods": methods}


@pytest.mark.parametrize("figure", ["value", "accuracy"])
def test_ours_stands_beside_the_paper_s(figure: str) -> None:
    header, rows = beside(found(figure, eng_ft=0.412, control_add=0.4, adamergex=0.475, adamergex_cross=0.1))
    assert header == ["method", "ours, xnli", "AdaMergeX paper"]
    table = {row[0]: row[1:] for row in rows}
    assert table["Eng-FT"] == ["41.2", "31.9, average of five tasks"]
    assert table["AdaMergeX"] == ["47.5", "33.3, average of five tasks; 48.3, six languages"]
    assert table["AdaMergeX (cross rule)"] == ["10.0, −37.5 against AdaMergeX", "−39.5 against AdaMergeX"]
    assert table["control: no subtraction"] == ["40.0", "–"]
    assert table["AriMerge"] == ["not run", "25.4, average of five tasks"]
    # Ours come first, in their order.
    assert [row[0] for row in rows][:2] == ["Eng-FT", "control: no subtraction"]
    assert len(rows) == len(table)


def test_a_method_without_data_says_so() -> None:
    _, rows = beside(found(eng_ft=None))
    assert rows[0][:2] == ["Eng-FT", "no data"]


def test_a_run_of_another_setting_has_no_rows() -> None:
    run = found(eng_ft=0.5)
    run["experiment"] = experiment(source="fr")
    assert beside(run)[1] == []


LANGUAGES_OF = {
    "xnli": "ar bg de el es fr hi ru sw th tr ur vi zh",
    "tydiqa": "ar bn fi id ko ru sw te",
    "nusax": "ace ban bbc bjn bug id jv mad min nij su",
}
LLAMA = {"model": "meta-llama/Llama-3.1-8B", "quantization": "nf4"}


def fused(**changes: Any) -> dict[str, Any]:
    """An experiment of the FLARE paper."""
    return {
        "task": "xnli",
        "source": "en",
        "targets": LANGUAGES_OF.get(changes.get("task", "xnli"), "sw").split(),
        "backbone": {"model": "FacebookAI/xlm-roberta-large"},
        "adapter": {"family": "lora"},
        "reference": {"task": "none"},
        "translation": {"model": "facebook/nllb-200-3.3B", "splits": ["train", "test"]},
        "fusion": {"function": "add_relu", "modules": ["attention.query", "attention.value"]},
        "evaluation": {"limit": 5010},
        **changes,
    }


def test_a_setting_of_the_flare_paper_has_its_figures() -> None:
    rows = published(fused())
    assert {row.paper for row in rows} == {"FLARE"}
    averages = {row.method: row.value for row in rows if row.task is None}
    assert averages == {
        "translate-train": 65.88,
        "x-mixup": 64.69,
        "input-fusion": 65.41,
        "flare": 67.03,
        "flare-mt": 65.89,
    }
    assert named(rows, "flare:add", "xnli") == [80.53] and named(rows, "flare:mul_relu", "xnli") == []
    assert {row.task for row in rows} == {None, "xnli"}
    assert named(published(fused(backbone={"model": "google/mt5-xl"})), "flare", None) == [69.89]
    llama = published(fused(backbone=LLAMA))
    assert named(llama, "flare", None) == [57.42] and named(llama, "flare", "xnli") == []
    gemma = {"model": "google/gemma-2-9b", "quantization": "nf4"}
    assert named(published(fused(backbone=gemma)), "input-fusion", None) == [52.54]


def test_the_average_of_the_functions_is_that_of_the_main_results() -> None:
    """The paper's two tables agree: a figure that was copied wrongly would not."""
    each = [named(published(fused(task=task, evaluation={})), "flare:add_relu", task) for task in ("tydiqa", "nusax")]
    values = [value for found in [*each, named(published(fused()), "flare:add_relu", "xnli")] for value in found]
    assert len(values) == 3 and round(sum(values) / 3, 2) == named(published(fused()), "flare", None)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "id"},
        {"task": "topics"},
        {"targets": ["sw"]},
        {"backbone": {"model": "FacebookAI/xlm-roberta-base"}},
        {"backbone": {"model": "FacebookAI/xlm-roberta-large", "quantization": "nf4"}},
        {"backbone": {"model": "meta-llama/Llama-3.1-8B"}},
        {"backbone": {**LLAMA, "quantization": "int8"}},
        {"backbone": {**LLAMA, "model": "meta-llama/Llama-3.1-8B-Instruct"}},
        {"backbone": {"model": "google/gemma-2-9b-it", "quantization": "nf4"}},
        {"adapter": {"family": "ia3"}},
        {"evaluation": {}},  # The task's own sample is 1,000 items.
        {"evaluation": {"limit": 5009}},
        {"evaluation": {"limit": 5010, "written_limit": 100}},
        {"evaluation": {"limit": 5010, "split": "validation"}},
        {"translation": {}},
        {"translation": {"model": "facebook/nllb-200-3.3B", "splits": ["test"]}},
        {"fusion": {"modules": ["attention.query"]}},
    ],
    ids=str,
)
def test_another_setting_than_flare_s_has_none(changes: dict[str, Any]) -> None:
    assert published(fused(**changes)) == []


def test_flare_with_another_function_is_not_the_paper_s_flare() -> None:
    rows = published(fused(fusion={"function": "mul"}))
    assert {row.method for row in rows} & {"flare", "flare-mt"} == set()
    assert named(rows, "flare:mul", "xnli") == [79.59] and named(rows, "translate-train", None) == [65.88]


@pytest.mark.parametrize("task", THREE)
def test_the_paper_s_languages_are_all_that_a_task_tests(task: str) -> None:
    assert published(fused(task=task))
    assert published(fused(task=task, targets=LANGUAGES_OF[task].split()[1:])) == []
    assert published(fused(task=task, targets=[*LANGUAGES_OF[task].split(), "xx"])) == []


def nusax_run(**macro: float) -> dict[str, Any]:
    codes = LANGUAGES_OF["nusax"].split()
    methods = {
        name: {
            "average": {"value": 0.5},
            "languages": {code: {"value": 0.5, "also": {"macro_f1": share}} for code in codes},
        }
        for name, share in macro.items()
    }
    return {"experiment": fused(task="nusax"), "metric": "accuracy", "methods": methods}


def test_ours_is_measured_as_the_paper_measures() -> None:
    run = nusax_run(flare=0.7)
    header, rows = beside(run)
    assert header == ["method", "ours, nusax, macro-F1", "FLARE paper"]
    table = {row[0]: row[1:] for row in rows}
    assert table["FLARE"] == ["70.0", "67.03, average of three tasks; 79.18"]
    assert table["FLARE, mul"] == ["not run", "77.73"]
    assert table["X-Mixup"] == ["not run", "64.69, average of three tasks"]
    run["methods"]["flare"]["languages"]["ace"]["also"] = {}
    assert beside(run)[1][0][1] == "no data"


RECIPES = Path(__file__).parents[2] / "recipes" / "adamergex"
FLARE = Path(__file__).parents[2] / "recipes" / "flare"


def commands(path: Path) -> list[list[str]]:
    """The words behind `lingraft run` of every command in a file; of loops, those with a value for every name."""
    text = re.sub(r"\\\n[ #]*", "", path.read_text(encoding="utf-8"))  # One command may take several lines.
    model = "xlmr-large" if "xlmr" in text else path.stem
    names = {"$task": "xnli", "$source": "th", "$model": model, '"merge.modules=$modules"': "merge.modules=all"}
    for name, value in names.items():
        text = text.replace(name, value)
    text = text.replace("$(echo $modules | tr -dc a-z)", "all")
    return [shlex.split(line) for line in re.findall(r"^[ #]+lingraft run (.+)$", text, re.MULTILINE)]


@pytest.mark.parametrize("path", sorted(RECIPES.iterdir()), ids=lambda path: path.name)
def test_commands_of_the_recipes_are_experiments(path: Path) -> None:
    said = commands(path)
    assert said
    for recipe, *overrides in said:
        asked = load_experiment(RECIPES.parents[1] / recipe, overrides)
        assert asked.protocol == "paper"
        task = TASKS[asked.task]
        for code in asked.development:  # There is something to choose λ on.
            task.source(code, "validation", None, "commit")
        assert all(method(name).name == name for name in asked.methods)


@pytest.mark.parametrize("path", sorted(FLARE.iterdir()), ids=lambda path: path.name)
def test_commands_of_flare_s_recipes_are_experiments_of_its_paper(path: Path) -> None:
    """All that its README runs as it stands; NusaX is run without the languages that NLLB does not know."""
    said = commands(path)
    assert said
    for recipe, *overrides in said:
        asked = load_experiment(FLARE.parents[1] / recipe, overrides)
        plain = asked.model_dump(mode="json")
        assert bool(published(plain)) == (asked.task != "nusax") and asked.seeds == (0, 1, 2)
        assert asked.prompt in TASKS[asked.task].prompts and asked.adapter.key() == asked.adapter.key() | {
            "rank": 8,
            "alpha": 16.0,
            "dropout": 0.0,
        }
        assert not asked.fusion.normalize_source and not asked.fusion.mask_padding and asked.fusion.layer_offset == 0
        rows = {row.method for row in published(plain)}
        assert rows <= {method(name).name for name in rows}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("task", FIVE)
def test_a_recipe_is_for_any_of_the_five_tasks(path: Path, task: str) -> None:
    asked = load_experiment(path, [f"task={task}"])
    assert asked.name == path.stem and set(asked.targets) == set(PAPER_TARGETS[task]) - {asked.source}
    chosen = {"xcopa": ("vi",), "xquad": ("vi",)}.get(task, ("fr",))
    assert asked.source != "en" or asked.development == chosen


@pytest.mark.parametrize("path", sorted([*RECIPES.glob("*.yaml"), *FLARE.glob("*.yaml")]), ids=lambda path: path.stem)
def test_the_size_of_a_recipe_s_backbone_is_known(path: Path) -> None:
    asked = load_experiment(path)
    shape = shape_of(KNOWN[asked.backbone.model])
    assert 0 < adapter_parameters(shape, asked.adapter) < shape.parameters / 50


@pytest.mark.parametrize("folder", [RECIPES, FLARE], ids=lambda folder: folder.name)
def test_every_recipe_stands_in_the_readme(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in text for path in folder.glob("*.yaml"))
