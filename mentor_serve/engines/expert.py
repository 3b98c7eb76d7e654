"""The expert on this machine: `ExpertModel` beside a policy, `ExpertServer` for remote engines.

Both read lazily: a sequence's keys and values are caught up only when someone asks about it, in
one ragged pass for everybody who asks at that moment.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mentor_serve.core.random import uniforms
from mentor_serve.engines.base import ExpertAnswer, ExpertQuery
from mentor_serve.engines.sampler import distribution, draw
from mentor_serve.engines.slot_model import SlotModel, default_max_tokens
from mentor_serve.errors import InvalidRequest
from mentor_serve.types import IntArray

_MIN_SHARED_TOKENS = 8
"""A shared prefix shorter than this is read again rather than copied."""


class ExpertModel:
    """The colocated expert. Its slots are the policy's slots; `move` and `free` follow them."""

    def __init__(self, model: Any, *, max_slots: int, max_tokens: int) -> None:
        self.slots = SlotModel(model, max_slots=max_slots, max_tokens=max_tokens)
        self._prompts: dict[int, tuple[int, ...]] = {}

    def next_logits(
        self,
        slots: Sequence[int],
        prompts: Sequence[tuple[int, ...]],
        responses: Sequence[IntArray],
    ) -> Tensor:
        """Float32 logits [n, V] after `prompts[i]` + `responses[i]` in `slots[i]`."""
        self._share_prompts(slots, prompts)
        pending: list[list[int]] = []
        for slot, prompt, response in zip(slots, prompts, responses, strict=True):
            length, extent = self.slots.lengths[slot], len(prompt) + len(response)
            # Reads at least the last token, whose logits are asked for.
            start = min(length, extent - 1)
            self.slots.truncate(slot, start)
            beyond = response[max(start - len(prompt), 0) :].tolist()
            pending.append([*prompt[start:], *beyond])
            self._prompts[slot] = prompt
        return self.slots.extend(slots, pending)

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
            self.slots.extend([same[0] for _, same in readers], [p[:-1] for p, _ in readers])
            donors.update({prompt: same[0] for prompt, same in readers})
        for prompt, same in takers.items():
            if prompt in donors:
                rest = [slot for slot in same if slot != donors[prompt]]
                self.slots.copy(donors[prompt], rest, num_tokens=len(prompt) - 1)


