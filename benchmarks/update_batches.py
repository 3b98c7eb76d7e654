"""Batches of one update: groups of random tokens whose recorded log-probabilities are near a model.

Every trajectory has an advantage (rewards are all different, mixed ones above the on-policy mean),
so that nothing is left out of the forward pass: what the real step saves by leaving out
trajectories without an advantage is a gift of the data that is not counted here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mentor_serve.learner.batch import TrainingBatch, build_batch
from mentor_serve.learner.logprobs import ResponseScorer
from mentor_serve.learner.packing import build_micro_batch
from mentor_serve.store.records import LeasedGroup, LeasedTrajectory
from mentor_serve.types import IntArray, StopReason, TokenSource, TrajectoryKind

NUM_ON_POLICY, NUM_MIXED = 8, 4
_LOGPROB_NOISE = 0.1
"""Standard deviation of recorded minus exact log-probabilities: ratios near 1, some clipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """Sizes of a batch, in tokens."""

    num_groups: int
    prompt_tokens: int = 64
    shortest: int = 16
    """Fewest tokens of a response; lengths are drawn uniformly."""
    longest: int = 512
    seed: int = 0

    @property
    def is_ragged(self) -> bool:
        """Whether responses differ in length."""
        return self.shortest < self.longest


def random_batch(model: Any, shape: BatchShape) -> TrainingBatch:
    """A batch for `model`, as the learner builds it from leased groups."""
    rng = np.random.default_rng(shape.seed)
    vocabulary = int(model.config.vocab_size)
    groups = [_group(number, vocabulary, shape, rng) for number in range(shape.num_groups)]
    batch = build_batch(groups, alpha=1.0, policy_version=0)
    return replace(batch, groups=tuple(_recorded(model, group, rng) for group in batch.groups))


def num_response_tokens(batch: TrainingBatch) -> int:
    """Tokens that the loss counts."""
    return sum(item.num_counted for group in batch.groups for item in group.trajectories)


def _group(
    number: int, vocabulary: int, shape: BatchShape, rng: np.random.Generator
) -> LeasedGroup:
    prompt = rng.integers(0, vocabulary, shape.prompt_tokens).astype(np.int32)
    kinds = [TrajectoryKind.ON_POLICY] * NUM_ON_POLICY + [TrajectoryKind.MIXED] * NUM_MIXED
    trajectories = []
    for index, kind in enumerate(kinds):
        length = int(rng.integers(shape.shortest, shape.longest + 1))
        tokens = rng.integers(0, vocabulary, length).astype(np.int32)
        reward = float(rng.uniform(0, 1)) + float(kind is TrajectoryKind.MIXED)
        trajectories.append(_trajectory(f"{number}-{index}", kind, prompt, tokens, reward))
    return LeasedGroup(
        group_id=f"group-{number}",
        task_id=f"task-{number}",
        policy_version=0,
        min_policy_version=0,
        gamma=1.0,
        alpha=1.0,
        prompt_token_ids=prompt,
        trajectories=trajectories,
    )


def _trajectory(
    name: str, kind: TrajectoryKind, prompt: IntArray, tokens: IntArray, reward: float
) -> LeasedTrajectory:
    zeros = np.zeros(len(tokens), np.float32)
    return LeasedTrajectory(
        trajectory_id=name,
        kind=kind,
        sample_index=0,
        reward=reward,
        accuracy=0.0,
        format_score=0.0,
        prompt_token_ids=prompt,
        token_ids=tokens,
        policy_logprobs=zeros,
        expert_logprobs=zeros,
        mixed_logprobs=zeros,
        entropies=zeros,
        weights=zeros,
        sources=np.full(len(tokens), TokenSource.POLICY, np.uint8),
        versions=np.zeros(len(tokens), np.int32),
        stop_reason=StopReason.EOS,
    )


@torch.no_grad()
def _recorded(model: Any, group: Any, rng: np.random.Generator) -> Any:
    """The group with log-probabilities as an engine would have recorded them, a little off."""
    scorer = ResponseScorer(model, temperature=1.0)
    trajectories = []
    for item in group.trajectories:
        exact = scorer(build_micro_batch([((item,),)]).to(model.device)).cpu().numpy()
        noise = rng.normal(0.0, _LOGPROB_NOISE, len(exact))
        trajectories.append(replace(item, old_logprobs=(exact + noise).astype(np.float32)))
    return replace(group, trajectories=tuple(trajectories))
