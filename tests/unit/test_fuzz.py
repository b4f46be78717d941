"""A thousand damaged adapters: each is refused with one clear message, or does no harm. No traceback, hang, or half a folder."""

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
from tests.unit.damage import (
    CONFIG,
    FLOATS,
    SIDECAR,
    SITES,
    WEIGHTS,
    damage,
    entries_of,
    pick,
    put,
    put_entries,
    set_texts,
    write_any,
)

STRUCTURES = sorted(FAMILIES)
CASES = 1000
SECONDS = 10
"""How long one case may take."""
MEMORY = 1 << 30
"""How much one case may take: the adapters have a few kilobytes."""
NAMES = ("task", "target", "source")
GRAFTS = ("transfer", "cross", "arimerge", "arimerge-add")
COMBINATIONS = ("linear", "cat", "ties", "dare", "knots")
NO_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("task", "target_ref", "source_ref", "divergence_dir", "weight", "method", "space", "out_rank")),
    **dict.fromkeys(("floor", "bound", "rcond", "density", "drop", "seed")),
    **{"rules": (), "modules": "all"},
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
                (place / ".divergence.lock").unlink(missing_ok=True)
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
    return merge_adapters(adapters, True, here / "out", True, **{**NO_OPTIONS, **options})


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
    return inspect_folders([here / "task"], True)


def look_at_divergence(random: np.random.Generator, here: Path, structure: str) -> Any:
    return inspect_folders([here / "divergence"], True)


def look_at_two(random: np.random.Generator, here: Path, structure: str) -> Any:
    return inspect_folders([here / name for name in random.permutation(["task", "divergence"])], True)


def show(random: np.random.Generator, here: Path, structure: str) -> Any:
    with contextlib.redirect_stdout(None):
        return inspect_folders([here / "task"], False)


OPERATIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "graft": (graft, NAMES),
    "graft_saved": (graft_saved, ("task", "divergence")),
    "combine": (combine, NAMES),
    "diverge": (diverge, ("target", "source")),
    "look": (look, ("task",)),
    "look_at_divergence": (look_at_divergence, ("divergence",)),
    "look_at_two": (look_at_two, ("task", "divergence")),
    "show": (show, ("task",)),
}
"""By name, what is done, and which of the adapters it reads."""


def prepared(whole: Path, here: Path, random: np.random.Generator, structure: str, readable: tuple[str, ...]) -> str:
    """Copies whole adapters to `here`, and damages one that is read, or two, or one twice."""
    source = whole / structure / f"{pick(random, FLOATS)}-{random.integers(2)}"
    for name in readable:
        shutil.copytree(source / name, here / name)
    said = []
    for _ in range(1 if random.random() < 0.8 else 2):
        victim = here / pick(random, readable)
        if not (victim / WEIGHTS).exists() and random.random() < 0.8:  # a divergence in two parts
            victim = victim / pick(random, ("target_ref", "source_ref"))
        if (victim / WEIGHTS).is_file() and (victim / CONFIG).is_file():
            # What is damaged already may not be something to damage again.
            with contextlib.suppress(Exception) if said else contextlib.nullcontext():
                said.append(f"{victim.relative_to(here)}: {damage(random, victim, structure)}")
        else:
            shutil.rmtree(victim, ignore_errors=True)
            said.append(f"{victim.relative_to(here)}: missing")
    return "; ".join(said)


def _complete(folder: Path) -> None:
    """Makes sure that a folder that was made is one: it can be opened, and every number of it is finite."""
    assert (folder / "step.json").is_file()
    parts = [folder] if (folder / WEIGHTS).exists() else [folder / "target_ref", folder / "source_ref"]
    for part in parts:
        check_folder(part)
        assert not list(part.glob(".*"))
        for name in (CONFIG, SIDECAR):
            json.dumps(json.loads((part / name).read_text()), allow_nan=False)
    kind = json.loads((folder / SIDECAR).read_text()).get("kind")
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


