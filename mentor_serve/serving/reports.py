"""From rollouts to the parts of a response: text, log-probabilities, what MENTOR did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mentor_serve.errors import EngineError
from mentor_serve.serving.sampling import Prompt, Stops
from mentor_serve.serving.text import IncrementalDecoder, TextCodec, find_stop
from mentor_serve.serving.wire import (
    ChatLogprobs,
    CompletionLogprobs,
    FinishReason,
    MentorReport,
    ProposedToken,
    TokenLogprob,
    TokenRecord,
    TopLogprob,
    finite_logprob,
    finite_or_none,
)
from mentor_serve.types import FloatArray, Rollout, StopReason, TokenSource

Alternatives = Sequence[tuple[int, float]]

_SOURCE_NAMES = {
    TokenSource.POLICY: "policy",
    TokenSource.GATED_KEPT: "gated_kept",
    TokenSource.EXPERT: "expert",
}


def finish_reason(rollout: Rollout) -> FinishReason:
    """OpenAI's name for how it ended. Raises `EngineError` if it did not end by itself."""
    match rollout.stop_reason:
        case StopReason.EOS | StopReason.STOP:
            return "stop"
        case StopReason.LENGTH:
            return "length"
    raise EngineError(f"the engine ended the response early: {rollout.stop_reason.value}")


def ended_by_token(rollout: Rollout, *, stops: Stops) -> bool:
    """Whether the last token is an end or stop token, which is no part of the text."""
    if rollout.stop_reason is StopReason.EOS:
        return True
    is_stop = rollout.stop_reason is StopReason.STOP and rollout.num_tokens > 0
    return is_stop and int(rollout.token_ids[-1]) in stops.token_ids


def response_text(rollout: Rollout, *, codec: TextCodec, stops: Stops) -> str:
    """The response as text, without its end token and special tokens, up to the stop string."""
    token_ids = rollout.token_ids.tolist()
    text = codec.decode(token_ids[:-1] if ended_by_token(rollout, stops=stops) else token_ids)
    cut = find_stop(text, stops.strings)
    return text if cut is None else text[:cut]


def _mean(parts: Sequence[FloatArray]) -> float | None:
    values = np.concatenate(parts) if parts else np.empty(0, np.float32)
    return finite_or_none(float(values.mean(dtype=np.float64))) if values.size else None


def mentor_report(
    rollouts: Sequence[Rollout],
    *,
    seed: int | None,
    policy_version: int | None,
    tokens: list[TokenRecord] | None = None,
) -> MentorReport:
    """Sums and token means over one or more rollouts.

    `policy_version` stands in where there is no token to read a version from.
    """
    versions = [int(v) for r in rollouts if r.num_tokens for v in _extremes(r)]
    fallback = policy_version or 0
    return MentorReport(
        policy_version=max(versions, default=fallback),
        min_policy_version=min(versions, default=fallback),
        num_gated=sum(rollout.num_gated for rollout in rollouts),
        num_interventions=sum(rollout.num_interventions for rollout in rollouts),
        mean_entropy=_mean([rollout.entropies for rollout in rollouts]),
        mean_weight=_mean([rollout.weights for rollout in rollouts]),
        seed=seed,
        expert_lost=any(rollout.expert_lost for rollout in rollouts),
        tokens=tokens,
    )


def _extremes(rollout: Rollout) -> tuple[int, int]:
    return int(rollout.policy_versions.min()), int(rollout.policy_versions.max())


def token_records(rollout: Rollout, *, codec: TextCodec) -> list[TokenRecord]:
    """How every token of a rollout came to be."""
    replaced = {
        item.position: ProposedToken(
            token_id=item.proposed_token_id,
            token=codec.token_text(item.proposed_token_id),
            policy_logprob=finite_or_none(item.policy_logprob),
            expert_logprob=finite_or_none(item.expert_logprob),
        )
        for item in rollout.interventions
    }
    return [
        TokenRecord.model_validate(
            {
                "token_id": token_id,
                "token": codec.token_text(token_id),
                "source": _SOURCE_NAMES[TokenSource(int(rollout.sources[t]))],
                "policy_version": int(rollout.policy_versions[t]),
                "entropy": finite_or_none(rollout.entropies[t]),
                "weight": finite_or_none(rollout.weights[t]),
                "policy_logprob": finite_or_none(rollout.policy_logprobs[t]),
                "mixed_logprob": finite_or_none(rollout.mixed_logprobs[t]),
                "expert_logprob": finite_or_none(rollout.expert_logprobs[t]),
                "proposed": replaced.get(t),
            }
        )
        for t, token_id in enumerate(rollout.token_ids.tolist())
    ]


