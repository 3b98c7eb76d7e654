"""Death at any point of a step, then a restart: the run ends as if nothing had happened.

`Killed` is a BaseException that no clean-up of the learner catches, so that nothing runs after it
that would not run after `kill -9`; two points are tried with a real process that ends at once.
"""

import json
import multiprocessing
import os
import signal

import pytest
import torch
from learner_samples import (
    FakeBroadcaster,
    consumed_steps,
    make_learner,
    stored_group,
)
from transformers import LlamaForCausalLM

from mentor_serve.errors import WeightsError
from mentor_serve.learner import TorchBackend, TrainingOptions
from mentor_serve.store import TrajectoryStore
from mentor_serve.weights import list_snapshots, read_snapshot, snapshot_path

NUM_STEPS = 3


class Killed(BaseException):
    """The process ends here."""


def kill(*_args, **_kwargs):
    raise Killed


def die(learner):
    """What the operating system does for a dead process."""
    learner._directory_lock.release()
    learner._claim.release()


def versions(store, run_id):
    return [(item.version, item.step, item.sha256) for item in store.list_versions(run_id)]


@pytest.fixture
def filled(store, run_id):
    for seed in range(2 * NUM_STEPS):
        store.add_group(run_id, stored_group(seed))
    return store


@pytest.fixture(scope="module")
def undisturbed(empty_database, tmp_path_factory):
    """Versions of a run that nobody disturbed."""
    home = tmp_path_factory.mktemp("undisturbed")
    (home / "mentor.db").write_bytes(empty_database.read_bytes())
    with TrajectoryStore(f"sqlite:///{home / 'mentor.db'}") as store:
        run_id = store.open_run("test", {})
        for seed in range(2 * NUM_STEPS):
            store.add_group(run_id, stored_group(seed))
        learner = make_learner(store, run_id, home)
        learner.start()
        for _ in range(NUM_STEPS):
            learner.run_step()
        learner.close()
        return versions(store, run_id)


def finish(store, run_id, home, url, expected, *, first_published):
    """Restart, run to the end, and compare with the undisturbed run."""
    broadcaster = FakeBroadcaster()
    learner = make_learner(store, run_id, home, broadcaster=broadcaster)
    learner.start()
    assert store.count_groups(run_id)["leased"] == 0
    assert broadcaster.versions == [first_published]
    assert store.live_version(run_id).version == first_published
    while learner.run_step() is not None:
        pass
    learner.close()
    assert versions(store, run_id) == expected
    steps = sorted(consumed_steps(url).values())
    assert steps == [("consumed", step) for step in (1, 1, 2, 2, 3, 3)]
    assert [item.sha256 for item in list_snapshots(home / "weights")] == [
        sha256 for _, _, sha256 in expected
    ]
    leftovers = [path.name for path in home.rglob(".tmp-*")]
    assert leftovers == []


POINTS = {
    "computing": ("mentor_serve.learner.backends.torch_backend.TorchBackend.step", 1),
    "inside the checkpoint": ("mentor_serve.learner.backends.torch_backend.TorchBackend.save", 1),
    "before the snapshot": ("mentor_serve.learner.archive.write_snapshot", 1),
    "before the commit": ("mentor_serve.store.TrajectoryStore.commit_update", 1),
    "before the publication": ("learner_samples.FakeBroadcaster.publish", 2),
    "before it is live": ("mentor_serve.store.TrajectoryStore.set_live", 2),
    "before pruning": ("mentor_serve.learner.archive.prune", 2),
}


@pytest.mark.parametrize("point", POINTS)
def test_death_at_any_point_loses_and_repeats_nothing(
    point, filled, run_id, tmp_path, url, undisturbed, monkeypatch
):
    target, version_after = POINTS[point]
    learner = make_learner(filled, run_id, tmp_path)
    learner.start()
    learner.run_step()
    with monkeypatch.context() as patch:
        patch.setattr(target, kill)
        with pytest.raises(Killed):
            learner.run_step()
    die(learner)
    finish(filled, run_id, tmp_path, url, undisturbed, first_published=version_after)


