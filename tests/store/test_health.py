"""`database_check` finds what is wrong, says what to do, and takes nothing sound for damage."""

import dataclasses
import sqlite3
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text
from store_samples import (
    demonstration,
    group,
    rollout,
    task,
    trajectory,
    update_record,
    version_record,
)

from mentor_serve.errors import StoreError
from mentor_serve.store import TrajectoryStore, database_check
from mentor_serve.store.connection import open_engine
from mentor_serve.types import TrajectoryKind


@pytest.fixture
def trained(store, run_id):
    """A sound store: an update of two groups, one ready and one failed group, a demonstration."""
    store.add_version(run_id, version_record(0))
    for number in range(2):
        store.add_group(run_id, group(number=number, num_on_policy=3))
    leased = store.lease_groups(run_id, num_groups=2, owner="learner", lease_s=60)
    store.commit_update(
        run_id,
        owner="learner",
        group_ids=[item.group_id for item in leased],
        update=update_record(1),
        version=version_record(1),
    )
    store.set_live(run_id, 1)
    store.add_group(run_id, group(number=2, version=1))
    store.add_group(run_id, dataclasses.replace(group(number=3), status="failed", error="x"))
    store.add_demonstrations(run_id, task(), [demonstration()])
    store.add_served(run_id, trajectory(TrajectoryKind.SERVED), trajectory_id="served")
    return run_id


def change(url, *statements):
    """Do what the store would never do; references are not checked."""
    engine = open_engine(url)
    try:
        with engine.connect() as connection:
            sqlite = connection.dialect.name == "sqlite"
            off = (
                "PRAGMA foreign_keys = OFF" if sqlite else "SET session_replication_role = replica"
            )
            connection.connection.cursor().execute(off)
            with connection.begin():
                for statement in statements:
                    connection.execute(text(statement))
            connection.invalidate()
    finally:
        engine.dispose()


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("quick", [True, False])
def test_a_sound_store_is_sound(url, quick):
    report = database_check(url, quick=quick)
    assert (report["problems"], report["warnings"], report["ok"]) == ([], [], True)
    assert report["is_quick"] is quick
    if not quick:
        assert report["counts"]["trajectories"] == 16
        assert report["counts"]["updates"] == 1


ONE_OK = "(SELECT MIN(id) FROM trajectories WHERE kind = 'on_policy' AND status = 'ok'"
READY = " AND group_id IN (SELECT id FROM rollout_groups WHERE status = 'ready'))"
CONSUMED = " AND group_id IN (SELECT id FROM rollout_groups WHERE status = 'consumed'))"


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("DELETE FROM updates", "2 consumed groups without the update"),
        ("UPDATE rollout_groups SET lease_owner = 'x'", "4 groups that are neither leased nor"),
        (
            f"DELETE FROM trajectory_tokens WHERE trajectory_id = {ONE_OK}{READY}",
            "1 usable trajectories of unconsumed groups without tokens",
        ),
        (
            f"DELETE FROM trajectory_tokens WHERE trajectory_id = {ONE_OK}{CONSUMED}",
            "1 finished groups that lost the tokens of some trajectories only",
        ),
        (
            "DELETE FROM trajectory_tokens WHERE trajectory_id IN "
            "(SELECT id FROM trajectories WHERE kind = 'expert')",
            "1 demonstrations without tokens",
        ),
        (
            "UPDATE rollout_groups SET num_mixed = 7 WHERE status = 'ready'",
            "1 groups whose num_on_policy, num_mixed, num_expert or num_tokens disagrees",
        ),
        (
            "UPDATE rollout_groups SET num_tokens = num_tokens + 1 WHERE status = 'ready'",
            "1 groups whose num_on_policy, num_mixed, num_expert or num_tokens disagrees",
        ),
        ("UPDATE updates SET num_groups = 3", "1 updates whose num_groups disagrees"),
        ("UPDATE updates SET num_groups = 1", "1 updates whose num_groups disagrees"),
        (
            "UPDATE version_stats SET num_passed = num_passed + 1 WHERE policy_version = 1",
            "2 rows of version_stats disagree with trajectories, first kind mixed, policy version",
        ),
        ("DELETE FROM version_stats WHERE kind = 'mixed'", "2 rows of version_stats disagree"),
        (
            "UPDATE trajectories SET task_id = 'nowhere' WHERE id = 'served'",
            "1 rows of trajectories refer to a row of tasks that is not there",
        ),
        (
            "UPDATE updates SET policy_version = 9",
            "1 rows of updates refer to a row of policy_versions that is not there",
        ),
        (
            "UPDATE trajectories SET num_tokens = 4 WHERE id = 'served'",
            "first token_ids of served: expected 4 values, got 5",
        ),
    ],
)
def test_damage_is_named(url, damage, problem):
    change(url, damage)
    report = database_check(url)
    assert report["ok"] is False
    assert any(problem in sentence for sentence in report["problems"]), report["problems"]
    assert all("; " in sentence for sentence in report["problems"])  # what to do


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("quick", [True, False])
def test_undecodable_arrays_are_named(url, quick):
    damage = "zeroblob(20)" if url.startswith("sqlite") else "'\\x00000000000000000000'"
    change(url, f"UPDATE trajectory_tokens SET entropies = {damage} WHERE trajectory_id = 'served'")
    report = database_check(url, quick=quick)
    (problem,) = report["problems"]
    assert problem.startswith("the arrays of 1 rows of trajectory_tokens")
    assert "first entropies of served" in problem


