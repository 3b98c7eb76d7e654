"""The collector deployment: turns tasks into stored groups, and keeps the learner alive."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from ray import serve

from mentor_serve.actors import names
from mentor_serve.actors.collector_options import collector_config
from mentor_serve.actors.runtime import enter_process, open_run, open_store, prepare_state
from mentor_serve.actors.supervisor import Supervisor, stop_supervised, supervised_actors
from mentor_serve.actors.workload import task_source, verifier_pool
from mentor_serve.models.loading import load_tokenizer
from mentor_serve.rollout.collector import Collector
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.settings import Settings
from mentor_serve.store.spool import Spool
from mentor_serve.types import Guidance, Rollout, RolloutRequest

log = structlog.get_logger(__name__)


class PolicySampler:
    """`GroupSampler` over the policy's Serve handle, and the expert's where it is a deployment."""

    def __init__(self, handle: Any, expert: Any = None, *, expert_timeout_s: float = 5.0) -> None:
        self._handle = handle
        self._expert = expert
        self._expert_timeout_s = expert_timeout_s

    async def guidance(self) -> Guidance:
        """Version, alpha and gamma of the live policy."""
        guidance: Guidance = await self._handle.guidance.remote()
        return guidance

    async def sample(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        """One list of rollouts per request."""
        rollouts: list[list[Rollout]] = await self._handle.sample.remote(requests)
        return rollouts

    async def sample_expert(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        """The expert's own rollouts; a remote expert has to answer a ping in time first."""
        handle = self._handle
        if self._expert is not None:
            handle = self._expert
            # Whole solutions may take long; that nobody is there shows sooner.
            await asyncio.wait_for(handle.ping.remote(), self._expert_timeout_s)
        rollouts: list[list[Rollout]] = await handle.sample_expert.remote(requests)
        return rollouts


def open_spool(settings: Settings, *, index: int, count: int) -> Spool:
    """The spool of a collector, with what collectors left that the settings no longer have.

    Raises:
        StoreUnavailable: the directory cannot be made or read.
    """
    root = settings.spool_dir
    spool = Spool(root / str(index), max_bytes=settings.store.spool_max_mb << 20)
    for other in root.iterdir():
        if other.name.isdigit() and int(other.name) >= count and int(other.name) % count == index:
            spool.take_from(other)
    return spool


class CollectorReplica:
    """Runs the collecting loop from construction to destruction."""

    def __init__(self, settings: Settings, policy: Any, expert: Any = None) -> None:
        enter_process(settings, role="collector")
        prepare_state(settings)
        self._settings = settings
        self._store = open_store(settings)
        self._run_id = open_run(settings, self._store)
        index = serve.get_replica_context().rank.rank
        count = settings.rollout.num_collectors
        tokenizer = load_tokenizer(settings.policy.model)
        self._verifiers = verifier_pool(settings)
        self._sampler = PolicySampler(policy, expert, expert_timeout_s=settings.expert.timeout_s)
        self._collector = Collector(
            sampler=self._sampler,
            source=task_source(settings, shard=index, num_shards=count),
            renderer=PromptRenderer(tokenizer, settings.tasks.system_prompt),
            verifier_pool=self._verifiers,
            store=self._store,
            run_id=self._run_id,
            config=collector_config(settings, index=index, count=count),
            spool=open_spool(settings, index=index, count=count),
        )
        self._stop = asyncio.Event()
        loop = asyncio.get_event_loop()
        self._tasks = [loop.create_task(self._collect())]
        self._supervised = supervised_actors(settings)
        self._tasks += [loop.create_task(self._supervise(name)) for name in self._supervised]

    async def _collect(self) -> None:
        await self._sampler.guidance()  # waits for a policy replica
        await self._collector.run(self._stop)

    async def _supervise(self, name: str) -> None:
        # The learner publishes its version first thing: start it when somebody can take it.
        await self._sampler.guidance()
        await Supervisor(name, self._settings, self._store, self._run_id).run(self._stop)

    async def stop(self) -> None:
        """Finish the groups in flight (bounded) and store them."""
        self._stop.set()
        await asyncio.wait(self._tasks, timeout=self._settings.gateway.drain_timeout_s + 2.0)

    async def counters(self) -> dict[str, int]:
        """Groups and rollouts since this replica started."""
        return self._collector.counters()

    def check_health(self) -> None:
        """Serve replaces a replica whose loop, or whose writer of groups, ended on its own."""
        self._collector.check_health()
        for task in self._tasks:
            if task.done() and not self._stop.is_set():
                task.result()
                raise RuntimeError("a collector task ended although nobody stopped it")

    async def __del__(self) -> None:
        await self.stop()
        if self._supervised:
            # Without collectors they would only poll; where others remain, they start them again.
            await asyncio.to_thread(stop_supervised, self._settings.gateway.drain_timeout_s)
        await self._verifiers.close()
        self._store.close()


def collector_deployment(settings: Settings) -> Any:
    """The deployment with its resources."""
    return serve.deployment(CollectorReplica).options(
        name=names.COLLECTOR,
        num_replicas=settings.rollout.num_collectors,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=2 * settings.gateway.drain_timeout_s + 10,
        ray_actor_options={"num_cpus": 0.1},
    )
