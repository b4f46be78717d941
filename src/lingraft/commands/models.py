"""`lingraft train` and `evaluate`: the verbs that load a base model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from lingraft import processes
from lingraft.adapter import Adapter, content_digest
from lingraft.cards import hub_datasets
from lingraft.commands.counterparts import OPTIONS, SOURCE, Counterparts, counterparts, refuse_unread, spelt
from lingraft.commands.watching import Watcher, stderr
from lingraft.config import (
    TEXT_TASKS,
    AdapterConfig,
    BackboneConfig,
    Config,
    CustomTask,
    FusionConfig,
    MixupConfig,
    ReferenceConfig,
    SpeedConfig,
    TrainingConfig,
    parse_override,
    parse_yaml,
    validated,
)
from lingraft.digests import digest_file, digest_value
from lingraft.errors import ConfigError, UserError, suggestion
from lingraft.fusion.stages import TENSORS, SecondStage, second_adapter, second_stage
from lingraft.stacks import is_stack, load_stack, stack_digest

if TYPE_CHECKING:
    from lingraft.tasks.task import Task


def _own_tasks(path: Path | None) -> dict[str, CustomTask]:
    if path is None:
        return {}
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"the tasks cannot be read ({error.strerror})",
            where=path,
            remedy="give the path of a YAML file that you may read",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"this is not YAML: {getattr(error, 'problem', None) or error}",
            where=path,
            remedy="correct the line: blanks, brackets and colons are the usual causes",
        ) from None
    if not isinstance(tree, dict) or not isinstance(tree.get("tasks"), dict):
        raise ConfigError(
            "this file has no `tasks:` mapping",
            where=path,
            remedy="write the tasks below `tasks:`, as in an experiment (docs/tasks.md)",
        )
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


_ASKED = ("compile", "attention", "kernels")
"""The values of `speed` that mean something where nothing is trained."""


def _check_speed(speed: SpeedConfig, family: str, second: str | None) -> None:
    """Refuses what one training cannot have.

    Raises:
        UserError: There is some of it.
    """
    if "together" in speed.model_fields_set:
        raise UserError(
            "speed.together: one adapter is trained here", remedy="leave it out: lingraft run trains several"
        )
    lost = speed.lost_behind_prefixes
    if lost and (family == "prefix" or second in ("fused", "fused-mt", "mixup")):
        why = "--adapter prefix" if family == "prefix" else f"--second {second}"
        raise UserError(f"{', '.join(f'speed.{name}' for name in lost)}: not with {why}", remedy="leave it out")


def _backbone(options: dict[str, Any]) -> Any:
    from lingraft.locating import locate

    names = ("model", "revision", "dtype", "device", "trust_remote_code", "quantization")
    return locate(validated(BackboneConfig, {k: options[k] for k in names}))


_SECOND: dict[str, tuple[Any, Any]] = {
    "lora": ("lora", "alone"),
    "concatenated": ("lora", "concatenated"),
    "fused": ("fused", "beside"),
    "fused-mt": ("fused-mt", "itself"),
    "mixup": ("mixup", "beside"),
}
"""What `--second` names: the kind of second stage, and what is read of counterparts."""
_PLACES = frozenset({"modules", "plain"})
_FUSES = {
    "fused": frozenset(FusionConfig.model_fields) - {"cache", "cache_limit", "encoder", "encoder_revision"},
    "fused-mt": frozenset({"function", "encoder", "encoder_revision"}) | _PLACES,
}
"""The values of `fusion` that a kind of second stage reads; others read where it has its LoRA."""


def _check_one_stage(options: dict[str, Any], groups: dict[str, Any]) -> None:
    """Refuses what only a second stage reads, and to go on from one as if it were the only one.

    Raises:
        UserError: There is some of it.
    """
    given = [name for name in ("second", *OPTIONS) if options[name] is not None]
    said = [spelt(given)] if given else []
    said += [f"{name}.{key}" for name in ("fusion", "mixup") for key in sorted(groups[name].model_fields_set)]
    if said:
        raise UserError(f"{', '.join(said)}: of a second stage", remedy="give --first-stage, or leave it out")
    if options["start_from"] is not None and Adapter.load(options["start_from"]).sidecar.get("second") is not None:
        raise UserError(
            "the adapter to start from stands on a first stage",
            where=options["start_from"],
            remedy="start from another",
        )


def _check_two_stages(options: dict[str, Any], groups: dict[str, Any]) -> None:
    """Refuses what a second stage would not read.

    Raises:
        UserError: There is some of it.
    """
    name = options["second"]
    if options["task"] in TEXT_TASKS:
        raise UserError("a second stage learns a task, not plain text", remedy="leave --first-stage out")
    if options["start_from"] is not None:
        raise UserError("--start-from: a second stage starts anew, on --first-stage", remedy="leave it out")
    if groups["adapter"].family != "lora":
        raise UserError(f"a second stage is LoRA on LoRA, not {groups['adapter'].family}", remedy="leave --adapter out")
    if "modules" in groups["adapter"].model_fields_set:
        raise UserError("adapter.modules: a second stage has its own", remedy="set fusion.modules and fusion.plain")
    unread = [f"fusion.{key}" for key in sorted(groups["fusion"].model_fields_set - _FUSES.get(name, _PLACES))]
    unread += [f"mixup.{key}" for key in sorted(groups["mixup"].model_fields_set) if name != "mixup"]
    if unread:
        raise UserError(f"{', '.join(unread)}: not read by --second {name}", remedy="leave it out")


def _stage(options: dict[str, Any], groups: dict[str, Any], source: str) -> tuple[SecondStage, dict[str, Any]]:
    """The second stage that is asked for, and the digest of its translation encoder, where it has one.

    Raises:
        AdapterError: The first stage cannot be one.
    """
    from lingraft.locating import locate

    (kind, form), fusion, reads = _SECOND[options["second"]], groups["fusion"], {}
    if kind == "fused-mt":
        encoder = locate(BackboneConfig(model=fusion.encoder, revision=fusion.encoder_revision))
        # Its commit is kept with the adapter.
        fusion = fusion.model_copy(update={"encoder_revision": encoder.config.revision})
        reads = {"encoder": encoder.digest}
    first = Adapter.load(options["first_stage"])
    stage = SecondStage(
        first,
        kind,
        fusion if kind in ("fused", "fused-mt") else None,
        groups["mixup"] if kind == "mixup" else None,
        options["language"],
        form=form,
        source=source,
    )
    return stage, reads


def train_adapter(overrides: Sequence[str], out: Path, as_json: bool, **options: Any) -> dict[str, Any] | None:
    """`lingraft train`, in one process or in each of several that a launcher started."""
    with processes.said_once():
        return _trained(overrides, out, as_json, options)


def _trained(overrides: Sequence[str], out: Path, as_json: bool, options: dict[str, Any]) -> dict[str, Any] | None:
    from lingraft.store import write_json
    from lingraft.tasks.items import subset
    from lingraft.tasks.reference import reference_text
    from lingraft.tasks.sources import bundled_or
    from lingraft.tasks.table import find_task

    overrides = [f"adapter.family={options['adapter']}", *overrides]
    models: dict[str, type[Config]] = {"adapter": AdapterConfig, "training": TrainingConfig}
    models |= {"reference": ReferenceConfig, "fusion": FusionConfig, "mixup": MixupConfig, "speed": SpeedConfig}
    groups = _groups(overrides, models)
    adapter, values = groups["adapter"], groups["training"]
    data_dir, language = bundled_or(options["data_dir"]), options["language"]
    plain_text, head, items, second = options["task"] in TEXT_TASKS, None, [], None
    counts: dict[str, Any] = {}
    if options["first_stage"] is None:
        _check_one_stage(options, groups)
    else:
        options["second"] = options["second"] or "fused"
        _check_two_stages(options, groups)
    _check_speed(groups["speed"], adapter.family, options["second"])
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
        items = task.examples(sources, language=language, prompt=options["prompt"])
        if options["first_stage"] is not None:
            read = _learned_beside(task, data_dir, options)
            second, reads = _stage(options, groups, read.language)
            where = f"{task.name}, train: {language} and {read.language}"
            items, skipped = read.beside(items, options["prompt"], where)
            counts |= {"without_counterpart": skipped} if skipped else {}
            what |= {"second": second.notes(), "counterparts": read.record(), **reads}
            adapter = second_adapter(adapter, groups["fusion"])
        items = subset(items, values.limit)
        if options["second"] == "concatenated":  # Two texts in one input need the room of two.
            values = values.model_copy(update={"max_length": 2 * values.max_length})
    beneath = load_stack(options["beneath"])
    located = _backbone(options)
    from lingraft.backbones import Backbone, training_stack

    training_stack()
    from lingraft import reading, training
    from lingraft.heads import Head
    from lingraft.locating import architecture_of
    from lingraft.serving import served_head

    if options["second"] == "mixup" and architecture_of(located) == "decoder":
        raise UserError(
            "X-Mixup mixes the states of an encoder, and this backbone is a decoder",
            remedy="use --second fused, concatenated or lora",
        )
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
        **({"beneath": [stack_digest(folder) for folder in options["beneath"]]} if beneath else {}),
    }
    with _making(out, record) as work, Watcher(as_json or not processes.is_main()) as watcher:
        backbone = Backbone(located, groups["speed"])
        if plain_text:
            sequences = reading.of_text(backbone, text.lines(), reference)
        else:
            if backbone.kind == "encoder":
                head = Head(**served_head(task))
            sequences, cut = reading.of_items(backbone, items, values, head)
            counts |= cut
        watcher.begin(f"train {options['task']} {language}")
        known = {k: v for k, v in record.items() if k in ("language", "training")}
        found = hub_datasets(what.get("rows", ()))
        summary = training.train(
            backbone,
            sequences,
            work,
            adapter=adapter,
            training=values,
            seed=options["seed"],
            start_from=options["start_from"],
            second=second,
            beneath=beneath,
            provenance={**known, "task": options["task"], **counts, **({"datasets": found} if found else {})},
            progress=lambda done, total, loss: watcher.progress(done, total, f"loss {loss:.3f}", loss),
            head=head,
        )
        summary |= counts
        write_json(work / "extra.json", summary)
    if not processes.is_main():
        return None
    if as_json:
        return {"out": str(out), **summary}
    said = f"{out}: {summary['steps']} steps, {summary['tokens']} tokens in {summary['seconds']} s"
    said += "" if summary["loss"] is None else f", loss {summary['loss']:.3f}"
    stderr().print(said + _left_out(counts.get("without_counterpart", 0)), markup=False, highlight=False)
    return None


def _making(out: Path, record: dict[str, Any]) -> AbstractContextManager[Path]:
    """The folder that appears, made by one process."""
    from lingraft.store import appearing

    return processes.made_once(lambda: appearing(out, record))


def _left_out(count: int) -> str:
    return f"; {count} items without counterpart left out" if count else ""


def _learned_beside(task: "Task", data_dir: Path | None, options: dict[str, Any]) -> Counterparts:
    """What a second stage reads of its items' counterparts."""
    form = _SECOND[options["second"]][1]
    if form in ("alone", "itself"):
        refuse_unread(options, f"--second {options['second']} reads the items alone")
        return Counterparts(form)
    remedy = "give --source-language or --source-data, or --second lora, which needs none"
    return counterparts(form, task, "train", data_dir, options, SOURCE, remedy)


