"""LoRA in PEFT's folders. Rank and alpha patterns and rsLoRA are read as PEFT reads them."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from lingraft.layouts.common import Config, Place, RoleLayout, shown

_VARIANTS = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
)
"""PEFT's options that make a LoRA layer compute something else than `s · B · A · x` at every position.

For `megatron_config` PEFT imports a module that the file names.
"""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def place(out_features: int, in_features: int, rank: int, scaling: float) -> Place:
    """A LoRA site's shape."""
    return Place({"A": (rank, in_features), "B": (out_features, rank)}, scaling)


def rank_of(site: Place) -> int:
    """The rank of a LoRA site."""
    return site.shapes["A"][0]


def weight_shape(site: Place) -> tuple[int, int]:
    """The shape of the weight a LoRA site adds to: out × in."""
    return site.shapes["B"][0], site.shapes["A"][1]


def _refused(config: Config) -> dict[str, Any]:
    init = config.get("init_lora_weights")
    return {
        "DoRA (use_dora)": config.get("use_dora"),
        "a LoRA bias (lora_bias)": config.get("lora_bias"),
        f"trained base biases (bias={shown(config.get('bias'))!r})": config.get("bias", "none") != "none",
        "replicated layers": config.get("layer_replication"),
        "target_parameters": config.get("target_parameters"),
        **{name: config.get(name) for name in _VARIANTS},
        f"an initialisation that changes the base model ({shown(init)})": isinstance(init, str)
        and init.startswith(_CHANGES_BASE),
    }


def _configured(layout: Mapping[str, Place]) -> dict[str, Any]:
    """The commonest rank and alpha, and patterns for the rest."""
    ranks = {m: rank_of(p) for m, p in layout.items()}
    alphas = {m: p.scaling * rank_of(p) for m, p in layout.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": False,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
    }


def _place(module: str, shapes: Mapping[str, tuple[int, ...]], config: Config) -> Place:
    a, b = shapes["A"], shapes["B"]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise ValueError(f"factors of shapes {a} and {b} do not multiply")
    try:
        alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        scaling = alpha / a[0] ** 0.5 if config.get("use_rslora") else alpha / a[0]
        if not _LEAST <= abs(scaling) <= 1 / _LEAST:
            raise ValueError(f"{alpha:g} at rank {a[0]} makes a scaling of {scaling:g}")
    except (re.error, AttributeError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"alpha cannot be read ({error})") from None
    return Place(shapes, scaling)


_LEAST = 1e-30
"""The least size of a scaling: merging divides by it."""
_WAYS = 10**6
"""In how many ways the patterns may match one module at most: Python's matching may try them all."""
_PIECE = re.compile(
    r"\[\^?(?:[^\\\[\]]|\\[^\d])+\]|\\[^\d]|\(\?:|\((?!\?)|[^\\\[\](){}]|\)|\{\d{1,2}(?:,\d{0,2})?\}", re.DOTALL
)
"""What a pattern is made of: characters and classes of them, groups, `*`, `+`, `?`, `{2,3}` and `|`."""


@lru_cache(maxsize=4096)
def _read_pattern(pattern: str) -> tuple[re.Pattern[str], int, int]:
    """A pattern that matches the end of a module's path; how many of its parts repeat, and how many choices it has besides.

    Raises:
        ValueError: It repeats a group, or has more than groups, classes, alternatives and repeats.
    """
    pieces = _PIECE.findall(pattern) if len(pattern) <= 1000 else []
    repeats, choices, before = 1, 1, ""  # What stands before the pattern repeats.
    alternatives = [1]
    for piece in pieces:
        if piece[0] == "(":
            alternatives.append(1)
        elif piece == ")" and len(alternatives) > 1:
            choices *= alternatives.pop()
        elif piece == "|":
            alternatives[-1] += 1
        elif piece == ")" or (piece[0] in "*+{" and before == ")"):
            pieces = []
            break
        elif piece == "?":
            choices *= 2
        elif piece[0] in "*+{":
            repeats += 1
        before = piece
    if "".join(pieces) != pattern:
        raise ValueError(f"the pattern {shown(pattern)!r} repeats a group or is too long or no plain pattern")
    return re.compile(rf"(.*\.)?({pattern})$"), repeats, choices * math.prod(alternatives)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: float) -> float:
    """The value for a module as PEFT finds it: a pattern matches the end of the path."""
    for pattern, value in (patterns or {}).items():
        expression, repeats, choices = _read_pattern(pattern)
        # Each repeat takes some characters of the path: so many ways there are to share them out.
        if len(patterns or {}) * choices * math.comb(len(module) + repeats, repeats) > _WAYS:
            raise ValueError(f"the pattern {shown(pattern)!r} has too many repeats and choices")
        if expression.match(module):
            return float(value)
    return float(default)


LORA = RoleLayout(
    "lora",
    "LORA",
    "lora_",
    {"A": "lora_A.weight", "B": "lora_B.weight"},
    _place,
    sized=("A", 0),
    configured=_configured,
    refused=_refused,
)
"""`<module>.lora_A.weight` (rank × in) and `<module>.lora_B.weight` (out × rank)."""
