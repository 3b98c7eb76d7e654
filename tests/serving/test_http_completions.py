"""Plain completions through the real OpenAI client, and the scoring that harnesses use."""

from __future__ import annotations

import openai
import pytest
from serving_fakes import http_client, openai_client

pytestmark = pytest.mark.anyio


async def test_text_prompts_are_continued(backend):
    answer = await openai_client(backend).completions.create(model="policy", prompt="say ")
    assert answer.choices[0].text == "hello"
    assert answer.object == "text_completion"
    assert answer.usage.prompt_tokens == 4
    assert backend.requests[0][1].sampling.max_new_tokens == 16
    assert answer.choices[0].mentor["seed"] == answer.mentor["seed"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[64, 65]]),
        (["a", "b"], [[64], [65]]),
        ([64, 65], [[64, 65]]),
        ([[64], [65, 66]], [[64], [65, 66]]),
    ],
)
async def test_prompts_are_text_texts_token_ids_or_lists_of_them(backend, prompt, expected):
    answer = await openai_client(backend).completions.create(model="policy", prompt=prompt)
    sent = [list(request.prompt_token_ids) for _model, request in backend.requests]
    assert sent == expected
    assert [choice.index for choice in answer.choices] == list(range(len(expected)))


async def test_choices_of_several_prompts_are_ordered_by_prompt_then_sample(backend):
    backend.replies = ["x", "yy"]
    answer = await openai_client(backend).completions.create(
        model="policy", prompt=["p", "q"], n=2, echo=True
    )
    assert [choice.text for choice in answer.choices] == ["px", "pyy", "qx", "qyy"]
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == 2 * (2 + 3)


async def test_a_given_seed_holds_for_every_prompt_and_an_absent_one_differs(backend):
    client = openai_client(backend)
    given = await client.completions.create(model="policy", prompt=["p", "p"], seed=5)
    assert given.mentor["seed"] == 5
    drawn = await client.completions.create(model="policy", prompt=["p", "p"])
    assert drawn.mentor["seed"] is None
    first, second = (choice.mentor["seed"] for choice in drawn.choices)
    assert first != second


async def test_logprobs_have_offsets_into_the_text(backend):
    backend.replies = ["a\u00e9b"]
    answer = await openai_client(backend).completions.create(
        model="policy", prompt="x", logprobs=1, max_tokens=4
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert logprobs.token_logprobs == [-0.5, -1.5, -2.5, -3.5]
    assert logprobs.text_offset == [0, 1, 1, 2]
    assert logprobs.top_logprobs[0] == {"e": -0.125, "a": -0.5}


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_echo_with_logprobs_scores_given_tokens_as_harnesses_expect(backend, max_tokens):
    backend.replies = ["z"]
    contexts = [backend.tokenizer.encode(text, add_special_tokens=False) for text in ("aee", "be")]
    body = {
        "model": "policy",
        "prompt": contexts,
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    async with http_client(backend) as client:
        answer = (await client.post("/v1/completions", json=body)).json()
    assert [choice["text"] for choice in answer["choices"]] == [
        "aee" + "z" * max_tokens,
        "be" + "z" * max_tokens,
    ]
    first = answer["choices"][0]["logprobs"]
    assert first["token_logprobs"][:3] == [None, -1.25, -2.25]
    assert len(first["token_logprobs"]) == 3 + max_tokens
    assert first["top_logprobs"][0] is None
    # What lm-evaluation-harness computes: a continuation of two tokens after a context of one.
    assert [max(top.values()) for top in first["top_logprobs"][1:3]] == [-0.125, -0.125]
    assert first["text_offset"] == [*range(3 + max_tokens)]
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens
    request = backend.requests[0][1]
    assert request.prompt_logprobs
    assert request.sampling.max_new_tokens == 1


async def test_a_harness_reads_greediness_from_the_best_alternative(backend):
    body = {"model": "policy", "prompt": [[64, 68]], "max_tokens": 0, "logprobs": 1, "echo": True}
    async with http_client(backend) as client:
        logprobs = (await client.post("/v1/completions", json=body)).json()["choices"][0][
            "logprobs"
        ]
    # Token 68 is the best alternative itself ("e"): the two values must be comparable.
    assert logprobs["tokens"][1] == "e"
    assert logprobs["top_logprobs"][1] == {"e": max(-0.125, logprobs["token_logprobs"][1])}


async def test_echo_without_logprobs_repeats_token_id_prompts_as_text(backend):
    answer = await openai_client(backend).completions.create(
        model="policy", prompt=[64, 65], echo=True, max_tokens=2
    )
    assert answer.choices[0].text == "abhe"
    assert not backend.requests[0][1].prompt_logprobs


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": [1, "a"]}, "prompt.1"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": ["a"] * 600, "n": 2}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs"),
    ],
)
async def test_a_completion_field_that_cannot_be_honoured_is_refused(backend, fields, param):
    with pytest.raises(openai.BadRequestError) as refusal:
        await openai_client(backend).completions.create(
            **({"model": "policy", "prompt": "a"} | fields)
        )
    assert refusal.value.param == param


async def test_best_of_equal_to_n_is_accepted(backend):
    await openai_client(backend).completions.create(model="policy", prompt="a", n=2, best_of=2)
    assert backend.requests[0][1].num_samples == 2


async def test_lone_surrogates_are_a_bad_request(backend):
    async with http_client(backend) as client:
        for body in (
            b'{"model": "policy", "prompt": "\\ud800"}',
            b'{"model": "\\ud800", "prompt": "a"}',
            b'{"model": "policy", "prompt": "a", "\\ud800": 1}',
        ):
            headers = {"content-type": "application/json"}
            answer = await client.post("/v1/completions", content=body, headers=headers)
            assert answer.status_code in {400, 404}
            assert answer.json()["error"]["message"]
