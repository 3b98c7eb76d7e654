"""What every sampler is given and gives back.

Shapes: n rows (a row is one sample of one prompt), T new tokens a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mentor_serve.core.random import uniforms

Prompt = tuple[int, ...]


class Purpose(IntEnum):
    """Purposes of random draws at one position (`stream` of `core.random.uniforms`)."""

    TOKEN = 0
    COIN = 1
    ACCEPT = 2
    RESIDUAL = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One batch: `samples_per_prompt` rows of each prompt, all with `new_tokens` new tokens."""

    prompts: tuple[Prompt, ...]
    """Distinct; row i belongs to prompt `i // samples_per_prompt`."""
    samples_per_prompt: int
    new_tokens: int
    gamma: float
    temperature: float = 1.0
    seed: int = 0

    @property
    def num_rows(self) -> int:
        """n."""
        return len(self.prompts) * self.samples_per_prompt

    @property
    def num_tokens(self) -> int:
        """Generated tokens of all rows: n * T."""
        return self.num_rows * self.new_tokens

    @property
    def row_prompts(self) -> list[Prompt]:
        """[n]."""
        return [prompt for prompt in self.prompts for _ in range(self.samples_per_prompt)]

    def draws(self, purpose: Purpose, *, device: torch.device) -> Tensor:
        """Uniforms of every row and position, float64 [n, T]."""
        prompt = torch.arange(len(self.prompts)).repeat_interleave(self.samples_per_prompt)
        sample = torch.arange(self.samples_per_prompt).repeat(len(self.prompts))
        position = torch.arange(self.new_tokens)
        drawn = uniforms(
            (self.seed + prompt)[:, None], sample[:, None], position[None, :], int(purpose)
        )
        return drawn.to(device)

    def temperatures(self, count: int, *, device: torch.device) -> Tensor | None:
        """[count] for `sampler.distribution`; None where the softmax needs no division."""
        if self.temperature == 1.0:
            return None
        return torch.full((count,), self.temperature, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerRun:
    """What one sampler made of one workload, and what it cost the expert."""

    token_ids: NDArray[np.int64]
    """[n, T]."""
    mean_weight: float
    """Mean w over generated tokens; 0 where no weight was computed."""
    expert_calls: int = 0
    """Batched forward passes of the expert."""
    expert_tokens: int = 0
    """Tokens that the expert read, prompts included (once for all rows of a prompt)."""
    rolled_back: int = 0
    """Policy tokens computed after a rejected draft and thrown away; the rejected draft itself,
    which is replaced in place, does not count."""

    @property
    def num_tokens(self) -> int:
        """Generated tokens."""
        return int(self.token_ids.size)

    @classmethod
    def joined(cls, runs: Sequence[SamplerRun]) -> SamplerRun:
        """Several workloads of equal shape, run one after the other, as one."""
        return cls(
            token_ids=np.concatenate([run.token_ids for run in runs]),
            mean_weight=float(np.mean([run.mean_weight for run in runs])),
            expert_calls=sum(run.expert_calls for run in runs),
            expert_tokens=sum(run.expert_tokens for run in runs),
            rolled_back=sum(run.rolled_back for run in runs),
        )


class Sampler(Protocol):
    """Anything that generates the tokens of a workload."""

    def run(self, workload: Workload) -> SamplerRun: ...
