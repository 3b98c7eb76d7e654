"""The gate: how much the expert may say at a token (paper, Eq. 6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def guidance_weight(entropies: Tensor, gamma: float | Tensor) -> Tensor:
    """`w = min(1, H / gamma)`: [...] -> [...], in [0, 1].

    `gamma` is a number or broadcasts against `entropies`. `gamma = 0` gives w = 1 everywhere, also
    where H = 0; a tiny negative entropy (rounding) counts as 0.
    Worked value: H = 0.4, gamma = 0.8 give 0.5.

    Raises:
        ValueError: a numeric `gamma` that is negative or NaN.
    """
    if not isinstance(gamma, Tensor):
        if math.isnan(gamma) or gamma < 0:
            raise ValueError(f"gamma: expected a number >= 0, got {gamma}")
        gamma = torch.tensor(gamma, dtype=entropies.dtype, device=entropies.device)
    entropies = entropies.clamp(min=0.0)
    ratio = entropies / torch.where(gamma > 0, gamma, torch.ones_like(gamma))
    return torch.where(gamma > 0, ratio.clamp(max=1.0), torch.ones_like(ratio))
