"""Log-probabilities of response tokens under a Hugging Face causal LM, with gradients.

Logits exist only at positions that predict a response token, and only for a chunk of tokens at a
time: memory for logits is bounded whatever the number of tokens or the size of the vocabulary.
Shapes: N response tokens, D hidden size, V vocabulary, R rows, L row length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mentor_serve.learner.packing import MicroBatch

MAX_CHUNK_ELEMENTS = 2**26
"""Largest number of logits alive at a time, a few copies of them apart: 256 MB in float32."""


class ResponseScorer:
    """Computes log pi_theta(token) for the response tokens of micro-batches.

    Models whose logits are more than `head(hidden)` (a soft cap, a scale) are detected once, by
    comparison, and go through their own `forward`, which computes logits at every position.
    """

    def __init__(self, model: PreTrainedModel, *, temperature: float) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature}")
        self._model = model
        self._temperature = temperature
        self._base: Any = model.base_model
        self._head: Any = model.get_output_embeddings()
        self._is_plain_head = self._check_head()

    def __call__(self, micro_batch: MicroBatch) -> Tensor:
        """log pi_theta of each target at the sampling temperature: [N] float32."""
        inputs = {
            "input_ids": micro_batch.input_ids,
            "position_ids": micro_batch.position_ids,
            "attention_mask": self._mask(micro_batch.attention_mask),
            "use_cache": False,
        }
        if not self._is_plain_head:
            logits_RLV = self._model(**inputs).logits
            logits_NV = logits_RLV.flatten(0, 1)[micro_batch.predicts]
            return _target_logprobs(logits_NV, micro_batch.targets, self._temperature)
        hidden_RLD = self._base(**inputs).last_hidden_state
        hidden_ND = hidden_RLD.flatten(0, 1)[micro_batch.predicts]
        return self._chunked(hidden_ND, micro_batch.targets)

    def _chunked(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        vocabulary = self._head.weight.shape[0]
        size = max(1, MAX_CHUNK_ELEMENTS // vocabulary)
        if len(targets_N) <= size:
            return self._score(hidden_ND, targets_N)
        # Each chunk's logits are computed again in the backward pass instead of being kept.
        parts = [
            checkpoint(self._score, hidden, targets, use_reentrant=False, preserve_rng_state=False)
            for hidden, targets in zip(
                torch.split(hidden_ND, size), torch.split(targets_N, size), strict=True
            )
        ]
        return torch.cat(parts)

    def _score(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        return _target_logprobs(self._head(hidden_ND), targets_N, self._temperature)

    def _mask(self, allowed: Tensor) -> Tensor:
        if self._model.config._attn_implementation == "sdpa":
            return allowed
        # Eager attention adds the mask to the scores.
        dtype = self._model.dtype
        blocked = torch.finfo(dtype).min
        return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, blocked)

    @torch.no_grad()
    def _check_head(self) -> bool:
        if self._head is None or self._base is self._model:
            return False
        ids = torch.arange(4, device=self._model.device)[None] % self._model.config.vocab_size
        logits = self._model(input_ids=ids, use_cache=False).logits
        plain = self._head(self._base(input_ids=ids, use_cache=False).last_hidden_state)
        return logits.shape == plain.shape and torch.allclose(logits, plain, rtol=1e-4, atol=1e-5)


def _target_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    scaled = logits_NV.float() / temperature
    chosen_N = scaled.gather(-1, targets_N[:, None]).squeeze(-1)
    return chosen_N - scaled.logsumexp(dim=-1)
