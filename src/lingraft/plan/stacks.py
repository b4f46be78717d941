"""Plans what stands on one another: language adapters, a task adapter trained on the source's, and grafts of what lies beneath."""

from typing import TYPE_CHECKING, Any

from lingraft.config import LfsftConfig, MadxConfig
from lingraft.merging import LANGUAGE_SPACES
from lingraft.methods import Method
from lingraft.plan.steps import Step

if TYPE_CHECKING:
    from lingraft.plan.planner import Planner

_PARTS = {"madx": ("invertible", "bottleneck"), "lfsft": ("sparse",)}
"""The structures of a language adapter's parts."""


class Stacks:
    """The part of a planner that knows of MAD-X and LF-SFT."""

    def __init__(self, planner: "Planner") -> None:
        self.planner = planner
        self.experiment = planner.experiment

    def language_adapter(self, row: Method, language: str, seed: int) -> Step:
        """The language adapter of a method."""
        settings = self._settings(row)
        return self.planner.reference_adapter(
            language, seed, settings.language_adapter, settings.reference_training, f"{row.stack} "
        )

    def task_adapter(self, row: Method, seed: int) -> Step:
        """The task's adapter, trained on top of the source's language adapter."""
        settings, source = self._settings(row), self.experiment.source
        return self.planner.task_adapter(
            source,
            seed,
            beneath=self.language_adapter(row, source, seed),
            training=settings.training,
            adapter=settings.task_adapter,
            named=f"{row.stack} ",
        )

    def asked(self, row: Method, beneath: Step, seed: int) -> dict[str, Step]:
        """What a prediction reads: the task's adapter and what lies beneath it."""
        return {"adapter": self.task_adapter(row, seed), "beneath": beneath}

    def references(self, row: Method, language: str, seed: int) -> dict[str, Step]:
        """The two language adapters of a graft."""
        source = self.experiment.source
        return {
            "target_ref": self.language_adapter(row, language, seed),
            "source_ref": self.language_adapter(row, source, seed),
        }

    def candidate(
        self, row: Method, weight: float, language: str, seed: int
    ) -> tuple[dict[str, Any] | None, dict[str, Step]]:
        """How a weight is tried: what is merged in memory, and from what."""
        if weight == row.neutral:
            return None, self.asked(row, self.language_adapter(row, self.experiment.source, seed), seed)
        inputs = {"adapter": self.task_adapter(row, seed), **self.references(row, language, seed)}
        return {**self.graft_config(row), "weight": weight}, inputs

    def graft_config(self, row: Method) -> dict[str, Any]:
        """How language adapters are merged, the weight aside."""
        return {"beneath": {structure: LANGUAGE_SPACES[structure] for structure in _PARTS[row.stack or ""]}}

    def beneath(self, row: Method, language: str, seed: int, selection: Step | None = None) -> Step:
        """What lies beneath the task's adapter in a language: its language adapter, or with a choice of λ a graft."""
        if selection is None:
            return self.language_adapter(row, language, seed)
        inputs = {**self.references(row, language, seed), "selection": selection}
        label = f"merge {row.name} {language} seed {seed}"
        return self.planner.step("merge", self.graft_config(row), inputs, {}, label)

    def _settings(self, row: Method) -> MadxConfig | LfsftConfig:
        return self.experiment.stack(row.stack or "")
