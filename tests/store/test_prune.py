"""Pruning deletes what is old and finished, in batches, and nothing that anybody still needs."""

import dataclasses
import threading
from collections import Counter
from datetime import timedelta

import pytest
from sqlalchemy import text
from store_samples import demonstration, group, task, trajectory, update_record, version_record

from mentor_serve.errors import ConfigError, SchemaOutOfDate
from mentor_serve.store import NewTrajectory, TrajectoryStore, database_check, new_id
from mentor_serve.store import prune as prune_module
from mentor_serve.store.old_rows import Selection
from mentor_serve.store.prune import Pruned, PrunePlan, prune
from mentor_serve.types import TrajectoryKind

DAY = 86_400


def plan(**options):
    return PrunePlan(**{"pause_s": 0.0} | options)


def served(store, run_id, *, version=0):
    name = new_id()
    store.add_served(run_id, trajectory(TrajectoryKind.SERVED, version=version), trajectory_id=name)
    return name


def update(store, run_id, *, step):
    """Two groups of version `step - 1`, consumed by the update that makes version `step`."""
    ids = [new_id(), new_id()]
    for number, name in enumerate(ids):
        store.add_group(run_id, group(number=2 * step + number, version=step - 1, group_id=name))
    leased = store.lease_groups(run_id, num_groups=2, owner="a", lease_s=60)
    assert [item.group_id for item in leased] == ids
    store.commit_update(
        run_id,
        owner="a",
        group_ids=ids,
        update=update_record(step),
        version=version_record(step),
    )
    return ids


@pytest.fixture
def history(store, run_id, clock):
    """Four days, an update (two groups of three responses) and a served response a day."""
    store.add_version(run_id, version_record(0))
    for step in range(1, 5):
        update(store, run_id, step=step)
        served(store, run_id, version=step - 1)
        clock.advance(DAY)
    return run_id


def rows(store, query):
    with store._read("testing") as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def count(store, table):
    return rows(store, f"SELECT COUNT(*) FROM {table}")[0][0]


CURVES = (
    "SELECT * FROM version_stats ORDER BY kind, policy_version",
    "SELECT * FROM v_pass_rate ORDER BY policy_version",
    "SELECT * FROM v_intervention_rate ORDER BY policy_version",
    "SELECT * FROM v_training_curve ORDER BY step",
)


@pytest.mark.parametrize("what", ["tokens", "groups"])
@pytest.mark.parametrize("rule", [{"keep_days": 1.5}, {"keep_versions": 2}])
def test_what_is_old_goes_by_age_or_by_version(store, history, url, clock, what, rule):
    """Days 0 to 2 are older than a day and a half on day 4; versions 3 and 4 are the newest two."""
    curves = [rows(store, query) for query in CURVES]
    done = prune(url, plan(what=what, **rule), now=clock.now)
    assert (done.num_groups, done.num_served, done.runs) == (6, 3, ["test"])
    assert done.num_token_rows == 6 * 3 + 3
    assert count(store, "trajectory_tokens") == 2 * 3 + 1
    left = 7 if what == "groups" else 28
    assert count(store, "trajectories") == left
    assert count(store, "rollout_groups") == (2 if what == "groups" else 8)
    assert count(store, "interventions") == (2 if what == "groups" else 8)
    assert done.num_trajectories == 28 - left
    assert count(store, "tasks") == 8
    assert [rows(store, query) for query in CURVES] == curves
    assert store.count_groups_ever(history) == 8
    pruned = 6 if what == "groups" else 0
    assert rows(store, "SELECT num_pruned_groups FROM runs") == [(pruned,)]
    report = database_check(url)
    assert report["problems"] == []


def test_with_both_rules_a_group_must_be_old_by_both(store, history, url, clock):
    by_both = plan(what="groups", keep_days=1.5, keep_versions=4, is_dry=True)
    assert prune(url, by_both, now=clock.now).num_groups == 2
    by_both = plan(what="groups", keep_days=3.5, keep_versions=1, is_dry=True)
    assert prune(url, by_both, now=clock.now).num_groups == 2


def test_a_rule_is_needed():
    with pytest.raises(ConfigError, match="--keep-days, --keep-versions or both, got neither"):
        PrunePlan()
    with pytest.raises(ConfigError, match="at least 0"):
        PrunePlan(keep_days=-1)


@pytest.mark.parametrize("what", ["tokens", "groups"])
def test_a_dry_run_counts_what_the_real_one_deletes(store, history, url, clock, what):
    tables = ("rollout_groups", "trajectories", "trajectory_tokens", "interventions")
    before = {table: count(store, table) for table in tables}
    dry = prune(url, plan(what=what, keep_days=0, is_dry=True, batch_size=3), now=clock.now)
    assert {table: count(store, table) for table in tables} == before
    real = prune(url, plan(what=what, keep_days=0, batch_size=3), now=clock.now)
    assert dry == real
    assert real.num_array_bytes > 0
    assert count(store, "trajectory_tokens") == 0


