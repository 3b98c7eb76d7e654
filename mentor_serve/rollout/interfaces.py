"""What a collector needs of the engine and of the store, wherever they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mentor_serve.store.records import (
    DemonstrationAttempt,
    NewDemonstration,
    StoredDemonstration,
)
from mentor_serve.store.writer import GroupDatabase
from mentor_serve.types import Guidance, Rollout, RolloutRequest, Task


class GroupSampler(Protocol):
    """The engines as the collector sees them."""

    async def guidance(self) -> Guidance:
        """Return version, alpha and gamma of the live policy."""

    async def sample(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        """Return `num_samples` rollouts for each request, in order."""

    async def sample_expert(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        """Return the same of the expert itself: every token follows pi*.

        In these rollouts `policy_logprobs` are the expert's own. May raise anything where the
        expert cannot be reached.
        """


class DemonstrationStore(Protocol):
    """The part of the trajectory store that keeps the expert's solutions."""

    def add_demonstrations(self, run_id: str, task: Task, items: Sequence[NewDemonstration]) -> Any:
        """Store attempts at a task; storing one again changes nothing."""

    def demonstration_attempts(
        self,
        run_id: str,
        task: Task,
        *,
        expert_model: str,
        prompt_token_ids: Sequence[int],
        own_run_only: bool = False,
    ) -> list[DemonstrationAttempt]:
        """Return the attempts of this expert at this prompt, of all runs or one, oldest first."""

    def demonstrations(self, ids: Sequence[str]) -> list[StoredDemonstration]:
        """Return scored attempts with their tokens, in the order of `ids`."""


class GroupStore(DemonstrationStore, GroupDatabase, Protocol):
    """The part of the trajectory store that a collector uses."""

    def count_groups(self, run_id: str) -> dict[str, int]:
        """Return the number of groups by status."""

    def count_groups_ever(self, run_id: str) -> int:
        """Return how many groups the run ever had, pruned ones included."""
