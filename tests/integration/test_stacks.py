"""Language adapters beneath task adapters, really trained: swapped, taken off, opened by plain PEFT, and by single commands."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from peft.tuners.tuners_utils import BaseTunerLayer

from lingraft.adapter import Adapter, AdapterWarning
from lingraft.attaching import tensors_of
from lingraft.backbones import Backbone
from lingraft.cli import main
from lingraft.config import AdapterConfig, BackboneConfig, CustomTask
from lingraft.differences import trainable_weights
from lingraft.evaluation import predict
from lingraft.heads import head_of
from lingraft.locating import locate
from lingraft.modules.bottleneck import BottleneckLayer
from lingraft.modules.sparse import SparseLayer
from lingraft.stacks import load_stack
from lingraft.structures import fresh
from lingraft.tasks.table import find_task
from lingraft.tensors import TensorFile
from lingraft.training import train
from tests.conftest import save_tiny_model
from tests.unit.test_stacks import (
    EXAMPLES,
    FAST,
    LANGUAGE,
    MODELS,
    STILL,
    TASK,
    TWO,
    Stop,
    Trace,
    difference,
    head,
    labelled,
    made,
    opened,
    plain_text,
    stopping,
)

SPARSE = AdapterConfig(family="sparse", entries=600, l1=0.1)
IDS = [[1, 20, 30, 40, 50, 60]]
ANSWER = [[0, 33, 44]]


def inputs(backbone: Backbone) -> dict[str, torch.Tensor]:
    more = {"decoder_input_ids": torch.tensor(ANSWER)} if backbone.kind == "encoder-decoder" else {}
    return {"input_ids": torch.tensor(IDS), **more}


def said(backbone: Backbone, stack: Sequence[Adapter]) -> torch.Tensor:
    """The logits with a stack on the base."""
    with backbone.with_adapter(stack) as wrapped, torch.no_grad(), backbone.autocast():
        return (backbone.model if wrapped is None else wrapped)(**inputs(backbone)).logits.float()


def scores(backbone: Backbone, stack: Sequence[Adapter]) -> list[tuple[float, ...]]:
    return [tuple(one.scores) for one in predict(backbone, stack, EXAMPLES)]


def learn(backbone: Backbone, folder: Path, **config: AdapterConfig) -> None:
    """Two language adapters, and a task adapter on top of the first."""
    for language in ("en", "sw"):
        texts = plain_text(backbone, language)
        train(backbone, texts, made(folder / language), adapter=config["language"], training=FAST)
    below = load_stack([folder / "en"])
    options: dict[str, Any] = {"adapter": config["task"], "training": FAST, "head": head(backbone)}
    train(backbone, labelled(backbone), made(folder / "task"), beneath=below, **options)


def parts_on(model: Any, number: int) -> dict[str, torch.Tensor]:
    """The numbers of a part beneath, copied, by the names of its file."""
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if f".beneath{number}" in f".{name}.":
            plain = name.replace(f".beneath{number}", "").replace("base_layer.", "")
            found[f"base_model.model.{plain}"] = tensor.detach().clone()
    return found


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in MODELS), ("tied", "bfloat16"), ("bert", "bfloat16"), ("mt5", "bfloat16")]
)  # fmt: skip
def test_languages_are_swapped_beneath_a_task(tmp_path: Path, name: str, dtype: str) -> None:
    backbone = opened(tmp_path, name, dtype)
    trace, alone = Trace(backbone), said(backbone, [])
    learn(backbone, tmp_path, language=LANGUAGE, task=TASK)
    trace.check()
    languages = {language: load_stack([tmp_path / language]) for language in ("en", "sw")}
    parts = {language: [dict(tensors_of(one)) for one in stack] for language, stack in languages.items()}
    assert all(not torch.equal(parts["en"][n][k], parts["sw"][n][k]) for n in (0, 1) for k in parts["en"][n])

    # While a task is learned, what lies beneath is what its files say, at every step, and learns nothing.
    model: Any = backbone.model if backbone.kind != "encoder" else backbone.headed(TWO).model
    seen: list[int] = []

    def look(done: int, total: int, loss: float) -> None:
        for number, expected in enumerate(parts["en"]):
            found = parts_on(model, number)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(found[key], value), key
        training = {n for n, p in model.named_parameters() if p.requires_grad}
        assert training and all(".default" in n for n in training)
        seen.append(done)

    options: dict[str, Any] = {"adapter": TASK, "training": FAST, "head": head(backbone)}
    options["beneath"] = languages["en"]
    train(backbone, labelled(backbone), made(tmp_path / "again"), progress=look, **options)
    assert seen == [1, 2, 3, 4]
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
        tmp_path / "task/adapter_model.safetensors"
    ).read_bytes()
    trace.check()
    for at, error in ((1, Stop), (3, KeyboardInterrupt)):
        with pytest.raises(error):
            out = made(tmp_path / f"stopped{at}")
            train(backbone, labelled(backbone), out, progress=stopping(at, error), **options)
        trace.check()

    # The task on either language: other answers, and the same ones again.
    task = Adapter.load(tmp_path / "task")
    stacks = {language: [*stack, task] for language, stack in languages.items()}
    answers = {language: scores(backbone, stack) for language, stack in stacks.items()}
    trace.check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores(backbone, load_stack([tmp_path / "sw", tmp_path / "task"])) == answers["sw"]
    found = [alone, *(said(backbone, s) for s in (*languages.values(), *stacks.values()))]
    of_one_shape = [x for x in found if x.shape == found[-1].shape]
    assert all(not torch.equal(a, b) for i, a in enumerate(of_one_shape) for b in of_one_shape[:i])
    assert answers["en"] != answers["sw"] and scores(backbone, stacks["en"]) == answers["en"]
    assert torch.equal(said(backbone, stacks["en"]), found[3])
    assert torch.equal(said(backbone, []), alone)

    # Whatever happens while it is on the model.
    for error in (Stop, KeyboardInterrupt):
        with pytest.raises(error), backbone.autocast(), backbone.with_adapter(stacks["sw"]) as wrapped:
            wrapped(**inputs(backbone))
            raise error
        trace.check()


@pytest.mark.parametrize("name", [*MODELS])
def test_a_stack_stands_on_the_modules_it_names_and_no_others(tmp_path: Path, name: str) -> None:
    backbone = opened(tmp_path, name)
    config = LANGUAGE.model_copy(update={"leave_out_last": True})
    train(backbone, plain_text(backbone, "en"), made(tmp_path / "en"), adapter=config, training=STILL)
    stack = load_stack([tmp_path / "en"])
    own = {n: id(p) for n, p in backbone.model.named_parameters()}
    with backbone.with_adapter(stack):
        layers = {n: m for n, m in backbone.model.named_modules() if isinstance(m, BaseTunerLayer)}
        plain = {n.replace(".base_layer", "") for n in layers}
        output: Any = backbone.model.get_output_embeddings()
        where = {n for n, m in backbone.model.named_modules() if m is output}
        assert {n for n, m in layers.items() if isinstance(m, BottleneckLayer)} == set(stack[1].modules)
        # Both halves of an encoder-decoder have embeddings of their own.
        behind = plain - where - set(stack[1].modules)
        assert len(where & plain) == 1 and len(behind) == (2 if backbone.kind == "encoder-decoder" else 1)
        assert all("embed" in n for n in behind)
        now = {n.replace(".base_layer", ""): id(p) for n, p in backbone.model.named_parameters()}
        assert own.items() <= now.items()
        assert not any(p.requires_grad for n, p in backbone.model.named_parameters() if ".beneath" in n or n in own)


@pytest.mark.parametrize("language", ["madx", "sparse"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # A prefix is not for models of two stacks.
        (name, kind)
        for name in ("tied", "bert", "t5")
        for kind in ("lora", "ia3", "prefix", "bottleneck")
        if (name, kind) != ("t5", "prefix")
    ],
)
def test_a_task_of_any_structure_on_a_language(tmp_path: Path, name: str, language: str, kind: str) -> None:
    """Trained on the source's, asked on the target's; the language's numbers stay what they are all the while."""
    backbone = opened(tmp_path, name)
    trace = Trace(backbone)
    tasks = {
        "lora": AdapterConfig(rank=2, dropout=0),
        "ia3": AdapterConfig(family="ia3"),
        "prefix": AdapterConfig(family="prefix", tokens=2),
        "bottleneck": AdapterConfig(family="bottleneck", reduction=4, positions="houlsby"),
    }
    learn(backbone, tmp_path, language=LANGUAGE if language == "madx" else SPARSE, task=tasks[kind])
    trace.check()
    noted = Adapter.load(tmp_path / "task").sidecar["beneath"]
    assert [note["structure"] for note in noted] == (["invertible", "bottleneck"] if language == "madx" else ["sparse"])
    # Its file holds what is its own, and nothing of what lay beneath or of the base.
    own = fresh(backbone, tasks[kind], 0, head(backbone))[1]
    assert set(TensorFile(tmp_path / "task/adapter_model.safetensors").names) == set(own)
    answers = {c: scores(backbone, load_stack([tmp_path / c, tmp_path / "task"])) for c in ("en", "sw")}
    assert answers["en"] != answers["sw"]
    with pytest.warns(AdapterWarning, match="trained on top of"):
        assert scores(backbone, load_stack([tmp_path / "task"])) not in answers.values()
    trace.check()

    # The loss the task is trained with is that of the stack it is asked on: the last of the log, with nothing learned.
    options: dict[str, Any] = {"adapter": tasks[kind], "head": head(backbone), "beneath": load_stack([tmp_path / "en"])}
    again = FAST.model_copy(update={"epochs": 0.5, "learning_rate": 1e-9})
    start = {"start_from": tmp_path / "task"}
    train(backbone, labelled(backbone), made(tmp_path / "again"), training=again, **options, **start)
    first = json.loads((tmp_path / "again/metrics.jsonl").read_text().splitlines()[0])["loss"]
    history = [json.loads(line)["loss"] for line in (tmp_path / "task/metrics.jsonl").read_text().splitlines()]
    assert first < history[0]
    for language_again in ("en", "sw"):
        fresh_options = {**options, "beneath": load_stack([tmp_path / language_again])}
        train(
            backbone, labelled(backbone), made(tmp_path / f"on-{language_again}"), training=again, **fresh_options, **start
        )  # fmt: skip
    losses = [(tmp_path / f"on-{c}/metrics.jsonl").read_text() for c in ("en", "sw")]
    assert losses[0] != losses[1] and losses[0] == (tmp_path / "again/metrics.jsonl").read_text()


