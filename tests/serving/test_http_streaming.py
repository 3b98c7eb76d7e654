"""Streaming: what the OpenAI client sees, what is on the wire, and who is told to stop."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from serving_fakes import FakeBackend, http_client, mixed_fields, openai_client

from mentor_serve.errors import EngineError, ExpertUnavailable
from mentor_serve.serving import create_app

pytestmark = pytest.mark.anyio
HELLO = [{"role": "user", "content": "hi"}]


async def _chunks(stream):
    return [chunk async for chunk in stream]


async def test_role_comes_first_then_text_then_the_reason_then_usage(backend):
    stream = await openai_client(backend).chat.completions.create(
        model="policy", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = await _chunks(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "hello"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 6 + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 6
    assert chunks[-1].usage.prompt_tokens == 4
    assert chunks[-2].mentor["policy_version"] == 3
    assert chunks[-2].system_fingerprint == "mentor-serve-1.2-v3"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_the_wire_is_data_lines_that_end_with_done(backend):
    body = {"model": "policy", "messages": HELLO, "stream": True}
    async with http_client(backend) as client:
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    events = answer.text.strip().split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    first = json.loads(events[0].removeprefix("data: "))
    assert first["object"] == "chat.completion.chunk"
    assert first["usage"] is None
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("reply", ["na\u00efve \u4f60\u597d \U0001f600!", "a" * 50, "\u00e9" * 20])
async def test_streamed_text_equals_the_whole_and_never_splits_a_character(backend, reply):
    backend.replies = [reply]
    client = openai_client(backend)
    whole = await client.chat.completions.create(model="policy", messages=HELLO)
    stream = await client.chat.completions.create(model="policy", messages=HELLO, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in await _chunks(stream)]
    assert "".join(pieces) == whole.choices[0].message.content == reply
    assert not any("\ufffd" in piece for piece in pieces)


async def test_a_response_cut_within_a_character_ends_with_a_replacement(backend):
    backend.replies = ["a\U0001f600"]
    client = openai_client(backend)
    whole = await client.completions.create(model="policy", prompt="p", max_tokens=3)
    stream = await client.completions.create(model="policy", prompt="p", max_tokens=3, stream=True)
    streamed = "".join(chunk.choices[0].text for chunk in await _chunks(stream))
    assert streamed == whole.choices[0].text == "a\ufffd"


async def test_no_part_of_a_stop_string_is_streamed(backend):
    backend.replies = ["one <b <br> two"]
    stream = await openai_client(backend).chat.completions.create(
        model="policy", messages=HELLO, stop=["<br>"], stream=True
    )
    chunks = await _chunks(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == "one <b "
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_the_beginning_of_a_stop_string_is_given_out_when_the_response_ends(backend):
    backend.replies = ["one <b"]
    stream = await openai_client(backend).completions.create(
        model="policy", prompt="p", stop=["<br>"], stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in await _chunks(stream)) == "one <b"


async def test_n_choices_interleave_and_each_ends_once(backend):
    backend.replies = ["abc", "xy"]
    stream = await openai_client(backend).chat.completions.create(
        model="policy", messages=HELLO, n=2, stream=True
    )
    chunks = await _chunks(stream)
    texts = ["", ""]
    endings = []
    order = []
    for choice in (chunk.choices[0] for chunk in chunks):
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            endings.append(choice.index)
        if choice.delta.content:
            order.append(choice.index)
    assert texts == ["abc", "xy"]
    assert sorted(endings) == [0, 1]
    assert order[:4] == [0, 1, 0, 1]
    reports = [chunk for chunk in chunks if getattr(chunk, "mentor", None)]
    assert len(reports) == 1
    assert reports[0] is chunks[-1]


async def test_several_prompts_stream_under_their_own_indices(backend):
    stream = await openai_client(backend).completions.create(
        model="policy",
        prompt=["p", "q"],
        echo=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts = ["", ""]
    usage = None
    for chunk in await _chunks(stream):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["phello", "qhello"]
    assert usage.completion_tokens == 12


async def test_logprobs_and_token_records_come_with_the_last_event_of_a_choice(backend):
    backend.mixed_fields = mixed_fields
    stream = await openai_client(backend).chat.completions.create(
        model="mentor",
        messages=HELLO,
        stream=True,
        logprobs=True,
        extra_body={"mentor": {"tokens": True}, "return_token_ids": True},
    )
    chunks = await _chunks(stream)
    last = chunks[-1].choices[0]
    assert len(last.logprobs.content) == 6
    assert len(last.mentor["tokens"]) == 6
    token_ids = [i for c in chunks[1:] for i in getattr(c.choices[0], "token_ids", None) or []]
    assert backend.tokenizer.decode(token_ids) == "hello<|end|>"
    assert chunks[0].prompt_token_ids == list(backend.requests[0][1].prompt_token_ids)


async def test_scoring_only_streams_no_response(backend):
    stream = await openai_client(backend).completions.create(
        model="policy", prompt=[64, 65], echo=True, max_tokens=0, logprobs=0, stream=True
    )
    chunks = await _chunks(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "ab"
    assert chunks[-1].choices[0].logprobs.token_logprobs == [None, -1.25]
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_a_failure_before_the_first_token_keeps_its_status(backend):
    backend.error = ExpertUnavailable("the expert does not answer")
    with pytest.raises(openai.InternalServerError) as failure:
        await openai_client(backend).chat.completions.create(
            model="policy", messages=HELLO, stream=True
        )
    assert failure.value.status_code == 503
    assert failure.value.response.headers["retry-after"] == "5"


async def test_a_failure_on_the_way_is_an_error_event(backend):
    backend.error = EngineError("the engine lost the device")
    backend.error_after = 2
    stream = await openai_client(backend).chat.completions.create(
        model="policy", messages=HELLO, stream=True
    )
    seen: list[str] = []

    async def read() -> None:
        async for chunk in stream:
            seen.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError, match="lost the device"):
        await read()
    assert seen == ["", "h", "e"]


async def test_an_unknown_failure_on_the_way_tells_no_details(backend):
    backend.error = RuntimeError("secret path")
    backend.error_after = 1
    body = {"model": "policy", "prompt": "p", "stream": True}
    async with http_client(backend) as client:
        answer = await client.post("/v1/completions", json=body)
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.text
    assert '"code":"internal_error"' in answer.text


async def test_time_running_out_on_the_way_is_an_error_event_and_cancels(backend):
    backend.replies = ["x" * 100]
    backend.step_s = 0.02
    stream = await openai_client(backend, request_timeout_s=0.15).chat.completions.create(
        model="policy", messages=HELLO, stream=True
    )
    with pytest.raises(openai.APIError, match="time limit"):
        await _chunks(stream)
    assert backend.num_cancelled == 1


async def _call_and_leave(backend: FakeBackend, path: str, body: dict, *, after_sends: int):
    """Drive the application as a server would, and hang up after some sends."""
    app = create_app(backend)
    payload = json.dumps(body).encode()
    has_left = asyncio.Event()
    sent = []
    messages = [{"type": "http.request", "body": payload, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await has_left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if len(sent) > after_sends:
            has_left.set()

    if after_sends == 0:
        asyncio.get_running_loop().call_later(0.05, has_left.set)
    headers = [(b"content-type", b"application/json"), (b"host", b"test")]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST",
        "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers,
        "scheme": "http", "server": ("test", 80), "client": ("test", 1), "http_version": "1.1",
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), timeout=5)
    return sent


async def test_a_client_that_leaves_a_stream_cancels_the_generation(backend):
    backend.replies = ["x" * 100]
    backend.step_s = 0.01
    body = {"model": "policy", "messages": HELLO, "stream": True}
    await _call_and_leave(backend, "/v1/chat/completions", body, after_sends=3)
    assert backend.num_cancelled == 1
    assert 1 <= backend.num_steps < 20


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_leaves_before_the_first_token_cancels_too(backend, is_stream):
    backend.step_s = 60
    body = {"model": "policy", "prompt": "p", "stream": is_stream}
    sent = await _call_and_leave(backend, "/v1/completions", body, after_sends=0)
    assert backend.num_cancelled == 1
    assert sent[0]["status"] == 499


async def test_one_failing_prompt_cancels_the_others(backend):
    class Fussy(FakeBackend):
        async def generate(self, model, request):
            if len(request.prompt_token_ids) > 1:
                raise EngineError("no")
            return await super().generate(model, request)

    fussy = Fussy(tokenizer=backend.tokenizer, step_s=60)
    with pytest.raises(openai.InternalServerError, match="no"):
        await openai_client(fussy).completions.create(model="policy", prompt=["a", "bb"])
    assert fussy.num_cancelled == 1
