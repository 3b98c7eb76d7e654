"""Models, tokenizer, training, trajectories and the API's own description."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from serving_fakes import http_client, openai_client

from mentor_serve.serving.requests import ChatRequest, CompletionRequest
from mentor_serve.serving.wire import MentorReport, TokenRecord

pytestmark = pytest.mark.anyio


async def test_models_are_listed_and_found(backend):
    client = openai_client(backend)
    models = (await client.models.list()).data
    assert [model.id for model in models] == ["policy", "policy@2", "expert", "mentor"]
    kept = await client.models.retrieve("policy@2")
    assert (kept.parent, kept.policy_version, kept.max_model_len) == ("policy", 2, 200)
    with pytest.raises(openai.NotFoundError) as refusal:
        await client.models.retrieve("org/other")
    assert refusal.value.code == "model_not_found"
    assert refusal.value.param == "model"


async def test_tokenize_and_detokenize_are_inverse(backend):
    async with http_client(backend) as client:
        text = "na\u00efve<|end|>"
        body = {"model": "policy", "prompt": text, "return_token_strs": True}
        answer = (await client.post("/tokenize", json=body)).json()
        assert answer["count"] == len(answer["tokens"]) == 7
        assert answer["max_model_len"] == 200
        assert answer["token_strs"][-1] == "<|end|>"
        back = await client.post("/detokenize", json={"tokens": answer["tokens"]})
        assert back.json() == {"prompt": text}


async def test_tokenize_renders_conversations(backend):
    messages = [{"role": "user", "content": "hi"}]
    async with http_client(backend) as client:
        answer = (await client.post("/tokenize", json={"messages": messages})).json()
    assert backend.tokenizer.decode(answer["tokens"]) == "<|user|>hi<|assistant|>"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, 400),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404),
        ("/detokenize", {"tokens": [10**6]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [], "model": "other"}, 404),
    ],
)
async def test_tokenizer_routes_refuse_what_they_cannot_do(backend, path, body, status):
    async with http_client(backend) as client:
        assert (await client.post(path, json=body)).status_code == status


async def test_harnesses_can_ask_for_the_tokenizer(backend):
    async with http_client(backend) as client:
        answer = (await client.get("/tokenizer_info")).json()
    assert answer["eos_token"] == "<|end|>"
    assert "assistant" in answer["chat_template"]


async def test_training_is_paused_and_resumed(backend):
    async with http_client(backend) as client:
        before = (await client.get("/v1/training")).json()
        assert before == {"step": 7, "is_paused": False, "alpha": 0.5, "loss": None}
        assert (await client.post("/v1/training/pause")).json()["is_paused"] is True
        assert (await client.post("/v1/training/resume")).json()["is_paused"] is False


async def test_trajectories_page_by_cursor(backend):
    backend.rows = [{"id": f"t{k}", "reward": float("nan")} for k in (5, 4, 3, 2, 1)]
    seen = []
    async with http_client(backend) as client:
        query = "?limit=2&kind=mixed"
        while query:
            page = (await client.get(f"/v1/trajectories{query}")).json()
            assert page["object"] == "list"
            seen += [row["id"] for row in page["data"]]
            assert page["has_more"] == (page["next_before"] is not None)
            query = page["has_more"] and f"?limit=2&kind=mixed&before={page['next_before']}"
        one = (await client.get("/v1/trajectories/t3")).json()
    assert seen == ["t5", "t4", "t3", "t2", "t1"]
    assert one == {"id": "t3", "reward": None}
    assert backend.queries[0] == {"limit": 3, "kind": "mixed", "before": None}


async def test_weights_are_listed(backend):
    async with http_client(backend) as client:
        answer = (await client.get("/v1/weights")).json()
    assert answer["data"] == [{"version": 3, "is_live": True}]


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        ({"version": 2}, 200, {"version": 4, "parent_version": 2}),
        ({"version": 1}, 409, {"code": "conflict"}),
        ({"version": 9}, 404, {"code": "not_found"}),
        ({"version": -1}, 400, {"param": "version"}),
        ({"version": "2"}, 400, {"param": "version"}),
        ({"version": 2, "force": True}, 400, {"code": "unknown_parameter"}),
        ({}, 400, {"code": "missing_required_parameter"}),
    ],
)
async def test_weights_are_rolled_back(backend, body, status, part):
    async with http_client(backend) as client:
        answer = await client.post("/v1/weights/rollback", json=body)
    assert answer.status_code == status
    document = answer.json()
    assert part.items() <= document.get("error", document).items()


async def test_every_route_and_every_sampling_field_is_documented(backend):
    page = (Path(__file__).parents[2] / "docs" / "http.md").read_text()
    async with http_client(backend) as client:
        routes = (await client.get("/openapi.json")).json()["paths"]
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    reports = {*MentorReport.model_fields, *TokenRecord.model_fields}
    missing = [name for name in (*routes, *fields, *reports) if f"`{name}`" not in page]
    assert missing == []


async def test_the_description_of_the_api_can_be_made(backend):
    async with http_client(backend) as client:
        description = (await client.get("/openapi.json")).json()
    assert description["info"] == {
        "title": "mentor-serve",
        "description": "A language model that gets better while it serves it.",
        "version": "1.2",
    }
    routes = set(description["paths"])
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models/{model}", "/health"} <= routes
