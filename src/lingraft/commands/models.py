"""`lingraft train` and `evaluate`: the verbs that load a base model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lingraft.commands.watching import Watcher, stderr
from lingraft.config import (
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

    names = ("model", "revision", "dtype", "device", "trust_remote_code")
    return locate(validated(BackboneConfig, {k: options[k] for k in names}))


def train_adapter(overrides: Sequence[str], out: Path, as_json: bool, **options: Any) -> dict[str, Any] | None:
    """`lingraft train`."""
    from lingraft.digests import digest_file
    from lingraft.store import appearing, write_json
    from lingraft.tasks.choice import bundled_or
    from lingraft.tasks.reference import reference_path, segments
    from lingraft.tasks.sources import read_lines
    from lingraft.tasks.table import choice_task

    overrides = [f"adapter.family={options['adapter']}", *overrides]
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
        path = reference_path(reference, language, data_dir)
        what: dict[str, Any] = {"reference": reference.key("text", "data_dir"), "text": digest_file(path)}
    else:
        task = choice_task(options["task"], _own_tasks(options["tasks_file"]))
        sources = task.sources(language, "train", data_dir)
        what = {"task": task.spec(), "rows": [s.digest() for s in sources]}
    located = _backbone(options)
    from lingraft.backbones import Backbone, training_stack

    training_stack()
    from lingraft import batching, training

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
            pieces = segments(read_lines(path), backbone.encode, reference, backbone.prefix)
            sequences = batching.text_sequences(pieces)
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
    stderr().print(
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
    from lingraft.tasks.choice import bundled_or
    from lingraft.tasks.items import subset
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
