"""Rollout groups on their way into SQL.

Functions over an open transaction; `TrajectoryStore` opens and commits it. What needs no database
was computed before (`group_rows`).

Locks: every transaction that stores groups takes them in one order, tasks by their key, groups by
their id, sums by their key, so that collectors never wait for each other in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import cache

from sqlalchemy import Connection, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.dml import ReturningInsert

from mentor_serve.store.group_rows import (
    ARRAY_COLUMNS,
    DetailInserts,
    GroupRows,
    RowValues,
    finite,
    trajectory_row,
)
from mentor_serve.store.journal import ensure_tasks
from mentor_serve.store.models import RolloutGroup, Trajectory
from mentor_serve.store.records import NewTrajectory
from mentor_serve.store.rollup import add_version_sums
from mentor_serve.types import Score, TrajectoryKind

__all__ = ["ARRAY_COLUMNS", "finite", "trajectory_row"]


def add_groups(
    connection: Connection, groups: Sequence[GroupRows], inserts: DetailInserts
) -> list[bool]:
    """Insert groups with everything that belongs to them; False for each that is there already.

    All of them must belong to one run, and come from `inserts`.
    """
    if not groups:
        return []
    task_ids = ensure_tasks(
        connection,
        groups[0].run_id,
        [(one.content_key, one.task, one.created_at) for one in groups],
    )
    new_ids = _insert_group_rows(connection, groups, task_ids)
    is_new = _first_of_each(groups, new_ids)
    new = [one for one, is_first in zip(groups, is_new, strict=True) if is_first]
    rows = [(*row, task_ids[one.content_key]) for one in new for row in one.details.trajectories]
    inserts.trajectories.execute(connection, rows)
    inserts.tokens.execute(connection, [row for one in new for row in one.details.tokens])
    inserts.interventions.execute(
        connection, [row for one in new for row in one.details.interventions]
    )
    add_version_sums(connection, [one.sums for one in new])
    return is_new


def _first_of_each(groups: Sequence[GroupRows], new_ids: set[str]) -> list[bool]:
    """Whether each group is the first of its id, and was not stored before."""
    seen: set[str] = set()
    is_first = []
    for one in groups:
        is_first.append(one.group_id in new_ids and one.group_id not in seen)
        seen.add(one.group_id)
    return is_first


def _insert_group_rows(
    connection: Connection, groups: Sequence[GroupRows], task_ids: dict[str, str]
) -> set[str]:
    """Insert the rows of `rollout_groups`; returns the ids of those that were not there."""
    statement = _group_insert(connection.dialect.name)
    rows = {one.group_id: one.group | {"task_id": task_ids[one.content_key]} for one in groups}
    return set(connection.scalars(statement, [rows[key] for key in sorted(rows)]))


@cache
def _group_insert(dialect_name: str) -> ReturningInsert[tuple[str]]:
    """One object for all calls: SQLAlchemy then recognises it without looking at every part."""
    dialect = postgresql if dialect_name == "postgresql" else sqlite
    statement: ReturningInsert[tuple[str]] = (
        dialect.insert(RolloutGroup).on_conflict_do_nothing().returning(RolloutGroup.id)
    )
    return statement


def insert_trajectories(
    connection: Connection, values: Sequence[RowValues], items: Sequence[NewTrajectory]
) -> None:
    """Insert trajectories without a group, in the order of `items`: values with ids."""
    inserts = DetailInserts(connection.dialect)
    rows = inserts.rows([one | {"group_id": None} for one in values], items)
    task_ids = [one["task_id"] for one in values]
    inserts.trajectories.execute(
        connection, [(*row, one) for row, one in zip(rows.trajectories, task_ids, strict=True)]
    )
    inserts.tokens.execute(connection, rows.tokens)
    inserts.interventions.execute(connection, rows.interventions)


def add_served(
    connection: Connection,
    run_id: str,
    item: NewTrajectory,
    *,
    trajectory_id: str,
    now: datetime,
) -> bool:
    """Insert a response that belongs to no group; False where it is already there."""
    known = select(Trajectory.id).where(Trajectory.id == trajectory_id)
    if connection.scalars(known).one_or_none() is not None:
        return False
    row = trajectory_row(item, run_id=run_id, now=now, version=0)
    insert_trajectories(connection, [row | {"id": trajectory_id, "task_id": None}], [item])
    return True


def score_served(connection: Connection, trajectory_id: str, score: Score) -> bool:
    """Set the reward of a served response; False where there is none of that id."""
    result = connection.execute(
        update(Trajectory)
        .where(Trajectory.id == trajectory_id, Trajectory.kind == TrajectoryKind.SERVED.value)
        .values(
            reward=finite(score.reward),
            accuracy=finite(score.accuracy),
            format_score=finite(score.format_score),
        )
    )
    return result.rowcount == 1