@pytest.mark.parametrize("what", ["tokens", "groups"])
def test_what_a_learner_may_take_is_never_touched(store, run_id, url, clock, what):
    store.add_version(run_id, version_record(0))
    for number in range(4):
        store.add_group(run_id, group(number=number))
    (leased,) = store.lease_groups(run_id, num_groups=1, owner="a", lease_s=60)
    clock.advance(1000 * DAY)  # the lease expired, too: somebody else may take the group
    done = prune(url, plan(what=what, keep_days=1, keep_versions=0), now=clock.now)
    assert done == Pruned(runs=["test"])
    again = store.lease_groups(run_id, num_groups=4, owner="b", lease_s=60)
    assert leased.group_id in {item.group_id for item in again}
    assert all(len(item.trajectories) == 3 for item in again)


@pytest.mark.parametrize("what", ["tokens", "groups"])
def test_demonstrations_stay_whether_groups_quote_them_or_not(store, run_id, url, clock, what):
    quoted, unused = demonstration(), demonstration()
    store.add_demonstrations(run_id, task(), [quoted, unused])
    copy = dataclasses.replace(quoted.trajectory, demonstration_id=quoted.demonstration_id)
    made = group(num_on_policy=1, num_mixed=0)
    made = dataclasses.replace(made, trajectories=[*made.trajectories, copy])
    store.add_group(run_id, made)
    store.add_group(run_id, dataclasses.replace(group(), status="failed", error="x"))
    clock.advance(DAY)
    assert prune(url, plan(what=what, keep_days=0), now=clock.now).num_groups == 1
    ids = [quoted.demonstration_id, unused.demonstration_id]
    assert [one.demonstration_id for one in store.demonstrations(ids)] == ids
    assert database_check(url)["ok"]


def test_stale_and_failed_groups_go_as_well(store, run_id, url, clock):
    for number, version in enumerate((0, 0, 5)):
        store.add_group(run_id, group(number=number, version=version))
    store.mark_stale(run_id, min_policy_version=1)
    store.add_group(run_id, dataclasses.replace(group(number=9), status="failed", error="x"))
    nothing = NewTrajectory(
        rollout=None,
        kind=TrajectoryKind.ON_POLICY,
        sample_index=0,
        score=None,
        prompt_token_ids=[],
        error="no engine",
    )
    empty = dataclasses.replace(group(number=8), status="failed", trajectories=[nothing], error="x")
    store.add_group(run_id, empty)
    clock.advance(DAY)
    tokens = prune(url, plan(what="tokens", keep_days=0), now=clock.now)
    assert (tokens.num_groups, tokens.num_token_rows) == (3, 9)  # one had no tokens
    groups = prune(url, plan(what="groups", keep_days=0), now=clock.now)
    assert (groups.num_groups, groups.num_token_rows) == (4, 0)
    assert store.count_groups(run_id) == {
        "ready": 1,
        "leased": 0,
        "consumed": 0,
        "stale": 0,
        "failed": 0,
    }


def test_one_run_or_all(store, history, url, clock):
    other = store.open_run("other", {})
    store.add_group(other, dataclasses.replace(group(), status="failed", error="x"))
    clock.advance(DAY)
    done = prune(url, plan(what="groups", keep_days=0, run="other"), now=clock.now)
    assert (done.num_groups, done.runs) == (1, ["other"])
    assert count(store, "rollout_groups") == 8
    done = prune(url, plan(what="groups", keep_days=0), now=clock.now)
    assert (done.num_groups, done.runs) == (8, ["test", "other"])
    assert [store.count_groups_ever(run) for run in (history, other)] == [8, 1]
    with pytest.raises(
        ConfigError, match=r"expected a run named 'none', found \['other', 'test'\]"
    ):
        prune(url, plan(keep_days=0, run="none"))


def test_versions_are_counted_run_by_run(store, history, url, clock):
    """A young run's few versions are not old because another run has many."""
    other = store.open_run("other", {})
    store.add_version(other, version_record(0))
    store.add_group(other, dataclasses.replace(group(), status="failed", error="x"))
    done = prune(url, plan(what="groups", keep_versions=1), now=clock.now)
    assert done.num_groups == 8  # of versions 0 to 3, where 4 is the newest
    assert store.count_groups(other)["failed"] == 1


def test_a_run_without_versions_has_no_old_ones(store, run_id, url):
    store.add_group(run_id, dataclasses.replace(group(), status="failed", error="x"))
    assert prune(url, plan(what="groups", keep_versions=1)).num_groups == 0


