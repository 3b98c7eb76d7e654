"""Numbers of an evaluation with their 95 % intervals: what becomes rows of `evaluations`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mentor_serve.evaluation.passk import ProblemBootstrap, pass_at_k, wilson_interval

WORD_PREFIX = "word_share:"
"""`word_share:verify` is the share of responses with the word "verify"."""
GREEDY_PREFIX = "greedy_"
"""Before the name of every number that was measured at temperature 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One number. Shares are in [0, 1], entropies in nats, lengths in tokens."""

    metric: str
    k: int | None = None
    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float

    @property
    def label(self) -> str:
        """For people: `pass@4`, `mean_tokens`."""
        return self.metric if self.k is None else f"{self.metric.removesuffix('_at_k')}@{self.k}"

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemCounts:
    """What the responses to one problem add up to."""

    num_samples: int
    num_correct: int
    """Wholly right ones: partial credit is no success."""
    accuracy: float
    """Sum over the responses, as are all below."""
    reward: float
    format_score: float
    entropy: float
    num_tokens: int
    num_truncated: int
    num_with_word: dict[str, int]
    is_binary: bool
    """Every accuracy was 0 or 1."""


def measure_problems(
    problems: Sequence[ProblemCounts], *, ks: Sequence[int], seed: int = 0
) -> list[Measure]:
    """All numbers of a set of problems with as many responses each.

    Intervals are of resampled problems; Wilson's for a single right or wrong response a problem.
    Values of k above the number of responses are left out.
    """
    num_samples = problems[0].num_samples
    bootstrap = ProblemBootstrap(len(problems), seed=seed)

    def share(metric: str, sums: Sequence[float], k: int | None = None) -> Measure:
        return _ratio(bootstrap, metric, sums, [num_samples] * len(sums), k=k)

    measures = [_accuracy(problems, share("avg_at_k", [p.accuracy for p in problems], num_samples))]
    for k in sorted({k for k in ks if 1 <= k <= num_samples}):
        passed = [pass_at_k(num_samples, p.num_correct, k) for p in problems]
        measure = _ratio(bootstrap, "pass_at_k", passed, [1] * len(passed), k=k)
        measures.append(_accuracy(problems, measure))
    tokens = [p.num_tokens for p in problems]
    return [
        *measures,
        share("mean_reward", [p.reward for p in problems]),
        share("mean_format", [p.format_score for p in problems]),
        _ratio(bootstrap, "mean_entropy", [p.entropy for p in problems], tokens),
        share("mean_tokens", tokens),
        share("truncated_share", [p.num_truncated for p in problems]),
        *(
            share(WORD_PREFIX + word, [p.num_with_word[word] for p in problems])
            for word in problems[0].num_with_word
        ),
    ]


def _ratio(
    bootstrap: ProblemBootstrap,
    metric: str,
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    k: int | None = None,
) -> Measure:
    total = float(np.sum(denominators))
    value = float(np.sum(numerators, dtype=np.float64)) / total if total else 0.0
    low, high = bootstrap.interval(numerators, denominators)
    return Measure(metric=metric, k=k, value=value, low=low, high=high)


def _accuracy(problems: Sequence[ProblemCounts], measure: Measure) -> Measure:
    """Wilson's interval in place of the bootstrap's, where trials are independent.

    The bootstrap of 20 failures would say "exactly 0".
    """
    if problems[0].num_samples > 1 or not all(p.is_binary for p in problems):
        return measure
    low, high = wilson_interval(sum(p.num_correct for p in problems), len(problems))
    return Measure(metric=measure.metric, k=measure.k, value=measure.value, low=low, high=high)
