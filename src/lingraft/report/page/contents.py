"""What a page shows, collected from a run's files: plain values, before anything of them is drawn."""

from pathlib import Path
from typing import Any

from lingraft.report.divergences import divergences
from lingraft.report.examples import examples
from lingraft.report.headline import headline, marks
from lingraft.report.provenance import provenance
from lingraft.report.results import results
from lingraft.report.spending import spending
from lingraft.report.tables import Table
from lingraft.report.trainings import trainings


def contents(run: Path, published: Table | None = None, found: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything that a run's page shows.

    Args:
        run: The run's folder, which holds `manifest.json`.
        published: A paper's figures beside the run's, where they are asked for.
        found: The run's results, where they are known.

    Raises:
        UserError: This is not a run, or it is not finished.
        StoreError: A file of the store is missing or damaged.
    """
    found = results(run, keep=True) if found is None else found
    return {
        "found": found,
        "headline": headline(found),
        "marks": marks(found),
        "examples": examples(run, found),
        "trainings": trainings(run, found),
        "spending": spending(run, found),
        "provenance": provenance(run, found),
        "divergences": divergences(run, found),
        "published": [published[0], published[1]] if published else None,
    }
