"""Chat completions through the real OpenAI client."""

from __future__ import annotations

import openai
import pytest
from serving_fakes import mixed_fields, openai_client

pytestmark = pytest.mark.anyio
HELLO = [{"role": "user", "content": "hi"}]


async def test_a_completion_has_text_exact_usage_and_its_seed(backend):
    client = openai_client(backend)
    answer = await client.chat.completions.create(model="policy", messages=HELLO)
    assert answer.choices[0].message.content == "hello"
    assert answer.choices[0].finish_reason == "stop"
    rendered = backend.tokenizer.encode("<|user|>hi<|assistant|>", add_special_tokens=False)
    assert list(backend.requests[0][1].prompt_token_ids) == rendered
    assert answer.usage.prompt_tokens == len(rendered) == 4
    assert answer.usage.completion_tokens == len("hello") + 1
    assert answer.usage.total_tokens == 10
    assert answer.mentor["seed"] == backend.requests[0][1].seed
    assert answer.mentor["policy_version"] == 3
    assert answer.mentor["mean_entropy"] == pytest.approx(1.5)
    assert answer.system_fingerprint == "mentor-serve-1.2-v3"
    assert answer.id.startswith("chatcmpl-")


async def test_defaults_fill_the_context_and_people_go_before_rollouts(backend):
    await openai_client(backend).chat.completions.create(model="policy", messages=HELLO)
    model, request = backend.requests[0]
    assert model == "policy"
    assert request.sampling.max_new_tokens == backend.max_model_len - 4
    assert request.sampling.temperature == 1.0
    assert request.priority == 1
    assert not request.mixed


async def test_sampling_fields_reach_the_engine(backend):
    await openai_client(backend).chat.completions.create(
        model="expert",
        messages=HELLO,
        n=2,
        seed=11,
        temperature=0,
        top_p=0.5,
        max_completion_tokens=3,
        max_tokens=99,
        stop=["x", "<|end|>"],
        user="someone",
        metadata={"a": "b"},
        extra_body={"top_k": -1, "stop_token_ids": [7], "ignore_eos": True},
    )
    request = backend.requests[0][1]
    sampling = request.sampling
    assert (request.num_samples, request.seed) == (2, 11)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 0)
    assert sampling.max_new_tokens == 3
    assert sampling.ignore_eos
    assert sampling.stop == ("x",)
    assert sampling.stop_token_ids == (7, backend.tokenizer.eos_token_id)


async def test_without_a_seed_two_requests_get_different_ones(backend):
    client = openai_client(backend)
    for _request in range(2):
        await client.chat.completions.create(model="policy", messages=HELLO)
    first, second = (request.seed for _model, request in backend.requests)
    assert first != second


async def test_n_choices_come_in_sample_order_and_count_the_prompt_once(backend):
    backend.replies = ["one", "three"]
    answer = await openai_client(backend).chat.completions.create(
        model="policy", messages=HELLO, n=2
    )
    assert [choice.message.content for choice in answer.choices] == ["one", "three"]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.prompt_tokens == 4
    assert answer.usage.completion_tokens == 4 + 6


async def test_length_and_stop_strings_end_a_response(backend):
    backend.replies = ["one two three"]
    client = openai_client(backend)
    cut = await client.chat.completions.create(model="policy", messages=HELLO, max_tokens=3)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("one", "length")
    stopped = await client.chat.completions.create(model="policy", messages=HELLO, stop=" two")
    assert stopped.choices[0].message.content == "one"
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens == len("one two")


async def test_a_stop_token_is_left_out_of_the_text(backend):
    backend.replies = ["one.two"]
    (period,) = backend.tokenizer.encode(".", add_special_tokens=False)
    answer = await openai_client(backend).chat.completions.create(
        model="policy", messages=HELLO, extra_body={"stop_token_ids": [period]}
    )
    assert answer.choices[0].message.content == "one"


