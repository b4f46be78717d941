"""The real pipeline on a tiny model: experiment, plan, training, λ, merge, evaluation, report; again, changed, killed."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from lingraft import execution, plan
from lingraft.adapter import Adapter, content_digest
from lingraft.backbones import Backbone
from lingraft.config import load_experiment
from lingraft.errors import DataError, Interrupted, LingraftError, RunFailed, UserError
from lingraft.evaluation import predict
from lingraft.locating import locate
from lingraft.plan import Step, make_plan
from lingraft.report.results import results
from lingraft.runner import Events, pending, run
from lingraft.store import Store, read_json
from lingraft.tasks.table import find_task

WORDS = {
    "en": ["river", "mountain", "island", "goal", "match", "team"],
    "sw": ["mto", "mlima", "kisiwa", "bao", "mchezo", "timu"],
    "de": ["fluss", "berg", "insel", "tor", "spiel", "mannschaft"],
    "id": ["sungai", "gunung", "pulau", "gol", "laga", "regu"],
}
YAML = """
name: tiny
backbone: {{model: "{model}", dtype: float32, device: cpu}}
data_dir: data
task: kind
tasks:
  kind:
    files: {{train: "{{language}}/train.jsonl", validation: "{{language}}/dev.jsonl", test: "{{language}}/test.jsonl"}}
    prompt: "Word: {{text}}\\nKind:"
    labels: [place, sport]
    id_field: id