def without_response(rollout: Rollout) -> Rollout:
    """Keep only what the engine said about the prompt (engines sample at least one token)."""
    return replace(
        rollout,
        token_ids=rollout.token_ids[:0],
        policy_logprobs=rollout.policy_logprobs[:0],
        mixed_logprobs=rollout.mixed_logprobs[:0],
        expert_logprobs=rollout.expert_logprobs[:0],
        entropies=rollout.entropies[:0],
        weights=rollout.weights[:0],
        sources=rollout.sources[:0],
        policy_versions=rollout.policy_versions[:0],
        stop_reason=StopReason.LENGTH,
        text="",
        interventions=[],
        top_logprobs=None,
    )


def _alternatives(rollout: Rollout) -> Sequence[Alternatives]:
    return rollout.top_logprobs or [()] * rollout.num_tokens


def chat_logprobs(rollout: Rollout, *, codec: TextCodec, num_top: int) -> ChatLogprobs:
    """OpenAI's chat form, one entry for every generated token, the end token included."""

    def entry(token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=codec.token_text(token_id),
            bytes=list(codec.token_bytes(token_id)),
            logprob=finite_logprob(logprob),
        )

    content = []
    rows = zip(
        rollout.token_ids.tolist(),
        rollout.policy_logprobs.tolist(),
        _alternatives(rollout),
        strict=True,
    )
    for token_id, logprob, top in rows:
        others = [entry(other, value) for other, value in top[:num_top]]
        own = entry(token_id, logprob)
        content.append(
            TokenLogprob(token=own.token, bytes=own.bytes, logprob=own.logprob, top_logprobs=others)
        )
    return ChatLogprobs(content=content)


@dataclass(frozen=True, slots=True)
class _ScoredToken:
    token_id: int
    logprob: float
    """NaN for the first token of a prompt, which nothing predicts."""
    top: Alternatives


def _scored_response(rollout: Rollout) -> list[_ScoredToken]:
    rows = zip(
        rollout.token_ids.tolist(),
        rollout.policy_logprobs.tolist(),
        _alternatives(rollout),
        strict=True,
    )
    return [_ScoredToken(token_id, logprob, top) for token_id, logprob, top in rows]


def _scored_prompt(prompt: Prompt, rollout: Rollout, *, num_top: int) -> list[_ScoredToken]:
    if rollout.prompt_logprobs is None:
        raise EngineError("expected log-probabilities of the prompt, the engine gave none")
    tops = rollout.prompt_top_logprobs
    if tops is None:
        if num_top:
            raise EngineError("expected alternatives of the prompt's tokens, the engine gave none")
        tops = [[]] * len(prompt.token_ids)
    rows = zip(prompt.token_ids, rollout.prompt_logprobs.tolist(), tops, strict=True)
    return [_ScoredToken(token_id, logprob, top) for token_id, logprob, top in rows]


def _top_by_text(scored: _ScoredToken, *, codec: TextCodec, num_top: int) -> dict[str, float]:
    # The token itself comes along even where it is not among the best, as OpenAI and vLLM do it;
    # of two ids with one spelling the likelier stays.
    top: dict[str, float] = {}
    for token_id, logprob in scored.top[:num_top]:
        top.setdefault(codec.token_text(token_id), finite_logprob(logprob))
    own = codec.token_text(scored.token_id)
    top[own] = max(finite_logprob(scored.logprob), top.get(own, -math.inf))
    return top


def completion_logprobs(
    rollout: Rollout,
    *,
    codec: TextCodec,
    num_top: int,
    echoed: Prompt | None,
    text_before: int = 0,
) -> CompletionLogprobs:
    """OpenAI's completions form; with `echoed`, the prompt's tokens come first.

    `text_before` is the length of the choice's text before the first of these tokens.
    """
    scored = _scored_prompt(echoed, rollout, num_top=num_top) if echoed else []
    scored += _scored_response(rollout)
    decoder = IncrementalDecoder(codec)
    ends = [text_before]
    for item in scored:
        ends.append(ends[-1] + len(decoder.push([item.token_id])))
    is_unknown = [math.isnan(item.logprob) for item in scored]
    return CompletionLogprobs(
        tokens=[codec.token_text(item.token_id) for item in scored],
        token_logprobs=[
            None if unknown else finite_logprob(item.logprob)
            for item, unknown in zip(scored, is_unknown, strict=True)
        ],
        top_logprobs=[
            None if unknown else _top_by_text(item, codec=codec, num_top=num_top)
            for item, unknown in zip(scored, is_unknown, strict=True)
        ],
        text_offset=[start for start, _end in pairwise(ends)],
    )
