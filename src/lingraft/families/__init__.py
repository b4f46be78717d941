"""The table of families: a structure, the spaces it can be merged in, and the operators of each.

The first space of a structure is its own rule; `cross` is the other kind's, for the paper's ablation.
"""

import dataclasses
from typing import Any

from lingraft.algebra import Family
from lingraft.errors import UserError, suggestion
from lingraft.families import bottleneck, ia3, invertible, prefix
from lingraft.families.lora import LoraCross, LoraFactors, LoraProduct
from lingraft.families.sparse import Sparse

FAMILIES: dict[str, dict[str, Family]] = {
    "lora": {"factors": LoraFactors(), "product": LoraProduct(), "cross": LoraCross()},
    "ia3": {"ratio": ia3.RATIO, "cross": ia3.CROSS},
    "prefix": {
        "layer": prefix.BY_LAYER,
        "flat": prefix.FLAT,
        "literal": prefix.PrefixLiteral(),
        "cross": prefix.CROSS,
    },
    "bottleneck": {"inverse": bottleneck.Bottleneck(), "cross": bottleneck.CROSS},
    "invertible": {"difference": invertible.DIFFERENCE},
    "sparse": {"difference": Sparse()},
}

GUARDS = ("floor", "bound", "rcond")
"""The options a rule may have: the guards against division by (nearly) nothing."""


def own_space(structure: str) -> str:
    """The space of a structure's own rule."""
    return next(iter(_spaces(structure)))


def family(structure: str, space: str | None = None, **guards: float | None) -> Family:
    """The operators of a structure in a space.

    Args:
        structure: `lora`, `ia3`, …
        space: One of the structure's; None for its own.
        **guards: Values for the rule's guards, of `GUARDS`; None leaves the default.

    Raises:
        UserError: There is no such structure or space, or the rule has no such guard.
    """
    spaces = _spaces(structure)
    space = space or own_space(structure)
    if space not in spaces:
        raise UserError(f"'{structure}' has no space '{space}'", remedy=suggestion(space, spaces))
    rule: Any = spaces[space]
    given = {name: value for name, value in guards.items() if value is not None}
    for name, value in given.items():
        if name not in {field.name for field in dataclasses.fields(rule)}:
            raise UserError(f"the rule {rule.name} has no '{name}'", remedy="leave that option out")
        if not 0 < value < float("inf"):
            raise UserError(f"'{name}' must be above 0 and finite, not {value}", remedy="give a number above 0")
    return dataclasses.replace(rule, **given) if given else rule


def _spaces(structure: str) -> dict[str, Family]:
    if structure not in FAMILIES:
        raise UserError(f"there is no adapter structure '{structure}'", remedy=suggestion(structure, FAMILIES))
    return FAMILIES[structure]
