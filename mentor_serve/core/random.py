"""Counter-based uniforms: every random draw is a function of what it is for.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised
on int64 tensors that hold unsigned 32-bit words. There is no generator state, so a draw does not
depend on batch composition, order of admission or device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds of Philox4x32 on int64 tensors of one broadcastable shape, words in [0, 2**32).

    Known answer: counter 0, key 0 -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply_wide(_MULTIPLIERS[0], c0)
        high_1, low_1 = _multiply_wide(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 = (k0 + _WEYL[0]) & _MASK_32
        k1 = (k1 + _WEYL[1]) & _MASK_32
    return c0, c1, c2, c3


def uniforms(seed_B: Tensor, sample_B: Tensor, position_B: Tensor, stream: int | Tensor) -> Tensor:
    """Float64 uniforms in [0, 1) with 53 random bits, one for each broadcast entry: [B] -> [B].

    A value depends on its own `(seed, sample, position, stream)` only; `stream` tells apart the
    purposes of draws at one position. Seeds are int64 (all 64 bits count); sample, position and
    stream count modulo 2**32.
    """
    word_0, word_1 = _words(seed_B, sample_B, position_B, stream)[:2]
    return ((word_0 >> 5) * 2**26 + (word_1 >> 6)).to(torch.float64) * 2.0**-53


def derived_seeds(
    seed_B: Tensor, sample_B: Tensor, position_B: Tensor, stream: int | Tensor
) -> Tensor:
    """Non-negative int64 seeds for another generator, derived like `uniforms`: [B] -> [B]."""
    word_0, word_1 = _words(seed_B, sample_B, position_B, stream)[2:]
    return ((word_0 >> 1) << 32) | word_1


def _words(seed_B: Tensor, sample_B: Tensor, position_B: Tensor, stream: int | Tensor) -> Words:
    if not isinstance(stream, Tensor):
        stream = torch.tensor(stream, dtype=torch.int64, device=seed_B.device)
    seed = seed_B.to(torch.int64)
    counter = (
        position_B.to(torch.int64) & _MASK_32,
        sample_B.to(torch.int64) & _MASK_32,
        stream & _MASK_32,
        torch.zeros_like(seed),
    )
    return philox4x32(counter, (seed & _MASK_32, (seed >> 32) & _MASK_32))


def _multiply_wide(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, by 16-bit halves to stay below 2**63."""
    low_part = factor * (word & 0xFFFF)
    high_part = factor * (word >> 16) + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)
