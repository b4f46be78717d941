"""`lingraft convert`: a sparse difference of the method's authors becomes an adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from lingraft.composable import FILE, read_difference, to_adapter
from lingraft.digests import digest_file


def convert_difference(
    path: Path, out: Path, model: str | None, task_type: str | None, as_json: bool
) -> dict[str, Any] | None:
    """`lingraft convert`."""
    difference = read_difference(path)
    file = path / FILE if path.is_dir() else path
    adapter = to_adapter(difference, model, task_type)
    adapter.save(out, {"converted": {"file": file.name, "format": "composable-sft", "sha256": digest_file(file)}})
    result = {
        "out": str(out),
        "entries": difference.entries,
        "parameters": {name: len(diff.indices) for name, diff in difference.diffs.items() if len(diff.indices)},
        "head": {name: list(value.shape) for name, value in difference.head.items()},
    }
    if as_json:
        return result
    count = sum(int(np.prod(diff.shape, dtype=object)) for diff in difference.diffs.values())
    said = f"{out}: {result['entries']:,} of {count:,} entries of {len(result['parameters'])} parameters change"
    click.echo("\n".join([said, *_head(difference.head)]), err=True)
    return None


def _head(head: Mapping[str, np.ndarray]) -> list[str]:
    """What is said of a head."""
    if not head:
        return []
    modules = sorted({name.partition(".")[0] for name in head})
    numbers = sum(value.size for value in head.values())
    return [f"head: {', '.join(modules)}, {numbers:,} numbers"]
