"""The backends that must agree, and what they are compared on."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np
import psutil
import ray
import torch
from learner_samples import leased, leased_group, random_groups, tiny_model

from mentor_serve.learner import TrainingOptions, UpdateConfig, build_batch
from mentor_serve.learner.backends import BackendName, RankOptions, build_backend

OPTIONS = TrainingOptions(learning_rate=1e-2)
UPDATE = UpdateConfig(mini_batch_prompts=6, max_tokens_per_micro_batch=24)
"""Two mini-batches of the twelve groups of `batch_of`, each several micro-batches on every rank."""


@dataclass(frozen=True)
class Case:
    """One backend with its ranks."""

    name: BackendName
    num_learners: int = 0
    zero_stage: int = 2

    def __str__(self):
        stage = f"-zero{self.zero_stage}" if self.name == "deepspeed" else ""
        return f"{self.name}-{self.num_learners}{stage}"

    def make(self, options=OPTIONS):
        """A backend without a model."""
        # Whatever is smaller than this many elements is never taken apart: all of a tiny model.
        zero3 = {"stage3_param_persistence_threshold": 0} if self.zero_stage == 3 else {}
        ranks = RankOptions(
            num_learners=self.num_learners,
            start_timeout_s=120.0,
            call_timeout_s=60.0,
            zero_stage=self.zero_stage,
            zero_options=zero3,
        )
        return build_backend(self.name, options, ranks)


CASES = [
    Case("torch"),
    Case("rllib", 0),
    Case("rllib", 2),
    Case("deepspeed", 2, 2),
    Case("deepspeed", 2, 3),
]
MORTAL = [Case("rllib", 2), Case("deepspeed", 2, 2)]
"""Those whose ranks the tests kill."""


def batch_of(seed=0, count=12, **options):
    """Ragged groups around the initial weights of `tiny_model()`."""
    groups = random_groups(tiny_model().eval(), count, seed=seed, **options)
    return build_batch(groups, alpha=0.5, policy_version=0)


def batch_without_gradient():
    """Like `batch_of`, but the first mini-batch's gradient is not finite."""
    groups = random_groups(tiny_model().eval(), 12)
    far = np.full(4, -1e30, np.float32)  # the ratio overflows, and Eq. 9 takes the larger loss
    groups[1] = leased_group(
        [
            leased([4, 5, 6, 7], reward=0.0, logprobs=far, index=0),
            leased([7, 6, 5, 4], reward=1.0, index=1),
        ],
        number=1,
    )
    return build_batch(groups, alpha=0.5, policy_version=0)


def batch_without_signal():
    """Like `batch_of`, but nothing in the first mini-batch has an advantage."""
    silent = [
        leased_group([leased([4], reward=1.0), leased([5], reward=1.0, index=1)], number=number)
        for number in range(6)
    ]
    groups = silent + random_groups(tiny_model().eval(), 12)[6:]
    return build_batch(groups, alpha=0.5, policy_version=0)


def assert_same_metrics(found, expected, *, tolerance=1e-4):
    """Float32 sums in another order: metrics of the second mini-batch follow its weights."""
    assert abs(found.loss - expected.loss) < tolerance
    assert abs(found.grad_norm - expected.grad_norm) < tolerance
    for name in ("num_trained_tokens", "num_optimizer_steps", "skipped_mini_batches"):
        assert getattr(found, name) == getattr(expected, name), name


def assert_same_weights(found, expected, *, tolerance=1e-5):
    """Weights of about 0.3 that moved by up to 0.01 a step: 1e-5 is a hundred roundings."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=0, msg=name)


def assert_identical(found, expected):
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def rank_pids(backend):
    """Process ids of the ranks, in their order."""
    actors = backend._group.actors
    return ray.get([item.__ray_call__.remote(lambda _: os.getpid()) for item in actors])


def wait_until_gone(pids, *, timeout_s=30.0):
    """Wait for processes to end."""
    deadline = time.monotonic() + timeout_s
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there after {timeout_s} s: {pids}"
        time.sleep(0.05)