@pytest.mark.parametrize("what", ["tokens", "groups"])
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_batches_cover_everything_once(store, history, url, clock, what, batch_size):
    told = []
    done = prune(
        url,
        plan(what=what, keep_days=0, batch_size=batch_size),
        progress=lambda number, total: told.append((number, total)),
        now=clock.now,
    )
    assert (done.num_groups, done.num_served) == (8, 4)
    assert done.num_batches == -(-8 // batch_size) + -(-4 // batch_size)
    assert told[0] == (0, 12)
    assert told[-1] == (12, 12)
    again = prune(url, plan(what=what, keep_days=0), now=clock.now)
    assert again == Pruned(runs=["test"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_prune_is_continued(store, history, url, clock, monkeypatch, error):
    """Whatever ends it in the middle of a batch, the batch did not happen."""
    original, calls = prune_module._delete, []

    def delete(*arguments, **options):
        calls.append(1)
        original(*arguments, **options)
        if len(calls) == 3:
            raise error

    monkeypatch.setattr(prune_module, "_delete", delete)
    done = Pruned()
    with pytest.raises(error):
        prune(url, plan(what="groups", keep_days=0, batch_size=2), into=done, now=clock.now)
    assert (done.num_groups, store.count_groups(history)["consumed"]) == (4, 4)
    assert rows(store, "SELECT num_pruned_groups FROM runs") == [(4,)]
    assert database_check(url)["ok"]
    monkeypatch.undo()
    rest = prune(url, plan(what="groups", keep_days=0), now=clock.now)
    assert rest.num_groups == 4
    assert store.count_groups_ever(history) == 8


def test_the_service_goes_on_while_a_prune_runs(store, history, url, clock):
    """Writers get their turn between batches, and what they write is left alone."""
    written, failures, stop = [], [], threading.Event()

    def write():
        try:
            with TrajectoryStore(url) as mine:
                while not stop.is_set():
                    made = group(number=len(written) % 5, version=9)
                    mine.add_group(history, made)
                    written.append(made.group_id)
        except Exception as error:
            failures.append(error)

    for step in range(5, 15):
        update(store, history, step=step)
    before = clock.now
    clock.advance(1)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        turns = []
        done = prune(
            url,
            PrunePlan(what="groups", keep_days=0, batch_size=2),
            progress=lambda *_: turns.append(len(written)),
            now=before + timedelta(milliseconds=500),
        )
    finally:
        stop.set()
        writer.join()
    assert failures == []
    assert done.num_groups == 28
    assert turns[-1] > turns[0]  # the writer had its turn
    assert store.count_groups(history)["ready"] == len(written)
    assert database_check(url)["ok"]


def test_two_prunes_at_once_delete_everything_once(store, history, url, clock):
    for step in range(5, 15):
        update(store, history, step=step)
    clock.advance(DAY)
    results, failures = [], []

    def work():
        try:
            results.append(
                prune(url, plan(what="groups", keep_days=0, batch_size=2), now=clock.now)
            )
        except Exception as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    assert sum(done.num_groups for done in results) == 28
    assert store.count_groups_ever(history) == 28


def test_a_group_that_became_trainable_again_is_spared(store, history, url, clock, monkeypatch):
    """The status is looked at again in the transaction that deletes."""
    original = prune_module._Pruning._take
    revived = []

    def take(self, run_id, selection, ids):
        if selection.is_groups and not revived:
            revived.append(ids[0])
            with store._write("reviving") as connection:
                connection.execute(
                    text("UPDATE rollout_groups SET status = 'ready' WHERE id = :id"),
                    {"id": ids[0]},
                )
        original(self, run_id, selection, ids)

    monkeypatch.setattr(prune_module._Pruning, "_take", take)
    done = prune(url, plan(what="groups", keep_days=0), now=clock.now)
    assert done.num_groups == 7
    assert rows(store, "SELECT id, status FROM rollout_groups") == [(revived[0], "ready")]


def test_a_database_of_another_schema_is_left_alone(empty_url):
    with pytest.raises(SchemaOutOfDate, match="mentor-serve db upgrade"):
        prune(empty_url, plan(keep_days=0))


@pytest.mark.parametrize("what", ["tokens", "groups"])
def test_finding_what_is_old_uses_indexes(store, history, url, clock, what, monkeypatch):
    """No query of a prune reads a table of trajectories from end to end."""
    if not url.startswith("sqlite"):
        pytest.skip("PostgreSQL scans tables as small as these, whatever indexes there are")
    queries = []
    after = Selection.after

    def noted(self, last):
        query = after(self, last)
        queries.append(query.limit(200))
        return query

    monkeypatch.setattr(Selection, "after", noted)
    prune(url, plan(what=what, keep_days=1, keep_versions=1, batch_size=1), now=clock.now)
    seen = Counter()
    with store._read("explaining") as connection:
        for query in queries:
            sql = str(query.compile(connection.engine, compile_kwargs={"literal_binds": True}))
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}"):
                seen[row[3]] += 1
    assert seen
    assert not any(step.startswith("SCAN") for step in seen), seen
    assert not any(step == "USE TEMP B-TREE FOR ORDER BY" for step in seen), seen
