"""`mentor-serve db stats`: what the database holds and how much room it takes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select

from mentor_serve.store import schema
from mentor_serve.store.connection import open_engine, reading, shown, sqlite_path
from mentor_serve.store.health import Progress
from mentor_serve.store.models import Base, RolloutGroup, Run, Trajectory, TrajectoryTokens
from mentor_serve.types import GroupStatus

Report = dict[str, Any]

ROLLOUT_TABLES = ("rollout_groups", "trajectories", "trajectory_tokens", "interventions")
"""What a group adds rows to; the other tables grow by steps and problems."""


def database_stats(
    url: str, *, spool: Path | None = None, progress: Progress | None = None
) -> Report:
    """Rows and bytes; reads whole tables, changes nothing.

    Args:
        url: Of the database.
        spool: Directory of groups that wait for the database.
        progress: Called with the number of steps done and of all.

    Returns:
        `url` (password hidden), `num_bytes` of the database, `num_free_bytes` within it (SQLite),
        `num_wal_bytes` beside it (SQLite), `tables` (`num_rows`, `num_bytes` with indexes,
        `num_index_bytes`; bytes are None where SQLite lacks dbstat), `rollouts` (see
        `_rollouts`), `groups` by status, `runs` and `spool` (`num_files`, `num_bytes`).

    Raises:
        SchemaOutOfDate: the database is of another schema.
        StoreError: it cannot be read.
    """
    schema.require_current(url)
    report: Report = {"url": shown(url)}
    steps = (_bytes, _rows, _groups, _rollouts)
    engine = open_engine(url, pool_size=1, read_only=True)
    try:
        for done, step in enumerate(steps):
            if progress is not None:
                progress(done, len(steps))
            with reading(engine, url, doing="measuring the database") as connection:
                step(connection, report)
    finally:
        engine.dispose()
    path = sqlite_path(url)
    wal = None if path is None else path.with_name(path.name + "-wal")
    report["num_wal_bytes"] = wal.stat().st_size if wal is not None and wal.exists() else 0
    report["spool"] = _spool(spool)
    if progress is not None:
        progress(len(steps), len(steps))
    return report


def _bytes(connection: Connection, report: Report) -> None:
    """Of the whole, and of each table with and without its indexes."""
    tables: dict[str, Report] = {
        name: {"num_rows": 0, "num_bytes": None, "num_index_bytes": None}
        for name in sorted(Base.metadata.tables)
    }
    report["tables"] = tables
    if connection.dialect.name == "postgresql":
        query = "SELECT pg_database_size(current_database())"
        report["num_bytes"] = connection.exec_driver_sql(query).scalar_one()
        report["num_free_bytes"] = None
        for name, row in tables.items():
            size = select(func.pg_total_relation_size(name), func.pg_indexes_size(name))
            row["num_bytes"], row["num_index_bytes"] = connection.execute(size).one()
        return
    pragma = {
        name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
        for name in ("page_size", "page_count", "freelist_count")
    }
    report["num_bytes"] = pragma["page_size"] * pragma["page_count"]
    report["num_free_bytes"] = pragma["page_size"] * pragma["freelist_count"]
    for name, kind, num_bytes in _sqlite_pages(connection):
        if name not in tables:
            continue  # SQLite's own, and Alembic's
        row = tables[name]
        row["num_bytes"] = (row["num_bytes"] or 0) + num_bytes
        row["num_index_bytes"] = (row["num_index_bytes"] or 0) + num_bytes * (kind == "index")


def _sqlite_pages(connection: Connection) -> list[tuple[str, str, int]]:
    """Table, `table` or `index`, and bytes of its pages; empty where dbstat is not compiled in."""
    modules = {row[0] for row in connection.exec_driver_sql("PRAGMA module_list")}
    if "dbstat" not in modules:
        return []
    query = (
        "SELECT m.tbl_name, m.type, s.pgsize FROM dbstat s JOIN sqlite_master m ON m.name = s.name "
        "WHERE s.aggregate = TRUE"
    )
    return [(row[0], row[1], row[2]) for row in connection.exec_driver_sql(query)]


def _rows(connection: Connection, report: Report) -> None:
    for name, table in Base.metadata.tables.items():
        rows = select(func.count()).select_from(table)
        report["tables"][name]["num_rows"] = connection.scalars(rows).one()


def _groups(connection: Connection, report: Report) -> None:
    query = select(RolloutGroup.status, func.count()).group_by(RolloutGroup.status)
    found = {row[0]: row[1] for row in connection.execute(query)}
    report["groups"] = {status.value: found.get(status.value, 0) for status in GroupStatus}
    runs = (
        select(Run.name, Run.num_pruned_groups, func.count(RolloutGroup.id))
        .outerjoin(RolloutGroup, RolloutGroup.run_id == Run.id)
        .group_by(Run.id, Run.name, Run.num_pruned_groups)
        .order_by(Run.id)
    )
    report["runs"] = [
        {"name": name, "num_groups": number, "num_pruned_groups": pruned}
        for name, pruned, number in connection.execute(runs)
    ]


def _rollouts(connection: Connection, report: Report) -> None:
    """Adds `rollouts`: means over what is there, and what the last day of the newest run added.

    `bytes_per_trajectory` counts the rows and indexes of a response with its arrays,
    interventions and share of the group, over all responses, pruned ones too;
    `array_bytes_per_token` the arrays alone, over response tokens that still have theirs;
    `stored_bytes_per_token` their table with its index, likewise. `last_day` is the 24 hours up
    to `newest_at`, its bytes an estimate from the share of groups.
    """
    columns = [one for one in TrajectoryTokens.__table__.columns if one.name != "trajectory_id"]
    length = sum((func.length(one) for one in columns[1:]), func.length(columns[0]))
    arrays = select(
        func.count(),
        func.coalesce(func.sum(length), 0),
        func.coalesce(func.sum(Trajectory.num_tokens), 0),
    ).join_from(TrajectoryTokens, Trajectory, Trajectory.id == TrajectoryTokens.trajectory_id)
    number, array_bytes, num_tokens = connection.execute(arrays).one()
    span = select(func.min(RolloutGroup.created_at), func.max(RolloutGroup.created_at))
    oldest, newest = connection.execute(span).one()
    tables = report["tables"]
    sizes = [tables[name]["num_bytes"] for name in ROLLOUT_TABLES]
    num_bytes = None if None in sizes else sum(sizes)
    last_day = 0
    if newest is not None:
        recent = RolloutGroup.created_at > newest - timedelta(days=1)
        counting = select(func.count()).select_from(RolloutGroup).where(recent)
        last_day = connection.scalars(counting).one()
    report["rollouts"] = {
        "num_with_arrays": number,
        "num_tokens_with_arrays": int(num_tokens),
        "bytes_per_trajectory": _ratio(num_bytes, tables["trajectories"]["num_rows"]),
        "array_bytes_per_token": _ratio(int(array_bytes), int(num_tokens)),
        "stored_bytes_per_token": _ratio(tables["trajectory_tokens"]["num_bytes"], int(num_tokens)),
        "oldest_at": None if oldest is None else oldest.isoformat(),
        "newest_at": None if newest is None else newest.isoformat(),
        "last_day": {
            "num_groups": last_day,
            "num_bytes": None
            if num_bytes is None
            else round(num_bytes * last_day / max(1, tables["rollout_groups"]["num_rows"])),
        },
    }


def _ratio(numerator: int | None, denominator: int) -> float | None:
    return None if numerator is None or denominator == 0 else numerator / denominator


def _spool(directory: Path | None) -> Report:
    found = [] if directory is None else [one for one in directory.rglob("*") if one.is_file()]
    return {"num_files": len(found), "num_bytes": sum(one.stat().st_size for one in found)}
