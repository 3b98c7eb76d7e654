"""When the expert is asked, and what becomes of its answers: colocated or in another process.

Both decide by `RunAhead`, judge by `mixing`, and roll the caches of rejected rows back. They differ
in who waits: a colocated expert computes in the engine's thread, a remote one answers when it
can while the policy goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mentor_serve.engines import mixing, remote_mixing
from mentor_serve.engines.advice import ExpertAnswers, ExpertQueries
from mentor_serve.engines.base import EngineStats
from mentor_serve.engines.batch import Batch, SlotIndex
from mentor_serve.engines.expert import ExpertModel
from mentor_serve.engines.expert_link import ExpertLink
from mentor_serve.engines.mixing import Verdicts
from mentor_serve.engines.run_ahead import RunAhead
from mentor_serve.engines.slots.slot_model import SlotModel
from mentor_serve.engines.tails import Tails
from mentor_serve.errors import ExpertUnavailable

_WAIT_S = 0.02
"""Longest wait for a remote expert in one step, and only where no row can go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """What the parts of an engine share."""

    policy: SlotModel
    batch: Batch
    tails: Tails
    run_ahead: RunAhead
    stats: EngineStats

    def can_draft(self) -> NDArray[np.bool_]:
        """Rows that may draft another token: [n]."""
        batch, tails, n = self.batch, self.tails, self.batch.num_rows
        can: NDArray[np.bool_] = (
            ~batch.is_reading[:n]
            & (batch.ending[:n] == 0)
            & ~tails.is_rejected[:n]
            & self.run_ahead.may_go_on(tails.count[:n], tails.survival[:n])
        )
        return can

    def apply(self, verdicts: Verdicts) -> SlotIndex:
        """Write verdicts down and learn from them; returns slots whose last token changed."""
        tails = self.tails
        is_gated = tails.is_gated[verdicts.slots, verdicts.index]
        cells = tails.cells[verdicts.slots, verdicts.index][is_gated]
        self.run_ahead.rejections.learn(cells, verdicts.is_replaced[is_gated])
        before = self.batch.num_new.copy()
        cut = mixing.apply(verdicts, self.batch, tails)
        self.roll_back(cut, before)
        return cut

    def roll_back(self, slots: SlotIndex, before: NDArray[np.int64]) -> None:
        """Caches forget what slots drafted beyond their last token: `before` is the old count."""
        batch, tails = self.batch, self.tails
        read = batch.prompt_len[slots] + batch.num_new[slots] - 1
        for slot, num_tokens in zip(slots.tolist(), read.tolist(), strict=True):
            self.policy.truncate(slot, num_tokens)
        tails.num_held[slots] = np.minimum(tails.num_held[slots], read)
        self.stats.rolled_back_tokens += int((before[slots] - batch.num_new[slots]).sum())


class Advisor(Protocol):
    """An expert, as the engine uses it."""

    def consult(self) -> SlotIndex:
        """Ask if that is worth it now; returns the slots whose last token may be another now."""

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Follow rows into other slots."""

    def end(self, slots: Sequence[int]) -> None:
        """Forget rows that ended."""

    def close(self) -> None:
        """Let go of threads and connections."""


class ColocatedAdvisor:
    """An expert beside the policy: the engine computes its passes itself."""

    def __init__(self, decoding: Decoding, model: ExpertModel) -> None:
        self._decoding = decoding
        self._model = model

    def consult(self) -> SlotIndex:
        """Settle every open position in one pass, if that pays now."""
        decoding, n = self._decoding, self._decoding.batch.num_rows
        tails = decoding.tails
        slots = np.flatnonzero(tails.count[:n])
        if not len(slots):
            return slots
        can_draft = decoding.can_draft()
        going_on = np.flatnonzero(can_draft)
        if len(going_on) and not decoding.run_ahead.should_ask(
            tails.survival[going_on], num_rows=int(going_on[-1]) + 1
        ):
            return slots[:0]
        return self._ask(slots)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Follow rows into other slots."""
        self._model.move(sources, targets)

    def end(self, slots: Sequence[int]) -> None:
        """Forget rows that ended."""
        self._model.free(slots)

    def close(self) -> None:
        """Nothing to let go of."""

    def _ask(self, slots: SlotIndex) -> SlotIndex:
        decoding, cache = self._decoding, self._model.slots
        started = time.perf_counter()
        passes, tokens_read = cache.num_passes, cache.num_tokens_read
        verdicts = mixing.judge(decoding.batch, decoding.tails, self._model, slots)
        cut = decoding.apply(verdicts)
        batch = decoding.batch
        for slot in cut.tolist():
            self._model.rollback(slot, int(batch.prompt_len[slot] + batch.num_new[slot]) - 1)
        num_tokens = cache.num_tokens_read - tokens_read
        decoding.stats.expert_calls += cache.num_passes - passes
        decoding.stats.expert_tokens += num_tokens
        decoding.run_ahead.observe_call(num_tokens, time.perf_counter() - started)
        return cut


