"""Drawing tokens: softmax, truncation and inverse-CDF sampling on a whole batch at once.

Pure functions. Shapes: n rows of the batch, V vocabulary. Every draw takes its uniform as an
argument, so that the caller decides what it depends on.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

_FLAT_VOCABULARY = 4096
"""Up to here the whole CDF is built; beyond it, block sums find the block first."""
_BLOCK = 512
_LOWEST = -1e4
"""Nats below the most likely token where a probability is 0 in every format anyway."""


class Distribution:
    """A batch of next-token distributions, each at its row's temperature, before truncation.

    Built from logits in as few passes over the vocabulary as sampling needs; normalised
    vectors are made only for who asks.
    """

    def __init__(
        self, logits: Tensor, temperatures: Tensor | None = None, masses: Tensor | None = None
    ) -> None:
        if temperatures is not None:
            logits = logits.div_(temperatures.unsqueeze(-1))
        # A token that is masked out by -inf must not make NaN of 0 * -inf in the entropy.
        self._shifted = logits.sub_(logits.amax(dim=-1, keepdim=True)).clamp_(min=_LOWEST)
        self.masses = torch.exp(self._shifted, out=masses)
        """[n, V] float32 probabilities up to a factor for each row."""
        self._totals = self.masses.sum(dim=-1)

    def entropies(self) -> Tensor:
        """[n], nats, full vocabulary."""
        products = torch.linalg.vecdot(self.masses, self._shifted)
        entropies: Tensor = self._totals.log() - products / self._totals
        return entropies.clamp_(min=0.0)

    def logprobs_of(self, token_ids: Tensor) -> Tensor:
        """Log-probabilities of tokens [n] or [n, k], in that shape."""
        if token_ids.ndim == 1:
            return self.logprobs_of(token_ids.unsqueeze(-1)).squeeze(-1)
        return self._shifted.gather(-1, token_ids) - self._totals.log().unsqueeze(-1)

    def logprobs_at(self, rows: Tensor) -> Tensor:
        """Normalised log-probabilities of some rows [m], [m, V]."""
        return self._shifted[rows] - self._totals[rows].log().unsqueeze(-1)

    def most_likely(self, rows: Tensor) -> Tensor:
        """Most likely tokens of some rows [m], [m]."""
        return self._shifted[rows].argmax(dim=-1)

    @cached_property
    def logprobs(self) -> Tensor:
        """[n, V] float32, nats."""
        return self._shifted - self._totals.log().unsqueeze(-1)

    @cached_property
    def probs(self) -> Tensor:
        """[n, V] float32."""
        return self.masses / self._totals.unsqueeze(-1)


def distribution(
    logits: Tensor, temperatures: Tensor | None = None, *, masses: Tensor | None = None
) -> Distribution:
    """Softmax of float32 logits [n, V] at temperatures [n] > 0; None is 1 everywhere.

    The logits are overwritten, and `masses` where it is given: fresh memory for a large vocabulary
    costs more than the softmax.
    """
    return Distribution(logits, temperatures, masses)


def draw(masses: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the CDF of unnormalised masses: [n, V], float64 [n] or [n, k] -> ids of that shape.

    Exact up to rounding: token v is drawn iff `cdf(v-1) <= u * total < cdf(v)`, so a token without
    mass is never drawn where the total is positive. Sums are float64, within blocks float32.
    """
    if uniforms.ndim == 1:
        return draw(masses, uniforms.unsqueeze(-1)).squeeze(-1)
    num_rows, num_tokens = masses.shape
    if num_tokens <= _FLAT_VOCABULARY:
        return _search(masses, uniforms)[0]
    if num_tokens % _BLOCK:
        masses = torch.nn.functional.pad(masses, (0, -num_tokens % _BLOCK))
    blocks = masses.view(num_rows, -1, _BLOCK)
    block, fraction = _invert(blocks.sum(dim=-1), uniforms)
    rows = torch.arange(num_rows, device=masses.device).unsqueeze(-1)
    inside = blocks[rows, block].flatten(0, 1)
    within = _search(inside, fraction.flatten().unsqueeze(-1))[0].view_as(block)
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


def _search(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index by inverse CDF [n, k], the CDF [n, V], and the mass that was looked for [n, k]."""
    cdf = masses.cumsum(dim=-1, dtype=torch.float64)
    target = uniforms * cdf[:, -1:]
    index = torch.searchsorted(cdf, target, right=True).clamp_(max=masses.shape[-1] - 1)
    return index, cdf, target


def _invert(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Index by inverse CDF [n, k], and where inside that index's share of mass u fell [n, k]."""
    index, cdf, target = _search(masses, uniforms)
    above = cdf.gather(-1, index)
    below = torch.where(index > 0, cdf.gather(-1, (index - 1).clamp(min=0)), 0.0)
    share = above - below
    fraction = torch.where(share > 0, (target - below) / share, 0.0)
    # Rounding may reach 1, which would step beyond the last token that has mass.
    return index, fraction.clamp(0.0, 1.0 - 2.0**-53)
