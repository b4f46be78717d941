"""Runs with workers that do as they are told: what is made, waited for, tried again, made anew, and given up."""

import pickle
from collections.abc import Hashable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft import runner
from lingraft.config import BackboneConfig, Experiment
from lingraft.errors import (
    AlreadyMade,
    Busy,
    Damaged,
    LingraftError,
    MissingExtra,
    RunFailed,
    TransientError,
    UserError,
)
from lingraft.estimating import _rates
from lingraft.plan import Plan, Step
from lingraft.plan.steps import Cell
from lingraft.runner import Events, carry_out
from lingraft.store import Store, write_json
from lingraft.workers import Ended


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_PAUSE", 0.01)


def make(store: Store, step: Step) -> None:
    with store.making(step.kind, step.key, step.identity()) as work:
        write_json(work / "extra.json", {"label": step.label})
        (work / "result.txt").write_text(step.label)


class Told:
    """Workers that fail as a script says: by label, what happens at each attempt before it is made."""

    def __init__(self, store: Store, script: dict[str, list[Exception]], places: int = 1) -> None:
        self.store, self.script, self.places = store, {k: list(v) for k, v in script.items()}, places
        self.running: list[Step] = []
        self.begun: list[str] = []
        self.stopped = False

    def sort(self, step: Step) -> Hashable:
        return step.kind

    def room(self, step: Step) -> bool:
        return len(self.running) < self.places

    def start(self, group: Sequence[Step]) -> None:
        self.running += group
        self.begun += [step.label for step in group]

    def ended(self, seconds: float) -> list[Ended]:
        if not self.running:
            return []
        step = self.running.pop()
        return [(step, self._outcome(step))]

    def _outcome(self, step: Step) -> LingraftError | None:
        for needed in step.inputs.values():
            try:
                self.store.folder(needed.kind, needed.key)
            except LingraftError as error:
                return error
        left = self.script.get(step.label, [])
        if left:
            error = left.pop(0)
            if isinstance(error, AlreadyMade):
                make(self.store, step)
            assert isinstance(error, LingraftError)
            return error
        make(self.store, step)
        return None

    def stop(self) -> None:
        self.stopped = True


def chain() -> tuple[Step, Step, Step, Step]:
    first = Step("train", {"n": 1}, label="first")
    second = Step("merge", {"n": 2}, {"x": first}, label="second")
    third = Step("score", {"n": 3}, {"x": second}, label="third")
    other = Step("train", {"n": 4}, label="other")
    return first, second, third, other


def test_every_step_is_made_once(tmp_path: Path) -> None:
    store, steps = Store(tmp_path), chain()
    workers = Told(store, {}, places=2)
    assert carry_out(steps, store, workers, Events()) == 4
    assert sorted(workers.begun) == sorted(step.label for step in steps) and workers.stopped


def test_what_another_run_is_making_is_waited_for(tmp_path: Path) -> None:
    store, steps = Store(tmp_path), chain()
    told: list[str] = []
    workers = Told(store, {"first": [Busy("somebody is at it"), Busy("still"), AlreadyMade("done")]})
    assert carry_out(steps, store, workers, Events(notice=told.append)) == 3, "one was made elsewhere"
    assert told == ["waiting for 'first': somebody is at it"], "said once"
    assert workers.begun[1] == "other", "something else is done meanwhile"


def test_what_a_retry_can_mend_is_tried_three_times(tmp_path: Path) -> None:
    store, steps = Store(tmp_path), chain()
    told: list[str] = []
    workers = Told(store, {"first": [TransientError("lost"), TransientError("lost")]})
    assert carry_out(steps, store, workers, Events(notice=told.append)) == 4
    assert told == ["trying 'first' again: lost"] * 2


def test_the_third_loss_is_a_failure_and_what_does_not_need_it_is_made(tmp_path: Path) -> None:
    store, steps = Store(tmp_path), chain()
    failures: list[str] = []
    workers = Told(store, {"first": [TransientError("lost")] * 3})
    with pytest.raises(RunFailed, match="1 step failed and 2 that depend on them did not run"):
        carry_out(steps, store, workers, Events(failure=lambda step, error: failures.append(step.label)))
    assert failures == ["first"] and store.has("train", steps[3].key) and workers.stopped


def test_what_a_retry_cannot_mend_is_not_tried_again(tmp_path: Path) -> None:
    store, steps = Store(tmp_path), chain()
    workers = Told(store, {"second": [LingraftError("NaN")]})
    with pytest.raises(RunFailed):
        carry_out(steps, store, workers, Events())
    assert workers.begun.count("second") == 1 and "third" not in workers.begun


