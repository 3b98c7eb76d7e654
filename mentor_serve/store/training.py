"""Updates and policy versions in SQL: functions over an open transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, insert, select, update

from mentor_serve.errors import LeaseLost, StoreError
from mentor_serve.store.groups import finite
from mentor_serve.store.models import PolicyVersion, RolloutGroup, Run, Update
from mentor_serve.store.records import UpdateRecord, VersionRecord
from mentor_serve.types import GroupStatus

_UPDATE_FIELDS = tuple(field.name for field in fields(UpdateRecord))
_VERSION_FIELDS = tuple(field.name for field in fields(VersionRecord))


def consume(
    connection: Connection, run_id: str, *, owner: str, group_ids: Sequence[str], step: int
) -> None:
    """Mark groups as trained on by `step`.

    An expired lease still counts as long as nobody else took the group.

    Raises:
        LeaseLost: `owner` does not hold every one of them; the caller's transaction must end.
    """
    wanted = set(group_ids)
    result = connection.execute(
        update(RolloutGroup)
        .where(
            RolloutGroup.run_id == run_id,
            RolloutGroup.id.in_(wanted),
            RolloutGroup.status == GroupStatus.LEASED.value,
            RolloutGroup.lease_owner == owner,
        )
        .values(
            status=GroupStatus.CONSUMED.value,
            consumed_by_step=step,
            lease_owner=None,
            lease_expires_at=None,
        )
    )
    if result.rowcount != len(wanted):
        raise LeaseLost(
            f"expected {owner!r} to hold the leases of {len(wanted)} groups, it holds "
            f"{result.rowcount}: step {step} was not committed; lease groups again and repeat it"
        )


def add_version(
    connection: Connection, run_id: str, version: VersionRecord, *, now: datetime
) -> None:
    """Insert a version that is not live."""
    row = {name: getattr(version, name) for name in _VERSION_FIELDS}
    connection.execute(
        insert(PolicyVersion).values(row | {"run_id": run_id, "is_live": False, "created_at": now})
    )


def add_update(connection: Connection, run_id: str, record: UpdateRecord, *, now: datetime) -> None:
    """Insert the row of one update and touch the run."""
    row: dict[str, Any] = {name: getattr(record, name) for name in _UPDATE_FIELDS}
    row = {
        name: finite(value) if isinstance(value, float) else value for name, value in row.items()
    }
    connection.execute(insert(Update).values(row | {"run_id": run_id, "created_at": now}))
    connection.execute(update(Run).where(Run.id == run_id).values(updated_at=now))


def set_live(connection: Connection, run_id: str, version: int) -> None:
    """Make `version` the only live one.

    Raises:
        StoreError: the run has no such version.
    """
    of_run = PolicyVersion.run_id == run_id
    connection.execute(
        update(PolicyVersion).where(of_run, PolicyVersion.is_live).values(is_live=False)
    )
    result = connection.execute(
        update(PolicyVersion).where(of_run, PolicyVersion.version == version).values(is_live=True)
    )
    if result.rowcount != 1:
        raise StoreError(f"expected version {version} in the store, found none; nothing changed")


def versions_query(run_id: str) -> Select[Any]:
    """The versions of a run as rows of `policy_versions`."""
    return select(PolicyVersion).where(PolicyVersion.run_id == run_id)


def read_versions(connection: Connection, query: Select[Any]) -> list[VersionRecord]:
    """Run a `versions_query`."""
    return [
        VersionRecord(**{name: row[name] for name in _VERSION_FIELDS})
        for row in connection.execute(query).mappings()
    ]


def latest_update(connection: Connection, run_id: str) -> UpdateRecord | None:
    """The update of the highest step."""
    query = select(Update).where(Update.run_id == run_id).order_by(Update.step.desc()).limit(1)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else UpdateRecord(**{name: row[name] for name in _UPDATE_FIELDS})
