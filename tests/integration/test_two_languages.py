"""Whole experiments with two languages on tiny models: every method, translations, files, kept states, leaks, interruptions."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingraft import training, translation
from lingraft.adapter import Adapter
from lingraft.config import load_experiment
from lingraft.errors import AdapterError, DataError, Interrupted, LingraftError, RunFailed, StoreError, UserError
from lingraft.estimating import estimates
from lingraft.fusion import attaching, cache
from lingraft.fusion.stages import first_digest
from lingraft.locating import locate
from lingraft.plan import Plan, Step, make_plan
from lingraft.report.results import results
from lingraft.report.tables import markdown
from lingraft.runner import Events, run
from lingraft.store import Store, read_json
from lingraft.tasks.translating import ROW
from tests.conftest import save_tiny_model
from tests.integration.test_pipeline import contents
from tests.unit.test_fusion_translators import save_nllb

TEXTS = {
    "en": ("the river", "a tall hill", "one more goal", "the team lost", "an island", "a match today"),
    "sw": ("mto", "kilima kirefu", "bao moja tena", "timu imeshindwa", "kisiwa", "mchezo leo"),
}
LABELS = ("place", "place", "sport", "sport", "place", "sport")
MOODS = {"en": ("glad", "sad", "joy", "grief"), "sw": ("furaha", "huzuni", "shangwe", "majonzi")}
YAML = """
name: two
backbone: {{model: "{model}", dtype: float32, device: cpu}}
data_dir: data
task: kind
tasks:
  kind:
    files: {{train: "{{language}}/train.jsonl", validation: "{{language}}/test.jsonl", test: "{{language}}/test.jsonl"}}
    prompt: "Words: {{text}}\\nKind:"
    labels: [place, sport]
    id_field: id
  mood:
    files: {{train: "{{language}}/mood.jsonl", validation: "{{language}}/mood.jsonl", test: "{{language}}/mood.jsonl"}}
    prompt: "Words: {{text}}\\nMood:"
    labels: [good, bad]
    id_field: id
