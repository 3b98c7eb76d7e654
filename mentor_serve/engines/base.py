"""What every generation engine offers, and what it needs of an expert.

An engine turns `RolloutRequest`s into `Rollout`s by continuous batching. It knows token ids and
weights; tasks, rewards and transport live elsewhere. All methods but `load_weights`, which takes
effect between two decode steps, are called from one thread (see `engines.driver`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from mentor_serve.types import Rollout, RolloutRequest

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was built; all monotone."""

    policy_steps: int = 0
    """Batched decode steps of the policy."""
    policy_tokens: int = 0
    """Generated tokens that were kept."""
    prefill_tokens: int = 0
    """Prompt tokens computed ahead of decoding."""
    shared_prefill_tokens: int = 0
    """Prompt tokens copied from another rollout of the same prompt instead."""
    expert_calls: int = 0
    """Batched forward passes of the expert."""
    expert_tokens: int = 0
    """Tokens the expert read; of a remote expert, positions it was asked about."""
    gated_tokens: int = 0
    interventions: int = 0
    weight_swaps: int = 0


@dataclass(slots=True)
class StepOutput:
    """What one `Engine.step` produced for one rollout (a sample of a request)."""

    request_id: int
    sample_index: int
    num_tokens: int
    """Tokens of this rollout so far."""
    new_token_ids: list[int] = field(default_factory=list)
    finished: Rollout | None = None


class Engine(Protocol):
    """A policy (and optionally an expert beside it) that generates."""

    @property
    def policy_version(self) -> int:
        """Version of the weights that the next decode step uses."""

    @property
    def stats(self) -> EngineStats: ...

    @property
    def max_model_len(self) -> int:
        """Largest prompt plus response, in tokens."""

    @property
    def has_expert(self) -> bool: ...

    def generate(self, requests: Sequence[RolloutRequest]) -> list[list[Rollout]]:
        """Run requests to their end: one list per request with `num_samples` rollouts each."""

    def submit(self, request: RolloutRequest) -> int:
        """Queue a request and return its id. Raises `InvalidRequest` if it can never be served."""

    def step(self) -> list[StepOutput]:
        """Admit what fits, then advance every running rollout by at least one token."""

    def cancel(self, request_id: int) -> None:
        """Drop a request; its running rollouts end with `StopReason.CANCELLED` in the next step."""

    def has_unfinished(self) -> bool: ...

    def load_weights(self, state_dict: Mapping[str, torch.Tensor], *, version: int) -> None:
        """Replace the policy's weights between two decode steps; running rollouts go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertQuery:
    """One gated position: what does the expert say after `token_ids`, and about `proposed`?"""

    sequence_id: int
    """Stable for the life of a rollout, so that the expert may keep its KV cache."""
    token_ids: Sequence[int]
    """The whole sequence before the gated position: prompt, then response so far."""
    proposed_token_id: int
    temperature: float
    seed: int
    """Seeds the expert's draws at this position."""
    num_samples: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertAnswer:
    """The expert's view of one gated position. No vocabulary-sized vector crosses a process."""

    proposed_logprob: float
    """log pi*(proposed)."""
    sample_token_ids: tuple[int, ...]
    """i.i.d. draws from pi*."""
    sample_logprobs: tuple[float, ...]


class ExpertClient(Protocol):
    """A remote expert. Raises `ExpertUnavailable` when no answer comes in time."""

    def advise(self, queries: Sequence[ExpertQuery]) -> list[ExpertAnswer]: ...

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Forget the KV cache of sequences that ended; best effort."""
