"""Fakes that the tests of the collector and its parts share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mentor_serve.store.records import NewGroup
from mentor_serve.types import (
    Guidance,
    Intervention,
    Rollout,
    RolloutRequest,
    StopReason,
    Task,
    TokenSource,
)

RIGHT = r"<think>1 + 1</think>\boxed{2}"
WRONG = r"<think>1 + 1</think>\boxed{3}"


def make_rollout(
    *,
    token_ids: Sequence[int] = (5, 6, 7),
    text: str | None = RIGHT,
    stop_reason: StopReason = StopReason.EOS,
    entropy: float = 0.5,
    expert_lost: bool = False,
    replaced: bool = False,
) -> Rollout:
    num_tokens = len(token_ids)
    floats = np.zeros(num_tokens, dtype=np.float32)
    sources = np.zeros(num_tokens, dtype=np.uint8)
    interventions = []
    if replaced:
        sources[1] = TokenSource.EXPERT
        interventions = [
            Intervention(
                position=1,
                proposed_token_id=9,
                chosen_token_id=token_ids[1],
                entropy=entropy,
                weight=1.0,
                policy_logprob=-1.0,
                expert_logprob=-2.0,
            )
        ]
    return Rollout(
        token_ids=np.asarray(token_ids, dtype=np.int32),
        policy_logprobs=floats - 1,
        mixed_logprobs=floats * np.nan,
        expert_logprobs=floats * np.nan,
        entropies=floats + entropy,
        weights=floats,
        sources=sources,
        policy_versions=np.full(num_tokens, 3, dtype=np.int32),
        stop_reason=stop_reason,
        text=text,
        interventions=interventions,
        expert_lost=expert_lost,
    )


class FakeTokenizer:
    """One token a character; no chat template."""

    chat_template = None
    eos_token_id = None

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, token_ids))


class CountingSource:
    """An endless source of numbered tasks whose answer is 2."""

    def __init__(self) -> None:
        self.position = 0

    def next_task(self) -> Task:
        self.position += 1
        return Task(source="test", prompt=f"problem {self.position - 1}", answer="2")

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def holdout(self, num_tasks: int) -> list[Task]:
        raise NotImplementedError


class FakeSampler:
    """Answers each request with rollouts from `respond(request, sample_index)`."""

    def __init__(self, respond: Callable[[RolloutRequest, int], Rollout] | None = None) -> None:
        self.respond = respond or (lambda request, index: make_rollout())
        self.current = Guidance(policy_version=3, step=2, alpha=0.5, gamma=0.8)
        self.asked: list[list[RolloutRequest]] = []
        self.failures: list[Exception] = []
        self.delay_s = 0.0

    async def guidance(self) -> Guidance:
        return self.current

    async def sample(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        self.asked.append(requests)
        await asyncio.sleep(self.delay_s)
        if self.failures:
            raise self.failures.pop(0)
        return [
            [self.respond(request, index) for index in range(request.num_samples)]
            for request in requests
        ]

    async def sample_expert(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        raise AssertionError("this method has no use for whole expert trajectories")


class MemoryStore:
    """Keeps groups and events in lists; `failures` are raised by the next writes."""

    def __init__(self) -> None:
        self.groups: list[NewGroup] = []
        self.events: list[tuple[str, str]] = []
        self.failures: list[Exception] = []
        self.rejects: Callable[[NewGroup], bool] = lambda group: False
        self.num_ready: int | None = None
        self.num_consumed = 0
        self.num_pruned = 0

    def group_rows(self, run_id: str, group: NewGroup, *, created_at: Any = None) -> Any:
        return group

    def add_groups(self, groups: Sequence[Any]) -> None:
        if self.failures:
            raise self.failures.pop(0)
        if any(self.rejects(group) for group in groups):
            raise ValueError("this group cannot be written")
        known = {group.group_id for group in self.groups}
        self.groups += [group for group in groups if group.group_id not in known]

    def add_demonstrations(self, run_id: str, task: Task, items: Any) -> int:
        raise NotImplementedError

    def demonstration_attempts(self, run_id: str, task: Task, **where: Any) -> Any:
        raise NotImplementedError

    def demonstrations(self, ids: Any) -> Any:
        raise NotImplementedError

    def count_groups(self, run_id: str) -> dict[str, int]:
        ready = sum(group.status == "ready" for group in self.groups) - self.num_consumed
        ready = ready if self.num_ready is None else self.num_ready
        return {"ready": ready, "consumed": self.num_consumed}

    def count_groups_ever(self, run_id: str) -> int:
        return sum(self.count_groups(run_id).values()) + self.num_pruned

    def add_event(
        self, run_id: str, *, kind: str, severity: str, message: str, details: Any = None
    ) -> None:
        self.events.append((kind, severity))
