"""Replays of real rollouts and updates: they agree, and a value that was changed is named."""

from __future__ import annotations

import dataclasses
import math
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from learner_samples import leased, leased_group, random_groups, tiny_model

from mentor_serve.engines import TorchEngine
from mentor_serve.errors import StoreError, WeightsError
from mentor_serve.learner import (
    AdvantageConfig,
    LearnerConfig,
    LoraOptions,
    TorchBackend,
    TrainingOptions,
    UpdateConfig,
    build_batch,
)
from mentor_serve.learner.checkpoint import TrainingState
from mentor_serve.learner.records import update_record
from mentor_serve.learner.replay import replay_rollouts, replay_update
from mentor_serve.learner.replay.rollouts import Sampled, exact_prefix
from mentor_serve.learner.replay.updates import StoredUpdate
from mentor_serve.store import TrajectoryRecord, VersionRecord
from mentor_serve.types import RolloutRequest, SamplingParams

GAMMA = 0.8
PROMPT = (1, 2, 3)


def row_of(item, *, expert_lost=False, **changes):
    """The row of `trajectories` that belongs to a trajectory's arrays."""
    values = {
        "id": item.trajectory_id,
        "group_id": "group-0",
        "task_id": "task",
        "kind": item.kind.value,
        "sample_index": item.sample_index,
        "status": "ok",
        "error": None,
        "reward": item.reward,
        "accuracy": item.accuracy,
        "format_score": item.format_score,
        "text": "",
        "num_prompt_tokens": len(item.prompt_token_ids),
        "num_tokens": len(item.token_ids),
        "num_gated": int(np.count_nonzero(item.sources)),
        "num_interventions": int(np.count_nonzero(item.sources == 2)),
        "mean_entropy": float(np.mean(item.entropies, dtype=np.float64)),
        "mean_weight": float(np.mean(item.weights, dtype=np.float64)),
        "min_policy_version": int(item.versions.min()),
        "max_policy_version": int(item.versions.max()),
        "stop_reason": "eos",
        "latency_s": 0.1,
        "seed": 0,
        "expert_lost": expert_lost,
        "created_at": datetime(2026, 1, 31, tzinfo=UTC),
        "source": "test",
        "prompt": "",
        "answer": "",
    }
    names = {field.name for field in dataclasses.fields(TrajectoryRecord)}
    values |= dict.fromkeys(names - values.keys())
    return TrajectoryRecord(**(values | changes))


def sampled_rollouts(*, swap_after=None, temperature=0.9, seed=3):
    """Trajectories of a real engine; weights change to version 1 after `swap_after` steps."""
    engine = TorchEngine(policy=tiny_model(0), expert=tiny_model(9), eos_token_ids=[])
    sampling = SamplingParams(temperature=temperature, max_new_tokens=14)
    for is_mixed in (False, True):
        engine.submit(
            RolloutRequest(
                prompt_token_ids=PROMPT,
                mixed=is_mixed,
                gamma=GAMMA,
                num_samples=3,
                seed=seed,
                sampling=sampling,
            )
        )
    finished, num_steps = {}, 0
    while engine.has_unfinished():
        for output in engine.step():
            if output.finished is not None:
                finished[output.request_id, output.sample_index] = output.finished
        num_steps += 1
        if num_steps == swap_after:
            engine.load_weights(tiny_model(1).state_dict(), version=1)
    items = []
    for (request, index), rollout in sorted(finished.items()):
        item = leased(
            rollout.token_ids,
            kind="on_policy" if request == min(finished)[0] else "mixed",
            reward=float(index % 2),
            index=index,
            logprobs=rollout.policy_logprobs,
            entropies=rollout.entropies,
            weights=rollout.weights,
            sources=rollout.sources,
        )
        items.append(dataclasses.replace(item, versions=rollout.policy_versions))
    return items


def replay(items, *, rows=None, load=None, **options):
    rows = rows or [row_of(item) for item in items]
    values = {
        "subject": "group",
        "load_version": load or (lambda version: tiny_model(version).eval()),
        "temperature": 0.9,
        "alpha": 0.5,
        "advantages": AdvantageConfig(),
        "tolerance": 1e-4,
    }
    group = dataclasses.replace(leased_group(items, prompt=PROMPT), gamma=GAMMA)
    sampled = [Sampled(trajectory=i, row=r) for i, r in zip(items, rows, strict=True)]
    return replay_rollouts(group, sampled, **(values | options))


def field_of(report, name):
    return next(field for field in report.fields if field.field == name)


def changed(item, field, position, by):
    values = getattr(item, field).copy()
    values[position] += by
    return dataclasses.replace(item, **{field: values})


def test_rollouts_of_the_engine_are_reproduced():
    items = sampled_rollouts()
    report = replay(items)
    assert report.is_equal, report.first
    assert report.versions == (0,)
    assert field_of(report, "policy_logprobs").num_compared == 6 * 14
    assert field_of(report, "weights").max_distance < 1e-4
    assert report.skipped == {}
    # The mixed rollouts are gated, so there is something that a wrong gamma would change.
    assert any(item.weights.max() > 0.5 for item in items)