async def test_logprobs_cover_every_token_with_alternatives_and_bytes(backend):
    backend.replies = ["\u00e9"]
    answer = await openai_client(backend).chat.completions.create(
        model="policy", messages=HELLO, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == [-0.5, -1.5, -2.5]
    assert bytes(content[0].bytes + content[1].bytes).decode() == "\u00e9"
    assert content[2].token == "<|end|>"
    assert [top.logprob for top in content[0].top_logprobs] == [-0.125, -0.25]
    plain = await openai_client(backend).chat.completions.create(model="policy", messages=HELLO)
    assert plain.choices[0].logprobs is None


async def test_the_mixed_model_reports_gates_interventions_and_token_records(backend):
    backend.mixed_fields = mixed_fields
    answer = await openai_client(backend).chat.completions.create(
        model="mentor", messages=HELLO, extra_body={"mentor": {"tokens": True}}
    )
    assert backend.requests[0][1].mixed
    report = answer.mentor
    assert (report["num_gated"], report["num_interventions"]) == (2, 1)
    assert (report["min_policy_version"], report["policy_version"]) == (2, 3)
    assert report["mean_weight"] == pytest.approx(0.25)
    assert "tokens" not in report
    records = answer.choices[0].mentor["tokens"]
    assert [record["source"] for record in records[:4]] == [
        "policy", "gated_kept", "expert", "policy",
    ]  # fmt: skip
    assert [record["token"] for record in records] == [*"hello", "<|end|>"]
    assert records[0]["expert_logprob"] is None
    assert records[1]["expert_logprob"] == -0.75
    assert records[2]["proposed"]["token_id"] == 65
    assert records[2]["proposed"]["expert_logprob"] is None
    assert "proposed" not in records[0]


async def test_token_ids_come_back_on_request_only(backend):
    client = openai_client(backend)
    answer = await client.chat.completions.create(
        model="policy", messages=HELLO, extra_body={"return_token_ids": True}
    )
    assert answer.prompt_token_ids == list(backend.requests[0][1].prompt_token_ids)
    assert backend.tokenizer.decode(answer.choices[0].token_ids) == "hello<|end|>"
    plain = await client.chat.completions.create(model="policy", messages=HELLO)
    assert not hasattr(plain, "prompt_token_ids")


async def test_messages_may_be_text_parts_developer_turns_and_echoed_answers(backend):
    client = openai_client(backend)
    answer = await client.chat.completions.create(model="policy", messages=HELLO)
    await client.chat.completions.create(
        model="policy",
        messages=[
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            answer.choices[0].message.model_dump(),
        ],
        extra_body={"add_generation_prompt": False},
    )
    text = backend.tokenizer.decode(backend.requests[1][1].prompt_token_ids)
    assert text == "<|system|>be brief<|user|>ab<|assistant|>hello"


async def test_the_last_message_can_be_continued(backend):
    await openai_client(backend).chat.completions.create(
        model="policy",
        messages=[*HELLO, {"role": "assistant", "content": "I think"}],
        extra_body={"continue_final_message": True},
    )
    text = backend.tokenizer.decode(backend.requests[0][1].prompt_token_ids)
    assert text.endswith("<|assistant|>I think")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 5000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"stop": ""}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"extra_body": {"min_p": 0.1}}, "min_p"),
        ({"extra_body": {"top_q": 0.1}}, "top_q"),
        ({"extra_body": {"mentor": {"token": True}}}, "mentor.token"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"extra_body": {"stream_options": {"include_usage": True}}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"stop": 5}, "stop"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
        ),
    ],
)
async def test_a_field_that_cannot_be_honoured_is_refused_by_name(backend, fields, param):
    with pytest.raises(openai.BadRequestError) as refusal:
        await openai_client(backend).chat.completions.create(
            **({"model": "policy", "messages": HELLO} | fields)
        )
    assert refusal.value.param == param
    assert refusal.value.type == "invalid_request_error"
    assert backend.requests == []


async def test_fields_set_to_off_are_accepted(backend):
    await openai_client(backend).chat.completions.create(
        model="policy",
        messages=HELLO,
        tools=[],
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        store=False,
        extra_body={"min_p": 0, "repetition_penalty": 1.0, "tool_choice": "none", "seed": None},
    )
    assert len(backend.requests) == 1


@pytest.mark.parametrize(
    "fields", [{"temperature": 0}, {"top_p": 0.9}, {"extra_body": {"top_k": 5}}]
)
async def test_the_mixed_model_refuses_truncated_and_greedy_sampling(backend, fields):
    client = openai_client(backend)
    with pytest.raises(openai.BadRequestError, match="mixed"):
        await client.chat.completions.create(model="mentor", messages=HELLO, **fields)
    await client.chat.completions.create(model="policy", messages=HELLO, **fields)


async def test_template_errors_and_reserved_template_variables_are_bad_requests(backend):
    client = openai_client(backend)
    with pytest.raises(openai.BadRequestError, match="the user speaks first"):
        await client.chat.completions.create(
            model="policy", messages=[{"role": "assistant", "content": "x"}]
        )
    with pytest.raises(openai.BadRequestError, match="chat_template_kwargs may not set"):
        await client.chat.completions.create(
            model="policy",
            messages=HELLO,
            extra_body={"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        )


async def test_a_prompt_beyond_the_context_is_refused_as_openai_does(backend):
    client = openai_client(backend)
    long = [{"role": "user", "content": "x" * 300}]
    with pytest.raises(openai.BadRequestError) as refusal:
        await client.chat.completions.create(model="policy", messages=long)
    assert refusal.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as refusal:
        await client.chat.completions.create(model="policy", messages=HELLO, max_tokens=197)
    assert refusal.value.code == "context_length_exceeded"
    await client.chat.completions.create(model="policy", messages=HELLO, max_tokens=196)
