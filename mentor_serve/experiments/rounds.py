"""Collects exactly the groups of one update, under guidance that is given: no loop, no pauses.

The plan of a group, the expert's demonstrations, the verifiers and the rows are those of
`rollout.collector`; what is missing is what a service needs to outlive failures. Here an error ends
the trial, which is resumed from what was stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from mentor_serve.errors import EngineError, StoreError, VerifierError
from mentor_serve.experiments.arms import Variant
from mentor_serve.rollout.config import CollectorConfig
from mentor_serve.rollout.demonstrations import Demonstrations, Outcome
from mentor_serve.rollout.groups import (
    GroupPlan,
    Response,
    collect_responses,
    derive_seed,
    finished_group,
)
from mentor_serve.rollout.interfaces import GroupSampler, GroupStore
from mentor_serve.rollout.pacing import Backoff
from mentor_serve.rollout.planning import GroupPlanner
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.recorder import Recorder
from mentor_serve.rollout.strategies import build_strategy
from mentor_serve.rollout.tasks.sources import TaskSource
from mentor_serve.rollout.verifiers.pool import VerifierPool
from mentor_serve.store.records import NewGroup, new_id
from mentor_serve.types import GroupStatus, Guidance, Task

_NEVER = 2**31 - 1
"""Above every version."""


class RoundStore(GroupStore, Protocol):
    """The part of the trajectory store that a round uses."""

    def add_group(self, run_id: str, group: NewGroup) -> Any:
        """Store a group; storing it again changes nothing."""

    def mark_stale(self, run_id: str, *, min_policy_version: int) -> int:
        """Give up ready groups with a token of an older version."""


class RoundCollector:
    """Turns the next tasks into stored groups, in the order of the tasks."""

    def __init__(
        self,
        *,
        sampler: GroupSampler,
        source: TaskSource,
        renderer: PromptRenderer,
        verifier_pool: VerifierPool,
        store: RoundStore,
        run_id: str,
        config: CollectorConfig,
        variant: Variant,
    ) -> None:
        """Collect nothing yet; the arguments are a `Collector`'s."""
        self._sampler = sampler
        self._source = source
        self._renderer = renderer
        self._verifier_pool = verifier_pool
        self._store = store
        self._run_id = run_id
        self._config = config
        self._variant = variant
        demonstrations = Demonstrations(
            config=config,
            sampler=sampler,
            recorder=Recorder(store, run_id, new_backoff=Backoff),
            renderer=renderer,
            judge=self._judge,
        )
        self._planner = GroupPlanner(
            strategy=build_strategy(config.guidance, config.shape, renderer),
            renderer=renderer,
            demonstrations=demonstrations,
        )

    def restart_at(self, number: int) -> None:
        """Go on with task `number`, and give up groups that wait: they are collected again.

        They were left by a process that died before its update, and come out the same.
        """
        self._store.mark_stale(self._run_id, min_policy_version=_NEVER)
        self._source.restore({"position": number})

    async def collect(
        self, num_groups: int, guidance: Guidance, *, weight: float
    ) -> list[Response]:
        """Store `num_groups` groups, and return all their sampled responses.

        Args:
            num_groups: how many tasks to take.
            guidance: version, alpha and gamma that the engine's weights go with.
            weight: w of every mixed token where the variant's gate is `matched`.

        Raises:
            EngineError: a rollout broke off.
            StoreError: the expert's solutions cannot be read.
            VerifierError: a response could not be judged.
        """
        first = self._source.state()["position"]
        tasks = [self._source.next_task() for _ in range(num_groups)]
        plans = await asyncio.gather(
            *(self._plan(first + index, task, guidance) for index, task in enumerate(tasks))
        )
        plans = [self._varied(plan, weight) for plan in plans]
        requests = [request for plan in plans for request in plan.requests]
        rollouts = iter(await self._sampler.sample(requests))
        groups = [
            collect_responses(plan, [next(rollouts) for _ in plan.requests], self._renderer)
            for plan in plans
        ]
        await self._score(plans, groups)
        for plan, responses in zip(plans, groups, strict=True):
            self._store_group(plan, responses)
        return [response for responses in groups for response in responses]

    async def _plan(self, number: int, task: Task, guidance: Guidance) -> GroupPlan:
        # Nothing of the run's name: arms of one seed start from the same rollouts.
        seed = derive_seed(self._config.seed, number)
        plan, found = await self._planner.plan(task, guidance, seed=seed)
        if found.problem is not None:
            raise StoreError(f"no demonstration of {task.prompt!r}: {found.problem}")
        return plan

    def _varied(self, plan: GroupPlan, weight: float) -> GroupPlan:
        variant = self._variant
        constant = weight if variant.gate == "matched" else None
        requests = [
            replace(request, constant_weight=constant, first_weight=variant.first_weight)
            if request.mixed
            else request
            for request in plan.requests
        ]
        return replace(plan, requests=requests)

    async def _score(self, plans: Sequence[GroupPlan], groups: Sequence[list[Response]]) -> None:
        flat = [
            (plan.task, response)
            for plan, responses in zip(plans, groups, strict=True)
            for response in responses
        ]
        for _, response in flat:
            if isinstance(response.outcome, EngineError):
                raise response.outcome
        outcomes = await self._judged([(task, response.text) for task, response in flat])
        for (_, response), outcome in zip(flat, outcomes, strict=True):
            response.outcome = outcome

    def _store_group(self, plan: GroupPlan, responses: Sequence[Response]) -> None:
        group = finished_group(new_id(), plan, responses)
        if group.status is not GroupStatus.READY:
            raise EngineError(f"a group of {plan.task.prompt!r} failed: {group.error}")
        self._store.add_group(self._run_id, group)

    async def _judge(self, task: Task, texts: Sequence[str]) -> list[Outcome]:
        return await self._judged([(task, text) for text in texts])

    async def _judged(self, items: Sequence[tuple[Task, str]]) -> list[Outcome]:
        prefix = self._renderer.response_prefix
        outcomes = await self._verifier_pool.score_batch(
            [(task, f"{prefix}{text}") for task, text in items]
        )
        failed = next((one for one in outcomes if isinstance(one, VerifierError)), None)
        if failed is not None:
            raise failed
        return outcomes