@pytest.mark.usefixtures("trained")
def test_two_live_versions_are_named(url, trained):
    change(
        url,
        "DROP INDEX uq_policy_versions_live",
        "UPDATE policy_versions SET is_live = (1 = 1)",
    )
    (problem,) = database_check(url, quick=True)["problems"]
    assert f"run {trained} has 2 live versions" in problem


def test_what_was_pruned_or_given_up_is_no_problem(store, trained, url):
    """Fewer groups than the update had, and sums above what is there, are right after pruning."""
    change(url, "DELETE FROM rollout_groups WHERE status = 'consumed'")
    change(url, "DELETE FROM trajectories WHERE group_id NOT IN (SELECT id FROM rollout_groups)")
    change(
        url,
        *(
            f"DELETE FROM {table} WHERE trajectory_id NOT IN (SELECT id FROM trajectories)"
            for table in ("trajectory_tokens", "interventions")
        ),
    )
    assert len(database_check(url)["problems"]) == 2
    change(url, "UPDATE runs SET num_pruned_groups = 2")
    assert database_check(url)["problems"] == []
    change(url, "UPDATE version_stats SET num_tokens = num_tokens - 1000")
    (problem,) = database_check(url)["problems"]
    assert "rows of version_stats disagree" in problem


def test_groups_given_up_within_an_update_are_no_problem(url, trained):
    change(url, "UPDATE updates SET num_groups = 3, num_skipped_steps = 1")
    assert database_check(url)["ok"]


def test_long_expired_leases_are_a_warning(store, trained, url, clock):
    store.lease_groups(trained, num_groups=1, owner="gone", lease_s=60)
    soon = database_check(url, now=clock.now + timedelta(seconds=120))
    assert (soon["expired_leases"], soon["warnings"]) == (1, [])
    later = database_check(url, now=clock.now + timedelta(days=1))
    assert later["ok"] is True
    assert "1 groups are leased although their leases expired" in later["warnings"][0]
    assert "'gone'" in later["warnings"][0]


def test_a_store_that_is_being_written_is_sound(store, run_id, url):
    """Sums, counts and rows are compared within one state of the database."""
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            store.add_group(run_id, group(number=number % 7, version=number % 3))
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        problems = [database_check(url)["problems"] for _ in range(5)]
    finally:
        stop.set()
        writer.join()
    assert problems == [[]] * 5
    assert store.count_groups(run_id)["ready"] > 0


