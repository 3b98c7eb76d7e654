"""How long the dashboard's queries and the questions of docs/sql.md take on a large store.

Every query of `StatsReader`, with each filter that the dashboard offers and with filters that no
response passes (the slowest case: everything is looked at), those of the page Experiments over all
runs that it takes, and every statement of the guide.

    python -m benchmarks.store_seed sqlite:////tmp/seeded.db --trajectories 1000000
    python -m benchmarks.store_queries sqlite:////tmp/seeded.db

Run it twice: the first reads the file from the disk. JSON goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import positive_int, processor, report_progress
from mentor_serve.store.connection import parse_url
from mentor_serve.store.experiment_stats import MAX_RUNS, ExperimentReader
from mentor_serve.store.stats import StatsReader
from mentor_serve.types import TrajectoryKind

GUIDE = Path(__file__).parents[1] / "docs" / "sql.md"
SLOW_S = 2.0
"""Queries that take longer are repeated three times only."""

Query = Callable[[], object]


def dashboard(reader: StatsReader) -> Iterator[tuple[str, Query]]:
    """The queries of the dashboard for its newest run, each with a name."""
    run = reader.runs()[0]
    run_id = run["id"]
    one = reader.trajectories(run_id, kind=TrajectoryKind.MIXED, limit=1)[0]["id"]
    # The seeded run ends with its last group.
    now = run["updated_at"] + timedelta(minutes=1)
    filters: dict[str, dict[str, Any]] = {
        "": {},
        "limit=1000": {"limit": 1000},
        "passed": {"is_passed": True},
        "not passed": {"is_passed": False},
        "mixed": {"kind": TrajectoryKind.MIXED},
        "expert (few)": {"kind": TrajectoryKind.EXPERT},
        "served (none)": {"kind": TrajectoryKind.SERVED},
        "interventions >= 1": {"min_interventions": 1},
        "interventions >= 50 (none)": {"min_interventions": 50},
        "mixed, not passed, interventions >= 10 (few)": {
            "kind": TrajectoryKind.MIXED,
            "is_passed": False,
            "min_interventions": 10,
        },
        "expert, not passed, interventions >= 1 (none)": {
            "kind": TrajectoryKind.EXPERT,
            "is_passed": False,
            "min_interventions": 1,
        },
    }
    yield "runs", reader.runs
    yield "training_curve", partial(reader.training_curve, run_id)
    yield "latest_update", partial(reader.latest_update, run_id)
    yield "live_version", partial(reader.live_version, run_id)
    for kind in (TrajectoryKind.ON_POLICY, TrajectoryKind.MIXED):
        yield f"by_version {kind.value}", partial(reader.by_version, run_id, kind=kind)
    yield "staleness", partial(reader.staleness, run_id)
    yield "group_counts", partial(reader.group_counts, run_id)
    yield "throughput", partial(reader.throughput, run_id, now=now)
    for name, chosen in filters.items():
        yield f"trajectories {name}".strip(), partial(reader.trajectories, run_id, **chosen)
    yield "trajectory", partial(reader.trajectory, one)
    yield "replacements", partial(reader.replacements, run_id)
    yield "events", partial(reader.events, run_id)
    yield "evaluations", partial(reader.evaluations, run_id)


def experiments(reader: ExperimentReader) -> Iterator[tuple[str, Query]]:
    """The queries of the page Experiments, over the newest runs."""
    run_ids = [run["id"] for run in reader.runs()[:MAX_RUNS]]
    for name in ("methods", "update_curves", "greedy_curves", "final_measures"):
        yield name, partial(getattr(reader, name), run_ids)


def guide(reader: StatsReader) -> Iterator[tuple[str, Query]]:
    """The statements of docs/sql.md, each under its first words."""
    text = GUIDE.read_text(encoding="utf-8")
    for statement in re.findall(r"```sql\n(.*?)```", text, re.DOTALL):
        yield " ".join(statement.split())[:72], partial(_ask, reader, statement)


def _ask(reader: StatsReader, statement: str) -> None:
    with reader.connection() as connection:
        # The driver's own cursor: a percent sign is a percent sign.
        cursor: Any = connection.connection.cursor()
        cursor.execute(statement)
        cursor.fetchall()
        cursor.close()


def measure(query: Query, *, repeats: int) -> dict[str, float | int]:
    """Times in ms after one run that is not counted.

    `cpu_p50_ms` is of this process: with SQLite all the work, with PostgreSQL the client's part. On
    a machine that does other things it says more than the wall times.
    """
    first, _ = _seconds(query)
    times = [_seconds(query) for _ in range(repeats if first < SLOW_S else min(repeats, 3))]
    wall, cpu = np.array(times).T * 1000
    return {
        "p50_ms": round(float(np.quantile(wall, 0.5)), 1),
        "p95_ms": round(float(np.quantile(wall, 0.95)), 1),
        "min_ms": round(float(wall.min()), 1),
        "cpu_p50_ms": round(float(np.quantile(cpu, 0.5)), 1),
        "num_runs": len(times),
    }


def _seconds(query: Query) -> tuple[float, float]:
    started, cpu_started = time.perf_counter(), time.process_time()
    query()
    return time.perf_counter() - started, time.process_time() - cpu_started


def measure_all(url: str, *, repeats: int = 20) -> dict[str, Any]:
    """Time every query; the result as JSON."""
    reader = ExperimentReader(url, timeout_s=60)
    result: dict[str, Any] = {
        "database": parse_url(url).get_backend_name(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
    }
    parts = {
        "dashboard": dashboard(reader),
        "experiments": experiments(reader),
        "guide": guide(reader),
    }
    for part, queries in parts.items():
        result[part] = {}
        for name, query in queries:
            result[part][name] = measure(query, repeats=repeats)
            report_progress(f"{name}: {result[part][name]}")
    reader.close()
    return result


def main() -> None:
    """Time every query and print the times as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("url", help="a database that benchmarks.store_seed filled")
    parser.add_argument("--repeats", type=positive_int, default=20)
    given = parser.parse_args()
    print(json.dumps(measure_all(given.url, repeats=given.repeats), indent=2))


if __name__ == "__main__":
    main()
