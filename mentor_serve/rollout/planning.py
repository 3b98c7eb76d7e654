"""From a task to the plan of its group: the prompt, the expert's solutions where the method wants
some, and the strategy's decision. The service's collector and the comparison's rounds share it.
"""

from __future__ import annotations

from mentor_serve.rollout.demonstrations import Demonstrations, Found, Request
from mentor_serve.rollout.groups import GroupPlan
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.strategies import Occasion, Strategy
from mentor_serve.types import Guidance, Task


class GroupPlanner:
    """Plans one group after the other; what the expert owes is told, not decided upon."""

    def __init__(
        self, *, strategy: Strategy, renderer: PromptRenderer, demonstrations: Demonstrations
    ) -> None:
        """Look for nothing yet."""
        self.strategy = strategy
        self._renderer = renderer
        self._demonstrations = demonstrations

    async def plan(self, task: Task, guidance: Guidance, *, seed: int) -> tuple[GroupPlan, Found]:
        """Return the group's plan, and what was found of the solutions that it wanted.

        A plan whose solutions were not found goes without them. Raises what rendering the task's
        prompt raises.
        """
        prompt = self._renderer.render(task)
        found = Found()
        if self.strategy.num_demonstrations:
            found = await self._demonstrations.find(
                Request(
                    task=task,
                    prompt_token_ids=prompt,
                    num_wanted=self.strategy.num_demonstrations,
                    policy_version=guidance.policy_version,
                )
            )
        occasion = Occasion(
            task=task,
            guidance=guidance,
            prompt_token_ids=prompt,
            demonstrations=found.demonstrations,
            seed=seed,
        )
        return self.strategy.plan(occasion), found
