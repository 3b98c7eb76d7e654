"""The loop on a real store: what a step does, and what happens when something goes wrong."""

import math
import threading
import time

import pytest
import torch
from learner_samples import (
    FakeBroadcaster,
    consumed_steps,
    make_learner,
    stored_group,
    timed_out,
    tiny_model,
)

from mentor_serve.errors import LeaseLost, StoreError, WeightsError
from mentor_serve.learner import LearnerPhase, TorchBackend, TrainingOptions
from mentor_serve.learner.records import tracked_numbers
from mentor_serve.store import TrajectoryStore, upgrade
from mentor_serve.types import Guidance
from mentor_serve.weights import list_snapshots, read_snapshot


@pytest.fixture
def broadcaster():
    return FakeBroadcaster()


@pytest.fixture
def start(store, run_id, tmp_path, broadcaster):
    """Starts learners and closes them after the test."""
    learners = []

    def make(**options):
        learner = make_learner(store, run_id, tmp_path, **({"broadcaster": broadcaster} | options))
        learner.start()
        learners.append(learner)
        return learner

    yield make
    for learner in learners:
        learner.close()


def add_groups(store, run_id, seeds, **options):
    for seed in seeds:
        store.add_group(run_id, stored_group(seed, **options))


def event_kinds(store, run_id):
    return [event.kind for event in reversed(store.recent_events(run_id))]


class BrokenBackend(TorchBackend):
    """Raises in `step` as often as told, after having changed the weights."""

    def __init__(self, failures):
        super().__init__(TrainingOptions(learning_rate=1e-2))
        self.failures = failures

    def step(self, batch, config):
        if self.failures:
            self.failures -= 1
            with torch.no_grad():
                self.model.get_input_embeddings().weight.add_(1.0)
            raise RuntimeError("out of memory")
        return super().step(batch, config)


def test_a_new_run_starts_with_version_0_published_and_live(start, store, run_id, broadcaster):
    learner = start()
    assert broadcaster.versions == [0]
    assert store.live_version(run_id).version == 0
    assert learner.guidance == Guidance(policy_version=0, step=0, alpha=1.0, gamma=999.0)
    expected = tiny_model().state_dict()
    for name, tensor in broadcaster.published[0].state_dict.items():
        assert torch.equal(tensor, expected[name])


def test_too_few_groups_are_no_step(start, store, run_id):
    learner = start()
    add_groups(store, run_id, [0])
    assert learner.run_step() is None
    assert store.count_groups(run_id)["ready"] == 1
    assert learner.status().phase is LearnerPhase.WAITING


def test_a_step_consumes_commits_and_publishes(start, store, run_id, broadcaster, url):
    learner = start(alpha_steps=4, entropy_quantile=1.0)
    add_groups(store, run_id, range(2))
    largest = max(
        float(item.rollout.entropies.max())
        for seed in range(2)
        for item in stored_group(seed).trajectories[:4]
    )
    record = learner.run_step()
    assert (record.step, record.policy_version, record.num_groups) == (1, 1, 2)
    # Update 0 used alpha(0) = 1; rollouts of version 1 are told alpha(1) = (1 + cos(pi/4)) / 2.
    assert record.alpha == 1.0
    assert record.gamma == pytest.approx(largest)
    assert learner.guidance.alpha == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert learner.guidance.gamma == pytest.approx(largest)
    assert set(consumed_steps(url).values()) == {("consumed", 1)}
    assert store.latest_update(run_id).loss == pytest.approx(record.loss)
    version = store.live_version(run_id)
    assert (version.version, version.parent_version, version.step) == (1, 0, 1)
    assert version.alpha == pytest.approx(learner.guidance.alpha)
    assert broadcaster.versions == [0, 1]
    assert broadcaster.published[1].guidance == learner.guidance
    assert read_snapshot(broadcaster.published[1].path).sha256 == version.sha256


def test_published_weights_are_not_changed_by_the_next_step(start, store, run_id, broadcaster):
    learner = start()
    add_groups(store, run_id, range(2))
    kept = {name: item.clone() for name, item in broadcaster.published[0].state_dict.items()}
    learner.run_step()
    for name, tensor in broadcaster.published[0].state_dict.items():
        assert torch.equal(tensor, kept[name])
    changed = broadcaster.published[1].state_dict
    assert any(not torch.equal(changed[name], kept[name]) for name in kept)


def test_groups_older_than_max_staleness_become_stale(start, store, run_id):
    learner = start(max_staleness=1)
    for step in range(2):
        add_groups(store, run_id, [10 * step, 10 * step + 1], version=step)
        learner.run_step()
    add_groups(store, run_id, [50, 51], version=0)
    add_groups(store, run_id, [52, 53], version=1)
    record = learner.run_step()
    assert store.count_groups(run_id)["stale"] == 2
    assert record.num_stale == 2
    assert (record.staleness_max, record.staleness_mean) == (1, 1.0)


