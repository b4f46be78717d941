"""Model cards: the README.md of an adapter's folder, made of what the folder's own files say.

A card is a pure function of PEFT's configuration, lingraft's notes and, for an adapter that a run has measured, its scores: equal
folders have equal cards, with no date, machine or path in them. Names in it come out of files that anybody may have written: all
of them go through `escaping`, and into the front matter through YAML's own writer.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lingraft.cards.facts import Facts, Score, base_model, is_hub_id, mapping
from lingraft.cards.telling import NAMES, USES, plain_title, sections
from lingraft.escaping import one_line
from lingraft.replacing import write_text

__all__ = [
    "CARD",
    "Facts",
    "Score",
    "base_model",
    "card",
    "hub_datasets",
    "is_hub_id",
    "metadata",
    "origin",
    "write_card",
]

CARD = "README.md"
_LANGUAGE = re.compile(r"[a-z]{2,3}")


def write_card(folder: Path, facts: Facts) -> None:
    """Writes a folder's card."""
    write_text(folder / CARD, card(facts))


def card(facts: Facts) -> str:
    """The text of a model card: the hub's front matter, and Markdown for people."""
    import yaml  # Adapters are opened without it.

    front = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n" + "\n\n".join(sections(facts)) + "\n"


def metadata(facts: Facts) -> dict[str, Any]:
    """The front matter: only what is known, and ids of the hub where they are ids of the hub."""
    found: dict[str, Any] = {}
    if base := base_model(facts.config, facts.notes):
        found |= {"base_model": base, "base_model_relation": "adapter"}
    found["library_name"] = "lingraft" if facts.config is None else "peft"
    if codes := [code for code in facts.spoken if _LANGUAGE.fullmatch(code)]:
        found["language"] = codes
    if data := facts.datasets:
        found["datasets"] = data
    if facts.kind == "adapter" and (use := USES.get(facts.use)):
        found["pipeline_tag"] = use[0]
    structures = [s for s in facts.structures if s in NAMES]
    found["tags"] = list(dict.fromkeys(["lingraft", *structures, *facts.published, "cross-lingual"]))
    if facts.scores:
        found["model-index"] = [{"name": _name(plain_title(facts)), "results": [_result(s) for s in facts.scores]}]
    return found


def origin(structure: str, notes: Mapping[str, Any], digest: str | None) -> dict[str, Any]:
    """What a merge notes of one of its parts: its structure, its digest, and what it has learned."""
    made = mapping(notes.get("provenance"))
    known = {k: made[k] for k in ("language", "task", "datasets", "digest") if k in made}
    if "task" not in known and isinstance(reference := mapping(made.get("reference")).get("task"), str):
        known["task"] = reference
    # A part of a saved divergence has no folder of its own any more, and knows its digest.
    return {"structure": structure, **({"digest": digest} if digest else {}), **known}


def hub_datasets(digests: Sequence[str]) -> list[str]:
    """The hub's data sets among the digests of what was read; rows out of files are nobody's that could be named."""
    return list(dict.fromkeys(re.findall(r"hub:([\w.-]+/[\w.-]+)@", "+".join(digests))))


def _result(score: Score) -> dict[str, Any]:
    metric = {"type": _name(score.metric), "value": round(score.value, 4), "name": _name(score.metric)}
    dataset = {"name": _name(score.task), "type": _name(score.dataset), "config": _name(score.language)}
    return {
        "task": {"type": "text-classification" if "accuracy" in score.metric else "text-generation"},
        "dataset": {**dataset, "split": _name(score.split)},
        "metrics": [metric],
    }


def _name(text: str) -> str:
    """A text as the hub writes it again: space at its ends, of whatever kind, would be lost there."""
    return " ".join(one_line(text).split())
