"""The store as a queue: groups are leased, renewed, released, counted and given up as stale.

Functions over an open transaction; `TrajectoryStore` opens and commits it. A group is available
when it is ready or when the lease on it has expired.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from sqlalchemy import ColumnElement, Connection, and_, func, or_, select, update

from mentor_serve.store.encoding import decode
from mentor_serve.store.groups import ARRAY_COLUMNS
from mentor_serve.store.models import RolloutGroup, Run, Trajectory, TrajectoryTokens
from mentor_serve.store.records import LeasedGroup, LeasedTrajectory
from mentor_serve.types import GroupStatus, StopReason, TrajectoryKind

_KIND_ORDER = {kind: order for order, kind in enumerate(TrajectoryKind)}


def _available(run_id: str, now: datetime) -> ColumnElement[bool]:
    return and_(
        RolloutGroup.run_id == run_id,
        or_(
            RolloutGroup.status == GroupStatus.READY.value,
            and_(
                RolloutGroup.status == GroupStatus.LEASED.value,
                RolloutGroup.lease_expires_at < now,
            ),
        ),
    )


def lease(
    connection: Connection,
    run_id: str,
    *,
    num_groups: int,
    owner: str,
    lease_s: float,
    now: datetime,
) -> list[str]:
    """Lease the `num_groups` oldest available groups, or none; returns their ids.

    SQLite holds the write lock since BEGIN IMMEDIATE. PostgreSQL locks the chosen rows and passes
    over those that another transaction is choosing (FOR UPDATE is left out on SQLite).
    """
    ids = list(
        connection.scalars(
            select(RolloutGroup.id)
            .where(_available(run_id, now))
            .order_by(RolloutGroup.id)
            .limit(num_groups)
            .with_for_update(skip_locked=True)
        )
    )
    if len(ids) < num_groups:
        return []
    connection.execute(
        update(RolloutGroup)
        .where(RolloutGroup.id.in_(ids))
        .values(
            status=GroupStatus.LEASED.value,
            lease_owner=owner,
            lease_expires_at=now + timedelta(seconds=lease_s),
        )
    )
    return ids


def read_leased(connection: Connection, group_ids: Sequence[str]) -> list[LeasedGroup]:
    """The groups with what the learner needs of them, in the order of their ids."""
    trajectories: dict[str, list[LeasedTrajectory]] = defaultdict(list)
    rows = connection.execute(
        select(Trajectory.group_id, Trajectory, TrajectoryTokens)
        .join(TrajectoryTokens, TrajectoryTokens.trajectory_id == Trajectory.id)
        .where(Trajectory.group_id.in_(group_ids), Trajectory.status == "ok")
    )
    for row in rows.mappings():
        trajectories[row["group_id"]].append(_leased_trajectory(row))
    groups = connection.execute(
        select(RolloutGroup).where(RolloutGroup.id.in_(group_ids)).order_by(RolloutGroup.id)
    )
    leased = []
    for group in groups.mappings():
        items = sorted(
            trajectories[group["id"]], key=lambda one: (_KIND_ORDER[one.kind], one.sample_index)
        )
        leased.append(
            LeasedGroup(
                group_id=group["id"],
                task_id=group["task_id"],
                policy_version=group["policy_version"],
                min_policy_version=group["min_policy_version"],
                gamma=group["gamma"],
                alpha=group["alpha"],
                prompt_token_ids=items[0].prompt_token_ids if items else np.empty(0, np.int32),
                trajectories=items,
            )
        )
    return leased


def _leased_trajectory(row: Any) -> LeasedTrajectory:
    arrays = {column: decode(row[column]) for column in ARRAY_COLUMNS.values()}
    return LeasedTrajectory(
        trajectory_id=row["id"],
        kind=TrajectoryKind(row["kind"]),
        sample_index=row["sample_index"],
        reward=row["reward"],
        accuracy=row["accuracy"],
        format_score=row["format_score"],
        stop_reason=StopReason(row["stop_reason"]),
        prompt_token_ids=decode(row["prompt_token_ids"]),
        **arrays,
    )


def renew(connection: Connection, *, owner: str, lease_s: float, now: datetime) -> int:
    """Move the end of every lease of `owner`; returns how many there are."""
    result = connection.execute(
        update(RolloutGroup)
        .where(RolloutGroup.lease_owner == owner, RolloutGroup.status == GroupStatus.LEASED.value)
        .values(lease_expires_at=now + timedelta(seconds=lease_s))
    )
    return result.rowcount


def release(connection: Connection, run_id: str, *, owner: str | None) -> int:
    """Make the leased groups of `owner` (None: of everyone) ready again; returns how many."""
    leased = and_(RolloutGroup.run_id == run_id, RolloutGroup.status == GroupStatus.LEASED.value)
    if owner is not None:
        leased = and_(leased, RolloutGroup.lease_owner == owner)
    result = connection.execute(
        update(RolloutGroup)
        .where(leased)
        .values(status=GroupStatus.READY.value, lease_owner=None, lease_expires_at=None)
    )
    return result.rowcount


def fail(
    connection: Connection, run_id: str, *, owner: str, group_ids: Sequence[str], error: str
) -> int:
    """Give up groups that `owner` holds, with the reason; returns how many it did hold."""
    result = connection.execute(
        update(RolloutGroup)
        .where(
            RolloutGroup.run_id == run_id,
            RolloutGroup.id.in_(group_ids),
            RolloutGroup.status == GroupStatus.LEASED.value,
            RolloutGroup.lease_owner == owner,
        )
        .values(
            status=GroupStatus.FAILED.value, error=error, lease_owner=None, lease_expires_at=None
        )
    )
    return result.rowcount


def mark_stale(
    connection: Connection, run_id: str, *, min_policy_version: int, now: datetime
) -> int:
    """Give up the available groups with a token older than `min_policy_version`."""
    result = connection.execute(
        update(RolloutGroup)
        .where(_available(run_id, now), RolloutGroup.min_policy_version < min_policy_version)
        .values(status=GroupStatus.STALE.value, lease_owner=None, lease_expires_at=None)
    )
    return result.rowcount


def count(connection: Connection, run_id: str) -> dict[str, int]:
    """Number of groups by status, every status present."""
    rows = connection.execute(
        select(RolloutGroup.status, func.count())
        .where(RolloutGroup.run_id == run_id)
        .group_by(RolloutGroup.status)
    )
    return {status.value: 0 for status in GroupStatus} | {row[0]: row[1] for row in rows}


def count_ever(connection: Connection, run_id: str) -> int:
    """Number of groups that the run ever had: those that are there and those that were pruned."""
    there = select(func.count()).select_from(RolloutGroup).where(RolloutGroup.run_id == run_id)
    pruned = select(func.sum(Run.num_pruned_groups)).where(Run.id == run_id)
    return connection.scalars(there).one() + (connection.scalars(pruned).one() or 0)
