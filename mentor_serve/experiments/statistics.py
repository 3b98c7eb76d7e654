"""Intervals and paired tests over seeds and problems.

Two things are random in a comparison: the training run (its seed) and the problems it is measured
on. A number by seed and problem is therefore resampled in both (a two-level bootstrap); one that
exists by seed alone, over seeds. All intervals are 95 % percentile intervals of 10,000 resamples
with a fixed seed, so that the same results give the same intervals. With five seeds they are
somewhat too narrow: the paired t-test beside them does not have that fault.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

NUM_RESAMPLES = 10_000
_LEVELS = (0.025, 0.975)

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    """The means of the single runs, in the order of their seeds."""

    def overlaps(self, other: Estimate) -> bool:
        """Whether the intervals have a point in common."""
        return self.low <= other.high and other.low <= self.high


def estimate(values_SP: Sequence[Sequence[float]] | Matrix) -> Estimate:
    """Mean over seeds and problems, [S, P], resampled in both; [S, 1] resamples seeds alone.

    The same problems are drawn for all seeds: they share them.

    Raises:
        ValueError: not a matrix with at least one entry, or a value that is no number.
    """
    matrix = np.asarray(values_SP, np.float64)
    if matrix.ndim != 2 or matrix.size == 0 or not np.isfinite(matrix).all():
        raise ValueError(f"expected finite numbers [seeds, problems], got shape {matrix.shape}")
    low, high = np.quantile(_resampled_means(matrix), _LEVELS)
    return Estimate(
        value=float(matrix.mean()),
        low=float(low),
        high=float(high),
        by_seed=tuple(matrix.mean(1).tolist()),
    )


def _resampled_means(matrix_SP: Matrix) -> Matrix:
    num_seeds, num_problems = matrix_SP.shape
    seeds, problems = _draws(num_seeds, num_problems)
    means: Matrix = ((seeds @ matrix_SP) * problems).sum(1) / (num_seeds * num_problems)
    return means


@cache
def _draws(num_seeds: int, num_problems: int) -> tuple[Matrix, Matrix]:
    """How often each seed and each problem is in each resample: all that a mean needs."""
    generator = np.random.default_rng(0)
    seeds, problems = (
        generator.multinomial(count, np.full(count, 1 / count), NUM_RESAMPLES).astype(float)
        for count in (num_seeds, num_problems)
    )
    return seeds, problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """One arm minus another on the same seeds and problems."""

    difference: Estimate
    p_value: float | None
    """Two-sided paired t-test over seeds; None for a single seed, or differences that are equal."""


def paired(ours_SP: Matrix, theirs_SP: Matrix) -> Paired:
    """Compare two arms, [S, P] each.

    Raises:
        ValueError: different seeds or problems.
    """
    if ours_SP.shape != theirs_SP.shape:
        raise ValueError(
            f"expected the same seeds and problems, got {ours_SP.shape} and {theirs_SP.shape}"
        )
    difference = estimate(ours_SP - theirs_SP)
    p_value = None
    if len(difference.by_seed) > 1 and np.ptp(difference.by_seed) > 0:
        p_value = float(stats.ttest_1samp(difference.by_seed, 0.0).pvalue)
    return Paired(difference=difference, p_value=None if _is_nan(p_value) else p_value)


def _is_nan(value: float | None) -> bool:
    return value is not None and math.isnan(value)
