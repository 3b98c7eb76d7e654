"""Importance weights for rollouts that other weights, or another engine, sampled.

Three policies are told apart: the *behaviour* policy that sampled a token (its log-probability was
recorded then), the *proximal* policy (the learner's weights before the update, recomputed), and the
current one. The clipped surrogate then compares current with proximal, and each token is weighted
by proximal / behaviour: decoupled PPO (Hilton et al., "Batch size-invariance for policy
optimization", 2022, Eq. 5), with the weight truncated as in Espeholt et al., "IMPALA", 2018.
Shape: N tokens of several sequences, flat.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ImportanceLevel = Literal["none", "token", "sequence"]
ImportanceMode = Literal["clamp", "mask"]


def importance_weights(
    proximal_logprobs_N: Tensor,
    behaviour_logprobs_N: Tensor,
    sequences_N: Tensor,
    mask_N: Tensor,
    *,
    level: ImportanceLevel,
    mode: ImportanceMode,
    cap: float,
) -> Tensor:
    """Detached weights [N], 0 outside `mask_N`.

    Args:
        proximal_logprobs_N: log-probability of each token under the weights before the update, [N].
        behaviour_logprobs_N: the same as recorded at generation, [N].
        sequences_N: number of the sequence that each token belongs to, [N] int64, from 0.
        mask_N: true at tokens that count, [N].
        level: "token": proximal / behaviour of the token; "sequence": the product of that over the
            tokens of its sequence that count; "none": 1.
        mode: what happens above `cap`: "clamp" to it, or "mask" (weight 0).
        cap: largest weight.

    Worked value: ratios (2, 3) in one sequence, cap 4: token level gives (2, 3); sequence level 6,
    so (4, 4) clamped and (0, 0) masked.

    Raises:
        ValueError: `cap` below 1 (it would change fresh rollouts), or an unknown level or mode.
    """
    if not cap >= 1.0:
        raise ValueError(f"cap: expected a number >= 1, got {cap}")
    counted_N = mask_N.bool()
    zero = torch.zeros((), dtype=torch.float32, device=proximal_logprobs_N.device)
    difference_N = (proximal_logprobs_N - behaviour_logprobs_N).detach().float()
    log_ratio_N = torch.where(counted_N, difference_N, zero)
    if level == "none":
        return counted_N.float()
    if level == "sequence":
        count = int(sequences_N.max()) + 1 if sequences_N.numel() else 0
        sums = torch.zeros(count, device=log_ratio_N.device).index_add_(0, sequences_N, log_ratio_N)
        log_ratio_N = sums[sequences_N]
    elif level != "token":
        raise ValueError(f"level: expected none, token or sequence, got {level!r}")
    weights_N = log_ratio_N.exp()
    if mode == "clamp":
        weights_N = weights_N.clamp(max=cap)
    elif mode == "mask":
        weights_N = torch.where(weights_N <= cap, weights_N, zero)
    else:
        raise ValueError(f"mode: expected clamp or mask, got {mode!r}")
    return torch.where(counted_N, weights_N, zero)


def effective_sample_share(sum_of_weights: float, sum_of_squares: float, count: int) -> float:
    """Kish's effective sample size over the sample size: `(sum w)^2 / (n sum w^2)`, in (0, 1].

    1 where all weights are equal; NaN for no sample. Worked value: weights (1, 3) give
    16 / (2 * 10) = 0.8.
    """
    if count == 0 or sum_of_squares <= 0:
        return float("nan")
    return sum_of_weights**2 / (count * sum_of_squares)
