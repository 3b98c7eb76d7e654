"""The gateway deployment: the HTTP application of `serving/` over the other deployments."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import ray
import structlog
from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import BackPressureError, RayServeException

from mentor_serve import __version__
from mentor_serve.actors import names
from mentor_serve.actors.detached import find_actor
from mentor_serve.actors.policy import PolicyState
from mentor_serve.actors.runtime import enter_process, open_run, open_store, prepare_state
from mentor_serve.actors.store_watch import StoreThreads, StoreWatch
from mentor_serve.engines.base import StepOutput
from mentor_serve.errors import EngineError, MentorError, WeightsError
from mentor_serve.models.loading import load_tokenizer
from mentor_serve.serving.app import create_app
from mentor_serve.serving.backend import (
    ConflictError,
    Generation,
    ModelCard,
    NotFoundError,
    OverloadedError,
    Readiness,
)
from mentor_serve.settings import Settings
from mentor_serve.store import TrajectoryStore
from mentor_serve.types import RolloutRequest, TrajectoryKind
from mentor_serve.weights import Snapshot, list_snapshots

log = structlog.get_logger(__name__)

STATE_MAX_AGE_S = 0.5
"""How old the replica's state may be that a model list or a readiness answer is made from."""
ANSWER_TIMEOUT_S = 10.0
PING_TIMEOUT_S = 2.0


