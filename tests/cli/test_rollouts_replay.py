"""`mentor-serve rollouts replay` on a run that was really trained; what is stored gets changed."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_outcome import Outcome

from mentor_serve.settings import load_settings
from mentor_serve.store.encoding import decode, encode
from mentor_serve.weights import snapshot_path

Run = Callable[..., Outcome]


def query(home: Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(home / "mentor.db")
    try:
        with connection:
            return connection.execute(sql, values).fetchall()
    finally:
        connection.close()


def trajectory(home: Path, *, kind: str = "mixed", step: int = 2) -> str:
    ((found,),) = query(
        home,
        "select t.id from trajectories t join rollout_groups g on g.id = t.group_id "
        "where t.kind = ? and g.consumed_by_step = ? order by t.num_tokens desc limit 1",
        kind,
        step,
    )
    return str(found)


def change(home: Path, trajectory_id: str, column: str, position: int, by: float) -> None:
    sql = f"select {column} from trajectory_tokens where trajectory_id = ?"
    ((stored,),) = query(home, sql, trajectory_id)
    values = decode(stored).copy()
    values[position] += np.float32(by)
    sql = f"update trajectory_tokens set {column} = ? where trajectory_id = ?"
    query(home, sql, encode(values), trajectory_id)


def replayed(run: Run, *arguments: str) -> tuple[int, dict[str, Any]]:
    outcome = run("rollouts", "replay", *arguments, "--json")
    assert outcome.exit_code in {0, 1}, outcome.err
    return outcome.exit_code, json.loads(outcome.out)


@pytest.mark.parametrize("kind", ["on_policy", "mixed"])
def test_a_trajectory_agrees_with_what_is_stored(run: Run, trained: Path, kind: str) -> None:
    code, report = replayed(run, trajectory(trained, kind=kind))
    assert (code, report["is_equal"], report["first_difference"]) == (0, True, None)
    # What step 2 consumed was sampled by version 1.
    assert report["versions"] == [1]
    assert report["fields"][0]["num_compared"] > 3
    assert next(iter(report["derived"].values())).keys() == {"reward", "advantage"}


def test_a_group_is_replayed_whole(run: Run, trained: Path) -> None:
    group_id = trajectory(trained)[: -len("-mixed-00")]
    code, report = replayed(run, group_id)
    assert code == 0
    assert len(report["derived"]) == 6
    text = run("rollouts", "replay", group_id).out
    assert "All agree within 0.0001" in text


@pytest.mark.parametrize("column", ["policy_logprobs", "entropies", "weights"])
def test_a_changed_value_is_named(run: Run, trained: Path, column: str) -> None:
    victim = trajectory(trained)
    change(trained, victim, column, 2, 0.5)
    code, report = replayed(run, victim)
    assert code == 1
    by_token = [f for f in report["fields"] if not f["field"].startswith("mean_")]
    firsts = [f["first_difference"] for f in by_token if f["first_difference"]]
    assert [(f["field"], f["position"], f["version"]) for f in firsts] == [(column, 2, 1)]
    assert firsts[0]["distance"] == pytest.approx(0.5, abs=1e-3)
    text = " ".join(run("rollouts", "replay", victim).out.split())
    assert "First difference: " in text
    if column == "policy_logprobs":
        assert f"First difference: policy_logprobs of {victim}, token 2: stored" in text
        assert "with version 1, 0.5 apart." in text


def test_the_tolerance_is_an_option(run: Run, trained: Path) -> None:
    victim = trajectory(trained)
    change(trained, victim, "policy_logprobs", 0, 0.01)
    assert replayed(run, victim)[0] == 1
    assert replayed(run, victim, "--tolerance", "0.05")[0] == 0
    assert replayed(run, "--step", "1", "--tolerance", "0")[1]["tolerance"] == 0


@pytest.mark.parametrize("step", [1, 2, 3])
def test_every_update_is_reproduced(run: Run, trained: Path, step: int) -> None:
    code, report = replayed(run, "--step", str(step))
    assert (code, report["versions"]) == (0, [step - 1])
    numbers = {field["field"]: field for field in report["fields"]}
    assert numbers["loss"]["stored"] != 0
    assert numbers["loss"]["recomputed"] == pytest.approx(numbers["loss"]["stored"], abs=1e-6)
    assert numbers["grad_norm"]["num_compared"] == 1


def test_a_changed_loss_is_named(run: Run, trained: Path) -> None:
    query(trained, "update updates set loss = loss + 0.25 where step = 2")
    outcome = run("rollouts", "replay", "--step", "2")
    assert outcome.exit_code == 1
    assert "First difference: loss: stored" in outcome.out
    assert "0.25 apart" in outcome.out


def test_a_changed_reward_changes_the_update(run: Run, trained: Path) -> None:
    victim = trajectory(trained, kind="on_policy", step=3)
    query(trained, "update trajectories set reward = 1 - reward where id = ?", victim)
    code, report = replayed(run, "--step", "3")
    assert code == 1
    assert report["first_difference"]["field"] == "mean_reward_on_policy"


def test_the_settings_of_the_run_decide(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment of whoever looks at a run later is none of its settings."""
    monkeypatch.setenv("MENTOR_SERVE_ROLLOUT__TEMPERATURE", "0.5")
    monkeypatch.setenv("MENTOR_SERVE_GUIDANCE__ALPHA_STEPS", "7")
    assert replayed(run, trajectory(trained))[0] == 0
    assert replayed(run, "--step", "2")[0] == 0
    assert replayed(run, trajectory(trained), "--set", "rollout.temperature=0.5")[0] == 1


def test_weights_that_are_gone_or_damaged_are_named(run: Run, trained: Path) -> None:
    victim = trajectory(trained)
    path = snapshot_path(load_settings().weights_dir, 1)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    outcome = run("rollouts", "replay", victim)
    assert (outcome.exit_code, "damaged" in outcome.err) == (1, True)
    shutil.rmtree(path)
    for arguments in ((victim,), ("--step", "2")):
        outcome = run("rollouts", "replay", *arguments)
        assert outcome.exit_code == 1
        assert "snapshot of version 1" in outcome.err
    assert replayed(run, "--step", "3")[0] == 0


def test_pruned_tokens_are_an_error_that_says_so(run: Run, trained: Path) -> None:
    victim = trajectory(trained)
    group_id = victim[: -len("-mixed-00")]
    query(trained, "delete from trajectory_tokens where trajectory_id like ?", f"{group_id}%")
    outcome = run("rollouts", "replay", victim)
    assert (outcome.exit_code, "pruned" in outcome.err) == (2, True)
    outcome = run("rollouts", "replay", "--step", "2")
    assert (outcome.exit_code, "pruned" in outcome.err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected either the id"),
        (("x", "--step", "1"), "expected either the id"),
        (("nobody",), "no trajectory or group of that id"),
        (("--step", "9"), "no such update"),
    ],
)
def test_wrong_usage_of_replay(
    run: Run, trained: Path, arguments: tuple[str, ...], message: str
) -> None:
    outcome = run("rollouts", "replay", *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.err
