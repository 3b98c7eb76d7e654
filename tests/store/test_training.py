import dataclasses
import json
import math
from datetime import timedelta

import pytest
from sqlalchemy import event
from store_samples import group, trajectory, update_record, version_record

from mentor_serve.errors import LeaseLost, StoreError
from mentor_serve.store import database_check
from mentor_serve.types import TrajectoryKind


@pytest.fixture
def leased(store, run_id):
    """Two groups leased by "learner", version 0 in the store."""
    store.add_version(run_id, version_record(0))
    for number in range(2):
        store.add_group(run_id, group(number=number))
    return [
        item.group_id
        for item in store.lease_groups(run_id, num_groups=2, owner="learner", lease_s=60)
    ]


def commit(store, run_id, group_ids, *, step=1, owner="learner", **options):
    store.commit_update(
        run_id,
        owner=owner,
        group_ids=group_ids,
        update=update_record(step, **options),
        version=version_record(step),
    )


def test_a_commit_consumes_the_groups_and_adds_update_and_version(store, run_id, leased, clock):
    commit(store, run_id, leased, loss=math.nan)
    assert store.count_groups(run_id)["consumed"] == 2
    expected = update_record(1, loss=None, created_at=clock.now)
    assert store.latest_update(run_id) == expected
    assert store.latest_version(run_id) == version_record(1, created_at=clock.now)
    assert [item.version for item in store.list_versions(run_id)] == [0, 1]
    assert store.live_version(run_id) is None
    assert database_check(store._url)["ok"]


def test_the_same_groups_are_not_committed_twice(store, run_id, leased):
    commit(store, run_id, leased)
    with pytest.raises(LeaseLost, match="holds 0"):
        commit(store, run_id, leased, step=2)
    assert store.latest_update(run_id).step == 1


def test_a_lost_lease_leaves_nothing(store, run_id, leased, clock):
    clock.advance(61)
    stolen = store.lease_groups(run_id, num_groups=1, owner="other", lease_s=60)
    with pytest.raises(LeaseLost, match="expected 'learner' to hold the leases of 2 groups"):
        commit(store, run_id, leased)
    assert store.latest_update(run_id) is None
    assert store.latest_version(run_id).version == 0
    assert store.count_groups(run_id)["leased"] == 2
    assert stolen[0].group_id in leased


def test_an_expired_lease_that_nobody_took_still_commits(store, run_id, leased, clock):
    clock.advance(3600)
    commit(store, run_id, leased)
    assert store.latest_update(run_id).step == 1


def test_unknown_groups_are_a_lost_lease(store, run_id, leased):
    with pytest.raises(LeaseLost):
        commit(store, run_id, [*leased, "unknown"])
    assert store.count_groups(run_id)["leased"] == 2


def test_a_step_is_committed_once(store, run_id, leased):
    commit(store, run_id, leased)
    store.add_group(run_id, group())
    (again,) = store.lease_groups(run_id, num_groups=1, owner="learner", lease_s=60)
    with pytest.raises(StoreError, match="committing step 1 failed"):
        store.commit_update(
            run_id,
            owner="learner",
            group_ids=[again.group_id],
            update=update_record(1, policy_version=2),
            version=version_record(2),
        )
    assert store.latest_version(run_id).version == 1
    assert store.count_groups(run_id)["leased"] == 1


@pytest.mark.parametrize(
    "statement", ["INSERT INTO policy_versions", "INSERT INTO updates", "UPDATE runs"]
)
def test_a_crash_between_statements_rolls_everything_back(store, run_id, leased, statement):
    def crash(connection, cursor, text, *rest):
        if text.startswith(statement):
            raise KeyboardInterrupt

    event.listen(store._engine, "before_cursor_execute", crash)
    with pytest.raises(KeyboardInterrupt):
        commit(store, run_id, leased)
    event.remove(store._engine, "before_cursor_execute", crash)
    assert store.count_groups(run_id)["leased"] == 2
    assert store.latest_update(run_id) is None
    assert store.latest_version(run_id).version == 0
    commit(store, run_id, leased)
    assert store.latest_update(run_id).step == 1


def test_exactly_one_version_is_live(store, run_id):
    for version in range(3):
        store.add_version(run_id, version_record(version, is_live=True))
    assert store.live_version(run_id) is None
    store.set_live(run_id, 1)
    store.set_live(run_id, 2)
    store.set_live(run_id, 2)
    assert [item.is_live for item in store.list_versions(run_id)] == [False, False, True]
    with pytest.raises(StoreError, match="expected version 9 in the store, found none"):
        store.set_live(run_id, 9)
    assert store.live_version(run_id).version == 2
    assert store.version(run_id, 1).parent_version == 0
    assert store.version(run_id, 9) is None


