"""The learner: lease groups, update, make it durable, publish; again and again. No Ray, no HTTP.

Contract: every group is consumed by at most one committed update, and none is lost, wherever the
process dies (docs/training.md has the argument). The store's newest version is the truth; disk and
memory follow it. A step never starts before the current version is published. An exception in a
step leaves an event, gives the groups back and brings the model back to the truth. While the store
is away the learner waits; a commit that was cut off is looked for afterwards, never applied twice.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from mentor_serve.errors import StoreUnavailable
from mentor_serve.learner.archive import LearnerArchive, PolicyLoader
from mentor_serve.learner.backends.base import TrainingBackend
from mentor_serve.learner.config import LearnerConfig
from mentor_serve.learner.guards import DirectoryLock
from mentor_serve.learner.journal import Journal, last_line
from mentor_serve.learner.records import LearnerPhase, LearnerStatus, LearnerStore
from mentor_serve.learner.trainer import Trainer
from mentor_serve.store.outage import Outage
from mentor_serve.store.records import UpdateRecord, VersionRecord
from mentor_serve.types import Guidance
from mentor_serve.weights.publisher import Broadcaster

_log = logging.getLogger(__name__)


class Learner:
    """Trains one run. `start` once, then `run` in a thread, or `run_step` by hand.

    Every method may be called from any thread; steps and rollbacks exclude each other, `status`,
    `pause` and `resume` never wait.
    """

    def __init__(
        self,
        store: LearnerStore,
        *,
        run_id: str,
        load_policy: PolicyLoader,
        backend: TrainingBackend,
        broadcaster: Broadcaster,
        config: LearnerConfig,
        weights_dir: Path,
        checkpoints_dir: Path,
    ) -> None:
        """Nothing is read or written before `start`.

        Args:
            store: the trajectory store.
            run_id: the run to train.
            load_policy: loads the initial policy and its tokenizer (or None).
            backend: holds model and optimiser.
            broadcaster: hands new versions to the replicas.
            config: the loop's knobs.
            weights_dir: this run's snapshots; no other run may write there.
            checkpoints_dir: this run's checkpoints; no other run may write there.
        """
        self._config = config
        self._backend = backend
        self._journal = Journal(store, run_id=run_id)
        archive = LearnerArchive(
            run_id=run_id,
            backend=backend,
            load_policy=load_policy,
            weights_dir=weights_dir,
            checkpoints_dir=checkpoints_dir,
            notify=lambda kind, message: self._journal.add(kind, "warning", message),
        )
        self._trainer = Trainer(
            store,
            run_id=run_id,
            backend=backend,
            broadcaster=broadcaster,
            archive=archive,
            journal=self._journal,
            config=config,
        )
        self._directory_lock = DirectoryLock(checkpoints_dir)
        self._claim = store.claim_run(run_id)
        self._outage = Outage()
        self._lock = threading.RLock()
        self._resumed = threading.Event()
        self._resumed.set()
        self._status = LearnerStatus(max_steps=config.max_steps)
        self._observers: list[Callable[[UpdateRecord], None]] = []

    def start(self) -> None:
        """Become the run's only learner, return to its newest version, and publish it.

        A failed publication is an event and is tried again before the first step.

        Raises:
            WeightsError: another learner runs here, or the newest version cannot be read.
            RunClaimed: another learner of the run works on the same database.
            StoreUnavailable: the store is away; try again.
        """
        with self._lock:
            self._directory_lock.acquire(timeout_s=self._config.lock_timeout_s)
            try:
                self._claim.hold(timeout_s=self._config.lock_timeout_s)
                self._trainer.start()
            except BaseException:
                self._claim.release()
                self._directory_lock.release()
                raise
            self._set_phase(LearnerPhase.WAITING)

    def close(self) -> None:
        """Wait for a running step, then give back leases and directories; call `start` no more."""
        with self._lock:
            try:
                if self._trainer.state is not None:
                    self._trainer.release()
                self._backend.close()
            finally:
                self._claim.release()
                self._directory_lock.release()
                if self._status.phase is not LearnerPhase.FINISHED:
                    self._set_phase(LearnerPhase.STOPPED)

    def run(self, stop: threading.Event) -> None:
        """Step until `stop` is set or `max_steps` updates are made; waits between steps."""
        while not stop.is_set():
            if self.is_finished:
                self._set_phase(LearnerPhase.FINISHED)
                return
            if not self._resumed.is_set():
                self._set_phase(LearnerPhase.PAUSED)
                stop.wait(self._config.poll_interval_s)
                continue
            try:
                made = self.run_step() is not None
            except Exception:
                # The loop is the boundary: run_step has recorded and undone everything.
                self._set_phase(LearnerPhase.BACKING_OFF)
                stop.wait(self._backoff_s())
                continue
            if not made:
                stop.wait(self._config.poll_interval_s)
        self._set_phase(LearnerPhase.STOPPED)

    def run_step(self) -> UpdateRecord | None:
        """Make one update; None where too few groups are ready or the lease on them was lost.

        Raises:
            Exception: whatever went wrong, after an event was left and the groups given back.
        """
        with self._lock:
            started = datetime.now(UTC)
            try:
                _ = self._trainer.current  # raises before `start`, which takes the claim
                self._claim.hold()
                record = self._trainer.prepare() or self._train()
            except StoreUnavailable as error:
                self._note_away(error)
                raise
            except Exception as error:
                self._note_failure(error)
                raise
            if record is not None:
                self._note_back()
                self._status = replace(
                    self._status,
                    phase=LearnerPhase.WAITING,
                    num_failures=0,
                    last_error=None,
                    last_step_at=started,
                    last_step_time_s=record.step_time_s,
                )
                self._tell_observers(record)
            return record

    def _train(self) -> UpdateRecord | None:
        groups = self._trainer.lease()
        self._note_back()
        self._set_phase(LearnerPhase.UPDATING if groups else LearnerPhase.WAITING)
        return self._trainer.train_on(groups) if groups else None

    def rollback(self, version: int) -> VersionRecord:
        """Go on from a kept snapshot: a NEW version with its weights and fresh optimiser moments.

        Versions only ever grow, so replicas need no special case. Groups that the abandoned
        versions sampled become stale.

        Raises:
            WeightsError: the version is unknown, or its snapshot is gone or damaged.
        """
        with self._lock:
            return self._trainer.rollback(version)

    def add_observer(self, observe: Callable[[UpdateRecord], None]) -> None:
        """Call `observe` after each committed update (metrics, trackers).

        An observer that raises leaves an event; the update stands.
        """
        self._observers.append(observe)

    def pause(self) -> None:
        """Let a running step end and start no other; collection goes on."""
        self._resumed.clear()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._resumed.set()

    @property
    def is_finished(self) -> bool:
        """Whether `max_steps` updates are made."""
        return 0 < self._config.max_steps <= self._trainer.current.step

    @property
    def guidance(self) -> Guidance:
        """What rollouts of the current version are sampled under."""
        state = self._trainer.current
        return Guidance(
            policy_version=state.version, step=state.step, alpha=state.alpha, gamma=state.gamma
        )

    def status(self) -> LearnerStatus:
        """Where training stands; never waits for a step."""
        state = self._trainer.state
        status = replace(
            self._status,
            is_paused=not self._resumed.is_set(),
            published_version=self._trainer.published_version,
        )
        if state is None:
            return status
        return replace(
            status,
            step=state.step,
            policy_version=state.version,
            alpha=state.alpha,
            gamma=state.gamma,
        )

    def _tell_observers(self, record: UpdateRecord) -> None:
        for observe in self._observers:
            try:
                observe(record)
            except Exception as error:
                self._journal.add("observer_failed", "warning", last_line(error))

    def _note_failure(self, error: Exception) -> None:
        line = last_line(error)
        _log.error("the step failed", exc_info=error)
        self._status = replace(
            self._status, num_failures=self._status.num_failures + 1, last_error=line
        )
        self._journal.add("step_failed", "error", line)

    def _note_away(self, error: StoreUnavailable) -> None:
        """The store is away: no failure of the step, and no traceback for each attempt."""
        if self._outage.fail(error):
            _log.warning("training waits for the store: %s", error)
        self._status = replace(self._status, last_error=last_line(error))

    def _note_back(self) -> None:
        if self._outage.is_on:
            reason = self._outage.reason
            message = f"training waited {self._outage.end():.1f} s for the store: {reason}"
            self._status = replace(self._status, last_error=None)
            self._journal.add("store_back", "warning", message[:2000])

    def _backoff_s(self) -> float:
        if self._outage.is_on:
            return self._outage.wait_s
        exponent = min(max(self._status.num_failures - 1, 0), 16)
        return min(2.0**exponent, self._config.max_backoff_s)

    def _set_phase(self, phase: LearnerPhase) -> None:
        self._status = replace(self._status, phase=phase)
