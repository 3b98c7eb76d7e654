"""The draws of `engines.drafting` and `engines.mixing` for rows that vLLM batches.

The same functions of the same uniforms, so that a response does not depend on the engine beyond
rounding, nor on how vLLM batches, drafts ahead, preempts or resumes. The proof of exactness is in
docs/sampling.md. Pure functions on tensors; nothing here knows vLLM. Shapes: B rows, V vocabulary,
N drafts of all rows one after the other, m drafts that the expert is asked about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mentor_serve.core.gate import guidance_weight
from mentor_serve.core.speculative import accept_probability, residual
from mentor_serve.engines.batch import Stream
from mentor_serve.engines.mixing import mixed_logprobs, until_first
from mentor_serve.engines.sampler import Distribution, distribution, draw, truncated
from mentor_serve.engines.vllm.rows import Rows
from mentor_serve.types import TokenSource

TopLogprobs = dict[int, list[tuple[int, float]]]


class Scratch:
    """Float32 memory for [n, V], kept from step to step and overwritten by each.

    The pages of a fresh tensor cost more than the arithmetic on it.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(2, 0)

    def softmax(self, logits: Tensor, temperatures: Tensor | None = None) -> Distribution:
        """`distribution` of a copy of the logits [n, V]; it holds until the next call."""
        size = logits.numel()
        if self._memory.shape[1] < size or self._memory.device != logits.device:
            self._memory = logits.new_empty((2, size), dtype=torch.float32)
        own, masses = self._memory[:, :size].view(2, *logits.shape)
        return distribution(own.copy_(logits), temperatures, masses=masses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """One token of the policy for each row, [B]; `ids` on the logits' device, the rest here."""

    ids: Tensor
    policy: Distribution
    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    entropies: NDArray[np.float32]
    weights: NDArray[np.float32]
    """w of Eq. 6; 0 in rows that are not mixed."""
    is_gated: NDArray[np.bool_]
    """The coin asks for the expert."""
    top_logprobs: TopLogprobs
    """By row, where wanted."""


def draw_policy(logits_BV: Tensor, rows: Rows, scratch: Scratch, *, offset: int = 0) -> Drafts:
    """Draw from the policy at `rows.positions + offset`; holds until `scratch` is used again."""
    device = logits_BV.device
    policy = scratch.softmax(logits_BV, rows.temperatures(device))
    ids = draw(_masses(policy, rows), rows.uniforms(Stream.TOKEN, offset=offset).to(device))
    greedy = np.flatnonzero(rows.is_greedy)
    if len(greedy):
        at = torch.from_numpy(greedy).to(device)
        ids[at] = policy.most_likely(at)
    # The only wait for the device: everything the host needs comes in one tensor.
    columns = [ids.double(), policy.logprobs_of(ids).double(), policy.entropies().double()]
    token_ids, logprobs, entropies = torch.stack(columns).cpu().numpy()
    entropies = entropies.astype(np.float32)
    weights, is_gated = _gate(entropies, rows, offset=offset)
    return Drafts(
        ids=ids,
        policy=policy,
        token_ids=token_ids.astype(np.int64),
        logprobs=logprobs.astype(np.float32),
        entropies=entropies,
        weights=weights,
        is_gated=is_gated,
        top_logprobs=_top_logprobs(policy, rows),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Drafts that the expert is asked about, row by row in order of position: [m] each."""

    rows: NDArray[np.int64]
    logits: Tensor
    """[m, V] of the expert."""
    token_ids: NDArray[np.int64]
    policy_logprobs: NDArray[np.float32]
    """Of the drafts."""
    policy_at: Callable[[NDArray[np.int64]], Tensor]
    """All of the policy's log-probabilities [k, V] where a few of the m are replaced."""
    temperatures: NDArray[np.float32]
    is_gated: NDArray[np.bool_]
    """False where the expert's word is only recorded."""
    accept_draws: NDArray[np.float64]
    residual_draws: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What becomes of the drafts of `Asked`: [m] each."""

    counts: NDArray[np.bool_]
    """The draft comes no later than its row's first rejection."""
    is_replaced: NDArray[np.bool_]
    token_ids: NDArray[np.int64]
    """The draft, or what replaces it."""
    policy_logprobs: NDArray[np.float32]
    expert_logprobs: NDArray[np.float32]
    proposed_token_ids: NDArray[np.int64]
    proposed_policy_logprobs: NDArray[np.float32]
    proposed_expert_logprobs: NDArray[np.float32]


def judge(asked: Asked, scratch: Scratch) -> Judged:
    """Accept drafts with `min(1, pi*(y) / pi_theta(y))`, replace a row's first rejected one."""
    device = asked.logits.device
    is_scaled = bool((asked.temperatures != 1).any())
    temperatures = torch.from_numpy(asked.temperatures).to(device) if is_scaled else None
    expert = scratch.softmax(asked.logits, temperatures)
    drafts = torch.from_numpy(asked.token_ids).to(device)
    proposed = expert.logprobs_of(drafts).cpu()
    of_policy = torch.from_numpy(asked.policy_logprobs)
    accept = accept_probability(of_policy.double().exp(), proposed.double().exp()).numpy()
    is_rejected = asked.is_gated & (asked.accept_draws >= accept)
    counts = until_first(asked.rows, is_rejected)
    token_ids = asked.token_ids.copy()
    policy_logprobs, expert_logprobs = of_policy.numpy().copy(), proposed.numpy().copy()
    replaced = np.flatnonzero(counts & is_rejected)
    if len(replaced):
        at = torch.from_numpy(replaced).to(device)
        policy_mV, expert_mV = asked.policy_at(replaced), expert.logprobs_at(at)
        uniforms = torch.from_numpy(asked.residual_draws[replaced]).to(device)
        chosen = draw(residual(policy_mV.exp(), expert_mV.exp()), uniforms).unsqueeze(-1)
        token_ids[replaced] = chosen[:, 0].cpu().numpy()
        policy_logprobs[replaced] = policy_mV.gather(-1, chosen)[:, 0].cpu().numpy()
        expert_logprobs[replaced] = expert_mV.gather(-1, chosen)[:, 0].cpu().numpy()
    return Judged(
        counts=counts,
        is_replaced=counts & is_rejected,
        token_ids=token_ids,
        policy_logprobs=policy_logprobs,
        expert_logprobs=expert_logprobs,
        proposed_token_ids=asked.token_ids,
        proposed_policy_logprobs=of_policy.numpy(),
        proposed_expert_logprobs=proposed.numpy(),
    )


def mixed_records(
    judged: Judged, weights: NDArray[np.float32], is_gated: NDArray[np.bool_]
) -> dict[str, NDArray[np.generic]]:
    """Records of the drafts judged, [m] by name; `weights` and `is_gated` are those of `Asked`."""
    kept = np.where(is_gated, int(TokenSource.GATED_KEPT), int(TokenSource.POLICY))
    return {
        "token_ids": judged.token_ids,
        "policy_logprobs": judged.policy_logprobs,
        "expert_logprobs": judged.expert_logprobs,
        "mixed_logprobs": mixed_logprobs(weights, judged.policy_logprobs, judged.expert_logprobs),
        "sources": np.where(judged.is_replaced, int(TokenSource.EXPERT), kept),
    }


def _gate(
    entropies: NDArray[np.float32], rows: Rows, *, offset: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Weights and coins [B]; both nothing in rows that are not mixed."""
    if not rows.is_mixed.any():
        return np.zeros(len(rows), np.float32), np.zeros(len(rows), np.bool_)
    gate = guidance_weight(torch.from_numpy(entropies), torch.from_numpy(rows.gamma)).numpy()
    weights = np.where(rows.is_mixed, gate, 0.0).astype(np.float32)
    return weights, rows.uniforms(Stream.COIN, offset=offset).numpy() < weights


def _masses(policy: Distribution, rows: Rows) -> Tensor:
    """Unnormalised probabilities [B, V], truncated where a row asks for it."""
    cut = np.flatnonzero(rows.is_cut)
    if not len(cut):
        return policy.masses
    device = policy.masses.device
    at = torch.from_numpy(cut).to(device)
    masses = policy.masses.clone()
    masses[at] = truncated(
        masses[at],
        top_p=torch.from_numpy(rows.top_p[cut]).to(device),
        top_k=torch.from_numpy(rows.top_k[cut]).to(device),
    )
    return masses


def _top_logprobs(policy: Distribution, rows: Rows) -> TopLogprobs:
    wanted = np.flatnonzero(rows.num_top_logprobs)
    if not len(wanted):
        return {}
    most = int(rows.num_top_logprobs[wanted].max())
    at = torch.from_numpy(wanted).to(policy.masses.device)
    top = policy.logprobs_at(at).topk(most)
    return {
        row: list(zip(ids, logprobs, strict=True))[: rows.num_top_logprobs[row]]
        for row, ids, logprobs in zip(
            wanted.tolist(), top.indices.tolist(), top.values.tolist(), strict=True
        )
    }
