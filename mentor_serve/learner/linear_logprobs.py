"""Log-probabilities straight from hidden states and the output head, without keeping any logits.

`log softmax(h W^T / temperature)[target]` as one differentiable function: both passes compute the
logits of a chunk of tokens at a time, in one buffer, and the backward pass adds each chunk's part
of the weight's gradient to a single tensor. Plain autograd would keep logits of all tokens, or,
with checkpointed chunks, make a gradient as large as the weight for every chunk. The same idea for
cross-entropy: Hsu et al., "Liger Kernel", arXiv 2410.10989 (whose kernels need a GPU).
Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def linear_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    temperature: float,
    chunk_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """log softmax(hidden_ND @ weight_VD.T / temperature) at the targets: [N] float32.

    Args:
        hidden_ND: inputs of the output head; gets a gradient.
        weight_VD: the head's weight, without a bias; gets a gradient where it wants one.
        targets_N: token ids, [N] int64.
        temperature: divides the logits, > 0.
        chunk_size: tokens whose logits exist at a time; changes memory, not values.
        dtype: of the matrix products; the softmax is in float32.
    """
    result: Tensor = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N, temperature, chunk_size, dtype
    )
    return result


class _LinearLogprobs(torch.autograd.Function):
    """p = softmax(z), z = h W^T / T: d log p_y / d z = onehot(y) - p."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        temperature: float,
        chunk_size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        chosen_N = hidden_ND.new_empty(len(targets_N), dtype=_softmax_dtype(dtype))
        log_normalizer_N = torch.empty_like(chosen_N)
        logits = _ChunkLogits(hidden_ND, weight_VD, temperature, chunk_size, dtype)
        for part in logits.parts:
            logits_CV = logits(part)
            chosen_N[part] = logits_CV.gather(1, targets_N[part, None]).squeeze(1)
            # As torch.logsumexp, in the buffer instead of in two new ones.
            largest_C = logits_CV.amax(dim=1)
            logits_CV.sub_(largest_C[:, None]).exp_()
            log_normalizer_N[part] = logits_CV.sum(dim=1).log_().add_(largest_C)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, log_normalizer_N)
        ctx.options = (temperature, chunk_size, dtype)
        return chosen_N.sub_(log_normalizer_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> Any:
        hidden_ND, weight_VD, targets_N, log_normalizer_N = ctx.saved_tensors
        temperature, chunk_size, dtype = ctx.options
        needs_weight = ctx.needs_input_grad[1]
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD) if needs_weight else None
        logits = _ChunkLogits(hidden_ND, weight_VD, temperature, chunk_size, dtype)
        for part in logits.parts:
            scale_C1 = (grad_N[part] / temperature)[:, None]
            grad_CV = logits(part).sub_(log_normalizer_N[part, None]).exp_().mul_(-scale_C1)
            grad_CV.scatter_add_(1, targets_N[part, None], scale_C1)
            grad_CV = grad_CV.to(dtype)
            grad_hidden_ND[part] = grad_CV @ logits.weight_VD
            if grad_weight_VD is None:
                continue
            if grad_weight_VD.dtype == dtype:
                grad_weight_VD.addmm_(grad_CV.t(), hidden_ND[part].to(dtype))
            else:
                grad_weight_VD += grad_CV.t() @ hidden_ND[part].to(dtype)
        return grad_hidden_ND, grad_weight_VD, None, None, None, None


class _ChunkLogits:
    """Scaled logits of one chunk after the other; each call overwrites what the last one gave."""

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        temperature: float,
        chunk_size: int,
        dtype: torch.dtype,
    ) -> None:
        count = len(hidden_ND)
        self.weight_VD = weight_VD.to(dtype)
        self.parts = [
            slice(start, min(start + chunk_size, count)) for start in range(0, count, chunk_size)
        ]
        self._hidden_ND = hidden_ND
        self._temperature = temperature
        shape = (min(chunk_size, count), len(weight_VD))
        self._buffer_CV = torch.empty(shape, dtype=_softmax_dtype(dtype), device=hidden_ND.device)

    def __call__(self, part: slice) -> Tensor:
        buffer_CV = self._buffer_CV[: part.stop - part.start]
        hidden_CD = self._hidden_ND[part].to(self.weight_VD.dtype)
        with torch.autocast(hidden_CD.device.type, enabled=False):
            if buffer_CV.dtype == hidden_CD.dtype:
                torch.mm(hidden_CD, self.weight_VD.t(), out=buffer_CV)
            else:
                buffer_CV.copy_(hidden_CD @ self.weight_VD.t())
        return buffer_CV if self._temperature == 1.0 else buffer_CV.div_(self._temperature)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
