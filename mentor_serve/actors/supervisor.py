"""Keeps one learner alive: starts it, watches it, replaces it when it hangs, stops it.

Ray itself restarts a learner whose process died. What Ray cannot see is a loop that ended or an
actor that no longer answers; those are killed here and made anew. Both are safe at any moment,
because the database and the checkpoints decide where a learner goes on.
"""

from __future__ import annotations

import asyncio

import ray
import structlog

from mentor_serve.actors import names
from mentor_serve.actors.detached import find_actor, kill_actor, retire_outdated
from mentor_serve.actors.learner import ensure_learner
from mentor_serve.settings import Settings
from mentor_serve.store import TrajectoryStore

log = structlog.get_logger(__name__)

POLL_INTERVAL_S = 2.0
ANSWER_TIMEOUT_S = 30.0
"""A learner answers `status` from a thread of its own, also in the middle of an update."""


class LearnerSupervisor:
    """Runs beside a collector; several may watch the same learner."""

    def __init__(self, settings: Settings, store: TrajectoryStore, run_id: str) -> None:
        self._settings = settings
        self._store = store
        self._run_id = run_id

    async def run(self, stop_event: asyncio.Event) -> None:
        """Watch until `stop_event`."""
        await asyncio.to_thread(retire_outdated, names.LEARNER, self._settings)
        while not stop_event.is_set():
            problem = await self._problem()
            if problem is not None and not stop_event.is_set():
                await self._replace(problem)
            try:
                await asyncio.wait_for(stop_event.wait(), POLL_INTERVAL_S)
            except TimeoutError:
                continue

    async def _problem(self) -> str | None:
        learner = ensure_learner(self._settings)
        try:
            status = await asyncio.wait_for(learner.status.remote(), ANSWER_TIMEOUT_S)
        except TimeoutError:
            return f"no answer within {ANSWER_TIMEOUT_S:g} s"
        except ray.exceptions.ActorUnavailableError:
            return None  # Ray is restarting it
        except ray.exceptions.RayError as error:
            return f"{type(error).__name__}: {error}"
        return None if status["fatal_error"] is None else str(status["fatal_error"])

    async def _replace(self, problem: str) -> None:
        log.error("learner_replaced", problem=problem)
        await asyncio.to_thread(
            self._store.add_event,
            self._run_id,
            kind="learner_replaced",
            severity="error",
            message=problem.splitlines()[0],
        )
        kill_actor(names.LEARNER)


def stop_learner(timeout_s: float) -> None:
    """Let the learner finish its update, then end its process; bounded by `timeout_s`."""
    learner = find_actor(names.LEARNER)
    if learner is None:
        return
    try:
        ray.get(learner.stop.remote(timeout_s), timeout=timeout_s + 5.0)
    except (ray.exceptions.RayError, TimeoutError) as error:
        log.warning("learner_not_stopped_in_time", error=str(error).splitlines()[0])
    kill_actor(names.LEARNER)
