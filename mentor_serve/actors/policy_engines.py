"""Builds the engines of a policy replica as `policy.engine` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mentor_serve import engines
from mentor_serve.engines.base import Engine
from mentor_serve.models.loading import load_model
from mentor_serve.settings import Settings


def build_engines(
    settings: Settings, tokenizer: Any, remote_expert: Any = None
) -> tuple[Engine, Engine | None]:
    """The policy's engine, and that of the expert's own rollouts where it is colocated.

    Raises:
        ConfigError: a model cannot be loaded or served by the engine that is named.
    """
    if settings.policy.engine == "vllm":
        return _vllm_engines(settings, tokenizer)
    expert_settings = settings.expert
    if remote_expert is not None or expert_settings.model == "none":
        policy = torch_engine(
            settings, settings.policy.model, expert=remote_expert, tokenizer=tokenizer
        )
        return policy, None
    expert = load_model(
        expert_settings.model, dtype=expert_settings.dtype, device=expert_settings.device
    )
    return (
        torch_engine(settings, settings.policy.model, expert=expert, tokenizer=tokenizer),
        torch_engine(settings, expert, expert=None, tokenizer=tokenizer),
    )


def torch_engine(
    settings: Settings, model: Any, *, expert: Any, tokenizer: Any
) -> engines.TorchEngine:
    """This project's own engine; kept versions run on it whatever serves the live one."""
    policy = settings.policy
    return engines.TorchEngine(
        policy=model,
        expert=expert,
        tokenizer=tokenizer,
        device=policy.device,
        dtype=policy.dtype,
        max_batch_size=policy.max_batch_size,
        max_model_len=policy.max_model_len,
        kv_cache_gib=policy.kv_cache_gib,
        run_ahead=settings.expert.run_ahead,
    )


def _vllm_engines(settings: Settings, tokenizer: Any) -> tuple[Engine, Engine | None]:
    expert = None if settings.expert.model == "none" else settings.expert.model
    # Three caches of one size: the policy's, the mixed rollouts', the expert's own.
    share = settings.policy.kv_cache_gib * (1 if expert is None else 2 / 3)
    policy = _vllm_engine(settings, settings.policy.model, expert, tokenizer, kv_cache_gib=share)
    if expert is None:
        return policy, None
    return policy, _vllm_engine(settings, expert, None, tokenizer, kv_cache_gib=share / 2)


def _vllm_engine(
    settings: Settings,
    model: str | Path,
    expert: str | Path | None,
    tokenizer: Any,
    *,
    kv_cache_gib: float,
) -> Engine:
    # Here, not above: the gateway imports this module too, and needs no torch.
    from mentor_serve.engines.vllm.cores import CoreOptions
    from mentor_serve.engines.vllm.engine import VllmEngine

    policy = settings.policy
    options = CoreOptions(
        device=policy.device,
        dtype=policy.dtype,
        max_batch_size=policy.max_batch_size,
        max_model_len=policy.max_model_len,
        kv_cache_gib=kv_cache_gib,
        num_draft_tokens=settings.expert.num_draft_tokens,
    )
    return VllmEngine.start(model, expert, tokenizer, options=options)
