"""Runs, tasks and events in SQL: functions over an open transaction."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, inspect, select, update
from sqlalchemy.dialects import postgresql, sqlite

from mentor_serve.errors import StoreError
from mentor_serve.store.models import Base, Event, RolloutGroup, Run, TaskRow
from mentor_serve.store.records import EventRecord, StoredTask, new_id
from mentor_serve.types import Task

_MAX_KEYS_A_QUERY = 500
"""Below what any build of SQLite or PostgreSQL takes as parameters of one statement."""

SEVERITIES = ("info", "warning", "error")


def insert_new(connection: Connection, model: type[Base], rows: Sequence[Mapping[str, Any]]) -> int:
    """Insert the rows that no unique constraint refuses; returns how many were new."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    key = inspect(model).primary_key[0]
    num_new = 0
    for row in rows:
        # The row count of such an insert is not reliable on every driver; returned rows are.
        statement = dialect.insert(model).values(**row).on_conflict_do_nothing().returning(key)
        num_new += len(connection.execute(statement).all())
    return num_new


def open_run(
    connection: Connection, name: str, config: Mapping[str, Any], *, announce: bool, now: datetime
) -> str:
    """The id of the run called `name`, created or continued with the given configuration."""
    new_run_id = new_id()
    row = {
        "id": new_run_id,
        "name": name,
        "config_json": dict(config),
        "started_at": now,
        "updated_at": now,
    }
    if insert_new(connection, Run, [row]) == 1:
        return new_run_id
    run_id = connection.scalars(select(Run.id).where(Run.name == name)).one()
    connection.execute(
        update(Run).where(Run.id == run_id).values(config_json=dict(config), updated_at=now)
    )
    if announce:
        add_event(
            connection,
            run_id,
            kind="run_continued",
            severity="info",
            message=f"run {name!r} continues",
            now=now,
        )
    return run_id


def find_run(connection: Connection, name: str) -> str | None:
    """The id of the run called `name`."""
    return connection.scalars(select(Run.id).where(Run.name == name)).one_or_none()


def ensure_task(connection: Connection, run_id: str, task: Task, *, now: datetime) -> str:
    """The id of the task's row, inserted unless the run already has the same problem."""
    key = content_key(task)
    return ensure_tasks(connection, run_id, [(key, task, now)])[key]


def ensure_tasks(
    connection: Connection, run_id: str, tasks: Iterable[tuple[str, Task, datetime]]
) -> dict[str, str]:
    """Content key to id of the row; rows are inserted for problems that are new to the run.

    Takes each task with its key and the time that it came. Keys are written in their order: two
    transactions that meet never wait for each other in turn.
    """
    wanted = {key: (task, now) for key, task, now in tasks}
    ids = _task_ids(connection, run_id, wanted)
    missing = sorted(wanted.keys() - ids.keys())
    if missing:
        rows = [_task_row(run_id, key, *wanted[key]) for key in missing]
        dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
        connection.execute(dialect.insert(TaskRow).on_conflict_do_nothing(), rows)
        # Read again, not remembered: another collector may have been first with one of them.
        ids |= _task_ids(connection, run_id, missing)
    return ids


def _task_ids(connection: Connection, run_id: str, keys: Iterable[str]) -> dict[str, str]:
    ids: dict[str, str] = {}
    wanted = list(keys)
    for start in range(0, len(wanted), _MAX_KEYS_A_QUERY):
        some = wanted[start : start + _MAX_KEYS_A_QUERY]
        query = select(TaskRow.content_key, TaskRow.id).where(
            TaskRow.run_id == run_id, TaskRow.content_key.in_(some)
        )
        ids |= {row[0]: row[1] for row in connection.execute(query)}
    return ids


def _task_row(run_id: str, key: str, task: Task, now: datetime) -> dict[str, Any]:
    return {
        "id": new_id(),
        "run_id": run_id,
        "source": task.source,
        "prompt": task.prompt,
        "answer": task.answer,
        "split": task.split,
        "metadata_json": task.metadata,
        "content_key": key,
        "created_at": now,
    }


def content_key(task: Task) -> str:
    """SHA-256 (hex) of everything that makes two tasks the same problem."""
    parts = [task.source, task.prompt, task.answer, task.split, task.metadata]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def list_tasks(
    connection: Connection,
    run_id: str,
    *,
    source: str | None,
    only_untried: bool,
    limit: int,
) -> list[StoredTask]:
    """Tasks in the order they came, at most `limit`."""
    query = select(TaskRow).where(TaskRow.run_id == run_id).order_by(TaskRow.id).limit(limit)
    if source is not None:
        query = query.where(TaskRow.source == source)
    if only_untried:
        tried = select(RolloutGroup.id).where(RolloutGroup.task_id == TaskRow.id)
        query = query.where(~tried.exists())
    return [
        StoredTask(
            task_id=row["id"],
            task=Task(
                source=row["source"],
                prompt=row["prompt"],
                answer=row["answer"],
                metadata=row["metadata_json"],
                split=row["split"],
            ),
            created_at=row["created_at"],
        )
        for row in connection.execute(query).mappings()
    ]


def add_event(
    connection: Connection,
    run_id: str,
    *,
    kind: str,
    severity: str,
    message: str,
    now: datetime,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Insert an event.

    Raises:
        StoreError: an unknown severity.
    """
    if severity not in SEVERITIES:
        raise StoreError(f"expected a severity of {', '.join(SEVERITIES)}, got {severity!r}")
    connection.execute(
        insert(Event).values(
            id=new_id(),
            run_id=run_id,
            kind=kind,
            severity=severity,
            message=message,
            details_json=dict(details or {}),
            created_at=now,
        )
    )


def recent_events(
    connection: Connection, run_id: str, *, severity: str | None, limit: int
) -> list[EventRecord]:
    """The newest events, newest first."""
    query = select(Event).where(Event.run_id == run_id).order_by(Event.id.desc()).limit(limit)
    if severity is not None:
        query = query.where(Event.severity == severity)
    return [
        EventRecord(
            id=row["id"],
            kind=row["kind"],
            severity=row["severity"],
            message=row["message"],
            details=row["details_json"],
            created_at=row["created_at"],
        )
        for row in connection.execute(query).mappings()
    ]
