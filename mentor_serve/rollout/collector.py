"""Keeps the store filled with fresh, scored groups.

Contract: while `run` runs, up to `concurrent_groups` groups are under way. Each becomes one
transaction. Nothing the engine, a verifier or the database does ends the loop: a verifier's failure
is a failed trajectory, an engine's failure a failed group and a pause, an expert's failure a group
without it. While the database is away groups go to the spool (docs/durability.md); when that is
full, collection waits. Only what the user configured wrongly is raised, when the collector is built
or the loop starts.

What a group consists of is the strategy's decision (`rollout.strategies`). Pure asyncio: no Ray, no
SQL; blocking calls to the source and the store run in their own threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from mentor_serve.errors import EngineError, MentorError, VerifierError
from mentor_serve.rollout.config import CollectorConfig
from mentor_serve.rollout.demonstrations import Demonstrations, Outcome
from mentor_serve.rollout.groups import (
    GroupPlan,
    Response,
    collect_responses,
    derive_seed,
    failed_group,
    finished_group,
    is_complete,
)
from mentor_serve.rollout.interfaces import GroupSampler, GroupStore
from mentor_serve.rollout.pacing import Backoff, Pacer, sleep_unless
from mentor_serve.rollout.planning import GroupPlanner
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.recorder import Recorder
from mentor_serve.rollout.strategies import build_strategy
from mentor_serve.rollout.tasks.sources import TaskSource
from mentor_serve.rollout.verifiers.pool import VerifierPool
from mentor_serve.store.outage import Outage
from mentor_serve.store.records import new_id
from mentor_serve.store.spool import Spool
from mentor_serve.types import Guidance, Task

__all__ = ["Collector", "CollectorConfig", "GroupSampler", "GroupStore"]

log = structlog.get_logger(__name__)

T = TypeVar("T")

_COUNTERS = (
    "groups_ready",
    "groups_failed",
    "groups_dropped",
    "groups_rejected",
    "groups_spooled",
    "groups_without_expert",
    "trajectories",
    "trajectories_failed",
    "tokens",
    "demonstrations_generated",
    "demonstrations_failed",
    "demonstrations_reused",
    "verifier_errors",
    "engine_errors",
    "expert_lost",
)


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
        spool: Spool | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            sampler: the engines.
            source: where tasks come from.
            renderer: tasks to prompts, rollouts to text.
            verifier_pool: scores responses.
            store: the trajectory store.
            run_id: run that is collected for.
            config: sizes, budgets, guidance.
            spool: where groups wait while the database is away; None lets them wait in memory.

        Raises:
            ConfigError: the guidance does not fit the size of the groups.
        """
        self._sampler = sampler
        self._source = source
        self._renderer = renderer
        self._verifier_pool = verifier_pool
        self._run_id = run_id
        self._config = config
        strategy = build_strategy(config.guidance, config.shape, renderer)
        self._recorder = Recorder(
            store,
            run_id,
            new_backoff=self._new_backoff,
            spool=spool,
            limits=config.writer_limits,
            outage=Outage(first_s=config.first_backoff_s),
            num_collectors=config.num_collectors,
        )
        self._counts = self._recorder.counts
        demonstrations = Demonstrations(
            config=config,
            sampler=sampler,
            recorder=self._recorder,
            renderer=renderer,
            judge=self._judge,
        )
        self._planner = GroupPlanner(
            strategy=strategy, renderer=renderer, demonstrations=demonstrations
        )
        self._pacer = Pacer(
            self._recorder.count_ready,
            max_ready_groups=config.max_ready_groups,
            max_away_groups=config.max_away_groups,
            is_store_away=lambda: self._recorder.is_store_away,
        )
        self._engine_backoff = self._new_backoff()
        self._expert_is_lost = False
        # A thread of its own: sources are not thread-safe.
        self._source_thread = ThreadPoolExecutor(1, thread_name_prefix="tasks")

    def counters(self) -> dict[str, int]:
        """Return counts since the collector was built, and the state of the moment.

        `groups_ready`, `groups_failed`, `groups_dropped`, `groups_rejected` (refused by the
        database, kept as files), `groups_spooled` (had to wait on disk), `groups_without_expert`
        (wanted an expert trajectory or a hint, got none), `trajectories`, `trajectories_failed`,
        `tokens`;
        `demonstrations_generated`, of these `demonstrations_failed`, `demonstrations_reused`;
        `verifier_errors`, `engine_errors`, `store_errors`, `expert_lost` (rollouts, or groups
        without their demonstrations); `in_flight`, `is_waiting` (1: the queue is full), `waited_s`
        (whole seconds); `spool_groups`, `spool_bytes` (wait on disk now), `is_store_away`,
        `is_spool_full` (1: neither database nor spool takes groups).
        """
        writer = self._recorder.writer_status()
        return {name: self._counts[name] for name in _COUNTERS} | {
            "store_errors": self._counts["store_errors"] + writer.num_failures,
            "spool_groups": writer.num_spooled,
            "spool_bytes": writer.spooled_bytes,
            "is_store_away": int(self._recorder.is_store_away),
            "is_spool_full": int(writer.is_full),
            "in_flight": self._pacer.num_in_flight,
            "is_waiting": int(self._pacer.is_waiting),
            "waited_s": int(self._pacer.waited_s),
        }

    def check_health(self) -> None:
        """Raise `StoreError` where collecting on is in vain: its writer ended by itself."""
        self._recorder.check_health()

    async def run(self, stop: asyncio.Event) -> None:
        """Collect until `stop` is set; then finish or drop what is under way within the bound.

        Raises:
            ConfigError: the verifier cannot be built.
        """
        await self._verifier_pool.start()
        self._recorder.start()
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
            await self._recorder.close()

    async def _resume(self, stop: asyncio.Event) -> None:
        """Move the source beyond the tasks that the run has, or had, groups of."""
        while not stop.is_set():
            try:
                num_groups = await self._recorder.count_groups_ever()
            except Exception as error:  # boundary: the store may fail in any way
                await self._count_failed(error, stop)
                continue
            if num_groups > 0:
                # Beyond what was under way when the process died: those tasks may have been
                # sampled out of order, and the same seed would draw the same rollouts again.
                share = -(-num_groups // self._config.num_collectors)
                spooled = self._recorder.writer_status().num_spooled
                position = share + spooled + self._config.concurrent_groups
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
        number, task = await self._drawn()
        method = self._planner.strategy.method
        plan = GroupPlan(task=task, guidance=guidance, requests=[], method=method)
        group_id = new_id()
        try:
            plan = await self._plan(number, task, guidance)
            rollouts = await self._answer(self._sampler.sample(plan.requests))
            responses = collect_responses(plan, rollouts, self._renderer)
        except Exception as error:  # boundary: an engine may fail in any way, Ray's included
            await self._recorder.add_group(failed_group(group_id, plan, error))
            await self._engine_failed(error, stop)
            return
        if self._engine_backoff.succeed():
            await self._recorder.event("engine_back", "info", "groups are generated again")
        await self._score(task, responses)
        await self._note_mixed(responses)
        await self._recorder.add_group(finished_group(group_id, plan, responses))

    async def _answer(self, asked: Awaitable[T]) -> T:
        limit_s = self._config.sample_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await asked
        except TimeoutError as error:
            raise EngineError(f"the engine gave no answer within {limit_s:g} s") from error

    async def _drawn(self) -> tuple[int, Task]:
        """The next task and its number in the source's sequence."""

        def draw() -> tuple[int, Task]:
            number = self._source.state()["position"]
            return number, self._source.next_task()

        return await asyncio.get_running_loop().run_in_executor(self._source_thread, draw)

    async def _plan(self, number: int, task: Task, guidance: Guidance) -> GroupPlan:
        config = self._config
        seed = derive_seed(config.seed, self._run_id, config.collector_index, number)
        plan, found = await self._planner.plan(task, guidance, seed=seed)
        if found.is_asked or found.problem is not None:
            await self._note_expert(is_lost=found.problem is not None, reason=str(found.problem))
        wants_expert = self._planner.strategy.num_demonstrations > 0
        has_expert = bool(plan.demonstrations) or plan.hint is not None
        self._counts["groups_without_expert"] += wants_expert and not has_expert
        return plan

    async def _score(self, task: Task, responses: list[Response]) -> None:
        complete = [response for response in responses if is_complete(response)]
        outcomes = await self._judge(task, [response.text for response in complete])
        for response, outcome in zip(complete, outcomes, strict=True):
            response.outcome = outcome

    async def _judge(self, task: Task, texts: Sequence[str]) -> list[Outcome]:
        """One score or verifier's failure for each response to a task."""
        items = [(task, f"{self._renderer.response_prefix}{text}") for text in texts]
        try:
            outcomes = await self._verifier_pool.score_batch(items)
        except MentorError as error:
            outcomes = [VerifierError(str(error)) for _ in items]
        self._counts["verifier_errors"] += sum(isinstance(one, VerifierError) for one in outcomes)
        return outcomes

    async def _engine_failed(self, error: Exception, stop: asyncio.Event) -> None:
        self._counts["engine_errors"] += 1
        wait_s = self._engine_backoff.fail()
        if self._engine_backoff.num_failures == 1:
            message = f"a group could not be generated: {type(error).__name__}: {error}"
            await self._recorder.event("engine_failed", "warning", message)
        log.warning("a group could not be generated", error=str(error), wait_s=wait_s)
        await sleep_unless(stop, wait_s)

    async def _note_mixed(self, responses: list[Response]) -> None:
        mixed = [response.rollout for response in responses if response.request.mixed]
        if mixed:
            num_lost = sum(rollout.expert_lost for rollout in mixed)
            await self._note_expert(is_lost=num_lost > 0, num_lost=num_lost)

    async def _note_expert(self, *, is_lost: bool, num_lost: int = 1, reason: str = "") -> None:
        """Record when the expert goes and when it comes back, once each."""
        self._counts["expert_lost"] += num_lost if is_lost else 0
        if is_lost and not self._expert_is_lost:
            self._expert_is_lost = True
            message = "the expert did not answer; its rollouts fall back to the policy"
            await self._recorder.event(
                "expert_lost", "warning", f"{message}: {reason}" if reason else message
            )
        elif not is_lost and self._expert_is_lost:
            self._expert_is_lost = False
            await self._recorder.event("expert_back", "info", "the expert answers again")

    async def _count_failed(self, error: Exception, stop: asyncio.Event) -> None:
        self._counts["store_errors"] += 1
        log.warning("cannot count groups", error=str(error))
        await sleep_unless(stop, self._config.longest_backoff_s / 10)

    def _new_backoff(self) -> Backoff:
        config = self._config
        return Backoff(first_s=config.first_backoff_s, longest_s=config.longest_backoff_s)