def _asked_beside(
    stage: SecondStage | None, task: "Task", data_dir: Path | None, options: dict[str, Any]
) -> Counterparts:
    """What is read of items' counterparts when an adapter is asked: as it was trained, or nothing."""
    if options["no_source"]:
        refuse_unread(options, "--no-source was given")
        return Counterparts()
    if stage is None:
        refuse_unread(options, "there is no adapter of two languages")
        return Counterparts()
    if stage.reads in ("alone", "itself"):
        refuse_unread(options, "this adapter reads the items alone")
        return Counterparts(stage.reads)
    remedy = "give --source-language or --source-data, or --no-source to ask the adapter as plain LoRA"
    return counterparts(stage.reads, task, options["split"], data_dir, options, stage.source or SOURCE, remedy)


def _adapter_record(folders: Sequence[Path], stage: SecondStage | None) -> dict[str, Any]:
    """What of adapters can change a result."""
    if not folders:
        return {"adapter": None}
    if len(folders) > 1 or is_stack(folders[0]):
        return {"adapters": [stack_digest(folder) for folder in folders]}
    folder = folders[0]
    if stage is None:
        return {"adapter": content_digest(folder)}
    further = folder / TENSORS
    return {
        "adapter": content_digest(folder),
        "second": stage.notes(),
        "further": digest_file(further) if further.is_file() else None,
    }


