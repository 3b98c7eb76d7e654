"""Which request fields are understood, which are ignored, and which are refused.

A field that would change the answer and is not understood is refused by name: an answer that
silently ignored it would be wrong. Fields that only label, bill or cache are ignored. `null`, an
empty list and an empty object are the same as absent, and a field set to the value that means "off"
is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mentor_serve.serving.errors import ApiError, invalid
from mentor_serve.serving.requests import GenerationRequest

IGNORED: Final = frozenset(
    {
        "cache_salt", "metadata", "parallel_tool_calls", "prediction", "priority",
        "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "request_id",
        "safety_identifier", "service_tier", "session_id", "store", "user",
    }
)  # fmt: skip
"""Fields that cannot change which tokens come back."""

OFF: Final[Mapping[str, tuple[Any, ...]]] = {
    "add_special_tokens": (False,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": (),
    "best_of": (1,),
    "chat_template": (),
    "documents": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": (),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Known fields that are not offered, each with the values that leave it off."""


def _refusal(name: str, *, values: tuple[Any, ...]) -> ApiError:
    hint = f"; only {' or '.join(map(repr, values))} is accepted" if values else ""
    message = f"'{name}' is not supported here{hint}; leave it out"
    return invalid(message, param=name, code="unsupported_parameter")


def check_extra_fields(extra: Mapping[str, Any] | None, *, num_choices: int = 1) -> None:
    """Raise a 400 for the first field that would be disregarded although it changes the answer."""
    for name, value in (extra or {}).items():
        if value is None or value in ([], {}) or name in IGNORED:
            continue
        if name not in OFF:
            message = f"unknown field '{name}'; leave it out"
            raise invalid(message, param=name, code="unknown_parameter")
        off = OFF[name] if name != "best_of" else (1, num_choices)
        if value not in off:
            raise _refusal(name, values=off)


def check_fields(body: GenerationRequest) -> None:
    """Refuse extra fields of a generation request and fields that need each other."""
    check_extra_fields(body.model_extra, num_choices=body.num_samples)
    if body.stream_options is not None and not body.stream:
        raise invalid("'stream_options' needs 'stream': true", param="stream_options")
