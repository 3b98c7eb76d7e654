"""The collector's own configuration, as the settings say. No Ray, no torch."""

from __future__ import annotations

from mentor_serve.rollout.config import CollectorConfig
from mentor_serve.rollout.strategies import GuidanceConfig, HintSchedule
from mentor_serve.settings import Settings
from mentor_serve.store.writer import WriterLimits
from mentor_serve.types import GuidanceMethod, SamplingParams


def guidance_config(settings: Settings) -> GuidanceConfig:
    """Which method guides, with its own settings."""
    guidance, rollout = settings.guidance, settings.rollout
    return GuidanceConfig(
        method=GuidanceMethod(guidance.method),
        expert_model=settings.expert.model,
        num_expert=guidance.num_expert,
        hints=HintSchedule(
            fraction=guidance.hint_fraction,
            later_fraction=guidance.hint_later_fraction,
            later_step=guidance.hint_later_step,
            header=guidance.hint_header,
            max_prompt_tokens=settings.policy.max_model_len - rollout.max_new_tokens,
        ),
        expert_attempts=guidance.expert_attempts,
        max_uses=guidance.max_uses,
        only_correct=guidance.only_correct,
    )


def collector_config(settings: Settings, *, index: int = 0, count: int = 1) -> CollectorConfig:
    """The collector's own view of the settings."""
    rollout, learner = settings.rollout, settings.learner
    has_expert = settings.expert.model != "none"
    return CollectorConfig(
        num_on_policy=rollout.num_on_policy,
        num_mixed=rollout.num_mixed if has_expert else 0,
        sampling=SamplingParams(
            temperature=rollout.temperature, max_new_tokens=rollout.max_new_tokens
        ),
        guidance=guidance_config(settings),
        concurrent_groups=rollout.concurrent_groups,
        record_mixed=rollout.record_mixed,
        seed=rollout.seed,
        collector_index=index,
        num_collectors=count,
        stop_timeout_s=settings.gateway.drain_timeout_s,
        # One batch in training and one waiting: enough to never starve the learner, and young
        # enough that nothing passes max_staleness.
        max_ready_groups=2 * learner.prompts_per_step if learner.enabled else None,
        # While nobody trains: as many as can still be trained on afterwards.
        max_away_groups=max(2, learner.max_staleness + 1) * learner.prompts_per_step,
        writer_limits=WriterLimits(
            max_buffered_groups=settings.store.buffer_groups,
            max_buffered_bytes=settings.store.buffer_mb << 20,
        ),
    )
