"""The store goes away in the middle of training: what a cut-off commit becomes, and who waits."""

import threading

import pytest
from learner_samples import FakeBroadcaster, consumed_steps, make_learner, stored_group

from mentor_serve.errors import LeaseLost, RunClaimed, StoreUnavailable, WeightsError
from mentor_serve.learner import TorchBackend, TrainingOptions
from mentor_serve.store import TrajectoryStore
from mentor_serve.weights import list_snapshots


class CountingBackend(TorchBackend):
    """Knows how often it computed an update."""

    def __init__(self):
        super().__init__(TrainingOptions(learning_rate=1e-2))
        self.num_steps = 0

    def step(self, batch, config):
        self.num_steps += 1
        return super().step(batch, config)


class CutStore:
    """A real store whose calls can be cut off, before or after they took effect."""

    def __init__(self, store):
        self._store = store
        self.before = {}
        """Method -> how many of its next calls do not reach the database."""
        self.after = {}
        """Method -> how many of its next calls take effect, but are not answered."""

    def __getattr__(self, name):
        method = getattr(self._store, name)

        def call(*args, **kwargs):
            self._count(self.before, name)
            result = method(*args, **kwargs)
            self._count(self.after, name)
            return result

        return call

    @staticmethod
    def _count(calls, name):
        if calls.get(name, 0) > 0:
            calls[name] -= 1
            raise StoreUnavailable("server closed the connection unexpectedly")


@pytest.fixture
def groups(store, run_id):
    for seed in range(4):
        store.add_group(run_id, stored_group(seed))


@pytest.fixture
def cut(store):
    return CutStore(store)


@pytest.fixture
def backend():
    return CountingBackend()


@pytest.fixture
def learner(cut, run_id, tmp_path, backend, groups):
    made = make_learner(cut, run_id, tmp_path, backend=backend, broadcaster=FakeBroadcaster())
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(empty_database, tmp_path_factory):
    """Hashes of the versions of a run that nobody disturbed."""
    home = tmp_path_factory.mktemp("undisturbed")
    (home / "mentor.db").write_bytes(empty_database.read_bytes())
    with TrajectoryStore(f"sqlite:///{home / 'mentor.db'}") as store:
        run_id = store.open_run("test", {})
        for seed in range(4):
            store.add_group(run_id, stored_group(seed))
        learner = make_learner(store, run_id, home)
        learner.start()
        while learner.run_step() is not None:
            pass
        learner.close()
        return [item.sha256 for item in store.list_versions(run_id)]


@pytest.fixture
def check(store, run_id, url, tmp_path, undisturbed):
    """Two updates, each of two groups, with the weights of an undisturbed run."""

    def verify():
        versions = store.list_versions(run_id)
        assert [item.sha256 for item in versions] == undisturbed
        assert [item.sha256 for item in list_snapshots(tmp_path / "weights")] == undisturbed
        steps = sorted(consumed_steps(url).values())
        assert steps == [("consumed", 1), ("consumed", 1), ("consumed", 2), ("consumed", 2)]
        assert store.latest_update(run_id).step == 2

    return verify


def kinds(store, run_id):
    return [event.kind for event in reversed(store.recent_events(run_id))]


@pytest.mark.parametrize("effect", ["before", "after"])
def test_a_commit_that_was_cut_off_is_settled_and_not_computed_again(
    effect, learner, cut, store, run_id, backend, check
):
    told = []
    learner.add_observer(lambda record: told.append(record.step))
    getattr(cut, effect)["commit_update"] = 1
    with pytest.raises(StoreUnavailable):
        learner.run_step()
    assert told == []
    assert store.count_groups(run_id)["consumed"] == (2 if effect == "after" else 0)
    assert learner.run_step().step == 1
    assert backend.num_steps == 1
    assert learner.run_step().step == 2
    assert told == [1, 2]
    check()
    assert kinds(store, run_id) == ["store_back"]


def test_an_outage_that_lasts_settles_later(learner, cut, backend, check):
    cut.after["commit_update"] = 1
    cut.before |= {"version": 3, "latest_version": 3, "release_leases": 3}
    for _ in range(4):
        with pytest.raises(StoreUnavailable):
            learner.run_step()
    assert learner.run_step().step == 1
    assert learner.run_step().step == 2
    assert backend.num_steps == 2
    check()


