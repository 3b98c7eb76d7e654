import pytest
from rollout_fakes import RIGHT, WRONG, FakeTokenizer, make_rollout

from mentor_serve.errors import EngineError, VerifierError
from mentor_serve.rollout.groups import (
    GroupPlan,
    Response,
    collect_responses,
    derive_seed,
    finished_group,
    is_complete,
    plan_requests,
)
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.types import (
    Guidance,
    RolloutRequest,
    SamplingParams,
    Score,
    StopReason,
    Task,
    TrajectoryKind,
)

SAMPLING = SamplingParams(temperature=0.7, max_new_tokens=5)
SCORE = Score(reward=1.0, accuracy=1.0, format_score=1.0)


def plan(
    *, alpha: float = 0.5, num_on_policy: int = 3, num_mixed: int = 2, seed: int = 1
) -> GroupPlan:
    guidance = Guidance(policy_version=3, alpha=alpha, gamma=0.8)
    requests = plan_requests(
        [1, 2],
        guidance,
        num_on_policy=num_on_policy,
        num_mixed=num_mixed,
        sampling=SAMPLING,
        seed=seed,
        record_mixed=True,
    )
    task = Task(source="test", prompt="?", answer="2")
    return GroupPlan(task=task, guidance=guidance, requests=requests)


def responses_of(group: GroupPlan, **options: object) -> list[Response]:
    rollouts = [[make_rollout(**options) for _ in range(r.num_samples)] for r in group.requests]  # type: ignore[arg-type]
    return collect_responses(group, rollouts, PromptRenderer(FakeTokenizer()))  # type: ignore[arg-type]


def test_a_group_asks_for_on_policy_and_mixed_rollouts_of_one_prompt() -> None:
    on_policy, mixed = plan().requests
    assert (on_policy.num_samples, on_policy.mixed) == (3, False)
    assert (mixed.num_samples, mixed.mixed, mixed.gamma, mixed.record_mixed) == (2, True, 0.8, True)
    assert on_policy.prompt_token_ids == mixed.prompt_token_ids == (1, 2)
    assert on_policy.sampling == mixed.sampling == SAMPLING
    assert on_policy.seed != mixed.seed


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"num_mixed": 0}])
def test_without_guidance_all_rollouts_are_on_policy(options: dict[str, float]) -> None:
    assert [request.mixed for request in plan(**options).requests] == [False]  # type: ignore[arg-type]


def test_seeds_are_stable_and_differ_in_every_part() -> None:
    seeds = {derive_seed(*parts) for parts in [(0, "run", 1), (1, "run", 1), (0, "run", 2)]}
    assert len(seeds | {derive_seed(0, "run", 1), derive_seed(0, "other", 1)}) == 4
    assert derive_seed(0, "run", 1) == 8492191570778143935
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert plan(seed=1).requests == plan(seed=1).requests


def test_responses_keep_their_kind_index_and_the_texts_of_interventions() -> None:
    responses = responses_of(plan(), replaced=True)
    assert [(r.kind.value, r.sample_index) for r in responses] == [
        ("on_policy", 0),
        ("on_policy", 1),
        ("on_policy", 2),
        ("mixed", 0),
        ("mixed", 1),
    ]
    assert responses[3].token_texts == {9: chr(9), 6: chr(6)}


@pytest.mark.parametrize("counts", [[3], [3, 1], [2, 2], []])
def test_too_few_rollouts_are_an_engine_error(counts: list[int]) -> None:
    rollouts = [[make_rollout()] * count for count in counts]
    with pytest.raises(EngineError, match=r"expected \[3, 2\] rollouts"):
        collect_responses(plan(), rollouts, PromptRenderer(FakeTokenizer()))  # type: ignore[arg-type]


@pytest.mark.parametrize("stop_reason", [StopReason.CANCELLED, StopReason.ERROR])
def test_a_rollout_that_broke_off_is_not_judged(stop_reason: StopReason) -> None:
    response = responses_of(plan(), stop_reason=stop_reason)[0]
    assert not is_complete(response)
    assert "broke off" in str(response.outcome)


@pytest.mark.parametrize(("num_scored", "status"), [(3, "ready"), (2, "ready"), (1, "failed")])
def test_a_group_needs_two_scored_on_policy_rollouts(num_scored: int, status: str) -> None:
    responses = responses_of(plan())
    for index, response in enumerate(responses):
        is_scored = response.kind is TrajectoryKind.MIXED or index < num_scored
        response.outcome = SCORE if is_scored else VerifierError("ran out of time")
    group = finished_group("id", plan(), responses)
    assert group.status == status
    assert [t.error for t in group.trajectories].count("ran out of time") == 3 - num_scored
    assert (group.error is None) == (status == "ready")
    if group.error is not None:
        assert "got 1: ran out of time" in group.error


def test_rows_carry_what_the_engine_was_asked_and_answered() -> None:
    group = plan()
    responses = responses_of(group)
    for response in responses:
        response.outcome = SCORE
    row = finished_group("id", group, responses).trajectories[4]
    request: RolloutRequest = group.requests[1]
    assert (row.kind, row.sample_index, row.seed) == (TrajectoryKind.MIXED, 1, request.seed)
    assert (row.text, row.score, row.error) == (RIGHT, SCORE, None)
    assert row.prompt_token_ids == (1, 2)
    assert RIGHT != WRONG