class RemoteAdvisor:
    """An expert elsewhere: one question out at a time, and the policy goes on meanwhile."""

    def __init__(self, decoding: Decoding, link: ExpertLink) -> None:
        self._decoding = decoding
        self._link = link
        self._asked: ExpertQueries | None = None
        self._num_calls = 0

    def consult(self) -> SlotIndex:
        """Take in what was answered, ask what is open; waits (briefly) only if no row can go on."""
        cut = self._take_in(self._link.poll())
        self._ask()
        if self._asked is not None and not self._decoding.can_draft().any():
            late = self._take_in(self._link.poll(timeout_s=_WAIT_S))
            cut = np.concatenate([cut, late])
        self._decoding.stats.expert_bytes = self._link.num_bytes
        return cut

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Questions name sequences, not slots."""

    def end(self, slots: Sequence[int]) -> None:
        """Let the expert forget rows that ended, if it ever knew them."""
        batch, tails = self._decoding.batch, self._decoding.tails
        asked = set() if self._asked is None else set(self._asked.sequence_ids.tolist())
        known = [
            sequence_id
            for slot in slots
            if (sequence_id := batch.rows[slot].sequence_id) in asked or tails.num_held[slot]
        ]
        if known:
            self._link.release(known)

    def close(self) -> None:
        """End the link's thread."""
        self._link.close()

    def _ask(self) -> None:
        decoding, n = self._decoding, self._decoding.batch.num_rows
        if self._asked is not None or self._link.is_busy:
            return
        slots = np.flatnonzero(decoding.tails.count[:n])
        # Time spent on the expert's device is not the policy's: ask as soon as it is free.
        if len(slots) and (decoding.run_ahead.asks_at_once or not decoding.can_draft().any()):
            self._num_calls += 1
            self._asked = remote_mixing.queries(
                decoding.batch, decoding.tails, slots, call=self._num_calls
            )
            self._link.send(self._asked)
            decoding.stats.expert_calls += 1
            decoding.stats.expert_tokens += len(self._asked.token_ids)

    def _take_in(self, answers: ExpertAnswers | ExpertUnavailable | None) -> SlotIndex:
        nothing = np.zeros(0, np.int64)
        asked = self._asked
        if answers is None or asked is None:
            return nothing
        self._asked = None
        decoding, batch, tails = self._decoding, self._decoding.batch, self._decoding.tails
        slots = self._slots_of(asked)
        if isinstance(answers, ExpertUnavailable):
            mixing.lose(slots[slots >= 0], batch, tails)
            return slots[slots >= 0]
        verdicts, dry = remote_mixing.judge(batch, tails, slots, asked, answers)
        cut = decoding.apply(verdicts)
        before = batch.num_new.copy()
        remote_mixing.await_replacement(batch, tails, dry)
        batch.ending[dry] = 0
        decoding.roll_back(dry, before)
        lost = dry[tails.num_drawn[dry] >= remote_mixing.MAX_SAMPLES]
        mixing.lose(lost, batch, tails)
        return np.concatenate([cut, lost])

    def _slots_of(self, asked: ExpertQueries) -> SlotIndex:
        """Where the rows asked about are now, -1 for those that are gone: [n]."""
        rows = self._decoding.batch.rows
        slot_of = {row.sequence_id: slot for slot, row in enumerate(rows)}
        return np.array([slot_of.get(int(id_), -1) for id_ in asked.sequence_ids], np.int64)
