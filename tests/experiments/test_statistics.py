"""Intervals and paired tests: values by hand, and how often they hold."""

from __future__ import annotations

import numpy as np
import pytest

from mentor_serve.experiments.statistics import estimate, paired


def test_an_estimate_is_the_mean_with_an_interval_around_it():
    found = estimate([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    assert found.value == 0.625
    assert found.by_seed == (0.75, 0.5)
    assert 0.0 <= found.low < 0.625 < found.high <= 1.0
    assert estimate([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]) == found


def test_equal_runs_leave_nothing_to_doubt():
    found = estimate([[0.25], [0.25], [0.25]])
    assert (found.low, found.value, found.high) == (0.25, 0.25, 0.25)


def test_the_interval_has_both_sources_of_chance():
    rng = np.random.default_rng(0)
    seeds, problems = rng.normal(0, 1, (8, 1)), rng.normal(0, 1, (1, 200))
    noise = rng.normal(0, 0.1, (8, 200))
    width = {
        name: (found := estimate(matrix)).high - found.low
        for name, matrix in {
            "seeds": seeds + noise,
            "problems": problems + noise,
            "both": seeds + problems + noise,
        }.items()
    }
    # Standard errors: 1/sqrt(8) = 0.35 of seeds, 1/sqrt(200) = 0.07 of problems; times 2 * 1.96.
    assert 0.7 < width["seeds"] < 1.7
    assert 0.2 < width["problems"] < 0.35
    assert width["both"] > width["problems"]


def test_ninety_five_percent_intervals_cover_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    num_covered = 0
    for _ in range(200):
        found = estimate(rng.normal(0, 1, (20, 1)) + rng.normal(0, 1, (1, 50)))
        num_covered += found.low <= 0 <= found.high
    # Percentile intervals of 20 seeds are a little narrow: 93 % is what theory says. Below 0.87 or
    # above 0.99 comes by chance once in a thousand.
    assert 0.87 < num_covered / 200 < 0.99


def test_a_paired_test_sees_what_unpaired_intervals_hide():
    rng = np.random.default_rng(2)
    level = rng.normal(0.5, 0.2, (5, 1))
    theirs = level + rng.normal(0, 0.01, (5, 40))
    ours = level + 0.05 + rng.normal(0, 0.01, (5, 40))
    assert estimate(ours).overlaps(estimate(theirs))
    found = paired(ours, theirs)
    assert found.difference.value == pytest.approx(0.05, abs=0.01)
    assert found.difference.low > 0
    assert found.p_value is not None
    assert found.p_value < 0.001


def test_a_single_seed_or_equal_differences_have_no_p_value():
    assert paired(np.ones((1, 3)), np.zeros((1, 3))).p_value is None
    assert paired(np.ones((4, 3)), np.zeros((4, 3))).p_value is None


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ValueError, match=r"got shape \(0,\)"):
        estimate([])
    with pytest.raises(ValueError, match="finite"):
        estimate([[1.0, float("nan")]])
    with pytest.raises(ValueError, match=r"same seeds and problems, got \(2, 3\) and \(2, 4\)"):
        paired(np.ones((2, 3)), np.ones((2, 4)))
