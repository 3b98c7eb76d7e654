"""One update of mixed-policy GRPO on a torch model (paper, Eq. 9).

A mini-batch of groups is one optimiser step. Its loss is the clipped surrogate summed over all
tokens and divided by the number of ALL tokens of the mini-batch, whatever the micro-batches and the
ranks are. No KL term, no entropy term, no dropout. An optimiser step with a gradient that is not
finite is left out and counted, never applied.

`run_share` is what every rank of every backend runs; an `OptimizerDriver` is all that differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mentor_serve.core.corrections import effective_sample_share, importance_weights
from mentor_serve.core.losses import clipped_surrogate_loss, shaped_surrogate_loss
from mentor_serve.learner.batch import TrainingBatch
from mentor_serve.learner.config import UpdateConfig
from mentor_serve.learner.logprobs import ResponseScorer
from mentor_serve.learner.packing import MicroBatch
from mentor_serve.learner.sharding import RankShare, plan_update


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
    effective_sample_share: float
    """Kish's effective sample size of the same ratios over their number; 1 for fresh rollouts."""
    truncated_weight_share: float
    """Share of the trained tokens whose importance weight was above its cap."""
    learning_rate: float
    num_optimizer_steps: int
    num_skipped_steps: int
    """Optimiser steps left out because the gradient was not finite."""
    skipped_mini_batches: tuple[int, ...]
    """Which ones, from 0."""
    num_trained_tokens: int
    """Tokens that went through the model: those of trajectories with an advantage."""


@dataclass(slots=True, kw_only=True)
class MiniBatchSums:
    """One mini-batch on one rank. Add the ranks' with `joined`."""

    num_tokens: int
    """Of the whole mini-batch, over all ranks."""
    loss: float = 0.0
    clip_fraction_low: float = 0.0
    clip_fraction_high: float = 0.0
    num_trained_tokens: int = 0
    num_truncated_weights: int = 0
    kl: float = 0.0
    ratio: float = 0.0
    """Sum of r, policy at the time over recorded, of on-policy tokens; `kl` is of the same."""
    squared_ratio: float = 0.0
    num_compared: int = 0
    grad_norm: float = math.nan
    """The same on every rank."""

    @classmethod
    def joined(cls, parts: Sequence[MiniBatchSums]) -> MiniBatchSums:
        """The mini-batch over all ranks."""
        same = {"num_tokens", "grad_norm"}
        return cls(
            **{
                field.name: getattr(parts[0], field.name)
                if field.name in same
                else sum(getattr(part, field.name) for part in parts)
                for field in fields(cls)
            }
        )


Scorer = Callable[[MicroBatch], Tensor]
"""log pi_theta of each target with gradients, [N]: a `ResponseScorer`, or what goes through one."""


class MicroBatchLoss(Protocol):
    """What `micro_batch_loss` is."""

    def __call__(
        self,
        scorer: Scorer,
        micro_batch: MicroBatch,
        config: UpdateConfig,
        sums: MiniBatchSums,
        *,
        proximal_logprobs_N: Tensor | None = None,
    ) -> Tensor:
        """The micro-batch's part of the loss."""


class OptimizerDriver(Protocol):
    """How gradients become a step: the only part that backends differ in."""

    def zero_grad(self) -> None:
        """Forget all gradients."""

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Entered around forward and backward pass; `is_last` of the mini-batch."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""

    def finish(self) -> float:
        """Sum gradients over ranks, clip, step; or not, where they are not finite.

        Called once a mini-batch, also where it had no micro-batch. Returns the norm before
        clipping, equal on every rank.
        """


class LocalDriver:
    """`OptimizerDriver` of one process."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> None:
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self._parameters = [item for group in optimizer.param_groups for item in group["params"]]

    def zero_grad(self) -> None:
        """Free all gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Nothing to prepare."""
        del is_last
        yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate."""
        loss.backward()  # type: ignore[no-untyped-call]

    def finish(self) -> float:
        """Clip and step."""
        fill_gradients(self._parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm))
        if math.isfinite(norm):
            self._optimizer.step()
        return norm


