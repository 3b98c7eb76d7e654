"""Mixture, acceptance and residual of Eq. 6 to 8."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mentor_serve.core.speculative import accept_probability, mix, residual

MASSES = st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any)


def normalised(masses):
    probs = torch.tensor(masses, dtype=torch.float64)
    return probs / probs.sum()


def test_mixture_interpolates_by_weight():
    policy, expert = torch.tensor([[0.8, 0.2]] * 2), torch.tensor([[0.4, 0.6]] * 2)
    mixed = mix(policy, expert, torch.tensor([0.25, 1.0]))
    # 0.75 * 0.8 + 0.25 * 0.4 = 0.7
    assert mixed.flatten().tolist() == pytest.approx([0.7, 0.3, 0.4, 0.6])


def test_acceptance_and_residual_by_hand():
    policy, target = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.2, 0.3, 0.4, 0.1])
    # 0.2 / 0.5 = 0.4, 1, capped, never drafted.
    assert accept_probability(policy, target).tolist() == pytest.approx([0.4, 1.0, 1.0, 1.0])
    # Excess (0, 0, 0.2, 0.1) of mass 0.3.
    assert residual(policy, target).tolist() == pytest.approx([0.0, 0.0, 2 / 3, 1 / 3])


def test_residual_of_equal_distributions_is_a_distribution():
    probs = torch.tensor([0.5, 0.5])
    assert torch.equal(residual(probs, probs), probs)


@given(MASSES, MASSES)
def test_accept_or_replace_reproduces_the_target(policy_masses, target_masses):
    """sum_y policy(y) accept(y) [y = v] + P(reject) residual(v) = target(v)."""
    policy, target = normalised(policy_masses), normalised(target_masses)
    accepted = policy * accept_probability(policy, target)
    emitted = accepted + (1 - accepted.sum()) * residual(policy, target)
    assert torch.allclose(emitted, target, atol=1e-12)


@given(MASSES, MASSES, st.floats(0, 1))
def test_the_coin_and_algorithm_1_replace_equally_often(policy_masses, expert_masses, weight):
    """w * TV(policy, expert), which is TV(policy, pi_mix)."""
    policy, expert = normalised(policy_masses), normalised(expert_masses)
    mixed = mix(policy, expert, torch.tensor(weight, dtype=torch.float64))
    by_algorithm_1 = 1 - (policy * accept_probability(policy, mixed)).sum()
    by_coin = weight * (1 - (policy * accept_probability(policy, expert)).sum())
    assert by_coin.item() == pytest.approx(by_algorithm_1.item(), abs=1e-12)


@given(MASSES, MASSES)
def test_thinning_expert_samples_gives_the_residual(policy_masses, expert_masses):
    """expert(z) max(0, 1 - policy(z) / expert(z)), normalised."""
    policy, expert = normalised(policy_masses), normalised(expert_masses)
    kept = expert * (1 - policy / torch.where(expert > 0, expert, 1.0)).clamp(min=0)
    if kept.sum() > 0:
        assert torch.allclose(kept / kept.sum(), residual(policy, expert), atol=1e-12)
