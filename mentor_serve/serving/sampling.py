"""From a checked request body to `RolloutRequest`s.

Everything that depends on the named model is refused here: unknown names, sampling that pi_mix
does not allow, prompts longer than the context.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from mentor_serve.serving.backend import Backend, ModelCard, UnknownModelError
from mentor_serve.serving.errors import ApiError, invalid
from mentor_serve.serving.requests import GenerationRequest
from mentor_serve.serving.text import TextCodec
from mentor_serve.types import RolloutRequest, SamplingParams

HTTP_PRIORITY = 1
"""Requests of people are admitted before rollouts (priority 0)."""

_RANDOM_SEED_BITS = 53
"""So that JavaScript clients read the seed without rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt as tokens, with its text where the client sent text."""

    token_ids: list[int]
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stops:
    """Where a response ends, beside the model's own end tokens."""

    strings: tuple[str, ...]
    token_ids: tuple[int, ...]


async def find_model(backend: Backend, model: str) -> ModelCard:
    """The card of a served model. Raises `UnknownModelError`."""
    cards = await backend.models()
    for card in cards:
        if card.id == model:
            return card
    served = ", ".join(card.id for card in cards)
    raise UnknownModelError(f"model {model!r} is not served; expected one of: {served}")


def check_mixed(card: ModelCard, body: GenerationRequest) -> None:
    """Refuse what would make samples of a mixed model something else than pi_mix (Eq. 6)."""
    if not card.is_mixed:
        return
    truncations = {
        "temperature": body.temperature == 0,
        "top_p": body.top_p is not None and body.top_p < 1,
        "top_k": body.top_k is not None and body.top_k > 0,
    }
    for name, is_set in truncations.items():
        if is_set:
            message = f"'{card.id}' samples from the whole mixed distribution; leave out '{name}'"
            raise invalid(message, param=name, code="unsupported_value")


def stops_of(body: GenerationRequest, codec: TextCodec) -> Stops:
    """Stop strings, with those that spell a special token turned into its id."""
    strings = []
    token_ids = list(body.stop_token_ids or [])
    for stop in body.stop_strings:
        if not stop:
            raise invalid("a stop string must not be empty", param="stop")
        special = codec.special_token_id(stop)
        if special is None:
            strings.append(stop)
        else:
            token_ids.append(special)
    return Stops(strings=tuple(strings), token_ids=tuple(token_ids))


def fit_context(
    prompt: Prompt, *, max_tokens: int | None, default: int | None, max_model_len: int
) -> int:
    """Number of tokens to generate, at least 1.

    `default` stands in for an absent `max_tokens` (None: all the room there is). Raises a 400
    `context_length_exceeded` as OpenAI does.
    """
    length = len(prompt.token_ids)
    if length == 0:
        raise invalid("expected a prompt of at least one token, got none", param="prompt")
    room = max_model_len - length
    wanted = max(1, max_tokens) if max_tokens is not None else 1
    if room < wanted:
        raise ApiError(
            400,
            f"the context holds {max_model_len} tokens, the prompt has {length} and {wanted} more "
            "were asked for; shorten the prompt or lower max_tokens",
            param="max_tokens" if room >= 1 else "prompt",
            code="context_length_exceeded",
        )
    if max_tokens is not None:
        return wanted
    return room if default is None else min(default, room)


def sampling_params(
    body: GenerationRequest, *, stops: Stops, max_new_tokens: int, top_logprobs: int
) -> SamplingParams:
    """OpenAI's defaults where the body is silent."""
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        max_new_tokens=max_new_tokens,
        stop=stops.strings,
        stop_token_ids=stops.token_ids,
        ignore_eos=bool(body.ignore_eos),
        top_logprobs=top_logprobs,
    )


def rollout_request(
    card: ModelCard,
    prompt: Prompt,
    *,
    body: GenerationRequest,
    sampling: SamplingParams,
    prompt_logprobs: bool = False,
) -> RolloutRequest:
    """One engine request. Without a seed in the body every prompt draws its own."""
    seed = secrets.randbits(_RANDOM_SEED_BITS) if body.seed is None else body.seed
    return RolloutRequest(
        prompt_token_ids=prompt.token_ids,
        mixed=card.is_mixed,
        num_samples=body.num_samples,
        seed=seed,
        sampling=sampling,
        prompt_logprobs=prompt_logprobs,
        priority=HTTP_PRIORITY,
    )


def common_seed(requests: Sequence[RolloutRequest]) -> int | None:
    """The seed if all requests have the same one, else None."""
    seeds = {request.seed for request in requests}
    return seeds.pop() if len(seeds) == 1 else None
