"""Engines, transactions and error translation for SQLite files and PostgreSQL.

One engine a process. Everything that differs between the two databases' connections is here; the
rest of the package writes portable statements. Refused: SQLite in memory (each connection would
see a database of its own) and any other database.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from mentor_serve.errors import SchemaOutOfDate, StoreError
from mentor_serve.store.failures import store_error_type

_WRITE_OPTION = "mentor_serve_write"

# sqlite3's own come out bare where a connection is opened by our own function.
_FOREIGN_ERRORS = (SQLAlchemyError, sqlite3.Error, OverflowError, UnicodeError)

_DEAD_PEER = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
"""libpq: a server whose machine is gone, and which says nothing, is noticed in half a minute."""


class _Pragma(NamedTuple):
    statement: str
    why: str


_PRAGMAS = (
    _Pragma(
        "PRAGMA page_size = 8192",
        "the arrays of a response of some hundred tokens fill a page of 4096 alone and waste half "
        "of the next; a file that is there keeps the size it was made with",
    ),
    _Pragma("PRAGMA foreign_keys = ON", "SQLite ignores foreign keys unless every connection asks"),
    _Pragma(
        "PRAGMA synchronous = FULL",
        "what is committed survives a power cut: weights on disk are never ahead of the database; "
        "that costs an fsync a transaction, and groups share one",
    ),
    _Pragma("PRAGMA temp_store = MEMORY", "sorts of the dashboard's queries stay off the disk"),
)
"""Run on each new SQLite connection, beside busy_timeout (the store's `timeout_s`) and WAL."""


def parse_url(url: str) -> URL:
    """The URL with the driver this project ships with.

    Raises:
        StoreError: not a URL, not SQLite or PostgreSQL, or SQLite in memory.
    """
    try:
        parsed = make_url(url.replace("postgres://", "postgresql://", 1))
    except (ArgumentError, ValueError):
        # Not "from" it: where the password holds an "@", a part of it is taken for the port and
        # quoted.
        raise StoreError(
            "expected a database URL such as sqlite:////var/lib/mentor/mentor.db or "
            "postgresql://user:password@host/mentor, got something else; correct store.url "
            "(special characters of a password are percent-encoded: %40 for @)"
        ) from None
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise StoreError(f"expected an SQLite or PostgreSQL URL, got {backend!r}; set store.url")
    if parsed.database in (None, "", ":memory:"):
        raise StoreError("an SQLite store needs a file: use sqlite:////absolute/path/mentor.db")
    return parsed


def shown(url: str) -> str:
    """The URL for people: the password is hidden."""
    return parse_url(url).render_as_string(hide_password=True)


def sqlite_path(url: str) -> Path | None:
    """The database file of an SQLite URL, None for PostgreSQL."""
    parsed = parse_url(url)
    return Path(str(parsed.database)) if parsed.get_backend_name() == "sqlite" else None


def open_engine(
    url: str, *, pool_size: int = 5, timeout_s: float = 30.0, read_only: bool = False
) -> Engine:
    """An engine whose connections wait `timeout_s` for a lock or for a place in the pool.

    Raises:
        StoreError: the URL cannot be used, or the PostgreSQL driver is not installed.
    """
    parsed = parse_url(url)
    options: dict[str, Any] = {
        "pool_size": pool_size,
        "pool_timeout": timeout_s,
        "hide_parameters": True,  # prompts and answers do not belong into error messages
    }
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed, options, timeout_s=timeout_s, read_only=read_only)
    settings = f"-c lock_timeout={int(timeout_s * 1000)} -c timezone=UTC"
    if read_only:
        # Filters decide how many rows fit: a plan made without their values may read every row.
        settings += " -c default_transaction_read_only=on -c plan_cache_mode=force_custom_plan"
    arguments = {
        "options": settings,
        "connect_timeout": max(2, math.ceil(timeout_s)),  # libpq takes 1 for 2
        **_DEAD_PEER,
    }
    try:
        return create_engine(parsed, pool_pre_ping=True, connect_args=arguments, **options)
    except ModuleNotFoundError as error:
        raise StoreError(
            "a PostgreSQL store needs psycopg: pip install 'mentor-serve[postgres]'"
        ) from error


