"""What does a grid of eight weights λ cost beside eight bare evaluations of the loaded model?

    .venv/bin/python benchmarks/grid.py [--quick] [--data-dir DIR] [--items 12]

Three random LoRA adapters (rank 8, all linear layers) that differ; validation items of SIB-200 or of the bundled topics. The
ways run in turn: the bare model eight times; with one adapter on it, eight times; λ changed in place (`evaluation.grid`); and
the plain way: for every weight the files are merged, the folder is put on the model by PEFT and taken off again. The
predictions of the last two must agree: in bfloat16, in which all is timed, and in float32.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import common

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
NAMES = ("task", "target", "source")
EXACT_ITEMS = 2
"""Items that are also asked in float32, unmeasured: in bfloat16 both ways round, each in its own way."""


def write_adapters(backbone: Any, place: Path) -> dict[str, Path]:
    """Three adapters whose B is small and random."""
    import numpy as np
    from safetensors.numpy import load_file

    from lingraft.batching import TokenSequence
    from lingraft.config import AdapterConfig, TrainingConfig
    from lingraft.layouts.common import WEIGHTS as FILE
    from lingraft.tensors import write_all
    from lingraft.training import train

    text = [TokenSequence((*backbone.prefix, 5, 6, 7), 1)]
    found = {}
    for seed, name in enumerate(NAMES):
        folder = found[name] = place / name
        folder.mkdir(parents=True)
        train(backbone, text, folder, adapter=AdapterConfig(dropout=0), training=TrainingConfig(epochs=0))
        rng, tensors = np.random.default_rng(seed), load_file(folder / FILE)
        for key, values in tensors.items():
            if "lora_B" in key:
                tensors[key] = (rng.standard_normal(values.shape) * 0.02).astype(np.float32)
        write_all(folder / FILE, tensors)
    return found


def ways(backbone: Any, items: list[Any], folders: Mapping[str, Path], place: Path) -> dict[str, Callable[[], Any]]:
    """What takes turns; each gives its predictions by weight."""
    import shutil

    from peft import PeftModel

    from lingraft.adapter import Adapter
    from lingraft.evaluation import Asking, Questions, ask, grid, predict
    from lingraft.merging import Graft

    task, target, source = (Adapter.load(folders[name]) for name in NAMES)

    def said(adapter: Any = None) -> list[Any]:
        return predict(backbone, adapter, items, max_length=4096)

    def questions() -> Questions:
        return Questions(backbone, items, Asking(max_length=4096))

    def bare() -> list[Any]:
        asked = questions()
        return [ask(backbone, None, asked) for _ in WEIGHTS]

    def attached() -> list[Any]:
        asked = questions()
        with backbone.with_adapter(task):
            return [ask(backbone, None, asked) for _ in WEIGHTS]

    def in_place() -> list[Any]:
        return [said for _, said in grid(backbone, task, target - source, Graft(0.0), WEIGHTS, questions())]

    def by_files() -> list[Any]:
        found = []
        for weight in WEIGHTS:
            parts = (Adapter.load(folders[name]) for name in NAMES)
            task, target, source = parts
            folder = place / "merged"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (task + weight * (target - source)).write(folder)
            wrapped = PeftModel.from_pretrained(backbone.model, str(folder))
            try:
                found.append(said())
            finally:
                backbone.model = wrapped.unload()
                vars(backbone.model).pop("peft_config", None)
        return found

    return {
        "the bare model, eight times": bare,
        "an adapter on it, eight times": attached,
        "λ in place": in_place,
        "merged files through PEFT": by_files,
    }


def main() -> None:
    parser = common.arguments(__doc__, "grid.json")
    common.data_option(parser)
    parser.add_argument("--items", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run(options, Path(place))


def run(options: argparse.Namespace, place: Path) -> None:
    """All ways in turn."""
    import torch

    from lingraft.backbones import Backbone
    from lingraft.config import BackboneConfig
    from lingraft.locating import locate

    torch.set_num_threads(options.threads)
    if options.quick:
        options.model, options.rounds, options.items = str(common.tiny_model(place / "tiny")), 1, 2
    backbone = Backbone(locate(BackboneConfig(model=options.model, device="cpu")))
    items, data = common.rows_of("topics", "en", "validation", options.data_dir, options.items)
    made = ways(backbone, items, write_adapters(backbone, place), place)
    said: dict[str, list[Any]] = {}

    def keeping(name: str) -> Callable[[], None]:
        def run_it() -> None:
            said[name] = made[name]()

        return run_it

    times = common.in_turn({name: keeping(name) for name in made}, options.rounds)
    base = times["the bare model, eight times"]["median_s"]
    for found in times.values():
        found["times_the_bare"] = found["median_s"] / base
    agreement = agreed(said["λ in place"], said["merged files through PEFT"])
    exact = Backbone(locate(BackboneConfig(model=options.model, dtype="float32", device="cpu")))
    again = ways(exact, items[:EXACT_ITEMS], {name: place / name for name in NAMES}, place)
    exactly = agreed(again["λ in place"](), again["merged files through PEFT"]())
    different = [x.scores != y.scores for x, y in zip(said["λ in place"][0], said["λ in place"][-1], strict=True)]
    found = common.heading(
        options,
        data=data,
        weights=WEIGHTS,
        times=times,
        **agreement,
        in_float32=exactly,
        changed_by_the_weight=sum(different),
    )
    common.write(options.out, found)
    for name, row in times.items():
        print(f"{name}: {row['median_s']:.2f} s, {row['times_the_bare']:.2f} times the bare model")
    print(f"{found['same_answers']} of {found['answers']} answers the same")


def agreed(in_place: list[Any], by_files: list[Any]) -> dict[str, Any]:
    """How many answers are the same by both ways, and how far their scores are apart, in nats."""
    pairs = [pair for a, b in zip(in_place, by_files, strict=True) for pair in zip(a, b, strict=True)]
    apart = [abs(x - y) for o, t in pairs for x, y in zip(o.scores, t.scores, strict=True)]
    return {
        "same_answers": sum(_best(o) == _best(t) for o, t in pairs),
        "answers": len(pairs),
        "largest_score_difference": max(apart),
    }


def _best(prediction: Any) -> int:
    return max(range(len(prediction.scores)), key=lambda n: prediction.scores[n])


if __name__ == "__main__":
    main()
