"""Invertible couplings (MAD-X) in PEFT's folders: two small networks, F and G, of two linear layers each."""

from collections.abc import Mapping

from lingraft.layouts.common import Config, Place, RoleLayout


def _place(module: str, shapes: Mapping[str, tuple[int, ...]], config: Config) -> Place:
    c, half = shapes["F.down"] if len(shapes["F.down"]) == 2 else (0, 0)
    one = {"down": (c, half), "down_bias": (c,), "up": (half, c), "up_bias": (half,)}
    if shapes != {f"{net}.{role}": shape for net in "FG" for role, shape in one.items()}:
        raise ValueError(f"the shapes {shapes} are not those of a coupling")
    return Place(shapes)


INVERTIBLE = RoleLayout(
    "invertible",
    "INVERTIBLE",
    "invertible_",
    {
        f"{net}.{layer}{ending}": f"invertible_{net}_{layer}.{kind}"
        for net in "FG"
        for layer in ("down", "up")
        for ending, kind in (("", "weight"), ("_bias", "bias"))
    },
    _place,
    sized=("F.down", 0),
    alike={"activation": "relu"},
)
"""`<module>.invertible_F_down.weight` (c × d/2), `.bias`, `invertible_F_up.…` (d/2 × c), and the same of G."""
