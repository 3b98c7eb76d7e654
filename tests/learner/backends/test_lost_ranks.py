"""kill -9 of one rank in the middle of an update: an error soon, then training goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
from backend_cases import (
    MORTAL,
    UPDATE,
    assert_identical,
    batch_of,
    rank_pids,
    wait_until_gone,
)
from learner_samples import consumed_steps, make_learner, stored_group, tiny_model

from mentor_serve.errors import LearnerWorkerLost
from mentor_serve.learner.backends.deepspeed import DeepSpeedBackend

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

NOTICED_WITHIN_S = 30.0
"""From the kill to the error; a shared machine may be slow, a hanging collective would take the
60 s of the call."""


@pytest.fixture(scope="module", params=MORTAL, ids=str)
def backend(request, ray_cluster):
    backend = request.param.make()
    backend.build(tiny_model())
    yield backend
    backend.close()


def test_a_killed_rank_is_noticed_and_training_goes_on(backend, tmp_path):
    # DeepSpeed's rank 0 also serves the ranks' meeting point.
    victim = 0 if isinstance(backend, DeepSpeedBackend) else 1
    backend.build(tiny_model())
    backend.step(batch_of(), UPDATE)
    backend.save(tmp_path)
    expected_metrics = backend.step(batch_of(1), UPDATE)
    expected = backend.full_state()
    pids = rank_pids(backend)
    killed_at = []

    def kill():
        os.kill(pids[victim], signal.SIGKILL)
        killed_at.append(time.monotonic())

    # One row a pass: many seconds of work, so that the kill falls into it.
    slow = replace(UPDATE, mini_batch_prompts=60, max_tokens_per_micro_batch=1)
    batch = batch_of(count=120)
    timer = threading.Timer(0.5, kill)
    timer.start()
    with pytest.raises(LearnerWorkerLost, match="train_on"):
        backend.step(batch, slow)
    timer.join()
    assert time.monotonic() - killed_at[0] < NOTICED_WITHIN_S
    # The others may hang in a collective operation: they are gone too.
    wait_until_gone(pids)
    with pytest.raises(LearnerWorkerLost, match="load a checkpoint"):
        backend.full_state()

    backend.load(tmp_path)
    assert not set(rank_pids(backend)) & set(pids)
    assert backend.step(batch_of(1), UPDATE) == expected_metrics
    assert_identical(backend.full_state(), expected)


def test_a_learner_returns_to_its_last_version_by_itself(backend, store, run_id, url, tmp_path):
    groups = [stored_group(seed) for seed in range(4)]
    for group in groups:
        store.add_group(run_id, group)
    learner = make_learner(store, run_id, tmp_path, backend=backend)
    learner.start()
    assert learner.run_step().step == 1
    victim = rank_pids(backend)[1]
    os.kill(victim, signal.SIGKILL)
    wait_until_gone([victim])
    with pytest.raises(LearnerWorkerLost):
        learner.run_step()
    assert learner.run_step().step == 2
    learner.close()
    fates = consumed_steps(url)
    steps = [1, 1, 2, 2]
    assert [fates[item.group_id] for item in groups] == [("consumed", step) for step in steps]
    assert [event.kind for event in store.recent_events(run_id)] == ["step_failed"]
