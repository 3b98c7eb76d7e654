"""`mentor-serve db check`: is the database there, of this schema, and sound?"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from mentor_serve.store import reads, schema
from mentor_serve.store.connection import open_engine, reading, shown


def database_check(url: str) -> dict[str, Any]:
    """Check schema, integrity (SQLite), orphans and counts; changes nothing.

    Returns:
        `url` (password hidden), `schema` (current, head, status), `ok`, `problems` (sentences),
        `counts` (rows by table) and `expired_leases`.

    Raises:
        StoreError: the database cannot be reached.
    """
    state = schema.check(url)
    report: dict[str, Any] = {
        "url": shown(url),
        "schema": {"current": state.current, "head": state.head, "status": state.status},
    }
    if state.status != "ok":
        problem = schema.explanation(url, state)
        return report | {"ok": False, "problems": [problem], "counts": {}, "expired_leases": 0}
    engine = open_engine(url, pool_size=1, read_only=True)
    try:
        with reading(engine, url, doing="checking the database") as connection:
            return report | reads.find_problems(connection, now=datetime.now(UTC))
    finally:
        engine.dispose()
