"""LUFFY (arXiv 2504.14945): whole expert trajectories take places of the group.

Of the group's places (8 in the original) `num_expert` (1 there) are the expert's and the others are
sampled from the policy, so that a group costs the learner as much as one of plain GRPO. How the
expert's tokens count is the learner's part (`learner.batch`, `core.losses`).
"""

from __future__ import annotations

import dataclasses

from mentor_serve.errors import ConfigError
from mentor_serve.rollout.groups import MIN_SCORED, GroupPlan
from mentor_serve.rollout.strategies.base import GroupShape, Occasion
from mentor_serve.rollout.strategies.mixed import sampled_plan
from mentor_serve.types import GuidanceMethod


class Luffy:
    """On-policy rollouts and demonstrations; all places on-policy where the expert has none."""

    method = GuidanceMethod.LUFFY

    def __init__(self, shape: GroupShape, *, num_expert: int, expert_model: str) -> None:
        """Take the places of a group, how many of them are the expert's, and its name.

        Raises:
            ConfigError: too few places would be left to the policy.
        """
        most = shape.num_on_policy - MIN_SCORED
        if not 1 <= num_expert <= most:
            raise ConfigError(
                f"guidance.num_expert: expected 1 to {most}, so that {MIN_SCORED} of the "
                f"rollout.num_on_policy = {shape.num_on_policy} places stay the policy's, got "
                f"{num_expert}"
            )
        self._shape = dataclasses.replace(shape, num_mixed=0)
        self._expert_model = expert_model
        self.num_demonstrations = num_expert

    def plan(self, occasion: Occasion) -> GroupPlan:
        """Return the on-policy request for the places that demonstrations leave."""
        joined = tuple(occasion.demonstrations[: self.num_demonstrations])
        shape = dataclasses.replace(
            self._shape, num_on_policy=self._shape.num_on_policy - len(joined)
        )
        plan = sampled_plan(self.method, shape, occasion)
        return dataclasses.replace(plan, demonstrations=joined, expert_model=self._expert_model)
