"""Backups as docs/operations.md takes them, while a service writes, are sound and complete."""

import shutil
import sqlite3
import subprocess
import threading
import time

import pytest
from store_samples import group

from mentor_serve.store import TrajectoryStore, database_check


@pytest.fixture
def busy(migrated_file, tmp_path):
    """A database with two writers at work; what they were told is stored, and how to stop them."""
    path = tmp_path / "mentor.db"
    shutil.copy(migrated_file, path)
    url = f"sqlite:///{path}"
    stop, failures = threading.Event(), []
    acknowledged = []
    with TrajectoryStore(url) as store:
        run_id = store.open_run("test", {})

        def write(number):
            try:
                while not stop.is_set():
                    made = group(number=number, num_on_policy=6)
                    store.add_group(run_id, made)
                    acknowledged.append(made.group_id)
            except Exception as error:
                failures.append(error)

        writers = [threading.Thread(target=write, args=(number,)) for number in range(2)]
        for writer in writers:
            writer.start()
        while len(acknowledged) < 20:
            assert not failures
            time.sleep(0.01)
        yield path, acknowledged
        stop.set()
        for writer in writers:
            writer.join()
    assert failures == []


def by_vacuum(source, target):
    connection = sqlite3.connect(source)
    connection.execute("VACUUM INTO ?", (str(target),))
    connection.close()


def by_backup(source, target):
    """The online backup interface, which `sqlite3 FILE .backup TARGET` calls as well."""
    with sqlite3.connect(source) as connection, sqlite3.connect(target) as copy:
        connection.backup(copy)
    connection.close()
    copy.close()


def by_command(source, target):
    if shutil.which("sqlite3") is None:
        pytest.skip("the sqlite3 command is not installed")
    subprocess.run(
        ["sqlite3", str(source), ".timeout 10000", f".backup '{target}'"], check=True, timeout=120
    )


@pytest.mark.parametrize("take", [by_vacuum, by_backup, by_command])
def test_a_backup_taken_during_writes_is_sound_and_complete(busy, tmp_path, take):
    path, acknowledged = busy
    before = list(acknowledged)
    backup = tmp_path / "backup.db"
    take(path, backup)
    assert len(acknowledged) >= len(before)
    url = f"sqlite:///{backup}"
    report = database_check(url)
    assert report["problems"] == []
    with TrajectoryStore(url) as restored:
        run_id = restored.find_run("test")
        number = restored.count_groups(run_id)["ready"]
        assert number >= len(before)
        leased = restored.lease_groups(run_id, num_groups=number, owner="a", lease_s=60)
        assert set(before) <= {item.group_id for item in leased}
        assert {len(item.trajectories) for item in leased} == {7}
        restored.add_group(run_id, group())  # and the service goes on with it
