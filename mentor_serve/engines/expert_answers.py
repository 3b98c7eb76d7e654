"""What a remote engine is told about positions whose logits the expert has computed.

Pure functions of a message and logits. Samples are drawn position by position from counter-based
uniforms, so that neither the cutting into blocks here nor that of calls elsewhere changes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mentor_serve.core.random import uniforms
from mentor_serve.engines.advice import ExpertAnswers, ExpertQueries, LongArray, starts_of
from mentor_serve.engines.sampler import distribution, draw

_BLOCK_POSITIONS = 256
_BLOCK_DRAWS = 16_384
"""Bounds on the positions and samples that are drawn at once, so that memory stays bounded."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """Where the flat arrays of one call hold what."""

    row: LongArray
    """[sum num_positions] Sequence of each position."""
    proposed: LongArray
    """[sum num_positions] Token proposed at each position."""
    first_sample: LongArray
    """[sum num_positions] Where the samples of each position begin."""
    first_token: LongArray
    """[n] Where the tokens of each sequence begin."""
    first_position: LongArray
    """[n] Where the positions of each sequence begin."""

    @classmethod
    def of(cls, queries: ExpertQueries) -> Layout:
        """The layout of one message."""
        return cls(
            row=queries.row_of_position,
            proposed=queries.proposed_token_ids.astype(np.int64),
            first_sample=starts_of(queries.samples_at_position),
            first_token=starts_of(queries.num_tokens),
            first_position=starts_of(queries.num_positions),
        )


def fill_in(
    queries: ExpertQueries, layout: Layout, at: LongArray, logits: Tensor, answers: ExpertAnswers
) -> None:
    """Fill in the positions `at` (flat indices [m]) from logits [m, V], in bounded blocks."""
    counts = queries.num_samples[layout.row[at]]
    for count in np.unique(counts).tolist():
        members = np.flatnonzero(counts == count)
        size = min(_BLOCK_POSITIONS, max(1, _BLOCK_DRAWS // max(1, count)))
        for begin in range(0, len(members), size):
            part = members[begin : begin + size]
            block = logits[torch.from_numpy(part).to(logits.device)]
            _answer_block(queries, layout, at[part], block, answers)


def _answer_block(
    queries: ExpertQueries, layout: Layout, at: LongArray, logits: Tensor, answers: ExpertAnswers
) -> None:
    """The same for positions [k] that all want the same number of samples."""
    device, rows = logits.device, layout.row[at]
    temperatures = torch.from_numpy(queries.temperatures[rows]).to(device)
    expert = distribution(logits, temperatures)
    proposed = torch.from_numpy(layout.proposed[at]).to(device)
    answers.proposed_logprobs[at] = expert.logprobs_of(proposed).cpu().numpy()
    offsets = np.arange(queries.num_samples[rows[0]])
    if not len(offsets):
        return
    draws = uniforms(
        torch.from_numpy(queries.seeds[rows])[:, None],
        torch.from_numpy(queries.first_sample[rows][:, None] + offsets),
        torch.from_numpy(queries.positions[at])[:, None],
        0,
    )
    samples = draw(expert.masses, draws.to(device))
    into = layout.first_sample[at][:, None] + offsets
    answers.sample_token_ids[into] = samples.cpu().numpy()
    answers.sample_logprobs[into] = expert.logprobs_of(samples).cpu().numpy()
