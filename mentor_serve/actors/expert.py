"""The expert as a deployment of its own, and the policy engine's line to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from mentor_serve import engines
from mentor_serve.actors import names
from mentor_serve.actors.runtime import enter_process
from mentor_serve.engines.advice import ExpertAnswers, ExpertQueries
from mentor_serve.engines.base import StepOutput
from mentor_serve.engines.driver import EngineDriver
from mentor_serve.errors import ExpertUnavailable, InvalidRequest
from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.settings import Settings
from mentor_serve.types import Rollout, RolloutRequest

ATTEMPT_INTERVAL_S = 0.2
RETRY_INTERVAL_S = 10.0


class Expert:
    """One replica: answers gated positions, and serves the model `expert` over HTTP."""

    def __init__(self, settings: Settings) -> None:
        # Here, not above: the gateway imports this module too, and needs no torch.
        from mentor_serve.engines.expert import ExpertServer

        enter_process(settings, role="expert", num_threads=settings.expert.num_threads)
        model = load_model(
            settings.expert.model, dtype=settings.expert.dtype, device=settings.expert.device
        )
        self._server = ExpertServer(
            model,
            max_sequences=settings.policy.max_batch_size * settings.policy.num_replicas,
            max_model_len=settings.policy.max_model_len,
        )
        self._server_lock = asyncio.Lock()
        self._driver = EngineDriver(
            engines.TorchEngine(
                policy=model,
                expert=None,
                tokenizer=load_tokenizer(settings.policy.model),
                device=settings.expert.device,
                dtype=settings.expert.dtype,
                max_batch_size=settings.policy.max_batch_size,
                max_model_len=settings.policy.max_model_len,
            )
        )

    async def advise(self, queries: ExpertQueries) -> ExpertAnswers:
        """Token ids in; log-probabilities and samples out."""
        # Without this lock, waiting calls would each hold a thread; and it keeps them in order.
        async with self._server_lock:
            return await asyncio.to_thread(self._server.advise, queries)

    async def release(self, sequence_ids: list[int]) -> None:
        """Forget sequences that ended."""
        async with self._server_lock:
            self._server.release(sequence_ids)

    async def sample_expert(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        """Rollouts of the expert itself for a collector, all requests at once."""
        return list(await asyncio.gather(*(self._driver.generate(one) for one in requests)))

    async def generate(self, model: str, request: RolloutRequest) -> list[Rollout]:
        """The same for an HTTP request, which goes first."""
        del model
        return await self._driver.generate(replace(request, mixed=False, priority=1))

    async def stream(self, model: str, request: RolloutRequest) -> AsyncIterator[StepOutput]:
        """The same, token by token."""
        del model
        async for output in self._driver.stream(replace(request, mixed=False, priority=1)):
            yield output

    async def ping(self) -> bool:
        """Answers while this replica works."""
        self.check_health()
        return True

    def check_health(self) -> None:
        """Serve replaces a replica whose engine died."""
        self._driver.check_health()


class RemoteExpert:
    """`ExpertClient` over a Serve handle. Blocks: call it through an `ExpertLink`.

    It blocks for at most `timeout_s`; after a failure it refuses at once for `RETRY_INTERVAL_S`,
    so that rollouts which start meanwhile do not each wait for a dead expert.
    """

    def __init__(self, handle: Any, timeout_s: float) -> None:
        self._handle = handle
        self._timeout_s = timeout_s
        self._silent_until = 0.0

    def advise(self, queries: ExpertQueries) -> ExpertAnswers:
        """Ask until the time limit.

        Raises:
            ExpertUnavailable: on a time-out, and at once for a while after one.
            InvalidRequest: the expert cannot ever answer this.
        """
        if time.monotonic() < self._silent_until:
            raise ExpertUnavailable("the expert failed a moment ago and is not asked for now")
        deadline = time.monotonic() + self._timeout_s
        problem: Exception | None = None
        while (remaining_s := deadline - time.monotonic()) > 0:
            try:
                return self._ask(queries, remaining_s)
            except InvalidRequest:
                raise
            except (TimeoutError, ray.exceptions.RayError, RayServeException) as error:
                # A replica that died is replaced within the time limit or not: ask again.
                problem = error
                time.sleep(min(ATTEMPT_INTERVAL_S, max(0.0, deadline - time.monotonic())))
        self._silent_until = time.monotonic() + RETRY_INTERVAL_S
        raise ExpertUnavailable(
            f"the expert should answer within {self._timeout_s:g} s, but: "
            f"{type(problem).__name__}: {problem}"
        )

    def _ask(self, queries: ExpertQueries, timeout_s: float) -> ExpertAnswers:
        response = self._handle.advise.remote(queries)
        try:
            answers: ExpertAnswers = response.result(timeout_s=timeout_s)
        except TimeoutError:
            # Nobody waits for it any more: what has not begun need not be computed.
            response.cancel()
            raise
        # Ray's arrays are read-only views of its own memory.
        return answers.copied()

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Best effort: the expert evicts forgotten sequences anyway."""
        self._handle.release.remote([int(sequence_id) for sequence_id in sequence_ids])


def expert_deployment(settings: Settings) -> Any:
    """The deployment with its resources."""
    expert = settings.expert
    return serve.deployment(Expert).options(
        name=names.EXPERT,
        num_replicas=1,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": expert.num_cpus, "num_gpus": expert.num_gpus},
    )
