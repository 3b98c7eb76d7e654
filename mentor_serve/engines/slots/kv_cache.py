"""Preallocated key-value slots: one slot holds the keys and values of one sequence.

`SlotStorage` owns the memory: tensors `[slots, heads, tokens, dim]`, grown by doubling one tensor
at a time. `SlotCache` hands it to a Hugging Face model as `past_key_values`: before a forward pass
the caller opens a *span* (which slots take part, at which positions their new tokens lie, how much
history attention may see); `update` then writes the new keys and values and returns the history.
Only full attention fits; the caller refuses other models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from mentor_serve.errors import EngineError

BLOCK_TOKENS = 32
"""History lengths are rounded up to this, so that kernels see few different shapes."""
_FIRST_SLOTS = 16
_FIRST_TOKENS = 128
_MAX_SLICED_PAIRS = 4
"""Up to so many pairs are copied slice by slice; more by index, in one operation a tensor."""


class SlotStorage:
    """Key-value memory of up to `max_slots` sequences of up to `max_tokens` tokens.

    All tensors hold the same number of slots and of tokens; heads and dim are their own.
    """

    def __init__(self, *, max_slots: int, max_tokens: int) -> None:
        self.tensors: list[Tensor] = []
        """Each `[slots, heads, tokens, dim]`; replaced by larger ones as the storage grows."""
        self._max_slots = max_slots
        self._max_tokens = max_tokens
        self._num_slots = 0
        self._num_tokens = 0
        self._halves: list[tuple[Tensor, Tensor]] = []
        self._halves_of: tuple[int, int, int] | None = None

    @property
    def footprint(self) -> int:
        """Bytes held now."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of one slot, over all tensors."""
        return sum(
            tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in self.tensors
        )

    def add(self, *, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """One more tensor, in the storage's present shape."""
        self.tensors.append(torch.empty((0, heads, 0, dim), dtype=dtype, device=device))
        self._resize(len(self.tensors) - 1)
        return self.tensors[-1]

    def grow(self, num_slots: int, num_tokens: int) -> None:
        """Make room for slots 0 .. num_slots-1 of `num_tokens` tokens, by doubling.

        Raises:
            EngineError: more than the storage may ever hold.
        """
        if num_slots <= self._num_slots and num_tokens <= self._num_tokens:
            return
        self.reshape(
            _grown(self._num_slots, num_slots, _FIRST_SLOTS, self._max_slots),
            _grown(self._num_tokens, num_tokens, _FIRST_TOKENS, self._max_tokens),
        )

    def reshape(self, num_slots: int, num_tokens: int) -> None:
        """Hold exactly so many slots of so many tokens; what does not fit is lost.

        One tensor at a time, so that the old and the new memory never coexist as a whole.

        Raises:
            EngineError: more than the storage may ever hold.
        """
        if num_slots > self._max_slots or num_tokens > self._max_tokens:
            raise EngineError(
                f"key-value slots: expected at most {self._max_slots} slots of {self._max_tokens} "
                f"tokens, asked for {num_slots} of {num_tokens}; use a larger max_batch_size or "
                "max_model_len"
            )
        if (num_slots, num_tokens) == (self._num_slots, self._num_tokens):
            return
        self._num_slots, self._num_tokens = num_slots, num_tokens
        # Views would keep every old tensor alive.
        self._halves, self._halves_of = [], None
        for index in range(len(self.tensors)):
            self._resize(index)

    def halves(
        self, index: int, *, first_slot: int, num_slots: int, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Views of a tensor's first and second half of heads, for a range of slots.

        The last range asked for is remembered for all tensors: decoding asks for the same again and
        again, and slicing costs about as much as a small model's product.
        """
        wanted = first_slot, num_slots, num_tokens
        if wanted != self._halves_of:
            slots = slice(first_slot, first_slot + num_slots)
            self._halves = [
                (
                    tensor[slots, : tensor.shape[1] // 2, :num_tokens],
                    tensor[slots, tensor.shape[1] // 2 :, :num_tokens],
                )
                for tensor in self.tensors
            ]
            self._halves_of = wanted
        return self._halves[index]

    def copy(self, pairs: Iterable[tuple[int, int, int]]) -> None:
        """Copy for each (source, target, n) the first n tokens of one slot to another.

        As if all sources were read before any target is written.
        """
        pairs = [pair for pair in pairs if pair[2] > 0 and pair[0] != pair[1]]
        if not pairs:
            return
        sources, targets, counts = (list(column) for column in zip(*pairs, strict=True))
        self.grow(max(*sources, *targets) + 1, max(counts))
        if len(pairs) <= _MAX_SLICED_PAIRS and not set(sources) & set(targets):
            for tensor in self.tensors:
                for source, target, count in pairs:
                    tensor[target, :, :count].copy_(tensor[source, :, :count])
            return
        longest = max(counts)
        for tensor in self.tensors:
            history = tensor[:, :, :longest]
            index = torch.tensor([sources, targets], device=tensor.device)
            history.index_copy_(0, index[1], history.index_select(0, index[0]))

    def _resize(self, index: int) -> None:
        old = self.tensors[index]
        shape = (self._num_slots, old.shape[1], self._num_tokens, old.shape[3])
        # Zeros, not empty memory: masked positions must stay finite, since 0 * NaN is NaN.
        new = torch.zeros(shape, dtype=old.dtype, device=old.device)
        slots, tokens = min(old.shape[0], shape[0]), min(old.shape[2], shape[2])
        new[:slots, :, :tokens] = old[:slots, :, :tokens]
        self.tensors[index] = new


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
    """A `SlotStorage` as a Hugging Face model's cache: two tensors a layer, keys and values."""

    def __init__(self, storage: SlotStorage) -> None:
        super().__init__(layers=[])
        self._storage = storage
        self._indices: dict[int, tuple[int, int]] = {}
        """Of a layer, where in the storage its keys and values are."""
        self._span: Span | None = None

    def open_span(self, span: Span, *, num_slots: int) -> None:
        """Set what the next forward pass writes; `num_slots` is one more than its largest slot."""
        self._span = span
        self._storage.grow(num_slots, span.length)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write [N, heads, T, dim] at the open span, return [N, heads, length, dim]."""
        if self._span is None:
            raise RuntimeError("expected an open span before the model's forward pass")
        if layer_idx not in self._indices:
            self._indices[layer_idx] = self._added(key_states), self._added(value_states)
        keys, values = (self._storage.tensors[index] for index in self._indices[layer_idx])
        return _write(keys, key_states, self._span), _write(values, value_states, self._span)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """History length of the open span; models only compare it with 0."""
        return 0 if self._span is None else self._span.length

    def _added(self, like: Tensor) -> int:
        self._storage.add(
            heads=like.shape[1], dim=like.shape[3], dtype=like.dtype, device=like.device
        )
        return len(self._storage.tensors) - 1


def rounded_length(num_tokens: int, *, max_tokens: int) -> int:
    """`num_tokens` rounded up to a block, at most `max_tokens`."""
    return min(-(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS, max_tokens)


def is_leading(slots: Sequence[int]) -> bool:
    """The slots are 0 .. n-1 in order."""
    return list(slots) == list(range(len(slots)))


def _grown(current: int, needed: int, first: int, most: int) -> int:
    if needed <= current:
        return current
    return max(needed, min(max(2 * current, first), most))


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
