"""Processes that die at once: at random moments, and before every single operation on the store."""

import pytest

from tests.faults.laboratory import Laboratory
from tests.faults.scenarios import crash_chain, crash_points, random_kills

KINDS = {
    "train": "train kind en",
    "predict": "predict adamergex λ=1",
    "score": "score adamergex λ=1",
    "select": "select λ of adamergex",
    "merge": "merge adamergex sw",
    "compare": "compare references sw",
}


def test_a_few_kills(lab: Laboratory) -> None:
    assert random_kills(lab, 3, seed=1)["kills"] == 3


@pytest.mark.full
def test_fifty_kills_at_random_moments(lab: Laboratory) -> None:
    done = random_kills(lab, 50)
    assert done["kills"] == 50 and done["while_steps_were_made"] >= 25


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_a_death_before_every_operation_on_the_store(lab: Laboratory, kind: str) -> None:
    (step, *_) = lab.steps(kind, KINDS[kind])
    assert crash_points(lab, step)["deaths"] >= 5


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_not_synced_is_lost_when_the_power_fails(lab: Laboratory, kind: str) -> None:
    (step, *_) = lab.steps(kind, KINDS[kind])
    assert crash_points(lab, step, powerless=True, most=20)["deaths"] >= 5


@pytest.mark.full
def test_a_run_that_dies_again_and_again_gets_to_its_end(lab: Laboratory) -> None:
    assert crash_chain(lab, (20, 200))["deaths"] >= 5
