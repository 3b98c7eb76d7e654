"""Trials of real parts: reproducible, resumable, and different where an arm says so."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trial_samples import bench_in, measured, plan_of

from mentor_serve.experiments import trial as trial_module
from mentor_serve.experiments.arms import ABLATIONS, METHODS, NUM_ROLLOUTS
from mentor_serve.experiments.trial_log import TrialLog
from mentor_serve.reports.trials import run_trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Killed(BaseException):
    """Stands for a signal: no handler of errors catches it."""


def rows(home: Path, sql: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(home / "mentor.db")
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def test_all_arms_sample_as_many_rollouts():
    for arm in (*METHODS, *ABLATIONS):
        mixed = arm.settings.get("rollout.num_mixed", 0)
        assert arm.settings["rollout.num_on_policy"] + mixed == NUM_ROLLOUTS, arm.name
    names = [arm.name for arm in (*METHODS, *ABLATIONS)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("arm", ["mentor", "unselective"])
def test_a_killed_trial_goes_on_and_ends_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
):
    whole, cut = bench_in(tmp_path / "whole"), bench_in(tmp_path / "cut")
    plan = plan_of(arm)
    run_trial(whole, plan)

    original = trial_module.Trial._update
    collect = trial_module.RoundCollector.collect

    async def dies_after_the_first_update(self: Any, step: int) -> None:
        if step == 1:
            raise Killed
        await original(self, step)

    async def dies_between_groups_and_update(self: Any, *args: Any, **options: Any) -> Any:
        await collect(self, *args, **options)
        raise Killed

    add = trial_module.TrialLog.add

    def dies_before_it_logs_the_second_update(self: Any, kind: str, values: Any) -> None:
        if kind == "update" and values["step"] == 2:
            raise Killed
        add(self, kind, values)

    kills: list[tuple[str, Any, Any]] = [
        ("_update", trial_module.Trial, dies_after_the_first_update),
        ("collect", trial_module.RoundCollector, dies_between_groups_and_update),
    ]
    if arm == "mentor":  # the weight that `unselective` takes from an update is only in the log
        kills.append(("add", trial_module.TrialLog, dies_before_it_logs_the_second_update))
    for name, owner, replacement in kills:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, replacement)
            with pytest.raises(Killed):
                run_trial(cut, plan)
    run_trial(cut, plan)

    expected, found = measured(whole, plan), measured(cut, plan)
    assert [entry["step"] for entry in found["update"]] == [1, 2, 3]
    for name in ("loss", "entropy", "gamma", "mean_reward_on_policy", "mean_reward_mixed"):
        # To rounding, which AdamW enlarges: when the expert is asked depends on measured times.
        values = [[entry[name] for entry in run["update"]] for run in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-2, abs=1e-4), name
    measured_at = [
        [(entry["step"], entry["suite"], entry["split"]) for entry in run["evaluation"]]
        for run in (found, expected)
    ]
    assert measured_at[0] == measured_at[1]
    assert found["done"] == expected["done"] == [{"num_updates": 3}]
    groups = "SELECT status, count(*) FROM rollout_groups GROUP BY status ORDER BY status"
    assert rows(tmp_path / "cut", groups) == [("consumed", 6), ("stale", 2)]


def test_a_complete_trial_is_not_run_again(tmp_path: Path):
    bench, plan = bench_in(tmp_path, num_updates=1), plan_of("on_policy")
    run_trial(bench, plan)
    before = bench.log_path(plan).read_bytes()
    run_trial(bench, plan)
    assert bench.log_path(plan).read_bytes() == before
    assert not (tmp_path / "checkpoints" / plan.key).exists()
    assert rows(tmp_path, "SELECT name FROM runs") == [(plan.key,)]
    assert rows(tmp_path, "SELECT count(*) FROM updates") == [(1,)]
    suites = rows(tmp_path, "SELECT DISTINCT suite, policy_version FROM evaluations ORDER BY 1")
    assert suites == [
        ("in_domain:curve", 0),
        ("in_domain:test", 1),
        ("in_domain:validation", 1),
    ]


def test_trajectories_go_when_a_trial_is_done_unless_they_are_wanted(tmp_path: Path):
    bench, plan = bench_in(tmp_path, num_updates=1), plan_of("luffy")
    run_trial(bench, plan)
    other = plan_of("luffy", seed=1)
    run_trial(replace(bench, keep_trajectories=False), other)
    by_run = "SELECT r.name, count(g.id) FROM runs r LEFT JOIN rollout_groups g ON g.run_id = r.id"
    found = dict(rows(tmp_path, f"{by_run} GROUP BY r.name"))
    assert found == {plan.key: 2, other.key: 0}
    assert rows(tmp_path, "SELECT count(*) FROM updates") == [(2,)]


def test_methods_of_one_seed_start_from_the_same_problems_and_rollouts(tmp_path: Path):
    bench = bench_in(tmp_path, num_updates=1)
    for arm in ("on_policy", "mentor", "questa"):
        run_trial(bench, plan_of(arm))
    texts = (
        "SELECT k.prompt, t.sample_index, t.text FROM trajectories t "
        "JOIN tasks k ON k.id = t.task_id JOIN rollout_groups g ON g.id = t.group_id "
        "JOIN runs r ON r.id = g.run_id "
        "WHERE r.name = '{}' AND t.kind = 'on_policy' AND t.sample_index < 8 ORDER BY 1, 2"
    )
    on_policy = rows(tmp_path, texts.format("main-on_policy-seed0"))
    mentor = rows(tmp_path, texts.format("main-mentor-seed0"))
    questa = rows(tmp_path, texts.format("main-questa-seed0"))
    assert len(mentor) == 16
    assert on_policy == mentor
    # QuestA's prompts show a hint: the same problems, other responses.
    assert [row[:2] for row in questa] == [row[:2] for row in mentor]
    assert questa != mentor


def test_a_run_asks_for_all_solutions_that_it_uses(tmp_path: Path):
    bench = bench_in(tmp_path, num_updates=1)
    for arm in ("luffy", "questa"):
        run_trial(bench, plan_of(arm))
    attempts = "SELECT r.name, count(*), count(DISTINCT t.task_id) FROM trajectories t"
    by_run = (
        f"{attempts} JOIN runs r ON r.id = t.run_id "
        "WHERE t.kind = 'expert' AND t.group_id IS NULL GROUP BY r.name ORDER BY r.name"
    )
    found = rows(tmp_path, by_run)
    assert [row[0] for row in found] == ["main-luffy-seed0", "main-questa-seed0"]
    # Both met the same two problems.
    assert found[0][1:] == found[1][1:]
    assert found[0][2] == 2


def test_stale_rollouts_are_as_many_versions_old_as_the_arm_says(tmp_path: Path):
    bench, plan = bench_in(tmp_path, num_updates=4), plan_of("stale_1", stage="ablation")
    run_trial(bench, plan)
    updates = TrialLog(bench.log_path(plan)).entries("update")
    assert [entry["staleness_max"] for entry in updates] == [0, 1, 1, 1]
    versions = "SELECT DISTINCT policy_version FROM rollout_groups ORDER BY 1"
    assert rows(tmp_path, versions) == [(0,), (1,), (2,)]
    # What is evaluated is the newest version all the same.
    newest = "SELECT max(policy_version) FROM evaluations WHERE suite = 'in_domain:test'"
    assert rows(tmp_path, newest) == [(4,)]


def test_the_released_codes_first_token_is_the_experts(tmp_path: Path):
    bench, plan = bench_in(tmp_path, num_updates=1), plan_of("released_code", stage="ablation")
    run_trial(bench, plan)
    (update,) = TrialLog(bench.log_path(plan)).entries("update")
    # Version 0 has gamma 999, which closes the gate everywhere else.
    gated = rows(
        tmp_path,
        "SELECT num_gated FROM trajectories WHERE kind = 'mixed'",
    )
    assert gated == [(1,)] * 8
    assert update["gamma"] >= 1.5


def test_base_and_expert_are_measured_as_they_are(tmp_path: Path):
    bench = bench_in(tmp_path, num_test=16, settings={})
    for arm in ("base", "expert"):
        run_trial(bench, plan_of(arm, learning_rate=None))
    base, expert = (
        measured(bench, plan_of(arm))["evaluation"][-1]["measures"] for arm in ("base", "expert")
    )
    assert base["greedy_avg@1"] < 0.9 < expert["greedy_avg@1"]
    models = rows(tmp_path, "SELECT DISTINCT model, policy_version FROM evaluations ORDER BY 1")
    assert models == [("embedded:expert", None), ("embedded:policy", None)]
