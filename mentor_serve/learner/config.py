"""Knobs of the learner as plain dataclasses; names and defaults follow the settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mentor_serve.core.corrections import ImportanceLevel, ImportanceMode

AdvantageEstimator = Literal["grpo", "leave_one_out", "dr_grpo"]
OldLogprobs = Literal["recorded", "recomputed"]
MixedRatio = Literal["policy", "mixed"]
MixedAdvantages = Literal["positive", "group"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters (Hu et al., arXiv 2106.09685) in place of the full weights."""

    rank: int = 16
    scale: int = 32
    """peft's `lora_alpha`: the update is multiplied by `scale / rank`."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the adapted modules; `all-linear` is every linear layer but the output head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How a backend holds the model and its optimiser, whatever it trains on."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    device: str = "cpu"
    autocast: Literal["none", "bfloat16"] = "none"
    """Type of matrix products; parameters, moments and the softmax stay float32."""
    gradient_checkpointing: bool = False
    """Keep one activation a layer and compute the rest again in the backward pass."""
    lora: LoraOptions | None = None
    seed: int = 0
    """Seeds fresh adapters."""

    def __post_init__(self) -> None:
        if self.lora is not None and self.lora.rank < 1:
            raise ValueError(f"lora.rank: expected at least 1, got {self.lora.rank}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageConfig:
    """How rewards become advantages, and which rollouts count."""

    estimator: AdvantageEstimator = "grpo"
    """Of on-policy rollouts: Eq. 10, leave-one-out, or centred without the deviation."""
    reward_range: float = 1.0
    """R_range of Eq. 11."""
    mask_truncated: bool = False
    """Leave out rollouts that ended at the length limit: their tokens do not count. Their rewards
    still belong to the group's mean."""
    mixed_ratio: MixedRatio = "policy"
    """What the ratio of mixed tokens is against: the old policy (paper), or the recorded mixed
    log-probability (the exact one; needs `rollout.record_mixed`)."""
    mixed: MixedAdvantages = "positive"
    """Of mixed rollouts: Eq. 11, or as members of the group like any other, under one mean and
    deviation with the on-policy ones (to compare with)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateConfig:
    """One update: Eq. 9 and the optimiser around it."""

    mini_batch_prompts: int = 16
    """Groups of one optimiser step."""
    learning_rate_scale: float = 1.0
    """Factor on the backend's learning rate; the loop sets it by its schedule."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    temperature: float = 1.0
    """Temperature that the rollouts were sampled at; log-probabilities are taken at it."""
    max_grad_norm: float = 1.0
    max_tokens_per_micro_batch: int = 16_384
    """Tokens of one forward pass; bounds memory, changes no gradient."""
    skip_zero_advantage: bool = True
    """Leave out the forward pass of trajectories whose advantage is 0. Exact: such a trajectory
    adds nothing to the gradient, and its tokens still count in the denominator of Eq. 9."""
    old_logprobs: OldLogprobs = "recorded"
    """pi_theta_old: as recorded at generation, or computed again under the weights before the
    update (older versions and the engine's rounding are then left to `importance`)."""
    importance: ImportanceLevel = "none"
    """Weight tokens by (policy before the update) / (recorded), see `core.corrections`."""
    importance_mode: ImportanceMode = "clamp"
    importance_cap: float = 2.0
    loss_scale: float = 1.0
    """Factor on the loss; the authors' code has n / (n + n_mixed) here, Eq. 9 has 1."""
    expert_shaping: float = 0.1
    """LUFFY's constant, for tokens of whole expert trajectories."""

    def __post_init__(self) -> None:
        if self.importance != "none" and self.old_logprobs != "recomputed":
            raise ValueError(
                f"importance = {self.importance!r} weighs the policy before the update against "
                "the recorded one: expected old_logprobs = 'recomputed', got 'recorded'"
            )
        if not self.loss_scale > 0:
            raise ValueError(f"loss_scale: expected a number > 0, got {self.loss_scale}")
        if self.importance_cap < 1:
            raise ValueError(f"importance_cap: expected at least 1, got {self.importance_cap}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """The learner's loop."""

    prompts_per_step: int = 16
    """Groups of one update."""
    max_staleness: int = 4
    """Groups whose oldest token is more versions behind than this become `stale`."""
    max_steps: int = 0
    """Stop after this many updates of the run; 0 goes on for ever."""
    alpha_initial: float = 1.0
    alpha_steps: int = 120
    """Updates over which alpha falls to 0 by a cosine."""
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    dynamic_sampling: bool = False
    """Train on groups that teach something alone (DAPO, arXiv 2503.14476): the others are consumed
    by the same update without counting, and more groups are taken in their place."""
    entropy_quantile: float = 0.95
    """p of gamma_p."""
    initial_gamma: float = 999.0
    """gamma_p of version 0."""
    gamma_floor: float = 0.0
    learning_rate_decay_steps: int = 0
    """Updates over which the learning rate falls by a cosine; 0 keeps it."""
    learning_rate_final_ratio: float = 0.1
    """What is left of the learning rate after that."""
    checkpoint_every: int = 1
    """Updates between two checkpoints. Weights are safe at every update (snapshots); above 1 a
    restart may find optimiser moments that are up to this many updates old."""
    keep_checkpoints: int = 3
    keep_snapshots: int = 5
    """Snapshots kept beside the live one."""
    lease_s: float = 120.0
    """Renewed while an update runs; a learner that dies loses its groups after this time."""
    poll_interval_s: float = 0.1
    """Wait between two looks for ready groups."""
    max_backoff_s: float = 30.0
    """Longest wait after a failed step (1 s, 2 s, 4 s, ...)."""
    max_group_failures: int = 3
    """Failed updates in a row after which the groups they share are marked `failed`."""
    lock_timeout_s: float = 10.0
    """How long a start waits for another learner of the same directories that is just ending."""
    seed: int = 0
    update: UpdateConfig = field(default_factory=UpdateConfig)

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "checkpoint_every", "keep_checkpoints", "keep_snapshots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.lease_s <= 0:
            raise ValueError(f"lease_s: expected a number > 0, got {self.lease_s}")
        if self.update.mini_batch_prompts < 1:
            raise ValueError(
                f"mini_batch_prompts: expected at least 1, got {self.update.mini_batch_prompts}"
            )
