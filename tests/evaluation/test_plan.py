import asyncio

import pytest
from test_suite import TASKS, Engine, boxed, rollout

from mentor_serve.errors import ConfigError
from mentor_serve.evaluation import EvaluationPlan, SuiteReport, run_plan
from mentor_serve.models.reference.tokenizer import build_tokenizer
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.verifiers import VerifierPool


def run(engine: Engine, plan: EvaluationPlan, **options: object) -> SuiteReport:
    async def evaluated() -> SuiteReport:
        renderer = PromptRenderer(build_tokenizer(), "Think.")
        async with VerifierPool("math") as pool:
            return await run_plan(engine, renderer, pool, TASKS, plan, **options)

    return asyncio.run(evaluated())


def plan(**options: object) -> EvaluationPlan:
    values = {"suite": "test", "num_problems": 4, "num_samples": 2, "words": ("wait",)} | options
    return EvaluationPlan(**values)


def test_greedy_and_sampled_responses_give_one_set_of_rows_with_unique_names() -> None:
    engine = Engine(
        [[rollout(boxed(n))] for n in range(4)]
        + [[rollout(boxed(n)), rollout(boxed(9, "wait"))] for n in range(4)]
    )
    seen: list[tuple[int, int]] = []
    report = run(engine, plan(), on_progress=lambda done, total: seen.append((done, total)))
    rows = {(m.metric, m.k): m.value for _, m in report.measured}
    assert len(rows) == len(report.measured)
    assert rows["greedy_pass_at_k", 1] == 1.0
    assert rows["avg_at_k", 2] == rows["pass_at_k", 1] == 0.5
    assert rows["pass_at_k", 2] == 1.0
    assert rows["word_share:wait", None] == 0.5
    assert ("greedy_word_share:wait", None) not in rows
    assert seen == [(4, 12), (12, 12)]
    temperatures = [request.sampling.temperature for request in engine.requests]
    assert temperatures == [0.0] * 4 + [0.6] * 4


def test_greedy_alone() -> None:
    report = run(Engine([[rollout(boxed(n))] for n in range(4)]), plan(num_samples=0))
    assert report.sampled is None
    assert all(m.metric.startswith("greedy_") for _, m in report.measured)
    assert ("greedy_word_share:wait", None) in {(m.metric, m.k) for _, m in report.measured}


def test_sampled_alone() -> None:
    engine = Engine([[rollout(boxed(n))] * 2 for n in range(4)])
    report = run(engine, plan(has_greedy=False))
    assert report.greedy is None
    assert not any(m.metric.startswith("greedy_") for _, m in report.measured)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0, "has_greedy": False}, "greedy responses, sampled ones or both"),
        ({"temperature": 0.0}, "temperature above 0"),
    ],
)
def test_plans_that_measure_nothing_are_config_errors(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**options)


def test_other_tasks_than_planned_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="expected 5 tasks to evaluate on, got 4"):
        run(Engine([]), plan(num_problems=5))
