"""Padding-free packing: several sequences in one row that cannot see each other.

Pure functions. The learner shifts targets itself; nothing here knows about losses.
Shape: T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """One forward pass worth of sequences, end to end."""

    input_ids: Tensor
    """[1, T] token ids."""
    position_ids: Tensor
    """[1, T]; restart at 0 with every sequence."""
    attention_mask: Tensor
    """[1, 1, T, T] bool, true where the query (row) may see the key (column): causal inside a
    sequence, nothing across sequences."""
    sequence_index: Tensor
    """[T]: which of the packed sequences (index into the caller's list) a token belongs to."""


def plan_rows(lengths: Sequence[int], max_tokens_per_row: int) -> list[list[int]]:
    """Assign sequences to rows first-fit, in the order given; returns indices per row.

    A sequence longer than the budget gets a row of its own.
    Worked value: lengths (3, 4, 2) with 5 tokens a row give [[0, 2], [1]].

    Raises:
        ValueError: a length or the budget below 1.
    """
    if max_tokens_per_row < 1:
        raise ValueError(f"max_tokens_per_row: expected at least 1, got {max_tokens_per_row}")
    rows: list[list[int]] = []
    free: list[int] = []
    for index, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"sequence {index}: expected at least one token, got {length}")
        for row, room in enumerate(free):
            if length <= room:
                rows[row].append(index)
                free[row] -= length
                break
        else:
            rows.append([index])
            free.append(max_tokens_per_row - length)
    return rows


def pack_sequences(sequences: Sequence[Tensor], max_tokens_per_row: int) -> list[PackedRow]:
    """Pack 1-d int64 tensors [T_i] into rows of at most `max_tokens_per_row` tokens (`plan_rows`).

    Every token occurs exactly once; tensors stay on the device of the sequences.

    Raises:
        ValueError: an empty sequence, one that is not 1-d, or a budget below 1.
    """
    for index, sequence in enumerate(sequences):
        if sequence.ndim != 1:
            raise ValueError(f"sequence {index}: expected shape [T], got {tuple(sequence.shape)}")
    lengths = [sequence.numel() for sequence in sequences]
    return [_build_row(sequences, row) for row in plan_rows(lengths, max_tokens_per_row)]


def _build_row(sequences: Sequence[Tensor], indices: list[int]) -> PackedRow:
    parts = [sequences[index] for index in indices]
    device = parts[0].device
    sequence_index = torch.cat(
        [
            torch.full((part.numel(),), index, dtype=torch.int64, device=device)
            for index, part in zip(indices, parts, strict=True)
        ]
    )
    positions = torch.cat([torch.arange(part.numel(), device=device) for part in parts])
    same = sequence_index.unsqueeze(0) == sequence_index.unsqueeze(1)
    causal = positions.unsqueeze(0) <= positions.unsqueeze(1)
    return PackedRow(
        input_ids=torch.cat(parts).unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        attention_mask=(same & causal)[None, None],
        sequence_index=sequence_index,
    )
