"""FLARE by single commands: a first stage, a second stage of every kind, asked with and without counterparts, and mistakes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lingraft.adapter import Adapter, content_digest
from lingraft.backbones import Backbone
from lingraft.cli import main
from lingraft.config import BackboneConfig, FusionConfig, load_experiment
from lingraft.divergence import Divergence
from lingraft.errors import AdapterError
from lingraft.evaluation import predict
from lingraft.fusion.stages import first_digest, second_stage
from lingraft.locating import locate
from lingraft.merging import Combination
from lingraft.methods import CRITERIA
from lingraft.metrics import Prediction
from lingraft.tasks.items import Example
from lingraft.tasks.pairs import concatenated, paired
from lingraft.tasks.table import find_task
from tests.conftest import save_tiny_model

WORDS = {
    "en": ("river", "mountain", "goal", "match"),
    "sw": ("mto", "mlima mrefu", "bao", "mchezo wa leo"),
    "de": ("fluss", "berg", "tor", "spiel"),
}
YAML = """
name: two
backbone: {{model: "{model}", dtype: float32, device: cpu}}
data_dir: {data}
task: kind
tasks:
  kind:
    files: {{train: "{{language}}/train.jsonl", test: "{{language}}/test.jsonl"}}
    prompt: "Word: {{text}}\\nKind:"
    labels: [place, sport]
    id_field: id
  counted:
    files: {{train: "{{language}}/train.jsonl", test: "{{language}}/test.jsonl"}}
    prompt: "Word: {{text}}\\nKind:"
    labels: [place, sport]
source: en
targets: [sw]
adapter: {{rank: 2, alpha: 4, dropout: 0}}
training: {{learning_rate: 0.02, epochs: 2, batch_size: 4, warmup: 0, max_length: 64}}
fusion: {{plain: all}}
methods: [translate-train, input-fusion, flare]
seeds: [0]
"""
VALUES = (
    "adapter.rank=2", "adapter.alpha=4", "adapter.dropout=0", "training.learning_rate=0.02", "training.epochs=2",
    "training.batch_size=4", "training.warmup=0", "training.max_length=64",
)  # fmt: skip
PLAIN = "fusion.plain=all"
KINDS = ("lora", "concatenated", "fused", "fused-mt", "mixup")


def lingraft(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def done(*words: object) -> Any:
    """What a command gives as JSON; it must go well."""
    result = lingraft(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*words: object) -> str:
    """What a command says to a mistake."""
    result = lingraft(*words)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert result.stderr.count("error: ") == 1
    return result.stderr


def rows(language: str, split: str, count: int) -> list[dict[str, str]]:
    words = WORDS[language]
    return [
        {"id": f"{split}{n}", "text": words[n % 4] + "!" * (n // 4), "label": ("place", "sport")[n % 4 // 2]}
        for n in range(count)
    ]


def write(path: Path, found: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in two languages, in a third the test alone, tiny models, and an experiment that has the task."""
    folder = tmp_path_factory.mktemp("two")
    for language in WORDS:
        for split, count in (("train", 8), ("test", 6)):
            if (language, split) != ("de", "train"):
                write(folder / f"data/{language}/{split}.jsonl", rows(language, split, count))
    for architecture in ("llama", "bert"):
        save_tiny_model(folder / architecture, architecture)
    save_tiny_model(folder / "other", "llama", hidden_size=64)
    (folder / "two.yaml").write_text(YAML.format(model=folder / "llama", data=folder / "data"), encoding="utf-8")
    return folder


def where(place: Path, model: str = "llama", task: str = "kind") -> list[object]:
    common = ["--dtype", "float32", "--device", "cpu", "--data-dir", place / "data", "--tasks", place / "two.yaml"]
    return ["--model", place / model, "--task", task, *common]


@pytest.fixture(scope="module")
def first(place: Path) -> Callable[[str], Path]:
    """A first stage on a model, trained once."""

    def get(model: str) -> Path:
        out = place / f"first-{model}"
        if not out.exists():
            done("train", *where(place, model), "--language", "en", "--out", out, *VALUES)
        return out

    return get


