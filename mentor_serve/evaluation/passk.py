"""Estimates from repeated samples of the same problem, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_Z_95 = 1.959963984540054


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples is right.

    Chen et al. 2021 (arXiv 2107.03374, section 2.1): the share of the k-subsets of the samples that
    hold a correct one, `1 - C(n - c, k) / C(n, k)`.

    >>> pass_at_k(4, 1, 2)
    0.5

    Raises:
        ValueError: not 1 <= k <= num_samples, or not 0 <= num_correct <= num_samples.
    """
    if not (1 <= k <= num_samples and 0 <= num_correct <= num_samples):
        raise ValueError(
            "expected 1 <= k <= num_samples and 0 <= num_correct <= num_samples, got "
            f"k = {k}, num_samples = {num_samples}, num_correct = {num_correct}"
        )
    # Exact integers: their quotient is right to the last bit for any number of samples.
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def wilson_interval(num_passed: int, num_trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of independent trials (Wilson 1927); 0 to 1 for none."""
    if num_trials == 0:
        return 0.0, 1.0
    share = num_passed / num_trials
    z_squared = _Z_95**2
    centre = share + z_squared / (2 * num_trials)
    spread = _Z_95 * math.sqrt(share * (1 - share) / num_trials + z_squared / (4 * num_trials**2))
    scale = 1 + z_squared / num_trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap_interval(
    values: Sequence[float], *, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean, resampling problems (not samples)."""
    if not values:
        return 0.0, 1.0
    bootstrap = ProblemBootstrap(len(values), num_resamples=num_resamples, seed=seed)
    return bootstrap.interval(values)


class ProblemBootstrap:
    """95 % percentile intervals of numbers that are sums over problems, from common resamples.

    Samples of one problem depend on each other; problems do not, so they are what is redrawn.
    """

    def __init__(self, num_problems: int, *, num_resamples: int = 2000, seed: int = 0) -> None:
        """Draw the resamples; the same arguments give the same ones.

        Raises:
            ValueError: fewer than one problem.
        """
        if num_problems < 1:
            raise ValueError(f"num_problems: expected at least 1, got {num_problems}")
        generator = np.random.default_rng(seed)
        # How often each problem was drawn is all that sums need, and small.
        chances = np.full(num_problems, 1 / num_problems)
        self._counts = generator.multinomial(num_problems, chances, num_resamples).astype(float)

    def interval(
        self, numerators: Sequence[float], denominators: Sequence[float] | None = None
    ) -> tuple[float, float]:
        """The interval of `sum(numerators) / sum(denominators)`, one entry a problem in each.

        Without denominators, of the mean. Resamples whose denominators sum to 0 do not count;
        (NaN, NaN) where no resample does.
        """
        sums = self._counts @ np.asarray(numerators, dtype=np.float64)
        if denominators is None:
            scale = np.full(len(sums), float(self._counts.shape[1]))
        else:
            scale = self._counts @ np.asarray(denominators, dtype=np.float64)
        ratios = sums[scale > 0] / scale[scale > 0]
        if ratios.size == 0:
            return math.nan, math.nan
        low, high = np.quantile(ratios, [0.025, 0.975])
        return float(low), float(high)
