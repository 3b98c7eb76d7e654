"""Open positions: drafted tokens that wait for the expert, and what settling them will need.

A row's *tail* begins at its first open position. A position is open where the coin asked for the
expert, or where a request wants the expert's view of every token recorded. Arrays over slots, like
`Batch`; K, the room for open positions of one row, grows as needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mentor_serve.engines.batch import SlotIndex, Stream

MAX_OPEN = 16
"""Open positions of one row; bounds the memory for the policy's distributions there."""
_FIRST_OPEN = 2


class Tails:
    """Open positions of every slot, oldest first. Arrays are `[max_slots]` or `[max_slots, K]`."""

    def __init__(self, max_slots: int) -> None:
        shape = (max_slots, _FIRST_OPEN)
        self.count = np.zeros(max_slots, np.int64)
        """Open positions of each slot."""
        self.survival = np.ones(max_slots, np.float64)
        """Estimated probability that no draft of the tail is rejected."""
        self.is_rejected = np.zeros(max_slots, np.bool_)
        """The first open draft is known to be rejected; only its replacement is missing."""
        self.num_drawn = np.zeros(max_slots, np.int64)
        """Samples of a remote expert that the first open position has seen."""
        self.num_held = np.zeros(max_slots, np.int64)
        """Tokens of the sequence that a remote expert holds."""
        self.positions = np.zeros(shape, np.int64)
        """Offset in the response of each open position."""
        self.is_gated = np.zeros(shape, np.bool_)
        """False where the expert is only asked for the record."""
        self.accept_draws = np.zeros(shape, np.float64)
        self.residual_draws = np.zeros(shape, np.float64)
        self.risks = np.zeros(shape, np.float64)
        """Estimated probability of rejection."""
        self.cells = np.zeros(shape, np.int64)
        """Which estimate `risks` came from."""
        self._logprobs: Tensor | None = None

    def open(
        self,
        slots: SlotIndex,
        *,
        positions: NDArray[np.int64],
        is_gated: NDArray[np.bool_],
        draws: NDArray[np.float64],
        logprobs: Tensor,
        risks: NDArray[np.float64],
        cells: NDArray[np.int64],
    ) -> None:
        """Add one open position to each of some slots: arrays [k], draws [k, 4], logprobs [k, V].

        `logprobs` is the policy's whole distribution there, which the residual will need.
        """
        index = self.count[slots]
        stored = self._reserve(int(index.max()) + 1, logprobs)
        stored[torch.from_numpy(slots), torch.from_numpy(index)] = logprobs
        self.positions[slots, index] = positions
        self.is_gated[slots, index] = is_gated
        self.accept_draws[slots, index] = draws[:, Stream.ACCEPT]
        self.residual_draws[slots, index] = draws[:, Stream.RESIDUAL]
        self.risks[slots, index] = np.where(is_gated, risks, 0.0)
        self.cells[slots, index] = cells
        self.count[slots] += 1
        self.survival[slots] *= 1.0 - self.risks[slots, index]

    def flat(self, slots: SlotIndex) -> tuple[SlotIndex, NDArray[np.int64]]:
        """Every open position of some slots, in order: slot of each [m], index in its slot [m]."""
        counts = self.count[slots]
        firsts = np.cumsum(counts) - counts
        index = np.arange(int(counts.sum())) - np.repeat(firsts, counts)
        return np.repeat(slots, counts), index

    def logprobs(self, slots: SlotIndex, index: NDArray[np.int64]) -> Tensor:
        """The policy's distributions at open positions: [m], [m] -> [m, V]."""
        if self._logprobs is None:
            raise RuntimeError("expected open positions before their distributions are asked for")
        return self._logprobs[torch.from_numpy(slots), torch.from_numpy(index)]

    def clear(self, slots: SlotIndex | Sequence[int]) -> None:
        """No position of these slots is open any more."""
        self.count[slots] = 0
        self.survival[slots] = 1.0
        self.is_rejected[slots] = False
        self.num_drawn[slots] = 0

    def forget(self, slots: SlotIndex | Sequence[int]) -> None:
        """Make slots ready for other rows."""
        self.clear(slots)
        self.num_held[slots] = 0

    def shift(self, slot: int, num_settled: int, num_left: int) -> None:
        """The first `num_settled` positions of a slot are settled; of the rest keep `num_left`."""
        stop = num_settled + num_left
        for array in self._by_position():
            array[slot, :num_left] = array[slot, num_settled:stop].copy()
        if self._logprobs is not None and num_settled:
            self._logprobs[slot, :num_left] = self._logprobs[slot, num_settled:stop].clone()
        self.count[slot] = num_left
        self.survival[slot] = np.prod(1.0 - self.risks[slot, :num_left])

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Follow rows into other slots."""
        if not sources:
            return
        for array in (
            *self._by_position(),
            self.count,
            self.survival,
            self.is_rejected,
            self.num_drawn,
            self.num_held,
        ):
            array[targets] = array[sources]
        for source, target in zip(sources, targets, strict=True):
            if self._logprobs is not None and self.count[target]:
                count = self.count[target]
                self._logprobs[target, :count] = self._logprobs[source, :count]

    def _by_position(self) -> tuple[NDArray[np.generic], ...]:
        return (
            self.positions,
            self.is_gated,
            self.accept_draws,
            self.residual_draws,
            self.risks,
            self.cells,
        )

    def _reserve(self, num_open: int, like: Tensor) -> Tensor:
        """Room for `num_open` positions a slot."""
        room = self.positions.shape[1]
        if num_open > room:
            for name in (
                "positions",
                "is_gated",
                "accept_draws",
                "residual_draws",
                "risks",
                "cells",
            ):
                setattr(self, name, np.pad(getattr(self, name), ((0, 0), (0, room))))
            room *= 2
        if self._logprobs is None or self._logprobs.shape[1] < room:
            new = like.new_empty((len(self.count), room, like.shape[1]))
            if self._logprobs is not None:
                new[:, : self._logprobs.shape[1]] = self._logprobs
            self._logprobs = new
        return self._logprobs
