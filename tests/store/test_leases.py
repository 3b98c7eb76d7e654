import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from store_samples import group

from mentor_serve.store import TrajectoryStore, database_check
from mentor_serve.store.prune import PrunePlan, prune

HERE = Path(__file__).parent


def add_groups(store, run_id, number, **options):
    ids = []
    for index in range(number):
        new = group(number=index, num_on_policy=1, num_mixed=0, **options)
        store.add_group(run_id, new)
        ids.append(new.group_id)
    return ids


def lease_ids(store, run_id, number, owner="a", lease_s=60.0):
    leased = store.lease_groups(run_id, num_groups=number, owner=owner, lease_s=lease_s)
    return [item.group_id for item in leased]


def start(code, *arguments):
    """A Python process that sees this folder's helpers."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_lease_is_all_or_nothing_and_oldest_first(store, run_id):
    ids = add_groups(store, run_id, 3)
    assert lease_ids(store, run_id, 4) == []
    assert store.count_groups(run_id)["ready"] == 3
    assert lease_ids(store, run_id, 2) == ids[:2]
    assert lease_ids(store, run_id, 2) == []
    assert lease_ids(store, run_id, 1, owner="b") == ids[2:]


def test_runs_do_not_see_each_other(store, run_id):
    add_groups(store, run_id, 1)
    other = store.open_run("other", {})
    assert lease_ids(store, other, 1) == []


def test_an_expired_lease_goes_to_the_next_owner(store, run_id, clock):
    ids = add_groups(store, run_id, 2)
    assert lease_ids(store, run_id, 2, owner="dead", lease_s=30) == ids
    clock.advance(29)
    assert lease_ids(store, run_id, 2, owner="next") == []
    clock.advance(2)
    assert lease_ids(store, run_id, 2, owner="next") == ids


def test_a_renewed_lease_does_not_expire(store, run_id, clock):
    add_groups(store, run_id, 2)
    lease_ids(store, run_id, 2, owner="slow", lease_s=30)
    clock.advance(29)
    assert store.renew_leases("slow", 30) == 2
    assert store.renew_leases("nobody", 30) == 0
    clock.advance(29)
    assert lease_ids(store, run_id, 2, owner="next") == []


def test_leases_are_released_by_owner_or_all_together(store, run_id):
    add_groups(store, run_id, 3)
    lease_ids(store, run_id, 1, owner="a")
    lease_ids(store, run_id, 2, owner="b")
    assert store.release_leases(run_id, owner="a") == 1
    assert store.count_groups(run_id) == {
        "ready": 1,
        "leased": 2,
        "consumed": 0,
        "stale": 0,
        "failed": 0,
    }
    assert store.release_leases(run_id) == 2
    assert store.count_groups(run_id)["ready"] == 3


def test_groups_that_are_too_old_become_stale(store, run_id, clock):
    add_groups(store, run_id, 2, version=1)
    add_groups(store, run_id, 2, version=2)
    lease_ids(store, run_id, 1, owner="a", lease_s=10)
    assert store.mark_stale(run_id, min_policy_version=2) == 1
    assert store.count_groups(run_id)["stale"] == 1
    clock.advance(11)
    assert store.mark_stale(run_id, min_policy_version=2) == 1
    assert store.mark_stale(run_id, min_policy_version=2) == 0
    assert store.count_groups(run_id) == {
        "ready": 2,
        "leased": 0,
        "consumed": 0,
        "stale": 2,
        "failed": 0,
    }


def test_an_owner_gives_up_the_groups_it_holds_and_no_others(store, run_id):
    ids = add_groups(store, run_id, 3)
    lease_ids(store, run_id, 1, owner="a")
    lease_ids(store, run_id, 1, owner="b")
    assert store.fail_groups(run_id, owner="a", group_ids=ids, error="loss is NaN") == 1
    counts = store.count_groups(run_id)
    assert (counts["failed"], counts["leased"], counts["ready"]) == (1, 1, 1)
    with store._read("x") as connection:
        rows = connection.exec_driver_sql("SELECT id, error, lease_owner FROM rollout_groups")
        assert ("loss is NaN", None) in [row[1:] for row in rows if row[0] == ids[0]]


def test_threads_that_lease_together_get_disjoint_groups(store, run_id):
    ids = add_groups(store, run_id, 24)
    taken = [[] for _ in range(6)]
    barrier = threading.Barrier(6)

    def learner(number):
        barrier.wait()
        while found := lease_ids(store, run_id, 2, owner=f"learner-{number}"):
            taken[number].extend(found)

    threads = [threading.Thread(target=learner, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = list(itertools.chain(*taken))
    # Two PostgreSQL transactions may each lock the other's second group and both give up.
    assert len(everything) == len(set(everything))
    assert sorted(everything + lease_ids(store, run_id, 24 - len(everything))) == ids


LEASER = """
import sys
from mentor_serve.store import TrajectoryStore
url, run_id, owner = sys.argv[1:]
with TrajectoryStore(url) as store:
    store.find_run("test")
    print("started", flush=True)
    sys.stdin.readline()
    misses = 0
    while misses < 3:
        found = store.lease_groups(run_id, num_groups=1, owner=owner, lease_s=3600)
        misses += not found
        for group in found:
            print(group.group_id, flush=True)
