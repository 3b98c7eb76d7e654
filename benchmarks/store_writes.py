"""How fast groups are stored, against the bare driver writing the same rows.

    python -m benchmarks.store_writes --json
    python -m benchmarks.store_writes --url postgresql://user:password@host/empty_database

Contenders, once a round each, in turn, on one database:

    driver   `executemany` of the same rows into the same tables, nothing else: rows are made before
    rows     `TrajectoryStore.add_groups` of rows made before: what the writer's transaction costs
    groups   the same from groups: means, sums and token arrays are computed as well
    writer   `GroupWriter.add` from as many threads as a collector has groups under way
    single   one thread, one group a transaction

Shares are those of the driver's speed in the same round; the median over rounds counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Connection

from benchmarks.machine import positive_int, processor, report_progress
from mentor_serve.store import NewGroup, NewTrajectory, TrajectoryStore, new_id, upgrade
from mentor_serve.store.bulk import BulkInsert
from mentor_serve.store.connection import open_engine, parse_url, writing
from mentor_serve.store.group_rows import DetailInserts, GroupRows
from mentor_serve.store.models import Base, RolloutGroup, TaskRow
from mentor_serve.store.spool import Spool
from mentor_serve.store.writer import GroupWriter, Outcome, WriterLimits
from mentor_serve.types import Guidance, Rollout, Score, StopReason, Task, TrajectoryKind

NUM_TRAJECTORIES = 8
NUM_TOKENS = 256
NUM_PROMPT_TOKENS = 64

Statement = tuple[str, list[Any]]
"""SQL and the rows for it."""


def make_group(rng: np.random.Generator) -> NewGroup:
    """One of six on-policy and two mixed responses; no two alike, as in a run."""
    return NewGroup(
        group_id=new_id(),
        task=Task(
            source="benchmark", prompt=f"{new_id()}: 1 + 1 = ?", answer="1", metadata={"n": 1}
        ),
        guidance=Guidance(policy_version=3, step=3, alpha=0.5, gamma=1.25),
        trajectories=[_trajectory(rng, index) for index in range(NUM_TRAJECTORIES)],
    )


def _trajectory(rng: np.random.Generator, index: int) -> NewTrajectory:
    is_mixed = index >= 6
    return NewTrajectory(
        rollout=_rollout(rng, is_mixed=is_mixed),
        kind=TrajectoryKind.MIXED if is_mixed else TrajectoryKind.ON_POLICY,
        sample_index=index,
        score=Score(reward=float(index % 2), accuracy=float(index % 2), format_score=1.0),
        prompt_token_ids=np.arange(NUM_PROMPT_TOKENS, dtype=np.int32),
        seed=index,
    )


def _rollout(rng: np.random.Generator, *, is_mixed: bool) -> Rollout:
    floats = np.abs(rng.normal(size=(3, NUM_TOKENS))).astype(np.float32)
    unseen = np.full(NUM_TOKENS, np.nan, np.float32)
    zeros = np.zeros(NUM_TOKENS, np.float32)
    return Rollout(
        token_ids=rng.integers(0, 50_000, NUM_TOKENS).astype(np.int32),
        policy_logprobs=-floats[0],
        mixed_logprobs=unseen,
        expert_logprobs=unseen,
        entropies=floats[1],
        weights=floats[2] if is_mixed else zeros,
        sources=(rng.random(NUM_TOKENS) < 0.1 * is_mixed).astype(np.uint8),
        policy_versions=np.full(NUM_TOKENS, 3, np.int32),
        stop_reason=StopReason.EOS,
        text=rng.bytes(2 * NUM_TOKENS).hex(),
    )


class Bench:
    """One database, one run, and the ways to write into it."""

    def __init__(
        self, url: str, spool: Path, *, num_groups: int, batch: int, num_threads: int
    ) -> None:
        upgrade(url)
        self._spool = Spool(spool, max_bytes=1 << 30)
        self._url = url
        self._num_groups = num_groups
        self._batch = batch
        self._rng = np.random.default_rng(0)
        self.store = TrajectoryStore(url)
        self.run_id = self.store.open_run("benchmark", {})
        self._engine = open_engine(url)
        self._inserts = DetailInserts(self._engine.dialect)
        self._threads = ThreadPoolExecutor(num_threads)

    def close(self) -> None:
        """Give threads and connections back."""
        self._threads.shutdown()
        self.store.close()
        self._engine.dispose()

    def contenders(self) -> dict[str, Callable[[], float]]:
        """Name to a function that writes one round's groups and returns the seconds."""
        return {
            "driver": self._driver,
            "rows": self._rows,
            "groups": self._groups,
            "writer": self._writer_thread,
            "single": self._single,
        }

    def _fresh(self) -> list[NewGroup]:
        return [make_group(self._rng) for _ in range(self._num_groups)]

    def _batches(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        return [items[start : start + self._batch] for start in range(0, len(items), self._batch)]

    def _made(self) -> list[GroupRows]:
        return [self.store.group_rows(self.run_id, group) for group in self._fresh()]

    def _driver(self) -> float:
        batches = [_driver_rows(some, self._inserts) for some in self._batches(self._made())]
        started = time.perf_counter()
        for batch in batches:
            with writing(self._engine, self._url, doing="the benchmark") as connection:
                for statement, rows in batch:
                    _execute_many(connection, statement, rows)
        return time.perf_counter() - started

    def _rows(self) -> float:
        batches = self._batches(self._made())
        started = time.perf_counter()
        for batch in batches:
            self.store.add_groups(batch)
        return time.perf_counter() - started

    def _single(self) -> float:
        groups = self._fresh()
        started = time.perf_counter()
        for group in groups:
            self.store.add_group(self.run_id, group)
        return time.perf_counter() - started

    def _writer_thread(self) -> float:
        limits = WriterLimits(max_batch_groups=self._batch)
        groups = self._fresh()
        writer = GroupWriter(self.store, self.run_id, spool=self._spool, limits=limits).start()
        started = time.perf_counter()
        outcomes = set(self._threads.map(writer.add, groups))
        seconds = time.perf_counter() - started
        writer.close()
        if outcomes != {Outcome.COMMITTED}:
            raise SystemExit(f"expected every group to be committed, got {sorted(outcomes)}")
        return seconds

    def _groups(self) -> float:
        batches = self._batches(self._fresh())
        started = time.perf_counter()
        for batch in batches:
            self.store.add_groups([self.store.group_rows(self.run_id, group) for group in batch])
        return time.perf_counter() - started


def _execute_many(connection: Connection, statement: str, rows: list[Any]) -> None:
    cursor = connection.connection.cursor()
    cursor.executemany(statement, rows)
    cursor.close()


def _driver_rows(groups: Sequence[GroupRows], inserts: DetailInserts) -> list[Statement]:
    """Statements and their rows, as the driver takes them."""
    tasks = {one.group_id: new_id() for one in groups}
    task_rows = [
        {
            "id": tasks[one.group_id],
            "run_id": one.run_id,
            "source": one.task.source,
            "prompt": one.task.prompt,
            "answer": one.task.answer,
            "split": one.task.split,
            "metadata_json": one.task.metadata,
            "content_key": one.content_key,
            "created_at": one.created_at,
        }
        for one in groups
    ]
    group_rows = [one.group | {"task_id": tasks[one.group_id]} for one in groups]
    trajectories = [
        (*row, tasks[one.group_id]) for one in groups for row in one.details.trajectories
    ]
    return [
        _statement(TaskRow, task_rows, inserts),
        _statement(RolloutGroup, group_rows, inserts),
        (inserts.trajectories.statement, trajectories),
        (inserts.tokens.statement, [row for one in groups for row in one.details.tokens]),
    ]


def _statement(table: type[Base], rows: list[dict[str, Any]], inserts: DetailInserts) -> Statement:
    bulk = BulkInsert(table, list(rows[0]), inserts.tokens.dialect)
    return bulk.statement, [bulk.row(row) for row in rows]


@contextmanager
def _database(url: str | None) -> Iterator[tuple[str, Path]]:
    """A database and a directory for the writer's spool."""
    with tempfile.TemporaryDirectory() as directory:
        yield url or f"sqlite:///{Path(directory) / 'mentor.db'}", Path(directory) / "spool"


def measure(
    url: str | None, *, rounds: int, num_groups: int, batch: int, num_threads: int
) -> dict[str, Any]:
    """Run all contenders; the result as JSON."""
    with _database(url) as (chosen, spool):
        bench = Bench(chosen, spool, num_groups=num_groups, batch=batch, num_threads=num_threads)
        try:
            seconds = _rounds(bench.contenders(), rounds=rounds)
        finally:
            bench.close()
        backend = parse_url(chosen).get_backend_name()
    speed = {
        name: statistics.median(num_groups / one for one in times)
        for name, times in seconds.items()
    }
    share = {
        name: statistics.median(
            driver / one for driver, one in zip(seconds["driver"], times, strict=True)
        )
        for name, times in seconds.items()
    }
    return {
        "benchmark": "store_writes",
        "processor": processor(),
        "database": backend,
        "rounds": rounds,
        "groups_a_round": num_groups,
        "groups_a_transaction": batch,
        "trajectories_a_group": NUM_TRAJECTORIES,
        "tokens_a_trajectory": NUM_TOKENS,
        "groups_per_s": {name: round(value, 1) for name, value in speed.items()},
        "share_of_driver": {name: round(value, 3) for name, value in share.items()},
    }


def _rounds(contenders: dict[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    for run in contenders.values():
        run()  # connections, statement caches, pages of the file
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(run())
        report_progress(f"round {number + 1} of {rounds}")
    return seconds


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", help="an empty database (default: a temporary SQLite file)")
    parser.add_argument("--rounds", type=positive_int, default=7)
    parser.add_argument("--groups", type=positive_int, default=256, help="groups a round")
    parser.add_argument("--batch", type=positive_int, default=32, help="groups a transaction")
    parser.add_argument("--threads", type=positive_int, default=8, help="adding threads (writer)")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    arguments = parser.parse_args()
    result = measure(
        arguments.url,
        rounds=arguments.rounds,
        num_groups=arguments.groups,
        batch=arguments.batch,
        num_threads=arguments.threads,
    )
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['database']}, {result['groups_a_transaction']} groups a transaction")
    for name, speed in result["groups_per_s"].items():
        print(
            f"{name:8} {speed:9.1f} groups/s {result['share_of_driver'][name]:6.2f} of the driver"
        )


if __name__ == "__main__":
    main()
