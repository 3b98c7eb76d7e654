"""How fast learners take groups from the store, and that each group goes to one of them.

    python -m benchmarks.store_queue --json
    python -m benchmarks.store_queue --url postgresql://user:password@host/empty_database

Learners are processes of their own. Each leases groups (and reads their arrays, as training does)
and commits an update that consumes them, until none is left; then every group must be consumed
once, by an update that is there. Also with one learner, and beside a process that stores groups.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import text

from benchmarks.machine import positive_int, processor, report_progress
from benchmarks.store_writes import NUM_TRAJECTORIES, make_group
from mentor_serve.store import TrajectoryStore, UpdateRecord, VersionRecord, upgrade
from mentor_serve.store.connection import open_engine, parse_url, reading

GROUPS_PER_UPDATE = 16
_STEPS_PER_LEARNER = 1_000_000
"""Learners count their steps in ranges of their own: a run's steps are unique."""

_CHECK = """
SELECT
    COUNT(*) AS num_groups,
    SUM(CASE WHEN g.status = 'consumed' AND u.step IS NOT NULL THEN 1 ELSE 0 END) AS num_consumed,
    (SELECT SUM(num_groups) FROM updates WHERE run_id = :run_id) AS num_in_updates
FROM rollout_groups g
LEFT JOIN updates u ON u.run_id = g.run_id AND u.step = g.consumed_by_step
WHERE g.run_id = :run_id AND g.id <= :last_id
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One drained queue."""

    learners: int
    is_written_to: bool
    """Another process stored groups all the while."""
    groups_per_s: float
    trajectories_per_s: float
    p50_ms: float
    """Of leasing and committing one update, the reading of its arrays included."""
    p95_ms: float
    groups_by_learner: list[int]


def drain(url: str, *, name: str, num_groups: int, learners: int, is_written_to: bool) -> Measured:
    """Fill a run of its own, let the learners empty it, and check what they did.

    Raises:
        RuntimeError: a group was lost or consumed twice.
    """
    run_id, last_id = _fill(url, name, num_groups)
    context = multiprocessing.get_context("spawn")
    start, stop = context.Event(), context.Event()
    results: Any = context.Queue()
    workers = [
        context.Process(target=_learn, args=(url, run_id, number, start, results))
        for number in range(learners)
    ]
    writer = context.Process(target=_write, args=(url, f"{name}-beside", start, stop))
    processes = [*workers, *([writer] if is_written_to else [])]
    for process in processes:
        process.start()
    for _ in workers:
        results.get(timeout=120)  # connected
    started = time.perf_counter()
    start.set()
    latencies = [results.get(timeout=600) for _ in workers]
    elapsed = time.perf_counter() - started
    stop.set()
    for process in processes:
        process.join(timeout=60)
    _check(url, run_id, last_id, num_groups)
    every = np.concatenate([np.asarray(one) for one in latencies]) * 1000
    return Measured(
        learners=learners,
        is_written_to=is_written_to,
        groups_per_s=round(num_groups / elapsed, 1),
        trajectories_per_s=round(num_groups * NUM_TRAJECTORIES / elapsed, 1),
        p50_ms=round(float(np.percentile(every, 50)), 2),
        p95_ms=round(float(np.percentile(every, 95)), 2),
        groups_by_learner=[GROUPS_PER_UPDATE * len(one) for one in latencies],
    )


def _fill(url: str, name: str, num_groups: int) -> tuple[str, str]:
    rng = np.random.default_rng(0)
    with TrajectoryStore(url) as store:
        run_id = store.open_run(name, {})
        store.add_version(run_id, _version(0))
        made = [store.group_rows(run_id, make_group(rng)) for _ in range(num_groups)]
        for first in range(0, num_groups, 64):
            store.add_groups(made[first : first + 64])
    return run_id, max(one.group_id for one in made)


