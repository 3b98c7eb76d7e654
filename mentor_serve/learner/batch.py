"""Leased groups to a training batch: advantages (Eq. 10 and 11), masks, and what was recorded.

Pure functions over numpy arrays and floats; no model is involved. Token ids are used as the engine
recorded them, never re-tokenised. Whole trajectories of the expert join their group as LUFFY has it
(arXiv 2504.14945): one mean and deviation over on-policy and expert rollouts.
Shapes: T response tokens, P prompt tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mentor_serve.core.advantages import (
    centred_advantages,
    leave_one_out_advantages,
    mixed_advantages,
    on_policy_advantages,
)
from mentor_serve.core.entropy import entropy_quantile
from mentor_serve.learner.config import AdvantageConfig, AdvantageEstimator
from mentor_serve.store.records import LeasedGroup, LeasedTrajectory
from mentor_serve.types import FloatArray, IntArray, StopReason, TokenSource, TrajectoryKind

_ON_POLICY = (TrajectoryKind.ON_POLICY, TrajectoryKind.SERVED)
_MIXED = (TrajectoryKind.MIXED,)
_EXPERT = (TrajectoryKind.EXPERT,)
_ESTIMATORS: dict[AdvantageEstimator, Callable[[torch.Tensor], torch.Tensor]] = {
    "grpo": on_policy_advantages,
    "leave_one_out": leave_one_out_advantages,
    "dr_grpo": centred_advantages,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTrajectory:
    """One trajectory as Eq. 9 sees it."""

    trajectory_id: str
    kind: TrajectoryKind
    prompt_token_ids: IntArray
    """[P], P >= 1."""
    token_ids: IntArray
    """[T], T >= 1."""
    old_logprobs: FloatArray
    """[T]: log pi_theta_old as recorded at generation; 0 where `mask` is False, and for experts."""
    keeps_old: bool
    """`old_logprobs` is not the policy's (but the mixture's): never computed again."""
    mask: NDArray[np.bool_]
    """[T]: False where no finite log-probability was recorded, and for truncated responses where
    these are left out; such tokens do not count."""
    advantage: float

    @property
    def is_mixed(self) -> bool:
        """Sampled from pi_mix."""
        return self.kind in _MIXED

    @property
    def is_expert(self) -> bool:
        """Written by the expert alone."""
        return self.kind in _EXPERT

    @property
    def num_counted(self) -> int:
        """Tokens in the denominator of Eq. 9."""
        return int(self.mask.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingGroup:
    """The trajectories of one prompt; they share `prompt_token_ids`."""

    group_id: str
    trajectories: tuple[TrainingTrajectory, ...]

    @property
    def has_signal(self) -> bool:
        """Some token of it has a gradient before clipping."""
        return any(item.advantage != 0.0 and item.num_counted > 0 for item in self.trajectories)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMetrics:
    """What the recorded rollouts say by themselves; NaN where nothing was there to average."""

    num_groups: int
    num_trajectories: int
    num_tokens: int
    """Tokens in the denominator of Eq. 9."""
    entropy: float
    """Mean over on-policy tokens, nats."""
    mean_reward_on_policy: float
    mean_reward_mixed: float
    mean_accuracy_on_policy: float
    mean_accuracy_mixed: float
    frac_reward_zero_std: float
    """Share of groups whose on-policy rewards are all equal."""
    mean_response_tokens: float
    truncated_share: float
    mean_weight: float
    """Mean w_t over tokens of mixed rollouts, as are the next two."""
    gated_share: float
    intervention_rate: float
    staleness_mean: float
    """Versions between a group's oldest token and the weights the update starts from."""
    staleness_max: int
    token_staleness_mean: float
    """Versions between each token and the weights the update starts from, over all tokens."""
    num_silent_groups: int
    """Groups without any advantage that counts."""
    num_left_out: int
    """Trajectories left out as truncated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """Everything one update needs."""

    groups: tuple[TrainingGroup, ...]
    on_policy_entropies: FloatArray
    """[N]: finite entropies of all on-policy tokens."""
    metrics: BatchMetrics

    def mini_batches(self, num_prompts: int) -> Iterator[tuple[TrainingGroup, ...]]:
        """Consecutive groups, `num_prompts` at a time; the last one may be smaller."""
        for start in range(0, len(self.groups), num_prompts):
            yield self.groups[start : start + num_prompts]

    def gamma(self, quantile: float, *, floor: float, fallback: float) -> float:
        """gamma_p for the next version: the quantile of the on-policy entropies, or `fallback`."""
        if self.on_policy_entropies.size == 0:
            return max(floor, fallback)
        return max(floor, entropy_quantile(torch.from_numpy(self.on_policy_entropies), quantile))


def build_batch(
    groups: Sequence[LeasedGroup],
    *,
    alpha: float,
    policy_version: int,
    config: AdvantageConfig | None = None,
    keep_silent: bool = True,
) -> TrainingBatch:
    """Turn leased groups into a batch.

    Args:
        groups: what `lease_groups` gave.
        alpha: weight of the mixed advantages in this update (Eq. 11).
        policy_version: version of the weights that the update starts from.
        config: how rewards become advantages; default as in the paper.
        keep_silent: False leaves groups without a signal out of the loss and its denominator
            (dynamic sampling); the metrics and gamma_p are of all groups either way.

    Raises:
        ValueError: an empty prompt, arrays of unequal length.
    """
    config = config or AdvantageConfig()
    training = [_group(group, alpha, config) for group in groups]
    on_policy = [item for group in groups for item in _select(group, _ON_POLICY)]
    entropies = np.concatenate([item.entropies for item in on_policy] or [np.empty(0, np.float32)])
    trained = tuple(item for item in training if keep_silent or item.has_signal)
    return TrainingBatch(
        groups=trained,
        on_policy_entropies=entropies[np.isfinite(entropies)].astype(np.float32),
        metrics=_metrics(groups, training, trained, policy_version, config),
    )


def has_signal(group: LeasedGroup, alpha: float, config: AdvantageConfig) -> bool:
    """Whether some rollout of the group has an advantage that counts."""
    return _group(group, alpha, config).has_signal


def _group(group: LeasedGroup, alpha: float, config: AdvantageConfig) -> TrainingGroup:
    on_policy, mixed = _select(group, _ON_POLICY), _select(group, _MIXED)
    expert = _select(group, _EXPERT)
    own = on_policy + expert
    # Without an on-policy rollout there is no mean(R_on) to compare with: no signal either way.
    advantages = [0.0] * (len(own) + len(mixed))
    if on_policy and config.mixed == "group":
        advantages = _ESTIMATORS[config.estimator](_rewards(own + mixed)).tolist()
    elif on_policy:
        mixed_M = mixed_advantages(_rewards(mixed), _rewards(on_policy), alpha, config.reward_range)
        advantages = _ESTIMATORS[config.estimator](_rewards(own)).tolist() + mixed_M.tolist()
    return TrainingGroup(
        group_id=group.group_id,
        trajectories=tuple(
            _trajectory(item, group.prompt_token_ids, advantage, config)
            for item, advantage in zip(own + mixed, advantages, strict=True)
            if len(item.token_ids)
        ),
    )


def _trajectory(
    item: LeasedTrajectory,
    prompt_token_ids: IntArray,
    advantage: float,
    config: AdvantageConfig,
) -> TrainingTrajectory:
    if len(prompt_token_ids) == 0:
        raise ValueError(f"trajectory {item.trajectory_id}: expected a prompt, got no tokens")
    keeps_old = item.kind in _MIXED and config.mixed_ratio == "mixed"
    recorded = item.mixed_logprobs if keeps_old else item.policy_logprobs
    if item.kind in _EXPERT:
        recorded = np.zeros(len(item.token_ids), np.float32)
    if len(recorded) != len(item.token_ids):
        raise ValueError(
            f"trajectory {item.trajectory_id}: expected one log-probability a token, got "
            f"{len(recorded)} for {len(item.token_ids)} tokens"
        )
    mask = np.isfinite(recorded)
    if _is_left_out(item, config):
        mask = np.zeros_like(mask)
    return TrainingTrajectory(
        trajectory_id=item.trajectory_id,
        kind=item.kind,
        prompt_token_ids=prompt_token_ids,
        token_ids=item.token_ids,
        old_logprobs=np.where(mask, recorded, 0.0).astype(np.float32),
        keeps_old=keeps_old,
        mask=mask,
        advantage=advantage,
    )


def _is_left_out(item: LeasedTrajectory, config: AdvantageConfig) -> bool:
    return config.mask_truncated and item.stop_reason is StopReason.LENGTH


def _select(group: LeasedGroup, kinds: Sequence[TrajectoryKind]) -> list[LeasedTrajectory]:
    return [item for item in group.trajectories if item.kind in kinds]


def _rewards(items: Sequence[LeasedTrajectory]) -> torch.Tensor:
    return torch.tensor([item.reward for item in items], dtype=torch.float64)


def _metrics(
    groups: Sequence[LeasedGroup],
    training: Sequence[TrainingGroup],
    trained: Sequence[TrainingGroup],
    policy_version: int,
    config: AdvantageConfig,
) -> BatchMetrics:
    every = [item for group in groups for item in group.trajectories]
    on_policy = [item for group in groups for item in _select(group, _ON_POLICY)]
    mixed = [item for group in groups for item in _select(group, _MIXED)]
    staleness = [policy_version - group.min_policy_version for group in groups]
    equal = [len({item.reward for item in _select(group, _ON_POLICY)}) <= 1 for group in groups]
    return BatchMetrics(
        num_groups=len(groups),
        num_trajectories=len(every),
        num_tokens=sum(item.num_counted for group in trained for item in group.trajectories),
        entropy=_token_mean(on_policy, lambda item: item.entropies),
        mean_reward_on_policy=_mean([item.reward for item in on_policy]),
        mean_reward_mixed=_mean([item.reward for item in mixed]),
        mean_accuracy_on_policy=_mean([item.accuracy for item in on_policy]),
        mean_accuracy_mixed=_mean([item.accuracy for item in mixed]),
        frac_reward_zero_std=_mean(equal),
        mean_response_tokens=_mean([len(item.token_ids) for item in every]),
        truncated_share=_mean([item.stop_reason is StopReason.LENGTH for item in every]),
        mean_weight=_token_mean(mixed, lambda item: item.weights),
        gated_share=_token_mean(mixed, lambda item: item.sources != TokenSource.POLICY),
        intervention_rate=_token_mean(mixed, lambda item: item.sources == TokenSource.EXPERT),
        staleness_mean=_mean(staleness),
        staleness_max=max(staleness, default=0),
        token_staleness_mean=_token_mean(every, lambda item: policy_version - item.versions),
        num_silent_groups=sum(not group.has_signal for group in training),
        num_left_out=sum(_is_left_out(item, config) for item in every),
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _token_mean(
    items: Sequence[LeasedTrajectory], values: Callable[[LeasedTrajectory], NDArray[np.generic]]
) -> float:
    """Mean over the finite values of all tokens."""
    tokens = np.concatenate([values(item).astype(np.float64) for item in items] or [np.empty(0)])
    finite = tokens[np.isfinite(tokens)]
    return float(finite.mean()) if finite.size else math.nan
