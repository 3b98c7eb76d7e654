"""Supervised fine-tuning of a causal language model on responses that are given.

Contract: the loss covers the tokens of responses, the end token included, and nothing else, nats a
token over the whole batch. Parameters and moments are float32 whatever the files hold; `autocast`
runs matrix products in half precision. The same seed and examples give the same weights on a CPU
with one thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mentor_serve.core.schedules import cosine_alpha
from mentor_serve.errors import ConfigError
from mentor_serve.learner.batch import TrainingTrajectory
from mentor_serve.learner.logprobs import ResponseScorer
from mentor_serve.learner.packing import build_micro_batch
from mentor_serve.types import TrajectoryKind

_log = logging.getLogger(__name__)
_NUM_REPORTS = 20
"""Lines of progress of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt and the response to learn."""

    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    """Of the response, its end token included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuningPlan:
    """How long and how fast to train."""

    num_steps: int = 1500
    """Optimiser steps."""
    batch_size: int = 32
    """Examples a step, in one forward pass."""
    learning_rate: float = 1e-4
    """Peak of AdamW's: a rise over `warmup_share` of the steps, then a cosine to 0."""
    warmup_share: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    autocast: Literal["none", "bfloat16"] = "none"
    """Type of matrix products."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: expected a number above 0, got {getattr(self, name)}")

    def learning_rate_at(self, step: int) -> float:
        """The rate of the step with this index, from 0.

        >>> plan = FinetuningPlan(num_steps=100, learning_rate=1.0)
        >>> [round(plan.learning_rate_at(step), 3) for step in (0, 4, 5, 52, 99)]
        [0.2, 1.0, 1.0, 0.508, 0.0]
        """
        warmup = round(self.warmup_share * self.num_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return cosine_alpha(step - warmup, self.num_steps - warmup, initial=self.learning_rate)


def finetune(model: Any, draw: Callable[[], Example], plan: FinetuningPlan) -> list[float]:
    """Train `model` in place and return the loss of each step, before it, in nats a token.

    Args:
        model: a Hugging Face causal language model; it comes back in eval mode.
        draw: gives the next example.
        plan: how long and how fast.

    Raises:
        RuntimeError: a gradient is not finite; the weights are those of the step before.
    """
    # Dropout stays off: hardly any causal model of today has it.
    model.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay
    )
    scorer = ResponseScorer(model, temperature=1.0, autocast=plan.autocast)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(plan.num_steps):
        for parameters in optimizer.param_groups:
            parameters["lr"] = plan.learning_rate_at(step)
        loss = response_loss(scorer, [draw() for _ in range(plan.batch_size)], model.device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(
            model.parameters(), plan.max_grad_norm, error_if_nonfinite=True
        )
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % max(1, plan.num_steps // _NUM_REPORTS) == 0:
            _log.info(
                "step %d of %d: loss %.4f, %.0f s",
                step + 1,
                plan.num_steps,
                losses[-1],
                time.monotonic() - started,
            )
    optimizer.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return losses


def response_loss(
    scorer: ResponseScorer, examples: Sequence[Example], device: torch.device
) -> Tensor:
    """Mean of -log p over all response tokens of the examples, a scalar with gradients."""
    # One response a row needs no mask: padding stands behind everything that counts.
    rows = [((_trajectory(example),),) for example in examples]
    logprobs_N = scorer(build_micro_batch(rows).to(device))
    return -logprobs_N.mean()


@torch.no_grad()
def mean_loss(model: Any, examples: Sequence[Example], *, batch_size: int) -> float:
    """Nats a response token over all examples, in forward passes of `batch_size`."""
    scorer = ResponseScorer(model, temperature=1.0)
    total, num_tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        count = sum(len(example.token_ids) for example in part)
        total += count * float(response_loss(scorer, part, model.device))
        num_tokens += count
    return total / num_tokens


def _trajectory(example: Example) -> TrainingTrajectory:
    """The example as the learner's packing takes it; what it does not use is empty."""
    num_tokens = len(example.token_ids)
    return TrainingTrajectory(
        trajectory_id="",
        kind=TrajectoryKind.EXPERT,
        prompt_token_ids=np.asarray(example.prompt_token_ids, np.int32),
        token_ids=np.asarray(example.token_ids, np.int32),
        old_logprobs=np.zeros(num_tokens, np.float32),
        keeps_old=False,
        mask=np.ones(num_tokens, np.bool_),
        advantage=0.0,
    )
