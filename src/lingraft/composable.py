"""Sparse differences in the files of the method's authors (composable-sft, `pytorch_diff.bin`), read without trusting them.

`torch.load(weights_only=True)` refuses these files for the numpy numbers in their pickles, and anything more lenient would execute
what they say; `unpickling` reads them without.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lingraft.adapter import Adapter
from lingraft.algebra import Site
from lingraft.errors import AdapterError
from lingraft.layouts.common import PREFIX, Place, shown
from lingraft.tensors import DTYPES, finite
from lingraft.unpickling import DAMAGE, LARGEST, Sparse, array, counted, numbers, read_values, refused

FILE = "pytorch_diff.bin"

_MOST_DENSE = 1 << 28
"""How many numbers a head may have that the file holds sparsely: more than any output layer, 1 GiB."""


@dataclass(frozen=True)
class Diff:
    """How one parameter differs from the base model's.

    Attributes:
        indices: The entries that differ, ascending positions in the parameter flattened row by row (int64).
        values: By how much (float32).
        shape: The parameter's.
    """

    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """The contents of a file.

    Attributes:
        diffs: By name of a parameter, those that differ in no entry included.
        head: Parameters that the file gives whole, in its types.
    """

    diffs: dict[str, Diff]
    head: dict[str, np.ndarray]

    @property
    def entries(self) -> int:
        """How many numbers of the base model change."""
        return sum(len(diff.indices) for diff in self.diffs.values())


def read_difference(path: Path) -> Difference:
    """Reads a `pytorch_diff.bin`, of any of the forms that it has had.

    Args:
        path: The file, or the folder it is in.

    Raises:
        AdapterError: It is missing, damaged, of torch's format before zip, names something that is no part of a sparse
            difference, or holds no difference.
    """
    file = path / FILE if path.is_dir() else path
    found = read_values(file)
    if not isinstance(found, dict):
        raise refused("it holds no table of parameters", file)
    return _difference(found, file)


# What the tables hold


def _difference(found: Mapping[str, Any], file: Path) -> Difference:
    """From the file's tables to ours."""
    sparse, dense = _tables(found, file)
    if both := sorted(set(sparse) & set(dense)):
        raise refused(f"'{both[0]}' is there both as a difference and whole", file)
    for name in (*sparse, *dense):
        if len(name) > 500 or not name.isprintable() or "" in name.split(".") or set(name) & set("/\\"):
            raise refused(f"{name[:80]!r} is no name of a parameter", file)
    diffs, head, name = {}, {}, ""
    try:
        # One tensor may be named often, and what is small in the file must stay so.
        numbers = sum(_length(entry) for table in (sparse, dense) for entry in table.values())
        if numbers > file.stat().st_size:
            raise ValueError("it holds more numbers than bytes")
        room = _MOST_DENSE
        for name, entry in sorted(sparse.items()):
            diffs[name] = _diff(entry)
        for name, entry in sorted(dense.items()):
            if not isinstance(whole := array(entry), np.ndarray):
                diff = _diff(entry)
                room -= math.prod(diff.shape)
                if room < 0:
                    raise ValueError("it is too large to be held whole")
                whole = np.zeros(math.prod(diff.shape), np.float32)
                whole[diff.indices] = diff.values
                whole = whole.reshape(diff.shape)
            elif whole.dtype not in DTYPES.values():
                raise ValueError(f"it holds {whole.dtype}")
            if not finite(whole):
                raise ValueError("a value is NaN or infinite")
            head[name] = np.asarray(whole, order="C")
    except DAMAGE as error:
        raise refused(f"{name}: {error}" if name else str(error), file) from None
    return Difference(diffs, head)


