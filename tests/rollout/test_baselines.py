"""Each guidance method, with real tiny engines and a real store."""

from collections import Counter

import numpy as np
import pytest
import torch
from engine_scene import EXPERT, EngineScene, task

from mentor_serve.learner.batch import build_batch
from mentor_serve.rollout.strategies import HintSchedule
from mentor_serve.types import Guidance, GuidanceMethod, TokenSource, TrajectoryKind

TASKS = [task("1+2"), task("3+4")]
MORE_TASKS = [task(f"{number}+1") for number in range(6)]
ATTEMPTS = "SELECT * FROM trajectories WHERE kind = 'expert' AND group_id IS NULL ORDER BY id"
GROUPS = "SELECT * FROM rollout_groups ORDER BY id"
LUFFY = {"method": GuidanceMethod.LUFFY}
QUESTA = {"method": GuidanceMethod.QUESTA, "hints": HintSchedule(header="ab")}


@pytest.fixture
def scene(tmp_path, tiny_pair, tiny_tokenizer):
    opened = EngineScene(tmp_path, pair=tiny_pair, tokenizer=tiny_tokenizer)
    yield opened
    opened.store.close()


def kinds(group):
    return [one.kind.value for one in group.trajectories]


def first_use(scene, group):
    """The demonstration that a group copies or quotes."""
    query = f"SELECT demonstration_id AS id FROM trajectories WHERE group_id = '{group.group_id}'"
    (used,) = {row["id"] for row in scene.rows(query)} - {None}
    return used


# MENTOR and on-policy GRPO


def test_mentor_has_mixed_rollouts_while_alpha_is_above_zero(scene):
    group = scene.collect(TASKS, num_groups=1, method=GuidanceMethod.MENTOR)[0]
    assert kinds(group) == ["on_policy"] * 4 + ["mixed"] * 2
    assert {row["method"] for row in scene.rows(GROUPS)} == {"mentor"}


def test_mentor_is_on_policy_alone_at_alpha_zero(scene):
    scene.sampler.current = Guidance(alpha=0.0)
    group = scene.collect(TASKS, num_groups=1, method=GuidanceMethod.MENTOR)[0]
    assert kinds(group) == ["on_policy"] * 4
    assert scene.rows(GROUPS)[0]["method"] == "mentor"


def test_on_policy_never_asks_the_expert(scene):
    groups = scene.collect(TASKS, num_groups=2, method=GuidanceMethod.ON_POLICY)
    assert {tuple(kinds(group)) for group in groups} == {("on_policy",) * 4}
    assert not any(request.mixed for requests in scene.sampler.asked for request in requests)
    assert scene.sampler.asked_expert == []
    assert {row["method"] for row in scene.rows(GROUPS)} == {"on_policy"}


# LUFFY


def test_a_luffy_group_gives_a_place_to_the_expert(scene):
    group = scene.collect(TASKS, num_groups=1, **LUFFY)[0]
    assert kinds(group) == ["on_policy"] * 3 + ["expert"]
    (request,) = scene.sampler.asked[0]
    assert (request.num_samples, request.mixed) == (3, False)
    row = scene.rows(GROUPS)[0]
    assert (row["method"], row["num_on_policy"], row["num_mixed"], row["num_expert"]) == (
        "luffy",
        3,
        0,
        1,
    )
    assert row["num_hint_tokens"] is None
    (expert,) = group.of_kind(TrajectoryKind.EXPERT)
    assert expert.prompt_token_ids.tolist() == scene.renderer.render(TASKS[0])
    (stored,) = scene.store.demonstrations([first_use(scene, group)])
    assert stored.token_ids.tolist() == expert.token_ids.tolist()
    assert stored.score.accuracy == expert.accuracy == 1.0


def test_an_expert_trajectory_knows_the_expert_and_not_the_policy(scene, tiny_pair):
    group = scene.collect(TASKS, num_groups=1, **LUFFY)[0]
    (expert,) = group.of_kind(TrajectoryKind.EXPERT)
    prompt, response = expert.prompt_token_ids.tolist(), expert.token_ids.tolist()
    with torch.no_grad():
        logits = tiny_pair[1](torch.tensor([prompt + response])).logits[0].double()
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    of_expert = logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(expert.expert_logprobs, of_expert, atol=1e-4)
    np.testing.assert_array_equal(expert.mixed_logprobs, expert.expert_logprobs)
    assert np.isnan(expert.policy_logprobs).all()
    assert np.isnan(expert.entropies).all()
    assert set(expert.sources.tolist()) == {TokenSource.EXPERT}
    assert set(expert.weights.tolist()) == {1.0}


