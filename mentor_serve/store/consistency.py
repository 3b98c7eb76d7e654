"""Rows of the store that contradict each other: queries and comparisons for `checks`."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, case, func, or_, select
from sqlalchemy.orm import aliased

from mentor_serve.store.models import (
    Base,
    PolicyVersion,
    RolloutGroup,
    Run,
    Trajectory,
    TrajectoryTokens,
    Update,
    VersionStats,
)
from mentor_serve.types import GroupStatus, TrajectoryKind

RESTORE = "restore a backup (docs/operations.md)"
"""What to do about most damage."""
_TRAINABLE = (GroupStatus.READY.value, GroupStatus.LEASED.value)


def _number_of(table: type[Base]) -> Select[int]:
    return select(func.count()).select_from(table)


def _tokens_of(owner: ColumnElement[str] | Any) -> Select[Any]:
    return select(TrajectoryTokens.trajectory_id).where(TrajectoryTokens.trajectory_id == owner)


CONSUMED_WITHOUT_UPDATE = _number_of(RolloutGroup).where(
    RolloutGroup.status == GroupStatus.CONSUMED.value,
    ~select(Update.step)
    .where(Update.run_id == RolloutGroup.run_id, Update.step == RolloutGroup.consumed_by_step)
    .exists(),
)
LEASE_AND_STATUS_DISAGREE = _number_of(RolloutGroup).where(
    (RolloutGroup.status == GroupStatus.LEASED.value) != RolloutGroup.lease_owner.is_not(None)
)
EMPTY_GROUPS = _number_of(RolloutGroup).where(
    RolloutGroup.status.in_(_TRAINABLE),
    ~select(Trajectory.id)
    .where(Trajectory.group_id == RolloutGroup.id, Trajectory.status == "ok")
    .exists(),
)
WITHOUT_TOKENS = _number_of(Trajectory).where(
    Trajectory.status == "ok",
    select(RolloutGroup.id)
    .where(RolloutGroup.id == Trajectory.group_id, RolloutGroup.status.in_(_TRAINABLE))
    .exists(),
    ~_tokens_of(Trajectory.id).exists(),
)
DEMONSTRATIONS_WITHOUT_TOKENS = _number_of(Trajectory).where(
    Trajectory.kind == TrajectoryKind.EXPERT.value,
    Trajectory.group_id.is_(None),
    Trajectory.status == "ok",
    ~_tokens_of(Trajectory.id).exists(),
)


def partly_pruned() -> Select[int]:
    """Pruning takes the arrays of whole groups: one that lost some of them was damaged."""
    by_group = (
        select(Trajectory.group_id)
        .join(RolloutGroup, RolloutGroup.id == Trajectory.group_id)
        .outerjoin(TrajectoryTokens, TrajectoryTokens.trajectory_id == Trajectory.id)
        .where(Trajectory.status == "ok", RolloutGroup.status.not_in(_TRAINABLE))
        .group_by(Trajectory.group_id)
        .having(
            func.count(TrajectoryTokens.trajectory_id).between(1, func.count(Trajectory.id) - 1)
        )
        .subquery()
    )
    return select(func.count()).select_from(by_group)


def miscounted_groups() -> Select[int]:
    """Groups whose counts are not those of their trajectories."""

    def usable(kind: TrajectoryKind) -> ColumnElement[int]:
        is_usable = and_(Trajectory.kind == kind.value, Trajectory.status == "ok")
        return func.count(case((is_usable, 1)))

    wrong = (
        RolloutGroup.num_on_policy != usable(TrajectoryKind.ON_POLICY),
        RolloutGroup.num_mixed != usable(TrajectoryKind.MIXED),
        RolloutGroup.num_expert != usable(TrajectoryKind.EXPERT),
        RolloutGroup.num_tokens != func.coalesce(func.sum(Trajectory.num_tokens), 0),
    )
    by_group = (
        select(RolloutGroup.id)
        .outerjoin(Trajectory, Trajectory.group_id == RolloutGroup.id)
        .group_by(RolloutGroup.id)
        .having(or_(*wrong))
        .subquery()
    )
    return select(func.count()).select_from(by_group)


def miscounted_updates() -> Select[int]:
    """More groups than the update had; or fewer, though none were pruned or given up."""
    group = aliased(RolloutGroup)
    found = (
        select(func.count())
        .select_from(group)
        .where(group.run_id == Update.run_id, group.consumed_by_step == Update.step)
        .scalar_subquery()
    )
    is_whole = and_(Run.num_pruned_groups == 0, func.coalesce(Update.num_skipped_steps, 0) == 0)
    return (
        _number_of(Update)
        .join(Run, Run.id == Update.run_id)
        .where(or_(found > Update.num_groups, and_(is_whole, found < Update.num_groups)))
    )


def several_live_versions(connection: Connection) -> list[str]:
    """Runs of which more than one version is live; only a damaged index lets that happen."""
    query = (
        select(PolicyVersion.run_id, func.count().label("num_live"))
        .where(PolicyVersion.is_live)
        .group_by(PolicyVersion.run_id)
        .having(func.count() > 1)
    )
    return [
        f"run {run_id} has {number} live versions; {RESTORE}, or clear is_live of all but one and "
        "rebuild the index uq_policy_versions_live (REINDEX)"
        for run_id, number in connection.execute(query)
    ]


_COUNTED = (
    "num_trajectories",
    "num_scored",
    "num_passed",
    "num_scored_tokens",
    "num_tokens",
    "num_gated",
    "num_interventions",
)
"""Whole numbers of `version_stats`: exact, whatever the order in which they were added."""


def wrong_version_stats(connection: Connection) -> list[str]:
    """Running sums below what is there; or above it, though nothing was pruned."""
    sums = select(*_stats_key(VersionStats), *(getattr(VersionStats, name) for name in _COUNTED))
    kept = {tuple(row[:3]): _whole(row[3:]) for row in connection.execute(sums)}
    found = {tuple(row[:3]): _whole(row[3:]) for row in connection.execute(_stats_scan())}
    pruned = set(connection.scalars(select(Run.id).where(Run.num_pruned_groups > 0)))
    nothing = (0,) * len(_COUNTED)
    wrong = [
        key
        for key in sorted(kept.keys() | found.keys())
        if _disagree(kept.get(key, nothing), found.get(key, nothing), is_pruned=key[0] in pruned)
    ]
    if not wrong:
        return []
    run_id, kind, version = wrong[0]
    return [
        f"{len(wrong)} rows of version_stats disagree with trajectories, first kind {kind}, policy "
        f"version {version} of run {run_id}: curves by version are wrong there; {RESTORE}"
    ]


def _disagree(kept: tuple[int, ...], found: tuple[int, ...], *, is_pruned: bool) -> bool:
    if is_pruned:
        return any(sum_ < number for sum_, number in zip(kept, found, strict=True))
    return kept != found


def _whole(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)  # PostgreSQL sums integers into decimals


def _stats_key(table: Any) -> tuple[Any, Any, Any]:
    version = getattr(table, "policy_version", None) or Trajectory.min_policy_version
    return table.run_id, table.kind, version


def _stats_scan() -> Select[Any]:
    t = Trajectory
    is_scored = t.accuracy.is_not(None)
    return (
        select(
            *_stats_key(t),
            func.count(),
            func.count(t.accuracy),
            func.coalesce(func.sum(case((t.accuracy >= 1, 1), else_=0)), 0),
            func.coalesce(func.sum(case((is_scored, t.num_tokens), else_=0)), 0),
            func.sum(t.num_tokens),
            func.sum(t.num_gated),
            func.sum(t.num_interventions),
        )
        .where(t.status == "ok", t.group_id.is_not(None))
        .group_by(*_stats_key(t))
    )
