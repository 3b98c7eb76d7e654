"""Evaluates versions of a running service as they come due. No Ray; `evaluator` is the actor.

A version is due while it, or a later one, is live and its number is a multiple of
`learner.eval_every`. One evaluation runs at a time. Whoever falls behind goes on with the newest
due version; the ones passed over, and those whose evaluation fails for good, are events. An
evaluation is stored in one transaction at its end: one that was cut off left nothing behind, and is
done again or passed over.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import structlog

from mentor_serve.actors.evaluation import (
    evaluate_model,
    evaluation_plan,
    evaluation_record,
    suite_name,
)
from mentor_serve.actors.runtime import verified_snapshot
from mentor_serve.errors import MentorError, WeightsError
from mentor_serve.evaluation.plan import SuiteReport
from mentor_serve.settings import Settings
from mentor_serve.store import TrajectoryStore, VersionRecord

log = structlog.get_logger(__name__)

POLL_INTERVAL_S = 1.0
RETRY_INTERVAL_S = 5.0
MAX_ATTEMPTS = 3

Evaluate = Callable[[Settings, VersionRecord], Coroutine[Any, Any, SuiteReport]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatorStatus:
    """What the evaluator is at; reading it never waits."""

    running_version: int | None = None
    """Being evaluated now."""
    last_version: int | None = None
    """Stored last, by this process."""
    last_duration_s: float | None = None
    num_failures: int = 0
    """Of the due version, so far."""
    last_error: str | None = None


async def evaluate_version(settings: Settings, version: VersionRecord) -> SuiteReport:
    """Evaluate a kept version from its own files.

    Raises:
        WeightsError: it is not kept any more, or damaged.
    """
    path = await asyncio.to_thread(verified_snapshot, settings, version)
    plan = evaluation_plan(settings)
    return await evaluate_model(settings, path, plan, device=settings.evaluation.device)


class EvaluationLoop:
    """One run's evaluations; `run` in a thread of its own."""

    def __init__(
        self,
        settings: Settings,
        store: TrajectoryStore,
        run_id: str,
        *,
        evaluate: Evaluate = evaluate_version,
        retry_interval_s: float = RETRY_INTERVAL_S,
    ) -> None:
        """`evaluate` is another function in tests alone."""
        self._settings = settings
        self._store = store
        self._run_id = run_id
        self._evaluate = evaluate
        self._retry_interval_s = retry_interval_s
        self._suite = suite_name(settings)
        self._handled = -1
        """The newest version that needs no look any more: stored, passed over or given up."""
        self._first_seen: int | None = None
        self._failing_version: int | None = None
        self.status = EvaluatorStatus()

    def run(self, stop: threading.Event) -> None:
        """Evaluate until `stop`; an evaluation under way is then cut off."""
        while not stop.is_set():
            try:
                wait_s = POLL_INTERVAL_S
                if not self.run_once(stop) and self.status.num_failures:
                    wait_s = self._retry_interval_s
            except MentorError as error:
                # The store does not answer: nothing can be recorded either.
                log.warning("evaluation_postponed", error=str(error))
                wait_s = self._retry_interval_s
            stop.wait(wait_s)

    def run_once(self, stop: threading.Event) -> bool:
        """Evaluate the newest due version, if there is one; whether its numbers were stored.

        Raises:
            StoreError: the store cannot be read or written.
        """
        version = self._next_due()
        if version is None:
            return False
        started = time.monotonic()
        if version.version != self._failing_version:
            self.status = replace(self.status, num_failures=0)
        self.status = EvaluatorStatus(
            running_version=version.version,
            last_version=self.status.last_version,
            num_failures=self.status.num_failures,
        )
        try:
            report = asyncio.run(_until(stop, self._evaluate(self._settings, version)))
        except WeightsError as error:
            self._skip(version.version, f"version {version.version} was not evaluated: {error}")
            return False
        except Exception as error:
            # The loop is the boundary: whatever a model or a verifier raises is one event.
            self._note_failure(version.version, error)
            return False
        finally:
            return_freed_memory()
        if report is None:
            return False
        record = evaluation_record(report, policy_version=version.version)
        self._store.add_evaluation(self._run_id, record)
        self._handled = version.version
        duration_s = time.monotonic() - started
        self.status = EvaluatorStatus(last_version=version.version, last_duration_s=duration_s)
        log.info("version_evaluated", version=version.version, duration_s=round(duration_s, 1))
        return True

    def _next_due(self) -> VersionRecord | None:
        """The newest due version that is not evaluated; older ones are passed over."""
        live = self._store.live_version(self._run_id)
        if live is None:
            return None
        every = self._settings.eval_every
        newest = live.version // every * every
        if newest <= self._handled:
            return None
        stored = self._store.newest_evaluated_version(self._run_id, suite=self._suite)
        if self._first_seen is None:
            # What was due before the run's first evaluation, or before evaluation was switched on
            # at all, was nobody's task.
            self._first_seen = newest if stored is None else stored + 1
        self._handled = max(self._handled, -1 if stored is None else stored)
        if newest <= self._handled:
            return None
        self._note_passed_over(newest, every)
        return self._store.version(self._run_id, newest)

    def _note_passed_over(self, newest: int, every: int) -> None:
        first = max(self._handled + 1, self._first_seen or 0)
        missed = [version for version in range(first, newest) if version % every == 0]
        if missed:
            numbers = ", ".join(map(str, missed[:5])) + (", ..." if len(missed) > 5 else "")
            message = f"versions not evaluated because newer ones came: {numbers}"
            self._skip(missed[-1], message, versions=missed)

    def _skip(self, version: int, message: str, **details: Any) -> None:
        log.warning("evaluation_skipped", message=message)
        self._store.add_event(
            self._run_id,
            kind="evaluation_skipped",
            severity="warning",
            message=message,
            details={"version": version, **details},
        )
        self._handled = version
        self.status = EvaluatorStatus(last_version=self.status.last_version, last_error=message)

    def _note_failure(self, version: int, error: Exception) -> None:
        num_failures = self.status.num_failures + 1
        self._failing_version = version
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        log.error("evaluation_failed", version=version, attempt=num_failures, exc_info=error)
        if num_failures >= MAX_ATTEMPTS:
            self._skip(version, f"version {version}: {MAX_ATTEMPTS} evaluations failed: {line}")
            return
        self.status = EvaluatorStatus(
            last_version=self.status.last_version, num_failures=num_failures, last_error=line
        )


def return_freed_memory() -> None:
    """Give freed pages back to the system, where the C library is one that can (glibc).

    Every evaluation's threads allocate from heaps of their own, and glibc keeps what is freed in
    them: without this the process was 40 MB larger after each evaluation, up to a heap a thread.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


async def _until(
    stop: threading.Event, work: Coroutine[Any, Any, SuiteReport]
) -> SuiteReport | None:
    """What `work` returns, or None where `stop` came first; `work` has ended either way."""
    task = asyncio.ensure_future(work)
    while not task.done():
        if stop.is_set():
            task.cancel()
        await asyncio.wait({task}, timeout=0.2)
    return None if task.cancelled() else task.result()
