"""Evaluates a model on tasks: samples, verifies, summarises.

Contract: every task counts with the same number of samples; a response that could not be judged
counts as wrong and is reported in `num_unjudged`. Nothing is stored here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mentor_serve.errors import ConfigError, EngineError, VerifierError
from mentor_serve.evaluation.measures import (
    WORD_PREFIX,
    Measure,
    ProblemCounts,
    measure_problems,
)
from mentor_serve.evaluation.words import FIGURE_3_WORDS, word_shares
from mentor_serve.rollout.groups import derive_seed
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.verifiers.pool import VerifierPool
from mentor_serve.types import Rollout, RolloutRequest, SamplingParams, Score, StopReason, Task

Generate = Callable[[list[RolloutRequest]], Awaitable[list[list[Rollout]]]]
"""Gives `num_samples` rollouts for each request, in order."""

_BATCH_PROBLEMS = 64
DEFAULT_KS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """What a model did on a set of problems, at one temperature."""

    num_problems: int
    num_samples: int
    """Responses to each problem."""
    temperature: float
    measures: tuple[Measure, ...]
    num_unjudged: int
    """Responses whose verifier failed; they count as wrong."""
    accuracy_by_problem: list[float]
    """Mean accuracy of each problem, in the order of the tasks."""
    num_correct_by_problem: list[int]
    """Wholly right responses to each problem: what pass@k is made of."""

    def measure(self, metric: str, k: int | None = None) -> Measure:
        """The number of that name.

        Raises:
            KeyError: it was not measured.
        """
        for measure in self.measures:
            if (measure.metric, measure.k) == (metric, k):
                return measure
        raise KeyError(f"{metric}, k = {k}")

    @property
    def accuracy(self) -> float:
        """Mean over all responses: avg@num_samples; pass@1 where sampling is greedy."""
        return self.measure("avg_at_k", self.num_samples).value

    @property
    def pass_at(self) -> dict[int, float]:
        """Unbiased pass@k for every k that was asked for and is at most `num_samples`."""
        return {m.k: m.value for m in self.measures if m.metric == "pass_at_k" and m.k}

    @property
    def word_shares(self) -> dict[str, float]:
        """Share of responses with each word (Figure 3)."""
        words = (m for m in self.measures if m.metric.startswith(WORD_PREFIX))
        return {m.metric.removeprefix(WORD_PREFIX): m.value for m in words}

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return dataclasses.asdict(self)


async def evaluate(  # noqa: PLR0913 - the knobs of one evaluation, all named
    generate: Generate,
    renderer: PromptRenderer,
    verifier_pool: VerifierPool,
    tasks: Sequence[Task],
    *,
    num_samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 96,
    seed: int = 0,
    ks: Sequence[int] = DEFAULT_KS,
    words: Sequence[str] = FIGURE_3_WORDS,
    on_progress: Callable[[int, int], None] | None = None,
) -> EvaluationReport:
    """Sample every task and summarise; the same seed gives the same requests.

    Args:
        generate: the engine.
        renderer: makes the prompts, with the policy's tokenizer.
        verifier_pool: judges the responses.
        tasks: problems to evaluate on; keep them apart from training (`TaskSource.holdout`).
        num_samples: responses to each problem; 1 at temperature 0.
        temperature: 0 is greedy (paper: pass@1 greedy; avg@32 and pass@32 at 0.6).
        max_new_tokens: longest response.
        seed: of the samples.
        ks: values of k; those above `num_samples` are left out.
        words: what to look for in the responses.
        on_progress: called with (problems done, problems).

    Raises:
        ConfigError: no task, or several samples of a greedy model.
        EngineError: not as many rollouts as were asked for.
    """
    if not tasks:
        raise ConfigError("expected at least one task to evaluate on, got none")
    if num_samples < 1 or (num_samples > 1 and temperature == 0):
        raise ConfigError(
            "expected num_samples >= 1, and a temperature above 0 for several samples, got "
            f"num_samples = {num_samples} at temperature {temperature}"
        )
    sampling = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens)
    judged: list[list[_Judged]] = []
    for start in range(0, len(tasks), _BATCH_PROBLEMS):
        batch = tasks[start : start + _BATCH_PROBLEMS]
        requests = [
            RolloutRequest(
                prompt_token_ids=tuple(renderer.render(task)),
                num_samples=num_samples,
                seed=derive_seed(seed, "evaluation", start + offset),
                sampling=sampling,
            )
            for offset, task in enumerate(batch)
        ]
        judged += await _judge(
            batch, await generate(requests), num_samples, renderer, verifier_pool
        )
        if on_progress is not None:
            on_progress(len(judged), len(tasks))
    problems = [_counts(of_task, words) for of_task in judged]
    return EvaluationReport(
        num_problems=len(judged),
        num_samples=num_samples,
        temperature=temperature,
        measures=tuple(measure_problems(problems, ks=ks)),
        num_unjudged=sum(not isinstance(r.outcome, Score) for of_task in judged for r in of_task),
        accuracy_by_problem=[problem.accuracy / num_samples for problem in problems],
        num_correct_by_problem=[problem.num_correct for problem in problems],
    )


@dataclass(frozen=True, slots=True)
class _Judged:
    rollout: Rollout
    text: str
    outcome: Score | VerifierError

    @property
    def accuracy(self) -> float:
        return self.outcome.accuracy if isinstance(self.outcome, Score) else 0.0


async def _judge(
    tasks: Sequence[Task],
    rollouts: Sequence[Sequence[Rollout]],
    num_samples: int,
    renderer: PromptRenderer,
    verifier_pool: VerifierPool,
) -> list[list[_Judged]]:
    came = [len(of_task) for of_task in rollouts]
    if came != [num_samples] * len(tasks):
        raise EngineError(
            f"expected {num_samples} rollouts for each of {len(tasks)} tasks, got {came}"
        )
    flat = [
        (task, rollout, renderer.decode(rollout))
        for task, of_task in zip(tasks, rollouts, strict=True)
        for rollout in of_task
    ]
    prefix = renderer.response_prefix
    outcomes = await verifier_pool.score_batch([(task, prefix + text) for task, _, text in flat])
    judged = [
        _Judged(rollout, text, outcome)
        for (_, rollout, text), outcome in zip(flat, outcomes, strict=True)
    ]
    return [judged[start : start + num_samples] for start in range(0, len(judged), num_samples)]


def _counts(responses: Sequence[_Judged], words: Sequence[str]) -> ProblemCounts:
    scores = [r.outcome for r in responses if isinstance(r.outcome, Score)]
    shares = word_shares((r.text for r in responses), words)
    return ProblemCounts(
        num_samples=len(responses),
        num_correct=sum(r.accuracy >= 1.0 for r in responses),
        accuracy=sum(r.accuracy for r in responses),
        reward=sum(score.reward for score in scores),
        format_score=sum(score.format_score for score in scores),
        entropy=sum(float(np.sum(r.rollout.entropies, dtype=np.float64)) for r in responses),
        num_tokens=sum(r.rollout.num_tokens for r in responses),
        num_truncated=sum(r.rollout.stop_reason is StopReason.LENGTH for r in responses),
        num_with_word={word: round(share * len(responses)) for word, share in shares.items()},
        is_binary=all(r.accuracy in (0.0, 1.0) for r in responses),
    )
