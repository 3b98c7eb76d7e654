"""Stand-ins for vLLM's samplers: every token is drawn by `draws`, from the logits of a step.

They read the batch as vLLM 0.32 lays it out (`worker.PRIVATE_NAMES`).

A mixed row's first token follows pi_mix like every other, though vLLM's first pass over a prompt
has no draft yet: vLLM is given the prompt without its last token and made to emit that one first,
while the policy drafts what follows it. Nor is there a bonus token from the expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mentor_serve.engines.batch import Stream
from mentor_serve.engines.vllm.draws import (
    Asked,
    Drafts,
    Judged,
    Scratch,
    draw_policy,
    judge,
    mixed_records,
)
from mentor_serve.engines.vllm.rows import EXTRA_ARG, Rows, RowSampling, StepRecords
from mentor_serve.types import TokenSource

_NO_TOKEN = -1


class _StepSampler:
    """What both samplers share: the rows of a step, and their records."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.version = 0
        self.records: StepRecords | None = None
        self._known: dict[str, RowSampling] = {}
        self._rows = Rows([], np.zeros(0, np.int64))

    def _current_rows(self) -> Rows:
        """The batch's rows in vLLM's order, at the positions that they draw next."""
        batch = self.runner.input_batch
        request_ids = batch.req_ids
        held = batch.num_tokens_no_spec[: len(request_ids)].astype(np.int64)
        if request_ids != list(self._known):
            self._known = {name: self._known.get(name) or self._row(name) for name in request_ids}
            self._rows = Rows(list(self._known.values()), held)
        return self._rows.moved_to(held - self._rows.prompt_len)

    def _row(self, request_id: str) -> RowSampling:
        arguments = self.runner.requests[request_id].sampling_params.extra_args[EXTRA_ARG]
        return RowSampling(**arguments)

    def _is_reading(self, num_rows: int) -> NDArray[np.bool_]:
        """[B] rows whose prompt is not read to its end: vLLM drops what is sampled for them."""
        reading: NDArray[np.bool_] = self.runner.discard_request_mask.np[:num_rows].astype(np.bool_)
        return reading


class PolicySampler(_StepSampler):
    """Stands in for vLLM's `Sampler`: one token of the policy a row."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._scorer = runner.sampler
        self._scratch = Scratch()

    def __call__(self, *, logits: Tensor, sampling_metadata: Any) -> Any:
        """Sample a step's tokens: [B, V] -> vLLM's `SamplerOutput` of [B, 1]."""
        rows = self._current_rows()
        drafts = draw_policy(logits, rows, self._scratch)
        records = StepRecords.empty(rows.keys, 1)
        records.counts[:] = ~self._is_reading(len(rows))
        _record_drafts(records, drafts, column=0, version=self.version)
        # A mixed row is here only if its weight is zero to within the uniforms' resolution.
        records.records["sources"][:] = TokenSource.POLICY
        records.top_logprobs = {row: [top] for row, top in drafts.top_logprobs.items()}
        self.records = records
        return _sampler_output(drafts.ids.unsqueeze(-1))

    def compute_logprobs(self, logits: Tensor) -> Tensor:
        """[n, V] log-probabilities at temperature 1, for the scores of prompt tokens."""
        scores: Tensor = self._scorer.compute_logprobs(logits)
        return scores

    def gather_logprobs(self, logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> Any:
        """Of given tokens [n] and the likeliest; without vLLM's ranks, which it compiles first."""
        from vllm.v1.outputs import LogprobsTensors

        top = logprobs.topk(num_logprobs, dim=-1)
        given = token_ids.unsqueeze(-1)
        ids = torch.cat([given, top.indices], dim=-1).to(torch.int32)
        values = torch.cat([logprobs.gather(-1, given), top.values], dim=-1)
        return LogprobsTensors(ids, values, torch.zeros_like(token_ids, dtype=torch.int32))


@dataclass(slots=True, kw_only=True)
class _Draft:
    """What the policy drafted after the last step, waiting for the expert's word."""

    rows: Rows
    """Positions are those of the first draft."""
    index: dict[int, int]
    """From key to row."""
    steps: list[Drafts]
    """K, one for each token that was drafted ahead."""
    version: int


