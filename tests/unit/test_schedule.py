"""Schedules: every step once, after all that it needs, whatever fails, is put back or is found damaged meanwhile."""

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from lingraft.plan import Step, ordered
from lingraft.schedule import Schedule


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Step, ...]:
    """Steps that need some of those before them."""
    steps: list[Step] = []
    for number in range(draw(st.integers(1, 14))):
        needed = draw(st.lists(st.sampled_from(steps), max_size=3, unique_by=lambda s: s.key)) if steps else []
        kind = draw(st.sampled_from(["train", "score"]))
        steps.append(Step(kind, {"n": number}, {f"in{i}": step for i, step in enumerate(needed)}, label=str(number)))
    return tuple(steps)


def closure(step: Step) -> set[str]:
    return {s.key for s in ordered([step])}


def test_a_step_is_ready_when_all_that_it_needs_is_finished() -> None:
    first, second = Step("train", {"n": 1}), Step("train", {"n": 2})
    both = Step("merge", {"n": 3}, {"x": first, "y": second})
    schedule = Schedule([first, second, both])
    assert [schedule.take(), schedule.take(), schedule.take()] == [first, second, None]
    schedule.finish(second)
    assert schedule.take() is None and not schedule.over
    schedule.finish(first)
    assert schedule.take() is both
    schedule.finish(both)
    assert schedule.over and schedule.finished == {first.key, second.key, both.key}


def test_what_is_not_in_the_schedule_counts_as_finished() -> None:
    first = Step("train", {"n": 1})
    second = Step("score", {"n": 2}, {"x": first})
    assert Schedule([second]).take() is second


def test_a_failure_stops_what_needs_it_and_nothing_else() -> None:
    first, other = Step("train", {"n": 1}), Step("train", {"n": 2})
    second = Step("merge", {"n": 3}, {"x": first})
    third = Step("score", {"n": 4}, {"x": second})
    schedule = Schedule([first, other, second, third])
    schedule.fail(schedule.take() or other)
    assert schedule.failed == {first.key} and schedule.stopped == {second.key, third.key}
    assert schedule.take() is other and schedule.take() is None
    schedule.finish(other)
    assert schedule.over


def test_a_damaged_input_is_made_before_whatever_needs_it_goes_on() -> None:
    deep = Step("train", {"n": 0})
    damaged = Step("train", {"n": 1}, {"x": deep})
    mine, other = Step("merge", {"n": 2}, {"x": damaged}), Step("merge", {"n": 3}, {"x": damaged})
    schedule = Schedule([mine, other])
    assert schedule.take() is mine
    schedule.add([deep, damaged])
    schedule.put_back(mine)
    assert schedule.take() is deep and schedule.take() is None, "the other one was ready, and is so no longer"
    schedule.finish(deep)
    assert schedule.take() is damaged and schedule.take() is None
    schedule.finish(damaged)
    assert [schedule.take(), schedule.take()] == [mine, other]


def test_what_is_put_back_after_what_it_needs_has_failed_is_stopped_with_what_needs_it() -> None:
    damaged = Step("train", {"n": 1})
    finds, waits = Step("merge", {"n": 2}, {"x": damaged}), Step("merge", {"n": 3}, {"x": damaged})
    after = Step("score", {"n": 4}, {"x": waits})
    schedule = Schedule([finds, waits, after])
    assert [schedule.take(), schedule.take()] == [finds, waits]
    schedule.add([damaged])
    schedule.put_back(finds)
    schedule.fail(schedule.take() or finds)
    assert schedule.stopped == {finds.key} and not schedule.over
    schedule.put_back(waits)
    assert schedule.stopped == {finds.key, waits.key, after.key} and schedule.over


def test_what_was_finished_is_made_again_when_it_is_found_damaged() -> None:
    first = Step("train", {"n": 1})
    second = Step("score", {"n": 2}, {"x": first})
    schedule = Schedule([first, second])
    schedule.finish(schedule.take() or second)
    assert schedule.take() is second
    schedule.add([first])
    schedule.put_back(second)
    assert schedule.take() is first and schedule.take() is None
    schedule.finish(first)
    schedule.finish(schedule.take() or first)
    assert schedule.over and schedule.total == 2


def test_sorts_are_taken_apart_and_the_earliest_is_named_first() -> None:
    steps = [Step(kind, {"n": n}) for n, kind in enumerate(["score", "train", "score", "train"])]
    schedule = Schedule(steps, sort=lambda step: step.kind)
    assert schedule.sorts == ["score", "train"]
    assert schedule.take("train") is steps[1]
    assert schedule.take("score") is steps[0]
    assert schedule.sorts == ["score", "train"]
    assert schedule.take("train") is steps[3] and schedule.sorts == ["score"]


def test_steps_of_one_shape_are_taken_together() -> None:
    steps = [Step("train", {"n": n, "shape": n % 2}) for n in range(6)]
    last = Step("train", {"n": 9, "shape": 0}, {"x": steps[1]})
    schedule = Schedule([*steps, last])
    first = schedule.take()
    assert first is steps[0]
    assert schedule.take_like(first, lambda step: step.config["shape"], 5) == [steps[2], steps[4]]
    assert schedule.take() is steps[1]


@settings(max_examples=200, deadline=None)
@given(graphs(), st.randoms(use_true_random=False), st.booleans())
def test_every_step_ends_once_and_after_all_that_it_needs(
    steps: tuple[Step, ...], rng: random.Random, several: bool
) -> None:
    schedule = Schedule(steps, sort=(lambda step: step.kind) if several else (lambda step: None))
    ended: list[str] = []
    patience = 20
    while not schedule.over:
        sorts = schedule.sorts
        assert sorts or schedule.running, "something can always go on"
        if sorts and (rng.random() < 0.6 or not schedule.running):
            step = schedule.take(rng.choice(sorts))
            assert step is not None
            assert {needed.key for needed in step.inputs.values()} <= schedule.finished
            continue
        step = rng.choice(list(schedule.running.values()))
        fate = rng.random()
        if fate < 0.6:
            schedule.finish(step)
            ended.append(step.key)
        elif fate < 0.7:
            schedule.fail(step)
        elif patience and fate < 0.8 and step.inputs:  # What it reads is damaged.
            patience -= 1
            broken = rng.choice(list(step.inputs.values()))
            schedule.add([broken])
            schedule.put_back(step)
            ended = [key for key in ended if key != broken.key]
        elif patience:
            patience -= 1
            schedule.put_back(step)
    assert len(ended) == len(set(ended)) and set(ended) == schedule.finished
    assert schedule.finished | schedule.failed | schedule.stopped == {step.key for step in steps}
    assert _reached(steps, schedule.failed) >= schedule.stopped


def _reached(steps: Sequence[Step], failed: set[str]) -> set[str]:
    """All that needs something that failed."""
    return {step.key for step in steps if closure(step) & failed}
