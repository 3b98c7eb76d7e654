"""How far the policy runs on past positions that wait for the expert.

Running on postpones the expert's call, so that one call settles more positions; but what is drafted
beyond a draft that is then rejected is thrown away. Asking is an optimal stopping problem: one
round earns tokens and costs time, and the long-run rate is best if a round ends as soon as the
next policy pass is expected to earn tokens more slowly than the average (the marginal value
theorem; Charnov, "Optimal foraging", 1976). Everything it needs is measured while running: times of
passes and calls, settled tokens, and how often drafts like these were rejected.

The rule only ever decides *when* the expert is asked. What it answers, and so every token, does
not depend on it (see docs/sampling.md).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mentor_serve.engines.tails import MAX_OPEN

RunAheadLimit = Literal["auto"] | int

_MEMORY = 0.98
"""Weight of the past after one more measurement."""
_OUTLIER = 4.0
"""A measurement counts at most this many times the average: the machine did something else."""
_NUM_WEIGHTS, _NUM_PROBS = 4, 8
_PRIOR_COUNT = 4.0
_LEAST_SURVIVAL = 0.5
_MARGIN = 0.85
"""Near the best rate the rate hardly changes, while fewer drafts are thrown away the sooner the
expert is asked: so a round ends a little before its best length."""


class LinearCost:
    """Seconds as a linear function of the size of the work, with the past fading away."""

    def __init__(self) -> None:
        self._count = self._x = self._xx = self._t = self._xt = 0.0

    @property
    def is_known(self) -> bool:
        """Something was measured."""
        return self._count > 0

    def observe(self, size: float, seconds: float) -> None:
        """One piece of work took so long."""
        if self._count > 1:
            seconds = min(seconds, _OUTLIER * max(self.at(size), self._t / self._count))
        for name, value in (
            ("_count", 1.0),
            ("_x", size),
            ("_xx", size * size),
            ("_t", seconds),
            ("_xt", size * seconds),
        ):
            setattr(self, name, getattr(self, name) * _MEMORY + value)

    @property
    def slope(self) -> float:
        """Seconds for one more unit; 0 while sizes have been too alike to tell."""
        if not self.is_known:
            return 0.0
        mean_x, mean_t = self._x / self._count, self._t / self._count
        variance = self._xx / self._count - mean_x**2
        if variance <= 1e-2 * mean_x**2 or mean_x <= 0:
            return 0.0
        slope = (self._xt / self._count - mean_x * mean_t) / variance
        return min(max(slope, 0.0), mean_t / mean_x)

    def at(self, size: float) -> float:
        """Expected seconds for work of this size."""
        if not self.is_known:
            return 0.0
        return (self._t + self.slope * (size * self._count - self._x)) / self._count


class Rejections:
    """How often drafts were rejected, by the gate's weight and the draft's own probability."""

    def __init__(self) -> None:
        self._rejected = np.zeros(_NUM_WEIGHTS * _NUM_PROBS)
        self._judged = np.zeros(_NUM_WEIGHTS * _NUM_PROBS)
        self._rejected_of_all, self._judged_of_all = 0.5, 1.0

    def cells(
        self, weights: NDArray[np.float32], policy_logprobs: NDArray[np.float32]
    ) -> NDArray[np.int64]:
        """Which drafts are alike: [k], [k] -> [k]."""
        by_weight = np.minimum(weights * _NUM_WEIGHTS, _NUM_WEIGHTS - 1).astype(np.int64)
        by_prob = np.minimum(-2.0 * policy_logprobs, _NUM_PROBS - 1).astype(np.int64)
        cells: NDArray[np.int64] = by_weight * _NUM_PROBS + by_prob
        return cells

    def risks(self, cells: NDArray[np.int64]) -> NDArray[np.float64]:
        """Estimated probabilities of rejection [k]; near the overall rate where data are few."""
        overall = self._rejected_of_all / self._judged_of_all
        risks: NDArray[np.float64] = (self._rejected[cells] + _PRIOR_COUNT * overall) / (
            self._judged[cells] + _PRIOR_COUNT
        )
        return risks

    def learn(self, cells: NDArray[np.int64], is_rejected: NDArray[np.bool_]) -> None:
        """Count judged drafts [k]."""
        memory = _MEMORY ** (1.0 / 4.0)
        self._judged *= memory
        self._rejected *= memory
        np.add.at(self._judged, cells, 1.0)
        np.add.at(self._rejected, cells, is_rejected.astype(np.float64))
        self._judged_of_all = self._judged_of_all * memory + len(cells)
        self._rejected_of_all = self._rejected_of_all * memory + float(is_rejected.sum())


class RunAhead:
    """The rule. `limit` "auto" weighs costs; a number k always runs on to k open positions a row.

    With k = 0 every position is settled before the next token is drafted. A remote expert
    (`is_remote`) costs the policy no time: rows run on while that is more likely of use than not.
    """

    def __init__(self, limit: RunAheadLimit, *, is_remote: bool = False) -> None:
        self._limit = limit
        self._is_remote = is_remote
        self.rejections = Rejections()
        self._pass_cost = LinearCost()
        self._call_cost = LinearCost()
        self._seconds = self._tokens = self._drafted = self._read = 0.0

    def observe_pass(self, num_rows: int, seconds: float) -> None:
        """One policy pass over so many rows."""
        self._pass_cost.observe(num_rows, seconds)
        self._seconds = self._seconds * _MEMORY + min(
            seconds, _OUTLIER * self._pass_cost.at(num_rows)
        )
        self._drafted = self._drafted * _MEMORY + num_rows
        self._tokens *= _MEMORY
        self._read *= _MEMORY

    def observe_call(self, num_tokens: int, seconds: float) -> None:
        """One expert call that read so many tokens."""
        self._call_cost.observe(num_tokens, seconds)
        self._seconds += min(seconds, _OUTLIER * self._call_cost.at(num_tokens))
        self._read += num_tokens

    def observe_settled(self, num_tokens: int) -> None:
        """So many more tokens are final."""
        self._tokens += num_tokens

    def may_go_on(
        self, num_open: NDArray[np.int64], survival: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """Which rows may draft another token: [n], [n] -> [n]."""
        if self._limit != "auto":
            limit = min(max(self._limit, 1), MAX_OPEN)
            return np.less(num_open, limit)
        worth = survival * self._seconds_per_token >= self._read_cost
        if self._is_remote:
            worth = survival >= _LEAST_SURVIVAL
        goes_on: NDArray[np.bool_] = (num_open == 0) | (worth & (num_open < MAX_OPEN))
        return goes_on

    @property
    def asks_at_once(self) -> bool:
        """An expert that costs the policy no time is asked as soon as a position is open."""
        return self._limit in ("auto", 0)

    def should_ask(self, survival: NDArray[np.float64], *, num_rows: int) -> bool:
        """Ask before the next pass, over `num_rows` rows of which these may go on: [k].

        Called where positions are open and k > 0; where no row may go on, the expert must be asked.
        """
        if self._limit != "auto":
            return self._limit == 0
        if not self._call_cost.is_known:
            return True
        earned = _MARGIN * float(survival.sum()) * self._seconds_per_token
        spent = self._pass_cost.at(num_rows) + self._read_cost * len(survival)
        return earned < spent

    @property
    def _seconds_per_token(self) -> float:
        return self._seconds / max(self._tokens, 1.0)

    @property
    def _read_cost(self) -> float:
        """Seconds that the expert will take to read one more drafted token."""
        return self._call_cost.slope * min(1.0, self._read / max(self._drafted, 1.0))
