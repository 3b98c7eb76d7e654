"""A learner in a process of its own that tells where it is, and a collector that feeds it.

The process runs the real loop on a real database and directories. The only additions are probes
around the stages of a step, which say through a pipe when a stage begins and ends, so that the
parent can end the process in the middle of a stage of its choice.
"""

from __future__ import annotations

import functools
import multiprocessing
import signal
import threading
import time
from collections import defaultdict
from contextlib import suppress

import torch
from learner_samples import FakeBroadcaster, make_learner, stored_group, tiny_model

from mentor_serve.learner import TorchBackend, archive
from mentor_serve.learner.archive import LearnerArchive
from mentor_serve.store import TrajectoryStore

STAGES = ("restore", "lease", "update", "checkpoint", "snapshot", "commit", "publish")
MAX_STALENESS = 4
GROUPS_A_STEP = 2
_MODEL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
"""0.9 million parameters: writing them takes long enough to be killed in the middle of it."""
_BEGIN, _END, _PUBLISHED = "begin", "end", "published"


def learner_in(home, store, run_id, *, broadcaster=None):
    """The learner of the killed process; also what an undisturbed run is made with."""
    return make_learner(
        store,
        run_id,
        home,
        broadcaster=broadcaster,
        load=functools.partial(tiny_model, **_MODEL),
        prompts_per_step=GROUPS_A_STEP,
        max_staleness=MAX_STALENESS,
        # A killed process frees the lock on its directories when the system has buried it.
        lock_timeout_s=10.0,
    )


def learn(url, run_id, home, pipe):
    """Main function of the process: train for ever."""
    torch.set_num_threads(1)
    send = functools.partial(_send, pipe)
    store = TrajectoryStore(url)
    store.lease_groups = _probed(store.lease_groups, "lease", send)
    store.commit_update = _probed(store.commit_update, "commit", send)
    TorchBackend.step = _probed(TorchBackend.step, "update", send)
    TorchBackend.save = _probed(TorchBackend.save, "checkpoint", send)
    LearnerArchive.restore = _probed(LearnerArchive.restore, "restore", send)
    archive.write_snapshot = _probed(archive.write_snapshot, "snapshot", send)
    learner = learner_in(home, store, run_id, broadcaster=PipeBroadcaster(send))
    learner.start()
    learner.run(threading.Event())


class PipeBroadcaster(FakeBroadcaster):
    """Says what a replica would have been given, and takes a while about it."""

    def __init__(self, send):
        super().__init__()
        self._send = send

    def publish(self, snapshot):
        self._send(_BEGIN, "publish")
        self._send(_PUBLISHED, (snapshot.version, snapshot.sha256))
        time.sleep(0.005)
        report = super().publish(snapshot)
        self._send(_END, "publish")
        return report


def _probed(function, stage, send):
    @functools.wraps(function)
    def probed(*args, **kwargs):
        send(_BEGIN, stage)
        result = function(*args, **kwargs)
        send(_END, stage)
        return result

    return probed


def _send(pipe, kind, value):
    pipe.send((kind, value, time.monotonic()))


class LearnerProcess:
    """One life of the learner, and what it said."""

    def __init__(self, url, run_id, home):
        # Started processes come from a server that has imported everything: they start at once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["mentor_serve.learner", "mentor_serve.store", "transformers.models.llama"]
        )
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=learn, args=(url, run_id, home, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._begun = {}
        self.seconds = defaultdict(list)
        """Stage -> how long each completed one took."""
        self.published = []
        """(version, sha256) as replicas were given them."""

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self._process.kill()  # harmless where a test has done so

    def wait_for(self, condition, *, deadline, what):
        """Listen until `condition()`; fails at `deadline` (monotonic) and when the process ends."""
        while not condition():
            assert time.monotonic() < deadline, f"no {what} in time"
            assert self._process.is_alive(), f"the learner ended by itself before {what}"
            self._listen(0.01)

    def kill_in(self, stage, *, delay_s, deadline):
        """End the process `delay_s` after it begins `stage`; returns the stage it died in.

        What it said before this call counts where nobody has listened to it yet.
        """
        self.wait_for(lambda: stage in self._begun, deadline=deadline, what=stage)
        time.sleep(max(0.0, self._begun[stage] + delay_s - time.monotonic()))
        return self.kill()

    def forget(self):
        """Listen to everything that was said so far."""
        while self._listen(0.0):
            pass

    def kill(self):
        """SIGKILL; returns the innermost stage that had begun and not ended, or "between"."""
        self._process.kill()
        self._process.join(timeout=20)
        assert self._process.exitcode == -signal.SIGKILL
        with suppress(EOFError):
            while self._listen(0.0):
                pass
        self._pipe.close()
        return max(self._begun, key=self._begun.__getitem__, default="between")

    def _listen(self, timeout_s):
        """Take one message; False where none came."""
        if not self._pipe.poll(timeout_s):
            return False
        kind, value, moment = self._pipe.recv()
        if kind == _BEGIN:
            self._begun[value] = moment
        elif kind == _END:
            self.seconds[value].append(moment - self._begun.pop(value))
        else:
            self.published.append(value)
        return True


class Collector:
    """Keeps groups ready from a thread, sampled under the live version; some come too late."""

    def __init__(self, url, run_id, *, seed):
        self._store = TrajectoryStore(url)
        self._run_id = run_id
        self._next_seed = seed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._collect, name="collector", daemon=True)
        self.stored = {}
        """Group id -> group, for every group that the store confirmed."""

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_error):
        self._stop.set()
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()
        self._store.close()

    def _collect(self):
        while not self._stop.wait(0.005):
            if self._store.count_groups(self._run_id)["ready"] >= 3 * GROUPS_A_STEP:
                continue
            live = self._store.live_version(self._run_id)
            version = 0 if live is None else live.version
            if len(self.stored) % 7 == 6:
                version = max(0, version - MAX_STALENESS - 2)
            group = stored_group(self._next_seed, version=version)
            assert self._store.add_group(self._run_id, group)
            self.stored[group.group_id] = group
            self._next_seed += 1
