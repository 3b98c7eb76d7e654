"""Whole solutions of the expert: from the store where it has them, else from the expert.

Every attempt is scored and stored before it is used, wrong ones too, so that the expert is asked
about a task once, whatever restarts in between, and other runs find its answers. A task that it
failed `expert_attempts` times in a row is not tried again. An expert that cannot be reached leaves
no trace: groups go on without it, and after a pause it is asked again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

from mentor_serve.errors import EngineError, ExpertUnavailable, StoreError, VerifierError
from mentor_serve.rollout.config import CollectorConfig
from mentor_serve.rollout.groups import derive_seed, expert_rollout
from mentor_serve.rollout.interfaces import GroupSampler
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.recorder import Recorder
from mentor_serve.store.records import (
    DemonstrationAttempt,
    NewDemonstration,
    NewTrajectory,
    StoredDemonstration,
    new_id,
)
from mentor_serve.types import (
    Rollout,
    RolloutRequest,
    Score,
    StopReason,
    Task,
    TrajectoryKind,
)

Outcome = Score | VerifierError
Judge = Callable[[Task, Sequence[str]], Awaitable[list[Outcome]]]
"""Scores responses to a task, one outcome each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Demonstrations wanted for one group."""

    task: Task
    prompt_token_ids: Sequence[int]
    """Of the task alone, without a hint."""
    num_wanted: int
    policy_version: int
    """Live version, only recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """At most as many as were wanted."""

    demonstrations: tuple[StoredDemonstration, ...] = ()
    is_asked: bool = False
    """The expert itself was needed: the stored solutions were too few."""
    problem: Exception | None = None
    """Why the expert, or the store, gave no answer; None where the expert merely failed."""


