"""MENTOR (arXiv 2510.04140) and plain GRPO: the two methods without whole expert trajectories."""

from __future__ import annotations

import dataclasses

from mentor_serve.rollout.groups import GroupPlan, plan_requests
from mentor_serve.rollout.strategies.base import GroupShape, Occasion
from mentor_serve.types import GuidanceMethod


class Mentor:
    """N1 on-policy rollouts and, while alpha > 0, N2 from the mixture of policy and expert."""

    method = GuidanceMethod.MENTOR
    num_demonstrations = 0

    def __init__(self, shape: GroupShape) -> None:
        self._shape = shape

    def plan(self, occasion: Occasion) -> GroupPlan:
        """Return the requests under the gamma and alpha of the moment."""
        return sampled_plan(self.method, self._shape, occasion)


class OnPolicy:
    """N1 on-policy rollouts and nothing else: GRPO, the paper's first baseline."""

    method = GuidanceMethod.ON_POLICY
    num_demonstrations = 0

    def __init__(self, shape: GroupShape) -> None:
        self._shape = dataclasses.replace(shape, num_mixed=0)

    def plan(self, occasion: Occasion) -> GroupPlan:
        """Return the one request."""
        return sampled_plan(self.method, self._shape, occasion)


def sampled_plan(method: GuidanceMethod, shape: GroupShape, occasion: Occasion) -> GroupPlan:
    """Return the plan of a group of rollouts of the occasion's prompt."""
    return GroupPlan(
        task=occasion.task,
        guidance=occasion.guidance,
        requests=plan_requests(
            occasion.prompt_token_ids,
            occasion.guidance,
            num_on_policy=shape.num_on_policy,
            num_mixed=shape.num_mixed,
            sampling=shape.sampling,
            seed=occasion.seed,
            record_mixed=shape.record_mixed,
        ),
        method=method,
    )
