"""Settling open positions: the expert's word where its coin came up, exact at every position.

With `b ~ Bernoulli(w)` drawn from the policy's entropy alone, `b = 0` lets the draft
`y ~ pi_theta` stand and `b = 1` asks for a token of pi*: `y` is accepted with
`min(1, pi*(y) / pi_theta(y))`, else a token is drawn from the normalised `(pi* - pi_theta)_+`. The
result is distributed as `(1 - w) pi_theta + w pi*` (Eq. 6); the proof is in docs/sampling.md.

A row's open positions are judged in order, up to its first rejection: what was drafted beyond it
has the wrong prefix. Shapes: m judged positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mentor_serve.core.speculative import accept_probability, residual
from mentor_serve.engines.batch import Batch, SlotIndex
from mentor_serve.engines.expert import ExpertModel
from mentor_serve.engines.sampler import distribution, draw
from mentor_serve.engines.tails import Tails
from mentor_serve.types import Intervention, TokenSource


@dataclass(slots=True, kw_only=True)
class Verdicts:
    """What the expert says of open positions; [m], in order of slot, then position."""

    slots: SlotIndex
    """Slots occur several times, one after the other."""
    index: NDArray[np.int64]
    """Which of its slot's open positions."""
    proposed_logprobs: NDArray[np.float32]
    """log pi* of the draft."""
    is_replaced: NDArray[np.bool_]
    """At most the last position of each slot."""
    chosen: NDArray[np.int64]
    """Replacements; what is not replaced holds 0 here and below."""
    chosen_policy_logprobs: NDArray[np.float32]
    chosen_expert_logprobs: NDArray[np.float32]

    @classmethod
    def keeping(
        cls,
        slots: SlotIndex,
        index: NDArray[np.int64],
        proposed_logprobs: NDArray[np.float32],
    ) -> Verdicts:
        """Every draft is accepted, until a replacement is filled in."""
        count = len(slots)
        return cls(
            slots=slots,
            index=index,
            proposed_logprobs=proposed_logprobs,
            is_replaced=np.zeros(count, np.bool_),
            chosen=np.zeros(count, np.int64),
            chosen_policy_logprobs=np.zeros(count, np.float32),
            chosen_expert_logprobs=np.zeros(count, np.float32),
        )


def judge(batch: Batch, tails: Tails, expert: ExpertModel, slots: SlotIndex) -> Verdicts:
    """Ask the colocated expert about every open position of some slots, in one pass."""
    flat_slots, index = tails.flat(slots)
    positions = tails.positions[flat_slots, index]
    logits = expert.logits_at(
        slots.tolist(),
        [batch.rows[slot].job.prompt for slot in slots],
        [batch.response(slot) for slot in slots],
        [part.tolist() for part in np.split(positions, np.cumsum(tails.count[slots])[:-1])],
    )
    temperatures = batch.temperature[flat_slots]
    is_scaled = bool((temperatures != 1).any())
    expert_probs = distribution(
        logits, torch.from_numpy(temperatures).to(logits.device) if is_scaled else None
    )
    drafts = torch.from_numpy(batch.records["token_ids"][flat_slots, positions]).long()
    proposed = expert_probs.logprobs_of(drafts.to(logits.device)).cpu().numpy()
    is_rejected = rejections(batch, tails, flat_slots, index, proposed)
    judged = until_first(flat_slots, is_rejected)
    verdicts = Verdicts.keeping(flat_slots[judged], index[judged], proposed[judged])
    verdicts.is_replaced[:] = is_rejected[judged]
    rows = np.flatnonzero(judged & is_rejected)
    if len(rows):
        policy = tails.logprobs(flat_slots[rows], index[rows]).to(logits.device)
        at = expert_probs.logprobs_at(torch.from_numpy(rows).to(logits.device))
        masses = residual(policy.exp(), at.exp())
        uniforms = torch.from_numpy(tails.residual_draws[flat_slots[rows], index[rows]])
        chosen = draw(masses, uniforms.to(logits.device)).unsqueeze(-1)
        replaced = verdicts.is_replaced
        verdicts.chosen[replaced] = chosen[:, 0].cpu().numpy()
        verdicts.chosen_policy_logprobs[replaced] = policy.gather(-1, chosen)[:, 0].cpu().numpy()
        verdicts.chosen_expert_logprobs[replaced] = at.gather(-1, chosen)[:, 0].cpu().numpy()
    return verdicts


