"""What a strategy is told, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mentor_serve.rollout.groups import GroupPlan
from mentor_serve.store.records import StoredDemonstration
from mentor_serve.types import Guidance, GuidanceMethod, SamplingParams, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShape:
    """Sizes and sampling of a group, whatever the method."""

    num_on_policy: int
    """N1, or with expert trajectories in the group: the places that they share with them."""
    num_mixed: int
    """N2; only MENTOR has mixed rollouts."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    record_mixed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Occasion:
    """One task about to become a group."""

    task: Task
    guidance: Guidance
    prompt_token_ids: Sequence[int]
    """Of the task alone, without a hint."""
    demonstrations: Sequence[StoredDemonstration]
    """At most as many as the strategy asked for; none where the expert has no solution."""
    seed: int


class Strategy(Protocol):
    """One way to guide. Stateless: a group is a function of its occasion."""

    @property
    def method(self) -> GuidanceMethod:
        """Stored with each group."""

    @property
    def num_demonstrations(self) -> int:
        """Whole expert trajectories that each group wants."""

    def plan(self, occasion: Occasion) -> GroupPlan:
        """Return the requests of the group and what of the expert's joins it."""
