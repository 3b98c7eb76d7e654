"""`transformers.generate` as a sampler: the policy alone, as most people would run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.samplers.workload import SamplerRun, Workload


class GenerateSampler:
    """Left-padded batches; every row runs to the full length."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def run(self, workload: Workload) -> SamplerRun:
        """Generate with torch's own generator, seeded by the workload."""
        torch.manual_seed(workload.seed)
        token_ids = generate_batch(
            self._policy,
            workload.row_prompts,
            new_tokens=workload.new_tokens,
            temperature=workload.temperature,
        )
        return SamplerRun(token_ids=token_ids.cpu().numpy(), mean_weight=0.0)


@torch.inference_mode()
def generate_batch(
    policy: Any, prompts: Sequence[Sequence[int]], *, new_tokens: int, temperature: float = 1.0
) -> Tensor:
    """Sample exactly `new_tokens` tokens after each prompt: int64 [n, new_tokens]."""
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    padded = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    mask = np.arange(width) >= np.array(padding)[:, None]
    output: Tensor = policy.generate(
        input_ids=torch.tensor(padded, device=policy.device),
        attention_mask=torch.from_numpy(mask.astype(np.int64)).to(policy.device),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        # No end token ends a row; the distribution loses that token, its cost stays.
        min_new_tokens=None if policy.generation_config.eos_token_id is None else new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )
    return output[:, width:]
