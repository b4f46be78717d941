"""Every recipe, end to end: random models of two layers, a dozen made-up items a split, all that a recipe compares."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lingraft.cli import main
from lingraft.config import Experiment, load_experiment
from lingraft.languages import LANGUAGES
from lingraft.locating import locate
from lingraft.methods import method
from lingraft.plan import Plan, characters, make_plan
from lingraft.predictions import read_generated, read_predictions
from lingraft.protocols import PAPER_TARGETS
from lingraft.store import read_json, write_json
from lingraft.tasks.sources import without_the_hub
from tests.conftest import save_tiny_model
from tests.integration.tiny_data import PARALLEL, TRANSLATED, write_all

ROOT = Path(__file__).parents[2] / "recipes"
COMPARED = "madx-lfsft-gemma3-270m"
RECIPES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix()
    for pattern in ("adamergex/*", "flare/*", "gemma3-270m/*", COMPARED)
    for path in ROOT.glob(f"{pattern}.yaml")
)
ARCHITECTURES = {
    "NousResearch/Llama-2-7b-hf": "llama",
    "FacebookAI/xlm-roberta-base": "xlm-roberta",
    "google-t5/t5-base": "t5",
    "google/mt5-base": "mt5",
    "FacebookAI/xlm-roberta-large": "xlm-roberta",
    "google/mt5-xl": "mt5",
    "meta-llama/Llama-3.1-8B": "llama",
    "google/gemma-2-9b": "gemma2",
    "demo": "gemma3_text",
}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "gemma2": {"max_position_embeddings": 2048, "head_dim": 8, "sliding_window": 64},
    "gemma3_text": {"max_position_embeddings": 2048, "head_dim": 8, "sliding_window": 64},
}
TARGETS = {"xcopa": "sw th", "xnli": "fr th de", "mgsm": "sw th", "xquad": "de th", "xlsum": "sw th"}
"""Targets of every task of the AdaMergeX paper; the first two are taken, of those that are not the source."""
FUSED = {"xnli": "[fr, th]", "tydiqa": "[sw, te]", "nusax": "[jv, min]"}
"""Targets of every task of the FLARE paper."""
METRICS = dict.fromkeys(("xquad", "xquad-tydiqa", "tydiqa"), "exact match") | {"xlsum": "ROUGE-L"}
FIGURES = {"exact match": "exact_match", "ROUGE-L": "rouge_l", "accuracy": "accuracy"}

SECOND = [
    ("adamergex/llama2-lora", "mgsm"),
    ("adamergex/llama2-lora", "xlsum"),
    ("adamergex/llama2-lora", "xquad"),
    ("adamergex/llama2-lora", "xquad-tydiqa"),
    ("adamergex/llama2-ia3", "xnli"),
    ("adamergex/llama2-lora-references", "xlsum"),
    ("adamergex/llama2-lora-rule", "xquad"),
    ("adamergex/llama2-ia3-rule", "xquad"),
    ("adamergex/llama2-lora-sources", "xlsum"),
    ("adamergex/xlmr-prefix", "xquad"),
    ("adamergex/xlmr-madx-lfsft", "xquad"),
    ("adamergex/t5-lora", "xcopa"),
    ("adamergex/mt5-lora", "xlsum"),
    *((f"flare/{model}", task) for model in ("xlmr-large", "mt5-xl", "llama3.1-8b") for task in ("tydiqa", "nusax")),
]
QUICK = {
    ("adamergex/llama2-lora", None),
    ("adamergex/llama2-lora-rule", "xquad"),
    ("adamergex/xlmr-lora", None),
    ("adamergex/t5-lora", None),
    ("gemma3-270m/mgsm", None),
    (COMPARED, None),
    ("adamergex/xlmr-madx-lfsft", "xquad"),
    ("flare/xlmr-large", None),
    ("flare/mt5-xl", "tydiqa"),
    ("flare/llama3.1-8b", None),
}
"""Those that run with every change: the main comparisons, an encoder, an encoder-decoder, extraction and generation."""
PAIRS = [(name, None) for name in RECIPES] + SECOND


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a model is made when it is first asked for."""
    return tmp_path_factory.mktemp("models")


