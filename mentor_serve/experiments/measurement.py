"""Evaluates the weights of one moment on validation or test problems."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mentor_serve.engines import TorchEngine
from mentor_serve.evaluation.plan import EvaluationPlan, SuiteReport, run_plan
from mentor_serve.evaluation.suite import EvaluationReport
from mentor_serve.experiments.presets import Preset, Suite
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.tasks import TaskSource, build_source
from mentor_serve.rollout.verifiers.pool import VerifierPool
from mentor_serve.types import Rollout, RolloutRequest, Task

VALIDATION = "validation"
BuildSource = Callable[[int], TaskSource]
_PROBLEM_SEED = 1_000
"""Of the evaluation problems, the same for every arm and seed; training draws other texts whatever
its seed (rollout.tasks.reasoning_gym)."""


def split_problems(
    suite: Suite, own: BuildSource, *, num_validation: int, num_test: int
) -> dict[str, list[Task]]:
    """Validation and test problems of a suite; no text is in both.

    Args:
        suite: which problems.
        own: builds the source of the tasks that are trained on, with a given seed.
        num_validation: problems to choose by.
        num_test: problems to report.

    Raises:
        ConfigError: the suite cannot spare so many.
    """
    if suite.generator is None:
        source = own(_PROBLEM_SEED)
    else:
        source = build_source(
            source="reasoning_gym",
            name=suite.generator,
            config=dict(suite.config),
            seed=_PROBLEM_SEED,
        )
    tasks = source.holdout(num_validation + num_test)
    return {VALIDATION: tasks[:num_validation], "test": tasks[num_validation:]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Measures whatever weights `engine` holds."""

    engine: TorchEngine
    renderer: PromptRenderer
    verifier_pool: VerifierPool
    max_new_tokens: int

    async def measure(
        self,
        suite: str,
        tasks: Sequence[Task],
        *,
        num_samples: int,
        temperature: float,
        ks: Sequence[int],
    ) -> SuiteReport:
        """Greedy responses, and `num_samples` sampled ones, to every problem.

        The samples' seeds are the same for all weights.
        """
        plan = EvaluationPlan(
            suite=suite,
            num_problems=len(tasks),
            num_samples=num_samples,
            temperature=temperature,
            max_new_tokens=self.max_new_tokens,
            ks=tuple(ks),
        )
        return await run_plan(self._generate, self.renderer, self.verifier_pool, tasks, plan)

    async def _generate(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        return self.engine.generate(requests)


def entry_of(report: SuiteReport, *, step: int, suite: str, split: str) -> dict[str, Any]:
    """What the trial's log keeps of a report: every number, and who solved what."""
    return {
        "step": step,
        "suite": suite,
        "split": split,
        "num_problems": report.plan.num_problems,
        "num_samples": report.plan.num_samples,
        "num_unjudged": report.num_unjudged,
        "measures": {measure.label: measure.value for _, measure in report.measured},
        "greedy_by_problem": _rounded(report.greedy),
        "accuracy_by_problem": _rounded(report.sampled),
        "num_correct_by_problem": None
        if report.sampled is None
        else list(report.sampled.num_correct_by_problem),
    }


def _rounded(part: EvaluationReport | None) -> list[float] | None:
    return None if part is None else [round(value, 4) for value in part.accuracy_by_problem]


def problems_of(
    suites: Iterable[Suite], preset: Preset, own: BuildSource
) -> dict[str, dict[str, list[Task]]]:
    """Validation and test problems of suites, by their names."""
    return {
        suite.name: split_problems(
            suite, own, num_validation=preset.num_validation, num_test=preset.num_test
        )
        for suite in suites
    }