@pytest.mark.parametrize("name", ["tied", "xlm-roberta", "mt5"])
def test_a_sparse_language_is_in_the_weights_while_a_task_is_learned(tmp_path: Path, name: str) -> None:
    backbone = opened(tmp_path, name)
    model: Any = backbone.model if backbone.kind != "encoder" else backbone.headed(TWO).model
    start = {s: w.parameter.detach().reshape(-1).clone() for s, w in trainable_weights(model).items()}
    config = AdapterConfig(rank=2, dropout=0)
    train(backbone, plain_text(backbone, "en"), made(tmp_path / "en"), adapter=SPARSE, training=FAST)
    for site, (indices, values) in difference(tmp_path / "en").items():
        start[site][indices] += torch.from_numpy(values)
    seen: list[int] = []

    def look(done: int, total: int, loss: float) -> None:
        for site, weight in trainable_weights(model).items():
            assert torch.equal(weight.parameter.reshape(-1), start[site]), site
        assert all(m.merged for m in model.modules() if isinstance(m, SparseLayer))
        seen.append(done)

    options: dict[str, Any] = {"adapter": config, "training": FAST, "head": head(backbone), "progress": look}
    below = load_stack([tmp_path / "en"])
    train(backbone, labelled(backbone), made(tmp_path / "task"), beneath=below, **options)
    assert len(seen) == 4


