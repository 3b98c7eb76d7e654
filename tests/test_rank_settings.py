"""Backends and ranks that cannot work together are refused when the settings are read."""

from __future__ import annotations

import pytest

from mentor_serve.actors.learner_options import rank_options
from mentor_serve.errors import ConfigError
from mentor_serve.settings import load_settings


def learner(**values: object) -> dict[str, object]:
    return {f"learner.{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (learner(num_learners=2), "num_learners.*must be 0"),
        (learner(backend="deepspeed"), "must be at least 1"),
        (learner(backend="rllib", num_learners=2, device="cuda"), "num_gpus_per_learner"),
        (learner(backend="rllib", num_learners=2, num_gpus_per_learner=1), "do not fit"),
        (learner(zero_offload="optimizer"), "need learner.backend = 'deepspeed'"),
        (learner(backend="rllib", zero_options={"overlap_comm": True}), "zero_options need"),
        (
            learner(backend="deepspeed", num_learners=1, zero_offload="parameters"),
            "zero_stage of at least 3, got 2",
        ),
        (
            learner(backend="deepspeed", num_learners=1, zero_offload="optimizer", zero_stage=0),
            "at least 1, got 0",
        ),
        (learner(backend="jax"), "learner.backend"),
        (learner(num_gpus_per_learner=2), "num_gpus_per_learner"),
    ],
)
def test_contradictions_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(overrides=values)


@pytest.mark.parametrize(
    "values",
    [
        learner(),
        learner(backend="rllib"),
        learner(backend="rllib", device="cuda"),
        learner(backend="rllib", num_learners=3),
        learner(backend="deepspeed", num_learners=2, device="cuda", num_gpus_per_learner=1),
        learner(backend="deepspeed", num_learners=2, zero_stage=3, zero_offload="parameters"),
    ],
)
def test_sensible_combinations_are_accepted(values: dict[str, object]) -> None:
    load_settings(overrides=values)


def test_every_setting_reaches_the_ranks() -> None:
    values = learner(
        backend="deepspeed",
        num_learners=2,
        num_cpus_per_learner=1.5,
        num_threads=3,
        rank_timeout_s=7.0,
        zero_stage=1,
        zero_offload="optimizer",
        zero_options={"allgather_bucket_size": 5},
    )
    options = rank_options(load_settings(overrides=values))
    assert (options.num_learners, options.num_cpus, options.num_gpus) == (2, 1.5, 0)
    assert (options.num_threads, options.call_timeout_s) == (3, 7.0)
    assert (options.zero_stage, options.zero_offload) == (1, "optimizer")
    assert options.zero_options == {"allgather_bucket_size": 5}
