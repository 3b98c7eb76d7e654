"""The engine as a sampler: lazy mixed sampling, or the policy alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.samplers.workload import SamplerRun, Workload
from mentor_serve.engines import RolloutRequest, SamplingParams, TorchEngine
from mentor_serve.types import Rollout


class EngineSampler:
    """`TorchEngine.generate` on a workload; counters are differences of `engine.stats`."""

    def __init__(self, engine: TorchEngine, *, mixed: bool) -> None:
        self._engine = engine
        self._mixed = mixed

    def run(self, workload: Workload) -> SamplerRun:
        """Generate; every row to its full length."""
        before = replace(self._engine.stats)
        rollouts = self.rollouts(workload)
        after = self._engine.stats
        return SamplerRun(
            token_ids=np.stack([rollout.token_ids for rollout in rollouts]).astype(np.int64),
            mean_weight=float(np.mean([rollout.weights.mean() for rollout in rollouts])),
            expert_calls=after.expert_calls - before.expert_calls,
            expert_tokens=after.expert_tokens - before.expert_tokens,
            rolled_back=after.rolled_back_tokens - before.rolled_back_tokens,
        )

    def rollouts(self, workload: Workload) -> list[Rollout]:
        """The engine's rollouts, row by row [n]."""
        sampling = SamplingParams(
            temperature=workload.temperature, max_new_tokens=workload.new_tokens, ignore_eos=True
        )
        requests = [
            RolloutRequest(
                prompt_token_ids=prompt,
                mixed=self._mixed,
                gamma=workload.gamma,
                num_samples=workload.samples_per_prompt,
                seed=workload.seed + number,
                sampling=sampling,
            )
            for number, prompt in enumerate(workload.prompts)
        ]
        return [rollout for group in self._engine.generate(requests) for rollout in group]
