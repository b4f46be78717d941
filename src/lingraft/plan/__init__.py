"""From an experiment to the unique steps it takes."""

from lingraft.plan.planner import characters, make_plan
from lingraft.plan.steps import VERSIONS, Cell, Plan, Step, ordered

__all__ = ["VERSIONS", "Cell", "Plan", "Step", "characters", "make_plan", "ordered"]
