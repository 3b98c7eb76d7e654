"""Detached actors outlive the application that started them; these functions keep them honest.

On a long-lived cluster an application may be deployed again with other settings while the learner
or the weight store of the former deployment still runs. Such an actor is ended, so that the one
started next has the new settings; both find their state on disk and in SQL.
"""

from __future__ import annotations

import hashlib
from typing import Any

import ray
import structlog

from mentor_serve.actors import names
from mentor_serve.settings import Settings

log = structlog.get_logger(__name__)

ANSWER_TIMEOUT_S = 10.0


def fingerprint(settings: Settings) -> str:
    """Equal for equal settings; secrets count as set or not set."""
    return hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:16]


def find_actor(name: str) -> Any | None:
    """Handle of a detached actor, or None where none of that name runs."""
    try:
        return ray.get_actor(name, namespace=names.NAMESPACE)
    except ValueError:
        return None


def kill_actor(name: str) -> None:
    """End an actor's process now, without a restart."""
    actor = find_actor(name)
    if actor is not None:
        ray.kill(actor, no_restart=True)


def retire_outdated(name: str, settings: Settings) -> bool:
    """End the actor if it was started with other settings or does not answer; tells whether."""
    actor = find_actor(name)
    if actor is None:
        return False
    try:
        if ray.get(actor.fingerprint.remote(), timeout=ANSWER_TIMEOUT_S) == fingerprint(settings):
            return False
    except ray.exceptions.RayError as error:
        log.warning("detached_actor_silent", actor=name, error=str(error).splitlines()[0])
    log.info("detached_actor_retired", actor=name)
    ray.kill(actor, no_restart=True)
    return True
