"""Which groups an update takes: dynamic sampling, and groups whose gradient was not finite."""

import dataclasses
import math

import pytest
import torch
from learner_samples import (
    FakeBroadcaster,
    consumed_steps,
    make_learner,
    stored_group,
    tiny_model,
)

from mentor_serve.learner import TorchBackend, TrainingOptions, UpdateConfig
from mentor_serve.types import Score

SILENT = Score(reward=0.0, accuracy=0.0, format_score=0.0)


def silent_group(seed):
    """A group in which no rollout has an advantage."""
    group = stored_group(seed)
    items = [dataclasses.replace(item, score=SILENT) for item in group.trajectories]
    return dataclasses.replace(group, trajectories=items)


@pytest.fixture
def start(store, run_id, tmp_path):
    learners = []

    def make(**options):
        learner = make_learner(store, run_id, tmp_path, **options)
        learner.start()
        learners.append(learner)
        return learner

    yield make
    for learner in learners:
        learner.close()


def test_silent_groups_are_trained_on_by_default(start, store, run_id):
    learner = start()
    for seed in range(2):
        store.add_group(run_id, silent_group(seed))
    record = learner.run_step()
    assert (record.num_groups, record.num_silent_groups) == (2, 2)
    assert record.num_trained_tokens == 0


def test_dynamic_sampling_fills_the_update_with_groups_that_teach(start, store, run_id, url):
    learner = start(dynamic_sampling=True, update=UpdateConfig(mini_batch_prompts=2))
    groups = [silent_group(0), stored_group(1), silent_group(2), stored_group(3)]
    for group in groups[:3]:
        store.add_group(run_id, group)
    # Two of three have no signal: what is there is held until another one comes.
    assert learner.run_step() is None
    assert store.count_groups(run_id)["leased"] == 3
    store.add_group(run_id, groups[3])
    record = learner.run_step()
    assert (record.num_groups, record.num_silent_groups) == (4, 2)
    assert set(consumed_steps(url).values()) == {("consumed", 1)}
    teaching = sum(len(t.rollout.token_ids) for g in (1, 3) for t in groups[g].trajectories)
    assert record.num_tokens == teaching
    # What is measured is measured on all of them: half of the groups have equal rewards.
    assert record.frac_reward_zero_std == 0.5


def test_dynamic_sampling_goes_on_where_hardly_anything_teaches(start, store, run_id):
    learner = start(dynamic_sampling=True)
    for seed in range(10):
        store.add_group(run_id, silent_group(seed))
    record = learner.run_step()
    # Two groups a step, at most four times as many are taken.
    assert (record.num_groups, record.num_silent_groups) == (8, 8)
    assert store.count_groups(run_id)["ready"] == 2


def test_held_groups_are_given_back_on_the_way_out(store, run_id, tmp_path):
    learner = make_learner(store, run_id, tmp_path, dynamic_sampling=True)
    learner.start()
    for seed in range(2):
        store.add_group(run_id, silent_group(seed))
    assert learner.run_step() is None
    learner.close()
    assert store.count_groups(run_id)["ready"] == 2


class SometimesInfinite(TorchBackend):
    """The forward pass overflows for groups whose first prompt token is `token`."""

    def __init__(self, token):
        super().__init__(TrainingOptions(learning_rate=1e-2))
        self.token = token

    def step(self, batch, config):
        table = self.trainable.model.get_input_embeddings()

        def overflow(module, inputs, output):
            hit = (inputs[0][:, :1] == self.token).unsqueeze(-1)
            return torch.where(hit, torch.full_like(output, math.inf), output)

        handle = table.register_forward_hook(overflow)
        try:
            return super().step(batch, config)
        finally:
            handle.remove()


def first_token(group):
    return group.trajectories[0].prompt_token_ids[0]


def seeds_with_two_first_tokens():
    first = first_token(stored_group(0))
    return 0, next(s for s in range(1, 50) if first_token(stored_group(s)) != first)


def test_groups_whose_gradient_was_not_finite_are_marked(start, store, run_id, url):
    bad, good = seeds_with_two_first_tokens()
    bad_group, good_group = stored_group(bad), stored_group(good)
    backend = SometimesInfinite(first_token(bad_group))
    learner = start(backend=backend, update=UpdateConfig(mini_batch_prompts=1))
    for group in (bad_group, good_group):
        store.add_group(run_id, group)
    record = learner.run_step()
    assert (record.step, record.num_skipped_steps) == (1, 1)
    found = consumed_steps(url)
    assert found[bad_group.group_id] == ("failed", None)
    assert found[good_group.group_id] == ("consumed", 1)
    (event,) = [e for e in store.recent_events(run_id) if e.kind == "gradient_not_finite"]
    assert "1 of 2 mini-batches" in event.message
    assert all(bool(torch.isfinite(t).all()) for t in backend.full_state().values())


def test_no_finite_gradient_at_all_makes_no_version(start, store, run_id, url):
    bad, _ = seeds_with_two_first_tokens()
    group = stored_group(bad)
    twin = dataclasses.replace(stored_group(bad), group_id=group.group_id[:-1] + "x")
    broadcaster = FakeBroadcaster()
    learner = start(backend=SometimesInfinite(first_token(group)), broadcaster=broadcaster)
    for item in (group, twin):
        store.add_group(run_id, item)
    assert learner.run_step() is None
    assert set(consumed_steps(url).values()) == {("failed", None)}
    assert broadcaster.versions == [0]
    assert store.latest_version(run_id).version == 0
    # Training goes on with what comes next, from the weights before.
    learner.run_step()
    expected = tiny_model().state_dict()
    for name, tensor in broadcaster.published[0].state_dict.items():
        assert torch.equal(tensor, expected[name])
