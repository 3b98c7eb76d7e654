"""Which groups and served responses are old: keyset queries in the order of an index.

Conditions and orders only; `prune` runs them and deletes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, func, select, true

from mentor_serve.store.models import (
    PolicyVersion,
    RolloutGroup,
    Trajectory,
    TrajectoryTokens,
)
from mentor_serve.types import GroupStatus, TrajectoryKind

FINISHED = (GroupStatus.CONSUMED.value, GroupStatus.STALE.value, GroupStatus.FAILED.value)
"""Statuses that a group never leaves: nobody will train on it any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Old groups of one status, or old served responses."""

    is_groups: bool
    condition: ColumnElement[bool]

    @property
    def ids(self) -> Any:
        """The column of the ids."""
        return RolloutGroup.id if self.is_groups else Trajectory.id

    def after(self, last: str) -> Select[Any]:
        """Ids behind `last` (the empty text: from the start), in their order."""
        # Without a bound SQLite would rather take another index and sort.
        return select(self.ids).where(self.condition, self.ids > last).order_by(self.ids)


def version_floor(connection: Connection, run_id: str, keep: int | None) -> int | None:
    """The oldest version that is kept; 0 keeps all, as where there is no version yet."""
    if keep is None:
        return None
    newest = connection.scalars(
        select(func.max(PolicyVersion.version)).where(PolicyVersion.run_id == run_id)
    ).one()
    return 0 if newest is None else newest - keep + 1


def _is_old(
    table: type[RolloutGroup] | type[Trajectory], before: datetime | None, floor: int | None
) -> ColumnElement[bool]:
    by_age = true() if before is None else table.created_at < before
    by_version = true() if floor is None else table.min_policy_version < floor
    return and_(by_age, by_version)


def old_groups(
    run_id: str, *, before: datetime | None, floor: int | None, has_tokens: bool
) -> list[Selection]:
    """Finished groups from before both bounds; with `has_tokens` those that still have arrays."""
    condition = and_(RolloutGroup.run_id == run_id, _is_old(RolloutGroup, before, floor))
    if has_tokens:
        condition = and_(
            condition,
            select(TrajectoryTokens.trajectory_id)
            .join(Trajectory, Trajectory.id == TrajectoryTokens.trajectory_id)
            .where(Trajectory.group_id == RolloutGroup.id)
            .exists(),
        )
    # One status at a time: then (run_id, status, id) is an index in the order of the ids.
    return [
        Selection(is_groups=True, condition=and_(condition, RolloutGroup.status == status))
        for status in FINISHED
    ]


def old_served(
    run_id: str, *, before: datetime | None, floor: int | None, has_tokens: bool
) -> Selection:
    """Served responses, likewise."""
    condition = and_(
        Trajectory.run_id == run_id,
        Trajectory.kind == TrajectoryKind.SERVED.value,
        _is_old(Trajectory, before, floor),
    )
    if has_tokens:
        tokens = TrajectoryTokens.trajectory_id
        condition = and_(condition, select(tokens).where(tokens == Trajectory.id).exists())
    # The index of listings starts with run_id and id, and has the kind.
    return Selection(is_groups=False, condition=condition)
