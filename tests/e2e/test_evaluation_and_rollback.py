"""A running service measures its versions, and goes back to an older one on demand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from service_checks import assert_every_group_was_used_once

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

EVERY = 4
SETTINGS = {
    "MENTOR_SERVE_LEARNER__EVAL_EVERY": str(EVERY),
    "MENTOR_SERVE_EVALUATION__NUM_PROBLEMS": "8",
    "MENTOR_SERVE_EVALUATION__NUM_SAMPLES": "2",
    "MENTOR_SERVE_EVALUATION__SUITE": "sums",
    "MENTOR_SERVE_WEIGHTS__KEEP_VERSIONS": "60",
    # Updates of a second, so that a version outlives the start of a command; and mixed rollouts
    # for as long as the test takes.
    "MENTOR_SERVE_LEARNER__PROMPTS_PER_STEP": "16",
    "MENTOR_SERVE_LEARNER__MINI_BATCH_PROMPTS": "16",
    "MENTOR_SERVE_GUIDANCE__ALPHA_STEPS": "5000",
    "MENTOR_SERVE_GATEWAY__ADMIN_KEYS": '["secret"]',
}


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Any]) -> Any:
    return start_service(env=SETTINGS)


def evaluated(service: Any) -> list[int]:
    rows = service.query("select distinct policy_version from evaluations order by 1")
    return [version for (version,) in rows]


def command(service: Any, *arguments: str) -> Any:
    """A command of the command line beside the service, as an operator would run it."""
    environment = {
        **os.environ,
        **SETTINGS,
        "MENTOR_SERVE_HOME": str(service.home),
        "MENTOR_SERVE_GATEWAY__PORT": str(service.port),
    }
    done = subprocess.run(
        [sys.executable, "-m", "mentor_serve.cli", *arguments, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def post(service: Any, path: str, body: dict[str, Any] | None = None) -> None:
    request = urllib.request.Request(
        service.base_url + path,
        method="POST",
        data=json.dumps(body or {}).encode(),
        headers={"content-type": "application/json", "authorization": "Bearer secret"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200


@contextmanager
def paused(service: Any) -> Iterator[None]:
    """No update meanwhile: what is kept stays, however long a command takes to start."""
    post(service, "/v1/training/pause")
    service.wait_for(
        lambda: service.get("/v1/training")["learner"]["phase"] == "paused", "the pause"
    )
    yield
    post(service, "/v1/training/resume")


def assert_evaluations_are_whole(service: Any) -> None:
    """Every evaluation has the same rows, all of one version that is a multiple, in one suite."""
    rows = service.query(
        "select evaluation_id, min(policy_version), max(policy_version), count(*), "
        "count(distinct metric || coalesce(k, '')), min(suite), max(suite) "
        "from evaluations group by evaluation_id"
    )
    assert len({count for _, _, _, count, _, _, _ in rows}) == 1
    for _, lowest, highest, count, num_names, *suites in rows:
        assert lowest == highest
        assert lowest % EVERY == 0
        assert count == num_names
        assert suites == ["sums", "sums"]
    assert len({lowest for _, lowest, *_ in rows}) == len(rows)


def test_due_versions_are_evaluated_while_the_service_goes_on(service: Any) -> None:
    service.wait_for(lambda: len(evaluated(service)) >= 3, "three evaluations", timeout_s=150.0)
    assert service.get("/health/readiness")
    step = service.step()
    service.wait_for_step(step + 1)
    assert_evaluations_are_whole(service)
    training = service.get("/v1/training")
    assert training["evaluation"]["policy_version"] in evaluated(service)
    metrics = {(m["metric"], m["k"]) for m in training["evaluation"]["measures"]}
    assert {("greedy_pass_at_k", 1), ("avg_at_k", 2), ("pass_at_k", 2)} <= metrics
    assert command(service, "status")["evaluation"]["suite"] == "sums"


def test_a_killed_evaluator_is_replaced_and_leaves_nothing_half(service: Any) -> None:
    service.wait_for(lambda: bool(evaluated(service)), "an evaluation", timeout_s=150.0)
    before = evaluated(service)
    assert service.kill_process("EvaluatorActor") == 1
    service.wait_for(
        lambda: evaluated(service)[-1] > before[-1], "a further evaluation", timeout_s=150.0
    )
    assert_evaluations_are_whole(service)
    assert_every_group_was_used_once(service)


def test_a_rollback_goes_through_the_learner(service: Any) -> None:
    service.wait_for_step(3)
    kept = [row["version"] for row in command(service, "weights", "list") if row["is_kept"]]
    old = kept[1]  # newest first: the newest that is no longer live is kept for longest
    record = command(service, "weights", "rollback", str(old))
    assert (record["through"], record["parent_version"]) == ("service", old)
    new = record["version"]
    assert new > old + 1
    hashes = dict(service.query("select version, sha256 from policy_versions"))
    assert hashes[new] == hashes[old] != hashes[new - 1]

    def is_live() -> bool:
        try:
            return int(service.get("/v1/training")["live_version"]) >= new
        except urllib.error.URLError:
            return False

    service.wait_for(is_live, f"version {new} to be live")
    # Training goes on from there, and all of the history is kept.
    service.wait_for(
        lambda: (
            service.query(
                f"select 1 from policy_versions where parent_version = {new} and step = "
                f"(select step + 1 from policy_versions where version = {new})"
            )
            != []
        ),
        "an update of the old weights",
    )
    with paused(service):
        versions = [row[0] for row in service.query("select version from policy_versions")]
        assert sorted(versions) == list(range(len(versions)))
        listed = {row["version"]: row for row in command(service, "weights", "list", "--verify")}
    assert listed[new]["verified"] is True
    assert_every_group_was_used_once(service)


def test_rollouts_of_a_running_service_are_reproduced(service: Any) -> None:
    service.wait_for_step(3)
    with paused(service):
        ((trajectory_id,),) = service.query(
            "select t.id from trajectories t join rollout_groups g on g.id = t.group_id where "
            "t.kind = 'mixed' and t.status = 'ok' and g.consumed_by_step >= 2 and "
            "t.min_policy_version = t.max_policy_version order by t.id desc limit 1"
        )
        report = command(service, "rollouts", "replay", trajectory_id)
        assert report["is_equal"]
        assert report["skipped"] == {}
        report = command(service, "rollouts", "replay", "--step", str(service.step()))
        assert report["is_equal"], report["first_difference"]


@pytest.mark.parametrize("version", [10**6, -1])
def test_a_rollback_to_nothing_is_refused(service: Any, version: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(service, "/v1/weights/rollback", {"version": version})
    with refused.value as answer:
        assert answer.code == (404 if version > 0 else 400)
