"""A causal language model that keeps many sequences in key-value slots.

`decode` advances slots 0 .. n-1 by one token each (the hot path); `read` takes different numbers of
tokens into any slots and returns the logits that are wanted. Models of the Llama family run on a
fused forward pass, every other full-attention model that takes explicit positions and a ready
attention mask on its own; the rest are refused when the model is handed over.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mentor_serve.engines.slots.fused import FusedForward
from mentor_serve.engines.slots.probe import build_forward
from mentor_serve.engines.slots.read_plan import Ragged, passes
from mentor_serve.errors import EngineError

TokenRow = Sequence[int] | NDArray[np.integer[Any]]
"""Token ids, or offsets into them."""

_FULL = "full_attention"
_WINDOWED = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
DEFAULT_MAX_MODEL_LEN = 4096


class SlotModel:
    """A model with `max_slots` sequences of up to `max_tokens` tokens each.

    Sets eval mode. The weights may be changed in place between calls, but not moved or replaced.
    Call under `torch.inference_mode`.

    Raises:
        EngineError: a model whose sequences cannot live in key-value slots.
    """

    def __init__(self, model: Any, *, max_slots: int, max_tokens: int) -> None:
        check_supported(model, max_tokens=max_tokens)
        self.model = model.eval()
        self.device: torch.device = model.device
        self.max_tokens = max_tokens
        self.lengths: NDArray[np.int64] = np.zeros(max_slots, np.int64)
        """[max_slots] How many tokens each slot has read."""
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.num_passes = 0
        self.num_tokens_read = 0
        self._forward, self._storage = build_forward(
            self.model, max_slots=max_slots, max_tokens=max_tokens
        )

    @property
    def is_fused(self) -> bool:
        """The model runs on the fused forward pass and not on its own."""
        return isinstance(self._forward, FusedForward)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token of one slot, over all layers."""
        if not self._storage.tensors:
            # The model's own forward shows its shapes when it first runs; no slot is in use yet.
            with torch.inference_mode():
                zero = torch.zeros(1, dtype=torch.int64, device=self.device)
                self._forward.decode(zero, zero, length=1)
        return self._storage.bytes_per_token

    @property
    def footprint(self) -> int:
        """Bytes that the keys and values of all slots hold now, used or not."""
        return self._storage.footprint

    def reserve(self, num_slots: int, num_tokens: int) -> None:
        """Hold exactly `num_slots` slots of `num_tokens` tokens, or as many as are in use.

        Grows or reshapes the storage ahead of need (fewer slots, longer); one tensor at a time, so
        that only one is ever held twice. Without it the storage grows by doubling.

        Raises:
            EngineError: more than `max_slots` or `max_tokens`.
        """
        used = np.flatnonzero(self.lengths)
        num_used = int(used[-1]) + 1 if len(used) else 0
        self._storage.reshape(
            max(num_slots, num_used), max(num_tokens, int(self.lengths.max(initial=0)))
        )

    def decode(
        self,
        token_ids: Tensor,
        positions: Tensor | None = None,
        *,
        active: NDArray[np.bool_] | None = None,
    ) -> Tensor:
        """Read one token into each of the slots 0 .. n-1: [n] -> float32 logits [n, V].

        Args:
            token_ids: [n] on the model's device.
            positions: [n] the slots' lengths, if they are on the device already.
            active: [n] rows that are False are dummies: computed along, their logits mean nothing,
                their lengths stay. What is written beyond a length is overwritten when the slot
                reads on. A dummy that is full (`max_tokens` long) loses the keys and values of its
                last token, which matter only to tokens that would come after it.

        Raises:
            EngineError: a slot is full.
        """
        num_rows = token_ids.shape[0]
        lengths = self.lengths[:num_rows]
        longest = int(lengths.max())
        if longest >= self.max_tokens:
            self._check_room(lengths if active is None else lengths[active])
            longest = self.max_tokens - 1
            positions = None
        if positions is None:
            places = torch.from_numpy(np.minimum(lengths, longest))
            positions = places.to(self.device, non_blocking=True)
        logits = self._forward.decode(token_ids, positions, length=longest + 1)
        lengths += 1 if active is None else active
        self.num_passes += 1
        self.num_tokens_read += num_rows if active is None else int(active.sum())
        return logits

    def read(
        self, slots: Sequence[int], token_ids: Sequence[TokenRow], wanted: Sequence[TokenRow]
    ) -> Tensor:
        """Read `token_ids[i]` (at least one) into `slots[i]` (all different).

        Args:
            slots: any slots, in any order.
            token_ids: rows of any lengths; long ones are read in chunks.
            wanted: for each row increasing offsets into its tokens, maybe none.

        Returns:
            Float32 logits after the wanted tokens, flat in row order: [sum of len(wanted[i]), V].

        Raises:
            EngineError: arguments that contradict this, or a slot would overflow.
        """
        ragged = Ragged.of(
            slots=slots,
            starts=self.lengths[np.asarray(slots, np.int64)],
            token_ids=token_ids,
            wanted=wanted,
        )
        self._check_room(ragged.ends - 1)
        max_cells = self._forward.max_cells(int(ragged.ends.max()))
        parts = passes(ragged, max_cells=max_cells, max_padding=self._forward.max_padding)
        logits = torch.empty((0, self.vocab_size), device=self.device)
        for part, which in parts:
            some = self._forward.read(part)
            self.lengths[part.slots] = part.ends
            self.num_passes += 1
            self.num_tokens_read += len(part.token_ids)
            if len(which) == len(ragged.wanted):
                logits = some
            elif len(which):
                if not len(logits):
                    logits = some.new_empty((len(ragged.wanted), self.vocab_size))
                logits[torch.from_numpy(which).to(self.device)] = some
        return logits

    def extend(self, slots: Sequence[int], token_ids: Sequence[TokenRow]) -> Tensor:
        """`read` that returns the logits after the last token of every row: float32 [n, V]."""
        return self.read(slots, token_ids, [(len(row) - 1,) for row in token_ids])

    def score(
        self, slot: int, token_ids: Sequence[int], *, chunk_tokens: int = 256
    ) -> list[Tensor]:
        """Read tokens into one slot and return the logits after each, in chunks [chunk, V]."""
        chunks = [
            token_ids[start : start + chunk_tokens]
            for start in range(0, len(token_ids), chunk_tokens)
        ]
        return [self.read([slot], [chunk], [range(len(chunk))]) for chunk in chunks]

    def copy(self, source: int, targets: Sequence[int], *, num_tokens: int) -> None:
        """Give other slots the first `num_tokens` tokens of one slot."""
        self._storage.copy([(source, target, num_tokens) for target in targets])
        self.lengths[list(targets)] = num_tokens

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Move sequences to other slots, pair by pair; the sources are left empty."""
        if not len(sources):
            return
        from_slots, to_slots = list(sources), list(targets)
        lengths = self.lengths[from_slots]
        self._storage.copy(zip(from_slots, to_slots, lengths.tolist(), strict=True))
        self.lengths[from_slots] = 0
        self.lengths[to_slots] = lengths

    def truncate(self, slot: int, num_tokens: int) -> None:
        """Forget what a slot read beyond its first `num_tokens` tokens."""
        self.lengths[slot] = min(self.lengths[slot], num_tokens)

    def _check_room(self, lengths: NDArray[np.int64]) -> None:
        """The tokens at these positions must fit."""
        longest = int(lengths.max(initial=-1))
        if longest >= self.max_tokens:
            raise EngineError(
                f"key-value slots: expected at most {self.max_tokens} tokens a sequence, asked for "
                f"{longest + 1}; use a larger max_model_len or shorter requests"
            )


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