@pytest.fixture(scope="module")
def second(place: Path, first: Callable[[str], Path]) -> Callable[[str], Path]:
    """A second stage of a kind, trained once; X-Mixup on an encoder, the others on a decoder."""

    def get(kind: str) -> Path:
        model = model_of(kind)
        out = place / f"second-{kind}"
        if not out.exists():
            more = [f"fusion.encoder={place / 'bert'}"] if kind == "fused-mt" else []
            stages = ["--first-stage", first(model), *([] if kind == "fused" else ["--second", kind])]
            done("train", *where(place, model), "--language", "sw", *stages, "--out", out, *VALUES, PLAIN, *more)
        return out

    return get


def model_of(kind: str) -> str:
    return "bert" if kind == "mixup" else "llama"


def evaluated(place: Path, kind: str, adapter: Path, out: Path, *more: object, language: str = "sw") -> list[Any]:
    """The scores of every candidate of every item."""
    done("evaluate", *where(place, model_of(kind)), "--language", language, "--adapter", adapter, "--out", out, *more)
    found = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["scores"] for line in found]


def scores(said: list[Prediction]) -> list[list[float]]:
    """The same of predictions in memory, to the digits that are written."""
    return [[round(score, 6) for score in one.scores] for one in said]


def examples(place: Path, language: str) -> list[Example]:
    task = find_task("kind", load_experiment(place / "two.yaml").tasks)
    return task.examples(task.sources(language, "test", place / "data"), language=language)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_and_asked_as_it_was_trained(
    place: Path, second: Callable[[str], Path], first: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    folder = second(kind)
    adapter = Adapter.load(folder)
    stage = second_stage(adapter)
    assert stage is not None and stage.digest == first_digest(first(model_of(kind)))
    record = json.loads((folder / "step.json").read_text())
    assert adapter.sidecar["second"] == stage.notes()
    # What was asked for; which encoder that was is known when it has been read.
    assert record["second"] == {k: v for k, v in stage.notes().items() if k != "encoder"}
    assert len(record["rows"]) == 1 and len(record["counterparts"].get("rows", [])) == (
        0 if kind in ("lora", "fused-mt") else 1
    )
    assert ("encoder" in record) == (kind == "fused-mt")

    both = paired(examples(place, "sw"), examples(place, "en")).examples
    given = {
        "lora": examples(place, "sw"),
        "concatenated": [concatenated(e) for e in both],
        "fused-mt": [Example(**{**vars(e), "source": e.asked}) for e in examples(place, "sw")],
    }.get(kind, both)
    backbone = Backbone(locate(BackboneConfig(model=str(place / model_of(kind)), dtype="float32", device="cpu")))
    expected, alone = (scores(predict(backbone, adapter, asked)) for asked in (given, examples(place, "sw")))
    assert evaluated(place, kind, folder, tmp_path / "with") == expected
    assert evaluated(place, kind, folder, tmp_path / "without", "--no-source") == alone
    assert (expected == alone) == (kind == "lora")


def test_commands_give_what_the_experiment_gives(
    place: Path, second: Callable[[str], Path], first: Callable[[str], Path], tmp_path: Path
) -> None:
    """Equal bytes of every second stage, equal notes, and equal answers to an adapter of the experiment's."""
    done("run", place / "two.yaml", "--out", tmp_path / "out", "--store", tmp_path / "store")
    trained = {}
    for folder in (tmp_path / "store" / "train").iterdir():
        if folder.is_dir() and not folder.name.startswith("."):
            trained[content_digest(folder)] = folder
    assert content_digest(first("llama")) in trained
    for kind in ("lora", "concatenated", "fused"):
        theirs = trained[content_digest(second(kind))]
        assert Adapter.load(theirs).sidecar["second"] == Adapter.load(second(kind)).sidecar["second"]
        answers = evaluated(place, kind, theirs, tmp_path / kind)
        kept = [p.read_text() for p in (tmp_path / "store" / "predict").glob("*/predictions.jsonl")]
        assert answers in [[json.loads(line)["scores"] for line in text.splitlines()] for text in kept]


def test_counterparts_of_a_file_are_those_of_the_task(
    place: Path, second: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = second("fused")
    known = evaluated(place, "fused", folder, tmp_path / "a")
    turned = write(tmp_path / "en.jsonl", rows("en", "test", 6)[::-1])
    assert evaluated(place, "fused", folder, tmp_path / "b", "--source-data", turned) == known
    german = evaluated(place, "fused", folder, tmp_path / "c", "--source-language", "de")
    of_file = write(tmp_path / "de.jsonl", rows("de", "test", 6))
    assert evaluated(place, "fused", folder, tmp_path / "d", "--source-data", of_file) == german != known
    # Another source language is remembered with the adapter.
    out = tmp_path / "from-de"
    stage = ["--first-stage", folder / "stage1", "--source-language", "de", "--source-data"]
    train = write(tmp_path / "train.jsonl", rows("de", "train", 8))
    done("train", *where(place), "--language", "sw", *stage, train, "--out", out, *VALUES)
    assert Adapter.load(out).sidecar["second"]["source"] == "de"
    told = evaluated(place, "fused", out, tmp_path / "e")
    assert told == evaluated(place, "fused", out, tmp_path / "f", "--source-language", "de")
    assert told != evaluated(place, "fused", out, tmp_path / "g", "--source-language", "en")


def test_of_a_task_without_ids_the_rows_of_a_file_are_in_order(
    place: Path, second: Callable[[str], Path], tmp_path: Path
) -> None:
    ask = ["evaluate", *where(place, task="counted"), "--language", "sw", "--adapter", second("fused")]
    path = write(tmp_path / "en.jsonl", rows("en", "test", 6))
    plain = done(*ask, "--out", tmp_path / "a")
    given = done(*ask, "--source-data", path, "--out", tmp_path / "b")
    assert {**plain, "out": ""} == {**given, "out": ""}
    short = write(tmp_path / "short.jsonl", rows("en", "test", 5))
    said = refused(*ask, "--source-data", short, "--missing", "skip", "--out", tmp_path / "c")
    assert "6 items cannot be paired with 5 counterparts: their ids are row numbers" in said


def test_items_without_counterpart_are_an_error_or_left_out_and_counted(
    place: Path, second: Callable[[str], Path], first: Callable[[str], Path], tmp_path: Path
) -> None:
    few = write(tmp_path / "few.jsonl", rows("en", "test", 4))
    ask = ["evaluate", *where(place), "--language", "sw", "--adapter", second("fused"), "--source-data", few]
    said = refused(*ask, "--out", tmp_path / "a")
    assert (
        "2 items have no counterpart (test4, test5)" in said and "--missing skip" in said and "translation." not in said
    )
    found = done(*ask, "--missing", "skip", "--out", tmp_path / "a")
    assert (found["items"], found["without_counterpart"]) == (4, 2)
    assert json.loads((tmp_path / "a/step.json").read_text())["without_counterpart"] == 2
    result = lingraft(*ask, "--missing", "skip", "--out", tmp_path / "b")
    assert "4 items; 2 items without counterpart left out" in result.stdout

    some = write(tmp_path / "some.jsonl", rows("en", "train", 5))
    train = ["train", *where(place), "--language", "sw", "--first-stage", first("llama"), "--source-data", some]
    assert "3 items have no counterpart" in refused(*train, "--out", tmp_path / "c", *VALUES)
    result = lingraft(*train, "--missing", "skip", "--out", tmp_path / "c", *VALUES)
    assert result.exit_code == 0 and "3 items without counterpart left out" in result.stderr
    assert Adapter.load(tmp_path / "c").sidecar["provenance"]["without_counterpart"] == 3


def test_no_counterparts_at_all(place: Path, second: Callable[[str], Path], tmp_path: Path) -> None:
    ask = ["evaluate", *where(place), "--language", "sw", "--out", tmp_path / "a", "--adapter"]
    for kind in ("fused", "concatenated"):
        said = refused(*ask, second(kind), "--source-language", "tr")
        assert "every item's counterpart in 'tr' is needed" in said
        assert all(name in said for name in ("--source-language", "--source-data", "--no-source"))
        said = refused(*ask, second(kind), "--source-data", tmp_path / "none.jsonl")
        assert "none.jsonl" in said and "--no-source" in said
    wrong = write(tmp_path / "wrong.jsonl", [{**row, "id": row["id"] + "x"} for row in rows("en", "test", 6)])
    said = refused(*ask, second("fused"), "--source-data", wrong, "--missing", "skip")
    assert "6 items have no counterpart" in said
    stages = ["--first-stage", second("fused") / "stage1", "--source-language", "de"]
    said = refused("train", *where(place), "--language", "sw", *stages, "--out", tmp_path / "b")
    assert "counterpart in 'de'" in said and "--source-data" in said and "--second lora" in said
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_wrong_first_stage_is_refused(
    place: Path, first: Callable[[str], Path], second: Callable[[str], Path], tmp_path: Path
) -> None:
    train = ["train", *where(place), "--language", "sw", "--out", tmp_path / "a", "--first-stage"]
    assert "there is no such adapter folder" in refused(*train, tmp_path / "none")
    assert "cannot be the first of another" in refused(*train, second("fused"))
    assert "another base model" in refused(*train, first("other"), *VALUES)
    done("train", *where(place), "--language", "en", "--adapter", "ia3", "--out", tmp_path / "ia3", "training.epochs=0")
    assert "ia3, which cannot be merged into the weights" in refused(*train, tmp_path / "ia3")

    swapped = tmp_path / "swapped"
    shutil.copytree(second("fused"), swapped)
    ask = ["evaluate", *where(place), "--language", "sw", "--out", tmp_path / "b", "--adapter", swapped]
    shutil.rmtree(swapped / "stage1")
    assert "the first stage of this adapter is missing" in refused(*ask)
    assert "(missing)" in lingraft("inspect", swapped).stdout
    sidecar = json.loads((swapped / "lingraft.json").read_text())
    shutil.copytree(second("fused") / "stage1", swapped / "stage1")
    (swapped / "lingraft.json").write_text(json.dumps({**sidecar, "second": {**sidecar["second"], "form": "behind"}}))
    assert "what the second stage is cannot be read" in refused(*ask)
    (swapped / "lingraft.json").write_text(json.dumps(sidecar))
    shutil.rmtree(swapped / "stage1")
    shutil.copytree(second("lora"), swapped / "stage1")
    assert "another one than this adapter was trained on" in refused(*ask)
    there = done("inspect", swapped)["adapters"][0]["first_stage"]
    assert there == f"another one here, {first_digest(second('lora'))}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--second", "lora"], "--second: of a second stage"),
        (["--source-language", "en", "--missing", "skip"], "--source-language, --missing: of a second stage"),
        (["fusion.function=add"], "fusion.function: of a second stage"),
        (["--start-from", "SECOND"], "stands on a first stage"),
        (["--first-stage", "FIRST", "--start-from", "FIRST"], "--start-from"),
        (["--first-stage", "FIRST", "--adapter", "ia3"], "LoRA on LoRA"),
        (["--first-stage", "FIRST", "adapter.modules=[q_proj]"], "fusion.modules"),
        (["--first-stage", "FIRST", "fusion.cache=true"], "fusion.cache: not read by --second fused"),
        (["--first-stage", "FIRST", "mixup.most=0.1"], "mixup.most: not read by --second fused"),
        (["--first-stage", "FIRST", "--second", "lora", "fusion.function=mul"], "fusion.function: not read"),
        (["--first-stage", "FIRST", "--second", "lora", "--source-language", "en"], "nothing is read of counterparts"),
        (["--first-stage", "FIRST", "--second", "mixup"], "this backbone is a decoder"),
        (["--first-stage", "FIRST", "fusion.fnction=mul"], "did you mean 'function'?"),
        (["--first-stage", "FIRST", "fusion.function=sub"], "'cross_attention'"),
    ],
)
def test_what_a_training_would_not_read_is_refused(
    place: Path,
    first: Callable[[str], Path],
    second: Callable[[str], Path],
    tmp_path: Path,
    words: list[str],
    said: str,
) -> None:
    known = {"FIRST": first("llama"), "SECOND": second("fused")}
    given = [known.get(word, word) for word in words]
    assert said in refused("train", *where(place), "--language", "sw", "--out", tmp_path / "a", *given)
    assert not (tmp_path / "a").exists()