class MixedSampler(_StepSampler):
    """Stands in for vLLM's `RejectionSampler`: pi_mix from drafts of the policy."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._draft: _Draft | None = None
        self._next: Rows | None = None
        """Rows of the last step at the positions that they draw next."""
        self._scratch: list[Scratch] = []
        """One for each token that is drafted ahead: the policy is kept until the expert's word."""
        self._judging = Scratch()

    def __call__(
        self, metadata: Any, draft_probs: None, logits: Tensor, sampling_metadata: Any
    ) -> Any:
        """Settle a step's drafts: vLLM's `SamplerOutput` of [B, K + 1], -1 where nothing is."""
        counts = np.array(metadata.num_draft_tokens, np.int64)
        drafted = metadata.draft_token_ids.cpu().numpy().astype(np.int64)
        return self._settle(counts, drafted, logits, metadata.target_logits_indices)

    def without_drafts(self, *, logits: Tensor, sampling_metadata: Any) -> Any:
        """The same for a step in which no row has a draft."""
        num_rows = len(self.runner.input_batch.req_ids)
        nothing = np.zeros(num_rows, np.int64)
        return self._settle(nothing, nothing[:0], logits, nothing[:0])

    def begin_drafts(self) -> None:
        """The policy is about to draft behind what `_settle` gave."""
        if self._next is None:
            raise RuntimeError("vLLM drafts before it has sampled: not the order of version 0.32")
        index = {key: row for row, key in enumerate(self._next.keys)}
        self._draft = _Draft(rows=self._next, index=index, steps=[], version=self.version)

    def draft(self, logits: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor]:
        """One more token for each row: [B, V] -> ids [B], and what vLLM keeps as their probs."""
        draft = self._draft
        if draft is None or len(draft.rows) != len(logits):
            raise RuntimeError("vLLM drafts for other rows than it sampled: not as in version 0.32")
        offset = len(draft.steps)
        if offset == len(self._scratch):
            self._scratch.append(Scratch())
        drafts = draw_policy(logits, draft.rows, self._scratch[offset], offset=offset)
        draft.steps.append(drafts)
        return drafts.ids, drafts.ids.unsqueeze(-1)

    def _settle(
        self,
        counts: NDArray[np.int64],
        drafted: NDArray[np.int64],
        logits: Tensor,
        target_indices: Any,
    ) -> Any:
        rows = self._current_rows()
        num_rows, width = len(rows), int(counts.max(initial=0)) + 1
        records = StepRecords.empty(rows.keys, width)
        tokens = np.full((num_rows, width), _NO_TOKEN, np.int64)
        is_reading = self._is_reading(num_rows)
        starts = np.cumsum(counts) - counts
        draft = self._draft
        sources = _drafted_rows(draft, rows, counts, starts, drafted)
        for row in np.flatnonzero((sources < 0) & ~is_reading).tolist():
            # The end of the prompt, or a row that vLLM had put out and took in again: without a
            # draft there is nothing to mix, so the engine submits it again from where it was.
            forced = rows.rows[row].forced_token
            is_first = forced >= 0 and not self._num_emitted(row)
            tokens[row, 0] = forced if is_first else 0
            records.is_lost[row] = not is_first
        settled = np.flatnonzero((sources >= 0) & ~is_reading)
        if draft is not None and len(settled):
            _settle_drafts(draft, records, settled, sources, counts)
            rows_asked, columns = _open_positions(records, draft, settled, sources, counts)
            if len(rows_asked):
                at = torch.from_numpy(starts[rows_asked] + columns).to(logits.device)
                asked = _asked(draft, sources, rows_asked, columns, logits[target_indices[at]])
                judged = judge(asked, self._judging)
                _record_judged(records, judged, asked.is_gated, rows_asked, columns)
            for row in settled.tolist():
                count = records.counts[row]
                tokens[row, :count] = records.records["token_ids"][row, :count]
        records.num_drafted = int(counts[settled].sum())
        self.records = records
        self._next = rows.moved_to(rows.positions + (tokens != _NO_TOKEN).sum(axis=1))
        return _sampler_output(torch.from_numpy(tokens).to(logits.device))

    def _num_emitted(self, row: int) -> int:
        batch = self.runner.input_batch
        return len(self.runner.requests[batch.req_ids[row]].output_token_ids)


def _drafted_rows(
    draft: _Draft | None,
    rows: Rows,
    counts: NDArray[np.int64],
    starts: NDArray[np.int64],
    drafted: NDArray[np.int64],
) -> NDArray[np.int64]:
    """[B] the row of `_draft` that each row's drafts come from, -1 without any."""
    found = np.full(len(rows), -1, np.int64)
    if draft is None:
        return found
    for row, (key, count) in enumerate(zip(rows.keys, counts.tolist(), strict=True)):
        source = draft.index.get(key, -1)
        if source < 0 or not count or draft.rows.positions[source] != rows.positions[row]:
            continue
        given = drafted[starts[row] : starts[row] + count].tolist()
        if given == [step.token_ids[source] for step in draft.steps[:count]]:
            found[row] = source
    return found


