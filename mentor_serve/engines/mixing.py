"""Settling drafted tokens: the gate, and the expert's word where its coin came up.

Exact at every position, the first after the prompt included. With `b ~ Bernoulli(w)` drawn from
the policy's entropy alone, `b = 0` lets the draft `y ~ pi_theta` stand and `b = 1` asks for a
token of pi*: `y` is accepted with `min(1, pi*(y) / pi_theta(y))`, else a token is drawn from the
normalised `(pi* - pi_theta)_+`. The result is distributed as `(1 - w) pi_theta + w pi*` (Eq. 6);
the proof is in docs/sampling.md. A remote expert sends no vocabulary-sized vector: the residual is
drawn by thinning its samples. Shapes: n rows of the batch, m rows that consult the expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mentor_serve.core.gate import guidance_weight
from mentor_serve.core.random import derived_seeds, uniforms
from mentor_serve.core.speculative import accept_probability, residual
from mentor_serve.engines.base import ExpertAnswer, ExpertClient, ExpertQuery
from mentor_serve.engines.batch import Batch, Stream
from mentor_serve.engines.expert import ExpertModel
from mentor_serve.engines.sampler import Distribution, distribution, draw
from mentor_serve.errors import ExpertUnavailable
from mentor_serve.types import Intervention, TokenSource

_MAX_SAMPLES = 1 << 16
"""Samples of a remote expert for one position before it counts as lost. Each is accepted with
probability TV(pi_theta, pi*), and asking begins with that probability too, so that giving up
happens at most once in e * 65,536 gated tokens, whatever the distributions."""
_FIRST_SAMPLES = 8
_MOST_SAMPLES_A_QUERY = 4096


@dataclass(slots=True, kw_only=True)
class Draft:
    """What the policy proposes at one position of every row."""

    token_ids: Tensor
    """[n]"""
    policy: Distribution
    """[n, V] at each row's temperature."""
    entropies: Tensor
    """[n] nats"""
    uniforms: Tensor
    """[n, 4] float64, one column a `Stream`."""


@dataclass(slots=True, kw_only=True)
class Settled:
    """The tokens that are emitted, and what is recorded of them; tensors [n] as in `Rollout`."""

    token_ids: Tensor
    mixed_logprobs: Tensor
    expert_logprobs: Tensor
    weights: Tensor
    sources: Tensor
    interventions: dict[int, Intervention] = field(default_factory=dict)
    """By row."""
    lost_rows: list[int] = field(default_factory=list)
    """Rows whose expert did not answer."""
    num_expert_calls: int = 0
    num_expert_tokens: int = 0


def settle(draft: Draft, batch: Batch, expert: ExpertModel | ExpertClient | None) -> Settled:
    """Let the expert decide where coins came up, all rows in one pass."""
    device = draft.token_ids.device
    unknown = torch.full_like(draft.entropies, math.nan)
    settled = Settled(
        token_ids=draft.token_ids,
        mixed_logprobs=unknown,
        expert_logprobs=unknown.clone(),
        weights=torch.zeros_like(draft.entropies),
        sources=torch.zeros_like(draft.token_ids),
    )
    n = batch.num_rows
    if expert is None or not batch.is_mixed[:n].any():
        return settled
    gammas = torch.from_numpy(batch.gamma[:n]).to(device)
    is_mixed = torch.from_numpy(batch.is_mixed[:n]).to(device)
    weights = guidance_weight(draft.entropies, gammas)
    settled.weights = torch.where(is_mixed, weights, 0.0)
    gated = draft.uniforms[:, Stream.COIN] < settled.weights
    consulted = gated | (torch.from_numpy(batch.is_recorded[:n]).to(device) & is_mixed)
    rows = consulted.nonzero().squeeze(-1)
    if len(rows):
        settled.token_ids = draft.token_ids.clone()
        settled.sources[gated] = int(TokenSource.GATED_KEPT)
        if isinstance(expert, ExpertModel):
            _settle_local(draft, batch, expert, rows, gated[rows], settled)
        else:
            _RemoteSettlement(draft, batch, expert, gated, settled).run(rows)
    return settled


