"""One update of mixed-policy GRPO on a torch model (paper, Eq. 9).

A mini-batch of groups is one optimiser step. Its loss is the clipped surrogate summed over all
tokens and divided by the number of ALL tokens of the mini-batch, whatever the micro-batches are.
No KL term, no entropy term, no dropout. An optimiser step with a gradient that is not finite is
left out and counted, never applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mentor_serve.core.losses import clipped_surrogate_loss
from mentor_serve.learner.batch import TrainingBatch, TrainingGroup, TrainingTrajectory
from mentor_serve.learner.config import UpdateConfig
from mentor_serve.learner.logprobs import ResponseScorer
from mentor_serve.learner.packing import MicroBatch, build_micro_batch, plan_micro_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateMetrics:
    """What one update did to the model; averages over its mini-batches weigh by tokens."""

    loss: float
    grad_norm: float
    """Mean over the optimiser steps, before clipping; NaN where none was made."""
    clip_fraction_low: float
    """Share of tokens whose gradient the lower clip cut."""
    clip_fraction_high: float
    mismatch_kl: float
    """KL(recorded policy || policy at the start of the update), nats a token: the mean of
    `r - 1 - log r` over computed on-policy tokens of the first mini-batch; NaN without any."""
    learning_rate: float
    num_optimizer_steps: int
    num_skipped_steps: int
    """Optimiser steps left out because the gradient was not finite."""
    num_trained_tokens: int
    """Tokens that went through the model: those of trajectories with an advantage."""


@dataclass(slots=True)
class _MiniBatchResult:
    num_tokens: int
    loss: float = 0.0
    clip_fraction_low: float = 0.0
    clip_fraction_high: float = 0.0
    num_trained_tokens: int = 0
    kl_sum: float = 0.0
    kl_tokens: int = 0
    grad_norm: float = math.nan


def mixed_grpo_update(
    model: PreTrainedModel,
    batch: TrainingBatch,
    config: UpdateConfig,
    *,
    optimizer: torch.optim.Optimizer,
) -> UpdateMetrics:
    """Make one optimiser step for each mini-batch of `batch`; `model` is changed in place.

    `model` must be in evaluation mode (dropout would falsify the ratio) with gradients enabled.
    """
    scorer = ResponseScorer(model, temperature=config.temperature)
    parameters = [item for item in model.parameters() if item.requires_grad]
    results = []
    for groups in batch.mini_batches(config.mini_batch_prompts):
        optimizer.zero_grad(set_to_none=True)
        result = accumulate_gradient(scorer, groups, config, device=model.device)
        for parameter in parameters:
            # An all-zero gradient is a gradient: AdamW's moments decay whether or not any
            # forward pass was needed.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        result.grad_norm = float(norm)
        if math.isfinite(result.grad_norm):
            optimizer.step()
        results.append(result)
    optimizer.zero_grad(set_to_none=True)
    return _summarise(results, learning_rate=float(optimizer.param_groups[0]["lr"]))


def accumulate_gradient(
    scorer: ResponseScorer,
    groups: Sequence[TrainingGroup],
    config: UpdateConfig,
    *,
    device: torch.device,
) -> _MiniBatchResult:
    """Add the gradient of one mini-batch's Eq. 9 to the parameters' `grad`."""
    num_tokens = sum(item.num_counted for group in groups for item in group.trajectories)
    result = _MiniBatchResult(num_tokens=num_tokens)
    trained = [
        [item for item in group.trajectories if _is_trained(item, config)] for group in groups
    ]
    micro_batches = plan_micro_batches(trained, max_tokens=config.max_tokens_per_micro_batch)
    for rows in micro_batches:
        micro_batch = build_micro_batch(rows).to(device)
        logprobs_N = scorer(micro_batch)
        loss, metrics = clipped_surrogate_loss(
            logprobs_N[:, None],
            micro_batch.old_logprobs[:, None],
            micro_batch.advantages,
            micro_batch.mask[:, None],
            config.clip_low,
            config.clip_high,
            normalizer=num_tokens,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        result.loss += float(loss.detach())
        result.clip_fraction_low += float(metrics["clip_fraction_low"])
        result.clip_fraction_high += float(metrics["clip_fraction_high"])
        result.num_trained_tokens += int(metrics["num_tokens"])
        _add_mismatch(result, logprobs_N.detach(), micro_batch)
    return result


def _is_trained(item: TrainingTrajectory, config: UpdateConfig) -> bool:
    if item.num_counted == 0:
        return False
    return item.advantage != 0.0 or not config.skip_zero_advantage


def _add_mismatch(result: _MiniBatchResult, logprobs_N: Tensor, micro_batch: MicroBatch) -> None:
    on_policy = micro_batch.mask & ~micro_batch.is_mixed
    log_ratio = (logprobs_N - micro_batch.old_logprobs)[on_policy].double()
    result.kl_sum += float((log_ratio.expm1() - log_ratio).sum())
    result.kl_tokens += log_ratio.numel()


def _summarise(results: Sequence[_MiniBatchResult], *, learning_rate: float) -> UpdateMetrics:
    weights = [result.num_tokens for result in results]
    finite = [item.grad_norm for item in results if math.isfinite(item.grad_norm)]
    first = results[0] if results else _MiniBatchResult(num_tokens=0)
    return UpdateMetrics(
        loss=_weighted([item.loss for item in results], weights),
        grad_norm=sum(finite) / len(finite) if finite else math.nan,
        clip_fraction_low=_weighted([item.clip_fraction_low for item in results], weights),
        clip_fraction_high=_weighted([item.clip_fraction_high for item in results], weights),
        mismatch_kl=first.kl_sum / first.kl_tokens if first.kl_tokens else math.nan,
        learning_rate=learning_rate,
        num_optimizer_steps=len(finite),
        num_skipped_steps=len(results) - len(finite),
        num_trained_tokens=sum(item.num_trained_tokens for item in results),
    )


def _weighted(values: Iterable[float], weights: Sequence[int]) -> float:
    total = sum(weights)
    if total == 0:
        return math.nan
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total
