"""Which forward pass serves a model: the fused one, once it has shown that it is right.

A change in the model's library or an unusual checkpoint could make the fused pass compute something
else. So it is tried on a few tokens when it is built: reading rows of different lengths and
decoding on must give the logits of the Hugging Face forward.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import structlog
import torch
from torch import Tensor

from mentor_serve.engines.slots.fused import FusedForward
from mentor_serve.engines.slots.kv_cache import SlotStorage
from mentor_serve.engines.slots.padded import PaddedForward
from mentor_serve.engines.slots.read_plan import Ragged

log = structlog.get_logger(__name__)

_TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits, relative to the largest logit, that rounding may explain.

In half precision the two round at different places, and that adds up over the layers."""
_PROBE_LENGTHS = (6, 3)


def build_forward(
    model: Any, *, max_slots: int, max_tokens: int
) -> tuple[FusedForward | PaddedForward, SlotStorage]:
    """The fastest forward that gives the model's logits, and the storage that it works on."""
    storage = SlotStorage(max_slots=max_slots, max_tokens=max_tokens)
    if FusedForward.supports(model) is None:
        deviation, tolerance = fused_deviation(model), _TOLERANCES[model.dtype]
        if deviation <= tolerance:
            forward = FusedForward(model, storage, max_slots=max_slots, max_tokens=max_tokens)
            return forward, storage
        log.warning(
            "the fused forward disagrees with the model's own, which is used instead: slower, but "
            "right; please report the model's configuration",
            model=type(model).__name__,
            deviation=deviation,
            tolerance=tolerance,
        )
    return PaddedForward(model, storage, max_tokens=max_tokens), storage


@torch.inference_mode()
def fused_deviation(model: Any) -> float:
    """Largest difference of fused from Hugging Face logits, relative to the largest of these.

    NaN where either of them is not finite. The model must be in eval mode.
    """
    vocab_size = int(model.get_output_embeddings().weight.shape[0])
    sequences = [(np.arange(1, n + 1) * 7919 + n) % vocab_size for n in _PROBE_LENGTHS]
    got = _fused_logits(model, sequences)
    expected = torch.cat([_own_logits(model, tokens) for tokens in sequences])
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _fused_logits(model: Any, sequences: list[np.ndarray[Any, np.dtype[np.int64]]]) -> Tensor:
    """After every token of the sequences, flat: all but the last read at once, that decoded."""
    num_rows, most = len(sequences), max(_PROBE_LENGTHS)
    storage = SlotStorage(max_slots=num_rows, max_tokens=most)
    fused = FusedForward(model, storage, max_slots=num_rows, max_tokens=most)
    ragged = Ragged.of(
        slots=range(num_rows),
        starts=np.zeros(num_rows, np.int64),
        token_ids=[tokens[:-1] for tokens in sequences],
        wanted=[range(len(tokens) - 1) for tokens in sequences],
    )
    read = fused.read(ragged)
    last = torch.tensor([int(tokens[-1]) for tokens in sequences], device=model.device)
    lengths = torch.from_numpy(ragged.counts).to(model.device)
    decoded = fused.decode(last, lengths, length=most)
    ends = ragged.counts.cumsum()
    parts = [
        part
        for row, (end, count) in enumerate(zip(ends, ragged.counts, strict=True))
        for part in (read[end - count : end], decoded[row : row + 1])
    ]
    return torch.cat(parts)


def _own_logits(model: Any, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
    ids = torch.from_numpy(tokens).to(model.device).unsqueeze(0)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    return logits
