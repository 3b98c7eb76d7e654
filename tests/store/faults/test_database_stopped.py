"""PostgreSQL is stopped and started again in the middle of a run.

MENTOR_TEST_OUTAGE_S sets how long it stays away (default 10 s).
"""

import logging
import os
import threading
import time

import postgres_server
import pytest
from books import Books
from fault_processes import consume, open_writer
from store_samples import group, version_record

from mentor_serve.errors import StoreUnavailable
from mentor_serve.store import TrajectoryStore, new_id, upgrade
from mentor_serve.store.writer import Outcome

OUTAGE_S = float(os.environ.get("MENTOR_TEST_OUTAGE_S", "10"))
NUM_THREADS = 3
DEADLINE_S = 120.0
log = logging.getLogger(__name__)

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.slow,
    pytest.mark.timeout(300 + 2 * OUTAGE_S),
    pytest.mark.skipif(
        postgres_server.find_binaries() is None, reason="needs pg_ctl: the test stops a server"
    ),
]


class Run:
    """Threads that collect and one that trains, until they are told to stop."""

    def __init__(self, store, run_id, writer):
        self._store = store
        self._run_id = run_id
        self._writer = writer
        self._stop = threading.Event()
        self.acknowledged = []
        self.outcomes = []
        self.num_updates = 0
        self.failures = []
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), daemon=True)
            for work in [*[self._collect] * NUM_THREADS, self._learn]
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error):
        self._stop.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()

    def _guarded(self, work):
        try:
            work()
        except BaseException as error:
            self.failures.append(error)
            raise

    def _collect(self):
        while not self._stop.wait(0.02):
            new = group(number=len(self.acknowledged) % 11)
            outcome = self._writer.add(new)
            self.acknowledged.append(new.group_id)
            self.outcomes.append(outcome)

    def _learn(self):
        owner = new_id()
        while not self._stop.wait(0.01):
            try:
                self.num_updates += consume(self._store, self._run_id, owner) is not None
            except StoreUnavailable:
                # What was leased when the store went is still ours: nobody else trains.
                time.sleep(0.05)
                self._release(owner)

    def _release(self, owner):
        try:
            self._store.release_leases(self._run_id, owner=owner)
        except StoreUnavailable:
            return

    def wait_for(self, condition):
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert not self.failures
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def server():
    made = postgres_server.PostgresServer()
    try:
        made.start()
        yield made
    finally:
        made.remove()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_run_outlives_an_outage_of_its_database(server, mode, tmp_path):
    upgrade(server.url)
    spool = tmp_path / "spool"
    with TrajectoryStore(server.url, timeout_s=5.0) as store:
        run_id = store.open_run("test", {})
        store.add_version(run_id, version_record(0))
        writer = open_writer(store, run_id, spool)
        with Run(store, run_id, writer) as run:
            run.wait_for(lambda: len(run.acknowledged) > 20 and run.num_updates > 5)
            server.stop(mode=mode)
            before, updates_before = len(run.acknowledged), run.num_updates
            time.sleep(OUTAGE_S)
            during = len(run.acknowledged) - before
            status = writer.status()
            assert status.is_away
            assert status.num_spooled > 0
            server.start()
            run.wait_for(lambda: writer.status().num_spooled == 0 and not writer.status().is_away)
            run.wait_for(lambda: run.num_updates > updates_before + 5)
        writer.close()
        books = Books(server.url, run_id, [spool])
        summary = books.check(run.acknowledged, is_settled=True)
        kinds = [event.kind for event in store.recent_events(run_id)]
        books.close()
    assert during > NUM_THREADS, f"collection stood still: {summary}"
    assert run.outcomes.count(Outcome.SPOOLED) >= during, summary
    assert "store_back" in kinds
    log.info(f"away for {OUTAGE_S:g} s ({mode}): {during} groups acknowledged meanwhile; {summary}")
