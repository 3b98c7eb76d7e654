"""Rows into and out of databases of any revision, whatever the package calls them today."""

from datetime import UTC

from schema_rows import TABLES

from mentor_serve.store import schema
from mentor_serve.store.connection import open_engine


def insert(connection, rows):
    """Write rows through the driver."""
    is_sqlite = connection.dialect.name == "sqlite"
    for table in TABLES:
        for row in rows.get(table, []):
            places = ", ".join(["?" if is_sqlite else "%s"] * len(row))
            statement = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({places})"
            connection.exec_driver_sql(statement, tuple(row.values()))


def read(connection, expected):
    """Table to rows in the order of their keys, with the columns of the first of `expected`."""
    found = {}
    for table, rows in expected.items():
        names = ", ".join(rows[0])
        statement = f"SELECT {names} FROM {table} ORDER BY {', '.join(TABLES[table])}"
        found[table] = [
            {name: _plain(value) for name, value in row.items()}
            for row in connection.exec_driver_sql(statement).mappings()
        ]
    return found


def _plain(value):
    if isinstance(value, memoryview):
        return bytes(value)
    if hasattr(value, "astimezone"):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return value


def migrate(url, command, revision):
    """Run an Alembic command (upgrade or downgrade) to a revision."""
    config = schema.alembic_config()
    engine = open_engine(url)
    try:
        with schema.migrating(engine) as connection:
            config.attributes["connection"] = connection
            command(config, revision)
    finally:
        engine.dispose()