def _tables(found: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The table of differences and that of what is whole: `diffs` and `abs`, before that `body` and `head`, first neither."""
    names = next((pair for pair in (("diffs", "abs"), ("body", "head")) if set(pair) & set(found)), None)
    if names is None:
        if not found or any(isinstance(array(entry), np.ndarray) for entry in found.values()):
            raise refused("it holds no differences", file, f"give the {FILE} of a sparse fine-tuning")
        return dict(found), {}
    for name in found:
        # The authors' block-sparse layers have weights of their own.
        if name not in names and not (name == "block_sparses" and _is_empty(found[name])):
            raise refused(f"'{shown(name)}' is more than a sparse difference", file)
    tables = [{} if (table := found.get(name)) is None else table for name in names]
    if not all(isinstance(table, dict) for table in tables):
        raise refused(f"{' and '.join(names)} are no tables of parameters", file)
    return tables[0], tables[1]


def _is_empty(table: Any) -> bool:
    return isinstance(table, dict) and not table


def _length(entry: Any) -> int:
    """How many numbers an entry of a table brings; of one that is none, whoever reads it complains."""
    values = array(entry.get("values") if isinstance(entry, dict) else entry)
    if isinstance(values, Sparse):
        return values.values.size
    return values.size if isinstance(values, np.ndarray) else len(values) if isinstance(values, list) else 0


def _diff(entry: Any) -> Diff:
    """One parameter: encoded by steps or by coordinates, a sparse tensor of torch's, or a dense one.

    Steps are from one entry to the next in the order of columns: `Σ_k i_k · Π_{j<k} size_j`.
    """
    entry = array(entry)
    if isinstance(entry, np.ndarray):
        flat = np.flatnonzero(entry)
        return _sorted(flat, numbers(entry.reshape(-1)[flat], float), entry.shape)
    if isinstance(entry, Sparse):
        return _of_coordinates(entry.indices, entry.values, entry.size)
    if not isinstance(entry, dict) or set(entry) not in (
        {"size", "index_steps", "values"},
        {"size", "indices", "values"},
    ):
        raise ValueError("this is no sparse difference")
    shape, values = counted(entry["size"]), numbers(entry["values"], float)
    if "indices" in entry:
        rows = entry["indices"]
        if not isinstance(rows, list) or len(rows) != len(shape):
            raise ValueError("the coordinates do not fit the size")
        return _of_coordinates([numbers(row, int, len(values)) for row in rows], values, shape)
    steps = numbers(entry["index_steps"], int, len(values))
    if len(steps) and (steps[0] < 0 or (steps[1:] < 1).any() or steps.max() > LARGEST):
        raise ValueError("the indices are not ascending")
    rest = np.cumsum(steps, dtype=np.int64)
    # A sum beyond int64 shows: with steps as small as these it comes to be negative first.
    if len(rest) and (rest.min() < 0 or rest.max() >= math.prod(shape)):
        raise ValueError("an index is beyond the size")
    flat = np.zeros(len(rest), np.int64)
    for size in shape:
        rest, place = np.divmod(rest, max(size, 1))
        flat = flat * size + place
    return _sorted(flat, values, shape)


def _of_coordinates(rows: Iterable[np.ndarray], values: np.ndarray, shape: tuple[int, ...]) -> Diff:
    """A parameter whose entries are named by an index for every axis."""
    flat = np.zeros(len(values), np.int64)
    for row, size in zip(rows, shape, strict=True):
        if row.shape != values.shape:
            raise ValueError(f"{len(row)} coordinates for {len(values)} values")
        if len(row) and not (row.min() >= 0 and row.max() < size):
            raise ValueError("a coordinate is beyond the size")
        flat = flat * size + row
    return _sorted(flat, values, shape)


def _sorted(flat: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> Diff:
    """Ascending; values of one and the same entry add, as torch adds them."""
    with np.errstate(over="ignore"):  # What is infinite in float32 is refused.
        values = values.astype(np.float32)
    if not (flat[1:] > flat[:-1]).all():
        order = np.argsort(flat, kind="stable")
        flat, values = flat[order], values[order]
        first = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
        if len(first) < len(flat):
            with np.errstate(over="ignore"):
                flat, values = flat[first], np.add.reduceat(values, first)
    if not finite(values):
        raise ValueError("a value is NaN or infinite in float32")
    return Diff(flat, values, shape)


# As an adapter


def to_adapter(difference: Difference, model: str | None = None, task_type: str | None = None) -> Adapter:
    """A difference as an adapter of structure `sparse`; parameters that differ in no entry are left out.

    What the file gives whole, a head, is kept under its module's name, in its own type.

    Args:
        difference: The contents of a file.
        model: The base model's name, for PEFT.
        task_type: PEFT's name of the task.

    Raises:
        AdapterError: A parameter is neither weight nor bias of a module, a head is part of a module that differs sparsely,
            or nothing differs.
    """
    diffs = {name: diff for name, diff in difference.diffs.items() if len(diff.indices)}
    if not diffs:
        raise AdapterError("no parameter differs in any entry", remedy="give the difference of a training")
    names = [*diffs, *difference.head]
    if strange := [name for name in names if not name.endswith((".weight", ".bias"))]:
        raise AdapterError(
            f"parameters that are no module's weight or bias: {', '.join(sorted(strange))}",
            remedy="give a difference of weights and biases alone: others cannot be put on a model",
        )
    if scalars := [name for name, diff in diffs.items() if not diff.shape]:
        raise AdapterError(
            f"parameters without a shape: {', '.join(sorted(scalars))}",
            remedy="leave these parameters out of the difference",
        )
    sites = {_site(name): diff for name, diff in sorted(diffs.items())}
    if len(sites) < len(diffs):
        raise AdapterError(
            "two parameters stand for one place: a module is named 'bias'",
            remedy="rename the module in the model that the difference is of",
        )
    modules = sorted({name.rpartition(".")[0] for name in diffs})
    tops, saved = ({name.partition(".")[0] for name in table} for table in (diffs, difference.head))
    if shared := sorted(tops & saved):
        raise AdapterError(
            f"'{shared[0]}' has parameters that are given whole beside others that differ sparsely",
            remedy="train it with its layer norms frozen (the authors' --freeze_layer_norm)",
        )
    config = {
        "peft_type": "SPARSE",
        "task_type": task_type,
        "base_model_name_or_path": model,
        "inference_mode": True,
        "target_modules": modules,
        "entries": {site: len(diff.indices) for site, diff in sites.items()},
        "modules_to_save": sorted(saved) or None,
    }

    def read(site: str) -> Site:
        diff = sites[site]
        shape = np.array(diff.shape, np.int64)
        return Site({"indices": diff.indices, "values": diff.values, "shape": shape})

    layout = {
        site: Place({"indices": diff.indices.shape, "values": diff.values.shape, "shape": (len(diff.shape),)})
        for site, diff in sites.items()
    }
    sidecar = {"format": 1, "kind": "adapter", "family": "sparse"}
    others = {PREFIX + name: _giving(value) for name, value in difference.head.items()}
    return Adapter("sparse", config, layout, np.dtype(np.float32), sidecar, read, others)


def _site(parameter: str) -> str:
    """The site of a parameter: its module's path for a weight, its own for a bias."""
    return parameter.removesuffix(".weight")


def _giving(value: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: value
