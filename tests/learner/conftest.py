"""One migrated SQLite database a test."""

import pytest

from mentor_serve.store import TrajectoryStore, upgrade


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    path = tmp_path_factory.mktemp("learner") / "empty.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def url(empty_database, tmp_path):
    """A copy of a migrated database: migrating takes longer than most tests."""
    path = tmp_path / "mentor.db"
    path.write_bytes(empty_database.read_bytes())
    return f"sqlite:///{path}"


@pytest.fixture
def store(url):
    with TrajectoryStore(url) as opened:
        yield opened


@pytest.fixture
def run_id(store):
    return store.open_run("test", {})