def outcome(whole: Path, here: Path, seed: int, operation: str) -> tuple[str, bool, str | None]:
    """What a case is, whether it was refused, and what is wrong with what came of it."""
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
            return said, True, None
        if operation != "show":
            json.dumps(result, allow_nan=False, default=str)
        if (here / "out").exists():
            _complete(here / "out")
            shutil.rmtree(here / "out")
        assert snapshot(here) == before, "an input was changed"
        return said, False, None
    except (Exception, TooSlow):  # noqa: BLE001 - whatever it is, it is told with the case
        return said, False, traceback.format_exc(limit=-6)
    finally:
        shutil.rmtree(here, ignore_errors=True)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_damaged_adapters_are_refused_or_harmless(whole: Path, tmp_path: Path, operation: str) -> None:
    number = list(OPERATIONS).index(operation)
    seeds = [seed for seed in range(CASES) if seed // len(STRUCTURES) % len(OPERATIONS) == number]
    found = [outcome(whole, tmp_path / "case", seed, operation) for seed in seeds]
    wrong = [f"{case}\n{problem}" for case, _, problem in found if problem]
    assert not wrong, f"{len(wrong)} of {len(seeds)} cases\n\n" + "\n".join(wrong)
    refused = sum(refused for _, refused, _ in found)
    assert 0.5 * len(seeds) < refused < 0.95 * len(seeds), "most damage is found, and some does no harm"


@pytest.mark.parametrize("structure", STRUCTURES)
def test_whole_adapters_pass(whole: Path, tmp_path: Path, structure: str) -> None:
    for place in (whole / structure).iterdir():
        here = tmp_path / place.name
        shutil.copytree(place, here)
        for name, (act, _) in OPERATIONS.items():
            if name not in ("graft", "combine"):  # Not every method is for every structure.
                act(np.random.default_rng(0), here, structure)
                shutil.rmtree(here / "out", ignore_errors=True)
        _graft(here)
        _complete(here / "out")


def _graft(here: Path) -> Any:
    folders = {"task": here / "task", "target_ref": here / "target", "source_ref": here / "source"}
    return _merge(here, [], **folders, weight=0.7)


# What stands in the way of the output


def _file(path: Path) -> None:
    path.write_text("mine")


def _full_folder(path: Path) -> None:
    path.mkdir()
    _file(path / "precious.txt")


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


OBSTACLES = {"a file": _file, "a folder": _full_folder, "an empty folder": Path.mkdir, "a dangling link": _dangling}


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("operation", [_graft, lambda here: diverge(np.random.default_rng(0), here, "ia3")])
def test_an_output_that_exists_in_any_form_is_left_alone(
    whole: Path, tmp_path: Path, obstacle: str, operation: Callable[[Path], Any]
) -> None:
    here = tmp_path / "here"
    shutil.copytree(whole / "ia3" / "F32-1", here)
    OBSTACLES[obstacle](here / "out")
    before = snapshot(here)
    with pytest.raises(LingraftError) as caught:
        operation(here)
    _clear(caught.value)
    assert str(here / "out") in str(caught.value)
    assert snapshot(here) == before


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_an_interrupted_merge_left_is_no_obstacle(whole: Path, tmp_path: Path, obstacle: str) -> None:
    here = tmp_path / "here"
    shutil.copytree(whole / "ia3" / "F32-1", here)
    OBSTACLES[obstacle](here / ".out.partial")
    try:
        _graft(here)
        _complete(here / "out")
        assert not (here / ".out.partial").exists()
    except LingraftError as error:
        _clear(error)
        assert not (here / "out").exists()


# The command line


def _config(**values: str) -> Callable[[Path], Any]:
    return lambda folder: set_texts(folder / CONFIG, values)


def _header(text: str) -> Callable[[Path], Any]:
    return lambda folder: put(folder / WEIGHTS, text, b"")


def _number(value: float) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        entries = entries_of(folder / WEIGHTS)
        name = next(name for name in entries if "lora_A" in name)
        kind, shape, data = entries[name]
        entries[name] = (kind, shape, np.float32(value).tobytes() + data[4:])
        put_entries(folder / WEIGHTS, entries)

    return spoil


def _named(new: str) -> Callable[[Path], Any]:
    def rename(folder: Path) -> None:
        entries = {name.replace(SITES[0], new): entry for name, entry in entries_of(folder / WEIGHTS).items()}
        put_entries(folder / WEIGHTS, entries)

    return rename


def _cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def _note(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / SIDECAR).write_text(text)


def _wide(folder: Path) -> None:
    shutil.rmtree(folder)
    write_any(folder, "lora", 1, np.float32, True, width=9)


_HUGE = '{"x.lora_A.weight": {"dtype": "F32", "shape": [1000000000000000], "data_offsets": [0, 4000000000000000]}}'
REFUSED: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "cut short": (_cut, ("cannot be read", WEIGHTS)),
    "an oversized header": (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 64), ("cannot be read", WEIGHTS)),
    "a claim of 10^15 numbers": (_header(_HUGE), ("cannot be read", WEIGHTS)),
    "a deep header": (_header("[" * 100_000), ("cannot be read", WEIGHTS)),
    "NaN": (_number(np.nan), ("NaN or infinite", f"{SITES[0]}.A")),
    "infinity": (_number(np.inf), ("NaN or infinite", f"{SITES[0]}.A")),
    "alpha zero": (_config(lora_alpha="0"), ("alpha", SITES[0], "scaling of 0")),
    "alpha infinite": (_config(lora_alpha="1e400"), ("NaN, infinite", CONFIG)),
    "alpha of 5000 digits": (_config(lora_alpha="9" * 5000), ("damaged", CONFIG)),
    "alpha a word": (_config(lora_alpha='"sixteen"'), ("alpha cannot be read", SITES[0])),
    "a pattern without end": (_config(alpha_pattern='{"(a|a)*b": 1}'), ("(a|a)*b", "repeats a group")),
    "a pattern of many ways": (_config(alpha_pattern='{".*.*.*.*.*x": 1}'), (".*.*.*.*.*x", "too many")),
    "a deep configuration": (_config(x="[" * 100_000), ("nested too deeply", CONFIG)),
    "a pickle": (_pickled, ("pickle", "to do", "torch.load", "weights_only=True")),
    "a name that leads out": (_named("../../x"), ("../../x", "no name", WEIGHTS)),
    "an absolute name": (_named("/etc/x"), ("/etc/x", "no name", WEIGHTS)),
    "a name with control characters": (_named("\x1b[2J"), ("no name", WEIGHTS)),
    "another base by its digest": (_note('{"backbone": {"digest": "other"}}'), ("different base models", "other")),
    "another base by its shape": (_wide, ("do not fit together", SITES[0], "(6, 9)")),
    "a digest that is a list": (_note('{"backbone": {"digest": [1]}}'), ("not lingraft's", SIDECAR)),
}


