"""The server of the tests themselves: it keeps its data over a stop, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator

import postgres_server
import psycopg
import pytest

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(
        postgres_server.find_binaries() is None, reason="needs the programs of PostgreSQL"
    ),
]


@pytest.fixture
def server() -> Iterator[postgres_server.PostgresServer]:
    made = postgres_server.PostgresServer()
    try:
        made.start()
        yield made
    finally:
        if made.directory.exists():
            made.remove()


def test_a_server_keeps_its_data_and_its_address_over_a_stop(
    server: postgres_server.PostgresServer,
) -> None:
    with psycopg.connect(server.url) as connection:
        connection.execute("CREATE TABLE kept (id int)")
    server.stop(mode="immediate")  # as a kill would: nothing is written on the way out
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(server.url)
    server.stop()  # again, which does nothing
    server.start()
    with psycopg.connect(server.url) as connection:
        assert connection.execute("SELECT COUNT(*) FROM kept").fetchone() == (0,)


def test_nothing_is_left_behind(server: postgres_server.PostgresServer) -> None:
    assert server.directory.exists()
    server.remove()
    assert not server.directory.exists()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(server.url)


def test_a_server_that_cannot_start_says_why(server: postgres_server.PostgresServer) -> None:
    with pytest.raises(RuntimeError, match="pg_ctl failed with exit code"):
        server.start()  # it runs already


def test_without_programs_the_reason_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_server, "find_binaries", lambda: None)
    monkeypatch.delenv("TEST_POSTGRES_URL", raising=False)
    assert not postgres_server.is_available()
    with pytest.raises(RuntimeError, match="make postgres-for-tests"):
        postgres_server.PostgresServer()
    monkeypatch.setenv("TEST_POSTGRES_URL", "postgresql://somewhere")
    assert postgres_server.is_available()
