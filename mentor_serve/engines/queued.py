"""What every engine does with requests before and after it generates.

Requests get an id and wait as samples in a `Scheduler`; a finished sample becomes a `Rollout`, and
a request is forgotten with its last one. Where tokens come from is the subclass's: it takes samples
from the scheduler in `step`, and ends those of `_cancelled`.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from mentor_serve.engines.base import EngineStats, StepOutput
from mentor_serve.engines.scheduler import EngineLimits, Job, Scheduler, check_request
from mentor_serve.engines.stopping import response_text
from mentor_serve.errors import EngineError
from mentor_serve.types import Intervention, Rollout, RolloutRequest, StopReason


class QueuedEngine(ABC):
    """The part of `engines.base.Engine` that does not depend on how tokens are computed."""

    def __init__(self, *, limits: EngineLimits, tokenizer: Any) -> None:
        """Take what requests are held to, and the policy's tokenizer or None."""
        self._limits = limits
        self._tokenizer = tokenizer
        self._stats = EngineStats()
        self._scheduler = Scheduler()
        self._jobs: dict[int, Job] = {}
        self._cancelled: list[int] = []
        self._next_request_id = 0
        self._step_lock = threading.Lock()

    @property
    def stats(self) -> EngineStats:
        """Live counters."""
        return self._stats

    @property
    def max_model_len(self) -> int:
        """Largest prompt plus response, in tokens."""
        return self._limits.max_model_len

    @property
    def has_expert(self) -> bool:
        """Mixed requests can be served."""
        return self._limits.has_expert

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer, or None."""
        return self._tokenizer

    @abstractmethod
    def step(self) -> list[StepOutput]:
        """Admit what fits, then do one round of work (`Engine.step`)."""

    def generate(self, requests: Sequence[RolloutRequest]) -> list[list[Rollout]]:
        """Run requests to their end: one list per request with `num_samples` rollouts each.

        Raises:
            InvalidRequest: one of the requests could never be served; none was started.
            EngineError: submitted requests are unfinished; their outputs would be lost.
        """
        if self.has_unfinished():
            raise EngineError("generate: expected an idle engine; use submit and step, or wait")
        for request in requests:
            self._check(request)
        ids = [self.submit(request) for request in requests]
        done: dict[int, dict[int, Rollout]] = {request_id: {} for request_id in ids}
        while self.has_unfinished():
            for output in self.step():
                if output.finished is not None:
                    done[output.request_id][output.sample_index] = output.finished
        return [[done[request_id][i] for i in sorted(done[request_id])] for request_id in ids]

    def submit(self, request: RolloutRequest) -> int:
        """Queue a request and return its id. Raises `InvalidRequest` if it can never be served."""
        self._check(request)
        request_id = self._next_request_id
        self._next_request_id += 1
        prompt = tuple(int(token) for token in request.prompt_token_ids)
        room = self._limits.max_model_len - len(prompt)
        job = Job(
            request_id=request_id,
            request=request,
            prompt=prompt,
            max_new_tokens=min(request.sampling.max_new_tokens, room),
        )
        self._jobs[request_id] = job
        self._scheduler.add(job)
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request in the next step; finished or unknown ones are left alone."""
        if request_id in self._jobs and request_id not in self._cancelled:
            self._cancelled.append(request_id)

    def has_unfinished(self) -> bool:
        """Some submitted rollout has not been handed back."""
        return bool(self._jobs)

    def _check(self, request: RolloutRequest) -> None:
        """Raises `InvalidRequest` for a request that could never be served."""
        check_request(request, self._limits)

    def _rollout(
        self,
        job: Job,
        recorded: dict[str, Any],
        reason: StopReason,
        *,
        interventions: list[Intervention],
        top_logprobs: Any,
        expert_lost: bool = False,
    ) -> Rollout:
        """The rollout of a sample that ends now; its request is forgotten with the last one."""
        sampling = job.request.sampling
        text = None
        if self._tokenizer is not None:
            text = response_text(recorded["token_ids"], sampling, self._tokenizer, reason)
        job.num_open -= 1
        if job.num_open == 0:
            del self._jobs[job.request_id]
        return Rollout(
            **recorded,
            stop_reason=reason,
            text=text,
            interventions=interventions,
            top_logprobs=top_logprobs if sampling.top_logprobs else None,
            prompt_logprobs=job.prompt_logprobs,
            prompt_top_logprobs=job.prompt_top_logprobs,
            latency_s=time.perf_counter() - job.submitted_at,
            expert_lost=expert_lost,
        )