def test_a_language_adapter_on_a_sparse_language_and_a_task_on_both(tmp_path: Path) -> None:
    """Three stand on one another: in the weights, behind the embeddings and the layers, and on these."""
    backbone = opened(tmp_path, "tied")
    trace = Trace(backbone)
    train(backbone, plain_text(backbone, "sw"), made(tmp_path / "sft"), adapter=SPARSE, training=FAST)
    options: dict[str, Any] = {"adapter": LANGUAGE, "training": FAST, "beneath": load_stack([tmp_path / "sft"])}
    train(backbone, plain_text(backbone, "en"), made(tmp_path / "en"), **options)
    below = load_stack([tmp_path / "sft", tmp_path / "en"])
    options |= {"adapter": TASK, "beneath": below}
    train(backbone, labelled(backbone), made(tmp_path / "task"), **options)
    trace.check()
    task = Adapter.load(tmp_path / "task")
    whole = scores(backbone, [*below, task])
    parts = [[*below[1:], task], [below[0], *below[2:], task], [*below[:2], task], list(below)]
    assert all(scores(backbone, some) != whole for some in parts)
    assert scores(backbone, [*below, task]) == whole
    trace.check()


# Plain PEFT, in a process that has never heard of stacks.

OPEN = """
import json, sys
import lingraft, torch, transformers
from peft import PeftModel, inject_adapter_in_model, PeftConfig, set_peft_model_state_dict
from safetensors.torch import load_file

asked, out = json.loads(sys.argv[1]), {}
for name, (model, loader, ids, stacks) in asked.items():
    for number, (labels, parts) in enumerate(stacks):
        more = {"num_labels": labels} if labels else {}
        if labels:
            torch.manual_seed(0)
        auto = "AutoModelForSequenceClassification" if labels else loader
        base = getattr(transformers, auto).from_pretrained(model, dtype=torch.float32, **more).eval()
        if len(parts) == 1:
            wrapped = PeftModel.from_pretrained(base, parts[0])
        else:
            coupling = parts[0] if "invertible" in parts[0] else None
            if coupling:
                inject_adapter_in_model(PeftConfig.from_pretrained(coupling), base, "coupling")
                tensors = load_file(coupling + "/adapter_model.safetensors")
                tensors = {k.removeprefix("base_model.model."): v for k, v in tensors.items()}
                assert not set_peft_model_state_dict(base, tensors, adapter_name="coupling").unexpected_keys
                del base.peft_config
            language, task = parts[-2:]
            wrapped = PeftModel.from_pretrained(base, language, adapter_name="language")
            wrapped.load_adapter(task, adapter_name="task")
            wrapped.base_model.set_adapter(["language", "task"])
        wrapped.eval()
        with torch.no_grad():
            out[f"{name} {number}"] = wrapped(**{k: torch.tensor(v) for k, v in ids.items()}).logits
torch.save(out, sys.argv[2])
"""
LOADERS = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForMaskedLM",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
}


