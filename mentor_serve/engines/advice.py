"""What an engine and a remote expert say to each other: one message for many sequences.

Structure of arrays, so that a pickled message is little more than its payload, and no vector of
the vocabulary's size crosses a process. The cost of a call is proportional to the tokens that the
expert has not read; what it already holds is named by its length (`starts`).

Worked example. A sequence begins 5 6 7 8 (the prompt), and the policy drafted 9 1 2 after it.
The coins came up at positions 4 and 6, so the expert is asked what follows the first 4 tokens (9
was proposed) and the first 6 tokens (2 was proposed). First call: start 0, tokens 5 6 7 8 9 1 2,
positions 4 6. It has then read 6 tokens. If 2 is replaced by 3 and the next coin comes up two
tokens later at a proposed 0: start 6, tokens 3 1 0, positions 8.

Sample i at position p is a function of (seed, p, i) and pi* alone: neither how calls are cut nor
when they are made changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mentor_serve.errors import ExpertUnavailable, InvalidRequest
from mentor_serve.types import IntArray

LongArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

_MOST_LOGPROB = 1e-3
"""Rounding may lift a log-probability a little above 0."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertQueries:
    """Open positions of n sequences, each at least one: what does the expert say there?"""

    sequence_ids: LongArray
    """[n] Distinct; stable for the life of a rollout, so that the expert may keep its cache."""
    starts: IntArray
    """[n] How many first tokens of the sequence the expert read before and may rely on."""
    num_tokens: IntArray
    """[n] How many tokens are sent."""
    token_ids: IntArray
    """Flat [sum num_tokens] Tokens from `starts` on, the last position's proposal included."""
    num_positions: IntArray
    """[n] At least 1."""
    positions: IntArray
    """Flat [sum num_positions] Increasing in a sequence and beyond its start. Position p asks what
    follows the first p tokens; the proposal is token number p, and the last token sent is the last
    position's proposal."""
    temperatures: FloatArray
    """[n] Above 0."""
    seeds: LongArray
    """[n] Seed the expert's draws."""
    first_sample: IntArray
    """[n] Index of the first sample wanted."""
    num_samples: IntArray
    """[n] Samples wanted at each position; may be 0."""
    call: int = 0
    """Order of this message among those of its sender. A message about a sequence that is older
    than the last one obeyed is not obeyed: nobody waits for it, and its drafts may be outdated."""

    def __len__(self) -> int:
        return len(self.sequence_ids)

    @property
    def num_bytes(self) -> int:
        """Payload in bytes."""
        return _payload_bytes(self)

    @property
    def row_of_position(self) -> LongArray:
        """Flat [sum num_positions] Which sequence each position belongs to."""
        return np.repeat(np.arange(len(self)), self.num_positions)

    @property
    def proposed_token_ids(self) -> IntArray:
        """Flat [sum num_positions] The proposal at each position."""
        row = self.row_of_position
        proposals: IntArray = self.token_ids[
            starts_of(self.num_tokens)[row] + self.positions - self.starts[row]
        ]
        return proposals

    @property
    def samples_at_position(self) -> LongArray:
        """Flat [sum num_positions] How many samples each position gets."""
        return np.repeat(self.num_samples, self.num_positions).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertAnswers:
    """The expert's view of the positions of one `ExpertQueries`, in its order."""

    proposed_logprobs: FloatArray
    """Flat [sum num_positions] log pi* of each proposal, in nats; NaN where missing."""
    sample_token_ids: IntArray
    """Flat [sum num_positions * num_samples] Draws from pi*, position by position; 0 where missing.
    """
    sample_logprobs: FloatArray
    """Flat, as `sample_token_ids` log pi* of each sample; NaN where missing."""
    missing: BoolArray
    """[n] The expert does not hold the first `starts` tokens any more (evicted, restarted): nothing
    was computed for these sequences. Ask again with start 0."""

    @classmethod
    def blank(cls, queries: ExpertQueries) -> ExpertAnswers:
        """Answers of the right shape in which nothing is filled in yet."""
        num_samples = int(queries.samples_at_position.sum())
        return cls(
            proposed_logprobs=np.full(len(queries.positions), np.nan, np.float32),
            sample_token_ids=np.zeros(num_samples, np.int32),
            sample_logprobs=np.full(num_samples, np.nan, np.float32),
            missing=np.zeros(len(queries), np.bool_),
        )

    @property
    def num_bytes(self) -> int:
        """Payload in bytes."""
        return _payload_bytes(self)

    def copied(self) -> ExpertAnswers:
        """The same in arrays that own their memory and may be written."""
        return ExpertAnswers(
            **{item.name: getattr(self, item.name).copy() for item in fields(self)}
        )


class ExpertClient(Protocol):
    """A remote expert, as an engine sees it. Both calls may block, for a bounded time."""

    def advise(self, queries: ExpertQueries) -> ExpertAnswers:
        """Raises `ExpertUnavailable` when no answer comes in time."""

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Forget sequences that ended; best effort."""


def starts_of(counts: NDArray[Any]) -> LongArray:
    """Where each row begins in a flat array, from the rows' sizes: [n] -> [n]."""
    starts = np.zeros(len(counts), np.int64)
    np.cumsum(counts[:-1], out=starts[1:])
    return starts


