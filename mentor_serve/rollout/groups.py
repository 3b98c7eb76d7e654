"""A group as pure data: the requests it asks of the engine, and the rows it becomes.

No input or output happens here; the collector does all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mentor_serve.errors import EngineError, VerifierError
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.store.records import NewGroup, NewTrajectory, StoredDemonstration
from mentor_serve.types import (
    GroupStatus,
    Guidance,
    GuidanceMethod,
    Rollout,
    RolloutRequest,
    SamplingParams,
    Score,
    StopReason,
    Task,
    TokenSource,
    TrajectoryKind,
)

MIN_SCORED = 2
"""On-policy rewards that Eq. 10 needs for a standard deviation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """The part of a demonstration that a group's prompt shows."""

    demonstration_id: str
    num_tokens: int
    """Tokens of the demonstration that are shown."""
    fraction: float
    """The share of it that was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """What is asked of the engine for one task, and what of the expert's joins its answers."""

    task: Task
    """The original one, whatever the prompt shows: verifiers and the store see this."""
    guidance: Guidance
    requests: list[RolloutRequest]
    """On-policy first; the mixed one is missing where alpha is 0."""
    method: GuidanceMethod = GuidanceMethod.MENTOR
    demonstrations: tuple[StoredDemonstration, ...] = ()
    """Whole expert trajectories that become members of the group."""
    expert_model: str | None = None
    """Who wrote them."""
    hint: Hint | None = None


@dataclass(slots=True, kw_only=True)
class Response:
    """One rollout on its way to the store."""

    kind: TrajectoryKind
    sample_index: int
    request: RolloutRequest
    rollout: Rollout
    text: str
    outcome: Score | VerifierError | EngineError
    token_texts: dict[int, str] = field(default_factory=dict)


def derive_seed(*parts: object) -> int:
    """Return a seed in [0, 2**63) that any change of a part changes: the head of a SHA-256."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little") >> 1


def plan_requests(
    prompt_token_ids: Sequence[int],
    guidance: Guidance,
    *,
    num_on_policy: int,
    num_mixed: int,
    sampling: SamplingParams,
    seed: int,
    record_mixed: bool = False,
) -> list[RolloutRequest]:
    """Return the on-policy request and, while alpha > 0, the mixed one, under different seeds."""
    prompt = tuple(prompt_token_ids)
    requests = [
        RolloutRequest(
            prompt_token_ids=prompt,
            num_samples=num_on_policy,
            seed=derive_seed(seed, TrajectoryKind.ON_POLICY),
            sampling=sampling,
        )
    ]
    if num_mixed > 0 and guidance.alpha > 0:
        requests.append(
            RolloutRequest(
                prompt_token_ids=prompt,
                mixed=True,
                gamma=guidance.gamma,
                num_samples=num_mixed,
                seed=derive_seed(seed, TrajectoryKind.MIXED),
                sampling=sampling,
                record_mixed=record_mixed,
            )
        )
    return requests


def collect_responses(
    plan: GroupPlan, rollouts: Sequence[Sequence[Rollout]], renderer: PromptRenderer
) -> list[Response]:
    """Pair rollouts with their requests, not scored yet; one that broke off carries its reason.

    Raises:
        EngineError: not as many rollouts as were asked for.
    """
    expected = [request.num_samples for request in plan.requests]
    came = [len(of_request) for of_request in rollouts]
    if came != expected:
        raise EngineError(f"expected {expected} rollouts for the requests of a group, got {came}")
    responses = []
    for request, of_request in zip(plan.requests, rollouts, strict=True):
        kind = TrajectoryKind.MIXED if request.mixed else TrajectoryKind.ON_POLICY
        for sample_index, rollout in enumerate(of_request):
            replaced = [
                token_id
                for one in rollout.interventions
                for token_id in (one.proposed_token_id, one.chosen_token_id)
            ]
            responses.append(
                Response(
                    kind=kind,
                    sample_index=sample_index,
                    request=request,
                    rollout=rollout,
                    text=renderer.decode(rollout),
                    outcome=_initial_outcome(rollout),
                    token_texts=renderer.token_texts(replaced),
                )
            )
    return responses


def is_complete(response: Response) -> bool:
    """Whether the rollout ended as it should, so that a verifier can judge it."""
    return not isinstance(response.outcome, EngineError)


def finished_group(group_id: str, plan: GroupPlan, responses: Sequence[Response]) -> NewGroup:
    """Return the group's rows: `failed` where fewer than two on-policy rollouts have a score."""
    num_scored = sum(
        response.kind is TrajectoryKind.ON_POLICY and isinstance(response.outcome, Score)
        for response in responses
    )
    error = None
    if num_scored < MIN_SCORED:
        reasons = [str(r.outcome) for r in responses if not isinstance(r.outcome, Score)]
        error = (
            f"expected at least {MIN_SCORED} scored on-policy rollouts, got {num_scored}: "
            f"{reasons[0] if reasons else 'none asked for'}"
        )
    return NewGroup(
        group_id=group_id,
        task=plan.task,
        guidance=plan.guidance,
        trajectories=[
            *(_trajectory(response, plan.hint) for response in responses),
            *(_copied(plan, index) for index in range(len(plan.demonstrations))),
        ],
        status=GroupStatus.READY if error is None else GroupStatus.FAILED,
        error=error,
        method=plan.method,
        num_hint_tokens=None if plan.hint is None else plan.hint.num_tokens,
        hint_fraction=None if plan.hint is None else plan.hint.fraction,
    )


