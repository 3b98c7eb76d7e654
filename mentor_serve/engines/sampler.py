"""Drawing tokens: softmax, truncation and inverse-CDF sampling on a whole batch at once.

Pure functions. Shapes: n rows of the batch, V vocabulary. Every draw takes its uniform as an
argument, so that the caller decides what it depends on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FLAT_VOCABULARY = 4096
"""Up to here the whole CDF is built; beyond it, block sums find the block first."""
_BLOCK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """A batch of next-token distributions, at each row's temperature, before truncation."""

    logprobs: Tensor
    """[n, V] float32, nats."""
    probs: Tensor
    """[n, V] float32."""

    def entropies(self) -> Tensor:
        """[n], nats, full vocabulary."""
        entropies: Tensor = torch.special.entr(self.probs).sum(dim=-1)
        return entropies


def distribution(logits: Tensor, temperatures: Tensor) -> Distribution:
    """Softmax of float32 logits [n, V] at temperatures [n] > 0."""
    logprobs = torch.log_softmax(logits / temperatures.unsqueeze(-1), dim=-1)
    return Distribution(logprobs=logprobs, probs=logprobs.exp())


def draw(masses: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the CDF of unnormalised masses: [n, V], float64 [n] or [n, k] -> ids of that shape.

    Exact up to float64 sums: token v is drawn iff `cdf(v-1) <= u * total < cdf(v)`, so a token
    without mass is never drawn where the total is positive.
    """
    if uniforms.ndim == 1:
        return draw(masses, uniforms.unsqueeze(-1)).squeeze(-1)
    num_rows, num_tokens = masses.shape
    if num_tokens <= _FLAT_VOCABULARY:
        return _invert(masses, uniforms)[0]
    padded = torch.nn.functional.pad(masses, (0, -num_tokens % _BLOCK))
    blocks = padded.view(num_rows, -1, _BLOCK)
    block, fraction = _invert(blocks.sum(dim=-1, dtype=torch.float64), uniforms)
    rows = torch.arange(num_rows, device=masses.device).unsqueeze(-1)
    inside = blocks[rows, block].flatten(0, 1)
    within = _invert(inside, fraction.flatten().unsqueeze(-1))[0].view_as(block)
    return block * _BLOCK + within


def truncated(probs: Tensor, *, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Zero what top-k, then top-p cut off: [n, V], [n], [n] -> unnormalised masses [n, V].

    top-k keeps exactly k tokens (ties by token id; 0 keeps all). top-p keeps, of what is left and
    renormalised, the fewest tokens whose mass reaches top_p; at least one.
    """
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(probs.shape[-1], device=probs.device)
    limit = torch.where(top_k > 0, top_k, torch.full_like(top_k, probs.shape[-1]))
    ordered = ordered.masked_fill(ranks >= limit.unsqueeze(-1), 0.0)
    cumulative = ordered.cumsum(dim=-1, dtype=torch.float64)
    before = cumulative - ordered
    total = cumulative[:, -1:]
    cut = (before >= top_p.unsqueeze(-1) * total) & (top_p < 1.0).unsqueeze(-1) & (ranks > 0)
    ordered = ordered.masked_fill(cut, 0.0)
    return torch.zeros_like(probs).scatter(-1, order, ordered)


def _invert(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Index by inverse CDF [n, k], and where inside that index's share of mass u fell [n, k]."""
    cdf = masses.cumsum(dim=-1, dtype=torch.float64)
    target = uniforms.to(torch.float64) * cdf[:, -1:]
    index = torch.searchsorted(cdf, target, right=True).clamp(max=masses.shape[-1] - 1)
    above = cdf.gather(-1, index)
    below = torch.where(index > 0, cdf.gather(-1, (index - 1).clamp(min=0)), 0.0)
    share = above - below
    fraction = torch.where(share > 0, (target - below) / share, 0.0)
    # Rounding may reach 1, which would step beyond the last token that has mass.
    return index, fraction.clamp(0.0, 1.0 - 2.0**-53)
