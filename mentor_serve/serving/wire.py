"""What clients get: OpenAI's response bodies, ours under the one key `mentor`.

Log-probabilities and entropies are in nats. NaN, which only marks "not asked of the expert",
leaves as null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field


def _is_none(value: object) -> bool:
    return value is None


OmitNone = Field(default=None, exclude_if=_is_none)
"""Default of fields that are left out of the JSON when they were not asked for."""

FinishReason = Literal["stop", "length"]

LOWEST_LOGPROB = -9999.0
"""OpenAI's stand-in for log 0, which JSON cannot carry."""


class Usage(BaseModel):
    """Exact token counts; a prompt counts once, however many responses it got."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def count(cls, *, prompt_tokens: int, completion_tokens: int) -> Usage:
        """Usage with its total."""
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )


class ModelObject(BaseModel):
    """A model in `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mentor-serve"
    root: str | None = None
    parent: str | None = None
    max_model_len: int
    policy_version: int | None = None


class ModelList(BaseModel):
    """Body of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class ProposedToken(BaseModel):
    """The policy's token that the expert replaced."""

    token_id: int
    token: str
    policy_logprob: float | None
    expert_logprob: float | None


class TokenRecord(BaseModel):
    """How one token came to be."""

    token_id: int
    token: str
    source: Literal["policy", "gated_kept", "expert"]
    policy_version: int
    entropy: float | None
    weight: float | None
    """w of Eq. 6; 0 where the model is not mixed."""
    policy_logprob: float | None
    mixed_logprob: float | None
    expert_logprob: float | None
    proposed: ProposedToken | None = OmitNone


class MentorReport(BaseModel):
    """What MENTOR did: of one choice, or of the whole response."""

    policy_version: int
    """Newest version of the weights that produced a token."""
    min_policy_version: int
    """Oldest one; less than `policy_version` when weights were swapped meanwhile."""
    num_gated: int
    num_interventions: int
    mean_entropy: float | None
    mean_weight: float | None
    seed: int | None
    """Send it back to get the same tokens; null where several prompts had several."""
    expert_lost: bool
    """The expert was away at some gated token, which then fell back to the policy."""
    tokens: list[TokenRecord] | None = OmitNone


class TopLogprob(BaseModel):
    """An alternative at one position."""

    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    """A generated token with its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat choice."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One response of a chat completion."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    token_ids: list[int] | None = OmitNone
    mentor: MentorReport


class ChatCompletion(BaseModel):
    """Body of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_token_ids: list[int] | None = OmitNone
    mentor: MentorReport


class ChatDelta(BaseModel):
    """What a chat event adds."""

    role: Literal["assistant"] | None = OmitNone
    content: str | None = OmitNone


class ChatChunkChoice(BaseModel):
    """One response's part of a chat event."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | None = OmitNone
    mentor: MentorReport | None = OmitNone


class ChatChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str | None = None
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = OmitNone
    mentor: MentorReport | None = OmitNone


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a plain completion, one entry a token in every list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One response of a plain completion, or its part of an event."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | None = OmitNone
    prompt_token_ids: list[int] | None = OmitNone
    mentor: MentorReport | None = OmitNone


class Completion(BaseModel):
    """Body of `POST /v1/completions`, and one event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
    mentor: MentorReport | None = OmitNone


class TokenizeResponse(BaseModel):
    """Body of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    """Body of `POST /detokenize`."""

    prompt: str


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every failure."""

    error: ErrorDetail


class ObjectList(BaseModel):
    """A page of trajectories, or the weight snapshots."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    has_more: bool = False
    next_before: Annotated[str | None, Field(description="pass as `before` for more")] = None


def finite_logprob(value: float) -> float:
    """A log-probability that JSON can carry."""
    return float(value) if math.isfinite(value) else LOWEST_LOGPROB


def finite_or_none(value: float) -> float | None:
    """None for NaN and infinities."""
    return float(value) if math.isfinite(value) else None


def jsonable(value: Any) -> Any:
    """Copy nested containers with NaN and infinities replaced by None."""
    if isinstance(value, float):
        return finite_or_none(value)
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value