QUICK = ("tied", "bert", "mt5")


@pytest.mark.parametrize(
    "names",
    [QUICK, pytest.param([n for n in MODELS if n not in QUICK], marks=pytest.mark.full)],
    ids=["quick", "others"],
)
def test_plain_peft_opens_every_part_and_stacks_them_by_hand(tmp_path: Path, names: Sequence[str]) -> None:
    asked: dict[str, Any] = {}
    expected: dict[str, torch.Tensor] = {}
    for name in names:
        backbone = opened(tmp_path, name)
        folder = tmp_path / f"{name}-adapters"
        learn(backbone, folder / "madx", language=LANGUAGE, task=TASK)
        learn(backbone, folder / "lfsft", language=SPARSE, task=SPARSE)
        madx, lfsft = folder / "madx", folder / "lfsft"
        stacks = [
            [madx / "en/invertible"],
            [madx / "sw/bottleneck"],
            [madx / "task"],
            [lfsft / "sw"],
            [lfsft / "task"],
            [lfsft / "sw", lfsft / "task"],
            [madx / "en/bottleneck", madx / "task"],
            [madx / "sw/invertible", madx / "sw/bottleneck", madx / "task"],
        ]
        given = []
        for number, stack in enumerate(stacks):
            adapters = [Adapter.load(part) for part in stack]
            expected[f"{name} {number}"] = said(backbone, adapters)
            labels = head_of(adapters[-1]).labels if backbone.kind == "encoder" else 0
            given.append((labels, [str(part) for part in stack]))
        ids = {key: value.tolist() for key, value in inputs(backbone).items()}
        asked[name] = (str(tmp_path / name), LOADERS[backbone.kind], ids, given)
    command = [sys.executable, "-c", OPEN, json.dumps(asked), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "logits.pt")
    assert found.keys() == expected.keys()
    wrong = {
        key: float((found[key] - expected[key]).abs().max())
        for key in expected
        if not torch.allclose(found[key], expected[key], rtol=1e-5, atol=1e-5)
    }
    assert not wrong


# By single commands.