def test_the_database_itself_refuses_a_second_live_version(store, run_id):
    for version in range(2):
        store.add_version(run_id, version_record(version))
    store.set_live(run_id, 0)
    with pytest.raises(StoreError, match="x failed"), store._write("x") as connection:
        connection.exec_driver_sql("UPDATE policy_versions SET is_live = (1 = 1)")
    assert store.live_version(run_id).version == 0


def test_a_run_of_the_same_name_continues(store, run_id, clock):
    clock.advance(10)
    assert store.open_run("test", {"rollout": {"seed": 2}}) == run_id
    assert store.open_run("test", {"rollout": {"seed": 3}}, announce=False) == run_id
    assert store.find_run("test") == run_id
    assert store.find_run("unknown") is None
    (only,) = store.recent_events(run_id)
    assert (only.kind, only.severity, only.created_at) == ("run_continued", "info", clock.now)
    assert store.open_run("other", {}) != run_id


def test_events_are_read_newest_first_and_by_severity(store, run_id):
    for number, severity in enumerate(["info", "error", "warning", "error"]):
        store.add_event(
            run_id,
            kind="test",
            severity=severity,
            message=str(number),
            details={"loss": math.inf, "path": {"n": number}},
        )
    assert [item.message for item in store.recent_events(run_id)] == ["3", "2", "1", "0"]
    errors = store.recent_events(run_id, severity="error", limit=1)
    assert [item.details for item in errors] == [{"loss": None, "path": {"n": 3}}]
    with pytest.raises(StoreError, match="expected a severity of info, warning, error"):
        store.add_event(run_id, kind="test", severity="fatal", message="")


def test_rows_of_an_unknown_run_are_refused(store):
    with pytest.raises(StoreError, match="adding an event failed"):
        store.add_event("unknown", kind="test", severity="info", message="")
    with pytest.raises(StoreError, match="storing a group failed"):
        store.add_group("unknown", group())
    with pytest.raises(StoreError, match="expected a run of id 'unknown'"):
        store.training_status("unknown")


def test_the_status_of_a_new_run_is_empty(store, run_id):
    status = store.training_status(run_id)
    assert (status.run_name, status.step, status.policy_version) == ("test", 0, None)
    assert (status.pass_rate_first, status.groups_per_minute, status.errors) == (None, 0.0, [])
    assert json.loads(json.dumps(status.as_dict()))["groups"]["ready"] == 0


def test_the_status_sums_up_a_run(store, run_id, clock):
    store.add_version(run_id, version_record(0))
    clock.advance(600)
    for version in range(7):
        passed = 1.0 if version >= 2 else 0.0
        samples = [trajectory(accuracy=passed, version=version)]
        store.add_group(run_id, dataclasses.replace(group(version=version), trajectories=samples))
        (taken,) = store.lease_groups(run_id, num_groups=1, owner="learner", lease_s=60)
        commit(
            store,
            run_id,
            [taken.group_id],
            step=version + 1,
            mean_reward_on_policy=float(version),
            mean_reward_mixed=None,
        )
        clock.advance(30)
    store.set_live(run_id, 6)
    store.add_group(run_id, group(version=7))
    store.add_event(run_id, kind="engine", severity="error", message="boom")
    status = store.training_status(run_id)
    assert (status.step, status.policy_version, status.live_version) == (7, 7, 6)
    assert (status.alpha, status.gamma) == (0.5, 1.25)
    assert status.groups["consumed"] == 7
    assert status.num_trajectories == 7 + 3
    assert status.mean_reward_on_policy == pytest.approx(3.0)
    assert status.mean_reward_mixed is None
    # Versions 0 to 4, then 3 to 7; version 7 has one right and one wrong response.
    assert status.pass_rate_first == pytest.approx(3 / 5)
    assert status.pass_rate_last == pytest.approx(5 / 6)
    assert status.last_update_at == clock.now - timedelta(seconds=30)
    assert status.groups_per_minute == pytest.approx(8 / 5)
    assert [item.message for item in status.errors] == ["boom"]
    document = json.loads(json.dumps(status.as_dict()))
    assert document["errors"][0]["created_at"] == clock.now.isoformat()


def test_the_check_finds_what_is_wrong(store, run_id, leased, url):
    commit(store, run_id, leased)
    assert database_check(url)["counts"]["trajectories"] == 6
    with store._write("x") as connection:
        connection.exec_driver_sql("DELETE FROM updates")
    store.add_group(
        run_id, dataclasses.replace(group(), trajectories=[trajectory(TrajectoryKind.EXPERT)])
    )
    with store._write("x") as connection:
        connection.exec_driver_sql(
            "DELETE FROM trajectory_tokens WHERE trajectory_id IN "
            "(SELECT id FROM trajectories WHERE kind = 'expert')"
        )
    report = database_check(url)
    assert report["ok"] is False
    assert [problem.split(";")[0] for problem in report["problems"]] == [
        "2 consumed groups without the update that consumed them",
        "1 usable trajectories of unconsumed groups without tokens",
    ]
