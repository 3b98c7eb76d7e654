"""Several runs side by side: curves that line up, and what each run came to."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count
from typing import Any

import pytest
from sqlalchemy import insert

from mentor_serve.store import models
from mentor_serve.store.connection import open_engine, writing
from mentor_serve.store.experiment_stats import MAX_RUNS, ExperimentReader

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)
RUNS = ("first", "second")


@pytest.fixture(name="url")
def url_with_runs(url: str) -> str:
    """A database of the newest schema that knows two runs."""
    write(url, models.Run, [run(name) for name in RUNS])
    return url


@pytest.fixture
def reader(url: str) -> Iterator[ExperimentReader]:
    opened = ExperimentReader(url)
    yield opened
    opened.close()


def write(url: str, table: Any, rows: list[dict[str, Any]]) -> None:
    engine = open_engine(url)
    with writing(engine, url, doing="seeding") as connection:
        connection.execute(insert(table), rows)
    engine.dispose()


def run(run_id: str, **config: Any) -> dict[str, Any]:
    times = {"started_at": NOW, "updated_at": NOW}
    return {"id": run_id, "name": run_id, "config_json": config, **times}


def version(run_id: str, number: int, *, step: int) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "version": number,
        "step": step,
        "sha256": None,
        "path": None,
        "created_at": NOW,
        "is_live": False,
        "parent_version": None,
        "alpha": 0.5,
        "gamma": 1.5,
    }


def write_updates(url: str, run_id: str, entropies: dict[int, float]) -> None:
    write(url, models.PolicyVersion, [version(run_id, step, step=step) for step in entropies])
    rows = [
        {
            "run_id": run_id,
            "step": step,
            "policy_version": step,
            "num_groups": 1,
            "num_trajectories": 12,
            "num_tokens": 100,
            "entropy": entropy,
            "alpha": 1.0,
            "gamma": 2.0,
            "num_stale": 0,
            "step_time_s": 0.5,
            "wait_time_s": 1.5,
            "created_at": NOW,
        }
        for step, entropy in entropies.items()
    ]
    write(url, models.Update, rows)


_numbers = count()


def measured(run_id: str, policy_version: int | None, value: float, **changes: Any) -> Any:
    """One number of an evaluation, newer than those that were made before."""
    row = {
        "id": f"{next(_numbers):08d}",
        "evaluation_id": None,
        "run_id": run_id,
        "policy_version": policy_version,
        "model": "policy",
        "suite": "sums",
        "metric": "greedy_pass_at_k",
        "k": 1,
        "value": value,
        "num_problems": 100,
        "num_samples": 1,
        "temperature": 0.0,
        "created_at": NOW,
    }
    return row | changes


def values(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], float]:
    return {(row["run_id"], row["suite"], row["metric"], row["k"]): row["value"] for row in rows}


def test_methods_are_those_of_the_settings(url: str, reader: ExperimentReader) -> None:
    write(url, models.Run, [run("luffy", guidance={"method": "luffy"}), run("odd", guidance=[1])])
    assert reader.methods([*RUNS, "luffy", "odd", "unknown"]) == {"luffy": "luffy"}


def test_short_curves_are_every_update_of_every_run(url: str, reader: ExperimentReader) -> None:
    write_updates(url, "first", {1: 0.5, 2: 0.25})
    write_updates(url, "second", {1: 0.125})
    rows = reader.update_curves(RUNS)
    assert [(row["run_id"], row["step"], row["entropy"]) for row in rows] == [
        ("first", 1, 0.5),
        ("first", 2, 0.25),
        ("second", 1, 0.125),
    ]
    assert rows[0]["step_time_s"] + rows[0]["wait_time_s"] == 2.0
    assert rows[0]["mean_reward_on_policy"] is None
    assert reader.update_curves(["second"])[0]["run_id"] == "second"
    assert reader.update_curves([]) == []


def test_long_curves_share_their_buckets(url: str, reader: ExperimentReader) -> None:
    write_updates(url, "first", {step: float(step) for step in range(1, 11)})
    write_updates(url, "second", dict.fromkeys(range(1, 6), 0.0))
    rows = reader.update_curves(RUNS, max_points=4)
    # Ten steps in at most four buckets: width 3. The second run ends within the second of them.
    assert [(row["run_id"], row["step"], row["entropy"]) for row in rows] == [
        ("first", 3, 2.0),
        ("first", 6, 5.0),
        ("first", 9, 8.0),
        ("first", 10, 10.0),
        ("second", 3, 0.0),
        ("second", 6, 0.0),
    ]


def test_greedy_curves_go_by_updates(url: str, reader: ExperimentReader) -> None:
    write(url, models.PolicyVersion, [version("first", 7, step=5)])
    rows = [
        measured("first", 7, 0.5),
        measured("first", 7, 0.75),
        measured("first", 9, 0.875),
        measured("first", None, 0.1, model="embedded:expert"),
        measured("first", 7, 0.1, metric="pass_at_k"),
        measured("first", 7, 0.1, suite="others"),
        measured("second", 1, 0.25),
    ]
    write(url, models.Evaluation, rows)
    found = [
        (row["suite"], row["run_id"], row["step"], row["value"])
        for row in reader.greedy_curves(RUNS)
    ]
    # The newest of two evaluations; the version itself where no row says how many updates it had.
    assert found == [
        ("others", "first", 5, 0.1),
        ("sums", "first", 5, 0.75),
        ("sums", "first", 9, 0.875),
        ("sums", "second", 1, 0.25),
    ]
    assert [row["value"] for row in reader.greedy_curves(RUNS, limit=1)] == [0.25]


def test_final_measures_are_of_the_highest_version(url: str, reader: ExperimentReader) -> None:
    rows = [
        measured("first", 9, 0.5),
        measured("first", 4, 0.1),
        measured("first", 4, 0.6, metric="pass_at_k", k=8, num_samples=8, temperature=0.6),
        measured("first", 4, 0.3, metric="pass_at_k", k=1, num_samples=8, temperature=0.6),
        measured("first", 4, 0.02, metric="word_share:wait", k=None, temperature=0.6),
        measured("first", 4, 30.0, metric="mean_tokens", k=None),
        measured("second", 2, None),
    ]
    write(url, models.Evaluation, rows)
    found = reader.final_measures(RUNS)
    assert values(found) == {
        ("first", "sums", "greedy_pass_at_k", 1): 0.5,
        ("first", "sums", "pass_at_k", 1): 0.3,
        ("first", "sums", "pass_at_k", 8): 0.6,
        ("first", "sums", "word_share:wait", None): 0.02,
    }
    assert {row["policy_version"] for row in found} == {4, 9}
    assert found[-1]["temperature"] == 0.6


def test_of_two_evaluations_of_a_version_the_newer_counts(
    url: str, reader: ExperimentReader
) -> None:
    write(url, models.Evaluation, [measured("first", 4, 0.1), measured("first", 4, 0.2)])
    assert [row["value"] for row in reader.final_measures(RUNS)] == [0.2]


def test_other_models_count_only_in_runs_without_a_version(
    url: str, reader: ExperimentReader
) -> None:
    expert = {"model": "embedded:expert"}
    rows = [
        measured("first", 3, 0.5),
        measured("first", None, 0.9, **expert),
        measured("first", None, 0.9, suite="others", **expert),
        measured("second", None, 0.3, model="embedded:policy"),
        measured("second", None, 0.9, suite="others", **expert),
    ]
    write(url, models.Evaluation, rows)
    assert values(reader.final_measures(RUNS)) == {
        ("first", "sums", "greedy_pass_at_k", 1): 0.5,
        ("second", "others", "greedy_pass_at_k", 1): 0.9,
    }


def test_too_many_runs_are_refused(reader: ExperimentReader) -> None:
    with pytest.raises(ValueError, match=f"at most {MAX_RUNS} runs, got {MAX_RUNS + 1}"):
        reader.update_curves(["run"] * (MAX_RUNS + 1))
