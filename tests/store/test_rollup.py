"""`version_stats` always equals what a scan of `trajectories` gives."""

import pytest
from sqlalchemy import text
from store_samples import group, trajectory

from mentor_serve.store import NewTrajectory
from mentor_serve.store.connection import open_engine, reading
from mentor_serve.types import TrajectoryKind

SCAN = """
SELECT kind, min_policy_version AS policy_version, COUNT(*) AS num_trajectories,
    COUNT(accuracy) AS num_scored,
    SUM(CASE WHEN accuracy >= 1 THEN 1 ELSE 0 END) AS num_passed,
    SUM(accuracy) AS accuracy_sum, SUM(reward) AS reward_sum,
    SUM(num_tokens) AS num_scored_tokens, SUM(num_tokens) AS num_tokens,
    SUM(num_gated) AS num_gated, SUM(num_interventions) AS num_interventions,
    SUM(mean_weight * num_tokens) AS weight_sum, SUM(mean_entropy * num_tokens) AS entropy_sum,
    SUM(num_tokens) AS num_entropy_tokens
FROM trajectories WHERE status = 'ok' AND group_id IS NOT NULL
GROUP BY kind, min_policy_version ORDER BY kind, min_policy_version
"""
SUMS = "SELECT * FROM version_stats ORDER BY kind, policy_version"


def rows(url, statement):
    engine = open_engine(url)
    with reading(engine, url, doing="x") as connection:
        found = [dict(row) for row in connection.execute(text(statement)).mappings()]
    engine.dispose()
    return found


def test_the_sums_equal_a_scan(store, run_id, url):
    failed = NewTrajectory(
        rollout=None,
        kind=TrajectoryKind.ON_POLICY,
        sample_index=9,
        score=None,
        prompt_token_ids=[],
        error="no engine",
    )
    for number, version in enumerate((0, 0, 1, 3)):
        made = group(number=number, version=version)
        made.trajectories.append(failed)
        assert store.add_group(run_id, made)
        assert not store.add_group(run_id, made)  # a repeated write adds nothing
    store.add_served(run_id, trajectory(TrajectoryKind.SERVED), trajectory_id="served-1")
    sums = rows(url, SUMS)
    assert [row.pop("run_id") for row in sums] == [run_id] * 6
    scanned = rows(url, SCAN)
    assert [row["num_trajectories"] for row in scanned] == [2, 1, 1, 4, 2, 2]
    for found, expected in zip(sums, scanned, strict=True):
        assert found == pytest.approx(
            {name: value if name == "kind" else float(value) for name, value in expected.items()}
        )


def test_a_write_that_fails_adds_nothing(store, run_id, url):
    made = group()
    made.trajectories[0].rollout.entropies = made.trajectories[0].rollout.entropies[:-1]
    with pytest.raises(Exception, match="one for each token"):
        store.add_group(run_id, made)
    assert rows(url, SUMS) == []
