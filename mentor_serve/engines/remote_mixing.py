"""Settling open positions with an expert in another process.

Same result as `mixing.judge`, in distribution, without a vector of the vocabulary's size on the
wire: the expert sends `log pi*` of the draft and i.i.d. samples of pi*; a rejected draft is
replaced by the first sample z that passes with `max(0, 1 - pi_theta(z) / pi*(z))`, which follows
the normalised `(pi* - pi_theta)_+` (Eq. 8). The policy goes on while a question is out. Shapes: n
rows asked about, m positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mentor_serve.core.random import derived_seeds, uniforms
from mentor_serve.engines.advice import ExpertAnswers, ExpertQueries
from mentor_serve.engines.batch import Batch, SlotIndex, Stream
from mentor_serve.engines.mixing import Verdicts, rejections, until_first
from mentor_serve.engines.tails import Tails

MAX_SAMPLES = 1 << 16
"""Samples for one position before its expert counts as lost. Each is accepted with probability
TV(pi_theta, pi*), and asking begins with that probability too, so that giving up happens at most
once in e * 65,536 gated tokens, whatever the distributions."""
FIRST_SAMPLES = 8
_MOST_SAMPLES_A_QUERY = 4096


def queries(batch: Batch, tails: Tails, slots: SlotIndex, *, call: int) -> ExpertQueries:
    """What to ask about every open position of some slots; only unread tokens are sent."""
    flat_slots, index = tails.flat(slots)
    # A position whose draft is rejected already needs samples only, and nothing beyond it counts.
    positions = tails.positions[flat_slots, index] + batch.prompt_len[flat_slots]
    counts = tails.count[slots]
    firsts, lasts = np.cumsum(counts) - counts, np.cumsum(counts) - 1
    starts = np.minimum(tails.num_held[slots], positions[firsts] - 1)
    unread = [
        _sequence_part(batch, slot, start, stop)
        for slot, start, stop in zip(
            slots.tolist(), starts.tolist(), (positions[lasts] + 1).tolist(), strict=True
        )
    ]
    num_drawn = tails.num_drawn[slots]
    return ExpertQueries(
        sequence_ids=np.array([batch.rows[slot].sequence_id for slot in slots], np.int64),
        starts=starts.astype(np.int32),
        num_tokens=np.array([len(part) for part in unread], np.int32),
        token_ids=np.concatenate(unread),
        num_positions=counts.astype(np.int32),
        positions=positions.astype(np.int32),
        temperatures=batch.temperature[slots],
        seeds=_seeds(batch, slots),
        first_sample=num_drawn.astype(np.int32),
        num_samples=np.clip(num_drawn, FIRST_SAMPLES, _MOST_SAMPLES_A_QUERY).astype(np.int32),
        call=call,
    )


def judge(
    batch: Batch, tails: Tails, slots: SlotIndex, asked: ExpertQueries, answers: ExpertAnswers
) -> tuple[Verdicts, SlotIndex]:
    """Verdicts from answers, and the slots whose rejected draft still lacks a replacement.

    `slots` [n] are where the rows asked about are now, -1 for those that are gone. Records that a
    slot's expert holds what it read; a slot that is missing there holds nothing and stays open.
    The verdicts of a slot that lacks a replacement end before that draft.
    """
    rows = asked.row_of_position
    index = np.arange(len(rows)) - np.repeat(
        np.cumsum(asked.num_positions) - asked.num_positions, asked.num_positions
    )
    _note_held(tails, slots, asked, answers)
    usable = (slots[rows] >= 0) & ~answers.missing[rows]
    flat_slots, index = slots[rows][usable], index[usable]
    proposed = answers.proposed_logprobs[usable]
    is_rejected = rejections(batch, tails, flat_slots, index, proposed)
    is_rejected |= tails.is_rejected[flat_slots] & (index == 0)
    judged = until_first(flat_slots, is_rejected)
    verdicts = Verdicts.keeping(flat_slots[judged], index[judged], proposed[judged])
    rejected = np.flatnonzero(is_rejected[judged])
    asked_at = np.flatnonzero(usable)[judged][rejected]
    found = _thin(batch, tails, verdicts, rejected, _Samples.of(asked, answers, asked_at))
    lacking = rejected[~found]
    dry = verdicts.slots[lacking]
    tails.num_drawn[dry] += asked.samples_at_position[asked_at[~found]]
    kept = np.ones(len(verdicts.slots), np.bool_)
    kept[lacking] = False
    return _only(verdicts, kept), dry


def await_replacement(batch: Batch, tails: Tails, slots: SlotIndex) -> None:
    """Drop everything beyond the rejected first draft of some slots, which ask for more samples.

    The caller rolls the policy's cache back to the slots' last token.
    """
    for slot in slots.tolist():
        tails.shift(slot, 0, 1)
    tails.is_rejected[slots] = True
    tails.survival[slots] = 0.0
    batch.cut(slots, tails.positions[slots, 0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Samples:
    """Samples of pi* at r positions, [r, S]; positions with fewer than S are padded."""

    token_ids: Tensor
    logprobs: Tensor
    """float64"""
    is_real: Tensor

    @classmethod
    def of(cls, asked: ExpertQueries, answers: ExpertAnswers, at: NDArray[np.int64]) -> _Samples:
        """The samples of some questions of a message [r], counted over all its positions."""
        counts = asked.samples_at_position
        starts = np.cumsum(counts) - counts
        offsets = np.arange(int(counts[at].max(initial=0)))
        is_real = offsets < counts[at][:, None]
        places = np.where(is_real, starts[at][:, None] + offsets, 0)
        return cls(
            token_ids=torch.from_numpy(answers.sample_token_ids[places]).long(),
            logprobs=torch.from_numpy(answers.sample_logprobs[places]).double(),
            is_real=torch.from_numpy(is_real),
        )


def _thin(
    batch: Batch,
    tails: Tails,
    verdicts: Verdicts,
    rejected: NDArray[np.int64],
    samples: _Samples,
) -> NDArray[np.bool_]:
    """Replace rejected drafts [r] by their first sample that passes; returns which have one [r]."""
    if not len(rejected):
        return np.zeros(0, np.bool_)
    slots, index = verdicts.slots[rejected], verdicts.index[rejected]
    policy = tails.logprobs(slots, index).cpu().gather(-1, samples.token_ids)
    positions = torch.from_numpy(tails.positions[slots, index])
    drawn = torch.from_numpy(tails.num_drawn[slots])
    chances = uniforms(
        torch.from_numpy(batch.seed[slots])[:, None],
        torch.from_numpy(batch.sample[slots])[:, None],
        positions[:, None],
        int(Stream.THINNING) + drawn[:, None] + torch.arange(policy.shape[1]),
    )
    passed = samples.is_real & (chances < 1.0 - (policy.double() - samples.logprobs).exp())
    found: NDArray[np.bool_] = passed.any(dim=-1).numpy()
    first = passed.int().argmax(dim=-1, keepdim=True)
    replaced = rejected[found]
    verdicts.is_replaced[replaced] = True
    for filled, values in (
        (verdicts.chosen, samples.token_ids),
        (verdicts.chosen_policy_logprobs, policy),
        (verdicts.chosen_expert_logprobs, samples.logprobs),
    ):
        filled[replaced] = values.gather(-1, first)[:, 0].numpy()[found]
    return found


def _note_held(
    tails: Tails, slots: SlotIndex, asked: ExpertQueries, answers: ExpertAnswers
) -> None:
    lasts = asked.positions[np.cumsum(asked.num_positions) - 1]
    alive = slots >= 0
    held = np.where(answers.missing, 0, lasts)
    tails.num_held[slots[alive]] = held[alive]


def _only(verdicts: Verdicts, kept: NDArray[np.bool_]) -> Verdicts:
    return Verdicts(
        slots=verdicts.slots[kept],
        index=verdicts.index[kept],
        proposed_logprobs=verdicts.proposed_logprobs[kept],
        is_replaced=verdicts.is_replaced[kept],
        chosen=verdicts.chosen[kept],
        chosen_policy_logprobs=verdicts.chosen_policy_logprobs[kept],
        chosen_expert_logprobs=verdicts.chosen_expert_logprobs[kept],
    )


def _sequence_part(batch: Batch, slot: int, start: int, stop: int) -> NDArray[np.int32]:
    """Tokens start .. stop - 1 of prompt and response."""
    prompt = batch.rows[slot].job.prompt
    response = batch.records["token_ids"][slot]
    of_response = response[max(start - len(prompt), 0) : max(stop - len(prompt), 0)]
    if start >= len(prompt):
        part: NDArray[np.int32] = of_response
        return part
    return np.concatenate([np.array(prompt[start:stop], np.int32), of_response])


def _seeds(batch: Batch, slots: SlotIndex) -> NDArray[np.int64]:
    """One seed a row for the expert's draws, which differ by position there: [n]."""
    seeds: NDArray[np.int64] = derived_seeds(
        torch.from_numpy(batch.seed[slots]),
        torch.from_numpy(batch.sample[slots]),
        torch.zeros(len(slots), dtype=torch.int64),
        int(Stream.ADVICE),
    ).numpy()
    return seeds
