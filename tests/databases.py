"""Fixtures: databases of a test's own, on every kind of database that there is.

SQLite files always. PostgreSQL on the server that TEST_POSTGRES_URL names (its user may create
databases), else on one that the session starts for itself; without either those tests are skipped
and say so. Migrations run once a session and kind: tests get copies of the result.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import postgres_server
import pytest
from sqlalchemy import Connection, create_engine, make_url, text

from mentor_serve.store import upgrade

_ABSENT = pytest.mark.skipif(not postgres_server.is_available(), reason=postgres_server.ABSENT)
DATABASES = ["sqlite", pytest.param("postgresql", marks=[pytest.mark.postgres, _ABSENT])]


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A server: its database `postgres`, as a user who may create others."""
    named = os.environ.get("TEST_POSTGRES_URL")
    if named:
        yield named
        return
    server = postgres_server.PostgresServer()
    try:
        server.start()
        yield server.url
    finally:
        server.remove()


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file of the newest schema, to be copied."""
    path = tmp_path_factory.mktemp("migrated") / "mentor.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_template(postgres_url: str) -> Iterator[str]:
    """Name of a PostgreSQL database of the newest schema, to be copied."""
    with postgres_database(postgres_url) as (name, url):
        upgrade(url)
        yield name


@pytest.fixture(params=DATABASES)
def database_kind(request: pytest.FixtureRequest) -> str:
    """`sqlite` or `postgresql`."""
    return str(request.param)


@pytest.fixture
def empty_url(database_kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without a schema."""
    if database_kind == "sqlite":
        yield f"sqlite:///{tmp_path / 'mentor.db'}"
        return
    with postgres_database(request.getfixturevalue("postgres_url")) as (_, url):
        yield url


@pytest.fixture
def url(database_kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of the newest schema."""
    if database_kind == "sqlite":
        path = shutil.copy(request.getfixturevalue("migrated_file"), tmp_path / "mentor.db")
        yield f"sqlite:///{path}"
        return
    template = request.getfixturevalue("migrated_template")
    server = request.getfixturevalue("postgres_url")
    with postgres_database(server, template=template) as (_, made):
        yield made


@contextmanager
def postgres_database(server: str, *, template: str = "template1") -> Iterator[tuple[str, str]]:
    """Name and URL of a new database on the server, dropped at the end."""
    location = make_url(server).set(drivername="postgresql+psycopg")
    name = f"mentor_test_{uuid.uuid4().hex}"
    with _administering(server) as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    try:
        yield name, location.set(database=name).render_as_string(hide_password=False)
    finally:
        with _administering(server) as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@contextmanager
def _administering(server: str) -> Iterator[Connection]:
    location = make_url(server).set(drivername="postgresql+psycopg")
    engine = create_engine(location, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()
