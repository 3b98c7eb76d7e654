"""When a response ends, and the text that is left of it.

End tokens are the engine's own business (vectorised); here are the rarer rules: a request's own
stop tokens and stop strings, which may straddle tokens.
"""

from __future__ import annotations

from typing import Any

from mentor_serve.types import IntArray, SamplingParams, StopReason


def ends_at_stop(response: IntArray, sampling: SamplingParams, tokenizer: Any) -> bool:
    """Does the newest token of a response [T] complete a stop token or a stop string?"""
    if int(response[-1]) in sampling.stop_token_ids:
        return True
    if not sampling.stop:
        return False
    # A character takes at most four tokens (one a byte); more history cannot be part of a match
    # that the newest token completes.
    window = 4 * max(len(stop) for stop in sampling.stop) + 8
    tail = response[-window:].tolist()
    return any(_first_stop(_decode(tokenizer, tail, skip), sampling.stop) >= 0 for skip in (1, 0))


def response_text(
    response: IntArray, sampling: SamplingParams, tokenizer: Any, reason: StopReason
) -> str:
    """Decode a finished response without its stop string, end token and special tokens."""
    token_ids = response.tolist()
    ended_by_token = reason is StopReason.EOS or (
        reason is StopReason.STOP and token_ids[-1] in sampling.stop_token_ids
    )
    if ended_by_token:
        return _decode(tokenizer, token_ids[:-1], True)
    text = _decode(tokenizer, token_ids, True)
    cut = _first_stop(text, sampling.stop) if reason is StopReason.STOP else -1
    return text if cut < 0 else text[:cut]


def _decode(tokenizer: Any, token_ids: list[int], skip_special_tokens: bool | int) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=bool(skip_special_tokens))
    return text


def _first_stop(text: str, stops: tuple[str, ...]) -> int:
    """Where the earliest stop string begins, or -1."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=-1)
