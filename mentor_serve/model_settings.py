"""Settings of the policy and the expert: which models, on what, and how they generate.

Part of `mentor_serve.settings`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt


class PolicySettings(BaseModel):
    """The model that is served and trained."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str = "embedded:policy"
    """`embedded:policy`, a Hugging Face model directory, or a hub id."""
    engine: Literal["torch", "vllm"] = "torch"
    """What generates. `torch`: this project's engine, for any Hugging Face causal LM. `vllm`: vLLM
    0.32 with the same sampling (docs/vllm.md)."""
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_batch_size: PositiveInt = 96
    """Rollouts that decode at the same time; HTTP requests find an eighth as many further slots."""
    max_model_len: PositiveInt = 512
    """Prompt plus response, in tokens."""
    kv_cache_gib: PositiveFloat = 4.0
    """Memory for keys and values of one replica, policy and colocated expert together; requests
    that do not fit wait."""
    num_replicas: PositiveInt = 1
    num_cpus: PositiveFloat = 0.5
    """CPUs that Ray books for one replica."""
    num_gpus: float = Field(default=0.0, ge=0)
    num_threads: NonNegativeInt = 1
    """Torch threads of a replica; 0 leaves torch's own choice."""
    max_queued_requests: PositiveInt = 512
    """HTTP and rollout requests that may wait for one replica; more are answered 503."""


class ExpertSettings(BaseModel):
    """The advisor: a stronger model over the same vocabulary."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str = "embedded:expert"
    """`embedded:expert`, a Hugging Face model directory, a hub id, or `none`."""
    placement: Literal["colocated", "remote"] = "colocated"
    """`colocated`: in the policy's process. `remote`: a deployment of its own."""
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    num_cpus: PositiveFloat = 0.3
    num_gpus: float = Field(default=0.0, ge=0)
    num_threads: NonNegativeInt = 1
    timeout_s: PositiveFloat = 5.0
    """How long a remote expert may take; after that its rollouts go on without it."""
    run_ahead: Literal["auto"] | NonNegativeInt = "auto"
    """How far the policy drafts past tokens that wait for the expert. `auto` weighs measured costs;
    k runs on to k such tokens a rollout, 0 settles each at once. Speed only: what is sampled stays
    the same."""
    num_draft_tokens: PositiveInt = 4
    """K of vLLM: tokens that the policy drafts before the expert judges them. Speed only."""


def check_models(policy: PolicySettings, expert: ExpertSettings) -> None:
    """Return if the engine can hold both models as the settings place them.

    Raises:
        ValueError: one vLLM cannot.
    """
    if policy.engine != "vllm" or expert.model == "none":
        return
    for name, expected in (
        ("placement", "colocated"),
        ("device", policy.device),
        ("dtype", policy.dtype),
    ):
        if getattr(expert, name) != expected:
            raise ValueError(
                f"policy.engine = 'vllm' needs expert.{name} = {expected!r}, since one vLLM runs "
                f"policy and expert, got {getattr(expert, name)!r}"
            )
