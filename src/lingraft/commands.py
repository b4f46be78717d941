"""What the verbs do: from options to the library's functions, and from their results to what is printed."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from lingraft.config import (
    AdapterConfig,
    BackboneConfig,
    Config,
    CustomTask,
    Experiment,
    ReferenceConfig,
    TrainingConfig,
    load_experiment,
    parse_override,
    parse_yaml,
    validated,
)
from lingraft.errors import ConfigError, UserError, suggestion, writing

if TYPE_CHECKING:
    from lingraft.plan import Step

SHORT = (
    "training.epochs=1",
    "reference_training.epochs=1",
    "reference.max_segments=16",
    "selection.weights=[0.5, 1]",
    "selection.limit=14",
    "evaluation.limit=28",
    "targets=[sw, vi]",
)
"""What `quickstart --short` changes: enough to see that everything works, too little to learn anything."""


def _errors() -> Console:
    return Console(stderr=True)


class Watcher:
    """Shows a run: bars with the time left on a terminal, a line a step elsewhere."""

    def __init__(self, quiet: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console = _errors()
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
            TimeRemainingColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            transient=True,
        )
        self._lines = not quiet and not self.console.is_terminal
        self._began = self._said = time.monotonic()
        self._all = self.bars.add_task("all steps", total=None, note="")
        self._one = self.bars.add_task("", total=None, note="", visible=False)

    def __enter__(self) -> "Watcher":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def step(self, step: "Step", number: int, total: int) -> None:
        """A step of a run begins."""
        self.bars.update(self._all, completed=number - 1, total=total)
        self.begin(step.label, f"[{number}/{total}] ")

    def begin(self, label: str, before: str = "") -> None:
        """Work that is shown by one bar begins."""
        from rich.markup import escape

        self.bars.reset(self._one, total=None, description=escape(label), visible=True)
        self._began = self._said = time.monotonic()
        if self._lines:
            self.console.print(before + label, markup=False, highlight=False)

    def progress(self, done: int, total: int, note: str) -> None:
        """The work goes on; without a terminal that is said twice a minute."""
        self.bars.update(self._one, completed=done, total=total or None, note=note)
        now = time.monotonic()
        if self._lines and 0 < done < total and now - self._said > 30:
            self._said = now
            left = (now - self._began) / done * (total - done)
            self.console.print(f"  {done}/{total} {note}, {_duration(left)} left", markup=False, highlight=False)

    def failure(self, step: "Step", error: Exception) -> None:
        """A step failed; the run goes on with what does not need it."""
        self.console.print(f"failed: {step.label}\n{error}", markup=False, highlight=False)


def run_experiment(
    path: Path,
    overrides: Sequence[str],
    data_dir: str | None,
    out: Path | None,
    store: Path | None,
    on: str,
    dry_run: bool,
    as_json: bool,
) -> dict[str, Any] | None:
    """`lingraft run` and `lingraft quickstart`."""
    from lingraft.runner import Events, run

    experiment = load_experiment(path, overrides)
    if data_dir is not None:
        experiment = experiment.model_copy(update={"data_dir": data_dir})
    out = out or Path("runs") / experiment.name
    if dry_run:
        return _dry_run(experiment, out, store, as_json)
    _notices(experiment, as_json)
    with Watcher(as_json) as watcher, writing(out):
        outcome = run(
            experiment,
            out,
            store=store,
            on=on,
            events=Events(watcher.step, watcher.progress, watcher.failure),
        )
    if outcome.ran == 0:
        _errors().print(f"nothing to do: all {outcome.kept} steps are finished", highlight=False)
    return show_report(out, as_json, fresh=outcome.ran > 0)


def _notices(experiment: Experiment, quiet: bool) -> None:
    from lingraft.tasks.table import choice_task

    task = choice_task(experiment.task, experiment.tasks)
    if task.licence and not quiet:
        _errors().print(f"data: {task.licence}", style="dim", markup=False, highlight=False)


def _dry_run(experiment: Experiment, out: Path, store: Path | None, as_json: bool) -> dict[str, Any] | None:
    from lingraft.locating import locate
    from lingraft.plan import make_plan
    from lingraft.report.terminal import lines
    from lingraft.runner import estimates, pending
    from lingraft.store import Store

    plan = make_plan(experiment, locate(experiment.backbone))
    shelf = Store(store or out.parent / "store")
    found = estimates(plan, shelf)
    waiting = [{"kind": s.kind, "key": s.key, "label": s.label} for s in pending(plan, shelf)]
    if as_json:
        return {**found, "pending": waiting}
    console = Console()
    trainings = [w["label"] for w in waiting if w["kind"] == "train"]
    if trainings:
        console.print("would train:", style="bold")
        for label in trainings:
            console.print(f"  {label}", markup=False, highlight=False)
    rows = [[kind, str(n["pending"]), str(n["finished"])] for kind, n in found["steps"].items()]
    lines(["steps", "to do", "finished"], rows, console)
    console.print("time: " + _duration(found["seconds"]), highlight=False)
    return None


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown until this model has been measured here (run once, or wait for the first steps)"
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def _own_tasks(path: Path | None) -> dict[str, CustomTask]:
    if path is None:
        return {}
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the tasks cannot be read ({error.strerror})", where=path) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"this is not YAML: {getattr(error, 'problem', None) or error}", where=path) from None
    if not isinstance(tree, dict) or not isinstance(tree.get("tasks"), dict):
        raise ConfigError("this file has no `tasks:` mapping", where=path)
    return {str(name): validated(CustomTask, value, where=path) for name, value in tree["tasks"].items()}


def _groups(overrides: Sequence[str], groups: dict[str, type[Config]]) -> dict[str, Any]:
    """`group.key=value` overrides as config values."""
    trees: dict[str, dict[str, Any]] = {name: {} for name in groups}
    for text in overrides:
        parts, value = parse_override(text)
        if parts[0] not in groups:
            raise ConfigError(f"unknown key '{'.'.join(parts)}'", remedy=suggestion(parts[0], groups))
        if len(parts) != 2:
            raise ConfigError(f"'{text}' sets no single value", remedy=f"write {parts[0]}.key=value")
        trees[parts[0]][parts[1]] = value
    return {name: validated(model, trees[name]) for name, model in groups.items() if name != "reference"} | (
        {"reference": trees["reference"]} if "reference" in groups else {}
    )


def _backbone(options: dict[str, Any]) -> Any:
    from lingraft.locating import locate

    names = ("model", "revision", "dtype", "device", "trust_remote_code")
    return locate(validated(BackboneConfig, {k: options[k] for k in names}))


def train_adapter(overrides: Sequence[str], out: Path, as_json: bool, **options: Any) -> dict[str, Any] | None:
    """`lingraft train`."""
    from lingraft.store import appearing, write_json
    from lingraft.tasks.choice import bundled_or
    from lingraft.tasks.table import choice_task

    groups = _groups(overrides, {"adapter": AdapterConfig, "training": TrainingConfig, "reference": ReferenceConfig})
    adapter, values = groups["adapter"], groups["training"]
    data_dir, language = bundled_or(options["data_dir"]), options["language"]
    plain_text = options["task"] == "clm"
    if plain_text:
        if options["text"] is None or data_dir is None:
            raise UserError(
                "clm needs --data-dir and --text",
                remedy="for example --data-dir bundled --text udhr/{language}.txt",
            )
        reference = validated(ReferenceConfig, {**groups["reference"], "text": options["text"]})
        what: dict[str, Any] = {"reference": reference.key("data_dir")}
    else:
        task = choice_task(options["task"], _own_tasks(options["tasks_file"]))
        sources = task.sources(language, "train", data_dir)
        what = {"task": task.spec(), "rows": [s.digest() for s in sources]}
    located = _backbone(options)
    from lingraft.backbones import Backbone, training_stack

    training_stack()
    from lingraft import batching, training
    from lingraft.tasks.reference import segments, text_path
    from lingraft.tasks.sources import read_lines

    record = {
        "kind": "train",
        **what,
        "language": language,
        "backbone": located.digest,
        "adapter": adapter.key(),
        "training": values.key(),
        "seed": options["seed"],
        "start_from": str(options["start_from"]) if options["start_from"] else None,
    }
    with appearing(out, record) as work, Watcher(as_json) as watcher:
        backbone = Backbone(located)
        if plain_text:
            lines = read_lines(text_path(reference.text, language, data_dir))  # pyright: ignore[reportArgumentType]
            sequences = batching.text_sequences(segments(lines, backbone.encode, reference, backbone.prefix))
        else:
            sequences = batching.answer_sequences(backbone, task.examples(sources), values.max_length)
        watcher.begin(f"train {options['task']} {language}")
        summary = training.train(
            backbone,
            sequences,
            work,
            adapter=adapter,
            training=values,
            seed=options["seed"],
            start_from=options["start_from"],
            provenance={k: v for k, v in record.items() if k in ("language", "training")} | {"task": options["task"]},
            progress=lambda done, total, loss: watcher.progress(done, total, f"loss {loss:.3f}"),
        )
        write_json(work / "extra.json", summary)
    if as_json:
        return {"out": str(out), **summary}
    _errors().print(
        f"{out}: {summary['steps']} steps, {summary['tokens']} tokens in {summary['seconds']} s, loss {summary['loss']:.3f}",
        markup=False,
        highlight=False,
    )
    return None


def evaluate_model(out: Path, as_json: bool, **options: Any) -> dict[str, Any] | None:
    """`lingraft evaluate`."""
    from lingraft.adapter import Adapter, content_digest
    from lingraft.report.tables import percent
    from lingraft.store import appearing
    from lingraft.tasks.choice import bundled_or, subset
    from lingraft.tasks.table import choice_task

    task = choice_task(options["task"], _own_tasks(options["tasks_file"]))
    sources = task.sources(options["language"], options["split"], bundled_or(options["data_dir"]))
    examples = subset(task.examples(sources), options["limit"])
    adapter = Adapter.load(options["adapter"]) if options["adapter"] else None
    located = _backbone(options)
    from lingraft.backbones import Backbone, training_stack

    training_stack()
    from lingraft.evaluation import predict
    from lingraft.predictions import write_evaluation

    record = {
        "kind": "evaluate",
        "task": task.spec(),
        "rows": [s.digest() for s in sources],
        "language": options["language"],
        "split": options["split"],
        "limit": options["limit"],
        "scoring": options["scoring"],
        "backbone": located.digest,
        "adapter": content_digest(options["adapter"]) if options["adapter"] else None,
    }
    with appearing(out, record) as work, Watcher(as_json) as watcher:
        watcher.begin(f"evaluate {task.name} {options['language']}")
        predictions = predict(
            Backbone(located),
            adapter,
            examples,
            scoring=options["scoring"],
            progress=lambda done, total: watcher.progress(done, total, ""),
        )
        scores = write_evaluation(work, predictions, list(task.answers))
    if as_json:
        return {"out": str(out), **scores}
    low, high = scores["accuracy"]["interval"]
    Console().print(
        f"accuracy {percent(scores['accuracy']['value'])} [{percent(low)}, {percent(high)}], "
        f"macro-F1 {percent(scores['macro_f1']['value'])}, gold log-likelihood {scores['gold_log_likelihood']['value']:.4f}, "
        f"{scores['items']} items",
        markup=False,
        highlight=False,
    )
    return None


def save_divergence(target_ref: Path, source_ref: Path, out: Path, as_json: bool) -> dict[str, Any] | None:
    """`lingraft divergence`."""
    from lingraft.merging import divergence_of, similarity

    found, provenance = divergence_of(target_ref, source_ref)
    alike = similarity(found.target_ref, found.source_ref)
    found.save(out, provenance)
    if as_json:
        return {"out": str(out), "cosine": alike["cosine"], "norms": alike["norms"]}
    cosine = "undefined (one of them is zero)" if alike["cosine"] is None else f"{alike['cosine']:.3f}"
    _errors().print(f"{out}: cosine of the two updates {cosine}", markup=False, highlight=False)
    return None


def merge_adapters(
    task: Path,
    target_ref: Path | None,
    source_ref: Path | None,
    divergence_dir: Path | None,
    weight: float,
    space: str,
    modules: str,
    out_rank: int | None,
    verify: bool,
    out: Path,
    as_json: bool,
) -> dict[str, Any] | None:
    """`lingraft merge`."""
    from lingraft import merging
    from lingraft.adapter import Divergence, content_digest
    from lingraft.store import appearing, write_json

    if divergence_dir is not None and (target_ref or source_ref):
        raise UserError("give either --divergence or the two references, not both")
    if divergence_dir is not None:
        divergence = Divergence.load(divergence_dir)
        inputs = {"divergence": content_digest(divergence_dir)}
    elif target_ref is None or source_ref is None:
        raise UserError("the divergence is missing", remedy="give --target-ref and --source-ref, or --divergence")
    else:
        divergence, made = merging.divergence_of(target_ref, source_ref)
        inputs = made["inputs"]
    merged, provenance = merging.graft(
        task, divergence, inputs, weight, space=space, modules=modules, out_rank=out_rank
    )
    with appearing(out, {"kind": "merge", **provenance}) as work:
        merged.write(work, provenance)
        kept = merging.energy_kept(merged)
        write_json(work / "extra.json", {"energy_kept": kept})
    result: dict[str, Any] = {"out": str(out), "energy_kept": kept}
    if verify:
        result["relative_error"] = merging.verify(out, task, divergence, weight, space=space, modules=modules)
    if as_json:
        return result
    said = [f"{out}: λ = {weight:g}, {space} space, {len(merged.layout)} sites"]
    if kept:
        said.append(f"energy kept: mean {100 * kept['mean']:.2f} %, least {100 * kept['least']:.2f} %")
    if verify:
        said.append(f"relative error of the weight updates: {result['relative_error']:.2e}")
    _errors().print("\n".join(said), markup=False, highlight=False)
    return None


def inspect_folders(folders: Sequence[Path], as_json: bool) -> dict[str, Any] | None:
    """`lingraft inspect`."""
    from collections import Counter

    from lingraft.adapter import Adapter, Divergence
    from lingraft.merging import similarity
    from lingraft.report.terminal import lines
    from lingraft.store import read_json

    described: list[dict[str, Any]] = []
    loaded: list[Adapter] = []
    for folder in folders:
        sidecar = folder / "lingraft.json"
        is_divergence = sidecar.is_file() and read_json(sidecar).get("kind") == "divergence"
        adapter = Divergence.load(folder)._as_adapter() if is_divergence else Adapter.load(folder)
        loaded.append(adapter)
        described.append(
            {
                "path": str(folder),
                "kind": "divergence" if is_divergence else "adapter",
                "family": adapter.structure,
                "base": adapter.config.get("base_model_name_or_path"),
                "base_digest": (adapter.sidecar.get("backbone") or {}).get("digest"),
                "sites": len(adapter.layout),
                "ranks": dict(sorted(Counter(p.rank for p in adapter.layout.values()).items())),
                "dtype": str(adapter.dtype),
                "init_sha256": adapter.sidecar.get("init_sha256"),
                "norm": similarity(adapter, adapter)["norms"][0],
                "provenance": adapter.sidecar.get("provenance"),
            }
        )
    alike = similarity(loaded[0], loaded[1]) if len(loaded) == 2 else None
    if as_json:
        return {"adapters": described, "similarity": alike}
    console = Console()
    for entry in described:
        lines(
            ["", entry["path"]],
            [[k, str(v)] for k, v in entry.items() if k != "path" and v is not None],
            console,
        )
    if alike:
        rows = [
            [layer, "–" if c is None else f"{c:.3f}"]
            for layer, c in {"all": alike["cosine"], **alike["by_layer"]}.items()
        ]
        lines(["layer", "cosine"], rows, console)
    return None


def show_report(run_dir: Path, as_json: bool, fresh: bool = True) -> dict[str, Any] | None:
    """`lingraft report`: prints the results and writes them beside the manifest."""
    from lingraft.report.results import results
    from lingraft.report.tables import csv_text, markdown
    from lingraft.report.terminal import show
    from lingraft.store import read_json, write_json

    if not fresh and (run_dir / "results.json").is_file():
        if as_json:
            return read_json(run_dir / "results.json")
        _errors().print(f"results: lingraft report {run_dir}", markup=False, highlight=False)
        return None
    found = results(run_dir)
    with writing(run_dir):
        write_json(run_dir / "results.json", found)
        (run_dir / "report.md").write_text(markdown(found), encoding="utf-8")
        (run_dir / "results.csv").write_text(csv_text(found), encoding="utf-8")
        _collect_adapters(found, run_dir / "adapters")
        drawn = _draw(found, run_dir)
    if as_json:
        return found
    show(found, Console())
    names = ["report.md", "results.csv", "results.json", *drawn]
    _errors().print(f"\nwritten to {run_dir}: {', '.join(names)}", markup=False, highlight=False)
    if found["adapters"]:
        _errors().print(f"adapters, as PEFT folders, in {run_dir / 'adapters'}", markup=False, highlight=False)
    return None


def _draw(found: dict[str, Any], run_dir: Path) -> list[str]:
    import importlib.util

    if not found["selections"] or importlib.util.find_spec("matplotlib") is None:
        return []
    from lingraft.report.figures import draw_curves

    draw_curves(found, run_dir / "lambda.svg")
    return ["lambda.svg"]


def _collect_adapters(found: dict[str, Any], target: Path) -> None:
    """Copies the grafted adapters to where a user looks for them, each folder at once."""
    for entry in found["adapters"]:
        name = f"{entry['method']}-{entry['language']}" + (f"-seed{entry['seed']}" if len(found["seeds"]) > 1 else "")
        final, partial = target / name, target / f".{name}.partial"
        mark = final / "step.json"
        source = Path(entry["path"])
        if mark.is_file() and mark.read_bytes() == (source / "step.json").read_bytes():
            continue
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)


def list_tasks(as_json: bool) -> list[dict[str, Any]] | None:
    """`lingraft tasks`."""
    from lingraft.report.terminal import lines
    from lingraft.tasks.table import TASKS

    rows = [
        {"name": t.name, "labels": list(t.answers.values()), "splits": list(t.layouts), "licence": t.licence}
        for t in TASKS.values()
    ]
    rows.append(
        {
            "name": "clm",
            "labels": [],
            "splits": ["text"],
            "licence": "reference task: language modelling on plain text",
        }
    )
    if as_json:
        return rows
    table = [[r["name"], ", ".join(r["labels"]) or "–", ", ".join(r["splits"]), r["licence"] or ""] for r in rows]
    lines(["task", "answers", "splits", "licence"], table, Console())
    return None


def list_methods(as_json: bool) -> list[dict[str, Any]] | None:
    """`lingraft methods`."""
    from lingraft.methods import METHODS
    from lingraft.report.terminal import lines

    if as_json:
        return [
            {"name": m.name, "title": m.title, "says": m.says, "tunes_weight": m.adapter == "graft"}
            for m in METHODS.values()
        ]
    lines(["method", "what it does"], [[m.name, m.says] for m in METHODS.values()], Console())
    return None