def recipe(name: str) -> Path:
    return ROOT / f"{name}.yaml"


def overrides(name: str, task: str | None, models: Path) -> list[str]:
    """What makes a recipe small; everything that it is about stays."""
    asked = load_experiment(recipe(name), [] if task is None else [f"task={task}"])
    architecture = ARCHITECTURES[asked.backbone.model]
    folder = models / architecture
    if not folder.exists():
        save_tiny_model(folder, architecture, **CHANGES.get(architecture, {}))
    length = 384 if architecture in ("xlm-roberta", "t5", "mt5") else 640
    changed = [
        *([] if task is None else [f"task={task}"]),
        f"backbone={{model: '{folder}', dtype: float32, device: cpu}}",
        "training.epochs=0.5",
        "training.batch_size=4",
        f"training.max_length={length}",
        "selection.weights=[0.5]",
        "selection.limit=3",
        "evaluation.limit=4",
        "evaluation.new_tokens=6",
    ]
    if asked.protocol == "paper":
        targets = [code for code in TARGETS[asked.task.partition("-")[0]].split() if code != asked.source]
        changed.append(f"targets=[{', '.join(targets[:2])}]")
    if asked.task == "xquad-tydiqa" and asked.protocol == "paper":
        changed.append("development=[ar, ru]")  # Its validation items are in other languages than the paper's.
    if name.startswith("flare/"):
        changed += two_languages(asked, folder)
    if asked.reference_training is not None:
        changed += [
            "reference_training.epochs=0.5",
            "reference_training.batch_size=4",
            f"reference_training.max_length={length}",
        ]
    stacks = {row.stack for row in map(method, asked.methods)} - {None}
    if "lfsft" in stacks:
        changed += ["lfsft.language_entries=400", "lfsft.task_entries=600"]
    for part in (f"{stack}.{part}" for stack in stacks for part in ("training", "reference_training")):
        changed += [f"{part}.epochs=0.5", f"{part}.batch_size=4", f"{part}.max_length={length}"]
    if not asked.reference.labelled and asked.reference.task != "none":
        small = {"segment_tokens": 48, "max_segments": 6}
        changed += [f"reference.{key}={value}" for key, value in {"hub": "null", "text": PARALLEL, **small}.items()]
    return changed


def two_languages(asked: Experiment, folder: Path) -> list[str]:
    """Two targets, and counterparts from files instead of a translation model."""
    tydiqa = asked.task == "tydiqa"
    changed = [f"targets={FUSED[asked.task]}", "translation.model=null", "seeds=[0]", f"fusion.encoder={folder}"]
    if tydiqa:  # Its languages have items of their own.
        kept = ", ".join(name for name in asked.methods if name != "translate-test")
        changed += [f"translation.files={TRANSLATED}", "translation.missing=skip", f"methods=[{kept}]"]
    return changed


def lingraft(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def done(*words: object) -> Result:
    result = lingraft(*words)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize(
    ("name", "task"),
    [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.full) for pair in PAIRS],
    ids=[f"{name}:{task}" if task else name for name, task in PAIRS],
)
@pytest.mark.usefixtures("wide")
def test_a_recipe_runs_to_its_report(name: str, task: str | None, data: Path, models: Path, tmp_path: Path) -> None:
    changed = overrides(name, task, models)
    out = tmp_path / "run"
    words = ["run", recipe(name), *changed, "--data-dir", data, "--out", out, "--store", tmp_path / "store"]
    first = done(*words)
    asked = load_experiment(recipe(name), changed)
    shown = read_json(out / "results.json")
    check_figures(asked, shown)
    check_report(asked, shown, (out / "report.md").read_text(encoding="utf-8"), first.stdout)
    check_answers(out, asked)
    before = sorted((tmp_path / "store").rglob("step.json"))
    again = done(*words)
    assert f"nothing to do: all {len(before)} steps are finished" in " ".join(again.stderr.split())
    assert sorted((tmp_path / "store").rglob("step.json")) == before