def test_death_right_after_the_commit_counts_the_step_once(
    filled, run_id, tmp_path, url, undisturbed, monkeypatch
):
    learner = make_learner(filled, run_id, tmp_path)
    learner.start()
    learner.run_step()
    commit = filled.commit_update

    def commit_and_die(*args, **kwargs):
        commit(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(filled, "commit_update", commit_and_die)
        with pytest.raises(Killed):
            learner.run_step()
    die(learner)
    finish(filled, run_id, tmp_path, url, undisturbed, first_published=2)


@pytest.mark.parametrize("target", ["write_snapshot", "LearnerArchive.save"])
def test_death_while_a_run_begins_lets_it_begin_again(
    target, filled, run_id, tmp_path, url, undisturbed, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(f"mentor_serve.learner.archive.{target}", kill)
        learner = make_learner(filled, run_id, tmp_path)
        with pytest.raises(Killed):
            learner.start()
    finish(filled, run_id, tmp_path, url, undisturbed, first_published=0)


def test_death_before_version_0_is_in_the_store_lets_it_begin_again(
    filled, run_id, tmp_path, url, undisturbed, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(filled, "add_version", kill)
        with pytest.raises(Killed):
            make_learner(filled, run_id, tmp_path).start()
    assert [item.version for item in list_snapshots(tmp_path / "weights")] == [0]
    finish(filled, run_id, tmp_path, url, undisturbed, first_published=0)


def die_inside(url, run_id, home, where):
    """Child process: one good step, then an end without any clean-up."""
    torch.set_num_threads(1)
    with TrajectoryStore(url) as store:
        learner = make_learner(store, run_id, home)
        learner.start()
        learner.run_step()

        def end(*_args, **_kwargs):
            os.kill(os.getpid(), signal.SIGKILL)

        if where == "snapshot":
            LlamaForCausalLM.save_pretrained = end
        else:
            FakeBroadcaster.publish = end
        learner.run_step()


@pytest.mark.parametrize(("where", "version_after"), [("snapshot", 1), ("publish", 2)])
def test_a_killed_process_leaves_what_a_restart_needs(
    where, version_after, filled, run_id, tmp_path, url, undisturbed
):
    process = multiprocessing.get_context("spawn").Process(
        target=die_inside, args=(url, run_id, tmp_path, where)
    )
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    left_over = list((tmp_path / "weights").glob(".tmp-*"))
    assert len(left_over) == (1 if where == "snapshot" else 0)
    finish(filled, run_id, tmp_path, url, undisturbed, first_published=version_after)


def spoil(path):
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def after_two_steps(store, run_id, home):
    learner = make_learner(store, run_id, home)
    learner.start()
    learner.run_step()
    learner.run_step()
    learner.close()


@pytest.mark.parametrize("name", ["backend/weights.safetensors", "backend/optimizer.pt", "rng.pt"])
def test_a_damaged_checkpoint_is_replaced_by_snapshot_and_older_optimiser(
    name, filled, run_id, tmp_path, undisturbed
):
    after_two_steps(filled, run_id, tmp_path)
    spoil(tmp_path / "checkpoints" / "v000002" / name)
    broadcaster = FakeBroadcaster()
    learner = make_learner(filled, run_id, tmp_path, broadcaster=broadcaster)
    learner.start()
    (event,) = filled.recent_events(run_id)
    assert event.kind == "checkpoint_unusable"
    assert name in event.message
    assert "the optimiser of v000001" in event.message
    assert learner.status().step == 2
    # The weights are exactly those of version 2.
    snapshot = read_snapshot(snapshot_path(tmp_path / "weights", 2))
    assert snapshot.sha256 == undisturbed[2][2]
    for tensor_name, tensor in broadcaster.published[0].state_dict.items():
        assert torch.equal(tensor, snapshot.state_dict[tensor_name])
    assert learner.run_step().step == 3
    learner.close()


def test_checkpoints_of_another_layout_are_replaced_by_the_snapshot(filled, run_id, tmp_path):
    """As after a change of the backend, or of its number of ranks."""
    after_two_steps(filled, run_id, tmp_path)
    for path in (tmp_path / "checkpoints").glob("v*"):
        manifest = json.loads((path / "checkpoint.json").read_text())
        (path / "backend" / "weights.safetensors").rename(path / "backend" / "ranks.bin")
        files = manifest["files"]
        files["backend/ranks.bin"] = files.pop("backend/weights.safetensors")
        files["backend/moments.bin"] = files.pop("backend/optimizer.pt")
        (path / "backend" / "optimizer.pt").rename(path / "backend" / "moments.bin")
        (path / "checkpoint.json").write_text(json.dumps(manifest))
    broadcaster = FakeBroadcaster()
    learner = make_learner(filled, run_id, tmp_path, broadcaster=broadcaster)
    learner.start()
    (event,) = filled.recent_events(run_id)
    assert event.kind == "checkpoint_unusable"
    assert "fresh moments" in event.message
    snapshot = read_snapshot(snapshot_path(tmp_path / "weights", 2))
    for name, tensor in broadcaster.published[0].state_dict.items():
        assert torch.equal(tensor, snapshot.state_dict[name])
    assert learner.run_step().step == 3
    learner.close()


def test_a_damaged_snapshot_is_written_again_from_the_checkpoint(
    filled, run_id, tmp_path, url, undisturbed
):
    after_two_steps(filled, run_id, tmp_path)
    spoil(snapshot_path(tmp_path / "weights", 2) / "model.safetensors")
    finish(filled, run_id, tmp_path, url, undisturbed, first_published=2)
    assert filled.recent_events(run_id)[0].kind == "snapshot_rewritten"


def test_without_checkpoint_and_snapshot_the_start_says_what_is_missing(filled, run_id, tmp_path):
    after_two_steps(filled, run_id, tmp_path)
    spoil(tmp_path / "checkpoints" / "v000002" / "backend" / "weights.safetensors")
    spoil(snapshot_path(tmp_path / "weights", 2) / "model.safetensors")
    learner = make_learner(filled, run_id, tmp_path)
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged: expected sha256"):
        learner.start()


def test_rare_checkpoints_still_lose_no_weights(filled, run_id, tmp_path):
    learner = make_learner(filled, run_id, tmp_path, checkpoint_every=2)
    learner.start()
    for _ in range(3):
        learner.run_step()
    learner.close()
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("v*"))
    assert names == ["v000000", "v000002"]
    broadcaster = FakeBroadcaster()
    again = make_learner(filled, run_id, tmp_path, broadcaster=broadcaster, checkpoint_every=2)
    again.start()
    assert again.status().step == 3
    assert broadcaster.versions == [3]
    again.close()


def test_a_changed_learning_rate_counts_after_a_restart(filled, run_id, tmp_path):
    after_two_steps(filled, run_id, tmp_path)
    backend = TorchBackend(TrainingOptions(learning_rate=5e-4))
    learner = make_learner(filled, run_id, tmp_path, backend=backend)
    learner.start()
    assert learner.run_step().learning_rate == 5e-4
    learner.close()


def test_the_learning_rate_follows_its_schedule_across_a_restart(filled, run_id, tmp_path):
    # Cosine from 1e-2 to a tenth of it over 4 updates: factors 1, 0.868, 0.55 for steps 0, 1, 2.
    schedule = {"learning_rate_decay_steps": 4, "learning_rate_final_ratio": 0.1}
    learner = make_learner(filled, run_id, tmp_path, **schedule)
    learner.start()
    assert learner.run_step().learning_rate == pytest.approx(1e-2)
    assert learner.run_step().learning_rate == pytest.approx(8.6819805e-3)
    learner.close()
    again = make_learner(filled, run_id, tmp_path, **schedule)
    again.start()
    assert again.run_step().learning_rate == pytest.approx(5.5e-3)
    again.close()
