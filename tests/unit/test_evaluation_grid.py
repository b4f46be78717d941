"""A grid of weights on one loaded model says what every merge says; between steps the merge stays on the model, and only there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lingraft import evaluation, live
from lingraft.adapter import Adapter
from lingraft.backbones import Backbone
from lingraft.config import AdapterConfig, BackboneConfig, TrainingConfig, load_experiment
from lingraft.encoding import labelled_sequences, masked_sequences
from lingraft.errors import AdapterError
from lingraft.evaluation import Asking, Questions, ask, grid
from lingraft.execution import execute
from lingraft.heads import Head
from lingraft.locating import locate
from lingraft.merging import Graft
from lingraft.plan import Step, make_plan
from lingraft.predictions import read_predictions
from lingraft.runner import run
from lingraft.session import Session
from lingraft.store import Store
from lingraft.tasks.items import Example
from lingraft.training import train
from tests.conftest import save_tiny_model
from tests.integration.test_pipeline import make_experiment
from tests.unit.test_live import HOW, logits, parts

ITEMS = [Example(str(n), f"Pick {'x' * n}:", (" a one", " b two"), n % 2) for n in range(6)]
WEIGHTS = (0.0, 0.5, 0.25, 1.0)
SOME = ["lora, factors", "lora, product", "lora, arimerge", "ia3", "prefix", "bottleneck"]
NO_LINES = {"compressed": ("lora", {"space": "product", "out_rank": 3}), "literal": ("prefix", {"space": "literal"})}


@pytest.mark.parametrize("name", [*SOME, *NO_LINES])
@pytest.mark.parametrize("scoring", ["sequence", "auto", "gold"])
def test_a_grid_says_what_every_merge_says(tiny: Backbone, tmp_path: Path, name: str, scoring: str) -> None:
    structure, how = {**HOW, **NO_LINES}[name]
    task, divergence = parts(tmp_path, structure)
    if structure == "lora":
        how = {"modules": "attention", **how}
    base, asking = logits(tiny), Asking(scoring=scoring)
    found = dict(grid(tiny, task, divergence, Graft(0.9, **how), WEIGHTS, ITEMS, asking))
    assert list(found) == list(WEIGHTS)
    for weight, said in found.items():
        merged = replace(Graft(0.9, **how), weight=weight).onto(task, divergence)
        for a, b in zip(said, ask(tiny, merged, ITEMS, asking), strict=True):
            mine, theirs = ((x.gold_log_likelihood,) if scoring == "gold" else x.scores for x in (a, b))  # pyright: ignore[reportAttributeAccessIssue]
            assert mine == pytest.approx(theirs, abs=2e-4)
    assert torch.equal(logits(tiny), base)


def test_a_weight_of_zero_says_what_the_task_s_adapter_says(tiny: Backbone, tmp_path: Path) -> None:
    task, divergence = parts(tmp_path, "lora")
    found = dict(grid(tiny, task, divergence, Graft(0.5), (0.5, 0.0), ITEMS))
    assert found[0.0] == ask(tiny, task, ITEMS)  # to the last bit
    assert found[0.5] != found[0.0]


def test_items_are_tokenised_once(tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, divergence = parts(tmp_path, "ia3")
    texts: list[Any] = []

    class Counting:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, text: Any, **options: Any) -> Any:
            texts.append(text)
            return self.inner(text, **options)

    monkeypatch.setattr(tiny, "tokenizer", Counting(tiny.tokenizer))
    questions = Questions(tiny, ITEMS)
    list(grid(tiny, task, divergence, Graft(0.5), (0.5,), questions))
    once = len(texts)
    assert once <= len(ITEMS) + 2
    list(grid(tiny, task, divergence, Graft(0.5), WEIGHTS, questions))
    assert len(texts) == once


def test_a_grid_that_is_left_early_or_fails_leaves_the_base_as_it_was(tiny: Backbone, tmp_path: Path) -> None:
    task, divergence = parts(tmp_path, "lora")
    base = logits(tiny)
    values = grid(tiny, task, divergence, Graft(0.5), WEIGHTS, ITEMS)
    next(values)
    assert not torch.equal(logits(tiny), base)
    values.close()
    assert torch.equal(logits(tiny), base)
    with pytest.raises(AdapterError, match="finite"):
        list(grid(tiny, task, divergence, Graft(0.5), (0.5, -1.0), ITEMS))
    assert torch.equal(logits(tiny), base)
    assert list(grid(tiny, task, divergence, Graft(0.5), (), ITEMS)) == []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A run of two methods with a weight."""
    folder = tmp_path_factory.mktemp("grid")
    run(load_experiment(make_experiment(folder, tiny_folder), CHANGES), folder / "out")
    return folder