source: en
targets: [sw]
reference: {{task: mood}}
adapter: {{rank: 2, alpha: 4, dropout: 0.05, modules: [attention.query, attention.value]}}
training: {{learning_rate: 0.02, epochs: 2, batch_size: 4, clip: 1.0, max_length: 64}}
fusion: {{encoder: "{encoder}"}}
selection: {{weight: 0.5}}
methods: [{methods}]
"""
SERVED = (
    "eng-ft", "translate-test", "translate-train", "input-fusion", "flare", "'flare:mul'", "'flare:cross_attention'",
    "flare-mt", "flare-graft",
)  # fmt: skip
CACHED = "fusion.cache=true"
READING = ("translate-test", "input-fusion", "x-mixup", "flare", "flare:mul", "flare:cross_attention", "flare-graft")
"""The methods that read the counterpart when asked."""


def rows(language: str, split: str, count: int = 8) -> list[dict[str, Any]]:
    """Items that stand in every language under the same id."""
    texts = TEXTS[language]
    return [
        {"id": f"{split}-{n}", "text": texts[n % 6] + (f" {n}" if n > 5 else ""), "label": LABELS[n % 6]}
        for n in range(count)
    ]


def write(path: Path, found: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_experiment(folder: Path, model: Path, encoder: Path | None, methods: Sequence[str] = SERVED) -> Path:
    """A small task in two languages, another one as reference, and the experiment."""
    for language in TEXTS:
        for split in ("train", "test"):
            write(folder / f"data/{language}/{split}.jsonl", rows(language, split))
        moods = [
            {"id": str(n), "text": text, "label": ("good", "bad")[n % 2]} for n, text in enumerate(MOODS[language])
        ]
        write(folder / f"data/{language}/mood.jsonl", moods)
    path = folder / "two.yaml"
    path.write_text(
        YAML.format(model=model, encoder=encoder or "none/none", methods=", ".join(methods)), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_nllb(tmp_path_factory.mktemp("nllb"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Path]:
    return {
        "decoder": tiny_folder,
        "encoder": save_tiny_model(tmp_path_factory.mktemp("bert"), "bert"),
        "encoder-decoder": save_tiny_model(tmp_path_factory.mktemp("t5"), "t5"),
    }


def methods_of(kind: str) -> tuple[str, ...]:
    return SERVED + {"decoder": ("vanilla",), "encoder": ("x-mixup",), "encoder-decoder": ("vanilla", "x-mixup")}[kind]


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], nllb: Path
) -> Callable[[str], tuple[Path, Plan]]:
    """The folder in which a kind of model has carried out the experiment. Tests copy it before they change it."""
    made: dict[str, tuple[Path, Plan]] = {}

    def get(kind: str) -> tuple[Path, Plan]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            path = write_experiment(folder, models[kind], nllb, methods_of(kind))
            made[kind] = folder, run(load_experiment(path), folder / "out").plan
        return made[kind]

    return get


KINDS = ("decoder", "encoder", "encoder-decoder")


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def planned(path: Path, overrides: Sequence[str] = ()) -> Plan:
    experiment = load_experiment(path, overrides)
    return make_plan(experiment, locate(experiment.backbone))


def ran(path: Path, overrides: Sequence[str] = ()) -> tuple[Plan, list[str]]:
    """Carries the experiment out; the plan, and the labels of the steps that ran."""
    labels: list[str] = []
    events = Events(step=lambda step, number, total: labels.append(step.label))
    return run(load_experiment(path, overrides), path.parent / "out", events=events).plan, labels


def folder_of(root: Path, step: Step) -> Path:
    return root / "store" / step.kind / step.key


def predictions(root: Path, plan: Plan, method: str) -> bytes:
    cell = next(c for c in plan.cells if c.method == method and c.language == "sw")
    found = [p for p in sorted(folder_of(root, cell.predict).iterdir()) if p.name != "step.json"]
    assert found
    return b"".join(p.read_bytes() for p in found)


def methods_in(found: dict[str, Any]) -> set[tuple[str, str]]:
    return {(name, code) for name, method in found["methods"].items() for code in method["languages"]}


# Every method on every kind of model


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_has_its_number_and_a_second_run_does_nothing(kind: str, finished: Any, tmp_path: Path) -> None:
    original, plan = finished(kind)
    experiment = load_experiment(original / "two.yaml")
    found = results(original / "out")
    alone = {"vanilla", "eng-ft", "translate-test"}
    assert methods_in(found) == {
        *((name, "sw") for name in experiment.methods),
        *((name, "en") for name in experiment.methods if name in alone),
    }
    for method in found["methods"].values():
        assert all(0 <= value <= 1 for value in method["languages"]["sw"]["by_seed"])
    folder = copied(original, tmp_path)
    before = contents(folder / "store")
    outcome = run(load_experiment(folder / "two.yaml"), folder / "out")
    assert (outcome.ran, outcome.kept) == (0, len(plan.steps))
    assert contents(folder / "store") == before


@pytest.mark.parametrize("kind", KINDS)
def test_second_stages_differ_from_one_another_and_know_their_first(kind: str, finished: Any) -> None:
    folder, plan = finished(kind)
    seconds = {c.method: c.adapter for c in plan.cells if c.adapter is not None and "second" in c.adapter.config}
    weights = {name: (folder_of(folder, step) / "adapter_model.safetensors") for name, step in seconds.items()}
    assert (
        len({path.read_bytes() for path in weights.values()})
        == len(weights)
        == len(methods_of(kind)) - (2 if kind == "encoder" else 3)
    )
    for name, step in seconds.items():
        first = step.inputs["stage1"]
        assert first.kind == ("merge" if name == "flare-graft" else "train")
        notes = Adapter.load(folder_of(folder, step)).sidecar["second"]
        assert notes["stage1"] == first_digest(folder_of(folder, first))
        assert notes["language"] == "sw"


def test_the_source_language_is_asked_once_for_methods_that_are_the_same_there(finished: Any) -> None:
    _, plan = finished("encoder")
    there = {c.method: c.predict.key for c in plan.cells if c.language == "en"}
    assert there["translate-test"] == there["eng-ft"]


# Interruptions


@pytest.mark.parametrize(("kind", "method"), [("encoder", "x-mixup"), ("decoder", "flare:cross_attention")])
def test_an_interrupted_second_stage_goes_on_to_the_same_bytes(
    kind: str, method: str, finished: Any, models: dict[str, Path], nllb: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    assert training.train_one.__kwdefaults__ is not None
    monkeypatch.setitem(training.train_one.__kwdefaults__, "checkpoint_seconds", 0.0)
    path = write_experiment(tmp_path, models[kind], nllb, [f"'{method}'"])
    at: list[Step] = []

    def stop(step: Step, done: int, total: int, note: str, loss: float | None) -> None:
        if at and "second" in at[-1].config and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="run the same command again"):
        run(load_experiment(path), tmp_path / "out", events=Events(step=lambda s, *_: at.append(s), progress=stop))
    assert list((tmp_path / "store/train").glob(".*.partial/checkpoint.safetensors"))
    done: list[int] = []
    run(load_experiment(path), tmp_path / "out", events=Events(progress=lambda step, n, *_: done.append(n)))
    assert 1 not in done[: done.index(4)], "it went on from its checkpoint"
    whole, _ = finished(kind)
    mine, theirs = contents(tmp_path / "store"), contents(whole / "store")
    assert mine == {name: theirs[name] for name in mine} and mine


@pytest.mark.full
def test_a_run_killed_in_a_second_stage_ends_in_the_same_bytes(
    finished: Any, models: dict[str, Path], nllb: Path, tmp_path: Path
) -> None:
    path = write_experiment(tmp_path, models["encoder-decoder"], nllb, ["flare", "flare-mt"])
    script = (
        "import os, signal, sys\n"
        "from lingraft import training\n"
        "from lingraft.config import load_experiment\n"
        "from lingraft.runner import Events, run\n"
        "from pathlib import Path\n"
        "training.train_one.__kwdefaults__['checkpoint_seconds'] = 0.0\n"
        "at = []\n"
        "def kill(step, done, total, note, loss):\n"
        "    if at and 'flare-mt' in at[-1] and at[-1].startswith('train') and done == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "path = Path(sys.argv[1])\n"
        "run(load_experiment(path), path.parent / 'out',\n"
        "    events=Events(step=lambda s, *_: at.append(s.label), progress=kill))\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    plan, labels = ran(path)
    assert "train flare-mt kind sw seed 0" in labels and "train flare kind sw seed 0" not in labels
    whole, _ = finished("encoder-decoder")
    mine, theirs = contents(tmp_path / "store"), contents(whole / "store")
    assert mine == {name: theirs[name] for name in mine}
    assert len(plan.steps) == len(list((tmp_path / "store").glob("*/*/step.json")))


# No leaks


@pytest.mark.parametrize("kind", KINDS)
def test_no_label_of_the_source_reaches_a_prediction(kind: str, finished: Any, tmp_path: Path) -> None:
    original, plan = finished(kind)
    folder = copied(original, tmp_path)
    path = folder / "data/en/test.jsonl"
    turned = {"place": "sport", "sport": "place"}
    write(path, [{**row, "label": turned[row["label"]]} for row in written(path)])
    again, labels = ran(folder / "two.yaml")
    reading = [c.method for c in plan.cells if c.method in READING and c.language == "sw"]
    assert len(reading) >= 6 - (kind == "decoder")
    for name in reading:
        assert any(label.startswith(f"predict {name} ") for label in labels), "it reads the rows that changed"
        assert predictions(folder, again, name) == predictions(original, plan, name), name


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_sources_text_does_reach_them(kind: str, finished: Any, tmp_path: Path) -> None:
    original, plan = finished(kind)
    folder = copied(original, tmp_path)
    path = folder / "data/en/test.jsonl"
    write(path, [{**row, "text": row["text"][::-1] + " indeed"} for row in written(path)])
    again, _ = ran(folder / "two.yaml")
    changed = {name for name in READING if any(c.method == name for c in plan.cells)}
    for cell in (c for c in plan.cells if c.language == "sw"):
        same = predictions(folder, again, cell.method) == predictions(original, plan, cell.method)
        assert same == (cell.method not in changed), cell.method


# Translations


def with_model(nllb: Path, *more: str) -> list[str]:
    return [f"translation={{model: '{nllb}'}}", *more]


TRANSLATED = ("eng-ft", "translate-test", "translate-train", "input-fusion", "x-mixup", "flare", "flare-mt")


def test_items_are_translated_once_for_all_methods_and_only_as_many_as_are_needed(
    models: dict[str, Path], nllb: Path, tmp_path: Path
) -> None:
    path = write_experiment(tmp_path, models["encoder"], nllb, TRANSLATED)
    # There is no training data in the target language: that is what translation is for.
    (tmp_path / "data/sw/train.jsonl").unlink()
    overrides = with_model(nllb, "training.limit=6", "evaluation.limit=5", "fusion.cache=true")
    before = planned(path, overrides)
    waiting = estimates(before, Store(tmp_path / "store"), locate(before.experiment.backbone))
    assert waiting["steps"]["translate"] == {"pending": 2, "finished": 0} and waiting["cost"] is not None
    plan, labels = ran(path, overrides)
    steps = {s.label: s for s in plan.steps if s.kind == "translate"}
    assert set(steps) == {"translate kind en-sw train", "translate kind sw-en test"}
    assert set(labels[:2]) == set(steps), "what could fail for a language comes before the first training"
    made = {label: written(folder_of(tmp_path, step) / "rows.jsonl") for label, step in steps.items()}
    assert {label: len(found) for label, found in made.items()} == {
        "translate kind en-sw train": 6,
        "translate kind sw-en test": 5,
    }
    train = {row["id"]: row for row in written(tmp_path / "data/en/train.jsonl")}
    for row in made["translate kind en-sw train"]:
        original = train[row["id"]]
        assert row["label"] == original["label"] and row["text"] != original["text"]
    assert methods_in(results(tmp_path / "out")) >= {(name, "sw") for name in TRANSLATED}
    asked = {c.method: c.predict for c in plan.cells if c.language == "sw"}
    assert {read_json(folder_of(tmp_path, s) / "step.json")["items"] for s in asked.values()} == {5}
    assert ran(path, overrides)[1] == []
    kept = estimates(plan, Store(tmp_path / "store"), locate(plan.experiment.backbone))["steps"]["translate"]
    assert kept == {"pending": 0, "finished": 2}


def test_another_translation_is_new_work_for_what_reads_it_and_for_nothing_else(
    models: dict[str, Path], nllb: Path, tmp_path: Path
) -> None:
    path = write_experiment(tmp_path, models["encoder"], nllb, TRANSLATED)
    before = {step.key: step.label for step in planned(path, with_model(nllb)).steps}
    other = tmp_path / "other"
    shutil.copytree(nllb, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    everything = {s.label for s in planned(path, with_model(nllb)).steps if _reads_translation(s)}
    assert any("flare" in label for label in everything) and not any("eng-ft" in label for label in everything)
    for overrides in (
        with_model(other),
        with_model(nllb, "translation.beams=2"),
        with_model(nllb, "training.limit=3"),
    ):
        after = planned(path, overrides).steps
        new = {step.label for step in after if step.key not in before}
        if "training.limit=3" in overrides:
            assert (
                everything
                >= {label for label in new if label.startswith("translate")}
                == {"translate kind en-sw train"}
            )
        else:
            assert new == everything
    moved = [s for s in planned(path, with_model(nllb, "evaluation.limit=3")).steps if s.key not in before]
    assert {s.label for s in moved if s.kind in ("train", "translate")} == {"translate kind sw-en test"}


def _reads_translation(step: Step) -> bool:
    return step.kind == "translate" or any(_reads_translation(needed) for needed in step.inputs.values())


def test_a_language_that_the_translation_model_does_not_know_is_said_before_the_first_training(
    models: dict[str, Path], nllb: Path, tmp_path: Path
) -> None:
    path = write_experiment(tmp_path, models["encoder"], None, ("eng-ft", "flare"))
    for name in ("train", "test"):
        write(tmp_path / f"data/th/{name}.jsonl", rows("sw", name))
    with pytest.raises(UserError, match="does not know the language 'th'"):
        ran(path, with_model(nllb, "targets=[th]"))
    assert not list((tmp_path / "store").glob("*/*/step.json"))


# Extraction


QUESTION = """
name: questions
backbone: {{model: "{model}", dtype: float32, device: cpu}}
data_dir: data
task: tydiqa
source: en
targets: [sw]
adapter: {{rank: 2, alpha: 4, dropout: 0, modules: [attention.query, attention.value]}}
training: {{learning_rate: 0.02, epochs: 1, batch_size: 4, clip: 1.0, max_length: 200}}
evaluation: {{new_tokens: 4, written_limit: 3, source: false}}
methods: [eng-ft, translate-train, input-fusion, flare]
"""


def write_questions(folder: Path, model: Path) -> Path:
    """Questions on contexts whose answer is their last word but one; no item has a counterpart."""
    for name in ("english", "swahili"):
        for split, count in (("train", 14), ("dev", 6)):
            paragraphs = []
            for n in range(count):
                before = f"{name} box {n} is "
                context = f"{before}red{n} today"
                asked = {
                    "id": f"{name}-{split}-{n}",
                    "question": f"what is box {n}?",
                    "answers": [{"text": f"red{n}", "answer_start": len(before)}],
                }
                paragraphs.append({"context": context, "qas": [asked]})
            path = folder / f"data/tydiqa_goldp/{name}_tydiqa_{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    path = folder / "questions.yaml"
    path.write_text(QUESTION.format(model=model))
    return path


class Upper:
    """A translation model that shouts, and loses the quotation marks of some texts."""

    def __init__(self, model: str, source: str, target: str, **options: Any) -> None:
        self.cut = 0

    def translate(self, texts: Sequence[str], progress: Any = None) -> list[str]:
        return [(text.replace('"', "") if " 2 " in text or " 3 " in text else text).upper() for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_a_translation_loses_is_counted_and_its_item_left_out(
    kind: str, models: dict[str, Path], nllb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translation, "Translator", Upper)
    path = write_questions(tmp_path, models[kind])
    plan, _ = ran(path, with_model(nllb))
    steps = {s.label: s for s in plan.steps if s.kind == "translate"}
    train = read_json(folder_of(tmp_path, steps["translate tydiqa en-sw train"]) / "step.json")
    dropped = [name for name in train["dropped"] if name.endswith(("-2", "-3"))]
    assert dropped == train["dropped"] and dropped
    test = read_json(folder_of(tmp_path, steps["translate tydiqa sw-en test"]) / "step.json")
    # Where answers are written, only a sample is asked, and no more is translated.
    assert (test["rows"], test["dropped"]) == (6 if kind == "encoder" else 3, [])
    for row in written(folder_of(tmp_path, steps["translate tydiqa sw-en test"]) / "rows.jsonl"):
        assert "answers" not in row and row["context"] == row["context"].upper()
    assert methods_in(results(tmp_path / "out")) == {(m, "sw") for m in plan.experiment.methods}
    asked = {c.method: c.predict for c in plan.cells}
    items = {m: read_json(folder_of(tmp_path, s) / "step.json")["items"] for m, s in asked.items()}
    assert set(items.values()) == {test["rows"]}


def test_unaligned_data_need_translations(models: dict[str, Path], tmp_path: Path) -> None:
    path = write_questions(tmp_path, models["decoder"])
    with pytest.raises(DataError, match="cannot be paired") as caught:
        ran(path)
    assert "translation.model" in str(caught.value) and "tydiqa" in str(caught.value)
    assert not (tmp_path / "store").exists()


# What a backbone has not


@pytest.mark.parametrize(
    ("kind", "method", "overrides", "match"),
    [
        ("encoder", "flare", ["fusion.modules=attention.nothing"], "no module is called 'attention.nothing'"),
        ("encoder", "x-mixup", ["mixup.layer=7"], "there is no layer 7 to mix in"),
        ("decoder", "flare", ["fusion.modules=all"], "states of different widths"),
        ("decoder", "flare", ["fusion.modules=all", CACHED], "states of different widths"),
        ("decoder", "flare-mt", ["fusion.modules=all"], "states of different widths"),
        ("encoder-decoder", "flare", ["fusion.modules=feed_forward", "fusion.layer_offset=1"], "different widths"),
    ],
)
def test_layers_that_cannot_be_fused_are_said_before_the_first_training(
    kind: str, method: str, overrides: list[str], match: str, models: dict[str, Path], nllb: Path, tmp_path: Path
) -> None:
    path = write_experiment(tmp_path, models[kind], nllb, ("eng-ft", method))
    with pytest.raises(UserError, match=match):
        ran(path, overrides)
    assert not (tmp_path / "store").exists()


# Files of translations


FILES = "translation.files=mt/{from}-{to}.{split}.jsonl"


def with_files(folder: Path, model: Path, methods: Sequence[str] = ("eng-ft", "translate-test", "flare")) -> Path:
    """An experiment and files of translations, in another order than the originals."""
    path = write_experiment(folder, model, None, methods)
    write(folder / "data/mt/en-sw.train.jsonl", rows("sw", "train")[::-1])
    write(folder / "data/mt/sw-en.test.jsonl", rows("en", "test")[::-1])
    for name in ("sw/train", "en/test"):
        (folder / f"data/{name}.jsonl").unlink()
    return path


def test_rows_of_files_are_found_by_their_ids(finished: Any, models: dict[str, Path], tmp_path: Path) -> None:
    path = with_files(tmp_path, models["encoder"])
    plan, _ = ran(path, [FILES, "evaluation.source=false"])
    whole, theirs = finished("encoder")
    # The same items, the same numbers, whatever the order of the counterparts; training rows are in another order.
    assert predictions(tmp_path, plan, "translate-test") == predictions(whole, theirs, "translate-test")
    assert methods_in(results(tmp_path / "out")) == {(m, "sw") for m in plan.experiment.methods}


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("sw-en.test", lambda found: found[1:], "1 items have no counterpart"),
        ("sw-en.test", lambda found: [{**row, "id": "x" + row["id"]} for row in found], "8 items have no counterpart"),
        ("sw-en.test", lambda found: [*found, found[0]], "'test-7' stands here and at"),
        ("sw-en.test", lambda found: [*found, {**found[0], "id": "more"}], "1 counterparts belong to no item"),
        ("sw-en.test", lambda found: [{"id": row["id"]} for row in found], "text"),
        ("en-sw.train", lambda found: found[2:], "2 counterparts belong to no item"),
        ("en-sw.train", lambda found: [{**row, "label": "spot"} for row in found], "unknown label 'spot'"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_training(
    name: str, change: Callable[[list[Any]], list[Any]], match: str, models: dict[str, Path], tmp_path: Path
) -> None:
    path = with_files(tmp_path, models["encoder"])
    file = tmp_path / f"data/mt/{name}.jsonl"
    write(file, change(written(file)))
    with pytest.raises(DataError, match=match):
        ran(path, [FILES, "evaluation.source=false"])
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("told", [False, True])
def test_rows_without_ids_are_told_apart_by_their_numbers(told: bool, models: dict[str, Path], tmp_path: Path) -> None:
    path = with_files(tmp_path, models["encoder"], ("translate-test",))
    path.write_text(path.read_text().replace("    id_field: id\n", "", 1))
    file = tmp_path / "data/mt/sw-en.test.jsonl"
    found = written(file)[::-1]
    if told:  # In another order, but every row says which it translates.
        write(file, [{**row, ROW: str(number)} for number, row in enumerate(found)][::-1])
    else:
        write(file, found)
    overrides = [FILES, "evaluation.source=false", "training.epochs=1"]
    (tmp_path / "aligned").mkdir()
    aligned = write_experiment(tmp_path / "aligned", models["encoder"], None, ("translate-test",))
    plan, _ = ran(path, overrides)
    theirs, _ = ran(aligned, overrides[1:])
    mine = [{k: v for k, v in row.items() if k != "id"} for row in answers(tmp_path, plan)]
    assert mine == [{k: v for k, v in row.items() if k != "id"} for row in answers(aligned.parent, theirs)]
    write(file, found[:-1])
    with pytest.raises(DataError, match="their ids are row numbers" if not told else "cannot be paired"):
        ran(path, [*overrides, "training.epochs=2"])


def answers(root: Path, plan: Plan) -> list[dict[str, Any]]:
    cell = next(c for c in plan.cells if c.method == "translate-test" and c.language == "sw")
    return written(folder_of(root, cell.predict) / "predictions.jsonl")


def test_a_file_that_is_not_there_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    path = with_files(tmp_path, models["encoder"])
    (tmp_path / "data/mt/sw-en.test.jsonl").unlink()
    with pytest.raises(DataError, match="file of translations is missing") as caught:
        ran(path, [FILES, "evaluation.source=false"])
    assert str(caught.value.where).endswith("mt/sw-en.test.jsonl")


def test_items_without_counterpart_may_be_left_out_and_are_counted(models: dict[str, Path], tmp_path: Path) -> None:
    path = with_files(tmp_path, models["encoder"], ("eng-ft", "flare", "input-fusion", "x-mixup"))
    for name, gone in (("sw-en.test", 3), ("en-sw.train", 1)):
        file = tmp_path / f"data/mt/{name}.jsonl"
        write(file, written(file)[gone:])
    file = tmp_path / "data/en/train.jsonl"
    write(file, written(file)[2:])
    plan, _ = ran(path, [FILES, "evaluation.source=false", "translation.missing=skip"])
    assert "FLARE" in markdown(results(tmp_path / "out"))
    for cell in plan.cells:
        assert cell.adapter is not None
        asked = read_json(folder_of(tmp_path, cell.predict) / "step.json")
        learned = read_json(folder_of(tmp_path, cell.adapter) / "step.json")
        alone = cell.method == "eng-ft"
        assert (asked["items"], asked.get("without_counterpart", 0)) == ((8, 0) if alone else (5, 3)), cell.method
        assert learned.get("without_counterpart", 0) == (0 if alone else 2), cell.method


# Kept source states


def trained(root: Path, plan: Plan, method: str) -> dict[str, np.ndarray]:
    cell = next(c for c in plan.cells if c.method == method)
    assert cell.adapter is not None
    return dict(Adapter.load(folder_of(root, cell.adapter)).tensors())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [(), ("fusion.layer_offset=1", "fusion.mask_padding=true")])
def test_kept_states_are_those_that_are_computed_at_every_step(
    kind: str, more: tuple[str, ...], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only a decoder's states are bfloat16 from the first: autocast leaves the norms of the others in float32.
    dtype = "bfloat16" if kind == "decoder" else "float32"
    path = write_experiment(tmp_path, models[kind], None, ("flare", "'flare:cross_attention'"))
    overrides = [f"backbone.dtype={dtype}", "training.epochs=1", *more]
    plain, _ = ran(path, overrides)
    computed: list[int] = []
    real = attaching.states_of
    monkeypatch.setattr(attaching, "states_of", lambda *given: computed.append(1) or real(*given))
    labels: list[str] = []
    during: dict[str, int] = {}

    def step(step: Step, number: int, total: int) -> None:
        labels.append(step.label)
        during[step.label] = len(computed)

    plan = run(load_experiment(path, [*overrides, CACHED]), tmp_path / "out", events=Events(step=step)).plan
    assert labels[0].startswith("states for") and sum(label.startswith("states") for label in labels) == 1
    first = next(label for label in labels if label.startswith("predict"))
    assert during[first] == 0, "a training with kept states computes none"
    for method in ("flare", "flare:cross_attention"):
        mine, theirs = trained(tmp_path, plan, method), trained(tmp_path, plain, method)
        assert set(mine) == set(theirs)
        for name in mine:
            if kind == "decoder":
                np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
            else:
                # The step of a gradient near zero may go either way: so it is the whole that is compared.
                assert np.linalg.norm(mine[name] - theirs[name]) <= 0.1 * np.linalg.norm(theirs[name]), name
        cells = [next(c for c in p.cells if c.method == method) for p in (plan, plain)]
        assert cells[0].adapter is not None and cells[1].adapter is not None
        assert cells[0].adapter.key != cells[1].adapter.key
    found = next(s for s in plan.steps if s.kind == "states")
    record = read_json(folder_of(tmp_path, found) / "step.json")
    assert record["bytes"] == (folder_of(tmp_path, found) / cache.STATES).stat().st_size > 0


def test_one_step_keeps_the_states_of_all_functions_and_rates(models: dict[str, Path], tmp_path: Path) -> None:
    path = write_experiment(tmp_path, models["decoder"], None, ("flare", "'flare:mul'", "flare-graft"))
    plan = planned(path, [CACHED])
    states = [s for s in plan.steps if s.kind == "states"]
    assert len(states) == 2, "one a first stage: the task's adapter, and the graft"
    values = "fusion_training={learning_rate: 0.5, epochs: 3, batch_size: 2, max_length: 64, warmup: 0.2}"
    for overrides in ([values], ["fusion.function=add"], ["fusion.decoding=lora"], ["fusion.cache_limit=3"]):
        again = planned(path, [CACHED, *overrides])
        assert {s.key for s in again.steps if s.kind == "states"} == {s.key for s in states}, overrides
    for overrides in (["fusion.modules=attention.key"], ["fusion.mask_padding=true"], ["training.limit=4"]):
        again = planned(path, [CACHED, *overrides])
        assert not {s.key for s in again.steps if s.kind == "states"} & {s.key for s in states}, overrides


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_would_be_too_large_are_refused_before_anything_is_trained(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    path = write_experiment(tmp_path, models[kind], None, ("eng-ft", "flare"))
    with pytest.raises(UserError, match=r"source states would take .* are allowed") as caught:
        ran(path, [CACHED, "fusion.cache_limit=1e-9"])
    assert "fusion.cache_limit" in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_states_of_another_first_stage_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    path = write_experiment(tmp_path, models["decoder"], None, ("flare",))
    overrides = [CACHED, "training.epochs=1"]
    plan, _ = ran(path, overrides)
    other = [*overrides, "training.learning_rate=0.01"]
    again = planned(path, other)
    old, new = (next(s for s in p.steps if s.kind == "states") for p in (plan, again))
    assert old.key != new.key
    shutil.copytree(folder_of(tmp_path, old), folder_of(tmp_path, new))
    said: list[LingraftError] = []
    with pytest.raises(RunFailed):
        run(
            load_experiment(path, other),
            tmp_path / "out",
            events=Events(failure=lambda step, error: said.append(error)),
        )
    assert [type(error) for error in said] == [AdapterError] and "another first stage" in str(said[0])
    shutil.rmtree(folder_of(tmp_path, new))
    assert ran(path, other)[1][0].startswith("states for")


def test_a_full_disk_leaves_no_states_and_a_later_run_goes_through(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_experiment(tmp_path, models["encoder"], None, ("flare",))
    overrides = [CACHED, "training.epochs=1"]
    real, calls = cache._raw, []

    def full(*given: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*given)

    said: list[LingraftError] = []
    with monkeypatch.context() as patched:
        patched.setattr(cache, "_raw", full)
        with pytest.raises(RunFailed):
            run(
                load_experiment(path, overrides),
                tmp_path / "out",
                events=Events(failure=lambda step, error: said.append(error)),
            )
    assert len(calls) == 3 and [type(error) for error in said] == [StoreError]
    assert not list((tmp_path / "store").rglob(f"*{cache.STATES}*"))
    _, labels = ran(path, overrides)
    assert labels[0].startswith("states for") and labels[-1].startswith("score flare")


def test_a_flipped_bit_of_kept_states_is_found_and_they_are_made_anew_before_they_are_learned_from(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = write_experiment(tmp_path, models["decoder"], None, ("flare",))
    plan, _ = ran(path, [CACHED, "training.epochs=1"])
    states = folder_of(tmp_path, next(s for s in plan.steps if s.kind == "states")) / cache.STATES
    whole = states.read_bytes()
    data = bytearray(whole)
    data[len(data) // 2] ^= 1
    states.write_bytes(bytes(data))
    said: list[str] = []
    values = "fusion_training={learning_rate: 0.5, epochs: 1, batch_size: 2, max_length: 64}"
    run(
        load_experiment(path, [CACHED, "training.epochs=1", values]),
        tmp_path / "out",
        events=Events(notice=said.append),
    )
    assert len(said) == 1 and "damaged" in said[0] and "made anew" in said[0]
    assert states.read_bytes() == whole
