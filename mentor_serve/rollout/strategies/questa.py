"""QuestA (arXiv 2507.13266): the question shows the first part of an expert's solution.

All rollouts are on-policy under the augmented prompt; training sees the prompt that the model saw.
The cut is by tokens of the demonstration, as in the paper.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mentor_serve.errors import ConfigError
from mentor_serve.models.prompts import THINK_OPEN
from mentor_serve.rollout.groups import GroupPlan, Hint
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.strategies.base import GroupShape, Occasion
from mentor_serve.rollout.strategies.mixed import sampled_plan
from mentor_serve.store.records import StoredDemonstration
from mentor_serve.types import GuidanceMethod, StopReason

_UNFINISHED_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HintSchedule:
    """How much of a solution is shown, and under which heading."""

    fraction: float = 0.5
    later_fraction: float = 0.25
    later_step: int = 0
    """Update from which `later_fraction` counts; 0: never."""
    header: str = "## Hint: Partial Solution"
    max_prompt_tokens: int | None = None
    """A longer augmented prompt would leave no room to answer; None: no bound."""

    def __post_init__(self) -> None:
        for name in ("fraction", "later_fraction"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ConfigError(
                    f"hint {name}: expected a share between 0 and 1, got {value}; for no hints use "
                    "guidance.method = 'on_policy'"
                )

    def at(self, step: int) -> float:
        """Return the share that is shown after `step` updates."""
        return self.later_fraction if 0 < self.later_step <= step else self.fraction


class QuestA:
    """On-policy rollouts of the hinted prompt; of the plain one where the expert has no solution.

    A hint is also left out where it would be empty or make the prompt too long.
    """

    method = GuidanceMethod.QUESTA
    num_demonstrations = 1

    def __init__(
        self, shape: GroupShape, *, schedule: HintSchedule, renderer: PromptRenderer
    ) -> None:
        self._shape = dataclasses.replace(shape, num_mixed=0)
        self._schedule = schedule
        self._renderer = renderer

    def plan(self, occasion: Occasion) -> GroupPlan:
        """Return the on-policy request under the augmented prompt."""
        hint = None
        for demonstration in occasion.demonstrations[:1]:
            fraction = self._schedule.at(occasion.guidance.step)
            shown = _first_part(demonstration, fraction)
            text = self._text(shown)
            prompt = self._renderer.render(occasion.task, hint=text) if text else []
            if prompt and self._fits(prompt):
                occasion = dataclasses.replace(occasion, prompt_token_ids=prompt)
                hint = Hint(
                    demonstration_id=demonstration.demonstration_id,
                    num_tokens=len(shown),
                    fraction=fraction,
                )
        plan = sampled_plan(self.method, self._shape, occasion)
        return dataclasses.replace(plan, hint=hint)

    def _fits(self, prompt: list[int]) -> bool:
        most = self._schedule.max_prompt_tokens
        return most is None or len(prompt) <= most

    def _text(self, token_ids: list[int]) -> str:
        # A cut inside a character leaves a replacement character; and an opened <think> would open
        # nothing in the user's turn.
        text = self._renderer.text_of(token_ids).rstrip(_UNFINISHED_CHARACTER)
        text = text.strip().removeprefix(THINK_OPEN).strip()
        return f"{self._schedule.header}\n\n{text}" if text else ""


def _first_part(demonstration: StoredDemonstration, fraction: float) -> list[int]:
    """The first `fraction` of the tokens, rounded down; the end token does not count."""
    token_ids: list[int] = demonstration.token_ids.tolist()
    if demonstration.stop_reason is StopReason.EOS:
        token_ids = token_ids[:-1]
    return token_ids[: int(fraction * len(token_ids))]
