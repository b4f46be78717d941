"""A thousand damaged adapters: each is refused with one clear message, or does no harm; never a traceback, a hang, or half a folder."""

import contextlib
import json
import os
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from lingraft import Adapter, Divergence
from lingraft.cli import main
from lingraft.commands.adapters import inspect_folders, merge_adapters, save_divergence
from lingraft.errors import LingraftError
from lingraft.families import FAMILIES
from lingraft.layouts.common import check_folder
from lingraft.tensors import finite
from tests.unit.adapters import snapshot
from tests.unit.damage import CONFIG, FLOATS, SIDECAR, WEIGHTS, damage, pick, write_any

STRUCTURES = sorted(FAMILIES)
CASES = 1000
SECONDS = int(os.environ.get("FUZZ_SECONDS", "10"))
"""How long one case may take."""
MEMORY = 1 << 30
"""How much one case may take: the adapters have a few kilobytes."""
NAMES = ("task", "target", "source")
GRAFTS = ("transfer", "cross", "arimerge", "arimerge-add")
COMBINATIONS = ("linear", "cat", "ties", "dare", "knots")
NO_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("task", "target_ref", "source_ref", "divergence_dir", "weight", "method", "space", "out_rank")),
    **dict.fromkeys(("floor", "bound", "rcond")),
    **{"rules": (), "modules": "all", "density": 0.5, "drop": 0.5, "seed": 0},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters as they should be: three of every structure and type, with a sidecar and without, and their divergences."""
    root = tmp_path_factory.mktemp("whole")
    for structure in STRUCTURES:
        for kind, dtype in FLOATS.items():
            for sidecar in (False, True):
                place = root / structure / f"{kind}-{sidecar:d}"
                for seed, name in enumerate(NAMES):
                    write_any(place / name, structure, seed, dtype, sidecar)
                save_divergence(place / "target", place / "source", place / "divergence", True)
                (place / ".divergence.lock").unlink()
    return root


@pytest.fixture(autouse=True)
def bounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No more memory than the adapters warrant; and files need not outlast a power cut."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


class TooSlow(BaseException):
    """Not an Exception: nothing may catch it."""


@contextlib.contextmanager
def in_time(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow(f"more than {seconds} s")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# What is done with the adapters of a folder


def _merge(here: Path, adapters: list[str], **options: Any) -> Any:
    return merge_adapters(adapters, False, here / "out", True, **{**NO_OPTIONS, **options})


def graft(random: np.random.Generator, here: Path, structure: str) -> Any:
    method = pick(random, GRAFTS)
    space = pick(random, (None, *FAMILIES[structure])) if method == "transfer" else None
    folders = {"task": here / "task", "target_ref": here / "target", "source_ref": here / "source"}
    rank = 1 if space == "product" and random.random() < 0.5 else None
    return _merge(here, [], **folders, weight=0.7, method=method, space=space, out_rank=rank)


def graft_saved(random: np.random.Generator, here: Path, structure: str) -> Any:
    space = pick(random, (None, *FAMILIES[structure]))
    return _merge(here, [], task=here / "task", divergence_dir=here / "divergence", weight=0.7, space=space)


def combine(random: np.random.Generator, here: Path, structure: str) -> Any:
    method = pick(random, COMBINATIONS)
    weight = 1 if method == "cat" else 0.3
    return _merge(here, [f"{here / name}={weight}" for name in NAMES], method=method)


def diverge(random: np.random.Generator, here: Path, structure: str) -> Any:
    return save_divergence(here / "target", here / "source", here / "out", True)


def look(random: np.random.Generator, here: Path, structure: str) -> Any:
    return inspect_folders([here / pick(random, (*NAMES, "divergence"))], True)


def look_at_two(random: np.random.Generator, here: Path, structure: str) -> Any:
    return inspect_folders([here / name for name in random.permutation([*NAMES, "divergence"])[:2]], True)


def show(random: np.random.Generator, here: Path, structure: str) -> Any:
    with contextlib.redirect_stdout(None):
        return inspect_folders([here / pick(random, NAMES)], False)


OPERATIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "graft": (graft, NAMES),
    "graft_saved": (graft_saved, ("task", "divergence")),
    "combine": (combine, NAMES),
    "diverge": (diverge, ("target", "source")),
    "look": (look, (*NAMES, "divergence")),
    "look_at_two": (look_at_two, (*NAMES, "divergence")),
    "show": (show, NAMES),
}
"""By name, what is done, and which of the adapters it may read."""


def prepared(whole: Path, here: Path, random: np.random.Generator, structure: str, readable: tuple[str, ...]) -> str:
    """Copies whole adapters to `here`, and damages one that is read."""
    source = whole / structure / f"{pick(random, FLOATS)}-{random.integers(2)}"
    shutil.copytree(source, here)
    name = pick(random, readable)
    victim = here / name
    if not (victim / WEIGHTS).exists() and random.random() < 0.7:  # a divergence in two parts
        victim = victim / pick(random, ("target_ref", "source_ref"))
    if not (victim / WEIGHTS).exists():
        shutil.rmtree(victim / "target_ref" if random.random() < 0.5 else victim)
        return f"{name}: a part is missing"
    return f"{victim.relative_to(here)}: {damage(random, victim, structure)}"


def _complete(folder: Path) -> None:
    """Makes sure that a folder that was made is one: it can be opened, and every number of it is finite."""
    assert (folder / "step.json").is_file()
    parts = [folder] if (folder / WEIGHTS).exists() else [folder / "target_ref", folder / "source_ref"]
    for part in parts:
        check_folder(part)
        assert not list(part.glob(".*"))
        for name in (CONFIG, SIDECAR):
            json.loads((part / name).read_text(), parse_constant=lambda text: pytest.fail(f"{text} in {name}"))
    kind = json.loads((folder / SIDECAR).read_text())["kind"]
    made = Divergence.load(folder) if kind == "divergence" else Adapter.load(folder)
    for adapter in [made.target_ref, made.source_ref] if isinstance(made, Divergence) else [made]:
        tensors = [tensor for module in adapter.modules for tensor in adapter.site(module).tensors.values()]
        assert all(finite(tensor) for tensor in [*tensors, *(read() for read in adapter.others.values())])


def _clear(error: LingraftError) -> None:
    """Makes sure that an error says what, and where or what to do."""
    assert error.exit_code in (1, 2)
    assert error.what and (error.where or error.remedy), "neither where nor what to do"
    text = str(error)
    assert len(text) < 3000, f"{len(text)} characters"
    assert all(c == "\n" or c.isprintable() for c in text), f"not printable: {text!r}"


def outcome(whole: Path, here: Path, seed: int, operation: str) -> tuple[str, str | None]:
    """What a case is, and what is wrong with what came of it."""
    random = np.random.default_rng([seed, list(OPERATIONS).index(operation)])
    structure = STRUCTURES[seed % len(STRUCTURES)]
    act, readable = OPERATIONS[operation]
    said = f"case {seed}: {operation} of {structure}, "
    try:
        said += prepared(whole, here, random, structure, readable)
        before = snapshot(here)
        try:
            with in_time(SECONDS), warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                result = act(random, here, structure)
        except LingraftError as error:
            _clear(error)
            assert snapshot(here) == before, "something was left behind"
            assert {p.name for p in here.iterdir() if p.name.startswith(".")} <= {".out.lock", ".out.partial"}
            return said, None
        if operation != "show":
            json.dumps(result, allow_nan=False, default=str)
        if (here / "out").exists():
            _complete(here / "out")
            shutil.rmtree(here / "out")
        assert snapshot(here) == before, "an input was changed"
        return said, None
    except (Exception, TooSlow):
        return said, traceback.format_exc(limit=-6)
    finally:
        shutil.rmtree(here, ignore_errors=True)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_damaged_adapters_are_refused_or_harmless(whole: Path, tmp_path: Path, operation: str) -> None:
    chosen = list(OPERATIONS).index(operation)
    wrong = []
    every = bool(os.environ.get("FUZZ_ALL"))
    for seed in range(CASES):
        if every or seed // len(STRUCTURES) % len(OPERATIONS) == chosen:
            case, problem = outcome(whole, tmp_path / "case", seed, operation)
            if problem:
                wrong.append(f"{case}\n{problem}")
    assert not wrong, f"{len(wrong)} cases\n\n" + "\n".join(wrong)