class GatewayBackend:
    """`serving.backend.Backend` over Serve handles and the store."""

    def __init__(
        self, settings: Settings, store: TrajectoryStore, run_id: str, handles: Mapping[str, Any]
    ) -> None:
        self._settings = settings
        self._store = store
        self._run_id = run_id
        self._policy = handles[names.POLICY]
        self._collector = handles[names.COLLECTOR]
        self._expert = handles.get(names.EXPERT)
        self._tokenizer: Any = None
        self._tokenizer_lock = threading.Lock()
        self._state: tuple[float, PolicyState] | None = None
        self._kept: tuple[float, list[Snapshot]] | None = None
        self._store_threads = StoreThreads()
        self._store_watch = StoreWatch(
            lambda: self._store_threads.call(store.count_groups, run_id), self._collector_counters
        )
        self._started_at = int(time.time())
        self.is_draining = False
        self._num_in_flight = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer; waits for `load_tokenizer_early` where that is under way."""
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._settings.policy.model)
            return self._tokenizer

    def load_tokenizer_early(self) -> None:
        """Load it in a thread: the first request should not pay seconds of imports."""
        threading.Thread(target=lambda: self.tokenizer, name="tokenizer", daemon=True).start()

    @property
    def max_model_len(self) -> int:
        """Prompt plus response, in tokens."""
        return self._settings.policy.max_model_len

    async def models(self) -> Sequence[ModelCard]:
        """The live policy, kept versions, and the expert's two where there is one."""
        state = await self._policy_state()
        live = state.guidance.policy_version
        root = self._settings.policy.model
        created = self._started_at
        cards = [ModelCard(id="policy", created=created, policy_version=live, root=root)]
        if self._settings.expert.model != "none":
            cards += [
                ModelCard(id="mentor", created=created, is_mixed=True, policy_version=live),
                ModelCard(id="expert", created=created, root=self._settings.expert.model),
            ]
        kept = await self._kept_snapshots()
        cards += [
            ModelCard(
                id=f"policy@{snapshot.version}",
                created=int(snapshot.created_at.timestamp()),
                policy_version=snapshot.version,
            )
            for snapshot in reversed(kept)
        ]
        return cards

    async def generate(self, model: str, request: RolloutRequest) -> Generation:
        """See `Backend.generate`."""
        handle = self._handle(model)
        with self._in_flight():
            try:
                state = await self._policy_state()
                rollouts = await handle.generate.remote(model, request)
            except Exception as error:
                raise _translated(error) from error
        return Generation(rollouts=rollouts, policy_version=state.guidance.policy_version)

    async def stream(self, model: str, request: RolloutRequest) -> AsyncGenerator[StepOutput, None]:
        """See `Backend.stream`."""
        handle = self._handle(model).options(stream=True)
        with self._in_flight():
            response = handle.stream.remote(model, request)
            is_finished = False
            try:
                async for output in response:
                    yield output
                is_finished = True
            except Exception as error:
                raise _translated(error) from error
            finally:
                if not is_finished:
                    response.cancel()

    async def drain(self, timeout_s: float) -> int:
        """Refuse new requests, wait for those in flight; returns how many are left at the end."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)
        except TimeoutError:
            log.warning("drain_timeout", num_in_flight=self._num_in_flight)
        return self._num_in_flight

    @contextmanager
    def _in_flight(self) -> Iterator[None]:
        self._num_in_flight += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self._num_in_flight -= 1
            if self._num_in_flight == 0:
                self._is_idle.set()

    def _handle(self, model: str) -> Any:
        if model == "expert" and self._expert is not None:
            return self._expert
        return self._policy

    async def readiness(self) -> Readiness:
        """Ready while the policy answers.

        A database that is away and a remote expert that does not answer are reasons, but no
        refusals: requests are served all the same, groups wait in the spool, rollouts follow the
        policy alone.
        """
        reasons: list[str] = []
        details: dict[str, Any] = {"version": __version__, "run": self._settings.run_name}
        try:
            state = await self._policy_state()
            details |= {
                "policy_version": state.guidance.policy_version,
                "num_running": state.num_running,
            }
        except (MentorError, TimeoutError) as error:
            silent = f"loading its models, or busy: no answer within {ANSWER_TIMEOUT_S:g} s"
            reasons.append(f"policy: {str(error) or silent}")
        is_ready = not reasons
        store_reasons, store_details = await self._store_watch.look()
        reasons += store_reasons
        details |= store_details
        if self._expert is not None:
            try:
                await asyncio.wait_for(self._expert.ping.remote(), PING_TIMEOUT_S)
            except (TimeoutError, ray.exceptions.RayError, RayServeException) as error:
                reasons.append(f"expert: {type(error).__name__}; rollouts follow the policy alone")
        return Readiness(ready=is_ready, reasons=reasons, details=details)

    async def _collector_counters(self) -> list[dict[str, int]]:
        """Of every collector that answers in time."""
        try:
            answers = await self._collector.broadcast("counters").results_async(
                timeout_s=PING_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, ray.exceptions.RayError, RayServeException):
            return []
        return [one for one in answers if isinstance(one, dict)]

    async def training(self) -> Mapping[str, Any]:
        """Where the run stands, the learner's own view and the collectors' counters."""
        status = await self._store_threads.call(self._store.training_status, self._run_id)
        evaluation = await self._store_threads.call(self._store.latest_evaluation, self._run_id)
        document: dict[str, Any] = asdict(status)
        document["evaluation"] = None if evaluation is None else asdict(evaluation)
        document["learner"] = await self._learner_status()
        return document

    async def _learner_status(self) -> dict[str, Any] | None:
        learner = find_actor(names.LEARNER)
        if learner is None:
            return None
        try:
            status: dict[str, Any] = await asyncio.wait_for(
                learner.status.remote(), ANSWER_TIMEOUT_S
            )
            return status
        except TimeoutError:
            return {"error": f"no answer within {ANSWER_TIMEOUT_S:g} s"}
        except ray.exceptions.RayError as error:
            return {"error": f"{type(error).__name__}: {error}"}

    async def set_paused(self, paused: bool) -> None:
        """Pauses the learner; collection follows by its own pacing."""
        learner = self._learner()
        await asyncio.wait_for(learner.set_paused.remote(paused), ANSWER_TIMEOUT_S)

    def _learner(self) -> Any:
        learner = find_actor(names.LEARNER)
        if learner is None:
            raise OverloadedError("the learner is starting; try again", retry_after_s=2.0)
        return learner

    async def roll_back(self, version: int) -> Mapping[str, Any]:
        """See `Backend.roll_back`; waits for the update in progress."""
        known = await self._store_threads.call(self._store.version, self._run_id, version)
        if known is None:
            raise NotFoundError(f"version {version} is none of this run; see GET /v1/weights")
        if not self._settings.learner.enabled:
            raise ConflictError("learner.enabled is false: the served weights never change")
        status = await self._learner_status()
        if status is None or status.get("phase") in {None, "starting"}:
            raise OverloadedError("the learner is starting; try again", retry_after_s=2.0)
        try:
            record = await asyncio.wait_for(
                self._learner().rollback.remote(version), self._settings.gateway.request_timeout_s
            )
        except ray.exceptions.RayError as error:
            cause = _translated(error)
            if isinstance(cause, WeightsError):
                raise ConflictError(str(cause)) from error
            raise cause from error
        return asdict(record)

    async def trajectories(
        self, *, limit: int, kind: TrajectoryKind | None, before: str | None
    ) -> Sequence[Mapping[str, Any]]:
        """See `Backend.trajectories`."""
        records = await self._store_threads.call(
            lambda: self._store.trajectories(self._run_id, limit=limit, kind=kind, before=before)
        )
        return [asdict(record) for record in records]

    async def trajectory(self, trajectory_id: str) -> Mapping[str, Any] | None:
        """See `Backend.trajectory`."""
        return await self._store_threads.call(self._store.trajectory_document, trajectory_id)

    async def weights(self) -> Sequence[Mapping[str, Any]]:
        """Every version of the run, newest first, and whether its snapshot is kept."""
        versions = await self._store_threads.call(self._store.list_versions, self._run_id)
        kept = await self._kept_snapshots()
        kept_versions = {snapshot.version for snapshot in kept}
        return [
            {**asdict(version), "is_kept": version.version in kept_versions}
            for version in reversed(versions)
        ]

    async def _kept_snapshots(self) -> list[Snapshot]:
        now = time.monotonic()
        if self._kept is None or now - self._kept[0] >= STATE_MAX_AGE_S:
            kept = await asyncio.to_thread(list_snapshots, self._settings.weights_dir)
            self._kept = (now, kept)
        return self._kept[1]

    async def _policy_state(self) -> PolicyState:
        now = time.monotonic()
        if self._state is not None and now - self._state[0] < STATE_MAX_AGE_S:
            return self._state[1]
        try:
            state: PolicyState = await asyncio.wait_for(
                self._policy.state.remote(), ANSWER_TIMEOUT_S
            )
        except Exception as error:
            raise _translated(error) from error
        self._state = (now, state)
        return state


def _translated(error: BaseException) -> BaseException:
    """Ray's wrapping taken off, so that `serving` sees the error families it knows."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, BaseException) else EngineError(str(error))
    if isinstance(error, BackPressureError):
        return OverloadedError("the policy's queue is full", retry_after_s=1.0)
    if isinstance(error, (ray.exceptions.RayActorError, RayServeException)):
        return OverloadedError("the policy replica is being replaced", retry_after_s=3.0)
    return error


