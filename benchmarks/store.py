"""Everything about the store in one run: writing, the queue, and queries by size, on each database.

    python -m benchmarks.store --json
    python -m benchmarks.store --json --server postgresql://user:password@host/postgres

SQLite in temporary files; PostgreSQL as well where `--server` names one on which the user may
create databases (they are dropped again). What is measured, and against what, is said in
`benchmarks.store_writes`, `benchmarks.store_queue` and `benchmarks.store_queries`. A million
responses take a few minutes and 2 GB on each database: `--sizes 10000 100000` is quicker.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text

from benchmarks import store_queries, store_queue, store_writes
from benchmarks.machine import positive_int, processor, report_progress
from benchmarks.store_seed import seed_store
from mentor_serve.store.connection import parse_url


@contextmanager
def new_database(server: str | None) -> Iterator[str]:
    """URL of an empty database, gone at the end: a temporary SQLite file, or one on `server`."""
    if server is None:
        with tempfile.TemporaryDirectory() as directory:
            yield f"sqlite:///{Path(directory) / 'mentor.db'}"
        return
    location = parse_url(server)
    name = f"mentor_benchmark_{uuid.uuid4().hex}"
    engine = create_engine(location, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        yield location.set(database=name).render_as_string(hide_password=False)
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    finally:
        engine.dispose()


def measure(server: str | None, *, sizes: list[int], rounds: int, groups: int) -> dict[str, Any]:
    """One database: writes, queue, and the queries at every size."""
    with new_database(server) as url:
        report_progress("writing")
        writes = store_writes.measure(url, rounds=rounds, num_groups=256, batch=32, num_threads=8)
    with new_database(server) as url:
        report_progress("the queue")
        queue = store_queue.measure(url, num_groups=groups, learners=[1, 4])
    queries = {}
    for size in sizes:
        with new_database(server) as url:
            report_progress(f"seeding {size} responses")
            seed_store(url, num_trajectories=size, seed=0)
            queries[str(size)] = store_queries.measure_all(url)
    return {"writes": writes, "queue": queue, "queries": queries}


def slowest(queries: dict[str, Any]) -> tuple[str, float]:
    """Name and p95, ms, of the slowest query of the dashboard."""
    name = max(queries["dashboard"], key=lambda name: queries["dashboard"][name]["p95_ms"])
    return name, queries["dashboard"][name]["p95_ms"]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", help="a PostgreSQL server, measured beside SQLite")
    parser.add_argument(
        "--sizes", type=positive_int, nargs="+", default=[10_000, 100_000, 1_000_000]
    )
    parser.add_argument("--rounds", type=positive_int, default=7, help="of writing")
    parser.add_argument("--groups", type=positive_int, default=1600, help="in the queue")
    parser.add_argument("--json", action="store_true", help="JSON instead of a summary")
    arguments = parser.parse_args()
    servers: dict[str, str | None] = {"sqlite": None}
    if arguments.server is not None:
        servers["postgresql"] = arguments.server
    result: dict[str, Any] = {"benchmark": "store", "processor": processor(), "databases": {}}
    for name, server in servers.items():
        result["databases"][name] = measure(
            server, sizes=arguments.sizes, rounds=arguments.rounds, groups=arguments.groups
        )
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for name, measured in result["databases"].items():
        print(name)
        print("  share of the bare driver's speed", measured["writes"]["share_of_driver"])
        for queue in measured["queue"]["queues"]:
            print("  queue", queue)
        for size, queries in measured["queries"].items():
            print(f"  slowest of the dashboard at {size} responses", slowest(queries))


if __name__ == "__main__":
    main()
