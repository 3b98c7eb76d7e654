"""Reads for programs: where a run stands, its trajectories, whether the database is sound.

Functions over an open transaction. Aggregates for people live in `stats`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from typing import Any

from numpy.typing import NDArray
from sqlalchemy import Connection, Select, func, select

from mentor_serve.store import journal, leases, training
from mentor_serve.store.encoding import decode
from mentor_serve.store.models import (
    InterventionRow,
    PolicyVersion,
    RolloutGroup,
    Run,
    TaskRow,
    Trajectory,
    TrajectoryTokens,
    Update,
    VersionStats,
)
from mentor_serve.store.records import TrainingStatus, TrajectoryRecord
from mentor_serve.types import TrajectoryKind

_RECENT_UPDATES = 10
_PASS_RATE_VERSIONS = 5
_RATE_WINDOW = timedelta(minutes=5)
_FROM_TASK = ("source", "prompt", "answer")
_FROM_TRAJECTORY = tuple(
    field.name for field in fields(TrajectoryRecord) if field.name not in _FROM_TASK
)


def training_status(connection: Connection, run_id: str, *, now: datetime) -> TrainingStatus | None:
    """Where the run stands; None where there is no such run."""
    run = connection.execute(select(Run).where(Run.id == run_id)).mappings().one_or_none()
    if run is None:
        return None
    versions = training.versions_query(run_id)
    newest = training.read_versions(
        connection, versions.order_by(PolicyVersion.version.desc()).limit(1)
    )
    live = training.read_versions(connection, versions.where(PolicyVersion.is_live))
    last = training.latest_update(connection, run_id)
    means = _recent_means(connection, run_id)
    return TrainingStatus(
        run_id=run_id,
        run_name=run["name"],
        step=0 if last is None else last.step,
        policy_version=newest[0].version if newest else None,
        live_version=live[0].version if live else None,
        alpha=newest[0].alpha if newest else None,
        gamma=newest[0].gamma if newest else None,
        groups=leases.count(connection, run_id),
        num_trajectories=connection.scalars(
            select(func.count()).select_from(Trajectory).where(Trajectory.run_id == run_id)
        ).one(),
        mean_reward_on_policy=means[0],
        mean_reward_mixed=means[1],
        mean_accuracy_on_policy=means[2],
        pass_rate_first=_pass_rate(connection, run_id, newest_first=False),
        pass_rate_last=_pass_rate(connection, run_id, newest_first=True),
        last_update_at=None if last is None else last.created_at,
        groups_per_minute=_groups_per_minute(connection, run_id, run["started_at"], now=now),
        errors=journal.recent_events(connection, run_id, severity="error", limit=5),
    )


def _recent_means(connection: Connection, run_id: str) -> tuple[float | None, ...]:
    recent = (
        select(
            Update.mean_reward_on_policy, Update.mean_reward_mixed, Update.mean_accuracy_on_policy
        )
        .where(Update.run_id == run_id)
        .order_by(Update.step.desc())
        .limit(_RECENT_UPDATES)
        .subquery()
    )
    return tuple(connection.execute(select(*(func.avg(column) for column in recent.c))).one())


def _pass_rate(connection: Connection, run_id: str, *, newest_first: bool) -> float | None:
    version = VersionStats.policy_version
    versions = (
        select(VersionStats.num_passed, VersionStats.num_scored)
        .where(VersionStats.run_id == run_id, VersionStats.kind == TrajectoryKind.ON_POLICY.value)
        .order_by(version.desc() if newest_first else version)
        .limit(_PASS_RATE_VERSIONS)
        .subquery()
    )
    passed, scored = connection.execute(
        select(func.sum(versions.c.num_passed), func.sum(versions.c.num_scored))
    ).one()
    return float(passed) / float(scored) if scored else None


def _groups_per_minute(
    connection: Connection, run_id: str, started_at: datetime, *, now: datetime
) -> float:
    window = min(_RATE_WINDOW, max(now - started_at, timedelta(seconds=1)))
    num_groups = connection.scalars(
        select(func.count())
        .select_from(RolloutGroup)
        .where(RolloutGroup.run_id == run_id, RolloutGroup.created_at > now - window)
    ).one()
    return num_groups * 60.0 / window.total_seconds()


def trajectories_query() -> Select[Any]:
    """Trajectories with the text of their task."""
    columns = [Trajectory.__table__.c[name] for name in _FROM_TRAJECTORY]
    columns += [TaskRow.__table__.c[name] for name in _FROM_TASK]
    return select(*columns).outerjoin_from(Trajectory, TaskRow, TaskRow.id == Trajectory.task_id)


def read_trajectories(connection: Connection, query: Select[Any]) -> list[TrajectoryRecord]:
    """Run a `trajectories_query`."""
    return [TrajectoryRecord(**row) for row in connection.execute(query).mappings()]


def trajectory_document(connection: Connection, trajectory_id: str) -> dict[str, Any] | None:
    """One trajectory as nested dicts and lists; NaN and infinity, which JSON lacks, become None."""
    found = read_trajectories(
        connection, trajectories_query().where(Trajectory.id == trajectory_id)
    )
    if not found:
        return None
    replaced = (
        select(InterventionRow)
        .where(InterventionRow.trajectory_id == trajectory_id)
        .order_by(InterventionRow.position)
    )
    document = asdict(found[0])
    document["created_at"] = found[0].created_at.isoformat()
    arrays = tokens(connection, trajectory_id)
    document["tokens"] = {name: _listed(array) for name, array in (arrays or {}).items()}
    document["interventions"] = [
        {name: value for name, value in row.items() if name != "trajectory_id"}
        for row in connection.execute(replaced).mappings()
    ]
    return document


def _listed(array: NDArray[Any]) -> list[Any]:
    return [value if math.isfinite(value) else None for value in array.tolist()]


def tokens(connection: Connection, trajectory_id: str) -> dict[str, NDArray[Any]] | None:
    """Column of `trajectory_tokens` to array; None where there are no tokens."""
    query = select(TrajectoryTokens).where(TrajectoryTokens.trajectory_id == trajectory_id)
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        return None
    return {name: decode(value) for name, value in row.items() if name != "trajectory_id"}
