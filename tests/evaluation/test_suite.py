import asyncio
import json
from typing import Any

import numpy as np
import pytest

from mentor_serve.errors import ConfigError, EngineError
from mentor_serve.evaluation import EvaluationReport, evaluate
from mentor_serve.models.reference.tokenizer import build_tokenizer
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.verifiers import VerifierPool
from mentor_serve.types import Rollout, RolloutRequest, StopReason, Task

TASKS = [Task(source="test", prompt=f"{n} + 0?", answer=str(n)) for n in range(4)]


def rollout(text: str, *, num_tokens: int = 2, entropy: float = 0.5) -> Rollout:
    floats = np.zeros(num_tokens, dtype=np.float32)
    return Rollout(
        token_ids=np.zeros(num_tokens, dtype=np.int32),
        policy_logprobs=floats,
        mixed_logprobs=floats,
        expert_logprobs=floats,
        entropies=floats + entropy,
        weights=floats,
        sources=np.zeros(num_tokens, dtype=np.uint8),
        policy_versions=np.zeros(num_tokens, dtype=np.int32),
        stop_reason=StopReason.LENGTH if num_tokens > 2 else StopReason.EOS,
        text=text,
    )


def boxed(answer: int, thought: str = "so") -> str:
    return rf"<think>{thought}</think>\boxed{{{answer}}}"


class Engine:
    """Answers problem n with `answers[n]`, one text a sample."""

    def __init__(self, answers: list[list[Rollout]]) -> None:
        self.answers = answers
        self.requests: list[RolloutRequest] = []

    async def __call__(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        start = len(self.requests)
        self.requests += requests
        return self.answers[start : len(self.requests)]


def run(engine: Engine, *, verifier: str = "math", **options: Any) -> EvaluationReport:
    async def evaluated() -> EvaluationReport:
        renderer = PromptRenderer(build_tokenizer(), "Think.")
        async with VerifierPool(verifier) as pool:
            return await evaluate(engine, renderer, pool, TASKS, **options)

    return asyncio.run(evaluated())


def test_one_greedy_sample_gives_pass_at_1_with_a_wilson_interval() -> None:
    engine = Engine([[rollout(boxed(n if n < 3 else 9))] for n in range(4)])
    report = run(engine, num_samples=1, temperature=0.0)
    assert report.accuracy == report.pass_at[1] == 0.75
    assert set(report.pass_at) == {1}
    for measure in (report.measure("avg_at_k", 1), report.measure("pass_at_k", 1)):
        # Wilson's interval of 3 of 4, by hand.
        assert (measure.low, measure.high) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert (report.num_problems, report.num_samples) == (4, 1)
    assert report.measure("mean_reward").value == pytest.approx(0.775)
    assert report.accuracy_by_problem == [1.0, 1.0, 1.0, 0.0]


def test_several_samples_give_avg_and_pass_at_every_k() -> None:
    correct = [4, 2, 1, 0]
    engine = Engine(
        [[rollout(boxed(n if index < correct[n] else 9)) for index in range(4)] for n in range(4)]
    )
    report = run(engine, num_samples=4, temperature=0.6, ks=(1, 2, 4, 8))
    assert report.accuracy == report.pass_at[1] == pytest.approx(7 / 16)
    assert report.pass_at[2] == pytest.approx((1 + 5 / 6 + 1 / 2 + 0) / 4)
    assert report.pass_at[4] == pytest.approx(3 / 4)
    assert 8 not in report.pass_at
    for measure in report.measures:
        assert measure.low <= measure.value <= measure.high, measure
    # Resamples with at most 1 correct response of 16 have a chance of 5 / 256, less than 2.5 %;
    # with at most 2 more: the quantile is 2 / 16.
    assert report.measure("avg_at_k", 4).low == 2 / 16
    assert json.loads(json.dumps(report.as_dict()))["num_samples"] == 4


def test_lengths_entropies_words_and_truncation_are_reported() -> None:
    engine = Engine(
        [
            [rollout("no format", num_tokens=6, entropy=1.0)],
            [rollout(boxed(1, "let me verify"))],
            [rollout(boxed(2, "Wait"))],
            [rollout(boxed(3, "wait, verify"))],
        ]
    )
    report = run(engine, num_samples=1, temperature=0.0)
    assert report.measure("mean_tokens").value == 3.0
    assert report.measure("mean_entropy").value == pytest.approx((6 * 1.0 + 6 * 0.5) / 12)
    # Token means: a resample of the long response alone has 1.0, one without it 0.5.
    assert report.measure("mean_entropy").low == pytest.approx(0.5)
    assert report.measure("truncated_share").value == 0.25
    assert report.measure("mean_format").value == 0.75
    assert report.word_shares["verify"] == report.word_shares["wait"] == 0.5


def test_a_response_that_cannot_be_judged_counts_as_wrong() -> None:
    engine = Engine([[rollout(text)] for text in ("fine", "raise", "die", "fine")])
    report = run(engine, verifier="evaluation_rewards:judge", num_samples=1)
    assert report.num_unjudged == 2
    assert report.accuracy == report.measure("mean_reward").value == 0.5


def test_requests_are_repeatable_and_differ_between_problems_and_seeds() -> None:
    def seeds(seed: int) -> list[int]:
        engine = Engine([[rollout(boxed(n))] for n in range(4)])
        run(engine, seed=seed, temperature=0.5, max_new_tokens=7)
        assert {request.sampling.max_new_tokens for request in engine.requests} == {7}
        assert not any(request.mixed for request in engine.requests)
        return [request.seed for request in engine.requests]

    assert seeds(1) == seeds(1)
    assert len(set(seeds(1) + seeds(2))) == 8


def test_progress_is_reported_in_problems() -> None:
    seen: list[tuple[int, int]] = []
    engine = Engine([[rollout(boxed(n))] for n in range(4)])
    run(engine, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 4)]


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"num_samples": 4, "temperature": 0.0}])
def test_what_cannot_be_sampled_is_a_config_error(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="num_samples"):
        run(Engine([]), **options)


def test_no_task_is_a_config_error() -> None:
    renderer = PromptRenderer(build_tokenizer())
    with pytest.raises(ConfigError, match="at least one task"):
        asyncio.run(evaluate(Engine([]), renderer, VerifierPool(), []))


def test_too_few_rollouts_are_an_engine_error() -> None:
    with pytest.raises(EngineError, match="expected 2 rollouts for each of 4 tasks"):
        run(Engine([[rollout("x")]] * 4), num_samples=2, temperature=1.0)
