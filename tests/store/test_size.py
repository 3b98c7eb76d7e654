"""What `database_stats` counts, and that a vacuum gives room back only when nobody looks."""

import dataclasses
import sqlite3

import pytest
from store_samples import demonstration, group, task, trajectory

from mentor_serve.errors import ConfigError, SchemaOutOfDate, StoreError, StoreUnavailable
from mentor_serve.store import TrajectoryStore, database_check, size
from mentor_serve.store.prune import PrunePlan, prune
from mentor_serve.store.size import database_stats
from mentor_serve.store.vacuum import require_alone, vacuum
from mentor_serve.types import TrajectoryKind

DAY = 86_400


@pytest.fixture
def filled(store, run_id, clock):
    """Two groups two days ago and one now, three responses of five tokens each."""
    store.add_group(run_id, dataclasses.replace(group(number=1), status="failed", error="x"))
    store.add_group(run_id, group(number=2))
    clock.advance(2 * DAY)
    store.add_group(run_id, group(number=3))
    store.add_served(run_id, trajectory(TrajectoryKind.SERVED), trajectory_id="served")
    store.add_demonstrations(run_id, task(), [demonstration(num_tokens=5)])
    return run_id


@pytest.mark.usefixtures("filled")
def test_rows_bytes_and_growth(url, clock, tmp_path):
    told = []
    report = database_stats(
        url, spool=tmp_path / "none", progress=lambda done, total: told.append((done, total))
    )
    tables = report["tables"]
    assert {name: row["num_rows"] for name, row in tables.items() if row["num_rows"]} == {
        "interventions": 3,
        "rollout_groups": 3,
        "runs": 1,
        "tasks": 4,
        "trajectories": 11,
        "trajectory_tokens": 11,
        "version_stats": 2,
    }
    assert all(0 <= row["num_index_bytes"] <= row["num_bytes"] for row in tables.values())
    assert sum(row["num_bytes"] for row in tables.values()) <= report["num_bytes"]
    rollouts = report["rollouts"]
    assert rollouts["num_tokens_with_arrays"] == 55
    per_rollout = sum(tables[name]["num_bytes"] for name in size.ROLLOUT_TABLES)
    assert rollouts["bytes_per_trajectory"] == pytest.approx(per_rollout / 11)
    assert rollouts["last_day"] == {"num_groups": 1, "num_bytes": round(per_rollout / 3)}
    assert rollouts["newest_at"] == clock.now.isoformat()
    assert report["groups"]["ready"] == 2
    assert report["spool"] == {"num_files": 0, "num_bytes": 0}
    assert told[-1][0] == told[-1][1]


@pytest.mark.usefixtures("filled")
def test_array_bytes_are_what_the_arrays_hold(store, url):
    report = database_stats(url)
    with store._read("x") as connection:
        rows = connection.exec_driver_sql("SELECT * FROM trajectory_tokens").all()
    expected = sum(len(value) for row in rows for value in row[1:])
    assert report["rollouts"]["array_bytes_per_token"] == pytest.approx(expected / 55)


@pytest.mark.usefixtures("filled")
def test_without_dbstat_bytes_of_tables_are_unknown(url, monkeypatch):
    if not url.startswith("sqlite"):
        pytest.skip("a property of SQLite's builds")
    monkeypatch.setattr(size, "_sqlite_pages", lambda connection: [])
    report = database_stats(url)
    assert {row["num_bytes"] for row in report["tables"].values()} == {None}
    assert report["num_bytes"] > 0
    assert report["rollouts"]["bytes_per_trajectory"] is None
    assert report["rollouts"]["array_bytes_per_token"] > 0


def test_a_database_without_a_schema_is_refused(empty_url):
    with pytest.raises(SchemaOutOfDate, match="mentor-serve db upgrade"):
        database_stats(empty_url)


@pytest.fixture
def roomy(migrated_file, tmp_path):
    """A file with room of deleted rows, opened by nobody."""
    path = tmp_path / "roomy.db"
    path.write_bytes(migrated_file.read_bytes())
    url = f"sqlite:///{path}"
    with TrajectoryStore(url) as store:
        run_id = store.open_run("test", {})
        failed = [dataclasses.replace(group(number=one), status="failed") for one in range(60)]
        for one in failed:
            store.add_group(run_id, one)
    prune(url, PrunePlan(what="groups", keep_days=0, pause_s=0))
    return url


def test_a_vacuum_gives_the_room_back(roomy):
    free = database_stats(roomy)["num_free_bytes"]
    assert free > 100_000
    before, after = vacuum(roomy)
    assert before - after == pytest.approx(free, rel=0.1)
    assert database_stats(roomy)["num_free_bytes"] == 0
    assert database_check(roomy)["ok"]


@pytest.mark.parametrize("is_read_only", [True, False])
def test_a_vacuum_is_refused_while_somebody_has_the_file_open(roomy, is_read_only):
    with TrajectoryStore(roomy, read_only=is_read_only) as service:
        service.find_run("test")
        for action in (vacuum, require_alone):
            with pytest.raises(StoreUnavailable, match="another process has it open; stop"):
                action(roomy, timeout_s=0.1)
        service.find_run("test")
    vacuum(roomy)
    with TrajectoryStore(roomy) as again:
        again.add_group(again.find_run("test"), group())


def test_a_vacuum_for_which_there_is_no_room_changes_nothing(roomy, monkeypatch):
    original = sqlite3.connect

    class Full(sqlite3.Connection):
        def execute(self, statement, *arguments):
            if statement == "VACUUM":
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error
            return super().execute(statement, *arguments)

    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: original(*a, factory=Full, **k))
    with pytest.raises(StoreError, match="VACUUM failed"):
        vacuum(roomy)
    monkeypatch.undo()
    assert database_check(roomy)["ok"]


def test_postgresql_needs_no_vacuum():
    with pytest.raises(ConfigError, match="autovacuum"):
        vacuum("postgresql://u:p@h/d")
