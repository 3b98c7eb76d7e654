"""PostgreSQL is stopped under a running service, which serves and collects on."""

from __future__ import annotations

import urllib.error
from collections.abc import Callable, Iterator
from typing import Any

import openai
import postgres_server
import pytest
from sqlalchemy import create_engine, make_url, text

from mentor_serve.store import upgrade

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.postgres,
    pytest.mark.timeout(500),
    pytest.mark.skipif(
        postgres_server.find_binaries() is None, reason="needs pg_ctl: the test stops a server"
    ),
]


@pytest.fixture
def server() -> Iterator[Any]:
    made = postgres_server.PostgresServer()
    try:
        made.start()
        yield made
    finally:
        made.remove()


def query(server: Any, sql: str) -> list[Any]:
    engine = create_engine(make_url(server.url).set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        rows = [tuple(row) for row in connection.execute(text(sql))]
    engine.dispose()
    return rows


def test_a_service_outlives_its_database(start_service: Callable[..., Any], server: Any) -> None:
    upgrade(server.url)
    service = start_service(
        env={
            "MENTOR_SERVE_STORE__URL": server.url,
            "MENTOR_SERVE_STORE__TIMEOUT_S": "5",
            "MENTOR_SERVE_ROLLOUT__MAX_NEW_TOKENS": "16",
        }
    )
    service.wait_for_step(2)
    client = openai.OpenAI(base_url=f"{service.base_url}/v1", api_key="unused", max_retries=0)
    server.stop(mode="immediate")

    def spooled() -> int:
        return int(service.get("/health/readiness")["details"]["spool"]["groups"])

    service.wait_for(lambda: spooled() > 0, "groups in the spool")
    readiness = service.get("/health/readiness")  # 200: else this raises
    assert readiness["status"] == "ready"
    assert readiness["reasons"][0].startswith("store_unavailable: spooling, ")
    assert client.completions.create(model="policy", prompt="1 + 1 =", max_tokens=4).choices
    with pytest.raises(urllib.error.HTTPError, match="503"):
        service.get("/v1/training")
    files = list((service.home / "spool").rglob("*.group"))
    assert files

    server.start()
    service.wait_for(lambda: spooled() == 0, "an empty spool")
    step = service.step()
    service.wait_for_step(step + 2)
    assert service.get("/health/readiness")["reasons"] == []
    assert service.interrupt() == 0, service.output.read_text()[-3000:]
    assert list((service.home / "spool").rglob("*.group")) == []
    kinds = {row[0] for row in query(server, "SELECT kind FROM events")}
    assert "store_back" in kinds
    assert not kinds & {"learner_replaced", "group_rejected", "group_dropped"}
    # The file names carry the ids of the groups that waited.
    waited = {path.name[21:-6] for path in files}
    stored = {row[0] for row in query(server, "SELECT id FROM rollout_groups")}
    assert waited <= stored
    wrong = query(
        server,
        "SELECT u.step FROM updates u LEFT JOIN rollout_groups g "
        "ON g.run_id = u.run_id AND g.consumed_by_step = u.step "
        "GROUP BY u.step, u.num_groups HAVING COUNT(g.id) <> u.num_groups",
    )
    assert wrong == []
