"""The token-level clipped surrogate (paper, Eq. 9), as a loss to minimise.

Shapes: B sequences, T time. The importance ratio is against the OLD POLICY, for tokens of mixed
rollouts too: `old_logprobs_BT` are the recorded policy log-probabilities, never pi_mix's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    clip_low: float,
    clip_high: float,
    *,
    normalizer: float | Tensor | None = None,
    token_weights_BT: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`-sum min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) / num_tokens` over masked tokens.

    Args:
        logprobs_BT: log pi_theta of each token under the weights being trained, [B, T].
        old_logprobs_BT: the same under the weights that sampled it, [B, T]; no gradient flows.
        advantages_B: one advantage a sequence [B], or a token [B, T] (packed rows).
        mask_BT: true (or 1) at response tokens that count; other entries may hold anything.
        clip_low: lower clip, 0.2 in the paper.
        clip_high: upper clip, 0.28 in the paper.
        normalizer: total number of tokens of the whole mini-batch. Give it when a mini-batch is
            cut into micro-batches: their losses and metrics then sum to the global Eq. 9.
            Default: this call's own token count.
        token_weights_BT: factor on each token's surrogate, [B, T] (`core.corrections`); no gradient
            flows. Default: 1.

    Returns:
        The scalar loss and 0-d metrics, detached: `clip_fraction_low` and `clip_fraction_high`
        (share of tokens whose gradient the lower or upper clip cut), `approx_kl` (mean of
        `(r - 1) - log r`, an estimate of KL(old || new)), all divided like the loss, and
        `num_tokens` of this call.

    Worked value: r = 1.5, A = 1, clip_high = 0.28, one token: loss -1.28, upper fraction 1.

    Raises:
        ValueError: shapes that disagree, a clip outside [0, 1) (low) or negative (high).
    """
    _check_shapes(logprobs_BT, old_logprobs_BT, advantages_B, mask_BT)
    if not 0 <= clip_low < 1 or not clip_high >= 0:
        raise ValueError(f"clip: expected 0 <= low < 1 and high >= 0, got {clip_low}, {clip_high}")
    counted_BT = mask_BT.bool()
    advantage_BT = advantages_B if advantages_B.ndim == 2 else advantages_B.unsqueeze(-1)
    zero = torch.zeros((), dtype=logprobs_BT.dtype, device=logprobs_BT.device)
    # Masked before exp, so that padding (even NaN) reaches neither the value nor the gradient.
    log_ratio_BT = torch.where(counted_BT, logprobs_BT - old_logprobs_BT.detach(), zero)
    advantage_BT = torch.where(counted_BT, advantage_BT.to(logprobs_BT.dtype), zero)
    ratio_BT = log_ratio_BT.exp()
    clipped_BT = ratio_BT.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate_BT = torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
    if token_weights_BT is not None:
        surrogate_BT = surrogate_BT * torch.where(counted_BT, token_weights_BT.detach(), zero)
    num_tokens = counted_BT.sum()
    denominator = num_tokens.clamp(min=1) if normalizer is None else normalizer
    loss = -surrogate_BT.sum() / denominator
    with torch.no_grad():
        cut_low = (ratio_BT < 1.0 - clip_low) & (advantage_BT < 0)
        cut_high = (ratio_BT > 1.0 + clip_high) & (advantage_BT > 0)
        metrics = {
            "clip_fraction_low": cut_low.sum() / denominator,
            "clip_fraction_high": cut_high.sum() / denominator,
            "approx_kl": (ratio_BT - 1.0 - log_ratio_BT).sum() / denominator,
            "num_tokens": num_tokens,
        }
    return loss, metrics


def shaped_surrogate_loss(
    logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    shaping: float = 0.1,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`-sum f(pi_theta(y)) A / num_tokens` with `f(x) = x / (x + shaping)`, for expert tokens.

    LUFFY (arXiv 2504.14945): tokens of whole expert trajectories, whose behaviour probability is
    taken as 1, so that the ratio is the policy's own probability; shaped, and not clipped. The
    gradient's weight `shaping p / (p + shaping)^2` is largest at p = shaping: unlikely expert
    tokens are learned from, while plain `p A` would all but ignore them.

    Args:
        logprobs_BT: log pi_theta of each expert token, [B, T].
        advantages_B: one advantage a sequence [B], or a token [B, T].
        mask_BT: true at tokens that count.
        shaping: the constant, 0.1 in LUFFY; > 0.
        normalizer: as in `clipped_surrogate_loss`.

    Returns:
        The scalar loss and `num_tokens` of this call.

    Worked value: p = 0.1, A = 1, one token: loss -0.5, and d loss / d log p = -0.25.

    Raises:
        ValueError: shapes that disagree, or `shaping` not above 0.
    """
    _check_shapes(logprobs_BT, logprobs_BT, advantages_B, mask_BT)
    if not shaping > 0:
        raise ValueError(f"shaping: expected a number > 0, got {shaping}")
    counted_BT = mask_BT.bool()
    advantage_BT = advantages_B if advantages_B.ndim == 2 else advantages_B.unsqueeze(-1)
    zero = torch.zeros((), dtype=logprobs_BT.dtype, device=logprobs_BT.device)
    probs_BT = torch.where(counted_BT, logprobs_BT, zero).exp()
    advantage_BT = torch.where(counted_BT, advantage_BT.to(logprobs_BT.dtype), zero)
    num_tokens = counted_BT.sum()
    denominator = num_tokens.clamp(min=1) if normalizer is None else normalizer
    loss = -(probs_BT / (probs_BT + shaping) * advantage_BT).sum() / denominator
    return loss, {"num_tokens": num_tokens}


def _check_shapes(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> None:
    expected = logprobs.shape
    if logprobs.ndim != 2 or old_logprobs.shape != expected or mask.shape != expected:
        raise ValueError(
            f"expected logprobs, old_logprobs and mask of one shape [B, T], got "
            f"{tuple(expected)}, {tuple(old_logprobs.shape)}, {tuple(mask.shape)}"
        )
    if advantages.shape not in (expected, expected[:1]):
        raise ValueError(
            f"advantages: expected shape {tuple(expected[:1])} or {tuple(expected)}, "
            f"got {tuple(advantages.shape)}"
        )
