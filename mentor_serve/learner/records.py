"""The learner's view of its store, its status, and the rows it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol

from mentor_serve.learner.batch import TrainingBatch
from mentor_serve.learner.checkpoint import TrainingState
from mentor_serve.learner.step import UpdateMetrics
from mentor_serve.store.claims import RunClaim
from mentor_serve.store.records import LeasedGroup, UpdateRecord, VersionRecord
from mentor_serve.weights.snapshots import Snapshot, SnapshotLabel


class LearnerStore(Protocol):
    """What the learner needs of the trajectory store; `TrajectoryStore` provides it."""

    def claim_run(self, run_id: str) -> RunClaim:
        """The right to train a run."""

    def lease_groups(
        self, run_id: str, *, num_groups: int, owner: str, lease_s: float
    ) -> list[LeasedGroup]:
        """All `num_groups` or none."""

    def renew_leases(self, owner: str, lease_s: float) -> int:
        """Move the end of the owner's leases."""

    def release_leases(self, run_id: str, *, owner: str | None = None) -> int:
        """Make leased groups ready again."""

    def mark_stale(self, run_id: str, *, min_policy_version: int) -> int:
        """Give up groups that are too old."""

    def fail_groups(self, run_id: str, *, owner: str, group_ids: Sequence[str], error: str) -> int:
        """Mark groups that `owner` leases as `failed` with a reason; returns how many."""

    def commit_update(
        self,
        run_id: str,
        *,
        owner: str,
        group_ids: Sequence[str],
        update: UpdateRecord,
        version: VersionRecord,
    ) -> None:
        """Consume groups, add the update and its version in one transaction, or `LeaseLost`."""

    def add_version(self, run_id: str, version: VersionRecord) -> None:
        """Add a version that no update produced."""

    def set_live(self, run_id: str, version: int) -> None:
        """Make a version the only live one."""

    def latest_version(self, run_id: str) -> VersionRecord | None:
        """The newest committed version."""

    def version(self, run_id: str, version: int) -> VersionRecord | None:
        """One version."""

    def add_event(
        self,
        run_id: str,
        *,
        kind: str,
        severity: str,
        message: str,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Record something that an operator should know."""


class LearnerPhase(StrEnum):
    """What the learner is doing."""

    STARTING = "starting"
    WAITING = "waiting"
    UPDATING = "updating"
    PAUSED = "paused"
    BACKING_OFF = "backing_off"
    FINISHED = "finished"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerStatus:
    """A consistent picture of the learner; reading it never waits for a step."""

    phase: LearnerPhase = LearnerPhase.STARTING
    is_paused: bool = False
    step: int = 0
    policy_version: int = 0
    published_version: int | None = None
    """The version that replicas took last."""
    alpha: float = 0.0
    gamma: float = 0.0
    max_steps: int = 0
    num_failures: int = 0
    """Failed steps since the last good one."""
    last_error: str | None = None
    last_step_at: datetime | None = None
    last_step_time_s: float | None = None


def update_record(
    batch: TrainingBatch,
    metrics: UpdateMetrics,
    *,
    alpha: float,
    state: TrainingState,
    num_stale: int,
    wait_time_s: float,
    step_time_s: float,
) -> UpdateRecord:
    """The row of `updates`: `alpha` is the one used, `state` the one produced."""
    trained = {
        name: getattr(metrics, name)
        for name in (
            "loss",
            "grad_norm",
            "clip_fraction_low",
            "clip_fraction_high",
            "mismatch_kl",
            "effective_sample_share",
            "truncated_weight_share",
            "num_trained_tokens",
            "num_skipped_steps",
            "learning_rate",
        )
    }
    return UpdateRecord(
        step=state.step,
        policy_version=state.version,
        alpha=alpha,
        gamma=state.gamma,
        num_stale=num_stale,
        wait_time_s=wait_time_s,
        step_time_s=step_time_s,
        **trained,
        **asdict(batch.metrics),
    )


def tracked_numbers(record: UpdateRecord) -> dict[str, float]:
    """The numbers of an update by column name, as a tracker takes them."""
    return {
        name: float(value)
        for name, value in asdict(record).items()
        if isinstance(value, int | float)
    }


def version_record(snapshot: Snapshot) -> VersionRecord:
    """The row of `policy_versions` for a snapshot on disk."""
    return VersionRecord(
        version=snapshot.version,
        step=snapshot.step,
        alpha=snapshot.alpha,
        gamma=snapshot.gamma,
        sha256=snapshot.sha256,
        path=str(snapshot.path),
        parent_version=snapshot.parent_version,
    )


def snapshot_label(state: TrainingState, *, run_id: str) -> SnapshotLabel:
    """What the snapshot of a state says about itself."""
    return SnapshotLabel(run_id=run_id, **asdict(state))