YAML = """
tasks:
  topic:
    files: {train: "{language}/train.jsonl", test: "{language}/test.jsonl"}
    prompt: "Word: {text}\\nKind:"
    labels: [place, sport]
    id_field: id
"""
WORDS = {"en": ("river", "mountain", "goal", "match"), "sw": ("mto", "mlima", "bao", "mchezo")}
VALUES = (
    "training.learning_rate=0.01", "training.epochs=1", "training.batch_size=4", "training.warmup=0",
    "training.max_length=64",
)  # fmt: skip
TEXT = (
    "--data-dir",
    "bundled",
    "--text",
    "udhr/{language}.txt",
    "reference.segment_tokens=32",
    "reference.max_segments=8",
)
FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "madx": {
        "language": (
            "--adapter",
            "bottleneck",
            "adapter.reduction=2",
            "adapter.positions=madx",
            "adapter.invertible=true",
        ),
        "task": ("--adapter", "bottleneck", "adapter.reduction=4", "adapter.positions=madx"),
    },
    "lfsft": {
        "language": ("--adapter", "sparse", "adapter.entries=300", "adapter.l1=0.1"),
        "task": ("--adapter", "sparse", "adapter.entries=500", "adapter.first_epochs=0.5"),
    },
}


def lingraft(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def done(*words: object) -> Any:
    """What a command gives as JSON; it must go well."""
    result = lingraft(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def mistaken(*words: object) -> str:
    """What a command says to a mistake."""
    result = lingraft(*words)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert result.stderr.count("error: ") == 1
    return result.stderr


@pytest.fixture(scope="module", params=["tied", "xlm-roberta", "t5"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a task's rows in two languages."""
    folder = tmp_path_factory.mktemp("commands")
    architecture, changes = MODELS[request.param]
    save_tiny_model(folder / "model", architecture, **changes)
    (folder / "kind").write_text({"tied": "clm", "xlm-roberta": "mlm", "t5": "prefix-lm"}[request.param])
    (folder / "tasks.yaml").write_text(YAML, encoding="utf-8")
    for language, words in WORDS.items():
        (folder / "data" / language).mkdir(parents=True)
        for split, count in (("train", 8), ("test", 6)):
            rows = [
                {"id": str(n), "text": words[n % 4] + "!" * (n // 4), "label": ("place", "sport")[n % 4 // 2]}
                for n in range(count)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "data" / language / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def on(place: Path) -> list[object]:
    return ["--model", place / "model", "--dtype", "float32", "--device", "cpu"]


def of_task(place: Path) -> list[object]:
    return ["--task", "topic", "--tasks", place / "tasks.yaml", "--data-dir", place / "data"]


@pytest.fixture(scope="module")
def trained(place: Path) -> Callable[[str], Path]:
    """The folder of two languages and a task on the first, trained once by commands."""

    def get(family: str) -> Path:
        out = place / family
        if out.exists():
            return out
        plain = ["--task", (place / "kind").read_text(), *TEXT]
        for language in ("en", "sw"):
            words = [*on(place), *plain, "--language", language, *FAMILIES[family]["language"], *VALUES]
            found = done("train", *words, "--out", out / language)
            assert found["out"] == str(out / language) and found["steps"] == (2 if family == "madx" else 4)
            assert ("first" in found) == (family == "lfsft")
        below = ["--beneath", out / "en"]
        words = [*on(place), *of_task(place), "--language", "en", *FAMILIES[family]["task"], *VALUES, *below]
        done("train", *words, "--out", out / "task")
        return out

    return get


def evaluated(place: Path, out: Path, *adapters: Path) -> tuple[Any, list[Any], str]:
    """What is printed, the scores of every candidate of every item, and what is said beside."""
    given = [word for folder in adapters for word in ("--adapter", folder)]
    words = ["evaluate", *on(place), *of_task(place), "--language", "sw", *given, "--out", out, "--json"]
    result = lingraft(*words)
    assert result.exit_code == 0, result.output
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(result.stdout), [json.loads(line)["scores"] for line in lines], result.stderr


@pytest.mark.parametrize("family", [*FAMILIES])
def test_as_a_user_would(place: Path, trained: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    folder = trained(family)
    record = json.loads((folder / "task/step.json").read_text())
    assert record["language"] == "en" and len(record["beneath"]) == 1
    parts = ["invertible", "bottleneck"] if family == "madx" else ["sparse"]
    notes = json.loads((folder / "task/lingraft.json").read_text())
    assert [(note["structure"], note["language"]) for note in notes["beneath"]] == [(part, "en") for part in parts]
    for language in ("en", "sw"):
        kept = [p.name for p in (folder / language).rglob("*") if "checkpoint" in p.name or "selection" in p.name]
        assert not kept
        for part in ("invertible", "bottleneck") if family == "madx" else (".",):
            note = json.loads((folder / language / part / "lingraft.json").read_text())
            assert note["provenance"]["language"] == language

    found, there, beside = evaluated(place, tmp_path / "sw", folder / "sw", folder / "task")
    _, source, _ = evaluated(place, tmp_path / "en", folder / "en", folder / "task")
    assert found["items"] == 6 and there != source and "trained on top of" not in beside
    digests = [json.loads((tmp_path / c / "step.json").read_text())["adapters"] for c in ("sw", "en")]
    assert digests[0][0] != digests[1][0] and digests[0][1] == digests[1][1]
    backbone = Backbone(locate(BackboneConfig(model=str(place / "model"), dtype="float32", device="cpu")))
    tree = yaml.safe_load((place / "tasks.yaml").read_text(encoding="utf-8"))["tasks"]["topic"]
    task = find_task("topic", {"topic": CustomTask.model_validate(tree)})
    examples = task.examples(task.sources("sw", "test", place / "data"), language="sw")
    by_hand = predict(backbone, load_stack([folder / "sw", folder / "task"]), examples)
    assert [[round(s, 6) for s in one.scores] for one in by_hand] == there

    _, without, beside = evaluated(place, tmp_path / "none", folder / "task")
    assert without != there
    assert f"trained on top of {', '.join(parts)}, and stands on nothing" in " ".join(beside.split())
    again = lingraft("evaluate", *on(place), *of_task(place), "--language", "sw", "--out", tmp_path / "sw")
    assert again.exit_code == 2 and "exists already" in again.stderr


def test_parts_are_inspected(trained: Callable[[str], Path], tmp_path: Path) -> None:
    madx, lfsft = trained("madx"), trained("lfsft")
    for folder, family in (
        (madx / "sw/invertible", "invertible"),
        (madx / "sw/bottleneck", "bottleneck"),
        (lfsft / "sw", "sparse"),
    ):
        (entry,) = done("inspect", folder)["adapters"]
        assert entry["family"] == family and entry["provenance"]["language"] == "sw" and entry["norm"] > 0
        shown = lingraft("inspect", folder)
        assert shown.exit_code == 0 and family in shown.output
    two = done("inspect", madx / "en/bottleneck", madx / "sw/bottleneck")
    assert 0.5 < two["similarity"]["cosine"] < 1
    whole = lingraft("inspect", madx / "sw")
    # A stack is no adapter: it is said what to give instead, or every part is shown.
    assert whole.exit_code in (0, 2) and "Traceback" not in whole.output
    assert "invertible" in whole.output and "bottleneck" in whole.output


def test_parts_are_merged_and_stacked_again(place: Path, trained: Callable[[str], Path], tmp_path: Path) -> None:
    folder = trained("lfsft")
    words = ["merge", f"{folder / 'en'}=0.5", f"{folder / 'sw'}=0.5", "--out", tmp_path / "mean"]
    done(*words)
    _, mean, beside = evaluated(place, tmp_path / "out", tmp_path / "mean", folder / "task")
    _, there, _ = evaluated(place, tmp_path / "sw", folder / "sw", folder / "task")
    assert "trained on top of" not in beside and mean != there and np.isfinite(mean).all()


def test_a_language_out_of_the_authors_file_is_the_same_beneath_a_task(
    place: Path, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    """A difference that was learned here, written as composable-sft writes them, converted, and put beneath the task."""
    folder = trained("lfsft")
    adapter = Adapter.load(folder / "sw")
    diffs = {}
    for site, (indices, values) in difference(folder / "sw").items():
        shape = tuple(adapter.site(site).tensors["shape"].tolist())
        places = torch.from_numpy(np.stack(np.unravel_index(indices, shape)))
        name = site if site.endswith(".bias") else f"{site}.weight"
        diffs[name] = torch.sparse_coo_tensor(places, torch.from_numpy(values), shape, check_invariants=True)
    (tmp_path / "theirs").mkdir()
    torch.save({"diffs": diffs, "abs": {}}, tmp_path / "theirs/pytorch_diff.bin")
    found = done("convert", tmp_path / "theirs", "--base", place / "model", "--out", tmp_path / "sw")
    assert found["entries"] == 300
    _, ours, _ = evaluated(place, tmp_path / "a", folder / "sw", folder / "task")
    _, theirs, beside = evaluated(place, tmp_path / "b", tmp_path / "sw", folder / "task")
    assert theirs == ours and "trained on top of" not in beside


@pytest.mark.filterwarnings("ignore::lingraft.adapter.AdapterWarning")
def test_mistakes_are_said(place: Path, trained: Callable[[str], Path], tmp_path: Path) -> None:
    madx, lfsft, out = trained("madx"), trained("lfsft"), ("--out", tmp_path / "a")
    ask = ["evaluate", *on(place), *of_task(place), "--language", "sw", *out]
    said = mistaken(*ask, "--adapter", madx / "en", "--adapter", lfsft / "sw")
    assert "cannot stand on bottleneck" in said and "give sparse differences first" in said
    assert "no such adapter" in mistaken(*ask, "--adapter", tmp_path / "none", "--adapter", madx / "task")
    task = ["train", *on(place), *of_task(place), "--language", "en", *VALUES, *out]
    sparse = ["--adapter", "sparse", "adapter.entries=100"]
    assert "leave --beneath out" in mistaken(*task, *sparse, "--beneath", madx / "en")
    assert "leave --start-from out" in mistaken(*task, *sparse, "--start-from", lfsft / "sw")
    assert "weight_decay=0" in mistaken(*task, *sparse, "training.weight_decay=0.1")
    assert "entries" in mistaken(*task, "--adapter", "sparse", "adapter.entries=100000000")
    assert "not of the structure 'sparse'" in mistaken(*task, *sparse, "adapter.invertible=true")
    plain = ["train", *on(place), "--task", (place / "kind").read_text(), *TEXT, "--language", "en", *VALUES, *out]
    words = FAMILIES["madx"]["language"]
    assert "coupling" in mistaken(*plain, *words, "--beneath", madx / "en")
    assert "leave --start-from out" in mistaken(*plain, *words, "--start-from", madx / "en/bottleneck")
    note = madx / "sw/lingraft.json"
    kept = note.read_text()
    try:
        note.write_text(json.dumps({**json.loads(kept), "parts": ["../x"]}))
        assert "parts of this stack" in mistaken(*ask, "--adapter", madx / "sw", "--adapter", madx / "task")
        assert "parts of this stack" in mistaken(*task, *FAMILIES["madx"]["task"], "--beneath", madx / "sw")
    finally:
        note.write_text(kept)
    assert not (tmp_path / "a").exists()


def test_a_second_stage_is_not_trained_on_a_language(tmp_path: Path) -> None:
    backbone = opened(tmp_path, "tied")
    train(backbone, plain_text(backbone, "en"), made(tmp_path / "en"), adapter=LANGUAGE, training=STILL)
    config = AdapterConfig(rank=2)
    train(backbone, plain_text(backbone, "en"), made(tmp_path / "lora"), adapter=config, training=STILL)
    rows = tmp_path / "data/en"
    rows.mkdir(parents=True)
    (tmp_path / "tasks.yaml").write_text(YAML)
    row = {"id": "0", "text": "river", "label": "place"}
    for split in ("train", "test"):
        (rows / f"{split}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "id": "1"}) + "\n")
    words = ["--model", tmp_path / "tied", "--dtype", "float32", "--device", "cpu", "--language", "en"]
    words += ["--task", "topic", "--tasks", tmp_path / "tasks.yaml", "--data-dir", tmp_path / "data"]
    stages = ["--first-stage", tmp_path / "lora", "--second", "lora", "--beneath", tmp_path / "en"]
    said = mistaken("train", *words, *stages, "adapter.rank=2", "--out", tmp_path / "a")
    assert "a second stage stands on its first one alone" in said and "--beneath" in said


def test_the_benchmark_of_stacks_runs(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    script, out = Path(__file__).parents[2] / "benchmarks" / "adapters.py", tmp_path / "found.json"
    wanted = ["--quick", "--model", str(tmp_path / "model"), "--entries", "500", "--out", str(out)]
    subprocess.run([sys.executable, str(script), *wanted], check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert found["swap_seconds"]["base_unchanged"] and found["learning"]["base_unchanged"]
    assert found["learning"]["bytes_an_entry"] == 20 and found["learning"]["copy_of_a_tied_embedding_mib"] > 0
