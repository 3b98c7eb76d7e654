"""`mentor-serve db check`: is the database there, of this schema, and sound?"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, func, select

from mentor_serve.errors import StoreError
from mentor_serve.store import schema
from mentor_serve.store.checks import CHECKS
from mentor_serve.store.connection import open_engine, parse_url, reading, shown
from mentor_serve.store.models import Base, RolloutGroup
from mentor_serve.types import GroupStatus

LONG_EXPIRED = timedelta(hours=1)
"""A learner that lives renews its leases many times in this time."""

Progress = Callable[[int, int], None]
Report = dict[str, Any]


def database_check(
    url: str,
    *,
    quick: bool = False,
    progress: Progress | None = None,
    now: datetime | None = None,
) -> Report:
    """Check schema, integrity, references, token arrays and counts; changes nothing.

    Args:
        url: Of the database.
        quick: Leave out what reads whole tables: seconds at most, however large the database.
        progress: Called with the number of steps done and of all.
        now: The time that leases are compared with.

    Returns:
        `url` (password hidden), `schema` (current, head, status), `is_quick`, `ok`, `problems` and
        `warnings` (sentences; warnings leave `ok` true), `notes`, `counts` (rows by table, empty
        where quick) and `expired_leases`. A file too damaged to be read is a problem, not an error.

    Raises:
        StoreError: the database cannot be reached.
    """
    report: Report = {"url": shown(url), "schema": None, "is_quick": quick, "ok": False}
    report |= {"problems": [], "warnings": [], "notes": [], "counts": {}, "expired_leases": 0}
    try:
        state = schema.check(url)
    except StoreError as error:
        report["problems"].append(_unreadable(error, "the schema"))
        return report
    report["schema"] = {"current": state.current, "head": state.head, "status": state.status}
    if state.status != "ok":
        report["problems"].append(schema.explanation(url, state))
        return report
    engine = _open(url)
    try:
        steps = _steps(report, quick=quick, now=now or datetime.now(UTC))
        _run(engine, url, steps, report, progress or _silent)
    finally:
        engine.dispose()
    report["ok"] = not report["problems"]
    return report


def _open(url: str) -> Engine:
    engine = open_engine(url, pool_size=1, read_only=True)
    if parse_url(url).get_backend_name() == "postgresql":
        # One state of the database for all statements of a step; SQLite has no other way.
        return engine.execution_options(isolation_level="REPEATABLE READ")
    return engine


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    label: str
    run: Callable[[Connection], None]
    """Adds to the report."""
    is_decisive: bool = False


def _steps(report: Report, *, quick: bool, now: datetime) -> list[_Step]:
    def adding(find: Callable[[Connection], list[str]]) -> Callable[[Connection], None]:
        return lambda connection: report["problems"].extend(find(connection))

    chosen = [check for check in CHECKS if (check.is_quick if quick else check.is_whole)]
    steps = [
        _Step(label=check.label, run=adding(check.find), is_decisive=check.is_decisive)
        for check in chosen
    ]
    steps.append(
        _Step(label="leases", run=lambda connection: _note_leases(connection, report, now=now))
    )
    steps.append(_Step(label="the server", run=lambda connection: _note_server(connection, report)))
    if not quick:
        steps.append(_Step(label="rows", run=lambda connection: _count(connection, report)))
    return steps


def _run(
    engine: Engine, url: str, steps: Sequence[_Step], report: Report, progress: Progress
) -> None:
    """Run the steps; one that cannot be read, or that decides, ends the check."""
    for done, step in enumerate(steps):
        progress(done, len(steps))
        is_over = False
        try:
            with reading(engine, url, doing="checking the database") as connection:
                step.run(connection)
        except StoreError as error:
            report["problems"].append(_unreadable(error, step.label))
            is_over = True
        if is_over or (step.is_decisive and report["problems"]):
            report["notes"].append(f"the other checks were left out after: {step.label}")
            break
    progress(len(steps), len(steps))


def _silent(done: int, total: int) -> None:
    """No one is looking."""


def _unreadable(error: StoreError, what: str) -> str:
    """A sentence about damage; an error that is none (the database is away) is raised again."""
    if not _is_damage(error):
        raise error
    return (
        f"{what} cannot be read, the database is damaged: {error}; stop the service and restore a "
        "backup (docs/operations.md)"
    )


def _is_damage(error: BaseException) -> bool:
    """Whether the database itself said that its contents are damaged."""
    reason: BaseException | None = error
    while reason is not None:
        driver = getattr(reason, "orig", None) or reason
        code = getattr(driver, "sqlite_errorcode", None)
        if code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return True
        if (getattr(driver, "sqlstate", None) or "").startswith("XX"):
            return True
        reason = reason.__cause__
    return False


def _note_leases(connection: Connection, report: Report, *, now: datetime) -> None:
    expired = select(
        func.count(), func.min(RolloutGroup.lease_expires_at), func.min(RolloutGroup.lease_owner)
    ).where(RolloutGroup.status == GroupStatus.LEASED.value, RolloutGroup.lease_expires_at < now)
    number, since, owner = connection.execute(expired).one()
    report["expired_leases"] = number
    if since is not None and since < now - LONG_EXPIRED:
        report["warnings"].append(
            f"{number} groups are leased although their leases expired, the first (of {owner!r}) "
            f"at {since:%Y-%m-%d %H:%M} UTC: no learner renewed them; a learner that starts "
            "takes them again, nothing is lost"
        )


def _note_server(connection: Connection, report: Report) -> None:
    if connection.dialect.name != "postgresql":
        return
    checksums = connection.exec_driver_sql("SHOW data_checksums").scalar_one()
    report["notes"].append(
        f"data checksums of the PostgreSQL server are {checksums}; its files and indexes are not "
        "read here: run pg_amcheck for them (docs/operations.md)"
    )


def _count(connection: Connection, report: Report) -> None:
    for name, table in sorted(Base.metadata.tables.items()):
        report["counts"][name] = connection.scalars(select(func.count()).select_from(table)).one()
