"""A store of any size in minutes: the rows of `benchmarks.seeded_run`, written into a database.

Rows go straight into the tables (COPY on PostgreSQL), so this says nothing about the speed of
`TrajectoryStore`; it makes what queries are timed on. The same arguments give the same rows on both
databases.

    python -m benchmarks.store_seed sqlite:////tmp/seeded.db --trajectories 1000000
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Engine, text

from benchmarks.seeded_run import NUM_MIXED, NUM_ON_POLICY, SeededRun
from mentor_serve.errors import StoreError
from mentor_serve.store import TrajectoryStore, upgrade
from mentor_serve.store.connection import open_engine, shown, writing
from mentor_serve.store.rollup import add_to_version_stats

GROUPS_PER_TRANSACTION = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class SeededStore:
    """What was written."""

    run_id: str
    num_groups: int
    num_trajectories: int
    """Of groups; demonstrations come on top."""
    num_interventions: int
    wall_s: float


def seed_store(
    url: str, *, num_trajectories: int, seed: int, with_tokens: bool = False
) -> SeededStore:
    """Add one run of `num_trajectories` responses, rounded down to whole groups, to a database.

    The schema is created where there is none. Without tokens (`with_tokens=False`) no group is left
    `ready`: a learner could not train on one.

    Raises:
        StoreError: the database cannot be reached, or holds the run of this seed already.
    """
    started = time.perf_counter()
    upgrade(url)
    run = SeededRun(seed=seed, num_groups=num_trajectories // (NUM_ON_POLICY + NUM_MIXED))
    with TrajectoryStore(url) as store:
        if store.find_run(run.name) is not None:
            raise StoreError(
                f"expected no run {run.name!r} in {shown(url)}, found one; choose another seed"
            )
    engine = open_engine(url, pool_size=1)
    try:
        with writing(engine, url, doing="seeding a run") as connection:
            for table, rows in run.before_groups(with_tokens=with_tokens):
                _insert(connection, table, rows)
        num_interventions = 0
        for first in range(0, run.num_groups, GROUPS_PER_TRANSACTION):
            numbers = range(first, min(first + GROUPS_PER_TRANSACTION, run.num_groups))
            rows_of = run.groups(numbers, with_tokens=with_tokens)
            num_interventions += len(rows_of["interventions"])
            with writing(engine, url, doing="seeding groups") as connection:
                for table, rows in rows_of.items():
                    _insert(connection, table, rows)
                add_to_version_stats(connection, rows_of["trajectories"])
        _gather_statistics(engine)
    finally:
        engine.dispose()
    return SeededStore(
        run_id=run.run_id,
        num_groups=run.num_groups,
        num_trajectories=run.num_groups * (NUM_ON_POLICY + NUM_MIXED),
        num_interventions=num_interventions,
        wall_s=time.perf_counter() - started,
    )


def _insert(connection: Connection, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    names = list(rows[0])
    cursor: Any = connection.connection.cursor()
    values = (tuple(row.values()) for row in rows)
    if connection.dialect.name == "postgresql":
        with cursor.copy(f"COPY {table} ({', '.join(names)}) FROM STDIN") as copy:
            for value in values:
                copy.write_row(value)
    else:
        places = ", ".join("?" * len(names))
        cursor.executemany(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({places})", values)
    cursor.close()


def _gather_statistics(engine: Engine) -> None:
    """What autovacuum does on a server in use. On SQLite plans are the same without statistics."""
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM (ANALYZE)"))


def main() -> None:
    """Seed a database and print what was written as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("url", help="sqlite:////path/to.db or postgresql://user:password@host/name")
    parser.add_argument("--trajectories", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", action="store_true", help="store per-token arrays as well")
    given = parser.parse_args()
    seeded = seed_store(
        given.url,
        num_trajectories=given.trajectories,
        seed=given.seed,
        with_tokens=given.tokens,
    )
    print(json.dumps(asdict(seeded), indent=2))


if __name__ == "__main__":
    main()
