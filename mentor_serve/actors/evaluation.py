"""Evaluates one set of weights in this process, as the settings say. No Ray.

The weights are read from one immutable directory into an engine of their own, which nobody swaps:
every number belongs to exactly one version, whatever is served meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mentor_serve.actors.workload import task_source, verifier_pool
from mentor_serve.engines import TorchEngine
from mentor_serve.engines.driver import EngineDriver
from mentor_serve.evaluation.plan import EvaluationPlan, SuiteReport, run_plan
from mentor_serve.evaluation.words import FIGURE_3_WORDS
from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.settings import Settings
from mentor_serve.store import EvaluationRecord, MeasureRecord
from mentor_serve.store.evaluations import POLICY

Progress = Callable[[int, int], None]
"""Called with (responses judged, responses)."""


def evaluation_plan(settings: Settings, **changes: Any) -> EvaluationPlan:
    """The plan that the settings name; `changes` go before them."""
    evaluation = settings.evaluation
    words = FIGURE_3_WORDS if evaluation.words == "figure_3" else tuple(evaluation.words)
    values: dict[str, Any] = {
        "suite": suite_name(settings),
        "num_problems": evaluation.num_problems,
        "num_samples": evaluation.num_samples,
        "temperature": evaluation.temperature,
        "max_new_tokens": settings.rollout.max_new_tokens,
        "seed": evaluation.seed,
        "ks": tuple(evaluation.ks),
        "words": words,
    }
    return EvaluationPlan(**(values | changes))


def suite_name(settings: Settings) -> str:
    """`evaluation.suite`, or a name made from the tasks; of a file, its own name alone."""
    tasks = settings.tasks
    name = tasks.name if tasks.source == "reasoning_gym" else Path(tasks.name).name
    return settings.evaluation.suite or f"{tasks.source}:{name}"[:200]


async def evaluate_model(
    settings: Settings,
    model: str | Path,
    plan: EvaluationPlan,
    *,
    device: str,
    on_progress: Progress | None = None,
) -> SuiteReport:
    """Evaluate a model directory (or whatever else `policy.model` may be) on held-out tasks.

    Cancelling the task ends generation and the verifiers; nothing is stored here either way.

    Raises:
        ConfigError: the model cannot be read, or the source cannot spare so many problems.
    """
    tasks = task_source(settings).holdout(plan.num_problems)
    tokenizer = await asyncio.to_thread(load_tokenizer, model)
    driver = EngineDriver(await asyncio.to_thread(_engine, settings, model, tokenizer, device))
    pool = verifier_pool(settings)
    try:
        return await run_plan(
            # All at once: the engine's own queue keeps its batch full.
            lambda requests: _gathered(driver, requests),
            PromptRenderer(tokenizer, settings.tasks.system_prompt),
            pool,
            tasks,
            plan,
            on_progress=on_progress,
        )
    finally:
        await pool.close()
        await asyncio.to_thread(driver.close, 0.0)


async def _gathered(driver: EngineDriver, requests: Any) -> Any:
    return list(await asyncio.gather(*(driver.generate(request) for request in requests)))


def _engine(settings: Settings, model: str | Path, tokenizer: Any, device: str) -> TorchEngine:
    policy = settings.policy
    return TorchEngine(
        policy=load_model(model, dtype=policy.dtype, device=device),
        tokenizer=tokenizer,
        device=device,
        dtype=policy.dtype,
        max_batch_size=settings.evaluation.max_batch_size,
        max_model_len=policy.max_model_len,
        kv_cache_gib=policy.kv_cache_gib,
    )


def evaluation_record(
    report: SuiteReport, *, policy_version: int | None, model: str = POLICY
) -> EvaluationRecord:
    """The rows of `evaluations`."""
    return EvaluationRecord(
        policy_version=policy_version,
        model=model,
        suite=report.plan.suite,
        num_problems=report.plan.num_problems,
        seed=report.plan.seed,
        measures=[
            MeasureRecord(
                metric=measure.metric,
                k=measure.k,
                value=measure.value,
                value_low=measure.low,
                value_high=measure.high,
                num_samples=part.num_samples,
                temperature=part.temperature,
            )
            for part, measure in report.measured
        ],
    )
