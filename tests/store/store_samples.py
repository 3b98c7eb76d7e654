"""Small but complete rollouts, groups and records for the store's tests."""

import numpy as np

from mentor_serve.store import (
    NewDemonstration,
    NewGroup,
    NewTrajectory,
    UpdateRecord,
    VersionRecord,
    new_id,
)
from mentor_serve.types import (
    Guidance,
    Intervention,
    Rollout,
    Score,
    StopReason,
    Task,
    TokenSource,
    TrajectoryKind,
)

PROMPT = [1, 2, 3]


def task(number=0):
    return Task(
        source="test:sums", prompt=f"{number} + 1 = ?", answer=str(number + 1), metadata={"n": 1}
    )


def rollout(*, num_tokens=5, is_mixed=False, version=0, seed=0):
    rng = np.random.default_rng(seed)
    floats = rng.normal(size=(3, num_tokens)).astype(np.float32)
    looked = np.full(num_tokens, np.nan, np.float32)
    sources = np.zeros(num_tokens, np.uint8)
    interventions = []
    if is_mixed and num_tokens > 1:
        looked[1] = -0.25
        sources[1] = TokenSource.EXPERT
        interventions = [
            Intervention(
                position=1,
                proposed_token_id=7,
                chosen_token_id=9,
                entropy=2.5,
                weight=0.75,
                policy_logprob=-1.5,
                expert_logprob=-9.0,
            )
        ]
    return Rollout(
        token_ids=rng.integers(0, 100, num_tokens).astype(np.int32),
        policy_logprobs=-np.abs(floats[0]),
        mixed_logprobs=looked,
        expert_logprobs=looked.copy(),
        entropies=np.abs(floats[1]),
        weights=np.abs(floats[2]) if is_mixed else np.zeros(num_tokens, np.float32),
        sources=sources,
        policy_versions=np.full(num_tokens, version, np.int32),
        stop_reason=StopReason.EOS,
        text="<think>1 + 1</think> 2",
        interventions=interventions,
        latency_s=0.5,
    )


def trajectory(kind=TrajectoryKind.ON_POLICY, *, sample_index=0, accuracy=1.0, **options):
    is_mixed = kind is TrajectoryKind.MIXED
    return NewTrajectory(
        rollout=rollout(is_mixed=is_mixed, seed=sample_index, **options),
        kind=kind,
        sample_index=sample_index,
        score=Score(reward=0.9 * accuracy + 0.1, accuracy=accuracy, format_score=1.0),
        prompt_token_ids=PROMPT,
        seed=42,
        token_texts={7: " wait", 9: " verify"},
    )


def expert_rollout(*, num_tokens=4, seed=0, version=0):
    rng = np.random.default_rng(seed)
    unknown = np.full(num_tokens, np.nan, np.float32)
    logprobs = -np.abs(rng.normal(size=num_tokens)).astype(np.float32)
    return Rollout(
        token_ids=rng.integers(0, 100, num_tokens).astype(np.int32),
        policy_logprobs=unknown,
        mixed_logprobs=logprobs,
        expert_logprobs=logprobs.copy(),
        entropies=unknown.copy(),
        weights=np.ones(num_tokens, np.float32),
        sources=np.full(num_tokens, TokenSource.EXPERT, np.uint8),
        policy_versions=np.full(num_tokens, version, np.int32),
        stop_reason=StopReason.EOS,
        text="<think>1 + 1 is 2</think> 2",
    )


def demonstration(*, accuracy=1.0, prompt=PROMPT, expert_model="embedded:expert", **options):
    return NewDemonstration(
        demonstration_id=new_id(),
        trajectory=NewTrajectory(
            rollout=expert_rollout(**options),
            kind=TrajectoryKind.EXPERT,
            sample_index=0,
            score=Score(reward=0.9 * accuracy + 0.1, accuracy=accuracy, format_score=1.0),
            prompt_token_ids=prompt,
            expert_model=expert_model,
        ),
    )


def group(*, number=0, version=0, num_on_policy=2, num_mixed=1, group_id=None, **options):
    return NewGroup(
        group_id=group_id or new_id(),
        task=task(number),
        guidance=Guidance(policy_version=version, step=version, alpha=0.5, gamma=1.25),
        trajectories=[
            trajectory(sample_index=index, accuracy=float(index % 2), version=version)
            for index in range(num_on_policy)
        ]
        + [
            trajectory(TrajectoryKind.MIXED, sample_index=index, version=version)
            for index in range(num_mixed)
        ],
        **options,
    )


def version_record(version, **options):
    return VersionRecord(
        version=version,
        step=version,
        alpha=0.5,
        gamma=1.25,
        sha256="0" * 64,
        path=f"weights/{version:06d}",
        parent_version=version - 1 if version else None,
        **options,
    )


def update_record(step, **options):
    return UpdateRecord(
        step=step,
        policy_version=options.pop("policy_version", step),
        num_groups=2,
        num_trajectories=6,
        num_tokens=30,
        alpha=0.5,
        gamma=1.25,
        **{
            "loss": 0.125,
            "mean_reward_on_policy": 0.55,
            "mean_reward_mixed": 1.0,
            "mean_accuracy_on_policy": 0.5,
            "staleness_mean": 0.0,
            "staleness_max": 0,
        }
        | options,
    )
