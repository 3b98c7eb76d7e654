"""Databases for the store's tests.

SQLite files always. PostgreSQL as well where TEST_POSTGRES_URL names a server on which the user may
create databases, for instance postgresql://mentor:secret@127.0.0.1:5432/postgres; each test then
gets a database of its own.
"""

import os
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import create_engine, make_url, text

from mentor_serve.store import TrajectoryStore, upgrade

POSTGRES_URL = os.environ.get("TEST_POSTGRES_URL")
DATABASES = ["sqlite"] + (
    [pytest.param("postgresql", marks=pytest.mark.postgres)] if POSTGRES_URL else []
)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = datetime(2026, 1, 31, 12, tzinfo=UTC)

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += timedelta(seconds=seconds)


@pytest.fixture(params=DATABASES)
def empty_url(request, tmp_path):
    """A database without a schema."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'mentor.db'}"
        return
    server = make_url(POSTGRES_URL).set(drivername="postgresql+psycopg")
    name = f"mentor_test_{uuid.uuid4().hex}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield server.set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture
def url(empty_url):
    """A database of the newest schema."""
    upgrade(empty_url)
    return empty_url


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(url, clock):
    with TrajectoryStore(url, clock=clock) as opened:
        yield opened


@pytest.fixture
def run_id(store):
    return store.open_run("test", {"policy": {"model": "embedded:policy"}})
