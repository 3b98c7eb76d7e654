"""kill -9 of a learning process, twenty times: nothing is lost, repeated or half done.

`test_learner_crashes.py` dies at exact points; here the system ends a real process at random
moments, in the middle of whatever it is doing, while a collector goes on storing groups.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from functools import partial
from statistics import median

import pytest
from killed_learner import GROUPS_A_STEP, STAGES, Collector, LearnerProcess, learner_in
from sqlalchemy import create_engine, text

from mentor_serve.store import TrajectoryStore
from mentor_serve.weights import read_snapshot, snapshot_path

NUM_KILLS = 20
RECOVERY_S = 30.0
"""From a kill to the next new version."""


def rows(url, query):
    engine = create_engine(url)
    with engine.connect() as connection:
        found = connection.execute(text(query)).all()
    engine.dispose()
    return found


def assert_books_balance(url, collector):
    """Every group has one fate, and every update exactly the groups it says."""
    stored = set(collector.stored)
    groups = rows(url, "SELECT id, status, consumed_by_step FROM rollout_groups ORDER BY id")
    updates = dict(rows(url, "SELECT step, num_groups FROM updates ORDER BY step"))
    versions = rows(url, "SELECT version, step FROM policy_versions ORDER BY version")
    assert stored <= {row.id for row in groups}
    assert {row.status for row in groups} <= {"ready", "leased", "consumed", "stale"}
    for row in groups:
        assert (row.status == "consumed") == (row.consumed_by_step is not None)
    consumed = Counter(row.consumed_by_step for row in groups if row.status == "consumed")
    assert consumed == updates == dict.fromkeys(range(1, len(updates) + 1), GROUPS_A_STEP)
    assert versions == [(number, number) for number in range(len(updates) + 1)]


def assert_live_snapshot_is_intact(url, home):
    """One version is live, the newest or the one before it, and its file has its hash."""
    ((live, sha256),) = rows(url, "SELECT version, sha256 FROM policy_versions WHERE is_live")
    ((newest,),) = rows(url, "SELECT max(version) FROM policy_versions")
    assert live in (newest - 1, newest)
    assert read_snapshot(snapshot_path(home / "weights", live), verify=True).sha256 == sha256


def consumed_by_step(url, collector):
    """The groups of each update, oldest first."""
    query = "SELECT consumed_by_step, id FROM rollout_groups WHERE status = 'consumed' ORDER BY id"
    steps = {}
    for step, group_id in rows(url, query):
        steps.setdefault(step, []).append(collector.stored[group_id])
    return [steps[step] for step in sorted(steps)]


def undisturbed_versions(database, home, steps):
    """Hash of every version of a run that trains on the same groups and is never killed."""
    home.mkdir()
    (home / "mentor.db").write_bytes(database.read_bytes())
    with TrajectoryStore(f"sqlite:///{home / 'mentor.db'}") as store:
        run_id = store.open_run("test", {})
        learner = learner_in(home, store, run_id)
        learner.start()
        for groups in steps:
            for group in groups:
                store.add_group(run_id, group)
            assert learner.run_step() is not None
        learner.close()
        return [(item.version, item.sha256) for item in store.list_versions(run_id)]


def has_reached(store, run_id, version):
    """Whether replicas serve a version above this one."""
    live = store.live_version(run_id)
    return live is not None and live.version > version


def kill_plan(rng):
    """The stage of every kill, each stage about as often.

    The first life has nothing to restore, and after the last kill one more has to prove itself.
    """
    stages = [STAGES[number % len(STAGES)] for number in range(NUM_KILLS - 2)]
    rng.shuffle(stages)
    return ["update", *stages, "publish"]


def live_until_killed(life, store, run_id, *, stage, delay_s, deadline):
    """Let the process reach a new version and end it in `stage`; returns where it died.

    A process that is to die while it restores is not given the time to make a version.
    """
    if stage != "restore":
        newest = store.latest_version(run_id)
        oldest = 0 if newest is None else newest.version
        life.wait_for(
            partial(has_reached, store, run_id, oldest), deadline=deadline, what="new version"
        )
        life.forget()
    return life.kill_in(stage, delay_s=delay_s, deadline=deadline)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_lose_and_repeat_nothing(url, store, run_id, tmp_path, empty_database):
    rng = random.Random(20)
    usual_s = dict.fromkeys(STAGES, 0.01)
    published, died_in = [], Counter()
    killed_at = time.monotonic()
    with Collector(url, run_id, seed=0) as collector:
        for stage in kill_plan(rng):
            with LearnerProcess(url, run_id, tmp_path) as life:
                where = live_until_killed(
                    life,
                    store,
                    run_id,
                    stage=stage,
                    delay_s=rng.random() * usual_s[stage],
                    deadline=killed_at + RECOVERY_S,
                )
            killed_at = time.monotonic()
            died_in[where] += 1
            assert_books_balance(url, collector)
            assert_live_snapshot_is_intact(url, tmp_path)
            published += life.published
            usual_s |= {name: median(seconds) for name, seconds in life.seconds.items()}
    assert died_in.total() == NUM_KILLS
    assert len(died_in) > len(STAGES) // 2, f"the kills were not spread: {died_in}"

    versions = rows(url, "SELECT version, sha256 FROM policy_versions ORDER BY version")
    assert set(published) <= set(versions)
    assert published == sorted(published)
    assert {row.id for row in rows(url, "SELECT id FROM rollout_groups")} == set(collector.stored)
    # Twenty deaths later the weights are, bit for bit, those of a run that nobody disturbed.
    steps = consumed_by_step(url, collector)
    assert undisturbed_versions(empty_database, tmp_path / "undisturbed", steps) == versions
