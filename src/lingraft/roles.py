"""Modules named by what they do (`attention.query`) as well as by name (`q_proj`): one table for all architectures."""

import re
from collections.abc import Iterable, Sequence

from lingraft.errors import AdapterError, UserError, suggestion

ROLES: dict[str, tuple[str, ...]] = {
    "attention.query": (
        "self_attn.q_proj",
        "attention.self.query",
        "attention.self.query_proj",
        "attention.self.pos_query_proj",
        "attention.query",
        "attention.q_lin",
        "attn.q_proj",
        "SelfAttention.q",
        "EncDecAttention.q",
    ),
    "attention.key": (
        "self_attn.k_proj",
        "attention.self.key",
        "attention.self.key_proj",
        "attention.self.pos_key_proj",
        "attention.key",
        "attention.k_lin",
        "attn.k_proj",
        "SelfAttention.k",
        "EncDecAttention.k",
    ),
    "attention.value": (
        "self_attn.v_proj",
        "attention.self.value",
        "attention.self.value_proj",
        "attention.value",
        "attention.v_lin",
        "attn.v_proj",
        "SelfAttention.v",
        "EncDecAttention.v",
    ),
    "attention.query_key_value": (
        "attention.query_key_value",
        "self_attention.query_key_value",
        "self_attn.qkv_proj",
        "attn.Wqkv",
    ),
    "attention.output": (
        "self_attn.o_proj",
        "attention.output.dense",
        "attention.out_lin",
        "attention.dense",
        "self_attention.dense",
        "attn.out_proj",
        "attn.Wo",
        "SelfAttention.o",
        "EncDecAttention.o",
    ),
    "feed_forward.gate": ("mlp.gate_proj", "DenseReluDense.wi_0"),
    "feed_forward.input": (
        "mlp.up_proj",
        "mlp.gate_up_proj",
        "intermediate.dense",
        "ffn.lin1",
        "ffn",
        "DenseReluDense.wi_1",
        "DenseReluDense.wi",
        "mlp.fc1",
        "mlp.dense_h_to_4h",
        "mlp.Wi",
    ),
    "feed_forward.output": (
        "mlp.down_proj",
        "output.dense",
        "ffn.lin2",
        "ffn_output",
        "DenseReluDense.wo",
        "mlp.fc2",
        "mlp.dense_4h_to_h",
        "mlp.Wo",
    ),
}
"""Role → the ends of module paths that play it. The longest end decides: `attention.output.dense` is no `output.dense`.

Some layouts have query, key and value in one layer, `attention.query_key_value`, or gate and input of the feed-forward part, which
then plays its input.
"""

ROLES["attention"] = tuple(end for role, ends in ROLES.items() if role.startswith("attention.") for end in ends)
ROLES["feed_forward"] = tuple(end for role, ends in ROLES.items() if role.startswith("feed_forward.") for end in ends)


def _ends_with(module: str, end: str) -> bool:
    return module == end or module.endswith("." + end)


def plays(module: str, role: str) -> bool:
    """Whether a module, given by its path, plays a role."""
    best = max((end for ends in ROLES.values() for end in ends if _ends_with(module, end)), key=len, default=None)
    return best is not None and best in ROLES[role]


def plays_any(module: str) -> bool:
    """Whether a module, given by its path, plays a role."""
    return any(_ends_with(module, end) for ends in ROLES.values() for end in ends)


_BEHIND = ("output.LayerNorm", "output_layer_norm", "full_layer_layer_norm")


def ends_feed_forward(module: str) -> bool:
    """Whether a module, given by its path, is the norm of the sum of a feed-forward part and its residual (post-norm layouts)."""
    return any(_ends_with(module, end) for end in _BEHIND) and not _ends_with(module, "attention.output.LayerNorm")


def layer_of(module: str) -> int | None:
    """The number of the layer a module stands in: the first number of its path."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


_LAYERS = re.compile(r"layer:(\d{1,6})(?:-(\d{1,6}))?")


def _matches(module: str, name: str) -> bool:
    """Whether a module is called so, plays that role, or stands in those layers; `a&b` asks for both."""
    module = module.removesuffix(".bias")  # A sparse difference's site; it goes with its weight's.
    for part in name.split("&"):
        part = part.strip()
        if layers := _LAYERS.fullmatch(part):
            number, first = layer_of(module), int(layers[1])
            if number is None or not first <= number <= int(layers[2] or first):
                return False
        elif not (plays(module, part) if part in ROLES else _ends_with(module, part)):
            return False
    return True


def weights(modules: Iterable[str], default: float, rules: Sequence[tuple[str, float]] = ()) -> dict[str, float]:
    """The weight λ of every module: the last rule that names it, or the default.

    Args:
        modules: Paths.
        default: The weight of modules that no rule names.
        rules: A name as for `select`, and the weight.

    Raises:
        UserError: A rule names nothing, or a weight is negative or not finite.
    """
    paths = tuple(modules)
    found = dict.fromkeys(paths, default)
    for name, weight in rules:
        found.update(dict.fromkeys(select(paths, [name]), weight))
    for weight in (default, *(w for _, w in rules)):
        if not 0 <= weight < float("inf"):
            raise AdapterError(
                f"the weight λ must be a finite number of at least 0, not {weight}", remedy="give a weight such as 0.5"
            )
    return found


def select(modules: Iterable[str], chosen: str | Sequence[str]) -> tuple[str, ...]:
    """The modules that a choice names.

    Args:
        modules: Paths such as `model.layers.0.self_attn.q_proj`.
        chosen: `all`, or names, path ends, roles and layers (`layer:3`, `layer:0-5`), as a list or with commas; `a&b` for
            what is both.

    Returns:
        The chosen paths, in the order given.

    Raises:
        UserError: A name or role matches nothing; says what there is.
    """
    paths = tuple(modules)
    names = [n.strip() for n in chosen.split(",")] if isinstance(chosen, str) else list(chosen)
    if names == ["all"]:
        return paths
    found: set[str] = set()
    for name in names:
        hits = [p for p in paths if _matches(p, name)]
        if not hits:
            leaves = sorted({p.rsplit(".", 1)[-1] for p in paths})
            roles = sorted(r for r in ROLES if any(plays(p, r) for p in paths))
            raise UserError(
                f"no module is called '{name}' or plays that role here",
                remedy=f"{suggestion(name, [*leaves, *roles])} (modules: {', '.join(leaves)}; roles: {', '.join(roles)})",
            )
        found.update(hits)
    return tuple(p for p in paths if p in found)
