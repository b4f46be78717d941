"""What does scheduling cost, and what do further workers bring?

    .venv/bin/python benchmarks/scheduling.py [--quick] [--rounds 3] [--out benchmarks/results/scheduling.json]

1,000 steps that do nothing but write a given weight down, each under its lease, synced to the disk and renamed: in this process,
and by actors of a Ray cluster on this machine. Four equal trainings on one thread each (a random model, bundled sentences): by one
actor and by two, on a cluster of one core and of two, from the first training step on and with the start of the actors.
Writes the page beside the result.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

GOALS = {"local": 5.0, "ray": 20.0, "two": 1.7}
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}


def experiment_of(model: Path, seeds: int, epochs: float) -> Any:
    from lingraft.config import Experiment

    return Experiment.model_validate(
        {
            "name": "scheduling",
            "backbone": {"model": str(model), "dtype": "float32", "device": "cpu"},
            "data_dir": "bundled",
            "task": "topics",
            "targets": ["sw"],
            "methods": ["eng-ft"],
            "reference": {"task": "none"},
            "training": {"epochs": epochs, "batch_size": 16, "max_length": 128},
            "resources": {"cpus": 1},
            "seeds": list(range(seeds)),
        }
    )


def nothing(model: Path, place: Path, on: str, count: int, address: str | None) -> float:
    """Seconds of so many steps that do nothing, from the first that begins."""
    from lingraft.locating import locate
    from lingraft.plan.steps import Step
    from lingraft.runner import Events, carry_out
    from lingraft.session import Session
    from lingraft.store import open_store

    experiment = experiment_of(model, 1, 1)
    store = open_store(place / "store")
    session = Session(experiment, locate(experiment.backbone), store)
    steps = [Step("select", {"weight": 1.0, "number": n}, label=f"nothing {n}") for n in range(count)]
    if on == "local":
        from lingraft.workers.local import Local

        workers: Any = Local(session, lambda *_: None)
    else:
        from lingraft.workers.cluster import Cluster

        workers = Cluster(session, store.location, address, steps, lambda *_: None, lambda text: None)
        # Actors are there before the clock runs: what is asked is the cost of a step.
        warm = [Step("select", {"weight": 1.0, "warm": n}, label=f"warm {n}") for n in range(4)]
        left = len(warm)
        for step in warm:
            while not workers.room(step):
                left -= len(workers.ended(1.0))
            workers.start([step])
        while left:
            left -= len(workers.ended(1.0))
    began = time.perf_counter()
    made = carry_out(steps, store, workers, Events())
    seconds = time.perf_counter() - began
    if made != count:
        raise SystemExit(f"{made} of {count} steps were made")
    return seconds


def trainings(model: Path, place: Path, count: int, epochs: float) -> dict[str, float]:
    """Seconds of equal trainings on a cluster, from the first training step on, and in all."""
    from lingraft.locating import locate
    from lingraft.plan import make_plan
    from lingraft.runner import Events, run

    experiment = experiment_of(model, count, epochs)
    plan = make_plan(experiment, locate(experiment.backbone))
    keys = [step.key for step in plan.steps if step.kind == "train" and not step.config.get("initial")]
    if len(keys) != count:
        raise SystemExit(f"{len(keys)} trainings instead of {count}")
    first: list[float] = []

    def progress(step: Any, done: int, total: int, note: str) -> None:
        if done and not first:
            first.append(time.perf_counter())

    began = time.perf_counter()
    run(
        experiment,
        place / "out",
        store=place / "store",
        on="ray",
        only=keys,
        events=Events(progress=progress),
    )
    ended = time.perf_counter()
    return {"in_all": ended - began, "from_first_step": ended - (first[0] if first else began)}


def once(question: str, options: argparse.Namespace, model: Path) -> dict[str, float]:
    """One round of one question, in this process."""
    count, epochs = (50, 0.2) if options.quick else (1000, options.epochs)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        place = Path(folder)
        if question == "local":
            return {"seconds": nothing(model, place, "local", count, None)}
        if question == "ray":
            return {"seconds": nothing(model, place, "ray", count, None)}
        from lingraft.workers import cluster

        cores = {"one": 1, "two": 2}[question]
        cluster._cores = lambda: cores  # What a cluster that is started here has.
        return trainings(model, place, 4, epochs)


def page(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    machine, times = found["machine"], found["times"]
    versions = ", ".join(f"{n} {machine[n]}" for n in ("python", "torch", "ray") if n in machine)

    def said(name: str, field: str) -> str:
        one = times[name][field]
        return f"{one['median_s']:.2f} [{one['min_s']:.2f}, {one['max_s']:.2f}]"

    def met(value: float, goal: float, at_most: bool) -> str:
        return "met" if (value <= goal if at_most else value >= goal) else "**missed**"

    rows = []
    for name, title in (("local", "in this process"), ("ray", "on a Ray cluster of this machine")):
        if name in times:
            value = times[name]["seconds"]["median_s"]
            row = [f"{found['steps']:,} steps that do nothing, {title}", f"at most {GOALS[name]:.0f} s"]
            rows.append([*row, said(name, "seconds") + " s", met(value, GOALS[name], True)])
    lines = [common.table(["", "goal", "median [least, most]", ""], rows), ""]
    if "two" in times:
        rows = []
        for field, title in (
            ("from_first_step", "from the first training step on"),
            ("in_all", "with the start of the actors"),
        ):
            ratio = times["one"][field]["median_s"] / times["two"][field]["median_s"]
            goal = GOALS["two"] if field == "from_first_step" else None
            rows.append(
                [
                    title,
                    said("one", field),
                    said("two", field),
                    f"{ratio:.2f}",
                    f"at least {goal}: {met(ratio, goal, False)}" if goal else "",
                ]
            )
        lines += [
            "Four equal trainings of one thread each, seconds:",
            "",
            common.table(["", "one worker", "two workers", "times faster", "goal"], rows),
            "",
        ]
    return "\n".join(
        [
            "# Scheduling",
            "",
            "    .venv/bin/python benchmarks/scheduling.py",
            "",
            f"{found['date']}; commit {found['commit']}; {machine['cores']} cores of {machine['processor']}; {versions}; "
            f"medians of {found['rounds']}.",
            "",
            *lines,
        ]
    )


def main() -> None:
    parser = common.arguments(__doc__, "scheduling.json", rounds=3)
    parser.add_argument("--epochs", type=float, default=1, help="of each of the four trainings")
    parser.add_argument("--questions", default="local,ray,one,two")
    parser.add_argument("--folder", type=Path, help="where the stores are: the disk that is synced to")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        asked = common.Asked()
        asked.say(**once(options.once, options, Path(options.model)))
        return
    questions = options.questions.split(",")
    rounds = 1 if options.quick else options.rounds
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in questions}
    with tempfile.TemporaryDirectory() as folder:
        model = common.tiny_model(Path(folder) / "model", **({} if options.quick else SIZES))
        given = ["--model", str(model), "--epochs", str(options.epochs), *(["--quick"] if options.quick else [])]
        given += ["--folder", str(options.folder)] if options.folder else []
        for _ in range(rounds):
            for name in questions:  # In turn, each in a process of its own.
                seen[name].append(common.alone(sys.executable, __file__, "--once", name, *given, threads=1))
                print(name, seen[name][-1], file=sys.stderr, flush=True)
    heading = common.heading(options, steps=50 if options.quick else 1000, epochs=options.epochs)
    heading |= {"threads": 1, "rounds": rounds}
    heading["machine"] |= common.versions("ray")
    times = {
        name: {field: common.spread([one[field] for one in each]) for field in each[0]} for name, each in seen.items()
    }
    found = {**heading, "times": times}
    common.write(options.out, found)
    options.out.with_suffix(".md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
