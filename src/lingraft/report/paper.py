"""The AdaMergeX paper's figures beside a run's: only what it prints, of the same task, backbone, structure and method.

What it prints only as an average over its five tasks is shown as that, and never as the figure of one of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lingraft.config import TEXT_TASKS, parse_yaml
from lingraft.methods import METHODS
from lingraft.protocols import PAPER_TARGETS
from lingraft.report.tables import Table, percent

FIVE = tuple(PAPER_TARGETS)
"""The paper's tasks."""
_BACKBONES = {
    "llama-2-7b": ("llama-2-7b", "llama2-7b"),
    "xlm-r": ("xlm-roberta-base", "xlm-r-base"),
}
"""The paper's backbones, and how names of models spell them."""
_RESTRICTED = {
    frozenset(("attention.query", "attention.value")): "restricted",
    frozenset(("q_proj", "v_proj")): "restricted",
    frozenset(("all",)): "all",
}
_OTHER_MODELS = ("chat", "instruct")
_TITLES = {"mad-x": "MAD-X", "lf-sft": "LF-SFT"}


@dataclass(frozen=True)
class Published:
    """One printed figure.

    Attributes:
        method: Our name of the method.
        title: The method as tables print it.
        task: The task; None: the average over the paper's five.
        language: `average`, over the task's target languages, or over which of them.
        value: In percent.
        structure: Of the adapter.
        backbone: The model.
        table: Which part of the paper prints it.
        against: The method that `value` is a difference to; None: it is the figure itself.
        modules: `restricted` or `all`: the merge it is of; None: the paper's own choice, which it does not name.
    """

    method: str
    title: str
    task: str | None
    language: str
    value: float
    structure: str
    backbone: str
    table: str
    against: str | None = None
    modules: str | None = None

    @property
    def text(self) -> str:
        """The figure, and what it is a figure of where that is not this task's average."""
        if self.against is not None:
            return f"{_signed(self.value)} against {_title(self.against)}"
        if self.task is None:
            return f"{self.value:.1f}, average of five tasks"
        where = "" if self.language == "average" else f", {self.language}"
        return f"{self.value:.1f}{where}"


@cache
def _printed() -> tuple[Published, ...]:
    entries: list[dict[str, Any]] = parse_yaml(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return tuple(
        Published(
            method=name,
            title=_title(name),
            task=entry.get("task"),
            language=entry.get("languages", "average"),
            value=float(value),
            structure=entry["structure"],
            backbone=entry["backbone"],
            table=entry["part"],
            against=entry.get("against"),
            modules=entry.get("modules"),
        )
        for entry in entries
        for name, value in entry["values"].items()
    )


def published(experiment: Mapping[str, Any]) -> list[Published]:
    """What the paper prints for an experiment's setting.

    Args:
        experiment: An experiment as plain data, as a run's manifest holds it.

    Returns:
        Figures of its backbone and structure: of its task, and averages over the paper's five tasks where it is one of them.
        None at all where source, reference task, target languages, items or the base's precision are not the paper's.
    """
    reference = experiment.get("reference") or {}
    evaluation = experiment.get("evaluation") or {}
    sampled = evaluation.get("limit") or evaluation.get("written_limit") or evaluation.get("split", "test") != "test"
    if sampled or experiment["backbone"].get("quantization", "none") != "none":
        return []
    if set(experiment["targets"]) != set(PAPER_TARGETS.get(experiment["task"], ())):
        return []
    if experiment["source"] != "en" or reference.get("task", "clm") not in TEXT_TASKS or experiment["task"] not in FIVE:
        return []
    backbone = _backbone(experiment["backbone"]["model"])
    modules = (experiment.get("merge") or {}).get("modules", "all")
    merged = (
        "all" if modules == "all" else _RESTRICTED.get(frozenset([modules] if isinstance(modules, str) else modules))
    )
    return [
        row
        for row in _printed()
        if row.backbone == backbone
        and row.structure == experiment["adapter"]["family"]
        and row.task in (None, experiment["task"])
        and row.modules in (None, merged)
    ]


def beside(found: dict[str, Any]) -> Table:
    """Methods: ours, on average over the targets, and the paper's.

    Args:
        found: The figures of a run, see `results.results`.

    Returns:
        A header and rows: our methods in their order, then what only the paper has. No rows where it prints nothing of the kind.
    """
    printed = published(found["experiment"])
    header = ["method", f"ours, {found['experiment']['task']}", "paper"]
    if not printed:
        return header, []
    names = dict.fromkeys([*found["methods"], *(row.method for row in printed)])
    rows: list[list[str]] = []
    for name in names:
        theirs = [row for row in printed if row.method == name]
        ours = _ours(found, name, next((row.against for row in theirs if row.against), None))
        rows.append([_title(name), ours, "; ".join(row.text for row in theirs) or "–"])
    return header, rows


def _ours(found: dict[str, Any], name: str, against: str | None) -> str:
    """Our average, and its difference to another method where the paper prints that."""
    if name not in found["methods"]:
        return "not run"
    value = _value(found["methods"][name]["average"])
    other = _value(found["methods"][against]["average"]) if against in found["methods"] else None
    if value is None:
        return "no data"
    difference = "" if other is None else f", {_signed(100 * (value - other))} against {_title(str(against))}"
    return f"{percent(value)}{difference}"


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


def _title(method: str) -> str:
    return METHODS[method].title if method in METHODS else _TITLES.get(method, method)


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")