def test_a_mistake_in_the_request_ends_the_run_at_once(tmp_path: Path) -> None:
    store, steps = Store(tmp_path), chain()
    workers = Told(store, {"first": [UserError("no such module")]})
    with pytest.raises(UserError, match="no such module"):
        carry_out(steps, store, workers, Events())
    assert workers.begun == ["first"] and workers.stopped


@pytest.mark.parametrize("deep", [False, True])
def test_a_damaged_input_is_set_aside_and_made_anew_with_what_is_missing_for_it(deep: bool, tmp_path: Path) -> None:
    store, (first, second, third, _) = Store(tmp_path), chain()
    make(store, first)
    make(store, second)
    good = (store.path("merge", second.key) / "result.txt").read_bytes()
    (store.path("merge", second.key) / "result.txt").write_text("damaged")
    if deep:
        (store.path("train", first.key) / "result.txt").unlink()
    told: list[str] = []
    fresh = Store(tmp_path)
    workers = Told(fresh, {})
    carry_out([third], fresh, workers, Events(notice=told.append))
    assert workers.begun == (["third", "second", "first", "second", "third"] if deep else ["third", "second", "third"])
    assert (store.path("merge", second.key) / "result.txt").read_bytes() == good
    assert store.has("score", third.key) and all("set aside" in text for text in told) and len(told) == 1 + deep


def test_an_input_that_is_damaged_again_and_again_is_a_failure(tmp_path: Path) -> None:
    store, (first, second, *_) = Store(tmp_path), chain()
    make(store, first)
    workers = Told(store, {"second": [Damaged("train", first.key, "the disk is bad") for _ in range(5)]})
    with pytest.raises(RunFailed):
        carry_out([second], store, workers, Events())
    assert workers.begun.count("second") == runner.TRIES


def test_all_inputs_that_are_damaged_are_made_anew_however_many(tmp_path: Path) -> None:
    store = Store(tmp_path)
    inputs = {str(n): Step("score", {"n": n}, label=str(n)) for n in range(2 * runner.TRIES)}
    for step in inputs.values():
        make(store, step)
        (store.path("score", step.key) / "result.txt").write_text("damaged")
    top = Step("select", {"n": 0}, inputs, label="top")
    assert carry_out([top], store, Told(store, {}), Events()) == 1 + len(inputs)


def test_a_damage_that_another_run_is_looking_at_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, (first, second, *_) = Store(tmp_path), chain()
    make(store, first)
    (store.path("train", first.key) / "result.txt").write_text("damaged")
    busy = [Busy("another looks at it") for _ in range(2 * runner.TRIES)]
    really = Store.set_aside

    def set_aside(self: Store, kind: str, key: str) -> str | None:
        if busy:
            raise busy.pop()
        return really(self, kind, key)

    monkeypatch.setattr(Store, "set_aside", set_aside)
    assert carry_out([second], store, Told(store, {}), Events()) == 2


def test_what_waits_for_another_run_is_stopped_when_what_it_needs_has_failed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_PAUSE", 0.5)
    store = Store(tmp_path)
    first = Step("train", {"n": 1}, label="first")
    waits, finds = (Step("merge", {"n": n}, {"x": first}, label=name) for n, name in ((2, "waits"), (3, "finds")))
    after = Step("score", {"n": 4}, {"x": waits}, label="after")
    make(store, first)

    class Late(Told):
        """The damage comes when the first of those who read it has begun."""

        def _outcome(self, step: Step) -> LingraftError | None:
            if step.label == "waits":
                (store.path("train", first.key) / "result.txt").write_text("damaged")
                return Busy("another run is making it")
            return super()._outcome(step)

    workers = Late(store, {"first": [LingraftError("its data are gone")]})
    with pytest.raises(RunFailed, match="1 step failed and 3 that depend on them"):
        carry_out([waits, finds, after], store, workers, Events())
    assert "after" not in workers.begun


def results_of(*steps: Step) -> Plan:
    """A plan whose report reads some steps."""
    cells = tuple(Cell("eng-ft", "sw", 0, step, step, None) for step in steps)
    return Plan(Experiment.model_construct(), steps, cells, {}, {}, ())


