"""What a failure of the database is taken for; the codes come from the databases themselves."""

import sqlite3

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from store_samples import group

from mentor_serve.errors import SchemaOutOfDate, StoreError, StoreUnavailable
from mentor_serve.store import TrajectoryStore, upgrade
from mentor_serve.store.connection import open_engine, reading, writing
from mentor_serve.store.failures import store_error_type


def wrapped(error, *, invalidated=False):
    return DBAPIError("SELECT 1", None, error, connection_invalidated=invalidated)


def of_sqlite(code):
    error = sqlite3.OperationalError("made up")
    error.sqlite_errorcode = code
    return wrapped(error)


def of_postgres(state):
    return wrapped(psycopg.errors.lookup(state)("made up"))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (sqlite3.SQLITE_BUSY, StoreUnavailable),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, StoreUnavailable),
        (sqlite3.SQLITE_LOCKED, StoreUnavailable),
        (sqlite3.SQLITE_FULL, StoreUnavailable),
        (sqlite3.SQLITE_IOERR_FSYNC, StoreUnavailable),
        (sqlite3.SQLITE_CANTOPEN_ISDIR, StoreUnavailable),
        (sqlite3.SQLITE_READONLY, StoreUnavailable),
        (sqlite3.SQLITE_CORRUPT_INDEX, StoreUnavailable),
        (sqlite3.SQLITE_ERROR, SchemaOutOfDate),
        (sqlite3.SQLITE_CONSTRAINT_UNIQUE, StoreError),
        (sqlite3.SQLITE_TOOBIG, StoreError),
        (sqlite3.SQLITE_MISMATCH, StoreError),
    ],
)
def test_codes_of_sqlite(code, expected):
    assert store_error_type(of_sqlite(code)) is expected


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("08006", StoreUnavailable),
        ("25006", StoreUnavailable),
        ("40001", StoreUnavailable),
        ("40003", StoreUnavailable),
        ("40P01", StoreUnavailable),
        ("53100", StoreUnavailable),
        ("53300", StoreUnavailable),
        ("55P03", StoreUnavailable),
        ("57P01", StoreUnavailable),
        ("57P03", StoreUnavailable),
        ("58030", StoreUnavailable),
        ("42P01", SchemaOutOfDate),
        ("42703", SchemaOutOfDate),
        ("22P02", StoreError),
        ("22003", StoreError),
        ("23505", StoreError),
        ("23503", StoreError),
        ("42601", StoreError),
    ],
)
def test_codes_of_postgresql(state, expected):
    assert store_error_type(of_postgres(state)) is expected


def test_failures_without_a_code():
    assert store_error_type(PoolTimeout("no connection was free")) is StoreUnavailable
    refused = OperationalError("", None, psycopg.OperationalError("connection refused"))
    assert store_error_type(refused) is StoreUnavailable
    closed = wrapped(psycopg.InterfaceError("the connection is closed"))
    assert store_error_type(closed) is StoreUnavailable
    assert store_error_type(wrapped(psycopg.ProgrammingError("nothing to fetch"))) is StoreError
    assert store_error_type(wrapped(sqlite3.ProgrammingError("closed"))) is StoreError
    assert store_error_type(OverflowError("too large")) is StoreError
    invalidated = wrapped(psycopg.DataError("cut off"), invalidated=True)
    assert store_error_type(invalidated) is StoreUnavailable


def test_a_locked_file_is_busy_and_not_broken(tmp_path):
    url = f"sqlite:///{tmp_path / 'mentor.db'}"
    upgrade(url)
    holder = sqlite3.connect(tmp_path / "mentor.db", isolation_level=None)
    with TrajectoryStore(url, timeout_s=0.05) as store:
        run_id = store.open_run("test", {})
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="storing"):
            store.add_group(run_id, group())
        holder.execute("ROLLBACK")
        assert store.add_group(run_id, group()) is True
    holder.close()


def test_a_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "mentor.db").mkdir()
    with (
        TrajectoryStore(f"sqlite:///{tmp_path / 'mentor.db'}") as store,
        pytest.raises(StoreUnavailable),
    ):
        store.find_run("test")


def test_a_server_that_nobody_runs():
    url = "postgresql://mentor:secret@127.0.0.1:1/mentor"
    with (
        TrajectoryStore(url, timeout_s=2.0) as store,
        pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1") as caught,
    ):
        store.find_run("test")
    assert "secret" not in str(caught.value)


def test_a_missing_table_is_the_schemas(empty_url):
    with TrajectoryStore(empty_url) as store, pytest.raises(SchemaOutOfDate, match="db check"):
        store.find_run("test")


def test_refused_data_is_refused_for_good(url):
    engine = open_engine(url)
    broken = text("INSERT INTO runs (id, name) VALUES ('a', NULL)")
    with (
        pytest.raises(StoreError) as caught,
        writing(engine, url, doing="a test") as connection,
    ):
        connection.execute(broken)
    assert type(caught.value) is StoreError
    with reading(engine, url, doing="a test") as connection:
        assert connection.execute(text("SELECT COUNT(*) FROM runs")).scalar_one() == 0
    engine.dispose()