CHANGES = ["methods=[adamergex]", "seeds=[0]", "selection.weights=[0.25,0.5,1.0]", "targets=[sw]", "training.epochs=1"]


def opened(made: Path) -> tuple[Session, list[Step]]:
    """A session on the finished run, and its steps that ask merges of one task and one pair of references."""
    experiment = load_experiment(made / "tiny.yaml", CHANGES)
    located = locate(experiment.backbone)
    steps = make_plan(experiment, located).steps
    grafts = [s for s in steps if s.kind == "predict" and s.config["graft"] is not None]
    return Session(experiment, located, Store(made / "store")), grafts


def written(step: Step, session: Session, folder: Path) -> list[tuple[float, ...]]:
    folder.mkdir(parents=True)
    execute(step, session, folder)
    assert {path.name for path in folder.iterdir()} == {"predictions.jsonl", "extra.json"}
    return [p.scores for p in read_predictions(folder)]


def test_steps_of_a_grid_share_the_merge_on_the_model_and_the_items(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, steps = opened(made)
    assert len(steps) == 3
    entered: list[Graft] = []
    inner = live.grafted

    def counted(backbone: Any, task: Any, divergence: Any, graft: Graft) -> Any:
        entered.append(graft)
        return inner(backbone, task, divergence, graft)

    monkeypatch.setattr(live, "grafted", counted)
    found = [written(step, session, tmp_path / step.key) for step in steps]
    assert len(entered) == 1
    monkeypatch.setattr(live, "is_line", lambda graft, task: False)
    anew, _ = opened(made)
    for said, step in zip(found, steps, strict=True):
        expected = written(step, anew, tmp_path / "anew" / step.key)
        for a, b in zip(said, expected, strict=True):
            assert a == pytest.approx(b, abs=2e-6)
        stored = [p.scores for p in read_predictions(session.folder(step))]
        assert said == stored
    # In any order, the same numbers.
    session.release()
    assert written(steps[-1], session, tmp_path / "again") == found[-1]


def test_whoever_asks_for_the_model_gets_it_with_nothing_on_it(made: Path, tmp_path: Path) -> None:
    session, steps = opened(made)
    base = logits(session.backbone)
    written(steps[0], session, tmp_path / "a")
    assert not torch.equal(logits(session._loaded), base)  # pyright: ignore[reportPrivateUsage]
    assert torch.equal(logits(session.backbone), base)
    assert not list(session.backbone.model.base_model._forward_pre_hooks)


@pytest.mark.parametrize("error", [KeyboardInterrupt, AdapterError("x")])
def test_a_step_that_fails_takes_the_merge_off(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    session, steps = opened(made)
    base = logits(session.backbone)
    written(steps[0], session, tmp_path / "a")

    def fail(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(evaluation, "ask", fail)
    (tmp_path / "b").mkdir()
    with pytest.raises((KeyboardInterrupt, AdapterError)):
        execute(steps[1], session, tmp_path / "b")
    assert torch.equal(logits(session._loaded), base)  # pyright: ignore[reportPrivateUsage]


def test_a_grid_on_an_encoder_answers_by_the_task_s_head(tmp_path: Path) -> None:
    backbone = Backbone(locate(BackboneConfig(model=str(save_tiny_model(tmp_path / "bert", "bert")), dtype="float32")))
    head, values = Head("classification", 2), TrainingConfig(epochs=1, batch_size=2, learning_rate=0.05)
    items = [Example(str(n), "", ("a", "b"), n % 2, parts=(f"text {'x' * n}",)) for n in range(4)]
    learned = {
        "task": labelled_sequences(backbone, items, head, 32).sequences,
        "target": masked_sequences(backbone, [list(range(5, 25))] * 2),
        "source": masked_sequences(backbone, [list(range(30, 50))] * 2),
    }
    for name, sequences in learned.items():
        (tmp_path / name).mkdir()
        own = head if name == "task" else None
        train(backbone, sequences, tmp_path / name, adapter=AdapterConfig(rank=2, dropout=0), training=values, head=own)
    task, target, source = (Adapter.load(tmp_path / name) for name in learned)
    found = dict(grid(backbone, task, target - source, Graft(0.5), (0.0, 0.5), items))
    assert found[0.0] == ask(backbone, task, items)
    assert found[0.5] == ask(backbone, task + 0.5 * (target - source), items)
    assert found[0.5] != found[0.0]
