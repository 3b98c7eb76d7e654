"""Shares of ranks add up to the whole update."""

from contextlib import contextmanager

import pytest
import torch
from learner_samples import leased, leased_group, random_groups, tiny_model

from mentor_serve.learner import UpdateConfig, build_batch
from mentor_serve.learner.logprobs import ResponseScorer
from mentor_serve.learner.sharding import plan_update
from mentor_serve.learner.step import MiniBatchSums, run_share, summarise


class KeepGradients:
    """An optimiser driver that keeps each mini-batch's gradient and steps nowhere."""

    def __init__(self, model):
        self.model = model
        self.gradients = []
        self.lasts = []

    def zero_grad(self):
        self.model.zero_grad()

    @contextmanager
    def micro_batch(self, *, is_last):
        self.lasts.append(is_last)
        yield

    def backward(self, loss):
        loss.backward()

    def finish(self):
        self.gradients.append(
            torch.cat(
                [
                    torch.zeros_like(item).flatten() if item.grad is None else item.grad.flatten()
                    for item in self.model.parameters()
                ]
            )
        )
        return float(self.gradients[-1].norm())


def run(batch, world_size, **config):
    """Gradients of each mini-batch summed over ranks, joined sums, and the plan."""
    config = UpdateConfig(**({"mini_batch_prompts": 2, "max_tokens_per_micro_batch": 40} | config))
    plan = plan_update(batch, config, world_size=world_size)
    model = tiny_model().eval()
    scorer = ResponseScorer(model, temperature=1.0)
    drivers, sums = [], []
    for share in plan:
        drivers.append(KeepGradients(model))
        sums.append(run_share(scorer, share, config, device=model.device, driver=drivers[-1]))
    gradients = [sum(parts) for parts in zip(*[item.gradients for item in drivers], strict=True)]
    joined = [MiniBatchSums.joined(parts) for parts in zip(*sums, strict=True)]
    return gradients, joined, plan


def batch_of(count=4, **options):
    groups = random_groups(tiny_model().eval(), count, **options)
    return build_batch(groups, alpha=0.5, policy_version=0)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("old_logprobs", ["recorded", "recomputed"])
def test_ranks_add_up_to_one(world_size, old_logprobs):
    batch = batch_of()
    whole, whole_sums, _ = run(batch, 1, old_logprobs=old_logprobs)
    parts, part_sums, plan = run(batch, world_size, old_logprobs=old_logprobs)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-3)
    one, other = (summarise(sums, learning_rate=1.0) for sums in (whole_sums, part_sums))
    assert other.loss == pytest.approx(one.loss, abs=1e-5)
    assert other.mismatch_kl == pytest.approx(one.mismatch_kl, rel=1e-4)
    assert other.effective_sample_share == pytest.approx(one.effective_sample_share, rel=1e-4)
    assert other.num_trained_tokens == one.num_trained_tokens
    assert len(plan) == world_size


def test_every_rank_does_the_same_number_of_micro_batches():
    _, _, plan = run(batch_of(), 5)
    for mini_batches in zip(*plan, strict=True):
        assert len({len(item.micro_batches) for item in mini_batches}) == 1
        assert len({item.num_tokens for item in mini_batches}) == 1
    assert any(item.num_silent for share in plan for item in share)


def test_every_response_is_in_exactly_one_share():
    batch = batch_of()
    trained = {
        item.trajectory_id + group.group_id
        for group in batch.groups
        for item in group.trajectories
        if item.advantage != 0
    }
    found = []
    for share in run(batch, 3)[2]:
        for mini_batch in share:
            counted = len(mini_batch.micro_batches) - mini_batch.num_silent
            for rows in mini_batch.micro_batches[:counted]:
                found += [id(item) for row in rows for block in row for item in block]
    assert len(found) == len(set(found)) == len(trained)


def test_the_last_backward_pass_of_a_mini_batch_is_known():
    batch = batch_of(2)
    config = UpdateConfig(mini_batch_prompts=1, max_tokens_per_micro_batch=30)
    (share,) = plan_update(batch, config, world_size=1)
    model = tiny_model().eval()
    driver = KeepGradients(model)
    scorer = ResponseScorer(model, temperature=1.0)
    run_share(scorer, share, config, device=model.device, driver=driver)
    counts = [len(item.micro_batches) for item in share]
    assert driver.lasts == [i == count - 1 for count in counts for i in range(count)]


def test_a_mini_batch_without_a_signal_is_a_step_on_every_rank():
    group = leased_group([leased([4], reward=1.0), leased([5], reward=1.0)])
    batch = build_batch([group], alpha=0.5, policy_version=0)
    gradients, sums, plan = run(batch, 2)
    assert [len(share[0].micro_batches) for share in plan] == [0, 0]
    assert not gradients[0].any()
    assert sums[0].num_tokens == 2


def test_a_world_has_a_rank():
    with pytest.raises(ValueError, match="world_size"):
        plan_update(batch_of(1), UpdateConfig(), world_size=0)