def check_figures(asked: Experiment, shown: dict[str, Any]) -> None:
    """Every method has a figure in every target, from the items that were asked for."""
    assert set(shown["methods"]) == set(asked.methods)
    assert shown["metric"] == FIGURES[METRICS.get(asked.task, "accuracy")]
    for name, row in shown["methods"].items():
        assert set(row["languages"]) - {asked.source} == set(asked.targets), name
        for cell in row["languages"].values():
            assert 0 <= cell["interval"][0] <= cell["value"] <= cell["interval"][1] <= 1
        assert row["average"] is not None
    assert {shown["items"][code] for code in asked.targets} == {4}
    grafts = {name for name in asked.methods if method(name).adapter == "graft"}
    assert set(shown["selections"]) == grafts
    for name, selection in shown["selections"].items():
        weights = [point["weight"] for point in selection["curve"]]
        assert weights == ([0.5, 1.0] if name == "arimerge" else [0.0, 0.5])
        assert all(point["gold_log_likelihood"] < 0 for point in selection["curve"])


def check_report(asked: Experiment, shown: dict[str, Any], report: str, printed: str) -> None:
    """A row for every method; the metric is named; what could not be read, and cells without data, are said."""
    metric = METRICS.get(asked.task, "accuracy")
    assert f"{asked.name}: {metric}, percent" in printed
    assert f"{metric[0].upper()}{metric[1:]} in percent" in report
    head = report.split("\n\n")[2].splitlines()
    titles = [line.split(" | ")[0].removeprefix("| ") for line in head[2:]]
    assert titles == [method(name).title for name in asked.methods]
    written = [
        c["also"] for m in shown["methods"].values() for c in m["languages"].values() if "unparsable" in c["also"]
    ]
    assert ("## Unparsable" in report) == any(figures["unparsable"] > 0 for figures in written)
    for name, code, why in shown["absent"]:
        assert code == asked.source and why == "no labelled test data", name
        assert re.search(rf"^- .*{re.escape(method(name).title)}.*, English: {why}\.$", report, re.MULTILINE)


def check_answers(out: Path, asked: Experiment) -> None:
    """What the models said is there to be read back, item by item and method by method."""
    manifest = read_json(out / "manifest.json")
    store = out / manifest["store"]
    extracts = asked.task in ("xquad", "tydiqa")
    heads = "xlm" in asked.backbone.model and not extracts
    for cell in manifest["cells"]:
        written = not heads and read_json(store / cell["predict"] / "step.json")["config"]["scoring"] == "generation"
        if written or extracts:
            said = read_generated(store / cell["predict"])
            assert all(item.text is not None and item.references for item in said)
        else:
            said = read_predictions(store / cell["predict"])
            assert all(len(item.scores) > item.gold for item in said)
        assert len(said) == 4 and all(item.prompt for item in said)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    ("task", "source", "target", "methods"),
    [("xcopa", "th", "sw", "[vanilla, eng-ft, adamergex]"), ("xlsum", "de", "fr", "[eng-ft, adamergex]")],
)
def test_what_the_paper_s_tables_cannot_have_is_said(
    task: str, source: str, target: str, methods: str, data: Path, models: Path, tmp_path: Path
) -> None:
    """Tables 4 and 5: only two tasks have labels in other languages than English, XL-Sum none in German."""
    name, out = "adamergex/llama2-lora-sources", tmp_path / "run"
    changed = [f"source={source}", f"targets=[{target}]", f"methods={methods}"]
    words = ["run", recipe(name), *overrides(name, task, models), *changed, "--data-dir", data, "--out", out]
    printed, report = done(*words).stdout, (out / "report.md").read_text(encoding="utf-8")
    lacking = f"no labelled training data in {LANGUAGES[source].name}"
    shown = read_json(out / "results.json")
    assert {name: why for name, code, why in shown["absent"] if code == target} == {
        "eng-ft": lacking,
        "adamergex": lacking,
    }
    rows = dict(line.strip("| ").rsplit(" | ", 1) for line in report.split("\n\n")[2].splitlines()[2:])
    figures = {name.partition(" |")[0]: figure for name, figure in rows.items()}
    assert figures["Eng-FT"] == figures["AdaMergeX"] == "no data"
    assert ("Vanilla" in figures) == ("vanilla" in methods)
    assert figures.get("Vanilla") != "no data"
    said = f"Eng-FT, AdaMergeX, {LANGUAGES[target].name}: {lacking}."
    assert said in printed and said in report


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("task", "absent"), [("xquad", {"fr", "sw"}), ("xlsum", {"de", "el"})])
def test_languages_that_a_task_has_not_are_said_before_anything_runs(
    task: str, absent: set[str], data: Path, models: Path, tmp_path: Path
) -> None:
    name = "adamergex/llama2-lora"
    everything = "targets=[de, ru, fr, es, zh, vi, tr, ar, el, th, hi, sw]"
    words = [
        "run",
        recipe(name),
        *overrides(name, task, models),
        everything,
        "--data-dir",
        data,
        "--out",
        tmp_path / "run",
    ]
    told = json.loads(done(*words, "--dry-run", "--json").stdout)["absent"]
    assert {code for _, code, _ in told if code != "en"} == absent
    assert all(why == "no labelled test data" for _, _, why in told)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", RECIPES)
