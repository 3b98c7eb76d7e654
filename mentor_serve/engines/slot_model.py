"""A Hugging Face causal language model that keeps many sequences in key-value slots.

`decode` advances slots 0 .. n-1 by one token each (the hot path); `extend` reads different
numbers of tokens into any slots. Works for every full-attention model that takes explicit
positions and a ready attention mask; others are refused when the model is handed over.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mentor_serve.engines.kv_cache import SlotCache, Span, rounded_length
from mentor_serve.errors import EngineError

_FULL = "full_attention"
_WINDOWED = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
_MAX_PASS_TOKENS = 8192
"""Padded tokens of one pass of `extend`; more are cut into several passes."""
_MAX_PADDING = 256
"""Padding that one pass of `extend` may hold before splitting it pays."""
DEFAULT_MAX_MODEL_LEN = 4096


class SlotModel:
    """A model with `max_slots` sequences of up to `max_tokens` tokens each.

    `lengths[slot]` is the number of tokens a slot has read. Call under `torch.inference_mode`.
    """

    def __init__(self, model: Any, *, max_slots: int, max_tokens: int) -> None:
        check_supported(model, max_tokens=max_tokens)
        self.model = model.eval()
        self.device: torch.device = model.device
        self.max_tokens = max_tokens
        self.lengths = [0] * max_slots
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.num_passes = 0
        self.num_tokens_read = 0
        self._cache = SlotCache(max_slots=max_slots, max_tokens=max_tokens)
        self._mask_dtype: torch.dtype = model.dtype

    def decode(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Read one token into each of the slots 0 .. n-1: [n], [n] -> float32 logits [n, V].

        `positions` are the slots' lengths before the call.
        """
        num_rows = token_ids.shape[0]
        longest = max(self.lengths[:num_rows]) + 1
        span = Span(
            slots=torch.arange(num_rows, device=self.device),
            is_leading=True,
            positions=positions.unsqueeze(1),
            kept=None,
            length=rounded_length(longest, max_tokens=self.max_tokens),
        )
        self._cache.open_span(span, num_slots=num_rows)
        logits = self._forward(token_ids.unsqueeze(1), span, keep=1)[:, -1]
        for slot in range(num_rows):
            self.lengths[slot] += 1
        self.num_tokens_read += num_rows
        return logits

    def extend(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Read `token_ids[i]` (at least one) into `slots[i]`; returns the logits after the last.

        Float32 [n, V], in the order given.
        Raggedness is padded on the left; rows of very different length go in separate passes.
        """
        logits: Tensor | None = None
        for rows in _passes([len(tokens) for tokens in token_ids]):
            part = self._extend_pass(
                [slots[row] for row in rows], [token_ids[row] for row in rows], keep=1
            )[:, -1]
            if len(rows) == len(slots):
                inverse = torch.empty(len(rows), dtype=torch.int64)
                inverse[torch.tensor(rows)] = torch.arange(len(rows))
                return part[inverse.to(self.device)]
            if logits is None:
                logits = part.new_empty((len(slots), part.shape[1]))
            logits[torch.tensor(rows, device=self.device)] = part
        if logits is None:
            raise EngineError("extend: expected at least one slot, got none")
        return logits

    def score(
        self, slot: int, token_ids: Sequence[int], *, chunk_tokens: int = 256
    ) -> list[Tensor]:
        """Read tokens into one slot and return the logits after each, in chunks [chunk, V]."""
        return [
            self._extend_pass([slot], [token_ids[start : start + chunk_tokens]], keep=0)[0]
            for start in range(0, len(token_ids), chunk_tokens)
        ]

    def copy(self, source: int, targets: Sequence[int], *, num_tokens: int) -> None:
        """Give other slots the first `num_tokens` tokens of one slot."""
        self._cache.copy([source] * len(targets), targets, num_tokens=num_tokens)
        for target in targets:
            self.lengths[target] = num_tokens

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Move sequences to other slots, pair by pair; the sources are left empty."""
        longest = max((self.lengths[source] for source in sources), default=0)
        self._cache.copy(sources, targets, num_tokens=longest)
        for source, target in zip(sources, targets, strict=True):
            self.lengths[target] = self.lengths[source]
            self.lengths[source] = 0

    def truncate(self, slot: int, num_tokens: int) -> None:
        """Forget what a slot read beyond its first `num_tokens` tokens."""
        self.lengths[slot] = min(self.lengths[slot], num_tokens)

    def _extend_pass(
        self, slots: Sequence[int], token_ids: Sequence[Sequence[int]], *, keep: int
    ) -> Tensor:
        width = max(len(tokens) for tokens in token_ids)
        padding = [width - len(tokens) for tokens in token_ids]
        starts = [self.lengths[slot] for slot in slots]
        padded = [[0] * pad + list(row) for pad, row in zip(padding, token_ids, strict=True)]
        columns = torch.arange(width)
        offsets = columns.unsqueeze(0) - torch.tensor(padding).unsqueeze(1)
        positions = torch.tensor(starts).unsqueeze(1) + offsets.clamp(min=0)
        ends = [start + len(row) for start, row in zip(starts, token_ids, strict=True)]
        kept = (offsets >= 0).nonzero(as_tuple=True) if any(padding) else None
        span = Span(
            slots=torch.tensor(slots, device=self.device),
            is_leading=list(slots) == list(range(len(slots))),
            positions=positions.to(self.device),
            kept=None if kept is None else (kept[0].to(self.device), kept[1].to(self.device)),
            length=rounded_length(max(ends), max_tokens=self.max_tokens),
        )
        self._cache.open_span(span, num_slots=max(slots) + 1)
        logits = self._forward(torch.tensor(padded, device=self.device), span, keep=keep)
        for slot, end in zip(slots, ends, strict=True):
            self.lengths[slot] = end
        self.num_tokens_read += sum(len(tokens) for tokens in token_ids)
        return logits

    def _forward(self, token_ids: Tensor, span: Span, *, keep: int) -> Tensor:
        columns = torch.arange(span.length, device=self.device)
        hidden = columns > span.positions.unsqueeze(-1)
        # Additive and finite: right for eager and sdpa, and a row of padding makes no NaN.
        mask = torch.zeros(hidden.shape, dtype=self._mask_dtype, device=self.device)
        mask.masked_fill_(hidden, torch.finfo(self._mask_dtype).min)
        output = self.model(
            input_ids=token_ids,
            attention_mask=mask.unsqueeze(1),
            position_ids=span.positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        self.num_passes += 1
        logits: Tensor = output.logits.float()
        return logits


def check_supported(model: Any, *, max_tokens: int) -> None:
    """Refuse a model whose sequences cannot live in key-value slots.

    Raises:
        EngineError: naming what was expected of the model and what it has instead.
    """
    name, config = type(model).__name__, model.config
    parameters = inspect.signature(model.forward).parameters
    for needed in ("position_ids", "past_key_values", "attention_mask", "logits_to_keep"):
        if needed not in parameters:
            raise EngineError(f"{name}: expected a causal LM whose forward takes {needed}")
    attention = getattr(config, "_attn_implementation", "sdpa")
    if attention not in ("sdpa", "eager"):
        raise EngineError(
            f"{name}: expected attention `sdpa` or `eager`, got {attention!r}; load it with "
            "attn_implementation='sdpa'"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise EngineError(f"{name}: expected a decoder-only model, got an encoder-decoder")
    for kind in _layer_kinds(config):
        window = getattr(config, _WINDOWED.get(kind, ""), None)
        # A window that no sequence outgrows is full attention.
        if kind != _FULL and (window is None or window < max_tokens):
            raise EngineError(
                f"{name}: expected full attention in every layer, got {kind} (window {window}); "
                f"use another model or a max_model_len of at most the window, not {max_tokens}"
            )


def default_max_tokens(model: Any) -> int:
    """The model's own context length, at most `DEFAULT_MAX_MODEL_LEN`."""
    length = getattr(model.config, "max_position_embeddings", None)
    return min(int(length or DEFAULT_MAX_MODEL_LEN), DEFAULT_MAX_MODEL_LEN)


def _layer_kinds(config: Any) -> set[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds)
    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    recurrent = any(hasattr(config, key) for key in ("ssm_cfg", "state_size", "mamba_d_state"))
    return {"linear_attention"} if recurrent else {"sliding_attention" if windowed else _FULL}


def _passes(lengths: Sequence[int]) -> list[list[int]]:
    """Cut rows, longest first, into passes with little padding and a bounded size."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    passes: list[list[int]] = []
    padding = 0
    for row in order:
        if passes:
            width = lengths[passes[-1][0]]
            padding += width - lengths[row]
            size = width * (len(passes[-1]) + 1)
            if padding <= _MAX_PADDING and size <= _MAX_PASS_TOKENS:
                passes[-1].append(row)
                continue
        passes.append([row])
        padding = 0
    return passes
