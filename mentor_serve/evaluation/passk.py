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
    """Return the 95 % percentile interval of the mean, resampling problems (not samples).

    Samples of one problem depend on each other; problems do not, so they are what is redrawn.
    """
    if not values:
        return 0.0, 1.0
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    # One row at a time would be slow, all at once large: counts of each problem are enough.
    counts = generator.multinomial(len(array), np.full(len(array), 1 / len(array)), num_resamples)
    means = counts @ array / len(array)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
