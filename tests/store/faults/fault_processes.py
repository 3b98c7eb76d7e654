"""Processes that tests kill: collectors with a spool, and a learner that only keeps the books."""

import itertools
import multiprocessing
import random
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

from store_samples import group, update_record, version_record

from mentor_serve.errors import StoreUnavailable
from mentor_serve.store import TrajectoryStore, new_id
from mentor_serve.store.outage import Outage
from mentor_serve.store.spool import Spool
from mentor_serve.store.writer import GroupWriter

GROUPS_A_STEP = 2
NUM_THREADS = 3
LEASE_S = 600.0


class UnreliableStore:
    """Cuts off some transactions, before or after they took effect."""

    def __init__(self, store, seed):
        self._store = store
        self._random = random.Random(seed)

    def group_rows(self, run_id, new, *, created_at=None):
        return self._store.group_rows(run_id, new, created_at=created_at)

    def add_groups(self, rows):
        luck = self._random.random()
        if luck < 0.15:
            raise StoreUnavailable("cut off before")
        self._store.add_groups(rows)
        if luck > 0.85:
            raise StoreUnavailable("cut off after")

    def add_event(self, run_id, **event):
        self._store.add_event(run_id, **event)


def open_writer(store, run_id, directory, *, max_bytes=10**8):
    """A writer whose pauses are short enough for tests."""
    return GroupWriter(
        store,
        run_id,
        spool=Spool(Path(directory), max_bytes=max_bytes),
        outage=Outage(first_s=0.01, longest_s=0.1),
    ).start()


def collect(url, run_id, directory, pipe, seed):
    """Main function of a collector: add groups for ever, say the id of each acknowledged one."""
    store = TrajectoryStore(url)
    writer = open_writer(UnreliableStore(store, seed), run_id, directory)
    pipes = threading.Lock()

    def add(first):
        for number in itertools.count(first, NUM_THREADS):
            new = group(number=number % 7, version=number % 3)
            outcome = writer.add(new)
            with pipes:
                pipe.send((new.group_id, outcome.value))

    for first in range(1, NUM_THREADS):
        threading.Thread(target=add, args=(first,), daemon=True).start()
    add(0)


def learn(url, run_id, _directory, pipe, _seed):
    """Main function of a learner: consume for ever, say each step."""
    store = TrajectoryStore(url)
    # A killed process keeps its claim until the system, or the server, has noticed.
    store.claim_run(run_id).hold(timeout_s=60.0)
    store.release_leases(run_id)
    if store.latest_version(run_id) is None:
        store.add_version(run_id, version_record(0))
    owner = new_id()
    while True:
        step = consume(store, run_id, owner)
        if step is None:
            time.sleep(0.002)
        else:
            pipe.send((step, "consumed"))


def consume(store, run_id, owner):
    """One update's worth of bookkeeping; None where too few groups are ready."""
    leased = store.lease_groups(run_id, num_groups=GROUPS_A_STEP, owner=owner, lease_s=LEASE_S)
    if not leased:
        return None
    step = store.latest_version(run_id).version + 1
    commit(store, run_id, owner, [one.group_id for one in leased], step)
    return step


def commit(store, run_id, owner, group_ids, step):
    """As the learner does it: a commit that was cut off is looked for before it is repeated."""
    pause = Outage(first_s=0.01, longest_s=0.2)
    is_known = True
    while True:
        try:
            if is_known or store.version(run_id, step) is None:
                is_known = False
                store.commit_update(
                    run_id,
                    owner=owner,
                    group_ids=group_ids,
                    update=update_record(step),
                    version=version_record(step),
                )
        except StoreUnavailable as error:
            pause.fail(error)
            time.sleep(pause.wait_s)
        else:
            return


class Victim:
    """One process and what it said."""

    def __init__(self, target, url, run_id, directory, seed):
        # Started processes come from a server that has imported everything: they start at once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mentor_serve.store.writer", "store_samples"])
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=target, args=(url, run_id, str(directory), theirs, seed), daemon=True
        )
        self._process.start()
        theirs.close()
        self.said = []

    def wait_for(self, num_messages, deadline):
        """Listen until so much was said."""
        while len(self.said) < num_messages:
            assert time.monotonic() < deadline, f"{len(self.said)} of {num_messages} messages"
            assert self._process.is_alive(), "the process ended by itself"
            self._listen(0.05)

    def kill(self):
        """SIGKILL; then what it had said is complete."""
        self._process.kill()
        self._process.join(timeout=30)
        assert self._process.exitcode == -signal.SIGKILL
        with suppress(EOFError):
            while self._listen(0.0):
                pass
        self._pipe.close()

    def _listen(self, timeout_s):
        if not self._pipe.poll(timeout_s):
            return False
        self.said.append(self._pipe.recv())
        return True
