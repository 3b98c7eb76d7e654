"""The writer: batches, order, outages, refusals, bounds."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime

import numpy as np
import pytest
from store_samples import group, task, trajectory

from mentor_serve.errors import SchemaOutOfDate, StoreError, StoreUnavailable
from mentor_serve.store import TrajectoryStore
from mentor_serve.store.group_files import FiledGroup, decode_group, encode_group
from mentor_serve.store.outage import Outage
from mentor_serve.store.spool import Spool
from mentor_serve.store.writer import GroupWriter, Outcome, WriterLimits

DEADLINE_S = 60.0


class Database:
    """A real store that can go away, and that can be held in the middle of a transaction."""

    def __init__(self, store):
        self._store = store
        self.error = None
        self.transactions = []
        """Ids of the groups of each transaction that was committed."""
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_asked = threading.Event()

    def group_rows(self, run_id, new, *, created_at=None):
        return self._store.group_rows(run_id, new, created_at=created_at)

    def add_groups(self, rows):
        self.is_asked.set()
        assert self.may_go_on.wait(DEADLINE_S)
        if self.error is not None:
            raise self.error
        done = self._store.add_groups(rows)
        self.transactions.append([one.group_id for one in rows])
        return done

    def add_event(self, run_id, **event):
        if self.error is not None:
            raise self.error
        self._store.add_event(run_id, **event)

    @property
    def order(self):
        return [group_id for ids in self.transactions for group_id in ids]


@pytest.fixture
def database(store):
    return Database(store)


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "spool", max_bytes=10**7)


@contextmanager
def writing(database, run_id, spool, **options):
    writer = GroupWriter(
        database, run_id, spool=spool, outage=Outage(first_s=0.005, longest_s=0.02), **options
    ).start()
    try:
        yield writer
    finally:
        database.may_go_on.set()
        writer.close(DEADLINE_S)


def until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def away():
    return StoreUnavailable("the server closed the connection")


def kinds(store, run_id):
    return [event.kind for event in reversed(store.recent_events(run_id))]


def test_a_group_is_committed_when_add_returns(database, store, run_id, spool):
    with writing(database, run_id, spool) as writer:
        assert writer.add(group()) is Outcome.COMMITTED
        assert store.count_groups(run_id)["ready"] == 1
        assert spool.num_groups == 0


def test_what_waits_goes_into_one_transaction(database, store, run_id, spool):
    database.may_go_on.clear()
    with writing(database, run_id, spool) as writer, ThreadPoolExecutor(9) as threads:
        first = threads.submit(writer.add, group())
        assert database.is_asked.wait(DEADLINE_S)
        rest = [threads.submit(writer.add, group(number=number % 3)) for number in range(8)]
        until(lambda: writer.status().num_buffered == 9)
        database.may_go_on.set()
        assert {one.result() for one in [first, *rest]} == {Outcome.COMMITTED}
    assert [len(ids) for ids in database.transactions] == [1, 8]
    assert store.count_groups(run_id)["ready"] == 9


def test_a_transaction_is_bounded(database, run_id, spool):
    database.may_go_on.clear()
    limits = WriterLimits(max_batch_groups=3)
    with (
        writing(database, run_id, spool, limits=limits) as writer,
        ThreadPoolExecutor(8) as threads,
    ):
        added = [threads.submit(writer.add, group()) for _ in range(8)]
        until(lambda: writer.status().num_buffered == 8)
        database.may_go_on.set()
        assert {one.result() for one in added} == {Outcome.COMMITTED}
    assert max(len(ids) for ids in database.transactions) <= 3


def test_a_full_buffer_holds_its_callers_back(database, run_id, spool):
    database.may_go_on.clear()
    limits = WriterLimits(max_buffered_groups=2)
    with (
        writing(database, run_id, spool, limits=limits) as writer,
        ThreadPoolExecutor(5) as threads,
    ):
        added = [threads.submit(writer.add, group()) for _ in range(5)]
        until(lambda: writer.status().num_buffered == 2)
        database.may_go_on.set()
        assert {one.result() for one in added} == {Outcome.COMMITTED}
    assert sorted(len(ids) for ids in database.transactions)[-1] <= 2


def test_a_large_group_enters_an_empty_buffer(database, run_id, spool):
    limits = WriterLimits(max_buffered_bytes=1, max_batch_bytes=1)
    with writing(database, run_id, spool, limits=limits) as writer:
        assert writer.add(group()) is Outcome.COMMITTED


def bad_group(**options):
    """Well-formed until the database looks at it: two samples of one index."""
    return dataclasses.replace(group(**options), trajectories=[trajectory(), trajectory()])


def test_a_bad_group_does_not_take_its_batch_with_it(database, store, run_id, spool):
    database.may_go_on.clear()
    good = [group(number=number) for number in range(4)]
    bad = bad_group(number=9)
    with writing(database, run_id, spool) as writer, ThreadPoolExecutor(5) as threads:
        added = [threads.submit(writer.add, one) for one in [good[0], bad, *good[1:]]]
        until(lambda: writer.status().num_buffered == 5)
        database.may_go_on.set()
        outcomes = [one.result() for one in added]
        assert outcomes[1] is Outcome.REJECTED
        assert outcomes.count(Outcome.COMMITTED) == 4
        until(lambda: "group_rejected" in kinds(store, run_id))
        assert writer.status().num_rejected == 1
    assert store.count_groups(run_id)["ready"] == 4
    (kept,) = spool.rejected_directory.glob("*.group")
    assert decode_group(kept.read_bytes()).group.group_id == bad.group_id
    assert "StoreError" in kept.with_suffix(".reason.txt").read_text()


def test_a_group_that_makes_no_rows_is_kept_as_well(database, run_id, spool):
    broken = group()
    broken.trajectories[0].rollout.entropies = np.zeros(2, np.float32)
    with writing(database, run_id, spool) as writer:
        assert writer.add(broken) is Outcome.REJECTED
        assert writer.add(group()) is Outcome.COMMITTED
    (kept,) = spool.rejected_directory.glob("*.group")
    assert len(decode_group(kept.read_bytes()).group.trajectories[0].rollout.entropies) == 2


def test_without_a_spool_a_refused_group_is_an_error(database, run_id):
    with writing(database, run_id, None) as writer:
        with pytest.raises(StoreError, match="cannot be stored"):
            writer.add(bad_group())
        assert writer.add(group()) is Outcome.COMMITTED


@pytest.mark.parametrize("error", [away(), SchemaOutOfDate("no such table: tasks")])
def test_while_the_database_is_away_groups_are_spooled_in_order(
    database, store, run_id, spool, error
):
    database.error = error
    groups = [group(number=number) for number in range(6)]
    with writing(database, run_id, spool) as writer:
        for one in groups[:4]:
            assert writer.add(one) is Outcome.SPOOLED
        status = writer.status()
        assert (status.is_away, status.num_spooled, status.is_full) == (True, 4, False)
        assert status.spooled_bytes == spool.num_bytes > 0
        assert str(error) in status.reason
        assert sum(store.count_groups(run_id).values()) == 0
        database.error = None
        for one in groups[4:]:
            writer.add(one)
        until(lambda: store.count_groups(run_id)["ready"] == 6 and spool.num_groups == 0)
        until(lambda: kinds(store, run_id) == ["store_back"])
        assert not writer.status().is_away
    assert database.order == [one.group_id for one in groups]
    assert list(spool.directory.glob("*.group")) == []


def test_new_groups_queue_behind_the_spool(database, run_id, spool):
    database.error = away()
    limits = WriterLimits(max_batch_groups=1)
    groups = [group(number=number) for number in range(8)]
    with writing(database, run_id, spool, limits=limits) as writer:
        for one in groups[:5]:
            writer.add(one)
        database.may_go_on.clear()
        database.error = None
        with ThreadPoolExecutor(1) as threads:
            # The replay is in its first transaction and has four more to go.
            database.is_asked.clear()
            assert database.is_asked.wait(DEADLINE_S)
            added = [threads.submit(writer.add, one) for one in groups[5:]]
            database.may_go_on.set()
            for one in added:
                one.result()
        until(lambda: spool.num_groups == 0)
    assert database.order == [one.group_id for one in groups]


def test_a_full_spool_makes_the_collector_wait(database, store, run_id, tmp_path):
    database.error = away()
    spool = Spool(tmp_path / "small", max_bytes=1)
    with writing(database, run_id, spool) as writer, ThreadPoolExecutor(2) as threads:
        assert writer.add(group()) is Outcome.SPOOLED
        waiting = [threads.submit(writer.add, group()) for _ in range(2)]
        until(lambda: writer.status().is_full and writer.status().num_buffered == 2)
        assert not any(one.done() for one in waiting)
        database.error = None
        for one in waiting:
            assert one.result(DEADLINE_S) in (Outcome.COMMITTED, Outcome.SPOOLED)
        until(lambda: store.count_groups(run_id)["ready"] == 3)
        assert not writer.status().is_full


def test_without_a_spool_add_waits_for_the_database(database, run_id):
    database.error = away()
    with writing(database, run_id, None) as writer, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(writer.add, group())
        until(lambda: writer.status().is_away)
        assert not waiting.done()
        database.error = None
        assert waiting.result(DEADLINE_S) is Outcome.COMMITTED


def test_a_new_writer_stores_what_a_former_one_left(database, store, run_id, spool, clock):
    database.error = away()
    groups = [group(number=number) for number in range(3)]
    with writing(database, run_id, spool) as writer:
        for one in groups:
            writer.add(one)
    assert spool.num_groups == 3
    # One of them was committed, and the process died before it removed the file.
    store.add_group(run_id, groups[1])
    clock.advance(3600)
    database.error = None
    again = Spool(spool.directory, max_bytes=10**7)
    with writing(database, run_id, again):
        until(lambda: again.num_groups == 0)
    assert store.count_groups(run_id)["ready"] == 3
    leased = store.lease_groups(run_id, num_groups=3, owner="learner", lease_s=60)
    assert {one.group_id for one in leased} == {one.group_id for one in groups}
    created = {row.created_at for row in store.trajectories(run_id)}
    assert max(created) < clock.now


def test_damaged_files_and_those_of_other_runs_are_set_aside(database, store, run_id, spool):
    database.error = away()
    with writing(database, run_id, spool) as writer:
        for number in range(2):
            writer.add(group(number=number))
    other = FiledGroup(run_id="another", created_at=datetime.now(UTC), group=group())
    spool.put(other.group.group_id, encode_group(other))
    damaged, good, foreign = spool.oldest(max_groups=3, max_bytes=10**7)
    damaged.write_bytes(damaged.read_bytes()[:-3])
    database.error = None
    with writing(database, run_id, spool):
        until(lambda: spool.num_groups == 0)
        until(lambda: kinds(store, run_id).count("group_rejected") == 2)
    assert store.count_groups(run_id)["ready"] == 1
    kept = sorted(path.name for path in spool.rejected_directory.glob("*.group"))
    assert kept == sorted([damaged.name, foreign.name])
    assert not good.exists()


def test_a_refused_group_in_the_spool_is_set_aside_alone(database, store, run_id, spool):
    database.error = away()
    groups = [group(number=1), bad_group(number=2), group(number=3)]
    with writing(database, run_id, spool) as writer:
        for one in groups:
            assert writer.add(one) is Outcome.SPOOLED
        database.error = None
        until(lambda: store.count_groups(run_id)["ready"] == 2 and spool.num_groups == 0)
    assert len(list(spool.rejected_directory.glob("*.group"))) == 1


def test_what_was_not_acknowledged_raises_at_the_end(database, run_id):
    database.error = away()
    with ThreadPoolExecutor(1) as threads, writing(database, run_id, None) as writer:
        waiting = threads.submit(writer.add, group())
        until(lambda: writer.status().num_buffered == 1)
        writer.close(DEADLINE_S)
        with pytest.raises(StoreError, match="closed before"):
            waiting.result(DEADLINE_S)
        with pytest.raises(StoreError, match="after the writer was closed"):
            writer.add(group())


def test_a_writer_that_dies_says_so_and_holds_nobody_back(database, run_id, spool, monkeypatch):
    with writing(database, run_id, spool) as writer:
        writer.check_health()
        monkeypatch.setattr(writer._events, "write", lambda: 1 / 0)
        writer.add(group())
        until(lambda: not writer._thread.is_alive())
        with pytest.raises(StoreError, match="closed"):
            writer.add(group())
        with pytest.raises(StoreError, match="ended by itself") as caught:
            writer.check_health()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_two_writers_may_share_a_spool(database, store, run_id, spool):
    database.error = away()
    with writing(database, run_id, spool) as writer:
        for number in range(20):
            writer.add(group(number=number))
    database.error = None
    one, other = (Spool(spool.directory, max_bytes=10**7) for _ in range(2))
    with writing(database, run_id, one), writing(database, run_id, other):
        until(lambda: one.num_groups == other.num_groups == 0)
    assert store.count_groups(run_id)["ready"] == 20
    assert list(spool.directory.rglob("*.group")) == []


NUM_THREADS = 6


def test_collectors_that_share_tasks_and_versions_never_deadlock(url, run_id):
    """Batches with the same tasks in different orders, some groups even twice, at once."""
    rng = np.random.default_rng(7)
    again = [group(number=number % 5) for number in range(12)]

    def collect(seed):
        order = np.random.default_rng(seed)
        with TrajectoryStore(url) as store:
            for _ in range(6):
                batch = [
                    group(number=int(number), version=int(version))
                    for number, version in zip(
                        order.permutation(12), order.integers(0, 4, 12), strict=True
                    )
                ]
                batch += [again[int(index)] for index in order.permutation(12)[:4]]
                order.shuffle(batch)
                # A deadlock would be a StoreUnavailable (40P01 on PostgreSQL).
                store.add_groups([store.group_rows(run_id, one) for one in batch])

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        for done in [threads.submit(collect, int(seed)) for seed in rng.integers(0, 2**31, 6)]:
            done.result(DEADLINE_S)
    with TrajectoryStore(url) as store:
        assert 6 * 6 * 12 < store.count_groups(run_id)["ready"] <= 6 * 6 * 12 + 12
        assert len(store.list_tasks(run_id)) == 12


def test_the_task_of_many_groups_is_one_row(store, run_id):
    rows = [store.group_rows(run_id, group(number=number % 2)) for number in range(10)]
    assert store.add_groups([*rows, rows[0]]) == [True] * 10 + [False]
    assert store.add_groups(rows) == [False] * 10
    assert store.add_groups([]) == []
    assert [item.task for item in store.list_tasks(run_id)] in (
        [task(0), task(1)],
        [task(1), task(0)],
    )
    assert len(store.trajectories(run_id, limit=100)) == 30
