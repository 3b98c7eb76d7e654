"""Databases of every released schema, with rows in them, upgrade and go a revision back and forth.

On SQLite they are the files in `schemas/`, as `freeze_schema.py` wrote them when the revision was
the newest; on PostgreSQL the same rows are written after migrating an empty database so far.
"""

import sqlite3
from itertools import pairwise

import freeze_schema
import pytest
import schema_databases
import schema_rows
from alembic import command
from alembic.script import ScriptDirectory

from mentor_serve.store import database_check, schema, schema_state, upgrade
from mentor_serve.store.connection import open_engine, reading, writing
from mentor_serve.store.encoding import decode

HEAD = schema_rows.REVISIONS[-1]


def fill(url, revision):
    """A database of `revision` with rows of that time."""
    if url.startswith("sqlite"):
        load(url, revision)
        return
    schema_databases.migrate(url, command.upgrade, revision)
    engine = open_engine(url)
    with writing(engine, url, doing="filling") as connection:
        schema_databases.insert(connection, schema_rows.rows_at(revision))
    engine.dispose()


def load(url, revision):
    """The frozen file of `revision`."""
    connection = sqlite3.connect(url.removeprefix("sqlite:///"))
    frozen = freeze_schema.FOLDER / f"{revision}.sql"
    connection.executescript(frozen.read_text(encoding="utf-8"))
    connection.close()


def assert_rows(url, expected):
    engine = open_engine(url)
    with reading(engine, url, doing="comparing") as connection:
        found = schema_databases.read(connection, expected)
    engine.dispose()
    for table, rows in expected.items():
        assert found[table] == rows, table


def described(url):
    """Columns of tables, columns of indexes and texts of views of an SQLite database."""
    connection = sqlite3.connect(url.removeprefix("sqlite:///"))
    found = {}
    for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master"):
        pragma = {"table": "table_xinfo", "index": "index_xinfo"}.get(kind)
        found[kind, name] = (
            connection.execute(f"SELECT * FROM pragma_{pragma}(?)", (name,)).fetchall()
            if pragma
            else sql
        )
    connection.close()
    return found


def test_every_revision_has_rows_and_a_frozen_file():
    script = ScriptDirectory.from_config(schema.alembic_config())
    revisions = sorted(one.revision for one in script.walk_revisions())
    assert revisions == list(schema_rows.REVISIONS)
    assert sorted(path.stem for path in freeze_schema.FOLDER.iterdir()) == revisions


@pytest.mark.parametrize("revision", schema_rows.REVISIONS)
def test_migrations_still_make_the_schema_that_was_frozen(tmp_path, revision):
    frozen, made = (f"sqlite:///{tmp_path / name}.db" for name in ("frozen", "made"))
    load(frozen, revision)
    schema_databases.migrate(made, command.upgrade, revision)
    assert described(frozen) == described(made)


@pytest.mark.parametrize("revision", schema_rows.REVISIONS)
def test_a_database_of_any_revision_upgrades_with_its_rows(empty_url, revision):
    fill(empty_url, revision)
    assert schema_state(empty_url).current == revision
    assert upgrade(empty_url).status == "ok"
    assert_rows(empty_url, schema_rows.rows_at(HEAD, written_at=revision))
    report = database_check(empty_url)
    assert (report["ok"], report["problems"]) == (True, [])


@pytest.mark.parametrize(
    ("older", "newer"),
    list(pairwise(schema_rows.REVISIONS)),
    ids=lambda revision: revision,
)
def test_a_revision_goes_back_and_forth_with_rows(empty_url, older, newer):
    fill(empty_url, newer)
    assert_rows(empty_url, schema_rows.rows_at(newer))
    schema_databases.migrate(empty_url, command.downgrade, older)
    assert schema_state(empty_url).current == older
    # What the older schema cannot hold is gone: columns, evaluations without a version.
    assert_rows(empty_url, schema_rows.rows_at(older))
    schema_databases.migrate(empty_url, command.upgrade, newer)
    assert_rows(empty_url, schema_rows.rows_at(newer, written_at=older))


def test_arrays_of_the_first_release_are_still_read(empty_url):
    fill(empty_url, "0001")
    upgrade(empty_url)
    columns = "token_ids", "sources", "entropies"
    engine = open_engine(empty_url)
    with reading(engine, empty_url, doing="decoding") as connection:
        statement = (
            f"SELECT {', '.join(columns)} FROM trajectory_tokens WHERE trajectory_id = 't-3'"
        )
        arrays = [bytes(blob) for blob in connection.exec_driver_sql(statement).one()]
    engine.dispose()
    assert [decode(blob).tolist() for blob in arrays] == [[4, 5, 6], [0, 0, 0], [0.5, 1.5, 2.5]]


def test_a_frozen_schema_is_not_written_again():
    with pytest.raises(SystemExit, match="never written again"):
        freeze_schema.main("0001")