class ExpertServer:
    """An `ExpertClient` over a model in this process, for engines elsewhere. Thread-safe.

    Keeps the keys and values of up to `max_sequences` sequences, the least recently asked about
    going first; a query carries its whole sequence, and only what lies beyond the longest prefix
    in common with a kept one is read.
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
        self._tokens: list[list[int]] = [[] for _ in range(max_sequences)]
        self._by_prefix: dict[tuple[int, ...], set[int]] = {}
        """Slots by their first `_MIN_SHARED_TOKENS` tokens, to find prefixes worth copying."""
        self._lock = threading.Lock()

    def advise(self, queries: Sequence[ExpertQuery]) -> list[ExpertAnswer]:
        """Answer queries in order.

        Raises:
            InvalidRequest: a sequence that is empty or too long, a token out of vocabulary, a
                temperature that is not positive.
        """
        for query in queries:
            self._check(query)
        answers: list[ExpertAnswer] = []
        with self._lock, torch.inference_mode():
            for chunk in _distinct_chunks(queries, self._max_sequences):
                answers += self._answer(chunk)
        return answers

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Forget sequences; unknown ones are ignored."""
        with self._lock:
            for sequence_id in sequence_ids:
                slot = self._slot_of.pop(sequence_id, None)
                if slot is not None:
                    self._forget(slot)
                    self._free.append(slot)

    def _answer(self, queries: Sequence[ExpertQuery]) -> list[ExpertAnswer]:
        first, second = self._place(queries)
        logits: dict[int, Tensor] = {}
        self._read(queries, first, logits)
        for index, source in second:
            self._copy_prefix(source, queries[index])
        self._read(queries, [index for index, _ in second], logits)
        return _answers(queries, torch.stack([logits[index] for index in range(len(queries))]))

    def _place(self, queries: Sequence[ExpertQuery]) -> tuple[list[int], list[tuple[int, int]]]:
        """Give each query a slot, with the best kept prefix in it.

        Returns the queries to read first, and those whose prefix one of the first has yet to read,
        with the slot to copy it from.
        """
        for query in queries:
            if query.sequence_id in self._slot_of:
                self._slot_of.move_to_end(query.sequence_id)
        first: list[int] = []
        second: list[tuple[int, int]] = []
        fresh: dict[tuple[int, ...], int] = {}
        for index, query in enumerate(queries):
            if query.sequence_id in self._slot_of:
                first.append(index)
                continue
            source = self._best_prefix(query.token_ids)
            slot = self._take_slot(query.sequence_id)
            key = _prefix_key(query.token_ids)
            if source is not None and source != slot:
                self._copy_prefix(source, query)
                first.append(index)
            elif key in fresh:
                second.append((index, fresh[key]))
            else:
                if key is not None:
                    fresh[key] = slot
                first.append(index)
        return first, second

    def _take_slot(self, sequence_id: int) -> int:
        if self._free:
            slot = self._free.pop()
        else:
            _, slot = self._slot_of.popitem(last=False)
            self._forget(slot)
        self._slot_of[sequence_id] = slot
        return slot

    def _best_prefix(self, tokens: Sequence[int]) -> int | None:
        """The slot that shares the longest prefix with `tokens`, if one is worth a copy."""
        key = _prefix_key(tokens)
        slots = self._by_prefix.get(key, ()) if key is not None else ()
        shared = {slot: _common_prefix(self._tokens[slot], tokens) for slot in slots}
        return max(shared, key=lambda slot: shared[slot], default=None)

    def _copy_prefix(self, source: int, query: ExpertQuery) -> None:
        slot = self._slot_of[query.sequence_id]
        shared = _common_prefix(self._tokens[source], query.token_ids)
        self.slots.copy(source, [slot], num_tokens=shared)
        self._remember(slot, query.token_ids[:shared])

    def _read(
        self, queries: Sequence[ExpertQuery], indices: Sequence[int], logits: dict[int, Tensor]
    ) -> None:
        """Catch up the sequences of some queries and store the logits after each, by index."""
        if not indices:
            return
        slots, pending = [], []
        for query in (queries[index] for index in indices):
            slot = self._slot_of[query.sequence_id]
            shared = _common_prefix(self._tokens[slot], query.token_ids)
            # Reads at least the last token, whose logits are asked for.
            start = min(shared, len(query.token_ids) - 1)
            self.slots.truncate(slot, start)
            self._remember(slot, query.token_ids)
            slots.append(slot)
            pending.append(list(query.token_ids[start:]))
        logits.update(zip(indices, self.slots.extend(slots, pending), strict=True))

    def _forget(self, slot: int) -> None:
        self.slots.truncate(slot, 0)
        self._remember(slot, ())

    def _remember(self, slot: int, tokens: Sequence[int]) -> None:
        old, new = _prefix_key(self._tokens[slot]), _prefix_key(tokens)
        self._tokens[slot] = list(tokens)
        if old is not None and old != new:
            self._by_prefix[old].discard(slot)
            if not self._by_prefix[old]:
                del self._by_prefix[old]
        if new is not None:
            self._by_prefix.setdefault(new, set()).add(slot)

    def _check(self, query: ExpertQuery) -> None:
        vocab_size, most = self.slots.vocab_size, self.slots.max_tokens
        if not 1 <= len(query.token_ids) <= most:
            raise InvalidRequest(
                f"expert query: expected 1 to {most} tokens, got {len(query.token_ids)}"
            )
        ids = (*query.token_ids, query.proposed_token_id)
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise InvalidRequest(
                f"expert query: expected token ids from 0 to {vocab_size - 1}, "
                f"got {min(ids)} to {max(ids)}"
            )
        if not query.temperature > 0 or query.num_samples < 0:
            raise InvalidRequest(
                "expert query: expected temperature > 0 and num_samples >= 0, got "
                f"{query.temperature} and {query.num_samples}"
            )


def _answers(queries: Sequence[ExpertQuery], logits: Tensor) -> list[ExpertAnswer]:
    device = logits.device
    temperatures = torch.tensor([query.temperature for query in queries], device=device)
    expert = distribution(logits, temperatures)
    most = max(query.num_samples for query in queries)
    seeds = torch.tensor([query.seed for query in queries]).unsqueeze(1)
    draws = uniforms(seeds, torch.arange(most), torch.zeros_like(seeds), 0)
    samples = draw(expert.probs, draws.to(device))
    sample_logprobs = expert.logprobs.gather(-1, samples).tolist()
    proposed = torch.tensor([[query.proposed_token_id] for query in queries], device=device)
    proposed_logprobs = expert.logprobs.gather(-1, proposed).squeeze(-1).tolist()
    return [
        ExpertAnswer(
            proposed_logprob=proposed_logprobs[row],
            sample_token_ids=tuple(tokens[: query.num_samples]),
            sample_logprobs=tuple(sample_logprobs[row][: query.num_samples]),
        )
        for row, (query, tokens) in enumerate(zip(queries, samples.tolist(), strict=True))
    ]


def _distinct_chunks(queries: Sequence[ExpertQuery], size: int) -> list[list[ExpertQuery]]:
    """Cut queries into runs of at most `size` in which no sequence occurs twice."""
    chunks: list[list[ExpertQuery]] = []
    seen: set[int] = set()
    for query in queries:
        if not chunks or len(chunks[-1]) == size or query.sequence_id in seen:
            chunks.append([])
            seen = set()
        chunks[-1].append(query)
        seen.add(query.sequence_id)
    return chunks


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    shared = min(len(left), len(right))
    if list(left[:shared]) == list(right[:shared]):
        return shared
    pairs = zip(left, right, strict=False)
    return next(index for index, (ours, theirs) in enumerate(pairs) if ours != theirs)


def _prefix_key(tokens: Sequence[int]) -> tuple[int, ...] | None:
    """The first tokens of a sequence, or None where it is too short to be worth sharing."""
    return tuple(tokens[:_MIN_SHARED_TOKENS]) if len(tokens) >= _MIN_SHARED_TOKENS else None
