"""Every failure has one shape; keys, origins, sizes and draining are enforced."""

from __future__ import annotations

import logging

import openai
import pytest
from serving_fakes import FakeBackend, http_client, openai_client

from mentor_serve.errors import (
    ConfigError,
    EngineError,
    ExpertUnavailable,
    InvalidRequest,
    StalePolicyError,
    StoreError,
    StoreUnavailable,
)
from mentor_serve.serving import OverloadedError, Readiness, UnknownModelError, create_app
from mentor_serve.types import StopReason

pytestmark = pytest.mark.anyio
BODY = {"model": "policy", "prompt": "a"}
JSON = {"content-type": "application/json"}


def _error(answer):
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        ("GET", "/v1/nothing", {}, 404, "not_found"),
        ("GET", "/v1/completions", {}, 405, "method_not_allowed"),
        ("POST", "/v1/completions", {"content": b"{", "headers": JSON}, 400, "invalid_json"),
        ("POST", "/v1/completions", {"content": b"[]", "headers": JSON}, 400, "invalid_json"),
        ("POST", "/v1/completions", {"content": b"", "headers": JSON}, 400, "invalid_json"),
        ("POST", "/v1/completions", {"content": b"{}"}, 400, "invalid_json"),
        ("POST", "/v1/completions", {"json": {}}, 400, "missing_required_parameter"),
        ("POST", "/v1/completions", {"json": BODY | {"n": "x"}}, 400, "invalid_value"),
        (
            "POST",
            "/v1/completions",
            {"content": b'{"model":"policy","prompt":"a","temperature":NaN}', "headers": JSON},
            400,
            "invalid_value",
        ),
        ("POST", "/v1/completions", {"json": BODY | {"model": "gpt-4"}}, 404, "model_not_found"),
        ("GET", "/v1/models/policy@99", {}, 404, "model_not_found"),
        ("GET", "/v1/trajectories/nope", {}, 404, "not_found"),
        ("GET", "/v1/trajectories?limit=0", {}, 400, "invalid_value"),
        ("GET", "/v1/trajectories?kind=odd", {}, 400, "invalid_value"),
    ],
)
async def test_failures_have_one_shape_and_the_right_status(
    backend, method, path, options, status, code
):
    async with http_client(backend) as client:
        answer = await client.request(method, path, **options)
    assert answer.status_code == status
    error = _error(answer)
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (StoreUnavailable("connection refused"), 503, {"retry-after": "5"}),
        (InvalidRequest("too long"), 400, {}),
        (UnknownModelError("gone meanwhile"), 404, {}),
        (StalePolicyError("version 1 is gone"), 409, {"x-should-retry": "false"}),
        (OverloadedError("queue full", retry_after_s=2.5), 503, {"retry-after": "3"}),
        (ExpertUnavailable("no expert"), 503, {"retry-after": "5"}),
        (EngineError("broken"), 500, {}),
        (TimeoutError("late"), 504, {"x-should-retry": "false"}),
    ],
)
async def test_failures_of_the_backend_become_statuses(backend, error, status, headers):
    backend.error = error
    async with http_client(backend) as client:
        answer = await client.post("/v1/completions", json=BODY)
    assert answer.status_code == status
    _error(answer)
    for name, value in headers.items():
        assert answer.headers[name] == value


@pytest.mark.parametrize("error", [RuntimeError("secret"), StoreError("postgres://user:secret@db")])
async def test_foreign_failures_are_logged_and_hidden(backend, error, caplog):
    backend.error = error
    with caplog.at_level(logging.ERROR):
        async with http_client(backend) as client:
            answer = await client.post(
                "/v1/completions", json=BODY, headers={"x-request-id": "abc-1"}
            )
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "abc-1" in _error(answer)["message"]
    assert "secret" in caplog.text


@pytest.mark.parametrize("reason", [StopReason.CANCELLED, StopReason.ERROR])
async def test_a_response_that_the_engine_dropped_is_no_success(backend, reason):
    class Dropping(FakeBackend):
        def rollout(self, request, sample):
            rollout = super().rollout(request, sample)
            rollout.stop_reason = reason
            return rollout

    async with http_client(Dropping(tokenizer=backend.tokenizer)) as client:
        answer = await client.post("/v1/completions", json=BODY)
    assert answer.status_code == 500
    assert _error(answer)["code"] == "engine_error"


async def test_a_request_over_the_time_limit_is_cancelled_with_504(backend):
    backend.step_s = 60
    async with http_client(backend, request_timeout_s=0.05) as client:
        answer = await client.post("/v1/completions", json=BODY)
    assert answer.status_code == 504
    assert _error(answer)["code"] == "timeout"
    assert backend.num_cancelled == 1


