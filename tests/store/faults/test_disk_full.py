"""No space left: on the database's disk, and on the spool's.

With root's rights a tmpfs of a few megabytes is a real disk that is really full. Without, SQLite's
own bound (`PRAGMA max_page_count`, the same SQLITE_FULL) stands in for the database's disk, and the
spool's part is skipped.
"""

import os
import sqlite3
import subprocess
import threading
import time

import pytest
from books import Books
from fault_processes import open_writer
from sqlalchemy import event
from store_samples import group

from mentor_serve.store import TrajectoryStore, upgrade
from mentor_serve.store.writer import Outcome

DEADLINE_S = 120.0
DISK_BYTES = 4 << 20


def mount(directory):
    """Whether `directory` is now a small disk of its own."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(directory)]
    return (
        os.getuid() == 0
        and subprocess.run(command, check=False, capture_output=True).returncode == 0
    )


@pytest.fixture
def small_disk(tmp_path):
    """A directory with a few megabytes of space, or None."""
    directory = tmp_path / "disk"
    is_mounted = mount(directory)
    yield directory if is_mounted else None
    if is_mounted:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(directory, *, leave):
    """Take the disk's space but for `leave` bytes; returns the file that holds it."""
    ballast = directory / "ballast"
    stats = os.statvfs(directory)
    ballast.write_bytes(bytes(max(0, stats.f_bavail * stats.f_frsize - leave)))
    return ballast


def until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def limit_pages(store, num_pages):
    """Let the database grow by so many pages; returns a function that lifts the limit."""

    def set_limit(connection, _record):
        (used,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {used + num_pages}")

    event.listen(store._engine, "connect", set_limit)
    store.close()

    def lift():
        event.remove(store._engine, "connect", set_limit)
        store.close()

    return lift


class Locked:
    """Another process, as it were, that holds SQLite's write lock."""

    def __init__(self, path):
        self._path = path

    def __enter__(self):
        self._connection = sqlite3.connect(self._path, isolation_level=None)
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, *_error):
        self._connection.execute("ROLLBACK")
        self._connection.close()


class Adding:
    """A thread that adds groups until it is told to stop."""

    def __init__(self, writer, acknowledged):
        self._writer = writer
        self._acknowledged = acknowledged
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._add, daemon=True)

    def start(self):
        self._thread.start()

    def stop(self):
        self._stop.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def _add(self):
        while not self._stop.is_set():
            new = group(number=len(self._acknowledged))
            self._writer.add(new)
            self._acknowledged.append(new.group_id)


def test_a_full_database_disk_is_an_outage(small_disk, tmp_path):
    home = tmp_path if small_disk is None else small_disk
    url = f"sqlite:///{home / 'mentor.db'}"
    upgrade(url)
    spool = tmp_path / "spool"
    with TrajectoryStore(url) as store:
        run_id = store.open_run("test", {})
        if small_disk is None:
            free = limit_pages(store, 40)
        else:
            free = fill(small_disk, leave=200_000).unlink
        writer = open_writer(store, run_id, spool)
        acknowledged, outcomes = [], []
        while outcomes.count(Outcome.SPOOLED) < 20:
            new = group(number=len(acknowledged))
            outcomes.append(writer.add(new))
            acknowledged.append(new.group_id)
        assert outcomes[0] is Outcome.COMMITTED
        assert writer.status().is_away
        assert "full" in writer.status().reason
        free()
        until(lambda: writer.status().num_spooled == 0)
        assert writer.add(group()) is Outcome.COMMITTED
        writer.close()
        books = Books(url, run_id, [spool])
        books.check(acknowledged, is_settled=True)
        books.close()


def test_a_full_spool_disk_makes_collection_wait(small_disk, tmp_path):
    if small_disk is None:
        pytest.skip("needs a tmpfs of its own: root's rights and mount")
    url = f"sqlite:///{tmp_path / 'mentor.db'}"
    upgrade(url)
    with TrajectoryStore(url, timeout_s=0.05) as store:
        run_id = store.open_run("test", {})
        spool = small_disk / "spool"
        writer = open_writer(store, run_id, spool)
        ballast = fill(small_disk, leave=100_000)
        acknowledged = []
        collect = Adding(writer, acknowledged)
        with Locked(tmp_path / "mentor.db"):
            collect.start()
            until(lambda: writer.status().is_full and writer.status().num_buffered == 1)
            stuck = len(acknowledged)
            assert stuck == writer.status().num_spooled > 0
            assert list(spool.glob("*.partial")) == []
            ballast.unlink()
            until(lambda: len(acknowledged) > stuck + 5)
        until(lambda: writer.status().num_spooled == 0)
        collect.stop()
        writer.close()
        books = Books(url, run_id, [spool])
        books.check(acknowledged, is_settled=True)
        books.close()
