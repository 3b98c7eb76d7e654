"""The running batch: per-slot state and records as arrays over slots 0 .. n-1.

Structure of arrays in numpy, so that one decode step costs a few vectorised operations and not a
Python loop over rows. Slots stay compact: when rows end, the last rows move into the holes.

A row's tokens are *settled* up to its first open position (`tails.Tails`), and drafted beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mentor_serve.core.random import uniforms
from mentor_serve.engines.scheduler import Job
from mentor_serve.types import IntArray, Intervention, StopReason

DRAW_BLOCK = 32
"""Positions whose uniforms are computed at once."""
_KEPT_DRAWS = DRAW_BLOCK // 2
"""Positions before the next one whose uniforms are kept, because a rollback may return there."""
_NEARLY_USED = DRAW_BLOCK * 3 // 4
"""Rows that drew so many of a block get the next one together with a row that has none left."""
_FIRST_RECORDS = 64

SlotIndex = NDArray[np.int64]
"""Slots [k], distinct unless noted."""


class Stream(IntEnum):
    """Purposes of random draws at one position; a column of `Batch.draws` for the first four."""

    TOKEN = 0
    COIN = 1
    ACCEPT = 2
    RESIDUAL = 3
    ADVICE = 4
    """Seeds of a remote expert's draws."""
    THINNING = 1 << 16
    """Acceptance of a remote expert's i-th sample uses THINNING + i."""


_NUM_BLOCK_STREAMS = 4


class Ending(IntEnum):
    """Why a row ends once all its tokens are settled; 0 while it goes on."""

    NONE = 0
    EOS = 1
    STOP = 2
    LENGTH = 3


STOP_REASONS = {
    Ending.EOS: StopReason.EOS,
    Ending.STOP: StopReason.STOP,
    Ending.LENGTH: StopReason.LENGTH,
}

RECORDED: dict[str, Any] = {
    "token_ids": np.int32,
    "policy_logprobs": np.float32,
    "mixed_logprobs": np.float32,
    "expert_logprobs": np.float32,
    "entropies": np.float32,
    "weights": np.float32,
    "sources": np.uint8,
    "policy_versions": np.int32,
}
"""What is recorded of every token, as in `Rollout`."""


@dataclass(slots=True, eq=False, kw_only=True)
class Row:
    """One running sample; what is not worth an array."""

    job: Job
    sample_index: int
    sequence_id: int
    """Unique among all engines, for a remote expert's cache."""
    prefill_version: int
    """Weights that computed the prompt's keys and values."""
    interventions: list[Intervention] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    expert_lost: bool = False