def test_run_waits_for_groups_and_stops_at_max_steps(start, store, run_id):
    learner = start(max_steps=2)
    stop = threading.Event()
    thread = threading.Thread(target=learner.run, args=(stop,))
    thread.start()
    add_groups(store, run_id, range(6))
    thread.join(timeout=60)
    assert not thread.is_alive()
    status = learner.status()
    assert (status.step, status.phase, status.published_version) == (2, LearnerPhase.FINISHED, 2)
    assert store.count_groups(run_id)["ready"] == 2
    learner.close()
    assert learner.status().phase is LearnerPhase.FINISHED  # and not just stopped


def test_a_paused_learner_takes_nothing_and_resumes(start, store, run_id):
    learner = start(max_steps=1)
    learner.pause()
    add_groups(store, run_id, range(2))
    stop = threading.Event()
    thread = threading.Thread(target=learner.run, args=(stop,))
    thread.start()
    wait_until(lambda: learner.status().phase is LearnerPhase.PAUSED)
    assert learner.status().is_paused
    assert store.count_groups(run_id)["ready"] == 2
    learner.resume()
    thread.join(timeout=60)
    assert learner.status().step == 1


def test_run_ends_when_asked_to(start):
    learner = start()
    stop = threading.Event()
    thread = threading.Thread(target=learner.run, args=(stop,))
    thread.start()
    stop.set()
    thread.join(timeout=30)
    assert learner.status().phase is LearnerPhase.STOPPED


def test_a_failed_step_gives_groups_back_and_undoes_the_model(
    start, store, run_id, broadcaster, tmp_path
):
    learner = start(backend=BrokenBackend(failures=1))
    add_groups(store, run_id, range(2))
    with pytest.raises(RuntimeError, match="out of memory"):
        learner.run_step()
    assert store.count_groups(run_id)["ready"] == 2
    assert learner.status().num_failures == 1
    assert learner.status().last_error == "RuntimeError: out of memory"
    learner.run_step()
    assert learner.status().num_failures == 0
    assert event_kinds(store, run_id) == ["step_failed"]
    # The spoiled weights left no trace: the same as a learner that never failed.
    assert broadcaster.versions == [0, 1]
    assert store.live_version(run_id).sha256 == undisturbed_sha256(tmp_path / "other", range(2))


def undisturbed_sha256(home, seeds):
    """Hash of the version that one undisturbed step on these groups makes."""
    home.mkdir()
    url = f"sqlite:///{home / 'mentor.db'}"
    upgrade(url)
    with TrajectoryStore(url) as store:
        run_id = store.open_run("undisturbed", {})
        add_groups(store, run_id, seeds)
        learner = make_learner(store, run_id, home)
        learner.start()
        learner.run_step()
        learner.close()
        return store.latest_version(run_id).sha256


def test_groups_that_fail_three_times_are_given_up(start, store, run_id, url):
    learner = start(max_steps=1)
    add_groups(store, run_id, [0], poisoned=True)
    add_groups(store, run_id, range(1, 4))
    learner.run(threading.Event())
    assert learner.status().step == 1
    counts = store.count_groups(run_id)
    assert (counts["failed"], counts["consumed"]) == (2, 2)
    assert event_kinds(store, run_id).count("step_failed") == 3
    assert "groups_failed" in event_kinds(store, run_id)