def fill_gradients(parameters: Iterable[Tensor]) -> None:
    """Give every parameter a gradient.

    An all-zero gradient is a gradient: AdamW's moments decay whether or not any forward pass was
    needed.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def mixed_grpo_update(
    model: PreTrainedModel,
    batch: TrainingBatch,
    config: UpdateConfig,
    *,
    optimizer: torch.optim.Optimizer,
) -> UpdateMetrics:
    """Make one optimiser step for each mini-batch of `batch`; `model` is changed in place.

    `model` must be without dropout (it would falsify the ratio; see `learner.trainable`), with
    gradients enabled.
    """
    (share,) = plan_update(batch, config, world_size=1)
    scorer = ResponseScorer(model, temperature=config.temperature)
    driver = LocalDriver(optimizer, max_grad_norm=config.max_grad_norm)
    sums = run_share(scorer, share, config, device=model.device, driver=driver)
    driver.zero_grad()
    return summarise(sums, learning_rate=float(optimizer.param_groups[0]["lr"]))


def run_share(
    scorer: Scorer,
    share: RankShare,
    config: UpdateConfig,
    *,
    device: torch.device,
    driver: OptimizerDriver,
    compute_loss: MicroBatchLoss | None = None,
) -> list[MiniBatchSums]:
    """One rank's part of an update: one optimiser step for each mini-batch.

    `compute_loss` is `micro_batch_loss` unless a framework calls that from hooks of its own.
    """
    compute_loss = compute_loss or micro_batch_loss
    proximal = _proximal_logprobs(scorer, share, config, device=device)
    results = []
    for number, mini_batch in enumerate(share):
        driver.zero_grad()
        sums = MiniBatchSums(num_tokens=mini_batch.num_tokens)
        count = len(mini_batch.micro_batches)
        for index in range(count):
            micro_batch = mini_batch.build(index).to(device)
            given = proximal.get((number, index))
            with driver.micro_batch(is_last=index == count - 1):
                loss = compute_loss(scorer, micro_batch, config, sums, proximal_logprobs_N=given)
                driver.backward(loss)
        sums.grad_norm = driver.finish()
        results.append(sums)
    return results


@torch.no_grad()
def _proximal_logprobs(
    scorer: Scorer, share: RankShare, config: UpdateConfig, *, device: torch.device
) -> dict[tuple[int, int], Tensor]:
    """Log-probabilities under the weights before the update, by mini-batch and micro-batch.

    The first mini-batch runs under these weights anyway, so its own values serve.
    """
    if config.old_logprobs == "recorded":
        return {}
    return {
        (number, index): scorer(mini_batch.build(index).to(device))
        for number, mini_batch in enumerate(share[1:], start=1)
        for index in range(len(mini_batch.micro_batches))
    }


def micro_batch_loss(
    scorer: Scorer,
    micro_batch: MicroBatch,
    config: UpdateConfig,
    sums: MiniBatchSums,
    *,
    proximal_logprobs_N: Tensor | None = None,
) -> Tensor:
    """The micro-batch's part of the mini-batch's loss (0-d); its numbers are added to `sums`."""
    logprobs_N = scorer(micro_batch)
    own_N = micro_batch.mask & ~micro_batch.is_expert
    old_N, weights_N = micro_batch.old_logprobs, None
    if config.old_logprobs == "recomputed":
        proximal_N = logprobs_N.detach() if proximal_logprobs_N is None else proximal_logprobs_N
        is_replaced = own_N & ~micro_batch.keeps_old
        weights_N = _importance(proximal_N, micro_batch, is_replaced, config, sums)
        old_N = torch.where(is_replaced, proximal_N, old_N)
    loss, metrics = clipped_surrogate_loss(
        logprobs_N[:, None],
        old_N[:, None],
        micro_batch.advantages,
        own_N[:, None],
        config.clip_low,
        config.clip_high,
        normalizer=sums.num_tokens,
        token_weights_BT=None if weights_N is None else weights_N[:, None],
    )
    if bool(micro_batch.is_expert.any()):
        expert_loss, _ = shaped_surrogate_loss(
            logprobs_N[:, None],
            micro_batch.advantages,
            (micro_batch.mask & micro_batch.is_expert)[:, None],
            shaping=config.expert_shaping,
            normalizer=sums.num_tokens,
        )
        loss = loss + expert_loss
    loss = config.loss_scale * loss
    sums.loss += float(loss.detach())
    sums.clip_fraction_low += float(metrics["clip_fraction_low"])
    sums.clip_fraction_high += float(metrics["clip_fraction_high"])
    sums.num_trained_tokens += int(micro_batch.mask.sum())
    _compare(sums, logprobs_N.detach(), micro_batch)
    return loss


def _importance(
    proximal_N: Tensor,
    micro_batch: MicroBatch,
    is_replaced: Tensor,
    config: UpdateConfig,
    sums: MiniBatchSums,
) -> Tensor | None:
    """Weights of the tokens whose old log-probability is replaced; 1 for all others."""
    if config.importance == "none":
        return None
    arguments = (proximal_N, micro_batch.old_logprobs, micro_batch.sequences, is_replaced)
    weights_N = importance_weights(
        *arguments,
        level=config.importance,
        mode=config.importance_mode,
        cap=config.importance_cap,
    )
    unbounded_N = importance_weights(
        *arguments, level=config.importance, mode="clamp", cap=math.inf
    )
    sums.num_truncated_weights += int((unbounded_N > config.importance_cap).sum())
    return torch.where(is_replaced, weights_N, torch.ones_like(weights_N))


def _compare(sums: MiniBatchSums, logprobs_N: Tensor, micro_batch: MicroBatch) -> None:
    on_policy = micro_batch.mask & ~micro_batch.is_mixed & ~micro_batch.is_expert
    log_ratio = (logprobs_N - micro_batch.old_logprobs)[on_policy].double()
    ratio = log_ratio.exp()
    sums.kl += float((log_ratio.expm1() - log_ratio).sum())
    sums.ratio += float(ratio.sum())
    sums.squared_ratio += float(ratio.square().sum())
    sums.num_compared += log_ratio.numel()


def summarise(results: Sequence[MiniBatchSums], *, learning_rate: float) -> UpdateMetrics:
    """The update's metrics from its mini-batches, each joined over all ranks."""
    finite = [item.grad_norm for item in results if math.isfinite(item.grad_norm)]
    first = results[0] if results else MiniBatchSums(num_tokens=0)
    skipped = [i for i, item in enumerate(results) if not math.isfinite(item.grad_norm)]
    num_trained = sum(item.num_trained_tokens for item in results)
    num_truncated = sum(item.num_truncated_weights for item in results)
    return UpdateMetrics(
        loss=_weighted(results, "loss"),
        grad_norm=sum(finite) / len(finite) if finite else math.nan,
        clip_fraction_low=_weighted(results, "clip_fraction_low"),
        clip_fraction_high=_weighted(results, "clip_fraction_high"),
        mismatch_kl=first.kl / first.num_compared if first.num_compared else math.nan,
        effective_sample_share=effective_sample_share(
            first.ratio, first.squared_ratio, first.num_compared
        ),
        truncated_weight_share=num_truncated / num_trained if num_trained else math.nan,
        learning_rate=learning_rate,
        num_optimizer_steps=len(finite),
        num_skipped_steps=len(skipped),
        skipped_mini_batches=tuple(skipped),
        num_trained_tokens=num_trained,
    )


def _weighted(results: Sequence[MiniBatchSums], name: str) -> float:
    total = sum(item.num_tokens for item in results)
    if total == 0:
        return math.nan
    return float(sum(getattr(item, name) * item.num_tokens for item in results)) / total
