"""How many tokens the policy drafts ahead: fewer where the expert rejects more.

A draft behind a rejected one is wasted. With s the share of drafts reached that stand, the k-th is
reached with probability s^(k-1); one that is reached less often than every second time is not
drafted. What is sampled does not depend on it, because every draw is a function of its position.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mentor_serve.engines.vllm.rows import StepRecords
from mentor_serve.errors import ConfigError
from mentor_serve.types import TokenSource

_MEMORY = 0.95
"""What a step leaves of the weight of those before it."""
_PRIOR = 16.0
"""Drafts that are taken to have stood before the first step."""
_WORTH = 0.5
"""Least probability of being reached at which a token is drafted."""


class DraftLength:
    """Sets the length in the scheduler of a core that drafts, between its steps.

    Args:
        scheduler: vLLM's, started with `num_speculative_tokens_per_batch_size`.
        most: the most tokens to draft.

    Raises:
        ConfigError: the scheduler is built differently than that of vLLM 0.32.
    """

    def __init__(self, scheduler: Any, *, most: int) -> None:
        lookup = getattr(scheduler, "dynamic_sd_lookup", None)
        if not isinstance(lookup, list):
            raise ConfigError(
                "vLLM's scheduler lacks the list `dynamic_sd_lookup`, which version 0.32.0 has; "
                "install that"
            )
        self._lookup: list[int] = lookup
        self._most = most
        self._reached = _PRIOR
        self._rejected = 0.0

    def adapt(self, records: StepRecords) -> None:
        """Take a step's verdicts into account."""
        reached = int(records.counts.sum())
        if not reached:
            return
        rejected = int(np.count_nonzero(records.records["sources"] == TokenSource.EXPERT))
        self._reached = _MEMORY * self._reached + reached
        self._rejected = _MEMORY * self._rejected + rejected
        # One length for every number of rows, by which vLLM looks it up.
        self._lookup[:] = [self.num_tokens] * len(self._lookup)

    @property
    def num_tokens(self) -> int:
        """Tokens to draft in the next step, at least 1."""
        stands = 1 - self._rejected / self._reached
        if stands <= _WORTH:
            return 1
        if stands >= _WORTH ** (1 / self._most):
            return self._most
        return 1 + int(math.log(_WORTH) / math.log(stands))
