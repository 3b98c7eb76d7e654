"""Failures of a database: which pass by themselves, which are the schema's, which the data's.

Decided by the codes that the databases document, never by messages. A caller that gets
`StoreUnavailable` keeps what it has and tries again; any other `StoreError` comes again for the
same data.
"""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from mentor_serve.errors import SchemaOutOfDate, StoreError, StoreUnavailable

_SQLITE_AWAY = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        # A damaged file is nobody's data: what is to be stored waits until it was restored.
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
    }
)
"""Primary result codes, https://www.sqlite.org/rescode.html."""

_SQLITE_SCHEMA = frozenset({sqlite3.SQLITE_ERROR, sqlite3.SQLITE_SCHEMA})
"""Statements are this package's own: an error in one means that a table or column is missing."""

_POSTGRES_AWAY = (
    "08",  # connection exception
    "25006",  # read-only transaction: a standby after a failover
    "28",  # invalid authorisation: a password that is being changed
    "3D",  # no such database: it is being restored
    "40",  # transaction rollback: serialisation failure, deadlock, completion unknown
    "42501",  # insufficient privilege
    "53",  # insufficient resources: disk full, too many connections
    "55P03",  # a lock was not to be had within lock_timeout
    "57",  # operator intervention: shutdown, cancelled, cannot connect now
    "58",  # system error outside the database: input or output
    "XX",  # internal error, damaged data
)
"""Heads of SQLSTATE, https://www.postgresql.org/docs/current/errcodes-appendix.html."""

_POSTGRES_SCHEMA = ("3F", "42P01", "42703", "42704", "42883")
"""No such schema, table, column, object, function."""


def store_error_type(error: BaseException) -> type[StoreError]:
    """The family of a failure of the database or its driver."""
    if isinstance(error, PoolTimeout):
        return StoreUnavailable
    if isinstance(error, DBAPIError):
        if error.connection_invalidated:
            return StoreUnavailable
        return _of_driver(error.orig)
    if isinstance(error, SQLAlchemyError):
        return StoreError
    return _of_driver(error)


def _of_driver(error: BaseException | None) -> type[StoreError]:
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)
        primary = None if code is None else code & 0xFF
        if primary in _SQLITE_AWAY:
            return StoreUnavailable
        return SchemaOutOfDate if primary in _SQLITE_SCHEMA else StoreError
    if not hasattr(error, "sqlstate"):
        return StoreError  # raised beside the drivers' own: an integer beyond 64 bits
    state = getattr(error, "sqlstate", None)
    if state is None:
        # psycopg has no code where the server sent none: refused, closed, timed out.
        return StoreUnavailable if _is_operational(error) else StoreError
    if state.startswith(_POSTGRES_AWAY):
        return StoreUnavailable
    return SchemaOutOfDate if state.startswith(_POSTGRES_SCHEMA) else StoreError


def _is_operational(error: BaseException | None) -> bool:
    """Whether it is one of PEP 249's errors of the connection (psycopg may not be installed)."""
    names = {one.__name__ for one in type(error).__mro__}
    return bool(names & {"OperationalError", "InterfaceError"})