def test_the_cost_of_a_recipe_is_known_before_it_is_begun(name: str, data: Path, tmp_path: Path) -> None:
    """As it stands, on the model it names, which nobody has fetched; the demo's recipes read files."""
    files = ["--data-dir", data] if "gemma3" in name else []
    words = ["run", recipe(name), *files, "--out", tmp_path / "run", "--dry-run"]
    printed = done(*words).stdout
    assert all(said in printed for said in ("would train:", "to do", "tokens read", "GPU hours", "GiB of memory"))
    found = json.loads(done(*words, "--json").stdout)
    cost = found["cost"]
    # An initial adapter is a training of no steps.
    trained = [step for step in found["pending"] if step["kind"] == "train" and "initial" not in step["label"]]
    assert cost["steps"]["train"]["count"] == len(trained) > 2
    assert cost["steps"]["train"]["tokens"] > 0 < cost["memory"] and cost["gpu_hours"] > 0
    assert all(row["gpu_hours"] >= 0 and row["tokens"] >= 0 for row in cost["steps"].values())
    # What asks the hub for a commit is unresolved offline; nothing else is.
    assert bool(found["unresolved"]) == (not files)
    assert not (tmp_path / "run").exists()


def planned(name: str, *changes: str) -> Plan:
    with without_the_hub():
        experiment = load_experiment(recipe(name), changes)
        return make_plan(experiment, locate(experiment.backbone))


@pytest.mark.parametrize(
    "changes", [(), ("task=xquad", "targets=[th, el, ru, sw]", "training.max_length=384")], ids=["xcopa", "xquad"]
)
def test_the_recipe_with_mad_x_and_lf_sft_shares_the_trainings_of_the_one_without(changes: tuple[str, ...]) -> None:
    own = "methods=[eng-ft, adamergex]"  # The controls need an untrained adapter and other languages besides.
    plans = [
        planned("adamergex/xlmr-prefix", *changes, own),
        planned("adamergex/xlmr-madx-lfsft", *changes),
    ]
    alone, beside = ({s.label: s.key for s in plan.steps if s.kind == "train"} for plan in plans)
    shared = {label: key for label, key in alone.items() if label in beside}
    assert shared == {label: beside[label] for label in shared}
    assert set(shared) == set(alone) > set()
    assert {label.split()[1] for label in set(beside) - set(shared)} == {"madx", "lfsft"}
    absent = {(name, code) for name, code, _ in plans[1].absent if code != "en"}
    assert absent == ({(name, "sw") for name in ("eng-ft", "adamergex", "madx", "lfsft")} if changes else set())