def test_advantages_are_those_of_the_equations():
    items = sampled_rollouts()
    derived = replay(items).derived
    rewards = [0.0, 1.0, 0.0]
    deviation = math.sqrt(sum((r - 1 / 3) ** 2 for r in rewards) / 2)
    expected = [(r - 1 / 3) / deviation for r in rewards] + [0.0, 0.5 * (1 - 1 / 3), 0.0]
    assert [value["advantage"] for value in derived.values()] == pytest.approx(expected)


@pytest.mark.parametrize("field", ["policy_logprobs", "entropies", "weights"])
def test_a_changed_value_is_named_with_its_place(field):
    items = sampled_rollouts()
    victim = 4  # mixed, so that its weights mean something
    items[victim] = changed(items[victim], field, 5, 0.01)
    report = replay(items)
    first = report.first
    assert not report.is_equal
    assert (first.field, first.trajectory_id, first.position) == (field, "mixed-1", 5)
    assert first.version == 0
    assert first.stored == pytest.approx(float(getattr(items[victim], field)[5]))
    assert first.distance == pytest.approx(0.01, abs=1e-4)


def test_the_first_of_several_differences_is_the_one_that_is_named():
    items = sampled_rollouts()
    items[3] = changed(items[3], "policy_logprobs", 2, 1.0)
    items[1] = changed(items[1], "entropies", 7, 1.0)
    items[1] = changed(items[1], "policy_logprobs", 9, 1.0)
    report = replay(items)
    first = report.first
    assert (first.trajectory_id, first.position, first.field) == ("on_policy-1", 7, "entropies")
    assert field_of(report, "policy_logprobs").num_different == 2


def test_weights_of_another_version_are_found_out():
    report = replay(sampled_rollouts(), load=lambda version: tiny_model(version + 1).eval())
    assert not report.is_equal
    assert report.first.position == 0


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"tolerance": 0.0}])
def test_other_conditions_are_differences(options):
    assert not replay(sampled_rollouts(), **options).is_equal


def test_tokens_after_a_swap_have_no_verdict():
    items = sampled_rollouts(swap_after=6)
    spanning = [item for item in items if len(set(item.versions.tolist())) == 2]
    assert spanning
    report = replay(items)
    assert report.is_equal, report.first
    num_after = sum(int(np.count_nonzero(item.versions == 1)) for item in spanning)
    ((reason, count),) = report.skipped.items()
    assert "after a swap" in reason
    assert count == num_after == field_of(report, "policy_logprobs").num_skipped
    # They do differ: their keys and values came from the older weights.
    alone = [dataclasses.replace(i, versions=np.ones_like(i.versions)) for i in spanning]
    assert not replay(alone).is_equal


def test_what_is_exact_ends_with_the_first_other_version():
    versions = np.array([3, 3, 4, 3], np.int32)
    assert exact_prefix(versions).tolist() == [True, True, False, False]
    assert exact_prefix(versions[:0]).tolist() == []


def test_only_versions_with_a_verdict_are_needed():
    def load(version):
        if version == 1:
            raise WeightsError("version 1 is not kept")
        return tiny_model(version).eval()

    assert replay(sampled_rollouts(swap_after=6), load=load).is_equal
    items = [dataclasses.replace(i, versions=i.versions + 1) for i in sampled_rollouts()]
    with pytest.raises(WeightsError, match="version 1 is not kept"):
        replay(items, load=load)


def test_a_gate_closed_for_want_of_the_expert_is_no_difference():
    items = sampled_rollouts()
    item = items[4]
    closed = item.weights.copy()
    closed[6:] = 0.0
    items[4] = dataclasses.replace(item, weights=closed)
    rows = [row_of(i, expert_lost=i.trajectory_id == "mixed-1") for i in items]
    report = replay(items, rows=rows)
    assert report.is_equal
    assert report.skipped == {"gate closed because the expert was away": 8}
    assert not replay(items).is_equal


def test_trajectories_of_the_expert_have_nothing_of_the_policy_to_compare():
    items = sampled_rollouts()
    missing = np.full(3, np.nan, np.float32)
    expert = leased([4, 5, 6], kind="expert", reward=1.0, logprobs=missing, entropies=missing)
    rows = [row_of(item) for item in items] + [row_of(expert, mean_entropy=None)]
    report = replay([*items, expert], rows=rows)
    assert report.is_equal
    assert report.skipped == {"not recorded when it was sampled": 3}


def test_a_row_at_odds_with_its_arrays_is_a_difference():
    items = sampled_rollouts()
    rows = [row_of(item) for item in items]
    rows[2] = dataclasses.replace(rows[2], num_gated=rows[2].num_gated + 1)
    first = replay(items, rows=rows).first
    assert (first.field, first.trajectory_id, first.position) == ("num_gated", "on_policy-2", None)


