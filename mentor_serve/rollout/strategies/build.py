"""From configuration to a strategy."""

from __future__ import annotations

from dataclasses import dataclass, field

from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.strategies.base import GroupShape, Strategy
from mentor_serve.rollout.strategies.luffy import Luffy
from mentor_serve.rollout.strategies.mixed import Mentor, OnPolicy
from mentor_serve.rollout.strategies.questa import HintSchedule, QuestA
from mentor_serve.types import GuidanceMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidanceConfig:
    """Which method guides, and what the methods with whole expert trajectories need."""

    method: GuidanceMethod = GuidanceMethod.MENTOR
    expert_model: str = ""
    """The expert's name: its demonstrations are stored and found again under it."""
    num_expert: int = 1
    """LUFFY: places of a group that are the expert's."""
    hints: HintSchedule = field(default_factory=HintSchedule)
    """QuestA's."""
    expert_attempts: int = 4
    """Failures in a row after which a task counts as beyond the expert."""
    max_uses: int = 0
    """Groups of a run that one demonstration may serve; 0: any number."""
    retry_s: float = 10.0
    """How long groups go without an expert that gave no answer before it is asked again."""
    only_correct: bool = True
    """Demonstrate with solutions of accuracy 1 alone."""
    shares_solutions: bool = True
    """Use those that other runs of the database asked for; else a run pays for all that it uses."""


def build_strategy(config: GuidanceConfig, shape: GroupShape, renderer: PromptRenderer) -> Strategy:
    """Return the strategy of `config.method`.

    Raises:
        ConfigError: `config` does not fit `shape`.
    """
    match config.method:
        case GuidanceMethod.MENTOR:
            return Mentor(shape)
        case GuidanceMethod.ON_POLICY:
            return OnPolicy(shape)
        case GuidanceMethod.LUFFY:
            return Luffy(shape, num_expert=config.num_expert, expert_model=config.expert_model)
        case GuidanceMethod.QUESTA:
            return QuestA(shape, schedule=config.hints, renderer=renderer)