def failed_group(group_id: str, plan: GroupPlan, error: BaseException) -> NewGroup:
    """Return the row of a group that the engine did not deliver."""
    return NewGroup(
        group_id=group_id,
        task=plan.task,
        guidance=plan.guidance,
        trajectories=[],
        status=GroupStatus.FAILED,
        error=f"{type(error).__name__}: {error}"[:2000],
        method=plan.method,
    )


def expert_rollout(
    demonstration: StoredDemonstration, *, policy_version: int, latency_s: float = 0.0
) -> Rollout:
    """A demonstration in the form of a rollout, [T] arrays.

    Every token follows pi*: w = 1, the mixture equals the expert. What the policy would say was
    never computed, so its log-probabilities and entropies are NaN. `policy_version` is the version
    that was live: nothing of a demonstration depends on it, so that reuse makes no group stale.
    """
    num_tokens = len(demonstration.token_ids)
    return Rollout(
        token_ids=demonstration.token_ids,
        policy_logprobs=np.full(num_tokens, np.nan, np.float32),
        mixed_logprobs=demonstration.expert_logprobs,
        expert_logprobs=demonstration.expert_logprobs,
        entropies=np.full(num_tokens, np.nan, np.float32),
        weights=np.ones(num_tokens, np.float32),
        sources=np.full(num_tokens, TokenSource.EXPERT, np.uint8),
        policy_versions=np.full(num_tokens, policy_version, np.int32),
        stop_reason=demonstration.stop_reason,
        text=demonstration.text,
        latency_s=latency_s,
    )


def _initial_outcome(rollout: Rollout) -> VerifierError | EngineError:
    if rollout.stop_reason in (StopReason.CANCELLED, StopReason.ERROR):
        return EngineError(f"the rollout broke off: {rollout.stop_reason}")
    return VerifierError("not scored")


def _copied(plan: GroupPlan, index: int) -> NewTrajectory:
    """A demonstration as a member of the group, under the prompt that all its members share."""
    demonstration = plan.demonstrations[index]
    return NewTrajectory(
        rollout=expert_rollout(demonstration, policy_version=plan.guidance.policy_version),
        kind=TrajectoryKind.EXPERT,
        sample_index=index,
        score=demonstration.score,
        prompt_token_ids=plan.requests[0].prompt_token_ids,
        demonstration_id=demonstration.demonstration_id,
        expert_model=plan.expert_model,
    )


def _trajectory(response: Response, hint: Hint | None) -> NewTrajectory:
    outcome = response.outcome
    is_scored = isinstance(outcome, Score)
    return NewTrajectory(
        rollout=response.rollout,
        kind=response.kind,
        sample_index=response.sample_index,
        score=outcome if isinstance(outcome, Score) else None,
        prompt_token_ids=response.request.prompt_token_ids,
        text=response.text,
        seed=response.request.seed,
        error=None if is_scored else str(outcome),
        token_texts=response.token_texts,
        demonstration_id=None if hint is None else hint.demonstration_id,
    )