def stored_update(*, config, options, seed=0, count=4):
    """An update that a backend really made, and the groups it was made of."""
    model = tiny_model(seed)
    groups = random_groups(model, count, seed=seed)
    before = VersionRecord(version=4, step=6, alpha=0.5, gamma=1.5)
    alpha = 0.5 * (1 + math.cos(math.pi * 6 / config.alpha_steps))
    batch = build_batch(
        groups,
        alpha=alpha,
        policy_version=4,
        config=config.advantages,
        keep_silent=not config.dynamic_sampling,
    )
    backend = TorchBackend(options)
    backend.build(model)
    metrics = backend.step(batch, config.update)
    gamma = batch.gamma(config.entropy_quantile, floor=config.gamma_floor, fallback=1.5)
    state = TrainingState(version=5, step=7, alpha=0.0, gamma=gamma, parent_version=4)
    record = update_record(
        batch, metrics, alpha=alpha, state=state, num_stale=0, wait_time_s=0.0, step_time_s=1.0
    )
    numbers = dataclasses.asdict(record).items()
    # As the store has it: NaN is NULL.
    nulls = {k: None for k, v in numbers if isinstance(v, float) and math.isnan(v)}
    return StoredUpdate(record=dataclasses.replace(record, **nulls), groups=groups, before=before)


def learner(*, mini_batch_prompts=4, **update):
    options = {"mini_batch_prompts": mini_batch_prompts} | update
    return LearnerConfig(prompts_per_step=4, update=UpdateConfig(**options))


def replayed(update, *, config, options=None, seed=0, tolerance=1e-5):
    return replay_update(
        update,
        tiny_model(seed),
        config=config,
        options=options or TrainingOptions(),
        tolerance=tolerance,
    )


UPDATES = {
    "plain": {},
    "recomputed": {"old_logprobs": "recomputed", "importance": "token", "importance_cap": 1.1},
    "micro": {"max_tokens_per_micro_batch": 40},
}


@pytest.mark.parametrize("options", UPDATES.values(), ids=UPDATES.keys())
def test_an_update_of_one_optimiser_step_is_reproduced(options):
    config = learner(**options)
    update = stored_update(config=config, options=TrainingOptions())
    report = replayed(update, config=config)
    assert report.is_equal, report.first
    compared = {field.field for field in report.fields if field.num_compared}
    assert {"loss", "grad_norm", "mismatch_kl", "alpha", "gamma", "entropy"} <= compared
    assert update.record.loss != 0
    assert update.record.mismatch_kl > 0


@pytest.mark.parametrize(
    "field", ["loss", "grad_norm", "mismatch_kl", "mean_reward_mixed", "gamma", "num_tokens"]
)
def test_a_changed_number_of_an_update_is_named(field):
    config = learner()
    update = stored_update(config=config, options=TrainingOptions())
    value = getattr(update.record, field)
    record = dataclasses.replace(update.record, **{field: value + 1})
    report = replayed(dataclasses.replace(update, record=record), config=config)
    assert report.first.field == field
    assert report.first.distance == pytest.approx(1.0, abs=1e-3)
    assert report.first.version == 4


def test_of_several_optimiser_steps_the_first_is_compared():
    config = learner(mini_batch_prompts=2)
    update = stored_update(config=config, options=TrainingOptions(learning_rate=0.1))
    report = replayed(update, config=config)
    assert report.is_equal, report.first
    fields = {field.field for field in report.fields}
    assert "mismatch_kl" in fields
    assert "loss" not in fields
    ((reason, count),) = report.skipped.items()
    assert "2 optimiser steps" in reason
    assert count == 6


def test_a_replay_changes_no_weight():
    config = learner()
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    update = stored_update(config=config, options=TrainingOptions())
    replay_update(update, model, config=config, options=TrainingOptions(), tolerance=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_update_of_adapters_is_compared_by_its_loss():
    pytest.importorskip("peft")
    config = learner()
    options = TrainingOptions(lora=LoraOptions(rank=2))
    update = stored_update(config=config, options=options)
    report = replayed(update, config=config, options=options)
    assert report.is_equal, report.first
    fields = {field.field for field in report.fields}
    assert "loss" in fields
    assert "grad_norm" not in fields


def test_groups_that_are_gone_are_an_error_that_says_so():
    config = learner()
    update = stored_update(config=config, options=TrainingOptions())
    empty = dataclasses.replace(update.groups[1], trajectories=[])
    groups = [update.groups[0], empty]
    with pytest.raises(StoreError, match="tokens of 1 of its groups are pruned"):
        replayed(dataclasses.replace(update, groups=groups), config=config)
    record = dataclasses.replace(update.record, num_skipped_steps=1)
    with pytest.raises(StoreError, match="left out 1 optimiser steps"):
        replayed(dataclasses.replace(update, record=record), config=config)
    # One group fewer than the update says: the first number that tells.
    report = replayed(dataclasses.replace(update, groups=update.groups[1:]), config=config)
    assert report.first.field == "num_groups"
