"""What goes into the store and what comes out of it: plain dataclasses, no SQLAlchemy.

All of them can be sent between processes. Times are aware UTC datetimes, arrays have one entry for
each generated token ([T]).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import uuid_utils

from mentor_serve.types import (
    ByteArray,
    FloatArray,
    Guidance,
    GuidanceMethod,
    IntArray,
    Rollout,
    Score,
    StopReason,
    Task,
    TrajectoryKind,
)


def new_id() -> str:
    """A UUID version 7: text order is the order of creation."""
    return str(uuid_utils.uuid7())


def trajectory_id(group_id: str, *, kind: TrajectoryKind, sample_index: int) -> str:
    """The id of a group's trajectory: the same for every attempt to store it."""
    return f"{group_id}-{kind.value}-{sample_index:02d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTrajectory:
    """One response to store, or the failure to get or score one (`error` set)."""

    rollout: Rollout | None
    """None where generation failed."""
    kind: TrajectoryKind
    sample_index: int
    """Number within the group and the kind, from 0."""
    score: Score | None
    prompt_token_ids: list[int] | tuple[int, ...] | IntArray
    """Exactly what the engine was given: nothing re-tokenises later."""
    text: str | None = None
    """The decoded response; None takes the rollout's own text."""
    seed: int | None = None
    error: str | None = None
    """Why this trajectory cannot be trained on; its status is then `failed`."""
    token_texts: Mapping[int, str] = field(default_factory=dict)
    """Text of the token ids in the rollout's interventions, as far as known."""
    demonstration_id: str | None = None
    """The demonstration that this response copies, or that its prompt quotes."""
    expert_model: str | None = None
    """Name of the model that wrote a trajectory of kind `expert`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewGroup:
    """All rollouts of one prompt, stored in one transaction."""

    group_id: str
    """From `new_id()`, made once by the caller: storing the same group again changes nothing."""
    task: Task
    guidance: Guidance
    """What the group was sampled under."""
    trajectories: list[NewTrajectory]
    status: str = "ready"
    """`ready`, or `failed` where the group cannot be trained on."""
    error: str | None = None
    method: GuidanceMethod = GuidanceMethod.MENTOR
    num_hint_tokens: int | None = None
    """Tokens of a demonstration that the prompt shows, ..."""
    hint_fraction: float | None = None
    """... and the share of it that was asked for; None without a hint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDemonstration:
    """One attempt of the expert at a task, whatever became of it."""

    demonstration_id: str
    """From `new_id()`, made once by the caller: storing it again changes nothing."""
    trajectory: NewTrajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class DemonstrationAttempt:
    """A stored attempt of the expert at a task, without its tokens."""

    demonstration_id: str
    accuracy: float | None
    """None where it could not be scored."""
    stop_reason: StopReason
    num_tokens: int
    num_uses: int
    """Groups of the asking run that copy or quote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDemonstration:
    """A scored attempt with its tokens ([T]); the policy's view of them is not known."""

    demonstration_id: str
    score: Score
    text: str
    token_ids: IntArray
    expert_logprobs: FloatArray
    """log pi* of each token, nats, at the temperature that it was sampled at."""
    stop_reason: StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedTrajectory:
    """What the learner needs of one trajectory."""

    trajectory_id: str
    kind: TrajectoryKind
    sample_index: int
    reward: float
    accuracy: float
    format_score: float
    prompt_token_ids: IntArray
    token_ids: IntArray
    policy_logprobs: FloatArray
    expert_logprobs: FloatArray
    mixed_logprobs: FloatArray
    entropies: FloatArray
    weights: FloatArray
    sources: ByteArray
    versions: IntArray
    """Version of the weights that produced each token."""
    stop_reason: StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedGroup:
    """A group that its owner may train on until the lease ends."""

    group_id: str
    task_id: str
    policy_version: int
    min_policy_version: int
    """The oldest version that produced one of its tokens."""
    gamma: float
    alpha: float
    prompt_token_ids: IntArray
    trajectories: list[LeasedTrajectory]
    """On-policy ones first, then mixed, then expert, by sample index; no failed ones."""

    def of_kind(self, kind: TrajectoryKind) -> list[LeasedTrajectory]:
        """The trajectories of one kind."""
        return [item for item in self.trajectories if item.kind is kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRecord:
    """One update of the learner: a row of `updates`. NaN is stored as NULL."""

    step: int
    policy_version: int
    """The version that this update produced."""
    num_groups: int
    num_trajectories: int
    num_tokens: int
    """Response tokens trained on."""
    alpha: float
    """Weight of the mixed advantages in this update (Eq. 11)."""
    gamma: float
    """gamma_p measured on this update's batch; rollouts of `policy_version` use it."""
    loss: float | None = None
    grad_norm: float | None = None
    entropy: float | None = None
    """Mean token entropy of the on-policy rollouts, nats."""
    clip_fraction_low: float | None = None
    clip_fraction_high: float | None = None
    mismatch_kl: float | None = None
    """Mean of `r - 1 - log r` over on-policy tokens, r the learner's probability at the start of
    the update over the recorded one: 0 where engine and learner agree."""
    effective_sample_share: float | None = None
    """Kish's effective sample size of those ratios over their number: 1 for fresh rollouts."""
    truncated_weight_share: float | None = None
    """Share of trained tokens whose importance weight was above its cap."""
    num_trained_tokens: int | None = None
    """Tokens with an advantage: those that went through the model."""
    num_skipped_steps: int | None = None
    """Optimiser steps left out because the gradient was not finite."""
    learning_rate: float | None = None
    mean_reward_on_policy: float | None = None
    mean_reward_mixed: float | None = None
    mean_accuracy_on_policy: float | None = None
    mean_accuracy_mixed: float | None = None
    frac_reward_zero_std: float | None = None
    """Share of groups whose on-policy rewards are all equal: they teach nothing (Eq. 10)."""
    mean_response_tokens: float | None = None
    truncated_share: float | None = None
    """Share of trajectories that ended at the length limit."""
    mean_weight: float | None = None
    """Mean w_t over the tokens of mixed rollouts."""
    gated_share: float | None = None
    """Share of those tokens whose coin came up b_t = 1."""
    intervention_rate: float | None = None
    """Share of those tokens that the expert replaced."""
    staleness_mean: float | None = None
    staleness_max: int | None = None
    """Versions between a group's oldest token and the weights that the update started from."""
    token_staleness_mean: float | None = None
    """The same for each token."""
    num_silent_groups: int | None = None
    """Groups without any advantage: with dynamic sampling they are consumed without counting."""
    num_left_out: int | None = None
    """Truncated trajectories that did not count."""
    num_stale: int = 0
    """Groups dropped as too old since the update before."""
    step_time_s: float | None = None
    wait_time_s: float | None = None
    """How long the learner waited for enough groups."""
    created_at: datetime | None = None
    """Set by the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRecord:
    """A snapshot of the policy's weights: a row of `policy_versions`."""

    version: int
    step: int
    alpha: float
    gamma: float
    sha256: str | None = None
    path: str | None = None
    parent_version: int | None = None
    is_live: bool = False
    """Ignored when written: `set_live` alone decides."""
    created_at: datetime | None = None
    """Set by the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """A row of `events`."""

    id: str
    kind: str
    severity: str
    message: str
    details: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTask:
    """A row of `tasks` with its id."""

    task_id: str
    task: Task
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryRecord:
    """A row of `trajectories`, the task's text beside it; arrays are read with `tokens`."""

    id: str
    group_id: str | None
    task_id: str | None
    kind: str
    sample_index: int
    status: str
    error: str | None
    reward: float | None
    accuracy: float | None
    format_score: float | None
    text: str | None
    num_prompt_tokens: int
    num_tokens: int
    num_gated: int
    num_interventions: int
    mean_entropy: float | None
    mean_weight: float | None
    min_policy_version: int
    max_policy_version: int
    stop_reason: str | None
    latency_s: float | None
    seed: int | None
    expert_lost: bool
    created_at: datetime
    source: str | None
    prompt: str | None
    answer: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStatus:
    """Where a run stands: `mentor-serve status --json` and `GET /v1/training`."""

    run_id: str
    run_name: str
    step: int
    """The last committed update; 0 before the first."""
    policy_version: int | None
    """The newest version."""
    live_version: int | None
    """The version that replicas serve."""
    alpha: float | None
    gamma: float | None
    groups: dict[str, int]
    """Number of groups by status, every status present."""
    num_trajectories: int
    mean_reward_on_policy: float | None
    """Mean over the last ten updates, as are the next two."""
    mean_reward_mixed: float | None
    mean_accuracy_on_policy: float | None
    pass_rate_first: float | None
    """Share of correct on-policy trajectories of the first five versions that have any."""
    pass_rate_last: float | None
    """The same of the last five."""
    last_update_at: datetime | None
    groups_per_minute: float
    """Groups stored in the last five minutes, divided by five."""
    errors: list[EventRecord]
    """The last five events of severity `error`, newest first."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: times as ISO text."""
        document = asdict(self)
        last = self.last_update_at
        document["last_update_at"] = None if last is None else last.isoformat()
        for event in document["errors"]:
            event["created_at"] = event["created_at"].isoformat()
        return document