@pytest.mark.parametrize("layers", ["true", "0", "-1", "3", "1" + "0" * 15, "2.0", '"2"', "null"])
def test_a_prefix_whose_number_of_layers_is_none_is_refused(whole: Path, tmp_path: Path, layers: str) -> None:
    folder = tmp_path / "task"
    shutil.copytree(whole / "prefix" / "F32-1" / "task", folder)
    set_texts(folder / CONFIG, {"num_layers": layers})
    with pytest.raises(LingraftError) as caught:
        inspect_folders([folder], True)
    _clear(caught.value)


@pytest.mark.parametrize("part", ["task", "target", "source"])
@pytest.mark.parametrize("name", REFUSED)
def test_the_command_line_refuses_in_one_message(whole: Path, tmp_path: Path, name: str, part: str) -> None:
    spoil, words = REFUSED[name]
    here = tmp_path / "here"
    shutil.copytree(whole / "lora" / "F32-1", here)
    spoil(here / part)
    before = snapshot(here)
    arguments = ["merge", "--weight", "0.7", "--out", str(here / "out")]
    for option, folder in zip(("--task", "--target-ref", "--source-ref"), NAMES, strict=True):
        arguments += [option, str(here / folder)]
    with in_time(SECONDS):
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.output and "unexpected" not in result.output
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr
    assert snapshot(here) == before
    assert {p.name for p in here.iterdir() if p.name.startswith(".")} <= {".out.lock", ".out.partial"}
