"""Leased groups to a training batch: advantages (Eq. 10 and 11), masks, and what was recorded.

Pure functions over numpy arrays and floats; no model is involved. Token ids are used as the engine
recorded them, never re-tokenised. Refused: trajectories of kind `expert`, whose tokens were not
sampled from a mixture around the policy (Eq. 9 has no term for them).
Shapes: T response tokens, P prompt tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mentor_serve.core.advantages import mixed_advantages, on_policy_advantages
from mentor_serve.core.entropy import entropy_quantile
from mentor_serve.store.records import LeasedGroup, LeasedTrajectory
from mentor_serve.types import FloatArray, IntArray, StopReason, TokenSource, TrajectoryKind

_ON_POLICY_KINDS = (TrajectoryKind.ON_POLICY, TrajectoryKind.SERVED)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTrajectory:
    """One trajectory as Eq. 9 sees it."""

    trajectory_id: str
    is_mixed: bool
    prompt_token_ids: IntArray
    """[P], P >= 1."""
    token_ids: IntArray
    """[T], T >= 1."""
    old_logprobs: FloatArray
    """[T]: log pi_theta_old as recorded at generation; 0 where `mask` is False."""
    mask: NDArray[np.bool_]
    """[T]: False where no finite log-probability was recorded; such tokens do not count."""
    advantage: float

    @property
    def num_counted(self) -> int:
        """Tokens in the denominator of Eq. 9."""
        return int(self.mask.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingGroup:
    """The trajectories of one prompt; they share `prompt_token_ids`."""

    group_id: str
    trajectories: tuple[TrainingTrajectory, ...]


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
    groups: Sequence[LeasedGroup], *, alpha: float, reward_range: float, policy_version: int
) -> TrainingBatch:
    """Turn leased groups into a batch.

    Args:
        groups: what `lease_groups` gave.
        alpha: weight of the mixed advantages in this update (Eq. 11).
        reward_range: R_range of Eq. 11.
        policy_version: version of the weights that the update starts from.

    Raises:
        ValueError: a trajectory of kind `expert`, an empty prompt, arrays of unequal length.
    """
    training_groups = tuple(_group(group, alpha, reward_range) for group in groups)
    on_policy = [item for group in groups for item in _select(group, mixed=False)]
    entropies = np.concatenate([item.entropies for item in on_policy] or [np.empty(0, np.float32)])
    return TrainingBatch(
        groups=training_groups,
        on_policy_entropies=entropies[np.isfinite(entropies)].astype(np.float32),
        metrics=_metrics(groups, training_groups, policy_version),
    )


def _group(group: LeasedGroup, alpha: float, reward_range: float) -> TrainingGroup:
    on_policy = _select(group, mixed=False)
    mixed = _select(group, mixed=True)
    if len(on_policy) + len(mixed) != len(group.trajectories):
        kinds = sorted({item.kind.value for item in group.trajectories})
        raise ValueError(
            f"group {group.group_id}: expected on-policy and mixed trajectories, got {kinds}"
        )
    # Without an on-policy rollout there is no mean(R_on) to compare with: no signal either way.
    advantages = [0.0] * len(mixed)
    if on_policy:
        rewards_G = _rewards(on_policy)
        mixed_M = mixed_advantages(_rewards(mixed), rewards_G, alpha, reward_range)
        advantages = on_policy_advantages(rewards_G).tolist() + mixed_M.tolist()
    return TrainingGroup(
        group_id=group.group_id,
        trajectories=tuple(
            _trajectory(item, group.prompt_token_ids, advantage)
            for item, advantage in zip(on_policy + mixed, advantages, strict=True)
            if len(item.token_ids)
        ),
    )


def _trajectory(
    item: LeasedTrajectory, prompt_token_ids: IntArray, advantage: float
) -> TrainingTrajectory:
    if len(prompt_token_ids) == 0:
        raise ValueError(f"trajectory {item.trajectory_id}: expected a prompt, got no tokens")
    if len(item.policy_logprobs) != len(item.token_ids):
        raise ValueError(
            f"trajectory {item.trajectory_id}: expected one log-probability a token, got "
            f"{len(item.policy_logprobs)} for {len(item.token_ids)} tokens"
        )
    mask = np.isfinite(item.policy_logprobs)
    return TrainingTrajectory(
        trajectory_id=item.trajectory_id,
        is_mixed=item.kind is TrajectoryKind.MIXED,
        prompt_token_ids=prompt_token_ids,
        token_ids=item.token_ids,
        old_logprobs=np.where(mask, item.policy_logprobs, 0.0).astype(np.float32),
        mask=mask,
        advantage=advantage,
    )


def _select(group: LeasedGroup, *, mixed: bool) -> list[LeasedTrajectory]:
    kinds = (TrajectoryKind.MIXED,) if mixed else _ON_POLICY_KINDS
    return [item for item in group.trajectories if item.kind in kinds]


def _rewards(items: Sequence[LeasedTrajectory]) -> torch.Tensor:
    return torch.tensor([item.reward for item in items], dtype=torch.float64)


def _metrics(
    groups: Sequence[LeasedGroup], training: Sequence[TrainingGroup], policy_version: int
) -> BatchMetrics:
    every = [item for group in groups for item in group.trajectories]
    on_policy = [item for group in groups for item in _select(group, mixed=False)]
    mixed = [item for group in groups for item in _select(group, mixed=True)]
    staleness = [policy_version - group.min_policy_version for group in groups]
    equal = [len({item.reward for item in _select(group, mixed=False)}) <= 1 for group in groups]
    return BatchMetrics(
        num_groups=len(groups),
        num_trajectories=len(every),
        num_tokens=sum(item.num_counted for group in training for item in group.trajectories),
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
