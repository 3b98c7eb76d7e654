"""Gives the room of deleted rows back to the file system: SQLite's VACUUM.

PostgreSQL needs nothing of the kind: its autovacuum makes the room of deleted rows usable again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mentor_serve.errors import ConfigError, StoreUnavailable
from mentor_serve.store.connection import shown, sqlite_path, translated


def vacuum(url: str, *, timeout_s: float = 5.0) -> tuple[int, int]:
    """Write the file anew without its free pages; returns its bytes before and after.

    Needs the file alone, and up to twice its size of free disk space.

    Raises:
        ConfigError: not SQLite.
        StoreUnavailable: another process has the file open; nothing was changed.
        StoreError: it failed, for instance for want of space; the file is as it was.
    """
    path = _file(url)
    before = path.stat().st_size
    with alone(url, timeout_s=timeout_s) as connection, translated(url, doing="VACUUM"):
        connection.execute("VACUUM")
    return before, path.stat().st_size


def require_alone(url: str, *, timeout_s: float = 5.0) -> None:
    """Refuse a file that another process has open.

    Raises:
        ConfigError: not SQLite.
        StoreUnavailable: another process has it open.
    """
    with alone(url, timeout_s=timeout_s):
        pass


@contextmanager
def alone(url: str, *, timeout_s: float) -> Iterator[sqlite3.Connection]:
    """A connection beside which there is no other, so that the journal mode can be changed.

    Every open connection in WAL mode holds a shared lock on the file, idle or not: leaving WAL
    mode is refused then. A service that starts meanwhile waits.
    """
    path = _file(url)
    connection = sqlite3.connect(path, timeout=timeout_s, isolation_level=None)
    try:
        with translated(url, doing="taking the database for ourselves"):
            try:
                connection.execute("PRAGMA journal_mode = DELETE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF not in (
                    sqlite3.SQLITE_BUSY,
                    sqlite3.SQLITE_LOCKED,
                ):
                    raise
                raise StoreUnavailable(
                    f"expected {shown(url)} to be used by nobody else, but another process has it "
                    "open; stop the service and the dashboard, then vacuum"
                ) from error
        try:
            yield connection
        finally:
            # Where somebody came between, the next one who writes switches back.
            with suppress(sqlite3.OperationalError):
                connection.execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()


def _file(url: str) -> Path:
    path = sqlite_path(url)
    if path is None:
        raise ConfigError(
            "--vacuum is for SQLite files; the autovacuum of PostgreSQL reuses the room of deleted "
            "rows by itself: leave the option out"
        )
    return path
