"""Prompt tokens' log-probabilities as vLLM gives them, in the form of `Rollout`."""

from __future__ import annotations

from typing import Any

import numpy as np

from mentor_serve.engines.scheduler import Job


def prompt_scores(scored: Any, job: Job) -> None:
    """Note vLLM's `prompt_logprobs` (by position: token id to `Logprob`) in the job."""
    num_top = job.request.sampling.top_logprobs
    logprobs = np.full(len(job.prompt), np.nan, np.float32)
    top: list[list[tuple[int, float]]] = [[]]
    for position in range(1, len(job.prompt)):
        entries = scored[position]
        logprobs[position] = entries[job.prompt[position]].logprob
        best = sorted(entries.items(), key=lambda item: -item[1].logprob)[:num_top]
        top.append([(token, entry.logprob) for token, entry in best])
    job.prompt_logprobs = logprobs
    job.prompt_top_logprobs = top if num_top else None