def test_the_learner_takes_a_luffy_group(scene):
    groups = scene.collect([task("1+2"), task("3+4")], num_groups=2, **LUFFY)
    batch = build_batch(groups, alpha=0.5, policy_version=0)
    for leased, group in zip(groups, batch.groups, strict=True):
        (expert,) = [one for one in group.trajectories if one.is_expert]
        (stored,) = leased.of_kind(TrajectoryKind.EXPERT)
        assert expert.num_counted == len(stored.token_ids)
        assert len(group.trajectories) == 4
    assert batch.metrics.staleness_max == 0


def test_more_than_one_expert_trajectory_differs_from_the_next(scene):
    group = scene.collect(TASKS, num_groups=1, num_on_policy=5, num_expert=3, **LUFFY)[0]
    experts = group.of_kind(TrajectoryKind.EXPERT)
    assert [one.sample_index for one in experts] == [0, 1, 2]
    assert len({tuple(one.token_ids.tolist()) for one in experts}) == 3


# Reuse


@pytest.mark.parametrize("options", [LUFFY, QUESTA], ids=["luffy", "questa"])
def test_a_task_that_comes_again_costs_no_expert(scene, options):
    groups = scene.collect(TASKS, num_groups=6, **options)
    by_prompt = Counter(request.prompt_token_ids for request in scene.sampler.asked_expert)
    # Asked until the first usable solution: for each task, all attempts but the last are not.
    attempts = scene.rows(ATTEMPTS)
    usable = [row for row in attempts if row["stop_reason"] != "length"]
    assert len(by_prompt) == len(usable) == 2
    assert sum(by_prompt.values()) == len(attempts) == scene.counts["demonstrations_generated"]
    assert scene.counts["demonstrations_reused"] == len(groups) - 2
    used = {row["demonstration_id"] for row in scene.rows("SELECT * FROM trajectories")} - {None}
    assert used <= {row["id"] for row in usable}


def test_groups_of_one_task_under_way_together_ask_once(scene):
    scene.collect([task("1+2")], num_groups=6, concurrent_groups=4, **LUFFY)
    usable = [row for row in scene.rows(ATTEMPTS) if row["stop_reason"] != "length"]
    assert len(usable) == 1


def test_a_restart_and_another_run_reuse_what_is_stored(tmp_path, scene, tiny_pair, tiny_tokenizer):
    scene.collect(TASKS, num_groups=2, **LUFFY)
    first = [row["id"] for row in scene.rows(ATTEMPTS)]
    assert first
    for run_name in ("run", "another run"):
        again = EngineScene(tmp_path, pair=tiny_pair, tokenizer=tiny_tokenizer, run_name=run_name)
        groups = again.collect(TASKS, num_groups=3, **LUFFY)
        assert again.sampler.asked_expert == []
        assert all(len(group.of_kind(TrajectoryKind.EXPERT)) == 1 for group in groups)
        assert again.counts["demonstrations_generated"] == 0
        again.store.close()
    assert [row["id"] for row in scene.rows(ATTEMPTS)] == first


def test_another_method_reuses_them_too(scene):
    scene.collect(TASKS, num_groups=2, **LUFFY)
    num_asked = len(scene.sampler.asked_expert)
    groups = scene.collect(TASKS, num_groups=2, **QUESTA)
    assert len(scene.sampler.asked_expert) == num_asked
    assert scene.counts["demonstrations_reused"] == len(groups)


@pytest.mark.parametrize("changed", [{"expert_model": "another expert"}, {"max_new_tokens": 1}])
def test_what_another_expert_wrote_or_is_too_long_is_not_reused(scene, changed):
    scene.collect(TASKS, num_groups=2, **LUFFY)
    num_asked = len(scene.sampler.asked_expert)
    longest = max(row["num_tokens"] for row in scene.rows(ATTEMPTS))
    assert longest > 1
    scene.collect(TASKS, num_groups=2, **LUFFY, **changed)
    assert len(scene.sampler.asked_expert) > num_asked


