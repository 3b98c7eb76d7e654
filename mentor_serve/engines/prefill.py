"""Reading prompts: in chunks beside decoding, once for all rollouts of a prompt.

A row is *reading* until its slot holds all of the prompt but its last token, which the first decode
step reads. Rows of one prompt under the same weights share: one reads, the others copy its keys
and values. A step reads at most `CHUNK_TOKENS` tokens, so that running rows never wait for a long
prompt.
"""

from __future__ import annotations

import numpy as np
import torch

from mentor_serve.engines.base import EngineStats
from mentor_serve.engines.batch import Batch
from mentor_serve.engines.sampler import distribution
from mentor_serve.engines.scheduler import Job
from mentor_serve.engines.slots.slot_model import SlotModel
from mentor_serve.types import FloatArray

CHUNK_TOKENS = 512
"""Prompt tokens that one step reads."""
_SCORED_CHUNK_TOKENS = 128
"""The same for a prompt whose tokens are scored: each of those costs a row of the vocabulary."""


class Prefill:
    """Brings the prompts of a batch into its policy's slots."""

    def __init__(self, policy: SlotModel, batch: Batch, stats: EngineStats) -> None:
        self._policy = policy
        self._batch = batch
        self._stats = stats
        self._scores_of: dict[int, tuple[FloatArray, list[list[tuple[int, float]]]]] = {}
        """Log-probabilities and alternatives of half-read prompts, by request."""

    def forget(self, request_id: int) -> None:
        """A request ended before its prompt was read."""
        self._scores_of.pop(request_id, None)

    def restart(self, version: int) -> None:
        """New weights: what rows have read of their prompts so far is void."""
        for slot in np.flatnonzero(self._batch.is_reading[: self._batch.num_rows]).tolist():
            self._policy.truncate(slot, 0)
            self._batch.rows[slot].prefill_version = version

    def advance(self) -> None:
        """Read one step's share; rows whose prompt is complete stop reading."""
        batch = self._batch
        reading = np.flatnonzero(batch.is_reading[: batch.num_rows]).tolist()
        if not reading:
            return
        reading = self._take_over(reading)
        chunks = self._chunks(reading)
        self._read([(slot, chunk) for slot, chunk in chunks.items() if not self._scores(slot)])
        for slot, chunk in chunks.items():
            if self._scores(slot):
                self._score(slot, chunk)
        for slot in chunks:
            batch.is_reading[slot] = self._num_left(slot) > 0
        self._take_over([slot for slot in reading if batch.is_reading[slot]])

    def _num_left(self, slot: int) -> int:
        return len(self._batch.rows[slot].job.prompt) - 1 - int(self._policy.lengths[slot])

    def _scores(self, slot: int) -> bool:
        """Is this the row that scores its prompt, for all samples of its job?"""
        row = self._batch.rows[slot]
        return row.job.request.prompt_logprobs and row.sample_index == row.job.scored_by

    def _take_over(self, reading: list[int]) -> list[int]:
        """Copy complete prompts from other rows; returns the rows that must still read."""
        batch = self._batch
        donors: dict[tuple[tuple[int, ...], int], int] = {}
        for slot in np.flatnonzero(~batch.is_reading[: batch.num_rows]).tolist():
            row = batch.rows[slot]
            donors.setdefault((row.job.prompt, row.prefill_version), slot)
        left: list[int] = []
        takers: dict[int, list[int]] = {}
        for slot in reading:
            row = batch.rows[slot]
            donor = donors.get((row.job.prompt, row.prefill_version))
            needs_scores = row.job.request.prompt_logprobs and row.job.prompt_logprobs is None
            if donor is None or needs_scores:
                left.append(slot)
            else:
                takers.setdefault(donor, []).append(slot)
        for donor, slots in takers.items():
            count = len(batch.rows[donor].job.prompt) - 1
            self._policy.copy(donor, slots, num_tokens=count)
            self._stats.shared_prefill_tokens += count * len(slots)
            batch.is_reading[slots] = False
        return left

    def _chunks(self, reading: list[int]) -> dict[int, list[int]]:
        """Which tokens which rows read in this step: one row a prompt, urgent ones first."""
        readers: dict[tuple[tuple[int, ...], int], int] = {}
        rows = self._batch.rows
        for slot in sorted(reading, key=lambda slot: -rows[slot].job.request.priority):
            row = rows[slot]
            job: Job = row.job
            if job.request.prompt_logprobs and job.prompt_logprobs is None:
                if job.scored_by is None:
                    job.scored_by = row.sample_index
                if self._scores(slot):
                    readers[(job.prompt, -1 - job.request_id)] = slot
            else:
                readers.setdefault((job.prompt, row.prefill_version), slot)
        budget = CHUNK_TOKENS
        chunks: dict[int, list[int]] = {}
        for slot in readers.values():
            start = int(self._policy.lengths[slot])
            most = min(budget, _SCORED_CHUNK_TOKENS) if self._scores(slot) else budget
            chunk = list(rows[slot].job.prompt[start : len(rows[slot].job.prompt) - 1][:most])
            budget -= len(chunk)
            if chunk or self._num_left(slot) == 0:
                chunks[slot] = chunk
        return chunks

    def _read(self, chunks: list[tuple[int, list[int]]]) -> None:
        chunks = [(slot, chunk) for slot, chunk in chunks if chunk]
        if chunks:
            slots, tokens = [slot for slot, _ in chunks], [chunk for _, chunk in chunks]
            self._policy.read(slots, tokens, [[] for _ in chunks])
            self._stats.prefill_tokens += sum(map(len, tokens))

    def _score(self, slot: int, chunk: list[int]) -> None:
        """Read a chunk and record the log-probability of the token after each of its tokens."""
        job, batch = self._batch.rows[slot].job, self._batch
        num_top = job.request.sampling.top_logprobs
        start = int(self._policy.lengths[slot])
        if start == 0:
            self._scores_of[job.request_id] = (
                np.full(len(job.prompt), np.nan, np.float32),
                [[]],
            )
        logprobs, top_logprobs = self._scores_of[job.request_id]
        if chunk:
            logits = self._policy.read([slot], [chunk], [range(len(chunk))])
            temperature = torch.tensor([batch.temperature[slot]], device=logits.device)
            policy = distribution(logits, temperature.expand(len(chunk)))
            after = slice(start + 1, start + 1 + len(chunk))
            next_ids = torch.tensor(job.prompt[after], device=logits.device)
            logprobs[after] = policy.logprobs_of(next_ids).cpu().numpy()
            best = policy.logprobs.topk(num_top)
            rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            top_logprobs += [list(zip(*row, strict=True)) for row in rows]
            self._stats.prefill_tokens += len(chunk)
        if self._num_left(slot) == 0:
            job.prompt_logprobs = logprobs
            job.prompt_top_logprobs = top_logprobs if num_top else None
            del self._scores_of[job.request_id]
