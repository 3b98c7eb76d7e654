"""The expert on this machine: `ExpertModel` beside a policy, `ExpertServer` for remote engines.

Both read lazily: a sequence's keys and values are caught up only when someone asks about it, in
one ragged pass for everybody who asks at that moment, and only the positions asked about cost a
row of the vocabulary.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mentor_serve.engines.advice import (
    ExpertAnswers,
    ExpertQueries,
    LongArray,
    check_queries,
)
from mentor_serve.engines.expert_answers import Layout, fill_in
from mentor_serve.engines.slots.slot_model import SlotModel, default_max_tokens
from mentor_serve.types import IntArray

_MIN_SHARED_TOKENS = 8
"""A shared prefix shorter than this is read again rather than copied."""


class ExpertModel:
    """The colocated expert. Its slots are the policy's slots; `move` and `free` follow them.

    What a slot has read is a prefix of its row's prompt and response: `rollback` after a rejected
    draft keeps it so. Call under `torch.inference_mode`.
    """

    def __init__(self, model: Any, *, max_slots: int, max_tokens: int) -> None:
        self.slots = SlotModel(model, max_slots=max_slots, max_tokens=max_tokens)
        self._prompts: dict[int, tuple[int, ...]] = {}

    def logits_at(
        self,
        slots: Sequence[int],
        prompts: Sequence[tuple[int, ...]],
        responses: Sequence[IntArray],
        positions: Sequence[Sequence[int]],
    ) -> Tensor:
        """Float32 logits after `prompts[i] + responses[i][:p]` for every p in `positions[i]`.

        Flat in row order: [sum of len(positions[i]), V]. Positions are increasing, at least one a
        row. One ragged pass reads what is not read yet; a first position before that is reached by
        reading from there again.
        """
        self._share_prompts(slots, prompts)
        pending: list[list[int]] = []
        wanted: list[list[int]] = []
        for slot, prompt, response, at in zip(slots, prompts, responses, positions, strict=True):
            begin = len(prompt)
            # The token before the first position is read in any case: its logits are asked for.
            start = min(int(self.slots.lengths[slot]), begin + int(at[0]) - 1)
            self.slots.truncate(slot, start)
            beyond = response[max(start - begin, 0) : int(at[-1])].tolist()
            pending.append([*prompt[start:], *beyond])
            wanted.append([begin + int(position) - 1 - start for position in at])
            self._prompts[slot] = prompt
        return self.slots.read(slots, pending, wanted)

    def rollback(self, slot: int, num_tokens: int) -> None:
        """Forget what a slot read beyond the first `num_tokens` tokens of prompt and response."""
        self.slots.truncate(slot, num_tokens)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Follow the policy's rows into other slots."""
        self.slots.move(sources, targets)
        for source, target in zip(sources, targets, strict=True):
            prompt = self._prompts.pop(source, None)
            if prompt is not None:
                self._prompts[target] = prompt

    def free(self, slots: Sequence[int]) -> None:
        """Forget rows that ended."""
        for slot in slots:
            self.slots.truncate(slot, 0)
            self._prompts.pop(slot, None)

    def _share_prompts(self, slots: Sequence[int], prompts: Sequence[tuple[int, ...]]) -> None:
        """Read each new prompt once (all but its last token) and copy it to its other rows."""
        takers: dict[tuple[int, ...], list[int]] = {}
        for slot, prompt in zip(slots, prompts, strict=True):
            if self.slots.lengths[slot] == 0 and len(prompt) > _MIN_SHARED_TOKENS:
                takers.setdefault(prompt, []).append(slot)
        if not takers:
            return
        donors = {
            prompt: slot
            for slot, prompt in self._prompts.items()
            if prompt in takers and self.slots.lengths[slot] >= len(prompt) - 1
        }
        readers = [
            (prompt, same)
            for prompt, same in takers.items()
            if prompt not in donors and len(same) > 1
        ]
        if readers:
            leaders = [same[0] for _, same in readers]
            self.slots.read(leaders, [prompt[:-1] for prompt, _ in readers], [()] * len(readers))
            donors.update({prompt: same[0] for prompt, same in readers})
        for prompt, same in takers.items():
            if prompt in donors:
                rest = [slot for slot in same if slot != donors[prompt]]
                self.slots.copy(donors[prompt], rest, num_tokens=len(prompt) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """A sequence that one call catches up."""

    row: int
    """Of the queries."""
    slot: int
    donor: int = -1
    """Slot to copy a prefix from, once it is read; ..."""
    num_shared: int = 0
    """... that prefix's length; 0 where there is nothing to wait for."""


class ExpertServer:
    """An `ExpertClient` over a model in this process, for engines elsewhere. Thread-safe.

    Keeps the keys and values of up to `max_sequences` sequences; the least recently asked about
    goes first. A sequence that is sent whole copies the longest prefix that it shares with a kept
    one (rollouts of one prompt share it), so that only the rest is read.
    """

    def __init__(
        self, model: Any, *, max_sequences: int = 64, max_model_len: int | None = None
    ) -> None:
        max_tokens = max_model_len or default_max_tokens(model)
        self.slots = SlotModel(model, max_slots=max_sequences, max_tokens=max_tokens)
        self._max_sequences = max_sequences
        self._slot_of: OrderedDict[int, int] = OrderedDict()
        """Slot of each sequence, the least recently asked about first."""
        self._free = list(range(max_sequences))
        self._tokens = np.zeros((max_sequences, max_tokens), np.int32)
        """[max_sequences, max_tokens] Of a slot, the first `slots.lengths[slot]` were read."""
        self._calls = np.zeros(max_sequences, np.int64)
        """[max_sequences] The call that last asked about each slot's sequence."""
        self._lock = threading.Lock()

    def advise(self, queries: ExpertQueries) -> ExpertAnswers:
        """Answer all queries; `missing` marks sequences that have to be sent whole.

        Raises:
            InvalidRequest: something is out of the vocabulary, too long or contradictory.
        """
        check_queries(queries, vocab_size=self.slots.vocab_size, max_tokens=self.slots.max_tokens)
        answers = ExpertAnswers.blank(queries)
        layout = Layout.of(queries)
        with self._lock, torch.inference_mode():
            rows = self._answerable(queries, answers)
            for begin in range(0, len(rows), self._max_sequences):
                chunk = rows[begin : begin + self._max_sequences]
                leaders, followers = self._place(queries, layout, chunk)
                self._read(queries, layout, leaders, answers)
                for reading in followers:
                    self.slots.copy(reading.donor, [reading.slot], num_tokens=reading.num_shared)
                self._read(queries, layout, followers, answers)
        return answers

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Forget sequences; unknown ones are ignored."""
        with self._lock:
            for sequence_id in sequence_ids:
                slot = self._slot_of.pop(int(sequence_id), None)
                if slot is not None:
                    self.slots.truncate(slot, 0)
                    self._free.append(slot)

    def _answerable(self, queries: ExpertQueries, answers: ExpertAnswers) -> list[int]:
        """Rows that can be read, kept sequences before new ones evict them; marks the others."""
        kept: list[int] = []
        whole: list[int] = []
        starts, ids = queries.starts.tolist(), queries.sequence_ids.tolist()
        for row, (start, sequence_id) in enumerate(zip(starts, ids, strict=True)):
            slot = self._slot_of.get(sequence_id)
            is_late = slot is not None and self._calls[slot] > queries.call
            if start == 0 and not is_late:
                whole.append(row)
            elif slot is not None and self.slots.lengths[slot] >= start and not is_late:
                kept.append(row)
            else:
                answers.missing[row] = True
        return kept + whole

    def _place(
        self, queries: ExpertQueries, layout: Layout, rows: list[int]
    ) -> tuple[list[_Reading], list[_Reading]]:
        """Give every row a slot with as much of its prefix as there is, and note its tokens.

        Returns what can be read at once, and what shares a prefix that one of those has yet to
        read.
        """
        for sequence_id in queries.sequence_ids[rows].tolist():
            if sequence_id in self._slot_of:
                self._slot_of.move_to_end(sequence_id)
        extents = np.array(self.slots.lengths, np.int64)
        """[max_sequences] What each slot holds once the first readings are done."""
        leaders: list[_Reading] = []
        followers: list[_Reading] = []
        for row in rows:
            sequence_id, start = int(queries.sequence_ids[row]), int(queries.starts[row])
            begin = layout.first_token[row]
            # All but the last proposal, which is judged and not read.
            tokens = queries.token_ids[begin : begin + queries.num_tokens[row] - 1]
            if start > 0:
                reading = _Reading(row=row, slot=self._slot_of[sequence_id])
                self.slots.truncate(reading.slot, start)
            else:
                first_position = int(queries.positions[layout.first_position[row]])
                reading = self._settle(row, sequence_id, tokens[: first_position - 1], extents)
            end = start + len(tokens)
            self._tokens[reading.slot, start:end] = tokens
            self._calls[reading.slot] = queries.call
            if reading.num_shared:
                extents[reading.slot] = 0
                followers.append(reading)
            else:
                extents[reading.slot] = end
                leaders.append(reading)
        return leaders, followers

    def _settle(self, row: int, sequence_id: int, tokens: IntArray, extents: LongArray) -> _Reading:
        """Find a slot for a sequence sent whole, and the longest prefix of `tokens` for it."""
        # The column beyond the last differs, so that argmax is the length of the common prefix.
        differs = np.ones((self._max_sequences, len(tokens) + 1), np.bool_)
        np.not_equal(self._tokens[:, : len(tokens)], tokens, out=differs[:, :-1])
        shared = np.minimum(differs.argmax(axis=1), extents)
        donor = int(shared.argmax())
        num_shared = int(shared[donor])
        slot = self._slot(sequence_id)
        if slot == donor:
            self.slots.truncate(slot, num_shared)
            return _Reading(row=row, slot=slot)
        self.slots.truncate(slot, 0)
        if num_shared < _MIN_SHARED_TOKENS:
            return _Reading(row=row, slot=slot)
        if num_shared > self.slots.lengths[donor]:
            return _Reading(row=row, slot=slot, donor=donor, num_shared=num_shared)
        self.slots.copy(donor, [slot], num_tokens=num_shared)
        return _Reading(row=row, slot=slot)

    def _slot(self, sequence_id: int) -> int:
        """The sequence's slot: its own, a free one, or that of the least recent sequence."""
        slot = self._slot_of.get(sequence_id)
        if slot is None:
            slot = self._free.pop() if self._free else self._slot_of.popitem(last=False)[1]
            self._slot_of[sequence_id] = slot
        return slot

    def _read(
        self,
        queries: ExpertQueries,
        layout: Layout,
        readings: Sequence[_Reading],
        answers: ExpertAnswers,
    ) -> None:
        """Catch up sequences in one ragged pass and answer their positions."""
        if not readings:
            return
        pending: list[IntArray] = []
        wanted: list[LongArray] = []
        indices: list[LongArray] = []
        for reading in readings:
            row, length = reading.row, int(self.slots.lengths[reading.slot])
            first = layout.first_position[row]
            at = np.arange(first, first + queries.num_positions[row])
            positions = queries.positions[at].astype(np.int64)
            pending.append(self._tokens[reading.slot, length : positions[-1]])
            wanted.append(positions - 1 - length)
            indices.append(at)
        logits = self.slots.read([reading.slot for reading in readings], pending, wanted)
        fill_in(queries, layout, np.concatenate(indices), logits, answers)