source: en
targets: [sw, de]
development: [id]
reference: {{text: "{{language}}.txt", unit: line, segment_tokens: 32}}
adapter: {{rank: 2, alpha: 4, dropout: 0.05, modules: [attention.query, attention.value]}}
training: {{learning_rate: 0.01, epochs: 2, batch_size: 4, clip: 1.0, max_length: 64}}
methods: [vanilla, eng-ft, tgt-ft, adamergex, adamergex-product, control-add, control-other, control-sequential]
selection: {{weights: [0.5, 1.0]}}
seeds: [0, 1]
"""


def make_experiment(folder: Path, model: Path) -> Path:
    """Writes a small task in four languages, reference text, and the experiment."""
    rng = random.Random(0)
    for language, words in WORDS.items():
        (folder / "data" / language).mkdir(parents=True)
        for name, count in (("train", 12), ("dev", 6), ("test", 10)):
            rows = [
                {"id": f"{name}{i}", "text": words[i % 6] + "!" * (i // 6), "label": ("place", "sport")[i % 6 // 3]}
                for i in range(count)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "data" / language / f"{name}.jsonl").write_text(text, encoding="utf-8")
        lines = [" ".join(rng.choice(words) for _ in range(4)) for _ in range(8)]
        (folder / "data" / f"{language}.txt").write_text("\n".join(lines), encoding="utf-8")
    path = folder / "tiny.yaml"
    path.write_text(YAML.format(model=model), encoding="utf-8")
    return path


@pytest.fixture
def experiment(tmp_path: Path, tiny_folder: Path) -> Path:
    return make_experiment(tmp_path, tiny_folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder in which the experiment has been carried out, into `out` and `store`. Tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("finished")
    run(load_experiment(make_experiment(folder, tiny_folder)), folder / "out")
    return folder


def copied(finished: Path, target: Path) -> Path:
    shutil.copytree(finished, target, dirs_exist_ok=True)
    return target


def contents(store: Path) -> dict[str, str]:
    """Hashes of what the steps made: everything but the records and logs of how long it took."""
    files = [p for p in store.rglob("*") if p.is_file() and p.name != "step.json" and not p.name.startswith(".")]
    return {p.relative_to(store).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def ran(experiment: Path, out: Path, overrides: Sequence[str] = ()) -> list[Step]:
    steps: list[Step] = []
    run(load_experiment(experiment, overrides), out, events=Events(step=lambda step, number, total: steps.append(step)))
    return steps


def test_every_number_of_the_table_is_there(finished: Path) -> None:
    found = results(finished / "out")
    assert set(found["methods"]) == set(load_experiment(finished / "tiny.yaml").methods)
    for name, method in found["methods"].items():
        assert set(method["languages"]) == ({"en", "sw", "de"} if name in ("vanilla", "eng-ft") else {"sw", "de"})
        assert len(method["languages"]["sw"]["by_seed"]) == (1 if name == "vanilla" else 2)
        assert method["average"] is not None
    assert {len(s["curve"]) for s in found["selections"].values()} == {3}
    assert len(found["references"]) == 4
    assert all(-1 <= entry["cosine"] <= 1 for entry in found["references"])


def test_the_chosen_weight_maximises_the_development_likelihood(finished: Path) -> None:
    for selection in results(finished / "out")["selections"].values():
        best = max(selection["curve"], key=lambda point: point["gold_log_likelihood"])
        assert selection["weight"] == best["weight"]


def test_a_second_run_does_nothing(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    before = contents(folder / "store")
    outcome = run(load_experiment(folder / "tiny.yaml"), folder / "out")
    assert outcome.ran == 0 and outcome.kept == len(outcome.plan.steps)
    assert contents(folder / "store") == before


def test_another_run_elsewhere_gives_the_same_bytes(finished: Path, tmp_path: Path, tiny_folder: Path) -> None:
    run(load_experiment(make_experiment(tmp_path, tiny_folder)), tmp_path / "out")
    assert contents(tmp_path / "store") == contents(finished / "store")


def test_an_experiment_that_asks_for_less_runs_nothing_and_reports_anew(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    command = [sys.executable, "-m", "lingraft.cli", "run", str(folder / "tiny.yaml"), "--out", str(folder / "out")]
    subprocess.run(command, capture_output=True, check=True)
    less = subprocess.run([*command, "methods=[vanilla]"], capture_output=True, text=True, check=True)
    assert "nothing to do" in less.stderr and "Vanilla" in less.stdout
    assert list(read_json(folder / "out/results.json")["methods"]) == ["vanilla"]


def dependants(steps: Sequence[Step], changed: Callable[[Step], bool]) -> set[str]:
    """Labels of the steps that are changed or need one that is."""
    found: set[str] = set()
    for step in steps:  # inputs come first
        if changed(step) or any(needed.key in found for needed in step.inputs.values()):
            found.add(step.key)
    return {step.label for step in steps if step.key in found}


@pytest.mark.parametrize(
    ("file", "reads"),
    [
        (
            "sw/test.jsonl",
            lambda s: s.kind == "predict" and s.config["language"] == "sw" and s.config["split"] == "test",
        ),
        ("id/dev.jsonl", lambda s: s.kind == "predict" and s.config["language"] == "id"),
        ("de.txt", lambda s: "reference" in s.config and s.config["language"] == "de"),
    ],
)
def test_edited_data_rerun_exactly_what_depends_on_them(
    finished: Path, tmp_path: Path, file: str, reads: Callable[[Step], bool]
) -> None:
    folder = copied(finished, tmp_path)
    experiment = load_experiment(folder / "tiny.yaml")
    steps = make_plan(experiment, locate(experiment.backbone)).steps
    expected = dependants(steps, reads)
    path = folder / "data" / file
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0].replace("o", "oo").replace("place", "sport"), *lines[1:]]), encoding="utf-8")
    assert {step.label for step in ran(folder / "tiny.yaml", folder / "out")} == expected
    assert 0 < len(expected) < len(steps)
    assert ran(folder / "tiny.yaml", folder / "out") == []


def test_a_changed_metric_scores_again_and_predicts_only_what_it_decides(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(finished, tmp_path)
    monkeypatch.setitem(plan.VERSIONS, "score", plan.VERSIONS["score"] + 1)
    again = ran(folder / "tiny.yaml", folder / "out")
    assert {step.kind for step in again} == {"score", "select", "merge", "predict"}
    # Predictions are made again only for grafts, whose weight the scores choose.
    assert all("adapter" in s.inputs and s.inputs["adapter"].kind == "merge" for s in again if s.kind == "predict")


def test_a_new_method_reuses_what_is_there(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    again = ran(folder / "tiny.yaml", folder / "out2", ["merge.modules=attention.query", "methods=[eng-ft, adamergex]"])
    assert {s.kind for s in again} == {"predict", "score", "select", "merge"}


def test_grafts_open_in_plain_peft_with_the_same_scores(finished: Path, tiny_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    experiment = load_experiment(finished / "tiny.yaml")
    found = results(finished / "out")
    backbone = Backbone(locate(experiment.backbone))
    task = find_task("kind", experiment.tasks)
    examples = task.examples(task.sources("sw", "test", Path(experiment.data_dir or "")))
    grafts = [a["path"] for a in found["adapters"] if a["language"] == "sw"]
    assert len(grafts) == 4
    for folder in grafts:
        ours = predict(backbone, Adapter.load(folder), examples)
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), folder
        )
        for prediction, example in zip(ours, examples, strict=True):
            ids = torch.tensor([[*backbone.prefix, *backbone.encode(example.prompt + " ")]])
            with torch.no_grad():
                table = torch.log_softmax(model(input_ids=ids).logits[0, -1], dim=-1)
            expected = [float(table[backbone.encode(c.strip())[0]]) for c in example.candidates]
            assert prediction.scores == pytest.approx(expected, abs=1e-4)


def test_a_merged_step_names_its_inputs(finished: Path) -> None:
    entry = next(a for a in results(finished / "out")["adapters"] if a["method"] == "adamergex-product")
    sidecar = read_json(Path(entry["path"]) / "lingraft.json")
    assert sidecar["provenance"]["space"] == "product"
    stored = {content_digest(p.parent) for p in (finished / "store/train").glob("*/adapter_model.safetensors")}
    assert set(sidecar["provenance"]["inputs"].values()) <= stored


def test_wrong_data_are_found_before_the_first_training(experiment: Path, tmp_path: Path) -> None:
    lines = '{"id": "1", "text": "mto", "label": "sport"}\n{"id": "2", "text": "bao", "label": "sprot"}\n'
    (tmp_path / "data/sw/test.jsonl").write_text(lines, encoding="utf-8")
    with pytest.raises(DataError, match="unknown label 'sprot'") as caught:
        run(load_experiment(experiment), tmp_path / "out")
    assert str(caught.value.where).endswith("test.jsonl:2") and "sport" in (caught.value.remedy or "")
    assert not (tmp_path / "store").exists()


def test_a_module_that_does_not_exist_is_said_before_the_first_training(experiment: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="q_prj"):
        run(load_experiment(experiment, ["merge.modules=q_prj"]), tmp_path / "out")


def test_a_failing_step_stops_its_dependants_and_nothing_else(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    real = execution._EXECUTORS["predict"]

    def failing(step: Step, session: execution.Session, work: Path) -> dict[str, object]:
        if "sw test" in step.label:
            raise LingraftError("the sky fell")
        return real(step, session, work)

    monkeypatch.setitem(execution._EXECUTORS, "predict", failing)
    with pytest.raises(RunFailed, match="that depend on them did not run"):
        run(
            load_experiment(experiment),
            tmp_path / "out",
            events=Events(failure=lambda step, error: told.append(str(error))),
        )
    assert set(told) == {"the sky fell"}
    config = load_experiment(experiment)
    left = pending(make_plan(config, locate(config.backbone)), Store(tmp_path / "store"))
    assert left and all("sw test" in step.label for step in left)


def test_ctrl_c_keeps_what_is_finished(experiment: Path, tmp_path: Path, finished: Path) -> None:
    def interrupt(step: Step, number: int, total: int) -> None:
        if number == 9:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    with pytest.raises(Interrupted, match="run the same command again"):
        run(load_experiment(experiment), tmp_path / "out", events=Events(step=interrupt))
    assert len(list((tmp_path / "store").glob("*/*/step.json"))) == 8
    run(load_experiment(experiment), tmp_path / "out")
    assert contents(tmp_path / "store") == contents(finished / "store")


def _killed(kills: int, experiment: Path, tmp_path: Path) -> int:
    """Starts the run and kills it at random moments, `kills` times before it is done; gives how often it was at work."""
    rng = random.Random(3)
    command = [sys.executable, "-m", "lingraft.cli", "run", str(experiment), "--out", str(tmp_path / "out")]
    still = 0

    def finished_steps() -> int:
        return len(list((tmp_path / "store").glob("*/*/step.json")))

    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # By steps and not by seconds alone: machines differ tenfold in how far they get.
        enough = finished_steps() + rng.randint(0, 100 // kills)
        while finished_steps() < enough and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        still += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    return still


def test_a_run_that_was_killed_finishes_with_the_same_bytes(experiment: Path, tmp_path: Path, finished: Path) -> None:
    assert _killed(2, experiment, tmp_path) == 2
    assert contents(tmp_path / "store") == contents(finished / "store")


@pytest.mark.full
def test_a_run_killed_at_ten_random_moments_finishes_with_the_same_bytes(
    experiment: Path, tmp_path: Path, finished: Path
) -> None:
    assert _killed(10, experiment, tmp_path) == 10
    assert contents(tmp_path / "store") == contents(finished / "store")
    leftovers = list((tmp_path / "store").rglob("*.partial"))
    assert leftovers == []


def test_the_command_line_says_what_it_did(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    command = [sys.executable, "-m", "lingraft.cli", "run", str(folder / "tiny.yaml"), "--out", str(folder / "out")]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nothing to do: all" in first.stderr
    shown = subprocess.run(
        [sys.executable, "-m", "lingraft.cli", "report", str(folder / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "AdaMergeX" in shown.stdout and "chosen" in shown.stdout
    assert re.search(r"\| AdaMergeX \|", (folder / "out/report.md").read_text(encoding="utf-8"))
    assert (folder / "out/adapters/adamergex-sw-seed0/adapter_config.json").is_file()
    assert read_json(folder / "out/results.json")["methods"]


def test_verbs_one_by_one_give_what_the_experiment_gives(finished: Path, tmp_path: Path, tiny_folder: Path) -> None:
    """The same training by `train`, merged by `merge`, has the bytes of the run's steps."""

    def lingraft(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "lingraft.cli", *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = ["--model", str(tiny_folder), "--dtype", "float32", "--device", "cpu", "--data-dir", str(finished / "data")]
    values = [
        "adapter.rank=2", "adapter.alpha=4", "adapter.modules=[attention.query, attention.value]", "training.learning_rate=0.01",
        "training.epochs=2", "training.batch_size=4", "training.clip=1.0", "training.max_length=64",
    ]  # fmt: skip
    text = ["reference.unit=line", "reference.segment_tokens=32"]
    lingraft(
        "train",
        *where,
        "--task",
        "kind",
        "--tasks",
        str(finished / "tiny.yaml"),
        "--language",
        "en",
        "--out",
        str(tmp_path / "T"),
        *values,
    )
    for name, language in (("Rt", "sw"), ("Rs", "en")):
        arguments = ["--task", "clm", "--text", "{language}.txt", "--language", language, "--out", str(tmp_path / name)]
        lingraft("train", *where, *arguments, *values, *text)
    chosen = results(finished / "out")["selections"]["adamergex"]["weight"]
    refs = ["--target-ref", str(tmp_path / "Rt"), "--source-ref", str(tmp_path / "Rs")]
    lingraft("divergence", *refs, "--out", str(tmp_path / "D"))
    for name, given in (("M", refs), ("MD", ["--divergence", str(tmp_path / "D")])):
        task = ["--task", str(tmp_path / "T"), "--weight", str(chosen), "--verify"]
        lingraft("merge", *task, *given, "--out", str(tmp_path / name))
    entries = results(finished / "out")["adapters"]
    entry = next(a for a in entries if (a["method"], a["language"], a["seed"]) == ("adamergex", "sw", 0))
    expected = content_digest(Path(entry["path"]))
    assert content_digest(tmp_path / "M") == content_digest(tmp_path / "MD") == expected
    shown = lingraft(
        "evaluate", *where, "--task", "kind", "--tasks", str(finished / "tiny.yaml"), "--language", "sw", "--adapter",
        str(tmp_path / "M"), "--out", str(tmp_path / "E"), "--json",
    )  # fmt: skip
    assert json.loads(shown)["items"] == 10
    assert "cosine" in lingraft("inspect", str(tmp_path / "Rt"), str(tmp_path / "Rs"))
