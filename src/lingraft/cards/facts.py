"""What a model card is made of: the notes of an adapter's folder, read without trusting them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lingraft.escaping import one_line

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
HOW = {
    "transfer": "adamergex",
    "cross": "adamergex",
    "divergence": "adamergex",
    "arimerge": "arimerge",
    "arimerge-add": "arimerge",
}
SECONDS = {"fused": "flare", "fused-mt": "flare", "mixup": "x-mixup"}
"""The published methods behind a merge, and behind a second stage, by what the notes call them."""


@dataclass(frozen=True)
class Score:
    """One measured figure.

    Attributes:
        task: The task's name.
        dataset: The data set's hub id, or the task's name where it has none.
        language: The language asked in.
        split: The part of the data.
        metric: The figure's name.
        value: The figure, from 0 to 1.
        interval: Its 95 % interval over items; None: not known.
        difference: The difference to Eng-FT with its 95 % interval and p; None: not known.
        items: How many items were asked; 0: not known.
        seeds: Over how many seeds interval and difference are.
    """

    task: str
    dataset: str
    language: str
    split: str
    metric: str
    value: float
    interval: tuple[float, float] | None = None
    difference: tuple[float, float, float, float] | None = None
    items: int = 0
    seeds: int = 1


@dataclass(frozen=True)
class Facts:
    """What a card is made of.

    Attributes:
        config: The contents of `adapter_config.json`; None: the folder holds several adapters.
        notes: The contents of `lingraft.json`.
        scores: What was measured.
        digests: SHA-256 of files, by name.
        method: The method of a run that it was made by, in words.
        languages: Target and source, where the caller knows more than the notes.
        task: The task's name, where the caller knows more than the notes.
        warning: What must be known of the scores.
    """

    config: Mapping[str, Any] | None
    notes: Mapping[str, Any]
    scores: Sequence[Score] = ()
    digests: Mapping[str, str] = field(default_factory=dict[str, str])
    method: str = ""
    languages: Sequence[str] = ()
    task: str = ""
    warning: str = ""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """How it was made."""
        return mapping(self.notes.get("provenance"))

    @property
    def made_of(self) -> list[Mapping[str, Any]]:
        """The adapters that a merge or divergence is made of."""
        found = self.notes.get("made_of")
        return [mapping(part) for part in found] if isinstance(found, list) else []

    @property
    def kind(self) -> str:
        """`adapter`, `divergence` or `stack`."""
        kind = self.notes.get("kind")
        return kind if kind in ("divergence", "stack") else "adapter"

    @property
    def how(self) -> str:
        """By what it was made; empty: not noted."""
        how = self.provenance.get("how")
        return how if isinstance(how, str) else "divergence" if self.kind == "divergence" else ""

    @property
    def structures(self) -> list[str]:
        """Its structure, or those of its parts."""
        family = self.notes.get("family")
        named = texts(self.notes.get("parts")) if self.kind == "stack" else []
        return named or ([family] if isinstance(family, str) else [])

    @property
    def second(self) -> Mapping[str, Any]:
        """What a second stage is; empty: it is none."""
        return mapping(self.notes.get("second"))

    @property
    def beneath(self) -> list[Mapping[str, Any]]:
        """The adapters that it was trained on top of."""
        found = self.notes.get("beneath")
        return [mapping(one) for one in found] if isinstance(found, list) else []

    @property
    def spoken(self) -> list[str]:
        """What it is for first, then what else it has learned in."""
        second, made = self.second, self.provenance
        found = [*self.languages, second.get("language"), made.get("language")]
        parts = [part.get("language") for part in self.made_of]
        # A graft's parts are task, target, source; its target comes first.
        found += [*parts[1:2], *parts]
        found += [second.get("source")]
        return list(dict.fromkeys(one_line(code) for code in found if isinstance(code, str) and code))

    @property
    def learned(self) -> str:
        """The task's name; empty: it has learned text, or nothing is known."""
        made = self.provenance
        parts = [part.get("task") for part in self.made_of[:1]] if self.kind == "adapter" else []
        reference = mapping(made.get("reference")).get("task")
        for name in (self.task, made.get("task"), reference, *parts):
            if isinstance(name, str) and name:
                return name
        return ""

    @property
    def use(self) -> str:
        """PEFT's name of what it is for, or the kind of its head."""
        kind = (self.config or {}).get("task_type") or mapping(self.notes.get("head")).get("kind")
        return kind if isinstance(kind, str) else ""

    @property
    def datasets(self) -> list[str]:
        """The data sets of the hub that it has learned or was asked."""
        known = texts(self.provenance.get("datasets"))
        known += [name for part in self.made_of for name in texts(part.get("datasets"))]
        known += [score.dataset for score in self.scores if "/" in score.dataset]
        return list(dict.fromkeys(name for name in known if "/" in name and is_hub_id(name)))

    @property
    def published(self) -> list[str]:
        """The published methods that it stands on, by their tags."""
        found = [SECONDS.get(str(self.second.get("kind"))), HOW.get(self.how)]
        found += [self.how if self.how in ("ties", "dare", "knots") else None]
        structures = {*self.structures, *(str(one.get("structure")) for one in self.beneath)}
        found += ["mad-x" if "invertible" in structures else None, "lf-sft" if "sparse" in structures else None]
        return list(dict.fromkeys(name for name in found if name))


def base_model(config: Mapping[str, Any] | None, notes: Mapping[str, Any]) -> str | None:
    """The base model's id on the hub, or None where it lies in a folder or nothing is known.

    A relative path may look like an id: the backbone's digest says which it is, where lingraft has noted one.
    """
    backbone = mapping(notes.get("backbone"))
    name, digest = backbone.get("name"), backbone.get("digest")
    if isinstance(name, str) and isinstance(digest, str):
        known = digest.startswith("hub:") or (not digest.startswith("folder:") and not name.endswith(".gguf"))
        return name if known and is_hub_id(name) else None
    name = (config or {}).get("base_model_name_or_path")
    return name if isinstance(name, str) and "/" in name and is_hub_id(name) else None


def is_hub_id(name: str) -> bool:
    """Whether a name may be one of the hub's: OWNER/NAME, or NAME."""
    return (
        len(name) <= 96
        and _HUB.fullmatch(name) is not None
        and not ("--" in name or ".." in name)
        and not name.endswith((".git", ".gguf"))
    )


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping; empty in the place of anything else."""
    return value if isinstance(value, Mapping) else {}


def texts(value: Any) -> list[str]:
    """The texts of a list."""
    return [v for v in value if isinstance(v, str)] if isinstance(value, list | tuple) else []