async def test_a_body_over_the_limit_is_refused_declared_or_not(backend):
    async def chunks():
        for _part in range(5):
            yield b"x" * 100

    async with http_client(backend, max_body_bytes=300) as client:
        declared = await client.post("/v1/completions", content=b"x" * 301, headers=JSON)
        chunked = await client.post("/v1/completions", content=chunks(), headers=JSON)
        small = await client.post("/v1/completions", json=BODY)
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert _error(answer)["code"] == "request_too_large"
    assert small.status_code == 200


async def test_request_ids_are_taken_over_when_sound_and_made_otherwise(backend):
    async with http_client(backend) as client:
        given = await client.get("/health", headers={"x-request-id": "my-id"})
        odd = await client.get("/health", headers={"x-request-id": "x" * 200})
    assert given.headers["x-request-id"] == "my-id"
    assert len(odd.headers["x-request-id"]) == 32


async def test_keys_are_asked_for_and_checked(backend):
    keys = {"api_keys": ["k1", "k2"], "admin_keys": ["root"]}
    with pytest.raises(openai.AuthenticationError) as refusal:
        await openai_client(backend, api_key="wrong", **keys).models.list()
    assert refusal.value.response.headers["www-authenticate"] == "Bearer"
    assert refusal.value.code == "invalid_api_key"
    for key in ("k1", "k2", "root"):
        models = await openai_client(backend, api_key=key, **keys).models.list()
        assert [model.id for model in models.data][:2] == ["policy", "policy@2"]
    async with http_client(backend, **keys) as client:
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 401
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/health/readiness")).status_code == 200


@pytest.mark.parametrize(
    ("keys", "sent", "status"),
    [
        ({}, None, 200),
        ({"api_keys": ["k"]}, "k", 200),
        ({"api_keys": ["k"]}, None, 401),
        ({"api_keys": ["k"], "admin_keys": ["root"]}, "k", 403),
        ({"api_keys": ["k"], "admin_keys": ["root"]}, "root", 200),
        ({"admin_keys": ["root"]}, None, 401),
        ({"admin_keys": ["root"]}, "k", 401),
        ({"admin_keys": ["root"]}, "root", 200),
    ],
)
async def test_routes_that_change_training_need_the_admin_key(backend, keys, sent, status):
    headers = {"authorization": f"Bearer {sent}"} if sent else {}
    async with http_client(backend, **keys) as client:
        answer = await client.post("/v1/training/pause", headers=headers)
        rollback = await client.post("/v1/weights/rollback", headers=headers, json={"version": 2})
        if "api_keys" not in keys:
            assert (await client.get("/v1/training")).status_code == 200
    assert answer.status_code == rollback.status_code == status
    assert backend.is_paused is (status == 200)


async def test_pages_of_other_sites_may_not_write(backend):
    async with http_client(backend, cors_origins=["https://lab.example"]) as client:
        foreign = await client.post(
            "/v1/training/pause", headers={"origin": "https://evil.example"}
        )
        assert foreign.status_code == 403
        assert not backend.is_paused
        own = await client.post("/v1/training/pause", headers={"origin": "http://test"})
        assert own.status_code == 200
        allowed = await client.post(
            "/v1/completions", json=BODY, headers={"origin": "https://lab.example"}
        )
        assert allowed.headers["access-control-allow-origin"] == "https://lab.example"
        assert "access-control-allow-credentials" not in allowed.headers
        other = await client.get("/health", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_without_configured_origins_there_are_no_cors_headers(backend):
    async with http_client(backend) as client:
        answer = await client.get("/health", headers={"origin": "https://lab.example"})
    assert "access-control-allow-origin" not in answer.headers


async def test_any_origin_and_empty_keys_are_configuration_errors(backend):
    with pytest.raises(ConfigError, match="exact origins"):
        create_app(backend, cors_origins=["*"])
    with pytest.raises(ConfigError, match="empty"):
        create_app(backend, api_keys=[""])


async def test_a_draining_service_refuses_new_requests_but_answers_probes(backend):
    async with http_client(backend) as client:
        assert (await client.get("/health/readiness")).json()["status"] == "ready"
        backend.is_draining = True
        refused = await client.post("/v1/completions", json=BODY)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert _error(refused)["code"] == "draining"
        assert (await client.get("/health")).status_code == 200
        readiness = await client.get("/health/readiness")
    assert readiness.status_code == 503
    assert "draining" in readiness.json()["reasons"][0]


async def test_readiness_tells_why_not(backend):
    backend.state = Readiness(ready=False, reasons=["no weights yet"], details={"step": 0})
    async with http_client(backend) as client:
        answer = await client.get("/health/readiness")
    assert answer.status_code == 503
    assert answer.json() == {
        "status": "not_ready",
        "reasons": ["no weights yet"],
        "details": {"step": 0},
    }
