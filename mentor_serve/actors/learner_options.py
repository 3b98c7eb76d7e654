"""The learner's own configurations, as the settings say. No Ray."""

from __future__ import annotations

from mentor_serve.learner import (
    AdvantageConfig,
    LearnerConfig,
    LoraOptions,
    TrainingOptions,
    UpdateConfig,
)
from mentor_serve.learner.backends import RankOptions
from mentor_serve.settings import Settings


def learner_config(settings: Settings) -> LearnerConfig:
    """The learner's own view of the settings."""
    learner, guidance = settings.learner, settings.guidance
    return LearnerConfig(
        prompts_per_step=learner.prompts_per_step,
        max_staleness=learner.max_staleness,
        max_steps=learner.max_steps,
        alpha_initial=guidance.alpha_initial,
        alpha_steps=guidance.alpha_steps,
        advantages=AdvantageConfig(
            estimator=learner.advantages,
            reward_range=guidance.reward_range,
            mask_truncated=learner.mask_truncated,
            mixed_ratio=learner.mixed_ratio,
        ),
        dynamic_sampling=learner.dynamic_sampling,
        entropy_quantile=guidance.entropy_quantile,
        initial_gamma=guidance.initial_gamma,
        gamma_floor=guidance.gamma_floor,
        learning_rate_decay_steps=learner.learning_rate_decay_steps,
        learning_rate_final_ratio=learner.learning_rate_final_ratio,
        checkpoint_every=learner.checkpoint_every,
        keep_checkpoints=learner.keep_checkpoints,
        keep_snapshots=settings.weights.keep_versions,
        lease_s=learner.lease_s,
        seed=learner.seed,
        update=UpdateConfig(
            mini_batch_prompts=learner.mini_batch_prompts,
            clip_low=learner.clip_low,
            clip_high=learner.clip_high,
            temperature=settings.rollout.temperature,
            max_grad_norm=learner.max_grad_norm,
            max_tokens_per_micro_batch=learner.max_tokens_per_micro_batch,
            old_logprobs=learner.old_logprobs,
            importance=learner.importance,
            importance_mode=learner.importance_mode,
            importance_cap=learner.importance_cap,
            expert_shaping=learner.expert_shaping,
        ),
    )


def training_options(settings: Settings) -> TrainingOptions:
    """How the backend holds the model."""
    learner = settings.learner
    lora = LoraOptions(
        rank=max(1, learner.lora_rank),
        scale=learner.lora_scale,
        target_modules=tuple(learner.lora_target_modules),
    )
    return TrainingOptions(
        learning_rate=learner.learning_rate,
        weight_decay=learner.weight_decay,
        device=learner.device,
        autocast=learner.autocast,
        gradient_checkpointing=learner.gradient_checkpointing,
        lora=lora if learner.lora_rank > 0 else None,
        seed=learner.seed,
    )


def rank_options(settings: Settings) -> RankOptions:
    """What the backend's ranks get."""
    learner = settings.learner
    return RankOptions(
        num_learners=learner.num_learners,
        num_cpus=learner.num_cpus_per_learner,
        num_gpus=learner.num_gpus_per_learner,
        num_threads=learner.num_threads,
        call_timeout_s=learner.rank_timeout_s,
        zero_stage=learner.zero_stage,
        zero_offload=learner.zero_offload,
        zero_options=learner.zero_options,
    )
