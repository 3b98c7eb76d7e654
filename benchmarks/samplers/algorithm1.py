"""Algorithm 1 of the paper: the policy drafts K tokens, the expert scores them in one pass.

A draft y is kept with probability `min(1, pi_mix(y) / pi_theta(y))` (Eq. 7); at the first rejection
the token is drawn from `(pi_mix - pi_theta)_+` (Eq. 8), and what was drafted after it is thrown
away. There is no bonus token after K accepted drafts. In a batch all rows draft K tokens, then one
ragged expert pass scores all rows.

Between rounds both caches hold all of a row but its last token, so that in a round of m drafts the
policy reads the last token and the first m - 1 drafts one by one, and the expert the same m tokens
at once. A rejection truncates both. Rows that are done give their slot away, so neither model
computes for them any more. Shapes: n running rows, m drafts of one row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.samplers.slots import read_prompts
from benchmarks.samplers.workload import Purpose, SamplerRun, Workload
from mentor_serve.core.gate import guidance_weight
from mentor_serve.core.speculative import mix, residual
from mentor_serve.engines.sampler import Distribution, distribution, draw
from mentor_serve.engines.slots.slot_model import SlotModel

PUBLISHED_K = 4
"""What the authors use."""

Index = NDArray[np.int64]


class _Rows:
    """Progress of one run. Slot s belongs to row `order[s]`; other arrays are by row."""

    def __init__(self, workload: Workload, *, device: torch.device) -> None:
        num_rows = workload.num_rows
        self.workload = workload
        self.order: Index = np.arange(num_rows)
        self.prompt_len = np.array([len(prompt) for prompt in workload.row_prompts])
        self.last = np.array([prompt[-1] for prompt in workload.row_prompts])
        self.count = np.zeros(num_rows, np.int64)
        """Generated tokens."""
        self.token_ids = np.zeros((num_rows, workload.new_tokens), np.int64)
        self.draws = {purpose: workload.draws(purpose, device=device) for purpose in Purpose}
        self.weight_sum = 0.0
        self.rolled_back = 0

    def uniforms(self, purpose: Purpose, slots: Index, offsets: Index | int) -> Tensor:
        """Draws at the `offsets`-th token from now of slots, float64 [k]."""
        rows = self.order[slots]
        # A row that drafts no more still needs some number for its dummy draw.
        positions = np.minimum(self.count[rows] + offsets, self.workload.new_tokens - 1)
        table = self.draws[purpose]
        return table[_on(table.device, rows), _on(table.device, positions)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drafts:
    """One round of drafts in slots 0 .. n-1, where the longest has M tokens."""

    num: Index
    """[n] m of each row: K, or what is left of its response."""
    token_ids: Tensor
    """[n, M]; beyond a row's m, dummies."""
    logprobs: Tensor
    """[n, M] log pi_theta of the drafts."""
    weights: Tensor
    """[n, M] w."""
    policies: list[Distribution]
    """M batches of pi_theta, [n, V] each."""

    @property
    def flat(self) -> tuple[Index, Index]:
        """Slot and offset of every real draft, row by row: [sum m], [sum m]."""
        slot, offset = np.nonzero(np.arange(self.token_ids.shape[1]) < self.num[:, None])
        return slot, offset


