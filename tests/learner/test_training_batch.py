"""Leased groups to a batch: Eq. 10, Eq. 11, masks and recorded metrics."""

import math

import numpy as np
import pytest
from learner_samples import leased, leased_group

from mentor_serve.learner import AdvantageConfig, build_batch
from mentor_serve.types import StopReason


def batch_of(*groups, alpha=0.5, reward_range=1.0, policy_version=0, mixed="positive"):
    return build_batch(
        groups,
        alpha=alpha,
        policy_version=policy_version,
        config=AdvantageConfig(reward_range=reward_range, mixed=mixed),
    )


def advantages(batch):
    return [item.advantage for group in batch.groups for item in group.trajectories]


def test_advantages_follow_equations_10_and_11():
    group = leased_group(
        [
            leased([4], reward=1.0),
            leased([4], reward=0.0, index=1),
            leased([4], reward=0.0, index=2),
            leased([4], reward=1.0, index=3),
            leased([4], kind="mixed", reward=1.0),
            leased([4], kind="mixed", reward=0.2, index=1),
        ]
    )
    # mean(R_on) = 0.5, sample std = sqrt(4 * 0.25 / 3) = sqrt(1/3): 0.5 / 0.57735 = 0.8660.
    # Mixed: 0.5 * (1 - 0.5) / 2 = 0.125, and max(0, 0.2 - 0.5) = 0.
    assert advantages(batch_of(group, reward_range=2.0)) == pytest.approx(
        [0.866025, -0.866025, -0.866025, 0.866025, 0.125, 0.0], abs=1e-6
    )


def test_mixed_rollouts_may_join_the_group_like_any_other():
    group = leased_group(
        [
            leased([4], reward=1.0),
            leased([4], reward=0.0, index=1),
            leased([4], kind="mixed", reward=1.0),
            leased([4], kind="mixed", reward=0.0, index=1),
        ]
    )
    # All four: mean 0.5, sample std sqrt(1/3). Alpha has no part in it.
    assert advantages(batch_of(group, mixed="group")) == pytest.approx(
        [0.866025, -0.866025, 0.866025, -0.866025], abs=1e-6
    )


def test_statistics_are_those_of_each_group_and_of_on_policy_rollouts_alone():
    first = leased_group(
        [leased([4], reward=1.0), leased([4], reward=1.0), leased([4], kind="mixed", reward=0.0)]
    )
    second = leased_group(
        [leased([4], reward=0.0), leased([4], reward=0.0), leased([4], kind="mixed", reward=1.0)]
    )
    # Equal rewards carry no on-policy signal; the second mixed rollout is 1 above the mean.
    assert advantages(batch_of(first, second)) == [0.0, 0.0, 0.0, 0.0, 0.0, 0.5]


def test_a_group_without_on_policy_rollouts_has_no_signal_but_counts_its_tokens():
    group = leased_group([leased([4, 5], kind="mixed", reward=1.0)])
    batch = batch_of(group)
    assert advantages(batch) == [0.0]
    assert batch.metrics.num_tokens == 2


def test_tokens_without_a_finite_logprob_leave_loss_and_denominator():
    group = leased_group([leased([4, 5, 6], logprobs=[-1.0, math.nan, -math.inf])])
    (item,) = batch_of(group).groups[0].trajectories
    assert item.mask.tolist() == [True, False, False]
    assert item.old_logprobs.tolist() == [-1.0, 0.0, 0.0]
    assert batch_of(group).metrics.num_tokens == 1


def test_empty_responses_take_part_in_the_statistics_but_have_nothing_to_train():
    group = leased_group([leased([], reward=0.0), leased([4], reward=1.0, index=1)])
    batch = batch_of(group)
    assert advantages(batch) == pytest.approx([math.sqrt(0.5)])
    assert batch.metrics.num_trajectories == 2


def test_expert_trajectories_share_the_groups_statistics():
    # Rewards 0, 0 and 1: mean 1/3, sample std sqrt(1/3); LUFFY normalises over all three.
    group = leased_group(
        [
            leased([4], reward=0.0),
            leased([5], reward=0.0, index=1),
            leased([6, 7], reward=1.0, kind="expert", logprobs=[math.nan] * 2),
        ]
    )
    low, high = (-1 / 3) / math.sqrt(1 / 3), (2 / 3) / math.sqrt(1 / 3)
    batch = batch_of(group)
    assert advantages(batch) == pytest.approx([low, low, high])
    assert batch.metrics.num_tokens == 4  # the expert's count without a recorded log-probability
    assert batch.metrics.mean_reward_on_policy == 0.0


def test_an_empty_prompt_is_refused():
    group = leased_group([leased([4], prompt=())], prompt=())
    with pytest.raises(ValueError, match="expected a prompt"):
        batch_of(group)


def test_a_logprob_too_few_is_refused():
    group = leased_group([leased([4, 5], logprobs=[-1.0])])
    with pytest.raises(ValueError, match="one log-probability a token"):
        batch_of(group)


def test_gamma_is_the_quantile_of_on_policy_entropies_above_the_floor():
    group = leased_group(
        [
            leased([4, 5], entropies=np.array([0.0, 1.0], np.float32)),
            leased([4, 5], entropies=np.array([2.0, 3.0], np.float32)),
            leased([4], kind="mixed", entropies=np.array([99.0], np.float32)),
        ]
    )
    batch = batch_of(group)
    assert batch.gamma(0.5, floor=0.0, fallback=7.0) == pytest.approx(1.5)
    assert batch.gamma(0.5, floor=2.5, fallback=7.0) == 2.5


def test_gamma_stays_where_nothing_was_on_policy():
    batch = batch_of(leased_group([leased([4], kind="mixed")]))
    assert batch.gamma(0.95, floor=0.0, fallback=7.0) == 7.0


def test_metrics_say_what_was_recorded():
    half = np.array([0.5, 0.5], np.float32)
    group = leased_group(
        [
            leased([4, 5, 6, 7], reward=1.0, stop_reason=StopReason.LENGTH),
            leased([4, 5], reward=0.0, index=1),
            leased(
                [4, 5],
                kind="mixed",
                reward=1.0,
                weights=half,
                sources=np.array([1, 2], np.uint8),
            ),
        ],
        min_policy_version=3,
    )
    equal = leased_group([leased([4], reward=1.0), leased([5], reward=1.0)], min_policy_version=5)
    metrics = batch_of(group, equal, policy_version=5).metrics
    assert (metrics.num_groups, metrics.num_trajectories, metrics.num_tokens) == (2, 5, 10)
    assert metrics.mean_reward_on_policy == 0.75
    assert metrics.mean_reward_mixed == 1.0
    assert metrics.frac_reward_zero_std == 0.5
    assert metrics.mean_response_tokens == 2.0
    assert metrics.truncated_share == 0.2
    assert (metrics.mean_weight, metrics.gated_share, metrics.intervention_rate) == (0.5, 1.0, 0.5)
    assert (metrics.staleness_mean, metrics.staleness_max) == (1.0, 2)
    assert metrics.entropy == 1.0


def test_metrics_of_absent_mixed_rollouts_are_nan():
    metrics = batch_of(leased_group([leased([4], reward=1.0)])).metrics
    assert math.isnan(metrics.mean_reward_mixed)
    assert math.isnan(metrics.mean_weight)
