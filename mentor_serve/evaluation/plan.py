"""One evaluation of one model: greedy and sampled responses to the same problems, one set of rows.

Contract: the numbers of a `SuiteReport` belong to one set of weights; whoever runs a plan gives a
`generate` whose weights do not change meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mentor_serve.errors import ConfigError
from mentor_serve.evaluation.measures import GREEDY_PREFIX, WORD_PREFIX, Measure
from mentor_serve.evaluation.suite import DEFAULT_KS, EvaluationReport, Generate, evaluate
from mentor_serve.evaluation.words import FIGURE_3_WORDS
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.verifiers.pool import VerifierPool
from mentor_serve.types import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """What to measure."""

    suite: str
    """Name of the problems in `evaluations.suite`."""
    num_problems: int = 200
    num_samples: int = 8
    """Sampled responses to each problem; 0 leaves sampling out."""
    temperature: float = 0.6
    """Of sampled responses (paper: 0.6)."""
    has_greedy: bool = True
    """Also answer each problem once at temperature 0 (paper: pass@1)."""
    max_new_tokens: int = 96
    seed: int = 0
    ks: tuple[int, ...] = DEFAULT_KS
    words: tuple[str, ...] = FIGURE_3_WORDS

    def __post_init__(self) -> None:
        if self.num_samples == 0 and not self.has_greedy:
            raise ConfigError(
                "expected greedy responses, sampled ones or both, got num_samples = 0 without "
                "greedy; raise one of them"
            )
        if self.num_samples > 0 and not self.temperature > 0:
            raise ConfigError(
                f"expected a temperature above 0 for {self.num_samples} sampled responses, got "
                f"{self.temperature}; num_samples = 0 measures greedy responses alone"
            )

    @property
    def num_responses(self) -> int:
        """Responses to all problems."""
        return self.num_problems * (self.num_samples + self.has_greedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteReport:
    """What came of a plan."""

    plan: EvaluationPlan
    greedy: EvaluationReport | None
    sampled: EvaluationReport | None

    @property
    def measured(self) -> list[tuple[EvaluationReport, Measure]]:
        """Every number with the part that it comes from, names unique.

        Greedy ones have `greedy_` before their name. Words are counted in sampled responses, in
        greedy ones only where nothing was sampled.
        """
        rows: list[tuple[EvaluationReport, Measure]] = []
        if self.greedy is not None:
            for measure in self.greedy.measures:
                if self.sampled is None or not measure.metric.startswith(WORD_PREFIX):
                    renamed = replace(measure, metric=GREEDY_PREFIX + measure.metric)
                    rows.append((self.greedy, renamed))
        if self.sampled is not None:
            rows += [(self.sampled, measure) for measure in self.sampled.measures]
        return rows

    @property
    def num_unjudged(self) -> int:
        """Responses whose verifier failed; they count as wrong."""
        return sum(part.num_unjudged for part in (self.greedy, self.sampled) if part is not None)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **asdict(self.plan),
            "num_unjudged": self.num_unjudged,
            "measures": [
                {**asdict(item), "num_samples": part.num_samples, "temperature": part.temperature}
                for part, item in self.measured
            ],
        }


async def run_plan(
    generate: Generate,
    renderer: PromptRenderer,
    verifier_pool: VerifierPool,
    tasks: Sequence[Task],
    plan: EvaluationPlan,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> SuiteReport:
    """Evaluate as `plan` says; `on_progress` is called with (responses judged, responses).

    Raises:
        ConfigError: not as many tasks as the plan says.
        EngineError: not as many rollouts as were asked for.
    """
    if len(tasks) != plan.num_problems:
        raise ConfigError(f"expected {plan.num_problems} tasks to evaluate on, got {len(tasks)}")
    done = 0

    async def part(num_samples: int, temperature: float) -> EvaluationReport:
        nonlocal done
        before = done

        def report_progress(num_problems: int, _: int) -> None:
            nonlocal done
            done = before + num_problems * num_samples
            if on_progress is not None:
                on_progress(done, plan.num_responses)

        return await evaluate(
            generate,
            renderer,
            verifier_pool,
            tasks,
            num_samples=num_samples,
            temperature=temperature,
            max_new_tokens=plan.max_new_tokens,
            seed=plan.seed,
            ks=plan.ks,
            words=plan.words,
            on_progress=report_progress,
        )

    return SuiteReport(
        plan=plan,
        greedy=await part(1, 0.0) if plan.has_greedy else None,
        sampled=await part(plan.num_samples, plan.temperature) if plan.num_samples else None,
    )
