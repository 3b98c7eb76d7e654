"""Builds the trials of a comparison from settings, and runs one in this process."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mentor_serve.actors.collector_options import collector_config
from mentor_serve.actors.evaluation import evaluation_record
from mentor_serve.actors.learner_options import learner_config, training_options
from mentor_serve.actors.runtime import open_run, open_store, prepare_state
from mentor_serve.actors.workload import task_source, verifier_pool
from mentor_serve.engines import TorchEngine
from mentor_serve.engines.driver import EngineDriver
from mentor_serve.errors import ConfigError
from mentor_serve.experiments.arms import Arm, Variant, arm_named
from mentor_serve.experiments.lag import LaggingBroadcaster
from mentor_serve.experiments.measurement import Evaluator, problems_of
from mentor_serve.experiments.presets import IN_DOMAIN, Preset, Suite
from mentor_serve.experiments.rounds import RoundCollector
from mentor_serve.experiments.trial import (
    Measurer,
    Parts,
    Trial,
    TrialPlan,
)
from mentor_serve.experiments.trial_log import TrialLog
from mentor_serve.learner import Learner, LearnerConfig
from mentor_serve.learner.backends import build_backend
from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.rollout.config import CollectorConfig
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.verifiers import VerifierPool
from mentor_serve.settings import Settings, load_settings
from mentor_serve.store import TrajectoryStore
from mentor_serve.store.prune import PrunePlan, prune
from mentor_serve.types import Guidance, GuidanceMethod, Rollout, RolloutRequest

BASE, EXPERT = "base", "expert"
"""Measured as they are, not trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all trials of a comparison share."""

    preset: Preset
    home: Path
    """Database, logs of trials, weights."""
    base: Mapping[str, Any]
    """Dotted settings of the caller: models, tasks, devices."""
    config_files: tuple[Path, ...] = ()
    keep_trajectories: bool = False

    def log_path(self, plan: TrialPlan) -> Path:
        """Where a trial writes what it measures."""
        return self.home / "trials" / f"{plan.key}.jsonl"

    def settings(self, plan: TrialPlan) -> Settings:
        """A trial's settings: the caller's, the preset's, the arm's, in that order."""
        given: dict[str, Any] = {
            **self.base,
            **self.preset.settings,
            "home": str(self.home),
            "run_name": plan.key,
            "learner.prompts_per_step": self.preset.prompts_per_update,
            "learner.mini_batch_prompts": self.preset.prompts_per_update,
            "learner.learning_rate_decay_steps": 0,
            "learner.eval_every": 0,
            "learner.keep_checkpoints": 1,
            "guidance.alpha_steps": self.preset.num_updates,
            "tasks.seed": plan.seed,
            "rollout.seed": plan.seed,
            "learner.seed": plan.seed,
        }
        if plan.arm not in (BASE, EXPERT):
            given |= arm_named(plan.arm).settings
        if plan.learning_rate is not None:
            given["learner.learning_rate"] = plan.learning_rate
        return load_settings(self.config_files, given)


def run_trial(bench: Bench, plan: TrialPlan) -> None:
    """Run a trial to its end, or go on with it; returns at once where it is complete.

    Raises:
        MentorError: see `Trial.run`.
    """
    log = TrialLog(bench.log_path(plan))
    if log.is_complete:
        return
    settings = bench.settings(plan)
    if settings.policy.engine != "torch":
        raise ConfigError(
            f"compare: expected policy.engine = 'torch', got {settings.policy.engine!r}: the "
            "ablations gate in ways that other engines do not"
        )
    torch.set_num_threads(max(1, settings.learner.num_threads))
    prepare_state(settings)
    with open_store(settings) as store:
        asyncio.run(_run(bench, plan, settings, store, log))
    if plan.arm not in (BASE, EXPERT) and not bench.keep_trajectories:
        _prune(settings)
    # What a trial is resumed from.
    shutil.rmtree(settings.checkpoints_dir, ignore_errors=True)


async def _run(
    bench: Bench, plan: TrialPlan, settings: Settings, store: TrajectoryStore, log: TrialLog
) -> None:
    preset, suites = bench.preset, _suites(plan, bench.preset)
    run_id = open_run(settings, store)
    is_trained = plan.arm not in (BASE, EXPERT)
    own = settings.expert.model if plan.arm == EXPERT else settings.policy.model
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(verifier_pool(settings))
        engine = _engine(settings, own, settings.expert.model if is_trained else None)
        renderer = PromptRenderer(
            load_tokenizer(settings.policy.model), settings.tasks.system_prompt
        )

        def store_evaluation(report: Any, policy_version: int | None) -> None:
            record = evaluation_record(report, policy_version=policy_version)
            if policy_version is None:
                record = replace(record, model=own)
            store.add_evaluation(run_id, record)

        measurer = Measurer(
            preset=preset,
            evaluator=Evaluator(
                engine=engine,
                renderer=renderer,
                verifier_pool=pool,
                max_new_tokens=settings.rollout.max_new_tokens,
            ),
            problems=problems_of(
                {suite.name: suite for suite in (IN_DOMAIN, *suites)}.values(),
                preset,
                lambda seed: task_source(settings, seed=seed),
            ),
            store=store_evaluation,
            log=log,
            suites=[suite.name for suite in suites],
        )
        if not log.entries("plan"):
            log.add("plan", _description(plan, settings))
        if not is_trained:
            await measurer.final(0, None)
            log.add("done", {"num_updates": 0})
            return
        parts = _parts(plan, settings, store, run_id, engine, renderer, pool, stack)
        await Trial(preset=preset, engine=engine, parts=parts, measurer=measurer, log=log).run()


def _suites(plan: TrialPlan, preset: Preset) -> tuple[Suite, ...]:
    match plan.stage:
        case "sweep":
            return ()
        case "ablation":
            return (IN_DOMAIN,)
    return preset.suites


def _parts(
    plan: TrialPlan,
    settings: Settings,
    store: TrajectoryStore,
    run_id: str,
    engine: TorchEngine,
    renderer: PromptRenderer,
    pool: VerifierPool,
    stack: AsyncExitStack,
) -> Parts:
    arm = arm_named(plan.arm)
    expert = None
    sampler = _Sampler(engine)
    if settings.guidance.method in (GuidanceMethod.LUFFY.value, GuidanceMethod.QUESTA.value):
        expert = _engine(settings, settings.expert.model, None)
        sampler.expert = EngineDriver(expert)
        stack.callback(sampler.expert.close, 0.0)
    broadcaster = LaggingBroadcaster(
        engine, lag=arm.variant.staleness, weights_dir=settings.weights_dir
    )
    name = settings.policy.model
    learner = Learner(
        store,
        run_id=run_id,
        load_policy=lambda: (
            load_model(name, device=settings.learner.device),
            load_tokenizer(name),
        ),
        backend=build_backend(settings.learner.backend, training_options(settings)),
        broadcaster=broadcaster,
        config=_varied(learner_config(settings), arm.variant),
        weights_dir=settings.weights_dir,
        checkpoints_dir=settings.checkpoints_dir,
    )
    collector = RoundCollector(
        sampler=sampler,
        source=task_source(settings),
        renderer=renderer,
        verifier_pool=pool,
        store=store,
        run_id=run_id,
        config=_paying(collector_config(settings)),
        variant=arm.variant,
    )
    return Parts(
        learner=learner,
        broadcaster=broadcaster,
        collector=collector,
        expert=expert,
        latest_update=lambda: store.latest_update(run_id),
    )


class _Sampler:
    """`GroupSampler` over engines of this process."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self.expert: EngineDriver | None = None

    async def guidance(self) -> Guidance:
        raise NotImplementedError("a round is told its guidance")

    async def sample(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        return self._engine.generate(requests)

    async def sample_expert(self, requests: list[RolloutRequest]) -> list[list[Rollout]]:
        assert self.expert is not None  # noqa: S101 - built for the methods that ask
        # A driver, because groups ask one by one and their questions share its batch.
        return list(await asyncio.gather(*(self.expert.generate(request) for request in requests)))


def _varied(config: LearnerConfig, variant: Variant) -> LearnerConfig:
    return replace(
        config,
        advantages=replace(config.advantages, mixed=variant.mixed_advantages),
        update=replace(config.update, loss_scale=variant.loss_scale),
        keep_snapshots=max(1, variant.staleness),
        max_staleness=max(config.max_staleness, variant.staleness),
    )


def _paying(config: CollectorConfig) -> CollectorConfig:
    """Every trial asks the expert itself, so that its costs are those of a run alone."""
    return replace(config, guidance=replace(config.guidance, shares_solutions=False))


def _engine(settings: Settings, model: str, expert: str | None) -> TorchEngine:
    policy = settings.policy

    def load(name: str) -> Any:
        return load_model(name, dtype=policy.dtype, device=policy.device)

    has_expert = expert is not None and settings.guidance.method == GuidanceMethod.MENTOR.value
    return TorchEngine(
        policy=load(model),
        expert=load(str(expert)) if has_expert else None,
        tokenizer=load_tokenizer(settings.policy.model),
        device=policy.device,
        dtype=policy.dtype,
        max_batch_size=policy.max_batch_size,
        max_model_len=policy.max_model_len,
        kv_cache_gib=policy.kv_cache_gib,
    )


def _description(plan: TrialPlan, settings: Settings) -> dict[str, Any]:
    arm: Arm | None = None if plan.arm in (BASE, EXPERT) else arm_named(plan.arm)
    return {
        "stage": plan.stage,
        "arm": plan.arm,
        "seed": plan.seed,
        "learning_rate": plan.learning_rate,
        "run_name": settings.run_name,
        "settings": {} if arm is None else dict(arm.settings),
    }


def _prune(settings: Settings) -> None:
    """Groups of a finished trial; its updates, evaluations and demonstrations stay."""
    plan = PrunePlan(what="groups", keep_versions=0, run=settings.run_name, pause_s=0.0)
    prune(settings.database_url, plan)