def rejections(
    batch: Batch,
    tails: Tails,
    slots: SlotIndex,
    index: NDArray[np.int64],
    proposed_logprobs: NDArray[np.float32],
) -> NDArray[np.bool_]:
    """Which drafts at open positions the expert rejects (Eq. 7 with pi* as the target): [m]."""
    positions = tails.positions[slots, index]
    policy = torch.from_numpy(batch.records["policy_logprobs"][slots, positions]).double().exp()
    target = torch.from_numpy(proposed_logprobs).double().exp()
    accept = accept_probability(policy, target).numpy()
    is_rejected: NDArray[np.bool_] = tails.is_gated[slots, index] & (
        tails.accept_draws[slots, index] >= accept
    )
    return is_rejected


def until_first(slots: SlotIndex, is_rejected: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which positions [m] come no later than their slot's first rejection."""
    if not len(slots):
        return np.zeros(0, np.bool_)
    before: NDArray[np.int64] = np.cumsum(is_rejected) - is_rejected
    is_first = np.append(True, slots[1:] != slots[:-1])
    at_start = np.maximum.accumulate(np.where(is_first, before, 0))
    judged: NDArray[np.bool_] = before == at_start
    return judged


def apply(verdicts: Verdicts, batch: Batch, tails: Tails) -> SlotIndex:
    """Write verdicts into records and tails, roll rejected rows back; returns the latter's slots.

    The caller rolls the caches of those back to their last token.
    """
    slots, index, replaced = verdicts.slots, verdicts.index, verdicts.is_replaced
    positions = tails.positions[slots, index]
    _note_interventions(verdicts, batch, positions)
    records = batch.records
    policy = np.where(
        replaced, verdicts.chosen_policy_logprobs, records["policy_logprobs"][slots, positions]
    )
    expert = np.where(replaced, verdicts.chosen_expert_logprobs, verdicts.proposed_logprobs)
    batch.amend(
        slots,
        positions,
        {
            "policy_logprobs": policy,
            "expert_logprobs": expert,
            "mixed_logprobs": mixed_logprobs(records["weights"][slots, positions], policy, expert),
        },
    )
    cut, at = slots[replaced], positions[replaced]
    batch.amend(
        cut,
        at,
        {
            "token_ids": verdicts.chosen[replaced],
            "sources": np.full(len(cut), TokenSource.EXPERT, np.uint8),
        },
    )
    batch.cut(cut, at)
    tails.clear(cut)
    _settle(verdicts, batch, tails)
    return cut


def lose(slots: SlotIndex, batch: Batch, tails: Tails) -> None:
    """The expert is gone: drafts stand from the first open position on, with weight 0."""
    for slot in slots.tolist():
        tail = slice(int(tails.positions[slot, 0]), int(batch.num_new[slot]))
        batch.records["weights"][slot, tail] = 0.0
        batch.records["sources"][slot, tail] = int(TokenSource.POLICY)
        batch.rows[slot].expert_lost = True
    batch.is_mixed[slots] = False
    batch.is_recorded[slots] = False
    tails.forget(slots)
    batch.num_settled[slots] = batch.num_new[slots]


def _settle(verdicts: Verdicts, batch: Batch, tails: Tails) -> None:
    """Take judged positions off the tails; what precedes the next open one is settled."""
    slots, judged = np.unique(verdicts.slots, return_counts=True)
    left = np.maximum(tails.count[slots] - judged, 0)
    tails.clear(slots[left == 0])
    for slot, num_judged, num_left in zip(
        slots[left > 0].tolist(), judged[left > 0].tolist(), left[left > 0].tolist(), strict=True
    ):
        tails.shift(slot, num_judged, num_left)
    batch.num_settled[slots] = np.where(left > 0, tails.positions[slots, 0], batch.num_new[slots])


def _note_interventions(verdicts: Verdicts, batch: Batch, positions: NDArray[np.int64]) -> None:
    for row in np.flatnonzero(verdicts.is_replaced).tolist():
        slot, position = int(verdicts.slots[row]), int(positions[row])
        records = batch.records
        batch.rows[slot].interventions.append(
            Intervention(
                position=position,
                proposed_token_id=int(records["token_ids"][slot, position]),
                chosen_token_id=int(verdicts.chosen[row]),
                entropy=float(records["entropies"][slot, position]),
                weight=float(records["weights"][slot, position]),
                policy_logprob=float(records["policy_logprobs"][slot, position]),
                expert_logprob=float(verdicts.proposed_logprobs[row]),
            )
        )


def mixed_logprobs(
    weights: NDArray[np.float32], policy: NDArray[np.float32], expert: NDArray[np.float32]
) -> NDArray[np.float32]:
    """`log((1 - w) pi_theta + w pi*)` (Eq. 6), in log space so that nothing underflows: [m]."""
    with np.errstate(divide="ignore"):  # w = 0 and w = 1 leave one of the two out
        of_policy, of_expert = np.log1p(-weights), np.log(weights)
    mixed: NDArray[np.float32] = np.logaddexp(of_policy + policy, of_expert + expert)
    return mixed
