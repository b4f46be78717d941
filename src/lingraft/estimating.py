"""About how long a run would take, from what its store has measured, and what it costs."""

from typing import Any

from lingraft.costs import cost, shape_for
from lingraft.errors import StoreError
from lingraft.locating import Located
from lingraft.plan import Plan, characters
from lingraft.store import Store

# Characters a second of Gemma 3 270M in bfloat16 on two CPU cores, until this store has measured its own.
_DEMO_RATES = {"train": 910.0, "predict": 3_200.0}


def estimates(plan: Plan, store: Store, located: Located, device: str = "H100") -> dict[str, Any]:
    """What a run would do and about how long it takes.

    Rates come from the finished steps of this store on the same base model; the demo model has measured defaults; else the
    time is None.

    Args:
        plan: The plan.
        store: The finished steps.
        located: The base model.
        device: The GPU to reckon hours for; see `costs`.

    Returns:
        `steps` by kind (pending, finished), `seconds` on this machine or None, and `cost`, what the pending steps would take on a
        GPU (see `costs.cost`), or None where the base model's shape is not known without fetching it.
    """
    todo = [step for step in plan.steps if not store.has(step.kind, step.key)]
    kinds: dict[str, dict[str, int]] = {}
    waiting = {step.key for step in todo}
    for step in plan.steps:
        counts = kinds.setdefault(step.kind, {"pending": 0, "finished": 0})
        counts["pending" if step.key in waiting else "finished"] += 1
    sizes = characters(plan.experiment, plan.steps)
    rates = _rates(plan, store, sizes)
    seconds: float | None = 0.0
    for step in todo:
        if step.kind not in ("train", "predict") or step.config.get("initial"):
            continue
        if step.key not in sizes or step.kind not in rates:
            seconds = None
            break
        seconds += sizes[step.key] / rates[step.kind]
    shape = shape_for(located)
    return {
        "steps": kinds,
        "seconds": seconds,
        "cost": None if shape is None else cost(plan, shape, todo, device=device),
    }


def _rates(plan: Plan, store: Store, sizes: dict[str, int]) -> dict[str, float]:
    """Characters a second, by kind."""
    rates = dict(_DEMO_RATES) if plan.experiment.backbone.model == "demo" else {}
    sums: dict[str, list[float]] = {}
    for step in plan.steps:
        if step.key in sizes and step.kind in ("train", "predict") and store.has(step.kind, step.key):
            try:
                record = store.record(step.kind, step.key)
            except StoreError:  # It is damaged, and made anew when it is needed.
                continue
            total = sums.setdefault(step.kind, [0.0, 0.0])
            total[0] += sizes[step.key]
            total[1] += (record.get("seconds") or 0) / record.get("environment", {}).get("together", 1)
    return rates | {kind: done / time for kind, (done, time) in sums.items() if time > 0}
