"""What clients send: OpenAI's request bodies plus vLLM's sampling extras and `mentor`.

Bounds that do not depend on the model are checked here; `fields.check_extra_fields` judges what
is left over.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictInt, Tag

MAX_CHOICES = 1024
"""Largest number of responses in one request: prompts times `n`."""


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    """Send one more event with the token counts before `[DONE]`."""
    include_obfuscation: bool | None = None
    """Accepted and ignored: nothing is obfuscated."""


class MentorOptions(BaseModel):
    """What to report beyond OpenAI's fields."""

    model_config = ConfigDict(extra="forbid")

    tokens: bool = False
    """Report entropy, weight, source and version of every token."""


TokenId = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]


class GenerationRequest(BaseModel):
    """The fields that chat and plain completions share."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Responses per prompt; default 1."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Absent: a random one, reported under `mentor.seed`."""
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    """Strings that end a response and are left out of its text."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """Default 1; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Number of most likely tokens kept; 0 and -1 keep all."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    """Add `token_ids` to every choice and the prompt's ids beside them."""
    mentor: MentorOptions | None = None

    @property
    def num_samples(self) -> int:
        """Responses per prompt."""
        return self.n or 1

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


def include_usage(body: GenerationRequest) -> bool:
    """Whether a stream is to end with its token counts."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def wants_token_records(body: GenerationRequest) -> bool:
    """Whether every token's record is to be reported."""
    return body.mentor is not None and body.mentor.tokens


class ContentPart(BaseModel):
    """One part of a message; only text is served."""

    type: str
    text: str | None = None


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None


class ChatRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """The older name of `max_completion_tokens`, which wins."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """Default: what the context has room for."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    """Default true: open the assistant's turn."""
    continue_final_message: bool | None = None
    """Go on with the last message instead of opening a turn."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the model's own chat template."""


def _prompt_kind(prompt: Any) -> str:
    if not isinstance(prompt, list):
        return "text"
    if prompt and isinstance(prompt[0], list):
        return "token_id_lists"
    return "texts" if prompt and isinstance(prompt[0], str) else "token_ids"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(max_length=MAX_CHOICES), Tag("texts")]
    | Annotated[list[TokenId], Field(min_length=1), Tag("token_ids")]
    | Annotated[
        list[Annotated[list[TokenId], Field(min_length=1)]],
        Field(max_length=MAX_CHOICES),
        Tag("token_id_lists"),
    ],
    Discriminator(_prompt_kind),
]
"""Text, several texts, token ids, or several lists of token ids."""


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """Default 16; 0 only with `echo`."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Report log-probabilities, with so many alternatives a token."""
    echo: bool | None = None
    """Begin the text with the prompt; with `logprobs`, the prompt's tokens are scored too."""
    add_special_tokens: bool | None = None
    """Default true: text prompts get the tokenizer's own special tokens."""


class TokenizeRequest(BaseModel):
    """Body of `POST /tokenize`: either `prompt` or `messages`."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """Default true for `prompt`, false for `messages`, whose template writes them."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """Body of `POST /detokenize`."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    tokens: list[TokenId]


class RollbackRequest(BaseModel):
    """Body of `POST /v1/weights/rollback`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Annotated[int, Field(ge=0, lt=2**31)]
    """A version whose snapshot is kept."""
