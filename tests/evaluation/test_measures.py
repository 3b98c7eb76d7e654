import math

import pytest

from mentor_serve.evaluation.measures import ProblemCounts, measure_problems
from mentor_serve.evaluation.passk import ProblemBootstrap


def problem(num_correct: int, *, num_samples: int = 4, num_tokens: int = 8) -> ProblemCounts:
    return ProblemCounts(
        num_samples=num_samples,
        num_correct=num_correct,
        accuracy=float(num_correct),
        reward=0.9 * num_correct,
        format_score=float(num_samples),
        entropy=0.5 * num_tokens,
        num_tokens=num_tokens,
        num_truncated=0,
        num_with_word={"wait": num_correct},
        is_binary=True,
    )


def test_the_bootstrap_of_a_ratio_redraws_numerator_and_denominator_together() -> None:
    bootstrap = ProblemBootstrap(50)
    lengths = [float(n) for n in range(1, 51)]
    # The same ratio in each problem is the ratio of every resample, whatever the lengths.
    assert bootstrap.interval([0.25 * n for n in lengths], lengths) == pytest.approx((0.25, 0.25))


def test_a_ratio_without_any_denominator_has_no_interval() -> None:
    low, high = ProblemBootstrap(3).interval([0.0] * 3, [0.0] * 3)
    assert math.isnan(low)
    assert math.isnan(high)


def test_no_problem_cannot_be_redrawn() -> None:
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        ProblemBootstrap(0)


def test_intervals_shrink_with_the_square_root_of_the_number_of_problems() -> None:
    def half_width(count: int) -> float:
        measures = measure_problems([problem(n % 5) for n in range(count)], ks=(1,))
        return measures[0].half_width

    assert half_width(1600) == pytest.approx(half_width(100) / 4, rel=0.1)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """300 evaluations of 60 problems whose true pass rate is 0.3: binomial(300, 0.95) is below
    270 with probability 3e-4, and the percentile bootstrap is a little short at 60 problems."""
    import numpy as np

    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        draws = generator.binomial(4, generator.beta(0.6, 1.4, 60))
        measure = measure_problems([problem(int(n)) for n in draws], ks=())[0]
        covered += measure.low <= 0.3 <= measure.high
    assert 265 <= covered <= 299


def test_labels_read_like_the_literature() -> None:
    measures = measure_problems([problem(1)], ks=(2, 8))
    labels = [m.label for m in measures]
    assert labels[:3] == ["avg@4", "pass@2", "mean_reward"]
    assert labels[-1] == "word_share:wait"