class Gateway:
    """Serve ingress; Serve calls `__serve_build_asgi_app__` after construction."""

    def __init__(self, settings: Settings, policy: Any, collector: Any, expert: Any = None) -> None:
        enter_process(settings, role="gateway")
        prepare_state(settings)
        self._settings = settings
        store = open_store(settings)
        handles = {names.POLICY: policy, names.COLLECTOR: collector}
        if expert is not None:
            handles[names.EXPERT] = expert
        self._backend = GatewayBackend(settings, store, open_run(settings, store), handles)
        self._backend.load_tokenizer_early()

    def __serve_build_asgi_app__(self) -> FastAPI:
        gateway = self._settings.gateway
        return create_app(
            self._backend,
            api_keys=[key.get_secret_value() for key in gateway.api_keys],
            admin_keys=[key.get_secret_value() for key in gateway.admin_keys],
            cors_origins=gateway.cors_origins,
            request_timeout_s=gateway.request_timeout_s,
            service_version=__version__,
        )

    async def drain(self) -> int:
        """See `GatewayBackend.drain`; called on every replica before the service stops."""
        return await self._backend.drain(self._settings.gateway.drain_timeout_s)


def gateway_deployment(settings: Settings) -> Any:
    """The ingress deployment with its resources."""
    gateway = settings.gateway
    return serve.deployment(serve.ingress()(Gateway)).options(
        name=names.GATEWAY,
        num_replicas=gateway.num_replicas,
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=gateway.drain_timeout_s + 5,
        ray_actor_options={"num_cpus": gateway.num_cpus},
    )