def test_all_methods_of_the_comparison_read_the_same_text_as_often(data: Path) -> None:
    plan = planned(COMPARED, f"data_dir={data}")
    read = characters(plan.experiment, plan.steps)
    sizes = {step.label: read[step.key] for step in plan.steps if step.kind == "train"}
    for language in ("en", "sw", "yo", "de"):
        names = ("", "madx ", "lfsft ")
        assert len({sizes[f"train {name}clm {language} seed 0"] for name in names}) == 1
        assert len({sizes[f"train {name}topics en seed 0"] for name in names}) == 1


@pytest.mark.usefixtures("wide")
def test_the_disk_that_source_states_would_take_is_known_before_they_are_computed(tmp_path: Path) -> None:
    """XNLI's, of all items and layers: more than a terabyte; computed at every step they take none."""
    words = [
        "run",
        recipe("flare/xlmr-large"),
        "methods=[flare]",
        "targets=[sw]",
        "seeds=[0]",
        "--out",
        tmp_path / "run",
    ]
    known = [json.loads(done(*words, f"fusion.cache={on}", "--dry-run", "--json").stdout) for on in ("false", "true")]
    assert known[0]["cost"]["disk"] == 0 and 1e12 < known[1]["cost"]["disk"] < 1e13
    assert [found["cost"]["steps"].get("states", {}).get("count", 0) for found in known] == [0, 1]
    assert known[1]["cost"]["steps"]["train"]["flops"] < known[0]["cost"]["steps"]["train"]["flops"]
    # Both translate: the training items into Swahili, the test items into English.
    assert all(found["cost"]["steps"]["translate"]["count"] == 2 for found in known)


@pytest.fixture(scope="module")
def compared(data: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the smallest run of the main recipe."""
    out, name = tmp_path_factory.mktemp("beside") / "run", "adamergex/llama2-lora"
    changed = [*overrides(name, None, models), "methods=[vanilla, eng-ft]", "targets=[sw]"]
    done("run", recipe(name), *changed, "--data-dir", data, "--out", out)
    return out


@pytest.mark.usefixtures("wide")
def test_the_paper_s_figures_stand_beside_no_other_backbone_s(compared: Path) -> None:
    refused = lingraft("report", compared, "--beside", "paper")
    assert refused.exit_code == 2
    assert "the paper has no figure for this task, backbone and structure" in refused.stderr
    assert "leave --beside out" in refused.stderr
    assert "Beside the paper" not in (compared / "report.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("wide")
def test_the_paper_s_figures_stand_beside_those_of_a_backbone_of_its_name(compared: Path) -> None:
    manifest = read_json(compared / "manifest.json")
    named = {
        **manifest["experiment"],
        "backbone": {**manifest["experiment"]["backbone"], "model": "NousResearch/Llama-2-7b-hf"},
        "targets": list(PAPER_TARGETS["xcopa"]),
        "evaluation": {**manifest["experiment"]["evaluation"], "limit": None, "written_limit": None},
    }
    other = compared.parent / "named"
    other.mkdir()
    write_json(other / "manifest.json", {**manifest, "experiment": named})
    printed = done("report", other, "--beside", "paper").stdout
    report = (other / "report.md").read_text(encoding="utf-8")
    table = report.partition("## Beside the paper")[2].split("\n\n")[1].splitlines()
    assert table[0] == "| method | ours, xcopa | AdaMergeX paper |"
    rows = [line.strip("| ").split(" | ") for line in table[2:]]
    assert [row[0] for row in rows][:2] == ["Vanilla", "Eng-FT"]
    assert rows[0][2] == "18.1, average of five tasks" and rows[0][1] not in ("not run", "no data")
    assert ["AdaMergeX", "not run", "33.3, average of five tasks"] in rows
    assert "Beside the paper" in printed and "33.3, average of five tasks" in printed
    done("report", other)  # Without the option they are left out again.
    assert "Beside the paper" not in (other / "report.md").read_text(encoding="utf-8")
