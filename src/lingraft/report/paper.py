"""The figures of the AdaMergeX and FLARE papers beside a run's: only what they print, of the same task, backbone, structure and
method.

What a paper prints only as an average over its tasks is shown as that, and never as the figure of one of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lingraft.config import TEXT_TASKS, parse_yaml
from lingraft.languages import name_of
from lingraft.methods import METHODS, method
from lingraft.protocols import PAPER_TARGETS
from lingraft.report.tables import ALSO, Table, percent
from lingraft.tasks.table import TASKS

FIVE = tuple(PAPER_TARGETS)
"""The AdaMergeX paper's tasks."""
THREE = {"xnli": 5_010, "tydiqa": 921, "nusax": 400}
"""The FLARE paper's tasks, and how many test items they have, in the language that has the most."""
_METRICS = {"nusax": "macro_f1"}
"""What the FLARE paper measures, where it is not our main figure of the task."""
_FILES = {"AdaMergeX": "paper.yaml", "FLARE": "flare.yaml"}
_BACKBONES = {
    "llama-2-7b": ("llama-2-7b", "llama2-7b"),
    "xlm-r": ("xlm-roberta-base", "xlm-r-base"),
    "xlm-r-large": ("xlm-roberta-large", "xlm-r-large"),
    "mt5-xl": ("mt5-xl",),
    "llama-3.1-8b": ("llama-3.1-8b",),
    "gemma-2-9b": ("gemma-2-9b",),
}
"""The papers' backbones, and how names of models spell them."""
_IN_NF4 = ("llama-3.1-8b", "gemma-2-9b")
"""Those whose figures are of weights in 4 bits; the others' are of whole ones."""
_RESTRICTED = {
    frozenset(("attention.query", "attention.value")): "restricted",
    frozenset(("q_proj", "v_proj")): "restricted",
    frozenset(("all",)): "all",
}
_FUSED = {"attention.query", "attention.value"}
_OTHER_MODELS = ("chat", "instruct", "-it")


@dataclass(frozen=True)
class Published:
    """One printed figure.

    Attributes:
        method: Our name of the method.
        title: The method as tables print it.
        task: The task; None: the average over all of the paper's.
        language: `average`, over the task's target languages, or over which of them.
        value: In percent.
        structure: Of the adapter.
        backbone: The model.
        table: Which part of the paper prints it.
        paper: Which paper.
        against: The method that `value` is a difference to; None: it is the figure itself.
        modules: `restricted` or `all`: the merge it is of; None: the paper's own choice, which it does not name.
        targets: The languages it is an average over, where they are not those of the task's main results.
    """

    method: str
    title: str
    task: str | None
    language: str
    value: float
    structure: str
    backbone: str
    table: str
    paper: str
    against: str | None = None
    modules: str | None = None
    targets: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The figure, and what it is a figure of where that is not this task's average."""
        if self.against is not None:
            return f"{_signed(self.value)} against {_title(self.against)}"
        if self.task is None:
            return f"{self.value}, average of {'five' if self.paper == 'AdaMergeX' else 'three'} tasks"
        where = "" if self.language == "average" else f", {self.language}"
        return f"{self.value}{where}"


@cache
def _printed() -> tuple[Published, ...]:
    files = {paper: Path(__file__).with_name(name).read_text(encoding="utf-8") for paper, name in _FILES.items()}
    entries: dict[str, list[dict[str, Any]]] = {paper: parse_yaml(text) for paper, text in files.items()}
    return tuple(
        Published(
            method=name,
            title=_title(name),
            task=entry.get("task"),
            language=entry.get("languages") or ", ".join(map(name_of, entry.get("targets", ()))) or "average",
            value=float(value),
            structure=entry["structure"],
            backbone=entry["backbone"],
            table=entry["part"],
            paper=paper,
            against=entry.get("against"),
            modules=entry.get("modules"),
            targets=tuple(entry.get("targets", ())),
        )
        for paper, theirs in entries.items()
        for entry in theirs
        for name, value in entry["values"].items()
    )


def published(experiment: Mapping[str, Any]) -> list[Published]:
    """What the papers print for an experiment's setting.

    Args:
        experiment: An experiment as plain data, as a run's manifest holds it.

    Returns:
        Figures of its backbone and structure: of its task, and averages over a paper's tasks where it is one of them.
        None at all where source, target languages, items or the base's precision are not the paper's, nor the reference task
        (AdaMergeX), nor what is translated and fused (FLARE).
    """
    backbone = _backbone(experiment["backbone"]["model"])
    precision = "nf4" if backbone in _IN_NF4 else "none"
    evaluation = experiment.get("evaluation") or {}
    if experiment["source"] != "en" or experiment["backbone"].get("quantization", "none") != precision:
        return []
    if evaluation.get("split", "test") != "test":
        return []
    papers = {"AdaMergeX": _as_adamergex, "FLARE": _as_flare}
    setting = {paper for paper, fits in papers.items() if fits(experiment, evaluation)}
    targets = set(experiment["targets"])
    modules = (experiment.get("merge") or {}).get("modules", "all")
    merged = (
        "all" if modules == "all" else _RESTRICTED.get(frozenset([modules] if isinstance(modules, str) else modules))
    )
    function = (experiment.get("fusion") or {}).get("function", "add_relu")
    return [
        row
        for row in _printed()
        if row.paper in setting
        and (row.paper != "AdaMergeX" or _averaged(row, experiment["task"], targets))
        and row.backbone == backbone
        and row.structure == experiment["adapter"]["family"]
        and row.task in (None, experiment["task"])
        and row.modules in (None, merged)
        # Without a name, φ is the experiment's; the paper's is add_relu.
        and (row.method not in ("flare", "flare-mt") or function == "add_relu")
    ]