def test_a_damaged_result_that_another_run_sets_aside_at_the_same_moment_is_not_taken_for_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, (first, *_) = Store(tmp_path), chain()
    make(store, first)
    (store.path("train", first.key) / "result.txt").write_text("damaged")
    looked: list[int] = []
    really = Store.set_aside

    def set_aside(self: Store, kind: str, key: str) -> str | None:
        looked.append(1)
        if len(looked) == 1:
            raise Busy("another looks at it")
        return really(self, kind, key)

    monkeypatch.setattr(Store, "set_aside", set_aside)
    runner._check_results(results_of(first), store, Events())
    assert not store.has("train", first.key)


def test_a_result_that_another_run_has_just_set_aside_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, (first, *_) = Store(tmp_path), chain()
    make(store, first)
    (store.path("train", first.key) / "result.txt").write_text("damaged")
    really = Store.folder

    def folder(self: Store, kind: str, key: str) -> Path:
        Store(tmp_path).set_aside(kind, key)
        return really(self, kind, key)

    monkeypatch.setattr(Store, "folder", folder)
    runner._check_results(results_of(first), store, Events())
    assert not store.has("train", first.key)


def test_a_damaged_record_is_no_measurement_and_no_obstacle_to_an_estimate(tmp_path: Path) -> None:
    store, (first, _, _, other) = Store(tmp_path), chain()
    for step in (first, other):
        with store.making(step.kind, step.key, step.identity()) as work:
            write_json(work / "extra.json", {"seconds": 2.0})
    experiment = Experiment.model_construct(backbone=BackboneConfig.model_validate({"model": "m"}))
    plan = Plan(experiment, (first, other), (), {}, {}, ())
    sizes = {first.key: 10, other.key: 30}
    assert _rates(plan, store, sizes) == {"train": 10.0}
    (store.path("train", first.key) / "step.json").write_text("{")
    assert _rates(plan, store, sizes) == {"train": 15.0}


def test_an_input_that_another_run_has_made_anew_meanwhile_is_read(tmp_path: Path) -> None:
    store, (first, second, *_) = Store(tmp_path), chain()
    make(store, first)
    told: list[str] = []
    workers = Told(store, {"second": [Damaged("train", first.key, "it was damaged")]})
    assert carry_out([second], store, workers, Events(notice=told.append)) == 1
    assert told == []


FATES = st.sampled_from(["busy", "made", "lost", "lost", "wrong"])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 20), max_size=3), min_size=1, max_size=8),
    st.dictionaries(st.integers(0, 7), st.lists(FATES, max_size=3)),
    st.integers(1, 3),
)
def test_whatever_happens_every_step_is_there_once_or_its_failure_is_said(
    tmp_path_factory: pytest.TempPathFactory, needs: list[list[int]], fates: dict[int, list[str]], places: int
) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    steps: list[Step] = []
    for number, wanted in enumerate(needs):
        inputs = {f"in{w % number}": steps[w % number] for w in wanted} if number else {}
        steps.append(Step(("train", "score")[number % 2], {"n": number}, inputs, label=str(number)))
    errors = {
        "busy": lambda: Busy("another"),
        "made": lambda: AlreadyMade("there"),
        "lost": lambda: TransientError("lost"),
        "wrong": lambda: LingraftError("wrong"),
    }
    script = {str(n): [errors[fate]() for fate in fate_list] for n, fate_list in fates.items()}
    failures: list[str] = []
    workers = Told(store, script, places)
    events = Events(failure=lambda step, error: failures.append(step.label))
    try:
        carry_out(steps, store, workers, events)
        assert not failures
    except RunFailed:
        assert failures
    for step in steps:
        lost = {s.label for s in _needed(step)} & set(failures)
        assert store.has(step.kind, step.key) == (not lost)
    assert not workers.running and workers.stopped


def _needed(step: Step) -> list[Step]:
    return [step, *(s for needed in step.inputs.values() for s in _needed(needed))]


def _kinds(kind: type[LingraftError]) -> list[type[LingraftError]]:
    return [kind, *(k for below in kind.__subclasses__() for k in _kinds(below))]


@pytest.mark.parametrize("kind", _kinds(LingraftError))
def test_an_error_comes_back_from_another_process_as_it_was(kind: type[LingraftError]) -> None:
    if kind is MissingExtra:
        error: LingraftError = MissingExtra("ray", "ray")
    elif kind is Damaged:
        error = Damaged("train", "abc", "changed", where="here")
    else:
        error = kind("wrong", where="here", remedy="mend it")
    error.exit_code = 7
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 - what was written here
    assert type(back) is kind and vars(back) == vars(error) and str(back) == str(error) and back.args == error.args
