"""Token entropy of a policy and its quantile over a batch (paper, section 3.1).

Pure functions; entropies are in nats over the full vocabulary. Shapes: V vocabulary, N tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy `H = -sum_v p_v log p_v` of `softmax(logits)`: [..., V] -> [...], nats.

    Divide the logits by the sampling temperature first. Logits of minus infinity count as
    impossible tokens. Half-precision logits are evaluated in float32.
    Worked value: logits (0, 0, 0, 0) give log 4 = 1.3863.
    """
    probs = torch.softmax(logits, dim=-1, dtype=_at_least_float32(logits.dtype))
    entropies: Tensor = torch.special.entr(probs).sum(dim=-1)
    return entropies


def entropy_quantile(entropies: Tensor, q: float) -> float:
    """`gamma_p`: the linearly interpolated `q`-quantile of token entropies: [N] -> float.

    Unlike `torch.quantile` it has no limit on N. Worked value: (0, 1, 2, 3) at q = 0.5 gives 1.5.

    Raises:
        ValueError: `q` outside [0, 1], no entropies, or an entropy that is not finite.
    """
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"quantile: expected a number in [0, 1], got {q}")
    if entropies.numel() == 0:
        raise ValueError("entropies: expected at least one token, got none")
    ordered = entropies.detach().flatten().to(torch.float64).sort().values
    if not bool(torch.isfinite(ordered).all()):
        raise ValueError("entropies: expected finite values, got a NaN or an infinity")
    rank = q * (ordered.numel() - 1)
    below, above = math.floor(rank), math.ceil(rank)
    low, high = float(ordered[below]), float(ordered[above])
    return low + (high - low) * (rank - below)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
