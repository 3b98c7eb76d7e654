"""The Hugging Face forward pass over key-value slots, for models without a fused one.

Raggedness is padded on the left. Only the wanted tokens reach the vocabulary projection: a hook on
the output embeddings picks their rows, since a row of logits can be far larger than all the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mentor_serve.engines.slots.kv_cache import (
    SlotCache,
    SlotStorage,
    Span,
    is_leading,
    rounded_length,
)
from mentor_serve.engines.slots.read_plan import Ragged, offsets_in


class PaddedForward:
    """Passes of any full-attention Hugging Face model over a `SlotStorage`."""

    max_padding = 256
    """Padding that one pass may hold before splitting it pays."""

    def __init__(self, model: Any, storage: SlotStorage, *, max_tokens: int) -> None:
        self._model = model
        self._cache = SlotCache(storage)
        self._max_tokens = max_tokens
        self._device: torch.device = model.device
        self._dtype: torch.dtype = model.dtype

    def max_cells(self, length: int) -> int:
        """Padded tokens that one pass may hold over a history of `length` tokens."""
        return max(16, min(8192, 2**25 // length))

    def decode(self, token_ids: Tensor, positions: Tensor, *, length: int) -> Tensor:
        """Read [n] tokens at [n] positions of slots 0 .. n-1 -> float32 logits [n, V].

        `length` is the longest history, the new token included.
        """
        num_rows = token_ids.shape[0]
        span = Span(
            slots=torch.arange(num_rows, device=self._device),
            is_leading=True,
            positions=positions.unsqueeze(1),
            kept=None,
            length=rounded_length(length, max_tokens=self._max_tokens),
        )
        self._cache.open_span(span, num_slots=num_rows)
        return self._logits(token_ids.unsqueeze(1), span, logits_to_keep=1)[:, -1]

    def read(self, ragged: Ragged) -> Tensor:
        """Read one pass -> float32 logits of the wanted tokens [m, V]."""
        width = int(ragged.counts.max())
        padding = width - ragged.counts
        rows = np.repeat(np.arange(len(ragged.slots)), ragged.counts)
        columns = offsets_in(ragged.counts) + padding[rows]
        padded = np.zeros((2, len(ragged.slots), width), np.int64)
        padded[0, rows, columns] = ragged.token_ids
        padded[1, rows, columns] = ragged.starts[rows] + offsets_in(ragged.counts)
        token_ids, positions = torch.from_numpy(padded).to(self._device)
        kept = self._index(rows, columns)
        span = Span(
            slots=torch.from_numpy(ragged.slots).to(self._device),
            is_leading=is_leading(ragged.slots.tolist()),
            positions=positions,
            kept=kept if padding.any() else None,
            length=rounded_length(int(ragged.ends.max()), max_tokens=self._max_tokens),
        )
        self._cache.open_span(span, num_slots=int(ragged.slots.max()) + 1)
        picked = _Picked(*self._index(rows[ragged.wanted], columns[ragged.wanted]))
        head = self._model.get_output_embeddings().register_forward_pre_hook(picked)
        try:
            logits = self._logits(token_ids, span, logits_to_keep=0)
        finally:
            head.remove()
        return logits[0] if picked.is_done else logits[picked.rows, picked.columns]

    def _index(self, *arrays: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Tensor, Tensor]:
        rows, columns = torch.from_numpy(np.stack(arrays)).to(self._device)
        return rows, columns

    def _logits(self, token_ids: Tensor, span: Span, *, logits_to_keep: int) -> Tensor:
        columns = torch.arange(span.length, device=self._device)
        hidden = columns > span.positions.unsqueeze(-1)
        # Additive and finite: right for eager and sdpa, and a row of padding makes no NaN.
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        mask.masked_fill_(hidden, torch.finfo(self._dtype).min)
        output = self._model(
            input_ids=token_ids,
            attention_mask=mask.unsqueeze(1),
            position_ids=span.positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )
        logits: Tensor = output.logits.float()
        return logits


class _Picked:
    """Forward pre-hook: of hidden states [N, T, hidden] only some go on, as [1, m, hidden]."""

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self.rows = rows
        self.columns = columns
        self.is_done = False
        """False where the model projects without calling the module; then all rows are there."""

    def __call__(self, _module: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        self.is_done = True
        return (args[0][self.rows, self.columns].unsqueeze(0), *args[1:])