def test_a_commit_that_ends_after_the_first_look_is_found_by_the_second(
    learner, store, run_id, backend, check, monkeypatch
):
    """The server is still at work on the transaction whose connection was lost."""
    late = []
    commit = store.commit_update

    def cut_off(*args, **kwargs):
        late.append((args, kwargs))
        raise StoreUnavailable("connection lost in COMMIT")

    with monkeypatch.context() as patch:
        patch.setattr(store, "commit_update", cut_off)
        with pytest.raises(StoreUnavailable):
            learner.run_step()

    def after_the_late_one(*args, **kwargs):
        while late:
            late_args, late_kwargs = late.pop()
            commit(*late_args, **late_kwargs)
        return commit(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(store, "commit_update", after_the_late_one)
        assert learner.run_step().step == 1
    assert backend.num_steps == 1
    assert learner.run_step().step == 2
    check()


def test_an_update_whose_groups_went_to_another_learner_is_dropped(
    learner, cut, store, run_id, url, backend
):
    cut.before["commit_update"] = 1
    with pytest.raises(StoreUnavailable):
        learner.run_step()
    store.release_leases(run_id)
    taken = store.lease_groups(run_id, num_groups=2, owner="another", lease_s=600)
    record = learner.run_step()
    assert record.step == 1
    assert backend.num_steps == 2
    consumed = {key for key, (status, _) in consumed_steps(url).items() if status == "consumed"}
    assert len(consumed) == 2
    assert consumed.isdisjoint(group.group_id for group in taken)
    assert "lease_lost" in kinds(store, run_id)


def test_a_dead_learner_with_an_unsettled_commit_loses_and_repeats_nothing(
    learner, cut, store, run_id, tmp_path, check
):
    cut.after["commit_update"] = 1
    with pytest.raises(StoreUnavailable):
        learner.run_step()
    learner._directory_lock.release()
    learner._claim.release()
    after = make_learner(store, run_id, tmp_path)
    after.start()
    while after.run_step() is not None:
        pass
    after.close()
    check()


def test_groups_are_given_back_when_the_store_goes_before_the_commit(
    learner, cut, store, run_id, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(
            "mentor_serve.learner.archive.LearnerArchive.save",
            lambda *_args, **_kwargs: (_ for _ in ()).throw(StoreUnavailable("away")),
        )
        with pytest.raises(StoreUnavailable):
            learner.run_step()
    assert store.count_groups(run_id)["leased"] == 0
    assert learner.run_step().step == 1


def test_the_loop_waits_out_an_outage_and_says_so_once(learner, cut, store, run_id, check):
    num_failures = 5
    cut.before |= {"mark_stale": num_failures, "add_event": 1}
    learner._outage = type(learner._outage)(first_s=0.001, longest_s=0.002)
    stop = threading.Event()
    learner.add_observer(lambda record: stop.set() if record.step == 2 else None)
    loop = threading.Thread(target=learner.run, args=(stop,), daemon=True)
    loop.start()
    loop.join(timeout=120)
    assert not loop.is_alive()
    check()
    assert cut.before["mark_stale"] == 0
    assert "step_failed" not in kinds(store, run_id)
    assert learner.status().last_error is None


def test_a_second_learner_elsewhere_on_the_same_database_is_refused(
    learner, store, run_id, tmp_path, url
):
    with TrajectoryStore(url) as other:
        second = make_learner(other, run_id, tmp_path / "another-machine")
        with pytest.raises(RunClaimed, match="expected to be the only learner"):
            second.start()
        assert learner.run_step().step == 1
        learner.close()
        with pytest.raises(WeightsError):  # free now; what it lacks are the files of the first
            second.start()


def test_a_learner_whose_claim_was_taken_makes_no_update(learner, store, run_id, monkeypatch):
    def taken(**_options):
        raise RunClaimed("expected to be the only learner, but process 7 on elsewhere trains it")

    monkeypatch.setattr(learner._claim, "hold", taken)
    with pytest.raises(RunClaimed):
        learner.run_step()
    assert store.count_groups(run_id)["ready"] == 4
    assert kinds(store, run_id) == ["step_failed"]


def test_lost_leases_are_no_outage():
    assert not issubclass(LeaseLost, StoreUnavailable)
