"""What does a merge cost beside reading and writing the same bytes, and beside PEFT?

    .venv/bin/python benchmarks/merge.py [--quick] [--out benchmarks/results/merge.json]

Random rank-8 adapters of all linear modules in float32: three in the shape of Llama-2-7B for lingraft, and three in the
shape of TinyLlama-1.1B for lingraft and PEFT on the same files. The ways run in turn; medians of five and the spread. Peak
memory is of a process of its own. `--quick` has tiny shapes: it shows only that all of it runs.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

import common
from lingraft import Adapter
from lingraft.store import write_json
from lingraft.tensors import write_tensors

RANK = 8
WEIGHT = 0.6
NAMES = ("task", "target", "source")
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
Times = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Shape:
    """A Llama model's sizes."""

    name: str
    layers: int
    hidden: int
    forward: int
    kv: int
    heads: int
    vocabulary: int = 32_000

    def modules(self) -> dict[str, tuple[int, int]]:
        """All linear modules: out × in."""
        h, f, kv = self.hidden, self.forward, self.kv
        attention = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
        mlp = {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}
        of_a_layer = {
            **{f"self_attn.{name}": shape for name, shape in attention.items()},
            **{f"mlp.{name}": shape for name, shape in mlp.items()},
        }
        return {f"model.layers.{n}.{name}": shape for n in range(self.layers) for name, shape in of_a_layer.items()}


LARGE = Shape("Llama-2-7B", 32, 4096, 11008, 4096, 32)
SMALL = Shape("TinyLlama-1.1B", 22, 2048, 5632, 256, 32)
TINY = Shape("tiny", 2, 64, 96, 32, 4, 100)


def write_adapters(folder: Path, shape: Shape) -> dict[str, Path]:
    """Three Gaussian adapters; their tensors are made as they are written."""
    modules = shape.modules()
    specs = [
        spec
        for module, (out, width) in sorted(modules.items())
        for spec in (
            (f"{PREFIX}{module}.lora_A.weight", (RANK, width), np.dtype(np.float32)),
            (f"{PREFIX}{module}.lora_B.weight", (out, RANK), np.dtype(np.float32)),
        )
    ]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "bias": "none",
        "init_lora_weights": True,
    }
    folders = {}
    for seed, name in enumerate(NAMES):
        folders[name] = folder / name
        folders[name].mkdir(parents=True)
        random = np.random.default_rng(seed)
        values = (random.standard_normal(size, dtype=np.float32) * np.float32(0.01) for _, size, _ in specs)
        write_tensors(folders[name] / WEIGHTS, specs, values)
        write_json(folders[name] / "adapter_config.json", config)
    return folders


def in_turn(ways: Mapping[str, Callable[[], Any]], out: Path, rounds: int) -> Times:
    """Medians of the ways, each run once unmeasured and then once a round.

    Before each the output is gone and the disk at rest, so that none pays for what another has left to be written.
    """

    def at_rest() -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()

    times = common.in_turn(ways, rounds, at_rest)
    shutil.rmtree(out, ignore_errors=True)
    return times


def read_and_write(files: list[Path], out: Path, block: int | None) -> None:
    """The bytes of a merge and nothing else: a block of every file is read, the last one's is written; None is all at once."""
    out.mkdir()
    buffer = memoryview(bytearray(block or files[0].stat().st_size))
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(path.open("rb", buffering=0)) for path in files]
        target = stack.enter_context((out / WEIGHTS).open("wb", buffering=0))
        while count := [source.readinto(buffer) for source in sources][-1]:
            target.write(buffer[:count])


def read_and_write_whole(files: list[Path], out: Path) -> None:
    """The plain way: every file into new memory."""
    out.mkdir()
    contents = [path.read_bytes() for path in files]
    (out / WEIGHTS).write_bytes(contents[-1])


def copy_by_cp(files: list[Path], out: Path) -> None:
    """`cp` of the three, and one of them brought to the disk."""
    out.mkdir()
    for number, path in enumerate(files):
        subprocess.run(["cp", str(path), str(out / str(number))], check=True)
    with (out / "0").open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def no_fsync() -> Generator[None, None, None]:
    """Within the block nothing is brought to the disk: that would measure the disk."""
    real = os.fsync
    os.fsync = lambda _: None
    try:
        yield
    finally:
        os.fsync = real


def merged(folders: Mapping[str, Path], **options: Any) -> Adapter:
    task, target, source = (Adapter.load(folders[name]) for name in NAMES)
    return (WEIGHT * (target - source)).onto(task, **options)


