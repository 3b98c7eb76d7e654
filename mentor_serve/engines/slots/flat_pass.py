"""What one fused forward pass computes, as tensors on the device.

Everything but attention runs on the flat list of real tokens. Attention sees queries `[R, W]`: a
row for each slot of the history it looks at, W the most tokens that one slot reads. Building a pass
moves index arrays to the device and never waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mentor_serve.engines.slots.kv_cache import rounded_length
from mentor_serve.engines.slots.read_plan import LongArray, Ragged, offsets_in


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlatPass:
    """M tokens of some slots, R rows of attention with W queries each, L tokens of history."""

    token_ids: Tensor
    """[M]"""
    positions: Tensor
    """[M] Place of each token in its sequence."""
    slots: Tensor
    """[M] Slot of each token."""
    num_slots: int
    """One more than the largest slot."""
    length: int
    """L, rounded up; at most `max_tokens`."""
    first_slot: int
    """Where the history rows begin, if they are a range of slots."""
    num_rows: int
    """R"""
    gathered: Tensor | None
    """[R] Slots of the history rows, if they are no range."""
    width: int
    """W"""
    padded: Tensor | None
    """[R W] Flat token of each query (any token for padding); None if M tokens are the queries."""
    unpadded: Tensor | None
    """[M] Query of each flat token; None if they are the same."""
    mask: Tensor
    """[R, 1, W, L] Additive: 0 or the dtype's minimum (finite, so that no row makes NaN)."""
    wanted: Tensor | None
    """[m] Flat tokens whose logits are wanted; None wants all."""


class PassBuilder:
    """Makes passes for one device and dtype. `max_slots`, `max_tokens`: of the storage."""

    def __init__(
        self, *, max_slots: int, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._max_tokens = max_tokens
        self._device = device
        self._slots = torch.arange(max_slots, device=device)
        self._columns = torch.arange(max_tokens, device=device)
        self._seen = torch.zeros((), dtype=dtype, device=device)
        self._hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)

    def decode(self, token_ids: Tensor, positions: Tensor, *, length: int) -> FlatPass:
        """One token into each of the slots 0 .. n-1: [n], [n]."""
        num_rows = token_ids.shape[0]
        length = rounded_length(length, max_tokens=self._max_tokens)
        return FlatPass(
            token_ids=token_ids,
            positions=positions,
            slots=self._slots[:num_rows],
            num_slots=num_rows,
            length=length,
            first_slot=0,
            num_rows=num_rows,
            gathered=None,
            width=1,
            padded=None,
            unpadded=None,
            mask=self._mask(positions.view(num_rows, 1), length),
            wanted=None,
        )

    def read(self, ragged: Ragged) -> FlatPass:
        """Any tokens into any slots."""
        width = int(ragged.counts.max())
        row_of_slot, num_rows, is_range = _rows(ragged.slots, width)
        offsets = offsets_in(ragged.counts)
        flat = np.empty((4, len(offsets)), np.int64)
        flat[0] = ragged.token_ids
        flat[1] = np.repeat(ragged.starts, ragged.counts) + offsets
        flat[2] = np.repeat(ragged.slots, ragged.counts)
        flat[3] = np.repeat(row_of_slot * width, ragged.counts) + offsets
        token_ids, positions, slots, queries = self._moved(flat)
        padded, query_positions = None, positions
        num_queries = num_rows * width
        if len(offsets) < num_queries or (np.diff(row_of_slot) < 0).any():
            source = np.zeros((2, num_queries), np.int64)
            source[0, flat[3]] = np.arange(len(offsets))
            source[1, flat[3]] = flat[1]
            padded, query_positions = self._moved(source)
        length = rounded_length(int(ragged.ends.max()), max_tokens=self._max_tokens)
        return FlatPass(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            num_slots=int(ragged.slots.max()) + 1,
            length=length,
            first_slot=int(ragged.slots.min()) if is_range else 0,
            num_rows=num_rows,
            gathered=None if is_range else self._moved(ragged.slots),
            width=width,
            padded=padded,
            unpadded=None if padded is None else queries,
            mask=self._mask(query_positions.view(num_rows, width), length),
            wanted=self._moved(ragged.wanted),
        )

    def _mask(self, positions: Tensor, length: int) -> Tensor:
        """[R, W] -> [R, 1, W, L]: every query sees the history up to and including itself."""
        is_hidden = self._columns[:length] > positions[:, None, :, None]
        return torch.where(is_hidden, self._hidden, self._seen)

    def _moved(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _rows(slots: LongArray, width: int) -> tuple[LongArray, int, bool]:
    """(row of attention of each slot, number of rows, whether rows are a range of slots).

    A range of slots is read in place. Copying the history of N slots costs about as much as looking
    at twice as many, so slots that take no part are better looked at in vain if they are few.
    """
    first, num_slots = int(slots.min()), len(slots)
    num_rows = int(slots.max()) - first + 1
    if (num_rows - num_slots) * width <= 2 * num_slots:
        return slots - first, num_rows, True
    return np.arange(num_slots), num_slots, False