"""


def test_processes_that_lease_together_get_disjoint_groups(url, run_id):
    with TrajectoryStore(url) as store:
        ids = add_groups(store, run_id, 30)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LEASER, url, run_id, f"process-{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "started\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    taken = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(itertools.chain(*taken)) == ids


WRITER = """
import sys
from mentor_serve.store import TrajectoryStore
from store_samples import group
url, run_id = sys.argv[1:]
with TrajectoryStore(url) as store:
    for number in range(100000):
        new = group(number=number % 7)
        store.add_group(run_id, new)
        print(new.group_id, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_was_acknowledged(url, run_id):
    process = start(WRITER, url, run_id)
    acknowledged = [process.stdout.readline().strip() for _ in range(25)]
    os.kill(process.pid, signal.SIGKILL)
    acknowledged += process.communicate()[0].split()
    assert process.returncode == -signal.SIGKILL
    with TrajectoryStore(url) as store:
        number = store.count_groups(run_id)["ready"]
        # One more may have been committed in the moment before it would have been reported.
        assert number - len(acknowledged) in (0, 1)
        leased = store.lease_groups(run_id, num_groups=number, owner="a", lease_s=60)
        assert set(acknowledged) <= {item.group_id for item in leased}
        assert {len(item.trajectories) for item in leased} == {3}
    report = database_check(url)
    assert report["ok"], report["problems"]


def test_a_killed_learner_gives_its_groups_back(url, run_id, clock):
    with TrajectoryStore(url) as store:
        ids = add_groups(store, run_id, 2)
    code = """
import sys, time
from mentor_serve.store import TrajectoryStore
url, run_id = sys.argv[1:]
store = TrajectoryStore(url)
print(len(store.lease_groups(run_id, num_groups=2, owner="dead", lease_s=0.3)), flush=True)
time.sleep(60)
"""
    process = start(code, url, run_id)
    assert process.stdout.readline() == "2\n"
    process.kill()
    process.communicate()
    with TrajectoryStore(url) as store:
        store.release_leases(run_id, owner="dead")
        assert lease_ids(store, run_id, 2, owner="next") == ids


def test_old_tokens_of_finished_groups_can_be_pruned(store, run_id, clock, url):
    add_groups(store, run_id, 1, version=0)
    add_groups(store, run_id, 1, version=1)
    store.mark_stale(run_id, min_policy_version=1)
    clock.advance(60)
    done = prune(url, PrunePlan(what="tokens", keep_days=0), now=clock.now)
    assert done.num_token_rows == 1
    assert len(store.trajectories(run_id)) == 2
    assert len(lease_ids(store, run_id, 1)) == 1


def test_writers_wait_for_each_other(store, run_id):
    """Eight threads that write at once all succeed: nobody sees a locked database."""
    failures = []

    def write():
        try:
            for _ in range(5):
                store.add_group(run_id, group())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.count_groups(run_id)["ready"] == 40
    assert len(store.list_tasks(run_id)) == 1