def check_queries(queries: ExpertQueries, *, vocab_size: int, max_tokens: int) -> None:
    """Return if an expert of this vocabulary and context length can answer.

    Raises:
        InvalidRequest: naming the first thing that is wrong.
    """
    _check_shapes(queries)
    # In this order: each relies on what the ones before it established.
    problem = (
        _problem_of_rows(queries)
        or _problem_of_tokens(queries, vocab_size, max_tokens)
        or _problem_of_positions(queries)
    )
    if problem:
        raise InvalidRequest(f"expert queries: {problem}")


def check_answers(queries: ExpertQueries, answers: ExpertAnswers, *, vocab_size: int) -> None:
    """Return if `answers` can be used; a garbled answer counts as none.

    Raises:
        ExpertUnavailable: naming the first thing that is wrong.
    """
    if not isinstance(answers, ExpertAnswers):
        raise ExpertUnavailable(f"expected ExpertAnswers, got {type(answers).__name__}")
    blank = ExpertAnswers.blank(queries)
    for item in fields(ExpertAnswers):
        expected, got = getattr(blank, item.name), getattr(answers, item.name)
        if not isinstance(got, np.ndarray) or got.shape != expected.shape:
            raise ExpertUnavailable(
                f"{item.name}: expected an array of shape {expected.shape}, got "
                f"{getattr(got, 'shape', type(got).__name__)}"
            )
        if got.dtype != expected.dtype:
            raise ExpertUnavailable(f"{item.name}: expected {expected.dtype}, got {got.dtype}")
    if (answers.missing & (queries.starts == 0)).any():
        raise ExpertUnavailable("expected an answer for every sequence that was sent whole")
    _check_values(queries, answers, vocab_size)


def _payload_bytes(message: ExpertQueries | ExpertAnswers) -> int:
    values = (getattr(message, item.name) for item in fields(message))
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))


def _check_shapes(queries: ExpertQueries) -> None:
    n = len(queries)
    sizes = {item.name: n for item in fields(queries) if item.name != "call"}
    if len(queries.num_tokens) == n == len(queries.num_positions):
        sizes["token_ids"] = int(queries.num_tokens.sum())
        sizes["positions"] = int(queries.num_positions.sum())
    for name, size in sizes.items():
        value = getattr(queries, name)
        if value.shape != (size,):
            raise InvalidRequest(
                f"expert queries: {name}: expected shape ({size},), got {value.shape}"
            )


def _problem_of_rows(queries: ExpertQueries) -> str | None:
    if len(np.unique(queries.sequence_ids)) < len(queries):
        return "expected distinct sequence_ids; put all positions of a sequence into one row"
    for name, least in (
        ("starts", 0),
        ("num_tokens", 1),
        ("num_positions", 1),
        ("first_sample", 0),
        ("num_samples", 0),
    ):
        smallest = getattr(queries, name).min(initial=least)
        if smallest < least:
            return f"{name}: expected at least {least}, got {smallest}"
    temperatures = queries.temperatures
    wrong = ~(np.isfinite(temperatures) & (temperatures > 0))
    if wrong.any():
        return f"expected temperatures above 0, got {temperatures[wrong][0]}"
    return None


def _problem_of_tokens(queries: ExpertQueries, vocab_size: int, max_tokens: int) -> str | None:
    ids = queries.token_ids
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        return f"expected token ids from 0 to {vocab_size - 1}, got {ids.min()} to {ids.max()}"
    # The last proposal is judged, not read.
    longest = (queries.starts.astype(np.int64) + queries.num_tokens).max(initial=0) - 1
    if longest > max_tokens:
        return f"expected at most {max_tokens} tokens before a position, got {longest}"
    return None


def _problem_of_positions(queries: ExpertQueries) -> str | None:
    positions = queries.positions.astype(np.int64)
    first = starts_of(queries.num_positions)
    too_early = positions[first] <= queries.starts
    if too_early.any():
        row = int(too_early.argmax())
        return (
            f"expected positions beyond the start, got {positions[first[row]]} with start "
            f"{queries.starts[row]}"
        )
    is_first = np.zeros(len(positions), np.bool_)
    is_first[first] = True
    if not ((np.diff(positions) > 0) | is_first[1:]).all():
        return "expected increasing positions within each sequence"
    last = positions[first + queries.num_positions - 1]
    expected = queries.starts.astype(np.int64) + queries.num_tokens - 1
    if (last != expected).any():
        row = int((last != expected).argmax())
        return (
            f"expected the last token sent to be the last position's proposal, number {last[row]}, "
            f"got token number {expected[row]}"
        )
    return None


def _check_values(queries: ExpertQueries, answers: ExpertAnswers, vocab_size: int) -> None:
    is_known = ~answers.missing[queries.row_of_position]
    proposed = answers.proposed_logprobs[is_known]
    # Written so that NaN fails, too.
    if not (proposed <= _MOST_LOGPROB).all():
        raise ExpertUnavailable("proposed_logprobs: expected log-probabilities, got NaN or above 0")
    is_sampled = np.repeat(is_known, queries.samples_at_position)
    samples = answers.sample_token_ids[is_sampled]
    if len(samples) and not 0 <= samples.min() <= samples.max() < vocab_size:
        raise ExpertUnavailable(
            f"sample_token_ids: expected 0 to {vocab_size - 1}, got {samples.min()} to "
            f"{samples.max()}"
        )
    logprobs = answers.sample_logprobs[is_sampled]
    if not (np.isfinite(logprobs) & (logprobs <= _MOST_LOGPROB)).all():
        raise ExpertUnavailable("sample_logprobs: expected finite log-probabilities up to 0")
