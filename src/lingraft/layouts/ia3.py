"""(IA)³ in PEFT's folders: one vector a module, over its outputs (out × 1) or, in the feed-forward part, its inputs (1 × in)."""

from collections.abc import Mapping

from lingraft.layouts.common import Config, Place, RoleLayout


def _place(module: str, shapes: Mapping[str, tuple[int, ...]], config: Config) -> Place:
    if len(shapes["l"]) != 2 or 1 not in shapes["l"]:
        raise ValueError(f"{shapes['l']} is not the shape of a vector, out × 1 or 1 × in")
    return Place(shapes)


IA3 = RoleLayout("ia3", "IA3", "ia3_", {"l": "ia3_l"}, _place)
"""`<module>.ia3_l`."""