def _settle_local(
    draft: Draft, batch: Batch, model: ExpertModel, rows: Tensor, gated: Tensor, settled: Settled
) -> None:
    slots = rows.tolist()
    passes, tokens_read = model.slots.num_passes, model.slots.num_tokens_read
    logits = model.next_logits(
        slots, [batch.rows[slot].job.prompt for slot in slots], [*map(batch.response, slots)]
    )
    settled.num_expert_calls = model.slots.num_passes - passes
    settled.num_expert_tokens = model.slots.num_tokens_read - tokens_read
    temperatures = torch.from_numpy(batch.temperature[slots]).to(rows.device)
    expert = distribution(logits.to(rows.device), temperatures)
    policy_probs, proposed = draft.policy.probs[rows], draft.token_ids[rows].unsqueeze(-1)
    accept = accept_probability(
        policy_probs.gather(-1, proposed), expert.probs.gather(-1, proposed)
    )
    rejected = gated & (draft.uniforms[rows, Stream.ACCEPT] >= accept.squeeze(-1))
    replaced = rejected.nonzero().squeeze(-1)
    if len(replaced):
        masses = residual(policy_probs[replaced], expert.probs[replaced])
        chosen = draw(masses, draft.uniforms[rows[replaced], Stream.RESIDUAL])
        settled.token_ids[rows[replaced]] = chosen
        settled.sources[rows[replaced]] = int(TokenSource.EXPERT)
        proposed_logprobs = expert.logprobs.gather(-1, proposed).squeeze(-1)[replaced]
        for row, token, logprob in zip(
            rows[replaced].tolist(), chosen.tolist(), proposed_logprobs.tolist(), strict=True
        ):
            settled.interventions[row] = _intervention(draft, batch, settled, row, token, logprob)
    emitted = settled.token_ids[rows].unsqueeze(-1)
    settled.expert_logprobs[rows] = expert.logprobs.gather(-1, emitted).squeeze(-1)
    _record_mixed(draft, settled, rows)


