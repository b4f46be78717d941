"""Where a run's figures come from, so that somebody else can have them again: experiment, data, model, steps and their hashes.

Nothing of it says where anything lies on a machine: what is a path from the root becomes the name at its end.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lingraft import __version__
from lingraft.config import Experiment
from lingraft.digests import digest_value
from lingraft.report.headline import model_name
from lingraft.report.readings import Made, harmless, opened, short_path
from lingraft.report.results import manifest_of, metric_of, store_of
from lingraft.report.spending import machine

_MAIN = {
    "train": "adapter_model.safetensors",
    "merge": "adapter_model.safetensors",
    "predict": "predictions.jsonl",
    "score": "scores.json",
    "select": "selected.json",
    "compare": "similarity.json",
    "read": "reading.json",
    "project": "labels.json",
    "translate": "rows.jsonl",
}
"""The file of a kind of step whose hash stands for it; without one, the record's seal does."""
_PATHS = (
    ("data_dir",),
    ("backbone", "model"),
    ("reference", "data_dir"),
    ("reference", "text"),
    ("translation", "model"),
    ("translation", "files"),
    ("fusion", "encoder"),
)
"""The values of an experiment that may be paths."""
_ALWAYS = ("name", "source", "targets", "development", "groups", "methods", "seeds")
"""Values that are written also where they are the defaults: what a table has is to be read, not to be looked up."""


def provenance(run: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Where a run's figures come from.

    Args:
        run: The run's folder.
        found: Its figures, see `results.results`.

    Returns:
        `run` (name, digest of the manifest, plan, versions of lingraft), `backbone`, `experiment_yaml`, which `lingraft run`
        takes, `data` (name and digest of what was read), `environment`, `steps` (`kind`, `label`, `key`, `sha256` of the
        main file, and how many `files`) and the `command`. No absolute path of any machine.
    """
    manifest = manifest_of(run)
    readings = opened(run, store_of(run, manifest), metric_of(manifest))
    steps = readings.made(manifest["steps"])
    experiment = manifest["experiment"]
    versions = sorted({str(step.record["lingraft"]) for step in steps if "lingraft" in step.record})
    return {
        "run": {
            "name": experiment["name"],
            "manifest": found["manifest"],
            "plan": manifest.get("plan"),
            "lingraft": ", ".join(versions) or __version__,
        },
        "backbone": _backbone(manifest),
        "experiment_yaml": experiment_yaml(experiment),
        "data": _data(steps),
        "environment": machine(steps),
        "steps": [_step(step) for step in steps],
        "command": command(experiment),
    }


def command(experiment: dict[str, Any]) -> str:
    """What repeats a run, beside its experiment as a file."""
    name = str(experiment["name"])
    parts = ["lingraft", "run", f"{name}.yaml", "--out", f"runs/{name}"]
    if (experiment.get("backbone") or {}).get("trust_remote_code"):
        parts.append("backbone.trust_remote_code=true")
    return shlex.join(parts)


def experiment_yaml(experiment: dict[str, Any]) -> str:
    """An experiment as a file that `lingraft run` takes, without values that are defaults.

    Paths from the root become the names at their ends. That code of the model's is run is left to the command, as it must be.
    """
    tree, renamed = _written(experiment), []
    for path in _paths(tree):
        *above, last = path
        place = tree
        for part in above:
            place = place[part]
        if (short := short_path(place[last])) != place[last]:
            place[last] = short
            renamed.append(".".join(path))
    text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    notes = [f"# {name} was a path of the machine it ran on: put your own in its place\n" for name in renamed]
    return "".join(notes) + text


class _Dumper(yaml.SafeDumper):
    """YAML in which texts that look like numbers are quoted: `2e-4` is one for lingraft, and none for PyYAML."""


_NUMERAL = re.compile(r"[-+.\d][-+.\w]*")


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "'" if _NUMERAL.fullmatch(value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def _written(experiment: dict[str, Any]) -> dict[str, Any]:
    """An experiment's values as a file holds them; of what this version does not know, all as they are."""
    try:
        known = Experiment.model_validate(experiment)
    except ValueError:
        tree = yaml.safe_load(yaml.safe_dump(experiment))  # A copy, down to the last list.
    else:
        tree = known.model_dump(mode="json", exclude_defaults=True)
        whole = known.model_dump(mode="json", include=set(_ALWAYS))
        order = [name for name in Experiment.model_fields if name in tree or whole.get(name)]
        if known.protocol is not None:  # It would fill in what is empty on purpose.
            order = [name for name in Experiment.model_fields if name in tree or name in whole]
        tree = {name: tree[name] if name in tree else whole[name] for name in order}
    if isinstance(tree.get("backbone"), dict):
        tree["backbone"].pop("trust_remote_code", None)
    return tree


def _paths(tree: dict[str, Any]) -> list[tuple[str, ...]]:
    """The places of an experiment's values that are texts and may be paths."""
    own = [
        ("tasks", name, "files", split)
        for name, task in (tree.get("tasks") or {}).items()
        if isinstance(task, dict) and isinstance(task.get("files"), dict)
        for split in task["files"]
    ]
    found: list[tuple[str, ...]] = []
    for path in (*_PATHS, *own):
        value: Any = tree
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str):
            found.append(path)
    return found


def _backbone(manifest: dict[str, Any]) -> dict[str, Any]:
    asked, found = manifest["experiment"].get("backbone") or {}, manifest["backbone"]
    digest = str(found["digest"])
    revision = digest.rpartition("@")[2] if digest.startswith("hub:") else asked.get("revision")
    quantised = asked.get("quantization")
    return {
        "name": model_name(str(found["name"])),
        "digest": digest,
        "revision": revision,
        "dtype": asked.get("dtype"),
        "quantization": None if quantised == "none" else quantised,
    }


def _data(steps: Sequence[Made]) -> list[dict[str, str]]:
    """What the steps read beside the base model, each once."""
    found: dict[tuple[str, str], None] = {}
    for step in steps:
        for name, digest in (step.record.get("reads") or {}).items():
            if name != "backbone":
                found[_read(step.config, str(name)), harmless(digest)] = None
    return [{"name": name, "digest": digest} for name, digest in found]


def _read(config: dict[str, Any], name: str) -> str:
    """What to call something that a step read."""
    if name in ("model", "encoder"):
        value = config.get("model") or ((config.get("second") or {}).get("fusion") or {}).get("encoder")
        return f"translation model {model_name(str(value))}" if value else "translation model"
    language = str(config.get("language") or "")
    if name == "text":
        return f"reference text, {language}"
    task = config.get("task")
    task = task.get("task") if isinstance(task, dict) else task
    other = (config.get("counterpart") or {}).get("language") if name == "counterpart_rows" else None
    return " ".join(str(part) for part in (task, other or language, config.get("split")) if part)


def _step(step: Made) -> dict[str, Any]:
    files = step.record.get("files")
    files = files if isinstance(files, dict) else {}
    return {
        "kind": step.kind,
        "label": step.label,
        "key": step.key,
        "sha256": files.get(_MAIN.get(step.kind, "")) or (digest_value(step.record) if step.record else None),
        "files": len(files),
    }
