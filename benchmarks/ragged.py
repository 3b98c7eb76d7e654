"""Requests of ragged lengths, and `transformers.generate` answering them as well as it can.

`generate` advances a batch until its longest row is done, so requests are sorted by the number of
tokens they want and cut into batches of one size. Prompts are left-padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.pairs import task_prompts
from benchmarks.samplers.generate import generate_batch
from mentor_serve.engines import RolloutRequest, SamplingParams, TorchEngine

_PROMPT_TOKENS = (8, 96)
_NEW_TOKENS = (16, 112)
"""Fewest and most tokens, drawn uniformly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RaggedRequest:
    """One prompt, and how many tokens are wanted after it."""

    prompt: tuple[int, ...]
    new_tokens: int
    seed: int


def ragged_requests(model: str, *, count: int, uses_chat: bool, seed: int) -> list[RaggedRequest]:
    """Requests with prompts cut from the bundled tasks' text, in the model's own tokens."""
    generator = torch.Generator().manual_seed(seed)
    stream = [token for prompt in task_prompts(model, 64, uses_chat=uses_chat) for token in prompt]
    requests = []
    for number in range(count):
        length = _uniform(*_PROMPT_TOKENS, generator)
        start = _uniform(0, len(stream) - length, generator)
        requests.append(
            RaggedRequest(
                prompt=tuple(stream[start : start + length]),
                new_tokens=_uniform(*_NEW_TOKENS, generator),
                seed=number,
            )
        )
    return requests


def longest(requests: Sequence[RaggedRequest]) -> int:
    """Tokens of the longest prompt with the longest response."""
    return max(len(r.prompt) for r in requests) + max(r.new_tokens for r in requests)


def num_new_tokens(requests: Sequence[RaggedRequest]) -> int:
    """Tokens that were asked for; what a sampler computes beyond them does not count."""
    return sum(request.new_tokens for request in requests)


def answer_by_engine(engine: TorchEngine, requests: Sequence[RaggedRequest], *, seed: int) -> int:
    """Answer all requests by continuous batching; returns the number of tokens."""
    groups = engine.generate(
        [
            RolloutRequest(
                prompt_token_ids=request.prompt,
                seed=1000 * seed + request.seed,
                sampling=SamplingParams(max_new_tokens=request.new_tokens, ignore_eos=True),
            )
            for request in requests
        ]
    )
    return sum(group[0].num_tokens for group in groups)


def answer_by_generate(
    policy: Any, requests: Sequence[RaggedRequest], *, batch: int, seed: int
) -> int:
    """Answer all requests in batches of similar length; returns the number of wanted tokens."""
    torch.manual_seed(seed)
    ordered = sorted(requests, key=lambda request: -request.new_tokens)
    for start in range(0, len(ordered), batch):
        part = ordered[start : start + batch]
        generate_batch(policy, [request.prompt for request in part], new_tokens=part[0].new_tokens)
    return num_new_tokens(requests)


def _uniform(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))
