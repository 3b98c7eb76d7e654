"""Keeps the store filled with fresh, scored groups.

Contract: while `run` runs, up to `concurrent_groups` groups are under way. Each becomes one
transaction. Nothing the engine, a verifier or the database does ends the loop: a verifier's failure
is a failed trajectory, an engine's failure a failed group and a pause, a database's failure a retry
of the same group. Only what the user configured wrongly is raised, when the loop starts.

Pure asyncio: no Ray, no SQL; blocking calls to the source and the store run in their own threads.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import structlog

from mentor_serve.errors import ConfigError, EngineError, MentorError, VerifierError
from mentor_serve.rollout.groups import (
    GroupPlan,
    Response,
    collect_responses,
    derive_seed,
    failed_group,
    finished_group,
    is_complete,
    plan_requests,
)
from mentor_serve.rollout.pacing import Backoff, Pacer, sleep_unless
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.tasks.sources import TaskSource
from mentor_serve.rollout.verifiers.pool import VerifierPool
from mentor_serve.store.records import NewGroup, new_id
from mentor_serve.types import (
    GroupStatus,
    Guidance,
    Rollout,
    RolloutRequest,
    SamplingParams,
    Task,
)

log = structlog.get_logger(__name__)

T = TypeVar("T")

_POISON_ATTEMPTS = 5
"""Failed writes after which a group is given up, if other groups were written meanwhile."""


class GroupSampler(Protocol):
    """The engine as the collector sees it, wherever it runs."""

    async def guidance(self) -> Guidance:
        """Return version, alpha and gamma of the live policy."""

    async def sample(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        """Return `num_samples` rollouts for each request, in order."""


class GroupStore(Protocol):
    """The part of the trajectory store that a collector writes."""

    def add_group(self, run_id: str, group: NewGroup) -> Any:
        """Store a group in one transaction; storing it again changes nothing."""

    def count_groups(self, run_id: str) -> dict[str, int]:
        """Return the number of groups by status."""

    def add_event(
        self,
        run_id: str,
        *,
        kind: str,
        severity: str,
        message: str,
        details: dict[str, Any] | None = None,
    ) -> Any:
        """Record something an operator should know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectorConfig:
    """How one collector works."""

    num_on_policy: int = 8
    """N1 (paper: 8)."""
    num_mixed: int = 4
    """N2 while alpha > 0 (paper: 4)."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    concurrent_groups: int = 8
    """Groups under way at the same time."""
    record_mixed: bool = False
    """Ask the expert at every token of mixed rollouts."""
    seed: int = 0
    collector_index: int = 0
    """Number of this collector, so that no two sample the same task under the same seed."""
    num_collectors: int = 1
    """Collectors of the run; each resumes its own share of the task sequence."""
    max_ready_groups: int | None = None
    """Ready groups at which collection waits for the learner; None never waits."""
    sample_timeout_s: float = 600.0
    """How long the engine may take for a group."""
    stop_timeout_s: float = 10.0
    """How long groups under way may take to end once the loop is told to stop."""
    first_backoff_s: float = 0.5
    longest_backoff_s: float = 30.0
    """Bounds of the pause after a failure of the engine or the store."""

    def __post_init__(self) -> None:
        if self.num_on_policy < 2 or self.num_mixed < 0 or self.concurrent_groups < 1:
            raise ConfigError(
                "expected num_on_policy >= 2, num_mixed >= 0 and concurrent_groups >= 1, got "
                f"{self.num_on_policy}, {self.num_mixed} and {self.concurrent_groups}"
            )
        if self.max_ready_groups is not None and self.max_ready_groups < 1:
            raise ConfigError(f"expected max_ready_groups >= 1, got {self.max_ready_groups}")


class Collector:
    """Turns tasks into stored groups until it is told to stop."""

    def __init__(
        self,
        *,
        sampler: GroupSampler,
        source: TaskSource,
        renderer: PromptRenderer,
        verifier_pool: VerifierPool,
        store: GroupStore,
        run_id: str,
        config: CollectorConfig,
    ) -> None:
        self._sampler = sampler
        self._source = source
        self._renderer = renderer
        self._verifier_pool = verifier_pool
        self._store = store
        self._run_id = run_id
        self._config = config
        self._pacer = Pacer(self._count_ready, max_ready_groups=config.max_ready_groups)
        self._engine_backoff = self._new_backoff()
        self._counts: Counter[str] = Counter()
        self._expert_is_lost = False
        # One thread each: sources are not thread-safe, and SQLite has one writer anyway.
        self._source_thread = ThreadPoolExecutor(1, thread_name_prefix="tasks")
        self._store_thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    def counters(self) -> dict[str, int]:
        """Return counts since the collector was built, and the state of the moment.

        `groups_ready`, `groups_failed`, `groups_dropped`, `trajectories`, `trajectories_failed`,
        `tokens`, `verifier_errors`, `engine_errors`, `store_errors`, `expert_lost` (rollouts);
        `in_flight`, `is_waiting` (1: the queue is full), `waited_s` (whole seconds).
        """
        names = (
            "groups_ready",
            "groups_failed",
            "groups_dropped",
            "trajectories",
            "trajectories_failed",
            "tokens",
            "verifier_errors",
            "engine_errors",
            "store_errors",
            "expert_lost",
        )
        return {name: self._counts[name] for name in names} | {
            "in_flight": self._pacer.num_in_flight,
            "is_waiting": int(self._pacer.is_waiting),
            "waited_s": int(self._pacer.waited_s),
        }

    async def run(self, stop: asyncio.Event) -> None:
        """Collect until `stop` is set; then finish or drop what is under way within the bound.

        Raises:
            ConfigError: the verifier cannot be built.
        """
        await self._verifier_pool.start()
        await self._resume(stop)
        lanes = [
            asyncio.create_task(self._lane(stop)) for _ in range(self._config.concurrent_groups)
        ]
        try:
            await stop.wait()
            await asyncio.wait(lanes, timeout=self._config.stop_timeout_s)
        finally:
            for lane in lanes:
                lane.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)
            self._source_thread.shutdown(wait=False, cancel_futures=True)
            self._store_thread.shutdown(wait=False, cancel_futures=True)

    async def _resume(self, stop: asyncio.Event) -> None:
        """Move the source beyond the tasks that the run has groups of."""
        while not stop.is_set():
            try:
                num_groups = sum((await self._count_groups()).values())
            except Exception as error:  # boundary: the store may fail in any way
                await self._count_failed(error, stop)
                continue
            if num_groups > 0:
                # Beyond what was under way when the process died: those tasks may have been
                # sampled out of order, and the same seed would draw the same rollouts again.
                share = -(-num_groups // self._config.num_collectors)
                position = share + self._config.concurrent_groups
                self._source.restore({"position": max(position, self._source.state()["position"])})
            return

    async def _lane(self, stop: asyncio.Event) -> None:
        """Collect one group after the other."""
        while not stop.is_set():
            try:
                if not await self._pacer.admit(stop):
                    return
            except Exception as error:  # boundary: the store may fail in any way
                await self._count_failed(error, stop)
                continue
            try:
                await self._collect(stop)
            except asyncio.CancelledError:
                self._counts["groups_dropped"] += 1
                raise
            except Exception as error:  # boundary: a collector outlives whatever one group meets
                await self._engine_failed(error, stop)
            finally:
                self._pacer.finish()

    async def _collect(self, stop: asyncio.Event) -> None:
        """Make and store one group. Whatever it raises happened before there was a group."""
        guidance = await self._answer(self._sampler.guidance())
        number, task = await self._in_thread(self._source_thread, self._draw)
        plan = GroupPlan(task=task, guidance=guidance, requests=[])
        group_id = new_id()
        try:
            plan = self._plan(number, task, guidance)
            rollouts = await self._answer(self._sampler.sample(plan.requests))
            responses = collect_responses(plan, rollouts, self._renderer)
        except Exception as error:  # boundary: an engine may fail in any way, Ray's included
            await self._store_group(failed_group(group_id, plan, error))
            await self._engine_failed(error, stop)
            return
        if self._engine_backoff.succeed():
            await self._event("engine_back", "info", "groups are generated again")
        await self._score(task, responses)
        await self._note_expert(responses)
        await self._store_group(finished_group(group_id, plan, responses))

    async def _answer(self, asked: Awaitable[T]) -> T:
        limit_s = self._config.sample_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await asked
        except TimeoutError as error:
            raise EngineError(f"the engine gave no answer within {limit_s:g} s") from error

    def _draw(self) -> tuple[int, Task]:
        number = self._source.state()["position"]
        return number, self._source.next_task()

    def _plan(self, number: int, task: Task, guidance: Guidance) -> GroupPlan:
        config = self._config
        requests = plan_requests(
            self._renderer.render(task),
            guidance,
            num_on_policy=config.num_on_policy,
            num_mixed=config.num_mixed,
            sampling=config.sampling,
            seed=derive_seed(config.seed, self._run_id, config.collector_index, number),
            record_mixed=config.record_mixed,
        )
        return GroupPlan(task=task, guidance=guidance, requests=requests)

    async def _score(self, task: Task, responses: list[Response]) -> None:
        complete = [response for response in responses if is_complete(response)]
        prefix = self._renderer.response_prefix
        items = [(task, f"{prefix}{response.text}") for response in complete]
        try:
            outcomes = await self._verifier_pool.score_batch(items)
        except MentorError as error:
            outcomes = [VerifierError(str(error)) for _ in items]
        for response, outcome in zip(complete, outcomes, strict=True):
            response.outcome = outcome
            self._counts["verifier_errors"] += isinstance(outcome, VerifierError)

    async def _store_group(self, group: NewGroup) -> None:
        """Store a group, trying again for as long as it takes."""
        backoff = self._new_backoff()
        written_before = self._counts["groups_ready"] + self._counts["groups_failed"]
        while True:
            try:
                await self._in_thread(
                    self._store_thread, lambda: self._store.add_group(self._run_id, group)
                )
                break
            except Exception as error:  # boundary: the database may fail in any way
                self._counts["store_errors"] += 1
                wait_s = backoff.fail()
                written = self._counts["groups_ready"] + self._counts["groups_failed"]
                if backoff.num_failures >= _POISON_ATTEMPTS and written > written_before:
                    self._counts["groups_dropped"] += 1
                    message = f"group {group.group_id} cannot be stored: {error}"
                    await self._event("group_dropped", "error", message)
                    return
                log.warning("cannot store a group", group_id=group.group_id, error=str(error))
            await asyncio.sleep(wait_s)
        self._count(group)

    def _count(self, group: NewGroup) -> None:
        self._counts[f"groups_{GroupStatus(group.status).value}"] += 1
        for trajectory in group.trajectories:
            self._counts["trajectories"] += 1
            self._counts["trajectories_failed"] += trajectory.error is not None
            if trajectory.rollout is not None:
                self._counts["tokens"] += trajectory.rollout.num_tokens

    async def _engine_failed(self, error: Exception, stop: asyncio.Event) -> None:
        self._counts["engine_errors"] += 1
        wait_s = self._engine_backoff.fail()
        if self._engine_backoff.num_failures == 1:
            message = f"a group could not be generated: {type(error).__name__}: {error}"
            await self._event("engine_failed", "warning", message)
        log.warning("a group could not be generated", error=str(error), wait_s=wait_s)
        await sleep_unless(stop, wait_s)

    async def _note_expert(self, responses: list[Response]) -> None:
        """Record when the expert goes and when it comes back, once each."""
        mixed = [response.rollout for response in responses if response.request.mixed]
        num_lost = sum(rollout.expert_lost for rollout in mixed)
        self._counts["expert_lost"] += num_lost
        if num_lost and not self._expert_is_lost:
            self._expert_is_lost = True
            message = "the expert did not answer; mixed rollouts fall back to the policy"
            await self._event("expert_lost", "warning", message)
        elif mixed and not num_lost and self._expert_is_lost:
            self._expert_is_lost = False
            await self._event("expert_back", "info", "the expert answers again")

    async def _event(self, kind: str, severity: str, message: str) -> None:
        log.info(message, kind=kind)
        try:
            await self._in_thread(
                self._store_thread,
                lambda: self._store.add_event(
                    self._run_id, kind=kind, severity=severity, message=message[:2000]
                ),
            )
        except Exception as error:  # boundary: an event is worth less than the group
            self._counts["store_errors"] += 1
            log.warning("cannot store an event", kind=kind, error=str(error))

    async def _count_ready(self) -> int:
        return (await self._count_groups()).get(GroupStatus.READY.value, 0)

    async def _count_groups(self) -> dict[str, int]:
        return await self._in_thread(
            self._store_thread, lambda: self._store.count_groups(self._run_id)
        )

    async def _count_failed(self, error: Exception, stop: asyncio.Event) -> None:
        self._counts["store_errors"] += 1
        log.warning("cannot count groups", error=str(error))
        await sleep_unless(stop, self._config.longest_backoff_s / 10)

    async def _in_thread(self, thread: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(thread, call)

    def _new_backoff(self) -> Backoff:
        config = self._config
        return Backoff(first_s=config.first_backoff_s, longest_s=config.longest_backoff_s)
