"""How the expert takes part in a group: the paper's method and the baselines it compares with.

A `Strategy` decides which requests a group makes and which demonstrations join it; the collector,
its budgets, verifiers and the store are the same for all. docs/baselines.md describes each.
"""

from mentor_serve.rollout.strategies.base import GroupShape, Occasion, Strategy
from mentor_serve.rollout.strategies.build import GuidanceConfig, build_strategy
from mentor_serve.rollout.strategies.questa import HintSchedule

__all__ = [
    "GroupShape",
    "GuidanceConfig",
    "HintSchedule",
    "Occasion",
    "Strategy",
    "build_strategy",
]
