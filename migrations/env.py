"""Alembic's environment: one tree of migrations for SQLite and PostgreSQL.

`mentor-serve db upgrade` and the store hand in an open connection; the plain `alembic` command
takes the URL from the settings (`MENTOR_SERVE_STORE__URL`, else the database under
`MENTOR_SERVE_HOME`).
"""

from __future__ import annotations

from typing import Any

from alembic import context
from sqlalchemy import Connection, Engine

from mentor_serve.store.columns import JsonText, PlainText, UtcTimestamp
from mentor_serve.store.connection import open_engine, parse_url
from mentor_serve.store.models import Base
from mentor_serve.store.schema import migrating


def render_item(kind: str, item: Any, autogen_context: Any) -> str | bool:
    """Write plain types into migrations: they must not change when the package's types do."""
    if kind == "type" and isinstance(item, UtcTimestamp):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and isinstance(item, (JsonText, PlainText)):
        return "sa.Text()"
    return False


def run(connection: Connection) -> None:
    """Migrate over an open connection."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        # SQLite cannot alter most of a table in place: it is copied into a new one.
        render_as_batch=connection.dialect.name == "sqlite",
        render_item=render_item,
        compare_type=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_with_engine(engine: Engine) -> None:
    """Migrate over a connection of our own, in one transaction and under the lock."""
    with migrating(engine) as connection:
        run(connection)


def configured_url() -> str:
    """The URL in the settings, which only the plain `alembic` command needs."""
    from mentor_serve.settings import load_settings

    return load_settings().database_url


def main() -> None:
    """Entry point: Alembic executes this file."""
    given = context.config.attributes.get("connection")
    if isinstance(given, Connection):
        run(given)
    elif isinstance(given, Engine):
        run_with_engine(given)
    elif context.is_offline_mode():
        url = parse_url(configured_url())
        context.configure(
            dialect_name=url.get_backend_name(),
            target_metadata=Base.metadata,
            literal_binds=True,
            render_as_batch=url.get_backend_name() == "sqlite",
        )
        with context.begin_transaction():
            context.run_migrations()
    else:
        engine = open_engine(configured_url(), pool_size=1)
        try:
            run_with_engine(engine)
        finally:
            engine.dispose()


main()
