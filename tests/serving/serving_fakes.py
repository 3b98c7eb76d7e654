"""A byte-level tokenizer and a scripted backend: the HTTP face without a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np
from openai import AsyncOpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mentor_serve.engines.base import StepOutput
from mentor_serve.serving import Generation, ModelCard, Readiness, create_app
from mentor_serve.serving.backend import ConflictError, NotFoundError
from mentor_serve.types import (
    Intervention,
    Rollout,
    RolloutRequest,
    StopReason,
    TokenSource,
    TrajectoryKind,
)

EOS = "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' and loop.first %}"
    "{{ raise_exception('the user speaks first') }}"
    "{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so that a character spans up to four of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
    )


def make_rollout(token_ids: Sequence[int], *, stop_reason: StopReason, **fields: Any) -> Rollout:
    """A rollout with easily recognised numbers: log-probability -0.5 - t."""
    n = len(token_ids)
    steps = np.arange(n, dtype=np.float32)
    nan = np.full(n, np.nan, np.float32)
    defaults: dict[str, Any] = {
        "policy_logprobs": -0.5 - steps,
        "mixed_logprobs": nan,
        "expert_logprobs": nan,
        "entropies": np.full(n, 1.5, np.float32),
        "weights": np.zeros(n, np.float32),
        "sources": np.zeros(n, np.uint8),
        "policy_versions": np.full(n, 3, np.int32),
    }
    return Rollout(
        token_ids=np.asarray(token_ids, np.int32),
        stop_reason=stop_reason,
        **(defaults | fields),
    )


@dataclass
class FakeBackend:
    """Answers every request with the next of `replies` (by sample), byte by byte."""

    tokenizer: Any
    replies: Sequence[str] = ("hello",)
    max_model_len: int = 200
    is_draining: bool = False
    error: Exception | None = None
    """Raised before the first token."""
    error_after: int | None = None
    """Number of streamed outputs after which `error` is raised instead."""
    step_s: float = 0.0
    mixed_fields: Callable[[int], dict[str, Any]] | None = None
    state: Readiness = field(default_factory=lambda: Readiness(ready=True))
    requests: list[tuple[str, RolloutRequest]] = field(default_factory=list)
    num_cancelled: int = 0
    num_steps: int = 0
    is_paused: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    queries: list[dict[str, Any]] = field(default_factory=list)

    async def models(self) -> list[ModelCard]:
        return [
            ModelCard(id="policy", created=1, policy_version=3),
            ModelCard(id="policy@2", created=1, policy_version=2),
            ModelCard(id="expert", created=1),
            ModelCard(id="mentor", created=1, policy_version=3, is_mixed=True),
        ]

    def rollout(self, request: RolloutRequest, sample: int) -> Rollout:
        sampling = request.sampling
        reply = self.replies[sample % len(self.replies)]
        wanted = self.tokenizer.encode(reply, add_special_tokens=False)
        wanted.append(self.tokenizer.eos_token_id)
        kept: list[int] = []
        reason = StopReason.LENGTH
        for token_id in wanted[: sampling.max_new_tokens]:
            kept.append(token_id)
            text = self.tokenizer.decode(kept, skip_special_tokens=True)
            if token_id == self.tokenizer.eos_token_id:
                reason = StopReason.EOS
                break
            if token_id in sampling.stop_token_ids or any(s in text for s in sampling.stop):
                reason = StopReason.STOP
                break
        fields = self.mixed_fields(len(kept)) if request.mixed and self.mixed_fields else {}
        if sampling.top_logprobs:
            fields["top_logprobs"] = self._tops(kept, sampling.top_logprobs)
        if request.prompt_logprobs:
            prompt = list(request.prompt_token_ids)
            scores = -0.25 - np.arange(len(prompt), dtype=np.float32)
            scores[0] = np.nan
            fields["prompt_logprobs"] = scores
            if sampling.top_logprobs:
                tops = self._tops(prompt, sampling.top_logprobs)
                fields["prompt_top_logprobs"] = [[], *tops[1:]]
        return make_rollout(kept, stop_reason=reason, **fields)

    def _tops(self, token_ids: Sequence[int], count: int) -> list[list[tuple[int, float]]]:
        best = self.tokenizer.encode("e", add_special_tokens=False)[0]
        row = [(best + k, -0.125 * (k + 1)) for k in range(count)]
        return [row for _token in token_ids]

    async def generate(self, model: str, request: RolloutRequest) -> Generation:
        self.requests.append((model, request))
        if self.error is not None:
            raise self.error
        try:
            await asyncio.sleep(self.step_s)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        rollouts = [self.rollout(request, sample) for sample in range(request.num_samples)]
        return Generation(rollouts=rollouts, policy_version=3)

    async def stream(self, model: str, request: RolloutRequest) -> AsyncGenerator[StepOutput, None]:
        self.requests.append((model, request))
        if self.error is not None and self.error_after is None:
            raise self.error
        rollouts = [self.rollout(request, sample) for sample in range(request.num_samples)]
        is_done = False
        try:
            for t in range(max(rollout.num_tokens for rollout in rollouts)):
                for sample, rollout in enumerate(rollouts):
                    if t >= rollout.num_tokens:
                        continue
                    await asyncio.sleep(self.step_s)
                    if self.error is not None and self.num_steps == self.error_after:
                        raise self.error
                    self.num_steps += 1
                    yield StepOutput(
                        request_id=0,
                        sample_index=sample,
                        num_tokens=t + 1,
                        new_token_ids=[int(rollout.token_ids[t])],
                        finished=rollout if t + 1 == rollout.num_tokens else None,
                    )
            is_done = True
        finally:
            self.num_cancelled += not is_done

    async def readiness(self) -> Readiness:
        return self.state

    async def training(self) -> Mapping[str, Any]:
        return {"step": 7, "is_paused": self.is_paused, "alpha": 0.5, "loss": float("nan")}

    async def set_paused(self, paused: bool) -> None:
        self.is_paused = paused

    async def trajectories(
        self, *, limit: int, kind: TrajectoryKind | None, before: str | None
    ) -> list[dict[str, Any]]:
        self.queries.append({"limit": limit, "kind": kind, "before": before})
        return [row for row in self.rows if before is None or row["id"] < before][:limit]

    async def trajectory(self, trajectory_id: str) -> dict[str, Any] | None:
        return next((row for row in self.rows if row["id"] == trajectory_id), None)

    async def weights(self) -> list[dict[str, Any]]:
        return [{"version": 3, "is_live": True}]

    async def roll_back(self, version: int) -> dict[str, Any]:
        if version == 1:
            raise ConflictError("version 1 is not kept")
        if version != 2:
            raise NotFoundError(f"version {version} is none of this run")
        return {"version": 4, "parent_version": version}


def mixed_fields(n: int) -> dict[str, Any]:
    """Fields of a mixed rollout: token 1 gated and kept, token 2 the expert's."""
    sources = np.zeros(n, np.uint8)
    sources[1:3] = [TokenSource.GATED_KEPT, TokenSource.EXPERT]
    versions = np.full(n, 3, np.int32)
    versions[:2] = 2
    expert = np.full(n, np.nan, np.float32)
    expert[1:3] = -0.75
    return {
        "sources": sources,
        "policy_versions": versions,
        "expert_logprobs": expert,
        "weights": np.full(n, 0.25, np.float32),
        "interventions": [
            Intervention(
                position=2,
                proposed_token_id=65,
                chosen_token_id=66,
                entropy=1.5,
                weight=0.25,
                policy_logprob=-1.0,
                expert_logprob=float("-inf"),
            )
        ],
    }


def openai_client(backend: FakeBackend, *, api_key: str = "unused", **options: Any) -> AsyncOpenAI:
    """The real client, wired to the application in this process."""
    app = create_app(backend, service_version="1.2", **options)
    transport = httpx2.ASGITransport(app=app)
    return AsyncOpenAI(
        base_url="http://test/v1",
        api_key=api_key,
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=transport, base_url="http://test"),
    )


def http_client(backend: FakeBackend, **options: Any) -> httpx2.AsyncClient:
    """A plain HTTP client for what the OpenAI client would hide."""
    app = create_app(backend, service_version="1.2", **options)
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test")
