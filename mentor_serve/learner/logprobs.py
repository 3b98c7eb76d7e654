"""Log-probabilities and entropies of response tokens under a Hugging Face causal LM.

Logits exist only at positions that predict a response token, and only for a chunk of tokens at a
time: memory for logits is bounded whatever the number of tokens or the size of the vocabulary.
Shapes: N response tokens, D hidden size, V vocabulary, R rows, L row length.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mentor_serve.core.entropy import token_entropy
from mentor_serve.learner.linear_logprobs import linear_logprobs
from mentor_serve.learner.packing import MicroBatch

MAX_CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
"""Most logits alive at a time: 32 and 512 MB in float32. Larger ones are no faster on a CPU; a GPU
needs them to be busy."""
_MIN_CHUNK_TOKENS = 32
"""Fewer tokens at a time would read the whole head for too little work."""


class ResponseScorer:
    """Computes log pi_theta(token) for the response tokens of micro-batches.

    Models whose logits are more than `head(hidden)` (a soft cap, a scale) are detected once, by
    comparison, and go through their own `forward`, which computes logits at every position.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float,
        autocast: Literal["none", "bfloat16"] = "none",
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature}")
        self._model = model
        self.temperature = temperature
        """Of the log-probabilities; may be changed between two calls."""
        self._autocast_dtype = torch.bfloat16 if autocast == "bfloat16" else None
        self._base: Any = model.base_model
        self._head: Any = model.get_output_embeddings()
        self._is_plain_head = self._check_head()
        self._is_linear_head = type(self._head) is nn.Linear and self._head.bias is None
        # Taken now: a backend that partitions parameters leaves them empty between passes.
        self._chunk = (
            _chunk_size(int(self._head.weight.shape[0]), model.device) if self._is_plain_head else 1
        )

    def __call__(self, micro_batch: MicroBatch) -> Tensor:
        """log pi_theta of each target at the sampling temperature, with gradients: [N] float32."""
        with self._autocast():
            if not self._is_plain_head:
                logits_NV = self._logits(micro_batch)
                return _target_logprobs(logits_NV, micro_batch.targets, self.temperature)
            return self._chunked(self._hidden(micro_batch), micro_batch.targets)

    @torch.no_grad()
    def with_entropies(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (nats, at the sampling temperature), each [N] float32.

        Without gradients; logits exist for a chunk of tokens at a time.
        """
        with self._autocast():
            if self._is_plain_head:
                inputs_N = self._hidden(micro_batch)
                sizes = self._chunk
            else:
                inputs_N = self._logits(micro_batch)
                sizes = max(1, len(inputs_N))
            logprobs, entropies = [], []
            for part, targets in zip(
                torch.split(inputs_N, sizes),
                torch.split(micro_batch.targets, sizes),
                strict=True,
            ):
                logits = self._head(part) if self._is_plain_head else part
                logprobs.append(_target_logprobs(logits, targets, self.temperature))
                entropies.append(token_entropy(logits.float() / self.temperature))
            return torch.cat(logprobs), torch.cat(entropies)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(
            self._model.device.type,
            dtype=self._autocast_dtype or torch.bfloat16,
            enabled=self._autocast_dtype is not None,
        )

    def _hidden(self, micro_batch: MicroBatch) -> Tensor:
        hidden_RLD = self._base(**self._inputs(micro_batch)).last_hidden_state
        hidden_ND: Tensor = hidden_RLD.flatten(0, 1)[micro_batch.predicts]
        return hidden_ND

    def _logits(self, micro_batch: MicroBatch) -> Tensor:
        logits_RLV = self._model(**self._inputs(micro_batch)).logits
        logits_NV: Tensor = logits_RLV.flatten(0, 1)[micro_batch.predicts]
        return logits_NV

    def _inputs(self, micro_batch: MicroBatch) -> dict[str, Any]:
        if micro_batch.attention_mask is None:
            # Without positions too: those of padding start again, which Transformers would read
            # as several sequences in a row, and build a mask for.
            return {"input_ids": micro_batch.input_ids, "use_cache": False}
        return {
            "input_ids": micro_batch.input_ids,
            "position_ids": micro_batch.position_ids,
            "attention_mask": self._mask(micro_batch.attention_mask),
            "use_cache": False,
        }

    def _chunked(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        size = self._chunk
        if self._is_linear_head and not hasattr(self._head.weight, "ds_id"):
            return linear_logprobs(
                hidden_ND,
                self._head.weight,
                targets_N,
                temperature=self.temperature,
                chunk_size=size,
                dtype=self._autocast_dtype or self._head.weight.dtype,
            )
        # A head with a bias or an adapter, or one that ZeRO-3 gathers in hooks of its `forward`.
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
        return _target_logprobs(self._head(hidden_ND), targets_N, self.temperature)

    def _mask(self, allowed: Tensor) -> Tensor:
        if self._model.config._attn_implementation == "sdpa":
            return allowed
        # Eager attention adds the mask to the scores.
        dtype = self._autocast_dtype or self._model.dtype
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


def _chunk_size(vocabulary: int, device: torch.device) -> int:
    most = MAX_CHUNK_ELEMENTS.get(device.type, MAX_CHUNK_ELEMENTS["cuda"])
    return max(_MIN_CHUNK_TOKENS, most // vocabulary)


def _target_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    scaled = logits_NV.float() / temperature
    chosen_N = scaled.gather(-1, targets_N[:, None]).squeeze(-1)
    return chosen_N - scaled.logsumexp(dim=-1)
