"""Mixed policy, acceptance and residual of modified speculative sampling (paper, Eq. 6 to 8).

All functions work on probabilities, not logits: [..., V] with V the vocabulary. For any target
`t` (pi_mix, or pi* where a coin asked for the expert), drafting `y ~ pi_theta`, accepting it with
`accept_probability` and otherwise drawing from `residual` yields exactly `t`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mix(policy_probs: Tensor, expert_probs: Tensor, weights: Tensor) -> Tensor:
    """`pi_mix = (1 - w) pi_theta + w pi*` (Eq. 6): [..., V], [..., V], [...] -> [..., V]."""
    weight = weights.unsqueeze(-1)
    return (1.0 - weight) * policy_probs + weight * expert_probs


def accept_probability(policy_probs: Tensor, target_probs: Tensor) -> Tensor:
    """`min(1, target / policy)` for each possible draft (Eq. 7): [..., V] -> [..., V].

    1 where the policy gives no probability (such a draft never happens).
    """
    possible = policy_probs > 0
    ratio = target_probs / torch.where(possible, policy_probs, torch.ones_like(policy_probs))
    return torch.where(possible, ratio.clamp(max=1.0), torch.ones_like(ratio))


def residual(policy_probs: Tensor, target_probs: Tensor) -> Tensor:
    """`(target - policy)_+`, normalised (Eq. 8): [..., V] -> [..., V].

    Where the two are equal nothing is ever rejected; the target itself is returned there, so that
    the result is a distribution in every case.
    """
    excess = (target_probs - policy_probs).clamp(min=0.0)
    mass = excess.sum(dim=-1, keepdim=True)
    has_mass = mass > 0
    normalised = excess / torch.where(has_mass, mass, torch.ones_like(mass))
    return torch.where(has_mass, normalised, target_probs)