def _averaged(row: Published, task: str, targets: set[str]) -> bool:
    """Whether an average is over these target languages; a language without data, which the paper prints, is in none of ours."""
    known = set(TASKS[task].languages)
    return targets == set(PAPER_TARGETS[task]) or (bool(row.targets) and targets & known == set(row.targets) & known)


def _as_adamergex(experiment: Mapping[str, Any], evaluation: Mapping[str, Any]) -> bool:
    """Whether items and reference task are the AdaMergeX paper's."""
    reference = (experiment.get("reference") or {}).get("task", "clm")
    sampled = evaluation.get("limit") or evaluation.get("written_limit")
    return experiment["task"] in FIVE and not sampled and reference in TEXT_TASKS


def _as_flare(experiment: Mapping[str, Any], evaluation: Mapping[str, Any]) -> bool:
    """Whether languages, items, translations and fused layers are the FLARE paper's.

    Its lists of languages are not printed where we could read them: they are taken to be all that the task's test set has, as the
    authors' code names the tags of all of them.
    """
    name, translation = experiment["task"], experiment.get("translation") or {}
    if name not in THREE:
        return False
    task, fused = TASKS[name], (experiment.get("fusion") or {}).get("modules", _FUSED)
    limits = (evaluation.get("limit") or task.sample.get("test"), evaluation.get("written_limit"))
    return (
        set(experiment["targets"]) == set(task.languages) - {"en"}
        and all(limit is None or limit >= THREE[name] for limit in limits)
        and bool(translation.get("model") or translation.get("files"))
        and {"train", "test"} <= set(translation.get("splits") or ("train", "test"))
        and set(fused) == _FUSED
    )


def beside(found: dict[str, Any]) -> Table:
    """Methods: ours, on average over the targets, and the paper's.

    Args:
        found: The figures of a run, see `results.results`.

    Returns:
        A header and rows: our methods in their order, then what only the paper has. No rows where it prints nothing of the kind.
    """
    printed = published(found["experiment"])
    task = found["experiment"]["task"]
    paper = next((row.paper for row in printed), None)
    metric = _METRICS.get(task) if paper == "FLARE" else None
    measured = f", {ALSO[metric]}" if metric else ""
    header = ["method", f"ours, {task}{measured}", f"{paper} paper"]
    if not printed:
        return header, []
    names = dict.fromkeys([*found["methods"], *(row.method for row in printed)])
    rows: list[list[str]] = []
    for name in names:
        theirs = [row for row in printed if row.method == name]
        ours = _ours(found, name, next((row.against for row in theirs if row.against), None), metric)
        rows.append([_title(name), ours, "; ".join(row.text for row in theirs) or "–"])
    return header, rows


def _ours(found: dict[str, Any], name: str, against: str | None, metric: str | None) -> str:
    """Our average, and its difference to another method where the paper prints that."""
    if name not in found["methods"]:
        return "not run"
    value = _average(found, name, metric)
    other = _average(found, against, metric) if against and against in found["methods"] else None
    if value is None:
        return "no data"
    difference = "" if other is None else f", {_signed(100 * (value - other))} against {_title(str(against))}"
    return f"{percent(value)}{difference}"


def _average(found: dict[str, Any], name: str, metric: str | None) -> float | None:
    """The main figure's average over the targets, or another figure's."""
    row = found["methods"][name]
    if metric is None or found.get("metric") == metric:
        return _value(row["average"])
    cells = [row["languages"].get(code, {}).get("also", {}).get(metric) for code in found["experiment"]["targets"]]
    return None if None in cells else sum(cells) / len(cells)


def _value(cell: dict[str, Any] | None) -> float | None:
    """A cell's figure, a share of 1; runs of earlier versions call it accuracy."""
    if not cell:
        return None
    return cell["value"] if "value" in cell else cell["accuracy"]


def _backbone(model: str) -> str | None:
    name = model.lower().rstrip("/").rpartition("/")[2]
    if any(word in name for word in _OTHER_MODELS):
        return None
    return next((family for family, spellings in _BACKBONES.items() if any(s in name for s in spellings)), None)


def _title(name: str) -> str:
    return method(name).title if name.partition(":")[0] in METHODS else name


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")
