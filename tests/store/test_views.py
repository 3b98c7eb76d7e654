import dataclasses
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import text
from store_samples import demonstration, group, task, update_record, version_record

from mentor_serve.store import TrajectoryStore
from mentor_serve.store.views import VIEWS
from mentor_serve.types import GuidanceMethod

GUIDE = Path(__file__).parents[2] / "docs" / "sql.md"


@pytest.fixture
def trained(store, run_id):
    """Two updates: groups of version 0 and 0 in the first, 0 and 1 in the second."""
    store.add_version(run_id, version_record(0))
    for step, versions in ((1, (0, 0)), (2, (0, 1))):
        for number, version in enumerate(versions):
            store.add_group(run_id, group(number=10 * step + number, version=version))
        leased = store.lease_groups(run_id, num_groups=2, owner="a", lease_s=60)
        store.commit_update(
            run_id,
            owner="a",
            group_ids=[item.group_id for item in leased],
            update=update_record(step, entropy=0.1 * step),
            version=version_record(step),
        )
    store.add_event(run_id, kind="expert_down", severity="warning", message="no answer")
    store.add_demonstrations(run_id, task(10), [demonstration()])
    return run_id


def rows(store, query):
    with store._read("testing a view") as connection:
        return [dict(row) for row in connection.execute(text(query)).mappings()]


def test_training_curve_has_a_row_for_each_update(store, trained):
    found = rows(store, "SELECT * FROM v_training_curve ORDER BY step")
    assert [(row["step"], row["policy_version"]) for row in found] == [(1, 1), (2, 2)]
    assert found[0]["run_name"] == "test"
    assert found[1]["entropy"] == pytest.approx(0.2)
    assert set(found[0]) == {
        *(field.name for field in dataclasses.fields(update_record(1))),
        "run_id",
        "run_name",
    }


def test_intervention_rate_is_by_version_and_over_tokens(store, trained):
    found = rows(store, "SELECT * FROM v_intervention_rate ORDER BY policy_version")
    assert [(row["policy_version"], row["num_trajectories"]) for row in found] == [(0, 3), (1, 1)]
    assert (found[0]["num_tokens"], found[0]["num_gated"]) == (15, 3)
    assert found[0]["gated_share"] == pytest.approx(0.2)
    assert found[0]["intervention_rate"] == pytest.approx(0.2)
    mixed = group().trajectories[-1].rollout
    assert found[0]["mean_weight"] == pytest.approx(float(mixed.weights.mean()))
    assert found[0]["mean_entropy"] == pytest.approx(float(mixed.entropies.mean()))


def test_intervention_tokens_count_replacements(store, trained):
    assert rows(store, "SELECT * FROM v_intervention_tokens") == [
        {
            "run_id": trained,
            "proposed_token_id": 7,
            "proposed_text": " wait",
            "chosen_token_id": 9,
            "chosen_text": " verify",
            "num_interventions": 4,
            "mean_entropy": 2.5,
            "mean_weight": 0.75,
        }
    ]


def test_pass_rate_counts_on_policy_responses_alone(store, trained):
    found = rows(store, "SELECT * FROM v_pass_rate ORDER BY policy_version")
    assert [
        (row["policy_version"], row["num_trajectories"], row["num_passed"], row["pass_rate"])
        for row in found
    ] == [(0, 6, 3, 0.5), (1, 2, 1, 0.5)]
    assert found[0]["mean_reward"] == pytest.approx(0.55)


def test_staleness_counts_from_the_version_an_update_started_from(store, trained):
    found = rows(store, "SELECT * FROM v_staleness ORDER BY step, staleness")
    assert [(row["step"], row["staleness"], row["num_groups"]) for row in found] == [
        (1, 0, 2),
        (2, 0, 1),
        (2, 1, 1),
    ]


def test_throughput_is_what_was_stored_in_an_hour(store, trained, clock):
    clock.advance(3600)
    store.add_group(trained, group(number=99))
    found = rows(store, "SELECT * FROM v_throughput ORDER BY hour")
    assert [row["run_id"] for row in found] == [trained] * 2
    # Three responses of five tokens a group; the demonstration was collected for no group.
    counts = [(row["num_groups"], row["num_trajectories"], row["num_tokens"]) for row in found]
    assert counts == [(4, 12, 60), (1, 3, 15)]


def test_guidance_methods_are_shares_of_the_groups_of_a_run(store, run_id):
    other = store.open_run("other", {})
    store.add_group(other, group(number=1))
    store.add_group(run_id, group(number=1, num_mixed=0, method=GuidanceMethod.ON_POLICY))
    for number, hint in ((2, 10), (3, 20), (4, None)):
        store.add_group(
            run_id,
            group(
                number=number,
                num_mixed=0,
                method=GuidanceMethod.QUESTA,
                num_hint_tokens=hint,
                hint_fraction=0.5 if hint else None,
            ),
        )
    failed = group(number=5, num_mixed=0, method=GuidanceMethod.QUESTA, status="failed", error="x")
    store.add_group(run_id, failed)
    query = "SELECT * FROM v_guidance_methods WHERE run_id = '{}' ORDER BY method"
    on_policy, questa = rows(store, query.format(run_id))
    assert (on_policy["method"], on_policy["num_groups"]) == ("on_policy", 1)
    assert on_policy["mean_hint_tokens"] is None
    assert questa["group_share"] == pytest.approx(0.75)
    assert (questa["num_with_hint"], questa["mean_hint_tokens"]) == (2, 15.0)
    (mentor,) = rows(store, query.format(other))
    assert (mentor["method"], mentor["group_share"], mentor["num_with_mixed"]) == ("mentor", 1.0, 1)


def test_numbers_are_floats_and_integers_on_every_database(store, trained):
    for view in VIEWS:
        for row in rows(store, f"SELECT * FROM {view}"):
            kinds = {type(value).__name__ for value in row.values()}
            assert kinds <= {"int", "float", "str", "NoneType", "datetime"}, view


@pytest.mark.parametrize("view", VIEWS)
def test_plain_sqlite3_reads_every_view(store, trained, url, view):
    if not url.startswith("sqlite"):
        pytest.skip("a property of SQLite files")
    path = url.removeprefix("sqlite:///")
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    assert connection.execute(f"SELECT * FROM {view}").fetchall()
    connection.close()


def test_views_of_an_empty_database_are_empty(url):
    with TrajectoryStore(url) as store:
        for view in VIEWS:
            assert rows(store, f"SELECT * FROM {view}") == []


def test_the_guide_names_every_table_and_view(url):
    guide = GUIDE.read_text(encoding="utf-8")
    from mentor_serve.store.models import Base

    for name in [*Base.metadata.tables, *VIEWS]:
        assert f"`{name}`" in guide