class Algorithm1:
    """Modified speculative sampling as published, batched and cached."""

    def __init__(
        self, policy: Any, expert: Any, *, max_rows: int, max_tokens: int, k: int = PUBLISHED_K
    ) -> None:
        if k < 1:
            raise ValueError(f"k: expected at least one draft a round, got {k}")
        self._k = k
        self._policy = SlotModel(policy, max_slots=max_rows, max_tokens=max_tokens)
        self._expert = SlotModel(expert, max_slots=max_rows, max_tokens=max_tokens)

    @torch.inference_mode()
    def run(self, workload: Workload) -> SamplerRun:
        """Generate; one expert pass a round."""
        calls, read = self._expert.num_passes, self._expert.num_tokens_read
        read_prompts(self._policy, workload)
        read_prompts(self._expert, workload)
        rows = _Rows(workload, device=self._policy.device)
        while len(rows.order):
            self._verify(rows, self._draft(rows))
            self._drop_finished(rows)
        return SamplerRun(
            token_ids=rows.token_ids,
            mean_weight=rows.weight_sum / workload.num_tokens,
            expert_calls=self._expert.num_passes - calls,
            expert_tokens=self._expert.num_tokens_read - read,
            rolled_back=rows.rolled_back,
        )

    def _draft(self, rows: _Rows) -> _Drafts:
        """Let the policy run K tokens ahead in every row that has so many left."""
        slots = np.arange(len(rows.order))
        num = np.minimum(self._k, rows.workload.new_tokens - rows.count[rows.order])
        temperatures = rows.workload.temperatures(len(slots), device=self._policy.device)
        last = _on(self._policy.device, rows.last[rows.order])
        token_ids, logprobs, weights, policies = [], [], [], []
        for offset in range(int(num.max())):
            is_drafting = num > offset
            active = None if is_drafting.all() else is_drafting
            policy = distribution(self._policy.decode(last, active=active), temperatures)
            last = draw(policy.masses, rows.uniforms(Purpose.TOKEN, slots, offset))
            token_ids.append(last)
            logprobs.append(policy.logprobs_of(last))
            weights.append(guidance_weight(policy.entropies(), rows.workload.gamma))
            policies.append(policy)
        return _Drafts(
            num=num,
            token_ids=torch.stack(token_ids, dim=1),
            logprobs=torch.stack(logprobs, dim=1),
            weights=torch.stack(weights, dim=1),
            policies=policies,
        )

    def _verify(self, rows: _Rows, drafts: _Drafts) -> None:
        """Score all drafts in one expert pass; keep, replace and throw away."""
        expert = self._score(rows, drafts)
        slot, offset = drafts.flat
        device = self._policy.device
        at = _on(device, slot), _on(device, offset)
        weights = drafts.weights[at]
        gain = (expert.logprobs_of(drafts.token_ids[at]) - drafts.logprobs[at]).exp()
        # pi_mix(y) / pi_theta(y), without building pi_mix.
        ratio = (1.0 - weights) + weights * gain
        is_kept = rows.uniforms(Purpose.ACCEPT, slot, offset) < ratio
        kept = np.ones((len(drafts.num), drafts.token_ids.shape[1]), np.bool_)
        kept[slot, offset] = is_kept.cpu().numpy()
        is_rejected = ~kept.all(axis=1)
        first = kept.argmin(axis=1)
        token_ids = drafts.token_ids.cpu().numpy()
        if is_rejected.any():
            cut = np.flatnonzero(is_rejected)
            token_ids[cut, first[cut]] = self._replacements(rows, drafts, expert, cut, first[cut])
        num_emitted = np.where(is_rejected, first + 1, drafts.num)
        self._emit(rows, drafts, token_ids, num_emitted)

    def _score(self, rows: _Rows, drafts: _Drafts) -> Distribution:
        """pi* at every real draft, flat [sum m, V]."""
        last = rows.last[rows.order].tolist()
        pending = [
            [token, *row[: m - 1]]
            for token, row, m in zip(
                last, drafts.token_ids.tolist(), drafts.num.tolist(), strict=True
            )
        ]
        slots = list(range(len(pending)))
        logits = self._expert.read(slots, pending, [range(len(part)) for part in pending])
        return distribution(
            logits, rows.workload.temperatures(len(logits), device=self._expert.device)
        )

    def _replacements(
        self, rows: _Rows, drafts: _Drafts, expert: Distribution, cut: Index, first: Index
    ) -> Index:
        """Draw from the residual (Eq. 8) at the first rejections: slots [r], offsets [r] -> [r]."""
        device = self._policy.device
        own = torch.empty((len(cut), self._policy.vocab_size), device=device)
        for offset in np.unique(first).tolist():
            here = np.flatnonzero(first == offset)
            at_offset = drafts.policies[offset].logprobs_at(_on(device, cut[here]))
            own[_on(device, here)] = at_offset.exp()
        flat = (np.cumsum(drafts.num) - drafts.num)[cut] + first
        theirs = expert.logprobs_at(_on(device, flat)).exp()
        weights = drafts.weights[_on(device, cut), _on(device, first)]
        masses = residual(own, mix(own, theirs, weights))
        drawn: Index = draw(masses, rows.uniforms(Purpose.RESIDUAL, cut, first)).cpu().numpy()
        return drawn

    def _emit(self, rows: _Rows, drafts: _Drafts, token_ids: Index, num_emitted: Index) -> None:
        """Write tokens down and make both caches forget what follows."""
        slot, offset = np.nonzero(np.arange(token_ids.shape[1]) < num_emitted[:, None])
        row = rows.order[slot]
        rows.token_ids[row, rows.count[row] + offset] = token_ids[slot, offset]
        rows.weight_sum += float(drafts.weights.cpu().numpy()[slot, offset].sum())
        rows.rolled_back += int((drafts.num - num_emitted).sum())
        rows.count[rows.order] += num_emitted
        rows.last[rows.order] = token_ids[np.arange(len(num_emitted)), num_emitted - 1]
        for cut in np.flatnonzero(num_emitted < drafts.num).tolist():
            length = int(rows.prompt_len[rows.order[cut]] + rows.count[rows.order[cut]]) - 1
            self._policy.truncate(cut, length)
            self._expert.truncate(cut, length)

    def _drop_finished(self, rows: _Rows) -> None:
        """Move the last running rows into the slots of finished ones."""
        is_running = rows.count[rows.order] < rows.workload.new_tokens
        num_left = int(is_running.sum())
        holes = np.flatnonzero(~is_running[:num_left])
        sources = num_left + np.flatnonzero(is_running[num_left:])
        if len(holes):
            for model in (self._policy, self._expert):
                model.move(sources.tolist(), holes.tolist())
            rows.order[holes] = rows.order[sources]
        rows.order = rows.order[:num_left]


def _on(device: torch.device, index: Index) -> Tensor:
    return torch.from_numpy(index).to(device)
