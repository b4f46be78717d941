"""Bottleneck adapters in PEFT's folders: the two linear layers that lingraft's module inserts behind another."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lingraft.layouts.common import Config, Place, RoleLayout


def _place(module: str, shapes: Mapping[str, tuple[int, ...]], config: Config) -> Place:
    b, d = shapes["down"] if len(shapes["down"]) == 2 else (0, 0)
    if shapes != {"down": (b, d), "down_bias": (b,), "up": (d, b), "up_bias": (d,)}:
        raise ValueError(f"the shapes {shapes} are not those of a bottleneck")
    return Place(shapes)


def _configured(layout: Mapping[str, Place]) -> dict[str, Any]:
    """The commonest size, and a pattern for the rest."""
    sizes = {module: place.shapes["down"][0] for module, place in layout.items()}
    size = Counter(sizes.values()).most_common(1)[0][0]
    return {"bottleneck_size": size, "bottleneck_pattern": {m: b for m, b in sizes.items() if b != size}}


BOTTLENECK = RoleLayout(
    "bottleneck",
    "BOTTLENECK",
    "bottleneck_",
    {
        "down": "bottleneck_down.weight",
        "down_bias": "bottleneck_down.bias",
        "up": "bottleneck_up.weight",
        "up_bias": "bottleneck_up.bias",
    },
    _place,
    sized=("down", 0),
    alike={"activation": "relu"},
    configured=_configured,
)
"""`<module>.bottleneck_down.weight` (b × d), `.bias` (b), `<module>.bottleneck_up.weight` (d × b), `.bias` (d)."""
