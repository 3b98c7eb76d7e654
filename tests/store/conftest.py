"""A clock that stands still, and a store on each kind of database (see tests/databases.py)."""

from datetime import UTC, datetime, timedelta

import pytest

from mentor_serve.store import TrajectoryStore


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = datetime(2026, 1, 31, 12, tzinfo=UTC)

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += timedelta(seconds=seconds)


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
