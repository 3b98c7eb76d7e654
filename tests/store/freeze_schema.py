"""Write `schemas/<revision>.sql`: an SQLite database of that revision with rows, as text.

    python tests/store/freeze_schema.py 0006

Once a revision is released its file is history: it stands for databases that people have. So a file
that is there is refused; while its revision is unreleased and still changes, delete it first. Rows
come from `schema_rows.py`, which has to know the revision.
"""

import sqlite3
import sys
import tempfile
from pathlib import Path

import schema_databases
import schema_rows
from alembic import command

from mentor_serve.store.connection import open_engine, writing

FOLDER = Path(__file__).parent / "schemas"


def dump(revision, folder):
    """SQL text of a new database of `revision` that holds `schema_rows.rows_at(revision)`."""
    path = Path(folder) / "mentor.db"
    url = f"sqlite:///{path}"
    schema_databases.migrate(url, command.upgrade, revision)
    engine = open_engine(url)
    with writing(engine, url, doing="freezing a schema") as connection:
        schema_databases.insert(connection, schema_rows.rows_at(revision))
    engine.dispose()
    connection = sqlite3.connect(path)
    lines = "\n".join(connection.iterdump())
    connection.close()
    return lines + "\n"


def main(revision):
    """Write the file of one revision."""
    path = FOLDER / f"{revision}.sql"
    if path.exists():
        sys.exit(f"expected no {path}, found one: a released schema is never written again")
    with tempfile.TemporaryDirectory() as folder:
        path.write_text(dump(revision, folder), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
