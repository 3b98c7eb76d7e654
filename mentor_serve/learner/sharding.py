"""An update cut into shares, one for each rank of a data-parallel group.

Every rank gets the same number of micro-batches in every mini-batch, so that collectives inside the
forward pass (ZeRO-3) and the backward pass line up; where rows do not suffice, a rank repeats one
of its own with nothing that counts. Losses are divided by the token count of ALL ranks, so
gradients are summed over ranks, never averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mentor_serve.learner.batch import TrainingBatch, TrainingGroup, TrainingTrajectory
from mentor_serve.learner.config import UpdateConfig
from mentor_serve.learner.packing import (
    MicroBatch,
    Row,
    build_micro_batch,
    cut_micro_batches,
    plan_rows_of,
    row_length,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatchShare:
    """What one rank computes of one optimiser step. Plain data: numpy arrays and numbers."""

    num_tokens: int
    """Tokens of the whole mini-batch: the denominator of Eq. 9."""
    micro_batches: tuple[tuple[Row, ...], ...]
    num_silent: int = 0
    """The last so many micro-batches only keep this rank in step: nothing in them counts."""

    def build(self, index: int) -> MicroBatch:
        """Micro-batch `index` as tensors on the CPU."""
        micro_batch = build_micro_batch(self.micro_batches[index])
        is_silent = index >= len(self.micro_batches) - self.num_silent
        return micro_batch.silenced() if is_silent else micro_batch


RankShare = tuple[MiniBatchShare, ...]
"""One rank's part of an update: one entry for each optimiser step."""


def plan_update(batch: TrainingBatch, config: UpdateConfig, *, world_size: int) -> list[RankShare]:
    """Cut `batch` into `world_size` shares of about equal cost: one `RankShare` a rank.

    Deterministic. With one rank the micro-batches are those of `plan_micro_batches`.

    Raises:
        ValueError: `world_size` below 1.
    """
    if world_size < 1:
        raise ValueError(f"world_size: expected at least 1, got {world_size}")
    mini_batches = [
        _shares(groups, config, world_size)
        for groups in batch.mini_batches(config.mini_batch_prompts)
    ]
    return [tuple(shares[rank] for shares in mini_batches) for rank in range(world_size)]


def _shares(
    groups: Sequence[TrainingGroup], config: UpdateConfig, world_size: int
) -> list[MiniBatchShare]:
    num_tokens = sum(item.num_counted for group in groups for item in group.trajectories)
    trained = [
        [item for item in group.trajectories if is_trained(item, config)] for group in groups
    ]
    max_tokens = config.max_tokens_per_micro_batch
    rows = plan_rows_of(trained, max_tokens=max_tokens)
    cut = [cut_micro_batches(part, max_tokens=max_tokens) for part in _deal(rows, world_size)]
    count = max(map(len, cut))
    return [_share(num_tokens, part, count, rows) for part in cut]


def _share(
    num_tokens: int, micro_batches: list[list[Row]], count: int, rows: Sequence[Row]
) -> MiniBatchShare:
    missing = count - len(micro_batches)
    filler = min(rows, key=row_length) if missing else ()
    return MiniBatchShare(
        num_tokens=num_tokens,
        micro_batches=(*map(tuple, micro_batches), *[(filler,)] * missing),
        num_silent=missing,
    )


def _deal(rows: Sequence[Row], world_size: int) -> list[list[Row]]:
    """Longest row first, to the rank with the least so far; each rank's rows by length."""
    parts: list[list[Row]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for row in sorted(rows, key=row_length, reverse=True):
        rank = loads.index(min(loads))
        parts[rank].append(row)
        loads[rank] += row_length(row)
    return [sorted(part, key=row_length) for part in parts]


def is_trained(item: TrainingTrajectory, config: UpdateConfig) -> bool:
    """Whether a trajectory goes through the model."""
    if item.num_counted == 0:
        return False
    return item.advantage != 0.0 or not config.skip_zero_advantage