def evaluate_model(overrides: Sequence[str], out: Path, as_json: bool, **options: Any) -> dict[str, Any] | None:
    """`lingraft evaluate`, in one process or in each of several that a launcher started."""
    with processes.said_once():
        return _evaluated(overrides, out, as_json, options)


def _evaluated(overrides: Sequence[str], out: Path, as_json: bool, options: dict[str, Any]) -> dict[str, Any] | None:
    from lingraft.store import write_json
    from lingraft.tasks.items import subset
    from lingraft.tasks.sources import bundled_or
    from lingraft.tasks.table import find_task

    speed: SpeedConfig = _groups(overrides, {"speed": SpeedConfig})["speed"]
    if unread := sorted(speed.model_fields_set - set(_ASKED)):
        raise UserError(
            f"{', '.join(f'speed.{name}' for name in unread)}: of a training",
            remedy=f"leave it out; {', '.join(f'speed.{name}' for name in _ASKED)} can be set",
        )
    task, prompt, split = (
        find_task(options["task"], _own_tasks(options["tasks_file"])),
        options["prompt"],
        options["split"],
    )
    data_dir = bundled_or(options["data_dir"])
    sources = task.sources(options["language"], split, data_dir)
    limit = options["limit"] or task.sample.get(split)
    examples = task.examples(sources, language=options["language"], prompt=prompt)
    adapters = load_stack(options["adapter"])
    stage = second_stage(adapters[-1]) if adapters else None
    read = _asked_beside(stage, task, data_dir, options)
    examples, skipped = read.beside(
        examples, prompt, f"{task.name}, {split}: {options['language']} and {read.language}"
    )
    examples = subset(examples, limit)
    located = _backbone(options)
    from lingraft.backbones import Backbone, training_stack

    training_stack()
    from lingraft.evaluation import Asking, Questions, ask
    from lingraft.journal import JOURNAL
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
        **_adapter_record(options["adapter"], stage),
        **({} if stage is None else {"counterparts": read.record()}),
    }
    counts = {"without_counterpart": skipped} if skipped else {}
    with _making(out, record) as work, Watcher(as_json or not processes.is_main()) as watcher:
        watcher.begin(f"evaluate {task.name} {options['language']}")
        asking = Asking(
            scoring=scoring,
            normalised=options["normalised"],
            new_tokens=wording.new_tokens,
            stop=wording.stop,
            max_length=options["max_length"],
        )
        backbone = Backbone(located, speed)
        questions = Questions(backbone, examples, asking)
        journal = questions.journal(work / JOURNAL, digest_value(record))
        said = ask(backbone, adapters, questions, None, lambda done, total: watcher.progress(done, total, ""), journal)
        scores = write_answers(work, said, task.rule(prompt), options["language"], list(task.answers))
        journal.close()
        if counts:
            write_json(work / "extra.json", counts)
    if not processes.is_main():
        return None
    if as_json:
        return {"out": str(out), **scores, **counts}
    Console().print(_figures(scores) + _left_out(skipped), markup=False, highlight=False, soft_wrap=True)
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
