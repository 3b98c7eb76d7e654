"""The yardstick of mixed sampling: the policy alone, plus the expert reading everything once.

The engine samples from the policy; then the expert reads every prompt and response in one
teacher-forced pass, with no draft to wait for, and gives logits where a coin with the gate's
probability came up (nowhere else would a lazy sampler need them). The tokens are the policy's, so
this samples from pi_theta, not from pi_mix: it is a measure of time, not a sampler.

No sampler whose expert reads every token is faster. A lazy one may be: what follows a row's last
coin, and a row without any, is never read.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from benchmarks.samplers.engine import EngineSampler
from benchmarks.samplers.slots import read_prompts
from benchmarks.samplers.workload import Purpose, SamplerRun, Workload
from mentor_serve.core.gate import guidance_weight
from mentor_serve.engines.slots.slot_model import SlotModel
from mentor_serve.types import Rollout

_ROWS_PER_READ = (1, 2, 4, 8, 16, 32, 64)
"""Tried by `tune`, beside all rows at once."""


class Floor:
    """Policy-only generation followed by one pass of the expert at its best speed."""

    def __init__(
        self, policy_only: EngineSampler, expert: Any, *, max_rows: int, max_tokens: int
    ) -> None:
        self._policy_only = policy_only
        self._expert = SlotModel(expert, max_slots=max_rows, max_tokens=max_tokens)
        self._rows_per_read = max_rows

    def run(self, workload: Workload) -> SamplerRun:
        """Generate, then let the expert read."""
        rollouts = self._policy_only.rollouts(workload)
        calls, read = self._expert.num_passes, self._expert.num_tokens_read
        mean_weight = self._teacher_force(workload, rollouts)
        return SamplerRun(
            token_ids=np.stack([rollout.token_ids for rollout in rollouts]).astype(np.int64),
            mean_weight=mean_weight,
            expert_calls=self._expert.num_passes - calls,
            expert_tokens=self._expert.num_tokens_read - read,
        )

    def tune(self, workload: Workload) -> int:
        """Find how many rows to give the expert at once; returns what `run` uses from now on."""
        rollouts = self._policy_only.rollouts(workload)
        seconds: dict[int, float] = {}
        sizes = [size for size in _ROWS_PER_READ if size < workload.num_rows]
        for size in (*sizes, workload.num_rows):
            self._rows_per_read = size
            seconds[size] = min(self._timed(workload, rollouts) for _ in range(2))
        self._rows_per_read = min(seconds, key=seconds.__getitem__)
        return self._rows_per_read

    def _timed(self, workload: Workload, rollouts: list[Rollout]) -> float:
        started = time.perf_counter()
        # The returned weight is a host value of the policy's; wait for the expert's device, too.
        self._teacher_force(workload, rollouts)
        if self._expert.device.type == "cuda":
            torch.cuda.synchronize(self._expert.device)
        return time.perf_counter() - started

    @torch.inference_mode()
    def _teacher_force(self, workload: Workload, rollouts: list[Rollout]) -> float:
        """Read all rows and give logits at gated tokens; returns the mean weight."""
        entropies = torch.from_numpy(np.stack([rollout.entropies for rollout in rollouts]))
        weights = guidance_weight(entropies, workload.gamma)
        coins = workload.draws(Purpose.COIN, device=weights.device) < weights
        read_prompts(self._expert, workload)
        responses = [rollout.token_ids[:-1].tolist() for rollout in rollouts]
        tokens = [
            [prompt[-1], *response]
            for prompt, response in zip(workload.row_prompts, responses, strict=True)
        ]
        gated = [np.flatnonzero(row).tolist() for row in coins.numpy()]
        for start in range(0, len(tokens), self._rows_per_read):
            stop = min(start + self._rows_per_read, len(tokens))
            self._expert.read(list(range(start, stop)), tokens[start:stop], gated[start:stop])
        return float(weights.mean())
