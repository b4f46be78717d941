"""Do adapters fit together? Every reason why not is said at once, before anything is computed."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from lingraft.errors import AdapterError
from lingraft.layouts import LAYOUTS
from lingraft.layouts.common import Place, shown
from lingraft.layouts.lora import rank_of, weight_shape

SHOWN = 8
_WIDE = {"bottleneck": "down", "prefix": "key"}
"""Structures that may grow when they are concatenated, and the tensor (size × width) whose width must be equal."""
_REMEDY = "give adapters of one base model, trained with equal settings; lingraft inspect shows what they are"


class Described(Protocol):
    """What is known of an adapter without reading its tensors."""

    @property
    def structure(self) -> str:
        """`lora`, `ia3`, …"""
        ...

    @property
    def layout(self) -> Mapping[str, Place]:
        """The shape of every site."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """PEFT's configuration."""
        ...

    @property
    def sidecar(self) -> Mapping[str, Any]:
        """What lingraft noted."""
        ...


def base_digest(adapter: Described) -> str | None:
    """The digest of the base model the adapter was trained on, where lingraft recorded it."""
    return (adapter.sidecar.get("backbone") or {}).get("digest")


def check_fit(
    named: Mapping[str, Described],
    sites: Iterable[str],
    *,
    any_rank: bool,
    any_size: bool = False,
    compared: bool = False,
) -> None:
    """Makes sure that adapters can be combined.

    Args:
        named: The adapters, by what to call them in a message; the first is what the others must fit.
        sites: The sites to be combined.
        any_rank: Only the weights that LoRA adapters add to must have equal shapes, and an adapter without a site adds
            nothing there; else every tensor must, and every adapter must have every site.
        any_size: Bottlenecks and prefixes may have any number of units, but must have equal widths.
        compared: Nothing is made of them, so that a second stage may be among them.

    Raises:
        AdapterError: They do not fit; all mismatches are listed. Or one is a second stage, which is nothing without its first.
    """
    if not compared:
        for who, adapter in named.items():
            _check_one_stage(who, adapter)
    (first_name, first), *others = named.items()
    if structures := _differing({who: a.structure for who, a in named.items()}):
        raise AdapterError(f"the adapters have different structures: {structures}", remedy=_REMEDY)
    problems: list[str] = []
    if bases := _differing({who: base_digest(a) for who, a in named.items()}):
        problems.append(f"they belong to different base models: {bases}")
    rules = LAYOUTS[first.structure]
    mine = rules.kind(first.config)
    for who, other in others:
        theirs = rules.kind(other.config)
        problems += [
            f"{key}: {shown(mine[key])} in the {first_name}, {shown(theirs[key])} in the {who}"
            for key in mine
            if mine[key] != theirs[key]
        ]
    chosen = sorted(sites)
    if not any_rank:
        for who, adapter in named.items():
            absent = [m for m in chosen if m not in adapter.layout]
            if absent:
                hint = ", and --space product takes it for no change" if first.structure == "lora" else ""
                problems.append(
                    f"the {who} lacks {len(absent)} sites, first {absent[0]} (--modules leaves sites as they are{hint})"
                )
    for module in chosen:
        having = {who: a.layout[module] for who, a in named.items() if module in a.layout}
        problems += _unequal(module, having, first.structure, any_rank, any_size)
    if problems:
        said = problems[:SHOWN] + ([f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])
        raise AdapterError("the adapters do not fit together:\n  - " + "\n  - ".join(said), remedy=_REMEDY)


def _check_one_stage(who: str, adapter: Described) -> None:
    if adapter.sidecar.get("second") is not None:
        raise AdapterError(
            f"the {who} is a second stage, which works only on top of the first one it was trained on",
            where=getattr(adapter, "path", None),
            remedy="merge the first stage (its folder 'stage1'), then train the second on the result: "
            "lingraft train --first-stage",
        )


def _differing(values: Mapping[str, str | None]) -> str | None:
    """`a x, b y` where the values that are known are not all equal."""
    known = {who: value for who, value in values.items() if value}
    return ", ".join(f"{who} {value[:24]}" for who, value in known.items()) if len(set(known.values())) > 1 else None


def _unequal(module: str, places: Mapping[str, Place], structure: str, any_rank: bool, any_size: bool) -> list[str]:
    (first_name, first), *others = places.items()
    found: list[str] = []
    for who, other in others:
        if structure == "lora":
            mine, theirs = weight_shape(first), weight_shape(other)
            if mine != theirs:
                found.append(f"{module}: {mine} in the {first_name}, {theirs} in the {who} (out × in)")
            elif not any_rank and rank_of(first) != rank_of(other):
                found.append(
                    f"{module}: rank {rank_of(first)} in the {first_name}, {rank_of(other)} in the {who} "
                    "(--space product takes any)"
                )
        elif (
            structure == "sparse"
        ):  # Supports differ; the shapes of the weights are tensors, compared when they are read.
            continue
        elif any_size and structure in _WIDE and first.shapes[_WIDE[structure]][1] == other.shapes[_WIDE[structure]][1]:
            continue
        elif first.shapes != other.shapes:
            roles = [r for r in first.shapes if first.shapes[r] != other.shapes.get(r)]
            found += [
                f"{module}: {r} {first.shapes[r]} in the {first_name}, {other.shapes.get(r)} in the {who}"
                for r in roles
            ]
    return found
