"""Micro-batches without padding: the responses of a group share one copy of their prompt.

A *block* is a prompt followed by one or more responses to it. Every response sees the prompt and
its own earlier tokens, and nothing else; positions go on from the prompt's end in each response.
So the block gives each response exactly the log-probabilities it has alone, and the prompt is
computed once for many responses. Several blocks make a row, several rows a micro-batch.
Shapes: R rows, L row length, N response tokens of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mentor_serve.core.packing import plan_rows
from mentor_serve.learner.batch import TrainingTrajectory

MIN_ROW_TOKENS = 256
"""Rows are filled up to this length, or the longest block's. Longer rows would save nothing:
attention costs L a token, while the prompt is shared well enough by then."""

Block = tuple[TrainingTrajectory, ...]
Row = tuple[Block, ...]
_PAD = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward pass. Token n of N is `trajectories`' responses, one after the other."""

    input_ids: Tensor
    """[R, L]."""
    position_ids: Tensor
    """[R, L]."""
    attention_mask: Tensor | None
    """[R, 1, L, L] bool, true where the query (row) may see the key (column). None where every row
    is one response after its prompt: plain causal attention, for which kernels have a shorter way.
    """
    predicts: Tensor
    """[N]: index into the flattened [R * L] of the position whose output predicts the token."""
    targets: Tensor
    """[N]: the token."""
    old_logprobs: Tensor
    """[N]."""
    advantages: Tensor
    """[N]: the trajectory's advantage."""
    mask: Tensor
    """[N] bool: the token counts."""
    is_mixed: Tensor
    """[N] bool."""
    is_expert: Tensor
    """[N] bool."""
    keeps_old: Tensor
    """[N] bool: `old_logprobs` is not the policy's and is never computed again."""
    sequences: Tensor
    """[N] int64: number of the response within the micro-batch."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        tensors: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        moved = {name: item.to(device) for name, item in tensors.items() if item is not None}
        return replace(self, **moved)

    def silenced(self) -> MicroBatch:
        """The same without any token that counts: gradients 0, yet the same work."""
        return replace(self, mask=torch.zeros_like(self.mask))


def plan_micro_batches(
    groups: Sequence[Sequence[TrainingTrajectory]], *, max_tokens: int
) -> list[list[Row]]:
    """Cut the trajectories of each group into blocks, blocks into rows, rows into micro-batches.

    A micro-batch holds at most `max_tokens` tokens, its padding included, or one row.
    """
    return cut_micro_batches(plan_rows_of(groups, max_tokens=max_tokens), max_tokens=max_tokens)


def plan_rows_of(groups: Sequence[Sequence[TrainingTrajectory]], *, max_tokens: int) -> list[Row]:
    """Rows of about equal length that hold every trajectory once, shortest row first."""
    longest = max((_block_length((item,)) for group in groups for item in group), default=0)
    capacity = max(longest, min(MIN_ROW_TOKENS, max_tokens))
    blocks = [block for group in groups for block in _blocks(group, capacity)]
    lengths = [_block_length(block) for block in blocks]
    # Longest first: first-fit then fills the gaps with the short ones.
    order = sorted(range(len(blocks)), key=lambda index: -lengths[index])
    planned = plan_rows([lengths[index] for index in order], capacity) if order else []
    rows = [tuple(blocks[order[index]] for index in row) for row in planned]
    return sorted(rows, key=row_length)


def cut_micro_batches(rows: Sequence[Row], *, max_tokens: int) -> list[list[Row]]:
    """Rows, shortest first, in micro-batches of at most `max_tokens` padded tokens, or one row."""
    micro_batches: list[list[Row]] = []
    for row in rows:
        # Rows come by length, so this one sets the length of the micro-batch it joins.
        if micro_batches and (len(micro_batches[-1]) + 1) * row_length(row) <= max_tokens:
            micro_batches[-1].append(row)
        else:
            micro_batches.append([row])
    return micro_batches


def build_micro_batch(rows: Sequence[Row]) -> MicroBatch:
    """Lay rows out as tensors, padded at the end to the longest."""
    length = max(row_length(row) for row in rows)
    laid_out = [_lay_out(row, length) for row in rows]
    trajectories = [item for row in rows for block in row for item in block]
    predicts = [index * length + item.predicts for index, item in enumerate(laid_out)]
    token_counts = torch.tensor([len(item.token_ids) for item in trajectories])

    def per_token(values: list[float] | list[bool], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(token_counts)

    return MicroBatch(
        input_ids=_stack([item.input_ids for item in laid_out]),
        position_ids=_stack([item.position_ids for item in laid_out]),
        attention_mask=None if _is_causal(rows) else _attention_mask(laid_out),
        predicts=torch.from_numpy(np.concatenate(predicts)),
        targets=_concatenate([item.token_ids for item in trajectories]).long(),
        old_logprobs=_concatenate([item.old_logprobs for item in trajectories]),
        advantages=per_token([item.advantage for item in trajectories], torch.float32),
        mask=_concatenate([item.mask for item in trajectories]),
        is_mixed=per_token([item.is_mixed for item in trajectories], torch.bool),
        is_expert=per_token([item.is_expert for item in trajectories], torch.bool),
        keeps_old=per_token([item.keeps_old for item in trajectories], torch.bool),
        sequences=torch.arange(len(trajectories)).repeat_interleave(token_counts),
    )


@dataclass(slots=True)
class _RowLayout:
    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    blocks: NDArray[np.int64]
    """[L]: number of the block, different for every padding position."""
    responses: NDArray[np.int64]
    """[L]: number of the response within the row, -1 for prompts."""
    predicts: NDArray[np.int64]


def _lay_out(row: Row, length: int) -> _RowLayout:
    layout = _RowLayout(
        input_ids=np.zeros(length, np.int64),
        position_ids=np.zeros(length, np.int64),
        # Padding sees itself alone: a row of the mask without any key would give NaN.
        blocks=-1 - np.arange(length),
        responses=np.full(length, _PAD, np.int64),
        predicts=np.empty(0, np.int64),
    )
    predicts: list[NDArray[np.int64]] = []
    start, response = 0, 0
    for number, block in enumerate(row):
        prompt = block[0].prompt_token_ids
        end = start + len(prompt)
        layout.input_ids[start:end] = prompt
        layout.position_ids[start:end] = np.arange(len(prompt))
        cursor = end
        for item in block:
            inputs = item.token_ids[:-1]  # the last token predicts nothing that counts
            stop = cursor + len(inputs)
            layout.input_ids[cursor:stop] = inputs
            layout.position_ids[cursor:stop] = len(prompt) + np.arange(len(inputs))
            layout.responses[cursor:stop] = response
            predicts.append(np.concatenate([[end - 1], np.arange(cursor, stop)]))
            cursor, response = stop, response + 1
        layout.blocks[start:cursor] = number
        start = cursor
    layout.predicts = np.concatenate(predicts)
    return layout


def _is_causal(rows: Sequence[Row]) -> bool:
    """Every row is one response: padding, at the end, is seen by nothing that counts."""
    return all(len(row) == 1 and len(row[0]) == 1 for row in rows)


def _attention_mask(layouts: Sequence[_RowLayout]) -> Tensor:
    blocks_RL = _stack([item.blocks for item in layouts])
    responses_RL = _stack([item.responses for item in layouts])
    length = blocks_RL.shape[1]
    order = torch.arange(length)
    causal_LL = order[None, :] <= order[:, None]
    same_block = blocks_RL[:, :, None] == blocks_RL[:, None, :]
    key_is_prompt = (responses_RL == _PAD)[:, None, :]
    same_response = responses_RL[:, :, None] == responses_RL[:, None, :]
    return (causal_LL & same_block & (key_is_prompt | same_response))[:, None]


def _blocks(group: Sequence[TrainingTrajectory], capacity: int) -> list[Block]:
    """Consecutive trajectories in blocks of at most `capacity` tokens, or one trajectory."""
    blocks: list[Block] = []
    for item in group:
        if blocks and _block_length((*blocks[-1], item)) <= capacity:
            blocks[-1] = (*blocks[-1], item)
        else:
            blocks.append((item,))
    return blocks


def _block_length(block: Block) -> int:
    return len(block[0].prompt_token_ids) + sum(len(item.token_ids) - 1 for item in block)


def row_length(row: Row) -> int:
    """Tokens of a row."""
    return sum(_block_length(block) for block in row)


def _stack(arrays: Sequence[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


def _concatenate(arrays: Sequence[NDArray[np.generic]]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))
