"""The policy deployment: one engine that serves HTTP requests and rollouts in one batch."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import structlog
from ray import serve

from mentor_serve import engines
from mentor_serve.actors import names
from mentor_serve.actors.detached import retire_outdated
from mentor_serve.actors.expert import RemoteExpert
from mentor_serve.actors.policy_engines import build_engines, torch_engine
from mentor_serve.actors.runtime import enter_process
from mentor_serve.actors.weight_store import PublishedWeights, ensure_weight_store
from mentor_serve.engines.base import EngineStats, StepOutput
from mentor_serve.engines.driver import EngineDriver
from mentor_serve.errors import InvalidRequest, StalePolicyError, WeightsError
from mentor_serve.models.loading import load_tokenizer
from mentor_serve.settings import Settings
from mentor_serve.types import Guidance, Rollout, RolloutRequest
from mentor_serve.weights import snapshot_path

log = structlog.get_logger(__name__)

HTTP_PRIORITY = 1
MAX_FROZEN_ENGINES = 2
"""Kept versions (`policy@N`) that one replica holds in memory at a time."""


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What a replica says of itself."""

    guidance: Guidance
    num_running: int
    max_model_len: int
    stats: EngineStats


class Policy:
    """One replica: the live policy, the colocated expert, and kept versions on request."""

    def __init__(self, settings: Settings, expert: Any = None) -> None:
        retire_outdated(names.WEIGHT_STORE, settings)
        # It starts while this process imports torch and loads the models.
        weight_store = ensure_weight_store(settings)
        enter_process(settings, role="policy", num_threads=settings.policy.num_threads)
        self._settings = settings
        self._tokenizer = load_tokenizer(settings.policy.model)
        self._guidance = Guidance(gamma=settings.guidance.initial_gamma)
        self._swap_error: str | None = None
        self._swap_lock = asyncio.Lock()
        self._frozen: OrderedDict[int, EngineDriver] = OrderedDict()
        self._driver, self._expert_driver = self._build_engines(expert)
        published = ray.get(weight_store.latest.remote())
        if published is not None:
            self._load_at_start(published)

    def _build_engines(self, expert: Any) -> tuple[EngineDriver, EngineDriver | None]:
        remote = None
        if expert is not None:
            remote = RemoteExpert(expert, self._settings.expert.timeout_s)
        policy_engine, expert_engine = build_engines(self._settings, self._tokenizer, remote)
        expert_driver = None if expert_engine is None else EngineDriver(expert_engine)
        return EngineDriver(policy_engine), expert_driver

    async def guidance(self) -> Guidance:
        """Version, alpha and gamma that new rollouts are sampled under."""
        return self._guidance

    async def state(self) -> PolicyState:
        """For readiness and metrics."""
        return PolicyState(
            guidance=self._guidance,
            num_running=self._driver.num_running,
            max_model_len=self._driver.engine.max_model_len,
            stats=self._driver.engine.stats,
        )

    async def sample(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        """Rollouts for a collector, all requests at once so that they share the prompt."""
        return list(await asyncio.gather(*(self._driver.generate(r) for r in requests)))

    async def sample_expert(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        """The colocated expert's own rollouts for a collector; HTTP requests go first there, too.

        Raises:
            InvalidRequest: the expert is not in this process.
        """
        driver = self._expert_driver
        if driver is None:
            raise InvalidRequest(
                "expected an expert in the policy's process, found none; "
                "set expert.placement = 'colocated' or ask the expert's deployment"
            )
        return list(await asyncio.gather(*(driver.generate(request) for request in requests)))

    async def generate(self, model: str, request: RolloutRequest) -> list[Rollout]:
        """Rollouts for an HTTP request; `model` as users name it."""
        driver, request = await self._route(model, request)
        return await driver.generate(request)

    async def stream(self, model: str, request: RolloutRequest) -> AsyncIterator[StepOutput]:
        """The same, token by token."""
        driver, request = await self._route(model, request)
        async for output in driver.stream(request):
            yield output

    async def load_published(self, published: PublishedWeights) -> int:
        """Swap to a published snapshot; called on every replica. Returns the live version."""
        async with self._swap_lock:
            if published.guidance.policy_version < self._guidance.policy_version:
                return self._guidance.policy_version
            try:
                state_dict = await asyncio.wait_for(
                    published.state[0], timeout=self._settings.weights.swap_timeout_s
                )
                await self._driver.load_weights(
                    state_dict,
                    version=published.guidance.policy_version,
                    timeout_s=self._settings.weights.swap_timeout_s,
                )
            except (TimeoutError, WeightsError, ray.exceptions.RayError) as error:
                self._swap_error = f"{type(error).__name__}: {error}"
                raise
            self._guidance = published.guidance
            self._swap_error = None
            return self._guidance.policy_version

    def check_health(self) -> None:
        """Serve replaces a replica whose engine died or that missed a swap."""
        self._driver.check_health()
        if self._swap_error is not None:
            raise WeightsError(f"this replica did not take the newest weights: {self._swap_error}")

    async def __del__(self) -> None:
        for driver in (self._driver, self._expert_driver, *self._frozen.values()):
            if driver is not None:
                await asyncio.to_thread(
                    driver.close, drain_timeout_s=self._settings.gateway.drain_timeout_s
                )

    def _load_at_start(self, published: PublishedWeights) -> None:
        state_dict = ray.get(published.state[0], timeout=self._settings.weights.swap_timeout_s)
        # No request is running yet, so the engine takes the weights at once.
        self._driver.engine.load_weights(state_dict, version=published.guidance.policy_version)
        self._guidance = published.guidance

    async def _route(
        self, model: str, request: RolloutRequest
    ) -> tuple[EngineDriver, RolloutRequest]:
        request = replace(request, priority=HTTP_PRIORITY)
        if model == "policy":
            return self._driver, replace(request, mixed=False)
        if model == "mentor":
            return self._driver, replace(request, mixed=True, gamma=self._guidance.gamma)
        if model == "expert":
            if self._expert_driver is None:
                raise InvalidRequest("the model `expert` needs expert.placement = colocated")
            return self._expert_driver, replace(request, mixed=False)
        version = int(model.removeprefix("policy@"))
        if version == self._guidance.policy_version:
            return self._driver, replace(request, mixed=False)
        return await self._frozen_driver(version), replace(request, mixed=False)

    async def _frozen_driver(self, version: int) -> EngineDriver:
        driver = self._frozen.get(version)
        if driver is None:
            path = snapshot_path(self._settings.weights_dir, version)
            driver = EngineDriver(await asyncio.to_thread(self._frozen_engine, path, version))
            self._frozen[version] = driver
            while len(self._frozen) > MAX_FROZEN_ENGINES:
                _, oldest = self._frozen.popitem(last=False)
                await asyncio.to_thread(oldest.close, drain_timeout_s=0.0)
        self._frozen.move_to_end(version)
        return driver

    def _frozen_engine(self, path: Path, version: int) -> engines.TorchEngine:
        if not path.is_dir():
            raise StalePolicyError(
                f"policy@{version} is not kept (weights.keep_versions = "
                f"{self._settings.weights.keep_versions}); see GET /v1/weights"
            )
        engine = torch_engine(self._settings, str(path), expert=None, tokenizer=self._tokenizer)
        engine.load_weights(engine.policy_model.state_dict(), version=version)
        return engine


def policy_deployment(settings: Settings) -> Any:
    """The deployment with its resources and queue bounds."""
    policy = settings.policy
    return serve.deployment(Policy).options(
        name=names.POLICY,
        num_replicas=policy.num_replicas,
        # The engine queues by priority itself; Serve's own bound is the last line of defence.
        max_ongoing_requests=policy.max_queued_requests,
        max_queued_requests=policy.max_queued_requests,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=settings.gateway.drain_timeout_s + 5,
        ray_actor_options={"num_cpus": policy.num_cpus, "num_gpus": policy.num_gpus},
    )
