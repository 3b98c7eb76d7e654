"""Creating, upgrading and checking the database's schema.

One tree of Alembic migrations for SQLite and PostgreSQL. An upgrade is one transaction under a
lock: it happens completely or not at all, and of two processes that start together one migrates
while the other waits and then finds nothing to do. Nothing here changes data of its own accord.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, text

from mentor_serve.errors import SchemaOutOfDate, StoreError
from mentor_serve.store.connection import (
    open_engine,
    reading,
    shown,
    sqlite_path,
    translated,
    without_foreign_keys,
)

UPGRADE_COMMAND = "mentor-serve db upgrade"
# Any constant: it names "a migration of mentor-serve" among PostgreSQL's advisory locks.
_ADVISORY_LOCK = 0x6D656E746F72

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaState:
    """Where a database stands against the migrations of this installation."""

    current: str | None
    """Revision in the database; None where it holds no schema yet."""
    head: str
    """Newest revision that this installation knows."""
    status: Literal["ok", "behind", "ahead", "empty"]


def migrations_path() -> Path:
    """The directory of the migrations: beside the code in a wheel, else in the checkout.

    Raises:
        StoreError: neither is there.
    """
    for candidate in (_PACKAGE / "_migrations", _PACKAGE.parent / "migrations"):
        if (candidate / "env.py").is_file():
            return candidate
    raise StoreError(
        f"expected the migrations in {_PACKAGE / '_migrations'} or {_PACKAGE.parent / 'migrations'}"
        ", found neither; reinstall mentor-serve"
    )


def alembic_config() -> Config:
    """Alembic's configuration without an ini file."""
    config = Config()
    # The option goes through configparser, where a percent sign starts an interpolation.
    config.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
    return config


def upgrade(url: str, *, timeout_s: float = 60.0) -> SchemaState:
    """Create the schema or bring it to the newest revision; waits for another upgrade to end.

    Raises:
        SchemaOutOfDate: the database was written by a newer mentor-serve.
        StoreError: the database cannot be reached or a migration failed (nothing changed then).
    """
    engine = open_engine(url, pool_size=1, timeout_s=timeout_s)
    try:
        with translated(url, doing="upgrading the schema"), migrating(engine) as connection:
            state = _state(connection)
            if state.status == "ahead":
                raise SchemaOutOfDate(explanation(url, state))
            if state.status != "ok":
                _alembic_upgrade(connection, url=url)
            return _state(connection)
    finally:
        engine.dispose()


def _alembic_upgrade(connection: Connection, *, url: str) -> None:
    config = alembic_config()
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise StoreError(f"upgrading the schema of {shown(url)} failed: {error}") from error


@contextmanager
def migrating(engine: Engine) -> Iterator[Connection]:
    """A transaction that no other migration runs beside; migrations/env.py uses it too."""
    with without_foreign_keys(engine) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        yield connection


def check(url: str) -> SchemaState:
    """Compare the database with this installation. Creates nothing, not even the SQLite file.

    Raises:
        StoreError: the database cannot be reached.
    """
    path = sqlite_path(url)
    if path is not None and not path.exists():
        return SchemaState(current=None, head=_head(), status="empty")
    engine = open_engine(url, pool_size=1, read_only=True)
    try:
        with reading(engine, url, doing="reading the schema revision") as connection:
            return _state(connection)
    finally:
        engine.dispose()


def require_current(url: str) -> SchemaState:
    """Refuse a database whose schema is not the one this installation was written for.

    Raises:
        SchemaOutOfDate: it is not; the message names the command to run.
        StoreError: the database cannot be reached.
    """
    state = check(url)
    if state.status != "ok":
        raise SchemaOutOfDate(explanation(url, state))
    return state


def explanation(url: str, state: SchemaState) -> str:
    """What is wrong with a state that is not ok, and what to do."""
    if state.status == "ahead":
        return (
            f"expected schema {state.head} in {shown(url)}, found {state.current}: the database "
            "was written by a newer mentor-serve; install that version, or restore a backup"
        )
    found = "no schema" if state.current is None else f"schema {state.current}"
    return f"expected schema {state.head} in {shown(url)}, found {found}; run: {UPGRADE_COMMAND}"


def _head() -> str:
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    if head is None:
        raise StoreError(f"no migrations in {migrations_path()}; reinstall mentor-serve")
    return head


def _state(connection: Connection) -> SchemaState:
    head = _head()
    current = MigrationContext.configure(connection).get_current_revision()
    known = {
        script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()
    }
    status: Literal["ok", "behind", "ahead", "empty"]
    if current is None:
        status = "empty"
    elif current == head:
        status = "ok"
    else:
        status = "behind" if current in known else "ahead"
    return SchemaState(current=current, head=head, status=status)