def test_a_full_disk_is_not_blamed_on_the_groups(start, store, run_id, monkeypatch):
    learner = start()
    add_groups(store, run_id, range(2))

    def no_space(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mentor_serve.learner.archive.write_snapshot", no_space)
        for _ in range(5):
            with pytest.raises(OSError, match="No space left"):
                learner.run_step()
    assert store.count_groups(run_id)["ready"] == 2
    assert learner.run_step().step == 1


def test_a_lost_lease_rolls_the_model_back(start, store, run_id, monkeypatch, tmp_path):
    learner = start()
    add_groups(store, run_id, range(2))

    def lost(*_args, **_kwargs):
        raise LeaseLost("expected to hold 2 leases, held 0")

    with monkeypatch.context() as patch:
        patch.setattr(store, "commit_update", lost)
        assert learner.run_step() is None
    assert [item.version for item in list_snapshots(tmp_path / "weights")] == [0, 1]
    assert learner.status().policy_version == 0
    assert learner.run_step().step == 1
    assert event_kinds(store, run_id) == ["lease_lost"]
    assert store.live_version(run_id).sha256 == undisturbed_sha256(tmp_path / "other", range(2))


def test_a_commit_whose_answer_was_lost_still_counts(start, store, run_id, monkeypatch, url):
    learner = start()
    add_groups(store, run_id, range(4))
    commit = store.commit_update

    def commit_and_lose_the_answer(*args, **kwargs):
        commit(*args, **kwargs)
        raise StoreError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(store, "commit_update", commit_and_lose_the_answer)
        with pytest.raises(StoreError):
            learner.run_step()
    assert learner.run_step().step == 2
    assert sorted(step for _, step in consumed_steps(url).values()) == [1, 1, 2, 2]


def test_a_failed_publication_is_repeated_before_the_next_step(start, store, run_id, broadcaster):
    learner = start()
    add_groups(store, run_id, range(4))
    broadcaster.failure = timed_out()
    assert learner.run_step().step == 1
    assert store.live_version(run_id).version == 0
    with pytest.raises(WeightsError, match="replica 0 did not answer"):
        learner.run_step()
    assert store.count_groups(run_id)["ready"] == 2
    broadcaster.failure = None
    assert learner.run_step().step == 2
    assert broadcaster.versions == [0, 1, 2]
    assert event_kinds(store, run_id) == ["publish_failed", "step_failed"]


def test_only_the_newest_checkpoints_and_snapshots_are_kept(start, store, run_id, tmp_path):
    learner = start(keep_checkpoints=2, keep_snapshots=2)
    add_groups(store, run_id, range(8))
    for _ in range(4):
        learner.run_step()
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("v*"))
    assert names == ["v000003", "v000004"]
    assert [item.version for item in list_snapshots(tmp_path / "weights")] == [2, 3, 4]


def test_rollback_makes_a_new_version_of_old_weights(start, store, run_id, broadcaster):
    learner = start()
    add_groups(store, run_id, range(4))
    learner.run_step()
    learner.run_step()
    add_groups(store, run_id, [10, 11], version=2)
    record = learner.rollback(0)
    assert (record.version, record.parent_version, record.step) == (3, 0, 2)
    assert store.live_version(run_id).version == 3
    assert store.count_groups(run_id)["stale"] == 2
    for name, tensor in broadcaster.published[0].state_dict.items():
        assert torch.equal(broadcaster.published[-1].state_dict[name], tensor)
    add_groups(store, run_id, [12, 13], version=3)
    assert (learner.run_step().step, learner.guidance.policy_version) == (3, 4)


def test_rollback_to_an_unknown_version_changes_nothing(start, store, run_id):
    learner = start()
    with pytest.raises(WeightsError, match="expected a version of this run, got 7"):
        learner.rollback(7)
    assert store.latest_version(run_id).version == 0


def test_a_second_learner_of_the_same_directories_is_refused(start, store, run_id, tmp_path):
    start()
    with pytest.raises(WeightsError, match="expected to be the only learner"):
        make_learner(store, run_id, tmp_path).start()


def test_another_runs_weights_are_never_touched(start, store, tmp_path):
    start().close()
    before = list_snapshots(tmp_path / "weights")
    other = make_learner(store, store.open_run("other", {}), tmp_path)
    with pytest.raises(WeightsError, match="give each run a directory of its own"):
        other.start()
    assert list_snapshots(tmp_path / "weights") == before
    assert len(before) == 1


def test_leases_are_renewed_during_a_long_step(start, store, run_id):
    class SlowBackend(TorchBackend):
        def step(self, batch, config):
            time.sleep(1.0)
            # Another learner would get the groups now, had the lease of 0.6 s not been renewed.
            stolen.extend(store.lease_groups(run_id, num_groups=1, owner="thief", lease_s=60.0))
            return super().step(batch, config)

    stolen = []
    learner = start(backend=SlowBackend(), lease_s=0.6)
    add_groups(store, run_id, range(2))
    assert learner.run_step().step == 1
    assert stolen == []


def test_observers_see_each_update_and_cannot_stop_training(start, store, run_id):
    learner = start()
    seen = []

    def broken(record):
        raise ValueError("no dashboard")

    learner.add_observer(broken)
    learner.add_observer(lambda record: seen.append(tracked_numbers(record)))
    add_groups(store, run_id, range(2))
    assert learner.run_step().step == 1
    assert seen[0]["step"] == 1.0
    assert "created_at" not in seen[0]
    assert event_kinds(store, run_id) == ["observer_failed"]


def test_a_learner_that_was_not_started_says_so(store, run_id, tmp_path):
    learner = make_learner(store, run_id, tmp_path)
    with pytest.raises(RuntimeError, match="call start"):
        learner.run_step()
    assert learner.status().phase is LearnerPhase.STARTING


def wait_until(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)