class _RemoteSettlement:
    """One step's dialogue with a remote expert: one query a row, more where thinning runs dry."""

    def __init__(
        self, draft: Draft, batch: Batch, client: ExpertClient, gated: Tensor, settled: Settled
    ) -> None:
        self._draft = draft
        self._batch = batch
        self._client = client
        self._gated = gated
        self._settled = settled
        self._num_drawn = torch.zeros(batch.num_rows, dtype=torch.int64)
        """Samples that each row has seen."""

    def run(self, rows: Tensor) -> None:
        """Settle rows; those whose expert does not answer keep the draft with weight 0."""
        try:
            answers = self._ask(rows)
        except ExpertUnavailable:
            self._lose(rows)
            return
        proposed = torch.tensor([answer.proposed_logprob for answer in answers])
        rejected = self._judge_drafts(rows, proposed.to(rows.device))
        waiting = rejected.cpu().nonzero().squeeze(-1).tolist()
        proposed_logprobs = {int(rows[index]): answers[index].proposed_logprob for index in waiting}
        open_rows, answers = rows[waiting], [answers[index] for index in waiting]
        while len(open_rows):
            open_rows = self._thin(open_rows, answers, proposed_logprobs)
            spent = self._num_drawn[open_rows.cpu()] >= _MAX_SAMPLES
            self._lose(open_rows[spent])
            open_rows = open_rows[~spent]
            if len(open_rows):
                try:
                    answers = self._ask(open_rows)
                except ExpertUnavailable:
                    self._lose(open_rows)
                    break
        lost = torch.tensor(self._settled.lost_rows, dtype=torch.int64, device=rows.device)
        _record_mixed(self._draft, self._settled, rows[~torch.isin(rows, lost)])

    def _ask(self, rows: Tensor) -> list[ExpertAnswer]:
        slots, drawn = rows.tolist(), self._num_drawn[rows.cpu()]
        seeds = derived_seeds(*self._purpose(slots), int(Stream.ADVICE) + drawn).tolist()
        gated = self._gated[rows].tolist()
        proposed = self._draft.token_ids[rows].tolist()
        queries = [
            ExpertQuery(
                sequence_id=self._batch.rows[slot].sequence_id,
                token_ids=self._batch.sequence(slot),
                proposed_token_id=proposed[index],
                temperature=float(self._batch.temperature[slot]),
                seed=seeds[index],
                num_samples=self._num_samples(int(drawn[index])) if gated[index] else 0,
            )
            for index, slot in enumerate(slots)
        ]
        self._settled.num_expert_calls += 1
        self._settled.num_expert_tokens += len(queries)
        answers = self._client.advise(queries)
        _check_answers(queries, answers, vocab_size=self._draft.policy.probs.shape[-1])
        return answers

    def _judge_drafts(self, rows: Tensor, expert_logprobs: Tensor) -> Tensor:
        """Record what the expert says of the drafts; true where a gated draft is rejected."""
        draft = self._draft
        policy_probs = draft.policy.probs[rows, draft.token_ids[rows]]
        accept = accept_probability(policy_probs, expert_logprobs.exp())
        self._settled.expert_logprobs[rows] = expert_logprobs
        return self._gated[rows] & (draft.uniforms[rows, Stream.ACCEPT] >= accept)

    def _thin(
        self, rows: Tensor, answers: list[ExpertAnswer], proposed_logprobs: dict[int, float]
    ) -> Tensor:
        """Keep each row's first sample z that passes with `max(0, 1 - pi_theta(z) / pi*(z))`.

        Returns the rows that have none.
        """
        settled, slots = self._settled, rows.tolist()
        width = max(len(answer.sample_token_ids) for answer in answers)
        samples = torch.zeros((len(slots), width), dtype=torch.int64)
        logprobs = torch.full((len(slots), width), -math.inf, dtype=torch.float64)
        for index, answer in enumerate(answers):
            count = len(answer.sample_token_ids)
            samples[index, :count] = torch.tensor(answer.sample_token_ids)
            logprobs[index, :count] = torch.tensor(answer.sample_logprobs, dtype=torch.float64)
        policy_probs = self._draft.policy.probs[rows].cpu().gather(-1, samples).double()
        drawn = self._num_drawn[slots].unsqueeze(-1)
        streams = int(Stream.THINNING) + drawn + torch.arange(width)
        seeds, sample_indices, positions = self._purpose(slots)
        chances = uniforms(seeds[:, None], sample_indices[:, None], positions[:, None], streams)
        # Where an answer is shorter, pi* is 0 here and nothing passes.
        passed = chances < 1.0 - policy_probs / logprobs.exp()
        self._num_drawn[slots] += torch.tensor([len(item.sample_token_ids) for item in answers])
        found, first = passed.any(dim=-1).tolist(), passed.int().argmax(dim=-1).tolist()
        for index in (index for index, is_found in enumerate(found) if is_found):
            slot, answer = slots[index], answers[index]
            token = answer.sample_token_ids[first[index]]
            settled.token_ids[slot] = token
            settled.sources[slot] = int(TokenSource.EXPERT)
            settled.expert_logprobs[slot] = answer.sample_logprobs[first[index]]
            settled.interventions[slot] = _intervention(
                self._draft, self._batch, settled, slot, token, proposed_logprobs[slot]
            )
        return rows[[index for index, is_found in enumerate(found) if not is_found]]

    def _purpose(self, slots: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Seed, sample index and position of the draws of some rows, [m] each."""
        batch = self._batch
        seeds, samples = torch.from_numpy(batch.seed[slots]), torch.from_numpy(batch.sample[slots])
        return seeds, samples, torch.from_numpy(batch.num_new[slots])

    @staticmethod
    def _num_samples(num_drawn: int) -> int:
        return min(max(_FIRST_SAMPLES, num_drawn), _MOST_SAMPLES_A_QUERY)

    def _lose(self, rows: Tensor) -> None:
        self._settled.weights[rows] = 0.0
        self._settled.sources[rows] = int(TokenSource.POLICY)
        self._settled.expert_logprobs[rows] = math.nan
        self._settled.lost_rows += rows.tolist()


def _check_answers(
    queries: list[ExpertQuery], answers: list[ExpertAnswer], *, vocab_size: int
) -> None:
    """A garbled answer counts as none, so that a broken expert cannot end the engine.

    Raises:
        ExpertUnavailable: an answer does not fit its query.
    """
    if len(answers) != len(queries):
        raise ExpertUnavailable(f"expected {len(queries)} answers, got {len(answers)}")
    for query, answer in zip(queries, answers, strict=True):
        ids, logprobs = answer.sample_token_ids, answer.sample_logprobs
        if not len(ids) == len(logprobs) == query.num_samples:
            raise ExpertUnavailable(f"expected {query.num_samples} samples, got {len(ids)}")
        if any(not 0 <= token < vocab_size for token in ids) or any(
            math.isnan(logprob) for logprob in (answer.proposed_logprob, *logprobs)
        ):
            raise ExpertUnavailable("expected token ids of the vocabulary with log-probabilities")


def _record_mixed(draft: Draft, settled: Settled, rows: Tensor) -> None:
    """`log((1 - w) pi_theta + w pi*)` of the emitted tokens, in log space."""
    emitted = settled.token_ids[rows].unsqueeze(-1)
    policy_logprobs = draft.policy.logprobs[rows].gather(-1, emitted).squeeze(-1)
    weights = settled.weights[rows]
    settled.mixed_logprobs[rows] = torch.logaddexp(
        torch.log1p(-weights) + policy_logprobs, weights.log() + settled.expert_logprobs[rows]
    )


def _intervention(
    draft: Draft, batch: Batch, settled: Settled, row: int, chosen: int, expert_logprob: float
) -> Intervention:
    proposed = int(draft.token_ids[row])
    return Intervention(
        position=int(batch.num_new[row]),
        proposed_token_id=proposed,
        chosen_token_id=chosen,
        entropy=float(draft.entropies[row]),
        weight=float(settled.weights[row]),
        policy_logprob=float(draft.policy.logprobs[row, proposed]),
        expert_logprob=expert_logprob,
    )