def _open_sqlite(url: URL, options: dict[str, Any], *, timeout_s: float, read_only: bool) -> Engine:
    path = Path(str(url.database)).absolute()
    if not read_only:
        path.parent.mkdir(parents=True, exist_ok=True)
    mode = "ro" if read_only else "rwc"
    uri = f"file:{quote(str(path))}?mode={mode}"

    def connect() -> sqlite3.Connection:
        # isolation_level None: the driver begins no transaction of its own, `_begin` below does.
        # check_same_thread False: the pool hands a connection to one thread at a time.
        connection = sqlite3.connect(
            uri, uri=True, timeout=timeout_s, isolation_level=None, check_same_thread=False
        )
        for pragma in _PRAGMAS:
            connection.execute(pragma.statement)
        if not read_only:
            _use_wal(connection, timeout_s=timeout_s)
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=_queue_pool(), **options)
    event.listen(engine, "begin", _begin)
    return engine


def _queue_pool() -> Any:
    # "sqlite://" alone would choose the pool for databases in memory.
    from sqlalchemy.pool import QueuePool

    return QueuePool


def _use_wal(connection: sqlite3.Connection, *, timeout_s: float) -> None:
    """Switch the file to write-ahead logging: readers never wait for the writer.

    The switch needs the file alone and does not always honour the busy timeout, so two processes
    that create the file together have to retry. The mode is kept in the file.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _begin(connection: Connection) -> None:
    # A deferred transaction that reads first and writes later fails at once with SQLITE_BUSY when
    # another writer came between; IMMEDIATE waits its turn instead.
    writes = connection.get_execution_options().get(_WRITE_OPTION, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def translated(url: str, *, doing: str) -> Iterator[None]:
    """Turn SQLAlchemy's exceptions into StoreError; the URL is shown without its password.

    So are those that drivers raise beside their own: integers beyond 64 bits, unpaired surrogates.

    Raises:
        StoreUnavailable: the database is away, busy or full; the same call may work later.
        SchemaOutOfDate: a table or a column is missing.
        StoreError: the database refuses this very data.
    """
    try:
        yield
    except _FOREIGN_ERRORS as error:
        reason = getattr(error, "orig", None) or error
        family = store_error_type(error)
        hint = "; run `mentor-serve db check`" if family is SchemaOutOfDate else ""
        raise family(
            f"{doing} failed in {shown(url)}: {type(reason).__name__}: {reason}{hint}"
        ) from error


@contextmanager
def reading(engine: Engine, url: str, *, doing: str) -> Iterator[Connection]:
    """A transaction that sees one state of the database."""
    with translated(url, doing=doing), engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def writing(engine: Engine, url: str, *, doing: str) -> Iterator[Connection]:
    """A transaction that commits at the end, or changes nothing if an exception leaves it."""
    with translated(url, doing=doing), engine.connect() as plain:
        connection = plain.execution_options(**{_WRITE_OPTION: True})
        with connection.begin():
            yield connection


@contextmanager
def without_foreign_keys(engine: Engine) -> Iterator[Connection]:
    """A write transaction for migrations.

    Copying a table drops the old one, which on SQLite would delete what refers to it, so foreign
    keys rest during the migration and are verified before the commit. The pragma is ignored inside
    a transaction, therefore it goes to the driver's connection first; that connection is not
    reused.

    Raises:
        StoreError: the migration left rows whose parents are missing; nothing was changed.
    """
    with engine.connect() as plain:
        is_sqlite = plain.dialect.name == "sqlite"
        if is_sqlite:
            cursor = plain.connection.cursor()
            cursor.execute("PRAGMA foreign_keys = OFF")
            cursor.close()
        connection = plain.execution_options(**{_WRITE_OPTION: True})
        try:
            with connection.begin():
                yield connection
                if is_sqlite:
                    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
                    if broken:
                        raise StoreError(
                            f"the migration would leave {len(broken)} rows without parents, first "
                            f"in table {broken[0][0]!r}; nothing was changed, please report this"
                        )
        finally:
            plain.invalidate()
