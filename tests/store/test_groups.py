import dataclasses
import math
import sqlite3

import numpy as np
import pytest
from store_samples import PROMPT, group, rollout, task, trajectory

from mentor_serve.errors import StoreError
from mentor_serve.store import NewTrajectory, TrajectoryStore, new_id
from mentor_serve.types import Score, StopReason, TrajectoryKind

ARRAYS = {
    "token_ids": "token_ids",
    "policy_logprobs": "policy_logprobs",
    "expert_logprobs": "expert_logprobs",
    "mixed_logprobs": "mixed_logprobs",
    "entropies": "entropies",
    "weights": "weights",
    "sources": "sources",
    "policy_versions": "versions",
}


def lease_one(store, run_id):
    (leased,) = store.lease_groups(run_id, num_groups=1, owner="learner", lease_s=60)
    return leased


def test_a_group_comes_back_bit_for_bit(store, run_id):
    stored = group(num_on_policy=3, num_mixed=2, version=4)
    assert store.add_group(run_id, stored) is True
    leased = lease_one(store, run_id)
    assert leased.group_id == stored.group_id
    assert (leased.policy_version, leased.min_policy_version) == (4, 4)
    assert (leased.gamma, leased.alpha) == (1.25, 0.5)
    assert leased.prompt_token_ids.tolist() == PROMPT
    assert len(leased.trajectories) == 5
    for new, read in zip(stored.trajectories, leased.trajectories, strict=True):
        assert (read.kind, read.sample_index) == (new.kind, new.sample_index)
        assert read.stop_reason is StopReason.EOS
        assert (read.reward, read.accuracy, read.format_score) == dataclasses.astuple(new.score)
        assert read.prompt_token_ids.tolist() == PROMPT
        for attribute, column in ARRAYS.items():
            expected, found = getattr(new.rollout, attribute), getattr(read, column)
            assert found.dtype == expected.dtype
            assert found.tobytes() == expected.tobytes(), attribute


def test_trajectories_are_ordered_by_kind_and_index(store, run_id):
    stored = group(num_on_policy=12, num_mixed=2)
    stored.trajectories.reverse()
    store.add_group(run_id, stored)
    leased = lease_one(store, run_id)
    found = [(item.kind.value, item.sample_index) for item in leased.trajectories]
    assert found == [("on_policy", i) for i in range(12)] + [("mixed", i) for i in range(2)]
    assert len(leased.of_kind(TrajectoryKind.MIXED)) == 2


def test_storing_a_group_again_changes_nothing(store, run_id):
    stored = group()
    assert store.add_group(run_id, stored) is True
    assert store.add_group(run_id, stored) is False
    changed = dataclasses.replace(stored, status="failed", trajectories=[])
    assert store.add_group(run_id, changed) is False
    assert store.count_groups(run_id)["ready"] == 1
    assert len(store.trajectories(run_id)) == 3


def test_means_and_versions_are_computed_from_the_arrays(store, run_id):
    new = trajectory(TrajectoryKind.MIXED, num_tokens=4)
    new.rollout.policy_versions = np.array([2, 2, 3, 3], np.int32)
    store.add_group(run_id, dataclasses.replace(group(version=3), trajectories=[new]))
    (record,) = store.trajectories(run_id)
    assert record.mean_entropy == pytest.approx(float(new.rollout.entropies.mean()))
    assert record.mean_weight == pytest.approx(float(new.rollout.weights.mean()))
    assert (record.min_policy_version, record.max_policy_version) == (2, 3)
    assert (record.num_tokens, record.num_gated, record.num_interventions) == (4, 1, 1)
    assert record.num_prompt_tokens == len(PROMPT)
    assert record.prompt == task().prompt
    assert lease_one(store, run_id).min_policy_version == 2


def test_failed_trajectories_are_rows_but_are_not_leased(store, run_id):
    lost = NewTrajectory(
        rollout=None,
        kind=TrajectoryKind.ON_POLICY,
        sample_index=7,
        score=None,
        prompt_token_ids=PROMPT,
        error="engine: out of slots",
    )
    unscored = dataclasses.replace(trajectory(sample_index=8), score=None)
    stored = group()
    stored.trajectories.extend([lost, unscored])
    store.add_group(run_id, stored)
    assert len(lease_one(store, run_id).trajectories) == 3
    failed = {row.sample_index: row for row in store.trajectories(run_id) if row.status == "failed"}
    assert failed[7].error == "engine: out of slots"
    assert failed[8].error == "not scored"
    assert failed[8].num_tokens == 5