class Batch:
    """Rows in slots 0 .. `num_rows` - 1. Arrays are `[max_slots]` unless noted."""

    def __init__(self, max_slots: int) -> None:
        self.rows: list[Row] = []
        self.num_new = np.zeros(max_slots, np.int64)
        """Tokens drafted so far; the position that is drawn next."""
        self.num_settled = np.zeros(max_slots, np.int64)
        """Tokens that nothing can change any more."""
        self.num_emitted = np.zeros(max_slots, np.int64)
        """Tokens that were handed out."""
        self.ending = np.zeros(max_slots, np.int8)
        """`Ending` that the last drafted token brings about, or 0."""
        self.is_reading = np.zeros(max_slots, np.bool_)
        """The prompt is not read yet."""
        self.prompt_len = np.zeros(max_slots, np.int64)
        self.limit = np.zeros(max_slots, np.int64)
        self.last_token = np.zeros(max_slots, np.int64)
        """Token that the policy reads next."""
        self.temperature = np.ones(max_slots, np.float32)
        """1 where sampling is greedy."""
        self.is_greedy = np.zeros(max_slots, np.bool_)
        self.top_p = np.ones(max_slots, np.float64)
        self.top_k = np.zeros(max_slots, np.int64)
        self.gamma = np.zeros(max_slots, np.float32)
        self.constant_weight = np.zeros(max_slots, np.float32)
        """NaN: the gate decides."""
        self.first_weight = np.zeros(max_slots, np.float32)
        """The same for the first token alone."""
        self.is_mixed = np.zeros(max_slots, np.bool_)
        """The expert may speak: a mixed request that has not lost its expert."""
        self.is_recorded = np.zeros(max_slots, np.bool_)
        """The expert is asked at every token."""
        self.ends_at_eos = np.zeros(max_slots, np.bool_)
        self.has_stops = np.zeros(max_slots, np.bool_)
        self.num_top_logprobs = np.zeros(max_slots, np.int64)
        self.seed = np.zeros(max_slots, np.int64)
        self.sample = np.zeros(max_slots, np.int64)
        self.draw_base = np.zeros(max_slots, np.int64)
        self.draws = np.zeros((max_slots, DRAW_BLOCK, _NUM_BLOCK_STREAMS), np.float64)
        """[max_slots, DRAW_BLOCK, 4] uniforms for positions from `draw_base` on."""
        self._arrays = [value for value in vars(self).values() if isinstance(value, np.ndarray)]
        self.records = {
            name: np.zeros((max_slots, _FIRST_RECORDS), dtype) for name, dtype in RECORDED.items()
        }
        """[max_slots, T] by name, T growing: what is recorded of every drafted token."""

    @property
    def num_rows(self) -> int:
        """Running samples; they hold slots 0 .. num_rows - 1."""
        return len(self.rows)

    def add(self, row: Row) -> int:
        """Put a sample into the next slot and return that."""
        slot = len(self.rows)
        self.rows.append(row)
        for array in (self.num_new, self.num_settled, self.num_emitted, self.ending):
            array[slot] = 0
        self.is_reading[slot] = True
        request, sampling = row.job.request, row.job.request.sampling
        self.prompt_len[slot] = len(row.job.prompt)
        self.limit[slot] = row.job.max_new_tokens
        self.last_token[slot] = row.job.prompt[-1]
        self.is_greedy[slot] = sampling.temperature == 0
        self.temperature[slot] = sampling.temperature or 1.0
        self.top_p[slot] = sampling.top_p
        self.top_k[slot] = sampling.top_k
        self.gamma[slot] = request.gamma
        self.constant_weight[slot] = _or_nan(request.constant_weight)
        self.first_weight[slot] = _or_nan(request.first_weight)
        self.is_mixed[slot] = request.mixed
        self.is_recorded[slot] = request.mixed and request.record_mixed
        self.ends_at_eos[slot] = not sampling.ignore_eos
        self.has_stops[slot] = bool(sampling.stop or sampling.stop_token_ids)
        self.num_top_logprobs[slot] = sampling.top_logprobs
        self.seed[slot] = np.uint64(request.seed % 2**64).astype(np.int64)
        self.sample[slot] = row.sample_index
        self.draw_base[slot] = -DRAW_BLOCK
        return slot

    def uniforms(self, slots: SlotIndex) -> NDArray[np.float64]:
        """[k, 4] uniforms of the positions drawn next in `slots`, one column a `Stream`."""
        offset = self.num_new[slots] - self.draw_base[slots]
        if ((offset < 0) | (offset >= DRAW_BLOCK)).any():
            self._draw_ahead()
            offset = self.num_new[slots] - self.draw_base[slots]
        current: NDArray[np.float64] = self.draws[slots, offset]
        return current

    def record(self, slots: SlotIndex, values: dict[str, Any]) -> None:
        """Write one drafted token a slot at its `num_new`, then advance: [k] or one for all."""
        positions = self.num_new[slots]
        self._reserve(int(positions.max()) + 1)
        for name, new in values.items():
            self.records[name][slots, positions] = new
        self.last_token[slots] = values["token_ids"]
        self.num_new[slots] += 1

    def amend(
        self, slots: SlotIndex, positions: NDArray[np.int64], values: dict[str, NDArray[Any]]
    ) -> None:
        """Overwrite records at positions that were drafted: arrays [k] by name."""
        for name, new in values.items():
            self.records[name][slots, positions] = new

    def cut(self, slots: SlotIndex, positions: NDArray[np.int64]) -> None:
        """Forget what was drafted beyond `positions`, which become each slot's last token."""
        self.num_new[slots] = positions + 1
        self.last_token[slots] = self.records["token_ids"][slots, positions]
        for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
            del self.rows[slot].top_logprobs[position + 1 :]

    def response(self, slot: int) -> IntArray:
        """Drafted tokens of a slot, a view."""
        tokens: IntArray = self.records["token_ids"][slot, : self.num_new[slot]]
        return tokens

    def recorded(self, slot: int) -> dict[str, NDArray[Any]]:
        """Copies of everything recorded of a slot's settled tokens, [T] each."""
        count = self.num_settled[slot]
        return {name: stored[slot, :count].copy() for name, stored in self.records.items()}

    def remove(self, slots: Sequence[int]) -> tuple[list[int], list[int]]:
        """Drop rows; returns which slots moved where (sources, targets): caches must follow."""
        removed = set(slots)
        num_left = self.num_rows - len(removed)
        targets = sorted(slot for slot in removed if slot < num_left)
        sources = [slot for slot in range(num_left, self.num_rows) if slot not in removed]
        if sources:
            for array in (*self._arrays, *self.records.values()):
                array[targets] = array[sources]
            for source, target in zip(sources, targets, strict=True):
                self.rows[target] = self.rows[source]
        del self.rows[num_left:]
        return sources, targets

    def _draw_ahead(self) -> None:
        """Compute a new block for every row that has used up its own, or nearly so.

        Not for all rows: where rows are admitted one by one, one of them is new at most steps.
        """
        n = self.num_rows
        used = self.num_new[:n] - self.draw_base[:n]
        (due,) = np.nonzero((used < 0) | (used >= _NEARLY_USED))
        self.draw_base[due] = np.maximum(self.num_new[due] - _KEPT_DRAWS, 0)
        fresh = self._fresh_draws(due)
        self.draws[due, : fresh.shape[1]] = fresh

    def _fresh_draws(self, rows: SlotIndex) -> NDArray[np.float64]:
        most = int((self.limit[rows] - self.draw_base[rows]).max())
        offsets = torch.arange(min(DRAW_BLOCK, most))[:, None]
        drawn = uniforms(
            torch.from_numpy(self.seed[rows])[:, None, None],
            torch.from_numpy(self.sample[rows])[:, None, None],
            torch.from_numpy(self.draw_base[rows])[:, None, None] + offsets,
            torch.arange(_NUM_BLOCK_STREAMS),
        )
        block: NDArray[np.float64] = drawn.numpy()
        return block

    def _reserve(self, num_tokens: int) -> None:
        for name, stored in self.records.items():
            if stored.shape[1] < num_tokens:
                self.records[name] = np.pad(stored, ((0, 0), (0, stored.shape[1])))


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value
