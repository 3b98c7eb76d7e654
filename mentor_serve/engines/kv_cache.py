"""Preallocated key-value slots, handed to a Hugging Face model as its `past_key_values`.

One slot holds one sequence. Storage is `[slots, heads, length, dim]` a layer, grown by doubling.
Before a forward pass the caller opens a *span*: which slots take part, at which positions their
new tokens lie, how much history attention may see. `update` then writes the new keys and values
and returns the history. Only full attention fits; the caller refuses other models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

BLOCK_TOKENS = 32
"""History lengths are rounded up to this, so that kernels see few different shapes."""
_FIRST_SLOTS = 16
_FIRST_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Where the tokens of one forward pass go (N slots, T new tokens at most)."""

    slots: Tensor
    """[N] slot of each row."""
    is_leading: bool
    """The slots are 0 .. N-1 in order, so that history is a view and needs no gather."""
    positions: Tensor
    """[N, T] position of every new token; what padding holds does not matter."""
    kept: tuple[Tensor, Tensor] | None
    """Row and column of every real token where some are padding; None if all are real."""
    length: int
    """How many positions of history the rows see."""


class SlotCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """Key-value storage of up to `max_slots` sequences of up to `max_tokens` tokens."""

    def __init__(self, *, max_slots: int, max_tokens: int) -> None:
        super().__init__(layers=[])
        self._max_slots = max_slots
        self._max_tokens = max_tokens
        self._num_slots = 0
        self._num_tokens = 0
        self._keys: list[Tensor | None] = []
        self._values: list[Tensor | None] = []
        self._span: Span | None = None

    def open_span(self, span: Span, *, num_slots: int) -> None:
        """Set what the next forward pass writes; `num_slots` is one more than its largest slot."""
        self._span = span
        self._reserve(num_slots, span.length)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write [N, heads, T, dim] at the open span, return [N, heads, length, dim]."""
        if self._span is None:
            raise RuntimeError("expected an open span before the model's forward pass")
        while len(self._keys) <= layer_idx:
            self._keys.append(None)
            self._values.append(None)
        keys = self._stored(self._keys, layer_idx, key_states)
        values = self._stored(self._values, layer_idx, value_states)
        return _write(keys, key_states, self._span), _write(values, value_states, self._span)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """History length of the open span; models only compare it with 0."""
        return 0 if self._span is None else self._span.length

    def copy(self, sources: Sequence[int], targets: Sequence[int], *, num_tokens: int) -> None:
        """Copy the first `num_tokens` tokens of slots to other slots, pair by pair."""
        if not targets or num_tokens == 0:
            return
        self._reserve(max(*sources, *targets) + 1, num_tokens)
        for storage in (*self._keys, *self._values):
            if storage is not None:
                source = torch.tensor(sources, device=storage.device)
                target = torch.tensor(targets, device=storage.device)
                storage[target, :, :num_tokens] = storage[source, :, :num_tokens]

    def _stored(self, storages: list[Tensor | None], layer: int, like: Tensor) -> Tensor:
        storage = storages[layer]
        wanted = (self._num_slots, self._num_tokens)
        if storage is None or (storage.shape[0], storage.shape[2]) != wanted:
            storage = storages[layer] = self._resized(storage, like)
        return storage

    def _resized(self, old: Tensor | None, like: Tensor) -> Tensor:
        shape = (self._num_slots, like.shape[1], self._num_tokens, like.shape[3])
        # Zeros, not empty memory: masked positions must stay finite, since 0 * NaN is NaN.
        new = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if old is not None:
            new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def _reserve(self, num_slots: int, num_tokens: int) -> None:
        self._num_slots = _grown(self._num_slots, num_slots, _FIRST_SLOTS, self._max_slots)
        self._num_tokens = _grown(self._num_tokens, num_tokens, _FIRST_TOKENS, self._max_tokens)
        for storages in (self._keys, self._values):
            for layer, storage in enumerate(storages):
                if storage is not None:
                    self._stored(storages, layer, storage)


def rounded_length(num_tokens: int, *, max_tokens: int) -> int:
    """`num_tokens` rounded up to a block, at most `max_tokens`."""
    return min(-(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS, max_tokens)


def _grown(current: int, needed: int, first: int, most: int) -> int:
    if needed <= current:
        return current
    if needed > most:
        raise RuntimeError(f"key-value slots: expected at most {most}, asked for {needed}")
    return min(max(needed, 2 * current, first), most)


def _write(storage: Tensor, new: Tensor, span: Span) -> Tensor:
    if span.kept is not None:
        rows, columns = span.kept
        storage[span.slots[rows], :, span.positions[rows, columns]] = new[rows, :, columns]
    elif new.shape[2] == 1:
        storage[span.slots, :, span.positions[:, 0]] = new[:, :, 0]
    else:
        storage[span.slots[:, None], :, span.positions] = new.transpose(1, 2)
    if span.is_leading:
        return storage[: len(span.slots), :, : span.length]
    return storage[span.slots, :, : span.length]
