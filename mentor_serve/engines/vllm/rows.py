"""What a sampler must know of the rows of one step, and what it says of them.

A *row* is one running sample. `RowSampling` travels from the engine to vLLM's worker in
`SamplingParams.extra_args`, `StepRecords` back. Shapes: B rows, K tokens a row at most in one step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mentor_serve.core.random import uniforms
from mentor_serve.engines.batch import DRAW_BLOCK, RECORDED, Stream
from mentor_serve.types import RolloutRequest

EXTRA_ARG = "mentor"
"""Key in `extra_args`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSampling:
    """How one row is sampled."""

    key: int
    """The engine's own name of the row; a row that is submitted again gets another."""
    prompt_len: int
    """Tokens of the prompt, of which vLLM may hold fewer or more (see `worker`)."""
    seed: int
    """int64."""
    sample: int
    temperature: float
    """1 where sampling is greedy."""
    is_greedy: bool
    top_p: float
    top_k: int
    gamma: float
    is_mixed: bool
    is_recorded: bool
    """The expert's word is wanted at every token."""
    num_top_logprobs: int
    forced_token: int
    """First token that vLLM is to emit, or -1: the last prompt token of a mixed row."""

    @classmethod
    def of(
        cls, request: RolloutRequest, *, key: int, sample: int, forced_token: int = -1
    ) -> RowSampling:
        """The row of one sample of a request."""
        sampling = request.sampling
        return cls(
            key=key,
            prompt_len=len(request.prompt_token_ids),
            seed=int(np.uint64(request.seed % 2**64).astype(np.int64)),
            sample=sample,
            temperature=sampling.temperature or 1.0,
            is_greedy=sampling.temperature == 0,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            gamma=request.gamma,
            is_mixed=request.mixed,
            is_recorded=request.mixed and request.record_mixed,
            num_top_logprobs=sampling.top_logprobs,
            forced_token=forced_token,
        )

    def as_extra_args(self) -> dict[str, Any]:
        """For `vllm.SamplingParams`."""
        return {EXTRA_ARG: asdict(self)}


class Rows:
    """The rows of one step and the position that each draws next: columns of [B].

    Made anew when rows come or go; from step to step `moved_to` changes the positions alone.
    """

    def __init__(self, rows: Sequence[RowSampling], positions: NDArray[np.int64]) -> None:
        self.rows = rows
        self.positions = positions
        """Offsets in the responses; negative where nothing is drawn."""
        self.keys = [row.key for row in rows]
        self.prompt_len = np.array([row.prompt_len for row in rows], np.int64)
        self.temperature = np.array([row.temperature for row in rows], np.float32)
        self.is_greedy = np.array([row.is_greedy for row in rows], np.bool_)
        self.is_cut = np.array([row.top_p < 1 or row.top_k > 0 for row in rows], np.bool_)
        self.top_p = np.array([row.top_p for row in rows], np.float64)
        self.top_k = np.array([row.top_k for row in rows], np.int64)
        self.gamma = np.array([row.gamma for row in rows], np.float32)
        self.is_mixed = np.array([row.is_mixed for row in rows], np.bool_)
        self.is_recorded = np.array([row.is_recorded for row in rows], np.bool_)
        self.num_top_logprobs = np.array([row.num_top_logprobs for row in rows], np.int64)
        self._seed = torch.tensor([row.seed for row in rows], dtype=torch.int64)
        self._sample = torch.tensor([row.sample for row in rows], dtype=torch.int64)
        self._blocks: dict[Stream, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
        """First positions [B], and the uniforms [B, DRAW_BLOCK] from there on."""

    def __len__(self) -> int:
        return len(self.rows)

    def uniforms(self, stream: Stream, *, offset: int = 0) -> Tensor:
        """[B] float64 draws for one purpose, `offset` positions ahead.

        Computed for a block of positions at once, since a few cost as much as one.
        """
        positions = self.positions + offset
        block = self._blocks.get(stream)
        if block is None or ((positions < block[0]) | (positions >= block[0] + DRAW_BLOCK)).any():
            # From the row's own position on, because its drafts may be rolled back to there.
            first = self.positions + offset // DRAW_BLOCK * DRAW_BLOCK
            block = self._blocks[stream] = first, self._draw_block(stream, first)
        first, values = block
        return torch.from_numpy(values[np.arange(len(self)), positions - first])

    def moved_to(self, positions: NDArray[np.int64]) -> Rows:
        """The same rows at other positions [B]."""
        moved = copy.copy(self)
        moved.positions = positions
        return moved

    def _draw_block(self, stream: Stream, first: NDArray[np.int64]) -> NDArray[np.float64]:
        positions = torch.from_numpy(first).unsqueeze(-1) + torch.arange(DRAW_BLOCK)
        seed, sample = self._seed.unsqueeze(-1), self._sample.unsqueeze(-1)
        values: NDArray[np.float64] = uniforms(seed, sample, positions, int(stream)).numpy()
        return values

    def temperatures(self, device: torch.device) -> Tensor | None:
        """[B] on a device, or None where all are 1."""
        if (self.temperature == 1).all():
            return None
        return torch.from_numpy(self.temperature).to(device)


@dataclass(slots=True, kw_only=True)
class StepRecords:
    """What one step of vLLM settled: arrays over its B rows and K positions."""

    keys: list[int]
    counts: NDArray[np.int64]
    """[B] tokens that the step adds to each response; the first so many columns below count."""
    is_lost: NDArray[np.bool_]
    """[B] the row had no draft, so that it must be submitted again."""
    records: dict[str, NDArray[Any]]
    """[B, K] by the names of `engines.batch.RECORDED`."""
    proposed: NDArray[np.int64]
    """[B, K] what the policy drafted where the expert replaced it."""
    proposed_policy_logprobs: NDArray[np.float32]
    proposed_expert_logprobs: NDArray[np.float32]
    num_drafted: int = 0
    """Tokens that the expert judged."""
    top_logprobs: dict[int, list[list[tuple[int, float]]]] = field(default_factory=dict)
    """By row: most likely tokens at each position, for rows that want them."""

    @classmethod
    def empty(cls, keys: list[int], num_positions: int) -> StepRecords:
        """Nothing settled yet."""
        shape = len(keys), num_positions
        return cls(
            keys=keys,
            counts=np.zeros(len(keys), np.int64),
            is_lost=np.zeros(len(keys), np.bool_),
            records={name: np.zeros(shape, dtype) for name, dtype in RECORDED.items()},
            proposed=np.zeros(shape, np.int64),
            proposed_policy_logprobs=np.zeros(shape, np.float32),
            proposed_expert_logprobs=np.zeros(shape, np.float32),
        )
