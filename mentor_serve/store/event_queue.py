"""Events that wait for a database that is away."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Protocol

import structlog

log = structlog.get_logger(__name__)

_MAX_EVENTS = 100
"""The oldest give way: they are in the log as well."""


class EventDatabase(Protocol):
    """The part of the trajectory store that records events."""

    def add_event(
        self,
        run_id: str,
        *,
        kind: str,
        severity: str,
        message: str,
        details: dict[str, Any] | None = None,
    ) -> Any:
        """Record something an operator should know."""


class EventQueue:
    """Takes events from any thread, writes them from one."""

    def __init__(self, database: EventDatabase, run_id: str) -> None:
        self._database = database
        self._run_id = run_id
        self._events: deque[tuple[str, str, str]] = deque(maxlen=_MAX_EVENTS)
        self._lock = threading.Lock()

    def add(self, kind: str, severity: str, message: str) -> None:
        """Keep an event until `write`."""
        with self._lock:
            self._events.append((kind, severity, message[:2000]))

    def write(self) -> None:
        """Write what waits; what cannot be written waits on."""
        while True:
            with self._lock:
                if not self._events:
                    return
                kind, severity, message = event = self._events[0]
            try:
                self._database.add_event(
                    self._run_id, kind=kind, severity=severity, message=message
                )
            except Exception as error:  # boundary: an event is worth less than the next group
                log.warning("event_not_stored", kind=kind, error=str(error))
                return
            with self._lock:
                if self._events and self._events[0] is event:
                    self._events.popleft()
