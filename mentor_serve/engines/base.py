"""What every generation engine offers.

An engine turns `RolloutRequest`s into `Rollout`s by continuous batching. It knows token ids and
weights; tasks, rewards and transport live elsewhere. All methods but `load_weights`, which takes
effect between two decode steps, are called from one thread (see `engines.driver`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from mentor_serve.engines.advice import ExpertClient
from mentor_serve.types import Rollout, RolloutRequest

if TYPE_CHECKING:
    import torch

__all__ = ["Engine", "EngineStats", "ExpertClient", "StepOutput"]


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was built; all monotone."""

    policy_steps: int = 0
    """Batched decode steps of the policy."""
    policy_tokens: int = 0
    """Generated tokens that were handed out."""
    prefill_tokens: int = 0
    """Prompt tokens computed ahead of decoding."""
    shared_prefill_tokens: int = 0
    """Prompt tokens copied from another rollout of the same prompt instead."""
    expert_calls: int = 0
    """Batched forward passes of the expert."""
    expert_tokens: int = 0
    """Tokens the expert read; of a remote expert, tokens sent to it."""
    expert_bytes: int = 0
    """Payload sent to and received from a remote expert."""
    rolled_back_tokens: int = 0
    """Drafted tokens that were thrown away because a draft before them was rejected."""
    gated_tokens: int = 0
    interventions: int = 0
    weight_swaps: int = 0


@dataclass(slots=True)
class StepOutput:
    """What one `Engine.step` produced for one rollout (a sample of a request).

    Only settled tokens are handed out, so that none is ever taken back; several may come at once.
    """

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
        """Admit what fits, then do one round of work.

        Some rollouts advance, perhaps by several tokens, and others may wait for the expert.
        """

    def cancel(self, request_id: int) -> None:
        """Drop a request; its running rollouts end with `StopReason.CANCELLED` in the next step."""

    def has_unfinished(self) -> bool: ...

    def load_weights(self, state_dict: Mapping[str, torch.Tensor], *, version: int) -> None:
        """Replace the policy's weights between two decode steps; running rollouts go on."""
