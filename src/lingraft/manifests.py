"""What a finished run writes for its report: where every number is, relative to the store."""

import os
from pathlib import Path
from typing import Any

from lingraft.answers.scoring import MAIN
from lingraft.config import Experiment
from lingraft.digests import digest_value
from lingraft.execution import SELECTED, SIMILARITY
from lingraft.locating import Located
from lingraft.plan import Plan, Step
from lingraft.store import Store, write_json
from lingraft.tasks.table import find_task

MANIFEST = "manifest.json"


def write_manifest(plan: Plan, located: Located, store: Store, out: Path) -> None:
    """Writes what a report needs to find: the folder of every number, relative to the store."""

    def place(step: Step) -> str:
        return f"{step.kind}/{step.key}"

    manifest: dict[str, Any] = {
        "format": 2,
        "experiment": plan.experiment.model_dump(mode="json"),
        "metric": main_metric(plan.experiment),
        "backbone": {"name": located.name, "digest": located.digest},
        "store": store.url or os.path.relpath(store.root, out.absolute()),
        "steps": [place(step) for step in plan.steps],
        "cells": [
            {
                "method": cell.method,
                "language": cell.language,
                "seed": cell.seed,
                "predict": place(cell.predict),
                "score": place(cell.score),
                "adapter": place(cell.adapter) if cell.adapter else None,
            }
            for cell in plan.cells
        ],
        "selections": [
            {"method": name, "language": language, "path": f"{place(step)}/{SELECTED}"}
            for (name, language), step in plan.selections.items()
        ],
        "comparisons": [
            {"language": language, "seed": seed, "path": f"{place(step)}/{SIMILARITY}"}
            for (language, seed), step in plan.comparisons.items()
        ],
        "absent": [list(entry) for entry in plan.absent],
        "plan": digest_value([step.key for step in plan.steps], 24),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MANIFEST, manifest)


def main_metric(experiment: Experiment) -> str:
    """What the experiment's task is measured by."""
    rule = find_task(experiment.task, experiment.tasks).rule(experiment.prompt)
    return MAIN[rule["kind"]]
