"""Statistics for people: hand-computed values, bounds, and what a missing database says."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import insert

from mentor_serve.errors import SchemaOutOfDate, StoreError
from mentor_serve.store import models, schema
from mentor_serve.store.aggregates import wilson_interval
from mentor_serve.store.connection import open_engine, writing
from mentor_serve.store.encoding import encode
from mentor_serve.store.rollup import add_to_version_stats
from mentor_serve.store.stats import MAX_POINTS, StatsReader
from mentor_serve.types import TrajectoryKind

NOW = datetime(2026, 5, 4, 12, 30, 20, tzinfo=UTC)
RUN = "run-a"


@pytest.fixture(name="url")
def url_with_run(url: str) -> str:
    """A database of the newest schema that knows one run."""
    write(url, models.Run, [run(RUN, at=NOW)])
    return url


@pytest.fixture
def reader(url: str) -> Iterator[StatsReader]:
    opened = StatsReader(url)
    yield opened
    opened.close()


def write(url: str, table: Any, rows: list[dict[str, Any]]) -> None:
    engine = open_engine(url)
    with writing(engine, url, doing="seeding") as connection:
        connection.execute(insert(table), rows)
        if table is models.Trajectory:
            add_to_version_stats(connection, rows)
    engine.dispose()


def run(run_id: str, *, at: datetime) -> dict[str, Any]:
    return {"id": run_id, "name": run_id, "config_json": {}, "started_at": at, "updated_at": at}


def version(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "run_id": RUN,
        "version": number,
        "step": number,
        "sha256": None,
        "path": None,
        "created_at": NOW,
        "is_live": False,
        "parent_version": number - 1 if number else None,
        "alpha": 0.5,
        "gamma": 1.5,
    }
    return row | changes


def update(step: int, **changes: Any) -> dict[str, Any]:
    names = {column.key for column in models.Update.__table__.columns}
    row = dict.fromkeys(names) | {
        "run_id": RUN,
        "step": step,
        "policy_version": step,
        "num_groups": 2,
        "num_trajectories": 12,
        "num_tokens": 100,
        "alpha": 1.0,
        "gamma": 2.0,
        "num_stale": 0,
        "created_at": NOW + timedelta(seconds=step),
    }
    return row | changes


def group(group_id: str, **changes: Any) -> dict[str, Any]:
    row = {
        "id": group_id,
        "run_id": RUN,
        "task_id": "task",
        "policy_version": 0,
        "min_policy_version": 0,
        "step": 0,
        "gamma": 1.5,
        "alpha": 0.5,
        "status": "ready",
        "num_on_policy": 2,
        "num_mixed": 2,
        "lease_owner": None,
        "lease_expires_at": None,
        "consumed_by_step": None,
        "error": None,
        "created_at": NOW,
    }
    return row | changes


def trajectory(trajectory_id: str, **changes: Any) -> dict[str, Any]:
    row = {
        "id": trajectory_id,
        "group_id": "group",
        "run_id": RUN,
        "task_id": "task",
        "kind": "on_policy",
        "sample_index": int(trajectory_id.rpartition("-")[2]),
        "status": "ok",
        "error": None,
        "reward": 0.1,
        "accuracy": 0.0,
        "format_score": 1.0,
        "text": "the answer is 4",
        "num_prompt_tokens": 5,
        "num_tokens": 10,
        "num_gated": 0,
        "num_interventions": 0,
        "mean_entropy": 0.5,
        "mean_weight": 0.0,
        "min_policy_version": 0,
        "max_policy_version": 0,
        "stop_reason": "eos",
        "latency_s": 0.1,
        "seed": 1,
        "expert_lost": False,
        "created_at": NOW,
    }
    return row | changes


def task() -> dict[str, Any]:
    return {
        "id": "task",
        "run_id": RUN,
        "source": "test",
        "prompt": "What is 2 + 2?",
        "answer": "4",
        "split": "train",
        "metadata_json": {},
        "content_key": "key",
        "created_at": NOW,
    }


def write_group(url: str, **changes: Any) -> None:
    write(url, models.TaskRow, [task()])
    write(url, models.RolloutGroup, [group("group", **changes)])


def write_updates(url: str, rows: list[dict[str, Any]]) -> None:
    write(url, models.PolicyVersion, [version(row["policy_version"]) for row in rows])
    write(url, models.Update, rows)


def test_runs_come_most_recently_active_first(url: str, reader: StatsReader) -> None:
    write(url, models.Run, [run("older", at=NOW - timedelta(days=1))])
    assert [row["name"] for row in reader.runs()] == [RUN, "older"]
    assert reader.runs()[0]["updated_at"] == NOW


def test_a_short_training_curve_is_every_update(url: str, reader: StatsReader) -> None:
    write_updates(url, [update(1, loss=0.5, staleness_max=3), update(2, loss=None)])
    first, second = reader.training_curve(RUN)
    assert (first["step"], first["loss"], first["staleness_max"]) == (1, 0.5, 3)
    assert (second["step"], second["loss"], second["mean_reward_mixed"]) == (2, None, None)
    assert second["created_at"] == NOW + timedelta(seconds=2)


def test_a_long_training_curve_is_averaged_in_buckets(url: str, reader: StatsReader) -> None:
    rows = [update(step, loss=float(step), num_stale=1) for step in range(1, 11)]
    write_updates(url, rows)
    curve = reader.training_curve(RUN, max_points=4)
    # Ten steps in at most four buckets: width 3, so steps 1-3, 4-6, 7-9, 10.
    assert [row["step"] for row in curve] == [3, 6, 9, 10]
    assert [row["loss"] for row in curve] == [2.0, 5.0, 8.0, 10.0]
    assert [row["num_stale"] for row in curve] == [3, 3, 3, 1]


@pytest.mark.parametrize("count", [1, 499, 500, 501, 1000, 1001])
def test_a_curve_never_exceeds_its_points(url: str, reader: StatsReader, count: int) -> None:
    write_updates(url, [update(step) for step in range(1, count + 1)])
    curve = reader.training_curve(RUN)
    assert 1 <= len(curve) <= MAX_POINTS
    assert curve[-1]["step"] == count


def test_latest_update_and_live_version(url: str, reader: StatsReader) -> None:
    assert reader.latest_update(RUN) is None
    assert reader.live_version(RUN) is None
    write_updates(url, [update(1), update(2, loss=0.25)])
    write(url, models.PolicyVersion, [version(3, is_live=True, gamma=1.25)])
    latest, live = reader.latest_update(RUN), reader.live_version(RUN)
    assert latest is not None
    assert live is not None
    assert (latest["step"], latest["loss"]) == (2, 0.25)
    assert (live["version"], live["gamma"]) == (3, 1.25)


def test_rates_by_version_weigh_trajectories_by_their_tokens(url: str, reader: StatsReader) -> None:
    write_group(url)
    mixed = {"kind": "mixed", "min_policy_version": 2}
    write(
        url,
        models.Trajectory,
        [
            trajectory("t-1", **mixed, num_tokens=10, num_gated=5, num_interventions=2)
            | {"mean_weight": 0.5, "mean_entropy": 1.0, "accuracy": 1.0, "reward": 1.0},
            trajectory("t-2", **mixed, num_tokens=30, num_gated=3, num_interventions=0)
            | {"mean_weight": 0.1, "mean_entropy": 0.2},
            trajectory("t-3", **mixed, status="failed", num_tokens=0, accuracy=None, reward=None),
            trajectory("t-4", kind="on_policy", min_policy_version=2, num_tokens=1000),
        ],
    )
    (row,) = reader.by_version(RUN, kind=TrajectoryKind.MIXED)
    assert row["policy_version"] == 2
    assert (row["num_trajectories"], row["num_scored"], row["num_passed"]) == (2, 2, 1)
    assert row["pass_rate"] == 0.5
    assert row["mean_reward"] == pytest.approx(0.55)
    assert row["mean_response_tokens"] == 20
    assert row["gated_share"] == pytest.approx(8 / 40)
    assert row["intervention_rate"] == pytest.approx(2 / 40)
    assert row["mean_weight"] == pytest.approx((0.5 * 10 + 0.1 * 30) / 40)
    assert row["mean_entropy"] == pytest.approx((1.0 * 10 + 0.2 * 30) / 40)


def test_the_pass_rate_leaves_unscored_trajectories_out(url: str, reader: StatsReader) -> None:
    write_group(url)
    write(
        url,
        models.Trajectory,
        [
            trajectory("t-1", accuracy=1.0),
            trajectory("t-2", accuracy=0.5),
            trajectory("t-3", accuracy=None, reward=None),
        ],
    )
    (row,) = reader.by_version(RUN, kind=TrajectoryKind.ON_POLICY)
    assert (row["num_scored"], row["num_passed"], row["pass_rate"]) == (2, 1, 0.5)
    assert (row["pass_rate_low"], row["pass_rate_high"]) == wilson_interval(1, 2)


def test_neighbouring_versions_share_a_bucket(url: str, reader: StatsReader) -> None:
    write_group(url)
    rows = [
        trajectory(f"t-{number}", min_policy_version=number, accuracy=float(number >= 4))
        for number in range(8)
    ]
    write(url, models.Trajectory, rows)
    curve = reader.by_version(RUN, kind=TrajectoryKind.ON_POLICY, max_points=2)
    assert [(row["policy_version"], row["pass_rate"]) for row in curve] == [(3, 0.0), (7, 1.0)]


def test_empty_responses_have_no_rates(url: str, reader: StatsReader) -> None:
    write_group(url)
    empty = {"num_tokens": 0, "mean_entropy": None, "mean_weight": None}
    write(url, models.Trajectory, [trajectory("t-1") | empty])
    (row,) = reader.by_version(RUN, kind=TrajectoryKind.ON_POLICY)
    assert (row["gated_share"], row["mean_entropy"], row["mean_response_tokens"]) == (None, None, 0)


def test_wilson_interval_against_published_values() -> None:
    low, high = wilson_interval(81, 263)  # Newcombe (1998), table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 20)[0] == pytest.approx(0.0)
    assert wilson_interval(20, 20)[1] == pytest.approx(1.0)


def test_group_counts_name_every_status_in_order(url: str, reader: StatsReader) -> None:
    write(url, models.TaskRow, [task()])
    write(
        url,
        models.RolloutGroup,
        [group("g1"), group("g2"), group("g3", status="stale")],
    )
    assert list(reader.group_counts(RUN).items()) == [
        ("ready", 2),
        ("leased", 0),
        ("consumed", 0),
        ("stale", 1),
        ("failed", 0),
    ]


def test_throughput_counts_full_minutes_only(url: str, reader: StatsReader) -> None:
    write(url, models.TaskRow, [task()])
    at = {
        "g1": NOW,  # in the minute that is not over
        "g2": NOW - timedelta(seconds=21),  # 12:29:59
        "g3": NOW - timedelta(seconds=79),  # 12:29:01
        "g4": NOW - timedelta(seconds=81),  # 12:28:59
        "g5": NOW - timedelta(hours=2),
    }
    write(url, models.RolloutGroup, [group(name, created_at=time) for name, time in at.items()])
    rows = reader.throughput(RUN, now=NOW, minutes=3)
    assert [(row["minute"].strftime("%H:%M"), row["num_groups"]) for row in rows] == [
        ("12:27", 0),
        ("12:28", 1),
        ("12:29", 2),
    ]


def test_staleness_counts_groups_of_the_newest_updates(url: str, reader: StatsReader) -> None:
    assert reader.staleness(RUN) == []
    write(url, models.TaskRow, [task()])
    write_updates(url, [update(step) for step in (1, 2, 3)])
    consumed = {"status": "consumed"}
    write(
        url,
        models.RolloutGroup,
        [
            group("g1", **consumed, consumed_by_step=1, min_policy_version=0),
            group("g2", **consumed, consumed_by_step=3, min_policy_version=2),
            group("g3", **consumed, consumed_by_step=3, min_policy_version=0),
            group("g4", **consumed, consumed_by_step=2, min_policy_version=1),
        ],
    )
    assert reader.staleness(RUN, num_updates=2) == [
        {"staleness": 0, "num_groups": 2},
        {"staleness": 2, "num_groups": 1},
    ]


def test_trajectories_are_filtered_and_newest_first(url: str, reader: StatsReader) -> None:
    write_group(url)
    write(
        url,
        models.Trajectory,
        [
            trajectory("t-1", accuracy=1.0),
            trajectory("t-2", kind="mixed", num_interventions=2, text="x" * 5000),
            trajectory("t-3", kind="mixed"),
            trajectory("t-4", kind="served", task_id=None, group_id=None, accuracy=None),
        ],
    )

    def found(**filters: Any) -> list[str]:
        return [row["id"] for row in reader.trajectories(RUN, **filters)]

    assert found() == ["t-4", "t-3", "t-2", "t-1"]
    assert found(limit=2) == ["t-4", "t-3"]
    assert found(kind=TrajectoryKind.MIXED) == ["t-3", "t-2"]
    assert found(is_passed=True) == ["t-1"]
    assert found(is_passed=False) == ["t-3", "t-2"]
    assert found(min_interventions=1) == ["t-2"]
    row = reader.trajectories(RUN, min_interventions=1)[0]
    assert (row["prompt"], len(row["text"])) == ("What is 2 + 2?", 200)
    assert reader.trajectories("another run") == []


def test_a_trajectory_comes_with_its_arrays_bit_for_bit(url: str, reader: StatsReader) -> None:
    write_group(url, status="consumed", consumed_by_step=7)
    write(url, models.Trajectory, [trajectory("t-1", kind="mixed", num_tokens=3)])
    arrays = {
        "prompt_token_ids": np.array([9, 8], dtype=np.int32),
        "token_ids": np.array([1, 2, 3], dtype=np.int32),
        "policy_logprobs": np.array([-0.1, -0.2, -0.3], dtype=np.float32),
        "expert_logprobs": np.array([np.nan, -2.0, np.nan], dtype=np.float32),
        "mixed_logprobs": np.array([np.nan, -1.0, np.nan], dtype=np.float32),
        "entropies": np.array([0.0, 1.5, 0.25], dtype=np.float32),
        "weights": np.array([0.0, 1.0, 0.5], dtype=np.float32),
        "sources": np.array([0, 2, 1], dtype=np.uint8),
        "versions": np.array([4, 4, 5], dtype=np.int32),
    }
    encoded = {name: encode(array) for name, array in arrays.items()}
    write(url, models.TrajectoryTokens, [{"trajectory_id": "t-1"} | encoded])
    write(url, models.InterventionRow, [intervention("t-1", 1)])
    detail = reader.trajectory("t-1")
    assert detail is not None
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(detail, name), array, err_msg=name)
        assert getattr(detail, name).dtype == array.dtype
    assert (detail.prompt, detail.answer, detail.source) == ("What is 2 + 2?", "4", "test")
    assert (detail.row["gamma"], detail.row["consumed_by_step"]) == (1.5, 7)
    assert [row["position"] for row in detail.interventions] == [1]
    assert reader.trajectory("nothing") is None


def intervention(trajectory_id: str, position: int, **changes: Any) -> dict[str, Any]:
    row = {
        "trajectory_id": trajectory_id,
        "position": position,
        "proposed_token_id": 10,
        "proposed_text": "okay",
        "chosen_token_id": 11,
        "chosen_text": "verify",
        "entropy": 1.0,
        "weight": 0.5,
        "policy_logprob": -1.0,
        "expert_logprob": -3.0,
    }
    return row | changes


def test_replacements_come_by_frequency(url: str, reader: StatsReader) -> None:
    write_group(url)
    mixed = {"kind": "mixed", "num_interventions": 2}
    write(url, models.Trajectory, [trajectory("t-1", **mixed), trajectory("t-2", **mixed)])
    other = {"chosen_token_id": 12, "chosen_text": "check"}
    write(
        url,
        models.InterventionRow,
        [
            intervention("t-1", 0, entropy=1.0),
            intervention("t-1", 3, entropy=3.0),
            intervention("t-2", 1, entropy=2.0),
            intervention("t-2", 2, **other),
        ],
    )
    first, second = reader.replacements(RUN)
    assert (first["proposed_text"], first["chosen_text"]) == ("okay", "verify")
    assert (first["num_interventions"], first["num_trajectories"]) == (3, 2)
    assert first["mean_entropy"] == pytest.approx(2.0)
    assert (second["chosen_text"], second["num_interventions"]) == ("check", 1)
    assert len(reader.replacements(RUN, limit=1)) == 1


def test_events_are_newest_first_and_evaluations_oldest_first(
    url: str, reader: StatsReader
) -> None:
    event = {"run_id": RUN, "kind": "k", "severity": "info", "details_json": {"n": 1}}
    write(
        url,
        models.Event,
        [event | {"id": name, "message": name, "created_at": NOW} for name in ("e1", "e2", "e3")],
    )
    assert [row["message"] for row in reader.events(RUN, limit=2)] == ["e3", "e2"]
    assert reader.events(RUN)[0]["details_json"] == {"n": 1}
    evaluation = {
        "run_id": RUN,
        "policy_version": 0,
        "suite": "s",
        "metric": "avg_at_k",
        "k": 8,
        "num_problems": 5,
        "created_at": NOW,
    }
    rows = [evaluation | {"id": f"v{value}", "value": value / 10} for value in (1, 2, 3)]
    # Not of the policy, and no solved share: neither belongs into a chart of versions.
    rows.append(evaluation | {"id": "v4", "value": 0.4, "policy_version": None, "model": "expert"})
    rows.append(evaluation | {"id": "v5", "value": 9.0, "metric": "mean_tokens", "k": None})
    write(url, models.Evaluation, rows)
    assert [row["value"] for row in reader.evaluations(RUN, limit=2)] == [0.2, 0.3]


def test_an_empty_store_answers_every_question(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'empty.db'}"
    schema.upgrade(url)
    reader = StatsReader(url)
    assert reader.runs() == []
    assert reader.training_curve("none") == []
    assert reader.by_version("none", kind=TrajectoryKind.MIXED) == []
    assert reader.replacements("none") == []
    assert sum(reader.group_counts("none").values()) == 0
    assert {row["num_groups"] for row in reader.throughput("none", now=NOW)} == {0}


def test_a_missing_database_is_named_and_not_created(tmp_path: Path) -> None:
    path = tmp_path / "absent.db"
    with pytest.raises(StoreError, match=r"absent\.db, found none"):
        StatsReader(f"sqlite:///{path}").runs()
    assert not path.exists()


def test_a_database_that_is_behind_names_the_command(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    sqlite3.connect(path).close()
    path.touch()
    with pytest.raises(SchemaOutOfDate, match="mentor-serve db upgrade"):
        StatsReader(f"sqlite:///{path}").runs()


def test_a_reader_follows_a_database_that_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "mentor.db"
    url = f"sqlite:///{path}"
    reader = StatsReader(url)
    for name in ("first", "second"):
        for stale in tmp_path.glob("mentor.db*"):
            stale.unlink()
        schema.upgrade(url)
        write(url, models.Run, [run(name, at=NOW)])
        assert [row["name"] for row in reader.runs()] == [name]


def test_reading_never_writes(url: str, reader: StatsReader) -> None:
    with pytest.raises(StoreError, match=r"(?i)read-?only"), reader.connection() as connection:
        connection.execute(insert(models.Run), [run("x", at=NOW)])


def test_postgres_plans_for_the_values_of_each_query(url: str, reader: StatsReader) -> None:
    if url.startswith("sqlite"):
        pytest.skip("SQLite has no plans for queries of unknown values")
    with reader.connection() as connection:
        mode = connection.exec_driver_sql("SHOW plan_cache_mode").scalar_one()
    assert mode == "force_custom_plan"


def test_replacements_are_counted_over_the_newest_responses_of_the_run(
    url: str, reader: StatsReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mentor_serve.store.stats.RECENT_TRAJECTORIES", 2)
    write_group(url)
    mixed = {"kind": "mixed", "num_interventions": 1}
    write(url, models.Trajectory, [trajectory(f"t-{number}", **mixed) for number in (1, 2, 4)])
    # Newer than the oldest of these two, but without a replacement that counts for the run.
    write(url, models.Trajectory, [trajectory("t-3", kind="served")])
    rows = [intervention(f"t-{number}", 0) for number in (1, 2, 3, 4)]
    write(url, models.InterventionRow, rows)
    (row,) = reader.replacements(RUN)
    assert (row["num_interventions"], row["num_trajectories"]) == (2, 2)


def test_a_password_is_never_shown() -> None:
    reader = StatsReader("postgresql://mentor:secret@localhost:1/mentor")
    assert "secret" not in reader.location
    with pytest.raises(StoreError) as caught:
        reader.runs()
    assert "secret" not in str(caught.value)
