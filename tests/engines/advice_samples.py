"""Messages to an expert, made from whole sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mentor_serve.engines.advice import ExpertQueries


def ask(sequence_id: int, token_ids: Sequence[int], positions: Sequence[int], **options):
    """About one sequence; `start` and the options of `ask_all`."""
    start = options.pop("start", 0)
    return ask_all([token_ids], positions, starts=[start], sequence_ids=[sequence_id], **options)


def ask_all(
    sequences: Sequence[Sequence[int]],
    positions: Sequence[int],
    *,
    starts: Sequence[int] | None = None,
    sequence_ids: Sequence[int] | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    first_sample: int = 0,
    num_samples: int = 8,
    call: int = 0,
) -> ExpertQueries:
    """About the same positions of several sequences, whose tokens are sent from `starts` on."""
    n = len(sequences)
    begins = [0] * n if starts is None else list(starts)
    sent = [
        sequence[begin : positions[-1] + 1]
        for sequence, begin in zip(sequences, begins, strict=True)
    ]
    return ExpertQueries(
        sequence_ids=np.array(range(n) if sequence_ids is None else sequence_ids, np.int64),
        starts=np.array(begins, np.int32),
        num_tokens=np.array([len(tokens) for tokens in sent], np.int32),
        token_ids=np.array([token for tokens in sent for token in tokens], np.int32),
        num_positions=np.full(n, len(positions), np.int32),
        positions=np.tile(np.array(positions, np.int32), n),
        temperatures=np.full(n, temperature, np.float32),
        seeds=np.full(n, seed, np.int64),
        first_sample=np.full(n, first_sample, np.int32),
        num_samples=np.full(n, num_samples, np.int32),
        call=call,
    )
