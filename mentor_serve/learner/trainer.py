"""The learner's state machine: truth, update, commit, publication. One thread, no loop.

Every method either completes or raises and leaves `needs_restore` set, so that the next `prepare`
returns to the store's newest version before anything else happens.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mentor_serve.core.schedules import cosine_alpha, learning_rate_scale
from mentor_serve.errors import LeaseLost, StoreUnavailable, WeightsError
from mentor_serve.learner.archive import LearnerArchive
from mentor_serve.learner.backends.base import TrainingBackend
from mentor_serve.learner.batch import TrainingBatch, build_batch
from mentor_serve.learner.checkpoint import TrainingState
from mentor_serve.learner.config import LearnerConfig
from mentor_serve.learner.guards import LeaseKeeper
from mentor_serve.learner.intake import GroupIntake
from mentor_serve.learner.journal import Journal, last_line
from mentor_serve.learner.records import LearnerStore, update_record, version_record
from mentor_serve.learner.step import UpdateMetrics
from mentor_serve.store.records import LeasedGroup, UpdateRecord, VersionRecord, new_id
from mentor_serve.weights.publisher import Broadcaster
from mentor_serve.weights.snapshots import Snapshot

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Made:
    """An update that is on disk, and that one transaction has to make true."""

    record: UpdateRecord
    state: TrainingState
    snapshot: Snapshot
    group_ids: list[str]


class Trainer:
    """Holds where one run stands, and moves it one update at a time."""

    def __init__(
        self,
        store: LearnerStore,
        *,
        run_id: str,
        backend: TrainingBackend,
        broadcaster: Broadcaster,
        archive: LearnerArchive,
        journal: Journal,
        config: LearnerConfig,
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._backend = backend
        self._broadcaster = broadcaster
        self._archive = archive
        self._journal = journal
        self._config = config
        # A new name for each life, so that a dead learner's leases are never taken for ours.
        self._owner = f"learner-{socket.gethostname()}-{os.getpid()}-{new_id()[-12:]}"
        self._snapshot: Snapshot | None = None
        self._unsettled: _Made | None = None
        """An update whose commit was cut off: whether it happened is not known."""
        self._group_failures: Counter[str] = Counter()
        self._intake = GroupIntake(store, run_id=run_id, owner=self._owner, config=config)
        self._waiting_since = time.monotonic()
        self.state: TrainingState | None = None
        """The version in memory; None before `start`."""
        self.published_version: int | None = None
        """The version that replicas took last."""
        self.needs_restore = False
        """Whether memory may differ from the store's newest version."""

    @property
    def current(self) -> TrainingState:
        """The version in memory.

        Raises:
            RuntimeError: before `start`.
        """
        if self.state is None:
            raise RuntimeError("expected a started learner; call start() first")
        return self.state

    # Truth

    def start(self) -> None:
        """Return to the run's newest version, or begin the run with version 0.

        Raises:
            WeightsError: neither checkpoint nor snapshot of the newest version can be read.
        """
        released = self._store.release_leases(self._run_id)
        if released:
            _log.info("released %d groups of a learner that ended", released)
        self._archive.build()
        record = self._store.latest_version(self._run_id)
        if record is None:
            self._initialise()
        else:
            self._restore(record)
        self.try_publish()

    def prepare(self) -> UpdateRecord | None:
        """Make memory and replicas agree with the store's newest version.

        Returns:
            The update whose commit was cut off, where that turns out to be, or is now, committed.

        Raises:
            StoreUnavailable: the store is away; nothing is lost.
            WeightsError: the version cannot be read, or the replicas did not take it.
        """
        settled = self._settle()
        if self.needs_restore:
            record = self._store.latest_version(self._run_id)
            if record is None:
                raise WeightsError(f"expected a version of run {self._run_id} in the store")
            self._restore(record)
        if self.published_version != self.current.version:
            self.publish()
        return settled

    def release(self) -> None:
        """Give back every group; where the store fails, the leases end by themselves."""
        self._intake.release()

    def _initialise(self) -> None:
        self._archive.discard_newer(-1)
        self._archive.seed(self._config.seed)
        state = TrainingState(
            version=0, step=0, alpha=self._alpha(0), gamma=self._config.initial_gamma
        )
        snapshot = self._archive.save(state, with_checkpoint=True)
        self._store.add_version(self._run_id, version_record(snapshot))
        self._adopt(state, snapshot)

    def _restore(self, record: VersionRecord) -> None:
        self._archive.discard_newer(record.version)
        state, snapshot = self._archive.restore(record)
        self._adopt(state, snapshot)

    def _adopt(self, state: TrainingState, snapshot: Snapshot) -> None:
        self.state = state
        self._snapshot = snapshot
        self.needs_restore = False

    def _alpha(self, step: int) -> float:
        return cosine_alpha(step, self._config.alpha_steps, self._config.alpha_initial)

    # Updates

    def lease(self) -> list[LeasedGroup]:
        """The groups of the next update, or none where too few are ready."""
        current = self.current
        return self._intake.take(version=current.version, alpha=self._alpha(current.step))

    def train_on(self, groups: Sequence[LeasedGroup]) -> UpdateRecord | None:
        """Update, commit, publish; None where the lease was lost, or no gradient was finite.

        Raises:
            StoreUnavailable: the store is away. Where that cut off the commit, the groups stay
                leased and the next `prepare` settles it; else they were given back.
            Exception: whatever went wrong before the commit, after the groups were given back.
        """
        # Set before anything changes, so that no way out can forget it.
        self.needs_restore = True
        started = time.monotonic()
        try:
            with LeaseKeeper(self._store, owner=self._owner, lease_s=self._config.lease_s):
                done = self._update(groups, started=started)
        except LeaseLost as error:
            self._abandon(error)
            return None
        except StoreUnavailable:
            if self._unsettled is None:
                self.release()
            raise
        except Exception:
            self._unsettled = None
            self.release()
            raise
        if done is None:
            self.release()
            return None
        return self._conclude(done)

    def _conclude(self, done: _Made) -> UpdateRecord:
        """Go on from an update that is committed."""
        self._unsettled = None
        self._adopt(done.state, done.snapshot)
        self._intake.num_stale = 0
        self._group_failures.clear()
        self.try_publish()
        self._prune()
        self._waiting_since = time.monotonic()
        return done.record

    def _abandon(self, error: LeaseLost) -> None:
        self._unsettled = None
        self._journal.add("lease_lost", "warning", str(error))
        self.release()

    def _settle(self) -> UpdateRecord | None:
        """Find out what became of a commit that was cut off; commit it if it did not happen.

        A commit that the server is still at work on holds the rows of its groups: ours waits for
        it, finds them consumed, and the second look finds the row.
        """
        made = self._unsettled
        if made is None:
            return None
        if not self._is_stored(made):
            try:
                self._commit(made)
            except LeaseLost as error:
                if not self._is_stored(made):
                    self._abandon(error)
                    return None
        return self._conclude(made)

    def _is_stored(self, made: _Made) -> bool:
        record = self._store.version(self._run_id, made.state.version)
        return record is not None and record.sha256 == made.snapshot.sha256

    def _commit(self, made: _Made) -> None:
        self._unsettled = made
        self._store.commit_update(
            self._run_id,
            owner=self._owner,
            group_ids=made.group_ids,
            update=made.record,
            version=version_record(made.snapshot),
        )

    def _update(self, groups: Sequence[LeasedGroup], *, started: float) -> _Made | None:
        """Compute the update, make it durable, commit it; nothing before the commit counts.

        None where no optimiser step could be made: then there is no update to commit.
        """
        old = self.current
        group_ids = [group.group_id for group in groups]
        alpha = self._alpha(old.step)
        try:
            batch, metrics = self._compute(groups, alpha=alpha)
        except Exception as error:
            self._blame(group_ids, error)
            raise
        if metrics.num_skipped_steps:
            group_ids = self._give_up_skipped(batch, metrics, group_ids)
            if metrics.num_optimizer_steps == 0:
                return None
        gamma = batch.gamma(
            self._config.entropy_quantile, floor=self._config.gamma_floor, fallback=old.gamma
        )
        state = TrainingState(
            version=old.version + 1,
            step=old.step + 1,
            alpha=self._alpha(old.step + 1),
            gamma=gamma,
            parent_version=old.version,
        )
        due = state.step % self._config.checkpoint_every == 0
        snapshot = self._archive.save(state, with_checkpoint=due)
        record = update_record(
            batch,
            metrics,
            alpha=alpha,
            state=state,
            num_stale=self._intake.num_stale,
            wait_time_s=started - self._waiting_since,
            step_time_s=time.monotonic() - started,
        )
        made = _Made(record, state, snapshot, group_ids)
        self._commit(made)
        return made

    def _compute(
        self, groups: Sequence[LeasedGroup], *, alpha: float
    ) -> tuple[TrainingBatch, UpdateMetrics]:
        batch = build_batch(
            groups,
            alpha=alpha,
            policy_version=self.current.version,
            config=self._config.advantages,
            keep_silent=not self._config.dynamic_sampling,
        )
        scale = learning_rate_scale(
            self.current.step,
            decay_steps=self._config.learning_rate_decay_steps,
            final_ratio=self._config.learning_rate_final_ratio,
        )
        update = replace(self._config.update, learning_rate_scale=scale)
        return batch, self._backend.step(batch, update)

    def _give_up_skipped(
        self, batch: TrainingBatch, metrics: UpdateMetrics, group_ids: Sequence[str]
    ) -> list[str]:
        """Mark groups whose gradient was not finite as failed; returns the others."""
        mini_batches = list(batch.mini_batches(self._config.update.mini_batch_prompts))
        skipped = metrics.skipped_mini_batches
        doomed = [group.group_id for index in skipped for group in mini_batches[index]]
        message = (
            f"step {self.current.step + 1}: the gradient of {len(skipped)} of "
            f"{len(mini_batches)} mini-batches was not finite and not applied; their "
            f"{len(doomed)} groups are marked as failed"
        )
        reason = f"the gradient of step {self.current.step + 1} was not finite"
        self._store.fail_groups(self._run_id, owner=self._owner, group_ids=doomed, error=reason)
        self._journal.add("gradient_not_finite", "warning", message)
        return [item for item in group_ids if item not in set(doomed)]

    def _blame(self, group_ids: Sequence[str], error: Exception) -> None:
        """Count a failed computation against its groups; give up those that failed too often."""
        self._group_failures.update(group_ids)
        limit = self._config.max_group_failures
        doomed = [item for item in group_ids if self._group_failures[item] >= limit]
        if not doomed:
            return
        reason = f"{limit} updates in a row failed: {last_line(error)}"
        self._store.fail_groups(self._run_id, owner=self._owner, group_ids=doomed, error=reason)
        self._journal.add("groups_failed", "error", f"{len(doomed)} groups: {reason}")
        for group_id in doomed:
            del self._group_failures[group_id]

    def _prune(self) -> None:
        try:
            self._archive.prune(
                keep_checkpoints=self._config.keep_checkpoints,
                keep_snapshots=self._config.keep_snapshots,
                version=self.current.version,
            )
        except OSError as error:
            # The update is committed: a directory that cannot be removed must not undo it.
            self._journal.add("prune_failed", "warning", last_line(error))

    def rollback(self, version: int) -> VersionRecord:
        """Make a new version with the weights of a kept one; see `Learner.rollback`.

        Raises:
            WeightsError: the version is unknown, or its snapshot is gone or damaged.
        """
        self.prepare()
        if self._store.version(self._run_id, version) is None:
            raise WeightsError(
                f"expected a version of this run, got {version}; "
                "choose one of `mentor-serve weights list`"
            )
        self.needs_restore = True
        old = self._archive.load_version(version)
        state = replace(
            self.current,
            version=self.current.version + 1,
            gamma=old.gamma,
            parent_version=version,
        )
        snapshot = self._archive.save(state, with_checkpoint=True)
        record = version_record(snapshot)
        self._store.add_version(self._run_id, record)
        self._adopt(state, snapshot)
        self._intake.mark_stale(state.version)
        message = f"version {state.version} has the weights of version {version}"
        self._journal.add("rolled_back", "warning", message)
        self.try_publish()
        return record

    # Publication

    def publish(self) -> None:
        """Hand the current version to the replicas and call it live.

        Raises:
            WeightsError: the replicas did not take it, or the store could not say so.
        """
        version = self.current.version
        if self._snapshot is None:
            raise RuntimeError("expected a started learner; call start() first")
        try:
            report = self._broadcaster.publish(self._snapshot)
            self._store.set_live(self._run_id, version)
        except Exception as error:
            # Anything may come from the other side of a broadcast; it all means: not published.
            raise WeightsError(
                f"expected every replica to take version {version}, but: {last_line(error)}; "
                "it is published again before the next step"
            ) from error
        self.published_version = version
        if report.num_dropped:
            message = (
                f"version {version}: {report.num_dropped} replicas did not take it and were "
                f"dropped, {report.num_replicas} serve it"
            )
            self._journal.add("replicas_dropped", "warning", message)

    def try_publish(self) -> None:
        """Publish; a failure is an event, and the next `prepare` tries again."""
        try:
            self.publish()
        except WeightsError as error:
            self._journal.add("publish_failed", "error", str(error))