def test_a_failed_group_is_kept_and_never_leased(store, run_id):
    failed = dataclasses.replace(group(), trajectories=[], status="failed", error="verifier: dead")
    store.add_group(run_id, failed)
    assert store.count_groups(run_id)["failed"] == 1
    assert store.lease_groups(run_id, num_groups=1, owner="a", lease_s=60) == []


def test_an_empty_response_can_be_stored(store, run_id):
    new = dataclasses.replace(trajectory(), rollout=rollout(num_tokens=0))
    store.add_group(run_id, dataclasses.replace(group(version=5), trajectories=[new]))
    leased = lease_one(store, run_id)
    assert leased.min_policy_version == 5
    assert leased.trajectories[0].token_ids.tolist() == []
    assert store.trajectories(run_id)[0].mean_entropy is None


def test_text_that_databases_refuse_is_replaced(store, run_id):
    new = dataclasses.replace(trajectory(), text="a\x00b\ud800c")
    store.add_group(run_id, dataclasses.replace(group(), trajectories=[new]))
    assert store.trajectories(run_id)[0].text == "a\N{REPLACEMENT CHARACTER}b?c"


@pytest.mark.parametrize("status", ["leased", "consumed", "stale", "new"])
def test_a_new_group_is_ready_or_failed(store, run_id, status):
    with pytest.raises(StoreError, match="ready or failed"):
        store.add_group(run_id, dataclasses.replace(group(), status=status))


def test_arrays_of_unequal_length_are_refused_and_leave_nothing(store, run_id):
    stored = group()
    stored.trajectories[-1].rollout.entropies = np.zeros(2, np.float32)
    with pytest.raises(StoreError, match="expected 5 entropies"):
        store.add_group(run_id, stored)
    assert sum(store.count_groups(run_id).values()) == 0
    assert store.trajectories(run_id) == []


def test_a_seed_beyond_64_bits_is_a_store_error(store, run_id):
    new = dataclasses.replace(trajectory(), seed=2**63)
    with pytest.raises(StoreError, match="storing a group failed"):
        store.add_group(run_id, dataclasses.replace(group(), trajectories=[new]))
    assert store.trajectories(run_id) == []


def test_two_samples_of_one_index_are_refused(store, run_id):
    twice = dataclasses.replace(group(), trajectories=[trajectory(), trajectory()])
    with pytest.raises(StoreError, match="storing a group failed"):
        store.add_group(run_id, twice)
    assert sum(store.count_groups(run_id).values()) == 0


def test_the_same_task_is_stored_once(store, run_id):
    first = store.ensure_task(run_id, task(1))
    assert store.add_tasks(run_id, [task(1), task(2), task(1)]) == [
        first,
        store.ensure_task(run_id, task(2)),
        first,
    ]
    other = dataclasses.replace(task(1), metadata={"n": 2})
    assert store.ensure_task(run_id, other) != first


def test_untried_tasks_are_those_without_a_group(store, run_id):
    store.add_tasks(run_id, [task(1), task(2)])
    store.add_group(run_id, group(number=1))
    assert [item.task for item in store.list_tasks(run_id)] == [task(1), task(2)]
    assert [item.task for item in store.list_tasks(run_id, only_untried=True)] == [task(2)]
    assert store.list_tasks(run_id, source="elsewhere") == []


def test_listings_continue_before_an_id(store, run_id):
    for number in range(3):
        store.add_group(run_id, group(number=number))
    everything = store.trajectories(run_id, limit=100)
    assert [item.id for item in everything] == sorted((i.id for i in everything), reverse=True)
    rest = store.trajectories(run_id, limit=100, before=everything[3].id)
    assert rest == everything[4:]
    mixed = store.trajectories(run_id, kind=TrajectoryKind.MIXED)
    assert {item.kind for item in mixed} == {"mixed"}
    assert len(mixed) == 3


