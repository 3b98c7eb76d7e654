"""A group as pure data: the requests it asks of the engine, and the rows it becomes.

No input or output happens here; the collector does all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from mentor_serve.errors import EngineError, VerifierError
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.store.records import NewGroup, NewTrajectory
from mentor_serve.types import (
    GroupStatus,
    Guidance,
    Rollout,
    RolloutRequest,
    SamplingParams,
    Score,
    StopReason,
    Task,
    TrajectoryKind,
)

MIN_SCORED = 2
"""On-policy rewards that Eq. 10 needs for a standard deviation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """What is asked of the engine for one task."""

    task: Task
    guidance: Guidance
    requests: list[RolloutRequest]
    """On-policy first; the mixed one is missing where alpha is 0."""


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
        trajectories=[_trajectory(response) for response in responses],
        status=GroupStatus.READY if error is None else GroupStatus.FAILED,
        error=error,
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
    )


def _initial_outcome(rollout: Rollout) -> VerifierError | EngineError:
    if rollout.stop_reason in (StopReason.CANCELLED, StopReason.ERROR):
        return EngineError(f"the rollout broke off: {rollout.stop_reason}")
    return VerifierError("not scored")


def _trajectory(response: Response) -> NewTrajectory:
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
    )
