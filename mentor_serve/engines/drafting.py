"""One policy pass: draft a token for every row that may go on, toss its coin, note how rows end."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mentor_serve.core.gate import guidance_weight
from mentor_serve.engines.advisors import Decoding
from mentor_serve.engines.batch import Ending, SlotIndex, Stream
from mentor_serve.engines.sampler import Distribution, distribution, draw, truncated
from mentor_serve.engines.stopping import ends_at_stop
from mentor_serve.types import TokenSource


class Drafter:
    """Drafts tokens into `decoding.batch`.

    Args:
        is_eos: [V] tokens that end a response.
        tokenizer: for stop strings.
        has_expert: mixed rows exist.
    """

    def __init__(
        self, decoding: Decoding, *, is_eos: NDArray[np.bool_], tokenizer: Any, has_expert: bool
    ) -> None:
        self._decoding = decoding
        self._is_eos = is_eos
        self._tokenizer = tokenizer
        self._has_expert = has_expert

    def draft(self, *, version: int) -> None:
        """One pass over the rows that may go on, whose tokens follow the weights of `version`."""
        decoding, batch = self._decoding, self._decoding.batch
        started = time.perf_counter()
        can_draft = decoding.can_draft()
        slots = np.flatnonzero(can_draft)
        if not len(slots):
            return
        num_rows = int(slots[-1]) + 1
        policy = self._policy_pass(slots, can_draft[:num_rows])
        draws = batch.uniforms(slots)
        token_ids = self._choose(policy, slots, draws)
        # The only wait for the device in a pass: everything the host needs comes in one tensor.
        drafted = torch.stack(
            [
                token_ids.double(),
                policy.logprobs_of(token_ids).double(),
                policy.entropies().double(),
            ]
        )
        ids, logprobs, entropies = drafted.cpu().numpy()
        self._note_top_logprobs(policy, slots)
        self._record(slots, policy, draws, ids, logprobs, entropies.astype(np.float32), version)
        self.note_endings(slots)
        decoding.stats.policy_steps += 1
        decoding.run_ahead.observe_pass(num_rows, time.perf_counter() - started)

    def note_endings(self, slots: SlotIndex) -> None:
        """Work out whether the last token of each slot ends it."""
        batch = self._decoding.batch
        at_eos = self._is_eos[batch.last_token[slots]] & batch.ends_at_eos[slots]
        at_limit = batch.num_new[slots] >= batch.limit[slots]
        ending = np.where(at_eos, Ending.EOS, np.where(at_limit, Ending.LENGTH, Ending.NONE))
        for index in np.flatnonzero(batch.has_stops[slots] & ~at_eos).tolist():
            slot = int(slots[index])
            sampling = batch.rows[slot].job.request.sampling
            if ends_at_stop(batch.response(slot), sampling, self._tokenizer):
                ending[index] = Ending.STOP
        batch.ending[slots] = ending

    def _policy_pass(self, slots: SlotIndex, can_draft: NDArray[np.bool_]) -> Distribution:
        batch, policy = self._decoding.batch, self._decoding.policy
        is_whole = len(slots) == len(can_draft)
        last_tokens = torch.from_numpy(batch.last_token[: len(can_draft)]).to(policy.device)
        logits = policy.decode(last_tokens, active=None if is_whole else can_draft)
        if not is_whole:
            logits = logits[torch.from_numpy(slots).to(policy.device)]
        temperatures = batch.temperature[slots]
        if (temperatures == 1).all():
            return distribution(logits)
        return distribution(logits, torch.from_numpy(temperatures).to(policy.device))

    def _choose(self, policy: Distribution, slots: SlotIndex, draws: NDArray[np.float64]) -> Tensor:
        """Drafts [k]: sampled, truncated first where a row asks for it, or greedy."""
        batch, masses = self._decoding.batch, policy.masses
        device = masses.device
        cut = np.flatnonzero((batch.top_p[slots] < 1) | (batch.top_k[slots] > 0))
        if len(cut):
            rows = torch.from_numpy(cut).to(device)
            top_p = torch.from_numpy(batch.top_p[slots[cut]]).to(device)
            top_k = torch.from_numpy(batch.top_k[slots[cut]]).to(device)
            masses = masses.clone()
            masses[rows] = truncated(masses[rows], top_p=top_p, top_k=top_k)
        token_ids = draw(masses, torch.from_numpy(draws[:, Stream.TOKEN].copy()).to(device))
        greedy = np.flatnonzero(batch.is_greedy[slots])
        if len(greedy):
            rows = torch.from_numpy(greedy).to(device)
            token_ids[rows] = policy.most_likely(rows)
        return token_ids

    def _record(
        self,
        slots: SlotIndex,
        policy: Distribution,
        draws: NDArray[np.float64],
        token_ids: NDArray[np.float64],
        logprobs: NDArray[np.float64],
        entropies: NDArray[np.float32],
        version: int,
    ) -> None:
        batch, tails = self._decoding.batch, self._decoding.tails
        is_mixed = batch.is_mixed[slots]
        weights = np.zeros(len(slots), np.float32)
        if self._has_expert and is_mixed.any():
            weights = np.where(is_mixed, self._gate(slots, entropies), weights)
        is_gated = draws[:, Stream.COIN] < weights
        batch.record(
            slots,
            {
                "token_ids": token_ids,
                "policy_logprobs": logprobs,
                "mixed_logprobs": np.nan,
                "expert_logprobs": np.nan,
                "entropies": entropies,
                "weights": weights,
                "sources": np.where(is_gated, int(TokenSource.GATED_KEPT), 0),
                "policy_versions": version,
            },
        )
        is_open = is_gated | (batch.is_recorded[slots] & is_mixed)
        if is_open.any():
            self._open(np.flatnonzero(is_open), slots, policy, draws, is_gated)
        settled = slots[tails.count[slots] == 0]
        batch.num_settled[settled] = batch.num_new[settled]

    def _gate(self, slots: SlotIndex, entropies: NDArray[np.float32]) -> NDArray[np.float32]:
        """Weights [k] of mixed rows: Eq. 6, but for what their requests put in its place."""
        batch = self._decoding.batch
        gammas = torch.from_numpy(batch.gamma[slots])
        weights = guidance_weight(torch.from_numpy(entropies), gammas).numpy()
        given = np.where(
            (batch.num_new[slots] == 0) & ~np.isnan(batch.first_weight[slots]),
            batch.first_weight[slots],
            batch.constant_weight[slots],
        )
        return np.where(np.isnan(given), weights, given)

    def _open(
        self,
        rows: NDArray[np.int64],
        slots: SlotIndex,
        policy: Distribution,
        draws: NDArray[np.float64],
        is_gated: NDArray[np.bool_],
    ) -> None:
        batch, rejections = self._decoding.batch, self._decoding.run_ahead.rejections
        opened = slots[rows]
        positions = batch.num_new[opened] - 1
        cells = rejections.cells(
            batch.records["weights"][opened, positions],
            batch.records["policy_logprobs"][opened, positions],
        )
        self._decoding.tails.open(
            opened,
            positions=positions,
            is_gated=is_gated[rows],
            draws=draws[rows],
            logprobs=policy.logprobs_at(torch.from_numpy(rows).to(policy.masses.device)),
            risks=rejections.risks(cells),
            cells=cells,
        )

    def _note_top_logprobs(self, policy: Distribution, slots: SlotIndex) -> None:
        batch = self._decoding.batch
        wanted = np.flatnonzero(batch.num_top_logprobs[slots])
        if not len(wanted):
            return
        most = int(batch.num_top_logprobs[slots[wanted]].max())
        top = policy.logprobs_at(torch.from_numpy(wanted).to(policy.masses.device)).topk(most)
        for slot, ids, logprobs in zip(
            slots[wanted].tolist(), top.indices.tolist(), top.values.tolist(), strict=True
        ):
            pairs = list(zip(ids, logprobs, strict=True))
            batch.rows[slot].top_logprobs.append(pairs[: batch.num_top_logprobs[slot]])
