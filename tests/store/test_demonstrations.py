import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text
from store_samples import PROMPT, demonstration, expert_rollout, group, task, trajectory

from mentor_serve.errors import StoreError
from mentor_serve.store import NewTrajectory, TrajectoryStore, database_check, new_id
from mentor_serve.store.prune import PrunePlan, prune
from mentor_serve.types import GuidanceMethod, StopReason, TrajectoryKind

EXPERT = "embedded:expert"
GUIDE = Path(__file__).parents[2] / "docs" / "baselines.md"


def attempts(store, run_id, *, number=0, expert_model=EXPERT, prompt=PROMPT, own_run_only=False):
    return store.demonstration_attempts(
        run_id,
        task(number),
        expert_model=expert_model,
        prompt_token_ids=prompt,
        own_run_only=own_run_only,
    )


def luffy_group(item, *, number=0, num_on_policy=2):
    copied = dataclasses.replace(item.trajectory, demonstration_id=item.demonstration_id)
    sampled = group(number=number, num_mixed=0, num_on_policy=num_on_policy)
    return dataclasses.replace(
        sampled, method=GuidanceMethod.LUFFY, trajectories=[*sampled.trajectories, copied]
    )


def test_attempts_come_back_in_their_order_with_their_tokens(store, run_id):
    right, wrong = demonstration(seed=1), demonstration(seed=2, accuracy=0.0)
    assert store.add_demonstrations(run_id, task(), [right, wrong]) == 2
    found = attempts(store, run_id)
    assert [(one.demonstration_id, one.accuracy) for one in found] == [
        (right.demonstration_id, 1.0),
        (wrong.demonstration_id, 0.0),
    ]
    assert {(one.num_tokens, one.num_uses, one.stop_reason) for one in found} == {
        (4, 0, StopReason.EOS)
    }
    read = store.demonstrations([wrong.demonstration_id, right.demonstration_id])
    for one, stored in zip(read, (wrong, right), strict=True):
        expected = stored.trajectory
        assert one.demonstration_id == stored.demonstration_id
        assert one.score == expected.score
        assert one.text == expected.rollout.text
        assert one.token_ids.tolist() == expected.rollout.token_ids.tolist()
        np.testing.assert_array_equal(one.expert_logprobs, expected.rollout.expert_logprobs)


def test_storing_again_changes_nothing(store, run_id):
    item = demonstration()
    store.add_demonstrations(run_id, task(), [item])
    assert store.add_demonstrations(run_id, task(), [item]) == 0
    assert len(attempts(store, run_id)) == 1


def test_an_attempt_belongs_to_its_task_expert_and_prompt(store, run_id):
    store.add_demonstrations(run_id, task(), [demonstration()])
    assert attempts(store, run_id, number=1) == []
    assert attempts(store, run_id, expert_model="another") == []
    assert attempts(store, run_id, prompt=[*PROMPT, 4]) == []


def test_another_run_of_the_same_task_finds_it(store, run_id):
    item = demonstration()
    store.add_demonstrations(run_id, task(), [item])
    store.add_group(run_id, luffy_group(item))
    other = store.open_run("other", {})
    (found,) = attempts(store, other)
    assert (found.demonstration_id, found.num_uses) == (item.demonstration_id, 0)
    assert attempts(store, run_id)[0].num_uses == 1
    assert attempts(store, other, own_run_only=True) == []
    assert len(attempts(store, run_id, own_run_only=True)) == 1


def test_uses_are_groups_not_trajectories(store, run_id):
    item = demonstration()
    store.add_demonstrations(run_id, task(), [item])
    store.add_group(run_id, luffy_group(item))
    hinted = group(num_mixed=0)
    hinted = dataclasses.replace(
        hinted,
        method=GuidanceMethod.QUESTA,
        trajectories=[
            dataclasses.replace(one, demonstration_id=item.demonstration_id)
            for one in hinted.trajectories
        ],
    )
    store.add_group(run_id, hinted)
    assert attempts(store, run_id)[0].num_uses == 2


