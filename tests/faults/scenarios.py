"""Disturbances, each a function of a laboratory that raises AssertionError where a run does not survive, and says what it did."""

import random
import shutil
import signal
import time
from collections.abc import Sequence
from typing import Any

from tests.faults.laboratory import Laboratory, finished, tail, watched


def random_kills(lab: Laboratory, count: int, seed: int = 0) -> dict[str, Any]:
    """SIGKILL at so many random moments; the same store goes on until it is finished, then another one is begun."""
    rng = random.Random(seed)
    killed = at_work = stores = 0
    while killed < count:
        store = lab.path("killed")
        stores += 1
        with watched(lab, store):
            while killed < count and (left := 1 - len(finished(store)) / len(lab.baseline)):
                child = lab.start(store)
                # Uniform over what the rest takes, its beginning included.
                child.process.join(rng.uniform(0.0, 0.15 + lab.seconds * left))
                if not child.alive:
                    assert child.wait() == 0, tail(child.spec.log)
                    break
                child.kill()
                killed += 1
                at_work += "[1/" in child.said()
            lab.finish(store)
        lab.check(store)
        shutil.rmtree(store)
    return {"kills": killed, "while_steps_were_made": at_work, "stores": stores}


def crash_points(
    lab: Laboratory, step: str, *, powerless: bool = False, every: int = 1, most: int | None = None
) -> dict[str, Any]:
    """A process that makes one step dies before each of its operations on the store in turn; the same command finishes.

    Args:
        lab: The laboratory.
        step: The step, as "kind/key"; all others are finished.
        powerless: What was not synced is lost by half.
        every: Of so many operations one is taken.
        most: At most so many operations are taken.
    """
    store = lab.copy("counted", without=[step])
    counted = lab.path("count")
    lab.finish(store, within=store, counted=counted)
    total = int(counted.read_text())
    assert total > 5, "operations on the store are not counted"
    shutil.rmtree(store)
    points = range(1, total + 1, every)
    if most is not None and len(points) > most:
        points = [points[n * len(points) // most] for n in range(most)]
    for point in points:
        store = lab.copy("crashed", without=[step])
        child = lab.start(store, within=store, die_at=point, powerless=powerless)
        code = child.wait()
        where = f"{step}, died before operation {point} of {total}"
        assert code == -signal.SIGKILL, f"{where}: exit code {code}\n{tail(child.spec.log)}"
        try:
            lab.check_visible(store)
            lab.finish(store)
            lab.check(store)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error
        shutil.rmtree(store)
    return {"step": lab.baseline[step]["label"], "operations": total, "deaths": len(points)}


def crash_chain(lab: Laboratory, stride: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Every process dies after some operations on the store, and the next goes on, until one gets to the end."""
    rng = random.Random(seed)
    store, deaths = lab.path("chain"), 0
    began = time.monotonic()
    with watched(lab, store):
        while True:
            child = lab.start(store, within=store, die_at=rng.randint(*stride))
            code = child.wait()
            if code == 0:
                break
            assert code == -signal.SIGKILL, tail(child.spec.log)
            deaths += 1
            assert time.monotonic() - began < 600, "no end in sight: nothing is kept of what was done before a death"
    lab.check(store)
    shutil.rmtree(store)
    return {"deaths": deaths}
