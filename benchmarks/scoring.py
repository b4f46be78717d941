"""How many items a second are scored, beside lm-evaluation-harness on the same prompts and candidates?

    .venv/bin/python benchmarks/scoring.py [--quick] [--data-dir DIR] [--xcopa 32] [--topics 16]

Both load the same folder of weights in float32, each in a process of its own, and take turns; lm-eval is asked through its `LM`
interface (`HFLM.loglikelihood`), at batch sizes 1 and 8 in a first round that does not count, then at the better one. Tokenising is
part of both. Beside the speed: the answers, and the largest difference of two candidates' log-likelihoods.
"""

# pyright: reportMissingImports=false
import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from lm_eval_agreement import MARGIN, best, margin, most_apart, scored_by_auto

SIZES = (1, 8, 32)


def rows_asked(data: Path | None, counts: Mapping[str, int]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What is scored: items, ours' way of scoring, and whether lm-eval is asked for whole candidates; what is left out, and why."""
    found: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    if data is None:
        skipped["XCOPA"] = "it is not bundled (--data-dir)"
    else:
        examples, name = common.rows_of("xcopa", "sw", "test", data, counts["xcopa"])
        found["xcopa"] = {"title": f"{name}: whole candidates", "items": examples, "scoring": "sequence", "whole": True}
    examples, name = common.rows_of("topics", "en", "test", data, counts["topics"])
    shared = {"items": examples}
    found["topics"] = {"title": f"{name}: first token", "scoring": "auto", "whole": False, **shared}
    found["topics-whole"] = {"title": f"{name}: whole candidates", "scoring": "sequence", "whole": True, **shared}
    return found, skipped


def our_side(spec: Mapping[str, Any]) -> None:
    """lingraft; writes what lm-eval is to be asked."""
    import torch

    from lingraft.backbones import Backbone
    from lingraft.config import BackboneConfig
    from lingraft.evaluation import predict
    from lingraft.locating import locate

    asked = common.Asked()
    torch.set_num_threads(spec["threads"])
    backbone = Backbone(locate(BackboneConfig(model=spec["model"], dtype="float32", device="cpu")))
    rows, skipped = rows_asked(Path(spec["data"]) if spec["data"] else None, spec["counts"])
    pairs: dict[str, list[list[str]]] = {}
    for name, row in list(rows.items()):
        try:
            scored = [e.candidates if row["whole"] else scored_by_auto(backbone, e) for e in row["items"]]
        except (AssertionError, StopIteration):
            skipped[row["title"]] = "lm-eval cannot be asked for these tokens as text"
            del rows[name]
            continue
        pairs[name] = [[e.prompt, c] for e, candidates in zip(row["items"], scored, strict=True) for c in candidates]
    Path(spec["pairs"]).write_text(json.dumps({"folder": str(backbone.folder), "pairs": pairs}), encoding="utf-8")
    titles = {name: row["title"] for name, row in rows.items()}
    sizes = {name: [len(e.candidates) for e in row["items"]] for name, row in rows.items()}
    asked.say(titles=titles, sizes=sizes, skipped=skipped, versions=common.versions("torch", "transformers"))
    while True:
        row = rows[asked.wait()["do"]]
        began = time.perf_counter()
        said = predict(backbone, None, row["items"], scoring=row["scoring"], max_length=4096)
        seconds = time.perf_counter() - began
        asked.say(seconds=seconds, scores=[v for p in said for v in p.scores], peak_mib=common.peak_memory())


def peers_side(spec: Mapping[str, Any]) -> None:
    """lm-evaluation-harness."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = common.Asked()
    torch.set_num_threads(spec["threads"])
    given = json.loads(Path(spec["pairs"]).read_text(encoding="utf-8"))
    lm = HFLM(pretrained=given["folder"], dtype="float32", device="cpu", batch_size=1)
    asked.say(versions=common.versions("lm_eval", "torch", "transformers"))
    while True:
        told = asked.wait()
        lm.batch_size_per_gpu = told["size"]
        pairs = given["pairs"][told["do"]]
        instances = [Instance("loglikelihood", {}, tuple(pair), number) for number, pair in enumerate(pairs)]
        began = time.perf_counter()
        said = lm.loglikelihood(instances, disable_tqdm=True)
        seconds = time.perf_counter() - began
        asked.say(seconds=seconds, scores=[score for score, _ in said], peak_mib=common.peak_memory())


def regrouped(values: Sequence[float], sizes: Sequence[int]) -> list[list[float]]:
    """Scores by item."""
    remaining = iter(values)
    return [[next(remaining) for _ in range(size)] for size in sizes]


def agreement(ours: list[list[float]], theirs: list[list[float]]) -> dict[str, Any]:
    """How many answers are the same, how many of the others lm-eval itself is undecided on, and how far margins are apart."""
    pairs = list(zip(ours, theirs, strict=True))
    other = [t for o, t in pairs if best(o) != best(t)]
    return {
        "items": len(pairs),
        "same": len(pairs) - len(other),
        "undecided": sum(margin(t) < MARGIN for t in other),
        "largest_margin_difference": max(most_apart(o, t) for o, t in pairs),
    }


def measured(ours: common.Worker, theirs: common.Worker | None, name: str, rounds: int) -> dict[str, Any]:
    """One row: both sides in turn."""
    sizes = ours.ready["sizes"][name]
    first = ours.ask(name)
    found: dict[str, Any] = {"title": ours.ready["titles"][name], "items": len(sizes)}
    scores = {"ours": regrouped(first["scores"], sizes)}
    size, tried = 1, {}
    if theirs is not None:
        theirs.ask(name, size=SIZES[0])  # Not counted: a process's first pass is slow.
        tried = {n: theirs.ask(name, size=n) for n in SIZES}
        size = min(tried, key=lambda n: tried[n]["seconds"])
        scores["peer"] = regrouped(tried[size]["scores"], sizes)
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    peaks: dict[str, int | None] = {}
    for _ in range(rounds):
        for side, worker in (("ours", ours), ("peer", theirs)):
            if worker is not None:
                said = worker.ask(name, size=size)
                seconds[side].append(said["seconds"])
                peaks[side] = said["peak_mib"]
    for side, times in seconds.items():
        if times:
            speeds = sorted(len(sizes) / t for t in times)
            found[side] = {
                **common.spread(times),
                "items_s": len(sizes) / common.spread(times)["median_s"],
                "items_s_least": speeds[0],
                "items_s_most": speeds[-1],
                "peak_mib": peaks[side],
            }
    if theirs is not None:
        ratios = [t / o for o, t in zip(seconds["ours"], seconds["peer"], strict=True)]
        faster = common.spread(ratios)
        found |= {
            "times_faster": faster["median_s"],
            "least": faster["min_s"],
            "most": faster["max_s"],
            "batch_size": size,
            "tried_s": {str(n): said["seconds"] for n, said in tried.items()},
            **agreement(scores["ours"], scores["peer"]),
        }
    return found | {"scores": scores}


def main() -> None:
    parser = common.arguments(__doc__, "scoring.json")
    common.data_option(parser)
    parser.add_argument("--xcopa", type=int, default=32, help="items of XCOPA")
    parser.add_argument("--topics", type=int, default=16, help="items of SIB-200 or of the bundled topics")
    parser.add_argument("--peer", type=Path, help="the interpreter of lm-eval; absent: made in .bench")
    for hidden in ("--peers-side", "--our-side"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peers_side or options.our_side:
        spec = json.loads((options.peers_side or options.our_side).read_text())
        (peers_side if options.peers_side else our_side)(spec)
        os._exit(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        counts = {"xcopa": options.xcopa, "topics": options.topics}
        if options.quick:
            options.model, options.rounds = str(common.tiny_model(folder / "tiny")), min(options.rounds, 1)
            counts = {"xcopa": 2, "topics": 2}
        spec = {
            "model": options.model,
            "data": str(options.data_dir) if options.data_dir else None,
            "counts": counts,
            "threads": options.threads,
            "pairs": str(folder / "pairs.json"),
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        run(options, folder / "spec.json")


def run(options: argparse.Namespace, spec: Path) -> None:
    """All rows."""
    peer = options.peer or (None if options.quick else common.peer("lm-eval"))
    made = {"ours": lambda: common.Worker(sys.executable, __file__, "--our-side", str(spec), threads=options.threads)}
    if peer is not None:
        made["peer"] = lambda: common.Worker(peer, __file__, "--peers-side", str(spec), threads=options.threads)
    with common.workers(made) as sides:
        ours, theirs = sides["ours"], sides.get("peer")
        rows = {name: measured(ours, theirs, name, options.rounds) for name in ours.ready["titles"]}
        ready = {side: worker.ready["versions"] for side, worker in sides.items()}
        skipped = ours.ready["skipped"]
    scores = {name: row.pop("scores") for name, row in rows.items()}
    defaults = None
    if {"topics", "topics-whole"} <= set(rows) and theirs is not None:
        # Each side as its users have it: lingraft's first token, lm-eval's whole candidates. Two questions: answers may differ.
        pairs = zip(scores["topics"]["ours"], scores["topics-whole"]["peer"], strict=True)
        defaults = {
            "times_faster": rows["topics-whole"]["peer"]["median_s"] / rows["topics"]["ours"]["median_s"],
            "same": sum(best(a) == best(b) for a, b in pairs),
            "items": rows["topics"]["items"],
        }
    found = common.heading(options, versions=ready, rows=rows, skipped=skipped, as_each_has_it=defaults)
    common.write(options.out, found)
    for row in rows.values():
        beside = ""
        if "peer" in row:
            beside = (
                f", lm-eval {row['peer']['items_s']:.2f} (batch {row['batch_size']}), {row['times_faster']:.2f} times; "
                f"{row['same']} of {row['items']} answers the same, margins within {row['largest_margin_difference']:.1e}"
            )
        print(f"{row['title']}: {row['ours']['items_s']:.2f} items/s{beside}")


if __name__ == "__main__":
    main()