def test_a_document_holds_tokens_and_interventions(store, run_id):
    stored = group(num_on_policy=0)
    store.add_group(run_id, stored)
    (record,) = store.trajectories(run_id)
    document = store.trajectory_document(record.id)
    assert document["tokens"]["token_ids"] == stored.trajectories[0].rollout.token_ids.tolist()
    assert document["tokens"]["mixed_logprobs"] == [None, -0.25, None, None, None]
    (one,) = document["interventions"]
    assert (one["position"], one["proposed_text"], one["chosen_text"]) == (1, " wait", " verify")
    assert store.trajectory_document("nothing") is None


def test_served_responses_are_scored_later(store, run_id):
    served = dataclasses.replace(trajectory(TrajectoryKind.SERVED), score=None)
    served_id = new_id()
    assert store.add_served(run_id, served, trajectory_id=served_id) is True
    assert store.add_served(run_id, served, trajectory_id=served_id) is False
    score = Score(reward=0.5, accuracy=0.0, format_score=math.nan)
    assert store.score_served(served_id, score) is True
    assert store.score_served("unknown", score) is False
    (record,) = store.trajectories(run_id, kind=TrajectoryKind.SERVED)
    assert (record.status, record.reward, record.format_score) == ("ok", 0.5, None)
    with pytest.raises(StoreError, match="expected a served trajectory"):
        store.add_served(run_id, trajectory(), trajectory_id=new_id())


def test_rewards_of_a_group_cannot_be_changed(store, run_id):
    store.add_group(run_id, group())
    (first, *_) = store.trajectories(run_id)
    assert store.score_served(first.id, Score(reward=0, accuracy=0, format_score=0)) is False
    assert store.trajectories(run_id)[0].reward == first.reward


def test_a_read_only_store_refuses_writes(store, url, run_id):
    store.add_group(run_id, group())
    with TrajectoryStore(url, read_only=True) as reader:
        assert reader.count_groups(run_id)["ready"] == 1
        assert reader.find_run("test") == run_id
        with pytest.raises(StoreError, match="opened read-only"):
            reader.add_group(run_id, group())
        # The database refuses as well, not only the class.
        with pytest.raises(StoreError, match=r"read-?only"), reader._read("x") as connection:
            connection.exec_driver_sql("DELETE FROM trajectories")
    assert len(store.trajectories(run_id)) == 3


def test_a_missing_database_is_named(tmp_path):
    reader = TrajectoryStore(f"sqlite:///{tmp_path / 'none.db'}", read_only=True)
    with reader, pytest.raises(StoreError, match=r"none\.db"):
        reader.find_run("test")
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("mysql://u:secret@h/d", "SQLite or PostgreSQL"),
        ("nonsense secret", "expected a database URL"),
    ],
)
def test_unusable_urls_are_refused_without_showing_them(url, message):
    with pytest.raises(StoreError, match=message) as caught:
        TrajectoryStore(url)
    assert "secret" not in str(caught.value)


def test_errors_hide_the_password():
    url = "postgresql://mentor:secret@127.0.0.1:1/mentor"
    with TrajectoryStore(url, timeout_s=1) as store, pytest.raises(StoreError) as caught:
        store.find_run("test")
    assert "secret" not in str(caught.value)
    assert "mentor:***@127.0.0.1:1" in str(caught.value)


def test_paths_with_unusual_characters_work(tmp_path):
    from mentor_serve.store import upgrade

    path = tmp_path / "a b#c%d" / "mentor.db"
    upgrade(f"sqlite:///{path}")
    assert path.exists()
    with TrajectoryStore(f"sqlite:///{path}") as store:
        assert store.open_run("r", {})


def test_times_are_utc_text_for_other_clients(store, run_id, url, clock):
    if not url.startswith("sqlite"):
        pytest.skip("a property of SQLite files")
    store.add_group(run_id, group())
    connection = sqlite3.connect(url.removeprefix("sqlite:///"))
    (created,) = connection.execute("SELECT created_at FROM rollout_groups").fetchone()
    (config,) = connection.execute("SELECT json_extract(config_json, '$.policy.model') FROM runs")
    connection.close()
    assert created == "2026-01-31T12:00:00.000000Z"
    assert config == ("embedded:policy",)
    assert store.trajectories(run_id)[0].created_at == clock.now
