"""The HTTP face over a real engine: a tiny random model, its driver thread, the OpenAI client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace

import numpy as np
import openai
import pytest
import torch
from serving_fakes import FakeBackend, openai_client
from transformers import LlamaConfig, LlamaForCausalLM

from mentor_serve.engines import TorchEngine
from mentor_serve.engines.base import StepOutput
from mentor_serve.engines.driver import EngineDriver
from mentor_serve.serving import Generation
from mentor_serve.types import RolloutRequest

pytestmark = pytest.mark.anyio
HELLO = [{"role": "user", "content": "hi"}]


class EngineBackend(FakeBackend):
    """The backend of one process: engine, driver, no Ray."""

    driver: EngineDriver
    policy: LlamaForCausalLM

    async def generate(self, model: str, request: RolloutRequest) -> Generation:
        rollouts = await self.driver.generate(replace(request, gamma=1.0))
        return Generation(rollouts=rollouts, policy_version=self.driver.engine.policy_version)

    async def stream(self, model: str, request: RolloutRequest) -> AsyncGenerator[StepOutput, None]:
        outputs = self.driver.stream(replace(request, gamma=1.0))
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()


def _model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def served(tokenizer) -> Iterator[EngineBackend]:
    torch.set_num_threads(1)
    policy, expert = (_model(len(tokenizer), seed) for seed in (1, 2))
    engine = TorchEngine(
        policy, expert, tokenizer=tokenizer, eos_token_ids=[tokenizer.eos_token_id]
    )
    backend = EngineBackend(tokenizer=tokenizer, max_model_len=engine.max_model_len)
    backend.driver = EngineDriver(engine)
    backend.policy = policy
    yield backend
    backend.driver.close()


async def test_streamed_and_whole_responses_of_a_seed_are_the_same(served):
    client = openai_client(served)
    asked = {"model": "policy", "prompt": "abc", "n": 2, "seed": 5, "max_tokens": 30}
    asked["extra_body"] = {"return_token_ids": True}
    whole = await client.completions.create(**asked)
    texts = ["", ""]
    token_ids: list[list[int]] = [[], []]
    async for chunk in await client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            token_ids[choice.index] += choice.token_ids
    assert texts == [choice.text for choice in whole.choices]
    assert token_ids == [choice.token_ids for choice in whole.choices]
    assert token_ids[0] != token_ids[1]
    assert whole.usage.completion_tokens == sum(map(len, token_ids))


async def test_the_mixed_model_consults_the_expert(served):
    answer = await openai_client(served).chat.completions.create(
        model="mentor",
        messages=HELLO,
        n=4,
        seed=3,
        max_tokens=20,
        extra_body={"mentor": {"tokens": True}},
    )
    assert answer.mentor["num_gated"] > 0
    assert 0 < answer.mentor["num_interventions"] <= answer.mentor["num_gated"]
    records = [record for choice in answer.choices for record in choice.mentor["tokens"]]
    assert len(records) == answer.usage.completion_tokens
    replaced = [record for record in records if record["source"] == "expert"]
    assert len(replaced) == answer.mentor["num_interventions"]
    assert all(record["proposed"]["token_id"] != record["token_id"] for record in replaced)


async def test_echoed_logprobs_are_the_models_own(served):
    token_ids = [10, 20, 30, 40, 50]
    answer = await openai_client(served).completions.create(
        model="policy", prompt=token_ids, echo=True, logprobs=0, max_tokens=0, temperature=0
    )
    with torch.no_grad():
        logits = served.policy(torch.tensor([token_ids])).logits[0]
    expected = torch.log_softmax(logits.float(), -1)[range(4), token_ids[1:]]
    given = answer.choices[0].logprobs.token_logprobs
    assert given[0] is None
    np.testing.assert_allclose(given[1:], expected.numpy(), atol=1e-4)


async def test_a_harness_gets_the_best_alternative_of_every_prompt_token(served):
    token_ids = [10, 20, 30, 40, 50]
    answer = await openai_client(served).completions.create(
        model="policy", prompt=token_ids, echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    with torch.no_grad():
        logits = served.policy(torch.tensor([token_ids])).logits[0]
    best = torch.log_softmax(logits.float(), -1).max(-1).values
    tops = answer.choices[0].logprobs.top_logprobs
    given = [max(top.values()) for top in tops[1:]]
    np.testing.assert_allclose(given, best.numpy(), atol=1e-4)


async def test_a_stop_string_ends_the_engines_work_too(served):
    client = openai_client(served)
    asked = {"model": "policy", "prompt": "abc", "seed": 5, "max_tokens": 60}
    free = (await client.completions.create(**asked)).choices[0].text
    stop = next(c for c in free[3:] if c.isascii() and c not in free[:3])
    stopped = await client.completions.create(**asked, stop=stop)
    assert stopped.choices[0].text == free[: free.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 60


async def test_leaving_a_stream_frees_the_engine(served):
    stream = served.stream("policy", RolloutRequest(prompt_token_ids=[1, 2], num_samples=2))
    await anext(stream)
    await stream.aclose()
    for _wait in range(100):
        if served.driver.num_running == 0:
            break
        await asyncio.sleep(0.02)
    assert served.driver.num_running == 0


async def test_a_token_outside_the_vocabulary_is_a_bad_request(served):
    with pytest.raises(openai.BadRequestError) as refusal:
        await openai_client(served).completions.create(model="policy", prompt=[10**6])
    assert refusal.value.code == "invalid_request"