def merge_in_process(folders: Mapping[str, Path], out: Path, **options: Any) -> None:
    """Neither hashes nor fsync."""
    with no_fsync():
        out.mkdir()
        merged(folders, **options).write(out)


COMMAND = [sys.executable, "-c", "import sys; from lingraft.cli import main; sys.exit(main())", "merge"]


def arguments(folders: Mapping[str, Path], out: Path, extra: list[str]) -> list[str]:
    flags = ("--task", "--target-ref", "--source-ref")
    references = [part for flag, name in zip(flags, NAMES, strict=True) for part in (flag, str(folders[name]))]
    return [*COMMAND, *references, "--weight", str(WEIGHT), "--out", str(out), *extra]


PEAK = """
import os, resource, sys
pid = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
if os.waitpid(pid, 0)[1]: sys.exit(1)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""ru_maxrss of a child counts what its parent held when it was started: a small process stands between."""


def merge_process(folders: Mapping[str, Path], out: Path, extra: list[str], cache: Path) -> None:
    """The command with all it does: start of Python, hashes of inputs (none remembered) and outputs, fsync."""
    shutil.rmtree(cache, ignore_errors=True)
    environment = {**os.environ, "LINGRAFT_CACHE": str(cache)}
    subprocess.run(arguments(folders, out, extra), check=True, capture_output=True, env=environment)


