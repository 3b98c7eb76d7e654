"""The lazy sampler in a few lines of numpy over an enumerated tree, right or with one flaw.

The flaws are the mistakes that a fast sampler of pi_mix invites; each changes the distribution.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import numpy as np

from .comparison import Floats, Ints
from .response_tree import ResponseTree


class Flaw(StrEnum):
    """What a wrong sampler does."""

    EXPERT_FIRST = "the first token comes from the expert"
    BONUS_TOKEN = "a draft that the expert accepts is followed by a token of the expert"
    NO_RESIDUAL = "a rejected draft is replaced from pi* instead of the residual"
    KEPT_TAIL = "what was drafted after a rejected token stays"
    EARLY_END = "an end drafted after a rejected token stays"
    STALE_GATE = "the coin after a rejected token keeps the weight of the tail"


def sample_leaves(
    tree: ResponseTree, num_samples: int, rng: np.random.Generator, flaw: Flaw | None = None
) -> Ints:
    """Counts of each response of the tree among `num_samples` draws."""
    at = np.zeros(num_samples, np.int64)
    accepted = np.zeros(num_samples, np.bool_)
    """The draft before was gated and kept."""
    tail = np.full(num_samples, -1)
    """Where a policy that ran on past a rejected draft stands now, or -1."""
    is_first = True
    while (rows := np.flatnonzero(at >= 0)).size:
        here, stale = tree.tables[at[rows]], tail[rows] >= 0
        behind = tree.tables[np.where(stale, tail[rows], at[rows])]
        weights = behind.weights if flaw is Flaw.STALE_GATE else here.weights
        drafts = _draw(here.policy, rng)
        gated = rng.random(rows.size) < weights
        ratio = _of(here.expert, drafts) / _of(here.policy, drafts)
        rejected = gated & (rng.random(rows.size) >= ratio)
        excess = np.clip(here.expert - here.policy, 0, None)
        masses = here.expert if flaw is Flaw.NO_RESIDUAL else excess
        tokens = np.where(rejected, _draw(masses, rng), drafts)
        from_expert, from_tail = _draw(here.expert, rng), _draw(behind.policy, rng)
        if flaw is Flaw.EXPERT_FIRST and is_first:
            tokens = from_expert
        elif flaw is Flaw.BONUS_TOKEN:
            tokens = np.where(accepted[rows], from_expert, tokens)
        elif flaw is Flaw.KEPT_TAIL:
            tokens = np.where(stale, from_tail, tokens)
        elif flaw is Flaw.EARLY_END:
            children = tree.children[at[rows]]
            ends = (_of(children, from_tail) < 0) & (children >= 0).any(axis=1)
            tokens = np.where(stale & ends, from_tail, tokens)
        accepted[rows] = gated & ~rejected
        tail[rows] = np.where(rejected, tree.children[at[rows], drafts], -1)
        at[rows] = tree.children[at[rows], tokens]
        is_first = False
    return np.bincount(-1 - at, minlength=len(tree.responses))


def _draw(masses: Floats, rng: np.random.Generator) -> Ints:
    """Inverse CDF of unnormalised masses, [N, V] -> [N]; anything where all are 0."""
    cdf = masses.cumsum(axis=1)
    uniform = rng.random(len(masses)) * cdf[:, -1]
    drawn: Ints = (uniform[:, None] >= cdf).sum(axis=1).clip(max=masses.shape[1] - 1)
    return drawn


def _of(table: Any, tokens: Ints) -> Any:
    """One entry of each row, [N, V] and [N] -> [N]."""
    return table[np.arange(len(tokens)), tokens]
