"""Structured logs and optional experiment trackers."""

from __future__ import annotations

from mentor_serve.telemetry.logging import bind_context, clear_context, configure_logging
from mentor_serve.telemetry.trackers import Tracker, TrackerName, open_tracker

__all__ = [
    "Tracker",
    "TrackerName",
    "bind_context",
    "clear_context",
    "configure_logging",
    "open_tracker",
]
