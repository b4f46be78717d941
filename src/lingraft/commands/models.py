"""`lingraft train` and `evaluate`: the verbs that load a base model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lingraft.commands.watching import Watcher, stderr
from lingraft.config import (
    TEXT_TASKS,
    AdapterConfig,
    BackboneConfig,
    Config,
    CustomTask,
    ReferenceConfig,
    TrainingConfig,
    parse_override,
    parse_yaml,
    validated,
)
from lingraft.errors import ConfigError, UserError, suggestion


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

    names = ("model", "revision", "dtype", "device", "trust_remote_code", "quantization")
    return locate(validated(BackboneConfig, {k: options[k] for k in names}))


def train_adapter(overrides: Sequence[str], out: Path, as_json: bool, **options: Any) -> dict[str, Any] | None:
    """`lingraft train`."""
    from lingraft.store import appearing, write_json
    from lingraft.tasks.items import subset
    from lingraft.tasks.reference import reference_text
    from lingraft.tasks.sources import bundled_or
    from lingraft.tasks.table import find_task

    overrides = [f"adapter.family={options['adapter']}", *overrides]
    groups = _groups(overrides, {"adapter": AdapterConfig, "training": TrainingConfig, "reference": ReferenceConfig})
    adapter, values = groups["adapter"], groups["training"]
    data_dir, language = bundled_or(options["data_dir"]), options["language"]
    plain_text, head = options["task"] in TEXT_TASKS, None
    if plain_text:
        if options["text"] is None or data_dir is None:
            raise UserError(
                f"{options['task']} needs --data-dir and --text",
                remedy="for example --data-dir bundled --text udhr/{language}.txt",
            )
        tree = {**groups["reference"], "task": options["task"], "text": options["text"]}
        reference = validated(ReferenceConfig, tree)
        text = reference_text(reference, language, data_dir)
        what: dict[str, Any] = {"reference": reference.key("text", "data_dir"), "text": text.digest()}
    else:
        task = find_task(options["task"], _own_tasks(options["tasks_file"]))
        sources = task.sources(language, "train", data_dir)
        what = {"task": task.spec(options["prompt"]), "rows": [s.digest() for s in sources]}
    located = _backbone(options)
    from lingraft.backbones import Backbone, training_stack

    training_stack()
    from lingraft import reading, training
    from lingraft.heads import Head
    from lingraft.serving import served_head

    record = {
        "kind": "train",
        **what,
        "language": language,
        "backbone": located.digest,
        "dtype": options["dtype"],
        "quantization": options["quantization"],
        "adapter": adapter.key(),
        "training": values.key(),
        "seed": options["seed"],
        "start_from": str(options["start_from"]) if options["start_from"] else None,
    }
    with appearing(out, record) as work, Watcher(as_json) as watcher:
        backbone = Backbone(located)
        counts: dict[str, Any] = {}
        if plain_text:
            sequences = reading.of_text(backbone, text.lines(), reference)
        else:
            if backbone.kind == "encoder":
                head = Head(**served_head(task))
            items = subset(task.examples(sources, language=language, prompt=options["prompt"]), values.limit)
            sequences, counts = reading.of_items(backbone, items, values, head)
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
            head=head,
        )
        summary |= counts
        write_json(work / "extra.json", summary)
    if as_json:
        return {"out": str(out), **summary}
    stderr().print(
        f"{out}: {summary['steps']} steps, {summary['tokens']} tokens in {summary['seconds']} s, loss {summary['loss']:.3f}",
        markup=False,
        highlight=False,
    )
    return None


def evaluate_model(out: Path, as_json: bool, **options: Any) -> dict[str, Any] | None:
    """`lingraft evaluate`."""
    from lingraft.adapter import Adapter, content_digest
    from lingraft.store import appearing
    from lingraft.tasks.items import subset
    from lingraft.tasks.sources import bundled_or
    from lingraft.tasks.table import find_task

    task, prompt, split = (
        find_task(options["task"], _own_tasks(options["tasks_file"])),
        options["prompt"],
        options["split"],
    )
    sources = task.sources(options["language"], split, bundled_or(options["data_dir"]))
    limit = options["limit"] or task.sample.get(split)
    examples = subset(task.examples(sources, language=options["language"], prompt=prompt), limit)
    adapter = Adapter.load(options["adapter"]) if options["adapter"] else None
    located = _backbone(options)
    from lingraft.backbones import Backbone, training_stack

    training_stack()
    from lingraft.evaluation import Asking, ask
    from lingraft.locating import architecture_of
    from lingraft.predictions import write_answers
    from lingraft.serving import served_head

    if architecture_of(located) == "encoder":
        served_head(task)
    wording = task.prompt(prompt)
    scoring = "generation" if task.kind != "choice" or wording.generate else options["scoring"]
    record = {
        "kind": "evaluate",
        "task": task.spec(prompt),
        "rows": [s.digest() for s in sources],
        "language": options["language"],
        "split": split,
        "limit": limit,
        "scoring": scoring,
        "normalised": options["normalised"],
        "max_length": options["max_length"],
        "dtype": options["dtype"],
        "quantization": options["quantization"],
        "backbone": located.digest,
        "adapter": content_digest(options["adapter"]) if options["adapter"] else None,
    }
    with appearing(out, record) as work, Watcher(as_json) as watcher:
        watcher.begin(f"evaluate {task.name} {options['language']}")
        said = ask(
            Backbone(located),
            adapter,
            examples,
            Asking(
                scoring=scoring,
                normalised=options["normalised"],
                new_tokens=wording.new_tokens,
                stop=wording.stop,
                max_length=options["max_length"],
            ),
            progress=lambda done, total: watcher.progress(done, total, ""),
        )
        scores = write_answers(work, said, task.rule(prompt), options["language"], list(task.answers))
    if as_json:
        return {"out": str(out), **scores}
    Console().print(_figures(scores), markup=False, highlight=False, soft_wrap=True)
    return None


def _figures(scores: dict[str, Any]) -> str:
    """A line of all figures: shares in percent, with their intervals."""
    from lingraft.report.tables import ALSO, METRICS, percent

    said: list[str] = []
    for name, title in (METRICS | ALSO).items():
        if name not in scores or (name == "truncated" and not scores[name]["value"]):
            continue
        low, high = scores[name].get("interval") or (None, None)
        bounds = "" if low is None else f" [{percent(low)}, {percent(high)}]"
        said.append(f"{title} {percent(scores[name]['value'])}{bounds}")
    if "gold_log_likelihood" in scores:
        said.append(f"gold log-likelihood {scores['gold_log_likelihood']['value']:.4f}")
    return ", ".join([*said, f"{scores['items']} items"])