def _settle_drafts(
    draft: _Draft,
    records: StepRecords,
    settled: NDArray[np.int64],
    sources: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> None:
    """Fill the records of the rows `settled` as if every draft stood."""
    records.counts[settled] = counts[settled]
    for column in range(int(counts[settled].max())):
        rows = settled[counts[settled] > column]
        drafts = draft.steps[column]
        _record_drafts(
            records, drafts, column=column, version=draft.version, to=rows, of=sources[rows]
        )
        for row in rows[draft.rows.num_top_logprobs[sources[rows]] > 0].tolist():
            top = drafts.top_logprobs[int(sources[row])]
            records.top_logprobs.setdefault(row, []).append(top)


def _record_drafts(
    records: StepRecords,
    drafts: Drafts,
    *,
    column: int,
    version: int,
    to: NDArray[np.int64] | slice = slice(None),
    of: NDArray[np.int64] | slice = slice(None),
) -> None:
    """Write rows `of` of some drafts into rows `to` of the records."""
    for name, values in (
        ("token_ids", drafts.token_ids),
        ("policy_logprobs", drafts.logprobs),
        ("entropies", drafts.entropies),
        ("weights", drafts.weights),
    ):
        records.records[name][to, column] = values[of]
    records.records["mixed_logprobs"][to, column] = np.nan
    records.records["expert_logprobs"][to, column] = np.nan
    records.records["sources"][to, column] = drafts.is_gated[of]
    records.records["policy_versions"][to, column] = version


def _open_positions(
    records: StepRecords,
    draft: _Draft,
    settled: NDArray[np.int64],
    sources: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the drafts that need the expert, row by row."""
    width = records.records["token_ids"].shape[1]
    is_drafted = np.arange(width) < counts[settled, None]
    is_recorded = draft.rows.is_recorded[sources[settled], None]
    is_open = is_drafted & (is_recorded | (records.records["sources"][settled] > 0))
    index, columns = np.nonzero(is_open)
    return settled[index], columns


def _asked(
    draft: _Draft,
    sources: NDArray[np.int64],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    logits: Tensor,
) -> Asked:
    """Question to the expert about the drafts at [m] rows and columns."""
    of = sources[rows]
    steps = draft.steps[: int(columns.max()) + 1]
    draws = {
        stream: np.stack([draft.rows.uniforms(stream, offset=k).numpy() for k in range(len(steps))])
        for stream in (Stream.ACCEPT, Stream.RESIDUAL)
    }

    def policy_at(which: NDArray[np.int64]) -> Tensor:
        found = logits.new_empty((len(which), logits.shape[-1]), dtype=torch.float32)
        for column in np.unique(columns[which]).tolist():
            here = np.flatnonzero(columns[which] == column)
            at = torch.from_numpy(of[which[here]]).to(logits.device)
            found[torch.from_numpy(here).to(logits.device)] = steps[column].policy.logprobs_at(at)
        return found

    return Asked(
        rows=rows,
        logits=logits,
        token_ids=np.stack([step.token_ids for step in steps])[columns, of],
        policy_logprobs=np.stack([step.logprobs for step in steps])[columns, of],
        policy_at=policy_at,
        temperatures=draft.rows.temperature[of],
        is_gated=np.stack([step.is_gated for step in steps])[columns, of],
        accept_draws=draws[Stream.ACCEPT][columns, of],
        residual_draws=draws[Stream.RESIDUAL][columns, of],
    )


def _record_judged(
    records: StepRecords,
    judged: Judged,
    is_gated: NDArray[np.bool_],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
) -> None:
    """Write the expert's verdicts down, and end each row at its first rejected draft."""
    weights = records.records["weights"][rows, columns]
    for name, values in mixed_records(judged, weights, is_gated).items():
        kept = judged.counts
        records.records[name][rows[kept], columns[kept]] = values[kept]
    replaced = judged.is_replaced
    cut, at = rows[replaced], columns[replaced]
    records.proposed_policy_logprobs[cut, at] = judged.proposed_policy_logprobs[replaced]
    records.proposed_expert_logprobs[cut, at] = judged.proposed_expert_logprobs[replaced]
    records.proposed[cut, at] = judged.proposed_token_ids[replaced]
    records.counts[cut] = at + 1


def _sampler_output(token_ids: Tensor) -> Any:
    from vllm.v1.outputs import SamplerOutput

    return SamplerOutput(sampled_token_ids=token_ids.to(torch.int32), logprobs_tensors=None)