def test_a_bound_on_uses_makes_new_ones(scene):
    groups = scene.collect([task("1+2")], num_groups=5, max_uses=2, **LUFFY)
    attempts = scene.rows(ATTEMPTS)
    usable = [row for row in attempts if row["stop_reason"] != "length"]
    assert len(usable) == -(-len(groups) // 2)
    assert len({request.seed for request in scene.sampler.asked_expert}) == len(attempts)
    used = scene.rows(
        "SELECT demonstration_id, COUNT(*) AS n FROM trajectories WHERE kind = 'expert' "
        "AND group_id IS NOT NULL GROUP BY demonstration_id"
    )
    assert max(row["n"] for row in used) == 2


# What the expert cannot do


@pytest.mark.parametrize("options", [LUFFY, QUESTA], ids=["luffy", "questa"])
def test_a_task_that_the_expert_fails_goes_without_it_and_is_not_tried_again(scene, options):
    groups = scene.collect([task("1+2", "wrong")], num_groups=3, expert_attempts=3, **options)
    assert {tuple(kinds(group)) for group in groups} == {("on_policy",) * 4}
    assert len(scene.sampler.asked_expert) == 3
    assert len({request.seed for request in scene.sampler.asked_expert}) == 3
    assert [row["accuracy"] for row in scene.rows(ATTEMPTS)] == [0.0] * 3
    assert scene.counts["demonstrations_failed"] == 3
    assert scene.counts["groups_without_expert"] == len(groups)
    plain = scene.renderer.render(task("1+2"))
    assert {tuple(group.prompt_token_ids.tolist()) for group in groups} == {tuple(plain)}
    for row in scene.rows(GROUPS):
        assert (row["method"], row["num_expert"]) == (options["method"].value, 0)
        assert row["num_hint_tokens"] is None
    # ... nor after a restart.
    scene.collect([task("1+2", "wrong")], num_groups=1, expert_attempts=3, **options)
    assert len(scene.sampler.asked_expert) == 3


def test_wrong_solutions_demonstrate_only_where_that_is_asked_for(scene):
    wrong = [task("1+2", "wrong")]
    group = scene.collect(wrong, num_groups=1, only_correct=False, **LUFFY)[0]
    assert kinds(group) == ["on_policy"] * 3 + ["expert"]
    assert group.trajectories[-1].accuracy == 0.0


def test_an_attempt_that_cannot_be_judged_is_kept_as_failed(scene):
    # Its on-policy rollouts cannot be judged either, so only the tasks between make groups.
    scene.collect([task("1+2", "raises"), task("3+4")], num_groups=1, expert_attempts=2, **LUFFY)
    unjudged = [row for row in scene.rows(ATTEMPTS) if row["status"] == "failed"]
    assert len(unjudged) == 2
    assert "cannot be judged" in unjudged[0]["error"]
    assert {row["reward"] for row in unjudged} == {None}


def test_solutions_cut_at_the_length_limit_do_not_demonstrate(scene):
    scene.collect(MORE_TASKS, num_groups=6, max_new_tokens=4, expert_attempts=1, **LUFFY)
    reasons = {row["id"]: row["stop_reason"] for row in scene.rows(ATTEMPTS)}
    used = {row["demonstration_id"] for row in scene.rows("SELECT * FROM trajectories")} - {None}
    assert set(reasons.values()) == {"length", "eos"}
    assert used == {one for one, reason in reasons.items() if reason == "eos"}


@pytest.mark.parametrize("options", [LUFFY, QUESTA], ids=["luffy", "questa"])
def test_an_expert_out_of_reach_leaves_groups_on_policy_and_is_asked_again(scene, options):
    scene.sampler.expert_error = ConnectionError("no replica")
    groups = scene.collect(TASKS, num_groups=3, **options)
    assert {tuple(kinds(group)) for group in groups} == {("on_policy",) * 4}
    assert scene.rows(ATTEMPTS) == []
    assert scene.counts["expert_lost"] == len(groups)
    scene.sampler.expert_error = None
    scene.collect(TASKS, num_groups=2, **options)
    assert scene.rows(ATTEMPTS)
    assert scene.counts["expert_lost"] == 0
    (lost,) = scene.store.recent_events(scene.run_id, severity="warning")
    assert lost.kind == "expert_lost"
    assert "ConnectionError: no replica" in lost.message


def test_an_expert_out_of_reach_is_left_alone_for_a_while(scene):
    scene.sampler.expert_error = ConnectionError("no replica")
    scene.collect(TASKS, num_groups=4, retry_s=3600.0, **LUFFY)
    assert len(scene.sampler.asked_expert) == 1
    assert scene.counts["expert_lost"] == scene.counts["groups_ready"] >= 4


# QuestA


def test_a_hint_is_the_first_part_of_a_right_solution(scene):
    groups = scene.collect(MORE_TASKS, num_groups=6, **QUESTA)
    prompts = {row["id"]: row["prompt"] for row in scene.rows("SELECT id, prompt FROM tasks")}
    rows = {row["id"]: row for row in scene.rows(GROUPS)}
    hinted = [group for group in groups if rows[group.group_id]["num_hint_tokens"]]
    # Of a solution of one or two tokens there is no half to show.
    assert len(hinted) >= 3
    for group in hinted:
        assert kinds(group) == ["on_policy"] * 4
        (stored,) = scene.store.demonstrations([first_use(scene, group)])
        shown = (len(stored.token_ids) - 1) // 2
        row = rows[group.group_id]
        assert (row["method"], row["num_hint_tokens"]) == ("questa", shown)
        assert row["hint_fraction"] == 0.5
        text = scene.renderer.text_of(stored.token_ids[:shown].tolist()).strip()
        text = text.removeprefix("<think>").strip()
        original = task(prompts[group.task_id])
        expected = scene.renderer.render(original, hint=f"ab\n\n{text}")
        assert group.prompt_token_ids.tolist() == expected
        assert len(expected) > len(scene.renderer.render(original))
        assert tuple(expected) in {asked[0].prompt_token_ids for asked in scene.sampler.asked}


def test_a_hint_changes_neither_the_task_nor_what_the_expert_is_asked(scene):
    scene.collect(TASKS, num_groups=2, **QUESTA)
    prompts = {row["prompt"] for row in scene.rows("SELECT prompt FROM tasks")}
    assert prompts == {"1+2", "3+4"}
    plain = {tuple(scene.renderer.render(one)) for one in TASKS}
    assert {request.prompt_token_ids for request in scene.sampler.asked_expert} == plain


def test_the_learner_takes_a_hinted_group_under_the_prompt_that_was_seen(scene):
    groups = scene.collect(MORE_TASKS, num_groups=6, **QUESTA)
    batch = build_batch(groups, alpha=0.0, policy_version=0)
    seen = {asked[0].prompt_token_ids for asked in scene.sampler.asked}
    assert len(batch.groups) == len(groups)
    for group in batch.groups:
        assert {tuple(one.prompt_token_ids.tolist()) for one in group.trajectories} <= seen


def test_later_hints_are_shorter(scene):
    hints = HintSchedule(header="ab", later_fraction=0.25, later_step=5)
    options = QUESTA | {"hints": hints}
    for step in (4, 5):
        scene.sampler.current = Guidance(step=step)
        scene.collect(MORE_TASKS, num_groups=6, **options)
    shown = {4: set(), 5: set()}
    for row in scene.rows(GROUPS):
        if row["hint_fraction"] is not None:
            shown[row["step"]].add((row["task_id"], row["hint_fraction"], row["num_hint_tokens"]))
    assert {fraction for _, fraction, _ in shown[4]} == {0.5}
    assert {fraction for _, fraction, _ in shown[5]} == {0.25}
    before = {task_id: num_tokens for task_id, _, num_tokens in shown[4]}
    assert all(num_tokens < before[task_id] for task_id, _, num_tokens in shown[5])


def test_a_hint_that_leaves_no_room_is_left_out(scene):
    most = len(scene.renderer.render(TASKS[0])) + 1
    options = QUESTA | {"hints": HintSchedule(header="ab", max_prompt_tokens=most)}
    groups = scene.collect(TASKS, num_groups=2, **options)
    assert {row["num_hint_tokens"] for row in scene.rows(GROUPS)} == {None}
    assert scene.counts["groups_without_expert"] == len(groups)
    assert scene.rows("SELECT * FROM trajectories WHERE demonstration_id IS NOT NULL") == []


def test_shares_of_methods_can_be_asked_for(scene):
    scene.collect(TASKS, num_groups=2, **LUFFY)
    scene.collect([task("5+6", "wrong")], num_groups=1, **LUFFY)
    scene.collect(TASKS, num_groups=2, **QUESTA)
    found = scene.rows("SELECT * FROM v_guidance_methods ORDER BY method")
    assert [row["method"] for row in found] == ["luffy", "questa"]
    assert sum(row["group_share"] for row in found) == pytest.approx(1.0)
    luffy = found[0]
    assert 0 < luffy["num_with_expert"] < luffy["num_groups"]
    assert found[1]["num_with_expert"] == 0
    assert {row["expert_model"] for row in scene.rows(ATTEMPTS)} == {EXPERT}