def _learn(url: str, run_id: str, number: int, start: Event, results: Any) -> None:
    """Lease and commit until nothing is left; reports the seconds of every update."""
    owner = f"learner-{number}"
    seconds: list[float] = []
    with TrajectoryStore(url) as store:
        store.count_groups(run_id)
        results.put("connected")
        start.wait()
        while True:
            began = time.perf_counter()
            leased = store.lease_groups(
                run_id, num_groups=GROUPS_PER_UPDATE, owner=owner, lease_s=60
            )
            if not leased:
                break
            step = number * _STEPS_PER_LEARNER + len(seconds) + 1
            store.commit_update(
                run_id,
                owner=owner,
                group_ids=[group.group_id for group in leased],
                update=_update(step, len(leased)),
                version=_version(step),
            )
            seconds.append(time.perf_counter() - began)
    results.put(seconds)


def _write(url: str, name: str, start: Event, stop: Event) -> None:
    rng = np.random.default_rng(1)
    with TrajectoryStore(url) as store:
        run_id = store.open_run(name, {})
        start.wait()
        while not stop.is_set():
            store.add_groups([store.group_rows(run_id, make_group(rng)) for _ in range(8)])


def _check(url: str, run_id: str, last_id: str, num_groups: int) -> None:
    engine = open_engine(url, pool_size=1)
    try:
        with reading(engine, url, doing="checking the queue") as connection:
            found = connection.execute(text(_CHECK), {"run_id": run_id, "last_id": last_id}).one()
    finally:
        engine.dispose()
    counts = tuple(int(one or 0) for one in found)
    if counts != (num_groups, num_groups, num_groups):
        raise RuntimeError(
            f"expected {num_groups} groups, each consumed by one update, found {counts} "
            "(groups, consumed, sum over updates)"
        )


def _version(number: int) -> VersionRecord:
    return VersionRecord(
        version=number,
        step=number,
        alpha=0.5,
        gamma=1.25,
        sha256=None,
        path=None,
        parent_version=None,
    )


def _update(step: int, num_groups: int) -> UpdateRecord:
    return UpdateRecord(
        step=step,
        policy_version=step,
        num_groups=num_groups,
        num_trajectories=num_groups * NUM_TRAJECTORIES,
        num_tokens=0,
        alpha=0.5,
        gamma=1.25,
    )


def measure(url: str, *, num_groups: int, learners: list[int]) -> dict[str, Any]:
    """Every number of learners, alone and beside a writer; the result as JSON."""
    upgrade(url)
    num_groups = num_groups // GROUPS_PER_UPDATE * GROUPS_PER_UPDATE
    found = []
    for count in learners:
        for is_written_to in (False, True):
            name = f"queue-{count}-{is_written_to}"
            report_progress(f"{count} learners, written to: {is_written_to}")
            found.append(
                drain(
                    url,
                    name=name,
                    num_groups=num_groups,
                    learners=count,
                    is_written_to=is_written_to,
                )
            )
    return {
        "benchmark": "store_queue",
        "processor": processor(),
        "database": parse_url(url).get_backend_name(),
        "groups": num_groups,
        "groups_an_update": GROUPS_PER_UPDATE,
        "trajectories_a_group": NUM_TRAJECTORIES,
        "queues": [asdict(one) for one in found],
    }


@contextmanager
def _database(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory() as directory:
        yield f"sqlite:///{Path(directory) / 'mentor.db'}"


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", help="an empty database (default: a temporary SQLite file)")
    parser.add_argument("--groups", type=positive_int, default=1600, help="a multiple of 16")
    parser.add_argument("--learners", type=positive_int, nargs="+", default=[1, 4])
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    arguments = parser.parse_args()
    with _database(arguments.url) as url:
        result = measure(url, num_groups=arguments.groups, learners=arguments.learners)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for one in result["queues"]:
        beside = "beside a writer" if one["is_written_to"] else "alone"
        print(
            f"{one['learners']} learners {beside:16} {one['groups_per_s']:8.1f} groups/s  "
            f"p50 {one['p50_ms']:.1f} ms  p95 {one['p95_ms']:.1f} ms  {one['groups_by_learner']}"
        )


if __name__ == "__main__":
    main()
