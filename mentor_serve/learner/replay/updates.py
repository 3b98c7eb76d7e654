"""An update's loss and numbers, computed again from its groups and the weights before it.

The first optimiser step of an update starts from weights that are kept as a snapshot. Later steps
start from weights that nobody keeps: of an update with several mini-batches the numbers of the
first are compared, as far as they are stored by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from transformers import PreTrainedModel

from mentor_serve.core.schedules import cosine_alpha
from mentor_serve.errors import StoreError
from mentor_serve.learner.batch import TrainingBatch, build_batch
from mentor_serve.learner.config import LearnerConfig, TrainingOptions
from mentor_serve.learner.logprobs import ResponseScorer
from mentor_serve.learner.replay.comparison import (
    FieldComparison,
    ReplayReport,
    compare_numbers,
)
from mentor_serve.learner.sharding import plan_update
from mentor_serve.learner.step import LocalDriver, UpdateMetrics, run_share, summarise
from mentor_serve.learner.trainable import Trainable
from mentor_serve.store.records import LeasedGroup, UpdateRecord, VersionRecord

_OF_FIRST = ("mismatch_kl", "effective_sample_share")
"""Stored numbers of the first mini-batch alone."""
_OF_ALL = (
    "loss",
    "clip_fraction_low",
    "clip_fraction_high",
    "truncated_weight_share",
    "num_trained_tokens",
)
"""Stored numbers over all mini-batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredUpdate:
    """What the store holds of an update."""

    record: UpdateRecord
    groups: Sequence[LeasedGroup]
    """Those it consumed."""
    before: VersionRecord
    """The version that it started from."""


def replay_update(
    update: StoredUpdate,
    model: PreTrainedModel,
    *,
    config: LearnerConfig,
    options: TrainingOptions,
    tolerance: float,
) -> ReplayReport:
    """Compute the update's first optimiser step again, without making it, and compare.

    Args:
        update: what is stored.
        model: the weights of `update.before`; they stay as they are.
        config: the learner's, as the run had it.
        options: how the model was held. Adapters are left out: merged, they give the same loss.
        tolerance: numbers agree within `tolerance * max(1, |stored|)`.

    Raises:
        StoreError: groups or their tokens are gone, or steps of the update were left out.
    """
    _check_whole(update)
    record, before = update.record, update.before
    batch = build_batch(
        update.groups,
        alpha=record.alpha,
        policy_version=before.version,
        config=config.advantages,
        keep_silent=not config.dynamic_sampling,
    )
    metrics = _first_step(model, batch, config=config, options=options)
    num_steps = len(list(batch.mini_batches(config.update.mini_batch_prompts)))
    skipped: dict[str, int] = {}
    names: tuple[str, ...] = _OF_FIRST
    if num_steps == 1:
        names += _OF_ALL
        # An adapter's gradient depends on the adapter, which the merged weights do not show.
        names += () if options.lora is not None else ("grad_norm",)
    else:
        reason = f"mean over {num_steps} optimiser steps, of which only the first can be repeated"
        skipped[reason] = len(_OF_ALL) + 1
    comparisons = _of_batch(update, batch, config, tolerance=tolerance)
    comparisons += compare_numbers(
        [(name, getattr(record, name), getattr(metrics, name)) for name in names],
        tolerance=tolerance,
        version=before.version,
    )
    return ReplayReport(
        subject=f"step {record.step}",
        versions=(before.version,),
        tolerance=tolerance,
        fields=tuple(comparisons),
        skipped=skipped,
        derived={"first optimiser step": _shown(metrics)},
    )


def _check_whole(update: StoredUpdate) -> None:
    step = update.record.step
    empty = [group.group_id for group in update.groups if not group.trajectories]
    if empty:
        raise StoreError(
            f"step {step}: the tokens of {len(empty)} of its groups are pruned, for instance of "
            f"{empty[0]}; choose a later step"
        )
    if update.record.num_skipped_steps:
        raise StoreError(
            f"step {step} left out {update.record.num_skipped_steps} optimiser steps, whose groups "
            "are marked as failed; which ones it had is not stored; choose another step"
        )


def _first_step(
    model: PreTrainedModel,
    batch: TrainingBatch,
    *,
    config: LearnerConfig,
    options: TrainingOptions,
) -> UpdateMetrics:
    trainable = Trainable(model, replace(options, lora=None))
    # The learner's own driver; with a rate of 0 its step changes nothing.
    optimizer = torch.optim.SGD(trainable.parameters, lr=0.0)
    driver = LocalDriver(optimizer, max_grad_norm=math.inf)
    scorer = ResponseScorer(
        trainable.model, temperature=config.update.temperature, autocast=options.autocast
    )
    (share,) = plan_update(batch, config.update, world_size=1)
    device = trainable.model.device
    sums = run_share(scorer, share[:1], config.update, device=device, driver=driver)
    driver.zero_grad()
    return summarise(sums, learning_rate=0.0)


def _of_batch(
    update: StoredUpdate, batch: TrainingBatch, config: LearnerConfig, *, tolerance: float
) -> list[FieldComparison]:
    """What the groups alone say, before any model: counts, rewards, guidance."""
    record, before = update.record, update.before
    pairs: list[tuple[str, float | None, float | None]] = [
        (name, getattr(record, name), value) for name, value in asdict(batch.metrics).items()
    ]
    alpha = cosine_alpha(before.step, config.alpha_steps, config.alpha_initial)
    gamma = batch.gamma(config.entropy_quantile, floor=config.gamma_floor, fallback=before.gamma)
    pairs += [("alpha", record.alpha, alpha), ("gamma", record.gamma, gamma)]
    return compare_numbers(pairs, tolerance=tolerance, version=before.version)


def _shown(metrics: UpdateMetrics) -> dict[str, float]:
    names = (*_OF_FIRST, *_OF_ALL, "grad_norm")
    values = {name: float(getattr(metrics, name)) for name in names}
    return {name: value for name, value in values.items() if math.isfinite(value)}
