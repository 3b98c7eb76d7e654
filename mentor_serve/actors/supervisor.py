"""Keeps the learner and the evaluator alive: starts, watches, replaces those that hang, stops.

Ray itself restarts an actor whose process died. What Ray cannot see is a loop that ended or an
actor that no longer answers; those are killed here and made anew. Both are safe at any moment,
because the database and the checkpoints decide where a learner goes on, and an evaluation that was
cut off has stored nothing.
"""

from __future__ import annotations

import asyncio

import ray
import structlog

from mentor_serve.actors import names
from mentor_serve.actors.detached import find_actor, kill_actor, retire_outdated
from mentor_serve.actors.evaluator import ensure_evaluator
from mentor_serve.actors.learner import ensure_learner
from mentor_serve.errors import StoreError
from mentor_serve.settings import Settings
from mentor_serve.store import TrajectoryStore

log = structlog.get_logger(__name__)

POLL_INTERVAL_S = 2.0
ANSWER_TIMEOUT_S = 30.0
"""They answer `status` from a thread of its own, also in the middle of an update."""
FIRST_ANSWER_TIMEOUT_S = 300.0
"""A new process has to import Ray and be given its place first, beside others that start too."""

_ENSURE = {names.LEARNER: ensure_learner, names.EVALUATOR: ensure_evaluator}


def supervised_actors(settings: Settings) -> list[str]:
    """Names of the actors that the settings ask for."""
    if not settings.learner.enabled:
        return []
    return [names.LEARNER, *([names.EVALUATOR] if settings.eval_every else [])]


class Supervisor:
    """Watches one actor from beside a collector; several may watch the same one."""

    def __init__(self, name: str, settings: Settings, store: TrajectoryStore, run_id: str) -> None:
        self._name = name
        self._settings = settings
        self._store = store
        self._run_id = run_id
        self._has_answered = False

    async def run(self, stop_event: asyncio.Event) -> None:
        """Watch until `stop_event`."""
        await asyncio.to_thread(retire_outdated, self._name, self._settings)
        while not stop_event.is_set():
            problem = await self._problem()
            if problem is not None and not stop_event.is_set():
                await self._replace(problem)
            try:
                await asyncio.wait_for(stop_event.wait(), POLL_INTERVAL_S)
            except TimeoutError:
                continue

    async def _problem(self) -> str | None:
        actor = _ENSURE[self._name](self._settings)
        limit_s = ANSWER_TIMEOUT_S if self._has_answered else FIRST_ANSWER_TIMEOUT_S
        try:
            status = await asyncio.wait_for(actor.status.remote(), limit_s)
        except TimeoutError:
            return f"no answer within {limit_s:g} s"
        except ray.exceptions.ActorUnavailableError:
            self._has_answered = False
            return None  # Ray is restarting it
        except ray.exceptions.RayError as error:
            return f"{type(error).__name__}: {error}"
        self._has_answered = True
        return None if status["fatal_error"] is None else str(status["fatal_error"])

    async def _replace(self, problem: str) -> None:
        log.error("actor_replaced", actor=self._name, problem=problem)
        try:
            await asyncio.to_thread(
                self._store.add_event,
                self._run_id,
                kind=f"{self._name}_replaced",
                severity="error",
                message=problem.splitlines()[0],
            )
        except StoreError as error:
            log.warning("event_not_stored", kind=f"{self._name}_replaced", error=str(error))
        kill_actor(self._name)
        self._has_answered = False


def stop_supervised(timeout_s: float) -> None:
    """End the evaluator at once, the learner after its update; bounded by `timeout_s` each."""
    _stop(names.EVALUATOR, timeout_s)
    _stop(names.LEARNER, timeout_s)


def _stop(name: str, timeout_s: float) -> None:
    actor = find_actor(name)
    if actor is None:
        return
    try:
        ray.get(actor.stop.remote(timeout_s), timeout=timeout_s + 5.0)
    except (ray.exceptions.RayError, TimeoutError) as error:
        log.warning("actor_not_stopped_in_time", actor=name, error=str(error).splitlines()[0])
    kill_actor(name)