def peak_mib(folders: Mapping[str, Path], out: Path, extra: list[str], cache: Path) -> float:
    shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, "-c", PEAK, *arguments(folders, out, extra)]
    environment = {**os.environ, "LINGRAFT_CACHE": str(cache)}
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    shutil.rmtree(out)
    kilobytes = int(found.stdout.splitlines()[-1])
    return kilobytes / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def excess_of_compression(folders: Mapping[str, Path], sample: int) -> list[float]:
    """Error of the compressed update over the least possible, less 1, of some modules; from the factors, in float64."""
    compressed, exact = merged(folders, space="product", out_rank=RANK), merged(folders, space="product")
    found = []
    for module in list(exact.modules)[:: max(len(exact.modules) // sample, 1)][:sample]:
        full, small = exact.site(module), compressed.site(module)
        a, b = (full.tensors[role].astype(np.float64) for role in ("A", "B"))
        b = b * full.scaling
        stacked_a = np.concatenate([a, small.tensors["A"].astype(np.float64)])
        stacked_b = np.concatenate([b, -small.scaling * small.tensors["B"].astype(np.float64)], axis=1)
        error = np.linalg.norm(core(stacked_a, stacked_b))
        least = np.linalg.norm(np.linalg.svd(core(a, b), compute_uv=False)[RANK:])
        found.append(float(error / least - 1))
    return found


def core(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A small matrix with the singular values of B·A."""
    return np.linalg.qr(b, mode="r") @ np.linalg.qr(a.T, mode="r").T


def compress_only(folders: Mapping[str, Path]) -> Callable[[], None]:
    """Compression of every site and no more; the stacked sites are held in memory."""
    from lingraft.families.lora import compress

    exact = merged(folders, space="product")
    sites = [exact.site(module) for module in exact.modules]

    def run() -> None:
        with threadpool_limits(1):
            for site in sites:
                compress(site, RANK)

    return run


def lingraft_alone(shape: Shape, folder: Path, disk: Path, rounds: int) -> dict[str, Any]:
    """What is measured without the disk is in `folder`, the rest on `disk`."""
    folders, out = write_adapters(folder, shape), folder / "out"
    files = [folders[name] / WEIGHTS for name in NAMES]
    on_disk = {name: Path(shutil.copytree(path, disk / name)) for name, path in folders.items()}
    output, cache = disk / "out", disk / "cache"
    compressed = ["--space", "product", "--out-rank", str(RANK)]
    bytes_alone = {
        "read and write, blocks of 1 MiB": lambda: read_and_write(files, out, 1 << 20),
        "read and write, one buffer for a whole file": lambda: read_and_write(files, out, None),
        "read and write, new memory": lambda: read_and_write_whole(files, out),
        "element-wise, in process": lambda: merge_in_process(folders, out),
    }
    product = {
        "product, exact, in process": lambda: merge_in_process(folders, out, space="product"),
        "product to rank 8, in process": lambda: merge_in_process(folders, out, space="product", out_rank=RANK),
        "product to rank 8, compression alone": compress_only(folders),
    }
    to_the_disk = {
        "cp of three, one fsynced": lambda: copy_by_cp([path / WEIGHTS for path in on_disk.values()], output),
        "element-wise, command": lambda: merge_process(on_disk, output, [], cache),
        "product to rank 8, command": lambda: merge_process(on_disk, output, compressed, cache),
    }
    times: Times = {}
    for ways, where in ((bytes_alone, out), (product, out), (to_the_disk, output)):
        times |= in_turn(ways, where, rounds)
    base = times["read and write, blocks of 1 MiB"]["median_s"]
    return {
        "shape": shape.name,
        "modules": len(shape.modules()),
        "adapter_bytes": files[0].stat().st_size,
        "times": times,
        "times_the_bytes": {name: found["median_s"] / base for name, found in times.items()},
        "memory_mib": {
            "element-wise, command": peak_mib(on_disk, output, [], cache),
            "product to rank 8, command": peak_mib(on_disk, output, compressed, cache),
        },
        "error_over_optimum_less_1": max(excess_of_compression(folders, 7)),
    }


def base_model(shape: Shape) -> Any:
    """A model of this shape whose weights are memory not yet touched: no way here reads them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv * shape.heads // shape.hidden,
        vocab_size=shape.vocabulary,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return model.to_empty(device="cpu")


def peft_loaded(model: Any, folders: Mapping[str, Path]) -> Any:
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(model, folders[NAMES[0]], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        wrapped.load_adapter(folders[name], name)
    return wrapped


def peft_merge(model: Any, folders: Mapping[str, Path], out: Path, how: str) -> None:
    """Three adapters loaded into a model that is there already, combined and saved."""
    wrapped = peft_loaded(model, folders)
    wrapped.add_weighted_adapter(list(NAMES), [1.0, WEIGHT, -WEIGHT], "merged", combination_type=how)
    wrapped.save_pretrained(out, selected_adapters=["merged"])


def beside_peft(shape: Shape, folder: Path, rounds: int, svd: bool) -> dict[str, Any]:
    """The same three files through PEFT and lingraft, imports not counted."""
    import torch

    torch.set_num_threads(1)  # PEFT is several times faster so where other processes run on the cores.
    folders, out = write_adapters(folder, shape), folder / "out"
    spent: dict[str, Callable[[], Any]] = {
        f"PEFT {how}, base and adapters loaded, merged, saved": (
            lambda how=how: peft_merge(base_model(shape), folders, out, how)
        )
        for how in ("linear", "cat")
    }
    spent["lingraft element-wise"] = lambda: merge_in_process(folders, out)
    spent["lingraft product, exact"] = lambda: merge_in_process(folders, out, space="product")
    spent["lingraft product to rank 8"] = lambda: merge_in_process(folders, out, space="product", out_rank=RANK)
    found: dict[str, Any] = {
        "shape": shape.name,
        "adapter_bytes": (folders[NAMES[0]] / WEIGHTS).stat().st_size,
        "times": in_turn(spent, out, rounds),
    }
    if svd:
        found["svd"] = peft_svd(shape, folder / "one layer")
    return found


def peft_svd(shape: Shape, folder: Path) -> dict[str, float]:
    """PEFT's `svd` on one layer, once; its time for the model is that times the layers, not measured."""
    one = Shape(shape.name, 1, shape.hidden, shape.forward, shape.kv, shape.heads, 100)
    wrapped = peft_loaded(base_model(one), write_adapters(folder, one))
    began = time.perf_counter()
    wrapped.add_weighted_adapter(list(NAMES), [1.0, WEIGHT, -WEIGHT], "merged", combination_type="svd", svd_rank=RANK)
    took = time.perf_counter() - began
    return {"one_layer_s": took, "extrapolated_to_the_model_s": took * shape.layers}


def weight_in_place(shape: Shape, folder: Path, rounds: int) -> dict[str, Any]:
    """λ changed in a loaded model, all sites at once; beside it PEFT's way to the same: a state dict put into the model."""
    import torch
    from peft import PeftModel, set_peft_model_state_dict

    from lingraft.live import LiveGraft, adapter_parameters
    from lingraft.merging import Graft

    folders = write_adapters(folder, shape)
    task, target, source = (Adapter.load(folders[name]) for name in NAMES)
    wrapped = PeftModel.from_pretrained(base_model(shape), folders[NAMES[0]])
    state = {n: torch.from_numpy(np.array(a)) for n, a in (task + WEIGHT * (target - source)).tensors()}
    parameters = adapter_parameters(wrapped)
    live = LiveGraft(parameters, task, target - source, Graft(0.0))
    live.set_weight(WEIGHT)
    worst = max(float((parameters[name] - state[name]).abs().max()) for name in state)
    ways: dict[str, Callable[[], Any]] = {
        "lingraft, λ in place": lambda: live.set_weight(WEIGHT),
        "PEFT, set_peft_model_state_dict of a merge that is there already": (
            lambda: set_peft_model_state_dict(wrapped, state)
        ),
    }
    return {
        "shape": shape.name,
        "times": in_turn(ways, folder / "out", rounds),
        "threads": torch.get_num_threads(),
        "largest_difference_to_the_merge": worst,
    }


def table(times: Times, more: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A Markdown table of milliseconds, with further columns by the row's name."""
    lines = ["| " + " | ".join(["", "ms", *more]) + " |", "|---" * (2 + len(more)) + "|"]
    for name, t in times.items():
        spread = f"{1e3 * t['median_s']:.1f} [{1e3 * t['min_s']:.1f}, {1e3 * t['max_s']:.1f}]"
        cells = [f"{column[name]:.3g}" if name in column else "" for column in more.values()]
        lines.append("| " + " | ".join([name, spread, *cells]) + " |")
    return lines


def markdown(results: Mapping[str, Any]) -> str:
    where, alone, peft = results["machine"], results["lingraft"], results["peft"]
    versions = ", ".join(f"{name} {value}" for name, value in where.items() if name not in ("processor", "cores"))
    lines = [
        "# Merging: beside the bytes, and beside PEFT",
        "",
        "    .venv/bin/python benchmarks/merge.py",
        "",
        f"{results['date']}; commit {results['commit']}; {where['cores']} cores of an {where['processor']}; {versions}.",
        f"Medians of {results['rounds']} [least, most], the ways in turn in one run.",
        "",
        f"## Three rank-{RANK} adapters of all {alone['modules']} linear modules of {alone['shape']}, float32, "
        f"{alone['adapter_bytes'] / 1e6:.1f} MB each",
        "",
        *table(alone["times"], {"times the bytes (1 MiB)": alone["times_the_bytes"], "peak MiB": alone["memory_mib"]}),
        "",
        "The rows of reading and writing read the three files and write one of the same size: the bytes of a merge. "
        'They and "in process", which is without hashes and fsync, work on files in memory where the machine has such a '
        'folder; "command" is the whole process with both, on the disk, with no hash remembered, and cp is on the disk too. '
        "Compression alone runs on one core, on stacked sites already in memory. Error of the compressed update over the "
        f"least possible, less 1, in float64, the worst of seven modules: {alone['error_over_optimum_less_1']:.1e}.",
        "",
        f"## The same through PEFT: three adapters of {peft['shape']}, {peft['adapter_bytes'] / 1e6:.1f} MB each",
        "",
        *table(peft["times"], {}),
        "",
        "In one process, torch on one thread, imports not counted. PEFT's base model is empty memory, so that nothing is read "
        "for it; PEFT's "
        "`linear` is not the same formula (it weights A and B by roots). Neither syncs to the disk, lingraft's fsync is off.",
    ]
    if "svd" in peft:
        lines += [
            "",
            f"PEFT's `svd` to rank {RANK}, one layer, once: {peft['svd']['one_layer_s']:.1f} s. **Extrapolated, not measured:** "
            f"{peft['svd']['extrapolated_to_the_model_s']:.0f} s for the model's layers.",
        ]
    live = results["weight_in_place"]
    if live is not None:
        lines += [
            "",
            f"## λ on a loaded model of {live['shape']}, torch on {live['threads']} thread(s)",
            "",
            *table(live["times"], {}),
            "",
            f"Largest difference of a number to the merge of the files: {live['largest_difference_to_the_merge']:.1e}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-svd", action="store_true", help="leave out PEFT's svd, which takes minutes")
    parser.add_argument("--disk", type=Path, help="a folder on a real disk, for what brings files to it")
    shared = Path("/dev/shm")
    parser.add_argument(
        "--memory", type=Path, default=shared if shared.is_dir() else None, help="a folder in memory, for the rest"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/merge.json"))
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    with tempfile.TemporaryDirectory(dir=options.memory) as near, tempfile.TemporaryDirectory(dir=options.disk) as far:
        work = Path(near)
        alone = lingraft_alone(TINY if options.quick else LARGE, work / "large", Path(far), rounds)
        shutil.rmtree(work / "large")
        small = TINY if options.quick else SMALL
        peft = beside_peft(small, work / "small", rounds, not options.no_svd)
        in_place = weight_in_place(small, work / "place", rounds)
    results = {
        "machine": common.machine("numpy", "safetensors", "torch", "transformers", "peft"),
        "commit": common.commit(),
        "date": time.strftime("%B %Y"),
        "rounds": rounds,
        "lingraft": alone,
        "peft": peft,
        "weight_in_place": in_place,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    text = markdown(results)
    options.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