class Demonstrations:
    """Finds demonstrations for one collector's groups."""

    def __init__(
        self,
        *,
        config: CollectorConfig,
        sampler: GroupSampler,
        recorder: Recorder,
        renderer: PromptRenderer,
        judge: Judge,
    ) -> None:
        self._config = config.guidance
        self._sampling = config.sampling
        self._seed = config.seed
        self._timeout_s = config.sample_timeout_s
        self._sampler = sampler
        self._recorder = recorder
        self._counts = recorder.counts
        self._renderer = renderer
        self._judge = judge
        self._silent_until = 0.0
        # Groups of one task that are under way together must not ask twice.
        self._locks: WeakValueDictionary[tuple[str, str, str], asyncio.Lock] = WeakValueDictionary()

    async def find(self, request: Request) -> Found:
        """Return stored demonstrations, the least used first, and generate what is missing."""
        task = request.task
        key = (task.source, task.prompt, task.answer)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            try:
                return await self._find(request)
            except StoreError as error:  # this task's alone: others are read and written
                return Found(problem=error)

    async def _find(self, request: Request) -> Found:
        attempts = await self._attempts(request)
        ids = self._choose(attempts, request.num_wanted)
        found = await self._read(ids) if ids else []
        self._counts["demonstrations_reused"] += len(found)
        num_failed = self._failures_in_a_row(attempts)
        if len(found) == request.num_wanted or num_failed >= self._config.expert_attempts:
            return Found(demonstrations=tuple(found))
        problem = None
        try:
            found += await self._generate(
                request,
                num_missing=request.num_wanted - len(found),
                num_made=len(attempts),
                num_failed=num_failed,
            )
        except ExpertUnavailable as error:
            problem = error
        return Found(demonstrations=tuple(found), is_asked=True, problem=problem)

    async def _attempts(self, request: Request) -> list[DemonstrationAttempt]:
        store, run_id = self._recorder.store, self._recorder.run_id
        return await self._recorder.persist(
            lambda: store.demonstration_attempts(
                run_id,
                request.task,
                expert_model=self._config.expert_model,
                prompt_token_ids=request.prompt_token_ids,
                own_run_only=not self._config.shares_solutions,
            ),
            what="demonstrations of a task",
        )

    async def _read(self, ids: Sequence[str]) -> list[StoredDemonstration]:
        store = self._recorder.store
        return await self._recorder.persist(
            lambda: store.demonstrations(ids), what="demonstrations of a task"
        )

    def _choose(self, attempts: Sequence[DemonstrationAttempt], num_wanted: int) -> list[str]:
        most = self._config.max_uses
        fit = [
            one
            for one in attempts
            if self._is_usable(one.accuracy, one.stop_reason, one.num_tokens)
            and (most == 0 or one.num_uses < most)
        ]
        # Sorting is stable: of equally used ones the oldest comes first.
        fit.sort(key=lambda one: one.num_uses)
        return [one.demonstration_id for one in fit[:num_wanted]]

    def _is_usable(self, accuracy: float | None, reason: StopReason, num_tokens: int) -> bool:
        if accuracy is None or reason is StopReason.LENGTH:
            return False
        is_right = accuracy >= 1 or not self._config.only_correct
        # A run with a smaller limit may meet longer solutions of an earlier one.
        return is_right and num_tokens <= self._sampling.max_new_tokens

    async def _generate(
        self, request: Request, *, num_missing: int, num_made: int, num_failed: int
    ) -> list[StoredDemonstration]:
        """Ask until nothing is missing or the expert failed too often in a row.

        Raises:
            ExpertUnavailable: at the first question that got no answer; nothing usable came before.
        """
        usable: list[StoredDemonstration] = []
        while len(usable) < num_missing and num_failed < self._config.expert_attempts:
            num_left = self._config.expert_attempts - num_failed
            try:
                rollouts = await self._ask(
                    request, min(num_missing - len(usable), num_left), first=num_made
                )
            except ExpertUnavailable:
                if usable:
                    break
                raise
            made = await self._score_and_store(request, rollouts)
            num_made += len(made)
            good = [one for one in made if one is not None]
            usable += good
            num_failed = 0 if good else num_failed + len(made)
        return usable

    def _failures_in_a_row(self, attempts: Sequence[DemonstrationAttempt]) -> int:
        count = 0
        for one in reversed(attempts):
            if self._is_usable(one.accuracy, one.stop_reason, one.num_tokens):
                break
            count += 1
        return count

    async def _ask(self, request: Request, num_samples: int, *, first: int) -> list[Rollout]:
        """Raises `ExpertUnavailable` for all that is no answer, and for a while after that."""
        if time.monotonic() < self._silent_until:
            raise ExpertUnavailable("the expert failed a moment ago and is not asked for now")
        try:
            return await self._sample(request, num_samples, first=first)
        except Exception as error:  # boundary: an expert may fail in any way, Ray's included
            self._silent_until = time.monotonic() + self._config.retry_s
            raise ExpertUnavailable(f"{type(error).__name__}: {error}") from error

    async def _sample(self, request: Request, num_samples: int, *, first: int) -> list[Rollout]:
        task = request.task
        asked = RolloutRequest(
            prompt_token_ids=tuple(request.prompt_token_ids),
            num_samples=num_samples,
            # The number of attempts before makes each one new, after a restart too.
            seed=derive_seed(
                self._seed, TrajectoryKind.EXPERT, task.source, task.prompt, task.answer, first
            ),
            sampling=self._sampling,
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                (rollouts,) = await self._sampler.sample_expert([asked])
        except TimeoutError as error:
            raise EngineError(f"the expert gave no answer within {self._timeout_s:g} s") from error
        broken = [
            one.stop_reason
            for one in rollouts
            if one.stop_reason in (StopReason.CANCELLED, StopReason.ERROR)
        ]
        if broken or len(rollouts) != num_samples:
            raise EngineError(
                f"expected {num_samples} whole responses of the expert, got {len(rollouts)}, of "
                f"which {len(broken)} broke off"
            )
        return rollouts

    async def _score_and_store(
        self, request: Request, rollouts: Sequence[Rollout]
    ) -> list[StoredDemonstration | None]:
        """Store the attempts; None stands for one that is no demonstration."""
        texts = [self._renderer.decode(rollout) for rollout in rollouts]
        outcomes = await self._judge(request.task, texts)
        items, made = [], []
        for rollout, text, outcome in zip(rollouts, texts, outcomes, strict=True):
            score = outcome if isinstance(outcome, Score) else None
            one = StoredDemonstration(
                demonstration_id=new_id(),
                score=score or Score(reward=0.0, accuracy=0.0, format_score=0.0),
                text=text,
                token_ids=rollout.token_ids,
                expert_logprobs=rollout.policy_logprobs,
                stop_reason=rollout.stop_reason,
            )
            items.append(self._item(request, one, outcome, rollout.latency_s))
            accuracy = None if score is None else score.accuracy
            is_usable = self._is_usable(accuracy, one.stop_reason, len(one.token_ids))
            made.append(one if is_usable else None)
        self._counts["demonstrations_generated"] += len(items)
        self._counts["demonstrations_failed"] += made.count(None)
        await self._store(request.task, items)
        return made

    def _item(
        self, request: Request, one: StoredDemonstration, outcome: Outcome, latency_s: float
    ) -> NewDemonstration:
        rollout = expert_rollout(one, policy_version=request.policy_version, latency_s=latency_s)
        trajectory = NewTrajectory(
            rollout=rollout,
            kind=TrajectoryKind.EXPERT,
            sample_index=0,
            score=one.score,
            prompt_token_ids=tuple(request.prompt_token_ids),
            expert_model=self._config.expert_model,
        )
        if not isinstance(outcome, Score):
            trajectory = replace(trajectory, score=None, error=str(outcome))
        return NewDemonstration(demonstration_id=one.demonstration_id, trajectory=trajectory)

    async def _store(self, task: Task, items: Sequence[NewDemonstration]) -> None:
        store, run_id = self._recorder.store, self._recorder.run_id
        await self._recorder.persist(
            lambda: store.add_demonstrations(run_id, task, items), what="demonstrations of a task"
        )
