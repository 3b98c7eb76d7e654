from itertools import combinations
from statistics import mean

import pytest

from mentor_serve.evaluation import pass_at_k
from mentor_serve.evaluation.passk import bootstrap_interval, wilson_interval


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_correct_sample(num_samples: int) -> None:
    for num_correct in range(num_samples + 1):
        samples = [index < num_correct for index in range(num_samples)]
        for k in range(1, num_samples + 1):
            enumerated = mean(float(any(subset)) for subset in combinations(samples, k))
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(enumerated, abs=1e-15)


def test_pass_at_k_does_not_overflow() -> None:
    assert pass_at_k(100_000, 1, 50_000) == 0.5
    assert pass_at_k(100_000, 0, 50_000) == 0.0
    assert pass_at_k(100_000, 50_001, 50_000) == 1.0


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1), (0, 0, 1)]
)
def test_what_cannot_be_estimated_is_refused(num_samples: int, num_correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected 1 <= k <= num_samples"):
        pass_at_k(num_samples, num_correct, k)


def test_the_wilson_interval_matches_published_values() -> None:
    # Newcombe 1998, table I: 81/263, 15/148 and 0/20 by the score method.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_the_bootstrap_interval_is_close_to_the_normal_one_and_repeatable() -> None:
    values = [0.0, 1.0] * 200
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.01)
    assert bootstrap_interval([0.25] * 10) == pytest.approx((0.25, 0.25))
    assert bootstrap_interval([]) == (0.0, 1.0)
