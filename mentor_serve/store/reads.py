"""Reads for programs: where a run stands, its trajectories, whether the database is sound.

Functions over an open transaction. Aggregates for people live in `stats`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from typing import Any

from numpy.typing import NDArray
from sqlalchemy import Connection, Select, and_, case, func, select

from mentor_serve.store import journal, leases, training
from mentor_serve.store.encoding import decode
from mentor_serve.store.models import (
    Base,
    InterventionRow,
    PolicyVersion,
    RolloutGroup,
    Run,
    TaskRow,
    Trajectory,
    TrajectoryTokens,
    Update,
)
from mentor_serve.store.records import TrainingStatus, TrajectoryRecord
from mentor_serve.types import GroupStatus, TrajectoryKind

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
    version = Trajectory.min_policy_version
    counted = and_(
        Trajectory.run_id == run_id,
        Trajectory.kind == TrajectoryKind.ON_POLICY.value,
        Trajectory.status == "ok",
    )
    # The versions first, from the index alone: a whole view would read every trajectory.
    versions = list(
        connection.scalars(
            select(version)
            .where(counted)
            .distinct()
            .order_by(version.desc() if newest_first else version)
            .limit(_PASS_RATE_VERSIONS)
        )
    )
    passed = case((Trajectory.accuracy >= 1, 1.0), else_=0.0)
    rate = connection.scalars(select(func.avg(passed)).where(counted, version.in_(versions))).one()
    return None if rate is None else float(rate)


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


def find_problems(connection: Connection, *, now: datetime) -> dict[str, Any]:
    """Counts of every table and everything that should not be; see `store.database_check`."""
    counts = {
        name: connection.scalars(select(func.count()).select_from(table)).one()
        for name, table in sorted(Base.metadata.tables.items())
    }
    problems: list[str] = []
    if connection.dialect.name == "sqlite":
        problems += [
            f"integrity: {row[0]}"
            for row in connection.exec_driver_sql("PRAGMA integrity_check")
            if row[0] != "ok"
        ]
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
        problems += [f"row {row[1]} of {row[0]} refers to a missing {row[2]}" for row in broken]
    for text, query in _ORPHANS.items():
        number = connection.scalars(query).one()
        if number:
            problems.append(f"{number} {text}")
    expired = connection.scalars(
        select(func.count())
        .select_from(RolloutGroup)
        .where(RolloutGroup.status == GroupStatus.LEASED.value, RolloutGroup.lease_expires_at < now)
    ).one()
    return {"ok": not problems, "problems": problems, "counts": counts, "expired_leases": expired}


def _number_of(table: type[Base]) -> Select[int]:
    return select(func.count()).select_from(table)


_ORPHANS: dict[str, Select[int]] = {
    "consumed groups without the update that consumed them": _number_of(RolloutGroup).where(
        RolloutGroup.status == GroupStatus.CONSUMED.value,
        ~select(Update.step)
        .where(Update.run_id == RolloutGroup.run_id, Update.step == RolloutGroup.consumed_by_step)
        .exists(),
    ),
    "groups that are neither leased nor free of a lease": _number_of(RolloutGroup).where(
        (RolloutGroup.status == GroupStatus.LEASED.value)
        != (RolloutGroup.lease_owner.is_not(None)),
    ),
    "trainable groups without a usable trajectory": _number_of(RolloutGroup).where(
        RolloutGroup.status.in_([GroupStatus.READY.value, GroupStatus.LEASED.value]),
        ~select(Trajectory.id)
        .where(Trajectory.group_id == RolloutGroup.id, Trajectory.status == "ok")
        .exists(),
    ),
    "usable trajectories of unconsumed groups without tokens": _number_of(Trajectory).where(
        Trajectory.status == "ok",
        select(RolloutGroup.id)
        .where(
            RolloutGroup.id == Trajectory.group_id,
            RolloutGroup.status.in_([GroupStatus.READY.value, GroupStatus.LEASED.value]),
        )
        .exists(),
        ~select(TrajectoryTokens.trajectory_id)
        .where(TrajectoryTokens.trajectory_id == Trajectory.id)
        .exists(),
    ),
}
