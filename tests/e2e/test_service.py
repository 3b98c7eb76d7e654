"""The whole service as one process tree: HTTP, learning, and SQL beside it."""

from __future__ import annotations

import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from service_checks import assert_every_group_was_used_once

from mentor_serve.weights import read_snapshot

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

NUM_LEARNER_KILLS = 3
LEARNER_RECOVERY_S = 30.0
"""From a kill to the next new version that replicas serve."""
LIVE = "select version, sha256, path from policy_versions where is_live"
QUESTION = "State the final answer to the following arithmetic problem: 4 - 1 - 7 ="


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Any]) -> Any:
    return start_service()


@pytest.fixture(scope="module")
def client(service: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.base_url}/v1", api_key="unused", max_retries=2)


def test_completion_of_the_live_policy(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="policy", prompt=QUESTION, max_tokens=16, seed=3)
    again = client.completions.create(model="policy", prompt=QUESTION, max_tokens=16, seed=3)
    assert reply.usage is not None
    assert 1 <= reply.usage.completion_tokens <= 16
    same_version = (
        reply.model_extra["mentor"]["policy_version"]
        == again.model_extra["mentor"]["policy_version"]
    )
    assert not same_version or reply.choices[0].text == again.choices[0].text


@pytest.mark.parametrize("model", ["policy", "expert", "mentor"])
def test_chat_with_every_model(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=96, n=2, seed=1
    )
    assert len(reply.choices) == 2
    assert all(choice.finish_reason in {"stop", "length"} for choice in reply.choices)
    assert all(choice.message.content for choice in reply.choices)


def test_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {
        "model": "expert",  # its weights never change, so both answers come from the same model
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 64,
        "seed": 11,
    }
    whole = client.chat.completions.create(**arguments)
    with client.chat.completions.create(**arguments, stream=True) as stream:
        parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(parts) > 2
    assert "".join(parts) == whole.choices[0].message.content


def test_models_are_listed(client: openai.OpenAI) -> None:
    names = {model.id for model in client.models.list()}
    assert {"policy", "expert", "mentor"} <= names


def test_wrong_requests_get_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="policy", prompt="x", max_tokens=-1)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="policy", prompt="1 + " * 5000, max_tokens=8)


def test_it_learns_and_serves_what_it_learned(service: Any, client: openai.OpenAI) -> None:
    service.wait_for_step(3)
    reply = client.completions.create(model="policy", prompt=QUESTION, max_tokens=4)
    assert reply.model_extra["mentor"]["policy_version"] >= 3
    training = service.get("/v1/training")
    assert training["live_version"] >= 3
    assert training["groups"]["consumed"] >= 3 * 4
    kept = client.completions.create(
        model=f"policy@{training['live_version'] - 1}", prompt=QUESTION, max_tokens=4
    )
    assert kept.model_extra["mentor"]["policy_version"] == training["live_version"] - 1


def test_sql_answers_beside_the_running_service(service: Any) -> None:
    service.wait_for_step(3)
    ((num_updates,),) = service.query("select count(*) from v_training_curve")
    assert num_updates >= 3
    kinds = dict(service.query("select kind, count(*) from trajectories group by kind"))
    assert kinds["on_policy"] == 2 * kinds["mixed"]
    for view in ("v_intervention_rate", "v_pass_rate", "v_staleness"):
        assert service.query(f"select * from {view}"), view
    service.query("select * from v_intervention_tokens")
    ((too_old,),) = service.query(
        "select count(*) from rollout_groups g join updates u on u.step = g.consumed_by_step "
        "where u.policy_version - 1 - g.min_policy_version > 4"
    )
    assert too_old == 0


def test_training_pauses_and_resumes(service: Any) -> None:
    def post(path: str) -> None:
        request = urllib.request.Request(service.base_url + path, method="POST", data=b"")
        with urllib.request.urlopen(request, timeout=20) as response:
            assert response.status == 200

    post("/v1/training/pause")
    service.wait_for(
        lambda: service.get("/v1/training")["learner"]["phase"] == "paused", "the pause"
    )
    step = service.step()
    assert service.get("/health/readiness")
    post("/v1/training/resume")
    service.wait_for_step(step + 1)


def test_processes_without_a_model_never_load_torch(service: Any) -> None:
    """It would cost each of them some 300 MB, and whoever asks first some seconds."""
    service.wait_for_step(1)
    service.get("/v1/training")
    assert service.has_loaded("libtorch", "LearnerActor")
    assert not service.has_loaded("libtorch", "ServeReplica:mentor:Gateway")
    assert not service.has_loaded("libtorch", "ServeReplica:mentor:Collector")


@pytest.mark.parametrize("victim", ["WeightStore", "ServeReplica:mentor:Policy"])
def test_a_killed_process_is_replaced_and_training_goes_on(service: Any, victim: str) -> None:
    service.wait_for_step(1)  # every process is up
    step = service.step()
    assert service.kill_process(victim) == 1

    def has_gone_on() -> bool:
        try:
            return service.step() >= step + 3
        except (urllib.error.URLError, ConnectionError):
            return False  # 503 while the replica is replaced

    service.wait_for(has_gone_on, f"updates after the death of {victim}", timeout_s=120.0)
    assert_every_group_was_used_once(service)


def test_a_killed_learner_is_back_with_a_new_version_within_half_a_minute(service: Any) -> None:
    """Last: it ends the service, so that the snapshot that was live stays."""
    rng = random.Random(3)
    service.wait_for_step(2)
    for _ in range(NUM_LEARNER_KILLS):
        time.sleep(rng.uniform(0.0, 2.0))  # an update of the bundled pair takes less than that
        ((before,),) = service.query("select max(version) from policy_versions")
        assert service.kill_process("LearnerActor") == 1
        service.wait_for(
            lambda before=before: service.query(LIVE)[0][0] > before,
            f"a version after {before}",
            timeout_s=LEARNER_RECOVERY_S,
        )
        assert_every_group_was_used_once(service)
    versions = [row[0] for row in service.query("select version from policy_versions order by 1")]
    assert versions == list(range(len(versions)))

    service.interrupt()
    ((_, sha256, path),) = service.query(LIVE)
    assert read_snapshot(Path(path), verify=True).sha256 == sha256
