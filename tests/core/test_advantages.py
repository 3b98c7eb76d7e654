"""Advantages of Eq. 10 and 11, and the annealing of alpha."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mentor_serve.core.advantages import (
    centred_advantages,
    leave_one_out_advantages,
    mixed_advantages,
    on_policy_advantages,
)
from mentor_serve.core.schedules import cosine_alpha

REWARDS = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=8)


def test_on_policy_advantages_by_hand():
    # Mean 0.5, sample variance (4 * 0.25) / 3 = 1/3: +-0.5 * sqrt(3) = +-0.8660.
    advantages = on_policy_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert advantages.tolist() == pytest.approx([0.8660254, -0.8660254, -0.8660254, 0.8660254])


@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [1.0]], ids=["equal", "single"])
def test_a_group_without_differences_carries_no_signal(rewards):
    assert on_policy_advantages(torch.tensor(rewards)).tolist() == [0.0] * len(rewards)


@given(REWARDS)
def test_on_policy_advantages_are_centred_with_unit_spread(rewards):
    advantages = on_policy_advantages(torch.tensor(rewards, dtype=torch.float64))
    assert advantages.sum().item() == pytest.approx(0.0, abs=1e-6)
    if len(set(rewards)) > 1:
        assert advantages.std().item() == pytest.approx(1.0, abs=1e-6)


def test_mixed_advantages_by_hand():
    # Mean of on-policy 0.25; 0.5 * (1 - 0.25) = 0.375, and below the mean counts 0.
    mixed = mixed_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5]), 0.5)
    assert mixed.tolist() == [0.375, 0.0]
    halved = mixed_advantages(torch.tensor([1.0]), torch.tensor([0.0, 0.5]), 0.5, 2.0)
    assert halved.tolist() == [0.1875]


@given(REWARDS, REWARDS, st.floats(0, 1))
def test_mixed_advantages_never_punish(mixed, on_policy, alpha):
    advantages = mixed_advantages(torch.tensor(mixed), torch.tensor(on_policy), alpha)
    assert bool((advantages >= 0).all())
    assert bool((advantages <= alpha + 1e-6).all())


def test_no_mixed_rollouts_is_allowed():
    assert mixed_advantages(torch.zeros(0), torch.tensor([0.0, 1.0]), 1.0).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (torch.zeros(0), "at least one"),
        (torch.tensor([1, 0]), "floating"),
        (torch.tensor([math.nan]), "finite"),
    ],
)
def test_impossible_rewards_are_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        on_policy_advantages(rewards)


@pytest.mark.parametrize(("alpha", "reward_range"), [(-0.1, 1.0), (math.nan, 1.0), (1.0, 0.0)])
def test_impossible_scales_are_refused(alpha, reward_range):
    with pytest.raises(ValueError, match=r"alpha|reward_range"):
        mixed_advantages(torch.ones(1), torch.ones(2), alpha, reward_range)


def test_alpha_follows_a_cosine_to_exactly_zero():
    # (1 + cos(pi / 4)) / 2 = 0.853553
    assert cosine_alpha(0, 120) == 1.0
    assert cosine_alpha(30, 120) == pytest.approx(0.8535534)
    assert cosine_alpha(60, 120) == pytest.approx(0.5)
    assert cosine_alpha(60, 120, 0.4) == pytest.approx(0.2)
    assert cosine_alpha(120, 120) == 0.0
    assert cosine_alpha(5000, 120) == 0.0


@given(st.integers(0, 300), st.integers(1, 200))
def test_alpha_never_rises(step, total_steps):
    assert 0.0 <= cosine_alpha(step + 1, total_steps) <= cosine_alpha(step, total_steps) <= 1.0


@pytest.mark.parametrize(("step", "total_steps"), [(-1, 10), (0, 0)])
def test_impossible_schedules_are_refused(step, total_steps):
    with pytest.raises(ValueError, match="expected"):
        cosine_alpha(step, total_steps)


def test_leave_one_out_by_hand():
    # 1 - mean(0, 0) and 0 - mean(1, 0).
    found = leave_one_out_advantages(torch.tensor([1.0, 0.0, 0.0]))
    assert found.tolist() == pytest.approx([1.0, -0.5, -0.5])
    assert leave_one_out_advantages(torch.tensor([3.0])).tolist() == [0.0]


def test_centred_by_hand():
    found = centred_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert found.tolist() == [0.5, -0.5, -0.5, 0.5]


@pytest.mark.parametrize("estimate", [leave_one_out_advantages, centred_advantages])
def test_other_estimators_refuse_what_is_no_reward(estimate):
    with pytest.raises(ValueError, match="rewards_G"):
        estimate(torch.tensor([1.0, math.nan]))