def test_what_an_evaluation_would_not_read_is_refused(
    place: Path, first: Callable[[str], Path], second: Callable[[str], Path], tmp_path: Path
) -> None:
    ask = ["evaluate", *where(place), "--language", "sw", "--out", tmp_path / "a", "--source-language", "en"]
    assert "no adapter of two languages" in refused(*ask)
    assert "no adapter of two languages" in refused(*ask, "--adapter", first("llama"))
    assert "reads the items alone" in refused(*ask, "--adapter", second("lora"))
    assert "--no-source was given" in refused(*ask, "--adapter", second("fused"), "--no-source")


def test_what_is_inspected_says_what_a_second_stage_is(second: Callable[[str], Path]) -> None:
    shown = lingraft("inspect", second("fused")).stdout
    for word in ("fused", "add_relu", "source language en", "stage1/", "(here)"):
        assert word in shown
    found = done("inspect", second("fused"), second("lora"))
    assert [entry["second"]["form"] for entry in found["adapters"]] == ["beside", "alone"]
    assert {entry["first_stage"] for entry in found["adapters"]} == {"here"}
    assert found["similarity"]["cosine"] is not None
    assert "second" not in done("inspect", second("fused") / "stage1")["adapters"][0]


def test_a_second_stage_is_not_merged(
    first: Callable[[str], Path], second: Callable[[str], Path], tmp_path: Path
) -> None:
    one, two = first("llama"), second("fused")
    out = ["--out", tmp_path / "a"]
    for words, who in (
        (["merge", "--task", two, "--target-ref", one, "--source-ref", one, "--weight", 1], "task"),
        (["merge", "--task", two, "--target-ref", one, "--source-ref", one, "--weight", 0], "task"),
        (["merge", "--task", one, "--target-ref", two, "--source-ref", one, "--weight", 1], "target reference"),
        (["merge", f"{one}=0.5", f"{two}=0.5", "--method", "cat"], "adapter 2"),
        (["divergence", "--target-ref", one, "--source-ref", two], "source reference"),
    ):
        said = refused(*words, *out)
        assert f"the {who} is a second stage" in said and "merge the first stage" in said
        assert not (tmp_path / "a").exists()
    x, y = Adapter.load(one), Adapter.load(two)
    for compute in (
        lambda: y + (x - x),
        lambda: x + 0.5 * (y - x),
        lambda: Divergence(x, y).save(tmp_path / "a"),
        lambda: Combination().of([y, x], [1, 1]),
    ):
        with pytest.raises(AdapterError, match="is a second stage"):
            compute()


def test_a_dry_run_says_how_much_disk_the_states_take(place: Path) -> None:
    dry = ["run", place / "two.yaml", "--dry-run", "methods=[flare]"]
    assert "source states:" not in lingraft(*dry).stdout
    shown = lingraft(*dry, "fusion.cache=true")
    disk = done(*dry, "fusion.cache=true")["cost"]["disk"]
    assert disk > 0 and f"source states: {disk / 1e3:.1f} kB on disk" in shown.stdout


def test_the_list_of_methods_explains_its_variants() -> None:
    shown = " ".join(lingraft("methods").stdout.split())
    assert "METHOD:FUNCTION flare, flare-mt, flare-graft" in shown
    assert all(f"METHOD:{name}" in shown for name in CRITERIA if name != "labels")
    functions = {row["name"]: row["functions"] for row in done("methods")}
    assert FusionConfig().function in functions["flare"] and functions["adamergex"] == []