def test_an_unscored_attempt_is_known_but_cannot_be_read(store, run_id):
    item = demonstration()
    unscored = dataclasses.replace(item.trajectory, score=None, error="ran out of time")
    item = dataclasses.replace(item, trajectory=unscored)
    store.add_demonstrations(run_id, task(), [item])
    assert attempts(store, run_id)[0].accuracy is None
    with pytest.raises(StoreError, match="found none"):
        store.demonstrations([item.demonstration_id])


@pytest.mark.parametrize(
    "item",
    [
        dataclasses.replace(demonstration(), trajectory=trajectory()),
        demonstration(expert_model=None),
        dataclasses.replace(
            demonstration(),
            trajectory=NewTrajectory(
                rollout=None,
                kind=TrajectoryKind.EXPERT,
                sample_index=0,
                score=None,
                prompt_token_ids=PROMPT,
                expert_model=EXPERT,
            ),
        ),
    ],
    ids=["of another kind", "without a name", "without tokens"],
)
def test_what_is_no_demonstration_is_refused(store, run_id, item):
    with pytest.raises(StoreError, match="expected a demonstration"):
        store.add_demonstrations(run_id, task(), [item])
    assert store.trajectories(run_id) == []


def test_a_group_is_leased_with_its_expert_trajectory_last(store, run_id):
    item = demonstration()
    store.add_demonstrations(run_id, task(), [item])
    store.add_group(run_id, luffy_group(item))
    (leased,) = store.lease_groups(run_id, num_groups=1, owner="learner", lease_s=60)
    assert [one.kind.value for one in leased.trajectories] == ["on_policy", "on_policy", "expert"]
    expert = leased.trajectories[-1]
    assert expert.token_ids.tolist() == item.trajectory.rollout.token_ids.tolist()
    assert np.isnan(expert.policy_logprobs).all()
    assert leased.prompt_token_ids.tolist() == PROMPT


def test_an_expert_trajectory_makes_no_group_older(store, run_id):
    item = demonstration(version=1)
    sampled = group(num_mixed=0, version=5)
    copied = dataclasses.replace(item.trajectory, demonstration_id=item.demonstration_id)
    store.add_group(
        run_id, dataclasses.replace(sampled, trajectories=[*sampled.trajectories, copied])
    )
    assert store.mark_stale(run_id, min_policy_version=5) == 0
    (leased,) = store.lease_groups(run_id, num_groups=1, owner="learner", lease_s=60)
    assert leased.min_policy_version == 5


def test_counts_of_gates_and_interventions_leave_expert_trajectories_out(store, run_id, url):
    item = demonstration()
    store.add_demonstrations(run_id, task(), [item])
    store.add_group(run_id, luffy_group(item))
    rows = store.trajectories(run_id, kind=TrajectoryKind.EXPERT)
    assert len(rows) == 2
    assert {(row.num_gated, row.num_interventions) for row in rows} == {(0, 0)}
    assert {(row.mean_weight, row.mean_entropy) for row in rows} == {(1.0, None)}
    assert database_check(url)["ok"]


def test_pruning_keeps_demonstrations(store, run_id, clock, url):
    item = demonstration()
    store.add_demonstrations(run_id, task(), [item])
    store.add_group(run_id, dataclasses.replace(luffy_group(item), status="failed", error="x"))
    clock.advance(60)
    done = prune(url, PrunePlan(what="tokens", keep_days=0), now=clock.now)
    assert done.num_token_rows == 3
    assert len(attempts(store, run_id)) == 1


def test_a_new_process_finds_them(store, run_id, url):
    item = demonstration()
    store.add_demonstrations(run_id, task(), [item])
    with TrajectoryStore(url) as again:
        assert len(attempts(again, run_id)) == 1
        assert again.demonstrations([item.demonstration_id])[0].text == expert_rollout().text


def test_reading_what_is_not_there_names_it(store):
    missing = new_id()
    with pytest.raises(StoreError, match=missing):
        store.demonstrations([missing])


def test_the_guide_lists_the_tasks_that_the_expert_failed(store, run_id):
    store.add_demonstrations(run_id, task(1), [demonstration(accuracy=0.0), demonstration()])
    store.add_demonstrations(run_id, task(2), [demonstration(accuracy=0.0) for _ in range(4)])
    (query,) = re.findall(r"```sql\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    with store._read("testing the guide") as connection:
        found = connection.execute(text(query)).all()
    assert found == [(task(2).prompt, 4)]
