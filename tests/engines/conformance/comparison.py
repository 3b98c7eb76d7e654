"""Statistics that tell a sampler from the distribution it should follow.

`FALSE_ALARM` is the probability with which one test fails a correct sampler on a fresh seed; the
seeds are fixed, so that a test which passes once always passes. Shapes: N draws, C cells.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, chisquare

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FALSE_ALARM = 1e-4
_FEWEST_EXPECTED = 5.0
"""Cells that expect fewer draws are pooled, as the chi-square approximation wants."""


def chi_square_p_value(counts_C: Ints, probabilities_C: Floats) -> float:
    """p-value of independent draws from one distribution; 0 if a draw was impossible."""
    expected = probabilities_C * counts_C.sum()
    if counts_C[expected == 0].any():
        return 0.0
    rare = expected < _FEWEST_EXPECTED
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(counts_C[~rare], counts_C[rare].sum()).astype(np.float64)
    kept = expected > 0
    expected, observed = expected[kept], observed[kept]
    # chisquare wants equal totals to within rounding.
    return float(chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue)


def conditional_p_value(drawn_N: Ints, probabilities_NC: Floats) -> float:
    """p-value of draws that each have their own distribution, given what was drawn before.

    The residuals `1[draw i = c] - P(c | past of i)` are martingale differences, so that their sum
    over i is asymptotically normal with covariance `sum_i diag(P_i) - P_i P_i'`; its Mahalanobis
    length is chi-square. Any selection of draws by their past keeps that true. 0 if a draw was
    impossible.
    """
    if not (probabilities_NC[np.arange(len(drawn_N)), drawn_N] > 0).all():
        return 0.0
    expected_C = probabilities_NC.sum(axis=0)
    rare = expected_C < _FEWEST_EXPECTED
    pooled = np.column_stack([probabilities_NC[:, ~rare], probabilities_NC[:, rare].sum(axis=1)])
    observed_C = np.bincount(drawn_N, minlength=len(expected_C)).astype(np.float64)
    observed = np.append(observed_C[~rare], observed_C[rare].sum())
    residuals = observed - pooled.sum(axis=0)
    covariance = np.diag(pooled.sum(axis=0)) - pooled.T @ pooled
    # Cells add up to one: the likeliest is implied by the others. A pool of nothing is left out.
    kept = pooled.sum(axis=0) > 0
    kept[pooled.sum(axis=0).argmax()] = False
    if not kept.any():
        return 1.0
    length = residuals[kept] @ np.linalg.solve(covariance[np.ix_(kept, kept)], residuals[kept])
    return float(chi2.sf(length, df=int(kept.sum())))


def by_rank(drawn_N: Ints, probabilities_NC: Floats, ranks_NC: Ints) -> tuple[Ints, Floats]:
    """Draws and probabilities with each row's cells renamed to their ranks."""
    ordered = np.empty_like(probabilities_NC)
    np.put_along_axis(ordered, ranks_NC, probabilities_NC, axis=1)
    return ranks_NC[np.arange(len(drawn_N)), drawn_N], ordered


def binomial_z(count: int, probabilities_N: Floats) -> float:
    """How many standard deviations a number of successes is off, each with its probability."""
    variance = float((probabilities_N * (1 - probabilities_N)).sum())
    return (count - float(probabilities_N.sum())) / math.sqrt(variance)


def total_variation(counts_C: Ints, probabilities_C: Floats) -> float:
    """Half the L1 distance of the observed frequencies from the probabilities."""
    return 0.5 * float(np.abs(counts_C / counts_C.sum() - probabilities_C).sum())


def total_variation_bound(num_draws: int, num_cells: int) -> float:
    """What the observed total variation exceeds with probability `FALSE_ALARM` at most.

    Its mean is at most `0.5 sum_c sqrt(p_c (1 - p_c) / n) <= 0.5 sqrt((C - 1) / n)` (Jensen,
    Cauchy-Schwarz); one draw moves it by at most 1/n, so McDiarmid's inequality adds
    `sqrt(ln(1 / FALSE_ALARM) / (2 n))`.
    """
    mean = 0.5 * math.sqrt((num_cells - 1) / num_draws)
    return mean + math.sqrt(math.log(1 / FALSE_ALARM) / (2 * num_draws))
