"""Which samples run next: higher priority first, then in order of submission.

Samples are admitted while there are slots and key-value memory for all they may generate, so that
a running row is never put out again. The next in line waits for room rather than being overtaken.
Also holds the checks that a request must pass before it may wait. Knows nothing of models.
"""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass, field

from mentor_serve.errors import InvalidRequest
from mentor_serve.types import FloatArray, RolloutRequest


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """A submitted request."""

    request_id: int
    request: RolloutRequest
    prompt: tuple[int, ...]
    max_new_tokens: int
    """What the request asks for, or less where the context ends earlier."""
    submitted_at: float = field(default_factory=time.perf_counter)
    num_open: int = 0
    """Samples that wait or run."""
    prompt_logprobs: FloatArray | None = None
    """Filled by the first prefill where the request wants them."""
    prompt_top_logprobs: list[list[tuple[int, float]]] | None = None
    scored_by: int | None = None
    """Sample whose prefill fills them."""

    @property
    def max_tokens(self) -> int:
        """Prompt and response at their longest."""
        return len(self.prompt) + self.max_new_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What an engine can serve."""

    vocab_size: int
    max_model_len: int
    has_expert: bool
    has_tokenizer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a batch may hold."""

    num_slots: int
    """Rows of any request."""
    num_priority_slots: int
    """Further rows for requests of a priority above 0, so that those need not wait for rollouts."""
    num_tokens: int
    """Key-value memory in tokens; every slot is as long as the longest row needs."""

    def fits(self, job: Job, *, num_rows: int, longest: int) -> bool:
        """May a sample of `job` join `num_rows` rows of which none exceeds `longest` tokens?"""
        most = self.num_slots
        if job.request.priority > 0:
            most += self.num_priority_slots
        return num_rows < most and (num_rows + 1) * max(longest, job.max_tokens) <= self.num_tokens


class Scheduler:
    """The queue of samples that wait for a slot."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, int, Job]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, job: Job) -> None:
        """Queue every sample of a job."""
        job.num_open = job.request.num_samples
        for sample in range(job.request.num_samples):
            entry = (-job.request.priority, job.request_id, sample, job)
            heapq.heappush(self._waiting, entry)

    def admit(self, room: Room, *, num_rows: int, longest: int) -> list[tuple[Job, int]]:
        """Take the best samples that fit beside what runs, as (job, sample index)."""
        taken: list[tuple[Job, int]] = []
        while self._waiting:
            job = self._waiting[0][3]
            if not room.fits(job, num_rows=num_rows + len(taken), longest=longest):
                break
            _, _, sample, job = heapq.heappop(self._waiting)
            longest = max(longest, job.max_tokens)
            taken.append((job, sample))
        return taken

    def withdraw(self, request_id: int) -> list[tuple[Job, int]]:
        """Take every waiting sample of one request out of the queue."""
        taken = [entry for entry in self._waiting if entry[1] == request_id]
        if taken:
            self._waiting = [entry for entry in self._waiting if entry[1] != request_id]
            heapq.heapify(self._waiting)
        return [(job, sample) for _, _, sample, job in sorted(taken, key=lambda entry: entry[:3])]


def check_request(request: RolloutRequest, limits: EngineLimits) -> None:
    """Return if an engine with these limits can serve the request.

    Raises:
        InvalidRequest: saying what was expected and what came.
    """
    _check_prompt(request, limits)
    _check_numbers(request, limits)
    if request.sampling.stop and not limits.has_tokenizer:
        raise InvalidRequest("stop: stop strings need an engine with a tokenizer; use token ids")
    if "" in request.sampling.stop:
        raise InvalidRequest("stop: expected non-empty strings, got ''")
    if request.mixed:
        _check_mixed(request, limits)


def _check_prompt(request: RolloutRequest, limits: EngineLimits) -> None:
    prompt = request.prompt_token_ids
    if len(prompt) == 0:
        raise InvalidRequest("prompt_token_ids: expected at least one token, got none")
    if len(prompt) + 1 > limits.max_model_len:
        raise InvalidRequest(
            f"prompt_token_ids: expected at most {limits.max_model_len - 1} tokens, so that one "
            f"more fits into the context of {limits.max_model_len}, got {len(prompt)}"
        )
    for name, ids in (
        ("prompt_token_ids", prompt),
        ("stop_token_ids", request.sampling.stop_token_ids),
    ):
        outside = next((token for token in ids if not 0 <= token < limits.vocab_size), None)
        if outside is not None:
            raise InvalidRequest(
                f"{name}: expected ids from 0 to {limits.vocab_size - 1}, got {outside}"
            )


def _check_numbers(request: RolloutRequest, limits: EngineLimits) -> None:
    sampling = request.sampling
    gamma = request.gamma
    constant, first = request.constant_weight, request.first_weight
    for name, value, is_allowed, expected in (
        ("num_samples", request.num_samples, request.num_samples >= 1, "at least 1"),
        ("max_new_tokens", sampling.max_new_tokens, sampling.max_new_tokens >= 1, "at least 1"),
        ("gamma", gamma, gamma >= 0 and not math.isnan(gamma), "a number >= 0"),
        ("constant_weight", constant, _is_share(constant), "a number in [0, 1], or None"),
        ("first_weight", first, _is_share(first), "a number in [0, 1], or None"),
        (
            "temperature",
            sampling.temperature,
            0 <= sampling.temperature < math.inf,
            "a finite number >= 0",
        ),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "a number in (0, 1]"),
        ("top_k", sampling.top_k, sampling.top_k >= 0, "0 (off) or more"),
        (
            "top_logprobs",
            sampling.top_logprobs,
            0 <= sampling.top_logprobs <= limits.vocab_size,
            f"0 to {limits.vocab_size}",
        ),
    ):
        if not is_allowed:
            raise InvalidRequest(f"{name}: expected {expected}, got {value}")


def _is_share(weight: float | None) -> bool:
    return weight is None or 0 <= weight <= 1


def _check_mixed(request: RolloutRequest, limits: EngineLimits) -> None:
    sampling = request.sampling
    if not limits.has_expert:
        raise InvalidRequest(
            "mixed: this engine has no expert; build it with expert=..., or send mixed=False"
        )
    if sampling.temperature == 0:
        raise InvalidRequest("mixed: expected a temperature > 0 (pi_mix is sampled), got 0")
    if sampling.top_p < 1 or sampling.top_k > 0:
        raise InvalidRequest(
            "mixed: expected top_p = 1 and top_k = 0 (pi_mix is over the full vocabulary), got "
            f"top_p = {sampling.top_p} and top_k = {sampling.top_k}"
        )
