"""Group advantages: mixed-policy GRPO (paper, Eq. 10 and 11) and what practitioners use instead.

Shapes: G on-policy rollouts of one prompt, M mixed rollouts of the same prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_policy_advantages(rewards_G: Tensor) -> Tensor:
    """`(R_i - mean(R_on)) / std(R_on)` (Eq. 10): [G] -> [G].

    The standard deviation is the sample one (n - 1). All zeros where every reward is equal, a
    single rollout included: such a group carries no signal.
    Worked value: rewards (1, 0, 0, 1) have mean 0.5 and std sqrt(1/3), so 0.8660 and -0.8660.

    Raises:
        ValueError: not a vector, empty, or a reward that is not finite.
    """
    _check_rewards(rewards_G, name="rewards_G")
    if bool((rewards_G == rewards_G[0]).all()):
        return torch.zeros_like(rewards_G)
    return (rewards_G - rewards_G.mean()) / rewards_G.std(correction=1)


def leave_one_out_advantages(rewards_G: Tensor) -> Tensor:
    """`R_i - mean of the other rewards`: [G] -> [G]; 0 for a single rollout.

    The baseline does not depend on the rollout's own reward, so the gradient is unbiased (RLOO;
    Ahmadian et al., arXiv 2402.14740). Equals the centred reward times `G / (G - 1)`.
    Worked value: rewards (1, 0, 0) give (1, -0.5, -0.5).

    Raises:
        ValueError: not a vector, empty, or a reward that is not finite.
    """
    _check_rewards(rewards_G, name="rewards_G")
    count = len(rewards_G)
    if count == 1:
        return torch.zeros_like(rewards_G)
    return (rewards_G - rewards_G.mean()) * (count / (count - 1))


def centred_advantages(rewards_G: Tensor) -> Tensor:
    """`R_i - mean(R)` without the standard deviation: [G] -> [G].

    Dr. GRPO (arXiv 2503.20783): dividing by it favours prompts that are nearly always or nearly
    never solved. Worked value: rewards (1, 0, 0, 1) give (0.5, -0.5, -0.5, 0.5).

    Raises:
        ValueError: not a vector, empty, or a reward that is not finite.
    """
    _check_rewards(rewards_G, name="rewards_G")
    return rewards_G - rewards_G.mean()


def mixed_advantages(
    rewards_M: Tensor,
    on_policy_rewards_G: Tensor,
    alpha: float,
    reward_range: float = 1.0,
) -> Tensor:
    """`alpha * max(0, R_i - mean(R_on)) / R_range` (Eq. 11): [M], [G] -> [M], never negative.

    Only mixed rollouts above the on-policy mean count; failures of the exploration are ignored.
    Worked value: alpha = 0.5, R = (1, 0), mean(R_on) = 0.25, range 1 give (0.375, 0).

    Raises:
        ValueError: no on-policy rewards, a reward that is not finite, `alpha` negative,
            `reward_range` not positive.
    """
    _check_rewards(on_policy_rewards_G, name="on_policy_rewards_G")
    if rewards_M.numel():
        _check_rewards(rewards_M, name="rewards_M")
    if not alpha >= 0:
        raise ValueError(f"alpha: expected a number >= 0, got {alpha}")
    if not reward_range > 0:
        raise ValueError(f"reward_range: expected a number > 0, got {reward_range}")
    return alpha * (rewards_M - on_policy_rewards_G.mean()).clamp(min=0.0) / reward_range


def _check_rewards(rewards: Tensor, *, name: str) -> None:
    if rewards.ndim != 1 or rewards.numel() == 0:
        raise ValueError(f"{name}: expected a vector of at least one reward, got {rewards.shape}")
    if not rewards.is_floating_point():
        raise ValueError(f"{name}: expected floating point rewards, got {rewards.dtype}")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError(f"{name}: expected finite rewards, got a NaN or an infinity")
