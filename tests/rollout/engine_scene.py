"""A collector over real tiny engines and a SQLite store, driven until a condition holds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mentor_serve.engines import TorchEngine
from mentor_serve.rollout.collector import Collector, CollectorConfig
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.strategies import GuidanceConfig
from mentor_serve.rollout.verifiers import VerifierPool
from mentor_serve.store import LeasedGroup, TrajectoryStore, upgrade
from mentor_serve.types import Guidance, Rollout, RolloutRequest, SamplingParams, Task

MAX_NEW_TOKENS = 60
END_TOKENS = (1, 20, 21, 22)
"""Enough of them that random models end most responses before the limit."""
EXPERT = "tiny expert"


def task(prompt: str, answer: str = "right") -> Task:
    return Task(source="test", prompt=prompt, answer=answer)


class Repeating:
    """A source that gives the same tasks over and over."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.position = 0

    def next_task(self) -> Task:
        self.position += 1
        return self.tasks[(self.position - 1) % len(self.tasks)]

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def holdout(self, num_tasks: int) -> list[Task]:
        raise NotImplementedError


class EngineSampler:
    """`GroupSampler` over engines in this process; remembers what was asked."""

    def __init__(self, policy: Any, expert: Any, tokenizer: Any) -> None:
        ends = {"tokenizer": tokenizer, "eos_token_ids": END_TOKENS}
        self._policy = TorchEngine(policy=policy, expert=expert, **ends)
        self._expert = TorchEngine(policy=expert, **ends)
        self.current = Guidance(policy_version=0, step=0, alpha=1.0, gamma=0.5)
        self.asked: list[list[RolloutRequest]] = []
        self.asked_expert: list[RolloutRequest] = []
        self.expert_error: Exception | None = None

    async def guidance(self) -> Guidance:
        return self.current

    async def sample(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        self.asked.append(requests)
        return self._policy.generate(requests)

    async def sample_expert(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        self.asked_expert += requests
        if self.expert_error is not None:
            raise self.expert_error
        return self._expert.generate(requests)


class EngineScene:
    """One run in one database; `collect` may be called again, as after a restart."""

    def __init__(
        self, path: Path, *, pair: tuple[Any, Any], tokenizer: Any, run_name: str = "run"
    ) -> None:
        url = f"sqlite:///{path / 'mentor.db'}"
        upgrade(url)
        self.store = TrajectoryStore(url)
        self.run_id = self.store.open_run(run_name, {})
        self.renderer = PromptRenderer(tokenizer)
        self.sampler = EngineSampler(*pair, tokenizer)
        self.counts: dict[str, int] = {}

    def config(self, **options: Any) -> CollectorConfig:
        names = {"num_on_policy", "num_mixed", "max_new_tokens", "seed", "concurrent_groups"}
        given = {name: options.pop(name) for name in names & options.keys()}
        max_new_tokens = given.pop("max_new_tokens", MAX_NEW_TOKENS)
        options = {"expert_model": EXPERT, "retry_s": 0.0} | options
        return CollectorConfig(
            **{"num_on_policy": 4, "num_mixed": 2, "concurrent_groups": 1} | given,
            sampling=SamplingParams(max_new_tokens=max_new_tokens),
            guidance=GuidanceConfig(**options),
            first_backoff_s=0.001,
            longest_backoff_s=0.01,
        )

    def collect(
        self, tasks: Sequence[Task], *, num_groups: int, limit_s: float = 60.0, **options: Any
    ) -> list[LeasedGroup]:
        """Collect at least `num_groups` more groups; return these, oldest first."""
        pool = VerifierPool("sample_rewards:as_told")
        collector = Collector(
            sampler=self.sampler,
            source=Repeating(tasks),
            renderer=self.renderer,
            verifier_pool=pool,
            store=self.store,
            run_id=self.run_id,
            config=self.config(**options),
        )

        def is_done() -> bool:
            return collector.counters()["groups_ready"] >= num_groups

        asyncio.run(_run(collector, pool, is_done, limit_s))
        self.counts = collector.counters()
        num_ready = self.store.count_groups(self.run_id)["ready"]
        return self.store.lease_groups(
            self.run_id, num_groups=num_ready, owner="test", lease_s=3600
        )

    def rows(self, query: str) -> list[dict[str, Any]]:
        from sqlalchemy import text

        with self.store._read("testing") as connection:
            return [dict(row) for row in connection.execute(text(query)).mappings()]


async def _run(
    collector: Collector, pool: VerifierPool, is_done: Callable[[], bool], limit_s: float
) -> None:
    stop = asyncio.Event()
    running = asyncio.create_task(collector.run(stop))
    deadline = time.monotonic() + limit_s
    while not is_done() and not running.done():
        assert time.monotonic() < deadline, f"still waiting, counters {collector.counters()}"
        await asyncio.sleep(0.001)
    stop.set()
    try:
        await asyncio.wait_for(running, limit_s)
    finally:
        await pool.close()
