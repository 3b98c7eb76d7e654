"""The data that crosses layers: requests, rollouts, tasks, scores, training state.

Plain dataclasses over ints, strings and numpy arrays. This module imports neither torch nor ray, so
that every layer, the dashboard included, may use it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
ByteArray = NDArray[np.uint8]


class TokenSource(IntEnum):
    """Who decided a token; one byte in `trajectory_tokens.sources`."""

    POLICY = 0
    GATED_KEPT = 1
    EXPERT = 2


class TrajectoryKind(StrEnum):
    """Which distribution a trajectory was sampled from."""

    ON_POLICY = "on_policy"
    MIXED = "mixed"
    EXPERT = "expert"
    SERVED = "served"


class GuidanceMethod(StrEnum):
    """How the expert takes part in a group's rollouts (docs/baselines.md)."""

    MENTOR = "mentor"
    ON_POLICY = "on_policy"
    LUFFY = "luffy"
    QUESTA = "questa"


class StopReason(StrEnum):
    """Why a rollout ended."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class GroupStatus(StrEnum):
    """Life of a rollout group: ready -> leased -> consumed, or stale, or failed."""

    READY = "ready"
    LEASED = "leased"
    CONSUMED = "consumed"
    STALE = "stale"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Truncation (`top_p`, `top_k`) is refused for mixed requests."""

    temperature: float = 1.0
    """Softmax temperature; 0 is greedy (not for mixed requests)."""
    top_p: float = 1.0
    """Nucleus mass; 1 keeps the whole vocabulary."""
    top_k: int = 0
    """Number of most likely tokens kept; 0 keeps all."""
    max_new_tokens: int = 64
    """Upper bound on the number of generated tokens, the end token included."""
    stop: tuple[str, ...] = ()
    """Strings that end a rollout; needs a tokenizer. Tokens up to and with the match are kept."""
    stop_token_ids: tuple[int, ...] = ()
    """Further token ids that end a rollout, beside the model's own end tokens."""
    ignore_eos: bool = False
    """Go on after the model's end token, up to `max_new_tokens`."""
    top_logprobs: int = 0
    """How many of the policy's most likely alternatives to record for each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """`num_samples` rollouts of one prompt; sample `i` is a function of prompt, `seed` and `i`."""

    prompt_token_ids: tuple[int, ...] | list[int]
    mixed: bool = False
    """Sample from pi_mix (Eq. 6) instead of the policy."""
    gamma: float = 999.0
    """gamma_p of `w = min(1, H / gamma)`; used by mixed requests only. 0 means w = 1 everywhere."""
    constant_weight: float | None = None
    """w of every token of a mixed request in place of the gate: how much of guidance is due to its
    being selective shows against this."""
    first_weight: float | None = None
    """w of a mixed request's first token in place of the gate; 1 is what the authors' code does."""
    num_samples: int = 1
    seed: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    record_mixed: bool = False
    """Ask the expert at every token, so that mixed and expert log-probabilities have no NaN."""
    prompt_logprobs: bool = False
    """Also record the policy's log-probability of each prompt token (the first one is NaN)."""
    priority: int = 0
    """Requests of higher priority are admitted first: HTTP 1, rollouts 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervention:
    """One token of the policy that the expert replaced."""

    position: int
    """Offset in the response, from 0."""
    proposed_token_id: int
    chosen_token_id: int
    entropy: float
    weight: float
    policy_logprob: float
    """log pi_theta of the proposed token."""
    expert_logprob: float
    """log pi* of the proposed token."""


@dataclass(slots=True, kw_only=True)
class Rollout:
    """One sampled response, one entry per generated token in every array ([T]).

    Log-probabilities and entropies are in nats, full vocabulary, at the sampling temperature
    (temperature 1 where sampling is greedy). `mixed_logprobs` and `expert_logprobs` are NaN where
    the expert did not have to look.
    """

    token_ids: IntArray
    policy_logprobs: FloatArray
    mixed_logprobs: FloatArray
    expert_logprobs: FloatArray
    entropies: FloatArray
    weights: FloatArray
    """w_t; 0 in the policy's own rollouts, 1 in whole expert trajectories."""
    sources: ByteArray
    """`TokenSource` values."""
    policy_versions: IntArray
    """Version of the weights that produced each token."""
    stop_reason: StopReason
    text: str | None = None
    """Decoded response, stop string and special tokens left out; None without a tokenizer."""
    interventions: list[Intervention] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] | None = None
    prompt_logprobs: FloatArray | None = None
    prompt_top_logprobs: list[list[tuple[int, float]]] | None = None
    """`top_logprobs` of each prompt token (the first one's is empty), with `prompt_logprobs`."""
    latency_s: float = 0.0
    """From submission to the last token."""
    expert_lost: bool = False
    """The expert was unavailable at some gated position, which then fell back to the policy."""

    @property
    def num_tokens(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids)

    @property
    def num_gated(self) -> int:
        """Number of tokens whose coin came up b_t = 1."""
        return int(np.count_nonzero(self.sources))

    @property
    def num_interventions(self) -> int:
        """Number of tokens that the expert replaced."""
        return int(np.count_nonzero(self.sources == TokenSource.EXPERT))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A problem with a verifiable answer."""

    source: str
    """Where it came from, for instance `reasoning_gym:chain_sum` or `jsonl:problems.jsonl`."""
    prompt: str
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the verifier needs beyond the answer (JSON-serialisable)."""
    split: str = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A verifier's judgement of one response; all parts in [0, 1]."""

    reward: float
    accuracy: float
    format_score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """The part of the training state that rollouts are sampled under."""

    policy_version: int = 0
    step: int = 0
    alpha: float = 1.0
    gamma: float = 999.0
