"""Token by token: both models read every token, and the next one is drawn from pi_mix (Eq. 6)."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.samplers.slots import last_prompt_tokens, read_prompts
from benchmarks.samplers.workload import Purpose, SamplerRun, Workload
from mentor_serve.core.gate import guidance_weight
from mentor_serve.core.speculative import mix
from mentor_serve.engines.sampler import distribution, draw
from mentor_serve.engines.slots.slot_model import SlotModel


class Naive:
    """The definition of mixed sampling, batched and cached."""

    def __init__(self, policy: Any, expert: Any, *, max_rows: int, max_tokens: int) -> None:
        self._policy = SlotModel(policy, max_slots=max_rows, max_tokens=max_tokens)
        self._expert = SlotModel(expert, max_slots=max_rows, max_tokens=max_tokens)

    @torch.inference_mode()
    def run(self, workload: Workload) -> SamplerRun:
        """Generate; one policy pass and one expert pass a step."""
        policy, expert = self._policy, self._expert
        calls, read = expert.num_passes, expert.num_tokens_read
        read_prompts(policy, workload)
        read_prompts(expert, workload)
        device = policy.device
        drawn = workload.draws(Purpose.TOKEN, device=device)
        temperatures = workload.temperatures(workload.num_rows, device=device)
        token_ids = torch.empty(drawn.shape, dtype=torch.int64, device=device)
        weights = torch.zeros(workload.num_rows, device=device)
        last = last_prompt_tokens(workload, device=device)
        for position in range(workload.new_tokens):
            own = distribution(policy.decode(last), temperatures)
            theirs = distribution(expert.decode(last), temperatures)
            weight = guidance_weight(own.entropies(), workload.gamma)
            last = draw(mix(own.probs, theirs.probs, weight), drawn[:, position])
            token_ids[:, position] = last
            weights += weight
        return SamplerRun(
            token_ids=token_ids.cpu().numpy(),
            mean_weight=float(weights.sum()) / workload.num_tokens,
            expert_calls=expert.num_passes - calls,
            expert_tokens=expert.num_tokens_read - read,
        )