@pytest.mark.usefixtures("trained")
def test_progress_is_told(url):
    told = []
    database_check(url, progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == list(range(len(told)))
    assert told[-1][0] == told[-1][1] > 10


# Damaged SQLite files


@pytest.fixture
def big_file(tmp_path, migrated_file) -> Path:
    """A file of some hundred pages: the schema, many responses and their arrays."""
    path = tmp_path / "big.db"
    path.write_bytes(migrated_file.read_bytes())
    with TrajectoryStore(f"sqlite:///{path}") as store:
        run_id = store.open_run("test", {})
        for number in range(60):
            made = group(number=number)
            made.trajectories[0] = dataclasses.replace(
                made.trajectories[0], rollout=rollout(num_tokens=400, seed=number)
            )
            store.add_group(run_id, made)
    return path


def pages_of(path: Path, table: str) -> list[int]:
    """Leaf pages of a table, by reading the file's own page map."""
    connection = sqlite3.connect(path)
    try:
        found = connection.execute(
            "SELECT pageno FROM dbstat WHERE name = ? AND pagetype = 'leaf'", (table,)
        ).fetchall()
    finally:
        connection.close()
    return [page for (page,) in found]


def page_size(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        return connection.execute("PRAGMA page_size").fetchone()[0]
    finally:
        connection.close()


def flip(path: Path, *, offset: int, length: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + length] = bytes(byte ^ 0xFF for byte in data[offset : offset + length])
    path.write_bytes(data)


@pytest.mark.parametrize("table", ["trajectory_tokens", "trajectories", "rollout_groups"])
def test_a_corrupted_page_is_found(big_file, table):
    assert database_check(f"sqlite:///{big_file}")["ok"]
    page = pages_of(big_file, table)[1]
    flip(big_file, offset=(page - 1) * page_size(big_file), length=64)  # header and pointers
    report = database_check(f"sqlite:///{big_file}")
    assert report["ok"] is False
    assert "damaged" in report["problems"][0]
    assert all("restore a backup" in sentence for sentence in report["problems"])
    assert "the other checks were left out" in report["notes"][-1]


def test_flipped_bytes_within_an_array_are_found(big_file):
    """SQLite has no checksums: what is in a page's cells is checked by decoding."""
    connection = sqlite3.connect(big_file)
    (blob,) = connection.execute(
        "SELECT token_ids FROM trajectory_tokens ORDER BY LENGTH(token_ids) DESC LIMIT 1"
    ).fetchone()
    connection.close()
    offset = big_file.read_bytes().find(blob)
    assert offset > 0
    flip(big_file, offset=offset, length=8)
    (problem,) = database_check(f"sqlite:///{big_file}")["problems"]
    assert problem.startswith("the arrays of 1 rows of trajectory_tokens")


@pytest.mark.parametrize(
    "damage", [lambda data: b"\xff" * 100 + data[100:], lambda data: b"no database" * 400]
)
def test_a_file_beyond_reading_is_a_report(big_file, damage):
    big_file.write_bytes(damage(big_file.read_bytes()))
    report = database_check(f"sqlite:///{big_file}")
    assert report["ok"] is False
    assert "the database is damaged" in report["problems"][0]
    assert "restore a backup" in report["problems"][0]


def test_a_truncated_file_is_a_report(big_file):
    data = big_file.read_bytes()
    big_file.write_bytes(data[: len(data) // 2])
    report = database_check(f"sqlite:///{big_file}")
    assert report["ok"] is False
    assert report["problems"]


def test_a_database_that_is_away_is_an_error():
    with pytest.raises(StoreError) as caught:
        database_check("postgresql://someone:hunter2@127.0.0.1:9/mentor")
    assert "hunter2" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


def test_a_write_in_a_check_is_refused(url, monkeypatch):
    """The check opens the database read-only, so that it cannot do what it should not."""
    from mentor_serve.store import checks, health

    bad = checks.Check(
        label="x",
        find=lambda connection: connection.execute(text("DELETE FROM runs")) and [],
    )
    monkeypatch.setattr(health, "CHECKS", (bad,))
    with pytest.raises(StoreError, match=r"read-?only"):
        database_check(url)
