"""How adapters differ and combine: one family of operators per structure, and the laws they keep.

A family works on one *site*, the tensors of one place in the model, and is written once against the array API, so that
it runs on numpy arrays read from files and on torch tensors of a loaded model alike. It computes in the type it is
given; callers pass float32 and round once, when they write.

AdaMergeX, for every family, is one line: `apply(task, scale(difference(target_ref, source_ref), weight))`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeAlias

from lingraft.errors import AdapterError

Array: TypeAlias = Any
"""An array of any library that follows the array API standard."""


@dataclass(frozen=True)
class Site:
    """The numbers of an adapter at one place of the model.

    Attributes:
        tensors: Arrays by role, for LoRA `A` (rank × in) and `B` (out × rank).
        scaling: The factor the model applies to the site's action.
    """

    tensors: Mapping[str, Array]
    scaling: float = 1.0

    def map(self, function: Callable[[Array], Array]) -> "Site":
        """The site with `function` applied to every tensor."""
        return Site({role: function(tensor) for role, tensor in self.tensors.items()}, self.scaling)


class Law(Enum):
    """What a family may promise; equality is of effects, up to rounding."""

    INVERSE = "apply(y, difference(x, y)) = x"
    ZERO = "apply(x, scale(d, 0)) = x"
    UNIT = "scale(d, 1) = d"
    NEUTRAL = "transfer(x, r, r, w) = x for every w"


ALL_LAWS = frozenset(Law)


class Family(Protocol):
    """The operators of one adapter structure on one site."""

    @property
    def name(self) -> str:
        """The family's name, with its space where there are several: `lora/factors`."""
        ...

    @property
    def laws(self) -> frozenset[Law]:
        """The laws the family keeps; tests hold it to them."""
        ...

    def difference(self, x: Site, y: Site) -> Site:
        """What leads from `y` to `x`."""
        ...

    def scale(self, delta: Site, weight: float) -> Site:
        """The difference, `weight` times as strong."""
        ...

    def apply(self, x: Site, delta: Site) -> Site:
        """`x`, changed by the difference."""
        ...

    def effect(self, x: Site) -> Array:
        """What the site does to the model; two sites are equal when their effects are."""
        ...

    def guarded(self, x: Site, y: Site) -> int:
        """How many numbers of `difference(x, y)` a guard against division by (nearly) nothing changed."""
        ...


def transfer(family: Family, task: Site, target_ref: Site, source_ref: Site, weight: float) -> Site:
    """AdaMergeX on one site (Zhao et al. 2024, eq. 6-10): the task adapter plus `weight` times the divergence.

    Args:
        family: The operators of the adapters' structure.
        task: The task's adapter, trained in the source language.
        target_ref: The reference task's adapter in the target language.
        source_ref: The reference task's adapter in the source language.
        weight: λ ≥ 0. At 0 the task's site itself is returned: nothing is computed.

    Raises:
        AdapterError: The weight is negative or not finite, or the sites do not fit together.
    """
    if not 0 <= weight < float("inf"):
        raise AdapterError(
            f"the weight λ must be a finite number of at least 0, not {weight}", remedy="give a weight such as 0.5"
        )
    if weight == 0:
        return task
    return family.apply(task, family.scale(family.difference(target_ref, source_ref), weight))
