"""Cutting a ragged read into passes of bounded size.

Plain index arithmetic on the host: it knows lengths, offsets and slots, no model. Long rows are cut
into chunks that follow each other in later passes; rows of one pass have similar lengths, because
attention (and on some models everything) pads them to the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mentor_serve.errors import EngineError

LongArray = NDArray[np.int64]

CHUNK_TOKENS = 512
"""Tokens of one row that one pass reads at most."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ragged:
    """Tokens for several slots, flat in row order (N rows, M tokens, m wanted)."""

    slots: LongArray
    """[N] Slot of each row, all different."""
    starts: LongArray
    """[N] Position of each row's first token."""
    counts: LongArray
    """[N] Tokens of each row, at least one."""
    token_ids: LongArray
    """[M]"""
    wanted: LongArray
    """[m] Which of the M tokens need logits, in row order."""

    @classmethod
    def of(
        cls,
        *,
        slots: Sequence[int],
        starts: LongArray,
        token_ids: Sequence[Sequence[int] | NDArray[np.integer]],
        wanted: Sequence[Sequence[int] | NDArray[np.integer]],
    ) -> Ragged:
        """Flatten rows; `wanted[i]` are increasing offsets into `token_ids[i]`.

        Raises:
            EngineError: no rows, an empty row, a slot twice, offsets out of range or order.
        """
        if not len(slots) == len(token_ids) == len(wanted) > 0:
            raise EngineError(
                "read: expected as many slots, rows of tokens and rows of wanted offsets (at least "
                f"one), got {len(slots)}, {len(token_ids)} and {len(wanted)}"
            )
        if len(set(slots)) != len(slots):
            raise EngineError(f"read: expected every slot once, got {list(slots)}")
        counts = np.array([len(row) for row in token_ids], np.int64)
        if not counts.all():
            raise EngineError("read: expected at least one token a row, got none in some")
        num_wanted = np.array([len(row) for row in wanted], np.int64)
        offsets = _flat(wanted)
        row = np.repeat(np.arange(len(slots)), num_wanted)
        flat = offsets + starts_of(counts)[row]
        if ((offsets < 0) | (offsets >= counts[row])).any() or (np.diff(flat) <= 0).any():
            raise EngineError("read: expected wanted offsets that increase and lie in their row")
        return cls(
            slots=np.asarray(slots, np.int64),
            starts=starts,
            counts=counts,
            token_ids=_flat(token_ids),
            wanted=flat,
        )

    @property
    def ends(self) -> LongArray:
        """[N] Length of each slot once everything is read."""
        return self.starts + self.counts


def starts_of(counts: LongArray) -> LongArray:
    """Where each of some runs of `counts` items begins, laid end to end."""
    return np.cumsum(counts) - counts


def offsets_in(counts: LongArray) -> LongArray:
    """0 .. counts[i]-1 for each i, laid end to end."""
    return np.arange(int(counts.sum())) - np.repeat(starts_of(counts), counts)


def passes(
    ragged: Ragged, *, max_cells: int, max_padding: int
) -> Iterator[tuple[Ragged, LongArray]]:
    """Cut a read into passes, in an order in which they can be done.

    Args:
        ragged: the whole read.
        max_cells: rows times the longest row of one pass, at most.
        max_padding: the part of it that is padding, at most.

    Yields:
        (pass, which): `which` [m of the pass] are the places of its logits among all wanted.
    """
    first = starts_of(ragged.counts)
    longest, chunk = int(ragged.counts.max()), min(CHUNK_TOKENS, max_cells)
    for begin in range(0, longest, chunk):
        sizes = np.clip(ragged.counts - begin, 0, chunk)
        for rows in _groups(sizes, max_cells=max_cells, max_padding=max_padding):
            if len(rows) == len(sizes) and longest <= chunk:
                yield ragged, np.arange(len(ragged.wanted))
                return
            yield _cut(ragged, rows, first[rows] + begin, sizes[rows], begin)


def _cut(
    ragged: Ragged, rows: LongArray, first: LongArray, sizes: LongArray, begin: int
) -> tuple[Ragged, LongArray]:
    """The pass that reads `sizes[i]` tokens from flat token `first[i]` on of each of some rows."""
    new_first = starts_of(sizes)
    source = np.repeat(first - new_first, sizes) + np.arange(int(sizes.sum()))
    new_index = np.full(len(ragged.token_ids), -1, np.int64)
    new_index[source] = np.arange(len(source))
    wanted = new_index[ragged.wanted]
    which = np.flatnonzero(wanted >= 0)
    part = Ragged(
        slots=ragged.slots[rows],
        starts=ragged.starts[rows] + begin,
        counts=sizes,
        token_ids=ragged.token_ids[source],
        wanted=wanted[which],
    )
    return part, which


def _groups(sizes: LongArray, *, max_cells: int, max_padding: int) -> list[LongArray]:
    """Rows (of size > 0) that share a pass: similar lengths, bounded; each in row order."""
    order = [row for row in np.argsort(-sizes, kind="stable").tolist() if sizes[row] > 0]
    groups: list[list[int]] = []
    width = padding = 0
    for row in order:
        size = int(sizes[row])
        padding += width - size
        if groups and padding <= max_padding and width * (len(groups[-1]) + 1) <= max_cells:
            groups[-1].append(row)
        else:
            groups.append([row])
            width, padding = size, 0
    return [np.sort(np.array(group, np.int64)) for group in groups]


def _flat(rows: Sequence[Sequence[int] | NDArray[np.integer]]) -> LongArray:
    # An empty list alone would be an array of floats, hence the cast.
    return np.concatenate(rows, dtype=np.int64, casting="unsafe")
